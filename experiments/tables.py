"""The rows of an experiment as a markdown table and as a figure, with the paper's values."""

from collections.abc import Sequence

from experiments.above import MARK
from experiments.rows import Row
from runfolder.plots import bar_panel, line_panel, svg_file


def markdown(rows: Sequence[Row], names: Sequence[str], dataset: str | None) -> str:
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
            mark = f" {MARK}" if row.above.get("is") else ""
            lines.append(table_line([title + mark, *cells]))
        if row.paper:
            cells = (paper_cell(row, name) for name in names)
            lines.append(table_line([f"*{title}: the paper, {dataset}*", *cells]))
    return "\n".join(lines)


def markdown_differences(rows: Sequence[Row], metric: str) -> str:
    """Return a markdown table of the rows' differences from others; empty if there are none."""
    columns = list(dict.fromkeys(column for row in rows for column in row.differences))
    if not columns:
        return ""
    titles = [f"{metric}, less that of {column}" for column in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        if row.differences:
            found = (row.differences.get(column) for column in columns)
            cells = [difference_cell(each[metric]) if each else "" for each in found]
            lines.append(table_line([row.name.replace("|", "\\|"), *cells]))
    how = "Differences are taken user by user, with 95 % intervals by resampling users."
    return "\n".join(lines) + f"\n\n{how} Bold: the interval is on one side of zero."


def difference_cell(metric: dict) -> str:
    """Return a difference with its interval, bold if zero is not in it."""
    low, high = metric["interval"]
    text = f"{metric['mean']:+.4f}"
    if low > 0 or high < 0:
        text = f"**{text}**"
    return f"{text} ({low:+.3f} to {high:+.3f})"


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


def figure(
    title: str, rows: Sequence[Row], names: Sequence[str], x_name: str, log: bool = False
) -> str:
    """Return an SVG file with a panel per metric.

    The panels show bars. With x_name, they show lines over the rows' groups, which are numbers, on
    a logarithmic axis if log.
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
            panels[name] = line_panel(x_name, series, values, marks, log)
        else:
            panels[name] = bar_panel(series, values, marks)
    mark = "table 2 of the paper (other users and models)" if any(row.paper for row in rows) else ""
    return svg_file(title, panels, len(names) // 2, series, mark)
