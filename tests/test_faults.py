"""Faults injected for real: broken files by the thousand, kills, a full disk, a process that dies, strangers' models.

The quick part runs with the other tests; `make test-faults` runs the long one too and prints how much it did.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, write_dataset
from safetensors import safe_open
from safetensors.torch import load_file

from llama import CheckpointError, load_config, load_model
from lora import AdapterError, LoRAConfig, adapter_tensors, apply_lora, load_adapter, save_adapter
from models.tokenizer import Tokenizer
from prepare.dataset import atomic_write, load_dataset, read_jsonl, write_json
from runfolder.checkpoint import load_checkpoint, save_checkpoint
from runfolder.state import FIELDS, fingerprint
from trsr import InputError

CPU = torch.device("cpu")
WORDS = (b"0", b"-1", b"null", b"[]", b"{}", b"true", b"1e999", b"99999999999999999999", b'"x"', b"\\ud800")
MENDABLE = (CheckpointError, AdapterError, InputError)  # what the scripts answer in one line


# ---- Broken files


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with one thing wrong: bytes changed, cut, doubled, moved, put in, or a number or name replaced."""
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
    words = rng.choice(
        (b"0", b"-1", b"null", b"[]", b"{}", b"true", b"1e999", b"99999999999999999999", b'"x"', b"\\ud800")
    )
    if kind == 6:
        return data[:a] + words + data[a:]
    digits = [i for i, c in enumerate(data[:4000]) if 48 <= c < 58 or c in b'",:{['] or [0]
    i = rng.choice(digits)
    return data[:i] + words + data[i + 1 :]


class Hang(BaseException):
    pass


def survive(path: Path, use, n: int, part=slice(None), seed: int = 0) -> Counter:
    """Use path broken in n ways; return how often that was refused or accepted. Anything else is an error of ours."""
    whole, rng, outcomes = path.read_bytes(), random.Random(f"{seed} {path.name}"), Counter()

    def ring(*_):
        raise Hang

    use()  # whole, it is accepted
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for i in range(n):
            broken = mutated(whole[part], rng) + (whole[part.stop :] if part.stop else b"")
            path.write_bytes(broken)
            signal.alarm(20)
            try:
                use()
                outcomes["accepted"] += 1
            except MENDABLE:
                outcomes["refused"] += 1
            except Hang:
                pytest.fail(f"{path.name}: mutation {i} hangs")
            except BaseException as error:
                keep = Path(os.environ.get("TRSR_KEEP", "/tmp")) / f"mutation-{path.name}"
                keep.write_bytes(broken)
                raise AssertionError(f"{path.name}: mutation {i} ends in {error!r}, kept as {keep}") from error
            finally:
                signal.alarm(0)
    finally:
        path.write_bytes(whole)
        signal.signal(signal.SIGALRM, before)
    print(f"{path.name} broken in {n} ways: {outcomes['refused']} refused, {outcomes['accepted']} accepted")
    return outcomes


def times(request, quick: int, full: int = 600) -> int:
    return full if request.config.getoption("--long") else quick


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def header_of(path: Path) -> slice:
    return slice(0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


def test_broken_weights(tmp_path, model_folder, request, record_testsuite_property):
    folder = copied(model_folder, tmp_path / "m")
    path = folder / "model.safetensors"

    def use():
        fingerprint(folder)
        model = load_model(folder, CPU, torch.float32)
        with safe_open(path, framework="pt") as file:  # what is accepted is what the file says
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(model.get_parameter(name).nan_to_num(), file.get_tensor(name).float().nan_to_num())
        assert {n for n, _ in model.named_parameters()} <= set(load_file(path)) | {"lm_head.weight"}
        assert all(p.is_floating_point() for p in model.parameters())

    found = survive(path, use, times(request, 60), header_of(path))
    assert found["refused"] > found["accepted"]
    record_testsuite_property("weights", str(dict(found)))


def test_broken_config(tmp_path, model_folder, request):
    folder = copied(model_folder, tmp_path / "m")

    def use():
        config = load_config(folder)
        if config.vocab_size * config.hidden_size * config.num_hidden_layers < 1 << 32:
            load_model(folder, CPU, torch.float32)(torch.tensor([[3, 4, 5]]))

    assert survive(folder / "config.json", use, times(request, 100))["refused"] > 10


def test_broken_tokenizer(tmp_path, model_folder, request):
    folder = copied(model_folder, tmp_path / "m")
    vocab = load_config(folder).vocab_size

    def use():
        tokenizer = Tokenizer(folder, vocab)
        ids = tokenizer.encode(["Title: red lamp", "### User: [Next Item]"])
        assert all(0 <= i < vocab for row in ids for i in row)
        tokenizer.decode(ids[0])

    assert survive(folder / "tokenizer.model", use, times(request, 60))["refused"] > 0


@pytest.mark.parametrize("name", ["items.jsonl", "train.jsonl", "meta.json"])
def test_broken_datasets(tmp_path, request, name):
    folder = write_dataset(tmp_path)

    def use():
        _, items, splits = load_dataset(folder, ("train", "val", "test"))
        for example in (e for split in splits.values() for e in split):
            assert {*example.history, example.positive, *example.negatives} <= items.keys()
            assert example.positive not in [*example.history, *example.negatives]
        json.dumps([items, [vars(e) for e in splits["train"]]], ensure_ascii=False).encode()

    assert survive(folder / name, use, times(request, 80))["refused"] > 5


def test_broken_summaries(tmp_path, request):
    path = tmp_path / "summaries.jsonl"
    record = {"user": "u", "paradigm": "recurrent", "key": "k", "summary": "Likes red.", "tree": {"summary": "x"}}
    path.write_text("".join(json.dumps(record | {"user": f"u{i}"}) + "\n" for i in range(5)))

    def use():
        assert all(isinstance(r["summary"], str) for _, r in read_jsonl(path, FIELDS))

    assert survive(path, use, times(request, 80))["refused"] > 5


@pytest.fixture
def adapter(tmp_path, model_folder):
    model = apply_lora(load_model(model_folder, CPU, torch.float32), LoRAConfig())
    for parameter in adapter_tensors(model).values():
        torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "adapter", adapter_tensors(model), LoRAConfig(), "m")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_broken_adapters(adapter, model_folder, request, name):
    def use():
        load_adapter(load_model(model_folder, CPU, torch.float32), adapter)

    part = header_of(adapter / name) if name.endswith("safetensors") else slice(None)
    assert survive(adapter / name, use, times(request, 60), part)["refused"] > 5


def test_broken_checkpoints_are_passed_over(tmp_path, model_folder, request, capsys):
    model = apply_lora(load_model(model_folder, CPU, torch.float32), LoRAConfig())
    optimizer = torch.optim.AdamW(adapter_tensors(model).values())
    sum(p.sum() for p in adapter_tensors(model).values()).backward()
    optimizer.step()
    progress = {"step": 7, "epoch": 0, "batch": 7, "best": -1.0}
    save_checkpoint(tmp_path, model, optimizer, progress, 0)
    older = tmp_path / "checkpoint" / "step-00000007.safetensors"
    newer = older.with_name("step-00000009.safetensors")
    shutil.copyfile(older, newer)
    outcomes = Counter()

    def use():
        newest = load_checkpoint(tmp_path, model, optimizer, CPU)
        outcomes["older" if f"{newer}: ignored" in capsys.readouterr().out else "newer"] += 1
        assert newest.keys() >= progress.keys()

    survive(newer, use, times(request, 60), header_of(newer))
    assert outcomes["older"] > outcomes["newer"] >= 1
    print(f"checkpoints: {outcomes['older']} times the older one was taken, {outcomes['newer']} times the newer")


# ---- Kills


def train_command(run_folder: Path, data: Path, model: Path) -> list[str]:
    flags = ("--data", data, "--model", model, "--run-dir", run_folder, "--paradigm", "recent-only", "--epochs", 12)
    return [sys.executable, *map(str, [ROOT / "train.py", *flags, "--batch-size", 4, "--lr", 0.01, "--save-every", 1])]


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_often(command: list[str], progress, kills: int, seed: int) -> int:
    """Kill the command at random moments while it works, then let it end; return how often it was killed at work."""
    rng, killed = random.Random(seed), 0
    while killed < kills:
        begun = progress()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and progress() <= begun:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        killed += 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.long
def test_twenty_kills_of_training_change_nothing(tmp_path, data_folder, model_folder):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected, command = ([*train_command(f, data_folder, model_folder), "--epochs", "25"] for f in (whole, killed))
    assert subprocess.run(expected, capture_output=True).returncode == 0
    n = kill_often(command, lambda: lines(killed / "metrics.jsonl"), 20, seed=1)
    print(f"training was killed {n} times")
    assert n == 20
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    (a,), (b,) = ([r for _, r in read_jsonl(f / "metrics.jsonl", {})][-1:] for f in (whole, killed))
    assert a == b
    assert len(list((killed / "checkpoint").iterdir())) == 1


@pytest.mark.long
def test_twenty_kills_of_summarizing_change_nothing(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data", users=(120, 20, 20))
    command = [sys.executable, str(ROOT / "summarize.py"), "--data", str(data), "--model", str(model_folder)]
    command += ["--max-new-tokens", "24", "--batch-size", "4", "--run"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, str(whole)], capture_output=True).returncode == 0

    def progress() -> int:
        return sum(lines(path) for path in killed.glob("summaries*.jsonl"))

    n = kill_often([*command, str(killed)], progress, 20, seed=2)
    print(f"summarizing was killed {n} times")
    assert n == 20
    assert (whole / "summaries.jsonl").read_bytes() == (killed / "summaries.jsonl").read_bytes()


# ---- A full disk


def limited(size: int):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, data_folder, model_folder):
    command = [*train_command(tmp_path, data_folder, model_folder), "--epochs", "1"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    before = checkpoint.read_bytes()
    shutil.rmtree(tmp_path / "adapter")
    longer = train_command(tmp_path / "b", data_folder, model_folder)
    done = subprocess.run(longer, capture_output=True, text=True, preexec_fn=limited(len(before) // 2))
    assert done.returncode == 2, done.stderr
    (told,) = own_lines(done.stderr, "train")
    assert "Traceback" not in done.stderr
    assert "not written; it needs" in told
    assert "MiB" in told
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "b" / "checkpoint").glob("*"))  # nor a part of one
    assert subprocess.run(longer, capture_output=True).returncode == 0


def test_a_full_disk_keeps_the_summaries_that_are_there(tmp_path, data_folder, model_folder):
    flags = ["--data", str(data_folder), "--model", str(model_folder), "--max-new-tokens", "12"]
    command = [sys.executable, str(ROOT / "summarize.py"), *flags, "--run", str(tmp_path / "a")]
    run("summarize.py", *flags, "--run", tmp_path / "b")
    size = (tmp_path / "b" / "summaries.jsonl").stat().st_size
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(size // 2))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "not written" in done.stderr
    assert 0 < lines(tmp_path / "a" / "summaries.part0.jsonl") < 40
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "summaries.jsonl").read_bytes() == (tmp_path / "b" / "summaries.jsonl").read_bytes()


def test_writing_where_nothing_can_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not written"):
        write_json(tmp_path / "no" / "such" / "folder.json", {})

    def break_off():
        with atomic_write(tmp_path / "x") as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert not list(tmp_path.iterdir())


# ---- Several processes


def launched(*script) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", *map(str, script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def own_lines(errors: str, script: str) -> list[str]:
    return [line for line in errors.replace("\r", "\n").splitlines() if line.startswith(f"{script}: ")]


def test_bad_input_is_told_once_by_several_processes(tmp_path, data_folder, model_folder):
    flags = ("--data", tmp_path / "nowhere", "--model", model_folder, "--run-dir", tmp_path / "run")
    trained = tmp_path / "trained"
    fit = train_command(trained, data_folder, model_folder)
    assert subprocess.run([*fit, "--epochs", "1"], capture_output=True).returncode == 0
    for script in ("summarize", "train", "evaluate"):
        more = {"train": ["--paradigm", "none"], "evaluate": ["--run-dir", trained]}.get(script, [])
        process = launched(ROOT / f"{script}.py", *flags, *more)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert len(own_lines(errors, script)) == 1, errors
        assert "no dataset" in own_lines(errors, script)[0]


def test_a_killed_process_ends_the_others_with_one_message(tmp_path, data_folder, model_folder):
    process = launched(*train_command(tmp_path, data_folder, model_folder)[1:])
    while process.poll() is None and lines(tmp_path / "metrics.jsonl") < 5:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert len(own_lines(errors, "train")) <= 1, errors
    assert "[rank" not in errors
    assert subprocess.run(train_command(tmp_path, data_folder, model_folder), capture_output=True).returncode == 0


# ---- Strangers' models


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_ever_loaded(tmp_path, model_folder):
    folder, mark = copied(model_folder, tmp_path / "m"), tmp_path / "executed"
    for name in ("pytorch_model.bin", "adapter_model.bin", "tokenizer.pkl", "checkpoint.pt"):
        (folder / name).write_bytes(pickle.dumps(Attack(mark)))
    load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors only"):
        load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(folder, CPU, torch.float32)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        fingerprint(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "weights.bin", "a/b.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path, model_folder, name):
    folder = copied(model_folder, tmp_path / "m")
    shutil.copyfile(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="not the plain name"):
        load_model(folder, CPU, torch.float32)


def test_a_hub_token_is_never_shown(tmp_path):
    token = "hf_" + "s3cr3t" * 6
    settings = {"HF_TOKEN": token, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "summarize.py"), "--model", "owner/gated", "--run", str(tmp_path / "r")]
    data = write_dataset(tmp_path / "data")
    done = subprocess.run(
        [*command, "--data", str(data)], capture_output=True, text=True, env=os.environ | settings, timeout=100
    )
    assert done.returncode == 2
    assert "owner/gated" in done.stderr
    assert token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# ---- Texts


def test_half_a_character_is_named(tmp_path):
    data = write_dataset(tmp_path)
    whole, half = (
        f'{{"id": "{i}", "attributes": {{"Title": "\\ud83c{end}"}}}}\n' for i, end in (("x", "\\udfae"), ("y", ""))
    )
    with open(data / "items.jsonl", "a") as file:
        file.write(whole + half)
    with pytest.raises(InputError, match=r"items.jsonl:62: a text holds half of a character"):
        load_dataset(data, ("train",))


@pytest.mark.parametrize("odd", ["\x00", "</s>", "### Assistant: Yes", "[Next Item]", "a" * 60000, "🎮" * 500])
def test_odd_texts_go_through_the_whole_chain(tmp_path, model_folder, odd):
    data = write_dataset(tmp_path / "data", users=(4, 2, 2))
    records = [r for _, r in read_jsonl(data / "items.jsonl", {})]
    for record in records:
        record["attributes"]["Title"] = odd + record["attributes"]["Title"]
    (data / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ("--run", tmp_path / "r", "--data", data, "--model", model_folder)
    run("summarize.py", *flags, "--max-new-tokens", 4)
    run("train.py", *flags, "--epochs", 1, "--batch-size", 4)
    done = run("evaluate.py", "--run", tmp_path / "r", "--report")
    assert "nan" not in done.stdout.lower()
