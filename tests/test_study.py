"""experiments/study.py and archive.py: a plan within its minutes, stopped, carried, resumed."""

import json
import shutil
import tarfile
import time
from importlib import import_module
from pathlib import Path

import pytest
from helpers import run, write_dataset, write_lines

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
        self.seconds, self.ran, self.gpus = seconds, [], {}

    def launch(self, call, machine):
        time.sleep(self.seconds)
        flags, folder = call.flags, call.log.parent
        self.ran.append((folder.name, call.log.stem))
        self.gpus[folder.name, call.log.stem] = call.gpu
        if call.script == "baselines.encode":
            study_of = next(stage for stage in self.encodings if stage.run == folder)
            (folder / study_of.makes[0]).write_text("")
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


def call(plan, out, scripts, seconds=60.0, cpu_jobs=0):
    """Run a study for so many seconds; return it."""
    made = Study(Settings(plan=str(plan), out=out, cpu_jobs=cpu_jobs), Plan.read(str(plan)))
    scripts.encodings = [study.encoding(each) for each in made.experiments]
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


def test_nothing_is_started_that_would_not_end_in_time_but_what_is_shorter(
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


def test_at_the_end_of_the_time_what_runs_is_stopped(plan, scripts, tmp_path, monkeypatch):
    scripts.seconds = 1.0
    monkeypatch.setattr(Pace, "seconds", lambda self, stage: 0.0)
    began = time.monotonic()
    made = call(plan, tmp_path / "out", scripts, seconds=1.5)
    assert time.monotonic() - began < 8
    assert 0 < len(scripts.ran) <= 3
    assert made.plan()


def test_archives_are_gone_on_from_in_another_folder(plan, scripts, tmp_path):
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

    # What is missing is made again, and what is there already stays as it is.
    shutil.rmtree(next(two.glob("data/recent*seed1")))
    (two / "data" / "table2.md").write_text("mine")
    call(plan, two, scripts)
    assert {mark for _, mark in scripts.ran[before:]} == {"train", "evaluate"}
    unpack(archives, two)
    assert (two / "data" / "table2.md").read_text() == "mine"
    bad = tmp_path / "bad.tar.gz"
    bad.write_text("nothing")
    with pytest.raises(InputError, match=r"bad\.tar\.gz: no archive of a study"):
        unpack([bad], two)


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
    assert "by then 0.3 minutes" in lines[1]
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
    with pytest.raises(InputError, match="--plan nosuch: no such file, and no plan of smollm2"):
        Plan.read("nosuch")


def test_one_run_with_two_kinds_of_flags_is_refused_or_has_a_folder_of_its_own(plan, tmp_path):
    line = '"table2 $data --seeds 0 --rows recent-only --train=--chat",'
    plan.write_text(plan.read_text().replace("[\n", f"[\n{line}\n", 1))
    settings = Settings(plan=str(plan), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"two experiments want train\.py here with different fl"):
        Study(settings, Plan.read(str(plan)))
    plan.write_text(plan.read_text().replace("--train=--chat", "--train=--chat --out other"))
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
