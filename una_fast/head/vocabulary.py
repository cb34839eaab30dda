"""A head whose vocabulary is split over ranks: no rank gathers the weight.

Legend: G ranks of the group, N_r rows of rank r and N of all, D hidden, V vocab, V_r entries of
rank r. Rank r holds rows [first_r, first_r + V_r) of the weight, hidden states, targets and
feedback of its own.

    H    [N, D]       all rows, gathered                       lives for a round of the call
    u_r  = H W_r^T    [C, V_r] logits of a chunk of all rows   lives for a chunk
    lse_r, z_r[y]     [N] of the own entries; combined:
                      m = max_r lse_r;  lse = m + log sum_r exp(lse_r - m);  z[y] = sum_r z_r[y]
    c    [N]          coefficients: of every row by its owner (segment_loss.py), gathered
    du_r = c (onehot - softmax(z)) dz/du                       over u_r
    dH   = sum_r du_r W_r   [N, D] partial sums in float32, reduce-scattered to the owners
    dW_r = du_r^T H   [V_r, D] complete: all rows of the group are in it

What never exists: W, or its gradient, on one rank; the logits of a row on one rank.

GEMM passes (2 N D V_r flop on each rank): 3 for the rows whose logits the workspace holds until the
coefficients are known (the last chunk of the call), 4 for the others; with a frozen head 2 and 3; 1
without gradients. Responses in no unit take part, with coefficients of 0.

Bytes over the wire, per rank, less the rank's own 1/G (traffic.py): N D numbers gathered in the
dtype of the products, N D float32 reduced, and some 60 bytes a row. A gathered head moves V D and
V D.

A call gathers all rows at once if they and their partial sums take at most half of the workspace;
else in rounds of equally many rows per rank, and the rows of all rounds but the last are gathered a
second time for the gradients. Per call and rank, whatever N_r is:

    sizes       1 gather of six integers; on a GPU the host waits for them
    targets     1 gather
    a round     1 gather of H, 1 maximum, 1 sum of 2 numbers a row
    gradients   1 gather of coefficients; in a round 1 reduce-scatter of dH
    backward    1 gather of a number, for a trained head: the upstream gradients must be equal
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from una_fast.group import Group
from una_fast.head.passes import Grads, Head, empty_hidden_grad, put, recompute, take
from una_fast.head.plan import (
    ForwardPlan,
    Span,
    Tile,
    forward_plan,
    kept_cuts,
    kept_plan,
    workspace_bytes,
)
from una_fast.head.segment_loss import SegmentLoss
from una_fast.head.torch_engine import LogitTransform, where_known
from una_fast.losses import IGNORED, UnaOutput

ROW_BYTES = 64  # of numbers of a gathered row beside hidden states and their gradient
NOWHERE = -1  # a target among the entries of another rank

# What the ranks of a call must have in common; rows and entries may differ.
COMMON = ("hidden size", "bytes of a number", "wanted gradients", "workspace")


# --- the ranks of a call --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """The rows and the vocabulary entries of every rank of a call.

    group: the ranks
    rows: N_r of every rank
    entries: V_r of every rank
    """

    group: Group
    rows: tuple[int, ...]
    entries: tuple[int, ...]

    @property
    def vocab(self) -> int:
        """Return V."""
        return sum(self.entries)

    @property
    def first(self) -> int:
        """Return the first vocabulary entry of this rank."""
        return sum(self.entries[: self.group.rank])


def find_shares(
    group: Group | dist.ProcessGroup | None,
    hidden: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    workspace_mb: float | None,
) -> Shares | None:
    """Gather the rows and entries of all ranks of a group; None without a group of several.

    group: all of its ranks call; None: the weight is whole
    hidden: [N_r, D]
    weight: [V_r, D]
    needs: whether hidden, weight and bias want a gradient
    workspace_mb: as given

    ValueError, on all ranks, if the ranks differ in more than rows and entries.
    """
    group = Group.of(group)
    if group.size == 1:
        return None
    wanted = sum(need << k for k, need in enumerate(needs))
    workspace = workspace_bytes(hidden.device.type, workspace_mb)
    own = [len(hidden), len(weight), hidden.shape[1], hidden.element_size(), wanted, workspace]
    sizes = group.gather(torch.tensor([own], device=hidden.device)).tolist()
    rows, entries, *common = zip(*sizes, strict=True)
    for name, values in zip(COMMON, common, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks of a split vocabulary differ in {name}: {list(values)} by rank; give "
                "all of them the same"
            )
    return Shares(group, rows, entries)


def agreed(group: Group, upstream: Tensor) -> Tensor:
    """Return the upstream gradient of all ranks; NaN if the ranks differ, on a GPU.

    group: the ranks, with one gradient of the head for the sum of their losses
    upstream: [] of this rank

    ValueError if the ranks differ, on a CPU.
    """
    all_of_them = group.gather(upstream.reshape(1))
    differ = (all_of_them != all_of_them[0]).any()
    if upstream.device.type == "cpu" and differ:
        raise ValueError(
            f"the losses of a split vocabulary were multiplied by {all_of_them.tolist()} by rank: "
            "the ranks share the gradient of the head, and must multiply by the same number"
        )
    return torch.where(differ, math.nan, upstream)


@dataclass(frozen=True)
class Round:
    """Rows [first, first + width) of every rank, side by side in a tensor of G * width rows.

    counts: rows of every rank in the round; the rest of `width` is padding
    """

    first: int
    width: int
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Return the number of rows without padding."""
        return sum(self.counts)

    @property
    def is_padded(self) -> bool:
        """Return whether a rank has fewer than `width` rows."""
        return min(self.counts) < self.width

    def own(self, rank: int) -> slice:
        """Return the place of a rank's rows among all rows of that rank."""
        return slice(self.first, self.first + self.counts[rank])

    def spans(self, cut: Span) -> list[Span]:
        """Return the places of rows [start, stop), counted without padding; neighbours joined."""
        found: list[Span] = []
        ends = list(accumulate(self.counts))
        for rank, (count, end) in enumerate(zip(self.counts, ends, strict=True)):
            begin = end - count
            padding = rank * self.width - begin
            start = max(cut[0], begin) + padding
            stop = min(cut[1], end) + padding
            if start >= stop:
                continue
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
        return found


def make_rounds(rows: Sequence[int], row_bytes: int, room: int) -> list[Round]:
    """Cut the rows of all ranks into rounds of equal width; none without rows.

    rows: N_r of every rank
    row_bytes: of a gathered row
    room: bytes for the gathered rows of a round
    """
    most = max(rows)
    if not most:
        return []
    widest = max(room // (row_bytes * len(rows)), 1)
    width = -(-most // -(-most // widest))
    rounds = []
    for first in range(0, most, width):
        counts = tuple(min(max(count - first, 0), width) for count in rows)
        rounds.append(Round(first, width, counts))
    return rounds


# --- the head -------------------------------------------------------------------------------------


@dataclass
class Scored:
    """A forward pass: own log-probs, and numbers of all rows for the gradients.

    logps: [N_r] of the own rows, accumulator dtype
    lse: [G * width] of every round
    labels: [G * width] targets of every round as indices into the own entries
    gathered: hidden states of the last round
    """

    logps: Tensor
    lse: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    gathered: Tensor | None = None


class SplitHead(Head):
    """The own entries of a head, for the rows of all ranks; all ranks must call each method."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        workspace_mb: float | None,
        engine: str,
        shares: Shares,
        *,
        needs: Sequence[bool] = (),
    ) -> None:
        """Choose the engine, and divide the workspace between gathered rows and logits.

        weight: [V_r, D]
        bias: [V_r], or None
        transform: from raw logits to logits
        workspace_mb: budget in MiB; None: the default of the device
        engine: "auto", "torch" or "triton"
        shares: rows and entries of all ranks
        needs: whether hidden, weight and bias want a gradient; empty: none
        """
        super().__init__(weight, bias, transform, workspace_mb, engine)
        self.shares, self.group = shares, shares.group
        numbers = weight.element_size() + (self.engine.acc.itemsize if any(needs) else 0)
        row_bytes = self.dim * numbers + ROW_BYTES
        self.rounds = make_rounds(shares.rows, row_bytes, self.budget // 2)
        if self.rounds:
            gathered = self.group.size * self.rounds[0].width * row_bytes
            self.budget = max(self.budget - gathered, self.budget // 2)
        self.tile = self._fit(needs)
        self.plans = [self._plan_of(chosen) for chosen in self.rounds]

    def _fit(self, needs: Sequence[bool]) -> Tile:
        """Return the tile of all rounds: the first has the most rows."""
        if not self.vocab or not self.rounds:
            return Tile(1, self.vocab)
        rows = self.rounds[0].rows
        if not any(needs):
            return forward_plan(self.size, rows, self.budget).tile
        _, weight, bias = needs
        width = self.dim if weight else int(bias)
        return kept_plan(self.size, rows, self.budget, width).tile

    def _plan_of(self, chosen: Round) -> ForwardPlan:
        """Return the chunks of a round, of rows counted without padding; none without entries."""
        if not self.vocab:
            return ForwardPlan(self.tile, ())
        cuts = kept_cuts(chosen.rows, self.tile)
        return ForwardPlan(self.tile, cuts, cuts[-1] if self.tile.vocab == self.vocab else None)

    def gather(self, own: Tensor, chosen: Round) -> Tensor:
        """Return the rows of all ranks in a round, [G * width, ...].

        own: [N_r, ...] all rows of this rank
        """
        mine = own[chosen.own(self.group.rank)]
        if len(mine) < chosen.width:
            padding = mine.new_zeros(chosen.width - len(mine), *mine.shape[1:])
            mine = torch.cat([mine, padding])
        return self.group.gather(mine)

    def gather_all(self, own: Tensor) -> list[Tensor]:
        """Return one number a row of all ranks, [G * width] for every round, in one gather."""
        if not self.rounds:
            return []
        most = max(self.shares.rows)
        whole = Round(0, most, self.shares.rows)
        by_rank = self.gather(own, whole).view(self.group.size, most)
        # The last round may be narrower, and is padded to the width of the others.
        rest = len(self.rounds) * self.rounds[0].width - most
        by_rank = torch.nn.functional.pad(by_rank, (0, rest))
        return [part.flatten() for part in by_rank.chunk(len(self.rounds), dim=1)]

    # --- log-probs ---

    def score(self, hidden: Tensor, targets: Tensor) -> Scored:
        """Return the log-probs of the own rows: 1 pass over the rows of all ranks.

        hidden: [N_r, D]
        targets: [N_r] indices into the whole vocabulary; -100 gives 0
        """
        options = {"dtype": self.engine.acc, "device": hidden.device}
        scored = Scored(torch.empty(len(hidden), **options))
        first = self.shares.first
        for number, targets_of_all in enumerate(self.gather_all(targets)):
            inside = (targets_of_all >= first) & (targets_of_all < first + self.vocab)
            scored.labels.append(torch.where(inside, targets_of_all - first, NOWHERE))
            self._score_round(number, hidden, scored)
        scored.logps = where_known(scored.logps, targets, self.shares.vocab)
        return scored

    def _score_round(self, number: int, hidden: Tensor, scored: Scored) -> None:
        """Write the own log-probs of a round, and keep the logsumexp of all its rows."""
        chosen, rank = self.rounds[number], self.group.rank
        scored.gathered = None  # the rows of one round at a time
        scored.gathered = self.gather(hidden, chosen)
        stats = self._own_stats(scored.gathered, scored.labels[number], number)
        lse, target_logit = self._joined(*stats)
        start = rank * chosen.width
        mine = slice(start, start + chosen.counts[rank])
        scored.logps[chosen.own(rank)] = target_logit[mine] - lse[mine]
        scored.lse.append(lse.to(self.engine.acc))

    def _own_stats(self, hidden: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return ([G * width] logsumexp, [G * width] target logit) over the own entries.

        hidden: [G * width, D] of a round
        labels: [G * width] indices into the own entries
        number: of the round
        """
        options = {"dtype": self.engine.acc, "device": hidden.device}
        # Without entries a sum of exponentials is 0; rows of padding may have any number.
        lse = torch.full(labels.shape, 0.0 if self.vocab else -math.inf, **options)
        target_logit = torch.zeros(labels.shape, **options)
        for cut in self.plans[number].cuts:
            spans = self.rounds[number].spans(cut)
            stats = self.chunk_stats(take(hidden, spans), take(labels, spans), self.tile)
            put(lse, spans, stats[0])
            put(target_logit, spans, stats[1])
        return lse, target_logit

    def _joined(self, lse: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 logsumexp and target logit over the entries of all ranks."""
        top = self.group.largest(lse.clone())
        top = top.masked_fill_(top == -math.inf, 0.0).double()
        sums = torch.stack([(lse - top).exp(), target_logit.double()])
        total, target_logit = self.group.sum(sums)
        return total.log() + top, target_logit

    def logps(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([N_r] log-probs, the logsumexps of all rows, round after round)."""
        scored = self.score(hidden, targets)
        lse = torch.cat(scored.lse) if scored.lse else scored.logps
        return scored.logps, lse

    def logps_of_both(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the [N_r] log-probs of policy and reference, one after the other."""
        return self.logps(hidden, targets)[0], self.logps(ref_hidden, targets)[0]

    # --- gradients ---

    def gradients_of(
        self,
        scored: Scored,
        hidden: Tensor,
        coef: Tensor,
        needs: Sequence[bool],
        weight_dtype: torch.dtype,
    ) -> Grads:
        """Return gradients: of the own hidden states, and of the own entries by all rows.

        scored: the forward pass; the gathered rows are let go
        hidden: [N_r, D]
        coef: [N_r] gradients of the loss by the own log-probs
        needs: whether hidden, weight and bias want a gradient
        weight_dtype: of the leaf of the weight
        """
        rank = self.group.rank
        need_hidden, need_weight, need_bias = needs
        chunks = sum(len(plan.cuts) for plan in self.plans)
        direct = self.direct_dtype(weight_dtype, self.tile, chunks)
        grads = Grads(self, self.tile, need_weight, need_bias, weight_dtype=direct)
        own = empty_hidden_grad(hidden, self, all_rows=True) if need_hidden else None
        coefs = self.gather_all(coef)
        # The last round first: its rows are here, and the buffer holds logits of its last chunk.
        for number in reversed(range(len(self.rounds))):
            chosen, is_last = self.rounds[number], scored.gathered is not None
            rows = scored.gathered if is_last else self.gather(hidden, chosen)
            scored.gathered = None
            if need_hidden:
                grads.hidden = self._partial_sums(rows, chosen)
            numbers = (scored.labels[number], coefs[number], scored.lse[number])
            self._add_round(number, rows, numbers, grads, is_last=is_last)
            if need_hidden:
                mine = self.group.reduce_scatter(grads.hidden)
                own[chosen.own(rank)] = mine[: chosen.counts[rank]]
        grads.finish()
        grads.hidden = own
        self.drop_buffer()
        return grads

    def _partial_sums(self, rows: Tensor, chosen: Round) -> Tensor:
        """Return [G * width, D] for the gradients of gathered rows by the own entries."""
        all_written = bool(self.vocab) and not chosen.is_padded
        make = torch.empty if all_written else torch.zeros
        return make(rows.shape, dtype=self.engine.acc, device=rows.device)

    def _add_round(
        self,
        number: int,
        rows: Tensor,
        numbers: tuple[Tensor, Tensor, Tensor],
        grads: Grads,
        *,
        is_last: bool,
    ) -> None:
        """Add the gradients of a round.

        number: of the round
        rows: [G * width, D]
        numbers: [G * width] labels, coefficients and logsumexps
        grads: gradients to add to
        is_last: the buffer holds the logits that the plan keeps
        """
        plan, spans = self.plans[number], self.rounds[number].spans
        kept = spans(plan.kept) if is_last and plan.kept else None
        cuts = map(spans, plan.backward_cuts)
        recompute(self, self.tile, cuts, rows, *numbers, grads, kept=kept)


class SplitPass:
    """One linear_una_loss call with gradients on a split vocabulary."""

    def __init__(
        self,
        head: SplitHead,
        hidden: Tensor,
        targets: Tensor,
        loss: SegmentLoss,
        needs: Sequence[bool],
        weight_dtype: torch.dtype,
    ) -> None:
        """Prepare a call.

        head: the head of the policy
        hidden: [N_r, D] in the dtype of the head
        targets: [N_r] indices into the whole vocabulary
        loss: from token log-probs to the loss, of the own rows
        needs: whether hidden, weight and bias want a gradient
        weight_dtype: of the leaf of the weight
        """
        self.head, self.hidden, self.targets, self.loss = head, hidden.detach(), targets, loss
        self.needs, self.weight_dtype = needs, weight_dtype

    def run(self) -> tuple[UnaOutput, Grads]:
        """Return the result for the own rows, and gradients without missing factors."""
        head, loss = self.head, self.loss
        scored = head.score(self.hidden, self.targets)
        coef = torch.zeros_like(scored.logps)
        if loss.feedback.num_units:
            coef = loss.lengths.per_row(loss.coefficients(scored.logps).to(coef.dtype))
            coef.masked_fill_(self.targets == IGNORED, 0.0)
        logps = scored.logps
        grads = head.gradients_of(scored, self.hidden, coef, self.needs, self.weight_dtype)
        if grads.of_head:
            grads.missing.shared_by = head.group
        return loss.output(logps), grads
