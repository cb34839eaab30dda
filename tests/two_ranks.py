"""Shared by the tests of sharded runs: two ranks under torchrun, and how their results compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tiny import read_metrics

WORKER = Path(__file__).with_name("fsdp_worker.py")
TIMEOUT = 600  # seconds; a missing collective hangs for ever


def run_two_ranks(cases: dict[str, dict[str, Any]], root: Path, ranks: int = 2) -> str:
    """Run cases of fsdp_worker.py under one torchrun; return the output of all ranks."""
    (root / "cases.json").write_text(json.dumps(cases))
    return torchrun(WORKER, root / "cases.json", root / "log", ranks)


def torchrun(worker: Path, argument: Path, log: Path, ranks: int = 2) -> str:
    """Run a worker on some ranks; return the output of all.

    worker: Python file
    argument: of the worker
    log: file of the output
    ranks: processes
    """
    launcher = Path(sys.executable).with_name("torchrun")
    command = [launcher, "--standalone", "--nproc-per-node", str(ranks), worker, argument]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
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
    assert code == 0, f"torchrun ended with {code}:\n{text[-6000:]}"
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

    A tensor that is zero in truth must be zero.
    """
    assert values.keys() == truth.keys()
    worst = 0.0
    for name, expected in truth.items():
        size = expected.abs().max().clamp_min(1e-30)
        worst = max(worst, float((values[name] - expected).abs().max() / size))
    return worst
