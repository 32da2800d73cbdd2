"""runfolder/compare.py: a row per run, if the runs are on the same users."""

import pytest

from files.jsonl import read_json, write_json
from runfolder import compare
from trsr import InputError


def test_compare_prints_a_row_per_run(evaluated_runs, capsys, monkeypatch):
    folders = [str(evaluated_runs / name) for name in ("three", "one", "two")]
    monkeypatch.setattr("sys.argv", ["compare", *folders])
    compare.main()
    out, _ = capsys.readouterr().out.split("\n\n")
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


def test_differences_are_from_the_first_run_user_by_user(evaluated_runs, capsys, monkeypatch):
    runs = [evaluated_runs / name for name in ("three", "one", "two")]
    found = compare.differences_of(runs)
    assert list(found) == ["recurrent (one)", "recurrent (two)"]
    table = [read_json(run / "results.json")["table"]["trained"] for run in runs]
    for other, metrics in zip(table[1:], found.values(), strict=True):
        assert list(metrics) == list(other)
        for name, metric in metrics.items():
            assert metric["mean"] == pytest.approx(other[name]["mean"] - table[0][name]["mean"])
            assert metric["interval"][0] <= metric["mean"] <= metric["interval"][1]
    monkeypatch.setattr("sys.argv", ["compare", *map(str, runs)])
    compare.main()
    differences = capsys.readouterr().out.split("\n\n")[1]
    assert differences.startswith("differences from recent-only, user by user")
    for name, metrics in found.items():
        assert f"{name}  " in differences
        assert f"{metrics['Recall@3']['mean']:+.4f}" in differences


def test_scores_of_other_users_are_not_compared(evaluated_runs, tmp_path):
    for name in ("results.json", "scores-test.jsonl"):
        (tmp_path / name).write_bytes((evaluated_runs / "one" / name).read_bytes())
    lines = (tmp_path / "scores-test.jsonl").read_text()
    (tmp_path / "scores-test.jsonl").write_text(lines.replace("test0", "test9"))
    with pytest.raises(InputError, match="its users are not those of"):
        compare.differences_of([evaluated_runs / "one", tmp_path])
    (tmp_path / "scores-test.jsonl").unlink()
    with pytest.raises(InputError, match=r"scores-test\.jsonl: no such file"):
        compare.differences_of([evaluated_runs / "one", tmp_path])


def test_runs_whose_folders_have_one_name_have_rows_of_their_own(tmp_path):
    found = {tmp_path / a / "run": {"paradigm": "recurrent"} for a in ("x", "y")}
    names = compare.row_names(found)
    assert len(set(names.values())) == 2
