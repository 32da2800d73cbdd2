"""summarize.py as a command: what it writes, and that neither batches, processes nor interruptions change it."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from helpers import ROOT, run, write_dataset, write_model

import trsr
from files.jsonl import read_jsonl, write_json
from llama import load_model
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset
from state.settings import claim_config, locked, read_config
from state.summaries import FIELDS
from summarize import Generator


def summarize(run_folder, data, model, *more, **options):
    flags = (
        "--data",
        data,
        "--model",
        model,
        "--run-dir",
        run_folder,
        "--max-new-tokens",
        12,
        *more,
    )
    return run("summarize.py", *flags, **options)


def records(run_folder):
    return {
        record["user"]: record for _, record in read_jsonl(run_folder / "summaries.jsonl", FIELDS)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_folder, model_folder):
    """Runs of both paradigms by one process."""
    runs = {paradigm: tmp_path_factory.mktemp("runs") / paradigm for paradigm in trsr.SUMMARIZED}
    for paradigm, folder in runs.items():
        summarize(folder, data_folder, model_folder, "--paradigm", paradigm)
    return runs


@pytest.mark.parametrize("paradigm", trsr.SUMMARIZED)
def test_summaries_are_what_the_method_says_one_user_at_a_time(
    finished, data_folder, model_folder, paradigm
):
    domain, items, splits = load_dataset(data_folder, ("train", "val", "test"))
    model = load_model(model_folder, torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer(model_folder, 640)

    def answer(prompt):  # the slow oracle: no cache, no batch
        ids = tokenizer.encode([prompt])[0]
        new = []
        while len(new) < 12:
            token = model(torch.tensor([ids + new]))[0, -1].argmax().item()
            if token == 2:
                break
            new.append(token)
        return tokenizer.decode(new)

    found = records(finished[paradigm])
    examples = [e for split in splits.values() for e in split]
    assert list(found) == [e.user for e in examples]
    settings = json.loads((finished[paradigm] / "config.json").read_text())["summarize"]
    for example in examples[:6]:
        texts = [items[i] for i in example.history]
        budget = trsr.Budget(1024 - 12, tokenizer.encode, trsr.Counter())
        task = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}[paradigm](
            texts, domain, budget, 5
        )
        answers = None
        try:
            while True:
                answers = [answer(prompt) for prompt in task.send(answers)]
        except StopIteration as end:
            root = end.value
        record = found[example.user]
        assert record["tree"] == root
        assert record["summary"] == root["summary"]
        assert record["paradigm"] == paradigm
        assert record["key"] == trsr.content_hash([settings, texts])


def test_the_target_is_not_in_the_text_that_is_summarized(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data")
    before = [json.loads(line) for line in (data / "items.jsonl").read_text().splitlines()]
    examples = [
        json.loads(line) for s in ("train", "val", "test") for line in (data / f"{s}.jsonl").open()
    ]
    targets, histories = (
        {e["positive"] for e in examples},
        {i for e in examples for i in e["history"]},
    )
    summarize(tmp_path / "a", data, model_folder)
    alone = targets - histories
    assert alone
    with open(data / "items.jsonl", "w") as file:  # another text for what is only ever a target
        for item in before:
            item["attributes"] = {"Title": "changed"} if item["id"] in alone else item["attributes"]
            file.write(json.dumps(item) + "\n")
    summarize(tmp_path / "b", data, model_folder)
    assert (tmp_path / "a" / "summaries.jsonl").read_bytes() == (
        tmp_path / "b" / "summaries.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("more", [("--batch-size", 3), ("--batch-size", 1)])
def test_batches_do_not_change_the_file(tmp_path, finished, data_folder, model_folder, more):
    summarize(tmp_path / "run", data_folder, model_folder, *more)
    assert (tmp_path / "run/summaries.jsonl").read_bytes() == (
        finished["hierarchical"] / "summaries.jsonl"
    ).read_bytes()


def test_two_processes_write_the_same_file(tmp_path, finished, data_folder, model_folder):
    summarize(tmp_path / "run", data_folder, model_folder, processes=2)
    assert (tmp_path / "run/summaries.jsonl").read_bytes() == (
        finished["hierarchical"] / "summaries.jsonl"
    ).read_bytes()
    assert not list((tmp_path / "run").glob("summaries.part*"))


def test_interruptions_at_random_moments_lose_no_finished_user(tmp_path, model_folder):
    # Seconds of work, since a busy machine is late to interrupt it.
    data = write_dataset(tmp_path / "data", users=(150, 4, 4))
    summarize(tmp_path / "whole", data, model_folder)
    folder, rng = tmp_path / "run", random.Random(0)
    command = [
        sys.executable,
        ROOT / "summarize.py",
        "--data",
        data,
        "--model",
        model_folder,
        "--run",
        folder,
    ]
    command = list(map(str, [*command, "--max-new-tokens", "12", "--batch-size", "1"]))

    def finished_users():
        users = set()  # some are in two files for a moment, and then the part is gone
        for path in folder.glob("summaries*.jsonl"):
            with suppress(FileNotFoundError):
                users.update(line.split(b'"')[3] for line in path.read_bytes().split(b"\n")[:-1])
        return len(users)

    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = finished_users()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and finished_users() <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(kind)
        _, errors = process.communicate()
        assert process.returncode == (-kind if kind == signal.SIGKILL else 130), errors
        if kind != signal.SIGKILL:
            assert (
                errors.splitlines()[-1]
                == "summarize: interrupted; what is done is kept, use the same command"
            )
            assert "Traceback" not in errors
        assert before < finished_users() < 158
    with open(folder / "summaries.part0.jsonl", "ab") as file:
        file.write(b'{"user": "torn')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "an interruption cut this line short" in done.stderr
    assert (folder / "summaries.jsonl").read_bytes() == (
        tmp_path / "whole/summaries.jsonl"
    ).read_bytes()


def test_a_second_call_does_nothing_and_a_changed_history_is_summarized_again(
    tmp_path, model_folder
):
    data = write_dataset(tmp_path / "data")
    summarize(tmp_path / "run", data, model_folder)
    assert "20 of them summarized before" in summarize(tmp_path / "run", data, model_folder).stdout
    before = records(tmp_path / "run")
    lines = (data / "val.jsonl").read_text().splitlines()
    example = json.loads(lines[0])
    lines[0] = json.dumps(example | {"history": example["history"][1:]})
    (data / "val.jsonl").write_text("\n".join(lines) + "\n")
    assert "19 of them summarized before" in summarize(tmp_path / "run", data, model_folder).stdout
    after = records(tmp_path / "run")
    assert {user for user in before if before[user] != after[user]} == {example["user"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--paradigm", "recurrent"), "paradigm 'hierarchical' (now 'recurrent')"),
        (("--block-size", "3"), "block_size 5 (now 3)"),
    ],
)
def test_other_settings_in_the_same_run_are_refused(
    finished, data_folder, model_folder, more, message
):
    done = summarize(finished["hierarchical"], data_folder, model_folder, *more, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(records(finished["hierarchical"])) == 20


def test_another_model_in_the_same_run_is_refused(tmp_path, finished, data_folder, model_folder):
    write_model(tmp_path / "model", seed=5)
    (tmp_path / "model" / "tokenizer.model").write_bytes(
        (model_folder / "tokenizer.model").read_bytes()
    )
    done = summarize(finished["hierarchical"], data_folder, tmp_path / "model", check=False)
    assert done.returncode == 2
    assert "fingerprint" in done.stderr


def test_bad_input_is_answered_in_one_line(tmp_path, data_folder, model_folder):
    def message(data, model, *more):
        done = summarize(tmp_path / "run", data, model, *more, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        (line,) = done.stderr.strip().splitlines()[-1:]
        return line

    assert "python -m prepare.demo" in message(tmp_path / "nowhere", model_folder)
    assert "no such model folder" in message(data_folder, tmp_path / "nowhere")
    write_model(tmp_path / "model")
    assert "copy the model's own there" in message(data_folder, tmp_path / "model")
    assert "expected a whole number from 1" in message(
        data_folder, model_folder, "--block-size", "0"
    )
    assert "no room for the instruction" in message(data_folder, model_folder, "--max-length", "40")


def test_settings_of_a_run_stay_once_work_has_started(tmp_path):
    common = {
        "data": "d",
        "model": "m",
        "paradigm": "none",
        "dtype": "fp32",
        "fingerprint": "f",
        "max_length": 9,
    }
    common |= {"history_items": 3, "lora_r": 8}
    claim_config(tmp_path, "train", common | {"lr": 7}, started=False)
    claim_config(
        tmp_path, "train", common | {"lr": 0.1, "k": (1, 2)}, started=False
    )  # nothing was done with the others
    claim_config(tmp_path, "train", common | {"lr": 0.1, "k": [1, 2]}, started=True)
    claim_config(tmp_path, "summarize", common | {"lr": 3}, started=True)
    with pytest.raises(trsr.InputError, match=r"lr 0\.1 \(now 0\.2\)"):
        claim_config(tmp_path, "train", common | {"lr": 0.2, "k": [1, 2]}, started=True)
    found = read_config(tmp_path)
    assert found == {"train": common | {"lr": 0.1, "k": [1, 2]}, "summarize": common | {"lr": 3}}
    for section, message in (
        (
            {"train": common | {"max_length": "9"}},
            "in 'train': field 'max_length' is a str, expected int",
        ),
        (
            {"train": common | {"paradigm": "nine"}},
            "in 'train': no settings that a script here would write",
        ),
        ({"tarin": common}, "in 'tarin': no settings that a script here would write"),
        ({"summarize": []}, "in 'summarize': field 'data' is missing"),
    ):
        write_json(tmp_path / "config.json", section)
        with pytest.raises(trsr.InputError, match=f"config.json: {message}"):
            read_config(tmp_path)


def test_a_second_process_in_a_run_folder_is_refused(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(trsr.InputError, match="another process"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "run", hold=False):
            pass
    with locked(tmp_path / "run"):
        pass


def test_out_of_memory_goes_on_with_fewer_prompts_a_batch(
    tmp_path, data_folder, model_folder, monkeypatch, capfd
):
    flags = ("--data", data_folder, "--model", model_folder, "--max-new-tokens", 12)
    run("summarize.py", *flags, "--run", tmp_path / "a")
    real = Generator._decode

    def full(self):
        if self.n_rows > 5:
            raise torch.OutOfMemoryError("no room")
        return real(self)

    monkeypatch.setattr(Generator, "_decode", full)
    done = run("summarize.py", *flags, "--run", tmp_path / "b")
    told = done.stdout + done.stderr
    assert "out of memory: going on with 8 prompts a batch" in told
    assert "out of memory: going on with 4 prompts a batch" in told
    assert (tmp_path / "a" / "summaries.jsonl").read_bytes() == (
        tmp_path / "b" / "summaries.jsonl"
    ).read_bytes()
    monkeypatch.setattr(
        Generator, "_decode", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    )
    done = run("summarize.py", *flags, "--run", tmp_path / "c", check=False)
    assert done.returncode == 2
    assert "out of memory with one prompt a batch" in done.stderr
