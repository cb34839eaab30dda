"""Shared by the tests of several ranks: how they are run, and how their results compare."""

from __future__ import annotations

import atexit
import functools
import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import read_metrics
from una_fast.distributed import SHARDS_INTEGERS

HERE = Path(__file__).parent
needs_sharded_integers = pytest.mark.skipif(
    not SHARDS_INTEGERS, reason="FSDP2 shards packed codes from torch 2.12 on"
)
TIMEOUT = 600  # seconds; a missing collective hangs for ever


def run_cases(cases: dict[str, dict[str, Any]], root: Path, ranks: int) -> str:
    """Run cases of fsdp_worker.py on some ranks; return the output of all ranks."""
    (root / "cases.json").write_text(json.dumps(cases))
    return run_ranks("fsdp_worker", root / "cases.json", root / "log", ranks)


def run_ranks(worker: str, argument: Path, log: Path, ranks: int) -> str:
    """Run a worker on some ranks of one import; return the output of all ranks.

    worker: name of a file of this directory
    argument: of the worker
    log: file of the output
    ranks: at least 1
    """
    job = {
        "worker": str(HERE / f"{worker}.py"),
        "argument": str(argument),
        "log": str(log),
        "ranks": ranks,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }
    server = _rank_server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    ready, _, _ = select.select([server.stdout], [], [], TIMEOUT)
    status = server.stdout.readline().strip() if ready else "a timeout"
    text = log.read_text() if log.exists() else ""
    if not ready or not status:
        _end(server)
        _rank_server.cache_clear()
    assert status == "0", f"the ranks ended with {status}:\n{text[-6000:]}"
    return text


@functools.cache
def _rank_server() -> subprocess.Popen[str]:
    """Start the server of this process's ranks, once."""
    server = subprocess.Popen(
        [sys.executable, str(HERE / "rank_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """End a server and its ranks."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def torchrun(worker: str, argument: Path, log: Path) -> str:
    """Run a worker on two ranks under torchrun; return the output of both.

    worker, argument, log: as of `run_ranks`
    """
    launcher = Path(sys.executable).with_name("torchrun")
    words = ["--standalone", "--nproc-per-node", "2", HERE / f"{worker}.py", argument]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, [launcher, *words])),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "a timeout"
    text = log.read_text()
    assert code == 0, f"the ranks ended with {code}:\n{text[-6000:]}"
    return text


def metrics_of(directory: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl without what the signs of rewards in the first step, rounding, decide.

    Policy and reference are equal there: ranks that split the vocabulary find rewards of zero.
    """
    lines = read_metrics(directory)
    first = next(line for line in lines if line["step"] > 0)
    first.pop("rewards/accuracies", None)
    first.pop("una/calibration_error", None)
    return lines


def saved_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Load the weights of a saved model or adapter."""
    (file,) = directory.glob("*model.safetensors")
    return load_file(file)


def worst_error(values: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Return the largest max|error| / max|truth| of a tensor.

    A tensor that is zero in truth must be zero; infinity for a number that is not finite.
    """
    assert values.keys() == truth.keys()
    worst = 0.0
    for name, expected in truth.items():
        if not values[name].isfinite().all():  # max() would pass over NaN
            return math.inf
        size = expected.abs().max().clamp_min(1e-30)
        worst = max(worst, float((values[name] - expected).abs().max() / size))
    return worst
