"""Shared code of all benchmarks: failures as reasons, the environment, result files, tables.

A contender that fails is a row of the table with the reason (`attempt`). A result carries the
versions, the machine and a digest of the sources (`environment`).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from contenders import WrongResult

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("una_fast", "kernels", "bench")
CLEANING = 30.0  # seconds
GPU_LOST = 75  # exit status after a contender broke the GPU's context: run again with --resume


# ----------------------------------------------------------------------------------------- attempts


def release() -> None:
    """Give the GPU's cached memory back."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class DeviceLost(Exception):
    """(name, reason) of a contender; the GPU answers nothing more in this process."""


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


_guards: list[Guard] = []  # at most one: of the run in this process


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
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def watched(name: str, seconds: float | None) -> contextlib.AbstractContextManager[None]:
    """Return the guard of one attempt, or no guard in a run without one."""
    return _guards[-1].watch(name, seconds) if _guards else contextlib.nullcontext()


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError after `seconds` of Python; a running kernel is waited for."""
    if not seconds:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(
    name: str,
    run: Callable[[], Any],
    clean: Callable[[], None] = release,
    seconds: float | None = None,
) -> tuple[Any, str | None]:
    """Return (result of run, None), or (None, the reason of the failure) after a call of `clean`.

    name: the contender named by DeviceLost
    run: the work
    clean: frees the memory of a failed run; DeviceLost is raised if `clean` fails too
    seconds: the deadline of `run`, None for no deadline
    """
    try:
        with watched(name, seconds), deadline(seconds):
            return run(), None
    except DeviceLost:
        raise
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except WrongResult as error:
        reason = f"wrong result: {error}"
    except TimeoutError:
        reason = f"not done in {seconds:g} s"
    except Exception as error:  # a peer may fail in any way
        text = " ".join(str(error).split())
        full = "out of memory" in text.lower()
        reason = "out of memory" if full else f"{type(error).__name__}: {text}"[:200]
    try:
        with watched(name, CLEANING):
            clean()
    except Exception as error:
        raise DeviceLost(name, reason) from error
    return None, reason


def typical(values: list[float], device: torch.device, busy: int = 0) -> float:
    """Return the median of `values`; on a CPU, shared with other work, the minimum.

    busy: programs that ran beside on purpose, and whose share of the time belongs to the result
    """
    return min(values) if device.type == "cpu" and not busy else statistics.median(values)


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


def spread_of(values: list[float], middle: float) -> dict[str, Any]:
    """Return the quartiles of `values`, and the distance of the outer two relative to `middle`."""
    quartiles = values * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"quartiles": quartiles, "spread": (quartiles[2] - quartiles[0]) / middle}


# -------------------------------------------------------------------------------------- environment


def command_output(*command: str) -> str | None:
    """Return the output of a command run at the root, None where the command fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(package: str) -> str | None:
    """Return the version of a package, None where the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest_of(*folders: str) -> str:
    """Return 16 hexadecimal digits of the Python sources below `folders` of the root."""
    found: list[Path] = []
    for folder in folders:
        found += (ROOT / folder).rglob("*.py")
    contents = b"".join(path.read_bytes() for path in sorted(found))
    return hashlib.sha256(contents).hexdigest()[:16]


def commit_of(*folders: str) -> dict[str, Any]:
    """Return the commit, and whether `folders` have uncommitted changes; None without git."""
    changes = command_output("git", "status", "--porcelain", "--", *folders)
    commit = command_output("git", "rev-parse", "HEAD")
    return {
        # A copy of the tree on another machine has no git: its caller names the commit.
        "commit": commit or os.environ.get("BENCH_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def utc_time() -> str:
    """Return the time of now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions, the machine, the command and the sources of a result."""
    found = {
        "torch": torch.__version__,
        "trl": installed("trl"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        **commit_of(*MEASURED),
        "sources": digest_of(*MEASURED),
        "time": utc_time(),
    }
    if device.type == "cuda":
        query = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF")
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": query}
        found |= {"memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
        peers = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformers")
        peers += ("unsloth_zoo",)
        found |= {name: installed(name) for name in peers}
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


class Column(NamedTuple):
    """A column of a printed table: row[key] / divisor in the format `form`."""

    key: str
    form: str
    divisor: float = 1

    def cell(self, row: dict[str, Any]) -> str:
        """Return the text of a row's cell, empty where the row has no such number."""
        return f"{row[self.key] / self.divisor:{self.form}}" if self.key in row else ""


def print_table(columns: dict[str, Column], table: Iterable[dict[str, Any]]) -> None:
    """Print a heading and a line per row: the name, then the row's cells or the row's reason."""
    print(f"{'':20}" + "".join(f"{head:>11}" for head in columns))
    for row in table:
        if "reason" in row:
            print(f"{row['name']:20}  {row['reason']}")
            continue
        cells = [f"{column.cell(row):>11}" for column in columns.values()]
        print(f"{row['name']:20}" + "".join(cells))
        if row.get("unfinished"):
            print(f"  the search ended early: {row['unfinished']}")


def print_verdict(bar: dict[str, Any], question: str, digits: int) -> None:
    """Print whether a bar was held: `question`, then the number that was found."""
    found = bar["found"]
    number = "not measured" if found is None else f"{found:.{digits}f}"
    print(f"  {'held  ' if bar['held'] else 'MISSED'} {question}: {number}")
