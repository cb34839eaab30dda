"""The fused head against its peers: time, memory and accuracy of the same work (contenders.py).

The loss, the gradients and the log-probs of every contender are compared with float64 before
anything is timed; a contender that is missing, wrong, out of memory or too slow gets a row with the
reason. Contenders and bare matrix products alternate in random order.

"bare mm" is the time of the matrix products that the work cannot do without (2 N D V flop each):
the logits of reference and policy, dL/dh and, with a trained head, dL/dW. The fastest single
torch.mm among chunks of 4096, 8192 and N rows counts for each product, scaled to N. Extra memory is
the peak beyond inputs, returned gradients and, where a trained head is narrower, one float32 [V, D]
accumulator.

    # on a CPU: float32, the minimum of the runs
    python bench/bench_head.py --suite cpu,real,busy,memory --out bench/results/head_cpu.json
    # rows per response x hidden x vocabulary, no bars
    python bench/bench_head.py --shapes 64x32x1000
    # on a GPU: bfloat16, CUDA events, the median
    python bench/bench_head.py --suite bars,layouts --out FILE
    pytest bench/bench_head.py --benchmark-only

Suites: cpu (default on a CPU), smoke (default on a GPU), bars (una_fast against the bare products),
peers, accuracy, memory (N up to 131072), layouts (many short responses), slices (workspaces that
hold few rows of logits), real (a trained model on real text: real_states.py), busy (beside two
programs that never wait; the median counts), forward (the ways to a log-prob; row kernels:
forward.py), all.
Exit status: 1 if a bar is missed; 75 if a contender broke the GPU's context (run again with
--resume).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import contenders
import harness
import real_states
from contenders import RealInputs
from forward import forward, show_forward
from una_fast.bench import attempts
from una_fast.bench.attempts import DeviceLost
from una_fast.bench.contenders import Contender, step
from una_fast.bench.inputs import HEADS, Inputs
from una_fast.bench.measuring import (
    Question,
    Rounds,
    cleaner,
    costs,
    examine,
    put_times,
    sizes_of,
    time_all,
)
from una_fast.bench.tables import Column
from una_fast.bench.timing import ceilings
from una_fast.bench.truth import Truth, check, logp_errors, truth

# CPU shape (rows per response, hidden, vocabulary) -> largest allowed ratios
BARS = {
    (1024, 512, 32000): {"time / bare mm": 1.15, "time / trl": 0.5, "bytes / eager": 0.5},
    (512, 1024, 65536): {"time / bare mm": 1.15, "time / trl": 0.7},
}
BUSY = 2  # programs beside a run of the suite "busy"
BUSY_BARS = {"time / trl": 0.6, "time / eager": 1.1}
# hidden -> (head, workspace in MiB) -> largest allowed "time / bare mm" of one streamed pair, GPU
TIME_BARS = {
    4096: {("trained", 2048): 1.15, ("trained", 512): 1.30, ("frozen", 512): 1.15},
    2048: {("trained", 2048): 1.25, ("trained", 512): 1.40, ("frozen", 512): 1.25},
    1152: {("trained", 2048): 1.45, ("trained", 512): 1.65, ("frozen", 512): 1.45},
}
# peer -> largest allowed ratio of una_fast's time to the peer's
PEER_BARS = {
    "trl": 1 / 1.3,
    "cce": 1 / 1.5,
    "liger": 1 / 2,
    "eager": 1.0,
    "torch.compile": 1.0,
}
MEMORY_BAR = 1.05  # extra memory / workspace
SUM_BAR = 0.02  # nat, error of a sum over 8192 tokens

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
Shape = tuple[int, int, int]  # rows per response, hidden, vocabulary
Entry = dict[str, Any]


class Case(NamedTuple):
    """One set of inputs and the questions asked of it.

    heads: of "trained", "frozen"
    only, without: beginnings of the names of contenders that take part, and that do not
    bars: of "cpu", "time", "peers", "memory", "accuracy"
    runs: timed rounds; 0 for errors only
    busy: programs beside the timed rounds, each of which takes a core
    workspaces: in MiB, in place of the command line's
    """

    suite: str
    lengths: tuple[int, ...]
    dim: int
    vocab: int
    scores: bool = False
    heads: tuple[str, ...] = HEADS
    only: tuple[str, ...] = ("",)
    without: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    runs: int = 20
    busy: int = 0
    workspaces: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        return (max(self.lengths), self.dim, self.vocab)


def pair(suite: str, shape: Shape, **options: Any) -> Case:
    """Return a case of two responses of equal length."""
    rows, dim, vocab = shape
    return Case(suite, (rows, rows), dim, vocab, **options)


def pairs(suite: str, shapes: list[Shape], **options: Any) -> list[Case]:
    return [pair(suite, shape, **options) for shape in shapes]


# Compiled anew for every N and as accurate as eager; without log-probs.
SLOW = ("torch.compile", "quack ce")
ON_CPU = {"heads": ("trained",), "only": ("una_fast", "trl", "eager")}


def cases(suite: str, shapes: list[Shape] | None = None, cpu: bool = False) -> list[Case]:
    """Return the cases of a suite; `shapes` stand in for the shapes of the suite."""
    if suite == "cpu":
        return pairs(suite, shapes or list(BARS), bars=("cpu",), runs=5, **ON_CPU)
    if suite == "busy":
        shapes = shapes or list(BARS)[:1]
        return pairs(suite, shapes, bars=("busy",), runs=7, busy=BUSY, **ON_CPU)
    if suite == "smoke":
        return pairs(suite, shapes or [(256, 512, 8192)], runs=3)
    if suite == "bars":
        return pairs(suite, shapes or SHAPES, only=("una_fast",), bars=("time", "memory"))
    if suite == "peers":
        return pairs(suite, shapes or SHAPES, bars=("peers", "memory"))
    if suite == "accuracy":
        shapes = shapes or [(8192, *model) for model in MODELS.values()]
        heads, bars = ("trained",), ("accuracy",)
        return pairs(suite, shapes, heads=heads, without=SLOW, bars=bars, runs=0)
    if suite == "memory" and cpu:
        shapes = shapes or [(128 << k, 512, 32000) for k in range(5)]
        return pairs(suite, shapes, runs=3, **ON_CPU)
    if suite == "memory":
        shapes = shapes or [(2048 << k, *MODELS["llama3-8b"]) for k in range(6)]
        *shorter, longest = pairs(suite, shapes, without=SLOW, bars=("memory",), runs=5)
        return [*shorter, longest._replace(bars=("time", "peers", "memory"), runs=3)]
    if suite == "slices":
        shape = shapes[0] if shapes else (8192, *MODELS["llama3-8b"])
        options = {"only": ("una_fast",), "bars": ("memory",), "runs": 10, "workspaces": (64, 16)}
        return [pair(suite, shape, **options)]
    if suite == "real":
        if reason := real_states.missing():
            print(f"\nreal: skipped, {reason}")
            return []
        only = ON_CPU["only"] if cpu else ("",)
        return [pair(suite, real_states.SHAPE, only=only, without=SLOW, runs=5)]
    assert suite == "layouts", suite
    longest, dim, vocab = shapes[0] if shapes else (1000, *MODELS["llama3-8b"])
    lengths = random.Random(0).choices(range(max(longest // 20, 1), longest + 1), k=64)
    equal = Case(suite, (longest,) * 16, dim, vocab, without=SLOW, bars=("memory",))
    return [equal, equal._replace(lengths=tuple(lengths), scores=True)]


# --------------------------------------------------------------------------------------- measuring


def measure(case: Case, x: Inputs, true: Truth, entrants: list[Contender], options: Any) -> Entry:
    """Return one entry of the results: a row for each entrant, then the row of the bare products.

    case: the bars and the number of runs
    x: the inputs, the head set to trained or frozen
    true: the float64 truth of x
    entrants: contenders with distinct names
    options: the command line's
    """
    head = "trained" if x.trained else "frozen"
    entry = {"suite": case.suite, "shape": case.shape, "responses": len(x.lengths), "head": head}
    entry |= sizes_of(x) | {"dtype": str(x.weight.dtype).removeprefix("torch.")}
    table = {}
    for c in entrants:
        assert c.name not in table, c.name
        row = sizes_of(x) | {"name": c.name, "passes": c.passes[head], "same_work": c.same_work}
        table[c.name] = row
    ready = []
    for c in entrants:
        questions = questions_of(c, case, x, true, options.warmup)
        if examine(c, table[c.name], x, questions, options.lost.get(c.name)):
            ready.append(c)
        options.note(table[c.name] | {"suite": case.suite, "head": head})
    if not case.runs:
        return entry | {"table": list(table.values())}
    rounds = Rounds(options.runs or case.runs, options.seconds, case.busy)
    with harness.busy_programs(case.busy):
        times = time_all(ready, x, rounds)
    ref, roof = put_times(table, ready, x, times)
    return entry | {"reference": ref, "table": [*table.values(), roof]}


def questions_of(
    contender: Contender, case: Case, x: Inputs, true: Truth, seconds: float
) -> list[Question]:
    """Return what is asked of a contender before its time is taken.

    contender, x, true: as in `measure`
    case: without timed runs costs are not asked
    seconds: of a contender's first call
    """
    found = [
        Question(functools.partial(check, contender, x, true), seconds),
        Question(functools.partial(logp_errors, contender, x, true), seconds),
    ]
    if case.runs:
        found.append(Question(functools.partial(costs, contender, x), 2 * seconds))
    return found


# -------------------------------------------------------------------------------------------- bars

AGAINST_EAGER = {  # key of a row -> name of the ratio to eager
    "extra_bytes": "bytes / eager",
    "hidden_grad_error": "hidden gradient error / eager",
    "weight_grad_error": "weight gradient error / eager",
}


def ratios(ours: dict[str, Any], table: list[dict[str, Any]]) -> dict[str, float]:
    """Return the numbers of a row of una_fast that bars ask for, as far as they were measured."""
    found = {}
    others = {}
    for row in table:
        if "workspace_mb" not in row and row.get("same_work", True):
            others[row["name"]] = row
    for name, row in others.items():
        if "seconds" in ours and "seconds" in row:
            found[f"time / {name}"] = ours["seconds"] / row["seconds"]
    eager = others.get("eager", {})
    for key, name in AGAINST_EAGER.items():
        if key in ours and eager.get(key):
            found[name] = ours[key] / eager[key]
    if "extra_bytes" in ours and ours.get("workspace_mb"):
        found["bytes / workspace"] = ours["extra_bytes"] / (ours["workspace_mb"] * 2**20)
    if ours.get("sum_tokens") == 8192:
        found["error of 8192-token sums, nat"] = ours["sum_error"]
    return found


def allowed(case: Case, head: str, workspace_mb: int | None, first: bool) -> dict[str, float]:
    """Return the bars of a row of una_fast; bars against peers are asked of the `first` row."""
    bars: dict[str, float] = {}
    if "cpu" in case.bars:
        bars |= BARS.get(case.shape, {})
    if "busy" in case.bars:
        bars |= BUSY_BARS
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


def judge(case: Case, entry: Entry) -> Entry:
    """Return the entry with `ratios` of the first row of una_fast and `bars` of all rows.

    A bar against a peer that ran out of memory is held, against a peer that could not be measured
    missed, and against a peer that was not asked for left out. A bar against bare products is
    missed where the products ran slower than a GPU should run them: slow products flatter all. On a
    CPU the square product fits the cache, and is no measure of theirs.
    """
    table, bars = entry["table"], []
    absent = set(PEER_BARS) - {row["name"] for row in table}
    full = {row["name"] for row in table if row.get("reason") == "out of memory"}
    ours = [row for row in table if "workspace_mb" in row]
    valid = "cpu" in case.bars or entry.get("reference", {}).get("valid", True)
    for k, row in enumerate(ours):
        found = ratios(row, table)
        for name, limit in allowed(case, entry["head"], row["workspace_mb"], k == 0).items():
            value, other = found.get(name), name.split(" / ")[-1]
            if other in absent:
                continue
            held = value <= limit if value is not None else "reason" not in row and other in full
            if other == "bare mm" and not valid:
                held = False
            bar = {"contender": row["name"], "bar": name, "allowed": limit}
            bars.append(bar | {"found": value, "held": held})
    return entry | {"ratios": ratios(ours[0], table) if ours else {}, "bars": bars}


COLUMNS = {
    "seconds": Column("seconds", ".4f"),
    "spread %": Column("spread", ".1f", 0.01),
    "x bare mm": Column("times bare mm", ".2f"),
    "TF/s": Column("tflops", ".1f"),
    "passes": Column("passes", ".2f"),
    "extra MiB": Column("extra_bytes", ".1f", 2**20),
    "grad err": Column("hidden_grad_error", ".1e"),
    "logp err": Column("logp_error", ".1e"),
    "sum err": Column("sum_error", ".1e"),
    "ratio err": Column("ratio_error", ".1e"),
}


def show(entry: Entry, device: torch.device) -> None:
    """Print an entry of the results and the verdicts on the entry's bars."""
    sizes = f"N {entry['rows']} in {entry['responses']}  D {entry['dim']}  V {entry['vocab']}"
    work = f"{entry['head']}, {entry['dtype']}, policy + reference, forward + backward"
    print(f"\n{entry['suite']}: {sizes}  {work}")
    harness.print_table(COLUMNS, entry["table"])
    if "tiles" in entry:
        tiles = entry["tiles"]
        print(
            f"  128 x 128 tiles of the softmax with an entry above 2^-12: {tiles['kept']:.1%}; "
            f"ordered by mean logit {tiles['kept, ordered']:.1%}, without {tiles['mass']:.2%} of a "
            f"row's mass (at most {tiles['largest mass']:.2%})"
        )
    ref = entry.get("reference")
    if ref and not ref["valid"] and device.type == "cuda":
        share = f"{ref['tflops'] / ref['ceiling_tflops']:.0%}"
        rate = f"{ref['ceiling_tflops']:.0f} TF/s"
        print(f"  INVALID reference: {share} of an 8192^3 product's {rate}")
    for bar in entry["bars"]:
        question = f"{bar['contender']}: {bar['bar']} <= {bar['allowed']:.3f}"
        harness.print_verdict(bar, question, digits=3)


# -------------------------------------------------------------------------------------------- main

SUITES = (
    "cpu",
    "smoke",
    "bars",
    "peers",
    "accuracy",
    "memory",
    "layouts",
    "slices",
    "real",
    "busy",
    "forward",
)


def parse_shapes(text: str) -> list[Shape]:
    """Read shapes such as 1024x512x32000, comma-separated."""
    shapes = [tuple(map(int, numbers.split("x"))) for numbers in text.split(",")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(
            "give rows-per-response x hidden x vocabulary, as in 1024x512x32000"
        )
    return shapes


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, device = found.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    own = "comma-separated (default: the suite's own)"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--suite", help=f"of {', '.join(SUITES)} or all, comma-separated")
    add("--shapes", type=parse_shapes, help="instead of the suite's own")
    add("--heads", help=f"of {', '.join(HEADS)}, {own}")
    add("--contenders", help=f"beginnings of names, {own}")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    workspace = "MiB, comma-separated; bars against peers ask the first (GPU: 2048,512)"
    add("--workspace", help=workspace)
    add("--engine", default="auto", help="of una_fast (default auto)")
    add("--runs", type=int, help="alternating runs (default: the suite's own)")
    seconds = "per shape and head; no round starts later (15)"
    add("--seconds", type=float, default=15, help=seconds)
    add("--warmup", type=float, default=90, help="seconds for a contender's first call (90)")
    budget = "seconds after which no shape starts"
    add("--budget", type=float, default=float("inf"), help=budget)
    add("--threads", type=int, default=2, help="CPU threads on a CPU (default 2)")
    out = "write the results there as JSON, after every shape and head"
    add("--out", type=Path, help=out)
    add("--resume", action="store_true", help="keep the results of --out and go on behind them")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options, with the defaults of the device filled in."""
    checked = parser()
    options = checked.parse_args(arguments)
    cpu = options.device == "cpu"
    suites = (options.suite or ("cpu" if cpu else "smoke")).split(",")
    options.suites = list(SUITES[1:]) if "all" in suites else suites
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        checked.error(f"no suite {unknown}; there are {', '.join(SUITES)} and all")
    options.dtype = getattr(torch, options.dtype or ("float32" if cpu else "bfloat16"))
    text = options.workspace or ("" if cpu else "2048,512")
    options.workspaces = [int(number) for number in text.split(",")] if text else [None]
    options.only = tuple((options.contenders or "").split(","))
    options.lost = {}
    options.note = lambda row: None
    return options


def key_of(entry: Entry) -> tuple:
    return tuple(entry[name] for name in ("suite", "rows", "responses", "dim", "vocab", "head"))


class Run:
    """A run of suites on a device: measures, prints and stores every entry that is not stored."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.begin = time.perf_counter()
        self.report = harness.open_report(options.out, options.resume, device)
        self.done = {key_of(entry) for entry in self.report["results"]}
        self.unmeasured = 0  # shapes for which no time was left
        options.lost = self.report.setdefault("lost", {})
        options.note = lambda row: harness.note(self.report, row, options.out)
        if "ceilings" not in self.report and device.type == "cuda":
            self.report["ceilings"] = ceilings(device)
            print(self.report["ceilings"], flush=True)

    def late(self) -> bool:
        """Return whether the budget is spent, and count the shape that is not measured then."""
        late = time.perf_counter() - self.begin > self.options.budget
        self.unmeasured += late
        return late

    def save(self, entry: Entry) -> None:
        self.report["results"].append(json.loads(json.dumps(entry)))
        self.report.pop("notes", None)  # the entry holds them
        harness.write_report(self.report, self.options.out)

    def run_suite(self, suite: str) -> None:
        if suite == "forward":
            shapes = self.options.shapes or [(4096, *model) for model in MODELS.values()]
            for shape in shapes:
                self.run_forward(*shape)
            return
        for case in cases(suite, self.options.shapes, self.device.type == "cpu"):
            if not self.late():
                self.run_case(case)

    def run_forward(self, rows: int, dim: int, vocab: int) -> None:
        if ("forward", rows, 1, dim, vocab, "none") in self.done or self.late():
            return
        run = functools.partial(forward, dim, vocab, rows, self.device, self.options)
        entry, reason = attempts.attempt("forward", run)
        if reason:
            print(f"\nforward, D {dim}: {reason}")
        else:
            show_forward(entry)
            self.save(entry)

    def heads_of(self, case: Case) -> list[str]:
        """Return the heads of a case that are asked for and not stored."""
        asked = (self.options.heads or ",".join(case.heads)).split(",")
        common = (case.suite, sum(case.lengths), len(case.lengths), case.dim, case.vocab)
        heads = [head for head in case.heads if head in asked]
        return [head for head in heads if (*common, head) not in self.done]

    def entrants_of(self, case: Case) -> list[Contender]:
        workspaces = case.workspaces or self.options.workspaces
        found = contenders.everybody(workspaces, self.options.engine)
        found = [c for c in found if c.name.startswith(case.only)]
        found = [c for c in found if c.name.startswith(self.options.only)]
        return [c for c in found if not c.name.startswith(case.without)]

    def inputs_of(self, case: Case) -> tuple[Inputs, Truth]:
        kind = {"device": self.device.type, "dtype": self.options.dtype}
        make = RealInputs if case.suite == "real" else Inputs
        x = make(case.lengths, case.dim, case.vocab, scores=case.scores, **kind)
        return x, truth(x)

    def run_case(self, case: Case) -> None:
        heads = self.heads_of(case)
        if not heads:
            return
        attempts.release()
        if self.device.type == "cuda":
            # Every shape is compiled for itself; the limit of recompilations is never met.
            torch.compiler.reset()
        made, reason = attempts.attempt("inputs", functools.partial(self.inputs_of, case))
        if reason:
            print(f"\n{case.suite} {case.shape}: no inputs: {reason}")
            return
        x, true = made
        entrants = self.entrants_of(case)
        for head in heads:
            x.head(head)
            run = functools.partial(measure, case, x, true, entrants, self.options)
            entry, reason = attempts.attempt("bare mm", run, cleaner(x))
            if reason:
                print(f"\n{case.suite} {case.shape} {head}: {reason}")
                continue
            entry = judge(case, entry)
            if isinstance(x, RealInputs):
                entry["tiles"] = real_states.skipped_tiles(x.hidden, x.weight)
            show(entry, self.device)
            sys.stdout.flush()
            self.save(entry)


def main(arguments: list[str] | None = None) -> int:
    """Run the suites and return the exit status."""
    options = parse(arguments)
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("una_fast").setLevel(logging.INFO)  # which engine, and what is slow
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    run = Run(options, device)
    try:
        with harness.guarded(run.report, options.out):
            for suite in options.suites:
                run.run_suite(suite)
    except DeviceLost as error:
        return harness.store_loss(run.report, error, options.out)
    if options.out:
        print(f"\nwrote {options.out}")
    if run.unmeasured:
        print(f"{run.unmeasured} shapes not measured within {options.budget:g} s")
    bars = itertools.chain.from_iterable(entry["bars"] for entry in run.report["results"])
    return int(run.unmeasured > 0 or not all(bar["held"] for bar in bars))


# -------------------------------------------------------------------------------- pytest-benchmark


def pytest_generate_tests(metafunc: Any) -> None:
    """Run `test_step` for every contender and head."""
    if "contender" in metafunc.fixturenames:
        entrants = contenders.everybody([None])
        metafunc.parametrize("contender", entrants, ids=[c.name for c in entrants])
        metafunc.parametrize("head", HEADS)


def test_step(benchmark: Any, contender: Contender, head: str) -> None:
    """Time one small pair, forward and backward, on the device at hand."""
    import pytest

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    shape = ((256, 256), 512, 8192) if cuda else ((64, 64), 64, 2000)
    dtype = torch.bfloat16 if cuda else torch.float32
    x = Inputs(*shape, device=device, dtype=dtype)
    x.head(head)
    reason = contender.unavailable(x)
    if reason:
        pytest.skip(reason)
    benchmark.extra_info |= {"passes": contender.passes[head]}
    benchmark.extra_info |= check(contender, x, truth(x))
    benchmark.extra_info |= costs(contender, x)

    def run() -> None:
        step(contender, x)
        if cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
