"""Regenerate the tables of README.md, and the plots, from the results in bench/results/.

python bench/tables.py                 # write them
python bench/tables.py --check         # exit status 1 if README.md does not match the results
python bench/tables.py --merge FILES   # parts of one GPU's results -> bench/results/head_gpu.json
python bench/tables.py --show FILE     # the GPU tables of a result, to stdout

A table stands between <!-- bench:NAME --> and <!-- end bench:NAME -->; without a result file, or markers, it is left
out (but for the CPU's).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import plots

ROOT = Path(__file__).resolve().parents[1]
GPU_SUITES = ("peers", "bars", "memory", "layouts", "slices")  # of the same work the first is shown
MODELS = {(4096, 128256): "Llama-3-8B", (4096, 151936): "Qwen3-8B", (2048, 151936): "Qwen3-1.7B",
          (1152, 262144): "gemma-3-1b"}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def head_table(result: Path, name: str) -> str:
    """The CPU comparison of bench_head.py. name: of the result, as README gives it."""
    report = read(result)
    where = report["environment"]
    lines = [
        "| rows, hidden, vocabulary | | seconds | × bare GEMMs | head passes | extra memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["results"]:
        if entry.get("suite", "cpu") != "cpu":
            continue
        for k, row in enumerate(entry["table"]):
            shape = f"{row['rows']}, {row['dim']}, {row['vocab']}" if k == 0 else ""
            who = f"**{row['name']}**" if row["name"] == "una_fast" else row["name"]
            if "reason" in row:
                cells = (shape, who, row["reason"], "", "", "")
            else:
                extra = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
                times = f"{row['seconds']:.2f}", f"{row['times bare mm']:.2f}"
                cells = (shape, who, *times, f"{row['passes']:.0f}", extra)
            lines.append(f"| {' | '.join(cells)} |")
    return (
        f"One pair, policy + reference, forward + backward, fp32 on {where['threads']} CPU threads (torch "
        f"{where['torch']}, TRL {where['trl']}; the minimum of alternating "
        "runs; TRL in tiles of 32768 vocabulary entries, as its trainers call it; "
        f"`{name}`, made by `{where['command']}`):\n\n" + "\n".join(lines)
    )


# -------------------------------------------------------------------------------------------------------------- GPU


def label(entry: dict[str, Any]) -> str:
    model = MODELS.get((entry["dim"], entry["vocab"]), f"{entry['dim']} x {entry['vocab']}")
    layout = "" if entry["responses"] == 2 else f" in {entry['responses']}"
    return f"{model}, {entry['rows']}{layout}, {entry['head']}"


def pivot(entries: list[dict[str, Any]], cell: Callable[[dict[str, Any], dict[str, Any]], str | None]) -> str:
    """A line per entry, a column per contender; reasons below. cell(row, entry): its text."""
    names = list(dict.fromkeys(row["name"] for entry in entries for row in entry["table"]))
    rows = [(row, entry) for entry in entries for row in entry["table"]]
    names = [name for name in names if any(r["name"] == name and ("reason" in r or cell(r, e)) for r, e in rows)]
    lines = [f"| model, N, head | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    notes: dict[str, None] = {}
    for entry in entries:
        by_name = {row["name"]: row for row in entry["table"]}
        cells = []
        for name in names:
            row = by_name.get(name, {})
            reason = row.get("reason")
            if reason and reason != "out of memory":
                notes[f"{name}: {reason}"] = None
            text = ("OOM" if reason == "out of memory" else "–") if reason else (row and cell(row, entry)) or ""
            cells.append(f"**{text}**" if text and name.startswith("una_fast") else text)
        lines.append(f"| {label(entry)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "".join(f"\n\n– {note}" for note in notes)


def timed(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries to show, one for each work; of the memory suite only the longest."""
    longest = max((e["rows"] for e in report["results"] if e["suite"] == "memory"), default=0)
    found: dict[tuple, dict[str, Any]] = {}
    for suite in GPU_SUITES:
        for entry in report["results"]:
            if entry["suite"] == suite and (suite != "memory" or entry["rows"] == longest):
                key = tuple(entry[name] for name in ("rows", "responses", "dim", "vocab", "head"))
                found.setdefault(key, entry)
    return list(found.values())


def time_cell(row: dict[str, Any], entry: dict[str, Any]) -> str | None:
    if "seconds" not in row:
        return None
    mark = "*" if row["name"] == "bare mm" and not entry["reference"]["valid"] else ""
    rate = f"{row['tflops']:.0f} TF/s" if row["name"] == "bare mm" else f"{row['times bare mm']:.2f}"
    return f"{row['seconds'] * 1e3:.1f} ({rate}){mark}"


def memory_cell(row: dict[str, Any], _: dict[str, Any]) -> str | None:
    return f"{row['extra_bytes'] / 2**30:.2f}" if "extra_bytes" in row else None


def error_cell(row: dict[str, Any], _: dict[str, Any]) -> str | None:
    if "sum_error" not in row:
        return None
    token = f"{row['logp_error']:.1g}" if "logp_error" in row else "–"
    return f"{row['sum_error']:.2g} / {token} / {row['hidden_grad_error']:.1e}"


def forward_table(entries: list[dict[str, Any]]) -> str:
    """A line per way or kernel, a column per model."""

    def cell(row: dict[str, Any]) -> str:
        if "reason" in row:
            return row["reason"]
        rate = f"{row['tflops']:.0f} TF/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
        return f"{row['seconds'] * 1e3:.2f} ms, {rate}"

    models = [MODELS.get((e["dim"], e["vocab"]), f"{e['dim']} x {e['vocab']}") for e in entries]
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for name in dict.fromkeys(row["name"] for entry in entries for row in entry["table"]):
        cells = [next((cell(row) for row in e["table"] if row["name"] == name), "") for e in entries]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table(report: dict[str, Any], name: str) -> str:
    """Time, memory, accuracy and the ways to a log-prob, as far as the report has them."""
    where, shown, parts = report["environment"], timed(report), []
    if shown:
        spread = [row["spread"] for entry in shown for row in entry["table"] if "spread" in row]
        parts.append(
            "Milliseconds of a step (× the bare cuBLAS products of the minimal passes; those with their rate, * below "
            f"90 % of an 8192³ product's). Medians of alternating runs, interquartile range at most "
            f"{max(spread, default=0):.1%}. quack ce is cross entropy alone, beside its own minimal passes:\n\n"
            + pivot(shown, time_cell)
        )
        parts.append(
            "Extra memory, GiB (peak beyond inputs, returned gradients and, with a trained head, one fp32 "
            "accumulator of the head's gradient):\n\n" + pivot(shown, memory_cell)
        )
    accuracy, forward = ([e for e in report["results"] if e["suite"] == suite] for suite in ("accuracy", "forward"))
    if accuracy:
        parts.append(
            "Largest error against float64, target logits around 24: sum over a response of 8192 tokens, nat / one "
            "token, nat / gradient of the hidden states, relative:\n\n" + pivot(accuracy, error_cell)
        )
    if forward:
        rows = forward[0]["rows"]
        parts.append(f"Forward only, {rows} rows; row kernels by block x warps:\n\n" + forward_table(forward))
    bars = [(entry, bar) for entry in report["results"] for bar in entry.get("bars", [])]
    missed = [f"{label(e)}, {b['contender']}: {b['bar']} {number(b['found'])} > {b['allowed']:.2f}" for e, b in bars
              if not b["held"]]  # fmt: skip
    verdict = f"{len(bars) - len(missed)} of {len(bars)} bars held." + "".join(f"\n- {line}" for line in missed)
    roof = report.get("ceilings", {})
    rates = ", ".join(f"{key} {value:.4g}" for key, value in roof.items() if isinstance(value, float))
    return (
        f"One pair unless said otherwise, policy + reference, forward + backward, bf16 on {where.get('gpu', 'a CPU')} "
        f"(torch {where['torch']}, triton {where.get('triton')}, TRL {where['trl']}, Liger {where.get('liger-kernel')}"
        f", CCE {where.get('cut-cross-entropy')}, QuACK {where.get('quack-kernels')}; {rates}; `{name}`).\n\n"
        + "\n\n".join([*parts, verdict])
    )


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def merge(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One report of several parts, measured on one kind of GPU with the same sources."""
    first, *others = list(reports)
    merged = {**first, "results": list(first["results"]), "parts": [first["environment"]]}
    for other in others:
        for name in ("gpu", "torch", "sources"):
            mine, theirs = (part["environment"].get(name) for part in (first, other))
            if mine != theirs:
                raise ValueError(f"parts of different {name} are not one result: {mine} and {theirs}")
        merged["results"] += other["results"]
        merged["parts"].append(other["environment"])
    return merged


# ----------------------------------------------------------------------------------------------------------- README


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Marker -> text; of the results there are."""
    cpu, gpu = (f"bench/results/head_{device}.json" for device in ("cpu", "gpu"))

    def images(result: str) -> str:
        there = [path for path in plots.files(root / result) if path.exists()]
        return "\n".join(f"![{path.stem}]({path.relative_to(root)})" for path in there)

    found = {"head": lambda: f"{head_table(root / cpu, cpu)}\n\n{images(cpu)}".strip()}
    if (root / gpu).exists():
        found["head_gpu"] = lambda: f"{gpu_table(read(root / gpu), gpu)}\n\n{images(gpu)}".strip()
    return found


def regenerate(text: str, root: Path = ROOT) -> str:
    for name, make in tables(root).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- end bench:{name} -->"
        if name != "head" and begin not in text:
            continue
        assert begin in text and end in text, f"README.md has no {begin} ... {end}"
        body = f"{begin}\n\n{make()}\n\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--show", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.show:
        print(gpu_table(read(arguments.show), arguments.show.name))
        return 0
    gpu, readme = ROOT / "bench/results/head_gpu.json", ROOT / "README.md"
    if arguments.merge:
        gpu.write_text(json.dumps(merge(map(read, arguments.merge)), indent=1) + "\n", encoding="utf-8")
    text = readme.read_text(encoding="utf-8")
    if arguments.check:
        return int(regenerate(text) != text)
    for result in (gpu.with_stem("head_cpu"), gpu):
        if result.exists():
            plots.draw(read(result), result)
    readme.write_text(regenerate(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
