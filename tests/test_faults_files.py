"""Files broken in thousands of ways: each is refused in one line, or means what it says.

A few mutations run with the other tests; `make test-faults` runs all of them and prints how many.
"""

import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import CPU, own_lines, run, write_dataset, write_lines, write_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaTokenizerFast

from files.jsonl import read_jsonl
from llama import CheckpointError, load_config, load_model
from lora import AdapterError, LoRAConfig, adapter_tensors, apply_lora, load_adapter, save_adapter
from models import hub
from models.tokenizer import Tokenizer
from ops.checkpoint import fingerprint
from prepare.dataset import load_dataset
from state.checkpoint import Progress, load_checkpoint, save_checkpoint
from state.summaries import FIELDS
from trsr import InputError

MENDABLE = (CheckpointError, AdapterError, InputError)  # what the scripts answer in one line
WORDS = (
    *(b"0", b"-1", b"null", b"[]", b"{}", b"true", b"1e999", b"99999999999999999999"),
    *(b'"x"', b"\\ud800"),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with one thing wrong.

    Bytes are changed, cut, doubled, moved or put in, or a number or name is replaced.
    """
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 1, 2, 8, 64, 1024)))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:a]
    if kind == 1:
        return data[:a] + data[b:]
    if kind == 2:
        return data[:b] + data[a:]
    if kind == 3:
        return data[:a] + rng.randbytes(rng.choice((1, 4, 300))) + data[a:]
    if kind == 4:
        return data[:a] + rng.randbytes(b - a) + data[b:]
    if kind == 5:
        return data[b:] + data[:b]
    words = rng.choice(WORDS)
    if kind == 6:
        return data[:a] + words + data[a:]
    digits = [i for i, c in enumerate(data[:4000]) if 48 <= c < 58 or c in b'",:{['] or [0]
    i = rng.choice(digits)
    return data[:i] + words + data[i + 1 :]


class Hang(BaseException):
    pass


def survive(path: Path, use, n: int, part=slice(None), seed: int = 0) -> Counter:
    """Use path broken in n ways; return how often that was refused or accepted.

    Anything else that happens is an error of the project.
    """
    whole, rng, outcomes = path.read_bytes(), random.Random(f"{seed} {path.name}"), Counter()

    def ring(*_):
        raise Hang

    use()  # whole, it is accepted
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for i in range(n):
            broken = mutated(whole[part], rng) + (whole[part.stop :] if part.stop else b"")
            path.write_bytes(broken)
            signal.alarm(120)
            try:
                use()
                outcomes["accepted"] += 1
            except MENDABLE:
                outcomes["refused"] += 1
            except Hang:
                pytest.fail(f"{path.name}: mutation {i} hangs")
            except BaseException as error:
                folder = os.environ.get("TRSR_KEEP", tempfile.gettempdir())
                keep = Path(folder) / f"mutation-{path.name}"
                keep.write_bytes(broken)
                what = f"mutation {i} ends in {error!r}, kept as {keep}"
                raise AssertionError(f"{path.name}: {what}") from error
            finally:
                signal.alarm(0)
    finally:
        path.write_bytes(whole)
        signal.signal(signal.SIGALRM, before)
    counts = f"{outcomes['refused']} refused, {outcomes['accepted']} accepted"
    print(f"{path.name} broken in {n} ways: {counts}")
    return outcomes


def copied(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target, dirs_exist_ok=True)


def header_of(path: Path) -> slice:
    """Return where a safetensors file has its header."""
    return slice(0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


# ---- Models


def test_broken_weights(tmp_path, model_folder, times, record_testsuite_property):
    folder = copied(model_folder, tmp_path / "m")
    path = folder / "model.safetensors"

    def use():
        fingerprint(folder)
        model = load_model(folder, CPU, torch.float32)
        with safe_open(path, framework="pt") as file:  # what is accepted is what the file says
            for name in file.keys():  # noqa: SIM118
                found, said = model.get_parameter(name), file.get_tensor(name).float()
                assert torch.equal(found.nan_to_num(), said.nan_to_num())
        assert {n for n, _ in model.named_parameters()} <= set(load_file(path)) | {"lm_head.weight"}
        assert all(p.is_floating_point() for p in model.parameters())

    found = survive(path, use, times(60), header_of(path))
    assert found["refused"] > found["accepted"]
    record_testsuite_property("weights", str(dict(found)))


def test_broken_index(tmp_path, times):
    write_model(tmp_path, shards=3)

    def use():
        fingerprint(tmp_path)
        load_model(tmp_path, CPU, torch.float32)

    assert survive(tmp_path / "model.safetensors.index.json", use, times(60))["refused"] > 5


def test_broken_config(tmp_path, architecture, folder, times):
    here = copied(folder, tmp_path / "m")

    def use():
        config = hub.load_config(here)
        if config.vocab_size * config.hidden_size * config.num_hidden_layers < 1 << 32:
            architecture.load(here, CPU, torch.float32)(torch.tensor([[3, 4, 5]]))

    assert survive(here / "config.json", use, times(100))["refused"] > 10


def test_broken_tokenizer(tmp_path, model_folder, times):
    folder = copied(model_folder, tmp_path / "m")
    vocab = load_config(folder).vocab_size

    def use():
        tokenizer = Tokenizer(folder, vocab)
        ids = tokenizer.encode(["Title: red lamp", "### User: [Next Item]"])
        assert all(0 <= i < vocab for row in ids for i in row)
        tokenizer.decode(ids[0])

    assert survive(folder / "tokenizer.model", use, times(60))["refused"] > 0
    LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    assert survive(folder / "tokenizer.json", use, times(60))["refused"] > 20


@pytest.fixture
def adapter(tmp_path, model_folder):
    """The folder of an adapter that does something."""
    model = apply_lora(load_model(model_folder, CPU, torch.float32), LoRAConfig())
    for parameter in adapter_tensors(model).values():
        torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "adapter", adapter_tensors(model), LoRAConfig(), "m")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_broken_adapters(adapter, model_folder, times, name):
    def use():
        load_adapter(load_model(model_folder, CPU, torch.float32), adapter)

    part = header_of(adapter / name) if name.endswith("safetensors") else slice(None)
    assert survive(adapter / name, use, times(60), part)["refused"] > 5


# ---- Data and runs


@pytest.mark.parametrize("name", ["items.jsonl", "train.jsonl", "val.jsonl", "meta.json"])
def test_broken_datasets(tmp_path, times, name):
    folder = write_dataset(tmp_path)

    def use():
        _, items, splits = load_dataset(folder, ("train", "val", "test"))
        for example in (e for split in splits.values() for e in split):
            assert {*example.history, example.positive, *example.negatives} <= items.keys()
            assert example.positive not in [*example.history, *example.negatives]
        json.dumps([items, [vars(e) for e in splits["train"]]], ensure_ascii=False).encode()

    assert survive(folder / name, use, times(80))["refused"] > 5


def test_broken_summaries(tmp_path, times):
    path = tmp_path / "summaries.jsonl"
    record = {"paradigm": "recurrent", "key": "k", "summary": "Likes red.", "tree": {"summary": ""}}
    write_lines(path, [{"user": f"u{i}"} | record for i in range(5)])

    def use():
        assert all(isinstance(r["summary"], str) for _, r in read_jsonl(path, FIELDS))

    assert survive(path, use, times(80))["refused"] > 5


def test_broken_settings_of_a_run(tmp_path, trained_run, times):
    folder = copied(trained_run, tmp_path / "run")

    def use():
        done = run("evaluate.py", run=folder, check=False)
        if done.returncode == 2:
            (said,) = own_lines(done.stderr, "evaluate")
            raise InputError(said)
        assert len(list(read_jsonl(folder / "scores-test.jsonl", {"user": str, "rank": int}))) == 4

    assert survive(folder / "config.json", use, times(60))["refused"] > 20


def test_broken_checkpoints_are_passed_over(tmp_path, model_folder, times, capsys):
    model = apply_lora(load_model(model_folder, CPU, torch.float32), LoRAConfig())
    optimizer = torch.optim.AdamW(adapter_tensors(model).values())
    sum(p.sum() for p in adapter_tensors(model).values()).backward()
    optimizer.step()
    progress = Progress(step=7, batch=7)
    save_checkpoint(tmp_path, model, optimizer, progress, 0)
    older = tmp_path / "checkpoint" / "step-00000007.safetensors"
    newer = older.with_name("step-00000009.safetensors")
    shutil.copyfile(older, newer)
    outcomes = Counter()

    def use():
        newest = load_checkpoint(tmp_path, model, optimizer, CPU)
        outcomes["older" if f"{newer}: ignored" in capsys.readouterr().out else "newer"] += 1
        assert isinstance(newest, Progress)

    survive(newer, use, times(60), header_of(newer))
    assert outcomes["older"] > outcomes["newer"] >= 1
    counts = f"{outcomes['older']} times the older one was taken, {outcomes['newer']} the newer"
    print(f"checkpoints: {counts}")
