"""launch/processes.py: sharing work out, working ahead, and one line for every failure."""

import os
import random
import signal
import socket
import subprocess
import threading

import pytest
import torch
from helpers import command, own_lines, wait_until

from launch.command import run_main
from launch.processes import all_reduce, gather, join_processes, prefetch, ranks, share_out
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


INTERRUPTED = "script: interrupted; finished work is kept, the same command resumes\n"


def made_of(cause):
    """Return the error that Python 3.11 makes of one that comes while it builds a class."""
    error = RuntimeError("Error calling __set_name__ on 'Field' instance")
    error.__cause__ = cause
    return error


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
        (KeyboardInterrupt(), 130, INTERRUPTED),
        (made_of(KeyboardInterrupt()), 130, INTERRUPTED),
    ],
    ids=["input", "disk", "memory", "interrupt", "wrapped"],
)
def test_a_script_ends_with_one_line(monkeypatch, capsys, run_script_here, error, status, line):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    assert (run_script_here(main), capsys.readouterr().err) == (status, line)


@pytest.mark.parametrize("cause", [None, ValueError("wrong")])
def test_an_error_of_the_program_is_no_interrupt(cause):
    def main():
        raise made_of(cause)

    with pytest.raises(RuntimeError, match="__set_name__"):
        run_main(main)


# ---- torchrun's environment, whole or not at all

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
WHOLE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def set_only(monkeypatch, variables):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "stray",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        WHOLE | {"RANK": "2"},
        WHOLE | {"MASTER_PORT": ""},
        WHOLE | {"RANK": "x"},
    ],
)
def test_what_another_job_has_left_over_is_one_process_and_a_line(monkeypatch, capsys, stray):
    set_only(monkeypatch, stray)
    assert join_processes()[:2] == (0, 1)
    assert "without the rest of torchrun's environment is ignored" in capsys.readouterr().err


def test_without_torchrun_nothing_is_said(monkeypatch, capsys):
    set_only(monkeypatch, {})
    assert join_processes()[:2] == (0, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rendezvous_that_does_not_come_ends_in_one_line(tmp_path, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = WHOLE | {"RANK": rank, "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "1"}
    line = command("train.py", run=tmp_path, timeout=2)
    done = subprocess.run(line, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 2
    (told,) = own_lines(done.stderr, "train")
    assert f"the 2 processes did not meet at 127.0.0.1:{port} within 2 seconds" in told
    assert not (tmp_path / "config.json").exists()


def test_a_signal_ends_the_wait_for_a_rendezvous(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = WHOLE | {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "1"}
    line = command("train.py", run=tmp_path, timeout=1000)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=os.environ | variables, **pipes) as process:

        def waits():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(waits, process)  # it holds the store that the others should come to
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in errors
