"""What training keeps: the state that a resume needs, and the best epoch's weights.

A checkpoint is one safetensors file with what is trained, the optimizer's state and, in its header, the progress.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llama import Llama
from lora import save_adapter
from prepare.dataset import atomic_write


def trainable(model: Llama) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, another as it is. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
        with atomic_write(path, "wb") as file:
            save_file(tensors, file.name, metadata={"progress": json.dumps(progress)})
        for old in set(path.parent.iterdir()) - {path}:
            old.unlink()


def load_checkpoint(run: Path, model: Llama, optimizer, device: torch.device) -> dict | None:
    """Put the newest whole checkpoint into model and optimizer; return its progress, None where there is none."""
    for path in sorted((run / "checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            print(f"{path}: ignored, it is not whole ({error})")
            continue
        for key, tensor in tensors.items():
            kind, name = key.split("/")
            parameter = model.get_parameter(name)
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
        save_adapter(run / "adapter", tensors, args.lora, args.model)
    elif rank == 0:
        (run / "model").mkdir(exist_ok=True)
        for source in (*folder.glob("*config.json"), *folder.glob("tokenizer*")):
            shutil.copyfile(source, run / "model" / source.name)
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        with atomic_write(run / "model" / "model.safetensors", "wb") as file:
            save_file(tensors, file.name, metadata={"format": "pt"})
