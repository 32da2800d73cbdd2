"""Several processes of which one fails: all of them end, with one message, and can resume."""

import os
import re
import signal

import pytest
from helpers import (
    ROOT,
    children,
    command,
    count_lines,
    own_lines,
    run,
    started,
    wait_until,
)

DEADLINE = 600  # seconds; they would wait for each other for hours


def test_bad_input_is_reported_once_by_several_processes(tmp_path, model_folder, trained_run):
    flags = {"data": tmp_path / "nowhere", "model": model_folder, "run": tmp_path / "run"}
    more = {"train": {"paradigm": "none"}, "evaluate": {"run": trained_run}}
    for script in ("summarize", "train", "evaluate"):
        settings = flags | more.get(script, {})
        process = started(command(f"{script}.py", **settings, processes=2))
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0
        assert len(own_lines(errors, script)) == 1, errors
        assert "no dataset" in own_lines(errors, script)[0]


FAILING = """
import sys; sys.path.insert(0, {root!r})
import os, signal
import {script}, trsr
from launch.processes import run_script

def fail(*_, **__):
    {fault}

if os.environ["RANK"] == "1":
    {script}.{function} = fail
sys.argv[0] = "{script}.py"
run_script({script}.main)
"""
FAULTS = {
    "input": 'raise trsr.InputError("a line that is broken")',
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
}
MESSAGES = {
    "input": "a line that is broken",
    "kill": "another process has ended|interrupted; finished work is kept",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("script", "function"),
    [("summarize", "append_record"), ("train", "train_step"), ("evaluate", "scored")],
)
def test_one_process_that_fails_ends_the_others_with_one_message(
    tmp_path, data_folder, model_folder, trained_run, times, script, function, fault
):
    path = tmp_path / "failing.py"
    names = {"root": str(ROOT), "script": script, "function": function, "fault": FAULTS[fault]}
    path.write_text(FAILING.format(**names))
    settings = {"data": data_folder, "model": model_folder, "run": tmp_path / "run"}
    if script == "train":
        settings["paradigm"] = "recent-only"
    if script == "evaluate":
        settings = {"run": trained_run}
    process = started(command(path, **settings, processes=times(2, 4)))
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    (said,) = own_lines(errors, script)
    assert re.search(MESSAGES[fault], said)
    assert "[rank" not in errors
    if script != "evaluate":
        run(f"{script}.py", **settings)  # and all can resume


def test_a_killed_process_ends_the_others_with_one_message(tmp_path, fit, fit_command):
    settings = {"epochs": 12, "batch_size": 4, "save_every": 1}
    process = started(fit_command(tmp_path, **settings, processes=2))
    wait_until(lambda: count_lines(tmp_path / "metrics.jsonl") >= 5, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert len(own_lines(errors, "train")) <= 1, errors
    assert "[rank" not in errors
    fit(tmp_path, **settings)
