"""Measure the peak memory of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from una_fast.attention.packed import fresh_tables
from una_fast.counters import LiveBytes
from una_fast.data.examples import Example
from una_fast.data.loader import Step
from una_fast.distributed import local_part, reshard
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
    parallel = trainer.config.parallel
    on_host = parallel is not None and parallel.offload_parameters
    with fresh_tables(), LiveBytes() as live:  # tables of earlier calls would not be seen
        if on_host:
            _assign_to_host(trainer, live)
        trainer.take_step(step)
        trainer.take_step(step)
    held = _held(trainer)
    live.assign("host", held)  # were there before; a GPU would not hold what is in host memory
    weights = 0
    for tensor in held:
        if not (on_host and isinstance(tensor, DTensor)):
            part = local_part(tensor)
            weights += part.numel() * part.itemsize
    return live.peak_by_category(without=["host"]).total() + weights


def _assign_to_host(trainer: Trainer, live: LiveBytes) -> None:
    """Count gradients and moments, which parallel.offload_parameters keeps there, as the host's."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        parameters = trainer.policy.trainable_parameters()
        live.assign("host", [p.grad for p in parameters if p.grad is not None])

    def after(optimizer: Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            live.assign("host", [x for x in state.values() if isinstance(x, Tensor)])

    trainer.optimizer.register_step_pre_hook(before)
    trainer.optimizer.register_step_post_hook(after)


def _held(trainer: Trainer) -> list[Tensor]:
    """Return the weights and buffers of the policy and of a frozen reference, tied ones once.

    Of sharded weights those that a rank keeps: weights that are gathered are freed.
    """
    policies = [trainer.policy]
    if isinstance(trainer.reference, FrozenReference):
        policies.append(trainer.reference.policy)
    held: dict[int, Tensor] = {}
    for policy in policies:
        reshard(policy.causal_lm)
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            held[id(tensor)] = tensor
    return list(held.values())
