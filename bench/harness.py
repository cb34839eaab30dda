"""Shared code of all benchmarks: failures as reasons, the environment, result files, tables.

A contender that fails is a row of the table with the reason (`attempt`). A result carries the
versions, the machine and a digest of the sources (`environment`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import contenders  # noqa: F401  before anything imports triton
from una_fast.bench import attempts
from una_fast.bench.attempts import DeviceLost
from una_fast.bench.machine import PEERS, commit_of, installed, machine_of
from una_fast.bench.tables import Column, table_lines

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("una_fast", "kernels", "bench")
CLEANING = 30.0  # seconds
GPU_LOST = 75  # exit status after a contender broke the GPU's context: run again with --resume


# ----------------------------------------------------------------------------------------- attempts


def running_file(out: Path) -> Path:
    """Return the file with the name of the contender that is running, beside the report."""
    return out.with_suffix(".running")


class Guard:
    """What is left of a run whose process ends under a contender: a hang in a kernel, a crash.

    While a contender runs, the file `<out>.running` holds its name. A contender beyond its deadline
    that Python's alarm does not reach is stored in the report as lost, and the process ends with
    GPU_LOST: a run with --resume goes on without the contender. So does a run that finds the file
    of a process that ended in any other way.
    """

    grace = 10.0  # seconds between the alarm and the end of the process

    def __init__(self, report: dict[str, Any], out: Path) -> None:
        self.report, self.out = report, out
        self.running = running_file(out)

    def take_over(self) -> None:
        """Store the contender under which the process before this one ended."""
        if self.running.exists():
            self.lose(self.running.read_text(encoding="utf-8"), "the process ended while it ran")

    def lose(self, name: str, reason: str) -> None:
        """Store a contender as lost."""
        self.report["lost"][name] = reason
        write_report(self.report, self.out)
        self.running.unlink(missing_ok=True)

    def end(self, name: str, seconds: float) -> None:
        """Store a contender that hangs, and end this process."""
        reason = f"hung: not done in {seconds:g} s, nor {self.grace:g} s later"
        self.lose(name, reason)
        print(f"\n{name} {reason}: run again with --resume", flush=True)
        os._exit(GPU_LOST)

    @contextlib.contextmanager
    def watch(self, name: str, seconds: float | None) -> Iterator[None]:
        """Guard one attempt; attempts may stand within each other."""
        before = None
        if self.running.exists():
            before = self.running.read_text(encoding="utf-8")
        self.running.parent.mkdir(parents=True, exist_ok=True)
        self.running.write_text(name, encoding="utf-8")
        timer = None
        if seconds:
            timer = threading.Timer(seconds + self.grace, self.end, (name, seconds))
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            if before is None:
                self.running.unlink(missing_ok=True)
            else:
                self.running.write_text(before, encoding="utf-8")


@contextlib.contextmanager
def guarded(report: dict[str, Any], out: Path | None) -> Iterator[None]:
    """Guard every attempt of a run that stores its results.

    report: with the entry "lost", reasons by contender
    out: the file of the report, None for a run without one, which is not guarded
    """
    if out is None:
        yield
        return
    guard = Guard(report, out)
    guard.take_over()
    attempts.watches.append(guard.watch)
    try:
        yield
    finally:
        attempts.watches.remove(guard.watch)


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Run so many programs beside the block that never wait for anything."""
    # They end with this program, however it ends.
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"
    programs = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


# -------------------------------------------------------------------------------------- environment


def digest_of(*folders: str) -> str:
    """Return 16 hexadecimal digits of the Python sources below `folders` of the root."""
    found: list[Path] = []
    for folder in folders:
        found += (ROOT / folder).rglob("*.py")
    contents = b"".join(path.read_bytes() for path in sorted(found))
    return hashlib.sha256(contents).hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the machine, the command and the sources of a result."""
    found = machine_of(device) | commit_of(ROOT, MEASURED) | {"sources": digest_of(*MEASURED)}
    if device.type == "cuda":
        found |= {name: installed(name) for name in (*PEERS, "unsloth_zoo")}
    return found


# ------------------------------------------------------------------------------------------ results


def open_report(out: Path | None, resume: bool, device: torch.device) -> dict[str, Any]:
    """Return a new report, or with `resume` the report stored in `out`, to be continued."""
    if resume and out and out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    if out and not resume:
        running_file(out).unlink(missing_ok=True)  # a run from the start blames nobody
    return {"environment": environment(device), "results": []}


def note(report: dict[str, Any], row: dict[str, Any], out: Path | None) -> None:
    """Print and store what is known of a contender, before the others have had their turn.

    report: keeps the row under "notes" until the whole entry is stored
    row: of the table, with the name
    """
    report.setdefault("notes", []).append(row)
    write_report(report, out)
    cells = [f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float)]
    print(f"  {row['name']}: {row.get('reason') or ', '.join(cells)}", flush=True)


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """Write a report as JSON, if `out` is given."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_suffix(".half")  # a process may be killed while it writes
        whole.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        whole.replace(out)


def store_loss(report: dict[str, Any], error: DeviceLost, out: Path | None) -> int:
    """Store which contender broke the GPU's context, and return the exit status of a lost GPU."""
    name, reason = error.args
    report["lost"][name] = f"broke the GPU's context: {reason}"
    write_report(report, out)
    print(f"\n{name} broke the GPU's context ({reason}): run again with --resume")
    return GPU_LOST


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------- tables


def print_table(columns: dict[str, Column], table: Iterable[dict[str, Any]]) -> None:
    """Print a heading and a line per row: see `table_lines`."""
    print(*table_lines(columns, table), sep="\n")


def print_verdict(bar: dict[str, Any], question: str, digits: int) -> None:
    """Print whether a bar was held: `question`, then the number that was found."""
    found = bar["found"]
    number = "not measured" if found is None else f"{found:.{digits}f}"
    print(f"  {'held  ' if bar['held'] else 'MISSED'} {question}: {number}")
