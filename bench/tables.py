"""Regenerate the tables of README.md and the recipes, and the plots, from bench/results/.

    python bench/tables.py                 # write all
    python bench/tables.py --check         # exit status 1 if a page does not match the results
    python bench/tables.py --merge FILES   # results of one GPU -> head_gpu.json or step_gpu.json
    python bench/tables.py --show FILE     # the tables of a GPU's result, or of steps, to stdout

A table stands between <!-- bench:NAME --> and <!-- end bench:NAME -->. A table without a result
file or markers is left out, but for the CPU's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import plots

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/recipes/README.md", "docs/embed/README.md")
GPU_SUITES = ("peers", "bars", "memory", "layouts", "slices")  # of the same work the first is shown
CPU_SUITES = {  # suite -> words behind the shape
    "cpu": "",
    "real": ", SmolLM2 on real text",
    "busy": ", beside two busy programs (medians)",
}
MODELS = {  # (hidden, vocabulary) -> name
    (4096, 128256): "Llama-3-8B",
    (4096, 151936): "Qwen3-8B",
    (2048, 151936): "Qwen3-1.7B",
    (1152, 262144): "gemma-3-1b",
}
Entry = dict[str, Any]
Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Read a stored report."""
    return json.loads(path.read_text(encoding="utf-8"))


def head_table(result: Path, name: str) -> str:
    """Return the CPU comparison of bench_head.py. name: of the result, as README gives the name."""
    report = read(result)
    where = report["environment"]
    lines = [
        "| rows, hidden, vocabulary | | seconds | × bare GEMMs | head passes | extra memory, MiB "
        "| error of the log-ratio, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for entry in report["results"]:
        if entry["suite"] in CPU_SUITES and entry["head"] == "trained":
            what = CPU_SUITES[entry["suite"]]
            table = enumerate(entry["table"])
            lines += [head_line(row, what if k == 0 else None) for k, row in table]
        if "tiles" in entry and not notes:
            notes.append(tiles_note(entry["tiles"]))
    machine = f"{where['threads']} CPU threads (torch {where['torch']}, TRL {where['trl']}"
    return (
        f"One pair, policy + reference, forward + backward, fp32 on {machine}; "
        "the minimum of alternating runs; "
        "TRL in tiles of 32768 vocabulary entries, as its trainers call it; "
        f"`{name}`, made by `{where['command']}`):\n\n" + "\n\n".join(["\n".join(lines), *notes])
    )


def tiles_note(tiles: dict[str, float]) -> str:
    """Say what a threshold on tiles of the softmax would leave out of a trained model's rows."""
    return (
        f"On real text {tiles['kept, ordered']:.0%} of the 128 × 128 tiles of the softmax hold an "
        f"entry above 2⁻¹², with entries ordered by their mean logit ({tiles['kept']:.0%} as they "
        f"come); the others hold {tiles['mass']:.2%} of a row's probability, at most "
        f"{tiles['largest mass']:.1%}. Cut-cross-entropy leaves such tiles out; una_fast computes "
        "all."
    )


def line_of(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head_line(row: Row, what: str | None) -> str:
    """Return the line of a contender.

    what: beside the shape, which the first contender of a table names; None for the others
    """
    shape = "" if what is None else f"{row['rows']}, {row['dim']}, {row['vocab']}{what}"
    name = f"**{row['name']}**" if row["name"] == "una_fast" else row["name"]
    if "reason" in row:
        return line_of((shape, name, row["reason"], "", "", "", ""))
    extra = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
    times = (f"{row['seconds']:.2f}", f"{row['times bare mm']:.2f}")
    error = f"{row['ratio_error']:.1e}" if "ratio_error" in row else ""
    return line_of((shape, name, *times, f"{row['passes']:.0f}", extra, error))


# ---------------------------------------------------------------------------------------------- GPU


def model_of(entry: Entry) -> str:
    """Return the name of the model with this head, or the head's sizes."""
    return MODELS.get((entry["dim"], entry["vocab"]), f"{entry['dim']} x {entry['vocab']}")


def label(entry: Entry) -> str:
    """Return the first cell of an entry's line."""
    layout = "" if entry["responses"] == 2 else f" in {entry['responses']}"
    return f"{model_of(entry)}, {entry['rows']}{layout}, {entry['head']}"


def names_in(entries: Iterable[Entry]) -> list[str]:
    """Return the names of all contenders, in the order of the tables."""
    rows = itertools.chain.from_iterable(entry["table"] for entry in entries)
    return list(dict.fromkeys(row["name"] for row in rows))


def pivot(entries: list[Entry], cell: Callable[[Row, Entry], str | None]) -> str:
    """Return a line per entry, a column per contender, and the reasons of failures below.

    entries: with the tables of the contenders
    cell: text of a row of an entry, None for an empty cell
    """
    shown = set()
    for entry in entries:
        shown |= {row["name"] for row in entry["table"] if "reason" in row or cell(row, entry)}
    names = [name for name in names_in(entries) if name in shown]
    lines = [line_of(("model, N, head", *names)), "|---" * (len(names) + 1) + "|"]
    notes: dict[str, None] = {}
    for entry in entries:
        by_name = {row["name"]: row for row in entry["table"]}
        cells = []
        for name in names:
            row = by_name.get(name, {})
            reason = row.get("reason")
            if not reason:
                text = (row and cell(row, entry)) or ""
            elif reason == "out of memory":
                text = "OOM"
            else:
                text = "–"
                notes[f"{name}: {reason}"] = None
            if text and name.startswith("una_fast"):
                text = f"**{text}**"
            cells.append(text)
        lines.append(line_of((label(entry), *cells)))
    return "\n".join(lines) + "".join(f"\n\n– {note}" for note in notes)


def of_suites(results: Iterable[Entry], *suites: str) -> list[Entry]:
    return [entry for entry in results if entry["suite"] in suites]


def timed(report: dict[str, Any]) -> list[Entry]:
    """Return the entries to show, one for each work; of the suite "memory" only the longest."""
    longest = max((e["rows"] for e in of_suites(report["results"], "memory")), default=0)
    found: dict[tuple, Entry] = {}
    for suite in GPU_SUITES:
        for entry in of_suites(report["results"], suite):
            if suite != "memory" or entry["rows"] == longest:
                key = tuple(entry[name] for name in ("rows", "responses", "dim", "vocab", "head"))
                found.setdefault(key, entry)
    return list(found.values())


def time_cell(row: Row, entry: Entry) -> str | None:
    """Return milliseconds, with the ratio to the bare products or the products' rate."""
    if "seconds" not in row:
        return None
    milliseconds = f"{row['seconds'] * 1e3:.1f}"
    if row["name"] != "bare mm":
        return f"{milliseconds} ({row['times bare mm']:.2f})"
    mark = "" if entry["reference"]["valid"] else "*"
    return f"{milliseconds} ({row['tflops']:.0f} TF/s){mark}"


def memory_cell(row: Row, _: Entry) -> str | None:
    """Return the extra memory in GiB."""
    return f"{row['extra_bytes'] / 2**30:.2f}" if "extra_bytes" in row else None


def error_cell(row: Row, _: Entry) -> str | None:
    """Return the errors of a sum, of a token, and of the gradient of the hidden states."""
    if "sum_error" not in row:
        return None
    token = f"{row['logp_error']:.1g}" if "logp_error" in row else "–"
    return f"{row['sum_error']:.2g} / {token} / {row['hidden_grad_error']:.1e}"


def forward_table(entries: list[Entry]) -> str:
    """Return a line per way or kernel, a column per model."""

    def cell(row: Row) -> str:
        if "reason" in row:
            return row["reason"]
        rate = f"{row['tflops']:.0f} TF/s" if "tflops" in row else f"{row['gb_per_s']:.0f} GB/s"
        return f"{row['seconds'] * 1e3:.2f} ms, {rate}"

    models = " | ".join(map(model_of, entries))
    lines = [f"| | {models} |", "|---" * (len(entries) + 1) + "|"]
    for name in names_in(entries):
        cells = []
        for entry in entries:
            rows = {row["name"]: row for row in entry["table"]}
            text = cell(rows[name]) if name in rows else ""
            cells.append(text)
        lines.append(line_of((name, *cells)))
    return "\n".join(lines)


def gpu_table(report: dict[str, Any], name: str) -> str:
    """Return time, memory, accuracy and the ways to a log-prob, as far as a report has them."""
    where, results = report["environment"], report["results"]
    shown = timed(report)
    accuracy, forward = of_suites(results, "accuracy"), of_suites(results, "forward")
    texts = []
    if shown:
        rows = itertools.chain.from_iterable(entry["table"] for entry in shown)
        spread = max((row["spread"] for row in rows if "spread" in row), default=0)
        texts.append(
            "Milliseconds of a step (× the bare cuBLAS products of the minimal passes; those with "
            "their rate, * below 90 % of an 8192³ product's). Medians of alternating runs, "
            f"interquartile range at most {spread:.1%}. quack ce is cross entropy alone, beside "
            "its own minimal passes:\n\n" + pivot(shown, time_cell)
        )
        texts.append(
            "Extra memory, GiB (peak beyond inputs, returned gradients and, with a trained head, "
            "one fp32 accumulator of the head's gradient):\n\n" + pivot(shown, memory_cell)
        )
    if accuracy:
        texts.append(
            "Largest error against float64, target logits around 24: sum over a response of 8192 "
            "tokens, nat / one token, nat / gradient of the hidden states, relative:\n\n"
            + pivot(accuracy, error_cell)
        )
    if forward:
        count = forward[0]["rows"]
        title = f"Forward only, {count} rows; row kernels by block x warps"
        texts.append(f"{title}:\n\n{forward_table(forward)}")
    texts.append(verdict(results, missed_ratio))
    roof = report.get("ceilings", {})
    rates = [f"{key} {value:.4g}" for key, value in roof.items() if isinstance(value, float)]
    peers = (
        f"torch {where['torch']}, triton {where.get('triton')}, TRL {where['trl']}, "
        f"Liger {where.get('liger-kernel')}, CCE {where.get('cut-cross-entropy')}, "
        f"QuACK {where.get('quack-kernels')}"
    )
    return (
        "One pair unless said otherwise, policy + reference, forward + backward, "
        f"bf16 on {where.get('gpu', 'a CPU')} ({peers}; {', '.join(rates)}; `{name}`).\n\n"
        + "\n\n".join(texts)
    )


def number(value: float | None) -> str:
    """Return a number in words of the tables."""
    return "not measured" if value is None else f"{value:.2f}"


def missed_ratio(entry: Entry, bar: dict[str, Any]) -> str:
    """Return the line of a missed bar of the head: the ratio is too large."""
    found = f"{bar['bar']} {number(bar['found'])} > {bar['allowed']:.2f}"
    return f"{label(entry)}, {bar['contender']}: {found}"


def verdict(results: list[Entry], line: Callable[[Entry, dict[str, Any]], str]) -> str:
    """Return how many bars were held, and a line for every missed bar."""
    missed = []
    count = 0
    for entry in results:
        bars = entry.get("bars", [])
        count += len(bars)
        missed += [f"\n- {line(entry, bar)}" for bar in bars if not bar["held"]]
    return f"{count - len(missed)} of {count} bars held." + "".join(missed)


# -------------------------------------------------------------------------------------------- steps

STEP_TABLES = {  # suites -> what they are
    ("equal",): "Pairs of one length, nothing to share",
    ("ragged",): "Pairs of many lengths, several per forward: packed here, padded there",
    ("shared16", "shared64"): "A long prompt, encoded once here and twice there",
}


def step_label(entry: Entry) -> str:
    """Return the first cell of a step's line."""
    depth = ""
    if entry["layers"] != entry["full_layers"]:
        depth = f", {entry['layers']} of {entry['full_layers']} layers"
    lora = " LoRA" if entry["lora"] else " full"
    cap = f", {entry['memory_cap']:g} GiB" if entry["memory_cap"] else ""
    return f"{entry['label']}{depth},{lora}, {entry['mode']}{cap}: {entry['layout']}"


def step_table_lines(
    entries: list[Entry], head: str, cells: Callable[[Row, Entry], list[str]]
) -> str:
    """Return a table with a line for every contender.

    entries: label the first line of their rows
    head: the first line of the table
    cells: texts of a row that was measured, without label and name
    """
    columns = head.count("|") - 1
    lines = [head, "|---" * columns + "|"]
    for entry in entries:
        for k, row in enumerate(entry["table"]):
            first = [step_label(entry), f"**{row['name']}**"] if k == 0 else ["", row["name"]]
            if "reason" in row:
                rest = [row["reason"], *[""] * (columns - 3)]
            else:
                rest = cells(row, entry)
            lines.append(line_of([*first, *rest]))
    return "\n".join(lines)


STEP_HEAD = (
    "| model, training, reference: prompt + response | | seconds (spread) | tokens/s "
    "| row tokens | TFLOP/s (MFU) | peak, GiB | loss | × TRL |"
)
LONGEST_HEAD = (
    "| model, training, reference: layout | | tokens per sequence | tokens per forward "
    "| seconds | peak, GiB |"
)


def step_cells(row: Row, entry: Entry) -> list[str]:
    """Return time, rates, memory, loss, and the ratio to TRL."""
    alone = "" if entry["parity"] else " (alone)"
    mfu = f" ({row['mfu']:.0%})" if "mfu" in row else ""
    ratio = f"{row['x trl']:.2f}" if "x trl" in row else ""
    return [
        f"{row['seconds']:.3g} ({row['spread']:.0%})",
        f"{row['tokens_per_s']:.0f}",
        str(row["row_tokens"]),
        f"{row['tflops']:.3g}{mfu}",
        f"{row['peak_bytes'] / 2**30:.3g}",
        f"{row['loss']:.4f}{alone}",
        ratio,
    ]


def longest_cells(row: Row, _: Entry) -> list[str]:
    """Return the longest sequence, with the time and the memory of a step."""
    at_least = "≥ " if row.get("unfinished") else ""
    return [
        f"{at_least}{row['sequence_tokens']}",
        str(row["row_tokens"]),
        f"{row['seconds']:.3g}",
        f"{row['peak_bytes'] / 2**30:.3g}",
    ]


def step_lines(entries: list[Entry]) -> str:
    return step_table_lines(entries, STEP_HEAD, step_cells)


def longest_lines(entries: list[Entry]) -> str:
    return step_table_lines(entries, LONGEST_HEAD, longest_cells)


def extrapolated_lines(lines: list[dict[str, Any]]) -> str:
    """Return a line for every case with its seconds at full depth."""
    found = []
    for line in lines:
        case = f"{line['label']}, {line['suite']}, {line['layout']}, {line['mode']}"
        cells = [f"{row['name']} {row['extrapolated_seconds']:.3g} s" for row in line["table"]]
        measured = " and ".join(map(str, line["from_layers"]))
        depths = f"{line['full_layers']} layers from {measured}"
        found.append(f"- {case}, {depths}: {', '.join(cells)}")
    return "\n".join(found)


def missed_rate(entry: Entry, bar: dict[str, Any]) -> str:
    """Return the line of a missed bar of a step: the rate is too small."""
    return f"{step_label(entry)}: {bar['bar']} {number(bar['found'])} < {bar['least']:.2f}"


def step_table(report: dict[str, Any], name: str) -> str:
    """Return a table for pairs of equal length, of many lengths, and with a shared prompt.

    Then the longest sequences, and long rows of una_fast alone.
    """
    where, results = report["environment"], report["results"]
    cpu = "gpu" not in where
    texts = []
    for suites, title in STEP_TABLES.items():
        entries = of_suites(results, *suites)
        if entries:
            texts.append(f"{title}:\n\n{step_lines(entries)}")
    extrapolated = report.get("extrapolated")
    if extrapolated:
        title = "Extrapolated to full depth along a line through two depths, not measured"
        texts.append(f"{title}:\n\n{extrapolated_lines(extrapolated)}")
    searched, long = of_suites(results, "maxlen"), of_suites(results, "long")
    if searched:
        title = "The longest sequence (prompt + response) of a pair that trains, by search"
        texts.append(f"{title}:\n\n{longest_lines(searched)}")
    if long:
        title = "Long rows, una_fast alone, one step (the second where all weights are trained)"
        texts.append(f"{title}:\n\n{step_lines(long)}")
    if any(entry["bars"] for entry in results):
        texts.append(verdict(results, missed_rate))
    if cpu:
        machine, times = f"{where['threads']} CPU threads", "the fastest step"
        memory = "what a step allocates beyond weights and optimizer state"
    else:
        machine, times = f"{where['gpu']} (driver {where['driver']})", "medians"
        memory = "all that is allocated"
    packages = (
        f"torch {where['torch']}, triton {where.get('triton')}, "
        f"transformers {where['transformers']}, TRL {where['trl']}, "
        f"Liger {where.get('liger-kernel')}, flash-attn {where.get('flash-attn')}"
    )
    return (
        f"Whole optimizer steps of random weights, {times} of alternating turns, the same losses "
        f"and gradient norms on both sides, on {machine} ({packages}; `{name}`, made by "
        f"`{where['command']}`). tokens/s and flop count every response as a sequence of its own, "
        "without padding and recomputation, so that a prompt encoded once may show more than "
        f"100 % MFU (of {report['peak']['source']}). Memory: {memory}.\n\n" + "\n\n".join(texts)
    )


# --------------------------------------------------------------------------------------------- demo

DEMO_LINES = {  # key of a summary -> (what it is, whether it is a share)
    "ended": ("answers that end within 64 tokens", True),
    "one_sentence": ("answers of one sentence", True),
    "all_three": ("one sentence, at most 20 words, the function's name", True),
    "words": ("words of an answer", False),
    "overlap": ("words shared with the documentation (F1)", True),
    "overlap_with_another": ("words shared with another function's", True),
    "names_function": ("answers with the function's name", True),
    "pair_accuracy": ("held-out pairs in the right order", True),
    "calibration_error": ("calibration error", True),
    "kl": ("KL, nats per answer", False),
}


def demo_table(report: dict[str, Any], name: str) -> str:
    """Return the numbers of the demo before and after, over seeds.

    report: of demo_seeds.py
    name: of the result, as README gives the name
    """
    where = report["environment"]
    of_kind = {"with records": "records", "online": "online"}
    lines = [line_of(("held-out questions", *of_kind)), "|---|---|---|"]
    for key, (what, is_share) in DEMO_LINES.items():
        cells = []
        for kind in of_kind.values():
            rows = [row for row in report["results"] if row["kind"] == kind and key in row]
            cells.append(before_after([row[key] for row in rows], is_share))
        if any(cells):
            lines.append(line_of((what, *cells)))
    seconds = []
    for kind in of_kind.values():
        times = [row["seconds"] for row in report["results"] if row["kind"] == kind]
        seconds.append(f"{min(times):.0f} – {max(times):.0f}" if times else "")
    lines.append(line_of(("seconds of the command", *seconds)))
    seeds = sorted({row["seed"] for row in report["results"]})
    return (
        f"Means over seeds {', '.join(map(str, seeds))} (smallest – largest), before → after, on "
        f"{where['threads']} CPU threads (torch {where['torch']}; `{name}`, made by "
        f"`{where['command']}`):\n\n" + "\n".join(lines)
    )


RECIPE_METRICS = {  # recipe -> metrics of its table
    "dpo": ("loss", "rewards/margins"),
    "mixed": ("loss", "una/calibration_error"),
    "online": ("reward", "kl"),
}


def recipes_table(report: dict[str, Any]) -> str:
    """Return the first and last numbers of the recipes. report: of recipes.py"""
    where = report["environment"]
    lines = [line_of(("recipe", "steps", "seconds", "first step → last")), "|---" * 4 + "|"]
    for row in report["results"]:
        shown = []
        for name in RECIPE_METRICS[row["name"]]:
            shown.append(f"{name} {row['first'][name]:.3f} → {row['last'][name]:.3f}")
        cells = (row["name"], str(row["steps"]), f"{row['seconds']:.0f}", ", ".join(shown))
        lines.append(line_of(cells))
    table = "\n".join(lines)
    return f"On {where['threads']} CPU threads (torch {where['torch']}):\n\n{table}"


def embed_table(report: dict[str, Any], name: str) -> str:
    """Return whole steps of TRL's trainer with its head and with ours.

    report: of bench_embed.py
    name: of its file
    """
    where = report["environment"]
    cells = ("model: prompt + response", "", "seconds (spread)", "× time", "MiB", "× memory")
    lines = [line_of(cells), "|---" * len(cells) + "|"]
    for case in dict.fromkeys(row["case"] for row in report["results"]):
        rows = [row for row in report["results"] if row["case"] == case]
        (ours,) = [row for row in rows if row["contender"] == "una_fast"]
        for k, row in enumerate(rows):
            kind = "LoRA" if row["lora"] else "full"
            size = f"{row['model']}, {kind}: {row['prompt']} + {row['response']}"
            label = row["contender"] if row is not ours else "**una_fast**"
            seconds = f"{row['seconds']:.3g} ({row['spread']:.0%})"
            times = f"{row['seconds'] / ours['seconds']:.2f}"
            memory = f"{row['peak_bytes'] / 2**20:.0f}"
            memories = f"{row['peak_bytes'] / ours['peak_bytes']:.2f}"
            lines.append(line_of((size if k == 0 else "", label, seconds, times, memory, memories)))
    table = "\n".join(lines)
    return (
        "Whole optimizer steps of TRL's `DPOTrainer` on one pair, with all of its metrics; the "
        "minimum of alternating steps, the same losses, and what a step allocates "
        f"({where['threads']} CPU thread, torch {where['torch']}, TRL {where['trl']}; `{name}`, "
        f"made by `{where['command']}`). *trl responses* is TRL told to score response positions "
        "alone, as it does on a GPU; on a CPU it scores every position. × time and × memory are "
        f"multiples of una_fast's.\n\n{table}"
    )


def install_note(report: dict[str, Any]) -> str:
    """Return what the first command installs. report: of install.py"""
    where = report["environment"]
    size, model = report["bytes"] / 1e9, report["model_bytes"] / 1e6
    return (
        f"The first command installs {size:.1f} GB, {model:.0f} MB of which are the model and most "
        f"of the rest torch and Triton (torch {where['torch']}, {report['seconds']:.0f} seconds "
        "beside a package index; `bench/results/install.json`, made by "
        f"`{where['command']}`)."
    )


def picture_note(demo: dict[str, Any], head: dict[str, Any]) -> str:
    """Return the caption of README's first picture.

    demo, head: reports of demo_seeds.py and bench_head.py
    """
    where, there = demo["environment"], head["environment"]
    rows = [row for row in demo["results"] if row["kind"] == "records"]
    times = [row["seconds"] for row in rows]
    (real,) = [e for e in head["results"] if e["suite"] == "real" and e["head"] == "trained"]
    seconds = f"{min(times):.0f} to {max(times):.0f} seconds"
    versions = f"torch {there['torch']}, TRL {there['trl']}"
    return (
        f"*Left: SmolLM2-135M-Instruct before and after `una-fast demo`: {len(rows)} seeds, 32 "
        f"held-out questions each, {seconds} on {where['threads']} CPU threads (torch "
        f"{where['torch']}); it learns the form of an answer, not facts. Right: forward and "
        f"backward of the loss of a pair of {real['rows']} tokens, policy and reference, fp32 on "
        f"{there['threads']} CPU threads ({versions}).*"
    )


def before_after(values: list[list[float | None]], is_share: bool) -> str:
    """Return "before → after (smallest – largest)" of [before, after] on several seeds; "" of none.

    values: a pair of numbers per seed
    is_share: shown in per cent
    """
    if not values:
        return ""

    def shown(number: float) -> str:
        return f"{100 * number:.0f} %" if is_share else f"{number:.1f}"

    firsts = [first for first, _ in values if first is not None]
    lasts = [last for _, last in values]
    spread = f"({shown(min(lasts))} – {shown(max(lasts))})"
    after = f"{shown(sum(lasts) / len(lasts))} {spread}"
    return f"{shown(sum(firsts) / len(firsts))} → {after}" if firsts else after


NO_GPU = (
    "No GPU has run it yet: `bench/GPU_TODO.md` says what is to be measured, how, "
    "and what is predicted."
)


def merge(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of several, measured on one kind of GPU with the same sources.

    Raises ValueError for reports of different kinds, GPUs, torch versions or sources.
    """
    first, *others = list(reports)
    merged = {**first, "results": list(first["results"]), "parts": [first["environment"]]}
    for other in others:
        kinds = [("kind", first.get("kind"), other.get("kind"))]
        for name in ("gpu", "torch", "sources"):
            kinds.append((name, first["environment"].get(name), other["environment"].get(name)))
        for name, mine, theirs in kinds:
            if mine != theirs:
                both = f"{mine} and {theirs}"
                raise ValueError(f"parts of different {name} are not one result: {both}")
        merged["results"] += other["results"]
        if "extrapolated" in other:
            merged["extrapolated"] = merged.get("extrapolated", []) + other["extrapolated"]
        merged["parts"].append(other["environment"])
    return merged


# ------------------------------------------------------------------------------------------- README


def tables(root: Path) -> dict[str, Callable[[], str]]:
    """Return {marker: function that makes the text}, of the results that exist."""
    cpu, gpu = (f"bench/results/head_{device}.json" for device in ("cpu", "gpu"))

    def images(result: str) -> str:
        drawn = [path for path in plots.files(root / result) if path.exists()]
        return "\n".join(f"![{path.stem}]({path.relative_to(root)})" for path in drawn)

    found = {"head": lambda: f"{head_table(root / cpu, cpu)}\n\n{images(cpu)}".strip()}
    if (root / gpu).exists():
        found["head_gpu"] = lambda: f"{gpu_table(read(root / gpu), gpu)}\n\n{images(gpu)}".strip()
    installed = root / "bench/results/install.json"
    if installed.exists():
        found["install"] = lambda: install_note(read(installed))
    recipes = root / "bench/results/recipes.json"
    if recipes.exists():
        found["recipes"] = lambda: recipes_table(read(recipes))
    embed = "bench/results/embed.json"
    if (root / embed).exists():
        found["embed"] = lambda: embed_table(read(root / embed), embed)
    demo = "bench/results/demo.json"
    if (root / demo).exists():
        picture = "![before and after](bench/results/demo.png)"
        found["demo_picture"] = lambda: (
            f"{picture}\n\n{picture_note(read(root / demo), read(root / cpu))}"
        )
        found["demo"] = lambda: demo_table(read(root / demo), demo)
    step_cpu, step_gpu = (f"bench/results/step_{device}.json" for device in ("cpu", "gpu"))
    if (root / step_cpu).exists():
        found["step"] = lambda: step_table(read(root / step_cpu), step_cpu)
    found["step_gpu"] = lambda: NO_GPU
    if (root / step_gpu).exists():
        found["step_gpu"] = lambda: step_table(read(root / step_gpu), step_gpu)
    return found


def any_table(report: dict[str, Any], name: str) -> str:
    """Return the tables of a report of steps, or of a GPU's report of the head."""
    make = step_table if report.get("kind") == "step" else gpu_table
    return make(report, name)


def regenerate(text: str, root: Path = ROOT, page: str = "README.md") -> str:
    """Return `text` with the tables of the results below `root` between the markers.

    page: of the text; README.md must have the table of the head
    """
    for name, make in tables(root).items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- end bench:{name} -->"
        if begin not in text and (name != "head" or page != "README.md"):
            continue
        assert begin in text and end in text, f"README.md has no {begin} ... {end}"
        body = f"{begin}\n\n{make()}\n\n{end}"
        marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = marked.sub(lambda _, body=body: body, text)
    return text


def main() -> int:
    """Write, check, merge or show the tables, and return the exit status."""
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
    gpu = ROOT / "bench/results/head_gpu.json"
    if arguments.merge:
        merged = merge(map(read, arguments.merge))
        target = gpu.with_stem("step_gpu") if merged.get("kind") == "step" else gpu
        target.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    if not arguments.check:
        draw_all(gpu)
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        new = regenerate(text, page=page)
        if new != text:
            stale.append(page)
        if not arguments.check:
            (ROOT / page).write_text(new, encoding="utf-8")
    return int(arguments.check and bool(stale))


def draw_all(gpu: Path) -> None:
    """Draw the pictures of the results that exist. gpu: results of the head on a GPU"""
    for result in (gpu.with_stem("head_cpu"), gpu):
        if result.exists():
            plots.draw(read(result), result)
    demo = ROOT / "bench/results/demo.json"
    if demo.exists():
        head = read(gpu.with_stem("head_cpu"))
        plots.draw_demo(read(demo), head, demo.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
