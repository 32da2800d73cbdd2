"""runfolder/scores.py: what chance and popularity score, and how sure a mean is."""

from collections import Counter

import numpy as np
import pytest

import trsr
from runfolder.scores import bootstrap_intervals, popularity_ranks, random_metrics


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
