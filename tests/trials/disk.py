#!/usr/bin/env python3
"""Disks without room, limits of file sizes, directories that cannot be written in, and signals.

Allowed is one line that says what is wrong, with earlier checkpoints and metrics intact. Small
disks are tmpfs, which needs root: without, their cases are left out, and the output says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import (
    Result,
    Trial,
    forked,
    lines_in,
    main,
    preload,
    train_words,
    una_fast,
    whole_checkpoints,
)

SIZES = ("64k", "200k", "420k", "600k", "800k", "1100k")
NOBODY = 65534


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size on a folder for the block."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "trial", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with small_disk(folder, "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        print("# no small disks: mounting a tmpfs needs root")
        return False


def told(trial: Trial, name: str, result: Result, good: object, note: str = "") -> None:
    """Report a case with the end of its run."""
    end = f"{result.kind:8} exit {result.code:4} {result.seconds:5.1f} s  {result.last[:150]}"
    trial.report(name, good, f"{end} {note}")


def left_in(out: Path) -> str:
    """Describe what a run has left in its directory."""
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    return f"[whole {whole_checkpoints(out)} of {names}, {lines_in(out / 'metrics.jsonl')} lines]"


def run(trial: Trial) -> None:
    """Try disks, limits, directories and signals."""
    preload()
    words = train_words(trial.fixtures, save_every=3)
    if can_mount(trial.root / "probe"):
        for size in trial.some(SIZES, 1, "disk"):
            try_disk(trial, words, size)
        for size in trial.some(SIZES, 1, "filled"):
            try_disk(trial, words, size, claims_room=True)
        if not trial.short:
            try_disk(trial, words, "600k", loggers="[tensorboard]", claims_room=True)
            try_read_only(trial, words)
    try_limit(trial, words)
    try_directories(trial, words)
    try_occupied(trial, words)
    try_signals(trial, words)


def try_disk(
    trial: Trial, words: list[str], size: str, *, loggers: str = "[]", claims_room: bool = False
) -> None:
    """Run on a disk that is too small, then resume while it is still full.

    size: of the disk
    loggers: the setting
    claims_room: the disk seems to have room, as if a neighbour filled it during the writing
    """

    def command(words: list[object]) -> int:
        from una_fast.cli import main as una_fast_main

        if claims_room:
            usage = shutil.disk_usage("/")
            shutil.disk_usage = lambda path: usage._replace(free=2**40)
        return una_fast_main([str(word) for word in words])

    with small_disk(trial.root / "disk", size) as disk:
        out = disk / "out"
        words = [*words, "--output_dir", out, "--loggers", loggers]
        result = forked(lambda: command(words), timeout=60)
        steps, lines = whole_checkpoints(out), lines_in(out / "metrics.jsonl")
        halves = [*out.glob("*.tmp")]
        says = "space" in result.last.lower()
        good = result.kind == "refusal" and says and not halves
        kind = "filled meanwhile" if claims_room else "too small"
        told(trial, f"disk of {size}, {kind}, {loggers}", result, good, left_in(out))
        if not steps and not lines:
            return
        result = forked(lambda: command([*words, "--resume", "true"]), timeout=60)
        kept = set(steps) <= set(whole_checkpoints(out))
        kept = kept and (not steps or lines_in(out / "metrics.jsonl") >= steps[-1])
        told(trial, "  resumed on the full disk", result, kept and result.is_clear, left_in(out))


def try_read_only(trial: Trial, words: list[str]) -> None:
    with small_disk(trial.root / "disk", "4m") as disk:
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for name in ("out", "new"):
            result = una_fast([*words, "--output_dir", disk / name])
            told(trial, f"read-only {name} directory", result, result.kind == "refusal")


def try_limit(trial: Trial, words: list[str]) -> None:
    """Run under limits of the size of a file, as quotas act."""
    for limit in trial.some((300, 60_000), 1, "limit"):
        out = trial.root / f"limit-{limit}"

        def limited(limit: int = limit, out: Path = out) -> int:
            from una_fast.cli import main as una_fast_main

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            return una_fast_main([str(word) for word in (*words, "--output_dir", out)])

        # The output of the child is a file too: the limit must leave room for its lines.
        result = forked(limited) if limit > 10_000 else forked_quietly(limited)
        told(trial, f"files of at most {limit} bytes", result, result.kind == "refusal")


def forked_quietly(function) -> Result:
    """Run a function with its lines in a pipe: the limit of file sizes does not reach them."""
    read, write = os.pipe()

    def piped() -> int:
        sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)
        return function()

    result = forked(piped)
    os.close(write)
    with os.fdopen(read, errors="replace") as lines:
        return Result(result.code, "", lines.read(), result.seconds, result.timed_out)


def try_directories(trial: Trial, words: list[str]) -> None:
    """Name something as the output directory that is none, or another user's."""
    file = trial.root / "file"
    file.write_text("x")
    loop = trial.root / "loop"
    loop.symlink_to(loop)
    cases = {
        "output_dir is a file": file,
        "output_dir below a file": file / "below",
        "output_dir /dev/null": Path("/dev/null"),
        "output_dir is a symlink to itself": loop,
        "output_dir below a symlink to itself": loop / "below",
        "output_dir with a name too long": trial.root / ("x" * 300),
    }
    for name, out in trial.some([*cases.items()], 1, "directory"):
        result = una_fast([*words, "--output_dir", out], timeout=30)
        told(trial, name, result, result.kind == "refusal")
    if os.geteuid() == 0 and not trial.short:
        result = forked(lambda: as_nobody(trial, words))
        told(trial, "output_dir of another user", result, result.kind == "refusal")


def as_nobody(trial: Trial, words: list[str]) -> int:
    import encodings.idna  # the library may not be readable for another user
    import encodings.utf_8_sig  # noqa: F401

    from una_fast.cli import main as una_fast_main

    out = trial.new_folder("of-root")
    out.chmod(0o555)
    trial.root.chmod(0o755)
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = tempfile.gettempdir()
    return una_fast_main([str(word) for word in (*words, "--output_dir", out)])


def try_occupied(trial: Trial, words: list[str]) -> None:
    """Put something else where a checkpoint, or a file of a run, will be written."""
    for name in trial.some(("checkpoint-3", "checkpoint-3.tmp", "model.safetensors"), 1, "name"):
        for what in trial.some(("file", "symlink", "directory"), 1, "what"):
            out, victim = trial.new_folder("occupied"), trial.new_folder("victim")
            (victim / "precious").write_text("x")
            path = out / name
            if what == "file":
                path.write_text("x")
            elif what == "symlink":
                path.symlink_to(victim)
            else:
                path.mkdir()
                (path / "precious").write_text("x")
            result = una_fast([*words, "--output_dir", out], timeout=60)
            good = result.is_clear and (victim / "precious").exists()
            told(trial, f"{name} is a {what}", result, good)


def try_signals(trial: Trial, words: list[str]) -> None:
    """Send signals in the middle of a step, and while the model is loaded."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    cases = [(name, when) for name in names for when in ("in a step", "while loading")]
    for name, when in trial.some(cases, 2, "signal"):
        if (name, when) != ("SIGUSR1", "while loading"):
            try_signal(trial, words, getattr(signal, name), in_a_step=when == "in a step")


def try_signal(trial: Trial, words: list[str], number: signal.Signals, *, in_a_step: bool) -> None:
    out = trial.new_folder("signal")
    metrics = out / "metrics.jsonl"

    def send(pid: int) -> None:
        deadline = time.monotonic() + 60
        while in_a_step and lines_in(metrics) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05 if in_a_step else 0.4)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    epochs = "2" if number == signal.SIGUSR1 else "20"
    result = una_fast([*words, "--output_dir", out, "--epochs", epochs], during=send, timeout=60)
    whole, lines = whole_checkpoints(out), lines_in(metrics)
    named = number.name in result.err + result.out
    good = named and not result.has_traceback and not result.timed_out
    if number == signal.SIGUSR1:
        good = good and result.kind == "ok"
    elif in_a_step:
        saves = number != signal.SIGINT
        good = good and result.code == 128 + number and (not saves or whole[-1:] == [lines])
        good = good and len([x for x in result.err.splitlines() if x.strip()]) == 1
    where = "in a step" if in_a_step else "while loading"
    told(trial, f"{number.name} {where}", result, good, left_in(out))


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
