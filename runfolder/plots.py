"""Plots as SVG: those of a run's report, which stand in its page, and figures that are files of their own."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 52, 20, 12, 40  # of a plot, in its own units
COLORS_AND_TEXT = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1c1c1a; --faint: #6a6a64; --line: #dcdcd4;
  --a: #1f5fbf; --b: #b8481b; --c: #2c7a4b; --d: #8040a0; --good: #e3f1e6; }
@media (prefers-color-scheme: dark) { :root { --page: #161614; --card: #1f1f1d; --ink: #e9e9e4; --faint: #a2a29a;
  --line: #3a3a36; --a: #7fb0ff; --b: #ff9d70; --c: #7fd3a0; --d: #cf9bea; --good: #20382a; } }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
"""
COLORS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers that reach from low or below it to high or above it."""
    if low == high:
        low, high = min(low, 0), max(high, 0) or 1
    span = high - low
    power = 10.0 ** np.floor(np.log10(span / n))
    step = next(power * f for f in (1, 2, 5, 10) if span / (power * f) <= n)
    return [
        float(step * i) for i in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)
    ]


def tag(name: str, content: object = "", **attributes: object) -> str:
    """Return an element around content, which is markup; `text_anchor` stands for text-anchor, `class_` for class."""
    names = (key.rstrip("_").replace("_", "-") for key in attributes)
    options = "".join(
        f' {n}="{escape(str(value))}"' for n, value in zip(names, attributes.values(), strict=True)
    )
    return f"<{name}{options}>{content}</{name}>"


def axes(xs: Sequence[float], ys: Sequence[float], x_name: str) -> tuple[str, Callable, Callable]:
    """Return the axes' markup and the functions from x and y to the plot's units."""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def x_of(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1) * (HEIGHT - TOP - BOTTOM)
        )

    marks = [
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y_of(y), y2=y_of(y), class_="axis")
        for y in y_ticks
    ]
    marks += [tag("text", f"{y:g}", x=LEFT - 6, y=y_of(y) + 4, text_anchor="end") for y in y_ticks]
    marks += [
        tag("text", f"{x:g}", x=x_of(x), y=HEIGHT - BOTTOM + 16, text_anchor="middle")
        for x in x_ticks
    ]
    marks.append(
        tag(
            "text", escape(x_name), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"
        )
    )
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


def line_plot(
    title: str, x_name: str, y_name: str, lines: dict[str, list[tuple[float, float]]]
) -> str:
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


# ---- Figures that are files: panels side by side, with intervals and with values from elsewhere beside them


Point = tuple[float, float, float]  # mean, and the low and high end of its interval
PANEL_TITLE, LABELS, VALUES, BAR = (
    26,
    170,
    44,
    13,
)  # heights of a title and a bar, widths of what stands beside bars


def _value(x: float, y: float, color: str, r: int = 3) -> str:
    return tag("circle", cx=round(x, 1), cy=round(y, 1), r=r, fill=color)


def _mark(x: float, y: float, color: str) -> str:
    x, y = round(x, 1), round(y, 1)
    diamond = f"M{x - 5},{y} L{x},{y - 5} L{x + 5},{y} L{x},{y + 5} Z"
    return tag("path", d=diamond, fill="var(--card)", stroke=color, stroke_width=1.5)


def _interval(x1: float, x2: float, y1: float, y2: float, color: str) -> str:
    places = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return tag(
        "line", **{name: round(v, 1) for name, v in places.items()}, stroke=color, stroke_width=1.2
    )


def line_panel(x_name: str, series: Sequence[str], values: dict, marks: dict) -> tuple[str, float]:
    """Return (markup, height) of lines over numbers: values {(x, series): Point}, marks {(x, series): y}."""
    ys = [y for _, low, high in values.values() for y in (low, high)]
    drawing, x_of, y_of = axes([x for x, _ in (*values, *marks)], [*ys, *marks.values()], x_name)
    for i, (name, color) in enumerate(zip(series, COLORS, strict=False)):
        aside = 6 * (
            i - (len(series) - 1) / 2
        )  # so that one series does not hide another's interval
        own = sorted(
            (x_of(x) + aside, *map(y_of, point)) for (x, s), point in values.items() if s == name
        )
        path = " ".join(f"{x:.1f},{mean:.1f}" for x, mean, _, _ in own)
        drawing += tag("polyline", points=path, fill="none", stroke=color, stroke_width=2)
        for x, mean, low, high in own:
            drawing += _interval(x, x, low, high, color) + _value(x, mean, color)
        places = [(x_of(x) + aside, y_of(y)) for (x, s), y in marks.items() if s == name]
        drawing += "".join(_mark(x, y, color) for x, y in places)
    return drawing, HEIGHT


def bar_panel(series: Sequence[str], values: dict, marks: dict) -> tuple[str, float]:
    """Return (markup, height) of bars in groups: values {(group, series): Point}, marks {(group, series): x}."""
    groups = list(dict.fromkeys(group for group, _ in (*values, *marks)))
    x_ticks, step = (
        ticks(0, max(*(high for _, _, high in values.values()), *marks.values(), 0)),
        BAR * len(series) + 8,
    )
    bottom, drawing = TOP + step * len(groups), ""

    def x_of(x: float) -> float:
        return LABELS + x / x_ticks[-1] * (WIDTH - LABELS - VALUES)

    for x in x_ticks:
        drawing += tag("line", x1=x_of(x), x2=x_of(x), y1=TOP, y2=bottom, class_="axis")
        drawing += tag("text", f"{x:g}", x=x_of(x), y=bottom + 16, text_anchor="middle")
    for row, group in enumerate(groups):
        top = TOP + step * row + 4
        label = group if len(group) < 26 else "…" + group[-24:]
        drawing += tag(
            "text", escape(label), x=LABELS - 6, y=top + (step - 8) / 2 + 4, text_anchor="end"
        )
        for i, (name, color) in enumerate(zip(series, COLORS, strict=False)):
            y = top + BAR * i + BAR / 2
            if point := values.get((group, name)):
                size = {
                    "x": LABELS,
                    "y": y - BAR / 2 + 1,
                    "width": x_of(point[0]) - LABELS,
                    "height": BAR - 2,
                }
                drawing += tag("rect", **size, fill=color, fill_opacity=0.7)
                drawing += _interval(x_of(point[1]), x_of(point[2]), y, y, "var(--ink)")
                drawing += tag("text", f"{point[0]:.3f}", x=WIDTH - VALUES + 8, y=y + 4)
            if (group, name) in marks:
                drawing += _mark(x_of(marks[group, name]), y, color)
    return drawing, bottom + 24


def svg_file(
    title: str, panels: dict[str, tuple[str, float]], columns: int, series: Sequence[str], mark: str
) -> str:
    """Return an SVG file with panels, (markup, height) by title, in rows, under a key to the series and the marks."""
    names = [*zip(series, COLORS, strict=False)] if len(series) > 1 else []
    parts, x, y = [], 12.0, PANEL_TITLE
    for name, color in [*names, (mark, "var(--faint)")] if mark else names:
        sign = _mark if name == mark else _value
        parts.append(sign(x, y - 8, color) + tag("text", escape(name), x=x + 10, y=y - 4))
        x += 34 + 7 * len(name)
    cells = list(panels.items())
    for row in (cells[i : i + columns] for i in range(0, len(cells), columns)):
        for column, (name, (markup, _)) in enumerate(row):
            heading = tag("text", escape(name), x=LEFT, y=16, font_weight="bold")
            inner = tag("g", markup, transform=f"translate(0,{PANEL_TITLE - TOP})")
            parts.append(tag("g", heading + inner, transform=f"translate({column * WIDTH},{y})"))
        y += max(height for _, (_, height) in row) + PANEL_TITLE
    size = {"width": columns * WIDTH, "height": round(y)}
    head = (
        tag("title", escape(title))
        + tag("style", COLORS_AND_TEXT)
        + tag("rect", **size, fill="var(--card)")
    )
    frame = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {size['width']} {size['height']}",
        "role": "img",
    }
    return tag("svg", head + "".join(parts), **size, **frame) + "\n"
