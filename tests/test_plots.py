"""runfolder/plots.py: scales that hold the values, and marks at their places."""

import re
import xml.etree.ElementTree as ET

import pytest

from runfolder import plots


def test_ticks_reach_around_the_values():
    for low, high in ((0, 1), (0.013, 0.0131), (3, 3), (0, 0), (-2, 7), (0, 12345), (1e-9, 2e-9)):
        found = plots.ticks(low, high)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 9 or low == high


def test_bars_intervals_and_the_paper_s_marks_are_on_one_scale():
    values = {("x", "a"): (0.5, 0.25, 1.0), ("y", "b"): (0.25, 0.25, 0.25)}
    marks = {("x", "a"): 0.5, ("z", "a"): 0.75}
    root = ET.fromstring(f"<g>{plots.bar_panel(['a', 'b'], values, marks).markup}</g>")
    widths = [float(bar.get("width")) for bar in root.iter("rect")]
    starts = [float(bar.get("x")) for bar in root.iter("rect")]
    tips = [float(re.match(r"M(\S+),", mark.get("d")).group(1)) + 5 for mark in root.iter("path")]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert tips == pytest.approx([starts[0] + widths[0], starts[0] + 1.5 * widths[0]], abs=0.1)
    line = next(line for line in root.iter("line") if line.get("class") is None)
    assert float(line.get("x2")) - starts[0] == pytest.approx(2 * widths[0], abs=0.1)


def test_a_line_goes_through_its_points():
    values = {(0, "a"): (0.2, 0.1, 0.3), (2, "a"): (0.4, 0.3, 0.5)}
    root = ET.fromstring(f"<g>{plots.line_panel('n', ['a'], values, {(2, 'a'): 0.4}).markup}</g>")
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert root.find("polyline").get("points") == " ".join(f"{x},{y}" for x, y in points)
    assert points[0][0] < points[1][0]
    assert points[0][1] > points[1][1]


def test_a_logarithmic_axis_has_its_marks_at_the_values():
    values = {(x, "a"): (0.5, 0.4, 0.6) for x in (256, 512, 2048)}
    panel = plots.line_panel("tokens", ["a"], values, {}, log=True)
    root = ET.fromstring(f"<g>{panel.markup}</g>")
    xs = [float(circle.get("cx")) for circle in root.iter("circle")]
    assert xs[2] - xs[1] == pytest.approx(2 * (xs[1] - xs[0]), abs=0.2)
    texts = {text.text: float(text.get("x")) for text in root.iter("text")}
    assert [texts[x] for x in ("256", "512", "2048")] == pytest.approx(xs, abs=0.1)


def test_each_of_six_series_has_a_color_of_its_own_in_both_modes():
    assert len(set(plots.COLORS)) == 6
    light, dark = plots.COLORS_AND_TEXT.split("prefers-color-scheme")
    for color in plots.COLORS:
        name = color.removeprefix("var(").removesuffix(")")
        assert f"{name}: #" in light
        assert f"{name}: #" in dark


def test_one_epoch_is_figures_and_two_are_a_line():
    once = plots.line_plot("Validation", "epoch", "recall", {"Recall@3": [(1, 0.25)]})
    assert "<td>0.2500</td>" in once
    assert "<svg" not in once
    twice = plots.line_plot("Validation", "epoch", "recall", {"Recall@3": [(1, 0.25), (2, 0.5)]})
    assert "polyline" in twice


def test_lengths_far_from_the_limit_fill_the_axis():
    far = plots.histogram("Prompts", "tokens", [400, 500, 450], 2048)
    assert ">2048<" not in far
    assert "the limit is 2048" in far
    places = [float(x) for x in re.findall(r'<rect x="([0-9.]+)"', far)]
    assert max(places) - min(places) > plots.WIDTH / 2
    near = plots.histogram("Prompts", "tokens", [400, 2000], 2048)
    assert ">2048</text>" in near


def test_bars_of_all_rows_have_their_intervals():
    rows = {"a": {"Recall@3": (0.5, 0.4, 0.6)}, "b": {"Recall@3": (0.25, 0.25, 0.25)}}
    root = ET.fromstring(re.search(r"<svg.*</svg>", plots.bar_plot("Recall", rows)).group())
    assert len(list(root.iter("rect"))) == 2
    assert {text.text for text in root.iter("text")} >= {"a", "b", "0.500", "0.250"}
