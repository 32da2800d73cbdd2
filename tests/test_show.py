"""runfolder/show.py: one user's blocks and summaries, in the order of writing."""

import pytest

from runfolder import show
from trsr import InputError


def test_show_prints_blocks_and_summaries_in_order(evaluated_runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["show", str(evaluated_runs / "one"), "--user", "test1"])
    show.main()
    out = capsys.readouterr().out
    assert out.index("items 1 to 5") < out.index("the summary before and items 6 to")
    assert "   1. Title" in out
    monkeypatch.setattr("sys.argv", ["show", str(evaluated_runs / "one"), "--user", "nobody"])
    with pytest.raises(InputError, match=r"no user 'nobody'; train, val and test.jsonl name the"):
        show.main()


def test_children_come_before_the_summary_that_merges_them():
    leaves = [{"summary": name, "items": [n, n + 1]} for n, name in enumerate("ab")]
    tree = {"summary": "both", "children": leaves}
    assert list(show.steps(tree)) == [
        (1, "items 1 to 1", [0, 1], "a"),
        (1, "items 2 to 2", [1, 2], "b"),
        (0, "the 2 summaries together", [0, 0], "both"),
    ]


def test_a_run_without_summaries_is_named(tmp_path):
    message = r"summaries\.jsonl: no summaries; first run python summarize\.py"
    with pytest.raises(InputError, match=message):
        show.records_of(tmp_path)
