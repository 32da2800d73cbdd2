"""SVG plots: those inside a run's report, and figures in files of their own."""

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 460, 260  # of a plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 12, 40  # margins around the axes
COLORS_AND_TEXT = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1c1c1a; --faint: #6a6a64;
  --line: #dcdcd4; --a: #1f5fbf; --b: #b8481b; --c: #2c7a4b; --d: #8040a0; --e: #8a6a00;
  --f: #007a85; --good: #e3f1e6; }
@media (prefers-color-scheme: dark) { :root { --page: #161614; --card: #1f1f1d; --ink: #e9e9e4;
  --faint: #a2a29a; --line: #3a3a36; --a: #7fb0ff; --b: #ff9d70; --c: #7fd3a0; --d: #cf9bea;
  --e: #e0c060; --f: #6fd0da; --good: #20382a; } }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); }
"""
Point = tuple[float, float, float]  # mean, and the low and high end of its interval
COLORS = tuple(f"var(--{letter})" for letter in "abcdef")

# ---- Elements and axes


def tag(name: str, content: object = "", **attributes: object) -> str:
    """Return an element around content, which is markup.

    The attribute `text_anchor` is written text-anchor, and `class_` is written class.
    """
    options = ""
    for key, value in attributes.items():
        options += f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
    return f"<{name}{options}>{content}</{name}>"


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers, the first at or below low and the last at or above high."""
    if low == high:
        low, high = min(low, 0), max(high, 0) or 1
    span = high - low
    power = 10.0 ** np.floor(np.log10(span / n))
    step = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= n)
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [float(step * i) for i in range(first, last + 1)]


def scale(marks: list[float], start: float, end: float) -> Callable[[float], float]:
    """Return the function that puts the first mark at start and the last at end."""
    low, span = marks[0], (marks[-1] - marks[0]) or 1
    return lambda value: start + (value - low) / span * (end - start)


def log_scale(marks: list[float], start: float, end: float) -> Callable[[float], float]:
    """Return scale's function for a logarithmic axis; the marks are greater than 0."""
    of_logs = scale([float(np.log(mark)) for mark in marks], start, end)
    return lambda value: of_logs(float(np.log(value)))


def axes(
    xs: Sequence[float], ys: Sequence[float], x_name: str, log: bool = False
) -> tuple[str, Callable, Callable]:
    """Return the axes' markup, and the functions from x and y to the plot's units.

    log: the axis of x is logarithmic, with a mark at each of xs.
    """
    x_ticks = sorted(set(xs)) if log else ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys), max(ys))
    # Marks at the values themselves leave no room at the ends, so they get some.
    aside = 20 if log else 0
    x_of = (log_scale if log else scale)(x_ticks, LEFT + aside, WIDTH - RIGHT - aside)
    y_of = scale(y_ticks, HEIGHT - BOTTOM, TOP)
    markup = ""
    for y in y_ticks:
        markup += tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y_of(y), y2=y_of(y), class_="axis")
    for y in y_ticks:
        markup += tag("text", f"{y:g}", x=LEFT - 6, y=y_of(y) + 4, text_anchor="end")
    for x in x_ticks:
        markup += tag("text", f"{x:g}", x=x_of(x), y=HEIGHT - BOTTOM + 16, text_anchor="middle")
    middle = (LEFT + WIDTH - RIGHT) / 2
    markup += tag("text", escape(x_name), x=middle, y=HEIGHT - 6, text_anchor="middle")
    return markup, x_of, y_of


# ---- Plots inside a page


def figure(
    title: str, drawing: str, y_name: str, names: Sequence[str] = (), height: float = HEIGHT
) -> str:
    """Return a plot with a caption; names: the names of its lines, in the order of COLORS."""
    keys = ""
    for name, color in zip(names, COLORS, strict=False):
        keys += tag("span", "", class_="key", style=f"background:{color}") + escape(name)
    label = tag("title", escape(f"{title}, {y_name}"))
    plot = tag("svg", label + drawing, viewBox=f"0 0 {WIDTH} {height:g}", role="img")
    caption = f"{escape(title)} <span class='faint'>({escape(y_name)})</span>{keys}"
    return tag("figure", tag("figcaption", caption) + plot)


def line_plot(
    title: str, x_name: str, y_name: str, lines: dict[str, list[tuple[float, float]]]
) -> str:
    """Return a plot with a line through each name's (x, y) points; nothing if there are none.

    A single x makes no line, so its values are written as figures.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    if len({x for x, _ in points}) == 1:
        return figures(title, f"{y_name}, at {x_name} {points[0][0]:g}", lines)
    xs, ys = zip(*points, strict=True)
    drawing, x_of, y_of = axes(xs, [0, *ys], x_name)
    for line, color in zip(lines.values(), COLORS, strict=False):
        places = [(round(x_of(x), 1), round(y_of(y), 1)) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawing += tag("polyline", points=path, fill="none", stroke=color, stroke_width=2)
        for x, y in places if len(places) <= 20 else ():
            drawing += tag("circle", cx=x, cy=y, r=3, fill=color)
    return figure(title, drawing, y_name, list(lines) if len(lines) > 1 else ())


def figures(title: str, about: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Return what would be a plot as a row of numbers: each name's last y."""
    known = {name: line[-1][1] for name, line in lines.items() if line}
    heads = "".join(tag("th", escape(name)) for name in known)
    values = "".join(tag("td", f"{y:.4f}") for y in known.values())
    caption = f"{escape(title)} <span class='faint'>({escape(about)})</span>"
    table = tag("table", tag("tr", heads) + tag("tr", values), class_="figures")
    return tag("figure", tag("figcaption", caption) + tag("div", table, class_="wide"))


def bar_plot(title: str, rows: dict[str, dict[str, Point]]) -> str:
    """Return a plot of bars with their intervals: a group per row, and in it a bar per name."""
    series = list(next(iter(rows.values())))
    values = {(row, name): point for row, found in rows.items() for name, point in found.items()}
    panel = bar_panel(series, values, {})
    return figure(title, panel.markup, "mean and 95 % interval", series, panel.height)


def histogram(title: str, x_name: str, values: Sequence[float], limit: float) -> str:
    """Return a histogram of values, with a line at limit if some values come near it."""
    near = max(values) > 0.75 * limit
    if not near:  # the axis shows what is there, instead of a long way to the limit
        x_name = f"{x_name}; the limit is {limit:g}"
    low, high = min(values), max(limit, *values) if near else max(values)
    high = high if high > low else low + 1
    counts, edges = np.histogram(values, bins=24, range=(low, high))
    drawing, x_of, y_of = axes([low, high], [0, int(counts.max())], x_name)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        size = {"x": x_of(low) + 0.5, "y": y_of(count), "width": x_of(high) - x_of(low) - 1}
        drawing += tag("rect", **size, height=y_of(0) - y_of(count), fill=COLORS[0])
    if near:
        at = x_of(limit)
        drawing += tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, stroke=COLORS[1])
        drawing += tag("text", f"{limit:g}", x=at - 4, y=TOP + 10, text_anchor="end")
    return figure(title, drawing, "users")


# ---- Figures as files: panels side by side
#
# A panel shows measured values with their intervals. Values from elsewhere are marks, drawn as
# diamonds.


PANEL_TITLE, BAR = 26, 13  # heights
LABELS, VALUES = 170, 44  # widths of the columns left and right of the bars


class Panel(NamedTuple):
    """One plot of a figure."""

    markup: str
    height: float


def _dot(x: float, y: float, color: str) -> str:
    return tag("circle", cx=round(x, 1), cy=round(y, 1), r=3, fill=color)


def _diamond(x: float, y: float, color: str) -> str:
    x, y = round(x, 1), round(y, 1)
    path = f"M{x - 5},{y} L{x},{y - 5} L{x + 5},{y} L{x},{y + 5} Z"
    return tag("path", d=path, fill="var(--card)", stroke=color, stroke_width=1.5)


def _interval(x1: float, x2: float, y1: float, y2: float, color: str) -> str:
    places = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    places = {name: round(value, 1) for name, value in places.items()}
    return tag("line", **places, stroke=color, stroke_width=1.2)


def line_panel(
    x_name: str,
    series: Sequence[str],
    values: dict[tuple, Point],
    marks: dict[tuple, float],
    log: bool = False,
) -> Panel:
    """Return a panel with a line per series; values and marks: by (x, series); log: of x."""
    xs = [x for x, _ in (*values, *marks)]
    ys = [y for _, low, high in values.values() for y in (low, high)]
    drawing, x_of, y_of = axes(xs, [*ys, *marks.values()], x_name, log)
    for i, (name, color) in enumerate(zip(series, COLORS, strict=False)):
        # Shifted a little, so that series do not hide each other's intervals.
        aside = 6 * (i - (len(series) - 1) / 2)
        own = {x: point for (x, of), point in values.items() if of == name}
        points = sorted((x_of(x) + aside, *map(y_of, point)) for x, point in own.items())
        path = " ".join(f"{x:.1f},{mean:.1f}" for x, mean, _, _ in points)
        drawing += tag("polyline", points=path, fill="none", stroke=color, stroke_width=2)
        for x, mean, low, high in points:
            drawing += _interval(x, x, low, high, color) + _dot(x, mean, color)
        for (x, of), y in marks.items():
            if of == name:
                drawing += _diamond(x_of(x) + aside, y_of(y), color)
    return Panel(drawing, HEIGHT)


def bar_panel(
    series: Sequence[str], values: dict[tuple, Point], marks: dict[tuple, float]
) -> Panel:
    """Return a panel with bars in groups, one per series; values and marks: by (group, series)."""
    groups = list(dict.fromkeys(group for group, _ in (*values, *marks)))
    highest = max(*(high for _, _, high in values.values()), *marks.values(), 0)
    x_ticks, step = ticks(0, highest), BAR * len(series) + 8
    x_of, bottom = scale(x_ticks, LABELS, WIDTH - VALUES), TOP + step * len(groups)
    drawing = ""
    for x in x_ticks:
        drawing += tag("line", x1=x_of(x), x2=x_of(x), y1=TOP, y2=bottom, class_="axis")
        drawing += tag("text", f"{x:g}", x=x_of(x), y=bottom + 16, text_anchor="middle")

    for row, group in enumerate(groups):
        top = TOP + step * row + 4
        label = escape(group if len(group) < 26 else "…" + group[-24:])
        y = top + (step - 8) / 2 + 4
        drawing += tag("text", label, x=LABELS - 6, y=y, text_anchor="end")
        for i, (name, color) in enumerate(zip(series, COLORS, strict=False)):
            y = top + BAR * i + BAR / 2
            if point := values.get((group, name)):
                drawing += _bar(point, y, x_of, color)
            if (group, name) in marks:
                drawing += _diamond(x_of(marks[group, name]), y, color)
    return Panel(drawing, bottom + 24)


def _bar(point: Point, y: float, x_of: Callable[[float], float], color: str) -> str:
    """Return a bar centered at y, with its interval and the mean as a number."""
    mean, low, high = point
    size = {"x": LABELS, "y": y - BAR / 2 + 1, "width": x_of(mean) - LABELS, "height": BAR - 2}
    bar = tag("rect", **size, fill=color, fill_opacity=0.7)
    number = tag("text", f"{mean:.3f}", x=WIDTH - VALUES + 8, y=y + 4)
    return bar + _interval(x_of(low), x_of(high), y, y, "var(--ink)") + number


def svg_file(
    title: str, panels: dict[str, Panel], columns: int, series: Sequence[str], mark: str
) -> str:
    """Return an SVG file: a key to series and marks, then the panels, which come by title.

    mark: what the marks mean; empty if there are none.
    """
    parts, y = [_key(series, mark)], PANEL_TITLE
    cells = list(panels.items())
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        for column, (name, panel) in enumerate(row):
            heading = tag("text", escape(name), x=LEFT, y=16, font_weight="bold")
            inner = tag("g", panel.markup, transform=f"translate(0,{PANEL_TITLE - TOP})")
            parts.append(tag("g", heading + inner, transform=f"translate({column * WIDTH},{y})"))
        y += max(panel.height for _, panel in row) + PANEL_TITLE

    size = {"width": columns * WIDTH, "height": round(y)}
    head = tag("title", escape(title)) + tag("style", COLORS_AND_TEXT)
    head += tag("rect", **size, fill="var(--card)")
    frame = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {size['width']} {size['height']}",
        "role": "img",
    }
    return tag("svg", head + "".join(parts), **size, **frame) + "\n"


def _key(series: Sequence[str], mark: str) -> str:
    """Return the key: the colors, if there are several, and the mark."""
    signs = []
    if len(series) > 1:
        signs += [(name, _dot, color) for name, color in zip(series, COLORS, strict=False)]
    if mark:
        signs.append((mark, _diamond, "var(--faint)"))
    markup, x = "", 12.0
    for name, sign, color in signs:
        y = PANEL_TITLE
        markup += sign(x, y - 8, color) + tag("text", escape(name), x=x + 10, y=y - 4)
        x += 34 + 7 * len(name)
    return markup
