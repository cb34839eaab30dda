"""Ranks and FSDP2: who takes part in a run, what is wrapped, and how sums cross ranks.

One contract makes a sharded run equal to a single process: gradients are *summed* over ranks (FSDP2 would average
them), because the loss is divided by the number of units of the global batch already. The head stays in the root's
group: it is gathered once per forward, kept until its gradient is built in that same forward, and reduced once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.size > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.sharded:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; anything that can be pickled."""
        if not self.sharded:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.sharded:
            dist.barrier()


def start_world(device: str = "auto") -> World:
    """Join the ranks that torchrun started, or be the only one. device: "auto" | "cpu" | "cuda"."""
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu or auto")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(index)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank = dist.get_rank() if size > 1 else 0
    return World(rank, size, torch.device(kind, index) if kind == "cuda" else torch.device(kind))


def stop_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(causal_lm: nn.Module, world: World, compute_dtype: torch.dtype) -> None:
    """Shard every transformer layer and then the rest (embedding, final norm, head) with FSDP2, in place.

    compute_dtype: what gathered weights and activations are in; gradients are reduced in float32.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layers = set(getattr(causal_lm, "_no_split_modules", None) or ())
    wrapped = [module for module in causal_lm.modules() if type(module).__name__ in layers]
    for module in [*wrapped, causal_lm]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in [*wrapped, causal_lm]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(
            True
        )  # gloo cannot fold the factor into the reduction


def reshard(*models: nn.Module) -> None:
    """Let go of what a forward without backward keeps gathered: parameters are then their shards."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_scalar(value: Tensor) -> float:
    """A norm or loss as a Python number, whether or not it is sharded."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)
