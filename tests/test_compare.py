"""runfolder/compare.py: a row per run, if the runs are on the same users."""

import csv
import shutil

import numpy as np
import pytest

from files.jsonl import read_json, write_json
from runfolder import compare
from runfolder.scores import told_apart
from runfolder.told_apart import holm, wilcoxon
from trsr import InputError


def test_compare_prints_a_row_per_run(evaluated_runs, capsys, monkeypatch):
    folders = [str(evaluated_runs / name) for name in ("three", "one", "two")]
    monkeypatch.setattr("sys.argv", ["compare", *folders])
    compare.main()
    out, *_ = capsys.readouterr().out.split("\n\n")
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


def test_a_long_name_has_a_line_of_its_own(evaluated_runs, tmp_path, capsys, monkeypatch):
    runs = [evaluated_runs / "three"]
    for name in ("one", "two"):
        runs.append(tmp_path / f"{name}-{'long' * 18}")
        shutil.copytree(evaluated_runs / name, runs[-1])
    monkeypatch.setattr("sys.argv", ["compare", *map(str, runs)])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 100  # the first one names a path
    title = f"recurrent ({runs[1].name})"
    assert lines.count(title) >= 3  # of the metrics, the differences and the tests
    for i, line in enumerate(lines):
        if line == title:
            assert lines[i + 1].startswith(" " * 42)


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


def test_rows_are_told_apart_or_not_and_all_is_in_the_csv_file(
    evaluated_runs, tmp_path, capsys, monkeypatch
):
    runs = [evaluated_runs / name for name in ("three", "one", "two")]
    path = tmp_path / "both.csv"
    monkeypatch.setattr("sys.argv", ["compare", *map(str, runs), "--csv", str(path)])
    compare.main()
    told = capsys.readouterr().out.split("\n\n")[2].splitlines()
    assert told[0] == "Wilcoxon's signed-rank test on NDCG@3, by Holm for 2 rows together;"
    assert told[1] == "the difference from recent-only:"
    found = compare.verdicts_of(runs)
    ranks = compare.ranks_of(runs)
    gains = {
        name: [1 / np.log2(r + 1) if r <= 3 else 0 for r in own] for name, own in ranks.items()
    }
    first = np.array(gains["recent-only"])
    p = {name: wilcoxon(np.array(gains[name]) - first) for name in found}
    assert {name: test["p"] for name, test in found.items()} == p
    assert [test["holm"] for test in found.values()] == holm(list(p.values()))
    for line, (name, test) in zip(told[2:4], found.items(), strict=True):
        assert line.startswith(f"{name}  ")
        assert line.endswith(f"corrected {test['holm']:.3g}: not significant")

    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    _, rows = compare.rows_of(runs)
    means = {(line["row"], line["metric"]): line for line in lines if line["table"] == "mean"}
    assert {row for row, _ in means} == set(rows)
    for (row, metric), line in means.items():
        assert float(line["mean"]) == rows[row][metric]["mean"]
        assert (line["low"] == "") == ("interval" not in rows[row][metric])
        assert line["p"] == line["holm"] == ""
    differences = [line for line in lines if line["table"] == "difference"]
    assert len(differences) == 2 * 6
    assert all(float(line["holm"]) == found[line["row"]]["holm"] for line in differences)


def test_users_who_gain_alike_tell_runs_apart():
    worse, better = [9] * 40, [[1] * 30 + [9] * 10, [9] * 40]
    first, second = told_apart(worse, better, [3, 5])
    assert first["p"] == pytest.approx(2 / 2**30)
    assert first["holm"] == 2 * first["p"]
    assert second == {"p": 1.0, "holm": 1.0}


def test_evaluations_of_other_candidates_are_compared_by_name(evaluated_runs, tmp_path):
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        shutil.copytree(evaluated_runs / run.name, run)
    with pytest.raises(InputError, match=r"results-all\.json: no results; .* --candidates all"):
        compare.rows_of(runs, "all")
    for run in runs:
        for name in ("results", "scores-test"):
            (source,) = run.glob(f"{name}.json*")
            source.rename(run / f"{name}-all{source.suffix}")
        results = read_json(run / "results-all.json")
        about = {"candidates": "all", "mean_candidates": 50.0 + len(run.name)}
        write_json(run / "results-all.json", results | about)
    _, rows = compare.rows_of(runs, "all")
    assert list(rows) == ["random", "popularity", "recurrent (one)", "recurrent (two)"]
    assert list(compare.verdicts_of(runs, "all")) == ["recurrent (two)"]
    results = read_json(runs[1] / "results-all.json")
    write_json(runs[1] / "results-all.json", results | {"mean_candidates": 49.0})
    with pytest.raises(InputError, match="other users, positives, candidates or --k"):
        compare.rows_of(runs, "all")


def test_other_positives_or_candidates_of_the_same_users_are_not_compared(evaluated_runs, tmp_path):
    for run in ("one", "two"):
        shutil.copytree(evaluated_runs / run, tmp_path / run)
    runs = [tmp_path / "one", tmp_path / "two"]
    compare.rows_of(runs)
    results = read_json(runs[1] / "results.json")
    write_json(runs[1] / "results.json", results | {"ranked": "another"})
    with pytest.raises(InputError, match="other users, positives, candidates or --k"):
        compare.rows_of(runs)
    del results["ranked"]  # of an older version
    write_json(runs[1] / "results.json", results)
    compare.rows_of(runs)


@pytest.mark.parametrize("name", ["val", "5-users", "val-5-users", "untrained", "interim"])
def test_any_evaluation_is_compared_by_what_its_files_are_named(
    evaluated_runs, tmp_path, name, capsys, monkeypatch
):
    for run in ("one", "two"):
        shutil.copytree(evaluated_runs / run, tmp_path / run)
        scores = f"scores-{name}" if name.startswith("val") else f"scores-test-{name}"
        (tmp_path / run / "results.json").rename(tmp_path / run / f"results-{name}.json")
        (tmp_path / run / "scores-test.jsonl").rename(tmp_path / run / f"{scores}.jsonl")
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setattr("sys.argv", ["compare", *runs, "--candidates", name])
    compare.main()
    assert "recurrent (two)" in capsys.readouterr().out


def test_the_value_of_evaluate_s_flag_names_candidates_too(tmp_path):
    (tmp_path / "pool.txt").write_text("i1\n")
    for value, name in (("30", "30-drawn"), (str(tmp_path / "pool.txt"), "candidates-pool")):
        write_json(tmp_path / f"results-{name}.json", {})
        assert compare.question_of(tmp_path, value).results.name == f"results-{name}.json"
    write_json(tmp_path / "results-interim.json", {})
    with pytest.raises(InputError, match="unfinished; add --candidates interim"):
        compare.question_of(tmp_path)


def test_untrained_rows_are_of_the_same_question_and_of_their_own_models(evaluated_runs, tmp_path):
    for run in ("one", "two"):
        shutil.copytree(evaluated_runs / run, tmp_path / run)
    runs = [tmp_path / "one", tmp_path / "two"]
    results = read_json(runs[0] / "results.json")
    for run, kept in zip(runs, (1, 0.5), strict=True):
        table = {"untrained": {k: {"mean": kept} for k in results["table"]["random"]}}
        own = results | {"row": "untrained", "table": results["table"] | table}
        write_json(run / "results-untrained.json", own)
    _, rows = compare.rows_of(runs)
    names = ["untrained (recurrent)", f"untrained (recurrent, {runs[1]})"]
    assert [rows[name]["Recall@3"]["mean"] for name in names] == [1, 0.5]
    random = {k: v for k, v in results["table"]["random"].items() if k.endswith("@3")}
    write_json(runs[0] / "results-untrained.json", own | {"table": {"random": random}})
    with pytest.raises(InputError, match=r"results-untrained\.json: other users, positives"):
        compare.rows_of(runs)


def test_a_csv_file_replaces_only_its_own_kind(evaluated_runs, tmp_path, monkeypatch):
    run, path = str(evaluated_runs / "one"), tmp_path / "own.csv"
    monkeypatch.setattr("sys.argv", ["compare", run, "--csv", str(path)])
    compare.main()
    compare.main()
    path.write_text("precious")
    with pytest.raises(InputError, match=r"own\.csv: is no table of this command"):
        compare.main()
    assert path.read_text() == "precious"


def test_a_run_without_a_training_is_a_row(evaluated_runs, tmp_path):
    for name in ("results-untrained.json", "scores-test-untrained.jsonl"):
        shutil.copy(evaluated_runs / "one" / name, tmp_path / name)
    _, rows = compare.rows_of([evaluated_runs / "two", tmp_path])
    assert list(rows) == ["random", "popularity", "recurrent", "untrained (recurrent)"]
    assert list(compare.differences_of([evaluated_runs / "two", tmp_path])) == [
        "untrained (recurrent)"
    ]


def test_runs_whose_folders_have_one_name_have_rows_of_their_own(tmp_path):
    found = {tmp_path / a / "run": {"paradigm": "recurrent", "row": "trained"} for a in ("x", "y")}
    names = compare.row_names(found)
    assert len(set(names.values())) == 2
