"""The two things a device may do its own way: the GEMMs of the head, and the row operations on a tile of logits.

The loop in passes.py is the same for every engine. Legend: C rows of a chunk, T vocabulary entries of a tile (all V,
or a slice), D hidden.

    raw logits   u = W h + bias                                        [C, T], accumulator dtype
    logits       z = softcap * tanh(logit_scale * u / softcap) / temperature
    gradient     du = coef * (onehot - softmax(z)) * dz/du             over the storage of u

A tile is an accumulator-dtype buffer (float32; float64 for float64 operands). Row operations walk it in blocks that
stay in the CPU's cache: one trip to memory instead of one per operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_BLOCK_BYTES = 1 << 20


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
    """Row ranges that stay in a CPU's cache; on a GPU, eighths, to bound the temporaries."""
    step = max(CACHE_BLOCK_BYTES // max(row_bytes, 1) if device.type == "cpu" else rows // 8, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _local(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(which rows have their target in the vocabulary range, its [C, 1] index there or 0)."""
    inside = (targets >= start) & (targets < stop)
    return inside, torch.where(inside, targets - start, 0).unsqueeze(1)


def row_logps(
    u: Tensor, targets: Tensor, transform: LogitTransform, bias: Tensor | None = None, start: int = 0
) -> tuple[Tensor, Tensor]:
    """(logsumexp over the tile, target logit or 0 where the target lies outside it), both [C]; u is kept.

    u: [C, T] raw logits of the vocabulary from `start` on; targets: [C] indices into the whole vocabulary;
    bias: [T], dtype of u."""
    inside, local = _local(targets, start, start + u.shape[1])
    lse, target_logit = u.new_empty(len(u)), u.new_empty(len(u))
    for rows in row_blocks(len(u), u.shape[1] * u.element_size(), u.device):
        z = transform(u[rows] if bias is None else u[rows] + bias)
        top = z.amax(1, keepdim=True)
        top.masked_fill_(top == -torch.inf, 0.0)  # a slice of masked entries alone: its logsumexp is -inf, not NaN
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
) -> Tensor:
    """u becomes du = coef * (onehot - softmax(z)) * dz/du, in place.

    coef, lse: [C], dtype of u; lse is the logsumexp of the whole row. The rest as in row_logps."""
    inside, local = _local(targets, start, start + u.shape[1])
    for rows in row_blocks(len(u), u.shape[1] * u.element_size(), u.device):
        block = u[rows] if bias is None else u[rows].add_(bias)
        slope = transform.apply_(block)
        c = coef[rows].unsqueeze(1)
        block.sub_(lse[rows].unsqueeze(1)).exp_().mul_(-c)
        block.scatter_add_(1, local[rows], torch.where(inside[rows].unsqueeze(1), c, 0.0))
        if isinstance(slope, Tensor) or slope != 1.0:
            block.mul_(slope)
    return u


class TorchEngine:
    """Plain PyTorch on any device."""

    name = "torch"

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, cast_bytes: int) -> None:
        """weight: [V, D]. bias: [V] or None. cast_bytes: room for a slice of the weight in the accumulator dtype,
        used where a GEMM cannot accumulate and return float32 from narrower operands (CPU)."""
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.transform = transform
        self.acc = accumulator_dtype(weight.dtype)
        self.narrow = weight.dtype != self.acc
        self.native = self.narrow and weight.is_cuda  # mm(out_dtype=float32) exists
        row_bytes = weight.shape[1] * torch.finfo(self.acc).bits // 8
        self.cast_rows = max(cast_bytes // row_bytes, 1)

    def _weight_slices(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """The weight rows [start, stop) in the dtype of the GEMM, with offsets relative to `start`."""
        step = self.cast_rows if self.narrow and not self.native else max(stop - start, 1)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            part = self.weight[low:high]
            yield low - start, high - start, part if self.native else part.to(self.acc)

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype if self.native else self.acc)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out (+)= a @ b, accumulated and stored in the accumulator dtype."""
        widen = {"out_dtype": self.acc} if self.native else {}
        if accumulate:
            torch.addmm(out, a, b, out=out, **widen)
        else:
            torch.mm(a, b, out=out, **widen)

    def logits(self, hidden: Tensor, vocab: tuple[int, int], out: Tensor) -> None:
        """Raw logits without bias. hidden: [C, D]; out: [C, T] for the vocabulary range."""
        hidden = self._operand(hidden)
        for low, high, part in self._weight_slices(*vocab):
            self._mm(hidden, part.T, out[:, low:high])

    def hidden_grad(self, du: Tensor, vocab: tuple[int, int], out: Tensor, accumulate: bool = False) -> None:
        """out [C, D] (+)= du @ W, in the accumulator dtype."""
        for low, high, part in self._weight_slices(*vocab):
            self._mm(self._operand(du[:, low:high]), part, out, accumulate or low > 0)

    def weight_grad(self, du: Tensor, hidden: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out [T, D] (+)= du^T @ hidden, in the accumulator dtype."""
        self._mm(self._operand(du).T, self._operand(hidden), out, accumulate)

    def row_logps(self, u: Tensor, targets: Tensor, vocab: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """row_logps of a tile over the vocabulary range."""
        return row_logps(u, targets, self.transform, self._bias(vocab), vocab[0])

    def row_grad_(self, u: Tensor, targets: Tensor, vocab: tuple[int, int], coef: Tensor, lse: Tensor) -> None:
        """row_grad_ of a tile over the vocabulary range."""
        row_grad_(u, targets, coef, lse, self.transform, self._bias(vocab), vocab[0])

    def _bias(self, vocab: tuple[int, int]) -> Tensor | None:
        return None if self.bias is None else self.bias[slice(*vocab)].to(self.acc)


ENGINES = ("auto", "torch", "triton")


def choose_engine(name: str, device: torch.device) -> type[TorchEngine]:
    """The engine class for a device; asking for one that cannot run there is an error."""
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is not one of {ENGINES}")
    if name == "triton":
        reason = "tensors are on the CPU" if device.type == "cpu" else "this version has no Triton engine yet"
        raise ValueError(f'engine="triton" cannot run: {reason}; use engine="auto" or "torch"')
    return TorchEngine
