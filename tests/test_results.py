"""runfolder/results.py: the answer to one question never replaces another's."""

import shutil
from pathlib import Path

import pytest
from helpers import run, scores, write_dataset

from files.jsonl import read_json
from runfolder.results import Question
from state.checkpoint import epochs_done


@pytest.fixture
def copied(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_names_of_files(tmp_path):
    own = Question(tmp_path)
    assert [path.name for path in (own.results, own.scores, own.report)] == [
        "results.json",
        "scores-test.jsonl",
        "report.html",
    ]
    other = Question(tmp_path, "val", ["untrained", "20-users"])
    assert [path.name for path in (other.results, other.scores, other.report)] == [
        "results-val-untrained-20-users.json",
        "scores-val-untrained-20-users.jsonl",
        "report-val-untrained-20-users.html",
    ]


def test_another_question_gets_another_file(copied, tmp_path):
    run("evaluate.py", "--report", run=copied)
    before = {path: path.read_bytes() for path in copied.glob("*") if path.is_file()}
    other = write_dataset(tmp_path / "other", seed=3)
    run("evaluate.py", run=copied, users=2)
    run("evaluate.py", run=copied, split="val")
    run("evaluate.py", run=copied, data=other)
    run("evaluate.py", "--untrained", run=copied)
    assert {path: path.read_bytes() for path in before} == before
    assert len(scores(copied, "scores-test-2-users.jsonl")) == 2
    assert read_json(copied / "results-2-users.json")["users"] == 2
    assert read_json(copied / "results-val.json")["split"] == "val"
    assert read_json(copied / "results-other.json")["data"] == str(other)
    assert read_json(copied / "results-untrained.json")["row"] == "untrained"


def test_an_unfinished_run_is_told_and_kept_apart(tmp_path, data_folder, model_folder):
    train = {"data": data_folder, "model": model_folder, "paradigm": "recent-only"}
    run("train.py", run=tmp_path, **train, epochs=2, batch_size=8)
    latest = max((tmp_path / "checkpoint").glob("step-*"))
    assert epochs_done(tmp_path) == 2
    run("evaluate.py", run=tmp_path)
    assert (tmp_path / "results.json").is_file()

    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "results.json").unlink()
    run("train.py", run=tmp_path / "one", **train, epochs=1, batch_size=8)
    shutil.copytree(tmp_path / "one/checkpoint", tmp_path / "checkpoint")
    assert latest.name not in {path.name for path in (tmp_path / "checkpoint").iterdir()}
    out = run("evaluate.py", run=tmp_path).stdout
    assert "unfinished: the best of 1 of 2 epochs" in out
    assert not (tmp_path / "results.json").exists()
    assert read_json(tmp_path / "results-interim.json")["epochs"] == "1 of 2 epochs"


def test_tables_for_a_spreadsheet_do_not_stay_behind(copied):
    run("evaluate.py", run=copied, csv=True, report=True)
    before = (copied / "results.csv").read_text()
    out = run("evaluate.py", run=copied, k=(2,)).stdout
    assert {"results.csv", "scores-test.csv", "report.html"} <= {
        Path(w.strip(",")).name for w in out.split()
    }
    after = (copied / "results.csv").read_text()
    assert "Recall@2" in after
    assert "Recall@2" not in before


def test_files_that_answer_another_question_are_not_replaced(copied, tmp_path):
    def message(**settings):
        done = run("evaluate.py", run=copied, check=False, **settings)
        return done.stderr.splitlines()[-1] if done.returncode else ""

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pool.txt").write_text("i1\ni2\ni3\n")
    assert message(candidates=tmp_path / "one/pool.txt") == ""
    assert message(candidates=tmp_path / "one/../one/pool.txt") == ""
    said = message(candidates=tmp_path / "two/pool.txt")
    assert "results-candidates-pool.json: is of candidates_file" in said
    assert "move or remove it, or choose another --run" in said

    assert message() == ""
    other = tmp_path / "untrained.jsonl"
    shutil.copy(copied / "scores-test.jsonl", other)
    assert message(untrained=True) == ""
    assert "results-untrained.json: is of model" in message(scores=other)
    other.rename(tmp_path / "mine.jsonl")
    assert message(scores=tmp_path / "mine.jsonl") == ""
    assert message(scores=tmp_path / "mine.jsonl", users=2) == ""
    found = read_json(copied / "results-mine.json"), read_json(copied / "results-mine-2-users.json")
    assert [results["users"] for results in found] == [4, 2]
    assert "leave it out with --scores" in message(scores=tmp_path / "mine.jsonl", report=True)
