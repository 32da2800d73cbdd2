"""The experiments: tables that say what the runs' files say, and nothing that is run twice."""

import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import flags, read_lines, run, scores, write_dataset

import trsr
from experiments import paper, runs
from files.jsonl import read_json

ROWS = ("hierarchical", "whole-history", "core", "sasrec")
LAUNCH = runs.launch
SVG = "{http://www.w3.org/2000/svg}"


def in_process(script, arguments, processes, log):
    """Do what experiments.runs.launch does, in this process: torch takes seconds to start."""
    name = script if script.endswith(".py") else f"{script}.__main__.py"
    done = run(name, *arguments, check=False)
    log.write_text(done.stdout + done.stderr)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def launched(monkeypatch):
    """The stages that are run, as (run folder's name, script)."""
    found = []

    def launch(script, arguments, processes, log):
        found.append((log.parent.name, script))
        return in_process(script, arguments, processes, log)

    monkeypatch.setattr(runs, "launch", launch)
    return found


def experiment(name, check=True, **settings):
    return run(f"experiments.{name}.py", check=check, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    """A dataset, the settings of experiments on it, and a table of two seeds and four rows."""
    folder = tmp_path_factory.mktemp("experiments")
    data, out = write_dataset(folder / "data", history=(6, 12)), folder / "out"
    settings = {
        "data": data,
        "out": out,
        "summarize": "--max-new-tokens 8",
        "train": "--epochs 1 --batch-size 8 --lr 0.01 --lora-dropout 0",
        "seeds": [0, 1],
    }
    models = {"summarizer": model_folder, "recommender": model_folder}
    table = settings | models | {"rows": ROWS, "baselines": "--epochs 2 --size 8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "launch", in_process)
        first = experiment("table2", **table).stdout
    model = runs.slug(model_folder)
    return SimpleNamespace(
        data=data,
        out=out,
        settings=settings,
        models=models,
        table=table,
        first=first,
        hierarchical=f"hierarchical-{model}-{model}",  # how its run folders begin
    )


def rows_of(world, name):
    return read_json(world.out / "results.json")[name]["rows"]


# ---- The table


def test_the_table_is_that_of_the_runs_scores(world):
    rows = {row["name"]: row for row in rows_of(world, "table2")}
    names = ["LLM-TRSR hierarchical", "TALLRec (whole history)", "CORE", "SASRec"]
    assert list(rows) == ["random", "popularity", *names]
    positives = {e["user"]: e["positive"] for e in read_lines(world.data / "test.jsonl")}
    text = (world.out / "table2.md").read_text()
    for name in names:
        values = []
        for folder in rows[name]["runs"]:
            for line in scores(Path(folder)):
                positive = line["candidates"].index(positives[line["user"]])
                rank = trsr.rank_of_positive(line["scores"], positive)
                values.append((rank <= 3, (rank <= 5) / rank))
        assert len(values) == 2 * 4
        measured = rows[name]["measured"]
        means = [measured["Recall@3"]["mean"], measured["MRR@5"]["mean"]]
        assert means == pytest.approx(np.mean(values, axis=0))
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        found = [float(x) for x in re.findall(r"(?<![(–.\d])\d\.\d{4}", line)]
        metrics = [f"{metric}@{k}" for metric in ("Recall", "MRR") for k in (3, 5, 10)]
        assert found == [round(measured[metric]["mean"], 4) for metric in metrics]
        low, high = measured["MRR@10"]["interval"]
        assert f"({low:.3f}–{high:.3f})" in line
        assert low <= measured["MRR@10"]["mean"] <= high


def test_the_table_marks_the_best_and_what_is_the_paper_s(world):
    text = (world.out / "table2.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    _, *own = [line for line in lines if "the paper" not in line]
    columns = [[cell.strip() for cell in line.split("|")[2:-1]] for line in own]
    for cells in zip(*columns, strict=True):
        values = [float(re.search(r"\d\.\d+", cell).group()) for cell in cells]
        bold = [v for v, cell in zip(values, cells, strict=True) if "**" in cell]
        assert bold == [max(values)] * values.count(max(values))
    assert "| *CORE: the paper, Amazon-M2* | *0.5230* | *0.4632*† | *0.6450* |" in text
    cells = "*0.8910* | *0.9120* | *0.9490* | *0.8597*"
    assert f"| *LLM-TRSR hierarchical: the paper, Amazon-M2* | {cells} |" in text
    assert "misprint" in text
    assert paper.NOTES["table2"] in text
    assert text in world.first


def test_the_figure_is_sound_and_shows_the_values(world):
    root = ET.parse(world.out / "table2.svg").getroot()
    assert root.tag == f"{SVG}svg"
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    for row in rows_of(world, "table2"):
        assert texts.count(row["name"]) == 6  # in each panel
        assert f"{row['measured']['Recall@3']['mean']:.3f}" in texts
    assert {"Recall@3", "MRR@10"} < set(texts)


# ---- The stages


def test_seeds_share_summaries_and_differ_in_what_they_train(world):
    folders = [world.out / f"{world.hierarchical}-items3-seed{seed}" for seed in (0, 1)]
    summaries = list(world.out.glob("summaries-*/summaries.jsonl"))
    assert len(summaries) == 1
    for folder in folders:
        assert os.path.samefile(folder / "summaries.jsonl", summaries[0])
    first, second = ([line["scores"] for line in scores(folder)] for folder in folders)
    assert first != second


def test_a_second_call_runs_nothing(world, launched):
    paths = [world.out / "table2.md", world.out / "table2.svg"]
    before = [path.read_bytes() for path in paths]
    done = experiment("table2", **world.table)
    assert launched == []
    assert "13 done before, nothing to run" in done.stdout
    assert [path.read_bytes() for path in paths] == before


def test_a_stage_whose_result_is_gone_is_run_again_alone(world, launched):
    name = f"{world.hierarchical}-items3-seed1"
    folder, expected = world.out / name, (world.out / "table2.md").read_text()
    (folder / "scores-test.jsonl").unlink()
    (world.out / "baselines" / "core-0" / "scores-test.jsonl").unlink()
    experiment("table2", **world.table)
    assert launched == [(name, "evaluate.py"), ("core-0", "baselines")]
    launched.clear()
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "adapter")
    experiment("table2", **world.table)  # what depends on it is made again too
    assert launched == [(name, "train.py"), (name, "evaluate.py")]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (world.out / "table2.md").read_text() == expected


def test_a_failing_stage_is_named_and_the_next_call_resumes_there(
    world, launched, monkeypatch, tmp_path
):
    counted = runs.launch

    def failing(script, arguments, processes, log):
        if script == "train.py":
            return 1, "step 1\ntrain: out of everything\nbye"
        return counted(script, arguments, 1, log)

    settings = world.table | {"rows": "hierarchical", "out": tmp_path, "seeds": 4}
    monkeypatch.setattr(runs, "launch", failing)
    done = experiment("table2", **settings, check=False)
    folder = tmp_path / f"{world.hierarchical}-items3-seed4"
    assert done.returncode == 2
    what = f"{folder}: train.py failed: out of everything"
    where = f"its output is in {folder / 'train.log'}"
    assert done.stderr == f"experiments.table2: {what} ({where})\n"
    monkeypatch.setattr(runs, "launch", counted)
    done = experiment("table2", **settings)
    assert "3: 1 done before, 2 to run" in done.stdout
    assert [script for _, script in launched] == ["summarize.py", "train.py", "evaluate.py"]

    # Other settings are not mixed into one folder.
    settings["train"] = "--epochs 2 --batch-size 8"
    other = experiment("table2", **settings, check=False)
    assert other.returncode == 2
    assert "train.py worked here with" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_model_made_for_each_seed_has_summaries_of_its_own(model_folder, tmp_path):
    for seed in (0, 1):
        shutil.copytree(model_folder, tmp_path / f"base-{seed}")
    settings = runs.Settings(data="data/demo", out=tmp_path, k=(3,))
    per_seed, fixed = str(tmp_path / "base-{seed}"), str(model_folder)

    def stages(summarizer, recommender, seed):
        return runs.language_model_run(settings, "recurrent", summarizer, recommender, 3, seed)

    one, two = (stages(per_seed, fixed, seed) for seed in (0, 1))
    assert one[0].run != two[0].run
    assert str(tmp_path / "base-1") in two[0].flags
    assert two[1].summaries == two[0].run
    one, two = (stages(fixed, per_seed, seed) for seed in (0, 1))
    assert one[0] == two[0]
    assert str(tmp_path / "base-1") in two[1].flags


def test_scripts_start_under_torchrun_and_say_why_they_fail(world, model_folder, tmp_path):
    folder, log = tmp_path / "two", tmp_path / "log"
    settings = {"data": world.data, "model": model_folder, "max_new_tokens": 8, "run_dir": folder}
    assert LAUNCH("summarize.py", tuple(flags(**settings)), 2, log)[0] == 0
    assert "on 2 x cpu" in log.read_text()
    own = next(world.out.glob("summaries-*/summaries.jsonl"))
    two, one = ([line["summary"] for line in read_lines(path)] for path in (folder / own.name, own))
    assert two == one
    status, output = LAUNCH("baselines", ("--data", "/nowhere"), 1, log)
    assert status == 2
    assert runs.reason("baselines", output).startswith("/nowhere: no dataset")


# ---- The figures


def test_figure9_takes_over_the_table_s_summaries_and_equal_runs(world, launched):
    settings = world.settings | world.models | {"paradigms": "hierarchical"}
    experiment("figure9", **settings, history_items=[0, 3])
    name = f"{world.hierarchical}-items0-seed"
    scripts = ("train.py", "evaluate.py")
    assert launched == [(f"{name}{seed}", script) for seed in (0, 1) for script in scripts]
    assert list(read_json(world.out / "results.json")) == ["table2", "figure9"]
    rows = {row["name"]: row for row in rows_of(world, "figure9")}
    assert rows["hierarchical, 3 items"]["measured"] == rows_of(world, "table2")[2]["measured"]
    config = read_json(world.out / f"{name}0" / "config.json")
    assert config["train"]["history_items"] == 0

    of_paper = "| *hierarchical, 3 items: the paper, Amazon-M2* | *0.8910* |"
    text = (world.out / "figure9.md").read_text()
    assert of_paper in text
    assert "hierarchical, 0 items: the paper" not in text
    # Without 3 items of its own the paper's stand alone.
    experiment("figure9", **settings, history_items=0)
    text = (world.out / "figure9.md").read_text()
    assert of_paper in text
    assert "| hierarchical, 3 items |" not in text


@pytest.mark.parametrize("name", ["figure10", "figure11"])
def test_models_of_any_name_beside_each_other(world, launched, model_folder, tmp_path, name):
    other = shutil.copytree(model_folder, tmp_path / "a<b & 'c'|d")
    several, one = ("summarizers", "recommender")
    if name == "figure10":
        several, one = ("recommenders", "summarizer")
    models = {several: [model_folder, other], one: model_folder}
    settings = world.settings | {"seeds": 0, "paradigms": "hierarchical"}
    experiment(name, **settings, **models)
    rows = rows_of(world, name)
    first, second = rows[:2]
    assert first["measured"] == second["measured"]  # it is the same model under two names
    assert first["runs"] != second["runs"]
    configs = [read_json(Path(row["runs"][0]) / "config.json") for row in rows if row["runs"]]
    items = {config["train"]["history_items"] for config in configs}
    assert items == {3 if name == "figure10" else 0}
    summarized = [script for _, script in launched if script == "summarize.py"]
    assert len(summarized) == (0 if name == "figure10" else 1)
    assert "a<b & 'c'\\|d |" in (world.out / f"{name}.md").read_text()
    text = (world.out / f"{name}.svg").read_text()
    assert "a&lt;b &amp; " in text
    ET.fromstring(text)
    assert ("Llama-2-7b, the paper" in text) == (name == "figure10")


# ---- What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"data": "/nowhere"},
            "/nowhere: no dataset (no meta.json); docs/data.md says how to make one",
        ),
        ({"recommender": "/nowhere"}, "/nowhere: no such model folder"),
        ({"train": "--seed 5"}, "--train: the experiment sets --seed itself; leave it out"),
        ({"summarize": "--int8 'x"}, "--summarize: No closing quotation"),
        ({"rows": "nonsense"}, "invalid choice: 'nonsense'"),
        ({"seeds": -1}, "expected a whole number from 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(world, launched, setting, message):
    done = experiment("table2", **world.table | setting, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert launched == []


def test_runs_on_other_data_are_not_mixed_in(world, launched, tmp_path):
    other = write_dataset(tmp_path / "other", seed=1)
    done = experiment("table2", **world.table | {"data": other}, check=False)
    assert (done.returncode, launched) == (2, [])
    assert f"made with {world.data}, not with {other}; choose another --out" in done.stderr
