"""state/summaries.py: summaries are merged, checked against their histories, and lent."""

import json
import os

import pytest
from helpers import change_json, read_lines, run, write_dataset, write_lines

from prepare.dataset import load_dataset
from state.settings import read_config
from state.summaries import collect_records, load_summaries, share_summaries
from trsr import InputError


def record(user, key="k", summary="Likes red."):
    tree = {"summary": summary}
    return {"user": user, "paradigm": "recurrent", "key": key, "summary": summary, "tree": tree}


def test_what_processes_wrote_is_merged_into_one_file(tmp_path, capsys):
    write_lines(tmp_path / "summaries.jsonl", [record("a"), record("b", "old")])
    write_lines(tmp_path / "summaries.part0.jsonl", [record("b", "new")])
    write_lines(tmp_path / "summaries.part1.jsonl", [record("c")])
    with open(tmp_path / "summaries.part1.jsonl", "a") as file:
        file.write('{"user": "torn')
    found = collect_records(tmp_path)
    assert {user: r["key"] for user, r in found.items()} == {"a": "k", "b": "new", "c": "k"}
    assert read_lines(tmp_path / "summaries.jsonl") == list(found.values())
    assert [path.name for path in tmp_path.iterdir()] == ["summaries.jsonl"]
    assert "an interruption cut this line short" in capsys.readouterr().err


def test_summaries_of_another_history_are_refused(tmp_path, model_folder):
    data, folder = write_dataset(tmp_path / "data"), tmp_path / "run"
    run("summarize.py", data=data, model=model_folder, run=folder, max_new_tokens=8)
    done = run("train.py", run=folder, epochs=1)
    assert "hierarchical, 3 recent items" in done.stdout
    example, *rest = read_lines(data / "train.jsonl")
    changed = example | {"history": example["history"][1:]}
    write_lines(data / "train.jsonl", [changed, *rest])
    done = run("train.py", run=folder, epochs=1, check=False)
    assert done.returncode == 2
    assert f"user {example['user']!r}: the summary is of another history" in done.stderr


def test_lent_summaries_are_those_of_the_other_run(tmp_path, data_folder, model_folder):
    lender, borrower = tmp_path / "lender", tmp_path / "borrower"
    common = {"data": data_folder, "model": model_folder, "max_new_tokens": 4}
    run("summarize.py", **common, run=lender)
    share_summaries(lender, borrower)
    assert os.path.samefile(lender / "summaries.jsonl", borrower / "summaries.jsonl")
    assert read_config(borrower) == read_config(lender)
    _, items, splits = load_dataset(data_folder, ("train",))
    assert load_summaries(borrower, items, splits["train"]).keys() == {
        example.user for example in splits["train"]
    }
    (borrower / "checkpoint").mkdir()  # a run that was trained with them takes no others
    config = json.loads((lender / "config.json").read_text())["summarize"]
    change_json(lender / "config.json", summarize=config | {"block_size": 3})
    with pytest.raises(InputError, match=r"block_size 5 \(now 3\)"):
        share_summaries(lender, borrower)
