"""summarize.py: generation against its oracles, and summaries that no batch or process changes."""

import random
import signal
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest
import torch
from helpers import (
    CPU,
    command,
    generate,
    random_ids,
    random_prompts,
    read_lines,
    run,
    started,
    wait_until,
    write_dataset,
    write_lines,
    write_model,
)

import trsr
from files.jsonl import read_json, read_jsonl
from llama import load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset
from state.summaries import FIELDS
from summarize import Generator, generate_slowly

# ---- Greedy generation


def test_greedy_ids_equal_transformers_generate(architecture, folder, tiny):
    reference = architecture.reference.from_pretrained(folder).eval()
    prompts = random_prompts(5, 61, 23, 40, 8, 33)
    width, eos = max(map(len, prompts)), architecture.eos
    # Padding is on the left; as a token that no text has.
    padded = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 1}
    out = reference.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
    expected = [row[: row.index(eos)] if eos in row else row for row in out]
    assert max(map(len, expected)) == 64
    for batch_size in (6, 3):
        assert generate(tiny, prompts, 64, [eos], batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_greedy_ids_are_those_of_the_obvious_way(architecture, tiny, batch_size):
    prompts = random_prompts(5, 61, 23, 40, 8, 33, 12)
    eos = architecture.eos
    slowly = [generate_slowly(tiny, prompt, 24, [eos]) for prompt in prompts]
    assert generate(tiny, prompts, 24, [eos], batch_size) == slowly


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_prompts_that_share_a_prefix_continue_as_if_alone(tiny, batch_size):
    parts = random_prompts(40, 45, 9, 21, 7, 33, 14, 18)
    prompts = [parts[i % 2] + parts[2 + i] for i in range(6)] + [parts[3], parts[0] + parts[2]]
    alone = [generate_slowly(tiny, prompt, 24, [2]) for prompt in prompts]
    assert generate(tiny, prompts, 24, [2], batch_size) == alone


def test_prompts_that_come_late_and_first(tiny):
    prompts = random_prompts(25, 61, 23, 40, 8, 33, 12)
    generator, found = Generator(tiny, 2, 12, [2]), []
    generator.submit(enumerate(prompts[:4]))
    while generator.waiting or generator.rows:
        for key, ids in generator.step():
            found.append(key)
            assert ids == generate_slowly(tiny, prompts[key], 12, [2])
            if key == 0:
                generator.submit(enumerate(prompts[4:], 4), first=True)
    assert sorted(found) == list(range(7))
    assert found.index(6) < found.index(3)


def test_generation_stops_at_the_end_token(tiny):
    prompt = random_ids(9).tolist()
    free = generate_slowly(tiny, prompt, 16, [])
    assert generate(tiny, [prompt], 16, [])[0] == free
    stop = free[5]
    assert generate(tiny, [prompt], 16, [stop])[0] == free[: free.index(stop)]
    assert generate_slowly(tiny, prompt, 16, [stop]) == free[: free.index(stop)]
    assert generate(tiny, [], 16, [2]) == []


# ---- Summaries


@pytest.fixture
def summarize(data_folder, model_folder):
    """Return the function that summarizes the small dataset in a run folder."""
    common = {"data": data_folder, "model": model_folder, "max_new_tokens": 12}
    return lambda folder, **settings: run("summarize.py", run=folder, **common | settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_folder, model_folder):
    """Runs of both paradigms by one process."""
    runs = {paradigm: tmp_path_factory.mktemp("runs") / paradigm for paradigm in trsr.SUMMARIZED}
    common = {"data": data_folder, "model": model_folder, "max_new_tokens": 12}
    for paradigm, folder in runs.items():
        run("summarize.py", run=folder, paradigm=paradigm, **common)
    return runs


def summaries(folder):
    return (folder / "summaries.jsonl").read_bytes()


def records(folder):
    return {record["user"]: record for _, record in read_jsonl(folder / "summaries.jsonl", FIELDS)}


@pytest.mark.parametrize("paradigm", trsr.SUMMARIZED)
def test_summaries_are_what_the_method_says_one_user_at_a_time(
    finished, data_folder, model_folder, paradigm
):
    domain, items, splits = load_dataset(data_folder, ("train", "val", "test"))
    model, tokenizer = load_model(model_folder, CPU, torch.float32), Tokenizer(model_folder, 640)
    form = Plain(tokenizer)

    def answers(prompts):  # no cache, no batch
        slowly = partial(generate_slowly, model, max_new_tokens=12, eos_ids=[2])
        return [tokenizer.decode(slowly(ids)) for ids in form.encode(prompts)]

    found = records(finished[paradigm])
    examples = [e for split in splits.values() for e in split]
    assert list(found) == [e.user for e in examples]
    settings = read_json(finished[paradigm] / "config.json")["summarize"]
    for example in examples[:6]:
        texts = [items[i] for i in example.history]
        budget = trsr.Budget(1024 - 12, form.encode, Counter())
        root = trsr.solve(getattr(trsr, paradigm)(texts, domain, budget, 5), answers)
        record = found[example.user]
        assert record["tree"] == root
        assert record["summary"] == root["summary"]
        assert record["paradigm"] == paradigm
        assert record["key"] == trsr.content_hash([settings, texts])


def test_the_target_is_not_in_the_text_that_is_summarized(tmp_path, summarize):
    data = write_dataset(tmp_path / "data")
    examples = [
        e for split in ("train", "val", "test") for e in read_lines(data / f"{split}.jsonl")
    ]
    targets = {example["positive"] for example in examples}
    alone = targets - {item for example in examples for item in example["history"]}
    assert alone
    summarize(tmp_path / "a", data=data)
    items = read_lines(data / "items.jsonl")
    for item in items:  # another text for what is only ever a target
        if item["id"] in alone:
            item["attributes"] = {"Title": "changed"}
    write_lines(data / "items.jsonl", items)
    summarize(tmp_path / "b", data=data)
    assert summaries(tmp_path / "a") == summaries(tmp_path / "b")


@pytest.mark.parametrize("batch_size", [3, 1])
def test_batches_do_not_change_the_file(tmp_path, finished, summarize, batch_size):
    summarize(tmp_path / "run", batch_size=batch_size)
    assert summaries(tmp_path / "run") == summaries(finished["hierarchical"])


def test_two_processes_write_the_same_file(tmp_path, finished, summarize):
    summarize(tmp_path / "run", processes=2)
    assert summaries(tmp_path / "run") == summaries(finished["hierarchical"])
    assert not list((tmp_path / "run").glob("summaries.part*"))


def test_out_of_memory_continues_with_fewer_prompts_per_batch(tmp_path, summarize, monkeypatch):
    summarize(tmp_path / "a")
    real = Generator._decode

    def full(self):
        if self.n_rows > 5:
            raise torch.OutOfMemoryError("no room")
        return real(self)

    def always_full(self):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Generator, "_decode", full)
    done = summarize(tmp_path / "b")
    said = done.stdout + done.stderr
    assert "out of memory: continuing with 8 prompts per batch" in said
    assert "out of memory: continuing with 4 prompts per batch" in said
    assert summaries(tmp_path / "a") == summaries(tmp_path / "b")
    monkeypatch.setattr(Generator, "_decode", always_full)
    done = summarize(tmp_path / "c", check=False)
    assert done.returncode == 2
    assert "out of memory with one prompt per batch" in done.stderr


# ---- Resuming


def test_interruptions_at_random_moments_lose_no_finished_user(tmp_path, model_folder):
    # More work than is done before the interruptions, also on a busy machine.
    data = write_dataset(tmp_path / "data", users=(80, 4, 4))
    common = {"data": data, "model": model_folder, "max_new_tokens": 12}
    run("summarize.py", run=tmp_path / "whole", **common)
    folder, rng = tmp_path / "run", random.Random(0)
    common |= {"run": folder, "batch_size": 1}
    line = command("summarize.py", **common)

    def finished_users():
        users = set()  # some are in two files for a moment, and then the part is gone
        for path in folder.glob("summaries*.jsonl"):
            with suppress(FileNotFoundError):
                users.update(line.split(b'"')[3] for line in path.read_bytes().split(b"\n")[:-1])
        return len(users)

    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = finished_users()
        enough = before + rng.randint(1, 9)
        process = started(line)
        wait_until(lambda enough=enough: finished_users() >= enough, process)
        process.send_signal(kind)
        _, errors = process.communicate()
        assert process.returncode == (-kind if kind == signal.SIGKILL else 130), errors
        if kind != signal.SIGKILL:
            said = "summarize: interrupted; finished work is kept, the same command resumes"
            assert errors.splitlines()[-1] == said
            assert "Traceback" not in errors
        assert before < finished_users() < 88
    with open(folder / "summaries.part0.jsonl", "ab") as file:
        file.write(b'{"user": "torn')  # as a kill in the middle of a write leaves it
    done = run("summarize.py", **common)
    assert "an interruption cut this line short" in done.stderr
    assert summaries(folder) == summaries(tmp_path / "whole")


def test_a_second_call_does_nothing_and_a_changed_history_is_summarized_again(tmp_path, summarize):
    data, folder = write_dataset(tmp_path / "data"), tmp_path / "run"
    summarize(folder, data=data)
    assert "20 of them summarized before" in summarize(folder, data=data).stdout
    before = records(folder)
    example, *rest = read_lines(data / "val.jsonl")
    write_lines(data / "val.jsonl", [example | {"history": example["history"][1:]}, *rest])
    assert "19 of them summarized before" in summarize(folder, data=data).stdout
    after = records(folder)
    assert {user for user in before if before[user] != after[user]} == {example["user"]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"paradigm": "recurrent"}, "paradigm 'hierarchical' (now 'recurrent')"),
        ({"block_size": 3}, "block_size 5 (now 3)"),
    ],
)
def test_other_settings_in_the_same_run_are_refused(finished, summarize, setting, message):
    done = summarize(finished["hierarchical"], **setting, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(records(finished["hierarchical"])) == 20


def test_another_model_in_the_same_run_is_refused(tmp_path, finished, summarize, tokenizer_model):
    write_model(tmp_path, seed=5, tokenizer=tokenizer_model)
    done = summarize(finished["hierarchical"], model=tmp_path, check=False)
    assert done.returncode == 2
    assert "the model's files are other ones now; use what it was made with" in done.stderr


def test_bad_input_is_answered_in_one_line(tmp_path, summarize):
    def message(**settings):
        done = summarize(tmp_path / "run", **settings, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "docs/data.md says how to make one" in message(data=tmp_path / "nowhere")
    assert "no such model folder" in message(model=tmp_path / "nowhere")
    write_model(tmp_path / "model")
    assert "copy the model's own there" in message(model=tmp_path / "model")
    assert "expected a whole number from 1" in message(block_size=0)
    assert "no room for the instruction" in message(max_length=40)
