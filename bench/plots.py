"""Time and extra memory against N, on log axes, from the suite "memory" of bench_head.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOTS = {  # suffix of the file -> (key of a row, label, unit)
    "time": ("seconds", "time of a step, ms", 1e-3),
    "memory": ("extra_bytes", "extra memory, MiB", 2**20),
}


def curves(results: list[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """Return {name: [(N, value)] by N} of the suite "memory" with a trained head.

    Rows without a measurement are left out.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in results:
        if entry["suite"] == "memory" and entry["head"] == "trained":
            for row in entry["table"]:
                if row.get(key) is not None and "reason" not in row:
                    found.setdefault(row["name"], []).append((entry["rows"], row[key]))
    return {name: sorted(points) for name, points in found.items()}


def files(result: Path) -> list[Path]:
    """Return the paths of a result's plots, written or not."""
    return [result.with_name(f"{result.stem}_{suffix}.png") for suffix in PLOTS]


def draw(report: dict[str, Any], result: Path) -> list[Path]:
    """Write the PNG files of the suite "memory" beside the result, and return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for file, (key, label, unit) in zip(files(result), PLOTS.values(), strict=True):
        lines = curves(report["results"], key)
        if not lines:
            continue
        first = next(entry for entry in report["results"] if entry["suite"] == "memory")
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        for name, points in lines.items():
            style = {"marker": "o", "markersize": 4}
            if name == "bare mm":
                style = {"color": "black", "linestyle": ":"}
            width = 2.4 if name.startswith("una_fast") else 1.2
            rows, values = zip(*points, strict=True)
            values = [value / unit for value in values]
            axes.plot(rows, values, label=name, lw=width, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rows N (policy + reference, one pair, head trained)")
        axes.set_ylabel(label)
        machine = report["environment"].get("gpu", "CPU")
        axes.set_title(f"D {first['dim']}, V {first['vocab']}, {machine}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        figure.savefig(file, dpi=130, metadata={"Software": None})
        plt.close(figure)
        written.append(file)
    return written
