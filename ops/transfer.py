"""Tensors between host and GPU, without either waiting for what the other is busy with."""

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return tensor where a copy to device does not wait for the device's queue of work."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory()  # from pageable memory the driver would copy synchronously
    return tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return tensor on device without waiting for the device's queue of work."""
    return pinned(tensor, device).to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor on its way to the host, which waits for nothing issued after it."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.arrived = tensor, None
        if tensor.is_cuda:
            self.tensor = tensor.to("cpu", non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    @property
    def ready(self) -> bool:
        """Whether nothing has to be waited for."""
        return self.arrived is None or self.arrived.query()

    def tolist(self) -> list:
        """Wait for the copy and return it as lists."""
        if self.arrived:
            self.arrived.synchronize()
        return self.tensor.tolist()
