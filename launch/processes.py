"""What the scripts share around torch.distributed: each runs alone and under torchrun."""

import os
import re
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist

from launch.command import run_main, torchrun_variables
from llama import CheckpointError
from lora import AdapterError
from trsr import InputError

# ---- Several processes


def join_processes(timeout: float = 600.0) -> tuple[int, int, torch.device]:
    """Return (rank, number of processes, device); under torchrun, meet the others first.

    Raises InputError if the others do not come within timeout seconds. Variables that are only a
    part of torchrun's environment, left over from another job, are named and ignored.
    """
    found = torchrun_variables()
    rank, world = found.get("RANK", 0), found.get("WORLD_SIZE", 1)
    strays = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if strays and not found:
        what = f"{' and '.join(strays)} without the rest of torchrun's environment"
        print(f"one process: {what} is ignored", file=sys.stderr)
    device = torch.device("cpu")
    torch.set_num_threads(allowed_threads(torch.get_num_threads()))
    if torch.cuda.is_available():
        device = torch.device("cuda", found.get("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
        # Otherwise each kernel launch can wait up to 5 ms for the thread of `prefetch`.
        sys.setswitchinterval(0.0005)
    if world == 1 or dist.is_initialized():
        return rank, world, device

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=meet(world, timeout),
        rank=rank,
        world_size=world,
        timeout=timedelta(hours=12),  # a process may finish its users long before the others
    )
    return rank, world, device


def meet(world: int, timeout: float) -> dist.Store:
    """Return the store that all processes share, once all of them have come to it.

    The waiting is done in a thread, because the main thread could not be interrupted meanwhile.
    """
    found: list = []

    def wait() -> None:
        try:
            limit = timedelta(seconds=timeout)
            store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
            # torchrun's store outlives a restart, with the addresses of processes that are gone.
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"start {restarts}", store)
            store.set(f"came {rank}", "")
            store.wait([f"came {other}" for other in range(world)], limit)
            found.append(store)
        except Exception as error:  # raised again where it can end the script
            found.append(error)

    thread = Thread(target=wait, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout + 5
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.2)
    if not found or isinstance(found[0], Exception):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = f"the {world} processes did not meet at {address} within {timeout:g} seconds"
        raise InputError(f"{what}; start all of them, with torchrun, or raise --timeout")
    return found[0]


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: object) -> list:
    """Return the values of all processes, in rank order. Every process has to call it."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def same_bits(always: bool) -> None:
    """Say whether equal inputs are to give equal bits, before the first matrix product.

    Otherwise the threads of a CPU, or a GPU's blocks, add gradients of equal rows as they come.
    """
    if always:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(always)
    torch.utils.deterministic.fill_uninitialized_memory = False


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Make every process's gradients the sum over all, in one message."""
    # One large message is faster than many small ones.
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in parameters])
    for parameter, grad in zip(parameters, parts, strict=True):
        parameter.grad.copy_(grad.view_as(parameter))  # in place, since graphs write there


def all_reduce(value: float, device: torch.device, op=dist.ReduceOp.SUM) -> float:
    """Return a number reduced over the processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def share_out(sizes: list[int], shares: int) -> list[list[int]]:
    """Return the indices of sizes in `shares` groups of about equal sum.

    Longest processing time first: the largest size left goes to the lightest group.
    """
    groups: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(i)
        loads[lightest] += sizes[i]
    return groups


# ---- Resources of one process

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def allowed_threads(threads: int, path: Path = QUOTA) -> int:
    """Return how many of torch's threads to use: in a container, no more than its share of cores.

    A number in OMP_NUM_THREADS is the user's, and stays.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    try:
        most, period = path.read_text().split()
        return max(1, min(threads, round(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        return threads


def peak_memory(device: torch.device) -> str:
    """Return the peak memory of this process: of its GPU, or on a CPU of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    return f"{peak / 2**20:.2f} GiB of memory"


def host_workers(device: torch.device) -> int:
    """Return how many processes tokenize while a GPU computes; 0 on a CPU, which is busy itself."""
    if device.type != "cuda":
        return 0
    local = torchrun_variables().get("LOCAL_WORLD_SIZE", 1)
    return min(8, (os.cpu_count() or 1) // local)


def prefetch(items: Iterator, n: int = 8) -> Iterator:
    """Yield items while a thread makes the next n, because some take long to make."""
    pool = ThreadPoolExecutor(1)
    try:
        due = deque(pool.submit(next, items, None) for _ in range(n))
        # The future is not kept in a variable: together with the error that it raises it would be
        # a reference cycle, which keeps alive all that items holds.
        while (item := due.popleft().result()) is not None:
            due.append(pool.submit(next, items, None))
            yield item
    finally:
        # Without waiting: whatever collects garbage may be what closes this, in any thread.
        pool.shutdown(wait=False, cancel_futures=True)


# ---- The end of a script


def first_to_fail() -> bool:
    """Return whether this process is the first to fail, and so the one that reports."""
    if not dist.is_initialized():  # until the processes meet, all of a machine fail alike
        return torchrun_variables().get("LOCAL_RANK", 0) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except dist.DistError:  # the store is gone, and with it the process that reported
        return False


def explain_failure(main: Callable[[], None]) -> None:
    """Run main; turn the failures of a device or of another process into InputError."""
    try:
        main()
    except torch.OutOfMemoryError:
        way = "lower --pack-tokens or --batch-size, or free the memory that others use"
        raise InputError(f"out of memory on the device; {way}") from None
    except RuntimeError as error:
        # A process that was killed leaves a broken connection to the others.
        broken = re.search("Connection (closed|reset|refused)|Broken pipe", str(error))
        lost = broken or isinstance(error, dist.DistError)
        if not (dist.is_initialized() and lost):
            raise
        what = "another process has ended, so this one cannot continue"
        raise InputError(f"{what}; the same command resumes") from None
    finally:
        # torchrun signals the remaining processes; what is ending anyway is not to be cut short.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main, alone or as one of several processes: one of them reports an error."""
    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        run_main(
            lambda: explain_failure(main), CheckpointError, AdapterError, reports=first_to_fail
        )
    except SystemExit as end:
        status = end.code
    if not dist.is_initialized():
        sys.exit(status)

    # A normal exit sometimes aborts in a thread of the process group, and waits for processes that
    # are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
