"""LoRA (Hu et al., 2021): low-rank adapters on frozen linear layers, in PEFT's file format.

It is independent of the model: it needs only the `nn.Linear` modules that it wraps. A checkpoint's
`q_proj` becomes `q_proj.base_layer`, `q_proj.lora_A` and `q_proj.lora_B`, so an adapter's tensors
have PEFT's names.
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
HEADS = ("lm_head", "embed_out")  # models read its weight directly, so it cannot be wrapped


class AdapterError(ValueError):
    """An adapter that cannot be used: one line that names the file or field, and a way out."""


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, scaling, dropout, and the names of the linear layers to adapt."""

    r: int = 8
    alpha: float = 16  # the adapter is scaled by alpha / r
    dropout: float = 0.05  # on the adapter's input
    targets: tuple[str, ...] = ATTENTION


# ---- The layer


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) * B A dropout(x), with W (out, in), A (r, in) and B (out, r).

    W is frozen; A and B are trained. A starts as an nn.Linear does and B at zero, so a new adapter
    changes nothing. Both are kept in fp32 and applied in the dtype of x, as PEFT does under
    autocast.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, config.r, **options)
        self.lora_B = nn.Linear(config.r, base.out_features, **options)
        self.scaling = config.alpha / config.r
        self.dropout = config.dropout
        self.merged = False  # once merged, W holds the adapter, and A and B rest
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # so that B A is zero at first
        self.train(base.training)  # a new module would start in training mode

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        y = self.base_layer(x)
        if self.merged:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A.weight.to(x.dtype))  # (..., r)
        return y + F.linear(low * self.scaling, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merge(self, sign: int = 1) -> None:
        """Add the adapter to W; with sign -1 take it out again, up to W's rounding."""
        weight = self.base_layer.weight
        if weight.itemsize < 2:  # int8, and fp8, which torch counts as floating point
            what = f"an adapter cannot be merged into {weight.dtype} weights"
            raise AdapterError(f"{what}; load the model without --int8 and --fp8")
        if self.merged == (sign > 0):  # nothing to do; merging twice would add it twice
            return
        delta = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        # Not in place, because W may be a view of the checkpoint's file.
        merged = (weight + sign * delta).to(weight.dtype)
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = sign > 0


# ---- The model


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze model and wrap every linear layer that a target names; return model.

    As in PEFT, a target is a layer's full name or the end of it. Raises AdapterError for a rank
    below 1, for a target that names no layer, and for the output head.
    """
    if config.r < 1:
        raise AdapterError(f"LoRA rank r is {config.r}, expected 1 or more")
    model.requires_grad_(False)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in HEADS}
    chosen = set()
    for target in config.targets:
        named = {name for name in linear if f".{name}".endswith(f".{target}")}
        if target in HEADS:
            raise AdapterError(f"LoRA target {target!r}: the output head cannot be adapted here")
        if not named:
            known = ", ".join(sorted({name.split(".")[-1] for name in linear}))
            what = f"LoRA target {target!r} names no linear layer of the model"
            raise AdapterError(f"{what} (it has {known})")
        chosen |= named

    for name in (name for name in linear if name in chosen):  # in order, for the random start
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear[name], config))
    return model


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """Return the model's adapted layers."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge(model: nn.Module, sign: int = 1) -> None:
    """Merge every adapter into its layer's weight, so that inference costs what the base does.

    With sign -1, take them out again.
    """
    for layer in lora_layers(model):
        layer.merge(sign)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's parameters, under the names that they have in the model."""
    pairs = model.named_parameters()
    return {name: p for name, p in pairs if ".lora_A." in name or ".lora_B." in name}


# ---- PEFT's file format: adapter_config.json and adapter_model.safetensors

# Fields of adapter_config.json that say nothing about what the adapter computes. Any other field
# but those that load_adapter_config reads has to be absent, null, false or empty.
_HARMLESS = (
    *("peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "eva_config"),
)
_PLAIN_STARTS = (True, "true", None, False, "gaussian", "eva", "orthogonal")  # W stays as it is


def save_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    config: LoRAConfig,
    base_model: str,
    write: Callable = save_file,
) -> None:
    """Write adapter_tensors (whole, on any device) and config to folder, as PEFT would.

    If write replaces its file atomically, an interruption leaves the earlier adapter of the same
    configuration, or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT and vLLM look tensors up by these names.
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

    # A different configuration is removed first and the new one written last, so that weights are
    # never beside a configuration that is not theirs.
    path, text = folder / "adapter_config.json", json.dumps(record, indent=2).encode() + b"\n"
    if path.is_file() and path.read_bytes() != text:
        path.unlink()
    write(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if not path.is_file():
        path.write_bytes(text)


def load_adapter_config(folder: Path) -> LoRAConfig:
    """Return the configuration of an adapter in PEFT's format.

    Raises AdapterError for a field with a value that is not built here.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        record = dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        what = "no adapter (no adapter_config.json)"
        raise AdapterError(f"{folder}: {what}; train.py makes one") from None
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: not a JSON object ({error})") from None

    r, alpha, targets = (record.get(name) for name in ("r", "lora_alpha", "target_modules"))
    dropout, start = record.get("lora_dropout", 0.0), record.get("init_lora_weights")
    listed = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    usable = {
        "peft_type": record.get("peft_type", "LORA") == "LORA",
        "bias": record.get("bias", "none") == "none",
        "target_modules": listed and bool(targets),
        "r": type(r) is int and 0 < r < 1 << 16,
        "lora_alpha": type(alpha) in (int, float) and math.isfinite(alpha) and alpha != 0,
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "init_lora_weights": start in _PLAIN_STARTS and type(start) is not int,
        "use_rslora": type(record.get("use_rslora", False)) is bool,
    }
    for field in (*usable, *record.keys() - usable.keys() - {*_HARMLESS}):
        value = record.get(field)
        off = value is None or value is False or value in ("", [], {})
        if not usable.get(field, off):
            what = f"{field} is {value!r}"
            raise AdapterError(f"{path}: {what}: only plain LoRA on a list of layers is read")
    # Rank-stabilized LoRA (Kalajdzievski, 2023) differs in the scaling alone: alpha / sqrt(r).
    scaled = alpha * math.sqrt(r) if record.get("use_rslora") else alpha
    return LoRAConfig(r, scaled, dropout, tuple(sorted(targets)))


def load_adapter(model: nn.Module, folder: Path) -> LoRAConfig:
    """Wrap model with the adapter of folder, written by this project or PEFT; return its config.

    Raises AdapterError if tensors are missing, left over or of another shape than the model and the
    configuration ask for, and if all of B is zero: then the adapter was never trained, or only a
    part of it was saved.
    """
    config = load_adapter_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    apply_lora(model, config)  # its tensors, still at their start, say what the file must hold
    expected = {PREFIX + name: p for name, p in adapter_tensors(model).items()}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names ^ expected.keys()):
                where = "has no place in this model" if name in names else "is missing"
                hint = "was the adapter trained on another model?"
                raise AdapterError(f"{path}: tensor {name} {where}; {hint}")
            for name, parameter in expected.items():
                parameter.data.copy_(checked(path, name, file.get_tensor(name), parameter.shape))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short ({error})") from None

    if not any(layer.lora_B.weight.any() for layer in lora_layers(model)):
        what = "every lora_B is zero, so the adapter changes nothing"
        raise AdapterError(f"{path}: {what}; train it again")
    return config


def checked(path: Path, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of the adapter file; AdapterError unless it has that shape and floats."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:  # fp8 would need its scales
        what = f"holds {tensor.dtype}, expected floating point in 16 bit or more"
        raise AdapterError(f"{path}: tensor {name} {what}")
    if tensor.shape != shape:
        what = f"has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        raise AdapterError(f"{path}: tensor {name} {what}; is it for another model or rank?")
    return tensor
