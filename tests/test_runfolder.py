"""The run folder's pages: what they show, that they escape it, and what a user hears whose folder lacks something."""

import html
import json
import shutil
from html.parser import HTMLParser

import pytest
from helpers import run, write_dataset

from files.jsonl import read_json, write_json
from runfolder import compare, page, plots, show
from trsr import InputError

NASTY = "<script>alert(\"x\")</script> & 'quoted'"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """Three evaluated runs side by side, on texts that would break a page that does not escape them."""
    parent = tmp_path_factory.mktemp("runs")
    data = write_dataset(parent / "data", history=(6, 12))
    items = [json.loads(line) for line in (data / "items.jsonl").open()]
    for item in items:
        item["attributes"]["Title"] += f" {NASTY}"
    (data / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    common = ("--data", data, "--model", model_folder)
    run(
        "summarize.py",
        *common,
        "--run",
        parent / "one",
        "--max-new-tokens",
        12,
        "--paradigm",
        "recurrent",
    )
    shutil.copytree(parent / "one", parent / "two")
    for name, more in (
        ("one", ()),
        ("two", ("--history-items", 1)),
        ("three", ("--paradigm", "recent-only")),
    ):
        run("train.py", *common, "--run", parent / name, "--epochs", 2, "--batch-size", 8, *more)
        run("evaluate.py", "--run", parent / name, "--k", 1, 3)
    run("evaluate.py", "--run", parent / "one", "--k", 1, 3, "--untrained")
    assert (
        "report.html" in run("evaluate.py", "--run", parent / "one", "--k", 1, 3, "--report").stdout
    )
    return parent


class Page(HTMLParser):
    """Collects the tags, and complains of one that is closed before those within it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_sound_file_and_escapes_all_texts(runs):
    text = (runs / "one/report.html").read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    assert not any(
        value.startswith(("http", "//"))
        for _, attrs in parsed.tags
        for value in attrs.values()
        if value
    )
    assert NASTY not in text
    assert html.escape(NASTY) in text


def test_the_page_escapes_users_summaries_models_and_folders(runs):
    hostile = "<img src=x onerror=alert(1)>\" onclick='x' </li></style><script>"

    def renamed(path, change):
        records = [json.loads(line) for line in path.open()]
        path.write_text("".join(json.dumps(change(record)) + "\n" for record in records))

    parent = runs / "hostile"
    folder = parent / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs / "one", folder)
    shutil.copytree(runs / "data", parent / "data")
    shutil.copytree(folder, parent / "<b>beside")

    def other_user(record):
        return record | {"user": record["user"] + hostile}

    def other_summary(record):
        def node(tree):
            below = {"previous": node(tree["previous"])} if "previous" in tree else {}
            return tree | {"summary": hostile} | below

        return other_user(record) | {"summary": hostile, "tree": node(record["tree"])}

    renamed(parent / "data/test.jsonl", other_user)
    renamed(folder / "scores-test.jsonl", other_user)
    renamed(folder / "summaries.jsonl", other_summary)
    results = read_json(folder / "results.json") | {"model": hostile, "data": str(parent / "data")}
    write_json(folder / "results.json", results | {"trimmed": {hostile: 3}})
    write_json(parent / "<b>beside/results.json", results | {"paradigm": hostile})
    text = page.write_report(folder).read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert not {"script", "img", "b"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert text.count(html.escape(hostile)) > 10  # they are all there, as text
    assert "&lt;b&gt;beside" in text


def test_the_page_shows_results_curves_and_users(runs):
    text = (runs / "one/report.html").read_text()
    results = read_json(runs / "one/results.json")
    for row in ("random", "popularity", "trained"):
        assert f"{results['table'][row]['Recall@3']['mean']:.4f}" in text
    for title in (
        "Training loss",
        "Validation",
        "By recent items in the prompt",
        "Longest prompt of each user",
    ):
        assert title in text, title
    for name in ("untrained", "two: recurrent, trained", "three: recent-only, trained"):
        assert name in text
    scores = [json.loads(line) for line in (runs / "one/scores-test.jsonl").open()]
    for line in scores:  # four users, so all of them
        assert f"{line['user']}: the positive has rank {line['rank']}" in text
        assert f"{max(line['scores']):.4f}" in text
        assert line["prompt_tokens"] > 20
    records = show.records_of(runs / "one")
    for line in scores:
        for _, _, _, summary in show.steps(records[line["user"]]["tree"]):
            assert html.escape(summary) in text
    assert text.count("positive: </strong>") == 4


def test_a_run_without_summaries_shows_the_history(runs):
    run("evaluate.py", "--run", runs / "three", "--k", 1, 3, "--report")
    text = (runs / "three/report.html").read_text()
    assert "<h3>History</h3>" in text
    assert "Blocks and summaries" not in text


def test_ticks_reach_around_the_values():
    for low, high in ((0, 1), (0.013, 0.0131), (3, 3), (0, 0), (-2, 7), (0, 12345), (1e-9, 2e-9)):
        found = plots.ticks(low, high)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 9 or low == high


def test_show_prints_blocks_and_summaries_in_order(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["show", str(runs / "one"), "--user", "test1"])
    show.main()
    out = capsys.readouterr().out
    assert out.index("items 1 to 5") < out.index("the summary before and items 6 to")
    assert "   1. Title" in out
    monkeypatch.setattr("sys.argv", ["show", str(runs / "one"), "--user", "nobody"])
    with pytest.raises(InputError, match="no summary of user 'nobody'"):
        show.main()


def test_compare_prints_a_row_a_run(runs, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["compare", *(str(runs / name) for name in ("three", "one", "two"))]
    )
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


def test_what_is_missing_or_differs_is_named(runs, tmp_path):
    with pytest.raises(
        InputError, match=r"results\.json: no such file; first run python evaluate\.py"
    ):
        page.write_report(tmp_path)
    with pytest.raises(
        InputError, match=r"summaries\.jsonl: no summaries; first run python summarize\.py"
    ):
        show.records_of(tmp_path)
    with pytest.raises(
        InputError, match=r"results\.json: no results; first run python evaluate\.py"
    ):
        compare.rows_of([tmp_path])
    write_json(tmp_path / "results.json", read_json(runs / "one/results.json") | {"users": 3})
    with pytest.raises(InputError, match="other users"):
        compare.rows_of([runs / "one", tmp_path])
