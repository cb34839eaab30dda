"""A patched model, and UNATrainer, under DeepSpeed's ZeRO-3: two ranks are one process.

DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed && pytest tests/test_zero3.py
"""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")

from embedded import difference
from ranks import run_ranks
from tiny import save_llama
from zero3_ranks import CASES, RANKS, one_process, trained


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the directory of the worker's results."""
    root = tmp_path_factory.mktemp("zero3")
    save_llama(root / "model")
    run_ranks("zero3_ranks", root, root / "log", RANKS)
    return root


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(ranks, case):
    found = torch.load(ranks / f"{case}.pt", weights_only=True)
    assert difference(found, one_process(case)) < 1e-6


def test_una_trainer_takes_the_steps_of_one_process(ranks):
    ours = json.loads((ranks / "trainer.json").read_text())
    alone = trained(ranks, 1)
    assert len(ours) == len(alone) == 2 and ours[0]["loss"] != ours[1]["loss"]
    for mine, truth in zip(ours, alone, strict=True):
        for name in ("loss", "grad_norm", "units", "rewards/chosen", "logps/chosen"):
            assert mine[name] == pytest.approx(truth[name], rel=1e-5), name
