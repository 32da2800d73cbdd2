"""From scores or ranks to the table: this project's, the baselines' or another system's, all by the same functions."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

import trsr
from prepare.dataset import popularity, read_jsonl
from trsr import Example, InputError


def read_scores(path: Path, examples: list[Example], candidates: list[list[str]]) -> dict[tuple[int, int], tuple]:
    """Return {(user, candidate): (score, 0)} from lines {"user", "candidates", "scores"}, in any order.

    InputError where a user is missing, or where the candidates are not the dataset's or a score is no finite number.
    """
    lines = {}
    for where, record in read_jsonl(path, {"user": str, "candidates": list}):
        if record["user"] in lines:
            raise InputError(f"{where}: field 'user': {record['user']!r} is there twice")
        scores = record.get("scores")
        if not isinstance(scores, list) or len(scores) != len(record["candidates"]):
            raise InputError(f"{where}: field 'scores', expected a list with a number for each candidate")
        if not all(type(x) in (int, float) and math.isfinite(x) for x in scores):
            raise InputError(f"{where}: field 'scores' holds something that is no finite number")
        lines[record["user"]] = where, dict(zip(record["candidates"], scores, strict=True))
    found = {}
    for u, (example, items) in enumerate(zip(examples, candidates, strict=True)):
        if example.user not in lines:
            raise InputError(f"{path}: user {example.user!r} is missing")
        where, scores = lines[example.user]
        if scores.keys() != set(items):
            odd = sorted(scores.keys() ^ set(items))[0]
            raise InputError(
                f"{where}: field 'candidates': {odd!r} is not there on one side; expected the dataset's own"
            )
        found |= {(u, c): (float(scores[item]), 0.0) for c, item in enumerate(items)}
    return found


def popularity_ranks(examples: list[Example], counts: Counter, seed: int) -> list[int]:
    """Return the positive's rank by how often an item was chosen in training; equals in a seeded random order."""
    rng = np.random.default_rng(seed)
    lists = ([e.positive, *e.negatives] for e in examples)
    return [trsr.rank_of_positive([counts[i] + rng.random() for i in items], 0) for items in lists]


def means_and_intervals(ranks: list, ks: list[int], seed: int = 0) -> dict[str, dict]:
    """Return each metric's mean over users and its 95 % interval; of several lists of ranks, over each user's mean."""
    ranks = np.atleast_2d(ranks)  # (lists, users)
    metrics = {name: v.reshape(ranks.shape).mean(0) for name, v in trsr.metrics_at(ranks.ravel(), ks).items()}
    intervals = trsr.bootstrap_intervals(metrics, seed=seed)
    return {name: {"mean": float(values.mean()), "interval": intervals[name]} for name, values in metrics.items()}


def table_of(
    row: str, ranks: list, examples: list[Example], train: list[Example], ks: list[int], seed: int = 0
) -> dict:
    """Return the rows of the result's table: random, popularity, and this one."""
    chance = trsr.random_metrics(1 + len(examples[0].negatives), ks)
    by_popularity = popularity_ranks(examples, popularity(train), seed)
    table = {"random": {name: {"mean": mean} for name, mean in chance.items()}}
    table["popularity"] = means_and_intervals(by_popularity, ks, seed)
    return table | {row: means_and_intervals(ranks, ks, seed)}
