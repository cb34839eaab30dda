"""The work that a device may do in its own way: GEMMs, and row operations on a tile of logits.

The loop in passes.py is the same for every engine. Legend: C rows of a chunk, T vocabulary entries
of a tile (all V, or a slice), D hidden.

    raw logits   u = W h + bias                                        [C, T], accumulator dtype
    logits       z = softcap * tanh(logit_scale * u / softcap) / temperature
    gradient     du = coef * (onehot - softmax(z)) * dz/du             over the storage of u, in the
                                                                       dtype that GEMMs read

A tile is an accumulator-dtype buffer (float32; float64 for float64 operands). GEMMs read bfloat16
as it is where the device can accumulate and return float32 from it (CUDA); elsewhere narrow
operands are cast, the weight slice by slice, and float16 operands are cast everywhere: coefficients
times small probabilities vanish in float16. Row operations of this file walk a tile in blocks: on a
CPU blocks stay in the cache, one trip to memory instead of one per operation; on a GPU they bound
the temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.head.plan import HeadSize, Machine
from una_fast.head.row_stats import LOWEST, EntropyTerm, RowSums
from una_fast.head.segment_loss import SegmentLoss
from una_fast.head.threads import share
from una_fast.losses import IGNORED

CACHE_BLOCK_BYTES = 1 << 20
GPU_BLOCK_BYTES = 8 << 20

# Logarithms, as in kernels/one_read.py.
SHIFT = 40.0  # of the target's E below 1
LARGEST = 60.0  # of an E

DEEPEST = -1e4  # of a log-prob where 0 * -inf would be NaN: its exponential is 0 in any dtype

Vocab = tuple[int, int]  # vocabulary entries [start, stop)


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

    @property
    def scale(self) -> float:
        """Return dz/du at u = 0; without a softcap, dz/du everywhere."""
        return self.logit_scale / self.temperature

    def __call__(self, u: Tensor) -> Tensor:
        """Return z of raw logits; u itself where z = u."""
        if self.softcap is None:
            return u if self.scale == 1.0 else u * self.scale
        return torch.tanh(u * (self.logit_scale / self.softcap)) * (self.softcap / self.temperature)

    def apply_(self, u: Tensor) -> Tensor | float:
        """Turn u into z in place, and return dz/du: a number without a softcap, else a tensor."""
        if self.softcap is None:
            if self.scale != 1.0:
                u.mul_(self.scale)
            return self.scale
        # With t = exp(-2|x|), 1 - tanh(x)^2 = 4 t / (1 + t)^2: nothing cancels near the cap.
        x = u.mul_(self.logit_scale / self.softcap)
        t = x.abs().mul_(-2).exp_()
        slope = t / (1 + t).square_()
        x.tanh_().mul_(self.softcap / self.temperature)
        return slope.mul_(4 * self.scale)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums: float64 for float64 operands, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def leaf_bytes(dtype: torch.dtype | None) -> int | None:
    """Return the bytes of a number of a weight gradient that may be built in the leaf's dtype.

    dtype: of the leaf; None: no gradient is wanted

    None for a gradient that needs an accumulator: float16 loses small numbers before a loss scale
    is multiplied in, and wider dtypes are the accumulator's.
    """
    return dtype.itemsize if dtype == torch.bfloat16 else None


# --- row operations -------------------------------------------------------------------------------


def row_blocks(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into ranges of logits that take about the bytes of one block."""
    block = CACHE_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(block // max(row_bytes, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _blocks_of(logits: Tensor) -> Iterator[slice]:
    rows, vocab = logits.shape
    return row_blocks(rows, vocab * logits.element_size(), logits.device)


def overlay(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [C, T] view in a narrower (or equal) dtype over the start of every row of u."""
    return u if dtype == u.dtype else u.view(dtype)[:, : u.shape[1]]


def _local(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return which targets lie in a vocabulary range, and the [C, 1] indices there (0 outside)."""
    inside = (targets >= start) & (targets < stop)
    return inside, torch.where(inside, targets - start, 0).unsqueeze(1)


def row_logps(
    u: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return ([C] logsumexp, [C] target logit) over the tile; 0 for a target outside the tile.

    u: [C, T] raw logits of the vocabulary from `start` on; not changed
    targets: [C] indices into the whole vocabulary
    transform: from u to z
    bias: [T], dtype of u
    start: first vocabulary entry of the tile
    """
    inside, local = _local(targets, start, start + u.shape[1])
    lse = u.new_empty(len(u))
    target_logit = u.new_empty(len(u))

    def work(rows: slice) -> None:
        raw = u[rows] if bias is None else u[rows] + bias
        z = transform(raw)
        top = z.amax(1, keepdim=True)
        # A slice of masked entries alone has a logsumexp of -inf, not NaN.
        top.masked_fill_(top == -torch.inf, 0.0)
        total = (z - top).exp_().sum(1)
        lse[rows] = total.log_().add_(top.squeeze(1))
        target_logit[rows] = z.gather(1, local[rows]).squeeze(1)

    share(work, _blocks_of(u), u.device)
    return lse, torch.where(inside, target_logit, 0.0)


def row_sums(
    u: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    stats: Sequence[str],
    bias: Tensor | None = None,
    start: int = 0,
) -> RowSums:
    """Return the sums of row_stats.py over the tile.

    u: [C, T] raw logits of the vocabulary from `start` on; not changed
    targets: [C] indices into the whole vocabulary
    transform: from u to z
    stats: names of the wanted statistics
    bias: [T], dtype of u
    start: first vocabulary entry of the tile
    """
    inside, local = _local(targets, start, start + u.shape[1])
    sums = RowSums.empty(len(u), u.dtype, u.device, stats)

    def work(rows: slice) -> None:
        raw = u[rows] if bias is None else u[rows] + bias
        z = transform(raw)
        target_logit = z.gather(1, local[rows]).squeeze(1)
        sums.target_logit[rows] = torch.where(inside[rows], target_logit, 0.0)
        if sums.plain is not None:
            sums.plain[rows] = z.sum(1)
        if sums.place is None:
            top = z.amax(1)
        else:
            top, place = z.max(1)  # the first of equal ones
            sums.place[rows] = place + start
        sums.top[rows] = top.clamp_min_(LOWEST)
        d = z - top.unsqueeze(1)
        if sums.moment is None:
            e = d.exp_()
        else:
            e = d.clamp_min_(DEEPEST).exp()
        sums.total[rows] = e.sum(1)
        if sums.moment is not None:
            sums.moment[rows] = d.mul_(e).sum(1)
        if sums.squares is not None:
            sums.squares[rows] = e.square_().sum(1)

    share(work, _blocks_of(u), u.device)
    return sums


def row_grad_(
    u: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    entropy: EntropyTerm | None = None,
) -> Tensor:
    """Return du = coef * (onehot - softmax(z)) * dz/du, [C, T], over the storage of u or in out.

    With an entropy term, du is the sum of both gradients (row_stats.py).

    u: [C, T] raw logits of the vocabulary from `start` on; lost
    targets: [C] indices into the whole vocabulary
    coef: [C] gradients of the loss by the log-probs, dtype of u
    lse: [C] logsumexp of the whole rows, dtype of u
    transform: from u to z
    bias: [T], dtype of u
    start: first vocabulary entry of the tile
    dtype: dtype of du, no wider than the dtype of u; None: the dtype of u
    out: [C, T] beside u, for du in the dtype of out
    entropy: term of the entropy's gradient; None: the log-probs' alone
    """
    inside, local = _local(targets, start, start + u.shape[1])
    du = overlay(u, dtype or u.dtype) if out is None else out

    def work(rows: slice) -> None:
        block = u[rows] if bias is None else u[rows].add_(bias)
        slope = transform.apply_(block)
        c = coef[rows].unsqueeze(1)
        block.sub_(lse[rows].unsqueeze(1))
        if entropy is None:
            block.exp_().mul_(-c)
        else:
            e, found, tail = (x[rows].unsqueeze(1) for x in entropy.columns)
            block.sub_(tail).clamp_min_(DEEPEST)  # log p
            factor = (block + found).mul_(-e).sub_(c)
            block.exp_().mul_(factor)
        at_target = torch.where(inside[rows].unsqueeze(1), c, 0.0)
        block.scatter_add_(1, local[rows], at_target)
        if isinstance(slope, Tensor) or slope != 1.0:
            block.mul_(slope)
        # The storage of both overlaps: the cast makes a copy in between.
        if du is not u:
            du[rows] = block.to(du.dtype)

    share(work, _blocks_of(u), u.device)
    return du


def one_read_(
    u: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([C] log-probs, E [C, V], [C] factors), with du = coef * factor * E row by row.

    The algebra is in kernels/one_read.py: E = exp(z - shift) of all entries but the target's, over
    the storage of u, before the sum of any row is known.

    u: [C, V] raw logits; lost
    targets: [C] indices
    transform: from u to z
    bias: [V], dtype of u
    dtype: dtype of E, no wider than the dtype of u; None: the dtype of u
    out: [C, V] beside u, for E in the dtype of out
    """
    inside, index = _local(targets, 0, u.shape[1])
    inside = inside.unsqueeze(1)
    scores = overlay(u, dtype or u.dtype) if out is None else out
    # Of every row: log of the target's E, E of the target (0 without one), sum of all others.
    own_log, own, rest = u.new_empty(3, len(u), 1)
    slope_at = torch.ones_like(own)

    def work(rows: slice) -> None:
        at = index[rows]
        block = u[rows] if bias is None else u[rows].add_(bias)
        slope = transform.apply_(block)
        # Differences first: their rounding errors are in proportion to them, not to the logits.
        origin = block.gather(1, at)
        block.sub_(torch.where(origin > -1e30, origin, 0.0))  # 0 for a masked target
        shift = (block.amax(1, keepdim=True) - LARGEST).clamp_min_(SHIFT)
        own_log[rows] = block.gather(1, at).sub_(shift)
        block.sub_(shift).exp_()
        at_index = block.gather(1, at)
        own[rows] = torch.where(inside[rows], at_index, 0.0)
        block.scatter_(1, at, at_index - own[rows])
        torch.sum(block, 1, keepdim=True, out=rest[rows])
        if isinstance(slope, Tensor):
            block.mul_(slope)
            torch.gather(slope, 1, at, out=slope_at[rows])
        # The storage of both overlaps: the cast makes a copy in between.
        if scores is not u:
            scores[rows] = block.to(scores.dtype)

    share(work, _blocks_of(u), u.device)
    ratio = rest / own
    small = torch.log1p(ratio).neg_()
    logps = torch.where(ratio < 1e30, small, own_log - rest.log())
    at_target = torch.where(inside, -rest * slope_at, scores.gather(1, index))
    scores.scatter_(1, index, at_target.to(scores.dtype))
    # A slope that differs from logit to logit is in E already.
    scale = transform.scale if transform.softcap is None else 1.0
    return logps.squeeze(1), scores, (-scale / (own + rest)).squeeze(1)


def log_probs(target_logit: Tensor, lse: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Return target_logit - lse where the targets are known; see `where_known`."""
    return where_known(target_logit - lse, targets, vocab)


def where_known(logps: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """Return log-probs; 0 where the target is -100, NaN for other targets outside the vocabulary.

    On a GPU targets are not checked beforehand: a check would wait for the device.
    """
    outside = (targets < 0) | (targets >= vocab)
    return torch.where(targets == IGNORED, 0.0, torch.where(outside, math.nan, logps))


# --- the engine -----------------------------------------------------------------------------------


class TorchEngine:
    """Plain PyTorch on any device."""

    name = "torch"
    segment_loss = SegmentLoss  # from token log-probs to loss and coefficients
    align = 1  # rows of a tile start at multiples of so many logits
    quantum = 1  # chunks of more rows are multiples of the quantum
    machine: Machine | None = None  # rates of the cost model

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, cast_bytes: int
    ) -> None:
        """Hold a head.

        weight: [V, D]
        bias: [V], or None
        transform: from raw logits to logits
        cast_bytes: room for a slice of the weight in the accumulator dtype, used where operands of
            GEMMs are cast
        """
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.transform = transform
        self.acc = accumulator_dtype(weight.dtype)
        native = self._native() and weight.dtype != torch.float16
        self.operand = weight.dtype if native else self.acc  # dtype that GEMMs read, of du too
        self.cast = self.operand != weight.dtype
        row_bytes = weight.shape[1] * self.acc.itemsize
        self.cast_rows = max(cast_bytes // row_bytes, 1)

    def _native(self) -> bool:
        """Return whether GEMMs accumulate and return float32 from narrower operands as they are."""
        return self.weight.is_cuda and torch.version.hip is None

    def size(self) -> HeadSize:
        """Return the sizes that the block plan depends on."""
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
        """Return whether a GEMM can write a dtype."""
        return dtype in (self.acc, self.operand)

    def _weight_slices(self, vocab: Vocab) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of the weight in the dtype of GEMMs, with offsets within the range."""
        start, stop = vocab
        step = self.cast_rows if self.cast else max(stop - start, 1)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            yield low - start, high - start, self.weight[low:high].to(self.operand)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """Compute out (+)= a @ b, accumulated in the accumulator dtype."""
        widen = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
        if accumulate:
            torch.addmm(out, a, b, out=out, **widen)
        else:
            torch.mm(a, b, out=out, **widen)

    def logits(self, hidden: Tensor, vocab: Vocab, out: Tensor) -> None:
        """Write raw logits without bias.

        hidden: [C, D]
        vocab: range of T vocabulary entries
        out: [C, T], accumulator dtype
        """
        hidden = hidden.to(self.operand)
        for low, high, weight in self._weight_slices(vocab):
            self._mm(hidden, weight.T, out[:, low:high])
            del weight  # one cast slice at a time

    def hidden_grad(self, du: Tensor, vocab: Vocab, out: Tensor, accumulate: bool = False) -> None:
        """Compute out [C, D] (+)= du @ W, in a dtype that the engine `writes`."""
        for low, high, weight in self._weight_slices(vocab):
            self._mm(du[:, low:high], weight, out, accumulate or low > 0)
            del weight  # one cast slice at a time

    def weight_grad(
        self, du: Tensor, hidden: Tensor, out: Tensor, accumulate: bool = False
    ) -> None:
        """Compute out [T, D] (+)= du^T @ hidden, in the accumulator dtype.

        Without accumulating, in any dtype: slice by slice where a GEMM cannot write it.
        """
        hidden = hidden.to(self.operand)
        if self.writes(out.dtype):
            self._mm(du.T, hidden, out, accumulate)
            return
        assert not accumulate, "a sum would be rounded at every step"
        step = min(self.cast_rows, len(out))
        part = torch.empty(step, out.shape[1], dtype=self.acc, device=out.device)
        for low in range(0, len(out), len(part)):
            rows = out[low : low + len(part)]
            self._mm(du[:, low : low + len(rows)].T, hidden, part[: len(rows)])
            rows.copy_(part[: len(rows)])

    def scaled_operand(self, hidden: Tensor, factors: Tensor) -> Tensor:
        """Return factors * hidden [C, D] as GEMMs read it, rounded once; factors: [C, 1]."""
        out = torch.empty(hidden.shape, dtype=self.operand, device=hidden.device)
        return torch.mul(hidden, factors, out=out)

    def weighted_sum(self, du: Tensor, factors: Tensor) -> Tensor:
        """Return the sum over the rows of factors * du, [T] in the accumulator dtype.

        du: [C, T] as GEMMs read it
        factors: [C, 1]
        """
        out = torch.empty(du.shape[1], 1, dtype=self.acc, device=du.device)
        self._mm(du.T, factors.to(self.operand), out)
        return out.squeeze(1)

    def row_logps(self, u: Tensor, targets: Tensor, vocab: Vocab) -> tuple[Tensor, Tensor]:
        """Return ([C] logsumexp, [C] target logit) of a tile over a vocabulary range."""
        return row_logps(u, targets, self.transform, self._bias(vocab), vocab[0])

    def row_sums(self, u: Tensor, targets: Tensor, vocab: Vocab, stats: Sequence[str]) -> RowSums:
        """Return the sums that statistics need, of a tile over a vocabulary range."""
        return row_sums(u, targets, self.transform, stats, self._bias(vocab), vocab[0])

    def row_grad_(
        self,
        u: Tensor,
        targets: Tensor,
        vocab: Vocab,
        coef: Tensor,
        lse: Tensor,
        out: Tensor | None = None,
        entropy: EntropyTerm | None = None,
    ) -> Tensor:
        """Return du of a tile over a vocabulary range, for GEMMs to read: over u, or in out."""
        bias = self._bias(vocab)
        head = (self.transform, bias, vocab[0], self.operand)
        return row_grad_(u, targets, coef, lse, *head, out, entropy)

    def one_read_(
        self, u: Tensor, targets: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ([C] log-probs, E [C, V], [C] factors), with du = coef * factor * E row by row.

        u: [C, V] raw logits of a tile over the whole vocabulary; lost
        targets: [C]
        out: [C, V] for E, as GEMMs read it; None: over u
        """
        bias = self._bias((0, u.shape[1]))
        return one_read_(u, targets, self.transform, bias, self.operand, out)

    def linear_logps(
        self, hidden: Tensor, targets: Tensor, budget: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return ([C] logsumexp, [C] target logit) without a tile of logits, in `budget` bytes.

        None where the engine has no such way.
        """
        return None

    @staticmethod
    def gather(logits: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """Return ([M] log-probs, [M] logsumexp) of logits that the caller holds.

        logits: [M, V]
        targets: [M]; -100 gives a log-prob of 0
        transform: from logits to the logits of the softmax
        """
        rows, vocab = logits.shape
        acc = accumulator_dtype(logits.dtype)
        target_logit = torch.empty(rows, dtype=acc, device=logits.device)
        lse = torch.empty_like(target_logit)

        def work(block: slice) -> None:
            wide = logits[block].to(acc)
            lse[block], target_logit[block] = row_logps(wide, targets[block], transform)

        share(work, row_blocks(rows, vocab * acc.itemsize, logits.device), logits.device)
        return log_probs(target_logit, lse, targets, vocab), lse

    @staticmethod
    def gather_grad(
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        upstream: Tensor,
        transform: LogitTransform,
        out: Tensor,
    ) -> None:
        """Write out = upstream * d logp / d logits.

        logits: [M, V]
        targets: [M]
        lse: [M] logsumexp that `gather` returned
        upstream: [M] gradients of the log-probs
        transform: as in `gather`
        out: [M, V]; may be the logits
        """
        coef = torch.where(targets == IGNORED, 0.0, upstream)
        rows, vocab = logits.shape

        def work(block: slice) -> None:
            u = logits[block].to(lse.dtype, copy=True)
            out[block] = row_grad_(u, targets[block], coef[block], lse[block], transform)

        share(work, row_blocks(rows, vocab * lse.element_size(), logits.device), logits.device)

    @staticmethod
    def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
        """Return factor * grad in a dtype, rounded once; over grad where dtype and `keep` allow.

        The product is in the accumulator dtype of grad: a factor is never rounded to a narrow one.

        grad: [M, K] or [M]
        factor: [] or [M, 1]
        dtype: of the result
        keep: grad is needed again, and must not be written to
        """
        acc = accumulator_dtype(grad.dtype)
        factor = factor.to(acc)
        overwrite = grad.dtype == dtype and not keep
        out = grad if overwrite else torch.empty_like(grad, dtype=dtype)
        # A GPU would round a factor without dimensions to the dtype of grad, but grad is wide here.
        if grad.dtype == dtype == acc:
            return torch.mul(grad, factor, out=out)
        # Blocks bound the wide copies.
        row_bytes = math.prod(grad.shape[1:]) * acc.itemsize

        def work(rows: slice) -> None:
            of_rows = factor if factor.dim() == 0 else factor[rows]
            out[rows] = grad[rows].to(acc) * of_rows

        share(work, row_blocks(len(grad), row_bytes, grad.device), grad.device)
        return out

    def _bias(self, vocab: Vocab) -> Tensor | None:
        return None if self.bias is None else self.bias[slice(*vocab)].to(self.acc)
