"""Write a run's report: one HTML page with its results, curves and some users, which needs no network and no script.

    python evaluate.py --report
    python -m runfolder.page runs/demo                          # the same, of what is there already

The page holds the results table, beside those of other runs on the same users; the loss and validation curves; a
metric against the number of recent items in the prompt, where runs that differ in it lie beside this one; the prompts'
lengths against the context; and of some users the blocks, the summaries and the ranked candidates. All texts are
escaped, and the plots are SVG in the page.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from prepare.dataset import atomic_write, load_dataset, read_json, read_jsonl
from runfolder.command import run_main
from runfolder.show import records_of, steps
from runfolder.state import read_config
from trsr import SUMMARIZED, InputError

SHOWN_USERS = 6
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 52, 20, 12, 40  # of a plot, in its own units
STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1c1c1a; --faint: #6a6a64; --line: #dcdcd4;
  --a: #1f5fbf; --b: #b8481b; --c: #2c7a4b; --d: #8040a0; --good: #e3f1e6; }
@media (prefers-color-scheme: dark) { :root { --page: #161614; --card: #1f1f1d; --ink: #e9e9e4; --faint: #a2a29a;
  --line: #3a3a36; --a: #7fb0ff; --b: #ff9d70; --c: #7fd3a0; --d: #cf9bea; --good: #20382a; } }
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
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
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
COLORS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")


# ---- Plots


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers that reach from low or below it to high or above it."""
    if low == high:
        low, high = min(low, 0), max(high, 0) or 1
    span = high - low
    power = 10.0 ** np.floor(np.log10(span / n))
    step = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= n)
    return [float(step * i) for i in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]


def tag(name: str, content: object = "", **attributes: object) -> str:
    """Return an element around content, which is markup; `text_anchor` stands for text-anchor, `class_` for class."""
    names = (key.rstrip("_").replace("_", "-") for key in attributes)
    options = "".join(f' {n}="{escape(str(value))}"' for n, value in zip(names, attributes.values(), strict=True))
    return f"<{name}{options}>{content}</{name}>"


def axes(xs: Sequence[float], ys: Sequence[float], x_name: str) -> tuple[str, Callable, Callable]:
    """Return the axes' markup and the functions from x and y to the plot's units."""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def x_of(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1) * (HEIGHT - TOP - BOTTOM)

    marks = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y_of(y), y2=y_of(y), class_="axis") for y in y_ticks]
    marks += [tag("text", f"{y:g}", x=LEFT - 6, y=y_of(y) + 4, text_anchor="end") for y in y_ticks]
    marks += [tag("text", f"{x:g}", x=x_of(x), y=HEIGHT - BOTTOM + 16, text_anchor="middle") for x in x_ticks]
    marks.append(tag("text", escape(x_name), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    return "".join(marks), x_of, y_of


def figure(title: str, drawing: str, y_name: str, names: Sequence[str] = ()) -> str:
    """Return a captioned plot; names are those of its lines, in the order of COLORS."""
    keys = "".join(
        tag("span", "", class_="key", style=f"background:{color}") + escape(name)
        for name, color in zip(names, COLORS, strict=False)
    )
    label = tag("title", escape(f"{title}, {y_name}"))
    plot = tag("svg", label + drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    caption = f"{escape(title)} <span class='faint'>({escape(y_name)})</span>{keys}"
    return tag("figure", tag("figcaption", caption) + plot)


def line_plot(title: str, x_name: str, y_name: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Return a plot of (x, y) points, a line a name; nothing where there are no points."""
    xs, ys = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
    if not xs:
        return ""
    drawing, x_of, y_of = axes(xs, [0, *ys], x_name)
    for line, color in zip(lines.values(), COLORS, strict=False):
        places = [(round(x_of(x), 1), round(y_of(y), 1)) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawing += tag("polyline", points=path, fill="none", stroke=color, stroke_width=2)
        for x, y in places if len(places) <= 20 else ():
            drawing += tag("circle", cx=x, cy=y, r=3, fill=color)
    return figure(title, drawing, y_name, list(lines) if len(lines) > 1 else ())


def histogram(title: str, x_name: str, values: Sequence[float], limit: float) -> str:
    """Return a histogram of values, with a line at limit."""
    counts, edges = np.histogram(values, bins=24, range=(0, max(limit, *values)))
    drawing, x_of, y_of = axes([0, limit, *values], [0, int(counts.max())], x_name)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        size = {"x": x_of(low) + 0.5, "y": y_of(count), "width": x_of(high) - x_of(low) - 1}
        drawing += tag("rect", **size, height=y_of(0) - y_of(count), fill=COLORS[0])
    at = x_of(limit)
    drawing += tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, stroke=COLORS[1])
    drawing += tag("text", f"{limit:g}", x=at - 4, y=TOP + 10, text_anchor="end")
    return figure(title, drawing, "users")


# ---- What is in the run folder


def neighbors(run: Path, results: dict) -> dict[str, dict]:
    """Return the results of the folders beside the run on the same users with the same metrics, by folder name."""
    found = {}
    for path in sorted(run.resolve().parent.glob("*/results.json")):
        other = path.parent != run.resolve() and read_json(path)
        same = other and all(other.get(name) == results[name] for name in ("data", "split", "users"))
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
    by_name = {name: [(line["epoch"], line["validation"][name]) for line in validations] for name in names}
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
            lines.setdefault(found["paradigm"], []).append((items, found["table"]["trained"][name]["mean"]))
    lines = {paradigm: sorted(points) for paradigm, points in lines.items() if len({x for x, _ in points}) > 1}
    return line_plot("By recent items in the prompt", "recent items", name, lines)


# ---- Users


def chosen_users(scores: list[dict]) -> list[dict]:
    """Return some users' score lines, from the best rank to the worst."""
    ordered = sorted(scores, key=lambda line: line["rank"])
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(SHOWN_USERS, len(ordered)))]


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
        cells = tag("td", place) + tag("td", f"{score:.4f}{bar}") + tag("td", mark + escape(items[item]))
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
        raise InputError(f"{results_path}: of split {results['split']!r}, not {split!r}; evaluate that split again")
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
        plots.append(histogram("Longest prompt of each user", "tokens", lengths, settings.get("max_length", 2048)))
    about = [
        f"{results['users']} users of {results['data']}/{split}.jsonl; model {results['model']}, {results['row']}",
        f"prompt: {results['paradigm']}, {settings.get('history_items')} recent items",
        *(f"trimmed to the context: {n} {what}" for what, n in results["trimmed"].items()),
    ]
    shown = [user_part(line, histories[line["user"]], items, trees.get(line["user"])) for line in chosen_users(scores)]
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
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += tag("title", escape(f"LLM-TRSR: {run}")) + tag("style", STYLE)
    path = run / f"report{suffix}.html"
    with atomic_write(path, "w") as file:
        file.write(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{tag("main", "".join(body))}</body></html>'
        )
    return path


def main() -> None:
    """Write the report of a run that was evaluated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, after evaluate.py")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="the split that was evaluated")
    args = parser.parse_args()
    print(f"wrote   {write_report(args.run, args.split)}")


if __name__ == "__main__":
    run_main(main)
