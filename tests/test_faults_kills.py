"""Kills at any moment: what was finished stays whole, and the same command ends as without them."""

import itertools
import os
import random
import signal
import subprocess
from collections import Counter

import pytest
import torch
from helpers import (
    CPU,
    command,
    count_lines,
    metrics,
    run,
    wait_until,
    write_dataset,
)

from llama import load_model
from lora import AdapterError, LoRAConfig, adapter_tensors, apply_lora, load_adapter, save_adapter
from state.checkpoint import Progress, load_checkpoint, save_checkpoint, write_tensors

# ---- Kills while a file is written


def killed_at_work(work, moment) -> None:
    """Run work(n) for n = 1, 2, ... in another process; kill it once moment(finished) holds."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)  # the other threads are not there after a fork
            for n in itertools.count(1):
                work(n)
                os.write(writing, b".")
        finally:
            os._exit(1)

    os.close(writing)
    os.set_blocking(reading, False)
    finished = 0

    def reached():
        nonlocal finished
        try:
            done = os.read(reading, 1 << 16)
        except BlockingIOError:  # nothing new
            return moment(finished)
        assert done, "the work has ended in an error"
        finished += len(done)
        return moment(finished)

    try:
        wait_until(reached)
    finally:
        os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(reading)
    assert status == -signal.SIGKILL


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path, model_folder, times, capsys
):
    model = apply_lora(load_model(model_folder, CPU, torch.float32), LoRAConfig(r=2048))
    tensors = adapter_tensors(model)
    optimizer = torch.optim.AdamW(tensors.values())
    sum(p.sum() for p in tensors.values()).backward()
    optimizer.step()
    mark, rng = next(iter(tensors.values())).data, random.Random(3)
    folder, least = tmp_path / "checkpoint", times(10, 40)

    def unfinished():
        return [path for path in folder.iterdir() if path.name.startswith(".")]

    kills = begun = torn = 0
    while kills < least or torn < 3:
        assert kills < 20 * least, "no kill was in the middle of writing a checkpoint"

        def work(n, begun=begun):
            mark.fill_(begun + n)
            progress = Progress(step=begun + n, best=0.0)
            save_checkpoint(tmp_path, model, optimizer, progress, 0)

        # Every other time, once the next checkpoint has been begun: most likely within it.
        enough, within = rng.randint(1, 4), kills % 2
        killed_at_work(work, lambda n: n >= enough and (not within or unfinished()))  # noqa: B023
        left = unfinished()
        found = load_checkpoint(tmp_path, model, optimizer, CPU)
        assert found.step >= begun + enough
        assert (mark == found.step).all()  # what is loaded was written as a whole
        shown = capsys.readouterr().out
        for path in left:
            assert f"{path}: ignored, its writing was interrupted" in shown
        kills, begun, torn = kills + 1, found.step, torn + bool(left)
    assert begun > kills
    print(f"of {kills} kills, {torn} were in the middle of writing a checkpoint")


def test_a_kill_while_an_adapter_is_written_never_leaves_a_mixed_pair(
    tmp_path, model_folder, times
):
    models = {}
    for alpha in (1, 2):
        base = load_model(model_folder, CPU, torch.float32)
        models[alpha] = apply_lora(base, LoRAConfig(2048, alpha))
        for parameter in adapter_tensors(models[alpha]).values():
            parameter.data.fill_(alpha)

    def work(n):
        alpha = 1 + n // 3 % 2
        tensors = adapter_tensors(models[alpha])
        save_adapter(tmp_path, tensors, LoRAConfig(2048, alpha), "m", write_tensors)

    rng, outcomes = random.Random(4), Counter()
    for _ in range(times(10, 40)):
        enough = rng.randint(1, 6)
        killed_at_work(work, lambda n, enough=enough: n >= enough)
        model = load_model(model_folder, CPU, torch.float32)
        try:
            config = load_adapter(model, tmp_path)
        except AdapterError as error:
            outcomes[str(error).split("(")[1]] += 1
            continue
        assert all((p == config.alpha).all() for p in adapter_tensors(model).values())
        outcomes[config.alpha] += 1
    print(f"adapters found after a kill, by their alpha: {dict(outcomes)}")
    assert outcomes[1] + outcomes[2] > 2
    # Between two configurations there is none.
    assert outcomes.keys() <= {1, 2, "no adapter_config.json); train.py makes one"}


# ---- Kills of whole scripts


def kill_often(line: list[str], progress, kills: int, seed: int) -> int:
    """Kill a command at random moments while it works, then let it end; return how often."""
    rng, killed = random.Random(seed), 0
    while killed < kills:
        enough = progress() + rng.randint(1, 4)
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_until(lambda enough=enough: progress() >= enough, process)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        killed += 1
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.long
def test_twenty_kills_of_training_change_nothing(tmp_path, fit_command):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"epochs": 25, "batch_size": 4, "save_every": 1}
    line = fit_command(whole, **settings)
    assert subprocess.run(line, capture_output=True).returncode == 0
    line = fit_command(killed, **settings)
    n = kill_often(line, lambda: count_lines(killed / "metrics.jsonl"), 20, seed=1)
    print(f"training was killed {n} times")
    assert n == 20
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert metrics(whole)[-1] == metrics(killed)[-1]
    assert len(list((killed / "checkpoint").iterdir())) == 1


@pytest.mark.long
def test_twenty_kills_of_summarizing_change_nothing(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data", users=(120, 20, 20))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"data": data, "model": model_folder, "max_new_tokens": 24, "batch_size": 4}
    run("summarize.py", run=whole, **settings)

    def progress() -> int:
        return sum(count_lines(path) for path in killed.glob("summaries*.jsonl"))

    n = kill_often(command("summarize.py", run=killed, **settings), progress, 20, seed=2)
    print(f"summarizing was killed {n} times")
    assert n == 20
    assert (whole / "summaries.jsonl").read_bytes() == (killed / "summaries.jsonl").read_bytes()
