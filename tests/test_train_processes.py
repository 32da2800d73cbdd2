"""train.py under torchrun: more processes train the model that one process trains."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    TINY_MODEL,
    flags,
    fresh_adapter,
    losses,
    metrics,
    run,
    same_losses,
    validations,
    write_model,
)
from safetensors.torch import load_file

from llama import load_model
from lora import adapter_tensors

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.parametrize(("processes", "shard"), [(2, "zero2"), (3, "zero3"), (2, "replicate")])
def test_more_processes_train_the_same_model(tmp_path, alone, model_folder, fit, processes, shard):
    fit(tmp_path, epochs=3, lora_dropout=0, shard=shard, processes=processes)
    same_losses(tmp_path, alone, 1e-5, 1e-4)
    assert validations(tmp_path) == validations(alone)

    ours, theirs = (load_file(folder / ADAPTER) for folder in (tmp_path, alone))
    assert ours.keys() == theirs.keys()
    start = adapter_tensors(fresh_adapter(model_folder))
    assert len(ours) == len(start) == 2 * 2 * 4
    for name, tensor in ours.items():  # whole tensors, not one process's slice
        assert tensor.shape == theirs[name].shape
        # Adam makes a whole step of a gradient that is rounding noise: a few values may differ.
        assert ((tensor - theirs[name]).abs() < 1e-4).float().mean() > 0.97
        assert tensor.abs().sum() > 0
        # Every layer's adapter has received a gradient.
        assert not torch.equal(tensor, start[name.removeprefix("base_model.model.")]), name

    ours, theirs = (
        load_file(next((folder / "checkpoint").glob("*.safetensors")))
        for folder in (tmp_path, alone)
    )
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"parameter", "step", "exp_avg", "exp_avg_sq"}
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert ((tensor - theirs[name]).abs() < 1e-4).float().mean() > 0.97, name


def test_two_nodes_train_the_same_model(tmp_path, alone, fit_command):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--nproc_per_node", 1, "--nnodes", 2, "--rdzv-id", "two")
    meet += ("--rdzv-endpoint", f"localhost:{port}")
    line = fit_command(tmp_path, epochs=3, lora_dropout=0, processes=2, torchrun=meet)
    nodes = [subprocess.Popen(line, stderr=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=600)
        assert node.returncode == 0, errors
    same_losses(tmp_path, alone, 1e-5)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A dataset of the demo's shop."""
    folder = tmp_path_factory.mktemp("shop")
    run("prepare.demo.py", out=folder, users=30, items=1500)
    return folder


RUNS_WITH_TWO_THREADS = """
import sys
import torch
from helpers import run

torch.set_num_threads(2)
for folder in sys.argv[1:4]:
    run("train.py", *sys.argv[4:], run=folder)
"""


def test_threads_change_no_bit(tmp_path, shop):
    folders = [tmp_path / name for name in "abc"]
    # Packs so large that several threads add up a row's gradients.
    settings = {"data": shop, "model": TINY_MODEL, "paradigm": "recent-only", "lr": 0.01}
    settings |= {"epochs": 1, "batch_size": 52}
    line = [sys.executable, "-c", RUNS_WITH_TWO_THREADS, *map(str, folders), *flags(**settings)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # Passive, because threads that wait for a busy core should not keep another one busy.
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b, c = ((folder / ADAPTER).read_bytes() for folder in folders)
    assert a == b == c
    assert losses(folders[0]) == losses(folders[1]) == losses(folders[2])


def test_many_processes_train_the_embedded_model_as_one_does(
    tmp_path, shop, fit, times, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"lora_dropout": 0, "epochs": 1, "shard": "zero2", "batch_size": 16}
    # 26 users in 4 steps, the last of which leaves all but two processes without a user.
    n = times(4, 8)
    for processes in (1, n):
        run = tmp_path / str(processes)
        fit(run, data=shop, model=TINY_MODEL, **settings, processes=processes)
    one, many = losses(tmp_path / "1"), losses(tmp_path / str(n))
    assert [step for step, _, _ in one] == [step for step, _, _ in many] == [1, 2, 3, 4]
    assert one[0][1] - one[-1][1] > 0.01
    for (_, loss, norm), (_, expected, norm1) in zip(many, one, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(norm1, rel=1e-4)
    assert metrics(tmp_path / "1")[-1] == metrics(tmp_path / str(n))[-1]  # the validation


def test_full_fine_tuning_trains_and_saves_the_whole_model(tmp_path, model_folder, fit):
    fit(tmp_path / "one", epochs=2, lora_r=0)
    fit(tmp_path / "two", epochs=2, lora_r=0, processes=2)
    same_losses(tmp_path / "one", tmp_path / "two", 1e-4)
    before, after = (
        load_model(folder, CPU, torch.float32) for folder in (model_folder, tmp_path / "one/model")
    )
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(p, q), name


def test_a_tied_model_trains_on_two_processes(tmp_path, tokenizer_model, fit):
    base = tmp_path / "base"
    write_model(base, tie_word_embeddings=True, tokenizer=tokenizer_model)
    fit(tmp_path / "one", model=base, epochs=1, lora_r=0)
    fit(tmp_path / "two", model=base, epochs=1, lora_r=0, processes=2)
    same_losses(tmp_path / "one", tmp_path / "two", 1e-4)
    load_model(tmp_path / "two" / "model", CPU, torch.float32)
