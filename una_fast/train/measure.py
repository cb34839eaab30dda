"""Measure the peak memory of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from una_fast.attention.packed import traced_attention
from una_fast.counters import LiveBytes
from una_fast.data.examples import Example
from una_fast.data.loader import Step

if TYPE_CHECKING:
    from una_fast.train.loop import Trainer


# --- measurement -----------------------------------------------------------------------------------------------------


def measured_peak(trainer: Trainer, batch: list[Example], *, accumulate: bool = False) -> int:
    """Bytes at the peak of two optimizer steps of one batch, or of it twice with `accumulate`: torch's count on a GPU;
    on a CPU what lives at once, with the weights."""
    times = 1 + accumulate
    work = Step(0.0, [batch] * times, times * sum(example.feedback.num_units for example in batch))
    device = trainer.world.device
    if device.type == "cuda":
        trainer.take_step(work)  # makes the optimizer's state
        torch.cuda.reset_peak_memory_stats(device)
        trainer.take_step(work)
        return torch.cuda.max_memory_allocated(device)
    with traced_attention(None), LiveBytes() as live:  # tables of earlier calls would not be seen
        trainer.take_step(work)
        trainer.take_step(work)
    held = {
        id(x): x for m in trainer.models for x in (*m.model.parameters(), *m.model.buffers())
    }.values()
    live.assign("host", held)  # were there before; a GPU would not hold what is in host memory
    return live.peak_parts(without=["host"]).total() + sum(x.numel() * x.itemsize for x in held)
