"""Write a Llama or Pythia of a given shape with random weights as sharded safetensors, for measurements and dry runs.

    python -m bench.random_model --shape small --tokenizer tokenizer.model --out runs/models/small
    python -m bench.random_model --shape llama-2-7b --tokenizer tokenizer.model --out runs/models/llama-2-7b
    python -m bench.random_model --shape pythia-1.4b --tokenizer tokenizer.json --out runs/models/pythia-1.4b

The weights are drawn as a fresh transformers model draws them (normal, standard deviation 0.02; norms at 1, biases 0).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from files.jsonl import write_json
from launch.command import run_main
from models.hub import build_model


def shape(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict:
    """Return the fields of config.json that make a shape."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "tie_word_embeddings",
    )
    return dict(zip(names, (hidden, intermediate, layers, heads, tied), strict=True))


SHAPES = {
    "small": shape(192, 512, 4, 6, tied=True),
    "100m": shape(768, 2048, 12, 12, tied=True),
    "llama-2-7b": shape(4096, 11008, 32, 32),
    "llama-2-13b": shape(5120, 13824, 40, 40),
    "llama-30b": shape(6656, 17920, 60, 52),
}
PYTHIA = {"pythia-1.4b": shape(2048, 8192, 24, 16), "pythia-2.8b": shape(2560, 10240, 32, 32)}


def config_of(name: str, **changes) -> dict:
    """Return the config.json of a shape: Llama 2's other fields, or Pythia's."""
    if name in PYTHIA:
        config = {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_act": "gelu",
        }
        config |= {
            "vocab_size": 50304,
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
        }
        config |= {"use_parallel_residual": True, "bos_token_id": 0, "eos_token_id": 0}
    else:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
        }
        config |= {"vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    return config | {"max_position_embeddings": 2048} | (SHAPES | PYTHIA)[name] | changes


def write_model(
    out: Path, config: dict, dtype: torch.dtype, seed: int, shard_bytes: int = 4 << 30
) -> int:
    """Write config.json and the weights, drawn on a GPU where there is one; return the number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    with torch.device("meta"):
        model = build_model(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shards: list[dict] = [{}]
    weight_map, held, total = {}, 0, 0

    def write_shard() -> None:
        save_file(
            shards[-1], out / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"}
        )
        weight_map.update(dict.fromkeys(shards[-1], f"model-{len(shards):05d}.safetensors"))

    for name, parameter in model.named_parameters():
        tensor = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        if parameter.dim() > 1:
            tensor = (
                (torch.randn(parameter.shape, generator=generator, device=device) * 0.02)
                .to(dtype)
                .cpu()
            )
        size = tensor.numel() * tensor.element_size()
        if held and held + size > shard_bytes:
            write_shard()
            shards[-1].clear()
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held, total = held + size, total + tensor.numel()
    write_shard()
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES | PYTHIA, required=True)
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="the model's tokenizer.model or .json"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    changes = {"torch_dtype": str(dtype).split(".")[1]} | (
        {"num_hidden_layers": args.layers} if args.layers else {}
    )
    total = write_model(args.out, config_of(args.shape, **changes), dtype, args.seed)
    shutil.copyfile(
        args.tokenizer,
        args.out / f"tokenizer{'.json' if args.tokenizer.suffix == '.json' else '.model'}",
    )
    print(
        json.dumps(
            {"shape": args.shape, "parameters": total, "dtype": args.dtype, "folder": str(args.out)}
        )
    )


if __name__ == "__main__":
    run_main(main)
