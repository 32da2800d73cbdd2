"""The experiments: their tables equal what the runs' files tell, nothing is run twice, and errors are one line."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run, write_dataset

import trsr
from experiments import paper, runs
from files.jsonl import read_json, read_jsonl
from runfolder import plots

ROWS = ("hierarchical", "whole-history", "core", "sasrec")
LAUNCH = runs.launch


def in_process(script, flags, processes, log):
    """What experiments.runs.launch does, without a new process and the seconds that torch takes to start there."""
    done = run(script if script.endswith(".py") else f"{script}.__main__.py", *flags, check=False)
    log.write_text(done.stdout + done.stderr)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def launched(monkeypatch):
    """The stages that are run, as (run folder's name, script)."""
    found = []

    def launch(script, flags, processes, log):
        found.append((log.parent.name, script))
        return in_process(script, flags, processes, log)

    monkeypatch.setattr(runs, "launch", launch)
    return found


def experiment(name, *flags, check=True):
    return run(f"experiments.{name}.py", *flags, check=check)


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    """A dataset, and the flags of an experiment with a table that was made: two seeds, four rows."""
    torch.set_num_threads(2)  # a module's fixture comes before the one that sets it for a test
    folder = tmp_path_factory.mktemp("experiments")
    write_dataset(folder / "data", history=(6, 12))
    flags = ["--data", folder / "data", "--out", folder / "out", "--summarize=--max-new-tokens 8"]
    flags += ["--train", "--epochs 1 --batch-size 8 --lr 0.01 --lora-dropout 0", "--seeds", 0, 1]
    models = ["--summarizer", model_folder, "--recommender", model_folder]
    table = [*flags, *models, "--rows", *ROWS, "--baselines", "--epochs 2 --size 8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "launch", in_process)
        done = experiment("table2", *table)
    return Namespace(
        folder=folder,
        out=folder / "out",
        flags=flags,
        models=models,
        table=table,
        first=done.stdout,
    )


def scores(folder):
    return [r for _, r in read_jsonl(folder / "scores-test.jsonl", {})]


def test_the_table_is_that_of_the_runs_scores(world):
    rows = {row["name"]: row for row in read_json(world.out / "results.json")["table2"]["rows"]}
    text = (world.out / "table2.md").read_text()
    assert list(rows) == [
        "random",
        "popularity",
        "LLM-TRSR hierarchical",
        "TALLRec (whole history)",
        "CORE",
        "SASRec",
    ]
    for name in list(rows)[2:]:
        values = []
        for folder in rows[name]["runs"]:
            for line in scores(Path(folder)):
                positive = line["candidates"].index(
                    line.get("positive") or positives(world)[line["user"]]
                )
                rank = trsr.rank_of_positive(line["scores"], positive)
                values.append((rank <= 3, (rank <= 5) / rank))
        assert len(values) == 2 * 4
        measured = rows[name]["measured"]
        assert [measured["Recall@3"]["mean"], measured["MRR@5"]["mean"]] == pytest.approx(
            np.mean(values, axis=0)
        )
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        found = [float(x) for x in re.findall(r"(?<![(–.\d])\d\.\d{4}", line)]
        assert found == [
            round(measured[f"{m}@{k}"]["mean"], 4) for m in ("Recall", "MRR") for k in (3, 5, 10)
        ]
        low, high = measured["MRR@10"]["interval"]
        assert f"({low:.3f}–{high:.3f})" in line
        assert low <= measured["MRR@10"]["mean"] <= high


def positives(world):
    return {
        r["user"]: r["positive"] for _, r in read_jsonl(world.folder / "data" / "test.jsonl", {})
    }


def test_the_table_marks_the_best_and_what_is_the_paper_s(world):
    text = (world.out / "table2.md").read_text()
    own = [line for line in text.splitlines() if line.startswith("| ") and "the paper" not in line][
        1:
    ]
    columns = [[cell.strip() for cell in line.split("|")[2:-1]] for line in own]
    for cells in zip(*columns, strict=True):
        values = [float(re.search(r"\d\.\d+", cell).group()) for cell in cells]
        assert [v for v, cell in zip(values, cells, strict=True) if "**" in cell] == [
            max(values)
        ] * values.count(max(values))
    assert "| *CORE: the paper, Amazon-M2* | *0.5230* | *0.4632*† | *0.6450* |" in text
    assert (
        "| *LLM-TRSR hierarchical: the paper, Amazon-M2* | *0.8910* | *0.9120* | *0.9490* | *0.8597* |"
        in text
    )
    assert "misprint" in text
    assert paper.NOTES["table2"] in text
    assert text in world.first


def test_seeds_share_summaries_and_differ_in_what_they_train(world):
    first, second = (
        world.out / f"{name_of(world, 'hierarchical')}-items3-seed{seed}" for seed in (0, 1)
    )
    summaries = list(world.out.glob("summaries-*/summaries.jsonl"))
    assert len(summaries) == 1
    for folder in (first, second):
        assert os.path.samefile(folder / "summaries.jsonl", summaries[0])
    assert [s["scores"] for s in scores(first)] != [s["scores"] for s in scores(second)]


def name_of(world, paradigm):
    model = runs.slug(world.models[1])
    return "-".join([paradigm, *([model] if paradigm in trsr.SUMMARIZED else []), model])


def test_a_second_call_runs_nothing(world, launched):
    before = (world.out / "table2.md").read_bytes(), (world.out / "table2.svg").read_bytes()
    done = experiment("table2", *world.table)
    assert launched == []
    assert "13 done before, nothing to run" in done.stdout
    assert (
        (world.out / "table2.md").read_bytes(),
        (world.out / "table2.svg").read_bytes(),
    ) == before


def test_a_stage_whose_result_is_gone_is_run_again_alone(world, launched):
    name = f"{name_of(world, 'hierarchical')}-items3-seed1"
    folder, expected = world.out / name, (world.out / "table2.md").read_text()
    (folder / "scores-test.jsonl").unlink()
    (world.out / "baselines" / "core-0" / "scores-test.jsonl").unlink()
    experiment("table2", *world.table)
    assert launched == [(name, "evaluate.py"), ("core-0", "baselines")]
    launched.clear()
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "adapter")
    experiment("table2", *world.table)  # what depends on it is made again too
    assert launched == [(name, "train.py"), (name, "evaluate.py")]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (world.out / "table2.md").read_text() == expected


def test_a_failing_stage_is_named_and_the_next_call_goes_on_there(
    world, launched, monkeypatch, tmp_path
):
    counted = runs.launch

    def failing(script, flags, processes, log):
        return (
            (1, "step 1\ntrain: out of everything\nbye")
            if script == "train.py"
            else counted(script, flags, 1, log)
        )

    flags = [*world.table, "--rows", "hierarchical", "--out", tmp_path, "--seeds", 4]
    monkeypatch.setattr(runs, "launch", failing)
    done = experiment("table2", *flags, check=False)
    name = f"{name_of(world, 'hierarchical')}-items3-seed4"
    assert done.returncode == 2
    line = f"experiments.table2: {tmp_path / name}: train.py failed: out of everything (its output is in "
    assert done.stderr == f"{line}{tmp_path / name / 'train.log'})\n"
    monkeypatch.setattr(runs, "launch", counted)
    done = experiment("table2", *flags)
    assert "3: 1 done before, 2 to run" in done.stdout
    assert [script for _, script in launched] == ["summarize.py", "train.py", "evaluate.py"]
    other = experiment(
        "table2", *flags, "--train", "--epochs 2 --batch-size 8", check=False
    )  # not mixed into one folder
    assert other.returncode == 2
    assert "train.py worked here with" in other.stderr
    assert other.stderr.count("\n") == 1


def test_figure9_takes_over_the_table_s_summaries_and_equal_runs(world, launched):
    flags = [*world.flags, *world.models, "--paradigms", "hierarchical", "--history-items"]
    experiment("figure9", *flags, 0, 3)
    name = f"{name_of(world, 'hierarchical')}-items0-seed"
    assert launched == [
        (f"{name}{seed}", script) for seed in (0, 1) for script in ("train.py", "evaluate.py")
    ]
    results = read_json(world.out / "results.json")
    assert list(results) == ["table2", "figure9"]
    rows = {row["name"]: row for row in results["figure9"]["rows"]}
    assert rows["hierarchical, 3 items"]["measured"] == results["table2"]["rows"][2]["measured"]
    text = (world.out / "figure9.md").read_text()
    assert "| *hierarchical, 3 items: the paper, Amazon-M2* | *0.8910* |" in text
    assert "hierarchical, 0 items: the paper" not in text
    assert (
        read_json(world.out / name.replace("seed", "seed0") / "config.json")["train"][
            "history_items"
        ]
        == 0
    )
    experiment("figure9", *flags, 0)  # without 3 items of its own the paper's stand alone
    text = (world.out / "figure9.md").read_text()
    assert "| *hierarchical, 3 items: the paper, Amazon-M2* | *0.8910* |" in text
    assert "| hierarchical, 3 items |" not in text


@pytest.mark.parametrize("name", ["figure10", "figure11"])
def test_models_of_any_name_beside_each_other(world, launched, model_folder, tmp_path, name):
    other = tmp_path / "a<b & 'c'|d"
    shutil.copytree(model_folder, other)
    several, one = (
        ("--recommenders", "--summarizer")
        if name == "figure10"
        else ("--summarizers", "--recommender")
    )
    flags = [
        *world.flags,
        "--seeds",
        0,
        "--paradigms",
        "hierarchical",
        several,
        model_folder,
        other,
        one,
        model_folder,
    ]
    experiment(name, *flags)
    rows = read_json(world.out / "results.json")[name]["rows"]
    first, second = rows[:2]
    assert first["measured"] == second["measured"]  # it is the same model under two names
    assert first["runs"] != second["runs"]
    items = {
        read_json(Path(r["runs"][0]) / "config.json")["train"]["history_items"]
        for r in rows
        if r["runs"]
    }
    assert items == {3 if name == "figure10" else 0}
    summarized = [script for _, script in launched if script == "summarize.py"]
    assert len(summarized) == (0 if name == "figure10" else 1)
    assert "a<b & 'c'\\|d |" in (world.out / f"{name}.md").read_text()
    text = (world.out / f"{name}.svg").read_text()
    assert "a&lt;b &amp; " in text
    ET.fromstring(text)
    assert ("Llama-2-7b, the paper" in text) == (name == "figure10")


def test_the_figure_is_sound_and_shows_the_values(world):
    root = ET.parse(world.out / "table2.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    for row in read_json(world.out / "results.json")["table2"]["rows"]:
        assert texts.count(row["name"]) == 6  # in each panel
        assert f"{row['measured']['Recall@3']['mean']:.3f}" in texts
    assert {"Recall@3", "MRR@10"} < set(texts)


def test_panels_put_values_intervals_and_the_paper_s_marks_on_one_scale():
    values, marks = (
        {("x", "a"): (0.5, 0.25, 1.0), ("y", "b"): (0.25, 0.25, 0.25)},
        {("x", "a"): 0.5, ("z", "a"): 0.75},
    )
    root = ET.fromstring(f"<g>{plots.bar_panel(['a', 'b'], values, marks)[0]}</g>")
    widths = [float(bar.get("width")) for bar in root.iter("rect")]
    starts = [float(bar.get("x")) for bar in root.iter("rect")]
    tips = [float(re.match(r"M(\S+),", mark.get("d")).group(1)) + 5 for mark in root.iter("path")]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert tips == pytest.approx([starts[0] + widths[0], starts[0] + 1.5 * widths[0]], abs=0.1)
    line = next(line for line in root.iter("line") if line.get("class") is None)
    assert float(line.get("x2")) - starts[0] == pytest.approx(2 * widths[0], abs=0.1)
    numbers = {(0, "a"): (0.2, 0.1, 0.3), (2, "a"): (0.4, 0.3, 0.5)}
    root = ET.fromstring(f"<g>{plots.line_panel('n', ['a'], numbers, {(2, 'a'): 0.4})[0]}</g>")
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert root.find("polyline").get("points") == " ".join(f"{x},{y}" for x, y in points)
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1]


def test_a_model_made_for_each_seed_has_summaries_of_its_own(world, model_folder, tmp_path):
    for seed in (0, 1):
        shutil.copytree(model_folder, tmp_path / f"base-{seed}")
    args = Namespace(data="data/demo", out=tmp_path, k=[3], summarize="", train="")
    per_seed = str(tmp_path / "base-{seed}")

    def stages(summarizer, recommender, seed):
        return runs.language_model_run(args, "recurrent", summarizer, recommender, 3, seed)

    one, two = (stages(per_seed, str(model_folder), seed) for seed in (0, 1))
    assert one[0].run != two[0].run
    assert str(tmp_path / "base-1") in two[0].flags
    assert two[1].summaries == two[0].run
    one, two = (stages(str(model_folder), per_seed, seed) for seed in (0, 1))
    assert one[0] == two[0]
    assert str(tmp_path / "base-1") in two[1].flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--data", "/nowhere"),
            "/nowhere: no dataset (no meta.json); docs/data.md says how to make one",
        ),
        (("--recommender", "/nowhere"), "/nowhere: no such model folder"),
        (("--train", "--seed 5"), "--train: the experiment sets --seed itself; leave it out"),
        (("--summarize", "--int8 'x"), "--summarize: No closing quotation"),
        (("--rows", "nonsense"), "invalid choice: 'nonsense'"),
        (("--seeds", "-1"), "expected a whole number from 0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(world, launched, flags, message):
    done = experiment("table2", *world.table, *flags, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert launched == []


def test_runs_on_other_data_are_not_mixed_in(world, launched, tmp_path):
    write_dataset(tmp_path / "other", seed=1)
    done = experiment("table2", *world.table, "--data", tmp_path / "other", check=False)
    assert (done.returncode, launched) == (2, [])
    assert (
        f"made with {world.folder / 'data'}, not with {tmp_path / 'other'}; choose another --out"
        in done.stderr
    )


def test_the_paper_s_recalls_and_mrrs_grow_with_k_but_for_the_misprint():
    falling = set()
    for domain, dataset in paper.DATASETS.items():
        for row in paper.TABLE2:
            values = paper.paper_values(domain, row)
            for metric in ("Recall", "MRR"):
                three, five, ten = (values[f"{metric}@{k}"] for k in (3, 5, 10))
                falling |= {(dataset, row, f"{metric}@5")} if not three < five < ten else set()
                assert three < ten < 1
    assert falling == paper.MISPRINTS
    assert paper.paper_values("news", "recent-only") == {}


def test_scripts_start_under_torchrun_and_tell_why_they_fail(world, model_folder, tmp_path):
    flags = (
        "--data",
        world.folder / "data",
        "--model",
        model_folder,
        "--max-new-tokens",
        8,
        "--run-dir",
        tmp_path / "two",
    )
    assert LAUNCH("summarize.py", tuple(map(str, flags)), 2, tmp_path / "log")[0] == 0
    assert "on 2 x cpu" in (tmp_path / "log").read_text()
    own = next(world.out.glob("summaries-*/summaries.jsonl"))
    made = [json.loads(line)["summary"] for line in (tmp_path / "two" / "summaries.jsonl").open()]
    assert made == [json.loads(line)["summary"] for line in own.open()]
    status, output = LAUNCH("baselines", ("--data", "/nowhere"), 1, tmp_path / "log")
    assert status == 2
    assert runs.reason("baselines", output).startswith("/nowhere: no dataset")
