"""runfolder/scores.py: what chance and popularity score, and how sure a mean is."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

import trsr
from runfolder.scores import (
    bootstrap_intervals,
    chance_metrics,
    means_and_intervals,
    paired_differences,
    popularity_ranks,
    random_metrics,
)
from runfolder.systems import ranks_of_file


def test_popularity_ranks_by_counts_with_ties_in_random_order():
    examples = [trsr.Example(f"u{n}", [], "p", ["a", "b"]) for n in range(2000)]
    ranks = popularity_ranks(examples, Counter({"p": 2, "a": 3}), 0)
    assert set(ranks) == {2}
    ranks = popularity_ranks(examples, Counter({"p": 1, "a": 1}), 0)
    assert ranks.count(1) == pytest.approx(1000, abs=100)
    assert set(ranks) == {1, 2}


def test_random_metrics_are_the_mean_over_simulated_orders():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 22, 200_000)
    expected = random_metrics(21, [3, 10])
    assert expected["Recall@3"] == pytest.approx(3 / 21)
    for name, values in trsr.metrics_at(ranks, [3, 10]).items():
        assert values.mean() == pytest.approx(expected[name], abs=5e-3)


def test_intervals_agree_with_the_normal_approximation():
    hits = np.array([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap_intervals({"Recall@3": hits})["Recall@3"]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=4e-3)
    assert high == pytest.approx(0.3 + half, abs=4e-3)
    assert bootstrap_intervals({"Recall@3": hits}) == {"Recall@3": (low, high)}


def users_with(*negatives):
    names = itertools.count()
    return [
        trsr.Example(f"u{u}", [], f"i{next(names)}", [f"i{next(names)}" for _ in range(n)])
        for u, n in enumerate(negatives)
    ]


def test_chance_is_exact_for_candidate_lists_of_any_length():
    examples = users_with(4, 9, 9)
    expected = (random_metrics(5, [3])["Recall@3"] + 2 * random_metrics(10, [3])["Recall@3"]) / 3
    assert chance_metrics(examples, [3])["Recall@3"] == pytest.approx(expected, abs=1e-12)
    assert chance_metrics(users_with(20, 20), [3]) == random_metrics(21, [3])


def test_the_interval_of_a_perfect_recall_is_exactly_one():
    for n in (3, 7, 49, 200):
        assert bootstrap_intervals({"Recall@3": np.ones(n)})["Recall@3"] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("candidates", "scores", "message"),
    [
        (["i0", "i1", "i1"], "[1, 2, 3]", "names 'i1' twice"),
        (["i0", "i1", "i2"], f"[1, 2, {'9' * 401}]", "no finite number"),
        (["i0", "i1", "i2"], "[1, 2, Infinity]", "no finite number"),
        (["i0", "i1", "i2"], "[1, 2, true]", "no finite number"),
    ],
)
def test_scores_that_cannot_be_ranked_are_named(tmp_path, candidates, scores, message):
    names = json.dumps(candidates)
    (tmp_path / "s.jsonl").write_text(
        f'{{"user": "u0", "candidates": {names}, "scores": {scores}}}\n'
    )
    examples = users_with(2)
    with pytest.raises(trsr.InputError, match=rf"s\.jsonl:1: .*{message}"):
        ranks_of_file(tmp_path / "s.jsonl", examples)


def test_the_ranks_of_a_file(tmp_path):
    examples = users_with(2, 3)
    names = [[e.positive, *e.negatives] for e in examples]
    scores = [[0.5, 0.7, 0.5], [10**30, -1, 3, 2.5]]
    lines = [
        {"user": e.user, "candidates": c[::-1], "scores": s[::-1]}
        for e, c, s in zip(examples, names, scores, strict=True)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines[::-1], lines[0] | {"user": "u9"}])
    (tmp_path / "s.jsonl").write_text(text)
    assert ranks_of_file(tmp_path / "s.jsonl", examples) == [3, 1]
    (tmp_path / "s.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(trsr.InputError, match=r"s\.jsonl: user 'u1' is missing"):
        ranks_of_file(tmp_path / "s.jsonl", examples)
    (tmp_path / "s.jsonl").write_text(json.dumps(lines[0]) + "\n" * 2)
    more = [trsr.Example("u0", [], "i0", ["i1", "i2", "i7"])]
    with pytest.raises(trsr.InputError, match=r"s\.jsonl:1: .*'i7' is not there on one side"):
        ranks_of_file(tmp_path / "s.jsonl", more)


# ---- Differences


def test_a_difference_is_taken_user_by_user_and_so_its_interval_is_narrow():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 22, 400)
    better = np.where(rng.random(400) < 0.1, 1, ranks)  # a tenth of the users ranked first
    found = paired_differences(better, ranks, [3])["Recall@3"]
    own, theirs = (means_and_intervals(r, [3])["Recall@3"] for r in (better, ranks))
    assert found["mean"] == pytest.approx(own["mean"] - theirs["mean"])
    gained = (better <= 3).astype(float) - (ranks <= 3)
    half = 1.96 * gained.std() / np.sqrt(400)
    assert found["interval"] == pytest.approx(
        (found["mean"] - half, found["mean"] + half), abs=4e-3
    )
    assert found["interval"][0] > 0  # while the two means' own intervals overlap
    assert own["interval"][0] < theirs["interval"][1]
    other_way = paired_differences(ranks, better, [3])["Recall@3"]
    assert other_way["mean"] == -found["mean"]


def test_each_user_s_mean_over_the_seeds_is_compared():
    two, one = [[1, 9, 1, 9], [9, 9, 1, 9]], [1, 1, 1, 9]
    found = paired_differences(two, one, [3])["Recall@3"]
    assert found["mean"] == pytest.approx(np.mean([0.5, 0, 1, 0]) - 0.75)
    same = paired_differences(one, one, [3])["Recall@3"]
    assert same == {"mean": 0.0, "interval": (0.0, 0.0)}
    with pytest.raises(trsr.InputError, match="4 users on one side and 3 on the other"):
        paired_differences(two, one[:3], [3])
