"""Print the tables of docs/results.md from what experiments.study, or any experiment, has made.

    python -m experiments.report --out runs/study               # a folder per dataset in it
    python -m experiments.report --out runs/study --only budgets

Reads OUT/DATASET/results.json and the .md files beside it, which study.tar.gz has too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.above import MARK
from experiments.tables import table_line
from experiments.tuning import NAMES
from files.jsonl import read_json
from launch.command import option, parse_settings, run_main
from trsr import InputError

PRINTED = ("targets", "rankings", "figure9", "figure10", "figure11")  # as they are


@dataclass(frozen=True)
class Settings:
    """The flags."""

    out: Path = option(Path("runs/study"), "the --out of a study, or of an experiment", Path)
    only: tuple[str, ...] = option(
        (), "of the tables (unset: all)", choices=("table2", "budgets", *PRINTED), nargs="+"
    )


def cell(metric: dict, interval: bool = False, best: float | None = None) -> str:
    """Return a mean with three digits, with its interval if asked for, bold if it is the best."""
    text = f"{metric['mean']:.3f}"
    if best is not None and text == f"{best:.3f}":
        text = f"**{text}**"
    if interval and (found := metric.get("interval")):
        text += f" ({found[0]:.3f}–{found[1]:.3f})"
    return text


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    return "\n".join([table_line(head), "|---" * len(head) + "|", *map(table_line, lines)])


def columns_of(found: dict) -> list[str]:
    """Return the metrics that are shown of an experiment: Recall at each of its cut-offs first."""
    ks = sorted(found["settings"]["k"])
    return [*(f"Recall@{k}" for k in ks), f"MRR@{ks[0]}", f"NDCG@{ks[0]}"]


def results(found: dict) -> list[str]:
    """Return the paragraphs of table 2: the metrics, the differences, and what was chosen."""
    rows, columns = [row for row in found["rows"] if row["measured"]], columns_of(found)
    best = {name: max(row["measured"][name]["mean"] for row in rows) for name in columns}
    lines = []
    for row in rows:
        cells = [cell(row["measured"][name], name == columns[0], best[name]) for name in columns]
        seeds = str(len(row["runs"]) or "")
        mark = f" {MARK}" if row["above"].get("is") else ""
        lines.append([row["name"] + mark, *cells, seeds])
    parts = [table(["", *columns, "seeds"], lines), *differences(rows, columns[0])]
    if above := next((row["above"] for row in rows if row["above"]), None):
        which = MARK if any(row["above"].get("is") for row in rows) else "No row is"
        parts.append(f"{which} above {above['best']}, the best baseline, in {above['metric']}.")
    for flag, what in NAMES.items():
        values = {row["name"]: row["chosen"].get(flag) for row in rows if "chosen" in row}
        chosen = [f"{name} {value:g}" for name, value in values.items() if value is not None]
        if chosen:
            parts.append(f"{what.capitalize()}s: {', '.join(chosen)}.")
    return parts


def differences(rows: Sequence[dict], name: str) -> list[str]:
    """Return a table of the rows' differences in a metric, if there are any."""
    columns = list(dict.fromkeys(column for row in rows for column in row["differences"]))
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            metric = row["differences"].get(column, {}).get(name)
            cells.append(difference(metric) if metric else "")
        if any(cells):
            lines.append([row["name"], *cells])
    head = ["", *(f"{name}, less that of {column}" for column in columns)]
    return [table(head, lines)] if lines else []


def difference(metric: dict) -> str:
    """Return a difference with its interval, bold if zero is not in it."""
    low, high = metric["interval"]
    text = f"{metric['mean']:+.3f}"
    return f"{f'**{text}**' if low > 0 or high < 0 else text} ({low:+.3f} to {high:+.3f})"


def difference_from(row: dict, other: str, name: str) -> str:
    """Return a row's difference in a metric from another row; empty if it has none."""
    metrics = row["differences"].get(other)
    return difference(metrics[name]) if metrics else ""


def budgets(found: dict) -> list[str]:
    """Return the paragraphs of the budgets, a column for each: the metric and its differences."""
    rows, name = [row for row in found["rows"] if row["measured"]], columns_of(found)[0]
    groups = sorted({row["group"] for row in rows})
    kinds = list(dict.fromkeys(row["series"] for row in rows))
    others = list(dict.fromkeys(other for row in rows for other in row["differences"]))

    def by_budget(title: str, cell_of: Callable[[dict], str]) -> str:
        cells = {(row["series"], row["group"]): cell_of(row) for row in rows}
        lines = [[kind, *(cells.get((kind, group), "") for group in groups)] for kind in kinds]
        return table([title, *(f"{group} tokens" for group in groups)], lines)

    parts = [by_budget(name, lambda row: cell(row["measured"][name]))]
    for other in others:
        less = partial(difference_from, other=other, name=name)
        parts.append(by_budget(f"{name}, less that of {other}", less))
    return [*parts, "Bold: the interval is on one side of zero."]


def report(folder: Path, only: Sequence[str]) -> list[str]:
    """Return the paragraphs of one dataset's tables."""
    found = read_json(folder / "results.json")
    parts = [f"## {folder.name}"]
    for name, make in (("table2", results), ("budgets", budgets)):
        if name in found and name in (only or (name,)):
            users, seeds = found[name]["users"], found[name]["settings"]["seeds"]
            about = f"{users} test users; seeds {', '.join(map(str, seeds))} where a row has all."
            parts += [f"### {name}", about, *make(found[name])]
    for name in PRINTED:
        path = folder / f"{name}.md"
        if path.is_file() and name in (only or (name,)):
            parts += [f"### {name}", path.read_text("utf-8").strip()]
    return parts


def main() -> None:
    """Print the tables of every dataset."""
    settings, known = parse_settings(Settings, __doc__), {"table2", "budgets", *PRINTED}
    # Runs and baselines have a results.json of another kind.
    places = [settings.out, *sorted(settings.out.glob("*/"))]
    folders = [
        folder
        for folder in places
        if (path := folder / "results.json").is_file() and not known.isdisjoint(read_json(path))
    ]
    if not folders:
        raise InputError(f"{settings.out}: no results of experiments; run experiments.study first")
    print("\n\n".join(part for folder in folders for part in report(folder, settings.only)))


if __name__ == "__main__":
    run_main(main)
