"""experiments/study.py and archive.py: a plan within its minutes, stopped, carried, resumed."""

import json
import random
import shutil
import tarfile
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
from helpers import run, write_dataset, write_lines

from baselines.encode import cache_path
from experiments import jobs, study
from experiments.archive import pack_up, unpack
from experiments.forecast import Work, settings_of
from experiments.study import Pace, Plan, Settings, Study
from files.jsonl import read_json, write_json
from trsr import InputError

PLAN = """
experiments = [
  "table2 $data --seeds 0 --rows recent-only hierarchical ncf",
  "rankings $data --seeds 0 --users 2 --rows recent-only ncf",
  "table2 $data --seeds 0 1 --rows recent-only hierarchical ncf",
]
[speeds]
learned = 1000
scored = 5000
written = 100
stage = 2
[flags]
models = "--summarizer MODEL --recommender MODEL --baselines='--candidates all --users 2'"
data = "--data DATA $models"
"""
FRONT, RANKED = 5, "scores-test-all-2-users.jsonl"


@pytest.fixture
def plan(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data", users=(8, 3, 4), history=(6, 8))
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("MODEL", str(model_folder)).replace("DATA", str(data)))
    return path


@pytest.fixture
def scripts(monkeypatch):
    """What stands in for the scripts: leaves what they leave; .ran lists (run folder, mark)."""
    monkeypatch.setattr(Pace, "work", lambda self, stage: Work(learned=1000.0))
    monkeypatch.setattr(jobs, "share_summaries", lambda source, run: None)
    found = Scripts()
    monkeypatch.setattr(jobs, "launch", found.launch)
    return found


class Scripts:
    def __init__(self, seconds=0.0):
        self.seconds, self.ran, self.gpus, self.encoders = seconds, [], {}, []

    def launch(self, call, machine):
        time.sleep(self.seconds)
        flags, folder = call.flags, call.log.parent
        self.ran.append((folder.name, call.log.stem))
        self.gpus[folder.name, call.log.stem] = call.gpu
        if call.script == "baselines.encode":
            self.encoders.append(flags[flags.index("--encoder") + 1])
            cache_path(self.encoders[-1], self.items, folder).write_text("")
        data = Path(flags[flags.index("--data") + 1]) if "--data" in flags else self.data
        users = [json.loads(line)["user"] for line in (data / "test.jsonl").open()]
        self.data = data
        if call.script == "train.py":
            (folder / "adapter").mkdir(exist_ok=True)
            lines = [{"loss": 1.0, "tokens_per_second": 9.0}, {"validation": {"Recall@3": 0.5}}]
            write_lines(folder / "metrics.jsonl", lines)
        if call.script in ("evaluate.py", "baselines"):
            own, ranked = "--candidates" not in flags, "--candidates" in flags
            for name, wanted in (
                ("scores-test.jsonl", own or call.script == "baselines"),
                (RANKED, ranked),
            ):
                if wanted:
                    lines = [
                        {"user": u, "rank": 1 + i, "scores": [0.5]} for i, u in enumerate(users)
                    ]
                    write_lines(folder / name, lines)
            write_json(
                folder / "results.json", {"validation": {"Recall@3": 0.1}, "example": "text"}
            )
        if call.script == "summarize.py":
            write_lines(folder / "summaries.jsonl", [{"user": u, "summary": "s"} for u in users])
        call.log.write_text("")
        return 0, ""


def call(plan, out, scripts, seconds=60.0, **flags):
    """Run a study for so many seconds; return it."""
    made = Study(Settings(plan=str(plan), out=out, **flags), Plan.read(str(plan)))
    scripts.items = made.experiments[0].items
    for each in made.experiments:
        each.claim_data()
    made.run(time.monotonic() + seconds)
    return made


def test_stages_run_in_the_order_of_the_plan_and_each_once(plan, scripts, tmp_path):
    made = call(plan, tmp_path / "out", scripts)
    assert made.plan() == []
    assert len(set(scripts.ran)) == len(scripts.ran)
    marks = [mark for _, mark in scripts.ran]
    assert marks[:5].count("summarize") == 1
    first = [i for i, (folder, _) in enumerate(scripts.ran) if folder.endswith(("seed1", "ncf-1"))]
    others = [i for i, (_, mark) in enumerate(scripts.ran) if mark == "evaluate-all-2-users"]
    assert max(others) < min(first)
    made.tables()
    text = (tmp_path / "out" / "data" / "table2.md").read_text()
    assert "seeds 0, 1" in text
    assert "Not all seeds" not in text


def test_a_stage_that_would_not_end_in_time_is_passed_over_for_a_shorter_one(
    plan, scripts, tmp_path, monkeypatch
):
    # Each takes 3 seconds by the plan, but training takes more.
    long = {"train.py": 100e3, "baselines": 0.0}
    monkeypatch.setattr(Pace, "work", lambda self, s: Work(learned=long.get(s.script, 1000.0)))
    made = call(plan, tmp_path / "out", scripts, seconds=20.0)
    ran = {mark for _, mark in scripts.ran}
    assert ran == {"summarize", "baselines"}  # rankings wait for trainings
    assert any(stage.script == "train.py" for stage in made.plan())
    # What they took corrects it: all others are as quick.
    stage = next(stage for stage in made.plan() if stage.script == "train.py")
    assert made.pace.seconds(stage) == pytest.approx(102.0)
    made.pace.seen["train.py"] = {"a": (1.0, 204.0)}
    assert made.pace.seconds(stage) == pytest.approx(0.5)
    assert call(plan, tmp_path / "none", scripts, seconds=0.5).plan()
    assert not (tmp_path / "none" / "data" / "baselines").exists()


class Children:
    """Stands in for the processes of stages: `stopped` is set once they are told to stop."""

    def __init__(self, echo):
        self.stopped = threading.Event()

    def stop(self):
        self.stopped.set()

    def close(self):
        pass


def test_trainings_that_another_call_will_finish_start_if_they_may(
    plan, scripts, tmp_path, monkeypatch
):
    long = {"train.py": 1e6, "evaluate.py": 1e6}
    monkeypatch.setattr(Pace, "work", lambda self, s: Work(learned=long.get(s.script, 1000.0)))
    call(plan, tmp_path / "a", scripts)
    assert not any(mark == "train" for _, mark in scripts.ran)
    scripts.ran.clear()
    call(plan, tmp_path / "b", scripts, carry_on=True)
    assert any(mark == "train" for _, mark in scripts.ran)
    assert not any(mark.startswith("evaluate") for _, mark in scripts.ran)


def test_when_time_is_up_the_running_stage_is_told_to_stop(
    plan, scripts, tmp_path, monkeypatch, capsys
):
    told = []

    def until_stopped(call, machine):
        told.append(machine.children.stopped.wait(60))
        return 143, ""

    monkeypatch.setattr(jobs, "Workers", Children)
    monkeypatch.setattr(jobs, "launch", until_stopped)
    monkeypatch.setattr(Pace, "seconds", lambda self, stage: 0.0)
    made = call(plan, tmp_path / "out", scripts, seconds=2.0)
    assert told == [True]
    assert "time is up: stopping 1 stage, which saves its work" in capsys.readouterr().out
    assert len(made.plan()) > 1


def test_a_study_resumes_from_its_archives_in_another_folder(plan, scripts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    made = call(plan, one, scripts)
    made.tables()
    (one / "data" / "ncf.csv").write_text("x")
    archives = pack_up(one)
    with tarfile.open(archives[0]) as archive:
        names = archive.getnames()
        contents = b"".join(archive.extractfile(name).read() for name in names)
    assert "data/table2.md" in names
    assert b'"scores"' not in contents  # ranks alone
    assert b'"example": "text"' not in contents
    assert not any("adapter" in name or "summaries.jsonl" in name for name in names)
    unpack(archives, two)
    before = len(scripts.ran)
    again = call(plan, two, scripts)
    assert len(scripts.ran) == before
    again.tables()
    for name in ("table2.md", "rankings.md"):
        assert (two / "data" / name).read_text() == (one / "data" / name).read_text()
    assert "seeds" in run("experiments.report.py", out=two).stdout
    write_json(two / "data" / "baselines" / "results.json", {"users": 4, "table": {}})
    report = run("experiments.report.py", out=two / "data").stdout
    assert [line for line in report.splitlines() if line.startswith("## ")] == ["## data"]

    # What is missing is made again, and what is there already stays as it is.
    shutil.rmtree(next(two.glob("data/recent*seed1")))
    (two / "data" / "table2.md").write_text("mine")
    call(plan, two, scripts)
    assert {mark for _, mark in scripts.ran[before:]} == {"train", "evaluate"}
    unpack(archives, two)
    assert (two / "data" / "table2.md").read_text() == "mine"

    # What was begun here does not pass for what the archive has finished.
    trained, texts = next(two.glob("data/recent*seed1")), next(two.glob("data/summaries-*"))
    marks = read_json(trained / "stages.json")
    write_json(trained / "stages.json", {"train.py": marks["train.py"]})
    (trained / "adapter.safetensors").write_text("whole")
    (trained / "results.json").write_text("old")
    (texts / "stages.json").unlink()
    (texts / "summaries.jsonl").write_text("begun")
    (texts / "more").write_text("begun")
    unpack(archives, two)
    assert read_json(trained / "stages.json") == marks
    assert (trained / "adapter.safetensors").read_text() == "whole"
    assert (trained / "results.json").read_text() != "old"
    assert (texts / "summaries.jsonl").read_bytes() == (
        one / "data" / texts.name / "summaries.jsonl"
    ).read_bytes()
    assert not (texts / "more").exists()

    # But a folder with runs in it stays.
    (texts / "stages.json").unlink()
    (texts / "ncf").mkdir()
    (texts / "ncf" / "results.json").write_text("mine")
    unpack(archives, two)
    assert (texts / "ncf" / "results.json").read_text() == "mine"
    assert (texts / "stages.json").is_file()
    shutil.rmtree(texts / "ncf")
    write_json(trained / "stages.json", marks | {"train.py": "another command"})
    (trained / "results.json").write_text("mine")
    unpack(archives, two)
    assert (trained / "results.json").read_text() == "mine"

    bad = tmp_path / "bad.tar.gz"
    bad.write_text("nothing")
    with pytest.raises(InputError, match=r"bad\.tar\.gz: no archive of a study"):
        unpack([bad], two)


def test_a_damaged_archive_is_refused_before_anything_is_written(tmp_path):
    one, two, rng = tmp_path / "one", tmp_path / "two", random.Random(0)
    (one / "data").mkdir(parents=True)
    text = "".join(f"{rng.random()}\n" for _ in range(400))
    (one / "data" / "table2.md").write_text(text)
    path, _ = pack_up(one)
    whole = path.read_bytes()
    # Behind the header, where a name and a date do not matter.
    places = range(64, len(whole), len(whole) // 40)
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    for content in (*flipped, whole[:-1], whole[: len(whole) // 2], whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"study\.tar\.gz: no archive of a study, or a dam"):
            unpack([path], two)
        assert not two.exists()
    path.write_bytes(whole)
    unpack([path], two)
    assert (two / "data" / "table2.md").read_text() == text


def test_an_archive_of_another_dataset_is_refused(tmp_path):
    archives = {}
    for name in ("one", "two"):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        write_json(folder / "data.json", {"data": "data/x", "sha256": name})
        (folder / f"{name}.md").write_text("a table")
        archives[name] = pack_up(tmp_path / name)
    for path in archives["one"]:  # the one with texts too
        with pytest.raises(InputError, match=r"of another dataset than those in .*two/data; cho"):
            unpack([path], tmp_path / "two")
    assert not (tmp_path / "two" / "data" / "one.md").exists()
    three = tmp_path / "three"
    with pytest.raises(InputError, match=r"two/study\.tar\.gz: its runs are of another dataset"):
        unpack([archives["one"][0], archives["two"][0]], three)
    assert not three.exists()
    unpack(archives["one"], three)
    assert (three / "data" / "one.md").read_text() == "a table"


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path):
    path, own = tmp_path / "study.tar.gz", tmp_path / "own"
    own.write_text("x")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(own, "../other")
    with pytest.raises(InputError, match="outside the destination"):
        unpack([path], tmp_path / "out")
    assert not (tmp_path / "other").exists()


def test_an_encoder_of_each_seed_encodes_before_the_baselines(
    plan, scripts, tmp_path, model_folder
):
    for seed in (0, 1):
        shutil.copytree(model_folder, tmp_path / f"base-{seed}")
    plan.write_text(plan.read_text().replace(str(model_folder), str(tmp_path / "base-{seed}")))
    made = call(plan, tmp_path / "out", scripts, cpu_jobs=2)
    assert sorted(scripts.encoders) == [f"llama:{tmp_path}/base-{seed}" for seed in (0, 1)]
    marks = [mark for _, mark in scripts.ran]
    assert marks.index("baselines") > max(i for i, m in enumerate(marks) if m == "baselines.encode")
    assert made.plan() == []


def test_a_report_has_the_cut_offs_and_choices_that_there_are(plan, scripts, tmp_path):
    plan.write_text(plan.read_text().replace("$models", "$models --k 4 2 --ranks 4 8"))
    call(plan, tmp_path / "out", scripts).tables()
    report = run("experiments.report.py", out=tmp_path / "out").stdout
    assert "| Recall@2 | Recall@4 | MRR@2 | NDCG@2 | seeds |" in report
    assert "Ranks: recent items only 4, LLM-TRSR hierarchical 4." in report


def test_baselines_run_beside_on_the_cpu_once_the_items_are_encoded(plan, scripts, tmp_path):
    call(plan, tmp_path / "out", scripts, cpu_jobs=2)
    assert scripts.ran[0] == ("baselines", "baselines.encode")
    gpus = {mark: gpu for (_, mark), gpu in scripts.gpus.items()}
    assert gpus["baselines"] == jobs.NO_GPU
    assert gpus["train"] is None
    machine = jobs.Machine(1, gpus=["0"], cpu_jobs=2)
    assert machine.environment(jobs.NO_GPU)["CUDA_VISIBLE_DEVICES"] == ""
    assert machine.environment(jobs.NO_GPU)["OMP_NUM_THREADS"] == "1"
    assert machine.environment(None) is None


def test_a_dry_run_tells_what_is_left(plan, scripts, tmp_path, capsys):
    made = Study(Settings(plan=str(plan), out=tmp_path / "out"), Plan.read(str(plan)))
    made.foresee()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("data: table2            6 of 6 stages  6,000 to learn")
    assert "0.3 minutes up to here" in lines[1]
    assert len(lines) == 6
    assert scripts.ran == []


def test_every_line_of_the_plans_of_the_project_is_a_command():
    for path in study.PLANS.glob("*.toml"):
        for name, *flags in Plan.read(path.stem).lines:
            settings_of(import_module(f"experiments.{name}").Settings, name, flags)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table2 $data", "tabel $data", "experiment 1: expected one of table2"),
        ("rankings $data", "rankings $dta", "experiment 2: no flags above have the name 'dta'"),
        ("stage = 2", "", "speeds.stage: expected a number above 0"),
        ("stage = 2", "stage = nan", "speeds.stage: expected a number above 0"),
        ("stage = 2", "stage = inf", "speeds.stage: expected a number above 0"),
        ("stage = 2", "stage = true", "speeds.stage: expected a number above 0"),
        ("rankings $data", "rankings '$data", "plan.toml: experiment 2: No closing quotation"),
        ("experiments = [", "experiments = 3\nmore = [", "experiments: expected a list of texts"),
        ("[speeds]", "[[speeds]]", "plan.toml: speeds: expected a table, [speeds]"),
        ("[flags]", "[[flags]]", "plan.toml: flags: expected a table, [flags]"),
        ("written = 100", "written = -1", "speeds.written: expected a number"),
        ("$models", "$later", "flags.data: no flags above have the name 'later'"),
        ("[speeds]", "[speeds", "plan.toml: Expected"),
    ],
)
def test_a_wrong_plan_is_named(plan, old, new, message):
    plan.write_text(plan.read_text().replace(old, new, 1))
    with pytest.raises(InputError) as error:
        Plan.read(str(plan))
    assert message in str(error.value)
    with pytest.raises(InputError, match="nosuch: no such file, and no plan of sizes, smollm2"):
        Plan.read("nosuch")


def test_a_wrong_flag_of_a_plan_is_named_with_its_line(plan, tmp_path):
    text = plan.read_text()
    plan.write_text(text.replace("--users 2 --rows", "--users x --rows"))
    what = r"plan\.toml: experiment 2: rankings: argument --users: expected .* lists the flags"
    with pytest.raises(InputError, match=what):
        Plan.read(str(plan)).experiments(tmp_path)
    plan.write_text(text.replace("--seeds 0 1", "--seeds 0 1 --train='--seed 3'"))
    with pytest.raises(InputError, match=r"experiment 3: --train: the experiment sets --seed"):
        Plan.read(str(plan)).experiments(tmp_path)


def test_minutes_that_are_all_reserved_are_refused(plan, tmp_path):
    out = tmp_path / "out"
    done = run("experiments.study.py", plan=plan, out=out, minutes=0.5, check=False)
    assert done.returncode == 2
    assert "--minutes 0.5: no time is left besides --reserve 0.5; give it more" in done.stderr
    assert not out.exists()


def test_one_run_with_two_kinds_of_flags_is_refused_or_has_a_folder_of_its_own(plan, tmp_path):
    line = '"table2 $data --seeds 0 --rows recent-only --train=--chat",'
    plan.write_text(plan.read_text().replace("[\n", f"[\n{line}\n", 1))
    settings = Settings(plan=str(plan), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"two experiments want train\.py here with different fl"):
        Study(settings, Plan.read(str(plan)))
    text = plan.read_text()
    for flag in ("--out other", "--out=other"):
        plan.write_text(text.replace("--train=--chat", f"--train=--chat {flag}"))
        made = Study(settings, Plan.read(str(plan)))
        assert made.folders == [tmp_path / "out" / "other", tmp_path / "out" / "data"]


def test_tokens_are_counted_once_for_all_calls(plan, tmp_path, monkeypatch):
    made = Study(Settings(plan=str(plan), out=tmp_path / "out"), Plan.read(str(plan)))
    stage = next(stage for stage in made.pace.stages if stage.script == "train.py")
    work = made.pace.work(stage)
    assert work.learned > 0
    assert len(read_json(tmp_path / "out" / "forecast.json")) == 2  # to learn, and to validate
    again = Pace(made.pace.speeds, made.pace.path, made.experiments)
    monkeypatch.setattr(again.forecast, "tokens", None)
    assert again.work(stage) == work


def test_a_stage_that_was_not_known_at_first_has_its_tokens_too(plan, tmp_path):
    made = Study(Settings(plan=str(plan), out=tmp_path / "out"), Plan.read(str(plan)))
    ranks = next(stage for stage in made.plan() if stage.script == "evaluate.py")
    pace = Pace(made.pace.speeds, tmp_path / "forecast.json", made.experiments)
    pace.stages = []  # as if the choice among finished trainings had only now led to it
    assert pace.work(ranks) == made.pace.work(ranks)
    assert pace.work(ranks)
