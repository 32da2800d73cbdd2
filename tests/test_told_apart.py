"""runfolder/told_apart.py: the signed-rank test by hand, by enumeration and against scipy."""

import itertools

import numpy as np
import pytest

from runfolder.told_apart import EXACT, exact_p, holm, mean_ranks, wilcoxon


def test_mean_ranks():
    assert mean_ranks(np.array([3.0, 1.0, 3.0, 0.5, 3.0])).tolist() == [4, 2, 4, 1, 4]


def test_small_cases_by_hand():
    assert wilcoxon([]) == wilcoxon([0, 0.0]) == 1.0
    assert wilcoxon([0.4]) == 1.0  # both signs are as far
    # 1 to 5 all positive: one of 32 ways, on either side.
    assert wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 32)
    assert wilcoxon([-0.1, -0.2, 0, -0.3, -0.4, -0.5, 0]) == pytest.approx(2 / 32)  # no zeros
    # -1, 2, 3, 4, 5: the sum of the negative ranks is 1; 0 and 1 can be had in one way each.
    assert wilcoxon([-0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(4 / 32)
    # Ties: ranks 1.5, 1.5, 3; the smaller sum is 1.5, had in two ways, and 0 in one.
    assert wilcoxon([0.1, -0.1, 0.2]) == pytest.approx(2 * 3 / 8)
    assert wilcoxon([0.1, -0.1 - 1e-16, 0.2]) == wilcoxon([0.1, -0.1, 0.2])


def test_the_exact_p_is_that_of_all_signs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.integers(-4, 5, 11) / 10
        ranks = mean_ranks(np.abs(differences[differences != 0]))
        sums = [
            sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
            for signs in itertools.product((0, 1), repeat=len(ranks))
        ]
        middle = ranks.sum() / 2
        far = abs(ranks[differences[differences != 0] > 0].sum() - middle)
        share = np.mean([abs(total - middle) >= far - 1e-9 for total in sums])
        assert wilcoxon(differences) == pytest.approx(share)


def test_the_approximation_continues_the_exact_p():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.15, 1, EXACT + 1)
    ranks = mean_ranks(np.abs(differences))
    positive = ranks[differences > 0].sum()
    exact = exact_p(ranks, min(positive, ranks.sum() - positive))
    assert wilcoxon(differences) == pytest.approx(exact, abs=0.01)


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(2)
    found = [wilcoxon(rng.normal(0, 1, 80) * rng.integers(0, 2, 80)) for _ in range(2000)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [7, 49, 51, 300])
def test_p_is_scipys(n, tied):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    differences = rng.normal(0.1, 1, n)
    if tied:
        differences = np.round(differences, 1)
    elif n > 10:
        differences[:3] = 0.0
    kept = differences[differences != 0]
    if len(kept) <= EXACT and tied:
        pytest.skip("scipy has no exact p with ties")
    method = "exact" if len(kept) <= EXACT else "approx"
    options = {"zero_method": "wilcox", "correction": False, "method": method}
    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(kept, **options).pvalue, rel=1e-9)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
