"""train.py --summaries: one summarizing serves many trainings, if it is of the same histories."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import read_lines, run, write_dataset

from files.jsonl import read_json
from state.lending import lender_of, summarized
from trsr import InputError


@dataclass
class Asked:
    run: Path
    summaries: Path | None = None
    paradigm: str = "recurrent"


@pytest.fixture(scope="module")
def lender(tmp_path_factory, data_folder, model_folder):
    """A run that has summaries and no training."""
    folder = tmp_path_factory.mktemp("runs") / "lender"
    common = {"data": data_folder, "model": model_folder, "max_new_tokens": 8}
    run("summarize.py", run=folder, paradigm="recurrent", **common)
    return folder


def refused(**settings):
    done = run("train.py", epochs=1, batch_size=8, **settings, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_two_learning_rates_from_one_summarizing(lender, tmp_path):
    before = {path.name: path.read_bytes() for path in lender.iterdir() if path.is_file()}
    for lr in (0.01, 0.02):
        folder = tmp_path / f"lr-{lr}"
        run("train.py", run=folder, summaries=lender, epochs=1, batch_size=8, lr=lr)
        assert read_lines(folder / "summaries.jsonl") == read_lines(lender / "summaries.jsonl")
        config = read_json(folder / "config.json")
        assert config["summarize"] == read_json(lender / "config.json")["summarize"]
        assert config["train"]["paradigm"] == "recurrent"
        assert "summaries" not in config["train"]
        run("evaluate.py", run=folder)
        # The same command again, with or without the flag, has nothing left to do.
        for more in ({"summaries": lender}, {}):
            again = run("train.py", run=folder, epochs=1, batch_size=8, lr=lr, **more)
            assert "all epochs were trained before" in again.stdout
    after = {path.name: path.read_bytes() for path in lender.iterdir() if path.is_file()}
    assert after == before


def test_the_run_trains_as_with_summaries_of_its_own(lender, tmp_path):
    own = shutil.copytree(lender, tmp_path / "own")
    run("train.py", run=own, epochs=1, batch_size=8)
    run("train.py", run=tmp_path / "lent", summaries=lender, epochs=1, batch_size=8)
    losses = [
        [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        for folder in (own, tmp_path / "lent")
    ]
    assert losses[0] == losses[1]


def test_a_dry_run_leaves_nothing_behind(lender, tmp_path):
    run("train.py", run=tmp_path / "dry", summaries=lender, epochs=1, batch_size=8, dry_run=True)
    assert not [path for path in (tmp_path / "dry").glob("*") if path.name != ".lock"]


def test_a_run_can_lend_to_itself(lender, tmp_path):
    own = shutil.copytree(lender, tmp_path / "own")
    run("train.py", run=own, summaries=own, epochs=1, batch_size=8)
    assert read_lines(own / "summaries.jsonl") == read_lines(lender / "summaries.jsonl")


def test_what_cannot_be_lent_is_named(lender, tmp_path, model_folder):
    nothing = tmp_path / "nothing"
    assert f"{nothing}/summaries.jsonl: no summaries" in refused(run=tmp_path, summaries=nothing)
    message = refused(run=tmp_path / "a", summaries=lender, paradigm="hierarchical")
    assert "summaries of --paradigm recurrent, not hierarchical" in message
    message = refused(run=tmp_path / "b", summaries=lender, paradigm="recent-only")
    assert "--paradigm recent-only shows none" in message
    other = write_dataset(tmp_path / "other", seed=5)
    message = refused(run=tmp_path / "c", summaries=lender, data=other)
    assert f"{lender}/summaries.jsonl: user 'train0': the summary is of another history" in message
    assert not (tmp_path / "c" / "summaries.jsonl").exists()


def test_summaries_of_the_run_s_own_are_not_replaced(lender, tmp_path):
    own = shutil.copytree(lender, tmp_path / "own")
    assert lender_of(Asked(own, lender)) == lender  # the same ones
    assert lender_of(Asked(own)) == own
    lines = (own / "summaries.jsonl").read_text()
    (own / "summaries.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    with pytest.raises(InputError, match="not the summaries of"):
        lender_of(Asked(own, lender))
    assert summarized(None, tmp_path) == {}
