"""What training keeps: the state that a resume needs, and the best epoch's weights.

A checkpoint is one safetensors file with what is trained, the optimizer's state and, in its header, the progress.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llama import Llama
from lora import save_adapter
from prepare.dataset import atomic_write
from trsr import InputError


def trainable(model: Llama) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, another as it is. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; InputError tells how much room it needs."""
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    try:
        with atomic_write(path, "wb") as file:
            save_file(tensors, file.name, metadata=metadata)
    except (SafetensorError, InputError) as error:
        why = f"{path}: not written; it needs {size / 2**20:.1f} MiB; what was there before is whole"
        raise InputError(f"{why} ({error})") from None


def save_checkpoint(run: Path, model: Llama, optimizer, progress: dict, rank: int) -> None:
    """Write the state after progress["step"] steps, whole or not at all, then remove older ones."""
    tensors = {}
    for name, parameter in trainable(model).items():
        assert parameter in optimizer.state, f"{name} has no optimizer state"
        state = {"parameter": parameter.detach()} | optimizer.state[parameter]
        tensors |= {f"{key}/{name}": full(tensor).cpu().contiguous() for key, tensor in state.items()}
    if rank == 0:
        (run / "checkpoint").mkdir(exist_ok=True)
        path = run / "checkpoint" / f"step-{progress['step']:08d}.safetensors"
        write_tensors(tensors, path, {"progress": json.dumps(progress)})
        for old in set(path.parent.iterdir()) - {path}:
            old.unlink()


def load_checkpoint(run: Path, model: Llama, optimizer, device: torch.device, show: bool = True) -> dict | None:
    """Put the newest whole checkpoint into model and optimizer; return its progress, None where there is none.

    show: name what is passed over.
    """
    trained = trainable(model)
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    expected = {f"{kind}/{name}": p.shape for name, p in trained.items() for kind in kinds}
    expected |= {f"step/{name}": torch.Size() for name in trained}
    for torn in (run / "checkpoint").glob(".*") if show else ():
        print(f"{torn}: ignored, its writing was interrupted")
    for path in sorted((run / "checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                progress = dict(json.loads(file.metadata()["progress"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = {key: tensor.shape for key, tensor in tensors.items() if tensor.is_floating_point()}
            if shapes != expected or not progress.keys() >= {"step", "epoch", "batch", "best"}:
                raise KeyError("of another model")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if show:
                print(f"{path}: ignored, it is not whole ({error})")
            continue
        for key, tensor in tensors.items():
            kind, name = key.split("/")
            parameter = trained[name]
            if isinstance(parameter, DTensor) and tensor.dim():
                tensor = distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements)
            if kind == "parameter":
                parameter.data.copy_(tensor)
            else:
                optimizer.state[parameter][kind] = tensor.to(device) if tensor.dim() else tensor
        return progress
    return None


def save_best(run: Path, model: Llama, folder: Path, args, rank: int) -> None:
    """Write what evaluate.py needs: the adapter, or with --lora-r 0 the whole model as a folder of its own."""
    tensors = {name: full(parameter) for name, parameter in trainable(model).items()}
    if rank == 0 and args.lora_r:
        try:
            save_adapter(run / "adapter", tensors, args.lora, args.model, write_tensors)
        except OSError as error:
            raise InputError(f"{run / 'adapter'}: not written ({error}); the same command goes on") from None
    elif rank == 0:
        (run / "model").mkdir(exist_ok=True)
        for source in (*folder.glob("*config.json"), *folder.glob("tokenizer*")):
            with atomic_write(run / "model" / source.name, "wb") as file:
                file.write(source.read_bytes())
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        write_tensors(tensors, run / "model" / "model.safetensors", {"format": "pt"})
