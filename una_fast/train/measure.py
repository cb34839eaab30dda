"""Measure the peak memory of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from una_fast.attention.packed import fresh_tables
from una_fast.counters import LiveBytes
from una_fast.data.examples import Example
from una_fast.data.loader import Step
from una_fast.model.reference import FrozenReference

if TYPE_CHECKING:
    from una_fast.train.loop import Trainer


def measured_peak(trainer: Trainer, batch: list[Example], *, accumulate: bool = False) -> int:
    """Return the bytes at the peak of two optimizer steps.

    trainer: takes the steps
    batch: examples of one micro-batch
    accumulate: a step takes the batch twice, so that the second meets the gradients of the first

    Counted are the allocations of torch on a GPU; on a CPU all tensors that live at once, the
    weights included.
    """
    times = 2 if accumulate else 1
    units = sum(example.feedback.num_units for example in batch)
    step = Step(0.0, [batch] * times, times * units)
    device = trainer.world.device
    if device.type == "cuda":
        trainer.take_step(step)  # makes the optimizer's state
        torch.cuda.reset_peak_memory_stats(device)
        trainer.take_step(step)
        return torch.cuda.max_memory_allocated(device)
    with fresh_tables(), LiveBytes() as live:  # tables of earlier calls would not be seen
        trainer.take_step(step)
        trainer.take_step(step)
    held = _held(trainer)
    live.assign("host", held)  # were there before; a GPU would not hold what is in host memory
    weights = sum(tensor.numel() * tensor.itemsize for tensor in held)
    return live.peak_by_category(without=["host"]).total() + weights


def _held(trainer: Trainer) -> list[Tensor]:
    """Return the weights and buffers of the policy and of a frozen reference, tied ones once."""
    policies = [trainer.policy]
    if isinstance(trainer.reference, FrozenReference):
        policies.append(trainer.reference.policy)
    held: dict[int, Tensor] = {}
    for policy in policies:
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            held[id(tensor)] = tensor
    return list(held.values())
