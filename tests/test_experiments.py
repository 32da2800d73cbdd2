"""The experiments: tables that say what the runs' files say, and nothing that is run twice."""

import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import flags, read_lines, run, scores, write_dataset

import trsr
from experiments import forecast, jobs, paper, runs
from experiments.processes import Call, Fresh
from experiments.stages import MARKS, SECONDS, Stage, slug
from experiments.tuning import Choice
from files.jsonl import read_json, write_json
from launch.embedded import MODEL
from prepare.domains import DOMAINS

ROWS = ("hierarchical", "whole-history", "core", "sasrec")
SVG = "{http://www.w3.org/2000/svg}"


def in_process(call, machine):
    """Do what experiments.jobs.launch does, in this process: torch takes seconds to start."""
    name = {"baselines": "baselines.__main__.py", "experiments.ruled": "experiments.ruled.py"}
    done = run(name.get(call.script, call.script), *call.flags, check=False)
    call.log.write_text(done.stdout + done.stderr)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def launched(monkeypatch):
    """The stages that are run, as (run folder's name, script)."""
    found = []

    def launch(call, machine):
        found.append((call.log.parent.name, call.script))
        return in_process(call, machine)

    monkeypatch.setattr(jobs, "launch", launch)
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
        patch.setattr(jobs, "launch", in_process)
        first = experiment("table2", **table).stdout
    model = slug(model_folder)
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
    table, _ = text.split("\n\n", 1)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
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


def test_below_the_table_each_language_model_is_compared_with_the_whole_history(world):
    rows = {row["name"]: row for row in rows_of(world, "table2")}
    whole, own = rows["TALLRec (whole history)"], rows["LLM-TRSR hierarchical"]
    assert whole["differences"] == rows["CORE"]["differences"] == {}
    assert list(own["differences"]) == [whole["name"]]  # recent items only is not in this table
    found = own["differences"][whole["name"]]
    ranks = [[[r["rank"] for r in scores(Path(f))] for f in row["runs"]] for row in (own, whole)]
    users = [[r["user"] for r in scores(Path(f))] for row in (own, whole) for f in row["runs"]]
    assert all(names == users[0] for names in users)
    expected = np.mean(np.array(ranks[0]) <= 5) - np.mean(np.array(ranks[1]) <= 5)
    assert found["Recall@5"]["mean"] == pytest.approx(expected)
    low, high = found["Recall@3"]["interval"]
    assert low <= found["Recall@3"]["mean"] <= high
    text = (world.out / "table2.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"| {own['name']} | "))
    *_, last = [line for line in text.splitlines() if line.startswith(f"| {own['name']} | ")]
    assert last != line
    assert f"{found['Recall@3']['mean']:+.4f}" in last
    assert f"({low:+.3f} to {high:+.3f})" in last
    assert "| | Recall@3, less that of TALLRec (whole history) |" in text


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
    experiment("table2", **world.table)  # nothing needs it any more
    assert launched == []
    (folder / "scores-test.jsonl").unlink()
    experiment("table2", **world.table)  # now it is needed again
    assert launched == [(name, "train.py"), (name, "evaluate.py")]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (world.out / "table2.md").read_text() == expected


def test_a_failing_stage_is_named_and_the_next_call_resumes_there(
    world, launched, monkeypatch, tmp_path
):
    counted = jobs.launch

    def failing(call, machine):
        if call.script == "train.py":
            return 1, "step 1\ntrain: out of everything\nbye"
        return counted(call, machine)

    settings = world.table | {"rows": "hierarchical", "out": tmp_path, "seeds": 4}
    monkeypatch.setattr(jobs, "launch", failing)
    done = experiment("table2", **settings, check=False)
    folder = tmp_path / f"{world.hierarchical}-items3-seed4"
    assert done.returncode == 2
    what = f"{folder}: train.py failed: out of everything"
    where = f"its output is in {folder / 'train.log'}"
    assert done.stderr == f"experiments.table2: {what} ({where})\n"
    monkeypatch.setattr(jobs, "launch", counted)
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
        model = runs.LanguageModel("recurrent", summarizer, recommender, 3)
        return runs.language_model_run(settings, model, Choice(), seed)

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
    call = Call("summarize.py", tuple(flags(**settings)), log)
    assert Fresh(processes=2).run(call, None)[0] == 0
    assert "on 2 x cpu" in log.read_text()
    own = next(world.out.glob("summaries-*/summaries.jsonl"))
    two, one = ([line["summary"] for line in read_lines(path)] for path in (folder / own.name, own))
    assert two == one
    status, output = Fresh().run(Call("baselines", ("--data", "/nowhere"), log), None)
    assert status == 2
    assert jobs.reason("baselines", output).startswith("/nowhere: no dataset")


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


# ---- Values chosen by validation, rows of their own, budgets


SMALL = (
    "stages.json config.json metrics.jsonl results*.json trimmed.json scores-test*.jsonl data.json"
)


def keep_small_files(folder):
    """Remove all but the files that docs/reproduction.md says have to stay."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.match(pattern) for pattern in SMALL.split()):
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def test_a_tuned_table_shows_only_what_was_chosen(world, launched, tmp_path):
    settings = world.table | {"out": tmp_path, "rows": ["recent-only", "ncf+positions"]}
    settings |= {"train": "--epochs 1 --batch-size 8", "lrs": [1e-5, 0.03], "ranks": [2, 4]}
    done = experiment("table2", **settings, baseline_lrs=[1e-6, 0.01])
    assert "0 done before, 9 to run" in done.stdout
    assert "\n9/9 " in done.stdout
    trained = [name for name, script in launched if script == "train.py"]
    assert len(set(trained)) == len(trained) == 2 + 1 + 1  # learning rates, a rank, a seed
    evaluated = [name for name, script in launched if script == "evaluate.py"]
    rows = {row["name"]: row for row in read_json(tmp_path / "results.json")["table2"]["rows"]}
    for name in ("recent items only", "NCF, every position"):
        row = rows[name]
        tried = {t["validation"]: t for t in reversed(row["tried"])}  # of equal ones the first
        best = tried[max(tried)]
        assert row["chosen"] == {k: v for k, v in best.items() if k != "validation"}
        label = f"lr{best['--lr']:g}"
        assert all(label in Path(folder).name for folder in row["runs"])
        assert len(row["runs"]) == 2
    assert sorted(evaluated) == sorted(Path(f).name for f in rows["recent items only"]["runs"])
    text = (tmp_path / "table2.md").read_text()
    chosen = rows["recent items only"]["chosen"]
    words = f"learning rate {chosen['--lr']:g}, rank {chosen['--lora-r']}"
    assert f"Chosen by validation recall with seed 0. recent items only: {words}; NCF" in text

    # A second call finds all of it, even if only the small files are left.
    keep_small_files(tmp_path)
    assert not list(tmp_path.glob("*/adapter"))
    launched.clear()
    again = experiment("table2", **settings, baseline_lrs=[1e-6, 0.01])
    assert launched == []
    assert "nothing to run" in again.stdout
    assert (tmp_path / "table2.md").read_text() == text


def test_the_untrained_recommender_and_summaries_alone_have_rows(world, launched, tmp_path):
    rows = ["untrained", "recent-only", "hierarchical-alone"]
    settings = world.table | {"out": tmp_path, "rows": rows, "seeds": [0, 1], "lrs": [1e-4, 0.01]}
    settings |= {"train": "--epochs 1 --batch-size 8", "evaluate": "--pack-tokens 1024"}
    experiment("table2", **settings)
    found = {row["name"]: row for row in read_json(tmp_path / "results.json")["table2"]["rows"]}
    assert list(found)[2:] == ["zero-shot, recent items", "recent items only", SUMMARY_ONLY]
    assert len(found["zero-shot, recent items"]["runs"]) == 1  # it is the same for all seeds
    untrained = Path(found["zero-shot, recent items"]["runs"][0])
    expected = read_json(untrained / "results-untrained.json")["table"]["untrained"]
    measured = found["zero-shot, recent items"]["measured"]
    means = {name: metric["mean"] for name, metric in measured.items()}
    assert means == pytest.approx({name: expected[name]["mean"] for name in means})
    assert not (untrained / "adapter").exists()
    # No learning rate matters to it, so none is told.
    assert "chosen" not in found["zero-shot, recent items"]
    assert "zero-shot, recent items: learning" not in (tmp_path / "table2.md").read_text()
    assert "chosen" in found["recent items only"]
    config = read_json(Path(found[SUMMARY_ONLY]["runs"][0]) / "config.json")["train"]
    assert (config["paradigm"], config["history_items"]) == ("hierarchical", 0)
    columns = {"recent items only"}
    assert {*found[SUMMARY_ONLY]["differences"]} == columns
    assert {*found["zero-shot, recent items"]["differences"]} == columns
    keep_small_files(tmp_path)
    launched.clear()
    experiment("table2", **settings)
    assert launched == []


def test_ranks_in_8_bit_are_not_those_without_it(world, launched, tmp_path):
    settings = world.table | {"out": tmp_path, "seeds": 0, "rows": ["untrained", "recent-only"]}
    experiment("table2", **settings)
    experiment("rankings", **settings, users=3)
    launched.clear()
    settings["evaluate"] = "--fp8 --pack-tokens 1024"
    experiment("table2", **settings)
    experiment("rankings", **settings, users=3)
    assert [script for _, script in launched] == ["evaluate.py"] * 4
    names = {path.name.removeprefix("scores-test") for path in tmp_path.glob("*/scores-test*-fp8*")}
    ends = ("-fp8", "-untrained-fp8", "-all-3-users-fp8", "-untrained-all-3-users-fp8")
    assert names == {f"{end}.jsonl" for end in ends}
    row = read_json(tmp_path / "results.json")["table2"]["rows"][3]
    ranks = [line["rank"] for line in scores(Path(row["runs"][0]), "scores-test-fp8.jsonl")]
    assert row["measured"]["Recall@3"]["mean"] == pytest.approx(np.mean(np.array(ranks) <= 3))


SUMMARY_ONLY = "hierarchical summary only"


def test_budgets_compare_each_kind_of_prompt_within_them(world, launched, tmp_path):
    settings = world.settings | world.models | {"out": tmp_path, "seeds": 0}
    budgets, rows = [200, 900, 1000], ["whole-history", "recent-only", "rule"]
    done = experiment("budgets", **settings, budgets=budgets, rows=rows)
    found = {row["name"]: row for row in read_json(tmp_path / "results.json")["budgets"]["rows"]}
    whole = [found[f"whole history, {b} tokens"] for b in budgets]
    assert [row["group"] for row in whole] == budgets
    for folder, budget in ((whole[0]["runs"][0], 200), (whole[1]["runs"][0], 900)):
        assert read_json(Path(folder) / "config.json")["train"]["max_length"] == budget

    # The whole history is cut at 200 tokens but not at 900, so 1000 would be the same.
    assert read_json(Path(whole[0]["runs"][0]) / "trimmed.json")["train.py"]
    assert whole[2]["reused"] == whole[1]["name"]
    assert whole[2]["measured"] == whole[1]["measured"]
    assert "reused" not in whole[1]
    assert not any("max1000" in name for name, _ in launched)
    text = (tmp_path / "budgets.md").read_text()
    assert "whole history, 1000 tokens: whole history, 900 tokens" in text
    assert text in done.stdout

    # Summaries by rule are made once, and in a way that train.py takes.
    ruled = [name for name, script in launched if script == "experiments.ruled"]
    assert ruled == ["summaries-hierarchical-rule"]
    own = found["summary by rule + recent, 900 tokens"]["runs"][0]
    lines = read_lines(Path(own) / "summaries.jsonl")
    assert len({line["user"] for line in lines}) == 20
    for other in ("whole history", "recent items only"):
        for budget in budgets:
            row = found[f"summary by rule + recent, {budget} tokens"]
            difference = row["differences"][f"{other} within the same budget"]["Recall@3"]["mean"]
            theirs = found[f"{other}, {budget} tokens"]["measured"]["Recall@3"]["mean"]
            assert difference == pytest.approx(row["measured"]["Recall@3"]["mean"] - theirs)
    root = ET.parse(tmp_path / "budgets.svg").getroot()
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert {"whole history", "recent items only", "summary by rule + recent"} < set(texts)
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 3 * 6
    assert all(len(line.get("points").split()) == 3 for line in lines)


def test_the_trainer_s_own_limit_is_a_budget_whose_runs_are_shared(world, launched):
    settings = world.settings | world.models
    done = experiment("budgets", **settings, budgets=2048, rows=["whole-history", "hierarchical"])
    assert launched == []  # table 2 has made them
    rows = {row["name"]: row for row in rows_of(world, "budgets")}
    table = {row["name"]: row for row in rows_of(world, "table2")}
    own, theirs = rows["whole history, 2048 tokens"], table["TALLRec (whole history)"]
    assert own["measured"] == theirs["measured"]
    assert "nothing to run" in done.stdout
    settings["train"] = "--epochs 1 --max-length 99"
    refused = experiment("budgets", **settings, budgets=2048, check=False)
    assert refused.returncode == 2
    assert "--train: the experiment sets --max-length itself" in refused.stderr


# ---- Every position, and other candidates


def test_rows_of_every_position_stand_beside_the_others(world, launched, tmp_path):
    train = "--epochs 1 --batch-size 8 --lora-dropout 0"
    settings = world.table | {"out": tmp_path, "seeds": 0, "lrs": [1e-3, 0.01], "train": train}
    rows = ["hierarchical", "hierarchical+positions", "recent-only+positions"]
    more = {"positions": "--epochs 2", "positions_lrs": 0.01}
    experiment("table2", **settings | {"rows": rows}, **more)
    found = {row["name"]: row for row in read_json(tmp_path / "results.json")["table2"]["rows"]}
    every = found["LLM-TRSR hierarchical, every position"]
    assert {*every["differences"]} == {"the same row with one target a user"}
    config = read_json(Path(every["runs"][0]) / "config.json")
    assert config["train"]["targets"] > 1000
    assert (config["train"]["epochs"], config["train"]["lr"]) == (2, 0.01)
    assert config["summarize"]["every_block"]
    last = read_json(Path(found["LLM-TRSR hierarchical"]["runs"][0]) / "config.json")
    assert last["train"]["targets"] == 1
    assert not last["summarize"]["every_block"]
    assert "chosen" in found["LLM-TRSR hierarchical"]

    # The same runs, among others, are compared at equal examples.
    launched.clear()
    models = world.models | {"lrs": 0.01, "rows": ["recent-only"]}
    settings = world.settings | {"out": tmp_path, "seeds": 0, "train": train} | models
    done = experiment("targets", **settings, trainings=["last", "all:2", "last:9"])
    scripts = ["train.py", "evaluate.py"]
    assert [script for _, script in launched] == scripts * 2  # last, and last:9
    users = read_lines(world.data / "train.jsonl")
    n = sum(len({*user["history"], user["positive"]}) - 1 for user in users)
    examples = 1 + len(users[0]["negatives"])
    assert f"| recent items only: all positions, 2 epochs | {2 * n * examples} |" in done.stdout
    assert f"last position, 9 epochs | {9 * len(users) * examples} |" in done.stdout
    column = "| | Recall@3, less that of last position, with the same kind of prompt |"
    assert column in done.stdout


def test_both_rankings_are_of_the_same_models_and_users(world, launched, tmp_path):
    rows = ["untrained", "recent-only", "ncf"]
    settings = world.table | {"out": tmp_path, "seeds": 0, "rows": rows}
    baselines = settings["baselines"] + " --candidates all --users 3"
    experiment("table2", **settings | {"baselines": baselines})
    launched.clear()
    done = experiment("rankings", **settings, users=3, among_k=[2, 20])
    assert [script for _, script in launched] == ["evaluate.py"] * 2  # baselines ranked both
    assert "Rankings: 3 test users" in done.stdout
    own, row = read_json(tmp_path / "results.json")["rankings"]["rows"][-2:]
    (folder,) = own["runs"]
    lines = read_lines(Path(folder) / "scores-test-all-3-users.jsonl")
    assert len(lines) == 3
    items = {item["id"] for item in read_lines(world.data / "items.jsonl")}
    users = {user["user"]: user for user in read_lines(world.data / "test.jsonl")}
    assert [line["ranked"] for line in lines] == [
        len(items - {*users[line["user"]]["history"]}) for line in lines
    ]
    expected = np.mean([line["rank"] <= 20 for line in lines])
    assert own["measured"]["Recall@20"]["mean"] == pytest.approx(expected)
    sampled = np.mean([line["rank"] <= 3 for line in scores(Path(folder))[:3]])
    line = next(x for x in done.stdout.splitlines() if x.startswith("| recent items only |"))
    assert line.split("|")[2].strip().startswith(f"{sampled:.4f} (")
    places = [
        line.split("|")[4].strip(" =")
        for line in done.stdout.splitlines()[-20:]
        if line.startswith("| ") and "place" not in line
    ]
    values = [
        float(line.split("|")[3].split()[0])
        for line in done.stdout.splitlines()[-20:]
        if line.startswith("| ") and "place" not in line
    ]
    assert places == [str(1 + sum(other > value for other in values)) for value in values]
    assert row["name"] == "NCF"

    # Without the same flags for table 2, the baselines are trained once more, and said so before.
    dry = experiment("rankings", **settings, users=2, dry_run=True)
    assert "evaluate.py" in dry.stdout
    tokens = foreseen(dry.stdout)
    assert {script for _, script in tokens} == {"evaluate.py"}
    again = experiment("rankings", **settings, users=3, among_k=[2, 20])
    assert "nothing to run" in again.stdout


# ---- What it will take


def number(text):
    return int(text.replace(",", ""))


def foreseen(output):
    """The tokens that --dry-run foresees, as (learned, read, written) by (run folder, script)."""
    found = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"(\S+): (\S+\.py)  (.+)", line):
            parts = {w: number(n) for n, w in re.findall(r"([\d,]+) to (\w+)", match[3])}
            found[match[1], match[2]] = [parts.get(w, 0) for w in ("learn", "read", "write")]
    return found


def test_a_dry_run_foresees_the_tokens_and_leaves_nothing_behind(world, launched, tmp_path):
    models = {"rows": ["recent-only", "hierarchical"], "train": "--epochs 3 --batch-size 8"}
    settings = world.table | models | {"out": tmp_path / "none", "seeds": 7, "dry_run": True}
    done = experiment("table2", **settings)
    found, fresh = foreseen(done.stdout), world.out / f"{world.hierarchical}-items3-seed0"
    assert (launched, (tmp_path / "none").exists()) == ([], False)
    assert "without train.py, evaluate.py, summarize.py: none has finished here" in done.stdout
    assert "summaries that are not there yet count with as many tokens" in done.stdout
    assert len(found) == 5

    # As many summaries as were asked for, of 8 tokens each.
    lines = read_lines(next(world.out.glob("summaries-hier*/summaries.jsonl")))
    texts = sum(sum(line["ends"].values()) for line in lines)
    ((_, read, written),) = [v for (_, script), v in found.items() if script == "summarize.py"]
    assert written == 8 * texts
    assert read > written

    # The summaries that are there have the tokens that train.py counts; all three epochs count.
    settings |= {"out": world.out, "train": world.table["train"], "rows": "hierarchical"}
    done = experiment("table2", **settings)
    found, name = foreseen(done.stdout), f"{world.hierarchical}-items3-seed7"
    reported = re.search(r"(\d+) tokens an epoch", (fresh / "train.log").read_text())
    learned, validated, _ = found[name, "train.py"]
    assert learned == int(reported[1])
    assert validated > 0
    assert "count with as many" not in done.stdout
    settings["train"] = settings["train"].replace("--epochs 1", "--epochs 3")
    done = experiment("table2", **settings)
    assert foreseen(done.stdout)[name, "train.py"] == [3 * learned, 3 * validated, 0]
    assert launched == []


def test_a_dry_run_tells_minutes_by_the_stages_that_have_finished(world, launched, monkeypatch):
    settings = world.table | {"rows": ["whole-history", "sasrec"], "seeds": [0, 1, 7]}
    settings |= {"dry_run": True}
    for path in world.out.rglob("seconds.json"):
        seconds = {"train.py": 120.0, "evaluate.py": 60.0, "baselines": 30.0}
        path.write_text(
            json.dumps({name: seconds[name] for name in read_json(path).keys() & seconds.keys()})
        )
    done = experiment("table2", **settings)
    assert "\nminutes 3.5\n" in done.stdout  # 120, 60 and 30 seconds once more
    done = experiment("table2", **settings, jobs=2)
    assert "\nminutes 3.5; 2 at a time 1.8\n" in done.stdout
    settings["train"] += " --epochs 7"  # so none has finished
    done = experiment("table2", **settings, speed=1e3)
    rate = re.search(r"tokens +([\d,]+) to learn, ([\d,]+) to read", done.stdout)
    minutes = (number(rate[1]) + number(rate[2]) / 2) / 1e3 / 60 + 0.5
    assert float(re.search("minutes ([\\d.]+)", done.stdout)[1]) == pytest.approx(minutes, abs=0.06)


def test_a_stage_with_a_label_counts_with_its_own_seconds(tmp_path):
    plain = Stage(tmp_path, "evaluate.py", (), ("made",), "plain")
    among = Stage(tmp_path, "evaluate.py", (), ("made",), "among", label="all")
    write_json(tmp_path / MARKS, {stage.mark: stage.key for stage in (plain, among)})
    write_json(tmp_path / SECONDS, {"evaluate.py": 10.0, "evaluate.py all": 200.0})
    works = {plain: forecast.Work(learned=5.0), among: forecast.Work(learned=400.0)}
    known = SimpleNamespace(work=lambda stage, stages: works[stage])
    rate = forecast.seconds_per_effort("evaluate.py", [among], known)
    assert rate == pytest.approx(0.5)
    rate = forecast.seconds_per_effort("evaluate.py", [plain, among], known)
    assert rate == pytest.approx(210 / 405)


def test_a_sample_of_the_users_is_near_all_of_them(monkeypatch, model_folder, tmp_path):
    data = write_dataset(tmp_path, users=(200, 4, 4), history=(2, 20))
    asked = flags(data=data, model=model_folder, paradigm="whole-history", run=tmp_path / "none")
    found = []
    for size in (200, 40):
        monkeypatch.setattr(forecast, "SAMPLE", size)
        found.append(forecast.Forecast().train_work(asked, None))
    assert found[0] != found[1]
    assert found[1].learned == pytest.approx(found[0].learned, rel=0.02)
    assert found[1].scored == found[0].scored  # there are few users to validate on


# ---- Datasets that the paper has not


def test_a_dataset_of_another_domain_has_no_rows_of_the_paper(launched, model_folder, tmp_path):
    data, out = write_dataset(tmp_path / "data", history=(3, 6)), tmp_path / "out"
    words = asdict(DOMAINS["products"]) | {"recommend": "Will the user cook this dish next?"}
    (data / "meta.json").write_text(json.dumps({"domain": "dishes", "words": words}))
    settings = {"data": data, "out": out, "train": "--epochs 1 --batch-size 8", "seeds": 0}
    settings |= {"summarizer": "rule", "recommender": model_folder}
    done = experiment("table2", **settings, rows=["hierarchical", "ncf"], baselines="--epochs 1")
    assert "(dishes)" in done.stdout
    done = experiment("figure9", **settings, history_items=1, paradigms="hierarchical")
    settings["recommenders"] = [settings.pop("recommender")]
    experiment("figure10", **settings, paradigms="hierarchical")
    experiment(
        "budgets",
        **settings | {"recommenders": None, "recommender": model_folder},
        budgets=2048,
        rows="hierarchical",
    )
    found = read_json(out / "results.json")
    assert {name: len(found[name]["rows"]) for name in found} == {
        "table2": 4,
        "figure9": 1,
        "figure10": 1,
        "budgets": 1,
    }
    for name in found:
        assert not any(row["paper"] for row in found[name]["rows"])
        assert "paper" not in (out / f"{name}.md").read_text()
        ET.parse(out / f"{name}.svg")


# ---- What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"data": "/nowhere"},
            "/nowhere: no dataset (no meta.json); docs/data.md says how to make one",
        ),
        ({"recommender": "/nowhere"}, "/nowhere: no such model folder"),
        ({"recommender": None}, "--recommender is needed: models/tiny, the default, knows only"),
        ({"summarizer": None}, "--summarizer is needed: models/tiny, the default, knows only"),
        ({"train": "--seed 5"}, "--train: the experiment sets --seed itself; leave it out"),
        ({"summarize": "--int8 'x"}, "--summarize: No closing quotation"),
        ({"rows": "nonsense"}, "invalid choice: 'nonsense'"),
        ({"seeds": -1}, "expected a whole number from 0"),
        ({"jobs": 2, "nproc": 2}, "--jobs 2 and --nproc 2: either several stages at once"),
        ({"train": "--lr 1", "lrs": 0.1}, "--train: the experiment sets --lr itself; leave it out"),
        ({"evaluate": "--users 3"}, "--evaluate: the experiment sets --users itself"),
        ({"evaluate": "--candidates 9"}, "--evaluate: the experiment sets --candidates itself"),
        ({"evaluate": "--cand=9 --csv"}, "--evaluate: the experiment sets --candidates itself"),
        ({"baselines": "--size 8 --every-position"}, "--baselines: the experiment sets --every"),
        ({"ranks": 0}, "expected a whole number from 1"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(world, launched, setting, message):
    done = experiment("table2", **world.table | setting, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert launched == []


def test_rows_without_summaries_need_no_summarizer(world, launched, tmp_path):
    rows = {"rows": ["recent-only", "whole-history"], "summarizer": None, "out": tmp_path}
    done = experiment("table2", **world.table | rows, dry_run=True)
    assert "models  recommender:" in done.stdout
    assert "summarizer" not in done.stdout
    assert MODEL not in done.stdout
    assert launched == []


def test_runs_on_other_data_are_not_mixed_in(world, launched, tmp_path):
    other = write_dataset(tmp_path / "other", seed=1)
    done = experiment("table2", **world.table | {"data": other}, check=False)
    assert (done.returncode, launched) == (2, [])
    assert f"made with {world.data}, not with {other}; choose another --out" in done.stderr
