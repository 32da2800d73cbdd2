"""experiments/jobs.py: stages in the right order, at once, over the GPUs, and how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, wait_until, write_dataset

from experiments import jobs
from experiments.jobs import Jobs, Machine
from experiments.stages import Stage, missing, missing_of
from files.jsonl import read_json
from trsr import InputError


@pytest.fixture
def stage(tmp_path):
    """Return the function that makes a stage in the run folder of this name."""

    def made(name, script="train.py", **more):
        run = tmp_path / name
        makes = {"train.py": "adapter", "evaluate.py": "scores-test.jsonl"}
        needed = {"summaries": tmp_path / more.pop("after")} if "after" in more else {}
        key = f"{name} {script}"
        return Stage(run, script, (), (makes.get(script, "made"),), key, **needed, **more)

    return made


class Scripts:
    """Stands in for the scripts: records when each ran, and makes what it should make."""

    def __init__(self, stages, failing=(), seconds=0.05):
        self.makes = {(s.run.name, s.script): s.run / s.makes[0] for s in stages}
        self.failing, self.seconds, self.lock = failing, seconds, threading.Lock()
        self.spans, self.environments, self.now, self.most = {}, {}, 0, 0

    def launch(self, call, machine):
        name = call.log.parent.name, call.script
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        began = time.perf_counter()
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
            self.spans[name] = began, time.perf_counter()
            self.environments[name] = machine.environment(call.gpu)
        call.log.write_text("")
        if name[0] in self.failing:
            return 2, f"{call.script.removesuffix('.py')}: no room"
        self.makes[name].write_text("")
        return 0, ""


def run_all(runs, monkeypatch, failing=(), n=2, **more):
    """Run the stages of runs, n at a time; return what stood in for the scripts."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run))
    scripts = Scripts(stages, failing)
    monkeypatch.setattr(jobs, "launch", scripts.launch)
    monkeypatch.setattr(jobs, "share_summaries", lambda source, run: None)
    machine = Machine(n, gpus=more.pop("gpus", []), fresh=True)
    try:
        Jobs(lambda: missing_of(runs), machine, len(stages)).run()
    except InputError as error:
        scripts.error = str(error)
    else:
        scripts.error = ""
    return scripts


def test_a_stage_starts_when_what_it_needs_is_done_and_others_run_beside_it(stage, monkeypatch):
    first = stage("summaries", "summarize.py")
    runs = []
    for name in ("a", "b", "c", "d"):
        runs.append([first, stage(name, after="summaries"), stage(name, "evaluate.py")])
    runs.append([stage("alone", "baselines")])
    scripts = run_all(runs, monkeypatch, n=3)
    assert scripts.error == ""
    assert len(scripts.spans) == 10
    for name in ("a", "b", "c", "d"):
        train, evaluate = scripts.spans[name, "train.py"], scripts.spans[name, "evaluate.py"]
        assert scripts.spans["summaries", "summarize.py"][1] <= train[0]
        assert train[1] <= evaluate[0]
    assert scripts.most == 3
    summaries = scripts.spans["summaries", "summarize.py"]
    assert scripts.spans["alone", "baselines"][0] < summaries[1]  # it waits for nothing
    assert missing_of(runs) == []


def test_one_at_a_time_they_run_in_order_in_the_environment_as_it_is(stage, monkeypatch):
    runs = [[stage(name), stage(name, "evaluate.py")] for name in ("a", "b")]
    scripts = run_all(runs, monkeypatch, n=1)
    order = sorted(scripts.spans, key=scripts.spans.get)
    assert order == [(n, s) for n in ("a", "b") for s in ("train.py", "evaluate.py")]
    assert scripts.most == 1
    assert set(scripts.environments.values()) == {None}


def test_gpus_are_shared_out_and_threads_too(stage, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [[stage(f"r{i}")] for i in range(8)]
    scripts = run_all(runs, monkeypatch, n=4, gpus=["3", "5"])
    used = [e["CUDA_VISIBLE_DEVICES"] for e in scripts.environments.values()]
    assert sorted(used) == ["3"] * 4 + ["5"] * 4
    threads = {e["OMP_NUM_THREADS"] for e in scripts.environments.values()}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 4))}
    assert Machine(2, gpus=[]).environment(None).get("CUDA_VISIBLE_DEVICES") == os.environ.get(
        "CUDA_VISIBLE_DEVICES"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Machine(2, gpus=[]).environment(None)["OMP_NUM_THREADS"] == "7"


def test_the_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert jobs.gpus_of_this_machine() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc")
    assert jobs.gpus_of_this_machine() == ["4", "GPU-abc"]
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: 0)
    assert jobs.gpus_of_this_machine() == []


def test_several_stages_of_several_processes_are_refused():
    with pytest.raises(InputError, match="--jobs 2 and --nproc 4: either"):
        Machine(2, 4)


@pytest.mark.parametrize("n", [1, 2])
def test_a_failing_stage_stops_only_those_that_wait_for_it(stage, monkeypatch, capsys, n):
    first = stage("summaries", "summarize.py")
    runs = [[first, stage("a", after="summaries"), stage("a", "evaluate.py")]]
    runs += [[stage(name), stage(name, "evaluate.py")] for name in ("b", "c")]
    scripts = run_all(runs, monkeypatch, failing=("summaries", "b"), n=n)
    ran = {("c", "train.py"), ("c", "evaluate.py")}
    assert set(scripts.spans) == ran | {("summaries", "summarize.py"), ("b", "train.py")}
    one, two = sorted(scripts.error.splitlines())
    assert "b: train.py failed: no room (its output is in" in one
    assert "summaries: summarize.py failed: no room" in two
    told = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(told) == 2
    # The next call tries again what is left, and nothing else.
    again = run_all(runs, monkeypatch, n=n)
    assert again.error == ""
    assert not ran & set(again.spans)
    assert missing_of(runs) == []


@pytest.mark.parametrize("script", ["evaluate.py", "baselines"])
def test_ranks_of_an_earlier_command_are_not_taken_for_those_of_this_one(
    stage, monkeypatch, tmp_path, script
):
    old = stage("a", script)
    run_all([[old]], monkeypatch, n=1)
    new = Stage(old.run, script, ("--other",), old.makes, "another key")
    monkeypatch.setattr(jobs, "launch", lambda call, machine: (0, ""))
    with pytest.raises(InputError, match=f"{script} failed: it made no {old.makes[0]}"):
        jobs.execute(new, Machine(1, gpus=[], fresh=True))
    assert missing([new]) == [new]


def test_what_a_script_resumes_from_stays(stage, monkeypatch):
    summaries = stage("summaries", "summarize.py")
    summaries.run.mkdir()
    (summaries.run / "made").write_text("half of the users")
    seen = []

    def launch(call, machine):
        seen.append((summaries.run / "made").read_text())
        call.log.write_text("")
        return 0, ""

    monkeypatch.setattr(jobs, "launch", launch)
    jobs.execute(summaries, Machine(1, gpus=[], fresh=True))
    assert seen == ["half of the users"]


def test_a_terminal_shows_the_output_of_one_stage_at_a_time(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    machines = [Machine(1), Machine(2), Machine(1, cpu_jobs=2), Machine(1, fresh=True, cpu_jobs=1)]
    assert [machine.children.echo for machine in machines] == [True, False, False, False]


def test_a_result_that_does_not_stay_done_is_named_instead_of_made_for_ever(stage, monkeypatch):
    one, other = stage("a"), stage("a")
    other = Stage(other.run, other.script, (), other.makes, "another key")
    scripts = run_all([[one], [other]], monkeypatch, n=1)
    assert "train.py is not done after it was run" in scripts.error


def test_a_run_that_is_ranked_needs_neither_its_adapter_nor_its_summaries(stage, monkeypatch):
    first = stage("summaries", "summarize.py")
    chain = [first, stage("a", after="summaries"), stage("a", "evaluate.py")]
    run_all([chain], monkeypatch, n=1)
    for gone in (first.run / "made", chain[1].run / "adapter"):
        gone.unlink()
    assert missing(chain) == []
    (chain[2].run / "scores-test.jsonl").unlink()
    assert missing(chain) == chain


def test_a_training_s_settings_outlive_its_adapter(stage, monkeypatch, tmp_path):
    train = stage("a")
    run_all([[train]], monkeypatch, n=1)
    (train.run / "adapter").unlink()
    (train.run / "config.json").write_text('{"train": {}}')
    untrained = stage("untrained", "evaluate.py", settings_of=train.run)
    assert missing([train, untrained]) == [untrained]
    assert missing([train]) == [train]


def test_what_was_cut_is_recorded_with_the_run(stage):
    train, ranks = stage("a"), stage("a", "evaluate.py")
    train.run.mkdir()
    prompt = "prompt  hierarchical, 3 recent items, 512 tokens\n"
    jobs.note_output(train, f"{prompt}trimmed to the context: 3 whole histories\n")
    jobs.note_output(ranks, f"{prompt}100%|###|\r4 users in 1.0 s\n")
    path = train.run / jobs.TRIMMED
    assert read_json(path) == {"train.py": {"whole histories": 3}, "evaluate.py": {}}
    assert not jobs.untrimmed([train, ranks])
    # A call that finds everything trained reads no prompt, and so says nothing of them.
    jobs.note_output(train, "done    a: all epochs were trained before\n")
    assert not jobs.untrimmed([train, ranks])
    jobs.note_output(train, prompt)
    assert jobs.untrimmed([train, ranks])
    path.unlink()
    assert not jobs.untrimmed([train, ranks])


# ---- Interruptions


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_an_interruption_ends_all_stages_once_they_have_saved(tmp_path, model_folder, number):
    data, out = write_dataset(tmp_path / "data", users=(40, 4, 4)), tmp_path / "out"
    command = [sys.executable, "-m", "experiments.table2", "--data", data, "--out", out]
    command += ["--rows", "recent-only", "--seeds", "0", "1", "--jobs", "2"]
    command += ["--recommender", model_folder, "--summarizer", model_folder]
    command += ["--train", "--epochs 400 --batch-size 8 --lora-dropout 0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, **pipes)

    def trained():
        return [f for f in out.glob("*/metrics.jsonl") if f.stat().st_size > 300]

    try:
        wait_until(lambda: len(trained()) == 2, process)
        threads = Path(f"/proc/{process.pid}/task").iterdir()  # a process belongs to one of them
        pids = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    finally:
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert len(pids) == 2
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert "Traceback" not in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    # Each script has saved what it has.
    assert len(list(out.glob("*/checkpoint/step-*.safetensors"))) == 2
