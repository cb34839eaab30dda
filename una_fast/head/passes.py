"""The chunk loop of the fused head, below every public function of ops.py and above every engine.

Legend: N rows, D hidden, V vocab, S responses, C rows of a chunk. Everything works without
autograd, on detached tensors; ops.py puts the autograd functions on top.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.group import Group
from una_fast.head.constants import constant
from una_fast.head.engines import choose_engine
from una_fast.head.plan import (
    FEW_ROWS,
    ForwardPlan,
    Plan,
    Span,
    Tile,
    cast_bytes,
    fit_tile,
    forward_plan,
    holds_both,
    kept_plan,
    make_plan,
    pieces_of,
    span_rows,
    tile_budget,
    workspace_bytes,
)
from una_fast.head.row_stats import EntropyTerm, RowSums
from una_fast.head.segment_loss import Lengths, SegmentLoss
from una_fast.head.torch_engine import (
    LogitTransform,
    TorchEngine,
    Vocab,
    leaf_bytes,
    log_probs,
    where_known,
)
from una_fast.logs import say_once
from una_fast.losses import IGNORED, UnaOutput

logger = logging.getLogger(__name__)

# Buffers of logits that wait for a backward pass, of all calls.
_waiting: list[weakref.ref[Tensor]] = []


class Head:
    """A head, its engine, and the buffers of logits and of their gradients for all chunks."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        workspace_mb: float | None,
        engine: str,
    ) -> None:
        """Choose the engine and divide the workspace.

        weight: [V, D]
        bias: [V], or None
        transform: from raw logits to logits
        workspace_mb: budget in MiB; None: the default of the device
        engine: "auto", "torch" or "triton"
        """
        chosen = choose_engine(engine, weight.device, weight.dtype)
        if engine == "auto":
            message = f"fused head on {weight.device.type}: engine {chosen.name}"
            say_once(logging.INFO, message, logger)
        if weight.is_cuda and weight.dtype == torch.float16:
            say_once(
                logging.WARNING,
                "fused head: float16 operands are cast to float32, which is slow; use bfloat16",
                logger,
            )
        self.workspace = workspace_bytes(weight.device.type, workspace_mb)
        self.engine: TorchEngine = chosen(weight, bias, transform, cast_bytes(self.workspace))
        self.vocab, self.dim = weight.shape
        self.size = self.engine.size()
        self.budget = tile_budget(self.workspace, cast=self.engine.cast)
        self._buffer: Tensor | None = None
        self._gradients: Tensor | None = None

    # --- plans ---

    def forward_plan(self, rows: int) -> ForwardPlan:
        """Plan a pass without a block plan, over contiguous rows."""
        return forward_plan(self.size, rows, self.budget)

    def plan(
        self,
        feedback: Feedback,
        lengths: Lengths,
        train_weight: torch.dtype | None,
        train_bias: bool,
        length_normalize: bool,
    ) -> Plan:
        """Make the block plan of a call with gradients; say once where the workspace costs time.

        feedback: units over the responses
        lengths: bounds of the responses
        train_weight: dtype of the wanted gradient of the weight, if any
        train_bias: the gradient of the bias is wanted
        length_normalize: log-ratios are means over tokens
        """
        plan = make_plan(
            feedback,
            lengths.ints,
            replace(self.size, leaf_bytes=leaf_bytes(train_weight)),
            whole_lengths=lengths.whole if lengths.group.size > 1 else None,
            budget=self.budget,
            accumulator_width=self.dim if train_weight else int(train_bias),
            length_normalize=length_normalize,
        )
        megabytes = f"{self.workspace / 2**20:g} MiB"
        if plan.tile.vocab < self.vocab:
            say_once(
                logging.WARNING,
                f"the workspace of {megabytes} holds too few rows of {self.vocab} logits: slices "
                "of the vocabulary, for one more pass; raise workspace_mb for speed",
                logger,
            )
        elif plan.tile.rows < min(FEW_ROWS, sum(lengths.ints)):
            rest = " and reads and writes its gradient" if train_weight else ""
            say_once(
                logging.WARNING,
                f"the workspace of {megabytes} holds {plan.tile.rows} rows of {plan.tile.vocab} "
                f"logits: every such chunk reads the head{rest} once; raise workspace_mb for speed",
                logger,
            )
        return plan

    def direct_dtype(self, leaf: torch.dtype, tile: Tile, chunks: int) -> torch.dtype | None:
        """Return the dtype of a weight gradient that is written once; None: the accumulator's.

        leaf: dtype of the leaf of the weight
        tile: logits in memory at once
        chunks: of all rows of the call
        """
        is_single = chunks == 1 and tile.vocab == self.vocab
        return leaf if is_single and leaf_bytes(leaf) else None

    # --- logits ---

    def drop_buffer(self) -> Head:
        """Free the logits, and return the head."""
        self._buffer = self._gradients = None
        return self

    def keep_buffer(self) -> bool:
        """Keep the logits in the buffer for backward, or free them; return whether they are kept.

        All calls that wait for their backward together keep no more on a device than the workspace:
        a call that finds no room computes its logits again.
        """
        buffer = self._buffer
        assert buffer is not None
        _waiting[:] = [ref for ref in _waiting if ref() is not None]
        others = [x for ref in _waiting if (x := ref()) is not None and x.device == buffer.device]
        room = self.workspace - sum(x.nbytes for x in others)
        if buffer.nbytes > room:
            self.drop_buffer()
            return False
        _waiting.append(weakref.ref(buffer))
        return True

    def take_buffer(self, done: Head, tile: Tile) -> None:
        """Take the logits buffer of another head, for tiles of the same size.

        The system hands out new memory page by page, which a CPU waits for.

        done: head that needs its buffer no more
        tile: of the plan
        """
        buffer = done._buffer
        done.drop_buffer()
        size, dtype = tile.logit_bytes(self.size), self.engine.acc
        if buffer is not None and (buffer.nbytes, buffer.dtype) == (size, dtype):
            self._buffer = buffer

    def buffer(self, tile: Tile, rows: int, width: int) -> Tensor:
        """Return a [rows, width] view of the logits buffer, with the row stride of the engine."""
        if self._buffer is None:
            self._buffer = self._empty(tile.logit_bytes(self.size), self.engine.acc)
        return self._view(self._buffer, rows, width)

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return memory of `size` bytes on the device of the head."""
        return torch.empty(size // dtype.itemsize, dtype=dtype, device=self.engine.weight.device)

    def _view(self, memory: Tensor, rows: int, width: int) -> Tensor:
        """Return the start of memory as [rows, width], with the row stride of the engine."""
        stride = self.size.stride(width)
        return memory[: rows * stride].view(rows, stride)[:, :width]

    def gradients(
        self,
        hidden: Tensor,
        vocab: Vocab,
        tile: Tile,
        replace_: Callable[[slice, Tensor, Tensor | None], Tensor],
        *,
        kept: bool = False,
    ) -> Tensor:
        """Return [C, T] gradients of logits, in a buffer: valid until the next call.

        hidden: [C, D]
        vocab: range of T entries
        tile: of the plan
        replace_: is given rows, their logits, and where their gradients go (None: over the logits);
            returns the gradients
        kept: the buffer holds the logits of these rows, over all of the vocabulary
        """
        rows, width = len(hidden), vocab[1] - vocab[0]
        if kept:
            return replace_(slice(0, rows), self.buffer(tile, rows, width), None)
        if tile.logit_rows is None:
            return replace_(slice(0, rows), self.logits(hidden, vocab, tile), None)
        if self._gradients is None:
            self._gradients = self._empty(tile.gradient_bytes(self.size), self.engine.operand)
        gradients = self._view(self._gradients, rows, width)
        for piece in _pieces(rows, tile):
            replace_(piece, self.logits(hidden[piece], vocab, tile), gradients[piece])
        return gradients

    def slices(self, tile: Tile) -> list[Vocab]:
        """Return the vocabulary ranges of the tiles of a row."""
        starts = range(0, self.vocab, tile.vocab)
        return [(start, min(start + tile.vocab, self.vocab)) for start in starts]

    def logits(self, hidden: Tensor, vocab: Vocab, tile: Tile) -> Tensor:
        """Return the raw logits of a chunk, in the buffer: valid until the next call."""
        u = self.buffer(tile, hidden.shape[0], vocab[1] - vocab[0])
        self.engine.logits(hidden, vocab, u)
        return u

    # --- log-probs ---

    def chunk_stats(self, hidden: Tensor, targets: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return ([C] logsumexp, [C] target logit) of a chunk."""
        if tile.logit_rows is not None and len(hidden) > tile.logit_rows:
            pieces = _pieces(len(hidden), tile)
            parts = [self._stats_of_tiles(hidden[p], targets[p], tile) for p in pieces]
            lse, target_logit = zip(*parts, strict=True)
            return torch.cat(lse), torch.cat(target_logit)
        stats = None
        # Where whole rows fit, the plan chose slices for the modelled time of plain products: the
        # kernel without logits, which no GPU has timed, serves only where whole rows do not fit.
        if tile.vocab < self.vocab and not self._whole_rows_fit:
            self.drop_buffer()  # makes room for partial sums
            stats = self.engine.linear_logps(hidden, targets, self.budget)
        return stats or self._stats_of_tiles(hidden, targets, tile)

    @property
    def _whole_rows_fit(self) -> bool:
        """Return whether the budget holds a row of logits."""
        return fit_tile(self.size, 1, self.budget, gathered=False).vocab == self.vocab

    def _stats_of_tiles(self, hidden: Tensor, targets: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return ([C] logsumexp, [C] target logit) of rows in the buffer, slice after slice."""
        lse = target_logit = None
        for vocab in self.slices(tile):
            u = self.logits(hidden, vocab, tile)
            slice_lse, slice_target = self.engine.row_logps(u, targets, vocab)
            if lse is None:
                lse, target_logit = slice_lse, slice_target
            else:
                lse = torch.logaddexp(lse, slice_lse)
                target_logit = target_logit + slice_target
        return lse, target_logit

    def chunk_sums(
        self, hidden: Tensor, targets: Tensor, tile: Tile, stats: Sequence[str]
    ) -> RowSums:
        """Return the sums that statistics of a chunk need, over the whole vocabulary."""
        sums: RowSums | None = None
        for vocab in self.slices(tile):
            u = self.logits(hidden, vocab, tile)
            part = self.engine.row_sums(u, targets, vocab, stats)
            sums = part if sums is None else sums.joined(part)
        return sums

    def logps(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([N] log-probs, [N] logsumexp): forward only, 1 pass."""
        rows = self.rows(hidden, targets, self.forward_plan(len(hidden)))
        return rows.logps, rows.lse

    def rows(
        self, hidden: Tensor, targets: Tensor, plan: ForwardPlan, stats: Sequence[str] = ()
    ) -> Rows:
        """Return log-probs and statistics of all rows: 1 pass.

        hidden: [N, D]
        targets: [N]; -100 gives 0
        plan: of the N rows; afterwards the buffer holds the logits of the last chunk
        stats: names of the wanted statistics
        """
        numbers = {"lse": self.engine.acc, "target_logit": self.engine.acc}
        numbers |= dict.fromkeys(stats, self.engine.acc)
        if "entropy" in stats:
            numbers["tail"] = self.engine.acc
        if "is_top1" in stats:
            numbers["is_top1"] = torch.bool
        found = {}
        for name, dtype in numbers.items():
            found[name] = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for start, stop in plan.cuts:
            rows = slice(start, stop)
            chunk = (hidden[rows], targets[rows], plan.tile)
            if stats:
                numbers_of = self.chunk_sums(*chunk, stats).finished(targets[rows], self.vocab)
            else:
                numbers_of = dict(zip(numbers, self.chunk_stats(*chunk), strict=True))
            for name, values in numbers_of.items():
                found[name][rows] = values
        ignored = targets == IGNORED
        logps = log_probs(found["target_logit"], found["lse"], targets, self.vocab)
        wanted = {name: found[name].masked_fill_(ignored, 0) for name in stats}
        return Rows(logps, found["lse"], wanted, found.get("tail"))

    def logps_of_both(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the [N] log-probs of policy and reference with a common head.

        Rows are stacked if a single chunk holds both.
        """
        rows = len(hidden)
        if not holds_both(self.size, rows, self.budget):
            return self.logps(hidden, targets)[0], self.logps(ref_hidden, targets)[0]
        logps, _ = self.logps(torch.cat([hidden, ref_hidden]), targets.repeat(2))
        return logps[:rows], logps[rows:]

    def sums(self, lengths: Lengths, tokens: Tensor) -> Tensor:
        """Return the [S] float64 sums of [N] token log-probs over each response, of all ranks."""
        return lengths.group.sum(self.engine.segment_loss.sums(lengths, tokens))


@dataclass
class Rows:
    """Log-probs and statistics of N rows, accumulator dtype; 0 where the target is -100.

    logps: [N]
    lse: [N] logsumexp, of all rows
    stats: name of a wanted statistic -> [N]
    tail: [N] what rounding took from lse; None without the entropy
    """

    logps: Tensor
    lse: Tensor
    stats: dict[str, Tensor]
    tail: Tensor | None = None


# --- gradients ------------------------------------------------------------------------------------


@dataclass
class Missing:
    """Factors missing in finished gradients, to be multiplied in by the backward pass.

    rows: [N] factors of the rows of the hidden gradient; None: 1
    head: one factor of the gradients of weight and bias; None: 1
    shared_by: ranks whose losses add to the gradients of weight and bias; None: this one alone
    """

    rows: Tensor | None = None
    head: Tensor | None = None
    shared_by: Group | None = None


class Grads:
    """Gradients under construction.

    hidden: [N, D]
    weight, bias: [V, D] and [V] in the accumulator dtype, or the weight's in a narrower one
    missing: factors not multiplied in yet
    """

    def __init__(
        self,
        head: Head,
        tile: Tile,
        weight: bool,
        bias: bool,
        hidden: Tensor | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the gradients of the head.

        head: the head
        tile: logits in memory at once
        weight, bias: wanted gradients
        hidden: [N, D] to be written row by row; None: not wanted
        weight_dtype: of a weight gradient that a single chunk writes; None: the accumulator's
        """
        device, acc = head.engine.weight.device, head.engine.acc
        self.engine = head.engine
        self.sliced = tile.vocab < head.vocab
        self.hidden = hidden
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if weight:
            dtype = weight_dtype or acc
            self.weight = torch.empty(head.vocab, head.dim, dtype=dtype, device=device)
        if bias:
            self.bias = torch.empty(head.vocab, dtype=acc, device=device)
        self.of_head = [x for x in (self.weight, self.bias) if x is not None]
        self.started = False  # whether the gradients of the head hold anything yet
        self.missing = Missing()

    def add(
        self,
        spans: Sequence[Span],
        hidden: Tensor,
        tiles: Iterable[tuple[Vocab, Tensor]],
        factors: Tensor | None = None,
        *,
        scale_rows: bool = True,
    ) -> None:
        """Add the gradients of a chunk.

        spans: rows of the chunk
        hidden: [C, D], the rows of the spans
        tiles: (vocabulary range, du [C, T]) of every tile of the chunk
        factors: [C] factors that the rows of du lack; None: 1
        scale_rows: multiply the rows of the hidden gradient by the factors now; else they are
            missing, and the caller's to count
        """
        self._settle()
        in_place = self._in_place(spans, is_scaled=factors is not None and scale_rows)
        if factors is not None:
            factors = factors.unsqueeze(1)
            if self.of_head:
                hidden = self.engine.scaled_operand(hidden, factors)
        rows = None
        for vocab, du in tiles:
            if self.hidden is not None:
                if rows is None:
                    rows = self._rows_to_write(spans, in_place)
                self.engine.hidden_grad(du, vocab, rows, vocab[0] > 0)
            if self.weight is not None:
                weight = self.weight[slice(*vocab)]
                self.engine.weight_grad(du, hidden, weight, self.started)
            if self.bias is not None:
                self._add_bias(vocab, du, factors)
        self.started = True
        if rows is None:
            return
        if factors is not None and scale_rows:
            rows.mul_(factors)
        if not in_place:
            put(self.hidden, spans, rows)

    def _add_bias(self, vocab: Vocab, du: Tensor, factors: Tensor | None) -> None:
        bias = self.bias[slice(*vocab)]
        if factors is None:
            total = du.sum(0, dtype=bias.dtype)
        else:
            total = self.engine.weighted_sum(du, factors)
        bias.copy_(bias + total if self.started else total)

    def _in_place(self, spans: Sequence[Span], is_scaled: bool) -> bool:
        """Return whether GEMMs can write the rows of the hidden gradient themselves.

        is_scaled: the rows are scaled afterwards, and rounded once: in the accumulator dtype
        """
        if self.hidden is None or len(spans) > 1 or not self.engine.writes(self.hidden.dtype):
            return False
        if is_scaled and self.hidden.dtype != self.engine.acc:
            return False
        # Over slices the rows are a running sum, kept in the accumulator dtype.
        return self.hidden.dtype == self.engine.acc or not self.sliced

    def _rows_to_write(self, spans: Sequence[Span], in_place: bool) -> Tensor:
        """Return [C, D] for GEMMs to write, and to add to over slices.

        The rows of the gradient itself, or an accumulator beside the gradient.
        """
        if in_place:
            return self.hidden[slice(*spans[0])]
        shape = (span_rows(spans), self.hidden.shape[1])
        return torch.empty(shape, dtype=self.engine.acc, device=self.hidden.device)

    def fold(self, other: Grads, factor: Tensor) -> None:
        """Add factor * (gradients of the head in `other`)."""
        self._settle()
        for mine, theirs in zip(self.of_head, other.of_head, strict=True):
            if self.started:
                mine.addcmul_(theirs, factor.to(mine.dtype))
            else:
                torch.mul(theirs, factor, out=mine)
        self.started = True

    def _settle(self) -> None:
        """Multiply the missing factor of the head in, before anything is added."""
        if self.missing.head is not None:
            for gradient in self.of_head:
                gradient.mul_(self.missing.head)
            self.missing.head = None

    def finish(self) -> None:
        """Fill gradients of the head with zeros if no chunk has been added."""
        if not self.started:
            for gradient in self.of_head:
                gradient.zero_()


def empty_hidden_grad(hidden: Tensor, head: Head, all_rows: bool) -> Tensor:
    """Return [N, D] to be written row by row; zeros if some rows are never written.

    The dtype is the dtype of hidden; float32 for float16: unscaled gradients underflow before a
    loss scale is multiplied in.
    """
    dtype = head.engine.acc if hidden.dtype == torch.float16 else hidden.dtype
    make = torch.empty if all_rows else torch.zeros
    return make(hidden.shape, dtype=dtype, device=hidden.device)


def recompute(
    head: Head,
    tile: Tile,
    cuts: Iterable[Sequence[Span]],
    hidden: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    grads: Grads,
    *,
    entropy: EntropyTerm | None = None,
    kept: Sequence[Span] | None = None,
) -> None:
    """Add the gradients of rows with known coefficient: the logits once more, tile by tile.

    head: the head
    tile: logits in memory at once
    cuts: spans of every chunk
    hidden: [N, D]
    targets: [N]
    coef: [N] gradients of the loss by the log-probs
    lse: [N] logsumexp
    grads: gradients to add to
    entropy: term of the entropy's gradient, [N]; None: the log-probs' alone
    kept: spans of the first chunk, where the buffer of the head still holds its logits
    """

    def tiles(rows: Tensor, spans: Sequence[Span]) -> Iterator[tuple[Vocab, Tensor]]:
        labels, factors, sums = (take(x, spans) for x in (targets, coef, lse))
        term = None if entropy is None else entropy.take(lambda x: take(x, spans))
        for vocab in head.slices(tile):

            def replace_(p: slice, u: Tensor, out: Tensor | None, vocab: Vocab = vocab) -> Tensor:
                part = None if term is None else term.take(lambda x: x[p])
                return head.engine.row_grad_(u, labels[p], vocab, factors[p], sums[p], out, part)

            yield vocab, head.gradients(rows, vocab, tile, replace_, kept=spans == kept)

    for spans in cuts:
        rows = take(hidden, spans)
        grads.add(spans, rows, tiles(rows, spans))


def _pieces(rows: int, tile: Tile) -> Iterator[slice]:
    """Yield the rows of a chunk whose logits are in memory at once."""
    start = 0
    for count in pieces_of(rows, tile):
        yield slice(start, start + count)
        start += count


def take(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return the rows of x in the spans: a view for one span, a copy for several."""
    pieces = [x[start:stop] for start, stop in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def put(x: Tensor, spans: Sequence[Span], values: Tensor) -> None:
    """Write rows into the spans of x."""
    offset = 0
    for start, stop in spans:
        count = stop - start
        x[start:stop] = values[offset : offset + count]
        offset += count


# --- any upstream gradient ------------------------------------------------------------------------


class LaterPass:
    """A call whose upstream gradient comes later: log-probs of tokens, or their sums.

    The logits of the last chunk stay in the buffer of the head, and backward begins with them.
    """

    def __init__(
        self,
        head: Head,
        rows: int,
        train_weight: bool,
        stats: Sequence[str],
        lengths: Lengths | None,
    ) -> None:
        """Plan a call.

        head: the head
        rows: N
        train_weight: the gradient of the weight is wanted
        stats: names of the wanted statistics
        lengths: bounds of the responses to sum over; None: log-probs of tokens
        """
        self.head, self.stats, self.lengths = head, stats, lengths
        self.plan = kept_plan(head.size, rows, head.budget, head.dim if train_weight else 0)
        self.is_kept = False

    def run(self, hidden: Tensor, targets: Tensor) -> Rows:
        """Return log-probs and statistics of the rows; keep logits if there is room.

        hidden: [N, D] in the dtype of the head
        targets: [N]
        """
        rows = self.head.rows(hidden, targets, self.plan, self.stats)
        if self.plan.kept is None:
            self.head.drop_buffer()
        else:
            self.is_kept = self.head.keep_buffer()
        return rows

    def gradients(
        self,
        hidden: Tensor,
        targets: Tensor,
        lse: Tensor,
        upstream: Tensor | None,
        entropy: EntropyTerm | None,
        needs: Sequence[bool],
        weight_dtype: torch.dtype,
    ) -> Grads:
        """Return the gradients; the logits that were kept are used up, and freed.

        hidden: [N, D] in the dtype of the head
        targets: [N]
        lse: [N]
        upstream: [N] gradients of the loss by the log-probs, or [S] by the sums; None: 0
        entropy: term of the entropy's gradient; None: the entropy got none
        needs: whether hidden, weight and bias want a gradient
        weight_dtype: of the leaf of the weight
        """
        head, plan = self.head, self.plan
        if upstream is None:
            coef = torch.zeros_like(lse)
        else:
            coef = upstream.to(lse.dtype)
        if upstream is not None and self.lengths is not None:
            coef = self.lengths.per_row(coef)
        # An ignored row may have an upstream gradient of NaN.
        ignored = targets == IGNORED
        coef = coef.masked_fill(ignored, 0.0)
        if entropy is not None:
            entropy = entropy.take(lambda x: x.masked_fill(ignored, 0.0))
        need_hidden, need_weight, need_bias = needs
        rows = empty_hidden_grad(hidden, head, all_rows=True) if need_hidden else None
        direct = head.direct_dtype(weight_dtype, plan.tile, len(plan.cuts))
        grads = Grads(head, plan.tile, need_weight, need_bias, rows, direct)
        cuts = [[span] for span in plan.backward_cuts]
        kept = [plan.kept] if self.is_kept else None
        self.is_kept = False
        chunks = (head, plan.tile, cuts, hidden, targets)
        recompute(*chunks, coef, lse, grads, entropy=entropy, kept=kept)
        grads.finish()
        head.drop_buffer()
        return grads


# --- one pass -------------------------------------------------------------------------------------


class OnePass:
    """One linear_una_loss call with gradients, following its plan."""

    def __init__(
        self,
        head: Head,
        plan: Plan,
        hidden: Tensor,
        targets: Tensor,
        loss: SegmentLoss,
        needs: Sequence[bool],
        weight_dtype: torch.dtype,
    ) -> None:
        """Prepare a call.

        head: the head of the policy
        plan: block plan of the call
        hidden: [N, D] in the dtype of the head
        targets: [N]
        loss: from token log-probs to the loss
        needs: whether hidden, weight and bias want a gradient
        weight_dtype: of the leaf of the weight
        """
        self.head, self.plan, self.targets, self.loss = head, plan, targets, loss
        self.hidden = hidden.detach()
        self.lengths = loss.lengths
        self.need_hidden, self.need_weight, self.need_bias = needs
        self.weight_dtype = weight_dtype if plan.direct else None
        self.whole = (0, head.vocab)

    def run(self) -> tuple[UnaOutput, Grads]:
        """Return the result, and the gradients with their missing factors."""
        plan, hidden = self.plan, self.hidden
        self.logps = torch.zeros(hidden.shape[0], dtype=self.head.engine.acc, device=hidden.device)
        self.lse = torch.zeros_like(self.logps) if plan.recomputed else None
        rows = None
        if self.need_hidden:
            rows = empty_hidden_grad(hidden, self.head, all_rows=not plan.unscored)
        self.grads = self._make_grads(rows)
        # First: in a group all log-probs must be there before the first coefficient.
        for spans in self._cuts(plan.unscored):
            self._forward(spans)
        if plan.streamed:
            self._stream()
        for block in plan.resident:
            self._resident(block)
        if plan.recomputed:
            self._recompute()
        self.grads.finish()
        self.head.drop_buffer()
        return self.loss.output(self.logps), self.grads

    def _cuts(self, responses: Sequence[int]) -> list[list[Span]]:
        return self.plan.cuts(responses, self.lengths.cu)

    def _make_grads(self, hidden: Tensor | None) -> Grads:
        wanted = (self.need_weight, self.need_bias)
        return Grads(self.head, self.plan.tile, *wanted, hidden, self.weight_dtype)

    def _per_row(self, per_response: Tensor) -> Tensor:
        return self.lengths.per_row(per_response.to(self.logps.dtype))

    def _forward(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Write the log-probs of a chunk; return hidden rows, targets and logsumexp."""
        hidden, targets = take(self.hidden, spans), take(self.targets, spans)
        lse, target_logit = self.head.chunk_stats(hidden, targets, self.plan.tile)
        put(self.logps, spans, log_probs(target_logit, lse, targets, self.head.vocab))
        return hidden, targets, lse

    def _resident(self, block: Sequence[int]) -> None:
        """Compute whole components in a chunk: coefficients are known before the products of du."""
        (spans,) = self._cuts(block)
        hidden, scores, factors = self._one_read(spans)
        coef = take(self._per_row(self.loss.coefficients(self.logps)), spans)
        self.grads.add(spans, hidden, [(self.whole, scores)], coef * factors)

    def _one_read(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
        """Write the log-probs of a chunk; return hidden rows, unscaled du and the factors of it."""
        hidden, targets = take(self.hidden, spans), take(self.targets, spans)
        logps = torch.empty(len(hidden), dtype=self.logps.dtype, device=hidden.device)
        factors = torch.empty_like(logps)

        def replace_(piece: slice, u: Tensor, out: Tensor | None) -> Tensor:
            found = self.head.engine.one_read_(u, targets[piece], out)
            logps[piece], scores, factors[piece] = found
            return scores

        scores = self.head.gradients(hidden, self.whole, self.plan.tile, replace_)
        factors.masked_fill_(targets == IGNORED, 0.0)
        put(self.logps, spans, where_known(logps, targets, self.head.vocab))
        return hidden, scores, factors

    def _stream(self) -> None:
        """Build the gradients of streamed responses before the coefficients are known.

        c_i = scalar * factor_i: rows are multiplied by factor_i, and lack the scalar of the group.
        """
        count = len(self.lengths.ints)
        factors, streamed = [1.0] * count, [0.0] * count
        for component in self.plan.streamed:
            for group in component.groups:
                for i, factor in zip(group.responses, group.factors, strict=True):
                    factors[i], streamed[i] = factor, 1.0
        device = self.hidden.device
        self.row_factors = torch.ones_like(self.logps)
        factors_S = constant(tuple(factors), torch.float64, device)
        streamed_S = constant(tuple(streamed), torch.float64, device) > 0
        if self.grads.of_head:
            self._stream_trained_head(factors_S)
        else:
            self._stream_frozen_head(factors_S)
        scalars_S = self.loss.coefficients(self.logps) / factors_S
        scalars_N = self._per_row(torch.where(streamed_S, scalars_S, 1.0))
        self.grads.missing.rows = scalars_N * self.row_factors

    def _stream_frozen_head(self, factors_S: Tensor) -> None:
        """Stream all rows: no sum crosses rows, so every row is scaled last."""
        factors_N = self._per_row(factors_S)
        for component in self.plan.streamed:
            self._stream_rows(component.responses, factors_N, self.grads)

    def _stream_trained_head(self, factors_S: Tensor) -> None:
        """Stream component after component: sums over the rows of a group wait for the scalar."""
        factors_N = self._per_row(factors_S)
        scratch = [self._make_grads(self.grads.hidden) for _ in range(self.plan.scratch)]
        for k, component in enumerate(self.plan.streamed):
            accumulators = scratch
            # Nothing is in the gradient yet: the first group is built there, and scaled later.
            if k == 0:
                accumulators = [self.grads, *scratch]
            pairs = list(zip(component.groups, accumulators[: len(component.groups)], strict=True))
            for group, sums in pairs:
                sums.started = False
                self._stream_rows(group.responses, factors_N, sums)
            # All responses of the component are summed: its scalars are known.
            scalars_S = (self.loss.coefficients(self.logps) / factors_S).to(self.logps.dtype)
            for group, sums in pairs:
                scalar = scalars_S[group.responses[0]]
                # A last scaling saves a trip through [V, D]; any later addition scales before.
                if sums is self.grads:
                    self.grads.missing.head = scalar
                else:
                    self.grads.fold(sums, scalar)

    def _stream_rows(self, responses: Sequence[int], factors_N: Tensor, grads: Grads) -> None:
        """Write log-probs, and add gradients without the scalar of the group.

        Rows of the hidden gradient wait for the scalar, and lack the other factors as well.
        """
        for spans in self._cuts(responses):
            hidden, scores, factors = self._one_read(spans)
            factors = factors * take(factors_N, spans)
            put(self.row_factors, spans, factors)
            grads.add(spans, hidden, [(self.whole, scores)], factors, scale_rows=False)

    def _recompute(self) -> None:
        """Compute log-probs first, then the logits again with known coefficients."""
        cuts = self._cuts(self.plan.recomputed)
        for spans in cuts:
            _, _, lse = self._forward(spans)
            put(self.lse, spans, lse)
        coef = self._per_row(self.loss.coefficients(self.logps))
        coef.masked_fill_(self.targets == IGNORED, 0.0)
        recompute(
            self.head,
            self.plan.tile,
            cuts,
            self.hidden,
            self.targets,
            coef,
            self.lse,
            self.grads,
        )
