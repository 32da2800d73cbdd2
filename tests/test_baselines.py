"""python -m baselines: what the models learn from, and one table of all."""

import copy

import numpy as np
import pytest
import torch
from helpers import read_lines, run, scores, write_dataset, write_lines

import trsr
from baselines import __main__ as command
from baselines.models import MODELS
from files.jsonl import read_json
from prepare.dataset import load_dataset
from runfolder import compare


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, run_baselines):
    """A folder with data and a run of all models with two seeds."""
    folder = tmp_path_factory.mktemp("baselines")
    settings = {"encoder": f"llama:{model_folder}", "epochs": 2, "size": 8, "seeds": [0, 1]}
    run_baselines(data=write_dataset(folder / "data"), run=folder / "run", **settings)
    return folder


def test_drawn_negatives_are_new_and_never_the_target_or_of_the_history(tmp_path):
    _, items, splits = load_dataset(write_dataset(tmp_path), ("train",))
    train, number = splits["train"], {name: i for i, name in enumerate(items)}
    users = command.Users(train, number, [[e.positive, *e.negatives] for e in train], 200)
    rngs = (np.random.default_rng(seed) for seed in (0, 1))
    first, second = (command.draw_negatives(users, len(items), 20, rng) for rng in rngs)
    assert not torch.equal(first, second)
    for row, example in zip(first.tolist(), train, strict=True):
        assert not {number[i] for i in [*example.history, example.positive]} & set(row)


def test_with_every_position_each_item_is_a_target_after_those_before_it(
    finished, model_folder, tmp_path, capsys, run_baselines
):
    example = trsr.Example("u", ["a", "b", "a", "c"], "d", ["n"])
    made = command.every_position([example, trsr.Example("v", ["a"], "b", ["m"])])
    assert [(e.user, e.history, e.positive, e.negatives) for e in made] == [
        ("u", ["a"], "b", ["n"]),
        ("u", ["a", "b", "a"], "c", ["n"]),
        ("u", ["a", "b", "a", "c"], "d", ["n"]),
        ("v", ["a"], "b", ["m"]),
    ]
    _, _, splits = load_dataset(finished / "data", ("train",))
    settings = {"encoder": f"llama:{model_folder}", "epochs": 1, "size": 8, "models": "ncf"}
    run_baselines(data=finished / "data", run=tmp_path, **settings, every_position=True)
    targets = sum(len(example.history) for example in splits["train"])
    assert f"learns  {targets} targets" in capsys.readouterr().out
    last, every = (
        read_json(folder / "baselines/results.json")["table"]
        for folder in (finished / "run", tmp_path)
    )
    assert every["popularity"] == last["popularity"]


def test_the_command_writes_scores_and_one_table(finished):
    folder = finished / "run" / "baselines"
    table = read_json(folder / "results.json")["table"]
    assert list(table) == ["random", "popularity", *MODELS]
    _, _, splits = load_dataset(finished / "data", ("test",))
    for name in MODELS:
        recalls = []
        for seed in (0, 1):
            lines, ranks = scores(folder / f"{name}-{seed}"), []
            candidates = [trsr.shuffled_candidates(example) for example in splits["test"]]
            assert [line["candidates"] for line in lines] == candidates
            for line, example in zip(lines, splits["test"], strict=True):
                positive = line["candidates"].index(example.positive)
                ranks.append(trsr.rank_of_positive(line["scores"], positive))
            recalls.append(np.mean([rank <= 3 for rank in ranks]))
        assert table[name]["Recall@3"]["mean"] == pytest.approx(np.mean(recalls))


def test_all_items_are_ranked_by_the_same_models(
    finished, model_folder, tmp_path, run_baselines, monkeypatch
):
    monkeypatch.setattr("baselines.ranking.CHUNK", 7)
    settings = {"encoder": f"llama:{model_folder}", "epochs": 2, "size": 8, "candidates": "all"}
    run_baselines(data=finished / "data", run=tmp_path, **settings)
    _, items, splits = load_dataset(finished / "data", ("test",))
    for name in MODELS:
        folder = tmp_path / "baselines" / f"{name}-0"
        own, among = scores(folder), scores(folder, "scores-test-all.jsonl")
        for line, of_all, example in zip(own, among, splits["test"], strict=True):
            assert of_all["ranked"] == len(items) - len(set(example.history))
            assert set(of_all["candidates"]) == set(items) - set(example.history)
            assert of_all["scores"] == sorted(of_all["scores"], reverse=True)
            found = dict(zip(of_all["candidates"], of_all["scores"], strict=True))
            for item, score in zip(line["candidates"], line["scores"], strict=True):
                assert found[item] == pytest.approx(score, abs=1e-5)
            positive = found[example.positive]
            assert of_all["score"] == positive
            assert of_all["rank"] == sum(score >= positive for score in found.values())
    tables = [read_json(tmp_path / f"baselines/results{end}.json") for end in ("", "-all")]
    assert [list(t["table"]) for t in tables] == [["random", "popularity", *MODELS]] * 2
    assert tables[1]["candidates"] == "all"
    runs = [tmp_path / "baselines" / f"{name}-0" for name in ("ncf", "din")]
    for candidates in ("", "all"):
        assert list(compare.rows_of(runs, candidates)[1]) == ["random", "popularity", "ncf", "din"]
        assert list(compare.verdicts_of(runs, candidates)) == ["din"]


def test_scores_of_another_system_get_the_same_table(finished):
    own = finished / "run" / "baselines" / "sasrec-0"
    settings = {"data": finished / "data", "run": finished / "other", "k": [3, 5, 10]}
    run("evaluate.py", **settings, scores=own / "scores-test.jsonl")
    found = read_json(finished / "other" / "results-scores-test.json")["table"]["scores-test"]
    expected = read_json(own / "results.json")["table"]["sasrec"]
    assert {m: v["mean"] for m, v in found.items()} == {m: v["mean"] for m, v in expected.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), "is missing"),
        (lambda lines: lines.append(lines[0]), "is there twice"),
        (lambda lines: lines[1]["scores"].pop(), "a number for each candidate"),
        (lambda lines: lines[1]["scores"].__setitem__(0, float("nan")), "no finite number"),
        (lambda lines: lines[1]["candidates"].__setitem__(0, "i59x"), "field 'candidates'"),
    ],
)
def test_scores_of_another_system_that_do_not_fit_are_named(finished, tmp_path, change, message):
    lines = read_lines(finished / "run" / "baselines" / "sasrec-0" / "scores-test.jsonl")
    changed = copy.deepcopy(lines)
    change(changed)
    write_lines(tmp_path / "bad.jsonl", changed)
    settings = {"data": finished / "data", "run": tmp_path, "scores": tmp_path / "bad.jsonl"}
    done = run("evaluate.py", **settings, check=False)
    assert done.returncode == 2
    assert message in done.stderr
