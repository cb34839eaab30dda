"""Shared by the tests of sharded runs: two ranks under torchrun, and how their results compare."""

from __future__ import annotations

import json
import math
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
FORK = Path(__file__).with_name("fork_ranks.py")
TIMEOUT = 600  # seconds; a missing collective hangs for ever


def run_two_ranks(cases: dict[str, dict[str, Any]], root: Path) -> str:
    """Run cases of fsdp_worker.py under one torchrun; return the output of both ranks."""
    (root / "cases.json").write_text(json.dumps(cases))
    return torchrun(WORKER, root / "cases.json", root / "log")


def run_four_ranks(cases: dict[str, dict[str, Any]], root: Path) -> str:
    """Run cases of fsdp_worker.py on four ranks of one import; return the output of all."""
    (root / "cases.json").write_text(json.dumps(cases))
    return fork_ranks(WORKER, root / "cases.json", root / "log", 4)


def torchrun(worker: Path, argument: Path, log: Path) -> str:
    """Run a worker on two ranks; return the output of both.

    worker: Python file
    argument: of the worker
    log: file of the output
    """
    launcher = Path(sys.executable).with_name("torchrun")
    return _run([launcher, "--standalone", "--nproc-per-node", "2", worker, argument], log)


def fork_ranks(worker: Path, argument: Path, log: Path, ranks: int) -> str:
    """Run a worker on some ranks of one import; parameters as in `torchrun`."""
    return _run([sys.executable, FORK, str(ranks), worker, argument], log)


def _run(command: list[Any], log: Path) -> str:
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
