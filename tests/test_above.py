"""experiments/above.py: which rows are marked as above the best baseline."""

import numpy as np
import pytest

from experiments.above import MARK, mark_above, note_above
from experiments.rows import Row
from experiments.tables import markdown
from runfolder.scores import means_and_intervals
from runfolder.told_apart import wilcoxon

KS = [3, 5]


def rows_of(**ranks):
    rows = [Row("random", "random")]
    for name, found in ranks.items():
        rows.append(Row(name, name, baseline=name.startswith("base")))
        rows[-1].ranks = found
        rows[-1].measured = means_and_intervals(found, KS)
    return rows


def test_only_what_is_higher_and_told_apart_from_the_best_baseline_is_marked():
    users = 60
    best = [[2] * 30 + [9] * 30]
    rows = rows_of(
        base_low=[[9] * users],
        base_best=best,
        far=[[1] * 30 + [4] * 30, [1] * 30 + [5] * 30],
        near=[[1, 2, 1] + [2] * 27 + [9] * 30],
        below=[[9] * users],
    )
    mark_above(rows, KS)
    found = {row.name: row.above for row in rows}
    assert found["random"] == found["base_low"] == found["base_best"] == {}
    assert [name for name, above in found.items() if above.get("is")] == ["far"]
    assert {above["best"] for above in found.values() if above} == {"base_best"}
    gain = lambda rank: 1 / np.log2(rank + 1) if rank <= 5 else 0  # noqa: E731
    near = [gain(r) - gain(b) for r, b in zip(rows[4].ranks[0], best[0], strict=True)]
    assert found["near"]["p"] == pytest.approx(wilcoxon(near))
    assert found["below"]["holm"] < 0.05  # told apart, but lower
    lines = markdown(rows, ["Recall@3"], None).splitlines()
    assert [line for line in lines if MARK in line] == [line for line in lines if "far" in line]
    note = note_above(rows)
    assert "above the best baseline, base_best, in NDCG@5: far (" in note
    assert "by Holm for 3 rows" in note


def test_without_baselines_there_is_nothing_to_be_above():
    rows = rows_of(one=[[1, 2]], two=[[2, 2]])
    mark_above(rows, KS)
    assert not any(row.above for row in rows)
    assert note_above(rows) == ""
