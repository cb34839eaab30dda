"""The picture of a result: a bar per contender for time, memory and the longest call."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, OTHERS = "#2563eb", "#9aa4b2"
PANEL_WIDTH, PANEL_HEIGHT = 3.6, 3.2  # inches
PANELS = (  # key of a row, title, unit
    ("seconds", "time of a step, ms", 1e-3),
    ("extra_bytes", "extra memory, MiB", 2**20),
    ("longest_rows", "longest call, tokens", 1),
    ("ratio_error", "error of the log-ratio, nats", 1),
)


def draw(table: Sequence[Mapping[str, Any]], title: str, file: Path) -> str | None:
    """Write the picture as PNG; return a reason without a picture.

    table: rows of the result
    title: above the panels
    file: to write
    """
    try:
        _draw(table, title, file)
    # Of any kind: the measurement before it is complete without a picture.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            return "matplotlib is not installed: pip install matplotlib"
        return f"{type(error).__name__}: {error}"
    return None


def _draw(table: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    keys = set().union(*table)
    panels = [panel for panel in PANELS if panel[0] in keys]
    figure = Figure(figsize=(PANEL_WIDTH * len(panels), PANEL_HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for panel, ax in zip(panels, axes.flat, strict=True):
        _draw_panel(ax, table, panel)
    # Paths of models hold what matplotlib would read as formulas.
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=9, parse_math=False)
    figure.savefig(file, dpi=130, metadata={"Software": None})


def _label(value: float) -> str:
    """Return a number for the end of a bar."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _draw_panel(ax: Any, table: Sequence[Mapping[str, Any]], panel: tuple[str, str, float]) -> None:
    """Draw the bars of a panel, the bare products as a line."""
    key, title, unit = panel
    bars = [row for row in table if key in row and row["name"] != "bare mm"]
    names = [row["name"] for row in bars][::-1]
    values = [row[key] / unit for row in bars][::-1]
    colors = [OURS if name.startswith("una_fast") else OTHERS for name in names]
    drawn = ax.barh(names, values, color=colors)
    ax.bar_label(drawn, labels=list(map(_label, values)), padding=2, fontsize=7)
    roofs = [row[key] for row in table if row["name"] == "bare mm" and key in row]
    for roof in roofs:
        ax.axvline(roof / unit, color="black", linestyle=":", linewidth=1)
        title += " (dotted: bare products)"
    ax.set_title(title, fontsize=9)
    ax.margins(x=0.2)
    ax.tick_params(labelsize=8)
