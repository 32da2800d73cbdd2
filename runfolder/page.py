"""Write a run's report: one HTML page with its results, curves and some users, which needs no network and no script.

    python evaluate.py --report
    python -m runfolder.page runs/demo                          # the same, of what is there already

The page holds the results table, beside those of other runs on the same users; the loss and validation curves; a
metric against the number of recent items in the prompt, where runs that differ in it lie beside this one; the prompts'
lengths against the context; and of some users the blocks, the summaries and the ranked candidates. All texts are
escaped, and the plots are SVG in the page.
"""

import argparse
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl
from launch.command import run_main
from prepare.dataset import load_dataset
from runfolder.plots import COLORS_AND_TEXT, histogram, line_plot, tag
from runfolder.show import records_of, steps
from state.settings import read_config
from trsr import SUMMARIZED, InputError

SHOWN_USERS = 6
STYLE = """
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .3rem 0; } .faint { color: var(--faint); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
.own { background: var(--good); }
td small { display: block; color: var(--faint); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figcaption { font-size: .9rem; margin-bottom: .4rem; } svg { display: block; width: 100%; height: auto; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin: 0 .3rem 0 .8rem; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem;
  margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
ol { margin: .2rem 0 .4rem; padding-left: 2.2rem; } li { overflow-wrap: anywhere; margin: .15rem 0; font-size: .92rem; }
.step { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .5rem 0; }
.made { border-left: 3px solid var(--a); padding-left: .6rem; margin: .3rem 0; overflow-wrap: anywhere; }
.candidates { width: 100%; table-layout: fixed; } .candidates td { white-space: normal; vertical-align: top; }
.candidates td, .candidates th { text-align: left; font-size: .92rem; overflow-wrap: anywhere; }
.candidates th:nth-child(1) { width: 3rem; } .candidates th:nth-child(2) { width: 8rem; }
.bar { height: .35rem; background: var(--a); border-radius: .2rem; min-width: 1px; }
@media (max-width: 34rem) { .candidates th:nth-child(2) { width: 5.5rem; } th, td { padding: .3rem .4rem; } }
"""


# ---- What is in the run folder


def neighbors(run: Path, results: dict) -> dict[str, dict]:
    """Return the results of the folders beside the run on the same users with the same metrics, by folder name."""
    found = {}
    for path in sorted(run.resolve().parent.glob("*/results.json")):
        other = path.parent != run.resolve() and read_json(path)
        same = other and all(
            other.get(name) == results[name] for name in ("data", "split", "users")
        )
        if same and other["table"]["random"].keys() == results["table"]["random"].keys():
            found[path.parent.name] = other
    return found


def results_table(run: Path, results: dict, others: dict[str, dict]) -> str:
    """Return the table of the run's rows, and of the runs beside it."""
    untrained = run / "results-untrained.json"
    rows = {name: (row, name == results["row"]) for name, row in results["table"].items()}
    if untrained.is_file():
        rows = {"untrained": (read_json(untrained)["table"]["untrained"], False)} | rows
    for name, other in others.items():
        rows[f"{name}: {other['paradigm']}, {other['row']}"] = other["table"][other["row"]], False
    names = list(results["table"]["random"])
    lines = [tag("tr", tag("th", "") + "".join(tag("th", escape(name)) for name in names))]
    for title, (row, own) in rows.items():
        cells = [tag("td", escape(f"{run.name}: {results['paradigm']}, {title}" if own else title))]
        for name in names:
            interval = row.get(name, {}).get("interval")
            small = tag("small", f"{interval[0]:.3f}–{interval[1]:.3f}") if interval else ""
            cells.append(tag("td", (f"{row[name]['mean']:.4f}" if name in row else "") + small))
        lines.append(tag("tr", "".join(cells), **({"class_": "own"} if own else {})))
    return tag("div", tag("table", "".join(lines)), class_="wide")


def curves(run: Path) -> list[str]:
    """Return the plots of the training loss and the validation recalls."""
    path = run / "metrics.jsonl"
    lines = [line for _, line in read_jsonl(path, {}, torn=True)] if path.is_file() else []
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validations = [line for line in lines if "validation" in line]
    names = list(validations[0]["validation"]) if validations else []
    by_name = {
        name: [(line["epoch"], line["validation"][name]) for line in validations] for name in names
    }
    return [
        line_plot("Training loss", "step", "nats a token", {"loss": losses}),
        line_plot("Validation", "epoch", "recall", by_name),
    ]


def history_plot(run: Path, results: dict, others: dict[str, dict]) -> str:
    """Return the plot of the first metric against the recent items in the prompt, a line a paradigm."""
    name, lines = next(iter(results["table"]["random"])), {}
    for folder, found in ({run.name: results} | others).items():
        items = read_config(run.resolve().parent / folder).get("train", {}).get("history_items")
        if items is not None and found["row"] == "trained":
            lines.setdefault(found["paradigm"], []).append(
                (items, found["table"]["trained"][name]["mean"])
            )
    lines = {
        paradigm: sorted(points)
        for paradigm, points in lines.items()
        if len({x for x, _ in points}) > 1
    }
    return line_plot("By recent items in the prompt", "recent items", name, lines)


# ---- Users


def chosen_users(scores: list[dict]) -> list[dict]:
    """Return some users' score lines, from the best rank to the worst."""
    ordered = sorted(scores, key=lambda line: line["rank"])
    return [
        ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(SHOWN_USERS, len(ordered)))
    ]


def listed(texts: Iterable[tuple[int, str]]) -> str:
    """Return numbered texts as a list."""
    return tag("ol", "".join(tag("li", escape(text), value=number) for number, text in texts))


def user_part(line: dict, history: list[str], items: dict[str, str], tree: dict | None) -> str:
    """Return one user's blocks with their summaries, or the history, and the ranked candidates."""
    parts = [tag("summary", escape(f"{line['user']}: the positive has rank {line['rank']}"))]
    if tree is None:
        parts += [tag("h3", "History"), listed(enumerate(history, 1))]
    else:
        parts.append(tag("h3", "Blocks and summaries"))
    for depth, what, (first, end), summary in steps(tree) if tree else ():
        block = listed((number + 1, history[number]) for number in range(first, end)) if end else ""
        made = tag("p", escape(summary), class_="made")
        parts.append(tag("div", tag("p", escape(what), class_="faint") + block + made, class_="step",
                         style=f"margin-left:{depth}rem"))  # fmt: skip
    rows = [tag("tr", tag("th", "") + tag("th", "P(Yes)") + tag("th", "Candidate"))]
    order = sorted(zip(line["scores"], line["candidates"], strict=True), key=lambda pair: -pair[0])
    for place, (score, item) in enumerate(order, 1):
        bar = tag("div", "", class_="bar", style=f"width:{100 * score:.1f}%")
        mark = tag("strong", "positive: ") if item == line["positive"] else ""
        cells = (
            tag("td", place)
            + tag("td", f"{score:.4f}{bar}")
            + tag("td", mark + escape(items[item]))
        )
        rows.append(tag("tr", cells, **({"class_": "own"} if mark else {})))
    parts += [tag("h3", "Candidates"), tag("table", "".join(rows), class_="candidates")]
    return tag("details", "".join(parts))


# ---- The page


def write_report(run: Path, split: str = "test", suffix: str = "") -> Path:
    """Write RUN/report.html, or report-untrained.html with that suffix, and return its path."""
    results_path, scores_path = run / f"results{suffix}.json", run / f"scores-{split}{suffix}.jsonl"
    for path in (results_path, scores_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file; first run python evaluate.py --run {run}")
    results, scores = read_json(results_path), [line for _, line in read_jsonl(scores_path, {})]
    if results["split"] != split:
        raise InputError(
            f"{results_path}: of split {results['split']!r}, not {split!r}; evaluate that split again"
        )
    _, items, splits = load_dataset(results["data"], (split,))
    histories = {example.user: [items[i] for i in example.history] for example in splits[split]}
    settings = read_config(run).get("train", {})
    trees = {}
    if results["paradigm"] in SUMMARIZED:
        trees = {user: record["tree"] for user, record in records_of(run).items()}
    others = neighbors(run, results)
    lengths = [line["prompt_tokens"] for line in scores if "prompt_tokens" in line]
    plots = [*curves(run), history_plot(run, results, others)]
    if lengths:
        plots.append(
            histogram(
                "Longest prompt of each user", "tokens", lengths, settings.get("max_length", 2048)
            )
        )
    about = [
        f"{results['users']} users of {results['data']}/{split}.jsonl; model {results['model']}, {results['row']}",
        f"prompt: {results['paradigm']}, {settings.get('history_items')} recent items",
        *(f"trimmed to the context: {n} {what}" for what, n in results["trimmed"].items()),
    ]
    shown = [
        user_part(line, histories[line["user"]], items, trees.get(line["user"]))
        for line in chosen_users(scores)
    ]
    body = [
        tag("h1", escape(f"LLM-TRSR: {run}")),
        *(tag("p", escape(text), class_="faint") for text in about),
        tag("h2", "Results"),
        results_table(run, results, others),
        tag("p", "Below each mean is its 95 % interval over users.", class_="faint"),
        *([tag("h2", "Curves"), tag("div", "".join(plots), class_="plots")] if any(plots) else []),
        tag("h2", "Some users, from the best rank of the positive to the worst"),
        *shown,
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += tag("title", escape(f"LLM-TRSR: {run}")) + tag("style", COLORS_AND_TEXT + STYLE)
    path = run / f"report{suffix}.html"
    with atomic_write(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{tag("main", "".join(body))}</body></html>'
        )
    return path


def main() -> None:
    """Write the report of a run that was evaluated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, after evaluate.py")
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="the split that was evaluated"
    )
    args = parser.parse_args()
    print(f"wrote   {write_report(args.run, args.split)}")


if __name__ == "__main__":
    run_main(main)
