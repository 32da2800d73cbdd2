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
