"""Charts as inline SVG: drawn by matplotlib, coloured by the style sheet of the page.

Colours of a drawing are placeholders, and become CSS variables: the same drawing serves the light
page, the dark page and the printed page. Texts stay texts. Invisible circles carry tooltips.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from una_fast.report.run_files import Series
from una_fast.report.settings import MOST_RUNS

SIZE = (4.4, 2.5)  # inches: 317 x 180 units of the drawing
MOST_POINTS = 480  # of a chart; longer series are thinned
LARGEST = 1e100  # larger values are not drawn: their axis would overflow
MOST_TOOLTIPS = 120  # of a chart

# Placeholders of colours, by the CSS variable that takes their place.
_INK, _GRID = "#fe0001", "#fe0002"
_COLOURS = tuple(f"#fe001{number}" for number in range(1, MOST_RUNS + 1))
_VARIABLES = {_INK: "ink-2", _GRID: "grid"} | {c: f"s{i}" for i, c in enumerate(_COLOURS, 1)}

_WIDTH = 1.6  # of a line
_DASHES = ((), (4, 2), (1, 1.5), (6, 2, 1, 2))  # stroke, gap, ... in widths of the line

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "una-fast",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "lines.linewidth": _WIDTH,
    "path.simplify": True,
}

_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    name: for tooltips
    x: [P] steps, or values of another metric
    y: [P] values; a NaN is a gap
    low, high: [P] bounds of the values behind a thinned point
    steps: [P] steps
    colour: number of the colour, from 0
    dash: number of the dash, from 0
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    steps: np.ndarray
    colour: int = 0
    dash: int = 0


def line_of(name: str, series: Series, *, points: int = MOST_POINTS) -> Line:
    """Return the line of a series over the steps.

    name: for tooltips
    series: values over the steps, not empty; infinities and NaN are gaps
    points: to thin the series to; a point is then the mean of neighbouring values, with the
        smallest and the largest
    """
    steps = sorted(series)
    values = np.array([series[step] for step in steps], dtype=np.float64)
    means, lows, highs, ends = [], [], [], []
    for where in np.array_split(np.arange(len(steps)), min(len(steps), points)):
        part = values[where]
        drawn = part[np.abs(part) < LARGEST]
        means.append(drawn.mean() if drawn.size else math.nan)
        lows.append(drawn.min(initial=means[-1]))
        highs.append(drawn.max(initial=means[-1]))
        ends.append(steps[where[-1]])
    x, y, low, high = (np.array(column, dtype=np.float64) for column in (ends, means, lows, highs))
    return Line(name, x, y, low, high, x)


def path_of(name: str, across: Series, up: Series, *, points: int = MOST_POINTS) -> Line:
    """Return the line of a series against another, over the steps of both; see `line_of`."""
    both = [step for step in across if step in up]
    x = line_of(name, {step: across[step] for step in both}, points=points)
    y = line_of(name, {step: up[step] for step in both}, points=points)
    return Line(name, x.y, y.y, y.y, y.y, x.steps)


def dash_array(dash: int) -> str:
    """Return the strokes and gaps of a dash for an SVG of a legend; empty for a whole line."""
    return " ".join(f"{_WIDTH * part:g}" for part in _DASHES[dash % len(_DASHES)])


def _line_style(dash: int) -> Any:
    """Return a dash as matplotlib has it."""
    pattern = _DASHES[dash % len(_DASHES)]
    return (0, pattern) if pattern else "-"


def draw(
    lines: Sequence[Line], *, label: str, x_label: str = "step", limit: float | None = None
) -> str:
    """Return a chart as an SVG element.

    lines: of the chart
    label: the chart in words, for readers who hear the page
    x_label: below the horizontal axis
    limit: a horizontal line across the chart
    """
    import matplotlib  # slow to load; pyplot is not needed, and would look for a screen
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style may ask for TeX
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=x_label == "step", min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if x_label == "step":
            axes.xaxis.set_major_formatter(_step_in_words)
        axes.set_xlabel(x_label)
        for line in lines:
            _draw_line(axes, line, band=0.3 / (1 + len(lines)))
        if limit is not None:
            axes.axhline(limit, color=_INK, linewidth=1, linestyle=_line_style(1))
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        tooltips = _tooltips(axes, lines)
    return _as_element(buffer.getvalue(), label, tooltips)


def _step_in_words(step: float, _: int) -> str:
    """Return a tick of the steps: 400, 20k, 1.5M."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"


def _draw_line(axes: Any, line: Line, *, band: float) -> None:
    """Draw a line, and the bounds as a band. band: opacity, from 0 to 1."""
    colour = _COLOURS[line.colour % MOST_RUNS]
    known = np.isfinite(line.x) & np.isfinite(line.y)
    axes.plot(line.x, line.y, color=colour, linestyle=_line_style(line.dash))
    if np.any(line.high > line.low):
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=band, linewidth=0)
    if known.sum() <= 24:  # a few points, or a single one, are seen as points
        axes.plot(line.x, line.y, ".", color=colour, markersize=5)
    elif known.any():
        last = np.flatnonzero(known)[-1]
        axes.plot(line.x[last], line.y[last], ".", color=colour, markersize=6)


def _tooltips(axes: Any, lines: Sequence[Line]) -> list[tuple[float, float, str]]:
    """Return (x, y, text) of the tooltips, in units of the drawing."""
    height = SIZE[1] * 72
    found = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
        share = max(MOST_TOOLTIPS // len(lines), 2)
        if len(known) > share:
            known = known[np.linspace(0, len(known) - 1, share).round().astype(int)]
        places = axes.transData.transform(np.column_stack([line.x[known], line.y[known]]))
        scale = 72 / axes.figure.dpi
        for index, (x, y) in zip(known, places * scale, strict=True):
            text = f"{line.name}: {line.y[index]:.4g} at step {line.steps[index]:,.0f}"
            found.append((x, height - y, text))
    return found


def _as_element(svg: str, label: str, tooltips: Sequence[tuple[float, float, str]]) -> str:
    """Return a drawing of matplotlib as an element of a page.

    The page decides on size and fonts. Ids of groups are dropped: several drawings share a page.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(svg)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label}
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _restyle(element)
    for x, y, text in tooltips:
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5", "class": "hit"}
        circle = ElementTree.SubElement(root, f"{{{_SVG}}}circle", place)
        ElementTree.SubElement(circle, f"{{{_SVG}}}title").text = text
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(element: ElementTree.Element) -> None:
    """Leave colours, fonts and the global style to the page."""
    if element.tag == f"{{{_SVG}}}style":
        element.text = ""
    if element.tag == f"{{{_SVG}}}g":
        element.attrib.pop("id", None)
    if "style" in element.attrib:
        # Older matplotlib writes size and family together.
        style = re.sub(r"\bfont: (\S+) [^;]*", r"font-size: \1", element.attrib["style"])
        parts = style.split(";")
        style = ";".join(part for part in parts if "font-family" not in part)
        for placeholder, variable in _VARIABLES.items():
            style = style.replace(placeholder, f"var(--{variable})")
        element.attrib["style"] = style
    if element.text and not element.text.strip():
        element.text = None
    if element.tail and not element.tail.strip():
        element.tail = None
