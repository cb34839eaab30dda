"""Timing of functions that take turns, and the machine's own rates."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from una_fast.bench import attempts

LONGEST_RUN = 60.0  # seconds, of one timed run on a GPU
CEILING = {"cuda": 8192, "cpu": 1024}  # rows and columns of the square product


class Job(NamedTuple):
    """run(*prepare()), of which `run` is timed."""

    prepare: Callable[[], tuple]
    run: Callable[..., Any]


def keep_quiet(words: str) -> None:
    """Stay silent: for callers without a progress bar."""


def seconds_of(job: Job, device: torch.device) -> float:
    """Return the seconds of one run: CUDA events on a GPU, the clock on a CPU."""
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
    jobs: dict[Any, Job],
    runs: int,
    budget: float,
    device: torch.device,
    clean: Callable[[], None] = attempts.release,
    tell: Callable[[str], None] = keep_quiet,
) -> tuple[dict[Any, list[float]], dict[Any, str]]:
    """Run all jobs in rounds of random order, so that no job always follows the same job.

    runs: number of rounds
    budget: seconds of all rounds; three rounds are made in any case
    clean: called after a failure
    tell: told the name of every finished job

    Returns (seconds of every run by job, reason by job that failed). A failed job is left out of
    the rounds that follow.
    """
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
            limit = LONGEST_RUN if device.type == "cuda" else None  # a CPU is shared
            value, reason = attempts.attempt(str(name), run, clean, limit)
            if reason == "out of memory":
                # Once more: the cache, full of the other jobs' blocks, has been given back.
                value, reason = attempts.attempt(str(name), run, clean, limit)
            tell(str(name))
            if reason:
                failed[name] = reason
            else:
                times[name].append(value)
    return times, failed


def typical(values: list[float], device: torch.device, busy: int = 0) -> float:
    """Return the median of `values`; on a CPU, shared with more work, the minimum.

    values: seconds
    device: of the runs
    busy: programs beside the runs on purpose; a busy machine belongs to the result
    """
    return min(values) if device.type == "cpu" and not busy else statistics.median(values)


def spread_of(values: list[float], middle: float) -> dict[str, Any]:
    """Return the quartiles of `values`, and the distance of the outer two relative to `middle`."""
    quartiles = values * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"quartiles": quartiles, "spread": (quartiles[2] - quartiles[0]) / middle}


def ceiling_job(device: torch.device, dtype: torch.dtype) -> Job:
    """Return the product of two square matrices."""
    n = CEILING[device.type]
    square = torch.randn(n, n, device=device, dtype=dtype)

    def operands() -> tuple:
        return square, square.T, torch.empty_like(square)

    return Job(operands, lambda a, b, out: torch.mm(a, b, out=out))


def ceilings(device: torch.device) -> dict[str, float]:
    """Return this machine's own rates: of a square product, and of a copy (bytes read, written)."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randn(1 << (30 if cuda else 22), device=device, dtype=dtype)
    copy = Job(lambda: (torch.empty_like(source),), lambda out: out.copy_(source))
    times, failed = alternate({"gemm": ceiling_job(device, dtype), "copy": copy}, 12, 10, device)
    if failed:
        return failed
    warm = {name: values[2:] for name, values in times.items()}  # the first two warm up
    best = {name: typical(values, device) for name, values in warm.items()}
    n = CEILING[device.type]
    return {
        "gemm_size": n,
        "gemm_tflops": 2 * n**3 / best["gemm"] / 1e12,
        "copy_tb_per_s": 2 * source.nbytes / best["copy"] / 1e12,
    }
