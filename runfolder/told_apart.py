"""Whether two systems are told apart: Wilcoxon's signed-rank test, and Holm's correction.

The test asks whether the per-user differences of two systems lie around zero. Rules:

    zeros   users without a difference are left out, which is Wilcoxon's own rule
    ties    equal differences share the mean of their ranks
    p       two-sided; exact up to EXACT users with a difference, also with ties, from the
            distribution over all 2^n equally likely signs; beyond, the normal approximation with
            the variance corrected for ties, without a correction for continuity

Users whose difference is the same up to rounding count as tied, because the same metric can come
out with other last digits.
"""

import math
from collections.abc import Sequence

import numpy as np

EXACT = 50  # users with a difference
DIGITS = 12  # after the point, to which differences are compared
LEVEL = 0.05  # of p, to be told apart


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value (n,), from 1; equal values have the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def wilcoxon(differences: Sequence[float]) -> float:
    """Return the two-sided p of the signed-rank test on per-user differences; 1 if all are zero."""
    found = np.round(np.asarray(differences, dtype=np.float64), DIGITS)
    found = found[found != 0]
    if not len(found):
        return 1.0
    ranks = mean_ranks(np.abs(found))
    positive = float(ranks[found > 0].sum())
    total = float(ranks.sum())
    if len(found) <= EXACT:
        return exact_p(ranks, min(positive, total - positive))

    # The variance is sum(rank^2) / 4, which for ranks without ties is n (n + 1) (2 n + 1) / 24; the
    # mean ranks of ties make the sum smaller by just the usual correction.
    deviation = math.sqrt(float((ranks**2).sum()) / 4)
    return math.erfc(abs(positive - total / 2) / deviation / math.sqrt(2))


def exact_p(ranks: np.ndarray, smaller: float) -> float:
    """Return the probability of a sum as far from the middle as `smaller`, on either side.

    Each rank is in the sum or not, all 2^n ways being equally likely.
    """
    doubled = np.round(2 * ranks).astype(int)  # mean ranks are halves at most
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1
    for rank in doubled:
        ways[rank:] = (ways[rank:] + ways[:-rank]) / 2
        ways[:rank] /= 2
    return min(1.0, 2 * float(ways[: round(2 * smaller) + 1].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for being several, in their order (Holm 1979).

    Told apart at a level are those whose corrected value is not above it; that any of them is by
    chance then has at most that probability.
    """
    corrected, highest = [0.0] * len(values), 0.0
    for done, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - done) * values[i]))
        corrected[i] = highest
    return corrected
