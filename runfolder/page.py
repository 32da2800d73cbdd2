"""Write a run's report: one HTML page that needs neither network nor scripts.

    python evaluate.py --report
    python -m runfolder.page runs/demo                          # the same, without evaluating again

The page shows

    results     the table, with baselines and other runs on the same users, their recalls as bars,
                how much of the probability the two answers have, and what the words mean
    summaries   their shares: how they ended, repeats, and whether they fit their own user
    curves      training loss and validation recall; the first metric by the number of recent items,
                if neighboring runs differ in it; the lengths of the prompts
    prompt      one whole prompt as the model reads it, and the run's settings
    users       for some of them the blocks, the summaries and the ranked candidates

All texts are escaped, and the plots are SVG.
"""

import re
from collections.abc import Iterable
from datetime import datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl
from launch.command import Parser, run_main
from prepare.dataset import load_dataset
from runfolder.plots import COLORS_AND_TEXT, bar_plot, histogram, line_plot, tag
from runfolder.quality import read_quality
from runfolder.results import Question, same_question
from runfolder.show import records_of, steps
from state.settings import read_config
from trsr import SUMMARIZED, InputError, Node

SHOWN_USERS = 6
STYLE = """
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .3rem 0; }
.faint { color: var(--faint); }

.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
.own { background: var(--good); }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--page); }
.wide .own td:first-child { background: var(--good); }
.figures th:first-child, .figures td:first-child { position: static; min-width: 0;
  text-align: right; background: none; }
.bars { max-width: 44rem; margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; font: .88rem/1.45 ui-monospace, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; }
td small { display: block; color: var(--faint); }
.shares td { text-align: left; white-space: normal; vertical-align: top; }

.plots { display: grid; gap: 1rem;
  align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figcaption { font-size: .9rem; margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem;
  margin: 0 .3rem 0 .8rem; }

details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
ol { margin: .2rem 0 .4rem; padding-left: 2.2rem; }
li { overflow-wrap: anywhere; margin: .15rem 0; font-size: .92rem; }
.step { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .5rem 0; }
.made { border-left: 3px solid var(--a); padding-left: .6rem; margin: .3rem 0;
  overflow-wrap: anywhere; }
.candidates { width: 100%; table-layout: fixed; }
.candidates td { white-space: normal; vertical-align: top; }
.candidates td, .candidates th { text-align: left; font-size: .92rem; overflow-wrap: anywhere; }
.candidates th:nth-child(1) { width: 3rem; }
.candidates th:nth-child(2) { width: 8rem; }
.bar { height: .35rem; background: var(--a); border-radius: .2rem; min-width: 1px; }
@media (max-width: 34rem) {
  .candidates th:nth-child(2) { width: 5.5rem; }
  th, td { padding: .3rem .4rem; }
}
"""


# ---- Results and curves


def neighbors(question: Question, results: dict) -> dict[str, dict]:
    """Return the results of the other runs in the parent folder, by folder name.

    Only those on the same users and with the same metrics are returned.
    """
    found, run = {}, question.run.resolve()
    for path in sorted(run.parent.glob(f"*/{question.results.name}")):
        if path.parent == run:
            continue
        try:
            other = read_json(path)
        except InputError as error:
            print(f"{error}; left out of the page")
            continue
        if same_question(other, results):
            found[path.parent.name] = other
    return found


def baselines_of(question: Question, results: dict) -> dict[str, dict]:
    """Return the tables of the baselines that were trained in the run's folder, by their names.

    Only those on the same users, which are all of the test split, and with the same metrics.
    """
    found = {}
    names = results["table"]["random"].keys()
    asked = results["split"] == "test" and not question.parts
    for path in sorted(question.run.glob("baselines/*/results.json")) if asked else ():
        other, scores = read_json(path), path.with_name("scores-test.jsonl")
        table = other.get("table", {})
        table = table.get(other.get("row"), table)  # older files have the baseline's row alone
        same = other.get("data") == results["data"] and table.keys() >= names
        if same and scores.is_file() and len(list(read_jsonl(scores, {}))) == results["users"]:
            found[path.parent.name] = table
    return found


class Row(NamedTuple):
    """A row of the table."""

    title: str
    metrics: dict[str, dict]
    own: bool  # whether it is what the page is about
    short: str = ""  # a name for plots, if the title is long


def result_rows(question: Question, results: dict, others: dict[str, dict]) -> list[Row]:
    """Return the rows, from what knows least to the method.

    That is random, popularity, baselines, untrained models, the method without summaries, and the
    method; other runs come before the page's own.
    """
    run, own = question.run, results["row"]
    table = results["table"]
    untrained = question.results.with_name("results-untrained.json")
    first = [Row(name, row, own=False) for name, row in table.items() if name != own]
    first += [Row(name, row, False) for name, row in baselines_of(question, results).items()]
    if untrained.is_file() and own != "untrained" and not question.parts:
        first.append(Row("untrained", read_json(untrained)["table"]["untrained"], own=False))

    found = [(folder, other, False) for folder, other in others.items()]
    found.append((run.name, results, True))
    found.sort(key=lambda row: (row[1]["row"] != "untrained", row[1]["paradigm"] in SUMMARIZED))
    kinds = [(other["paradigm"], other["row"]) for _, other, _ in found]
    for folder, other, is_own in found:
        kind = other["paradigm"], other["row"]
        title, alone = f"{folder}: {kind[0]}, {kind[1]}", kinds.count(kind) == 1
        first.append(Row(title, other["table"][kind[1]], is_own, kind[0] if alone else folder))
    return first


def results_table(rows: list[Row], names: list[str]) -> str:
    """Return the table of rows; names: of the metrics."""
    heads = "".join(tag("th", escape(name)) for name in names)
    lines = [tag("tr", tag("th", "") + heads)]
    lines += [table_row(row, names) for row in rows]
    return tag("div", tag("table", "".join(lines)), class_="wide")


def recall_bars(rows: list[Row], names: list[str]) -> str:
    """Return the plot of the recalls of all rows."""
    recalls = [name for name in names if name.startswith("Recall")]
    bars: dict[str, dict] = {}
    for row in rows:
        points = {name: row.metrics[name] for name in recalls if name in row.metrics}
        bars[row.short or row.title] = {
            name: (point["mean"], *(point.get("interval") or [point["mean"]] * 2))
            for name, point in points.items()
        }
    return bar_plot("Recall", bars)


def table_row(row: Row, names: list[str]) -> str:
    """Return a row of means with their intervals."""
    cells = tag("td", escape(row.title))
    for name in names:
        text = f"{row.metrics[name]['mean']:.4f}" if name in row.metrics else ""
        if interval := row.metrics.get(name, {}).get("interval"):
            text += tag("small", f"{interval[0]:.3f}–{interval[1]:.3f}")
        cells += tag("td", text)
    return tag("tr", cells, **({"class_": "own"} if row.own else {}))


def answer_mass(run: Path, results: dict) -> str:
    """Return the probability that Yes and No have together; nothing if it is not recorded."""
    untrained = run / "results-untrained.json"
    tables = [results, read_json(untrained) if untrained.is_file() else {}]
    found = [table for table in tables if isinstance(table.get("answer_mass"), int | float)]
    shares = ", ".join(f"{table['answer_mass']:.3f} ({table['row']})" for table in found)
    if not found:
        return ""
    text = f"Yes and No together have this share of the probability of the next token: {shares}."
    low = "Where it is low, the model would rather say something else."
    return tag("p", escape(f"{text} {low}"), class_="faint")


def quality_part(run: Path, results: dict) -> str:
    """Return the summaries' shares; nothing for a prompt without summaries or an older run."""
    quality = read_quality(run / "quality.json") if results["paradigm"] in SUMMARIZED else None
    if quality is None:
        return ""
    lines = [*quality.rows(), *(("advice", sentence) for sentence in quality.advice())]
    rows = "".join(tag("tr", tag("td", what) + tag("td", escape(text))) for what, text in lines)
    return tag("h2", "Summaries") + tag("table", rows, class_="shares")


def curves(run: Path) -> list[str]:
    """Return the plots of the training loss and of the validation recalls."""
    path = run / "metrics.jsonl"
    lines = [line for _, line in read_jsonl(path, {}, torn=True)] if path.is_file() else []
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    recalls: dict[str, list] = {}
    for line in lines:
        for name, recall in line.get("validation", {}).items():
            recalls.setdefault(name, []).append((line["epoch"], recall))
    return [
        line_plot("Training loss", "step", "nats per token", {"loss": losses}),
        line_plot("Validation", "epoch", "recall", recalls),
    ]


def history_plot(run: Path, results: dict, others: dict[str, dict]) -> str:
    """Return the plot of the first metric against the recent items in the prompt, by paradigm."""
    metric = next(iter(results["table"]["random"]))
    lines: dict[str, list] = {}
    for folder, found in ({run.name: results} | others).items():
        items = read_config(run.resolve().parent / folder).get("train", {}).get("history_items")
        if items is not None and found["row"] == "trained":
            point = items, found["table"]["trained"][metric]["mean"]
            lines.setdefault(found["paradigm"], []).append(point)
    # A single number of items makes no line.
    varied = {name: line for name, line in lines.items() if len({x for x, _ in line}) > 1}
    varied = {name: sorted(line) for name, line in varied.items()}
    return line_plot("By recent items in the prompt", "recent items", metric, varied)


def length_plot(run: Path, scores: list[dict]) -> str:
    """Return the histogram of the users' prompt lengths; nothing if they are not recorded."""
    lengths = [line["prompt_tokens"] for line in scores if "prompt_tokens" in line]
    if not lengths:
        return ""
    limit = read_config(run).get("train", {}).get("max_length", 2048)
    return histogram("Longest prompt of each user", "tokens", lengths, limit)


# ---- Users


def chosen_users(scores: list[dict]) -> list[dict]:
    """Return the score lines of users spread evenly from the best rank to the worst."""
    ordered = sorted(scores, key=lambda line: line["rank"])
    places = np.linspace(0, len(ordered) - 1, min(SHOWN_USERS, len(ordered)))
    return [ordered[round(place)] for place in places]


def listed(texts: Iterable[tuple[int, str]]) -> str:
    """Return numbered texts as a list."""
    return tag("ol", "".join(tag("li", escape(text), value=number) for number, text in texts))


def user_part(
    line: dict, history: list[str], items: dict[str, str], tree: Node | None, unfolded: bool
) -> str:
    """Return one user's summaries or history, and the ranked candidates."""
    title = tag("summary", escape(f"{line['user']}: the positive has rank {line['rank']}"))
    if tree is None:
        known = tag("h3", "History") + listed(enumerate(history, 1))
    else:
        known = tag("h3", "Blocks and summaries") + summaries_part(history, tree)
    candidates = tag("h3", "Candidates") + candidates_table(line, items)
    return tag("details", title + known + candidates, **({"open": ""} if unfolded else {}))


def summaries_part(history: list[str], tree: Node) -> str:
    """Return the blocks and what the model wrote about each, in the order of writing."""
    parts = ""
    for depth, what, (first, end), summary in steps(tree):
        about = tag("p", escape(what), class_="faint")
        if end:
            about += listed((number + 1, history[number]) for number in range(first, end))
        made = tag("p", escape(summary), class_="made")
        parts += tag("div", about + made, class_="step", style=f"margin-left:{depth}rem")
    return parts


def candidates_table(line: dict, items: dict[str, str]) -> str:
    """Return the table of a user's candidates, the most probable first."""
    rows = tag("tr", tag("th", "") + tag("th", "P(Yes)") + tag("th", "Candidate"))
    order = sorted(zip(line["scores"], line["candidates"], strict=True), key=lambda pair: -pair[0])
    for place, (score, item) in enumerate(order, 1):
        bar = tag("div", "", class_="bar", style=f"width:{100 * score:.1f}%")
        positive = item == line["positive"]
        mark = tag("strong", "positive: ") if positive else ""
        cells = tag("td", place) + tag("td", f"{score:.4f}{bar}")
        cells += tag("td", mark + escape(items[item]))
        rows += tag("tr", cells, **({"class_": "own"} if positive else {}))
    return tag("table", rows, class_="candidates")


def users_part(run: Path, results: dict, scores: list[dict]) -> str:
    """Return the part of the page about some users."""
    _, items, splits = load_dataset(results["data"], (results["split"],))
    examples = splits[results["split"]]
    histories = {example.user: [items[i] for i in example.history] for example in examples}
    trees = {}
    if results["paradigm"] in SUMMARIZED:
        trees = {user: record["tree"] for user, record in records_of(run).items()}
    parts, chosen = "", chosen_users(scores)
    for line in chosen:
        user = line["user"]
        # The last one is the worst: where it went wrong is what one wants to see.
        wrong = line is chosen[-1] and line["rank"] > 1
        parts += user_part(line, histories[user], items, trees.get(user), wrong)
    return parts


# ---- The page


def write_report(question: Question) -> Path:
    """Write the page of an evaluation and return its path."""
    run = question.run
    for path in (question.results, question.scores):
        if not path.is_file():
            raise InputError(f"{path}: no such file; first run python evaluate.py --run {run}")
    results = read_json(question.results)
    scores = [line for _, line in read_jsonl(question.scores, {})]

    path, title = question.report, tag("title", escape(f"LLM-TRSR: {run}"))
    head = '<meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += title + tag("style", COLORS_AND_TEXT + STYLE)
    body = tag("main", page_body(question, results, scores))
    with atomic_write(path, "w") as file:
        file.write('<!doctype html><html lang="en">')
        file.write(f"<head>{head}</head><body>{body}</body></html>")
    return path


def page_body(question: Question, results: dict, scores: list[dict]) -> str:
    """Return the page's content."""
    run, others = question.run, neighbors(question, results)
    rows, names = result_rows(question, results, others), list(results["table"]["random"])
    body = tag("h1", escape(f"LLM-TRSR: {run}"))
    for text in about(question, results):
        body += tag("p", escape(text), class_="faint")
    body += tag("h2", "Results") + results_table(rows, names)
    body += tag("p", "Below each mean is its 95 % interval over users.", class_="faint")
    body += tag("div", recall_bars(rows, names), class_="bars")
    body += answer_mass(run, results) + glossary(rows, names) + quality_part(run, results)

    plots = [*curves(run), history_plot(run, results, others), length_plot(run, scores)]
    if any(plots):
        body += tag("h2", "Curves") + tag("div", "".join(plots), class_="plots")
    body += prompt_part(results) + settings_part(run)
    body += tag("h2", "Some users, from the best rank of the positive to the worst")
    return body + users_part(run, results, scores)


GLOSSARY = {
    "candidates": "the items to rank for a user: the positive, which came next, and negatives",
    "P(Yes)": "what a candidate is ranked by: the probability of Yes against No",
    "Recall@K": "the share of users whose positive is among the first K",
    "MRR@K": "the mean of 1 / rank of the positive, 0 if it is not among the first K",
    "NDCG@K": "the mean of 1 / log2(rank + 1), 0 if it is not among the first K",
    "interval": "95 % of the means of users drawn again, with replacement, are inside",
    "random": "what a random order of the candidates scores on average",
    "popularity": "candidates by how often they were taken in training",
    "untrained": "the language model as it is, before the adapter is trained",
    "recent-only": "the prompt shows the last items, and no summary",
    "whole-history": "the prompt shows all items, and no summary",
    "none": "the prompt shows nothing of the user",
    "hierarchical": "blocks of the history are summarized apart, then their summaries together",
    "recurrent": "the summary is rewritten with every block of the history",
}


def glossary(rows: list[Row], names: list[str]) -> str:
    """Return what the words of the table mean: those that are in it."""
    words = " ".join([*(row.title for row in rows), *names])
    always = ("candidates", "P(Yes)", "interval")
    terms = ""
    for term, meaning in GLOSSARY.items():
        if term in always or re.search(rf"\b{re.escape(term.removesuffix('K'))}", words):
            terms += tag("dt", escape(term)) + tag("dd", escape(meaning))
    return tag("details", tag("summary", "What the words mean") + tag("dl", terms))


def prompt_part(results: dict) -> str:
    """Return one whole prompt; nothing for older results, which have none."""
    example = results.get("example") or {}
    if not isinstance(example.get("prompt"), str):
        return ""
    about = f"For the next item of user {example.get('user')}; the model's answer comes after it."
    body = tag("h2", "One prompt, as the model reads it") + tag("p", escape(about), class_="faint")
    return body + tag("pre", escape(example["prompt"]))


def settings_part(run: Path) -> str:
    """Return the settings that the run was made with, script by script."""
    parts = ""
    for script, kept in read_config(run).items():
        shown = {k: v for k, v in kept.items() if isinstance(v, str | int | float | list | None)}
        # Prompts and hashes are long, and elsewhere.
        shown = {k: v for k, v in shown.items() if len(str(v)) < 100}
        rows = "".join(
            tag("tr", tag("td", escape(name)) + tag("td", escape(str(value))))
            for name, value in shown.items()
        )
        parts += tag("h3", escape(f"{script}.py")) + tag("table", rows, class_="shares")
    return tag("details", tag("summary", "Settings") + parts) if parts else ""


def about(question: Question, results: dict) -> list[str]:
    """Return the lines below the title: users, model, prompt, date, and what was trimmed."""
    run = question.run
    date = datetime.fromtimestamp(question.results.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    users = f"{results['users']} users of {results['data']}/{results['split']}.jsonl"
    recent = read_config(run).get("train", {}).get("history_items")
    return [
        f"{users}; model {results['model']}, {results['row']}",
        f"prompt: {results['paradigm']}, {recent} recent items; evaluated {date}",
        *(f"trimmed to the context: {n} {what}" for what, n in results["trimmed"].items()),
    ]


def main() -> None:
    """Write the report of a run that was evaluated."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder, after evaluate.py")
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="the split that was evaluated"
    )
    args = parser.parse_args()
    print(f"wrote   {write_report(Question(args.run, args.split))}")


if __name__ == "__main__":
    run_main(main)
