"""train.py as a command, and its step against separate examples, other process counts and interruptions."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run, write_dataset, write_model
from safetensors.torch import load_file

import train
import trsr
from launch.processes import share_out
from llama import load_model
from lora import LoRAConfig, adapter_tensors, apply_lora, load_adapter
from models.tokenizer import Tokenizer
from ops.packs import Tree, pack_trees
from prepare.dataset import load_dataset


def fit(run_folder, data, model, *more, **options):
    flags = (
        "--data",
        data,
        "--model",
        model,
        "--run-dir",
        run_folder,
        "--batch-size",
        8,
        "--paradigm",
        "recent-only",
    )
    return run("train.py", *flags, "--lr", 0.01, *more, **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(folder) if "loss" in r]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_folder, model_folder):
    """A run of three epochs by one process, without dropout."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    fit(folder, data_folder, model_folder, "--epochs", 3, "--lora-dropout", 0)
    return folder


def separate_examples(model_folder, data_folder):
    """The training examples' token ids, apart, the slow way."""
    domain, items, splits = load_dataset(data_folder, ("train",))
    tokenizer = Tokenizer(model_folder, 640)
    budget = trsr.Budget(1023, tokenizer.encode, trsr.Counter())
    recommender = trsr.Recommender("recent-only", domain, items, {}, 3, budget)
    answers = trsr.answer_ids(tokenizer.encode, domain)
    found = []
    for example in splits["train"]:
        for i, item in enumerate([example.positive, *example.negatives]):
            (ids,) = recommender.prompt_ids(example, [item])
            found.append([*ids, answers[min(i, 1)]])
    return found


@pytest.mark.parametrize("loss", ["prompt", "answer"])
def test_a_step_equals_separate_examples(tmp_path, data_folder, model_folder, loss):
    fit(
        tmp_path,
        data_folder,
        model_folder,
        "--epochs",
        1,
        "--lora-dropout",
        0,
        "--loss",
        loss,
        "--batch-size",
        24,
    )
    torch.manual_seed(0)
    model = apply_lora(load_model(model_folder, torch.device("cpu"), torch.float32), LoRAConfig())
    total, count = 0.0, 0
    for ids in separate_examples(model_folder, data_folder):
        first = len(ids) - 2 if loss == "answer" else 0
        logits = model(torch.tensor([ids]))[0, first:-1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[first + 1 :]), reduction="sum")
        count += len(ids) - 1 - first
    (total / count).backward()
    grads = [p.grad for p in adapter_tensors(model).values()]
    norm = torch.stack([g.norm() for g in grads]).norm()
    ((_, found, found_norm),) = losses(tmp_path)
    assert count == 24 or loss == "prompt"
    assert abs(found - (total / count).item()) < 1e-5
    assert abs(found_norm - norm.item()) < 1e-5
    # The update itself: AdamW's first step from the oracle's gradients gives the adapter that was saved.
    torch.nn.utils.clip_grad_norm_(adapter_tensors(model).values(), 1.0)
    torch.optim.AdamW(
        adapter_tensors(model).values(), lr=0.01, betas=(0.9, 0.95), weight_decay=5e-4
    ).step()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in adapter_tensors(model).items():
        if "lora_B" in name:  # A has no gradient in the first step, B being zero
            moved = (parameter - saved["base_model.model." + name]).abs()
            assert (moved < 1e-5).float().mean() > 0.97, (
                name
            )  # Adam's sign is noise where the gradient is near zero


@pytest.mark.parametrize(("processes", "shard"), [(2, "zero2"), (3, "zero3"), (2, "replicate")])
def test_more_processes_train_the_same_model(
    tmp_path, alone, data_folder, model_folder, processes, shard
):
    flags = ("--epochs", 3, "--lora-dropout", 0, "--shard", shard)
    fit(tmp_path, data_folder, model_folder, *flags, processes=processes)
    for (step, loss, norm), (step1, loss1, norm1) in zip(
        losses(tmp_path), losses(alone), strict=True
    ):
        assert step == step1
        assert abs(loss - loss1) < 1e-5
        assert abs(norm - norm1) < 1e-4
    validations = [
        [r["validation"] for r in metrics(f) if "validation" in r] for f in (tmp_path, alone)
    ]
    assert validations[0] == validations[1]
    ours, theirs = (
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path, alone)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # whole tensors, not one process's slice
        assert tensor.shape == theirs[name].shape
        # Adam makes a whole step of a gradient that is rounding noise, so a few values may differ by that.
        assert ((tensor - theirs[name]).abs() < 1e-4).float().mean() > 0.97
        assert tensor.abs().sum() > 0
    ours, theirs = (
        load_file(next((f / "checkpoint").glob("*.safetensors"))) for f in (tmp_path, alone)
    )
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"parameter", "step", "exp_avg", "exp_avg_sq"}
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert ((tensor - theirs[name]).abs() < 1e-4).float().mean() > 0.97, name


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    made = [
        sys.executable,
        "-m",
        "prepare.demo",
        "--out",
        str(folder),
        "--users",
        "30",
        "--items",
        "1500",
    ]
    assert subprocess.run(made, cwd=ROOT, capture_output=True).returncode == 0
    return folder


def test_threads_change_no_bit(tmp_path, shop, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    for name in ("a", "b", "c"):  # packs so large that several threads add up one row's gradients
        fit(tmp_path / name, shop, ROOT / "models/tiny", "--epochs", 1, "--batch-size", 52)
    a, b, c = (
        (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in "abc"
    )
    assert a == b == c
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c")


def test_eight_processes_train_the_embedded_model_as_one_does(tmp_path, shop, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--lora-dropout", 0, "--epochs", 1, "--shard", "zero2", "--batch-size", 16)
    for processes in (
        1,
        8,
    ):  # 26 users in 4 steps, the last of which leaves six processes without a user
        fit(tmp_path / str(processes), shop, ROOT / "models/tiny", *flags, processes=processes)
    one, eight = (losses(tmp_path / name) for name in ("1", "8"))
    assert [step for step, _, _ in one] == [step for step, _, _ in eight] == [1, 2, 3, 4]
    assert one[0][1] - one[-1][1] > 0.01
    for (_, loss, norm), (_, expected, norm1) in zip(eight, one, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(norm1, rel=1e-4)
    assert metrics(tmp_path / "1")[-1] == metrics(tmp_path / "8")[-1]  # the validation


def test_every_layer_s_adapter_receives_a_gradient_under_fsdp(
    alone, tmp_path, data_folder, model_folder
):
    fit(tmp_path, data_folder, model_folder, "--epochs", 1, "--lora-dropout", 0, processes=2)
    torch.manual_seed(0)
    start = apply_lora(load_model(model_folder, torch.device("cpu"), torch.float32), LoRAConfig())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 4
    for name, parameter in adapter_tensors(start).items():
        assert not torch.equal(parameter, saved["base_model.model." + name]), name


def test_full_fine_tuning_trains_and_saves_the_whole_model(tmp_path, data_folder, model_folder):
    flags = ("--epochs", 2, "--lora-r", 0)
    fit(tmp_path / "one", data_folder, model_folder, *flags)
    fit(tmp_path / "two", data_folder, model_folder, *flags, processes=2)
    for (_, loss, _), (_, loss2, _) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert abs(loss - loss2) < 1e-4
    before = load_model(model_folder, torch.device("cpu"), torch.float32)
    after = load_model(tmp_path / "one" / "model", torch.device("cpu"), torch.float32)
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(p, q), name


def test_full_fine_tuning_does_not_write_over_the_model_it_starts_from(
    tmp_path, data_folder, model_folder
):
    shutil.copytree(model_folder, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    done = fit(tmp_path, data_folder, tmp_path / "model", "--epochs", 1, "--lora-r", 0, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "would take its place" in done.stderr
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_the_best_epoch_is_the_one_kept(tmp_path, data_folder, model_folder):
    fit(tmp_path, data_folder, model_folder, "--epochs", 4, "--k", 1, 2)
    recalls = [sum(r["validation"].values()) for r in metrics(tmp_path) if "validation" in r]
    best = recalls.index(max(recalls))
    other = tmp_path.parent / "until-best"
    fit(other, data_folder, model_folder, "--epochs", best + 1, "--k", 1, 2)
    kept, expected = (
        (f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (tmp_path, other)
    )
    assert kept == expected


# ---- interruptions


def command(folder, data, model, *more):
    flags = [
        "--data",
        data,
        "--model",
        model,
        "--run",
        folder,
        "--batch-size",
        4,
        "--paradigm",
        "recent-only",
    ]
    return [
        sys.executable,
        *map(
            str, [ROOT / "train.py", *flags, "--lr", 0.01, "--epochs", 10, "--save-every", 3, *more]
        ),
    ]


def lines(folder):
    return (
        len((folder / "metrics.jsonl").read_text().splitlines())
        if (folder / "metrics.jsonl").exists()
        else 0
    )


def same_end(folder, other):
    assert losses(folder) == losses(other)
    assert [r for r in metrics(folder) if "validation" in r] == [
        r for r in metrics(other) if "validation" in r
    ]
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, data_folder, model_folder):
    rng = random.Random(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (
        subprocess.run(command(whole, data_folder, model_folder), capture_output=True).returncode
        == 0
    )
    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):  # dropout on
        begun = lines(killed)
        process = subprocess.Popen(
            command(killed, data_folder, model_folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and lines(killed) < begun + 5:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(kind)
        _, errors = process.communicate()
        assert process.returncode in (2, -kind), errors
        if kind != signal.SIGKILL:
            assert "the same command goes on from there" in errors
            assert "Traceback" not in errors
    (killed / "checkpoint" / "step-99999999.safetensors").write_bytes(b"torn")
    done = subprocess.run(
        command(killed, data_folder, model_folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step-99999999.safetensors: ignored" in done.stdout
    same_end(whole, killed)


def test_a_run_resumes_on_another_number_of_processes(tmp_path, alone, data_folder, model_folder):
    flags = ("--epochs", 3, "--lora-dropout", 0, "--save-every", 1)
    stop = tmp_path / "stop"

    class Stop(Exception):
        pass

    real, calls = train.train_step, []

    def failing(*arguments):
        if len(calls) == 4:
            raise Stop
        calls.append(1)
        return real(*arguments)

    train.train_step = failing
    try:
        with pytest.raises(Stop):
            fit(stop, data_folder, model_folder, *flags)
    finally:
        train.train_step = real
    assert len(losses(stop)) == 4
    fit(stop, data_folder, model_folder, *flags, processes=2)
    for (_, loss, _), (_, expected, _) in zip(losses(stop), losses(alone), strict=True):
        assert abs(loss - expected) < 1e-5


def launch(processes, *more):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        *map(str, more),
    ]


def test_two_nodes_train_the_same_model(tmp_path, alone, data_folder, model_folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--rdzv-id", "two", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    _, *script = command(tmp_path, data_folder, model_folder, "--lora-dropout", 0)
    script[script.index("--run")] = "--run-dir"
    script[script.index("--batch-size") + 1], script[script.index("--epochs") + 1] = "8", "3"
    agents = [
        subprocess.Popen([*launch(1, "--nnodes", 2, *meet), *script], stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for agent in agents:
        _, errors = agent.communicate(timeout=200)
        assert agent.returncode == 0, errors
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(alone), strict=True):
        assert abs(loss - expected) < 1e-5


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_process_is_restarted_and_all_go_on_from_the_checkpoint(
    tmp_path, data_folder, model_folder
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = []
    for folder in (whole, killed):
        _, *script = command(folder, data_folder, model_folder)  # dropout on
        script[script.index("--run")] = "--run-dir"
        meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", 2)
        runs.append([*launch(2, *meet), *script])
    assert subprocess.run(runs[0], capture_output=True, timeout=200).returncode == 0
    process = subprocess.Popen(runs[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and lines(killed) < 10:
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "another process has ended" in errors or "stopped after step" in errors
    assert "Traceback" not in errors
    same_end(whole, killed)


def test_activation_checkpointing_changes_nothing(tmp_path, data_folder, model_folder):
    fit(tmp_path / "kept", data_folder, model_folder, "--epochs", 1)  # dropout on
    fit(tmp_path / "again", data_folder, model_folder, "--epochs", 1, "--activation-checkpointing")
    for (_, loss, norm), (_, loss1, norm1) in zip(
        losses(tmp_path / "kept"), losses(tmp_path / "again"), strict=True
    ):
        assert abs(loss - loss1) < 1e-6
        assert abs(norm - norm1) < 1e-5


def test_a_dry_run_tells_what_the_run_will_take_and_leaves_nothing(
    tmp_path, data_folder, model_folder
):
    done = fit(tmp_path, data_folder, model_folder, "--dry-run")
    found = re.search(
        r"work    (\d+) tokens an epoch, (\S+) FLOP; each example apart: (\d+)", done.stdout
    )
    model = load_model(model_folder, torch.device("cpu"), torch.float32)
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    assert float(found[2]) == pytest.approx(
        4 * weights * int(found[1]), rel=0.2
    )  # and the adapter's
    assert (
        int(found[1]) < int(found[3]) == sum(map(len, separate_examples(model_folder, data_folder)))
    )
    assert re.search(r"memory  about [\d.]+ GiB a device", done.stdout)
    assert re.search(r"time    [\d.]+ minutes an epoch", done.stdout)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_settings_in_the_same_run_are_refused(alone, data_folder, model_folder):
    done = fit(
        alone,
        data_folder,
        model_folder,
        "--epochs",
        3,
        "--lora-dropout",
        0,
        "--seed",
        1,
        check=False,
    )
    assert done.returncode == 2
    assert "seed 0 (now 1)" in done.stderr


def test_a_dataset_that_changed_under_the_same_name_is_refused(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data")
    fit(tmp_path / "run", data, model_folder, "--epochs", 1)
    before = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    first, *rest = (data / "train.jsonl").read_text().splitlines(True)
    (data / "train.jsonl").write_text("".join([*rest, first]))  # the same users in another order
    done = fit(tmp_path / "run", data, model_folder, "--epochs", 1, check=False)
    assert done.returncode == 2
    assert re.search(
        r"train\.py worked here with content '(\w+)' \(now '(?!\1)\w+'\); use", done.stderr
    )
    shutil.rmtree(tmp_path / "run/checkpoint")  # the adapter alone is reason enough
    assert (
        fit(
            tmp_path / "run", data, model_folder, "--epochs", 1, "--lora-alpha", 4, check=False
        ).returncode
        == 2
    )
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == before


# ---- bad input and bad numbers


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, data_folder, model_folder):
    done = fit(tmp_path, data_folder, model_folder, "--lr", 1e30, "--epochs", 3, check=False)
    assert done.returncode == 2
    assert "step 2: loss nan" in done.stderr or "step 2: loss inf" in done.stderr
    assert "train" in done.stderr.split("users: ")[1]
    assert [step for step, _, _ in losses(tmp_path)] == [1]


def test_out_of_memory_names_the_batch_the_pack_and_the_flags(
    tmp_path, data_folder, model_folder, monkeypatch
):
    def full(self, pack):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train.Llama, "loss", full)
    done = fit(tmp_path, data_folder, model_folder, "--pack-tokens", 300, check=False)
    assert done.returncode == 2
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    found = re.search(
        r"a pack of (\d+) tokens, (\d+) of them in a batch of 8; lower --pack-tokens, or add --act",
        told,
    )
    assert 0 < int(found[1]) <= 300
    assert int(found[2]) >= 2
    assert not losses(tmp_path)


def test_what_train_needs_is_named(tmp_path, data_folder, model_folder):
    def message(*more):
        done = fit(tmp_path / "run", data_folder, model_folder, *more, check=False)
        assert done.returncode == 2
        return done.stderr.strip().splitlines()[-1]

    assert "run python summarize.py --run" in message("--paradigm", "hierarchical")
    assert "no multiple of the 2 examples" in message("--batch-size", 7)
    assert "'nothing' names no linear layer" in message("--lora-targets", "nothing")
    assert "no room for the instruction" in message("--max-length", 30)


def test_summaries_of_another_history_are_refused(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data")
    run(
        "summarize.py",
        "--data",
        data,
        "--model",
        model_folder,
        "--run",
        tmp_path / "run",
        "--max-new-tokens",
        8,
    )
    done = run("train.py", "--run", tmp_path / "run", "--epochs", 1)
    assert "hierarchical, 3 recent items" in done.stdout
    line, *rest = (data / "train.jsonl").read_text().splitlines()
    example = json.loads(line)
    changed = json.dumps(example | {"history": example["history"][1:]})
    (data / "train.jsonl").write_text("\n".join([changed, *rest]) + "\n")
    done = run("train.py", "--run", tmp_path / "run", "--epochs", 1, check=False)
    assert done.returncode == 2
    assert f"user {example['user']!r}: the summary is of another history" in done.stderr


# ---- parts


def test_users_are_shared_out_evenly():
    rng = random.Random(0)
    sizes = [rng.randint(200, 900) for _ in range(64)]
    groups = share_out(sizes, 8)
    assert sorted(i for group in groups for i in group) == list(range(64))
    loads = [sum(sizes[i] for i in group) for group in groups]
    assert max(loads) < 1.05 * sum(sizes) / 8
    assert share_out([5], 3) == [[0], [], []]


def test_an_epoch_is_a_permutation_that_the_seed_determines():
    steps = train.step_batches(10, 4, seed=3, epoch=1)
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(u for step in steps for u in step) == list(range(10))
    assert steps == train.step_batches(10, 4, seed=3, epoch=1)
    assert steps != train.step_batches(10, 4, seed=3, epoch=2)
    assert steps != train.step_batches(10, 4, seed=4, epoch=1)


@pytest.mark.parametrize("loss", ["prompt", "answer"])
def test_targets_are_counted_as_if_examples_were_apart(loss):
    tree = Tree([1, 2, 3], [[4, 5], [6]])
    assert train.target_count(tree, loss) == {"prompt": 4 + 3, "answer": 2}[loss]
    (pack,) = pack_trees([tree], 99, last_only=loss == "answer")
    assert pack.weights.sum() == train.target_count(tree, loss)


def test_the_adapter_of_a_run_loads_in_peft(tmp_path, alone, model_folder):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(model_folder), alone / "adapter"
    ).eval()
    model = load_model(model_folder, torch.device("cpu"), torch.float32)
    load_adapter(model, alone / "adapter")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (model.eval()(ids) - theirs(ids).logits).abs().max() < 1e-5


def test_bf16_trains_close_to_fp32(tmp_path, alone, data_folder, model_folder):
    fit(tmp_path, data_folder, model_folder, "--epochs", 3, "--lora-dropout", 0, "--dtype", "bf16")
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(alone), strict=True):
        assert 0 < abs(loss - expected) < 0.05


def test_a_tied_model_trains_on_two_processes(tmp_path, data_folder, model_folder):
    write_model(tmp_path / "model", tie_word_embeddings=True)
    (tmp_path / "model" / "tokenizer.model").write_bytes(
        (model_folder / "tokenizer.model").read_bytes()
    )
    flags = ("--epochs", 1, "--lora-r", 0)
    fit(tmp_path / "one", data_folder, tmp_path / "model", *flags)
    fit(tmp_path / "two", data_folder, tmp_path / "model", *flags, processes=2)
    for (_, loss, _), (_, loss2, _) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert abs(loss - loss2) < 1e-4
    load_model(tmp_path / "two" / "model", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_trimmed_adds_up_over_users_and_splits(workers, data_folder, model_folder):
    domain, items, splits = load_dataset(data_folder, ("train", "val"))
    tokenizer = Tokenizer(model_folder, 640)
    budget = trsr.Budget(130, tokenizer.encode, Counter())
    recommender = trsr.Recommender("whole-history", domain, items, {}, 3, budget)
    args, expected = argparse.Namespace(workers=workers), Counter()
    for split in ("train", "val"):
        users = [(e, [e.positive, *e.negatives]) for e in splits[split]]
        for example, candidates in users:
            alone = trsr.Recommender(
                "whole-history", domain, items, {}, 3, replace(budget, trimmed=Counter())
            )
            alone.prompt_ids(example, candidates)
            expected += alone.budget.trimmed
        assert len(
            list(train.tokenized(train.Prompts(recommender, users), args, show=False))
        ) == len(users)
    assert expected
    assert budget.trimmed == expected
