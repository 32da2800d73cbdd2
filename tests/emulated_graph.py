"""CUDA graphs on a CPU: what a capture records is each operation with the memory of its tensors.

A replay runs the operations again on that memory, so whatever a real graph would read where it was,
or write where nobody looks, the emulation does, too. What would make the host wait is refused, as a
capture refuses it.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Runs operations and records them; `undo` takes back what they did to older tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING:
            raise RuntimeError(f"aten.{name} waits for the device: not allowed in a capture")
        kwargs = kwargs or {}
        for place, argument in enumerate(function._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value) if written else ():
                if storage(tensor) not in self.made:
                    self.before.append((tensor, tensor.detach().clone()))

        result = function(*args, **kwargs)
        self.made |= {storage(t) for t in tensors_of(result)} - {
            storage(t) for t in tensors_of((args, kwargs))
        }
        self.calls.append((function, args, kwargs, result))
        return result

    def undo(self):
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.replays = [], 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                if storage(old) != storage(new):
                    old.copy_(new)


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Cuda:
    """Stands for torch.cuda; free: bytes that the device has left; cached: that torch holds."""

    Stream, CUDAGraph = Stream, Graph

    def __init__(self, needed=100, free=1000):
        self.needed, self.free, self.cached, self.graphs = needed, free, 0, []

    def graph_pool_handle(self):
        return 0, 1

    def current_stream(self):
        return Stream()

    def stream(self, _stream):
        return nullcontext()

    def memory_allocated(self, _device):
        return 0

    def memory_reserved(self, _device):
        return self.cached

    def max_memory_allocated(self, _device):
        return self.needed

    def mem_get_info(self, _device):
        return self.free, 10 * self.free

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ((0, 1), "thread_local")
        assert isinstance(stream, Stream)
        recorder = Recorder()
        with torch.random.fork_rng(devices=[]), recorder:
            yield
        recorder.undo()  # a capture computes nothing, and draws no random numbers
        graph.calls = recorder.calls
        self.graphs.append(graph)
