"""The fused head against its peers: time, memory and accuracy of the same work (contenders.py says which).

Everybody's loss, gradients and log-probs are compared with float64 before anything is timed; who is missing, wrong,
out of memory or too slow gets a row with the reason. Contenders and bare matrix products alternate in random order.

"bare mm" is the time of the matrix products the work cannot do without (2 N D V flop each): the logits of reference
and policy, dL/dh and, with a trained head, dL/dW. For each the fastest single torch.mm among chunks of 4096, 8192 and
N rows counts, scaled to N. Extra memory is the peak beyond inputs, returned gradients and, where a trained head is
narrower, one float32 [V, D] accumulator.

    python bench/bench_head.py --suite cpu,memory --out bench/results/head_cpu.json   # float32, minimum of the runs
    python bench/bench_head.py --shapes 64x32x1000                 # rows per response x hidden x vocabulary, no bars
    python bench/bench_head.py --suite bars,layouts --out FILE     # on a GPU: bfloat16, CUDA events, median
    pytest bench/bench_head.py --benchmark-only

Suites: cpu (default there), smoke (default on a GPU), bars (una_fast against the bare products), peers, accuracy,
memory (N up to 131072), layouts (many short responses), slices (workspaces that hold few rows of logits), forward (the
ways to a log-prob; row kernels), all.
Exit status: 1 if a bar is missed; 75 if a contender broke the GPU's context (run again with --resume).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import harness
import torch
from contenders import HEADS, Contender, Inputs, check, logp_errors, step, truth
from harness import GPU_LOST, DeviceLost, open_report, release, typical, write_report
from torch import Tensor

from una_fast.counters import FlopCounter, LiveBytes

# CPU shape (rows per response, hidden, vocabulary) -> largest allowed ratios
BARS = {
    (1024, 512, 32000): {"time / trl": 0.55, "time / eager": 1.15, "bytes / eager": 0.5},
    (512, 1024, 65536): {"time / trl": 0.80},
}
# hidden -> (head, workspace in MiB) -> largest allowed "time / bare mm" of one streamed pair on a GPU
TIME_BARS = {
    4096: {("trained", 2048): 1.15, ("trained", 512): 1.30, ("frozen", 512): 1.15},
    2048: {("trained", 2048): 1.25, ("trained", 512): 1.40, ("frozen", 512): 1.25},
    1152: {("trained", 2048): 1.45, ("trained", 512): 1.65, ("frozen", 512): 1.45},
}
PEER_BARS = {
    "trl": 1 / 1.3,
    "cce": 1 / 1.5,
    "liger": 1 / 2,
    "eager": 1.0,
    "torch.compile": 1.0,
}  # una_fast's time / its
MEMORY_BAR = 1.05  # extra memory / workspace
SUM_BAR = 0.02  # nat, error of a sum over 8192 tokens
VALID_REFERENCE = 0.9  # of the rate of an 8192^3 product
GEMM_ROWS = (4096, 8192)
CEILING = {"cuda": 8192, "cpu": 1024}

MODELS = {
    "llama3-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
    "qwen3-1.7b": (2048, 151936),
    "gemma3-1b": (1152, 262144),
}
SHAPES = [
    (4096, *MODELS["llama3-8b"]),
    (4096, *MODELS["qwen3-8b"]),
    (16384, *MODELS["qwen3-8b"]),
    (8192, *MODELS["qwen3-1.7b"]),
    (16384, *MODELS["gemma3-1b"]),
]


class Case(NamedTuple):
    """One set of inputs and what is asked of it. runs = 0: errors only. only, without: beginnings of names."""

    suite: str
    lengths: tuple[int, ...]
    dim: int
    vocab: int
    scores: bool = False
    heads: tuple[str, ...] = HEADS
    only: tuple[str, ...] = ("",)
    without: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()  # of "cpu", "time", "peers", "memory", "accuracy"
    runs: int = 20
    workspaces: tuple[int, ...] = ()  # MiB, instead of those of the command line

    @property
    def shape(self) -> tuple[int, int, int]:
        return (max(self.lengths), self.dim, self.vocab)


def pair(suite: str, shape: tuple[int, int, int], **options: Any) -> Case:
    return Case(suite, (shape[0], shape[0]), *shape[1:], **options)


def cases(suite: str, shapes: list[tuple[int, int, int]] | None, cpu: bool = False) -> list[Case]:
    heads, only = ("trained",), ("una_fast", "trl", "eager")  # on a CPU
    if suite == "cpu":
        return [
            pair(suite, s, heads=heads, only=only, bars=("cpu",), runs=5) for s in shapes or BARS
        ]
    if suite == "smoke":
        return [pair(suite, s, runs=3) for s in shapes or [(256, 512, 8192)]]
    if suite == "bars":
        return [
            pair(suite, s, only=("una_fast",), bars=("time", "memory")) for s in shapes or SHAPES
        ]
    if suite == "peers":
        return [pair(suite, s, bars=("peers", "memory")) for s in shapes or SHAPES]
    without = (
        "torch.compile",
        "quack",
    )  # compiled anew for every N, and as accurate as eager; no log-probs
    if suite == "accuracy":
        shapes = shapes or [(8192, *model) for model in MODELS.values()]
        return [
            pair(suite, s, heads=("trained",), without=without, bars=("accuracy",), runs=0)
            for s in shapes
        ]
    if suite == "memory" and cpu:
        return [
            pair(suite, s, heads=heads, only=only, runs=3)
            for s in shapes or [(128 << k, 512, 32000) for k in range(5)]
        ]
    if suite == "memory":
        shapes = shapes or [(2048 << k, *MODELS["llama3-8b"]) for k in range(6)]
        found = [pair(suite, s, without=without, bars=("memory",), runs=5) for s in shapes]
        return [*found[:-1], found[-1]._replace(bars=("time", "peers", "memory"), runs=3)]
    if suite == "slices":
        s = shapes[0] if shapes else (8192, *MODELS["llama3-8b"])
        return [pair(suite, s, only=("una_fast",), bars=("memory",), runs=10, workspaces=(64, 16))]
    assert suite == "layouts", suite
    dim, vocab = shapes[0][1:] if shapes else MODELS["llama3-8b"]
    longest = shapes[0][0] if shapes else 1000
    lengths = random.Random(0).choices(range(max(longest // 20, 1), longest + 1), k=64)
    pairs = Case(suite, (longest,) * 16, dim, vocab, without=without, bars=("memory",))
    return [pairs, pairs._replace(lengths=tuple(lengths), scores=True)]


# -------------------------------------------------------------------------------------------------------- measuring


def attempt(
    name: str, run: Callable[[], Any], x: Inputs | None = None, seconds: float | None = None
) -> tuple[Any, str | None]:
    """harness.attempt, leaving no gradients of x behind either."""

    def clean() -> None:
        if x is not None:
            x.clear()
        release()

    return harness.attempt(name, run, clean, seconds)


class Job(NamedTuple):
    """run(*prepare()) is what is timed."""

    prepare: Callable[[], tuple]
    run: Callable[..., Any]


def seconds_of(job: Job, device: torch.device) -> float:
    arguments = job.prepare()
    if device.type == "cpu":
        start = time.perf_counter()
        job.run(*arguments)
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job.run(*arguments)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def alternate(
    jobs: dict[Any, Job], runs: int, budget: float, device: torch.device, x: Inputs | None = None
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """(seconds of every run, reasons of those that failed). Random order, so that nobody always follows the same.

    budget: seconds after which no further round starts, but for the first three."""
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    failed: dict[Any, str] = {}
    shuffle, begin = random.Random(0).shuffle, time.perf_counter()
    for k in range(runs):
        if k >= 3 and time.perf_counter() - begin > budget:
            break
        order = [name for name in jobs if name not in failed]
        shuffle(order)
        for name in order:
            run = functools.partial(seconds_of, jobs[name], device)
            value, reason = attempt(str(name), run, x)
            if (
                reason == "out of memory"
            ):  # once more, with what the others left in the cache given back
                value, reason = attempt(str(name), run, x)
            if reason:
                failed[name] = reason
            else:
                times[name].append(value)
    return times, failed


def gemm_jobs(x: Inputs) -> dict[Any, Job]:
    """One torch.mm each, by (pass, rows), and "ceiling"."""
    weight, hidden, device = x.weight.detach(), x.hidden.detach(), x.device
    room = (
        torch.cuda.get_device_properties(device).total_memory // 8
        if device.type == "cuda"
        else 1 << 40
    )
    fits = room // (x.vocab * weight.element_size())
    counts = {rows for rows in (*GEMM_ROWS, x.rows) if rows <= min(x.rows, fits)} or {
        min(x.rows, fits)
    }

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a, b, out=out)

    def logits(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return hidden[:rows], weight.T, weight.new_empty(rows, x.vocab)

    def hidden_grad(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return hidden[:rows] @ weight.T, weight, weight.new_empty(rows, x.dim)

    def weight_grad(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return (hidden[:rows] @ weight.T).T, hidden[:rows], torch.empty_like(weight)

    passes = {"logits": logits, "hidden": hidden_grad} | (
        {"weight": weight_grad} if x.trained else {}
    )
    found: dict[Any, Job] = {
        (name, rows): Job(functools.partial(operands, rows), multiply)
        for name, operands in passes.items()
        for rows in sorted(counts)
    }
    return found | {"ceiling": ceiling_job(device, weight.dtype)}


def ceiling_job(device: torch.device, dtype: torch.dtype) -> Job:
    n = CEILING[device.type]
    square = torch.randn(n, n, device=device, dtype=dtype)
    return Job(
        lambda: (square, square.T, torch.empty_like(square)),
        lambda a, b, out: torch.mm(a, b, out=out),
    )


def reference(seconds: dict[tuple[str, int], float], rows: int, trained: bool) -> dict[str, Any]:
    """The bare products of the minimal passes over N rows. seconds: of one torch.mm, by (pass, rows of it)."""
    each: dict[str, float] = {}
    chunk: dict[str, int] = {}
    for (name, count), value in seconds.items():
        whole = value * rows / count
        if whole < each.get(name, float("inf")):
            each[name], chunk[name] = whole, count
    passes = ["logits", "logits", "hidden", *["weight"] * trained]
    return {
        "seconds": sum(each[name] for name in passes),
        "passes": len(passes),
        "each": each,
        "rows of mm": chunk,
    }


def alloc_retries(device: torch.device) -> int:
    """How often the caching allocator had to give memory back and ask again."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device.type == "cuda" else 0


def costs(contender: Contender, x: Inputs) -> dict[str, Any]:
    """Peak extra bytes of one step; on a CPU also the passes it really makes."""
    accumulator = 4 * x.weight.numel() if x.trained and x.weight.dtype != torch.float32 else 0
    if x.device.type == "cpu":
        with FlopCounter() as flop:
            step(contender, x)
        with LiveBytes() as memory:
            step(contender, x)
        extra = memory.peak(excluding=[leaf.grad for leaf in x.leaves.values()]) - accumulator
        return {"passes": flop.passes(x.rows, x.dim, x.vocab), "extra_bytes": extra}
    x.clear()
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(contender, x)
    torch.cuda.synchronize()
    returned = sum(leaf.grad.nbytes for leaf in x.leaves.values())
    return {"extra_bytes": torch.cuda.max_memory_allocated() - before - returned - accumulator}


def measure(
    case: Case, x: Inputs, true: contenders.Truth, entrants: list[Contender], options: Any
) -> dict[str, Any]:
    """One entry of the results: a table with a row for each entrant, then one for the bare products."""
    head = "trained" if x.trained else "frozen"
    names = [c.name for c in entrants]
    assert len(set(names)) == len(names), names
    common = {"rows": x.rows, "dim": x.dim, "vocab": x.vocab}
    entry = {
        "suite": case.suite,
        "shape": case.shape,
        "responses": len(x.lengths),
        "head": head,
        **common,
    }
    entry["dtype"] = str(x.weight.dtype).removeprefix("torch.")
    table = {
        c.name: {**common, "name": c.name, "passes": c.passes[head], "same_work": c.same_work}
        for c in entrants
    }
    ready = []
    for c in entrants:
        row = table[c.name]
        if isinstance(c, contenders.Una):
            row["workspace_mb"] = c.workspace_mb
        reason, found = options.lost.get(c.name) or c.unavailable(x), {}
        if not reason:
            found, reason = attempt(c.name, functools.partial(check, c, x, true), x, options.warmup)
        if not reason:
            row |= found
            found, reason = attempt(
                c.name, functools.partial(logp_errors, c, x, true), x, options.warmup
            )
        if not reason and case.runs:
            row |= found
            found, reason = attempt(c.name, functools.partial(costs, c, x), x)
        if reason:
            row["reason"] = reason
        else:
            row |= found
            ready.append(c)
        x.clear()
    if not case.runs:
        return entry | {"table": list(table.values())}

    def cleared() -> tuple:
        x.clear()
        return ()

    bare = gemm_jobs(x)
    jobs = bare | {c.name: Job(cleared, functools.partial(step, c, x)) for c in ready}
    retries = alloc_retries(x.device)
    _, failed = alternate(
        jobs, 1, options.seconds, x.device, x
    )  # warm-up: costs() gave the cache back
    times, late = alternate({name: jobs[name] for name in jobs if name not in failed}, options.runs or case.runs,
                            options.seconds, x.device, x)  # fmt: skip
    failed |= late
    best = {name: typical(values, x.device) for name, values in times.items() if name not in failed}
    ref = reference(
        {name: best[name] for name in bare if name in best and name != "ceiling"}, x.rows, x.trained
    )
    flop = 2 * x.rows * x.dim * x.vocab
    ref |= {"tflops": ref["passes"] * flop / ref["seconds"] / 1e12}
    ref |= {"ceiling_tflops": 2 * CEILING[x.device.type] ** 3 / best["ceiling"] / 1e12}
    ref |= {"valid": ref["tflops"] >= VALID_REFERENCE * ref["ceiling_tflops"]}
    ref |= {"alloc_retries": alloc_retries(x.device) - retries}  # each of them cost somebody time
    for c in ready:
        row = table[c.name]
        if c.name in failed:
            row["reason"] = failed[c.name]
            continue
        values = times[c.name]
        spread = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        own = ref["seconds"] - (0 if c.same_work else ref["each"]["logits"])
        row |= {
            "seconds": best[c.name],
            "quartiles": spread,
            "spread": (spread[2] - spread[0]) / best[c.name],
        }
        row |= {"times bare mm": best[c.name] / own}
        row |= {"tflops": row["passes"] * flop / best[c.name] / 1e12, "all_seconds": values}
    roof = {
        **common,
        "name": "bare mm",
        "seconds": ref["seconds"],
        "times bare mm": 1.0,
        "passes": ref["passes"],
    }
    return entry | {"reference": ref, "table": [*table.values(), roof | {"tflops": ref["tflops"]}]}


# ------------------------------------------------------------------------------------------------------------- bars


def ratios(ours: dict[str, Any], table: list[dict[str, Any]]) -> dict[str, float]:
    """What a bar may ask of a row of una_fast; a number that was not measured is missing."""
    found = {}
    others = {
        row["name"]: row
        for row in table
        if "workspace_mb" not in row and row.get("same_work", True)
    }
    for name, row in others.items():
        if "seconds" in ours and "seconds" in row:
            found[f"time / {name}"] = ours["seconds"] / row["seconds"]
    eager = others.get("eager", {})
    for key, name in (("extra_bytes", "bytes / eager"), ("hidden_grad_error", "hidden gradient error / eager"),
                      ("weight_grad_error", "weight gradient error / eager")):  # fmt: skip
        if key in ours and eager.get(key):
            found[name] = ours[key] / eager[key]
    if "extra_bytes" in ours and ours.get("workspace_mb"):
        found["bytes / workspace"] = ours["extra_bytes"] / (ours["workspace_mb"] * 2**20)
    if ours.get("sum_tokens") == 8192:
        found["error of 8192-token sums, nat"] = ours["sum_error"]
    return found


def allowed(case: Case, head: str, workspace_mb: int | None, first: bool) -> dict[str, float]:
    """The bars of a row of una_fast; those against peers are for the `first` alone."""
    bars: dict[str, float] = {}
    if "cpu" in case.bars:
        bars |= BARS.get(case.shape, {})
    if "time" in case.bars and (head, workspace_mb) in TIME_BARS.get(case.dim, {}):
        bars["time / bare mm"] = TIME_BARS[case.dim][head, workspace_mb]
    if "memory" in case.bars and workspace_mb:
        bars["bytes / workspace"] = MEMORY_BAR
    if "peers" in case.bars and first:
        bars |= {f"time / {peer}": ratio for peer, ratio in PEER_BARS.items()}
    if "accuracy" in case.bars:
        bars["error of 8192-token sums, nat"] = SUM_BAR
        if first:
            bars |= {f"{leaf} gradient error / eager": 1.0 for leaf in ("hidden", "weight")}
    return bars


def judge(case: Case, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with `ratios` of the first row of una_fast and `bars` of all.

    A bar against a peer that ran out of memory is held, against one that could not be measured missed, and against one
    that was not asked for left out. Against bare products on a GPU that were slower than they should be none is held:
    they flatter everything."""
    table, bars = entry["table"], []
    absent = set(PEER_BARS) - {row["name"] for row in table}
    full = {row["name"] for row in table if row.get("reason") == "out of memory"}
    ours = [row for row in table if "workspace_mb" in row]
    for k, row in enumerate(ours):
        found = ratios(row, table)
        for name, limit in allowed(case, entry["head"], row["workspace_mb"], k == 0).items():
            value, other = found.get(name), name.split(" / ")[-1]
            if other in absent:
                continue
            held = value <= limit if value is not None else "reason" not in row and other in full
            if other == "bare mm" and not entry.get("reference", {}).get("valid", True):
                held = False
            bars.append(
                {
                    "contender": row["name"],
                    "bar": name,
                    "allowed": limit,
                    "found": value,
                    "held": held,
                }
            )
    return entry | {"ratios": ratios(ours[0], table) if ours else {}, "bars": bars}


def show(entry: dict[str, Any], device: torch.device) -> None:
    print(f"\n{entry['suite']}: N {entry['rows']} in {entry['responses']}  D {entry['dim']}  V {entry['vocab']}  "
          f"{entry['head']}, {entry['dtype']}, policy + reference, forward + backward")  # fmt: skip
    columns = {  # head -> (key, format, divisor)
        "seconds": ("seconds", ".4f", 1),
        "spread %": ("spread", ".1f", 0.01),
        "x bare mm": ("times bare mm", ".2f", 1),
        "TF/s": ("tflops", ".1f", 1),
        "passes": ("passes", ".2f", 1),
        "extra MiB": ("extra_bytes", ".1f", 2**20),
        "grad err": ("hidden_grad_error", ".1e", 1),
        "logp err": ("logp_error", ".1e", 1),
        "sum err": ("sum_error", ".1e", 1),
    }
    print(f"{'':20}" + "".join(f"{head:>11}" for head in columns))
    for row in entry["table"]:
        if "reason" in row:
            print(f"{row['name']:20}  {row['reason']}")
            continue
        cells = (
            f"{row[key] / unit:{form}}" if key in row else ""
            for key, form, unit in columns.values()
        )
        print(f"{row['name']:20}" + "".join(f"{cell:>11}" for cell in cells))
    ref = entry.get("reference")
    if ref and not ref["valid"] and device.type == "cuda":
        share = ref["tflops"] / ref["ceiling_tflops"]
        print(
            f"  INVALID reference: {share:.0%} of an 8192^3 product's {ref['ceiling_tflops']:.0f} TF/s"
        )
    for bar in entry["bars"]:
        value = "not measured" if bar["found"] is None else f"{bar['found']:.3f}"
        verdict = "held  " if bar["held"] else "MISSED"
        print(f"  {verdict} {bar['contender']}: {bar['bar']} <= {bar['allowed']:.3f}: {value}")


# ---------------------------------------------------------------------------------------------------------- forward


def forward(dim: int, vocab: int, rows: int, device: torch.device, options: Any) -> dict[str, Any]:
    """Two ways to log-probs (a product into float32 logits and row_logps; linear_logps), then the row kernels alone."""
    from una_fast.kernels import logp_partials, rowgrad

    narrow = device.type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    x = Inputs((rows, rows), dim, vocab, device=device.type, dtype=dtype)
    hidden, weight, targets = x.hidden.detach()[:rows], x.weight.detach(), x.targets[:rows]
    u, coef = torch.empty(rows, vocab, device=device), torch.full((rows,), 1e-3, device=device)
    lse = torch.empty(rows, device=device)
    widen = {"out_dtype": torch.float32} if narrow else {}

    def logits() -> None:
        torch.mm(hidden, weight.T, out=u, **widen)

    def nothing() -> tuple:
        return ()

    def again() -> tuple:  # the row kernels write over their logits
        logits()
        lse.copy_(rowgrad.row_logps(u, targets)[0])
        return ()

    def blocked(block: int, warps: int, run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            before = dict(rowgrad.LAUNCH)
            rowgrad.LAUNCH.update(BLOCK=block, num_warps=warps)
            try:
                run()
            finally:
                rowgrad.LAUNCH.update(before)

        return call

    jobs = {
        "mm, float32 logits": Job(nothing, logits),
        "mm + row_logps": Job(nothing, lambda: (logits(), rowgrad.row_logps(u, targets))),
        "linear_logps": Job(nothing, lambda: logp_partials.linear_logps(hidden, weight, targets)),
    }
    kernels = {  # bytes per logit
        "row_logps": (4, lambda: rowgrad.row_logps(u, targets)),
        "row_grad": (
            4 + dtype.itemsize,
            lambda: rowgrad.row_grad(u, targets, coef, lse, dtype=dtype),
        ),
        "row_logps_grad": (
            8 + dtype.itemsize,
            lambda: rowgrad.row_logps_grad(u, targets, coef, dtype=dtype),
        ),
    }
    moved = {}
    for name, (size, run) in kernels.items():
        for block, warps in rowgrad.BLOCKS:
            key = f"{name}, {block} x {warps}"
            jobs[key], moved[key] = Job(again, blocked(block, warps, run)), size * rows * vocab
    failed = {}
    for name, job in jobs.items():
        _, reason = attempt(name, functools.partial(seconds_of, job, device), None, options.warmup)
        if reason:
            failed[name] = reason
    if "linear_logps" not in failed:
        logits()
        expected, found = (
            rowgrad.row_logps(u, targets),
            logp_partials.linear_logps(hidden, weight, targets),
        )
        error = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
        if not error <= 1e-3:
            failed["linear_logps"] = f"wrong result: {error:.1e} from row_logps"
    runnable = {name: job for name, job in jobs.items() if name not in failed}
    times, late = alternate(runnable, options.runs or 20, options.seconds, device)
    flop, table = 2 * rows * dim * vocab, []
    for name in jobs:
        reason = failed.get(name) or late.get(name)
        if reason:
            table.append({"name": name, "reason": reason})
            continue
        best = typical(times[name], device)
        rate = (
            {"gb_per_s": moved[name] / best / 1e9}
            if name in moved
            else {"tflops": flop / best / 1e12}
        )
        table.append({"name": name, "seconds": best, **rate})
    return {"suite": "forward", "shape": (rows, dim, vocab), "responses": 1, "head": "none", "rows": rows, "dim": dim,
            "vocab": vocab, "table": table, "bars": []}  # fmt: skip


def show_forward(entry: dict[str, Any]) -> None:
    print(f"\nforward: {entry['rows']} rows  D {entry['dim']}  V {entry['vocab']}")
    for row in entry["table"]:
        rate = (
            f"{row['tflops']:8.0f} TF/s"
            if "tflops" in row
            else f"{row.get('gb_per_s', 0):8.0f} GB/s"
        )
        print(
            f"{row['name']:28}"
            + (row["reason"] if "reason" in row else f"{row['seconds'] * 1e3:10.3f} ms {rate}")
        )


def ceilings(device: torch.device) -> dict[str, float]:
    """This machine's own rates: a square product, and a copy, bytes read and written."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(1 << (30 if device.type == "cuda" else 22), device=device, dtype=dtype)
    copy = Job(lambda: (torch.empty_like(source),), lambda out: out.copy_(source))
    times, failed = alternate({"gemm": ceiling_job(device, dtype), "copy": copy}, 12, 10, device)
    if failed:
        return failed
    best = {
        name: typical(values[2:], device) for name, values in times.items()
    }  # the first two warm up
    n = CEILING[device.type]
    return {"gemm_size": n, "gemm_tflops": 2 * n**3 / best["gemm"] / 1e12,
            "copy_tb_per_s": 2 * source.nbytes / best["copy"] / 1e12}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- main

SUITES = ("cpu", "smoke", "bars", "peers", "accuracy", "memory", "layouts", "slices", "forward")


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    shapes = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(
            "give rows-per-response x hidden x vocabulary, as in 1024x512x32000"
        )
    return shapes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--suite", help=f"of {', '.join(SUITES)} or all, comma-separated")
    parser.add_argument("--shapes", type=parse_shapes, help="instead of the suite's own")
    parser.add_argument(
        "--heads", help=f"of {', '.join(HEADS)}, comma-separated (default: the suite's own)"
    )
    parser.add_argument(
        "--contenders", help="beginnings of names, comma-separated (default: the suite's own)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU"
    )
    parser.add_argument(
        "--workspace", help="MiB, comma-separated; bars against peers ask the first (GPU: 2048,512)"
    )
    parser.add_argument("--engine", default="auto", help="of una_fast (default auto)")
    parser.add_argument("--runs", type=int, help="alternating runs (default: the suite's own)")
    parser.add_argument(
        "--seconds", type=float, default=15, help="per shape and head; no round starts later (15)"
    )
    parser.add_argument(
        "--warmup", type=float, default=90, help="seconds for a contender's first call (90)"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no shape starts"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads on a CPU (default 2)")
    parser.add_argument(
        "--out", type=Path, help="write the results there as JSON, after every shape and head"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the results of --out and go on behind them"
    )
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    suites = (options.suite or ("cpu" if cpu else "smoke")).split(",")
    options.suites = list(SUITES[1:]) if "all" in suites else suites
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no suite {sorted(unknown)}; there are {', '.join(SUITES)} and all")
    options.dtype = getattr(torch, options.dtype or ("float32" if cpu else "bfloat16"))
    text = options.workspace or ("" if cpu else "2048,512")
    options.workspaces = [int(part) for part in text.split(",")] if text else [None]
    options.only = tuple((options.contenders or "").split(","))
    options.lost = {}
    return options


def key_of(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("suite", "rows", "responses", "dim", "vocab", "head"))


def main(arguments: list[str] | None = None) -> int:
    options, begin = parse(arguments), time.perf_counter()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("una_fast").setLevel(logging.INFO)  # which engine, and what is slow
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    report = open_report(options.out, options.resume, device)
    options.lost = report.setdefault("lost", {})
    if "ceilings" not in report and device.type == "cuda":
        report["ceilings"] = ceilings(device)
        print(report["ceilings"], flush=True)

    def save(entry: dict[str, Any] | None = None) -> None:
        if entry is not None:
            report["results"].append(json.loads(json.dumps(entry)))
        write_report(report, options.out)

    done = {key_of(entry) for entry in report["results"]}
    late = 0
    try:
        for suite in options.suites:
            if suite == "forward":
                shapes = options.shapes or [(4096, *model) for model in MODELS.values()]
                for rows, dim, vocab in shapes:
                    if ("forward", rows, 1, dim, vocab, "none") in done:
                        continue
                    if time.perf_counter() - begin > options.budget:
                        late += 1
                        continue
                    entry, reason = attempt(
                        "forward", functools.partial(forward, dim, vocab, rows, device, options)
                    )
                    if reason:
                        print(f"\nforward, D {dim}: {reason}")
                    else:
                        show_forward(entry)
                        save(entry)
                continue
            for case in cases(suite, options.shapes, device.type == "cpu"):
                if time.perf_counter() - begin > options.budget:
                    late += 1
                    continue
                run_case(case, device, options, done, save)
    except DeviceLost as error:
        name, reason = error.args
        report["lost"][name] = f"broke the GPU's context: {reason}"
        save()
        print(f"\n{name} broke the GPU's context ({reason}): run again with --resume")
        return GPU_LOST
    if options.out:
        print(f"\nwrote {options.out}")
    if late:
        print(f"{late} shapes not measured within {options.budget:g} s")
    return int(
        late > 0 or not all(bar["held"] for entry in report["results"] for bar in entry["bars"])
    )


def run_case(
    case: Case,
    device: torch.device,
    options: Any,
    done: set[tuple],
    save: Callable[[dict[str, Any]], None],
) -> None:
    heads = [head for head in case.heads if not options.heads or head in options.heads.split(",")]
    common = (case.suite, sum(case.lengths), len(case.lengths), case.dim, case.vocab)
    heads = [head for head in heads if (*common, head) not in done]
    if not heads:
        return
    release()
    if device.type == "cuda":
        torch.compiler.reset()  # every shape is compiled for itself; the limit of recompilations is never met

    def inputs() -> tuple[Inputs, contenders.Truth]:
        x = Inputs(
            case.lengths,
            case.dim,
            case.vocab,
            scores=case.scores,
            device=device.type,
            dtype=options.dtype,
        )
        return x, truth(x)

    made, reason = attempt("inputs", inputs)
    if reason:
        print(f"\n{case.suite} {case.shape}: no inputs: {reason}")
        return
    x, true = made
    entrants = [
        c
        for c in contenders.everybody(case.workspaces or options.workspaces, options.engine)
        if c.name.startswith(case.only)
        and c.name.startswith(options.only)
        and not c.name.startswith(case.without)
    ]
    for head in heads:
        x.head(head)
        entry, reason = attempt(
            "bare mm", functools.partial(measure, case, x, true, entrants, options), x
        )
        if reason:
            print(f"\n{case.suite} {case.shape} {head}: {reason}")
            continue
        entry = judge(case, entry)
        show(entry, device)
        sys.stdout.flush()
        save(entry)


# ------------------------------------------------------------------------------------------------- pytest-benchmark


def pytest_generate_tests(metafunc: Any) -> None:
    if "contender" in metafunc.fixturenames:
        entrants = contenders.everybody([None])
        metafunc.parametrize("contender", entrants, ids=[c.name for c in entrants])
        metafunc.parametrize("head", HEADS)


def test_step(benchmark: Any, contender: Contender, head: str) -> None:
    """One small pair, forward and backward, on the device at hand."""
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    shape, dtype = (
        ((256, 256), 512, 8192) if cuda else ((64, 64), 64, 2000),
        torch.bfloat16 if cuda else torch.float32,
    )
    x = Inputs(*shape, device=device.type, dtype=dtype)
    x.head(head)
    if reason := contender.unavailable(x):
        pytest.skip(reason)
    benchmark.extra_info |= {
        "passes": contender.passes[head],
        **check(contender, x, truth(x)),
        **costs(contender, x),
    }

    def run() -> None:
        step(contender, x)
        if cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
