"""Read the files of a run: finished, stopped, or still running.

    metrics.jsonl      series: metric -> steps and values
    completions.jsonl  samples of the first, the middle and the last step
    config.yaml, resolved.json, data.json, comparison.json, plan.json   plain values

A missing file is left out; an unreadable line or file is told in `notes`. Only a directory without
metrics.jsonl is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from una_fast.printable import printable
from una_fast.settings_file import read_settings

METRICS = "metrics.jsonl"
SAMPLES = 8  # of a step
LAST_STEP = 2**53  # larger numbers of steps are damage

# How `Reporter.completions` begins a line: steps are found without reading the texts.
_STEP = re.compile(rb'\{"step": (\d+)[,}]')

Series = dict[int, float]  # step -> value


@dataclass
class RunFiles:
    """A run, from the files of the output directory.

    directory: output directory of the run
    name: the run among the others of the page
    series: metric -> step -> value; values may be NaN or infinite
    samples: step -> lines of completions.jsonl, at most SAMPLES of a step
    config: settings; empty if config.yaml is missing
    decisions: of resolved.json
    sources: of data.json
    comparison: of comparison.json
    plan: planned memory of the largest batch, of plan.json
    notes: on unreadable files and lines
    """

    directory: Path
    name: str
    series: dict[str, Series] = field(default_factory=dict)
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Return the last step with a metric."""
        return max((max(series) for series in self.series.values()), default=0)


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """Read the files of runs; ValueError for a directory without a run."""
    names = _names([directory.absolute() for directory in directories])
    return [_read_run(*named) for named in zip(directories, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return names of directories: the last part, or more parts if runs share the last."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _read_run(directory: Path, name: str) -> RunFiles:
    problem = None
    if not directory.is_dir():
        problem = "is no directory"
    elif not (directory / METRICS).is_file():
        problem = f"holds no {METRICS}"
    if problem:
        raise ValueError(f"RUN {printable(directory)} {problem}; give the output_dir of a run")
    run = RunFiles(directory, name)
    run.config = _read(run, "config.yaml", read_settings, dict)
    run.decisions = _read(run, "resolved.json", _read_json, dict)
    run.sources = _read(run, "data.json", _read_json, list)
    run.comparison = _read(run, "comparison.json", _read_json, dict)
    run.plan = _read(run, "plan.json", _read_json, dict)
    _read_metrics(run)
    _read_samples(run)
    return run


def _read(run: RunFiles, name: str, read: Callable[[Path], Any], kind: type) -> Any:
    """Return the value of a file, or an empty value; an unreadable file is noted."""
    path = run.directory / name
    if not path.is_file():
        return kind()
    try:
        value = read(path)
    except (ValueError, OSError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read: {printable(error)}")
        return kind()
    if not isinstance(value, kind):
        run.notes.append(f"{name} is left out: it holds no {kind.__name__}")
        return kind()
    return value


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _object(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line of JSON; None for another value."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_metrics(run: RunFiles) -> None:
    """Read the series; the last line may be half written, more unreadable lines are noted."""
    unread = 0
    with (run.directory / METRICS).open("rb") as file:
        for line in file:
            values = _object(line)
            step = None if values is None else values.pop("step", None)
            if isinstance(step, int) and 0 <= step < LAST_STEP:
                _add(run.series, step, values)
            elif line.endswith(b"\n") and line.strip():
                unread += 1
    if unread:
        run.notes.append(f"{METRICS}: {unread} lines cannot be read, and are left out")
    is_offline = run.config.get("mode", "offline") == "offline"
    for prefix in ("", "eval_"):
        # Older runs on records named the log-ratio so; a KL is that of samples.
        if is_offline and f"{prefix}log_ratio" not in run.series and f"{prefix}kl" in run.series:
            run.series[f"{prefix}log_ratio"] = run.series.pop(f"{prefix}kl")


def _add(series: dict[str, Series], step: int, values: dict[str, Any]) -> None:
    """Add the numbers of a line; a later line of the same step wins."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            series.setdefault(name, {})[step] = _as_float(value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _read_samples(run: RunFiles) -> None:
    """Read samples of the first, the middle and the last step.

    The file may be much larger than the memory: the places of the steps are found first.
    """
    path = run.directory / "completions.jsonl"
    if not path.is_file():
        return
    places: dict[int, int] = {}
    with path.open("rb") as file:
        place = 0
        for line in file:
            found = _STEP.match(line)
            if found is not None and line.endswith(b"\n"):
                places.setdefault(int(found[1]), place)
            place += len(line)
        steps = sorted(places)
        chosen = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
        for step in sorted(chosen):
            file.seek(places[step])
            run.samples[step] = _samples_of(file, step)


def _samples_of(file: Any, step: int) -> list[dict[str, Any]]:
    """Return samples of a step. file: at the first line of the step."""
    samples: list[dict[str, Any]] = []
    for line in file:
        sample = _object(line)
        if sample is None or sample.get("step") != step or len(samples) == SAMPLES:
            break
        samples.append(sample)
    return samples
