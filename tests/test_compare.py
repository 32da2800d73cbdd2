"""runfolder/compare.py: a row per run, if the runs are on the same users."""

import pytest

from files.jsonl import read_json, write_json
from runfolder import compare
from trsr import InputError


def test_compare_prints_a_row_per_run(evaluated_runs, capsys, monkeypatch):
    folders = [str(evaluated_runs / name) for name in ("three", "one", "two")]
    monkeypatch.setattr("sys.argv", ["compare", *folders])
    compare.main()
    out = capsys.readouterr().out
    assert "4 users of" in out
    titles = [
        "random",
        "popularity",
        "untrained (recurrent)",
        "recent-only",
        "recurrent (one)",
        "recurrent (two)",
    ]
    assert [line.split("  ")[0] for line in out.splitlines()[2:] if line[0] != " "] == titles


def test_runs_without_results_or_on_other_users_are_named(evaluated_runs, tmp_path):
    message = r"results\.json: no results; first run python evaluate\.py"
    with pytest.raises(InputError, match=message):
        compare.rows_of([tmp_path])
    results = read_json(evaluated_runs / "one/results.json")
    write_json(tmp_path / "results.json", results | {"users": 3})
    with pytest.raises(InputError, match="other users"):
        compare.rows_of([evaluated_runs / "one", tmp_path])
