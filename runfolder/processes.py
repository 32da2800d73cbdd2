"""What the scripts share around torch.distributed: each of them runs alone and under torchrun."""

import os
import re
import resource
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from llama import CheckpointError
from lora import AdapterError
from runfolder.command import run_main
from trsr import InputError


def join_processes() -> tuple[int, int, torch.device]:
    """Return this process's rank, the number of processes and its device; under torchrun, meet the others first."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        sys.setswitchinterval(0.0005)  # or each launch of a kernel waits up to 5 ms for the thread of `ahead`
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # torchrun's store lives on when it restarts the processes, with the addresses of those that are gone.
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # A process may finish its users long before the others.
        options = {"store": store, "rank": rank, "world_size": world, "timeout": timedelta(hours=12)}
        dist.init_process_group(backend, **options)
    return rank, world, device


def gather(value: object) -> list:
    """Return the value that each process passes, in the order of their ranks. Every process must call it."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process had in use at once: of its GPU, or on a CPU of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"


def host_workers(device: torch.device) -> int:
    """Return how many processes tokenize while a GPU works; a CPU has its hands full."""
    return min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if device.type == "cuda" else 0


def share_out(sizes: list[int], shares: int) -> list[list[int]]:
    """Return the indices of sizes in `shares` groups of about equal sum: the largest first, to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(i)
        loads[lightest] += sizes[i]
    return groups


def ahead(items: Iterator, n: int = 8) -> Iterator:
    """Yield items, while a thread makes the next n: some take long, as the first of users packed together."""
    pool = ThreadPoolExecutor(1)
    try:
        due = deque(pool.submit(next, items, None) for _ in range(n))
        # Whoever still had the future when it raises would be a cycle with the error, and keep all that items holds.
        while (item := due.popleft().result()) is not None:
            due.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def first_to_fail() -> bool:
    """Return whether this process is the first that fails, and so the one to say it."""
    if not dist.is_initialized():  # before they meet, all fail alike
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except dist.DistError:  # the store is gone, and with it whoever told
        return False


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main, alone or as one of several processes: an error is one line, told by one of them."""

    def guarded() -> None:
        try:
            main()
        except torch.OutOfMemoryError:
            way = "lower --pack-tokens or --batch-size, or free the memory that others use"
            raise InputError(f"out of memory on the device; {way}") from None
        except RuntimeError as error:
            # What is left of a process that was killed is a broken connection at the others.
            broken = re.search("Connection (closed|reset|refused)|Broken pipe", str(error))
            lost = broken or isinstance(error, dist.DistError)
            if not (dist.is_initialized() and lost):
                raise
            raise InputError("another process has ended, so none can go on; the same command resumes") from None
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):  # torchrun's is not to break off what ends already
                signal.signal(number, signal.SIG_IGN)

    status = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run_main(guarded, CheckpointError, AdapterError, tells=first_to_fail)
    except SystemExit as end:
        status = end.code
    if not dist.is_initialized():
        sys.exit(status)
    # The usual way out aborts now and then in a thread of the process group, and waits for processes that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
