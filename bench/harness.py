"""What the benchmarks share: a contender's failure as a reason, the environment of a result, the file it goes to."""

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
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from contenders import WrongResult

ROOT = Path(__file__).resolve().parents[1]
GPU_LOST = 75  # exit status after a contender broke the GPU's context: run again with --resume


def release() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class DeviceLost(Exception):
    """(who, why): an error after which the GPU answers nothing more in this process."""


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """TimeoutError after so many seconds of Python; a running kernel is waited for."""
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
    """(result, None) or (None, the reason), after clean(). name: of whom, should the GPU be lost."""
    try:
        with deadline(seconds):
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
        reason = (
            "out of memory"
            if "out of memory" in text.lower()
            else f"{type(error).__name__}: {text}"[:200]
        )
    try:
        clean()
    except Exception as error:
        raise DeviceLost(name, reason) from error
    return None, reason


def typical(values: list[float], device: torch.device) -> float:
    """The median; on a shared CPU the minimum."""
    return min(values) if device.type == "cpu" else statistics.median(values)


def command_output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    measured = ["una_fast", "kernels", "bench"]
    changes = command_output("git", "status", "--porcelain", "--", *measured)  # None: no git there
    sources = sorted(path for folder in measured for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    found = {
        "torch": torch.__version__,
        "trl": installed("trl"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": command_output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "sources": digest[:16],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        query = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF")
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": query}
        found |= {"memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
        peers = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformers")
        found |= {name: installed(name) for name in peers}
    return found


def open_report(out: Path | None, resume: bool, device: torch.device) -> dict[str, Any]:
    """A new report, or the one in `out` to go on behind."""
    if resume and out and out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    return {"environment": environment(device), "results": []}


def write_report(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
