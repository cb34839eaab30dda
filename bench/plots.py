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
BEFORE, AFTER, PEER = "#9aa4b2", "#2563eb", "#9aa4b2"
PEERS = ("una_fast", "trl", "eager")


def draw_demo(demo: dict[str, Any], head: dict[str, Any], file: Path) -> None:
    """Write the picture on top of README: the demo before and after, and the loss beside peers.

    demo: report of demo_seeds.py
    head: report of bench_head.py, with the suite "real"
    file: a PNG
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (shares, texts, peers) = plt.subplots(
        1, 3, figsize=(14, 3.9), width_ratios=(4, 5, 3.4), layout="constrained"
    )
    _draw_shares(shares, [row for row in demo["results"] if row["kind"] == "records"])
    _draw_texts(texts, demo["texts"][SHOWN_QUESTION])
    (real,) = [e for e in head["results"] if e["suite"] == "real" and e["head"] == "trained"]
    _draw_peers(peers, real["table"])
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw_shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the means over seeds as bars, and every seed as a dot. rows: summaries"""
    for k, (label, colour) in enumerate((("before", BEFORE), ("after", AFTER))):
        for place, key in enumerate(DEMO_BARS):
            values = [100 * row[key][k] for row in rows]
            x = place + 0.38 * (k - 0.5)
            mean = sum(values) / len(values)
            axes.bar(x, mean, 0.36, color=colour, label=label if place == 0 else None)
            axes.plot([x] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(DEMO_BARS)), DEMO_BARS.values(), fontsize=8)
    axes.set_ylabel("per cent")
    axes.set_ylim(0, 100)
    axes.set_title(f"una-fast demo: held-out questions, {len(rows)} seeds", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_texts(axes: Any, text: dict[str, Any]) -> None:
    """Write a question and the answers to it."""
    axes.axis("off")
    before, after = text["answers"]
    blocks = (("question", text["prompt"]), ("before", before), ("after", after))
    height = 1.0
    for name, words in (*blocks, ("documentation", text["reference"])):
        lines = textwrap.wrap(" ".join(words.split()), 62)
        axes.text(0.0, height, name, weight="bold", fontsize=9.5, va="top")
        axes.text(0.0, height - 0.07, "\n".join(lines), fontsize=9.5, va="top")
        height -= 0.12 + 0.066 * len(lines)


def _draw_peers(axes: Any, table: list[dict[str, Any]]) -> None:
    """Draw time and extra memory of the loss as shares of the largest. table: of an entry"""
    rows = {row["name"]: row for row in table}
    measures = {
        "seconds": ("time", 1.0, "{:.1f} s"),
        "extra_bytes": ("memory", 2**20, "{:.0f} MiB"),
    }
    for place, (key, (_, unit, form)) in enumerate(measures.items()):
        most = max(rows[name][key] for name in PEERS)
        for k, name in enumerate(PEERS):
            value = rows[name][key]
            y = place + 0.27 * k
            axes.barh(y, value / most, 0.24, color=AFTER if name == "una_fast" else PEER)
            shown = f" {name} {form.format(value / unit)}"
            is_long = value / most > 0.6
            axes.text(
                0.02 if is_long else value / most,
                y,
                shown,
                va="center",
                fontsize=9,
                color="white" if is_long else "black",
            )
    axes.set_yticks([0.27, 1.27], [name for name, _, _ in measures.values()])
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_title("the loss of a pair on its hidden states", fontsize=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
