"""The machine, the versions and the sources of a result."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformers")


def command_output(root: Path, *command: str) -> str | None:
    """Return the output of a command run in a folder, None after a failure."""
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed(package: str) -> str | None:
    """Return the version of a package, None for a missing package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(root: Path, folders: Iterable[str]) -> dict[str, Any]:
    """Return the commit of a tree, and whether folders have uncommitted changes.

    root: of the tree
    folders: to look at for changes

    None without git. A copy of the tree on another machine has no git: BENCH_COMMIT names the
    commit.
    """
    changes = command_output(root, "git", "status", "--porcelain", "--", *folders)
    commit = command_output(root, "git", "rev-parse", "HEAD")
    return {
        "commit": commit or os.environ.get("BENCH_COMMIT"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }


def total_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory: of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Return the bytes left to the process, on a CPU without swapping."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_available(), _left_of_group())


def _available() -> int:
    """Return the bytes left to new programs under Linux, else all of the memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return total_memory(torch.device("cpu"))
    sizes = dict(line.split(":") for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024


def _left_of_group(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left in a container; a large number without a limit."""
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or "max"
        return 1 << 62
    return max(limit - used, 0)


def utc_time() -> str:
    """Return the time of now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine_of(device: torch.device) -> dict[str, Any]:
    """Return the versions, the hardware, the command and the time of a result."""
    found = {
        "torch": torch.__version__,
        "trl": installed("trl"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "time": utc_time(),
    }
    if device.type != "cuda":
        return found
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    total = torch.cuda.get_device_properties(0).total_memory
    return {
        **found,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": command_output(Path.cwd(), *driver),
        "memory_gib": total / 2**30,
    }
