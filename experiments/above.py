"""Which rows are above the best baseline: Wilcoxon's test, corrected by Holm over the rows."""

from collections.abc import Sequence

from experiments.rows import Row
from runfolder.scores import means_and_intervals, tested_metric, told_apart
from runfolder.told_apart import LEVEL

MARK = "‡"


def mark_above(rows: Sequence[Row], ks: Sequence[int]) -> None:
    """Fill in `above` of each row but the baselines, if any baseline is in the table.

    The best baseline is the one with the highest mean of the metric that is tested.
    """
    metric = tested_metric(ks)
    baselines = [row for row in rows if row.baseline and row.ranks]
    others = [row for row in rows if row.ranks and not row.baseline]
    if not baselines or not others:
        return
    means = {
        row.name: means_and_intervals(row.ranks, ks)[metric]["mean"] for row in rows if row.ranks
    }
    best = max(baselines, key=lambda row: means[row.name])
    tests = told_apart(best.ranks, [row.ranks for row in others], ks)
    for row, test in zip(others, tests, strict=True):
        higher = means[row.name] > means[best.name]
        row.above = test | {"best": best.name, "metric": metric}
        row.above["is"] = higher and test["holm"] <= LEVEL


def note_above(rows: Sequence[Row]) -> str:
    """Return the sentence that says what the mark means; empty without baselines."""
    tested = [row for row in rows if row.above]
    if not tested:
        return ""
    best, metric = tested[0].above["best"], tested[0].above["metric"]
    marked = ", ".join(row.name for row in tested if row.above["is"]) or "no row"
    how = "Wilcoxon's signed-rank test, user by user, without users who have no difference"
    what = f"above the best baseline, {best}, in {metric}: {marked}"
    return f"{MARK} {what} ({how}; p at most {LEVEL}, by Holm for {len(tested)} rows together)."
