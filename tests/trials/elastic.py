#!/usr/bin/env python3
"""Kill a run and go on with another number of ranks: 1 -> 2 -> 1 and 2 -> 1 -> 2, full and LoRA.

The records keep their order, and losses and gradient norms are those of one rank to 1e-5. A run
that samples refuses another number of ranks by name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import Command, Result, Trial, main, metrics_of, online_words, train_words

PLANS = ((1, 2, 1), (2, 1, 2))
TOLERANCE = 1e-5
NUMBERS = ("loss", "eval_loss", "log_ratio", "eval_log_ratio", "grad_norm")
COUNTS = ("step", "tokens", "units", "response_tokens", "epoch")


def run(trial: Trial) -> None:
    """Compare every plan with a run on one rank; the short form takes the first plan."""
    root = trial.new_folder("elastic")
    offline = {
        "eval_data": trial.fixtures.evaluation,
        "epochs": 2,
        "save_every": 4,
        "eval_every": 6,
        "seed": trial.seed,
    }
    for name, settings in (("full", {}), ("lora", {"lora.r": 4})):
        words = train_words(trial.fixtures, **offline, **settings)
        truth = root / f"{name}-truth"
        result = life(words, truth, 1)
        assert result.kind == "ok", result.err
        for plan in PLANS[: 1 if trial.short else 2]:
            try_plan(trial, name, words, plan, truth)
        if trial.short:
            return
    try_online(trial, root)


def life(words: list[str], out: Path, ranks: int, stop: int | None = None) -> Result:
    """Run a command, resuming; kill everything when the checkpoint of step `stop` is there."""
    log = out.with_name(out.name + ".log")
    command = Command([*words, "--output_dir", out, "--resume", "true"], log, ranks=ranks)
    if stop is not None and command.when(lambda: (out / f"checkpoint-{stop}").exists()):
        command.kill()
    return command.wait(300)


def try_plan(trial: Trial, name: str, words: list[str], plan: tuple[int, ...], truth: Path) -> None:
    out = truth.with_name(f"{name}-{''.join(map(str, plan))}")
    stops = (8, 16, None)
    for ranks, stop in zip(plan, stops, strict=True):
        result = life(words, out, ranks, stop)
    case = f"{name} on {' -> '.join(map(str, plan))} ranks"
    if result.kind != "ok":
        trial.report(case, False, f"{result.kind} {result.last[:160]}")
        return
    wanted, got = metrics_of(truth), metrics_of(out)
    same_records = [counts(row) for row in wanted] == [counts(row) for row in got]
    worst = worst_difference(wanted, got) if same_records else float("inf")
    trial.figures[case] = worst
    note = f"largest difference {worst:.1e}, same records {same_records}"
    trial.report(case, worst <= TOLERANCE, note)


def counts(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in COUNTS]


def worst_difference(wanted: list[dict[str, Any]], got: list[dict[str, Any]]) -> float:
    """Return the largest difference of a number, relative where the number is above 1."""
    worst = 0.0
    for one, other in zip(wanted, got, strict=True):
        for name in NUMBERS:
            if name in one:
                size = max(abs(one[name]), 1.0)
                worst = max(worst, abs(one[name] - other[name]) / size)
    return worst


def try_online(trial: Trial, root: Path) -> None:
    words = online_words(trial.fixtures, save_every=4)
    life(words, root / "online", 1, stop=4)
    result = life(words, root / "online", 2)
    good = result.code != 0 and not result.timed_out and "ranks" in result.err
    lines = [line for line in result.err.splitlines() if "error:" in line]
    trial.report("online on 1 -> 2 ranks is refused", good, f"{(lines or [''])[0][:160]}")


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
