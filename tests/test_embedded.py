"""launch/embedded.py: the scripts as they stand, in any order, before and after make demo."""

import itertools
import subprocess
import sys

import pytest
from helpers import ROOT, read_lines

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
    """A folder where the scripts find the embedded model, and nothing of a run yet."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


def call(checkout, arguments, processes=1):
    """Run a script as a user does, from a checkout; return what it prints."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    script = arguments if arguments[0] == "-m" else [str(ROOT / arguments[0]), *arguments[1:]]
    options = {"cwd": checkout, "capture_output": True, "text": True, "timeout": 900}
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *script], env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def after_demo(checkout):
    for arguments in DEMO:
        call(checkout, arguments)
    return checkout


def test_after_the_demo_every_script_runs_as_it_stands_twice(after_demo):
    """The demo's run is finished: nobody complains about flags that were not given."""
    run = after_demo / "runs/demo"
    kept = [run / name for name in ("summaries.jsonl", "metrics.jsonl", "config.json")]
    before = [path.read_bytes() for path in kept]
    scores = read_lines(run / "scores-test.jsonl")
    for arguments in (["summarize.py"], ["train.py"], ["evaluate.py", "--k", "3", "5", "10"]) * 2:
        out = call(after_demo, arguments)
        if arguments == ["train.py"]:
            assert "done    runs/demo: all epochs were trained before" in out
            assert "next    python evaluate.py --run runs/demo" in out
    assert [path.read_bytes() for path in kept] == before
    assert read_lines(run / "scores-test.jsonl") == scores


def test_after_the_demo_torchrun_says_that_the_training_is_finished(after_demo):
    before = (after_demo / "runs/demo/metrics.jsonl").read_bytes()
    for processes in (2, 8):
        out = call(after_demo, ["train.py"], processes)
        assert out.count("all epochs were trained before") == 1
    assert (after_demo / "runs/demo/metrics.jsonl").read_bytes() == before


def test_a_flag_that_differs_is_refused_as_ever(after_demo):
    script = [sys.executable, str(ROOT / "train.py"), "--batch-size", "4"]
    done = subprocess.run(script, cwd=after_demo, capture_output=True, text=True)
    assert done.returncode == 2
    assert "train.py worked here with batch_size 2 (now 4)" in done.stderr


@pytest.mark.parametrize("order", itertools.permutations(["summarize.py", "train.py"]), ids=str)
def test_before_the_demo_each_script_makes_what_is_missing(checkout, order):
    """A shop of the demo's size takes minutes, so a smaller one is there already."""
    call(checkout, SHOP)
    for script in order:
        more = ["--epochs", "1", "--batch-size", "2"] if script == "train.py" else []
        if script == order[0] == "summarize.py":
            more = ["--max-new-tokens", "8"]
        out = call(checkout, [script, *more])
        first = "runs/demo/summaries.jsonl is missing, so this comes first: python summarize.py"
        assert (first in out) == (script == order[0] == "train.py")
        call(checkout, [script])
    assert len(read_lines(checkout / "runs/demo/summaries.jsonl")) == 9
    call(checkout, ["evaluate.py", "--k", "3", "5", "10"])
    assert read_json(checkout / "runs/demo/results.json")["users"] == 3


@pytest.mark.long
def test_in_a_new_checkout_evaluate_makes_everything(checkout):
    out = call(checkout, ["evaluate.py", "--k", "3", "5", "10"])
    for missing in ("data/demo/meta.json", "runs/demo/summaries.jsonl", "runs/demo/adapter"):
        assert f"{missing} is missing, so this comes first" in out
    assert read_json(checkout / "runs/demo/results.json")["users"] == 200


@pytest.mark.long
def test_in_a_new_checkout_torchrun_trains(checkout):
    call(checkout, ["train.py"], processes=8)
    assert (checkout / "runs/demo/adapter/adapter_model.safetensors").is_file()
