#!/usr/bin/env python3
"""Two ranks: a disk that fills, signals and death of the launcher, faults on one rank alone; and a
reward that changes the working directory of a single process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from common import (
    Command,
    Result,
    Trial,
    lines_in,
    main,
    online_words,
    train_words,
    whole_checkpoints,
)
from disk import can_mount, small_disk

REWARDS = """\
import os, sys
def _on_rank_1(error, completions):
    if os.environ.get("RANK") == "1":
        raise error
    return [0.5 * (number % 2) for number, _ in enumerate(completions)]
def wrong(completions, **_):
    return _on_rank_1(ValueError("only here"), completions)
def leaves(completions, **_):
    return _on_rank_1(SystemExit(0), completions)
def interrupts(completions, **_):
    return _on_rank_1(KeyboardInterrupt(), completions)
def moves(completions, **_):
    os.chdir("/")
    return [0.5 * (number % 2) for number, _ in enumerate(completions)]
"""


def run(trial: Trial) -> None:
    """Try every fault; the short form tries one."""
    root = trial.new_folder("two-ranks")
    (root / "rewards.py").write_text(REWARDS)
    faults = [
        lambda: try_full_disk(trial, root),
        lambda: try_signal(trial, root, signal.SIGTERM),
        lambda: try_signal(trial, root, signal.SIGINT),
        lambda: try_dead_launcher(trial, root, in_a_step=True),
        lambda: try_dead_launcher(trial, root, in_a_step=False),
        lambda: try_bad_record(trial, root),
        *(lambda name=name: try_reward(trial, root, name) for name in ("wrong", "leaves")),
        lambda: try_reward(trial, root, "interrupts"),
        lambda: try_moved(trial, root),
    ]
    for fault in trial.some(faults, 1, "fault"):
        fault()


def ended(result: Result) -> str:
    lines = [line for line in result.err.splitlines() if "error:" in line]
    return f"exit {result.code}, {result.seconds:.0f} s, {(lines or [result.last])[0][:120]}"


def try_full_disk(trial: Trial, root: Path) -> None:
    if not can_mount(root / "probe"):
        return
    with small_disk(root / "disk", "700k") as disk:
        words = train_words(trial.fixtures, save_every=3, output_dir=disk / "out")
        result = Command(words, root / "full.log", ranks=2).wait()
        good = not result.timed_out and not result.has_traceback_of_ours and "space" in result.err
        trial.report("disk full at a save", good and not [*disk.glob("out/*.tmp")], ended(result))


def started(trial: Trial, root: Path, name: str) -> tuple[Command, Path]:
    """Start a long run on two ranks; return it when it has taken four steps."""
    out = root / name
    words = train_words(trial.fixtures, save_every=3, epochs=30, output_dir=out)
    command = Command(words, root / f"{name}.log", ranks=2)
    command.when(lambda: lines_in(out / "metrics.jsonl") >= 4)
    return command, out


def try_signal(trial: Trial, root: Path, number: signal.Signals) -> None:
    """Signal the launcher, which hands the signal on."""
    command, out = started(trial, root, number.name)
    os.kill(command.pid, number)
    begin = time.monotonic()
    result = command.wait(60)
    seconds = time.monotonic() - begin
    whole, lines = whole_checkpoints(out), lines_in(out / "metrics.jsonl")
    good = not result.timed_out and not result.has_traceback_of_ours and not command.members()
    if number == signal.SIGTERM:
        good = good and whole[-1:] == [lines]
    note = f"ended {seconds:.1f} s later, whole {whole}, {lines} lines"
    trial.report(f"{number.name} to the launcher", good, f"{ended(result)}; {note}")


def try_dead_launcher(trial: Trial, root: Path, *, in_a_step: bool) -> None:
    """Kill the launcher; all ranks must be gone within 10 seconds."""
    name = "in a step" if in_a_step else "while loading"
    out = root / f"launcher-{int(in_a_step)}"
    words = train_words(trial.fixtures, save_every=3, epochs=30, output_dir=out)
    command = Command(words, root / f"launcher-{int(in_a_step)}.log", ranks=2)
    if in_a_step:
        command.when(lambda: lines_in(out / "metrics.jsonl") >= 4)
    else:
        command.when(lambda: len(command.members()) >= 3)
        time.sleep(trial.rng("launcher").uniform(0.5, 3))
    os.kill(command.pid, signal.SIGKILL)
    begin = time.monotonic()
    while command.members() and time.monotonic() - begin < 30:
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    left = command.members()
    command.kill()
    command.wait()
    note = f"ranks gone after {seconds:.1f} s; whole {whole_checkpoints(out)}"
    trial.report(f"launcher killed {name}", not left and seconds < 10, note)


def try_bad_record(trial: Trial, root: Path) -> None:
    bad = root / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    words = train_words(trial.fixtures, data=bad, output_dir=root / "bad")
    result = Command(words, root / "bad.log", ranks=2).wait()
    said = sum("bad.jsonl:1" in line for line in result.err.splitlines())
    good = not result.timed_out and result.code != 0 and said >= 1
    trial.report("a bad record", good, f"{ended(result)}; said {said} times")


def try_reward(trial: Trial, root: Path, name: str) -> None:
    """A reward that fails on rank 1 alone must end both ranks."""
    rewards = f"[{root / 'rewards.py'}:{name}]"
    words = online_words(trial.fixtures, rewards=rewards, max_steps=2, output_dir=root / name)
    command = Command(words, root / f"{name}.log", ranks=2)
    result = command.wait(90)
    good = not result.timed_out and result.code != 0 and not command.members()
    trial.report(f"a reward that {name} on one rank", good, ended(result))


def try_moved(trial: Trial, root: Path) -> None:
    rewards = f"[{root / 'rewards.py'}:moves]"
    words = online_words(trial.fixtures, rewards=rewards, max_steps=2, output_dir="relative")
    result = Command(words, root / "moves.log", cwd=root).wait()
    there = (root / "relative" / "model.safetensors").exists()
    elsewhere = Path("/relative").exists()
    with contextlib.suppress(OSError):
        os.rmdir("/relative")
    good = (there or result.code != 0) and not elsewhere
    trial.report("a reward that changes the working directory", good, ended(result))


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
