"""The chunk loop of the fused head: what every engine and every public function of head.py runs.

Legend: N rows, D hidden, V vocab, S responses, C rows of a chunk. All of it works without autograd, on detached
tensors; head.py puts the autograd functions on top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.engine import LogitTransform, TorchEngine, choose_engine
from una_fast.feedback import Feedback
from una_fast.losses import UnaOutput
from una_fast.plan import DEFAULT_WORKSPACE_MB, FEW_ROWS, Plan, Span, Tile, chunks, fit_tile, make_plan, say_once

IGNORE = -100


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

    def tile_bytes(self, narrow: bool) -> int:
        return self.budget - (self.cast_bytes if narrow else 0)


class Lengths:
    """cu_seqlens as Python integers, and what the device needs of it."""

    def __init__(self, cu: list[int], device: torch.device) -> None:
        self.cu = cu
        self.ints = [b - a for a, b in zip(cu[:-1], cu[1:], strict=True)]
        self.tensor = torch.tensor(self.ints, dtype=torch.int64).to(device, non_blocking=True)

    def sums(self, per_token: Tensor) -> Tensor:
        """[N] -> [S] float64 sums over each response."""
        if not self.ints:
            return per_token.double()
        return torch.segment_reduce(per_token.double(), "sum", lengths=self.tensor, unsafe=True)

    def per_row(self, per_response: Tensor) -> Tensor:
        """[S] -> [N]."""
        return per_response.repeat_interleave(self.tensor, output_size=self.cu[-1])


class Head:
    """One head (weight, bias, transform) with the engine that runs it and the one buffer of logits it reuses."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, workspace: Workspace, engine: str
    ) -> None:
        chosen = choose_engine(engine, weight.device)
        if engine == "auto":
            say_once(logging.INFO, f"fused head on {weight.device.type}: engine {chosen.name}")
        self.engine: TorchEngine = chosen(weight, bias, transform, workspace.cast_bytes)
        self.workspace = workspace
        self.vocab, self.dim = weight.shape
        self.acc_bytes = torch.finfo(self.engine.acc).bits // 8
        self._buffer: Tensor | None = None

    def tile(self, rows: int) -> Tile:
        budget = self.workspace.tile_bytes(self.engine.narrow)
        return fit_tile(rows, self.vocab, self.dim, self.acc_bytes, self.engine.narrow, budget)

    def plan(
        self, feedback: Feedback, lengths: Lengths, train_weight: bool, train_bias: bool, length_normalize: bool
    ) -> Plan:
        """The block plan of a call with gradients."""
        plan = make_plan(
            feedback,
            lengths.ints,
            vocab=self.vocab,
            hidden=self.dim,
            acc_bytes=self.acc_bytes,
            cast=self.engine.narrow,
            budget=self.workspace.tile_bytes(self.engine.narrow),
            accumulator_width=self.dim if train_weight else int(train_bias),
            length_normalize=length_normalize,
        )
        if plan.tile.rows < min(FEW_ROWS, sum(lengths.ints)):
            say_once(
                logging.WARNING,
                f"the workspace of {self.workspace.budget / 2**20:g} MiB holds {plan.tile.rows} rows of "
                f"{plan.tile.vocab} logits: every such chunk reads the head"
                f"{' and reads and writes its gradient' if train_weight else ''} once; raise workspace_mb for speed",
            )
        return plan

    def drop_buffer(self) -> Head:
        """Free the logits between forward and backward."""
        self._buffer = None
        return self

    def buffer(self, tile: Tile, rows: int, width: int) -> Tensor:
        """A [rows, width] view of the logits buffer."""
        if self._buffer is None:
            self._buffer = torch.empty(tile.rows * tile.vocab, dtype=self.engine.acc, device=self.engine.weight.device)
        return self._buffer[: rows * width].view(rows, width)

    def slices(self, tile: Tile) -> list[Span]:
        return [(v, min(v + tile.vocab, self.vocab)) for v in range(0, self.vocab, tile.vocab)]

    def logits(self, hidden: Tensor, vocab: Span, tile: Tile) -> Tensor:
        """Raw logits of a chunk, in the buffer: valid until the next call."""
        u = self.buffer(tile, hidden.shape[0], vocab[1] - vocab[0])
        self.engine.logits(hidden, vocab, u)
        return u

    def chunk_logps(self, hidden: Tensor, targets: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """([C] log-probs, [C] logsumexp) of one chunk. With a full-width tile its logits stay in the buffer."""
        lse = target_logit = None
        for vocab in self.slices(tile):
            u = self.logits(hidden, vocab, tile)
            part_lse, part_target = self.engine.row_logps(u, targets, vocab)
            lse = part_lse if lse is None else torch.logaddexp(lse, part_lse)
            target_logit = part_target if target_logit is None else target_logit + part_target
        return torch.where(targets == IGNORE, 0.0, target_logit - lse), lse

    def logps(self, hidden: Tensor, targets: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """([N] log-probs, [N] logsumexp): forward only, 1 pass."""
        logps = torch.empty(hidden.shape[0], dtype=self.engine.acc, device=hidden.device)
        lse = torch.empty_like(logps)
        for start in range(0, len(logps), tile.rows):
            rows = slice(start, start + tile.rows)
            logps[rows], lse[rows] = self.chunk_logps(hidden[rows], targets[rows], tile)
        return logps, lse


class Grads:
    """Gradients under construction: hidden [N, D]; weight [V, D] and bias [V] in the accumulator dtype."""

    def __init__(self, head: Head, weight: bool, bias: bool, hidden: Tensor | None = None) -> None:
        device, acc = head.engine.weight.device, head.engine.acc
        self.engine = head.engine
        self.hidden = hidden
        self.weight = torch.empty(head.vocab, head.dim, dtype=acc, device=device) if weight else None
        self.bias = torch.empty(head.vocab, dtype=acc, device=device) if bias else None
        self.head_parts = [x for x in (self.weight, self.bias) if x is not None]
        self.started = False  # whether weight and bias hold anything yet

    def add(self, spans: Sequence[Span], hidden: Tensor, du: Tensor, vocab: Span, started: bool) -> None:
        """The gradients of one tile. du: [C, T]; hidden: [C, D], the rows of the spans.

        started: whether this vocabulary range of weight and bias holds anything yet."""
        if self.hidden is not None:
            self._add_hidden(spans, du, vocab)
        if self.weight is not None:
            self.engine.weight_grad(du, hidden, self.weight[slice(*vocab)], started)
        if self.bias is not None:
            bias = self.bias[slice(*vocab)]
            bias.copy_(bias + du.sum(0) if started else du.sum(0))

    def _add_hidden(self, spans: Sequence[Span], du: Tensor, vocab: Span) -> None:
        later_slice = vocab[0] > 0
        if len(spans) == 1 and self.hidden.dtype == self.engine.acc:
            self.engine.hidden_grad(du, vocab, self.hidden[slice(*spans[0])], later_slice)
            return
        part = du.new_empty(du.shape[0], self.hidden.shape[1])
        self.engine.hidden_grad(du, vocab, part)
        _put(self.hidden, spans, _take(self.hidden, spans) + part if later_slice else part)

    def fold(self, other: Grads, scale: Tensor) -> None:
        """weight and bias += scale * other's."""
        for mine, theirs in zip(self.head_parts, other.head_parts, strict=True):
            if self.started:
                mine.addcmul_(theirs, scale.to(mine.dtype))
            else:
                torch.mul(theirs, scale, out=mine)
        self.started = True

    def recompute(
        self, head: Head, hidden: Tensor, targets: Tensor, coef: Tensor, lse: Tensor, tile: Tile, cuts: list[list[Span]]
    ) -> None:
        """Gradients of rows whose coefficient and logsumexp [N] are known: the logits once more, tile by tile."""
        for vocab in head.slices(tile):
            for k, spans in enumerate(cuts):
                rows, labels = _take(hidden, spans), _take(targets, spans)
                u = head.logits(rows, vocab, tile)
                head.engine.row_grad_(u, labels, vocab, _take(coef, spans), _take(lse, spans))
                self.add(spans, rows, u, vocab, self.started or k > 0)
        self.started = self.started or bool(cuts)

    def finish(self) -> None:
        if not self.started:
            for part in self.head_parts:
                part.zero_()


def empty_hidden_grad(hidden: Tensor, head: Head, tile: Tile, all_rows: bool) -> Tensor:
    """[N, D] to be written row by row: zeros if some rows never are; in the accumulator dtype if slices are summed, and
    for float16, which cannot hold what a loss scale is yet to multiply."""
    wide = tile.vocab < head.vocab or hidden.dtype == torch.float16
    dtype = head.engine.acc if wide else hidden.dtype
    return (torch.empty if all_rows else torch.zeros)(hidden.shape, dtype=dtype, device=hidden.device)


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
        targets: Tensor,
        lengths: Lengths,
        loss_of: Callable[[Tensor], UnaOutput],
        needs: Sequence[bool],
    ) -> None:
        self.head, self.plan, self.targets, self.lengths, self.loss_of = head, plan, targets, lengths, loss_of
        self.need_hidden, self.need_weight, self.need_bias = needs

    def run(self, hidden: Tensor) -> tuple[UnaOutput, Grads, Tensor | None]:
        """Loss, gradients, and the [N] factors that the rows of the hidden gradient still lack (None: none)."""
        plan = self.plan
        self.hidden = hidden
        self.logps = torch.zeros(hidden.shape[0], dtype=self.head.engine.acc, device=hidden.device)
        self.lse = torch.zeros_like(self.logps)
        into = empty_hidden_grad(hidden, self.head, plan.tile, not plan.unscored) if self.need_hidden else None
        self.grads = Grads(self.head, self.need_weight, self.need_bias, into)
        late = self._stream() if plan.streamed else None
        for block in plan.resident:
            self._resident(block)
        if plan.recomputed:
            self._recompute()
        for spans in self._cuts(plan.unscored):
            self._forward(spans)
        self.grads.finish()
        return self.loss_of(self.lengths.sums(self.logps)), self.grads, late

    def _cuts(self, responses: Sequence[int]) -> list[list[Span]]:
        return list(chunks(responses, self.lengths.cu, self.plan.tile.rows))

    def _coefficients(self) -> Tensor:
        """[S] dL/dlogps, right for the responses whose component is summed; from the one copy of the losses."""
        leaf = self.lengths.sums(self.logps).requires_grad_()
        with torch.enable_grad():
            loss = self.loss_of(leaf).loss
        return torch.autograd.grad(loss, leaf)[0]

    def _row_factors(self, per_response: Tensor) -> Tensor:
        return self.lengths.per_row(per_response).to(self.logps.dtype)

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        """Log-probs of a chunk into place; returns its hidden rows."""
        hidden = _take(self.hidden, spans)
        logps, lse = self.head.chunk_logps(hidden, _take(self.targets, spans), self.plan.tile)
        _put(self.logps, spans, logps)
        _put(self.lse, spans, lse)
        return hidden

    def _backward(self, spans: Sequence[Span], hidden: Tensor, factors: Tensor, grads: Grads) -> None:
        """Gradients of the chunk just forwarded, whose logits are still in the buffer."""
        vocab = (0, self.head.vocab)
        u = self.head.buffer(self.plan.tile, hidden.shape[0], self.head.vocab)
        self.head.engine.row_grad_(u, _take(self.targets, spans), vocab, _take(factors, spans), _take(self.lse, spans))
        grads.add(spans, hidden, u, vocab, grads.started)
        grads.started = True

    def _resident(self, block: Sequence[int]) -> None:
        (spans,) = self._cuts(block)
        hidden = self._forward(spans)
        self._backward(spans, hidden, self._row_factors(self._coefficients()), self.grads)

    def _stream(self) -> Tensor:
        units = torch.ones(len(self.lengths.ints), dtype=torch.float64)
        streamed = torch.zeros(len(self.lengths.ints), dtype=torch.bool)
        for component in self.plan.streamed:
            for group in component.groups:
                units[list(group.responses)] = torch.tensor(group.units, dtype=torch.float64)
                streamed[list(group.responses)] = True
        units, streamed = (x.to(self.hidden.device, non_blocking=True) for x in (units, streamed))
        factors = self._row_factors(units)
        scratch = [self._accumulators() for _ in range(self.plan.scratch)] if self.grads.head_parts else []
        for k, component in enumerate(self.plan.streamed):
            if not self.grads.head_parts:
                self._stream_rows(component.responses, factors, self.grads)
                continue
            # The first component builds its first group in the gradient itself, scaled in place afterwards.
            into = [self.grads, *scratch] if k == 0 else scratch
            for group, accumulators in zip(component.groups, into, strict=False):
                accumulators.started = False
                self._stream_rows(group.responses, factors, accumulators)
            scalars = self._coefficients() / units
            for group, accumulators in zip(component.groups, into, strict=False):
                scalar = scalars[group.responses[0]]
                if accumulators is self.grads:
                    for part in self.grads.head_parts:
                        part.mul_(scalar)
                else:
                    self.grads.fold(accumulators, scalar)
        return self._row_factors(torch.where(streamed, self._coefficients() / units, 1.0))

    def _accumulators(self) -> Grads:
        return Grads(self.head, self.need_weight, self.need_bias, self.grads.hidden)

    def _stream_rows(self, responses: Sequence[int], factors: Tensor, grads: Grads) -> None:
        for spans in self._cuts(responses):
            self._backward(spans, self._forward(spans), factors, grads)

    def _recompute(self) -> None:
        cuts = self._cuts(self.plan.recomputed)
        for spans in cuts:
            self._forward(spans)
        factors = self._row_factors(self._coefficients())
        self.grads.recompute(self.head, self.hidden, self.targets, factors, self.lse, self.plan.tile, cuts)
