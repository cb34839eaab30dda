"""Statistics of rows of logits, from sums that a single read gives.

Of the logits z of a row in a tile (all V entries, or a slice of them), with the largest entry m and
d = z - m, a read gives

    top = m        place = column of the first m        total = sum of exp(d)
    moment = sum of exp(d) d        squares = sum of exp(2 d)        plain = sum of z

Sums of two slices add up once both are brought to the larger top. With s = top - larger top:

    total e^s        moment: e^s (moment + s total)        squares e^2s

Over the whole vocabulary, with p = softmax(z):

    logsumexp    lse = m + log total
    entropy      H = -sum of p log p = log total - moment / total
    log_sum_sq_probs                 = log squares - 2 log total
    mean_logits                      = plain / V
    is_top1                          = place is the target: of equal largest logits, the first wins

log total and -moment are never negative, so nothing cancels in H, however peaked the row is.

With upstream gradients c of log p_y and e of H, the gradient of the logits is

    dz_j = c (1[j = y] - p_j) - e p_j (log p_j + H)        log p_j = (z_j - lse) - tail
    tail = log total - (lse - m)        what rounding took from lse

At |z| = 50 the tail is up to 2e-6 in float32, more than the log p of the largest entry of a peaked
row. Only the entropy's gradient needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# statistic -> sum that it needs
SUM_OF = {
    "entropy": "moment",
    "mean_logits": "plain",
    "is_top1": "place",
    "log_sum_sq_probs": "squares",
}
STATS = tuple(SUM_OF)

LOWEST = -3.0e38  # the top of a slice whose entries are all masked: finite, so that differences are


def check_stats(stats: Sequence[str]) -> tuple[str, ...]:
    """Return the names of wanted statistics, once each; ValueError for anything else."""
    is_list = isinstance(stats, Iterable) and not isinstance(stats, str)
    if not is_list or not set(stats) <= set(STATS):
        raise ValueError(f"stats={stats!r} must be a tuple with some of {STATS}")
    return tuple(dict.fromkeys(stats))


def needed_sums(stats: Sequence[str]) -> list[str]:
    """Return the names of the sums that statistics need, beside top, total and target logit."""
    return [SUM_OF[name] for name in stats]


@dataclass
class RowSums:
    """Sums over a tile of C rows, accumulator dtype; None where no statistic needs the sum.

    top: [C]
    total: [C]
    target_logit: [C], 0 for a target outside the tile
    place: [C] int64, index into the whole vocabulary
    moment: [C]
    squares: [C]
    plain: [C]
    """

    top: Tensor
    total: Tensor
    target_logit: Tensor
    place: Tensor | None = None
    moment: Tensor | None = None
    squares: Tensor | None = None
    plain: Tensor | None = None

    @staticmethod
    def empty(rows: int, dtype: torch.dtype, device: torch.device, stats: Sequence[str]) -> RowSums:
        """Return sums to be written, as far as the statistics need them."""
        names = ["top", "total", "target_logit", *needed_sums(stats)]
        sums = {}
        for name in names:
            number = torch.int64 if name == "place" else dtype
            sums[name] = torch.empty(rows, dtype=number, device=device)
        return RowSums(**sums)

    def joined(self, later: RowSums) -> RowSums:
        """Return the sums over this tile and a later slice of the same rows."""
        top = torch.maximum(self.top, later.top)
        mine, theirs = self._from(top), later._from(top)
        sums = {}
        for name in ("total", "target_logit", "moment", "squares", "plain"):
            part = getattr(mine, name)
            sums[name] = None if part is None else part + getattr(theirs, name)
        place = self.place
        if place is not None:
            place = torch.where(later.top > self.top, later.place, place)
        return RowSums(top, place=place, **sums)

    def _from(self, top: Tensor) -> RowSums:
        """Return the sums with differences taken from a larger top."""
        shift = self.top - top
        factor = shift.exp()
        moment, squares = self.moment, self.squares
        if moment is not None:
            moment = factor * (moment + shift * self.total)
        if squares is not None:
            squares = factor.square() * squares
        return replace(self, total=factor * self.total, moment=moment, squares=squares)

    def finished(self, targets: Tensor, vocab: int) -> dict[str, Tensor]:
        """Return the numbers of whole rows, [C] each: those of `Rows` by name.

        targets: [C]
        vocab: V
        """
        log_total = self.total.log()
        lse = log_total + self.top
        found = {"lse": lse, "target_logit": self.target_logit}
        if self.moment is not None:
            found["entropy"] = log_total - self.moment / self.total
            found["tail"] = log_total - (lse - self.top)
        if self.squares is not None:
            found["log_sum_sq_probs"] = self.squares.log() - 2 * log_total
        if self.plain is not None:
            found["mean_logits"] = self.plain / vocab
        if self.place is not None:
            found["is_top1"] = self.place == targets
        return found


@dataclass(frozen=True)
class EntropyTerm:
    """Numbers of rows that the gradient of the entropy needs, accumulator dtype.

    upstream: [C] gradients of the loss by the entropy, e above
    entropy: [C]
    tail: [C]
    """

    upstream: Tensor
    entropy: Tensor
    tail: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return upstream, entropy and tail."""
        return self.upstream, self.entropy, self.tail

    def take(self, pick: Callable[[Tensor], Tensor]) -> EntropyTerm:
        """Return the term of some rows: pick(x) of every column."""
        return EntropyTerm(*map(pick, self.columns))
