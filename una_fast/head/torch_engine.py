"""The two things a device may do its own way: the GEMMs of the head, and the row operations on a tile of logits.

The loop in passes.py is the same for every engine. Legend: C rows of a chunk, T vocabulary entries of a tile (all V,
or a slice), D hidden.

    raw logits   u = W h + bias                                        [C, T], accumulator dtype
    logits       z = softcap * tanh(logit_scale * u / softcap) / temperature
    gradient     du = coef * (onehot - softmax(z)) * dz/du             over the storage of u, in the GEMMs' dtype

A tile is an accumulator-dtype buffer (float32; float64 for float64 operands). GEMMs read bfloat16 and float16 as they
are where the device can accumulate and return float32 from them (CUDA); elsewhere narrow operands are cast, the weight
slice by slice. Row operations of this file walk a tile in blocks: on a CPU they stay in its cache, one trip to memory
instead of one per operation; on a GPU they bound the temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.head.plan import HeadSize, Machine
from una_fast.head.segment_loss import CallLoss

IGNORE = -100  # the target of a row without one

CACHE_BLOCK_BYTES = 1 << 20

GPU_BLOCK_BYTES = 8 << 20

Vocab = tuple[int, int]  # a range of vocabulary entries


@dataclass(frozen=True)
class LogitTransform:
    """z = softcap * tanh(logit_scale * u / softcap) / temperature; softcap None means no cap."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap} must be positive, or None for no cap")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale={self.logit_scale} must be finite")

    def __call__(self, u: Tensor) -> Tensor:
        """z of raw logits; u itself where there is nothing to do."""
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return u if scale == 1.0 else u * scale
        return torch.tanh(u * (self.logit_scale / self.softcap)) * (self.softcap / self.temperature)

    def apply_(self, u: Tensor) -> Tensor | float:
        """u becomes z in place; returns dz/du (a number unless there is a softcap)."""
        scale = self.logit_scale / self.temperature
        if self.softcap is None:
            if scale != 1.0:
                u.mul_(scale)
            return scale
        u.mul_(self.logit_scale / self.softcap).tanh_()
        slope = (1 - u * u).mul_(scale)
        u.mul_(self.softcap / self.temperature)
        return slope


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Row ranges whose logits take about one block's bytes."""
    block = CACHE_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(block // max(row_bytes, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def overlay(u: Tensor, dtype: torch.dtype) -> Tensor:
    """A [C, T] view of `dtype`, no wider than that of u, over the start of every row of u."""
    return u if dtype == u.dtype else u.view(dtype)[:, : u.shape[1]]


def _local(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(which rows have their target in the vocabulary range, its [C, 1] index there or 0)."""
    inside = (targets >= start) & (targets < stop)
    return inside, torch.where(inside, targets - start, 0).unsqueeze(1)


def row_logps(
    u: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """(logsumexp over the tile, target logit or 0 where the target lies outside it), both [C]; u is kept.

    u: [C, T] raw logits of the vocabulary from `start` on; targets: [C] indices into the whole vocabulary;
    bias: [T], dtype of u."""
    inside, local = _local(targets, start, start + u.shape[1])
    lse, target_logit = u.new_empty(len(u)), u.new_empty(len(u))
    for rows in row_blocks(len(u), u.shape[1] * u.element_size(), u.device):
        z = transform(u[rows] if bias is None else u[rows] + bias)
        top = z.amax(1, keepdim=True)
        top.masked_fill_(
            top == -torch.inf, 0.0
        )  # a slice of masked entries alone: its logsumexp is -inf, not NaN
        lse[rows] = (z - top).exp_().sum(1).log_().add_(top.squeeze(1))
        target_logit[rows] = z.gather(1, local[rows]).squeeze(1)
    return lse, torch.where(inside, target_logit, 0.0)


def row_grad_(
    u: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """du = coef * (onehot - softmax(z)) * dz/du over the storage of u, which is lost: [C, T] in `dtype` (u's own).

    coef, lse: [C], dtype of u; lse is the logsumexp of the whole row. The rest as in row_logps."""
    inside, local = _local(targets, start, start + u.shape[1])
    du = overlay(u, dtype or u.dtype)
    for rows in row_blocks(len(u), u.shape[1] * u.element_size(), u.device):
        block = u[rows] if bias is None else u[rows].add_(bias)
        slope = transform.apply_(block)
        c = coef[rows].unsqueeze(1)
        block.sub_(lse[rows].unsqueeze(1)).exp_().mul_(-c)
        block.scatter_add_(1, local[rows], torch.where(inside[rows].unsqueeze(1), c, 0.0))
        if isinstance(slope, Tensor) or slope != 1.0:
            block.mul_(slope)
        if du is not u:
            du[rows] = block.to(du.dtype)  # by way of a copy: the two overlap
    return du


def log_probs(target_logit: Tensor, lse: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """target_logit - lse; 0 where the target is -100, NaN where it is none of the vocabulary (on a GPU nobody looks at
    the targets beforehand: that would wait for it)."""
    outside = (targets < 0) | (targets >= vocab)
    return torch.where(targets == IGNORE, 0.0, torch.where(outside, math.nan, target_logit - lse))


class TorchEngine:
    """Plain PyTorch on any device."""

    name = "torch"
    loss = CallLoss  # how token log-probs become a loss
    align = 1  # rows of a tile start at multiples of so many logits
    quantum = 1  # chunks of more rows than this are multiples of it
    machine: Machine | None = None  # rates of the cost model

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, cast_bytes: int
    ) -> None:
        """weight: [V, D]. bias: [V] or None. cast_bytes: room for a slice of the weight in the accumulator dtype, used
        where GEMMs need their operands cast."""
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.transform = transform
        self.acc = accumulator_dtype(weight.dtype)
        self.operand = weight.dtype if self._native() else self.acc  # what GEMMs read, du included
        self.cast = self.operand != weight.dtype
        row_bytes = weight.shape[1] * self.acc.itemsize
        self.cast_rows = max(cast_bytes // row_bytes, 1)

    def _native(self) -> bool:
        """Whether GEMMs accumulate and return float32 from narrower operands as they are."""
        return self.weight.is_cuda and torch.version.hip is None

    def size(self) -> HeadSize:
        """What the block plan must know."""
        return HeadSize(
            *self.weight.shape,
            acc_bytes=self.acc.itemsize,
            operand_bytes=self.operand.itemsize,
            cast=self.cast,
            align=self.align,
            quantum=self.quantum,
            machine=self.machine,
        )

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether a GEMM can write this dtype."""
        return dtype in (self.acc, self.operand)

    def _weight_slices(self, vocab: Vocab) -> Iterator[tuple[int, int, Tensor]]:
        """The weight rows of a range in the dtype of the GEMM, with offsets relative to its start."""
        start, stop = vocab
        step = self.cast_rows if self.cast else max(stop - start, 1)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            yield low - start, high - start, self.weight[low:high].to(self.operand)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out (+)= a @ b, accumulated in the accumulator dtype and stored in that of `out`."""
        widen = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
        if accumulate:
            torch.addmm(out, a, b, out=out, **widen)
        else:
            torch.mm(a, b, out=out, **widen)

    def logits(self, hidden: Tensor, vocab: Vocab, out: Tensor) -> None:
        """Raw logits without bias. hidden: [C, D]; out: [C, T] for the vocabulary range."""
        hidden = hidden.to(self.operand)
        for low, high, part in self._weight_slices(vocab):
            self._mm(hidden, part.T, out[:, low:high])

    def hidden_grad(self, du: Tensor, vocab: Vocab, out: Tensor, accumulate: bool = False) -> None:
        """out [C, D] (+)= du @ W, in a dtype that `writes`."""
        for low, high, part in self._weight_slices(vocab):
            self._mm(du[:, low:high], part, out, accumulate or low > 0)

    def weight_grad(
        self, du: Tensor, hidden: Tensor, out: Tensor, accumulate: bool = False
    ) -> None:
        """out [T, D] (+)= du^T @ hidden, in the accumulator dtype."""
        self._mm(du.T, hidden.to(self.operand), out, accumulate)

    def row_logps(self, u: Tensor, targets: Tensor, vocab: Vocab) -> tuple[Tensor, Tensor]:
        """row_logps of a tile over the vocabulary range."""
        return row_logps(u, targets, self.transform, self._bias(vocab), vocab[0])

    def row_grad_(
        self, u: Tensor, targets: Tensor, vocab: Vocab, coef: Tensor, lse: Tensor
    ) -> Tensor:
        """du of a tile over the vocabulary range, for GEMMs to read, over the storage of u."""
        return row_grad_(
            u, targets, coef, lse, self.transform, self._bias(vocab), vocab[0], self.operand
        )

    def row_logps_grad_(
        self, u: Tensor, targets: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(lse, target logit, du) of a tile over the whole vocabulary whose coef is known beforehand."""
        lse, target_logit = u.new_empty(len(u)), u.new_empty(len(u))
        vocab = (0, u.shape[1])
        for rows in row_blocks(len(u), u.shape[1] * u.element_size(), u.device):
            lse[rows], target_logit[rows] = self.row_logps(u[rows], targets[rows], vocab)
            self.row_grad_(u[rows], targets[rows], vocab, coef[rows], lse[rows])
        return lse, target_logit, overlay(u, self.operand)

    def linear_logps(
        self, hidden: Tensor, targets: Tensor, budget: int, *, only_if_faster: bool
    ) -> tuple[Tensor, Tensor] | None:
        """(lse, target logit) of rows over the whole vocabulary without a tile of logits, in `budget` bytes; None where
        the engine has no such way, or not one known to beat whole rows of logits."""
        return None

    @staticmethod
    def gather(logits: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """(log-prob, logsumexp), both [M], of logits [M, V] that the caller holds; a target of -100 gives 0."""
        acc = accumulator_dtype(logits.dtype)
        logps = torch.empty(len(logits), dtype=acc, device=logits.device)
        lse = torch.empty_like(logps)
        for rows in row_blocks(len(logits), logits.shape[1] * acc.itemsize, logits.device):
            lse[rows], logps[rows] = row_logps(logits[rows].to(acc), targets[rows], transform)
        return log_probs(logps, lse, targets, logits.shape[1]), lse

    @staticmethod
    def gather_grad(
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        upstream: Tensor,
        transform: LogitTransform,
        out: Tensor,
    ) -> None:
        """out = upstream * d logp / d logits, [M, V]; out may be the logits."""
        coef = torch.where(targets == IGNORE, 0.0, upstream)
        for rows in row_blocks(len(logits), logits.shape[1] * lse.element_size(), logits.device):
            u = logits[rows].to(lse.dtype, copy=True)
            out[rows] = row_grad_(u, targets[rows], coef[rows], lse[rows], transform)

    def _bias(self, vocab: Vocab) -> Tensor | None:
        return None if self.bias is None else self.bias[slice(*vocab)].to(self.acc)
