#!/usr/bin/env python3
"""A run of an hour, with evaluation, checkpoints and TensorBoard; in the long form another one
beside it, with sampling and rewards. Memory must be flat within 2 % over the second half, open
files constant.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import Command, Trial, as_words, lines_in, main, online_words, train_words

SECONDS, SHORT_SECONDS = 3600.0, 20.0
EVERY = 5.0  # seconds between two looks
MOST_GROWTH = 0.02


class Look(NamedTuple):
    """The state of a process: seconds since its start, MiB resident, open files, threads, steps."""

    seconds: float
    mib: float
    files: int
    threads: int
    steps: int


def run(trial: Trial) -> None:
    """Soak an offline run and, in the long form, an online run beside it."""
    endless = {"epochs": 1_000_000, "learning_rate": 1e-5, "save_every": 50}
    offline = {"eval_data": trial.fixtures.evaluation, "eval_every": 20, "loggers": "[tensorboard]"}
    words = {"offline": train_words(trial.fixtures, **endless, **offline)}
    if not trial.short:
        online = {**endless, "batch_size": 2, "offset": "ema", "max_steps": 5_000_000}
        words["online"] = online_words(trial.fixtures, **online)
    seconds = SHORT_SECONDS if trial.short else float(os.environ.get("SOAK", SECONDS))
    soaks = [Soak(trial, kind, of_kind) for kind, of_kind in words.items()]
    start = time.monotonic()
    while time.monotonic() - start < seconds and any(s.command.is_running for s in soaks):
        time.sleep(min(EVERY, seconds / 8))
        for soak in soaks:
            soak.look(time.monotonic() - start)
    for soak in soaks:
        soak.report(trial)


class Soak:
    """A run that is looked at again and again."""

    def __init__(self, trial: Trial, kind: str, words: list[str]) -> None:
        """Start the command, and wait for its first step."""
        self.kind = kind
        self.out = trial.new_folder(f"soak-{kind}")
        output = as_words({"output_dir": self.out / "run"})
        self.command = Command([*words, *output], self.out / "log")
        self.metrics = self.out / "run" / "metrics.jsonl"
        self.command.when(lambda: lines_in(self.metrics) > 0)
        self.looks: list[Look] = []

    def look(self, seconds: float) -> None:
        """Note the state of the process, `seconds` after the start."""
        if self.command.is_running:
            self.looks.append(look(self.command.pid, seconds, lines_in(self.metrics)))

    def report(self, trial: Trial) -> None:
        """End the run, and report how its memory and open files went."""
        is_alive = self.command.is_running
        self.command.kill()
        result = self.command.wait()
        if not is_alive:
            trial.report(f"soak {self.kind}", False, result.last)
            return
        half = self.looks[len(self.looks) // 2 :]
        third = max(len(half) // 3, 1)
        # Means of the first and the last third: single looks catch a checkpoint being written.
        first, last = (mean(part, "mib") for part in (half[:third], half[-third:]))
        growth = last / first - 1
        files = [max(part.files for part in piece) for piece in (half[:third], half[-third:])]
        figures: dict[str, Any] = {
            "seconds": round(self.looks[-1].seconds),
            "steps": self.looks[-1].steps,
            "mib_at_half": round(first, 1),
            "mib_at_end": round(last, 1),
            "growth": round(growth, 5),
            "open_files": files,
            "threads": [half[0].threads, half[-1].threads],
            "output_mib": round(size_of(self.out) / 2**20, 1),
        }
        trial.figures[self.kind] = figures
        good = growth <= MOST_GROWTH and files[1] <= files[0]
        trial.report(f"soak {self.kind}", good or trial.short, str(figures))


def look(pid: int, seconds: float, steps: int) -> Look:
    """Look at a process."""
    values = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        values[name] = value.split()
    mib = int(values["VmRSS"][0]) / 1024
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Look(seconds, mib, files, int(values["Threads"][0]), steps)


def mean(looks: list[Look], name: str) -> float:
    return sum(getattr(look, name) for look in looks) / len(looks)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
