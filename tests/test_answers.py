"""state/answers.py: no prompt is asked twice, and what is written stays what it was."""

import json
import random
import re
import signal
from collections import Counter

import pytest
import torch
from helpers import (
    CPU,
    command,
    count_lines,
    read_lines,
    run,
    started,
    wait_until,
    write_dataset,
    write_lines,
)

import summarize
import trsr
from batches.tasks import Writer, run_tasks
from llama import load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.domains import DOMAINS
from state.answers import Answers, collect_answers
from trsr import InputError

SETTINGS = {"model": "m", "fingerprint": "f", "max_new_tokens": 12}


def asked(done):
    """How many prompts a call of summarize.py asked, and how many answers were known."""
    return tuple(map(int, re.search(r"asked +(\d+) prompts; (\d+) more", done.stdout).groups()))


def grown(data):
    """Give each user three items more."""
    for split in ("train", "val", "test"):
        examples = read_lines(data / f"{split}.jsonl")
        for example in examples:
            taken = {*example["history"], example["positive"], *example["negatives"]}
            others = [f"i{n}" for n in range(60) if f"i{n}" not in taken]
            example["history"] += random.Random(example["user"]).sample(others, 3)
        write_lines(data / f"{split}.jsonl", examples)


# ---- The file


def test_an_answer_is_known_by_settings_and_prompt_but_not_by_the_dataset(tmp_path):
    answers = Answers(tmp_path, SETTINGS | {"data": "a"})
    assert answers.get("prompt") is None
    answers.add("prompt", "says é\n", "end")
    assert answers.get("prompt") == ("says é\n", "end")
    collect_answers(tmp_path)
    assert Answers(tmp_path, SETTINGS | {"data": "b"}).get("prompt") == ("says é\n", "end")
    for other in ({"max_new_tokens": 13}, {"fingerprint": "g"}, {"int8": "weights"}):
        assert Answers(tmp_path, SETTINGS | other).get("prompt") is None
    assert answers.get("prompt ") is None
    assert "prompt" not in (tmp_path / "answers.jsonl").read_text()  # a hash stands for it


def test_parts_are_merged_and_a_torn_line_is_dropped(tmp_path, capsys):
    for rank in range(3):
        Answers(tmp_path, SETTINGS, rank).add(f"prompt {rank}", f"answer {rank}", "limit")
    with open(tmp_path / "answers.part1.jsonl", "a") as file:
        file.write('{"key": "torn')
    collect_answers(tmp_path)
    assert "answers.part1.jsonl:2: dropped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    Answers(tmp_path, SETTINGS, 0).add("prompt 3", "answer 3", "end")
    collect_answers(tmp_path)
    found = Answers(tmp_path, SETTINGS)
    for rank in range(4):
        assert found.get(f"prompt {rank}") == (f"answer {rank}", "end" if rank == 3 else "limit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "k", "answer": 3, "ended": "end"}', "answers.jsonl:1: field 'answer' is an int"),
        ('{"key": "k", "answer": "a", "ended": "x"}', "answers.jsonl:1: field 'ended' is 'x'"),
        ("not JSON", "answers.jsonl:1: not JSON"),
    ],
)
def test_a_broken_file_is_named_with_a_way_out(tmp_path, line, message):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        Answers(tmp_path, SETTINGS)
    assert str(caught.value).endswith("delete answers.jsonl, which only saves work")


# ---- The engine


@pytest.mark.parametrize("paradigm", [trsr.hierarchical, trsr.recurrent])
def test_trees_and_ends_are_the_same_whatever_is_known(tmp_path, model_folder, paradigm):
    model, tokenizer = load_model(model_folder, CPU, torch.float32), Tokenizer(model_folder, 640)
    form, domain = Plain(tokenizer), DOMAINS["products"]
    users = {f"u{n}": [f"Title: item {n} {i}" for i in range(n)] for n in (0, 4, 13, 7, 22)}

    def summarized(answers):
        budget = trsr.Budget(500, form.encode, Counter())
        writer = Writer(summarize.Generator(model, 3, 12, [2, 300]), form, answers=answers)
        tasks = ((u, paradigm(items, domain, budget, 5)) for u, items in users.items())
        return dict(run_tasks(tasks, writer)), dict(writer.ends), writer.counts

    roots, ends, counts = summarized(None)
    total = counts.total()
    first = Answers(tmp_path, SETTINGS)
    assert summarized(first)[:2] == (roots, ends)

    keys, rng = list(first.found), random.Random(0)
    for n in (1, len(keys) // 2, len(keys)):
        some = Answers(tmp_path, SETTINGS)
        some.found = {key: first.found[key] for key in rng.sample(keys, n)}
        found, how, counts = summarized(some)
        assert (found, how) == (roots, ends)
        assert counts == {"asked": len(keys) - n, "known": total - len(keys) + n}


# ---- The command


@pytest.fixture
def call(tmp_path, model_folder):
    """Return the function that summarizes a dataset of the test's own in a run folder."""
    data = write_dataset(tmp_path / "data", history=(9, 14))
    common = {"data": data, "model": model_folder, "max_new_tokens": 12}
    return lambda name, **more: run("summarize.py", run=tmp_path / name, **common | more)


def expected_prompts(before, after):
    """The prompts of all users, and of those whose block and what stands above it are new.

    before, after: the lines of summaries.jsonl. Each history has three items more.
    """
    merged, whole, new = {merge_of(record["tree"]) for record in before}, 0, 0
    for record in after:
        spans = spans_of(record["tree"])
        whole += len(spans)
        new += sum(end > spans[-1][1] - 3 for _, end in spans)
        if merge := merge_of(record["tree"]):
            whole += 1
            new += merge not in merged  # the same summaries have the same one above them
            merged.add(merge)
    return whole, new


def merge_of(tree):
    """The summaries that were merged; the context has room for all of them."""
    return tuple(child["summary"] for child in tree.get("children", ()))


def spans_of(tree):
    """The first and the end of each block's items."""
    if "children" in tree:
        return [child["items"] for child in tree["children"]]
    return [*(spans_of(tree["previous"]) if "previous" in tree else ()), tree["items"]]


@pytest.mark.parametrize("paradigm", ["hierarchical", "recurrent"])
def test_a_grown_history_costs_its_new_blocks_and_what_stands_above(tmp_path, call, paradigm):
    call("run", paradigm=paradigm)
    before = read_lines(tmp_path / "run/summaries.jsonl")
    grown(tmp_path / "data")
    done = call("run", paradigm=paradigm)
    whole, new = expected_prompts(before, read_lines(tmp_path / "run/summaries.jsonl"))
    assert "0 of them summarized before" in done.stdout
    assert asked(done) == (new, whole - new)

    fresh = call("fresh", paradigm=paradigm)
    answers = count_lines(tmp_path / "fresh/answers.jsonl")
    assert asked(fresh) == (answers, whole - answers)  # two users may have the same merge
    written = [(tmp_path / name / "summaries.jsonl").read_bytes() for name in ("run", "fresh")]
    assert written[0] == written[1]
    assert asked(call("run", paradigm=paradigm)) == (0, 0)


def test_two_processes_share_what_is_known(tmp_path, call):
    call("run", processes=2)
    assert not list((tmp_path / "run").glob("answers.part*"))
    grown(tmp_path / "data")
    done = call("run", processes=2)
    alone = call("alone")
    assert sum(asked(done)) == sum(asked(alone))
    assert asked(done)[0] < asked(alone)[0] * 0.7
    written = [(tmp_path / name / "summaries.jsonl").read_bytes() for name in ("run", "alone")]
    assert written[0] == written[1]


def test_a_run_without_answers_goes_on(tmp_path, call):
    call("run")
    before = (tmp_path / "run/summaries.jsonl").read_bytes()
    (tmp_path / "run/answers.jsonl").unlink()
    assert asked(call("run")) == (0, 0)
    assert (tmp_path / "run/summaries.jsonl").read_bytes() == before
    grown(tmp_path / "data")
    assert asked(call("run")) == asked(call("fresh"))
    after = [(tmp_path / name / "summaries.jsonl").read_bytes() for name in ("run", "fresh")]
    assert after[0] == after[1]


def test_a_kill_loses_no_answered_block(tmp_path, model_folder):
    """All users have begun by then, and none is done: a rerun asks only what was not answered."""
    data = write_dataset(tmp_path / "data", users=(6, 2, 2), history=(40, 48))
    common = {"data": data, "model": model_folder, "max_new_tokens": 12, "batch_size": 1}
    common |= {"paradigm": "recurrent", "block_size": 2}
    whole = run("summarize.py", run=tmp_path / "whole", **common)
    folder = tmp_path / "run"
    process = started(command("summarize.py", run=folder, **common))
    wait_until(lambda: count_lines(folder / "answers.part0.jsonl") >= 30, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = read_lines(folder / "summaries.jsonl")
    if (part := folder / "summaries.part0.jsonl").is_file():
        finished += [json.loads(line) for line in part.read_bytes().split(b"\n")[:-1]]
    used = sum(sum(record["ends"].values()) for record in finished)
    kept = count_lines(folder / "answers.part0.jsonl")
    assert kept > used  # a user is under way

    done = run("summarize.py", run=folder, **common)
    assert asked(done)[0] == asked(whole)[0] - kept
    assert sum(asked(done)) == sum(asked(whole)) - used
    written = [(tmp_path / name / "summaries.jsonl").read_bytes() for name in ("run", "whole")]
    assert written[0] == written[1]


def test_answers_of_other_settings_are_not_used(tmp_path, call):
    total = sum(asked(call("run")))
    distinct = count_lines(tmp_path / "run/answers.jsonl")
    (tmp_path / "run/summaries.jsonl").unlink()  # so that the run may have other settings
    call("run", max_new_tokens=11)
    assert count_lines(tmp_path / "run/answers.jsonl") > 1.5 * distinct
    (tmp_path / "run/summaries.jsonl").unlink()
    assert asked(call("run")) == (0, total)


def test_a_broken_file_ends_the_command_in_one_line(tmp_path, call):
    call("run")
    (tmp_path / "run/summaries.jsonl").unlink()
    change_json_line(tmp_path / "run/answers.jsonl")
    done = call("run", check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "answers.jsonl:1: field 'answer' is missing" in last
    assert last.endswith("which only saves work")


def change_json_line(path):
    """Take the answer out of the first line."""
    first, *rest = read_lines(path)
    first.pop("answer")
    write_lines(path, [first, *rest])
