"""evaluate.py --untrained where nothing was trained, and its CSV files."""

import csv

import pytest
from helpers import read_lines, run, scores

from files.jsonl import read_json


def refused(**settings):
    done = run("evaluate.py", **settings, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_no_training_is_needed(tmp_path, trained_run, data_folder, model_folder):
    common = {"data": data_folder, "model": model_folder, "untrained": True}
    run("evaluate.py", run=tmp_path / "new", **common)
    run("evaluate.py", run=trained_run, untrained=True)
    name = "scores-test-untrained.jsonl"
    assert scores(tmp_path / "new", name) == scores(trained_run, name)
    new, old = (read_json(f / "results-untrained.json") for f in (tmp_path / "new", trained_run))
    assert new == old
    assert not (tmp_path / "new" / "config.json").exists()


def test_flags_say_how_it_is_asked_and_name_the_files(tmp_path, data_folder, model_folder):
    common = {"run": tmp_path, "data": data_folder, "model": model_folder, "untrained": True}
    run("evaluate.py", **common, paradigm="none")
    results = read_json(tmp_path / "results-untrained-paradigm-none.json")
    assert results["paradigm"] == "none"
    run("evaluate.py", **common, history_items=1)
    run("evaluate.py", **common)
    found = [
        [line["prompt_tokens"] for line in scores(tmp_path, f"scores-test-untrained{more}.jsonl")]
        for more in ("-paradigm-none", "-history_items-1", "")
    ]
    assert all(a < b < c for a, b, c in zip(*found, strict=True))


def test_the_run_s_summaries_are_used(tmp_path, data_folder, model_folder):
    made = {"data": data_folder, "model": model_folder, "paradigm": "recurrent"}
    run("summarize.py", run=tmp_path, **made, max_new_tokens=8)
    run("evaluate.py", run=tmp_path, untrained=True)
    assert read_json(tmp_path / "results-untrained.json")["paradigm"] == "recurrent"
    run("evaluate.py", run=tmp_path, untrained=True, paradigm="recent-only")
    assert len(read_lines(tmp_path / "scores-test-untrained-paradigm-recent-only.jsonl")) == 4


def test_what_contradicts_a_training_is_refused(trained_run, tmp_path, data_folder, model_folder):
    message = refused(run=trained_run, untrained=True, paradigm="none")
    assert f"--paradigm none: {trained_run} was trained with recent-only; leave it out" in message
    assert "--history-items 2: " in refused(run=trained_run, history_items=2)
    assert "--chat True: " in refused(run=trained_run, chat=True)
    run("evaluate.py", run=trained_run, users=1, history_items=3)  # as it was trained
    assert "or evaluate.py with --untrained" in refused(
        run=tmp_path, data=data_folder, model=model_folder
    )
    message = refused(
        run=tmp_path, data=data_folder, model=model_folder, untrained=True, paradigm="hierarchical"
    )
    assert "summaries.jsonl: no summaries; run python summarize.py" in message


@pytest.mark.parametrize("candidates", [None, "all"])
def test_the_csv_files_say_what_the_others_say(tmp_path, data_folder, model_folder, candidates):
    common = {"run": tmp_path, "data": data_folder, "model": model_folder, "untrained": True}
    run("evaluate.py", **common, candidates=candidates, csv=True)
    more = "-untrained" + (f"-{candidates}" if candidates else "")
    with open(tmp_path / f"results{more}.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    table = read_json(tmp_path / f"results{more}.json")["table"]
    assert len(lines) == sum(map(len, table.values()))
    for line in lines:
        entry = table[line["row"]][line["metric"]]
        assert float(line["mean"]) == entry["mean"]
        low, high = entry.get("interval", ("", ""))
        assert (line["low"], line["high"]) == (str(low), str(high))

    with open(tmp_path / f"scores-test{more}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for record in scores(tmp_path, f"scores-test{more}.jsonl"):
        own = [row for row in rows if row["user"] == record["user"]]
        assert {row["candidate"] for row in own} == set(record["candidates"])
        by_place = [float(row["score"]) for row in sorted(own, key=lambda row: int(row["place"]))]
        assert by_place == sorted(record["scores"], reverse=True)
        (positive,) = [row for row in own if row["positive"] == "1"]
        assert positive["candidate"] == record["positive"]
        assert int(positive["place"]) == record["rank"]
