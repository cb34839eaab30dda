"""Ranks among whom tensors are summed and exchanged.

The head and attention need a group alone: importing the file needs no FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

# torch has other names for both since 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """A process among the ranks that split the tokens of a batch, or a head.

    rank: place of the process in the group
    size: ranks of the group
    handle: of torch's collectives; None: the process is alone
    """

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None

    @staticmethod
    def of(given: Group | dist.ProcessGroup | None) -> Group:
        """Return the place of the process in a group of torch's; None: the process is alone."""
        if given is None or isinstance(given, Group):
            return given or ALONE
        return Group(dist.get_rank(given), dist.get_world_size(given), given)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the group; overwrites the tensor."""
        if self.size > 1:
            dist.all_reduce(values, group=self.handle)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Return the maximum of a tensor over the group; overwrites the tensor."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.handle)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors of all ranks, one after the other along the first dimension.

        values: [n, ...], of the same shape on all ranks
        """
        if self.size == 1:
            return values
        all_values = values.new_empty(self.size * len(values), *values.shape[1:])
        _gather_into(all_values, values.contiguous(), group=self.handle)
        return all_values

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Return the part of the process of the sum over the group.

        values: [size * n, ...]; rank r gets rows [r n, (r + 1) n) of the sum
        """
        if self.size == 1:
            return values
        part = values.new_empty(len(values) // self.size, *values.shape[1:])
        _reduce_scatter_into(part, values, group=self.handle)
        return part

    def exchange(self, sent: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Return the pieces that the ranks send to the process, in order of ranks: an all-to-all.

        sent: [sum(to)], contiguous: a piece for every rank
        to: numbers for every rank
        of: numbers from every rank
        """
        received = sent.new_empty(sum(of))
        dist.all_to_all_single(received, sent, list(of), list(to), group=self.handle)
        return received


ALONE = Group()
