"""launch/embedded.py: the scripts as they stand, in any order, before and after make demo."""

import itertools
import os
import subprocess
import sys

import pytest
from helpers import ROOT, read_lines, run

from files.jsonl import read_json

# As make demo calls them, but with fewer users and shorter summaries.
SHOP = ["-m", "prepare.demo", "--out", "data/demo", "--items", "1500"]
SHOP += ["--train-users", "4", "--val-users", "2", "--test-users", "3"]
DEMO = [
    SHOP,
    ["summarize.py", "--batch-size", "8", "--max-new-tokens", "8"],
    ["train.py", "--loss", "answer", "--lr", "2e-3", "--epochs", "1", "--batch-size", "2"],
    ["evaluate.py"],
]


@pytest.fixture
def checkout(tmp_path):
    return new_checkout(tmp_path)


def new_checkout(folder):
    """Make a folder where the scripts find the embedded model, and nothing of a run yet."""
    (folder / "models").symlink_to(ROOT / "models")
    return folder


def call(checkout, script, *more, processes=1, check=True):
    """Run a script as a user does, from a checkout; return the finished process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setenv("OMP_NUM_THREADS", "1")
        if script == SHOP[0]:
            line = [sys.executable, *SHOP]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            return subprocess.run(line, env=environment, check=True, capture_output=True)
        return run(script, *more, processes=processes, check=check)


@pytest.fixture(scope="module")
def after_demo(tmp_path_factory):
    """A checkout after the demo; no test changes it."""
    folder = new_checkout(tmp_path_factory.mktemp("demo"))
    for arguments in DEMO:
        call(folder, *arguments)
    return folder


def test_after_the_demo_every_script_runs_as_it_stands_twice(after_demo):
    """The demo's run is finished: nobody complains about flags that were not given."""
    run_folder = after_demo / "runs/demo"
    kept = [run_folder / name for name in ("summaries.jsonl", "metrics.jsonl", "config.json")]
    before = [path.read_bytes() for path in kept]
    scores = read_lines(run_folder / "scores-test.jsonl")
    for script in ("summarize.py", "train.py", "evaluate.py") * 2:
        more = ["--k", 3, 5, 10] if script == "evaluate.py" else []
        out = call(after_demo, script, *more).stdout
        if script == "train.py":
            assert "done    runs/demo: all epochs were trained before" in out
            assert "next    python evaluate.py --run runs/demo" in out
    assert [path.read_bytes() for path in kept] == before
    assert read_lines(run_folder / "scores-test.jsonl") == scores


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.long)])
def test_after_the_demo_torchrun_says_that_the_training_is_finished(after_demo, processes):
    before = (after_demo / "runs/demo/metrics.jsonl").read_bytes()
    out = call(after_demo, "train.py", processes=processes).stdout
    assert out.count("all epochs were trained before") == 1
    assert (after_demo / "runs/demo/metrics.jsonl").read_bytes() == before


def test_a_flag_that_differs_is_refused_as_ever(after_demo):
    done = call(after_demo, "train.py", "--batch-size", 4, check=False)
    assert done.returncode == 2
    assert "train.py worked here with batch_size 2 (now 4)" in done.stderr


@pytest.mark.parametrize("order", itertools.permutations(["summarize.py", "train.py"]), ids=str)
def test_before_the_demo_each_script_makes_what_is_missing(checkout, order):
    """A shop of the demo's size takes minutes, so a smaller one is there already."""
    call(checkout, *SHOP)
    for script in order:
        more = ["--epochs", 1, "--batch-size", 2] if script == "train.py" else []
        if script == order[0] == "summarize.py":
            more = ["--max-new-tokens", 8]
        out = call(checkout, script, *more).stdout
        first = "runs/demo/summaries.jsonl is missing, so this comes first: python summarize.py"
        assert (first in out) == (script == order[0] == "train.py")
        call(checkout, script)
    assert len(read_lines(checkout / "runs/demo/summaries.jsonl")) == 9
    call(checkout, "evaluate.py", "--k", 3, 5, 10)
    assert read_json(checkout / "runs/demo/results.json")["users"] == 3


@pytest.mark.long
def test_in_a_new_checkout_evaluate_makes_everything(checkout):
    out = call(checkout, "evaluate.py", "--k", 3, 5, 10).stdout
    for missing in ("data/demo/meta.json", "runs/demo/summaries.jsonl", "runs/demo/adapter"):
        assert f"{missing} is missing, so this comes first" in out
    assert read_json(checkout / "runs/demo/results.json")["users"] == 200


@pytest.mark.long
def test_in_a_new_checkout_torchrun_trains(checkout):
    call(checkout, "train.py", processes=8)
    assert (checkout / "runs/demo/adapter/adapter_model.safetensors").is_file()
