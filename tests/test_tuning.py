"""experiments/tuning.py and rows.py: values chosen by validation alone, and only once."""

import pytest
from helpers import write_lines

from experiments import runs
from experiments.rows import Row, plan_of
from experiments.stages import MARKS
from experiments.tuning import Choice, choose, combinations
from files.jsonl import write_json
from trsr import InputError


def finish(stage, recalls, made=True):
    """Leave what a training leaves: its mark, its validation recalls and its adapter."""
    stage.run.mkdir(parents=True, exist_ok=True)
    write_json(stage.run / MARKS, {stage.script: stage.key})
    lines = [{"epoch": e, "validation": {"Recall@3": r, "Recall@5": r}} for e, r in recalls]
    write_lines(stage.run / "metrics.jsonl", [{"step": 1, "loss": 2.0}, *lines])
    if made:
        (stage.run / stage.makes[0]).mkdir(exist_ok=True)


@pytest.fixture
def tuned(tmp_path, model_folder):
    """The settings of a grid with two seeds, and its row."""
    settings = runs.TunedSettings(
        out=tmp_path, k=(3,), seeds=(4, 1), lrs=(1e-3, 1e-2), ranks=(2, 4), train="--epochs 2"
    )
    model = runs.LanguageModel("recent-only", "", str(model_folder), 3)
    choices = {
        choice: [runs.language_model_run(settings, model, choice, seed) for seed in settings.seeds]
        for choice in settings.grid()
    }
    return settings, Row("recent", "recent", choices=choices)


def test_a_grid_has_all_combinations_in_order():
    grid = combinations({"--lr": (1e-3, 3e-4, 1e-3), "--lora-r": (8, 32)})
    labels = ["lr0.001-r8", "lr0.001-r32", "lr0.0003-r8", "lr0.0003-r32"]
    assert [choice.label for choice in grid] == labels
    assert grid[1].flags == ["--lr", 1e-3, "--lora-r", 32]
    assert str(grid[3]) == "learning rate 0.0003, rank 32"
    assert combinations({"--lr": (), "--lora-r": ()}) == [Choice()]
    defaults = runs.TunedSettings(tune=True, ranks=(4,)).grid()
    assert [dict(c.values) for c in defaults] == [{"--lr": x, "--lora-r": 4} for x in runs.LRS]


def test_first_learning_rates_are_trained_then_ranks_then_all_seeds(tuned):
    _, row = tuned
    first = plan_of([row])
    assert [stage.script for stage in first] == ["train.py"] * 2
    assert {stage.flags[stage.flags.index("--seed") + 1] for stage in first} == {"4"}
    assert {stage.flags[stage.flags.index("--lora-r") + 1] for stage in first} == {"2"}
    finish(first[0], [(1, 0.5), (2, 0.1)], made=False)  # of others their recalls are enough
    assert plan_of([row]) == [first[1]]
    assert row.tried() == []  # nothing is chosen yet
    finish(first[1], [(1, 0.2), (2, 0.7)])  # the best of its epochs counts

    (second,) = plan_of([row])
    assert "lr0.01-r4" in second.run.name
    finish(second, [(1, 0.7), (2, 0.6)])  # a tie: the first in the grid is taken
    left = plan_of([row])
    assert row.chosen.label == "lr0.01-r2"
    assert [stage.script for stage in left] == ["evaluate.py", "train.py", "evaluate.py"]
    assert left[0].run == first[1].run  # the first seed's training is not made again
    assert left[1].run.name == left[0].run.name.replace("seed4", "seed1")
    record = row.record()
    assert record["chosen"] == {"--lr": 1e-2, "--lora-r": 2}
    assert [t["validation"] for t in record["tried"]] == pytest.approx([1.0, 1.4, 1.4])
    assert [t["--lora-r"] for t in record["tried"]] == [2, 2, 4]


def test_a_flag_is_chosen_with_the_best_value_of_the_one_before():
    grid = combinations({"--lr": (1, 2, 3), "--lora-r": (8, 32)})
    recalls = {"lr1-r8": 0.3, "lr2-r8": 0.5, "lr3-r8": 0.5, "lr2-r32": 0.6, "lr3-r32": 0.9}
    tried, best = choose(grid, lambda choice: recalls.get(choice.label))
    assert [choice.label for choice in tried] == ["lr1-r8", "lr2-r8", "lr3-r8", "lr2-r32"]
    assert best.label == "lr2-r32"
    del recalls["lr2-r32"]
    assert choose(grid, lambda choice: recalls.get(choice.label)) == (tried, None)
    assert choose([Choice()], lambda choice: None) == ([Choice()], Choice())

    # With one learning rate, ranks are tried at once; with one of both, nothing is.
    grid = combinations({"--lr": (1,), "--lora-r": (8, 32)})
    assert choose(grid, lambda choice: None) == (grid, None)
    assert choose(grid, lambda choice: 0.5) == (grid, grid[0])
    assert choose(grid[:1], lambda choice: None) == (grid[:1], grid[0])


def test_one_choice_is_not_tried_first(tuned):
    _, row = tuned
    row.choices = dict([next(iter(row.choices.items()))])
    scripts = ["train.py", "evaluate.py"] * 2
    assert [stage.script for stage in plan_of([row])] == scripts


def test_a_training_without_validation_is_named(tuned):
    _, row = tuned
    trainings = plan_of([row])
    finish(trainings[0], [(1, 0.5)])
    finish(trainings[1], [])
    with pytest.raises(InputError, match=r"metrics\.jsonl: no line with field 'validation'"):
        plan_of([row])
    path = trainings[1].run / "metrics.jsonl"
    path.write_text('{"validation": {"Recall@3": "much"}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: field 'validation'"):
        plan_of([row])


def test_what_is_chosen_from_cannot_be_set_too(tuned, model_folder):
    settings, _ = tuned
    model = runs.LanguageModel("recent-only", "", str(model_folder), 3)
    choice = settings.grid()[0]
    for more in ("--lr 1", "--lora-r=3"):
        changed = runs.TunedSettings(train=more, lrs=(1e-3,), ranks=(2,))
        with pytest.raises(InputError, match=r"the experiment sets --lo?r.* itself"):
            runs.language_model_run(changed, model, choice, 0)
    model = runs.LanguageModel("recent-only", "", str(model_folder), 3, budget=64)
    changed = runs.TunedSettings(train="--max-length 9")
    with pytest.raises(InputError, match="the experiment sets --max-length itself"):
        runs.language_model_run(changed, model, Choice(), 0)


def test_baselines_are_chosen_by_the_recalls_that_they_report(tmp_path, model_folder):
    settings = runs.Settings(out=tmp_path, k=(3,), seeds=(0, 1))
    model = runs.BaselineModel("sasrec", f"llama:{model_folder}", True, "--epochs 2")
    choices = combinations({"--lr": (1e-3, 1e-2)})
    row = Row(
        "SASRec",
        "SASRec",
        choices={c: [runs.baseline_run(settings, model, c, s) for s in (0, 1)] for c in choices},
    )
    first = plan_of([row])
    names = ["sasrec+positions-lr0.001-0", "sasrec+positions-lr0.01-0"]
    assert [stage.run.name for stage in first] == names
    for training, recall in zip(first, (0.3, 0.4), strict=True):
        training.run.mkdir(parents=True)
        write_json(training.run / MARKS, {training.script: training.key})
        write_json(training.run / "results.json", {"validation": {"Recall@3": recall}})
        (training.run / "scores-test.jsonl").write_text("")
    assert [stage.run.name for stage in plan_of([row])] == ["sasrec+positions-lr0.01-1"]


def test_a_larger_budget_takes_over_runs_that_cut_nothing(tmp_path, model_folder):
    settings = runs.Settings(out=tmp_path, k=(3,), seeds=(0,))
    rows = []
    for budget in (64, 128, 256):
        model = runs.LanguageModel("whole-history", "", str(model_folder), 3, budget)
        found = {Choice(): [runs.language_model_run(settings, model, Choice(), 0)]}
        rows.append(Row(f"{budget}", budget, choices=found, smaller=rows[-1] if rows else None))

    def run_with(cut):
        train, ranks = plan_of(rows)
        finish(train, [(1, 0.5)])
        write_json(ranks.run / MARKS, {"train.py": train.key, "evaluate.py": ranks.key})
        (ranks.run / "scores-test.jsonl").write_text("")
        write_json(ranks.run / "trimmed.json", {"train.py": cut, "evaluate.py": {}})
        return ranks.run

    first = run_with({"items": 3})  # cut, so the next budget is run too
    second = run_with({})
    assert first != second
    assert plan_of(rows) == []
    assert rows[1].reused is None
    assert rows[2].reused is rows[1]
    assert rows[2].runs == rows[1].runs
    assert rows[2].record()["reused"] == "128"
