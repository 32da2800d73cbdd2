"""Write a Llama or Pythia of a given shape with random weights, for measurements and dry runs.

    python -m bench.random_model --shape small --tokenizer tokenizer.model --out runs/models/small
    python -m bench.random_model --shape pythia-1.4b --tokenizer tokenizer.json \\
        --out runs/models/pythia-1.4b

The weights are those that transformers would give a new model: normal with a standard deviation of
0.02, norms 1, biases 0. They are written as sharded safetensors.
"""

import json
import shutil
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.shapes import PYTHIA, SHAPES, config_of
from files.jsonl import write_json
from launch.command import option, parse_settings, run_main
from launch.numbers import positive, seed_number
from models.hub import build_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    shape: str = option(
        SUPPRESS, "shape of the model's layers", choices=SHAPES | PYTHIA, required=True
    )
    layers: int | None = option(None, "number of layers (unset: the shape's)", positive)
    tokenizer: Path = option(
        SUPPRESS, "the model's tokenizer.model or tokenizer.json", Path, required=True
    )
    out: Path = option(SUPPRESS, "model folder to write", Path, required=True)
    dtype: str = option("fp32", "type of the weights", choices=tuple(DTYPES))
    seed: int = option(0, "seed of the weights", seed_number)


def random_weights(model: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and new value, drawn on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            yield name, (drawn * 0.02).to(dtype).cpu()
        else:
            value = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(parameter.shape, value, dtype=dtype)


def write_model(
    out: Path, config: dict, dtype: torch.dtype, seed: int, shard_bytes: int = 4 << 30
) -> int:
    """Write config.json and random weights; return the number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    with torch.device("meta"):
        model = build_model(out)

    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    n_shards = held = total = 0

    def write_shard() -> None:
        nonlocal n_shards
        n_shards += 1
        name = f"model-{n_shards:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))

    for name, tensor in random_weights(model, dtype, seed):
        size = tensor.numel() * tensor.element_size()
        if held and held + size > shard_bytes:
            write_shard()
            shard.clear()
            held = 0
        shard[name] = tensor
        held, total = held + size, total + tensor.numel()
    write_shard()
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total


def main() -> None:
    """Write the model."""
    settings = parse_settings(Settings, __doc__)
    out, dtype = settings.out, DTYPES[settings.dtype]
    changes: dict = {"torch_dtype": str(dtype).split(".")[1]}
    if settings.layers:
        changes["num_hidden_layers"] = settings.layers
    total = write_model(out, config_of(settings.shape, **changes), dtype, settings.seed)
    kind = ".json" if settings.tokenizer.suffix == ".json" else ".model"
    shutil.copyfile(settings.tokenizer, out / f"tokenizer{kind}")
    made = {"shape": settings.shape, "parameters": total}
    print(json.dumps(made | {"dtype": settings.dtype, "folder": str(out)}))


if __name__ == "__main__":
    run_main(main)
