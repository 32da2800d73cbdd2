"""launch/progress.py: what a training tells, when, and the forecast after ten steps."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU

from files.jsonl import read_jsonl
from launch.progress import StepBar, StepLog
from ops.transfer import HostCopy
from train import Outcome, Settings
from trsr import Example, InputError


def test_after_ten_steps_the_bar_foresees_an_epoch(capsys):
    bar = StepBar(total=20, done=4, tokens_per_epoch=60_000, device=CPU)
    for speed in (10.0, *[500.0] * 9):  # the first step is slow, and the median ignores it
        assert "after ten steps" not in capsys.readouterr().out
        bar.step(1, 0.25, 1e-4, speed)
    assert "after ten steps 500 tokens/s: 2.0 minutes per epoch" in capsys.readouterr().out
    assert (bar.bar.n, bar.bar.total) == (14, 20)
    assert bar.bar.postfix.startswith("epoch 1, loss 0.2500, lr 0.0001, 500 tokens/s, ")
    assert bar.bar.postfix.endswith(" GiB of memory")
    bar.step(1, 0.25, 1e-4, 500.0)
    assert "after ten steps" not in capsys.readouterr().out


def steplog(tmp_path, on_its_way=True):
    """A log whose bar keeps quiet, and what launches a step with an outcome."""
    settings = Settings(run=tmp_path)
    users = [Example(f"u{i}", [], "", []) for i in range(4)]
    log = StepLog(settings, users, SimpleNamespace(step=lambda *_: None))
    log.begin()

    def launch(number, *outcome):
        step = SimpleNamespace(users=[number], tokens=10, packs=[])
        made = Outcome(HostCopy(torch.tensor(outcome)))
        if on_its_way:
            made.values.arrived = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
        log.launch(number, 1, step, lambda: made)

    return log, launch


def told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    return [line["step"] for _, line in read_jsonl(path, {})] if path.exists() else []


def test_a_step_is_told_of_once_the_next_one_is_launched(tmp_path):
    log, launch = steplog(tmp_path)
    for number in (1, 2, 3):
        launch(number, 0.5, 1.0)
        assert told(tmp_path) == [*range(1, number)]
    for _ in range(2):
        log.settle()
        assert told(tmp_path) == [1, 2, 3]


def test_what_is_not_finite_is_told_of_with_its_own_step_and_users(tmp_path):
    _, launch = steplog(tmp_path)
    launch(1, 0.5, 1.0)
    launch(2, math.nan, 1.0)
    with pytest.raises(InputError, match=r"step 2: loss nan.*its users: u2$"):
        launch(3, 0.5, 1.0)
    assert told(tmp_path) == [1]


def test_a_step_that_cannot_be_launched_does_not_hide_the_one_before(tmp_path):
    log, launch = steplog(tmp_path)
    launch(1, 0.5, 1.0)

    def fail():
        raise torch.OutOfMemoryError

    step = SimpleNamespace(users=[2], packs=[SimpleNamespace(ids=range(512))] * 3)
    with pytest.raises(InputError, match="a pack of 512 tokens, 3 of them in a batch of 64; lower"):
        log.launch(2, 1, step, fail)
    assert told(tmp_path) == [1]


def test_what_is_known_is_told_of_at_once_with_its_own_time(tmp_path):
    log, launch = steplog(tmp_path, on_its_way=False)
    for number in (1, 2):
        time.sleep(0.05)
        launch(number, 0.5, 1.0)
        assert told(tmp_path) == [*range(1, number + 1)]
    time.sleep(0.3)  # a checkpoint
    log.begin()
    time.sleep(0.05)
    launch(3, 0.5, 1.0)
    speeds = [line["tokens_per_second"] for _, line in read_jsonl(tmp_path / "metrics.jsonl", {})]
    assert all(10 / 0.3 < speed <= 10 / 0.05 for speed in speeds)
