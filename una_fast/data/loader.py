"""Which records make up a step, on which rank, in which micro-batch.

Every rank holds all records and derives the same plan from (seed, epoch, step), so that a resumed run continues with
exactly the records that were due, and the number of units of the global batch is known without communication.

The records of a step are packed into micro-batches by MULTIFIT (Coffman, Garey and Johnson 1978): each record, widest
first, goes to the first batch with room for it; then the room is made as small as it can be without another round of
the ranks, which levels the batches. An example takes rows x width of a layout (`data.footprint`) and a batch takes
sum(rows) x max(width), so that one rule serves both layouts:

    packed   rows add up tokens and width is 1: nothing is lost, every batch is nearly full
    padded   widths descend, so that a batch holds neighbours in width; it is closed early where one more record would
             pad it by more than another batch costs
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from una_fast.data.batch import footprint, layout_tokens
from una_fast.data.examples import Example, Prompt
from una_fast.feedback import Feedback
from una_fast.logs import say_once

if TYPE_CHECKING:
    pass


# Tokens of padding that records of unequal width may cost a batch: an estimate of what one more batch costs in kernel
# launches, gathers and reads of the weights, in tokens. 64 records of 100..4000 tokens (log-uniform) and a budget of
# 16384: 512 gives 13 batches with 6 % padding, 1024 gives 10 with 10 %, and without such a limit it is 6 with 20 %.
MAX_PADDING = 512

ROUNDING = 1e-9  # 1.1 epochs of 10 steps are 11.000000000000002 steps


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's micro-batches (padded with empty ones to the same number on every rank), and
    the feedback units of the global batch, which every rank divides by."""

    epoch: float
    micro_batches: list[list[Example]]
    num_units: int


class Loader:
    """The steps of a run over a mixture of sources."""

    def __init__(
        self,
        sources: Sequence[Sequence[Example]],
        weights: Sequence[float],
        *,
        batch_size: int,
        micro_batch_size: int | None,
        max_tokens_per_batch: int | None,
        packed: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = [example for source in sources for example in source]
        self.sizes, self.weights = [len(source) for source in sources], list(weights)
        if micro_batch_size is None and max_tokens_per_batch is None:
            micro_batch_size = 1
        self.batch_size, self.seed = batch_size, seed
        self.limits = {
            "packed": packed,
            "max_tokens": max_tokens_per_batch,
            "max_records": micro_batch_size,
        }
        self.rank, self.world_size = rank, world_size
        self._epoch = 0, self._order(0)
        self.steps_per_epoch = math.ceil(len(self._epoch[1]) / batch_size)
        limit = max_tokens_per_batch or math.inf
        longer = sum(layout_tokens([example], packed=packed) > limit for example in self.examples)
        if longer and rank == 0:
            count = f"{longer} of {len(self.examples)} records"
            say_once(
                logging.WARNING,
                f"{count} are longer than max_tokens_per_batch={limit}; each of them runs alone",
            )

    def identity(self) -> str:
        """A hash of every example and of the mixture: the same for the same data, in any process."""
        digest = hashlib.sha256(repr((self.sizes, self.weights)).encode())
        for example in self.examples:
            if isinstance(example, Prompt):
                digest.update(
                    repr((example.text, sorted(example.columns.items()), example.weight)).encode()
                )
            arrays = [example.prompt_ids, *example.responses]
            digest.update(repr([len(ids) for ids in arrays]).encode())
            for values in (
                *arrays,
                *(getattr(example.feedback, f.name).numpy() for f in fields(Feedback)),
            ):
                digest.update(values.tobytes())
        return digest.hexdigest()[:16]

    def steps(self, first: int, stop: int) -> Iterator[Step]:
        """Steps first, first + 1, ..., stop - 1 of the run."""
        for step in range(first, stop):
            yield self.split(self.records(step), (step + 1) / self.steps_per_epoch)

    def records(self, step: int) -> list[Example]:
        """The records of the global batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        start = within * self.batch_size
        return [self.examples[i] for i in self._epoch[1][start : start + self.batch_size]]

    def in_order(self) -> Iterator[Step]:
        """Every example once, in the order of the sources (evaluation)."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.split(self.examples[start : start + self.batch_size], 0.0)

    def _order(self, epoch: int) -> np.ndarray:
        return mixture_order(self.sizes, self.weights, seed=self.seed, epoch=epoch)

    def split(self, batch: list[Example], epoch: float) -> Step:
        """A global batch as a step, at least one example: this rank's micro-batches of it."""
        batches = plan_batches(batch, world_size=self.world_size, **self.limits)
        rounds = math.ceil(len(batches) / self.world_size)
        batches += [[]] * (rounds * self.world_size - len(batches))
        mine = batches[self.rank :: self.world_size]
        return Step(epoch, mine, sum(example.feedback.num_units for example in batch))


@dataclass(eq=False)
class _Batch:
    """A micro-batch in the making: it takes rows * width tokens, of which `own` if its examples were run one by one."""

    width: int
    rows: int = 0
    own: int = 0
    examples: list[Example] = field(default_factory=list)


def plan_batches(
    examples: Sequence[Example],
    *,
    packed: bool,
    max_tokens: int | None,
    max_records: int | None,
    world_size: int = 1,
) -> list[list[Example]]:
    """Every example once, in batches of at most max_tokens (as `collate` lays them out) and max_records; an example
    that is longer is a batch of its own. Batches r, r + world_size, ... are those of rank r: the batches of a round are
    of similar size. At least one example is needed."""
    sized = sorted(
        ((*footprint(e, packed=packed), e) for e in examples),
        key=lambda s: (s[1], s[0]),
        reverse=True,
    )
    whole = sum(rows for rows, _, _ in sized) * sized[0][1]
    capacity = min(whole, max_tokens or whole)
    batches = _first_fit(sized, capacity, max_records)
    most = math.ceil(len(batches) / world_size) * world_size
    low = (sum(rows * width for rows, width, _ in sized) - 1) // most
    while capacity - low > 1 + capacity // 128:
        middle = (low + capacity) // 2
        fitted = _first_fit(sized, middle, max_records)
        if len(fitted) <= most:
            batches, capacity = fitted, middle
        else:
            low = middle
    # Largest first, to a sixteenth: among equals the longest records come first, whose attention costs more.
    batches.sort(key=lambda batch: -16 * batch.rows * batch.width // capacity)
    return [batch.examples for batch in batches]


def _first_fit(
    sized: Sequence[tuple[int, int, Example]], capacity: int, max_records: int | None
) -> list[_Batch]:
    """Batches of (rows, width, example), which come widest first."""
    batches: list[_Batch] = []
    unfilled: list[_Batch] = []
    for rows, width, example in sized:
        for batch in unfilled:
            tokens = (batch.rows + rows) * batch.width
            if tokens <= capacity and tokens - batch.own - rows * width <= MAX_PADDING:
                break
        else:
            batch = _Batch(width)
            batches.append(batch)
            unfilled.append(batch)
        batch.rows, batch.own = batch.rows + rows, batch.own + rows * width
        batch.examples.append(example)
        if len(batch.examples) == max_records:
            unfilled.remove(batch)
    return batches


def num_steps(steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run."""
    steps = math.ceil(epochs * steps_per_epoch - ROUNDING)
    return steps if max_steps is None else min(steps, max_steps)


def hold_out(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, evaluation) examples; the same split for the same seed, both in the order of the source."""
    held = np.zeros(len(examples), dtype=bool)
    count = math.ceil(fraction * len(examples) - ROUNDING)
    held[np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:count]] = True
    pick = [
        [e for e, h in zip(examples, held, strict=True) if h == wanted] for wanted in (False, True)
    ]
    return pick[0], pick[1]


def mixture_order(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> np.ndarray:
    """The examples of one epoch, as shuffled int64 indices into the concatenation of the sources.

    A source of weight w gives every example floor(w) times, and a random part of its examples (the fraction of w,
    rounded, at least one) once more. The same seed and epoch give the same order on every machine.
    """
    rng = np.random.default_rng([seed, epoch])
    parts, start = [np.empty(0, dtype=np.int64)], 0
    for size, weight in zip(sizes, weights, strict=True):
        times = int(weight)
        parts += [np.arange(start, start + size)] * times
        if weight > times:
            extra = max(1, int((weight - times) * size + 0.5))
            parts.append(start + rng.permutation(size)[:extra])
        start += size
    return rng.permutation(np.concatenate(parts))
