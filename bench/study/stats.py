"""The statistics of the study: KL bins, selection of settings, intervals over seeds, and verdicts.

candidate   a setting (lr, beta) of a method at one of the steps with an evaluation
selection   per method and KL bin: the candidate with the best mean gold over the selection
            seeds, among candidates with a mean KL in the bin
frontier    gold and KL of the chosen candidates on the reporting seeds, never seen by selection
interval    mean +- t s / sqrt(n), 90 %
verdict     on the differences in gold to another method, seed by seed, in one bin
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

MARGIN = 0.02  # of gold: less than this either way is no difference
# 95 % quantiles of Student's t by degrees of freedom, for two-sided 90 % intervals
T95 = (math.inf, 6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125)
T95 += (1.7959, 1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247)

Run = dict[str, Any]
Bin = tuple[float, float]


class Candidate(NamedTuple):
    """A setting, at one of the steps of its runs."""

    lr: float
    beta: float
    step: int


class Point(NamedTuple):
    """Gold and KL of a policy."""

    gold: float
    kl: float


class Interval(NamedTuple):
    """The mean of `count` values with its interval."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Return the mean with a 90 % interval; infinitely wide for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = T95[min(count - 1, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def verdict(differences: Sequence[float], margin: float = MARGIN) -> str:
    """Return the verdict on differences in gold, seed by seed.

    equivalent: the interval lies inside +-margin; better or worse: outside, on that side; else
    inconclusive.
    """
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
    """Return the bin (low, high] of a KL."""
    return next((b for b in bins if b[0] < kl <= b[1]), None)


def candidates(runs: Iterable[Run], what: str) -> dict[Candidate, dict[int, Point]]:
    """Return {candidate: {seed: gold and KL}} of one method's runs made for `what`."""
    found: dict[Candidate, dict[int, Point]] = defaultdict(dict)
    for run in runs:
        if run["what"] == what and "failed" not in run:
            for point in run["points"]:
                own = Candidate(run["lr"], run["beta"], point["step"])
                found[own][run["seed"]] = Point(point["gold"], point["kl"])
    return found


def select(runs: Iterable[Run], bins: Sequence[Bin]) -> dict[Bin, Candidate]:
    """Return the chosen candidate of every bin.

    A setting must have finished on all selection seeds.
    """
    found = candidates(runs, "select")
    seeds = set().union(*found.values())
    best: dict[Bin, tuple[float, Candidate]] = {}
    for candidate, points in found.items():
        mean = mean_point(points.values())
        own = bin_of(mean.kl, bins)
        if own is None or points.keys() != seeds:
            continue
        best[own] = max(best.get(own, (-math.inf, candidate)), (mean.gold, candidate))
    return {b: best[b][1] for b in bins if b in best}


def frontier(runs: Sequence[Run], bins: Sequence[Bin]) -> dict[Bin, dict[int, Point]]:
    """Return {bin: {reporting seed: gold and KL of the chosen candidate}}."""
    reported = candidates(runs, "report")
    chosen = select(runs, bins)
    return {b: dict(sorted(reported[c].items())) for b, c in chosen.items() if c in reported}


def paired(ours: dict[int, Point], theirs: dict[int, Point]) -> list[float]:
    """Return the differences in gold over the common seeds."""
    return [ours[seed].gold - theirs[seed].gold for seed in sorted(ours.keys() & theirs.keys())]


def slope(line: dict[Bin, dict[int, Point]], at: Bin) -> float:
    """Return the gold per nat of a frontier around a bin.

    Between the means of the neighbours of the bin, or of the bin and the nearest bin.
    """
    bins = list(line)
    k = bins.index(at)
    first, last = bins[max(k - 1, 0)], bins[min(k + 1, len(bins) - 1)]
    if first == last:
        return 0.0
    low, high = mean_point(line[first].values()), mean_point(line[last].values())
    return (high.gold - low.gold) / (high.kl - low.kl) if high.kl > low.kl else 0.0


def mean_point(points: Collection[Point]) -> Point:
    """Return the mean gold and the mean KL."""
    gold = statistics.fmean(p.gold for p in points)
    return Point(gold, statistics.fmean(p.kl for p in points))


def at_equal_kl(ours: dict[int, Point], theirs: dict[int, Point], per_nat: float) -> list[float]:
    """Return `paired`, less the share of the difference in KL at so much gold per nat."""
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = ours[seed], theirs[seed]
        found.append(a.gold - b.gold - per_nat * (a.kl - b.kl))
    return found


def overall(verdicts: Iterable[str]) -> str:
    """Return one verdict for a comparison over all bins.

    better or worse: the verdict of some bin, and the opposite of no bin; mixed: both verdicts
    appear; equivalent: the only verdict beside inconclusive bins.
    """
    found = set(verdicts) - {"inconclusive"}
    if {"better", "worse"} <= found:
        return "mixed"
    for word in ("better", "worse", "equivalent"):
        if word in found:
            return word
    return "inconclusive"
