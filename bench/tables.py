"""Regenerate the tables of README.md, and the plots, from the results in bench/results/.

python bench/tables.py                 # write them
python bench/tables.py --check         # exit status 1 if README.md does not match the results
python bench/tables.py --merge FILES   # parts of one GPU's results -> bench/results/head_gpu.json or step_gpu.json
python bench/tables.py --show FILE     # the tables of a GPU's result, or of steps, to stdout

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


def pivot(
    entries: list[dict[str, Any]], cell: Callable[[dict[str, Any], dict[str, Any]], str | None]
) -> str:
    """A line per entry, a column per contender; reasons below. cell(row, entry): its text."""
    names = list(dict.fromkeys(row["name"] for entry in entries for row in entry["table"]))
    rows = [(row, entry) for entry in entries for row in entry["table"]]
    names = [
        name
        for name in names
        if any(r["name"] == name and ("reason" in r or cell(r, e)) for r, e in rows)
    ]
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
            text = (
                ("OOM" if reason == "out of memory" else "–")
                if reason
                else (row and cell(row, entry)) or ""
            )
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
    rate = (
        f"{row['tflops']:.0f} TF/s" if row["name"] == "bare mm" else f"{row['times bare mm']:.2f}"
    )
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
        cells = [
            next((cell(row) for row in e["table"] if row["name"] == name), "") for e in entries
        ]
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
    accuracy, forward = (
        [e for e in report["results"] if e["suite"] == suite] for suite in ("accuracy", "forward")
    )
    if accuracy:
        parts.append(
            "Largest error against float64, target logits around 24: sum over a response of 8192 tokens, nat / one "
            "token, nat / gradient of the hidden states, relative:\n\n"
            + pivot(accuracy, error_cell)
        )
    if forward:
        rows = forward[0]["rows"]
        parts.append(
            f"Forward only, {rows} rows; row kernels by block x warps:\n\n" + forward_table(forward)
        )
    bars = [(entry, bar) for entry in report["results"] for bar in entry.get("bars", [])]
    missed = [f"{label(e)}, {b['contender']}: {b['bar']} {number(b['found'])} > {b['allowed']:.2f}" for e, b in bars
              if not b["held"]]  # fmt: skip
    verdict = f"{len(bars) - len(missed)} of {len(bars)} bars held." + "".join(
        f"\n- {line}" for line in missed
    )
    roof = report.get("ceilings", {})
    rates = ", ".join(
        f"{key} {value:.4g}" for key, value in roof.items() if isinstance(value, float)
    )
    return (
        f"One pair unless said otherwise, policy + reference, forward + backward, bf16 on {where.get('gpu', 'a CPU')} "
        f"(torch {where['torch']}, triton {where.get('triton')}, TRL {where['trl']}, Liger {where.get('liger-kernel')}"
        f", CCE {where.get('cut-cross-entropy')}, QuACK {where.get('quack-kernels')}; {rates}; `{name}`).\n\n"
        + "\n\n".join([*parts, verdict])
    )


# ------------------------------------------------------------------------------------------------------------- steps

STEP_TABLES = {  # suites -> what they are
    ("equal",): "Pairs of one length, nothing to share",
    ("ragged",): "Pairs of many lengths, several per forward: packed here, padded there",
    ("shared16", "shared64"): "A long prompt, encoded once here and twice there",
}


def step_label(entry: dict[str, Any]) -> str:
    depth = (
        ""
        if entry["layers"] == entry["full_layers"]
        else f", {entry['layers']} of {entry['full_layers']} layers"
    )
    lora = " LoRA" if entry["lora"] else " full"
    cap = f", {entry['memory_cap']:g} GiB" if entry["memory_cap"] else ""
    return f"{entry['label']}{depth},{lora}, {entry['mode']}{cap}: {entry['layout']}"


def step_lines(entries: list[dict[str, Any]]) -> str:
    """A line for every contender: time, rates, memory, loss, and the ratio to TRL."""
    lines = [
        "| model, training, reference: prompt + response | | seconds (spread) | tokens/s | row tokens | TFLOP/s (MFU) "
        "| peak, GiB | loss | × TRL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        for k, row in enumerate(entry["table"]):
            cells = [
                step_label(entry) if k == 0 else "",
                f"**{row['name']}**" if k == 0 else row["name"],
            ]
            if "reason" in row:
                cells += [row["reason"], *[""] * 6]
            else:
                ratio = f"{row['x trl']:.2f}" if "x trl" in row else ""
                mfu = f" ({row['mfu']:.0%})" if "mfu" in row else ""
                cells += [
                    f"{row['seconds']:.3g} ({row['spread']:.0%})",
                    f"{row['tokens_per_s']:.0f}",
                ]
                cells += [
                    str(row["row_tokens"]),
                    f"{row['tflops']:.3g}{mfu}",
                    f"{row['peak_bytes'] / 2**30:.3g}",
                ]
                cells += [f"{row['loss']:.4f}" + ("" if entry["parity"] else " (alone)"), ratio]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def longest_lines(entries: list[dict[str, Any]]) -> str:
    lines = [
        "| model, training, reference: layout | | tokens per sequence | tokens per forward | seconds | peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        for k, row in enumerate(entry["table"]):
            cells = [
                step_label(entry) if k == 0 else "",
                f"**{row['name']}**" if k == 0 else row["name"],
            ]
            if "reason" in row:
                cells += [row["reason"], "", "", ""]
            else:
                more = "≥ " if row.get("unfinished") else ""
                cells += [f"{more}{row['sequence_tokens']}", str(row["row_tokens"])]
                cells += [f"{row['seconds']:.3g}", f"{row['peak_bytes'] / 2**30:.3g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def extrapolated_lines(lines: list[dict[str, Any]]) -> str:
    found = []
    for line in lines:
        what = f"{line['label']}, {line['suite']}, {line['layout']}, {line['mode']}"
        cells = ", ".join(
            f"{row['name']} {row['extrapolated_seconds']:.3g} s" for row in line["table"]
        )
        found.append(
            f"- {what}, {line['full_layers']} layers from {' and '.join(map(str, line['from_layers']))}: {cells}"
        )
    return "\n".join(found)


def step_table(report: dict[str, Any], name: str) -> str:
    """Separate tables for pairs of one length, of many, and with a shared prompt; then how long a sequence may be."""
    where, cpu, results = (
        report["environment"],
        "gpu" not in report["environment"],
        report["results"],
    )
    parts = []
    for suites, title in STEP_TABLES.items():
        entries = [entry for entry in results if entry["suite"] in suites]
        if entries:
            parts.append(f"{title}:\n\n{step_lines(entries)}")
    if lines := report.get("extrapolated"):
        parts.append(
            f"Extrapolated to full depth along a line through two depths, not measured:\n\n{extrapolated_lines(lines)}"
        )
    if entries := [entry for entry in results if entry["suite"] == "maxlen"]:
        parts.append(
            f"The longest sequence (prompt + response) of a pair that trains, by search:\n\n{longest_lines(entries)}"
        )
    if entries := [entry for entry in results if entry["suite"] == "long"]:
        parts.append(
            f"Long rows, una_fast alone, one step (the second where all weights are trained):\n\n{step_lines(entries)}"
        )
    bars = [(entry, bar) for entry in results for bar in entry["bars"]]
    missed = [
        f"\n- {step_label(e)}: {b['bar']} {number(b['found'])} < {b['least']:.2f}"
        for e, b in bars
        if not b["held"]
    ]
    if bars:
        parts.append(f"{len(bars) - len(missed)} of {len(bars)} bars held." + "".join(missed))
    machine = (
        f"{where['threads']} CPU threads" if cpu else f"{where['gpu']} (driver {where['driver']})"
    )
    times = "the fastest step" if cpu else "medians"
    memory = (
        "what a step allocates beyond weights and optimizer state"
        if cpu
        else "all that is allocated"
    )
    return (
        f"Whole optimizer steps of random weights, {times} of alternating turns, the same losses and gradient norms on "
        f"both sides, on {machine} (torch {where['torch']}, triton {where.get('triton')}, transformers "
        f"{where['transformers']}, TRL {where['trl']}, Liger {where.get('liger-kernel')}, flash-attn "
        f"{where.get('flash-attn')}; `{name}`, made by `{where['command']}`). tokens/s and flop count every response "
        "as a sequence of its own, without padding and recomputation, so that a prompt encoded once may show more than "
        f"100 % MFU (of {report['peak']['source']}). Memory: {memory}.\n\n" + "\n\n".join(parts)
    )


NO_GPU = "No GPU has run it yet: `bench/GPU_TODO.md` says what is to be measured, how, and what is predicted."


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def merge(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One report of several parts, measured on one kind of GPU with the same sources."""
    first, *others = list(reports)
    merged = {**first, "results": list(first["results"]), "parts": [first["environment"]]}
    for other in others:
        kinds = [("kind", first.get("kind"), other.get("kind"))]
        for name in ("gpu", "torch", "sources"):
            kinds.append((name, *(part["environment"].get(name) for part in (first, other))))
        for name, mine, theirs in kinds:
            if mine != theirs:
                raise ValueError(
                    f"parts of different {name} are not one result: {mine} and {theirs}"
                )
        merged["results"] += other["results"]
        if "extrapolated" in other:
            merged["extrapolated"] = merged.get("extrapolated", []) + other["extrapolated"]
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
    step_cpu, step_gpu = (f"bench/results/step_{device}.json" for device in ("cpu", "gpu"))
    if (root / step_cpu).exists():
        found["step"] = lambda: step_table(read(root / step_cpu), step_cpu)
    found["step_gpu"] = lambda: (
        step_table(read(root / step_gpu), step_gpu) if (root / step_gpu).exists() else NO_GPU
    )
    return found


def any_table(report: dict[str, Any], name: str) -> str:
    return (step_table if report.get("kind") == "step" else gpu_table)(report, name)


def regenerate(text: str, root: Path = ROOT) -> str:
    for name, make in tables(root).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- end bench:{name} -->"
        if name != "head" and begin not in text:
            continue
        assert begin in text and end in text, f"README.md has no {begin} ... {end}"
        body = f"{begin}\n\n{make()}\n\n{end}"
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, body=body: body,
            text,
            flags=re.DOTALL,
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--show", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.show:
        print(any_table(read(arguments.show), arguments.show.name))
        return 0
    gpu, readme = ROOT / "bench/results/head_gpu.json", ROOT / "README.md"
    if arguments.merge:
        merged = merge(map(read, arguments.merge))
        target = gpu.with_stem("step_gpu") if merged.get("kind") == "step" else gpu
        target.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
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
