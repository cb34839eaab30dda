"""Whole training steps of real architectures with random weights: una_fast against TRL's DPOTrainer.

The same pairs, reference mode, checkpointing, attention, precision and patches on both sides (step_contenders.py says
how, and what a step is). Contenders take turns, each alone in memory: build, warm up, measure, leave. Before any time
counts both must have seen the same token ids and logged the same loss and gradient norm; otherwise there is none.

    python bench/bench_step.py --suite cpu --out bench/results/step_cpu.json       # a tiny Llama in float32
    python bench/bench_step.py --suite equal,shared16 --models llama3-8b           # on a GPU: bfloat16
    python bench/bench_step.py --suite equal --models qwen3-8b --layers 6,12       # two depths, and a line through them
    python bench/bench_step.py --suite maxlen --models gemma3-1b --memory-cap 79 --offload

Suites: equal (a prompt of 16 tokens: nothing to share), ragged (lognormal lengths, several pairs per forward),
shared16 and shared64 (prompt : response), maxlen (the longest sequence that runs, by search), long (una_fast alone at
stated lengths, one step, the second where all weights are trained), cpu (the first four of a tiny Llama, and equal
with LoRA).
tokens/s counts the pairs as separate sequences without padding, for both; flop likewise (step_contenders.needed_flop).
Exit status: 1 if a bar is missed, the contenders disagree, or time ran out; 75 if a GPU was lost (use --resume).
"""

from __future__ import annotations

import argparse
import importlib.util
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

import harness
import step_contenders
import torch
from contenders import WrongResult
from step_contenders import CONTENDERS, SHAPES, Case, Session, Setup, needed_flop

from una_fast.train.metrics import peak_tflops

STEP_SUITES = ("equal", "ragged", "shared16", "shared64")
SUITES = (*STEP_SUITES, "maxlen", "long", "cpu")
NO_PROMPT = 16  # tokens: nothing to share
# (suite, model) -> the smallest allowed ratio of tokens/s to TRL's, at full depth
SPEED_BARS = {("equal", "llama3-8b"): 1.0, ("equal", "qwen3-8b"): 1.0, ("equal", "gemma3-1b"): 1.05}
SPEED_BARS |= {
    ("shared16", model): 1.6 for model in ("llama3-8b", "qwen3-8b", "qwen3-1.7b", "gemma3-1b")
}
SPEED_BARS |= {
    ("shared64", model): 1.75 for model in ("llama3-8b", "qwen3-8b", "qwen3-1.7b", "gemma3-1b")
}
TRL_LONGEST = 59392  # tokens of a sequence: TRL 1.15, DPO of gemma-3-1b, one GPU of 79 GiB
LENGTH_BARS = {0: 2.0, 16: 4.0}  # prompt : response -> times TRL_LONGEST, at a cap of 79 GiB
CAP = 79.0
# dtype -> allowed differences: of the loss; of the gradient norm, relative; of the mean log-prob of a token, in nat. In
# bfloat16 two orders of the same sums differ by about 0.02 nat per token, which at this beta is 0.03 in the margin of a
# pair at every length. A target off by one shows in the mean: 1.3 nat per token, 0.02 in the mean of 4096.
PARITY = {torch.float32: (1e-3, 1e-3, 1e-4), torch.bfloat16: (0.1, 0.1, 1e-2)}
GRAIN = 1024  # tokens: to which maxlen is known

# ------------------------------------------------------------------------------------------------------------- suites


def lognormal(count: int, median: float, longest: int, rng: random.Random) -> list[int]:
    return [
        min(max(round(median * math.exp(0.8 * rng.gauss(0, 1))), 4), longest) for _ in range(count)
    ]


def pairs_of(suite: str, tokens: int) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """(lengths of the pairs of a step, pairs per forward). tokens: of a response in "equal"."""
    if suite == "equal":
        return ((NO_PROMPT, tokens, tokens),), 1
    if suite == "ragged":
        rng = random.Random(0)
        prompts, chosen, rejected = (
            lognormal(8, tokens / part, tokens, rng) for part in (16, 8, 8)
        )
        return tuple(zip(prompts, chosen, rejected, strict=True)), 4
    response = 2 * tokens // int(suite.removeprefix("shared"))
    return ((2 * tokens, response, response),), 1


def longest_pair(sequence: int, ratio: int) -> tuple[int, int, int]:
    """A pair whose sequences are so long. ratio: prompt : response, 0 for nothing to share."""
    response = sequence // (ratio + 1) if ratio else sequence - NO_PROMPT
    return sequence - response, response, response


def step_cases(suite: str, model: str, depths: Iterable[int], options: Any) -> list[Case]:
    pairs, micro = pairs_of(suite, SHAPES[model].tokens)
    mode = options.mode or SHAPES[model].mode
    cap = options.memory_cap
    return [
        Case(suite, model, n, mode, pairs, micro, mode == "adapter", memory_cap=cap) for n in depths
    ]


def long_cases(model: str) -> list[Case]:
    """What has to run on one GPU of 80 GB."""
    tile, k = ("mlp_tile", 8192), 1024
    there, moved = (tile,), (tile, ("offload", True))

    def case(
        layers: int, mode: str, pair: tuple[int, int, int], changes: tuple, **more: Any
    ) -> Case:
        return Case("long", model, layers, mode, (pair,), changes=changes, **more)

    if model == "llama3-8b":
        return [
            case(32, "adapter", (128 * k, 512, 512), there, lora=True),
            case(32, "cached", (256 * k, 512, 512), moved, lora=True),
            case(16, "cached", (384 * k, 512, 512), moved, lora=True),
        ]
    if model == "gemma3-1b":
        capped = [
            case(
                26, "cached", longest_pair(round(times * TRL_LONGEST), ratio), moved, memory_cap=CAP
            )
            for ratio, times in LENGTH_BARS.items()
        ]
        return [case(26, "cached", (256 * k, 512, 512), moved), *capped]
    if model == "tiny-llama":
        return [case(2, "adapter", (2 * k, 16, 16), (("mlp_tile", 256),), lora=True)]
    return []


# ---------------------------------------------------------------------------------------------------------- measuring


def parity(
    case: Case, dtype: torch.dtype, warmup: int, ours: Session, theirs: Session
) -> dict[str, float]:
    """Differences of what the two logged; WrongResult where they did not do the same."""
    if ours.sequences != theirs.sequences:
        raise WrongResult("the contenders saw different token ids")
    if ours.weights != theirs.weights:
        raise WrongResult(
            f"una_fast trains {ours.weights} weights and trl {theirs.weights}; see --master-weights"
        )
    # Rounding to bfloat16 is part of an optimizer, so that later steps may differ there.
    steps = warmup if dtype == torch.float32 else 1
    tokens = statistics.mean(n for pair in case.pairs for n in pair[1:])
    worst = {"loss": 0.0, "grad_norm": 0.0, "logps": 0.0}
    for a, b in list(zip(ours.history, theirs.history, strict=True))[:steps]:
        differences = {
            "loss": abs(a["loss"] - b["loss"]),
            "grad_norm": abs(a["grad_norm"] - b["grad_norm"]) / max(b["grad_norm"], 1e-12),
            "logps": max(abs(a[key] - b[key]) for key in ("logps/chosen", "logps/rejected"))
            / tokens,
        }
        for (name, value), limit in zip(differences.items(), PARITY[dtype], strict=True):
            if not value <= limit:  # NaN is none either
                raise WrongResult(
                    f"{name} of a step off by {value:.1e}; una_fast and trl logged {a} and {b}"[
                        :300
                    ]
                )
            worst[name] = max(worst[name], value)
    return worst | {"steps": steps}


def take_turns(
    case: Case, setup: Setup, names: list[str], options: Any, late: Callable[[], bool]
) -> tuple[dict[str, list[Session]], dict[str, str], dict[str, Any]]:
    """(sessions, reasons of those that failed, parity). No second round where the first showed a difference."""
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
            session, reason = step_contenders.run(
                name, case, setup, options.warmup, options.steps, options.deadline
            )
            if reason:
                reasons[name] = reason
            else:
                sessions[name].append(session)
        if k == 0 and not reasons and len(names) == 2:
            found, reason = harness.attempt(
                "parity",
                lambda: parity(
                    case, setup.dtype, options.warmup, sessions["una_fast"][0], sessions["trl"][0]
                ),
                step_contenders.clean,
            )
            if reason:
                return sessions, dict.fromkeys(names, reason), {}
    return sessions, reasons, found


def row_of(
    name: str, case: Case, sessions: list[Session], peak: float | None, device: str
) -> dict[str, Any]:
    seconds = [value for session in sessions for value in session.seconds]
    typical = harness.typical(seconds, torch.device(device))
    quartiles = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    first, flop = sessions[0], needed_flop(case)
    row = {
        "name": name,
        "seconds": typical,
        "quartiles": quartiles,
        "spread": (quartiles[2] - quartiles[0]) / typical,
        "all_seconds": seconds,
        "tokens_per_s": case.tokens / typical,
        "row_tokens": first.row_tokens,
        "row_tokens_per_s": first.row_tokens / typical,
        "tflops": flop / typical / 1e12,
        "peak_bytes": max(session.peak_bytes for session in sessions),
        "loss": first.history[0]["loss"],
        "grad_norm": first.history[0]["grad_norm"],
        "weights": first.weights,
        "packed": first.packed,
    }
    return row | ({"mfu": row["tflops"] / peak} if peak else {})


def entry_of(case: Case, setup: Setup, layout: str) -> dict[str, Any]:
    shape = SHAPES[case.model]
    changed = {**{name: getattr(setup, name) for name in SHARED_SETTINGS}, **dict(case.changes)}
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
        "settings": changed,
    }


SHARED_SETTINGS = (
    "checkpointing",
    "offload",
    "liger",
    "master_weights",
    "attention",
    "optimizer",
    "mlp_tile",
)


def layout_of(pairs: tuple[tuple[int, int, int], ...]) -> str:
    if len(pairs) == 1:
        prompt, chosen, rejected = pairs[0]
        return f"{prompt} + {chosen}" + ("" if chosen == rejected else f" / {rejected}")
    lengths = [n for pair in pairs for n in pair[1:]]
    return f"{len(pairs)} pairs, responses of {min(lengths)} to {max(lengths)}"


def measure(case: Case, setup: Setup, options: Any, late: Callable[[], bool]) -> dict[str, Any]:
    """One entry of the results: a row for every contender, and the ratio to TRL."""
    names = ["una_fast"] if case.suite == "long" else options.names
    if case.suite == "long":
        warmup = (
            0 if case.lora else 1
        )  # adapters' optimizer state is small, that of all weights has to be there
        options = argparse.Namespace(**vars(options) | {"rounds": 1, "warmup": warmup, "steps": 1})
    sessions, reasons, found = take_turns(case, setup, names, options, late)
    table = [
        {"name": name, "reason": reasons[name]}
        if name in reasons
        else row_of(name, case, sessions[name], options.peak["tflops"], options.device)
        for name in names
    ]
    by_name = {row["name"]: row for row in table}
    other = by_name.get("trl", {})
    for row in table:
        if "seconds" in row and "seconds" in other:
            row["x trl"] = row["tokens_per_s"] / other["tokens_per_s"]
    entry = entry_of(case, setup, layout_of(case.pairs))
    return entry | {
        "tokens": case.tokens,
        "flop": needed_flop(case),
        "parity": found,
        "table": table,
    }


# ------------------------------------------------------------------------------------------------------------- maxlen


def search(
    runs: Callable[[int], bool], start: int, grain: int = GRAIN, limit: int = 1 << 23
) -> int:
    """The largest multiple of `grain` that runs, 0 if none does, to within 1/32 of itself. Memory grows with length."""
    low, high = 0, 0
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
    return f"prompt : response {ratio} : 1" if ratio else "nothing shared"


def longest(
    case: Case, ratio: int, setup: Setup, options: Any, late: Callable[[], bool]
) -> dict[str, Any]:
    """The longest sequence of a pair, for every contender. options.start: the first length that is tried."""
    table = []
    for name in options.names:
        row: dict[str, Any] = {"name": name, "tried": []}
        best: dict[str, Any] = {}

        def runs(length: int, name: str = name, row: dict = row, best: dict = best) -> bool:
            if late():
                raise OutOfTime
            trial = case._replace(pairs=(longest_pair(length, ratio),))
            session, reason = step_contenders.run(name, trial, setup, 1, 1, options.deadline)
            row["tried"].append([length, reason or "ran"])
            if reason and reason != "out of memory":
                raise WrongResult(reason)
            if not reason:
                best.update(sequence_tokens=length, row_tokens=session.row_tokens)
                best.update(seconds=session.seconds[0], peak_bytes=session.peak_bytes)
            return reason is None

        try:
            search(runs, options.start, options.grain)
        except OutOfTime:
            row["unfinished"] = True  # what ran is a lower bound
        except WrongResult as error:
            row["unfinished"] = str(error)
        row |= best or {"reason": "nothing ran"}
        table.append(row)
    entry = entry_of(case, setup, searched_layout(ratio)) | {
        "ratio": ratio,
        "parity": {},
        "table": table,
    }
    entry.pop("pairs")
    return entry


# --------------------------------------------------------------------------------------------------------------- bars


def judge(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its bars. One against a TRL that ran out of memory is held, where una_fast ran."""
    bars, by_name = [], {row["name"]: row for row in entry["table"]}
    mine = by_name.get("una_fast", {})

    def ask(what: str, least: float, found: float | None, held: bool | None = None) -> None:
        held = (found is not None and found >= least) if held is None else held
        bars.append({"bar": what, "least": least, "found": found, "held": held})

    whole = entry["layers"] == entry["full_layers"]
    if (
        whole
        and (entry["suite"], entry["model"]) in SPEED_BARS
        and {"una_fast", "trl"} <= by_name.keys()
    ):
        beaten = by_name["trl"].get("reason") == "out of memory" and "seconds" in mine
        ask(
            "tokens/s / trl",
            SPEED_BARS[entry["suite"], entry["model"]],
            mine.get("x trl"),
            beaten or None,
        )
    if (
        whole
        and entry["model"] == "gemma3-1b"
        and entry["suite"] == "maxlen"
        and entry["memory_cap"] == CAP
        and mine
    ):
        least = LENGTH_BARS[entry["ratio"]]
        ask("sequence / TRL's published", least, mine.get("sequence_tokens", 0) / TRL_LONGEST)
    if entry["suite"] == "long" and entry["model"] != "tiny-llama":
        ask("runs", 1.0, float("seconds" in mine))
    return entry | {"bars": bars}


def failed(entry: dict[str, Any]) -> bool:
    wrong = any(row.get("reason", "").startswith("wrong result") for row in entry["table"])
    return wrong or not all(bar["held"] for bar in entry["bars"])


def extrapolate(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Full depth from the two deepest measured ones: a line in the number of layers, never measured."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results:
        if entry["suite"] in STEP_SUITES and entry["layers"] < entry["full_layers"]:
            groups.setdefault(key_of(entry | {"layers": 0}), []).append(entry)
    found = []
    for group in groups.values():
        low, high = (
            sorted(group, key=lambda e: e["layers"])[-2:]
            if len(group) > 1
            else (group[0], group[0])
        )
        rise = high["layers"] - low["layers"]
        if not rise:
            continue
        table = []
        for a in low["table"]:
            b = next(row for row in high["table"] if row["name"] == a["name"])
            if "seconds" in a and "seconds" in b:
                more = (high["full_layers"] - high["layers"]) / rise
                seconds = b["seconds"] + more * (b["seconds"] - a["seconds"])
                tokens = high["tokens"] / seconds
                table.append(
                    {
                        "name": a["name"],
                        "extrapolated_seconds": seconds,
                        "extrapolated_tokens_per_s": tokens,
                    }
                )
        common = {
            name: high[name]
            for name in ("suite", "model", "label", "full_layers", "mode", "lora", "layout")
        }
        found.append(common | {"from_layers": [low["layers"], high["layers"]], "table": table})
    return found


# --------------------------------------------------------------------------------------------------------------- show


def show(entry: dict[str, Any]) -> None:
    cap = f", {entry['memory_cap']:g} GiB" if entry["memory_cap"] else ""
    print(f"\n{entry['suite']}: {entry['label']}, {entry['layers']} of {entry['full_layers']} layers, "
          f"{entry['layout']}, {entry['mode']}{' LoRA' if entry['lora'] else ''}, {entry['dtype']}{cap}")  # fmt: skip
    columns = {  # head -> (key, format, divisor)
        "seconds": ("seconds", ".3f", 1),
        "spread %": ("spread", ".1f", 0.01),
        "tokens/s": ("tokens_per_s", ".0f", 1),
        "x trl": ("x trl", ".2f", 1),
        "TF/s": ("tflops", ".3g", 1),
        "MFU %": ("mfu", ".0f", 0.01),
        "peak MiB": ("peak_bytes", ".0f", 2**20),
        "row": ("row_tokens", "d", None),
        "sequence": ("sequence_tokens", "d", None),
        "loss": ("loss", ".4f", 1),
    }
    print(f"{'':10}" + "".join(f"{head:>11}" for head in columns))
    for row in entry["table"]:
        if "reason" in row:
            print(f"{row['name']:10}  {row['reason']}")
            continue
        cells = (f"{row[key] / unit if unit else row[key]:{form}}" if key in row else ""
                 for key, form, unit in columns.values())  # fmt: skip
        print(f"{row['name']:10}" + "".join(f"{cell:>11}" for cell in cells))
        if row.get("unfinished"):
            print(f"  the search ended early: {row['unfinished']}")
    if entry["parity"]:
        print(
            "  parity: loss {loss:.1e}, gradient norm {grad_norm:.1e}, log-probs {logps:.1e}".format(
                **entry["parity"]
            )
        )
    for bar in entry["bars"]:
        value = "not measured" if bar["found"] is None else f"{bar['found']:.2f}"
        print(
            f"  {'held  ' if bar['held'] else 'MISSED'} {bar['bar']} >= {bar['least']:.2f}: {value}"
        )
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------------------- main


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--suite", default="cpu", help=f"of {', '.join(SUITES)}, comma-separated (default cpu)")
    add(
        "--models",
        help=f"of {', '.join(SHAPES)}, comma-separated (default: tiny-llama, on a GPU the real ones)",
    )
    add(
        "--layers",
        help="depths, comma-separated, instead of the full one (of long: those alone); two give a line to the full one",
    )
    add(
        "--mode",
        choices=("cached", "adapter", "frozen"),
        help="where the reference comes from (default: the shape's)",
    )
    add("--contenders", default="una_fast,trl", help="una_fast, trl or both (default)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--checkpointing", action=flag, default=True, help="recompute layers in backward (default)")
    add(
        "--offload",
        action="store_true",
        help="move what checkpointing keeps to host memory, on both sides",
    )
    add(
        "--liger",
        action=flag,
        help="liger's layers on both sides (default: on a GPU that has liger-kernel)",
    )
    add("--master-weights", action="store_true", help="train float32 weights, on both sides")
    add(
        "--attention",
        help="attn_implementation (default: flash_attention_2 if installed on a GPU, else sdpa)",
    )
    add("--optimizer", choices=("adamw", "adamw_8bit", "sgd"), default="adamw")
    add("--mlp-tile", type=int, help="of una_fast alone: tokens per piece of an MLP")
    add(
        "--memory-cap",
        type=float,
        metavar="GIB",
        help="of GPU memory; on a CPU of what a step allocates",
    )
    add("--rounds", type=int, default=2, help="turns of every contender (2)")
    add("--warmup", type=int, default=2, help="steps of a turn before those that are timed (2)")
    add("--steps", type=int, default=3, help="timed steps of a turn (3)")
    add("--start", type=int, default=32768, help="maxlen: the first length tried (32768)")
    add("--grain", type=int, default=GRAIN, help=f"maxlen: lengths are multiples of it ({GRAIN})")
    add("--deadline", type=float, default=240, help="seconds for a contender's first turn (240)")
    add(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which nothing new is started",
    )
    add("--threads", type=int, default=2, help="CPU threads on a CPU (2)")
    add("--out", type=Path, help="write the results there as JSON, after every case")
    add("--resume", action="store_true", help="keep the results of --out and go on behind them")
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    options.suites, options.names = options.suite.split(","), options.contenders.split(",")
    real = [name for name in SHAPES if not name.startswith("tiny")]
    options.models = (
        options.models.split(",") if options.models else ["tiny-llama"] if cpu else real
    )
    options.depths = [int(n) for n in options.layers.split(",")] if options.layers else None
    for given, known in (
        (options.suites, SUITES),
        (options.models, SHAPES),
        (options.names, CONTENDERS),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.warmup < (2 if cpu else 1):
        parser.error(
            "--warmup must be at least 2 on a CPU, where memory is counted in a step of it, else at least 1"
        )
    options.dtype = getattr(torch, options.dtype or ("float32" if cpu else "bfloat16"))
    if options.liger is None:
        options.liger = not cpu and importlib.util.find_spec("liger_kernel") is not None
    flash = not cpu and importlib.util.find_spec("flash_attn") is not None
    options.attention = options.attention or ("flash_attention_2" if flash else "sdpa")
    options.lost = {}
    return options


def work(options: Any) -> list[tuple[Case, int | None]]:
    """(case, prompt : response of a search for the longest, else None)."""
    found: list[tuple[Case, int | None]] = []
    for suite in options.suites:
        if suite == "cpu":
            layers = SHAPES["tiny-llama"].config["num_hidden_layers"]
            cases = [
                case
                for name in STEP_SUITES
                for case in step_cases(name, "tiny-llama", [layers], options)
            ]
            found += [
                (case, None) for case in (*cases, cases[0]._replace(mode="adapter", lora=True))
            ]
            continue
        for model in options.models:
            depths = options.depths or [SHAPES[model].config["num_hidden_layers"]]
            if suite == "long":
                cases = [
                    case
                    for case in long_cases(model)
                    if case.layers in (options.depths or [case.layers])
                ]
                found += [(case, None) for case in cases]
            elif suite == "maxlen":
                mode = options.mode or SHAPES[model].mode
                cap, lora = options.memory_cap, mode == "adapter"
                cases = [Case(suite, model, n, mode, (), lora=lora, memory_cap=cap) for n in depths]
                found += [(case, ratio) for case in cases for ratio in LENGTH_BARS]
            else:
                found += [(case, None) for case in step_cases(suite, model, depths, options)]
    return found


def key_of(entry: dict[str, Any]) -> tuple:
    return tuple(
        entry[name] for name in ("suite", "model", "layers", "mode", "lora", "memory_cap", "layout")
    )


def cap_memory(device: torch.device, gib: float | None) -> None:
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / whole) if gib else 1.0)


def peak_of(device: torch.device) -> dict[str, Any]:
    """What MFU is a fraction of."""
    if device.type == "cuda":
        return {"tflops": peak_tflops(device), "source": "dense bf16 of the data sheet"}
    from bench_head import CEILING, ceilings

    measured = ceilings(device)["gemm_tflops"]
    return {"tflops": measured, "source": f"a float32 product of {CEILING['cpu']}^3, measured"}


def versions() -> dict[str, str | None]:
    packages = ("transformers", "accelerate", "peft", "liger-kernel", "flash-attn", "torchao")
    return {name: harness.installed(name) for name in packages}


def main(arguments: list[str] | None = None) -> int:
    options, begin = parse(arguments), time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    report = harness.open_report(options.out, options.resume, device)
    report["environment"] |= versions()
    report["kind"] = "step"
    options.lost = report.setdefault("lost", {})
    options.peak = report.setdefault("peak", None) or peak_of(device)
    report["peak"] = options.peak
    setup = Setup(
        device, options.dtype, **{name: getattr(options, name) for name in SHARED_SETTINGS}
    )
    done, missing = {key_of(entry) for entry in report["results"]}, 0

    def late() -> bool:
        return time.perf_counter() - begin > options.budget

    for case, ratio in work(options):
        layout = (
            layout_of(case.pairs)
            if ratio is None
            else f"prompt : response {ratio} : 1"
            if ratio
            else "nothing shared"
        )
        if key_of(entry_of(case, setup, layout)) in done:
            continue
        if late():
            missing += 1
            continue
        cap_memory(device, case.memory_cap)
        try:
            if ratio is None:
                entry = measure(case, setup, options, late)
            else:
                entry = longest(case, ratio, setup, options, late)
        except harness.DeviceLost as error:
            name, reason = error.args
            report["lost"][name] = f"broke the GPU's context: {reason}"
            harness.write_report(report, options.out)
            print(f"\n{name} broke the GPU's context ({reason}): run again with --resume")
            return harness.GPU_LOST
        entry = judge(entry)
        show(entry)
        report["results"].append(json.loads(json.dumps(entry)))
        report["extrapolated"] = extrapolate(report["results"])
        harness.write_report(report, options.out)
    for line in report.get("extrapolated", []):
        cells = ", ".join(
            f"{row['name']} {row['extrapolated_seconds']:.3f} s" for row in line["table"]
        )
        print(f"\nextrapolated from {line['from_layers']} to {line['full_layers']} layers, not measured: "
              f"{line['suite']}, {line['label']}: {cells}")  # fmt: skip
    if missing:
        print(f"{missing} cases not measured within {options.budget:g} s")
    return int(missing > 0 or any(failed(entry) for entry in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
