"""The numbers of a contender: errors against float64, extra memory, time in turns.

Extra memory is the peak beyond inputs, returned gradients and, for a narrower, trained head, a
float32 [V, D] accumulator. On a CPU torch's dispatcher counts the memory (counters.py), on a
GPU the caching allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from una_fast.bench import attempts
from una_fast.bench.contenders import Contender, Una, step
from una_fast.bench.gemms import gemm_jobs, reference
from una_fast.bench.inputs import Inputs
from una_fast.bench.timing import CEILING, Job, alternate, keep_quiet, spread_of, typical
from una_fast.counters import FlopCounter, LiveBytes

VALID_REFERENCE = 0.9  # of the rate of an 8192^3 product


def cleaner(x: Inputs) -> Callable[[], None]:
    """Return a function to drop the gradients of x and the GPU's cached memory."""

    def clean() -> None:
        x.clear()
        attempts.release()

    return clean


def alloc_retries(device: torch.device) -> int:
    """Return how often the caching allocator had to give memory back and ask again."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device.type == "cuda" else 0


def costs(contender: Contender, x: Inputs) -> dict[str, Any]:
    """Return the peak extra bytes of a step; on a CPU also the counted passes."""
    if x.device.type != "cpu":
        return {"extra_bytes": extra_bytes(contender, x)}
    with FlopCounter() as flop:
        step(contender, x)
    passes = flop.passes(x.rows, x.dim, x.vocab)
    return {"passes": passes, "extra_bytes": extra_bytes(contender, x)}


def accumulator_bytes(x: Inputs) -> int:
    """Return the bytes of the float32 [V, D] accumulator of a narrower, trained head."""
    narrow = x.trained and x.weight.dtype != torch.float32
    return 4 * x.weight.numel() if narrow else 0


def extra_bytes(contender: Contender, x: Inputs) -> int:
    """Return the peak bytes of a step beyond inputs, gradients and accumulator."""
    if x.device.type == "cpu":
        with LiveBytes() as memory:
            step(contender, x)
        gradients = [leaf.grad for leaf in x.leaves.values()]
        return memory.peak(excluding=gradients) - accumulator_bytes(x)
    x.clear()
    attempts.release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(contender, x)
    torch.cuda.synchronize()
    returned = sum(leaf.grad.nbytes for leaf in x.leaves.values())
    return torch.cuda.max_memory_allocated() - before - returned - accumulator_bytes(x)


def sizes_of(x: Inputs) -> dict[str, int]:
    """Return rows, dim and vocab of inputs, as results name the sizes."""
    return {"rows": x.rows, "dim": x.dim, "vocab": x.vocab}


class Question(NamedTuple):
    """A question about a contender: a function with numbers as answer, and a limit in seconds."""

    ask: Callable[[], dict[str, Any]]
    seconds: float


def examine(
    contender: Contender,
    row: dict[str, Any],
    x: Inputs,
    questions: Sequence[Question],
    reason: str | None = None,
) -> bool:
    """Put the answers of a contender into `row`, or the reason why no time is taken.

    contender: named in messages
    row: of the table, changed in place
    x: the inputs of the questions
    questions: asked in order, until a failure
    reason: known beforehand, so that no question is asked

    Returns whether the contender may be timed.
    """
    if isinstance(contender, Una):
        row["workspace_mb"] = contender.workspace_mb
    reason = reason or contender.unavailable(x)
    for question in questions:
        if reason:
            break
        ask, seconds = question
        found, reason = attempts.attempt(contender.name, ask, cleaner(x), seconds)
        row |= found or {}
    if reason:
        row["reason"] = reason
    x.clear()
    return not reason


class Rounds(NamedTuple):
    """The timed rounds.

    runs: number of rounds
    budget: seconds of all rounds; three rounds are made in any case
    busy: programs to run beside
    tell: told the name of every finished job
    """

    runs: int
    budget: float
    busy: int = 0
    tell: Callable[[str], None] = keep_quiet


class Times(NamedTuple):
    """Seconds of jobs; the bare products have names of two parts, see gemm_jobs.

    best: name -> seconds to count
    spreads: name -> quartiles, spread and single runs
    failed: name -> reason
    retries: of the caching allocator, at some contender's expense
    """

    best: dict[Any, float]
    spreads: dict[Any, dict[str, Any]]
    failed: dict[Any, str]
    retries: int


def time_all(ready: Sequence[Contender], x: Inputs, rounds: Rounds) -> Times:
    """Time the contenders and the bare products in turns."""

    def cleared() -> tuple:
        x.clear()
        return ()

    jobs = gemm_jobs(x)
    for c in ready:
        jobs[c.name] = Job(cleared, functools.partial(step, c, x))
    retries = alloc_retries(x.device)
    runs, budget, busy, tell = rounds
    # A warm-up: costs() gave the cache back.
    _, failed = alternate(jobs, 1, budget, x.device, cleaner(x), tell)
    runnable = {name: job for name, job in jobs.items() if name not in failed}
    times, late = alternate(runnable, runs, budget, x.device, cleaner(x), tell)
    failed |= late
    best: dict[Any, float] = {}
    spreads = {}
    for name, values in times.items():
        if name not in failed:
            best[name] = typical(values, x.device, busy)
            spreads[name] = spread_of(values, best[name]) | {"all_seconds": values}
    return Times(best, spreads, failed, alloc_retries(x.device) - retries)


def put_times(
    table: Mapping[str, dict[str, Any]], ready: Sequence[Contender], x: Inputs, times: Times
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the times of contenders into rows of a table, beside the time of the bare products.

    table: name -> row, changed in place
    ready: the timed contenders
    x: the inputs
    times: of contenders and bare products

    Returns (the reference: the bare products in detail, the row of the bare products).
    """
    best = times.best
    products = {name: value for name, value in best.items() if isinstance(name, tuple)}
    ref = reference(products, x.rows, x.trained)
    flop = 2 * x.rows * x.dim * x.vocab
    ref["tflops"] = ref["passes"] * flop / ref["seconds"] / 1e12
    ref["ceiling_tflops"] = 2 * CEILING[x.device.type] ** 3 / best["ceiling"] / 1e12
    ref["valid"] = ref["tflops"] >= VALID_REFERENCE * ref["ceiling_tflops"]
    ref["alloc_retries"] = times.retries
    for c in ready:
        row = table[c.name]
        if c.name in times.failed:
            row["reason"] = times.failed[c.name]
            continue
        seconds = best[c.name]
        bare = ref["seconds"] - (0 if c.same_work else ref["each"]["logits"])
        row |= {"seconds": seconds, **times.spreads[c.name], "times bare mm": seconds / bare}
        row["tflops"] = row["passes"] * flop / seconds / 1e12
    roof = sizes_of(x) | {"name": "bare mm", "seconds": ref["seconds"], "times bare mm": 1.0}
    return ref, roof | {"passes": ref["passes"], "tflops": ref["tflops"]}
