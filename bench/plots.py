"""The pictures of README: time and memory of the head against N, and the demo before and after."""

from __future__ import annotations

import textwrap
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


DEMO_BARS = {  # key of a summary -> label
    "ended": "answers\nthat end",
    "one_sentence": "one\nsentence",
    "overlap": "words shared with\nthe documentation",
    "overlap_with_another": "... of another\nfunction",
}
SHOWN_QUESTION = 0  # of the kept texts


def draw_demo(report: dict[str, Any], file: Path) -> None:
    """Write a picture of the demo with records: shares before and after, and one question.

    report: of demo_seeds.py
    file: a PNG
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["results"] if row["kind"] == "records"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for k, (label, colour) in enumerate((("before", "#9aa4b2"), ("after", "#2563eb"))):
        for place, key in enumerate(DEMO_BARS):
            values = [100 * row[key][k] for row in rows]
            x = place + 0.38 * (k - 0.5)
            mean = sum(values) / len(values)
            left.bar(x, mean, 0.36, color=colour, label=label if place == 0 else None)
            left.plot([x] * len(values), values, "k.", markersize=4)
    left.set_xticks(range(len(DEMO_BARS)), DEMO_BARS.values(), fontsize=9)
    left.set_ylabel("per cent")
    left.set_ylim(0, 100)
    left.set_title(f"held-out questions, {len(rows)} seeds (dots)", fontsize=10)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    right.axis("off")
    text = report["texts"][SHOWN_QUESTION]
    blocks = [("question", text["prompt"]), ("before", text["answers"][0])]
    blocks += [("after", text["answers"][1]), ("documentation", text["reference"])]
    height = 1.0
    for name, words in blocks:
        lines = textwrap.wrap(" ".join(words.split()), 66)
        right.text(0.0, height, name, weight="bold", fontsize=9.5, va="top")
        right.text(0.0, height - 0.07, "\n".join(lines), fontsize=9.5, va="top")
        height -= 0.12 + 0.066 * len(lines)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)
