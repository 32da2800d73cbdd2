"""LoRA (Hu et al., 2021): low-rank adapters on frozen linear layers, in PEFT's file format.

It knows no model: it meets one only through the `nn.Linear` modules that it wraps. A checkpoint's `q_proj` becomes
`q_proj.base_layer`, `q_proj.lora_A` and `q_proj.lora_B`, so an adapter's tensors bear the names that PEFT gives them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."  # what PEFT puts before the names of the wrapped model
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdapterError(ValueError):
    """An adapter that cannot be used: one line that names the file, field or tensor, and the way out."""


@dataclass(frozen=True)
class LoRAConfig:
    """Rank r, scaling alpha / r, dropout on the adapter's input, and the names of the linear layers to adapt."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ATTENTION


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) * B A dropout(x), with W (out, in) frozen, A (r, in) and B (out, r) trained.

    A starts as nn.Linear does and B at zero, so a new adapter changes nothing. A and B are kept in fp32 and applied in
    the dtype of x, which is what PEFT does under autocast. Once merged, W holds the adapter and A and B rest.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, config.r, **options)
        self.lora_B = nn.Linear(config.r, base.out_features, **options)
        self.scaling = config.alpha / config.r
        self.dropout = config.dropout
        self.merged = False
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.base_layer(x)
        if self.merged:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.weight.to(x.dtype))
        return y + F.linear(low * self.scaling, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merge(self, sign: int = 1) -> None:
        """Add the adapter to W (or take it out again with sign -1, up to W's rounding)."""
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise AdapterError(
                f"an adapter cannot be merged into {weight.dtype} weights; load the model without --int8"
            )
        if self.merged == (sign > 0):
            return
        delta = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        # Not in place: W may be a view of the checkpoint's file.
        self.base_layer.weight = nn.Parameter(
            (weight + sign * delta).to(weight.dtype), requires_grad=False
        )
        self.merged = sign > 0


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze model and wrap every linear layer whose name ends in one of config.targets; return model."""
    if config.r < 1:
        raise AdapterError(f"LoRA rank r is {config.r}, expected 1 or more")
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in names if name.split(".")[-1] in config.targets]
    if unmatched := [
        t for t in config.targets if not any(name.split(".")[-1] == t for name in chosen)
    ]:
        known = ", ".join(sorted({name.split(".")[-1] for name in names}))
        raise AdapterError(
            f"LoRA target {unmatched[0]!r} names no linear layer of the model (it has {known})"
        )
    for name in chosen:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LoRALinear(base, config))
    return model


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """Return the model's adapted layers."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge(model: nn.Module) -> None:
    """Merge every adapter into its layer's weight: inference then costs what the base model costs."""
    for layer in lora_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take every merged adapter out of its layer's weight again."""
    for layer in lora_layers(model):
        layer.merge(-1)


# ---- PEFT's file format: adapter_config.json and adapter_model.safetensors

# Fields of adapter_config.json that would change what the adapter computes; here they must be off.
_OFF = (
    *(
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    ),
    *(
        "layers_to_transform",
        "exclude_modules",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
    ),
)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's parameters under the names they have in the model."""
    return {
        name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    }


def save_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: LoRAConfig,
    base_model: str,
    write: Callable = save_file,
) -> None:
    """Write adapter_tensors (full tensors, on any device) and config to folder, as PEFT would.

    With a write that replaces the file at once, an interruption leaves the earlier adapter of this config or the new.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
    }
    path, text = folder / "adapter_config.json", json.dumps(record, indent=2).encode() + b"\n"
    if (
        path.is_file() and path.read_bytes() != text
    ):  # weights never stand beside a configuration that is not theirs
        path.unlink()
    write(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if not path.is_file():
        path.write_bytes(text)


def load_adapter_config(folder: Path) -> LoRAConfig:
    """Return the configuration of an adapter in PEFT's format; AdapterError for a kind that is not built here."""
    path = Path(folder) / "adapter_config.json"
    try:
        record = dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise AdapterError(
            f"{folder}: no adapter (no adapter_config.json); train.py makes one"
        ) from None
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: not a JSON object ({error})") from None
    plain = (("peft_type", "LORA"), ("bias", "none"))
    odd = [f for f in _OFF if record.get(f)] + [
        f for f, value in plain if record.get(f, value) != value
    ]
    targets = record.get("target_modules")
    odd += (
        []
        if isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        else ["target_modules"]
    )
    odd += [] if isinstance(record.get("r"), int) and 0 < record["r"] < 1 << 16 else ["r"]
    odd += [
        f
        for f in ("lora_alpha", "lora_dropout")
        if not isinstance(record.get(f, 0.0), (int, float))
    ]
    odd += [] if "lora_alpha" in record else ["lora_alpha"]
    if odd:
        raise AdapterError(
            f"{path}: {odd[0]} is {record.get(odd[0])!r}: only plain LoRA on a list of layers is read"
        )
    return LoRAConfig(
        record["r"], record["lora_alpha"], record.get("lora_dropout", 0.0), tuple(sorted(targets))
    )


def load_adapter(model: nn.Module, folder: Path) -> LoRAConfig:
    """Wrap model with the adapter of folder, by this project or PEFT; return its configuration.

    AdapterError where tensors are missing, left over or of another shape than the model and the configuration ask for,
    and where all of B is zero: such an adapter was never trained, or only a part of it was saved.
    """
    config = load_adapter_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    apply_lora(model, config)
    tensors = {PREFIX + name: p for name, p in adapter_tensors(model).items()}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names ^ tensors.keys()):
                where = "has no place in this model" if name in names else "is missing"
                raise AdapterError(
                    f"{path}: tensor {name} {where}; was the adapter trained on another model?"
                )
            for name, parameter in tensors.items():
                found = file.get_tensor(name)
                if not found.is_floating_point():
                    raise AdapterError(
                        f"{path}: tensor {name} holds {found.dtype}, expected floating point"
                    )
                if found.shape != parameter.shape:
                    shapes = f"{tuple(found.shape)}, expected {tuple(parameter.shape)}"
                    raise AdapterError(
                        f"{path}: tensor {name} has shape {shapes}; is it for another model or rank?"
                    )
                parameter.data.copy_(found)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short ({error})") from None
    if not any(layer.lora_B.weight.any() for layer in lora_layers(model)):
        raise AdapterError(
            f"{path}: every lora_B is zero, so the adapter changes nothing; train it again"
        )
    return config
