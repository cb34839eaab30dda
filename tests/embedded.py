"""Shared by the tests of the integrations: ragged batches with shared prompts, and eager truths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100

# (prompt, response) of every batch row; rows 0 and 1 share a prompt, and so do 2, 3 and 4.
RESPONSES = (
    ((5, 6, 7, 8), (11, 12, 13)),
    ((5, 6, 7, 8), (14,)),
    ((9, 10), (15, 16)),
    ((9, 10), (17, 18, 19, 20, 21, 22, 23)),
    ((9, 10), (24,)),
)


def make_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]] = RESPONSES, *, left: bool = False
) -> dict[str, Tensor]:
    """Make input_ids, attention_mask and labels of prompts and responses.

    rows: (prompt, response) per batch row
    left: padding stands on the left
    """
    width = 2 + max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(rows):
        tokens = torch.tensor([*prompt, *response])
        start = width - len(tokens) if left else 0
        stop = start + len(tokens)
        ids[row, start:stop] = tokens
        mask[row, start:stop] = 1
        labels[row, start + len(prompt) : stop] = tokens[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def eager_logps(model: nn.Module, batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Return [B, T - 1] log-probs from the model's own logits, 0 where no token is scored."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1] / temperature
    targets = batch["labels"][:, 1:]
    scored = targets != IGNORED
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(scored, found, 0.0)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a loss by the trained parameters, zeros where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    filled = {}
    for (name, parameter), grad in zip(named.items(), grads, strict=True):
        filled[name] = torch.zeros_like(parameter) if grad is None else grad
    return filled


def difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest error of a gradient, relative to the largest of all gradients."""
    assert found.keys() == truth.keys()
    scale = max(float(value.abs().max()) for value in truth.values())
    errors = [float((found[name] - truth[name]).abs().max()) for name in truth]
    return max(errors) / scale


def plain(output: Any) -> dict[str, Tensor]:
    """Return the tensors of an output by name."""
    return {name: value for name, value in output.items() if torch.is_tensor(value)}


def add_native_adapter(model: PreTrainedModel, options: Any) -> None:
    """Add an adapter by transformers' own method; skip the test beside a peft too old for it."""
    try:
        model.add_adapter(options)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
