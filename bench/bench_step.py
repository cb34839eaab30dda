"""Whole training steps of real architectures with random weights: una_fast against TRL's
DPOTrainer.

Both sides get the same pairs, reference mode, checkpointing, attention, precision and patches
(step_contenders.py says how, and defines a step). Contenders take turns, each alone in memory:
build, warm up, measure, leave. Before any time counts, both must have seen the same token ids and
logged the same loss and gradient norm; otherwise no time is shown.

    # a tiny Llama in float32
    python bench/bench_step.py --suite cpu --out bench/results/step_cpu.json
    # on a GPU: bfloat16
    python bench/bench_step.py --suite equal,shared16 --models llama3-8b
    # two depths, and a line through the two
    python bench/bench_step.py --suite equal --models qwen3-8b --layers 6,12
    python bench/bench_step.py --suite maxlen --models gemma3-1b --memory-cap 79 --offload

Suites: equal (a prompt of 16 tokens: nothing to share), ragged (lognormal lengths, several pairs
per forward), shared16 and shared64 (prompt : response), maxlen (the longest sequence that runs, by
search), long (una_fast alone at stated lengths, one step, the second where all weights are
trained), cpu (the first four of a tiny Llama, and equal with LoRA). tokens/s counts the pairs as
separate sequences without padding, for both sides; flop likewise (step_contenders.needed_flop).
Exit status: 1 if a bar is missed, the contenders disagree, or time ran out; 75 if a GPU was lost
(use --resume).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import harness
import step_contenders
from step_contenders import CONTENDERS, SHAPES, Case, Session, Setup, needed_flop, responses_of
from una_fast.bench import attempts, machine, timing
from una_fast.bench.attempts import WrongResult
from una_fast.bench.tables import Column
from una_fast.bench.timing import CEILING, ceilings, spread_of
from una_fast.train.metrics import peak_tflops

STEP_SUITES = ("equal", "ragged", "shared16", "shared64")
SUITES = (*STEP_SUITES, "maxlen", "long", "cpu")
NO_PROMPT = 16  # tokens: nothing to share
# (suite, model) -> the smallest allowed ratio of tokens/s to TRL's, at full depth
SPEED_BARS = {("equal", "llama3-8b"): 1.0, ("equal", "qwen3-8b"): 1.0, ("equal", "gemma3-1b"): 1.05}
for _model in ("llama3-8b", "qwen3-8b", "qwen3-1.7b", "gemma3-1b"):
    SPEED_BARS["shared16", _model] = 1.6
    SPEED_BARS["shared64", _model] = 1.75
TRL_LONGEST = 59392  # tokens of a sequence: TRL 1.15, DPO of gemma-3-1b, one GPU of 79 GiB
LENGTH_BARS = {0: 2.0, 16: 4.0}  # prompt : response -> times TRL_LONGEST, at a cap of 79 GiB
CAP = 79.0
# dtype -> allowed differences: of the loss; of the gradient norm, relative; of the mean log-prob of
# a token, in nat. In bfloat16 two orders of the same sums differ by about 0.02 nat per token, which
# at this beta is 0.03 in the margin of a pair at every length. A target off by one shows in the
# mean: 1.3 nat per token, 0.02 in the mean of 4096.
PARITY = {torch.float32: (1e-3, 1e-3, 1e-4), torch.bfloat16: (0.1, 0.1, 1e-2)}
GRAIN = 1024  # tokens: to which maxlen is known
SHARED_SETTINGS = (
    "checkpointing",
    "offload",
    "liger",
    "master_weights",
    "attention",
    "optimizer",
    "mlp_tile",
)

Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected
Entry = dict[str, Any]

# ------------------------------------------------------------------------------------------- suites


def lognormal(count: int, median: float, longest: int, rng: random.Random) -> list[int]:
    """Draw lengths between 4 and `longest` tokens."""
    lengths = [round(median * math.exp(0.8 * rng.gauss(0, 1))) for _ in range(count)]
    return [min(max(length, 4), longest) for length in lengths]


def pairs_of(suite: str, tokens: int) -> tuple[tuple[Pair, ...], int]:
    """Return (lengths of the pairs of a step, pairs per forward).

    suite: "equal", "ragged", "shared16" or "shared64"
    tokens: of a response in "equal"
    """
    if suite == "equal":
        return ((NO_PROMPT, tokens, tokens),), 1
    if suite == "ragged":
        rng = random.Random(0)
        prompts = lognormal(8, tokens / 16, tokens, rng)
        chosen = lognormal(8, tokens / 8, tokens, rng)
        rejected = lognormal(8, tokens / 8, tokens, rng)
        return tuple(zip(prompts, chosen, rejected, strict=True)), 4
    response = 2 * tokens // int(suite.removeprefix("shared"))
    return ((2 * tokens, response, response),), 1


def longest_pair(sequence: int, ratio: int) -> Pair:
    """Return a pair of two sequences of `sequence` tokens.

    sequence: tokens of prompt and response together
    ratio: prompt : response, 0 for nothing to share
    """
    response = sequence // (ratio + 1) if ratio else sequence - NO_PROMPT
    return sequence - response, response, response


def step_cases(suite: str, model: str, depths: Iterable[int], options: Any) -> list[Case]:
    """Return the cases of a suite and model, one per depth."""
    pairs, micro = pairs_of(suite, SHAPES[model].tokens)
    mode = options.mode or SHAPES[model].mode
    lora, cap = mode == "adapter", options.memory_cap
    return [Case(suite, model, n, mode, pairs, micro, lora, memory_cap=cap) for n in depths]


def long_cases(model: str) -> list[Case]:
    """Return the long rows that have to run on one GPU of 80 GB."""
    tile, k = ("mlp_tile", 8192), 1024
    there, moved = (tile,), (tile, ("offload", True))  # hidden states: on the GPU, on the host

    def case(layers: int, mode: str, pair: Pair, changes: tuple, **more: Any) -> Case:
        return Case("long", model, layers, mode, (pair,), changes=changes, **more)

    if model == "llama3-8b":
        return [
            case(32, "adapter", (128 * k, 512, 512), there, lora=True),
            case(32, "cached", (256 * k, 512, 512), moved, lora=True),
            case(16, "cached", (384 * k, 512, 512), moved, lora=True),
        ]
    if model == "gemma3-1b":
        found = [case(26, "cached", (256 * k, 512, 512), moved)]
        for ratio, times in LENGTH_BARS.items():
            pair = longest_pair(round(times * TRL_LONGEST), ratio)
            found.append(case(26, "cached", pair, moved, memory_cap=CAP))
        return found
    if model == "tiny-llama":
        return [case(2, "adapter", (2 * k, 16, 16), (("mlp_tile", 256),), lora=True)]
    return []


# ---------------------------------------------------------------------------------------- measuring


def parity(
    case: Case, dtype: torch.dtype, warmup: int, ours: Session, theirs: Session
) -> dict[str, float]:
    """Return the largest differences between the steps that the two sides logged.

    Raises WrongResult where the sides did different work: other token ids, another dtype of the
    trained weights, or a difference over PARITY.
    """
    if ours.sequences != theirs.sequences:
        raise WrongResult("the contenders saw different token ids")
    if ours.weights != theirs.weights:
        trained = f"una_fast trains {ours.weights} weights and trl {theirs.weights}"
        raise WrongResult(f"{trained}; see --master-weights")
    # Rounding to bfloat16 is part of an optimizer, so that later steps may differ there.
    steps = warmup if dtype == torch.float32 else 1
    tokens = statistics.mean(case.responses)
    worst = {"loss": 0.0, "grad_norm": 0.0, "logps": 0.0}
    for a, b in list(zip(ours.history, theirs.history, strict=True))[:steps]:
        logps = [abs(a[key] - b[key]) for key in ("logps/chosen", "logps/rejected")]
        differences = {
            "loss": abs(a["loss"] - b["loss"]),
            "grad_norm": abs(a["grad_norm"] - b["grad_norm"]) / max(b["grad_norm"], 1e-12),
            "logps": max(logps) / tokens,
        }
        for (name, value), limit in zip(differences.items(), PARITY[dtype], strict=True):
            if not value <= limit:  # NaN is refused as well
                logged = f"una_fast and trl logged {a} and {b}"
                raise WrongResult(f"{name} of a step off by {value:.1e}; {logged}"[:300])
            worst[name] = max(worst[name], value)
    return worst | {"steps": steps}


def take_turns(
    case: Case, setup: Setup, names: list[str], options: Any, late: Callable[[], bool]
) -> tuple[dict[str, list[Session]], dict[str, str], dict[str, Any]]:
    """Run the contenders in rounds of random order.

    Returns (sessions by contender, reasons of failures by contender, parity). No second round is
    run where the first showed a difference.
    """
    sessions: dict[str, list[Session]] = {name: [] for name in names}
    reasons = {name: options.lost[name] for name in names if name in options.lost}
    found: dict[str, Any] = {}
    shuffle = random.Random(0).shuffle
    for k in range(options.rounds):
        if k and late():
            break
        order = [name for name in names if name not in reasons]
        shuffle(order)
        for name in order:
            steps = (options.warmup, options.steps, options.deadline)
            session, reason = step_contenders.run(name, case, setup, *steps)
            if reason:
                reasons[name] = reason
                told = {"reason": reason}
            else:
                sessions[name].append(session)
                told = {"seconds": min(session.seconds), "loss": session.history[0]["loss"]}
            options.note({"name": name, "suite": case.suite, "model": case.model} | told)
        if k == 0 and not reasons and len(names) == 2:
            first = (sessions["una_fast"][0], sessions["trl"][0])
            compare = functools.partial(parity, case, setup.dtype, options.warmup, *first)
            found, reason = attempts.attempt("parity", compare, step_contenders.clean)
            if reason:
                return sessions, dict.fromkeys(names, reason), {}
    return sessions, reasons, found


def row_of(
    name: str, case: Case, sessions: list[Session], peak: float | None, device: str
) -> dict[str, Any]:
    """Return a contender's row of the table.

    name: of the contender
    sessions: the contender's runs of the case
    peak: TFLOP/s that MFU is a fraction of, None for no MFU
    device: "cpu" or "cuda"
    """
    seconds = list(itertools.chain.from_iterable(session.seconds for session in sessions))
    typical = timing.typical(seconds, torch.device(device))
    first = sessions[0]
    row = {
        "name": name,
        "seconds": typical,
        **spread_of(seconds, typical),
        "all_seconds": seconds,
        "tokens_per_s": case.tokens / typical,
        "row_tokens": first.row_tokens,
        "row_tokens_per_s": first.row_tokens / typical,
        "tflops": needed_flop(case) / typical / 1e12,
        "peak_bytes": max(session.peak_bytes for session in sessions),
        "loss": first.history[0]["loss"],
        "grad_norm": first.history[0]["grad_norm"],
        "weights": first.weights,
        "packed": first.packed,
    }
    if peak:
        row["mfu"] = row["tflops"] / peak
    return row


def entry_of(case: Case, setup: Setup, layout: str) -> Entry:
    """Return the entry of a case, still without rows."""
    shape = SHAPES[case.model]
    settings = {name: getattr(setup, name) for name in SHARED_SETTINGS} | dict(case.changes)
    return {
        "suite": case.suite,
        "model": case.model,
        "label": shape.label,
        "layers": case.layers,
        "full_layers": shape.config["num_hidden_layers"],
        "mode": case.mode,
        "lora": case.lora,
        "layout": layout,
        "pairs": case.pairs,
        "micro": case.micro,
        "memory_cap": case.memory_cap,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "settings": settings,
    }


def layout_of(pairs: tuple[Pair, ...]) -> str:
    """Return the lengths of the pairs in words: "16 + 512"."""
    if len(pairs) == 1:
        prompt, chosen, rejected = pairs[0]
        responses = f"{chosen}" if chosen == rejected else f"{chosen} / {rejected}"
        return f"{prompt} + {responses}"
    lengths = responses_of(pairs)
    return f"{len(pairs)} pairs, responses of {min(lengths)} to {max(lengths)}"


def measure(case: Case, setup: Setup, options: Any, late: Callable[[], bool]) -> Entry:
    """Return one entry of the results: a row for every contender, and the ratio to TRL."""
    names = ["una_fast"] if case.suite == "long" else options.names
    if case.suite == "long":
        # The optimizer state of adapters is small; the state of all weights has to be in place.
        warmup = 0 if case.lora else 1
        options = argparse.Namespace(**vars(options) | {"rounds": 1, "warmup": warmup, "steps": 1})
    sessions, reasons, found = take_turns(case, setup, names, options, late)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in reasons:
            rows[name] = {"name": name, "reason": reasons[name]}
        else:
            peak = options.peak["tflops"]
            rows[name] = row_of(name, case, sessions[name], peak, options.device)
    other = rows.get("trl", {})
    for row in rows.values():
        if "seconds" in row and "seconds" in other:
            row["x trl"] = row["tokens_per_s"] / other["tokens_per_s"]
    entry = entry_of(case, setup, layout_of(case.pairs))
    entry |= {"tokens": case.tokens, "flop": needed_flop(case)}
    return entry | {"parity": found, "table": list(rows.values())}


# ------------------------------------------------------------------------------------------- maxlen


def search(
    runs: Callable[[int], bool], start: int, grain: int = GRAIN, limit: int = 1 << 23
) -> int:
    """Return the largest multiple of `grain` that runs, to within 1/32, or 0 if nothing runs.

    Memory grows with length: a longer sequence never runs where a shorter sequence failed.

    runs: tells whether a length runs
    start: the first length to try
    grain: lengths are multiples of `grain`
    limit: no length beyond is tried
    """
    low = high = 0
    length = start
    while not high and length <= limit:
        if runs(length):
            low, length = length, 2 * length
        else:
            high = length
    while high - low > max(grain, low // 32):
        middle = (low + high) // 2 // grain * grain
        if middle <= low:
            break
        if runs(middle):
            low = middle
        else:
            high = middle
    return low


class OutOfTime(Exception):
    """The budget of the run is spent."""


def searched_layout(ratio: int) -> str:
    """Return the kind of pair of a search in words."""
    return f"prompt : response {ratio} : 1" if ratio else "nothing shared"


def longest(
    case: Case, ratio: int, setup: Setup, options: Any, late: Callable[[], bool]
) -> dict[str, Any]:
    """Return one entry of the results: the longest sequence of a pair, for every contender.

    case: without pairs
    ratio: prompt : response of the pairs, 0 for nothing to share
    setup: the same for both sides
    options: of the command line; options.start is the first length to try
    late: tells whether the budget is spent
    """
    table = []
    for name in options.names:
        if name in options.lost:
            table.append({"name": name, "reason": options.lost[name]})
            continue
        row: dict[str, Any] = {"name": name, "tried": []}
        best: dict[str, Any] = {}

        def runs(length: int, name: str = name, row: dict = row, best: dict = best) -> bool:
            if late():
                raise OutOfTime
            trial = case._replace(pairs=(longest_pair(length, ratio),))
            session, reason = step_contenders.run(name, trial, setup, 1, 1, options.deadline)
            row["tried"].append([length, reason or "ran"])
            options.note(
                {"name": name, "suite": case.suite, "reason": f"{length} tokens: {reason or 'ran'}"}
            )
            if reason and reason != "out of memory":
                raise WrongResult(reason)
            if not reason:
                best.update(sequence_tokens=length, row_tokens=session.row_tokens)
                best.update(seconds=session.seconds[0], peak_bytes=session.peak_bytes)
            return reason is None

        try:
            search(runs, options.start, options.grain)
        except OutOfTime:
            row["unfinished"] = "out of time"  # what ran is a lower bound
        except WrongResult as error:
            row["unfinished"] = str(error)
        row |= best or {"reason": "nothing ran"}
        table.append(row)
    entry = entry_of(case, setup, searched_layout(ratio))
    entry.pop("pairs")
    return entry | {"ratio": ratio, "parity": {}, "table": table}


# --------------------------------------------------------------------------------------------- bars


def judge(entry: Entry) -> Entry:
    """Return the entry with bars. A bar against a TRL that ran out of memory is held if una_fast
    ran.
    """
    bars = []
    by_name = {row["name"]: row for row in entry["table"]}
    mine = by_name.get("una_fast", {})
    suite, model = entry["suite"], entry["model"]

    def ask(bar: str, least: float, found: float | None, beaten: bool = False) -> None:
        held = beaten or (found is not None and found >= least)
        bars.append({"bar": bar, "least": least, "found": found, "held": held})

    whole = entry["layers"] == entry["full_layers"]
    if whole and (suite, model) in SPEED_BARS and {"una_fast", "trl"} <= by_name.keys():
        beaten = by_name["trl"].get("reason") == "out of memory" and "seconds" in mine
        ask("tokens/s / trl", SPEED_BARS[suite, model], mine.get("x trl"), beaten)
    published = model == "gemma3-1b" and entry["memory_cap"] == CAP
    if whole and suite == "maxlen" and published and mine:
        least = LENGTH_BARS[entry["ratio"]]
        ask("sequence / TRL's published", least, mine.get("sequence_tokens", 0) / TRL_LONGEST)
    if suite == "long" and model != "tiny-llama":
        ask("runs", 1.0, float("seconds" in mine))
    return entry | {"bars": bars}


def failed(entry: Entry) -> bool:
    """Return whether a row of the entry is a wrong result, or a bar was missed."""
    wrong = any(row.get("reason", "").startswith("wrong result") for row in entry["table"])
    return wrong or not all(bar["held"] for bar in entry["bars"])


def extrapolate(results: list[Entry]) -> list[dict[str, Any]]:
    """Return full depth from the two deepest measured depths, on a line in the number of layers."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in results:
        if entry["suite"] in STEP_SUITES and entry["layers"] < entry["full_layers"]:
            groups.setdefault(key_of(entry | {"layers": 0}), []).append(entry)
    found = []
    for group in groups.values():
        by_depth = {entry["layers"]: entry for entry in group}
        if len(by_depth) > 1:
            *_, low, high = sorted(by_depth)
            found.append(line_through(by_depth[low], by_depth[high]))
    return found


def line_through(low: Entry, high: Entry) -> dict[str, Any]:
    """Return the seconds at full depth on the line through the entries of two depths."""
    rise = high["layers"] - low["layers"]
    more = (high["full_layers"] - high["layers"]) / rise
    table = []
    for a in low["table"]:
        b = next(row for row in high["table"] if row["name"] == a["name"])
        if "seconds" in a and "seconds" in b:
            seconds = b["seconds"] + more * (b["seconds"] - a["seconds"])
            row = {"name": a["name"], "extrapolated_seconds": seconds}
            table.append(row | {"extrapolated_tokens_per_s": high["tokens"] / seconds})
    kept = ("suite", "model", "label", "full_layers", "mode", "lora", "layout")
    line = {name: high[name] for name in kept}
    return line | {"from_layers": [low["layers"], high["layers"]], "table": table}


# -------------------------------------------------------------------------------------------- show

COLUMNS = {
    "seconds": Column("seconds", ".3f"),
    "spread %": Column("spread", ".1f", 0.01),
    "tokens/s": Column("tokens_per_s", ".0f"),
    "x trl": Column("x trl", ".2f"),
    "TF/s": Column("tflops", ".3g"),
    "MFU %": Column("mfu", ".0f", 0.01),
    "peak MiB": Column("peak_bytes", ".0f", 2**20),
    "row": Column("row_tokens", ".0f"),
    "sequence": Column("sequence_tokens", ".0f"),
    "loss": Column("loss", ".4f"),
}


def show(entry: Entry) -> None:
    """Print an entry of the results, the parity and the verdicts on the entry's bars."""
    cap = f", {entry['memory_cap']:g} GiB" if entry["memory_cap"] else ""
    lora = " LoRA" if entry["lora"] else ""
    depth = f"{entry['layers']} of {entry['full_layers']} layers"
    work = f"{entry['layout']}, {entry['mode']}{lora}, {entry['dtype']}{cap}"
    print(f"\n{entry['suite']}: {entry['label']}, {depth}, {work}")
    harness.print_table(COLUMNS, entry["table"])
    if entry["parity"]:
        text = "  parity: loss {loss:.1e}, gradient norm {grad_norm:.1e}, log-probs {logps:.1e}"
        print(text.format(**entry["parity"]))
    for bar in entry["bars"]:
        harness.print_verdict(bar, f"{bar['bar']} >= {bar['least']:.2f}", digits=2)
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, flag = found.add_argument, argparse.BooleanOptionalAction
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = "comma-separated (default: tiny-llama, on a GPU the real ones)"
    layers = "depths, comma-separated, instead of the full one (of long: those alone); "
    layers += "two give a line to the full one"
    mode = "where the reference comes from (default: the shape's)"
    offload = "move what checkpointing keeps to host memory, on both sides"
    liger = "liger's layers on both sides (default: on a GPU that has liger-kernel)"
    attention = "attn_implementation (default: flash_attention_2 if installed on a GPU, else sdpa)"
    cap = "of GPU memory; on a CPU of what a step allocates"
    budget = "seconds after which nothing new is started"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--suite", default="cpu", help=f"of {', '.join(SUITES)}, comma-separated (default cpu)")
    add("--models", help=f"of {', '.join(SHAPES)}, {models}")
    add("--layers", help=layers)
    add("--mode", choices=("cached", "adapter", "frozen"), help=mode)
    add("--contenders", default="una_fast,trl", help="una_fast, trl or both (default)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--checkpointing", action=flag, default=True, help="recompute layers in backward (default)")
    add("--offload", action="store_true", help=offload)
    add("--liger", action=flag, help=liger)
    add("--master-weights", action="store_true", help="train float32 weights, on both sides")
    add("--attention", help=attention)
    add("--optimizer", choices=("adamw", "adamw_8bit", "sgd"), default="adamw")
    add("--mlp-tile", type=int, help="of una_fast alone: tokens per piece of an MLP")
    add("--memory-cap", type=float, metavar="GIB", help=cap)
    add("--rounds", type=int, default=2, help="turns of every contender (2)")
    add("--warmup", type=int, default=2, help="steps of a turn before those that are timed (2)")
    add("--steps", type=int, default=3, help="timed steps of a turn (3)")
    add("--start", type=int, default=32768, help="maxlen: the first length tried (32768)")
    add("--grain", type=int, default=GRAIN, help=f"maxlen: lengths are multiples of it ({GRAIN})")
    add("--deadline", type=float, default=240, help="seconds for a contender's first turn (240)")
    add("--budget", type=float, default=float("inf"), help=budget)
    add("--threads", type=int, default=2, help="CPU threads on a CPU (2)")
    add("--out", type=Path, help="write the results there as JSON, after every case")
    add("--resume", action="store_true", help="keep the results of --out and go on behind them")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options, with the defaults of the device filled in."""
    checked = parser()
    options = checked.parse_args(arguments)
    cpu = options.device == "cpu"
    options.suites, options.names = options.suite.split(","), options.contenders.split(",")
    if options.models:
        options.models = options.models.split(",")
    elif cpu:
        options.models = ["tiny-llama"]
    else:
        options.models = [name for name in SHAPES if not name.startswith("tiny")]
    options.depths = [int(n) for n in options.layers.split(",")] if options.layers else None
    asked = ((options.suites, SUITES), (options.models, SHAPES), (options.names, CONTENDERS))
    for given, known in asked:
        unknown = sorted(set(given) - set(known))
        if unknown:
            checked.error(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    if options.warmup < (2 if cpu else 1):
        checked.error(
            "--warmup must be at least 2 on a CPU, where memory is counted in a step of it, "
            "else at least 1"
        )
    options.dtype = getattr(torch, options.dtype or ("float32" if cpu else "bfloat16"))
    if options.liger is None:
        options.liger = not cpu and importlib.util.find_spec("liger_kernel") is not None
    flash = not cpu and importlib.util.find_spec("flash_attn") is not None
    options.attention = options.attention or ("flash_attention_2" if flash else "sdpa")
    options.lost = {}
    options.note = lambda row: None
    return options


Work = tuple[Case, int | None]  # a case; prompt : response of a search for the longest, else None


def work(options: Any) -> list[Work]:
    """Return the cases of the chosen suites."""
    found: list[Work] = []
    for suite in options.suites:
        models = ["tiny-llama"] if suite == "cpu" else options.models
        for model in models:
            found += work_of(suite, model, options)
    return found


def work_of(suite: str, model: str, options: Any) -> list[Work]:
    """Return the cases of one suite and model."""
    full = SHAPES[model].config["num_hidden_layers"]
    depths = options.depths or [full]
    if suite == "cpu":
        cases = []
        for name in STEP_SUITES:
            cases += step_cases(name, model, [full], options)
        cases.append(cases[0]._replace(mode="adapter", lora=True))
    elif suite == "long":
        cases = long_cases(model)
        if options.depths:
            cases = [case for case in cases if case.layers in options.depths]
    elif suite == "maxlen":
        mode = options.mode or SHAPES[model].mode
        cap, lora = options.memory_cap, mode == "adapter"
        cases = [Case(suite, model, n, mode, (), lora=lora, memory_cap=cap) for n in depths]
        return list(itertools.product(cases, LENGTH_BARS))
    else:
        cases = step_cases(suite, model, depths, options)
    return [(case, None) for case in cases]


def key_of(entry: Entry) -> tuple:
    """Return the identity of a case among the results."""
    names = ("suite", "model", "layers", "mode", "lora", "memory_cap", "layout")
    return tuple(entry[name] for name in names)


def cap_memory(device: torch.device, gib: float | None) -> None:
    """Allow the process so many GiB of GPU memory, or all memory."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        share = min(1.0, gib / whole) if gib else 1.0
        torch.cuda.set_per_process_memory_fraction(share)


def peak_of(device: torch.device) -> dict[str, Any]:
    """Return the TFLOP/s that MFU is a fraction of, and the origin of the number."""
    if device.type == "cuda":
        return {"tflops": peak_tflops(device), "source": "dense bf16 of the data sheet"}
    measured = ceilings(device)["gemm_tflops"]
    return {"tflops": measured, "source": f"a float32 product of {CEILING['cpu']}^3, measured"}


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a step runs through."""
    packages = ("transformers", "accelerate", "peft", "liger-kernel", "flash-attn", "torchao")
    return {name: machine.installed(name) for name in packages}


def main(arguments: list[str] | None = None) -> int:
    """Run the suites and return the exit status."""
    options, begin = parse(arguments), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    report = harness.open_report(options.out, options.resume, device)
    report["environment"] |= versions()
    report["kind"] = "step"
    options.lost = report.setdefault("lost", {})
    options.note = lambda row: harness.note(report, row, options.out)
    options.peak = report.setdefault("peak", None) or peak_of(device)
    report["peak"] = options.peak
    settings = {name: getattr(options, name) for name in SHARED_SETTINGS}
    setup = Setup(device, options.dtype, **settings)
    done = {key_of(entry) for entry in report["results"]}
    missing = 0

    def late() -> bool:
        return time.perf_counter() - begin > options.budget

    for case, ratio in work(options):
        layout = layout_of(case.pairs) if ratio is None else searched_layout(ratio)
        if key_of(entry_of(case, setup, layout)) in done:
            continue
        if late():
            missing += 1
            continue
        cap_memory(device, case.memory_cap)
        try:
            with harness.guarded(report, options.out):
                if ratio is None:
                    entry = measure(case, setup, options, late)
                else:
                    entry = longest(case, ratio, setup, options, late)
        except attempts.DeviceLost as error:
            return harness.store_loss(report, error, options.out)
        entry = judge(entry)
        show(entry)
        report["results"].append(json.loads(json.dumps(entry)))
        report.pop("notes", None)  # the entry holds them
        report["extrapolated"] = extrapolate(report["results"])
        harness.write_report(report, options.out)
    for line in report.get("extrapolated", []):
        cells = [f"{row['name']} {row['extrapolated_seconds']:.3f} s" for row in line["table"]]
        depths = f"from {line['from_layers']} to {line['full_layers']} layers"
        place = f"{line['suite']}, {line['label']}"
        print(f"\nextrapolated {depths}, not measured: {place}: {', '.join(cells)}")
    if missing:
        print(f"{missing} cases not measured within {options.budget:g} s")
    return int(missing > 0 or any(failed(entry) for entry in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
