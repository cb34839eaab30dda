#!/usr/bin/env python3
"""SIGKILL at random instants: 1 and 2 ranks, saves in the foreground and in the background,
evaluation, the last step, precompute-ref.

A run is killed again and again, going on each time, and then ends by itself: bitwise as a run that
was never killed. No kill may lose a checkpoint that was whole before it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    Command,
    Trial,
    differences,
    lines_in,
    main,
    preload,
    train_words,
    una_fast,
    whole_checkpoints,
)

PATIENCE = 60.0  # seconds for the instant of a kill

# Settings, and kills on one rank and on two in the long form: 60 in all.
RUNS: dict[str, tuple[dict[str, Any], int, int]] = {
    "synchronous saves": ({"save_every": 2}, 9, 4),
    "saves in the background": ({"save_every": 1, "save_async": "true"}, 12, 5),
    "evaluation": ({"save_every": 3, "eval_every": 1}, 9, 3),
    "the last step": ({"save_every": 12, "max_steps": 12, "keep_checkpoints": 1}, 6, 3),
}
PRECOMPUTE = 9


def run(trial: Trial) -> None:
    """Kill every kind of run."""
    preload()
    for name, (settings, on_one, on_two) in trial.some([*RUNS.items()], 1, "kind"):
        words = train_words(
            trial.fixtures, eval_data=trial.fixtures.evaluation, epochs=2, **settings
        )
        kill_again_and_again(trial, name, words, 1, 1 if trial.short else on_one)
        if not trial.short:
            kill_again_and_again(trial, name, words, 2, on_two)
    if not trial.short:
        kill_precompute(trial, PRECOMPUTE)


# ---- training ----


def kill_again_and_again(trial: Trial, name: str, words: list[str], ranks: int, kills: int) -> None:
    """Kill a run `kills` times, let it end, and compare it with a run that was never killed."""
    root = trial.new_folder(f"kills-{name.replace(' ', '-')}-{ranks}")
    truth, out = root / "truth", root / "out"
    live(words, truth, ranks, None)
    total = lines_in(truth / "metrics.jsonl")
    rng = trial.rng("kills", name, ranks)
    faults, done = [], 0
    for _ in range(3 * kills):
        condition = instant(rng, out, total, last_step=name == "the last step")
        before, killed = live(words, out, ranks, condition)
        after = whole_checkpoints(out)
        if before and (not after or max(after) < max(before)):
            faults.append(f"kill {done + 1}: {before} -> {after}")
        done += killed
        if done == kills:
            break
        if not killed:  # it has ended before its instant: once more from the start
            faults += [f"{wrong} differ" for wrong in [differences(out, truth)] if wrong]
            shutil.rmtree(out)
    live(words, out, ranks, None)
    faults += [f"{wrong} differ" for wrong in [differences(out, truth)] if wrong]
    trial.report(
        f"{name}, {ranks} rank{'s' * (ranks > 1)}",
        not faults and done == kills,
        f"{done} kills {'; '.join(faults)}",
    )
    trial.figures["kills"] = trial.figures.get("kills", 0) + done


def instant(rng: random.Random, out: Path, total: int, *, last_step: bool) -> Callable[[], bool]:
    """Return a condition that begins to hold at an instant of interest, drawn at random.

    rng: draws the instant
    out: directory of the run
    total: lines of the metrics of a whole run
    last_step: only around the writing of the last checkpoint and of the final model
    """
    now = lines_in(out / "metrics.jsonl")
    line = min(now + rng.randint(1, 6), total - 1)
    seen = names_in(out)
    kinds = {
        "a step": lambda: lines_in(out / "metrics.jsonl") >= line,
        "a half-written checkpoint": lambda: any("checkpoint-" in x for x in asides(out)),
        "a new name": lambda: names_in(out) - seen and lines_in(out / "metrics.jsonl") > now,
    }
    if last_step:
        kinds = {
            "the last line": lambda: lines_in(out / "metrics.jsonl") >= total - 1,
            "the last checkpoint": lambda: any("checkpoint-" in x for x in asides(out)),
            "the final model": lambda: "model.tmp" in asides(out) or (out / "COMPLETE").exists(),
        }
    return kinds[rng.choice(sorted(kinds))]


def names_in(out: Path) -> set[str]:
    return {path.name for path in out.glob("checkpoint-*")}


def asides(out: Path) -> set[str]:
    return {path.name for path in out.glob("*.tmp")}


def live(
    words: list[str], out: Path, ranks: int, condition: Callable[[], bool] | None
) -> tuple[list[int], bool]:
    """Run a command, resuming, until it ends or a condition holds; then kill it a little later.

    Returns the checkpoints that were whole at the kill, and whether it was killed.
    """
    words = [*words, "--output_dir", out, "--resume", "true"]
    delay = random.Random(repr((out.name, lines_in(out / "metrics.jsonl")))).expovariate(100)
    found: list[Any] = [[], False]

    def kill_at_the_instant(is_running: Callable[[], bool], kill: Callable[[], None]) -> None:
        deadline = time.monotonic() + PATIENCE
        while condition is not None and is_running() and time.monotonic() < deadline:
            if condition():
                time.sleep(delay)
                found[0] = sorted(named_whole(out))
                kill()
                found[1] = True
                return
            time.sleep(0.0005)

    if ranks > 1:
        command = Command(words, out.with_name(f"{out.name}.log"), ranks=ranks)
        kill_at_the_instant(lambda: command.is_running, command.kill)
        result = command.wait(240)
    else:

        def during(pid: int) -> None:
            def is_running() -> bool:
                return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

            kill_at_the_instant(is_running, lambda: os.kill(pid, signal.SIGKILL))

        result = una_fast(words, during=during, timeout=240)
    if not found[1] and result.code != 0:
        print(f"# {out}: {result.kind} {result.last[:200]}", flush=True)
    return found[0], found[1]


def named_whole(out: Path) -> list[int]:
    """Return the steps of checkpoints with a manifest; quick, without reading their files."""
    paths = out.glob("checkpoint-*/COMPLETE")
    names = [path.parent.name.partition("-")[2] for path in paths]
    return [int(name) for name in names if name.isdigit()]


# ---- precompute-ref ----


def kill_precompute(trial: Trial, kills: int) -> None:
    """Kill precompute-ref; its files are those of a command that was never killed."""
    root = trial.new_folder("kills-precompute")
    fixtures = trial.fixtures
    words = ["precompute-ref", "--model", fixtures.model, "--data", fixtures.mixed]
    words += ["--eval_data", fixtures.evaluation, "--device", "cpu"]
    truth, out = root / "truth", root / "out"
    una_fast([*words, "--output_dir", truth])
    wanted = files_in(truth)
    rng = trial.rng("precompute")
    wrong, killed = [], 0
    progress = out / "data-00-mixed.jsonl.logps.tmp"
    for number in range(kills):
        lines = min(lines_in(progress) + rng.randint(1, 9), 48)
        delay = rng.expovariate(200)

        def during(pid: int, lines: int = lines, delay: float = delay) -> None:
            nonlocal killed
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return
                if lines_in(progress) >= lines:
                    time.sleep(delay)
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                    return
                time.sleep(0.0005)

        una_fast([*words, "--output_dir", out], during=during)
        for name, content in files_in(out).items():
            if content != wanted[name]:
                wrong.append(f"kill {number}: {name} looks whole")
    result = una_fast([*words, "--output_dir", out])
    good = result.kind == "ok" and not wrong and files_in(out) == wanted
    trial.report("precompute-ref", good, f"{killed} kills {'; '.join(wrong)}")
    trial.figures["kills"] = trial.figures.get("kills", 0) + killed


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder that look whole, by name."""
    found = {}
    for path in folder.glob("*.json*"):
        if path.suffix != ".tmp":
            found[path.name] = path.read_bytes()
    return found


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
