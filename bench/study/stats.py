"""The statistics of the study: KL bins, selection of settings, intervals over seeds, and verdicts.

candidate    a setting (lr, beta) of a method at one of the steps where its runs are evaluated
selection    per method and KL bin: the candidate with the best mean gold over the selection seeds, of those whose
             mean KL there lies in the bin
frontier     gold and KL of the chosen candidates on the reporting seeds, which selection never sees
interval     mean +- t s / sqrt(n), 90 %
verdict      on the differences in gold to another method, seed by seed, in one bin
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MARGIN = 0.02  # of gold: less than this either way is no difference
# 95 % quantiles of Student's t by degrees of freedom, for two-sided 90 % intervals
T95 = (math.inf, 6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125)
T95 += (1.7959, 1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247)

Run = dict[str, Any]
Bin = tuple[float, float]


class Candidate(NamedTuple):
    lr: float
    beta: float
    step: int


class Point(NamedTuple):
    gold: float
    kl: float


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """The mean with its 90 % interval; infinitely wide for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = T95[min(count - 1, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def verdict(differences: Sequence[float], margin: float = MARGIN) -> str:
    """equivalent: the interval lies inside +-margin; better or worse: outside of it, on that side; else
    inconclusive."""
    if len(differences) < 2:
        return "inconclusive"
    found = interval(differences)
    if -margin < found.low and found.high < margin:
        return "equivalent"
    if found.low > margin:
        return "better"
    if found.high < -margin:
        return "worse"
    return "inconclusive"


def bin_of(kl: float, bins: Sequence[Bin]) -> Bin | None:
    """The bin (low, high] that a KL lies in."""
    return next((b for b in bins if b[0] < kl <= b[1]), None)


def candidates(runs: Iterable[Run], what: str) -> dict[Candidate, dict[int, Point]]:
    """candidate -> {seed: gold and KL}, of the runs of one method that were made for `what`."""
    found: dict[Candidate, dict[int, Point]] = defaultdict(dict)
    for run in runs:
        if run["what"] == what and "failed" not in run:
            for point in run["points"]:
                own = Candidate(run["lr"], run["beta"], point["step"])
                found[own][run["seed"]] = Point(point["gold"], point["kl"])
    return found


def select(runs: Iterable[Run], bins: Sequence[Bin]) -> dict[Bin, Candidate]:
    """The chosen candidate of every bin that has one; a setting must have finished on all selection seeds."""
    found = candidates(runs, "select")
    seeds = {seed for points in found.values() for seed in points}
    best: dict[Bin, tuple[float, Candidate]] = {}
    for candidate, points in found.items():
        own = bin_of(statistics.fmean(p.kl for p in points.values()), bins)
        if own is None or points.keys() != seeds:
            continue
        gold = statistics.fmean(p.gold for p in points.values())
        best[own] = max(best.get(own, (-math.inf, candidate)), (gold, candidate))
    return {b: best[b][1] for b in bins if b in best}


def frontier(runs: Sequence[Run], bins: Sequence[Bin]) -> dict[Bin, dict[int, Point]]:
    """bin -> {reporting seed: gold and KL of the chosen candidate}."""
    reported = candidates(runs, "report")
    return {
        b: dict(sorted(reported[c].items())) for b, c in select(runs, bins).items() if c in reported
    }


def paired(ours: dict[int, Point], theirs: dict[int, Point]) -> list[float]:
    """Differences in gold over the seeds that both have."""
    return [ours[seed].gold - theirs[seed].gold for seed in sorted(ours.keys() & theirs.keys())]


def slope(line: dict[Bin, dict[int, Point]], at: Bin) -> float:
    """Gold per nat of a frontier around a bin: between the means of its neighbours, or the bin and the nearest."""
    bins = list(line)
    k = bins.index(at)
    first, last = bins[max(k - 1, 0)], bins[min(k + 1, len(bins) - 1)]
    if first == last:
        return 0.0
    (gold_0, kl_0), (gold_1, kl_1) = (
        (
            statistics.fmean(p.gold for p in line[b].values()),
            statistics.fmean(p.kl for p in line[b].values()),
        )
        for b in (first, last)
    )
    return (gold_1 - gold_0) / (kl_1 - kl_0) if kl_1 > kl_0 else 0.0


def at_equal_kl(ours: dict[int, Point], theirs: dict[int, Point], per_nat: float) -> list[float]:
    """`paired`, less what the difference in KL accounts for at so much gold per nat."""
    return [
        ours[s].gold - theirs[s].gold - per_nat * (ours[s].kl - theirs[s].kl)
        for s in sorted(ours.keys() & theirs.keys())
    ]


def overall(verdicts: Iterable[str]) -> str:
    """One word for a comparison over all bins: better or worse where that is so in some bin and the other in none;
    equivalent where that is all there is beside inconclusive bins."""
    found = set(verdicts) - {"inconclusive"}
    if {"better", "worse"} <= found:
        return "mixed"
    for word in ("better", "worse", "equivalent"):
        if word in found:
            return word
    return "inconclusive"
