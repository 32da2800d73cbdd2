"""The rows of an experiment as a markdown table and as a figure, with the paper's values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.runs import Stage
from runfolder.plots import bar_panel, line_panel, svg_file


@dataclass
class Row:
    """A row of the table: its runs, one per seed, and the paper's values."""

    name: str
    group: object  # in the figure: a group of bars, or a number on the axis
    series: str = ""  # its color in the figure
    runs: list[list[Stage]] = field(default_factory=list)  # each ends with the stage that ranks
    paper: dict[str, float] = field(default_factory=dict)
    misprints: tuple[str, ...] = ()
    measured: dict[str, dict] = field(default_factory=dict)


def markdown(rows: Sequence[Row], names: Sequence[str], dataset: str) -> str:
    """Return a markdown table, with the best of each column bold and the paper's in italics."""
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    best = {}
    for name in names:
        means = [row.measured[name]["mean"] for row in rows if row.measured]
        best[name] = f"{max(means, default=0):.4f}"

    for row in rows:
        title = row.name.replace("|", "\\|")
        if row.measured:
            cells = (measured_cell(row.measured[name], best[name]) for name in names)
            lines.append(table_line([title, *cells]))
        if row.paper:
            cells = (paper_cell(row, name) for name in names)
            lines.append(table_line([f"*{title}: the paper, {dataset}*", *cells]))
    return "\n".join(lines)


def table_line(cells: Sequence[str]) -> str:
    """Return a line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def measured_cell(metric: dict, best: str) -> str:
    """Return a mean, bold if it is the best, with its interval if it has one."""
    text = f"{metric['mean']:.4f}"
    if text == best:
        text = f"**{text}**"
    if interval := metric.get("interval"):
        text += f" ({interval[0]:.3f}–{interval[1]:.3f})"
    return text


def paper_cell(row: Row, name: str) -> str:
    """Return the paper's value, if it has one."""
    if name not in row.paper:
        return ""
    return f"*{row.paper[name]:.4f}*{'†' if name in row.misprints else ''}"


def figure(title: str, rows: Sequence[Row], names: Sequence[str], x_name: str) -> str:
    """Return an SVG file with a panel per metric.

    The panels show bars. With x_name, they show lines over the rows' groups, which are numbers.
    """
    series = list(dict.fromkeys(row.series for row in rows))
    panels = {}
    for name in names:
        values, marks = {}, {}
        for row in rows:
            place = row.group, row.series
            if row.measured:
                mean = row.measured[name]["mean"]
                values[place] = mean, *row.measured[name].get("interval", (mean, mean))
            if name in row.paper:
                marks[place] = row.paper[name]
        if x_name:
            panels[name] = line_panel(x_name, series, values, marks)
        else:
            panels[name] = bar_panel(series, values, marks)
    mark = "table 2 of the paper (other users and models)" if any(row.paper for row in rows) else ""
    return svg_file(title, panels, len(names) // 2, series, mark)
