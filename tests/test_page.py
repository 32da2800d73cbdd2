"""runfolder/page.py: what the report shows, and that it escapes all of it."""

import html
import shutil
from html.parser import HTMLParser

import pytest
from helpers import NASTY, read_lines, run, scores, write_lines

from files.jsonl import read_json, write_json
from runfolder import page, show
from runfolder.quality import Quality
from runfolder.results import Question
from trsr import InputError


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


def test_the_page_is_one_sound_file_and_escapes_all_texts(evaluated_runs):
    text = (evaluated_runs / "one/report.html").read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.tags}
    values = [value for _, attrs in parsed.tags for value in attrs.values() if value]
    assert not any(value.startswith(("http", "//")) for value in values)
    assert NASTY not in text
    assert html.escape(NASTY) in text


def test_the_page_escapes_users_summaries_models_and_folders(evaluated_runs, tmp_path):
    hostile = "<img src=x onerror=alert(1)>\" onclick='x' </li></style><script>"
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(evaluated_runs / "one", folder)
    shutil.copytree(evaluated_runs / "data", tmp_path / "data")
    shutil.copytree(folder, tmp_path / "<b>beside")

    def other_user(record):
        return record | {"user": record["user"] + hostile}

    def other_summary(record):
        def node(tree):
            below = {"previous": node(tree["previous"])} if "previous" in tree else {}
            return tree | {"summary": hostile} | below

        return other_user(record) | {"summary": hostile, "tree": node(record["tree"])}

    for path, change in (
        (tmp_path / "data/test.jsonl", other_user),
        (folder / "scores-test.jsonl", other_user),
        (folder / "summaries.jsonl", other_summary),
    ):
        write_lines(path, map(change, read_lines(path)))
    results = read_json(folder / "results.json") | {"model": hostile}
    results["data"] = str(tmp_path / "data")
    write_json(folder / "results.json", results | {"trimmed": {hostile: 3}})
    write_json(tmp_path / "<b>beside/results.json", results | {"paradigm": hostile})

    text = page.write_report(Question(folder)).read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert not {"script", "img", "b"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert text.count(html.escape(hostile)) > 10  # they are all there, as text
    assert "&lt;b&gt;beside" in text


def test_the_page_shows_results_curves_and_users(evaluated_runs):
    folder = evaluated_runs / "one"
    text, results = (folder / "report.html").read_text(), read_json(folder / "results.json")
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
    lines = scores(folder)
    for line in lines:  # four users, so all of them
        assert f"{line['user']}: the positive has rank {line['rank']}" in text
        assert f"{max(line['scores']):.4f}" in text
        assert line["prompt_tokens"] > 20
    records = show.records_of(folder)
    for line in lines:
        for _, _, _, summary in show.steps(records[line["user"]]["tree"]):
            assert html.escape(summary) in text
    assert text.count("positive: </strong>") == 4


def copied(evaluated_runs, folder, name="one"):
    """Copy a run without what judges it; return its folder."""
    shutil.copytree(evaluated_runs / name, folder)
    (folder / "quality.json").unlink(missing_ok=True)
    for path in folder.glob("results*.json"):
        write_json(path, {k: v for k, v in read_json(path).items() if k != "answer_mass"})
    return folder


def test_the_page_shows_what_summaries_and_answers_are_worth(evaluated_runs, tmp_path):
    folder = copied(evaluated_runs, tmp_path / "one")
    shares = {"ended": 0.25, "limit": 0.63, "turn": 0.12, "loop": 0.01, "loop_users": 0.02}
    shares |= {"another": 0.03, "empty": 0.04, "own_first": 0.77, "chance": 1 / 24}
    found = Quality(users=40, texts=200, **shares)
    write_json(folder / "quality.json", found.record())
    for name, mass in (("results", 0.9876), ("results-untrained", 0.0321)):
        path = folder / f"{name}.json"
        write_json(path, read_json(path) | {"answer_mass": mass})

    text = page.write_report(Question(folder)).read_text()
    assert Page(text).open == []
    assert "<h2>Summaries</h2>" in text
    for _, row in found.rows():
        assert html.escape(row) in text
    advice = list(found.advice())
    assert len(advice) == 2
    assert all(html.escape(sentence) in text for sentence in advice)
    assert "0.988 (trained), 0.032 (untrained)" in text


def test_an_older_run_has_no_shares_to_show(evaluated_runs, tmp_path):
    folder = copied(evaluated_runs, tmp_path / "one")
    text = page.write_report(Question(folder)).read_text()
    assert "<h2>Summaries</h2>" not in text
    assert "Yes and No together" not in text


def test_shares_are_of_the_summaries_that_the_prompt_shows(evaluated_runs, tmp_path):
    folder = copied(evaluated_runs, tmp_path / "three", "three")
    write_json(folder / "quality.json", {"left": "by summaries that this prompt does not show"})
    assert "<h2>Summaries</h2>" not in page.write_report(Question(folder)).read_text()


def test_a_broken_file_of_shares_is_named(evaluated_runs, tmp_path):
    folder = copied(evaluated_runs, tmp_path / "one")
    write_json(folder / "quality.json", {"users": 3})
    with pytest.raises(InputError, match=r"quality\.json: field 'texts' is missing"):
        page.write_report(Question(folder))


def test_a_run_without_summaries_shows_the_history(evaluated_runs):
    run("evaluate.py", run=evaluated_runs / "three", k=[1, 3], report=True)
    text = (evaluated_runs / "three/report.html").read_text()
    assert "<h3>History</h3>" in text
    assert "Blocks and summaries" not in text


def test_a_run_without_results_is_named(tmp_path):
    message = r"results\.json: no such file; first run python evaluate\.py"
    with pytest.raises(InputError, match=message):
        page.write_report(Question(tmp_path))


def baseline(folder, results, users):
    """Write the results of a baseline beside a run's own."""
    folder.mkdir(parents=True)
    metrics = {n: {"mean": 0.1234, "interval": [0.1, 0.2]} for n in results["table"]["random"]}
    write_json(folder / "results.json", {"data": results["data"], "table": metrics})
    write_lines(folder / "scores-test.jsonl", [{"user": str(i)} for i in range(users)])


def test_rows_come_from_what_knows_least_to_the_method(evaluated_runs, tmp_path):
    for name in ("one", "two", "three"):
        copied(evaluated_runs, tmp_path / name, name)
    question = Question(tmp_path / "one")
    results = read_json(question.results)
    baseline(tmp_path / "one/baselines/sasrec-0", results, results["users"])
    baseline(tmp_path / "one/baselines/ncf-0", results, results["users"] + 1)  # other users
    rows = page.result_rows(question, results, page.neighbors(question, results))
    assert [row.title for row in rows] == [
        "random",
        "popularity",
        "sasrec-0",
        "untrained",
        "three: recent-only, trained",
        "two: recurrent, trained",
        "one: recurrent, trained",
    ]
    assert [row.own for row in rows] == [False] * 6 + [True]
    text = page.write_report(question).read_text()
    bars = text[text.index('<div class="bars">') : text.index("What the words mean")]
    assert bars.count(">0.123</text>") == len([n for n in results["table"]["random"] if "Rec" in n])


def test_the_page_shows_a_whole_prompt_settings_and_what_words_mean(evaluated_runs):
    folder = evaluated_runs / "one"
    text, results = (folder / "report.html").read_text(), read_json(folder / "results.json")
    prompt = results["example"]["prompt"]
    assert f"<pre>{html.escape(prompt)}</pre>" in text
    assert all(part in prompt for part in ("[Preference Summary]", "[Next Item]"))
    assert "<td>max_new_tokens</td>" in text
    assert "<dt>MRR@K</dt>" in text
    assert "<dt>whole-history</dt>" not in text  # no row is about it


def test_the_user_who_went_most_wrong_is_open(evaluated_runs):
    folder = evaluated_runs / "one"
    opened = (folder / "report.html").read_text().split('<details open="">')[1:]
    worst = max(scores(folder), key=lambda line: line["rank"])
    assert len(opened) == (worst["rank"] > 1)
    assert all(f"has rank {worst['rank']}</summary>" in part for part in opened)
