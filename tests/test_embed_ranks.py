"""A patched model under DDP, FSDP1 and FSDP2 on two ranks has the gradients of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from embed_ranks import (
    WRAPPERS,
    evaluations,
    logged,
    objective_trainer,
    one_process,
    una_trainer,
)
from embedded import difference
from ranks import run_ranks
from tiny import save_llama
from una_fast.integrations.hf import UNATrainer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    save_llama(root / "model")
    run_ranks("embed_ranks", root, root / "log", 2)
    return root


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_ranks_are_those_of_one_process(ranks, wrapper):
    """Accumulation over four ragged micro-batches; one of a rank has no unit."""
    found = torch.load(ranks / f"{wrapper}.pt", weights_only=True)
    assert difference(found, one_process(wrapper)) < 1e-6


def steps_of(ranks: Path, name: str) -> list[dict[str, float]]:
    return json.loads((ranks / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def alone(ranks) -> UNATrainer:
    return una_trainer(ranks, 1)


def test_una_trainer_on_two_ranks_is_one_process(ranks, alone):
    """Units are counted over the accumulated batches and over the ranks."""
    for mine, truth in zip(steps_of(ranks, "una_trainer"), logged(alone), strict=True):
        for name in ("loss", "grad_norm", "units", "rewards/chosen", "una/implicit_mean"):
            assert mine.get(name) == pytest.approx(truth.get(name), rel=1e-6, abs=1e-6), name
    trained = torch.load(ranks / "una_trainer.pt", weights_only=True)
    assert difference(trained, alone.model.state_dict()) < 1e-6


def test_evaluation_on_two_ranks_is_one_process(ranks, alone):
    """Each record once: no repeats in the last batches, no mean of the means of batches."""
    truth = evaluations(alone)
    assert [metrics["eval_units"] for metrics in truth[:3]] == [10, 10, 1]
    for metrics, other in zip(steps_of(ranks, "evaluations"), truth, strict=True):
        assert metrics.keys() == other.keys()
        for name in metrics.keys() - {"eval_padding", "eval_model_preparation_time"}:
            assert metrics[name] == pytest.approx(other[name], rel=1e-6, abs=1e-6), name
    for metrics in truth:
        records = truth[2] if metrics["eval_units"] == 1 else truth[0]
        assert metrics["eval_loss"] == pytest.approx(records["eval_loss"], abs=1e-6)


def test_trl_on_two_ranks(ranks):
    for mine, truth in zip(steps_of(ranks, "ours"), steps_of(ranks, "trl"), strict=True):
        assert mine.keys() == truth.keys()
        for name in ("loss", "grad_norm", "entropy", "logps/chosen", "rewards/accuracies"):
            assert mine[name] == pytest.approx(truth[name], rel=1e-5), name


def test_an_objective_in_trl_on_two_ranks_is_one_process(ranks):
    """Units of a step, and of an evaluation whose last batches are filled with its first record."""
    alone = objective_trainer(ranks, 1)
    for mine, truth in zip(steps_of(ranks, "objective"), logged(alone), strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(truth[name], rel=1e-5), name
    (mine,), (truth,) = steps_of(ranks, "of_objective"), logged(alone, "eval_loss")
    assert mine["eval_loss"] == pytest.approx(truth["eval_loss"], rel=1e-5)
