"""What training keeps: the state that a resume needs, and the weights of the best epoch.

A checkpoint is one safetensors file with the trained parameters, the optimizer's state and, in its
header, the progress.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from files.atomic import atomic_write
from launch.processes import ranks
from lora import LoRAConfig, save_adapter
from state.origin import write_origin
from trsr import InputError


@dataclass
class Progress:
    """How far a run is; a checkpoint keeps it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    batch: int = 0  # steps done of the epoch that is under way
    best: float = -1.0  # the best sum of validation recalls


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gather_full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, any other as it is. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; InputError says how much room it needs."""
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    try:
        with atomic_write(path, "wb") as file:
            save_file(tensors, file.name, metadata=metadata)
    except (SafetensorError, InputError) as error:
        why = f"{path}: not written; it needs {size / 2**20:.1f} MiB"
        raise InputError(f"{why}; the previous version is intact ({error})") from None


# ---- The checkpoint


def save_checkpoint(run: Path, model: nn.Module, optimizer, progress: Progress, rank: int) -> None:
    """Write the state after progress.step steps, then remove older ones."""
    tensors = {}
    for name, parameter in trainable(model).items():
        assert parameter in optimizer.state, f"{name} has no optimizer state"
        state = {"parameter": parameter.detach()} | optimizer.state[parameter]
        for key, tensor in state.items():
            tensors[f"{key}/{name}"] = gather_full(tensor).cpu().contiguous()

    if rank == 0:
        (run / "checkpoint").mkdir(exist_ok=True)
        path = run / "checkpoint" / f"step-{progress.step:08d}.safetensors"
        write_tensors(tensors, path, {"progress": json.dumps(asdict(progress))})
        for old in set(path.parent.iterdir()) - {path}:
            old.unlink()


def load_checkpoint(
    run: Path, model: nn.Module, optimizer, device: torch.device, show: bool = True
) -> Progress | None:
    """Restore model and optimizer from the newest intact checkpoint.

    Returns its progress, None if there is no checkpoint. show: name the files that are skipped.
    """
    for torn in (run / "checkpoint").glob(".*") if show else ():
        print(f"{torn}: ignored, its writing was interrupted")
    for path in sorted((run / "checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            progress, tensors = read_checkpoint(path, trainable(model))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if show:
                print(f"{path}: ignored, it is not intact ({error})")
            continue
        restore(tensors, trainable(model), optimizer, device)
        return progress
    return None


def epochs_done(run: Path) -> int | None:
    """Return the epochs that the newest intact checkpoint has behind it; None without one."""
    for path in sorted((run / "checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                return int(json.loads(file.metadata()["progress"])["epoch"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            continue
    return None


def read_checkpoint(
    path: Path, trained: dict[str, nn.Parameter]
) -> tuple[Progress, dict[str, Tensor]]:
    """Return (progress, tensors) of a checkpoint; raise if it is broken or of another model."""
    with safe_open(path, framework="pt") as file:
        progress = dict(json.loads(file.metadata()["progress"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    expected = {f"step/{name}": torch.Size() for name in trained}
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        expected |= {f"{kind}/{name}": p.shape for name, p in trained.items()}
    shapes = {key: t.shape for key, t in tensors.items() if t.is_floating_point()}
    if shapes != expected:
        raise KeyError("of another model")
    return Progress(**{field.name: progress[field.name] for field in fields(Progress)}), tensors


def restore(
    tensors: dict[str, Tensor], trained: dict[str, nn.Parameter], optimizer, device: torch.device
) -> None:
    """Copy a checkpoint's tensors into the parameters and the optimizer, sharded as those are."""
    for key, tensor in tensors.items():
        kind, name = key.split("/")
        parameter = trained[name]
        if isinstance(parameter, DTensor) and tensor.dim():
            mesh, placements = parameter.device_mesh, parameter.placements
            tensor = distribute_tensor(tensor.to(device), mesh, placements)
        if kind == "parameter":
            parameter.data.copy_(tensor)
        else:
            # The step counter is a scalar, which AdamW keeps on the CPU unless it is fused.
            here = tensor.dim() or optimizer.defaults["fused"]
            optimizer.state[parameter][kind] = tensor.to(device) if here else tensor


# ---- The best epoch


def save_best(
    run: Path,
    model: nn.Module,
    adapter: LoRAConfig | None,
    name: str,
    base: Path,
    dtype: str,
) -> None:
    """Write what evaluate.py needs: RUN/adapter, or without an adapter the whole RUN/model.

    name and base: the base model as the user named it, and its folder. Every process has to call
    it; the first one writes.
    """
    tensors = {key: gather_full(parameter) for key, parameter in trainable(model).items()}
    if ranks()[0] > 0:
        return
    if adapter:
        try:
            save_adapter(run / "adapter", tensors, adapter, name, write_tensors)
            write_origin(run)
        except OSError as error:
            what = f"{run / 'adapter'}: not written ({error})"
            raise InputError(f"{what}; the same command resumes") from None
    else:
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        save_model(run / "model", tensors, base, kind)


def save_model(folder: Path, tensors: dict[str, Tensor], base: Path, dtype: torch.dtype) -> None:
    """Write a model folder of its own: the tensors in dtype, and the base's other files."""
    folder.mkdir(exist_ok=True)
    for source in (*base.glob("*config.json"), *base.glob("tokenizer*")):
        with atomic_write(folder / source.name, "wb") as file:
            file.write(source.read_bytes())
    whole = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    write_tensors(whole, folder / "model.safetensors", {"format": "pt"})
