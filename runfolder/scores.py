"""From scores or ranks to the table: of this project, the baselines or another system alike."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

import trsr
from prepare.dataset import popularity
from runfolder.told_apart import holm, wilcoxon
from trsr import Example, InputError


def random_metrics(n_candidates: int, ks: Sequence[int]) -> dict[str, float]:
    """Return what a random order scores on average: the mean over all equally likely ranks."""
    metrics = trsr.metrics_at(range(1, n_candidates + 1), ks)
    return {name: float(values.mean()) for name, values in metrics.items()}


def chance_metrics(examples: Sequence[Example], ks: Sequence[int]) -> dict[str, float]:
    """Return what a random order scores on average on users with candidate lists of any length."""
    found: Counter = Counter()
    for n, users in Counter(1 + len(example.negatives) for example in examples).items():
        for name, value in random_metrics(n, ks).items():
            found[name] += value * (users / len(examples))
    return dict(found)


def bootstrap_intervals(
    metrics: dict[str, np.ndarray], resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile interval of each metric's mean, by resampling users."""
    table = np.stack(list(metrics.values()))  # (metrics, users)
    n = table.shape[1]
    rng = np.random.default_rng(seed)
    # How often each user is drawn is a multinomial sample.
    draws = (rng.multinomial(n, np.full(n, 1 / n)) / n for _ in range(resamples))
    means = np.stack([table @ weights for weights in draws])
    # A mean lies within its values, whatever the weights' rounding has made of it.
    means = means.clip(table.min(axis=1), table.max(axis=1))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(metrics, low, high, strict=True)}


def popularity_ranks(examples: Sequence[Example], counts: Counter, seed: int) -> list[int]:
    """Return the positive's rank by how often items were chosen in training.

    Equally popular items are in a seeded random order.
    """
    rng = np.random.default_rng(seed)
    ranks = []
    for example in examples:
        scores = [counts[i] + rng.random() for i in [example.positive, *example.negatives]]
        ranks.append(trsr.rank_of_positive(scores, 0))
    return ranks


def user_metrics(ranks: list, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return each metric of each user (users,).

    ranks: one list, or a list for each seed; then each user's metric is the mean over the seeds.
    """
    ranks = np.atleast_2d(ranks)  # (seeds, users)
    metrics = trsr.metrics_at(ranks.ravel(), ks)
    return {name: values.reshape(ranks.shape).mean(0) for name, values in metrics.items()}


def with_intervals(metrics: dict[str, np.ndarray], seed: int) -> dict[str, dict]:
    """Return the mean over users and the 95 % interval of each metric."""
    intervals = bootstrap_intervals(metrics, seed=seed)
    return {
        name: {"mean": float(values.mean()), "interval": intervals[name]}
        for name, values in metrics.items()
    }


def means_and_intervals(ranks: list, ks: Sequence[int], seed: int = 0) -> dict[str, dict]:
    """Return each metric's mean over users and its 95 % interval; ranks as for user_metrics."""
    return with_intervals(user_metrics(ranks, ks), seed)


def paired_differences(
    ranks: list, others: list, ks: Sequence[int], seed: int = 0
) -> dict[str, dict]:
    """Return each metric's mean difference between two systems, and its 95 % interval.

    ranks and others: of the same users in the same order, each as for user_metrics; the numbers of
    seeds can differ. The difference is taken user by user, and users are resampled, so what is easy
    or hard for both systems widens no interval. InputError if the numbers of users differ.
    """
    own, theirs = user_metrics(ranks, ks), user_metrics(others, ks)
    sizes = [len(next(iter(metrics.values()))) for metrics in (own, theirs)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{sizes[0]} users on one side and {sizes[1]} on the other")
    return with_intervals({name: own[name] - theirs[name] for name in own}, seed)


def tested_metric(ks: Sequence[int]) -> str:
    """Return the metric on whose per-user values two systems are tested."""
    return f"NDCG@{max(ks)}"


def told_apart(ranks: list, others: Sequence[list], ks: Sequence[int]) -> list[dict[str, float]]:
    """Return the test of a system against each of others, as {"p", "holm"}.

    p: of Wilcoxon's signed-rank test on the users' differences in tested_metric; holm: corrected
    over the others. ranks and each of others: as for paired_differences.
    """
    name = tested_metric(ks)
    own = user_metrics(ranks, ks)[name]
    found = [wilcoxon(own - user_metrics(other, ks)[name]) for other in others]
    return [{"p": p, "holm": h} for p, h in zip(found, holm(found), strict=True)]


def table_of(
    row: str,
    ranks: list,
    examples: Sequence[Example],
    train: Sequence[Example],
    ks: Sequence[int],
    seed: int = 0,
) -> dict:
    """Return the rows of the result's table: random, popularity, and this one."""
    chance = chance_metrics(examples, ks)
    by_popularity = popularity_ranks(examples, popularity(train), seed)
    table = {"random": {name: {"mean": mean} for name, mean in chance.items()}}
    table["popularity"] = means_and_intervals(by_popularity, ks, seed)
    return table | {row: means_and_intervals(ranks, ks, seed)}
