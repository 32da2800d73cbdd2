"""CUDA graphs: one launch instead of hundreds.

A small model's kernels take less time than the host needs to launch them one by one. A graph
records the launches once, with the memory that they read and write; a replay repeats them on what
that memory holds by then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, cuda, nn
from torch.distributed.fsdp import FSDPModule

from ops.transfer import on_device, pinned

SMALL = 1e9  # weights up to which the host takes longer to launch a kernel than a GPU to run it


class StepGraph:
    """Captures step() once; replay() runs it again on what its input tensors hold by then."""

    def __init__(self, step: Callable[[], Tensor]):
        # The first call compiles, the second one settles; neither may happen in the capture.
        side = cuda.Stream()
        with cuda.stream(side):
            step()
            step()
        side.synchronize()
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph):
            self.output = step()

    def replay(self) -> Tensor:
        """Run the step and return its output, which the next replay overwrites."""
        self.graph.replay()
        return self.output


def wanted(asked: bool | None, model: nn.Module) -> bool:
    """Return whether to launch a model's passes as graphs: as asked, else if it is small.

    Never if its layers wait for the GPU, or exchange weights with other processes.
    """
    if asked is None:
        asked = sum(p.numel() for p in model.parameters()) < SMALL
    return asked and not (model.syncs_host or isinstance(model, FSDPModule))


def is_gpu(device: torch.device) -> bool:
    """Return whether the device has graphs."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Captured:
    """A graph, and the memory that it reads its arguments from and writes its result to."""

    graph: cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the function's result for these tensors."""
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(pinned(tensor, place.device), non_blocking=True)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it


class Graphs:
    """Runs a function of tensors, as a CUDA graph for each set of shapes that comes again.

    The first call of some shapes runs the function as it is, which compiles what it needs; the
    second one captures it. What else it reads or writes, such as weights and gradients, has to stay
    where it is in memory; random numbers advance as without a graph. All graphs share memory that
    nothing else can use, about as much as the function itself needs; where that much is not free,
    there are none. enabled: whether to capture at all; never on a CPU.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.device, self.enabled = device, enabled and is_gpu(device)
        self.captured: dict[tuple, Captured | None] = {}  # by shapes; None: they came once
        self.needed: dict[tuple, int] = {}  # bytes beside what was there before, by shapes
        if self.enabled:
            # One stream for all, as memory that graphs share asks for.
            self.pool, self.stream = cuda.graph_pool_handle(), cuda.Stream(device)

    def run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return function(*tensors), always the same function; tensors may be on the host."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if graph := self.captured.get(shapes):
            return graph(tensors)
        here = [on_device(tensor, self.device) for tensor in tensors]
        if not self.enabled:
            return function(*here)
        if shapes not in self.captured:
            self.captured[shapes] = None
            return self.run_once(function, shapes, here)
        if not self.room_for(shapes):
            return self.give_up(function, here)
        try:
            graph = self.captured[shapes] = self.capture(function, here)
        except torch.OutOfMemoryError:  # another process was faster
            return self.give_up(function, here)
        return graph(here)

    def give_up(self, function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        """Return the function's result; from now on nothing is a graph."""
        print("graphs  no room for their memory: what they launched is launched one by one")
        self.enabled = False
        self.captured.clear()  # frees what they have
        return function(*tensors)

    def run_once(self, function, shapes: tuple, tensors: list[Tensor]) -> Tensor:
        """Return the function's result, and note how much memory it needs."""
        before = cuda.memory_allocated(self.device)
        # On the stream of the capture, because autograd keeps to the streams it has seen.
        self.stream.wait_stream(cuda.current_stream())
        with cuda.stream(self.stream):
            output = function(*tensors)
        cuda.current_stream().wait_stream(self.stream)
        # At most: the peak may be an earlier one.
        self.needed[shapes] = cuda.max_memory_allocated(self.device) - before
        return output.clone()

    def room_for(self, shapes: tuple) -> bool:
        """Return whether a graph of these shapes fits beside what the function itself needs."""
        graphs = (self.needed[s] for s, graph in self.captured.items() if graph)
        more = self.needed[shapes] - max(graphs, default=0)
        free, _ = cuda.mem_get_info(self.device)
        # A capture begins by emptying the allocator's own cache.
        free += cuda.memory_reserved(self.device) - cuda.memory_allocated(self.device)
        return 1.25 * more < free

    def capture(self, function: Callable[..., Tensor], tensors: list[Tensor]) -> Captured:
        """Return a graph of the function; nothing is computed yet."""
        inputs, graph = [tensor.clone() for tensor in tensors], cuda.CUDAGraph()
        self.stream.wait_stream(cuda.current_stream())
        # Other threads may go on to use the GPU's driver meanwhile.
        options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with cuda.graph(graph, **options):
            output = function(*inputs)
        return Captured(graph, inputs, output)
