"""A patched model under DDP, FSDP1 and FSDP2 on two ranks has the gradients of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from embed_ranks import WRAPPERS, logged, one_process, una_trainer
from embedded import difference
from ranks import run_ranks
from tiny import save_llama


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


def test_una_trainer_on_two_ranks_is_one_process(ranks):
    """Units are counted over the accumulated batches and over the ranks."""
    alone = una_trainer(ranks, 1)
    for mine, truth in zip(steps_of(ranks, "una_trainer"), logged(alone), strict=True):
        for name in ("loss", "grad_norm", "units", "rewards/chosen", "una/implicit_mean"):
            assert mine.get(name) == pytest.approx(truth.get(name), rel=1e-6, abs=1e-6), name
    trained = torch.load(ranks / "una_trainer.pt", weights_only=True)
    assert difference(trained, alone.model.state_dict()) < 1e-6


def test_trl_on_two_ranks(ranks):
    for mine, truth in zip(steps_of(ranks, "ours"), steps_of(ranks, "trl"), strict=True):
        assert mine.keys() == truth.keys()
        for name in ("loss", "grad_norm", "entropy", "logps/chosen", "rewards/accuracies"):
            assert mine[name] == pytest.approx(truth[name], rel=1e-5), name
