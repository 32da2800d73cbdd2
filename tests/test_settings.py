"""state/settings.py: one set of settings per script, and one process per run folder."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, run

from files.jsonl import write_json
from state.settings import claim_config, locked, read_config
from trsr import InputError

PIPED = {"capture_output": True, "text": True, "check": True}

COMMON = {
    "data": "d",
    "model": "m",
    "paradigm": "none",
    "dtype": "fp32",
    "fingerprint": "f",
    "max_length": 9,
    "history_items": 3,
    "lora_r": 8,
}


def test_settings_of_a_run_stay_once_work_has_started(tmp_path):
    claim_config(tmp_path, "train", COMMON | {"lr": 7}, started=False)
    # Nothing was done with the others.
    claim_config(tmp_path, "train", COMMON | {"lr": 0.1, "k": (1, 2)}, started=False)
    claim_config(tmp_path, "train", COMMON | {"lr": 0.1, "k": [1, 2]}, started=True)
    claim_config(tmp_path, "summarize", COMMON | {"lr": 3}, started=True)
    with pytest.raises(InputError, match=r"lr 0\.1 \(now 0\.2\)"):
        claim_config(tmp_path, "train", COMMON | {"lr": 0.2, "k": [1, 2]}, started=True)
    train, summarize = COMMON | {"lr": 0.1, "k": [1, 2]}, COMMON | {"lr": 3}
    assert read_config(tmp_path) == {"train": train, "summarize": summarize}


FOREIGN = "no settings that a script of this project would write"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train": COMMON | {"max_length": "9"}},
            "in 'train': field 'max_length' is a str, expected int",
        ),
        ({"train": COMMON | {"paradigm": "nine"}}, "in 'train': paradigm 'nine' is unknown"),
        ({"tarin": COMMON}, f"in 'tarin': {FOREIGN}"),
        ({"summarize": []}, "in 'summarize': field 'data' is missing"),
    ],
)
def test_settings_that_no_script_wrote_are_named(tmp_path, config, message):
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_config(tmp_path)


def test_a_second_process_in_a_run_folder_is_refused(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(InputError, match="another process"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "run", hold=False):
            pass
    with locked(tmp_path / "run"):
        pass


HOLDER = """
import sys
from pathlib import Path
from state.settings import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_scripts_refuse_a_run_folder_while_another_process_works_there(
    tmp_path, data_folder, model_folder
):
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen(line, **pipes, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    common = {"data": data_folder, "model": model_folder, "run": tmp_path / "run"}
    short = {"max_new_tokens": 2}

    done = run("summarize.py", paradigm="hierarchical", **common, **short, check=False)
    assert done.returncode == 2
    said = "another process is working in this run folder; wait, or choose another"
    assert said in done.stderr
    run("train.py", epochs=1, paradigm="hierarchical", **common, check=False)
    done = run("train.py", paradigm="none", **common, check=False)
    assert "another process is working in this run folder" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    holder.kill()
    holder.communicate()
    run("summarize.py", **common, **short)


def test_a_run_removes_what_a_killed_process_left_half_written(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **PIPED).stdout
    (tmp_path / "adapter").mkdir()
    torn = [tmp_path / f".a.json.{gone.strip()}.tmp", tmp_path / f"adapter/.b.{gone.strip()}.tmp"]
    alive = tmp_path / f".c.json.{os.getpid()}.tmp"
    for path in (*torn, alive):
        path.write_text("half")
    with locked(tmp_path):
        assert not any(path.exists() for path in torn)
        assert alive.exists()  # another process is writing it


def test_what_changed_is_told_in_words(tmp_path):
    settings = {"data": "d", "model": "m", "paradigm": "none", "dtype": "fp32", "max_length": 9}
    settings |= {"fingerprint": "f", "history_items": 3, "lora_r": 8, "content": "1", "prompt": "a"}
    claim_config(tmp_path, "train", settings, started=False)
    changed = settings | {"content": "2", "prompt": "b", "fingerprint": "g", "lora_r": 4}
    with pytest.raises(InputError) as error:
        claim_config(tmp_path, "train", changed, started=True)
    assert "train.py worked here with lora_r 8 (now 4)" in str(error.value)
    for what in ("texts or users are other ones", "model's files are", "prompt has other words"):
        assert what in str(error.value)
