"""The chunk loop of the fused head: what every engine and every public function of head.py runs.

Legend: N rows, D hidden, V vocab, S responses, C rows of a chunk. All of it works without autograd, on detached
tensors; head.py puts the autograd functions on top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.head.constants import constant
from una_fast.head.engines import choose_engine
from una_fast.head.plan import (
    DEFAULT_WORKSPACE_MB,
    FEW_ROWS,
    Plan,
    Span,
    Tile,
    chunks,
    fit_tile,
    forward_tile,
    make_plan,
)
from una_fast.head.segment_loss import BOOSTED, CallLoss, Lengths
from una_fast.head.torch_engine import LogitTransform, TorchEngine, log_probs
from una_fast.logs import say_once
from una_fast.losses import UnaOutput


@dataclass(frozen=True)
class Workspace:
    budget: int  # bytes

    @classmethod
    def of(cls, device: torch.device, workspace_mb: float | None) -> Workspace:
        if workspace_mb is None:
            workspace_mb = DEFAULT_WORKSPACE_MB.get(device.type, DEFAULT_WORKSPACE_MB["cuda"])
        if not 0 < workspace_mb < math.inf:
            raise ValueError(f"workspace_mb={workspace_mb} must be positive and finite")
        return cls(int(workspace_mb * 2**20))

    @property
    def cast_bytes(self) -> int:
        """The part set aside for slices of a narrow weight in the accumulator dtype, where those are needed."""
        return self.budget // 8

    def tile_bytes(self, cast: bool) -> int:
        return self.budget - (self.cast_bytes if cast else 0)


class Head:
    """One head (weight, bias, transform) with the engine that runs it and the one buffer of logits it reuses."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        workspace: Workspace,
        engine: str,
    ) -> None:
        chosen = choose_engine(engine, weight.device, weight.dtype)
        if engine == "auto":
            say_once(logging.INFO, f"fused head on {weight.device.type}: engine {chosen.name}")
        self.engine: TorchEngine = chosen(weight, bias, transform, workspace.cast_bytes)
        self.workspace = workspace
        self.vocab, self.dim = weight.shape
        self.size = self.engine.size()
        self.budget = workspace.tile_bytes(self.engine.cast)
        self._buffer: Tensor | None = None

    def tile(self, rows: int) -> Tile:
        """The tile of a pass without a plan, over rows that lie together."""
        return forward_tile(self.size, rows, self.budget)

    def plan(
        self,
        feedback: Feedback,
        lengths: Lengths,
        train_weight: bool,
        train_bias: bool,
        length_normalize: bool,
    ) -> Plan:
        """The block plan of a call with gradients."""
        plan = make_plan(
            feedback,
            lengths.ints,
            self.size,
            budget=self.budget,
            accumulator_width=self.dim if train_weight else int(train_bias),
            length_normalize=length_normalize,
        )
        if plan.tile.vocab < self.vocab:
            say_once(
                logging.WARNING,
                f"the workspace of {self.workspace.budget / 2**20:g} MiB holds too few rows of {self.vocab} logits: "
                "slices of the vocabulary, for one more pass; raise workspace_mb for speed",
            )
        elif plan.tile.rows < min(FEW_ROWS, sum(lengths.ints)):
            say_once(
                logging.WARNING,
                f"the workspace of {self.workspace.budget / 2**20:g} MiB holds {plan.tile.rows} rows of "
                f"{plan.tile.vocab} logits: every such chunk reads the head"
                f"{' and reads and writes its gradient' if train_weight else ''} once; raise workspace_mb for speed",
            )
        return plan

    def drop_buffer(self) -> Head:
        """Free the logits."""
        self._buffer = None
        return self

    def buffer(self, tile: Tile, rows: int, width: int) -> Tensor:
        """A [rows, width] view of the logits buffer, its row stride padded to what the engine wants."""
        if self._buffer is None:
            size = tile.rows * self.size.stride(tile.vocab)
            self._buffer = torch.empty(
                size, dtype=self.engine.acc, device=self.engine.weight.device
            )
        stride = self.size.stride(width)
        return self._buffer[: rows * stride].view(rows, stride)[:, :width]

    def slices(self, tile: Tile) -> list[Span]:
        return [(v, min(v + tile.vocab, self.vocab)) for v in range(0, self.vocab, tile.vocab)]

    def logits(self, hidden: Tensor, vocab: Span, tile: Tile) -> Tensor:
        """Raw logits of a chunk, in the buffer: valid until the next call."""
        u = self.buffer(tile, hidden.shape[0], vocab[1] - vocab[0])
        self.engine.logits(hidden, vocab, u)
        return u

    def chunk_stats(
        self, hidden: Tensor, targets: Tensor, tile: Tile, *, keep_logits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """([C] logsumexp, [C] target logit) of one chunk. keep_logits: of a full-width tile, in the buffer."""
        sliced = tile.vocab < self.vocab
        if sliced or not keep_logits:
            if sliced:
                self.drop_buffer()  # its room is for the partial sums
            stats = self.engine.linear_logps(
                hidden, targets, self.budget, only_if_faster=not sliced
            )
            if stats is not None:
                return stats
        lse = target_logit = None
        for vocab in self.slices(tile):
            u = self.logits(hidden, vocab, tile)
            part_lse, part_target = self.engine.row_logps(u, targets, vocab)
            lse = part_lse if lse is None else torch.logaddexp(lse, part_lse)
            target_logit = part_target if target_logit is None else target_logit + part_target
        return lse, target_logit

    def logps(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """([N] log-probs, [N] logsumexp): forward only, 1 pass."""
        tile = self.tile(len(hidden))
        lse = torch.empty(hidden.shape[0], dtype=self.engine.acc, device=hidden.device)
        target_logit = torch.empty_like(lse)
        for ((start, stop),) in chunks([0], [0, len(lse)], tile.rows, self.size.quantum):
            rows = slice(start, stop)
            stats = self.chunk_stats(hidden[rows], targets[rows], tile, keep_logits=False)
            lse[rows], target_logit[rows] = stats
        return log_probs(target_logit, lse, targets, self.vocab), lse

    def logps_of_both(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[N] log-probs of policy and reference, which share this head: stacked where one chunk holds both."""
        rows = len(hidden)
        if 2 * rows > fit_tile(self.size, 2 * rows, self.budget, gathered=True).rows:
            return self.logps(hidden, targets)[0], self.logps(ref_hidden, targets)[0]
        logps, _ = self.logps(torch.cat([hidden, ref_hidden]), targets.repeat(2))
        return logps[:rows], logps[rows:]


class Grads:
    """Gradients under construction: hidden [N, D]; weight [V, D] and bias [V] in the accumulator dtype."""

    def __init__(
        self, head: Head, tile: Tile, weight: bool, bias: bool, hidden: Tensor | None = None
    ) -> None:
        device, acc = head.engine.weight.device, head.engine.acc
        self.engine = head.engine
        self.sliced = tile.vocab < head.vocab
        self.hidden = hidden
        self.weight = (
            torch.empty(head.vocab, head.dim, dtype=acc, device=device) if weight else None
        )
        self.bias = torch.empty(head.vocab, dtype=acc, device=device) if bias else None
        self.head_parts = [x for x in (self.weight, self.bias) if x is not None]
        self.started = False  # whether weight and bias hold anything yet
        self.scale: Tensor | float | None = None  # a factor that weight and bias still lack

    def add(
        self, spans: Sequence[Span], hidden: Tensor, tiles: Iterator[tuple[Span, Tensor]]
    ) -> None:
        """The gradients of one chunk. hidden: [C, D], the rows of the spans. tiles: (vocabulary range, du [C, T])."""
        self._settle()
        into = None
        for vocab, du in tiles:
            if self.hidden is not None:
                into = self._rows_to_write(spans) if into is None else into
                self.engine.hidden_grad(du, vocab, into, vocab[0] > 0)
            if self.weight is not None:
                self.engine.weight_grad(du, hidden, self.weight[slice(*vocab)], self.started)
            if self.bias is not None:
                total = du.sum(0, dtype=self.bias.dtype)
                self.bias[slice(*vocab)] = (
                    self.bias[slice(*vocab)] + total if self.started else total
                )
        self.started = True
        if into is not None and not self._in_place(spans):
            _put(self.hidden, spans, into)

    def _in_place(self, spans: Sequence[Span]) -> bool:
        whole = self.engine.writes(self.hidden.dtype) and (
            self.hidden.dtype == self.engine.acc or not self.sliced
        )
        return len(spans) == 1 and whole

    def _rows_to_write(self, spans: Sequence[Span]) -> Tensor:
        """[C, D] for the GEMM to write, and to add to over slices: the gradient itself, or an accumulator beside it."""
        if self._in_place(spans):
            return self.hidden[slice(*spans[0])]
        rows = sum(stop - start for start, stop in spans)
        return torch.empty(
            rows, self.hidden.shape[1], dtype=self.engine.acc, device=self.hidden.device
        )

    def fold(self, other: Grads, scale: Tensor) -> None:
        """weight and bias += scale * other's."""
        self._settle()
        for mine, theirs in zip(self.head_parts, other.head_parts, strict=True):
            if self.started:
                mine.addcmul_(theirs, scale.to(mine.dtype))
            else:
                torch.mul(theirs, scale, out=mine)
        self.started = True

    def _settle(self) -> None:
        """Multiply by the factor that is due, before anything is added."""
        if self.scale is not None:
            for part in self.head_parts:
                part.mul_(self.scale)
            self.scale = None

    def finish(self) -> None:
        if not self.started:
            for part in self.head_parts:
                part.zero_()


def empty_hidden_grad(hidden: Tensor, head: Head, all_rows: bool) -> Tensor:
    """[N, D] to be written row by row: zeros if some rows never are; in the accumulator dtype for float16, which cannot
    hold what a loss scale is yet to multiply."""
    dtype = head.engine.acc if hidden.dtype == torch.float16 else hidden.dtype
    return (torch.empty if all_rows else torch.zeros)(
        hidden.shape, dtype=dtype, device=hidden.device
    )


def recompute(
    head: Head,
    tile: Tile,
    cuts: Sequence[Sequence[Span]],
    hidden: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    grads: Grads,
) -> None:
    """Gradients of rows whose coefficient and logsumexp [N] are known: the logits once more, tile by tile."""

    def tiles(rows: Tensor, spans: Sequence[Span]) -> Iterator[tuple[Span, Tensor]]:
        labels, factors, sums = (_take(x, spans) for x in (targets, coef, lse))
        for vocab in head.slices(tile):
            u = head.logits(rows, vocab, tile)
            yield vocab, head.engine.row_grad_(u, labels, vocab, factors, sums)

    for spans in cuts:
        rows = _take(hidden, spans)
        grads.add(spans, rows, tiles(rows, spans))


def _take(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The rows of x in the spans: a view for one span, a copy for several."""
    parts = [x[a:b] for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _put(x: Tensor, spans: Sequence[Span], values: Tensor) -> None:
    offset = 0
    for a, b in spans:
        x[a:b] = values[offset : offset + b - a]
        offset += b - a


class OnePass:
    """One linear_una_loss call with gradients, following its plan."""

    def __init__(
        self,
        head: Head,
        plan: Plan,
        hidden: Tensor,
        targets: Tensor,
        loss: CallLoss,
        needs: Sequence[bool],
    ) -> None:
        """hidden: [N, D] in the dtype of the head. needs: whether hidden, weight and bias want a gradient."""
        self.head, self.plan, self.targets, self.loss = head, plan, targets, loss
        self.hidden = hidden.detach()
        self.lengths = loss.lengths
        self.need_hidden, self.need_weight, self.need_bias = needs
        self.boosted = head.engine.operand == torch.float16
        self.boost = (
            loss.boost() if self.boosted else 1.0
        )  # every gradient but a streamed one is built times this

    def run(self) -> tuple[UnaOutput, Grads, Tensor | None]:
        """Loss, gradients, and the [N] factors that the rows of the hidden gradient still lack (None: none)."""
        plan, hidden = self.plan, self.hidden
        self.logps = torch.zeros(hidden.shape[0], dtype=self.head.engine.acc, device=hidden.device)
        self.lse = torch.zeros_like(self.logps) if plan.recomputed else None
        into = empty_hidden_grad(hidden, self.head, not plan.unscored) if self.need_hidden else None
        self.grads = self._gradients(into)
        late = self._stream() if plan.streamed else None
        for block in plan.resident:
            self._resident(block)
        if plan.recomputed:
            self._recompute()
        for spans in self._cuts(plan.unscored):
            self._forward(spans)
        self.grads.finish()
        if self.boosted:
            self.grads.scale = (1.0 if self.grads.scale is None else self.grads.scale) / self.boost
            late = torch.ones_like(self.logps) / self.boost if late is None else late
        self.head.drop_buffer()
        return self.loss.output(self.logps), self.grads, late

    def _cuts(self, responses: Sequence[int]) -> list[list[Span]]:
        return self.plan.cuts(responses, self.lengths.cu)

    def _gradients(self, hidden: Tensor | None) -> Grads:
        return Grads(self.head, self.plan.tile, self.need_weight, self.need_bias, hidden)

    def _row_factors(self, per_response: Tensor) -> Tensor:
        return self.lengths.per_row(per_response.to(self.logps.dtype))

    def _forward(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of a chunk into place; returns its hidden rows, targets and logsumexp."""
        hidden, targets = _take(self.hidden, spans), _take(self.targets, spans)
        lse, target_logit = self.head.chunk_stats(hidden, targets, self.plan.tile)
        _put(self.logps, spans, log_probs(target_logit, lse, targets, self.head.vocab))
        return hidden, targets, lse

    def _resident(self, block: Sequence[int]) -> None:
        (spans,) = self._cuts(block)
        hidden, targets, lse = self._forward(spans)
        factors = _take(self._row_factors(self.loss.coefficients(self.logps) * self.boost), spans)
        vocab = (0, self.head.vocab)
        u = self.head.buffer(self.plan.tile, len(hidden), self.head.vocab)
        self.grads.add(
            spans,
            hidden,
            iter([(vocab, self.head.engine.row_grad_(u, targets, vocab, factors, lse))]),
        )

    def _stream(self) -> Tensor:
        units, streamed = [1.0] * len(self.lengths.ints), [0.0] * len(self.lengths.ints)
        for component in self.plan.streamed:
            for group in component.groups:
                for i, unit in zip(group.responses, group.units, strict=True):
                    units[i], streamed[i] = unit, 1.0
        device = self.hidden.device
        if self.boosted:
            most = max(abs(unit) for unit, used in zip(units, streamed, strict=True) if used)
            units = [unit * BOOSTED / most for unit in units]
        units = constant(tuple(units), torch.float64, device)
        streamed = constant(tuple(streamed), torch.float64, device) > 0
        factors = self._row_factors(units)
        scratch = (
            [self._gradients(self.grads.hidden) for _ in range(self.plan.scratch)]
            if self.grads.head_parts
            else []
        )
        for k, component in enumerate(self.plan.streamed):
            if not self.grads.head_parts:
                self._stream_rows(component.responses, factors, self.grads)
                continue
            # The first component builds its first group in the gradient itself, to be scaled later.
            into = [self.grads, *scratch] if k == 0 else scratch
            for group, accumulators in zip(component.groups, into, strict=False):
                accumulators.started = False
                self._stream_rows(group.responses, factors, accumulators)
            scalars = (self.loss.coefficients(self.logps) / units * self.boost).to(self.logps.dtype)
            for group, accumulators in zip(component.groups, into, strict=False):
                scalar = scalars[group.responses[0]]
                if accumulators is self.grads:
                    self.grads.scale = scalar
                else:
                    self.grads.fold(accumulators, scalar)
        return self._row_factors(
            torch.where(streamed, self.loss.coefficients(self.logps) / units, 1.0 / self.boost)
        )

    def _stream_rows(self, responses: Sequence[int], factors: Tensor, grads: Grads) -> None:
        """Log-probs and gradients of rows whose coefficient is yet to be multiplied in."""
        for spans in self._cuts(responses):
            hidden, targets = _take(self.hidden, spans), _take(self.targets, spans)
            u = self.head.logits(hidden, (0, self.head.vocab), self.plan.tile)
            lse, target_logit, du = self.head.engine.row_logps_grad_(
                u, targets, _take(factors, spans)
            )
            _put(self.logps, spans, log_probs(target_logit, lse, targets, self.head.vocab))
            grads.add(spans, hidden, iter([((0, self.head.vocab), du)]))

    def _recompute(self) -> None:
        cuts = self._cuts(self.plan.recomputed)
        for spans in cuts:
            _, _, lse = self._forward(spans)
            _put(self.lse, spans, lse)
        coef = self._row_factors(self.loss.coefficients(self.logps) * self.boost)
        recompute(
            self.head, self.plan.tile, cuts, self.hidden, self.targets, coef, self.lse, self.grads
        )
