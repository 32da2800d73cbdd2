"""train.py after an interruption: it ends as if there had been none."""

import os
import random
import signal
import subprocess

import pytest
from helpers import (
    children,
    count_lines,
    losses,
    same_losses,
    started,
    validations,
    wait_until,
)

import train


def lines(folder):
    return count_lines(folder / "metrics.jsonl")


def same_end(folder, other):
    assert losses(folder) == losses(other)
    assert validations(folder) == validations(other)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


LONG = {"batch_size": 4, "epochs": 10, "save_every": 3}  # 60 steps, with dropout


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, fit, fit_command):
    rng, whole, killed = random.Random(1), tmp_path / "whole", tmp_path / "killed"
    fit(whole, **LONG)
    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        enough = lines(killed) + rng.randint(3, 9)
        process = started(fit_command(killed, **LONG))
        wait_until(lambda enough=enough: lines(killed) >= enough, process)
        process.send_signal(kind)
        _, errors = process.communicate()
        assert process.returncode == (-kind if kind == signal.SIGKILL else 2), errors
        if kind != signal.SIGKILL:
            assert "the same command resumes from there" in errors
            assert "Traceback" not in errors
    (killed / "checkpoint" / "step-99999999.safetensors").write_bytes(b"torn")
    done = fit(killed, **LONG)
    assert "step-99999999.safetensors: ignored" in done.stdout
    same_end(whole, killed)


def test_a_run_resumes_on_another_number_of_processes(tmp_path, alone, fit, monkeypatch):
    class Stop(Exception):
        pass

    real, calls = train.train_step, []

    def failing(*arguments):
        if len(calls) == 4:
            raise Stop
        calls.append(1)
        return real(*arguments)

    settings = {"epochs": 3, "lora_dropout": 0, "save_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", failing)
        with pytest.raises(Stop):
            fit(tmp_path, **settings)
    assert len(losses(tmp_path)) == 4
    fit(tmp_path, **settings, processes=2)
    same_losses(tmp_path, alone, 1e-5)


def test_a_killed_process_is_restarted_and_all_resume_from_the_checkpoint(tmp_path, fit_command):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    several = LONG | {"epochs": 6, "processes": 2, "torchrun": ("--max-restarts", 2)}
    line = fit_command(whole, **several)
    assert subprocess.run(line, capture_output=True, timeout=600).returncode == 0
    process = started(fit_command(killed, **several))
    wait_until(lambda: lines(killed) >= 10, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "another process has ended" in errors or "stopped after step" in errors
    assert "Traceback" not in errors
    same_end(whole, killed)
