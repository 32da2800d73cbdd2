"""launch/processes.py: sharing work out, working ahead, and one line for every failure."""

import random
import threading

import pytest
import torch

from launch.processes import all_reduce, gather, prefetch, ranks, share_out
from trsr import InputError


def test_users_are_shared_out_evenly():
    rng = random.Random(0)
    sizes = [rng.randint(200, 900) for _ in range(64)]
    groups = share_out(sizes, 8)
    assert sorted(i for group in groups for i in group) == list(range(64))
    loads = [sum(sizes[i] for i in group) for group in groups]
    assert max(loads) < 1.05 * sum(sizes) / 8
    assert share_out([5], 3) == [[0], [], []]


def test_a_process_alone_gathers_and_reduces_its_own():
    assert ranks() == (0, 1)
    assert gather("x") == ["x"]
    assert all_reduce(3.5, torch.device("cpu")) == 3.5


def test_items_are_made_ahead_in_another_thread_and_come_in_order():
    made, third = [], threading.Event()

    def items():
        for n in range(20):
            made.append(threading.current_thread())
            if n == 2:
                third.set()
            yield n

    found = prefetch(items(), n=3)
    assert next(found) == 0
    assert third.wait(60)  # two more are made while the first one is in use
    assert [0, *found] == list(range(20))
    assert threading.main_thread() not in made


def test_an_error_of_what_is_made_ahead_arrives_in_its_place():
    def items():
        yield 1
        raise InputError("no room")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(InputError, match="no room"):
        next(found)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("--x: no"), 2, "script: --x: no\n"),
        (OSError(28, "No space left on device"), 2, "script: [Errno 28] No space left on device\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "script: out of memory on the device; lower --pack-tokens or --batch-size, "
            "or free the memory that others use\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "script: interrupted; finished work is kept, the same command resumes\n",
        ),
    ],
    ids=["input", "disk", "memory", "interrupt"],
)
def test_a_script_ends_with_one_line(monkeypatch, capsys, run_script_here, error, status, line):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    assert (run_script_here(main), capsys.readouterr().err) == (status, line)
