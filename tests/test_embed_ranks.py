"""A patched model under DDP, FSDP1 and FSDP2 on two ranks has the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embed_ranks import WRAPPERS, one_process
from embedded import difference
from two_ranks import torchrun

WORKER = Path(__file__).with_name("embed_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    torchrun(WORKER, root, root / "log")
    return root


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_ranks_are_those_of_one_process(ranks, wrapper):
    """Accumulation over four ragged micro-batches; one of a rank has no unit."""
    found = torch.load(ranks / f"{wrapper}.pt", weights_only=True)
    assert difference(found, one_process(wrapper)) < 1e-6
