"""The summary of runs: facts in words, and the first and last values of the key metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from una_fast.report.metric_table import EVAL, sentence_of
from una_fast.report.plain import (
    count_of,
    mapping_of,
    mappings_of,
    number_in_words,
    text_of,
)
from una_fast.report.render import breakable
from una_fast.report.run_files import RunFiles, Series

Row = tuple[str, list[str]]  # a name, and the value of every run

KEY_METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "una/calibration_error",
    "reward",
    "kl",
    "log_ratio",
    "completions/mean_length",
)


def across(found: Sequence[dict[str, str]]) -> list[Row]:
    """Return the rows of the runs' mappings; a missing value is empty."""
    names: dict[str, None] = {}
    for values in found:
        names |= dict.fromkeys(values)
    rows = []
    for name in names:
        rows.append((name, [values.get(name, "") for values in found]))
    return rows


def facts_of(run: RunFiles) -> dict[str, str]:
    """Return model, method, data, steps, time and memory of a run in words, as far as known."""
    facts = {"Directory": str(run.directory)}
    if run.config:
        facts["Model"] = text_of(run.config.get("model"))
        facts["Method"] = _method(run.config)
    if run.sources:
        facts["Data"] = _data(run)
    facts["Steps"] = _steps(run)
    seconds = _seconds(run)
    if seconds:
        facts["Time in steps"] = _duration(seconds)
        if "device" in run.decisions:
            facts["Time in steps"] += f" on {text_of(run.decisions['device'])}"
    peak = last_of(run.series.get("memory/peak_gib", {}))
    if peak is not None:
        facts["Peak of memory"] = f"{peak:.3g} GiB"
    return facts


def _method(config: dict[str, Any]) -> str:
    """Return mode, losses, beta and the trained weights in words."""
    losses = [f"{kind} {text_of(config[kind])}" for kind in _LOSSES if kind in config]
    trained = "all weights"
    if isinstance(config.get("lora"), dict):
        trained = f"LoRA of rank {text_of(config['lora'].get('r'))}"
    words = [text_of(config.get("mode", "offline")), ", ".join(losses)]
    words += [f"beta {text_of(config.get('beta'))}", trained]
    return "; ".join(filter(None, words))


_LOSSES = ("pair", "binary", "score")


def _data(run: RunFiles) -> str:
    """Return the counts of the sources for training together."""
    counts: Counter[str] = Counter()
    units: Counter[str] = Counter()
    for source in mappings_of(run.sources)[: training_sources(run)]:
        for name in ("records", "examples"):
            counts[name] += count_of(source.get(name))
        for kind, count in mapping_of(source.get("units")).items():
            units[kind] += count_of(count)
    words = f"{counts['records']:,} records, {counts['examples']:,} used"
    if units:
        words += f" ({units_in_words(units)})"
    return words


def training_sources(run: RunFiles) -> int:
    """Return the count of the sources for training; sources for evaluation stand behind."""
    paths = run.config.get("data")
    return len(paths) if isinstance(paths, list) else len(run.sources)


def units_in_words(units: dict[str, Any]) -> str:
    """Return feedback units by kind in words."""
    return ", ".join(f"{count_of(count):,} {kind}" for kind, count in units.items())


def _steps(run: RunFiles) -> str:
    """Return steps, epochs and tokens in words."""
    words = [f"{run.steps:,}"]
    epoch = last_of(run.series.get("epoch", {}))
    if epoch is not None:
        words.append(f"{epoch:.3g} epoch{'' if epoch == 1 else 's'}")
    tokens = filter(math.isfinite, run.series.get("tokens", {}).values())
    total = sum(tokens)
    if total:
        words.append(f"{total:,.0f} tokens")
    return ", ".join(words)


def _seconds(run: RunFiles) -> float:
    """Return the seconds of training: tokens of every report, divided by the speed."""
    speeds = run.series.get("tok_per_sec", {})
    total = 0.0
    for step, tokens in run.series.get("tokens", {}).items():
        speed = speeds.get(step, 0.0)
        if speed > 0 and math.isfinite(tokens / speed):
            total += tokens / speed
    return total


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


# ---- key metrics --------------------------------------------------------------------------------


def tiles_of(run: RunFiles) -> list[dict[str, str]]:
    """Return the key metrics of a run, of the evaluation if the run has it."""
    tiles = []
    for metric in KEY_METRICS:
        name = EVAL + metric if EVAL + metric in run.series else metric
        series = run.series.get(name, {})
        if not series:
            continue
        since = f"from {number_in_words(_first_of(series))}"
        if len(series) == 1:
            since = f"at step {min(series):,} alone"
        tile = {"name": breakable(name), "sentence": sentence_of(name), "since": since}
        tiles.append(tile | {"last": number_in_words(last_of(series))})
    return tiles


def changes_of(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the first and last values of the key metrics, of training and of the evaluation."""
    rows = []
    for metric in KEY_METRICS:
        for name in (EVAL + metric, metric):
            found = [run.series.get(name, {}) for run in runs]
            if any(found):
                rows.append((breakable(name), [_change(series) for series in found]))
    return rows


def _change(series: Series) -> str:
    if not series:
        return ""
    return f"{number_in_words(_first_of(series))} → {number_in_words(last_of(series))}"


def _first_of(series: Series) -> float:
    return series[min(series)]


def last_of(series: Series) -> float | None:
    """Return the value of the last step; None without a value."""
    return series[max(series)] if series else None
