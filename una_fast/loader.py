"""Which records make up a step, on which rank, in which micro-batch.

Every rank holds all records and derives the same plan from (seed, epoch, step), so that a resumed run continues with
exactly the records that were due, and the number of units of the global batch is known without communication.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from una_fast.data import Example, mixture_order
from una_fast.feedback import Feedback

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
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = [example for source in sources for example in source]
        self.sizes, self.weights = [len(source) for source in sources], list(weights)
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = math.ceil(len(self._order(0)) / batch_size)

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        steps = math.ceil(epochs * self.steps_per_epoch - ROUNDING)
        return steps if max_steps is None else min(steps, max_steps)

    def identity(self) -> str:
        """A hash of every example and of the mixture: the same for the same data, in any process."""
        digest = hashlib.sha256(repr((self.sizes, self.weights)).encode())
        for example in self.examples:
            arrays = [example.prompt_ids, *example.responses]
            digest.update(repr([len(ids) for ids in arrays]).encode())
            for values in (*arrays, *(getattr(example.feedback, f.name).numpy() for f in fields(Feedback))):
                digest.update(values.tobytes())
        return digest.hexdigest()[:16]

    def steps(self, first: int, stop: int) -> Iterator[Step]:
        """Steps first, first + 1, ..., stop - 1 of the run."""
        order, epoch = None, -1
        for step in range(first, stop):
            if order is None or step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            start = (step % self.steps_per_epoch) * self.batch_size
            batch = [self.examples[i] for i in order[start : start + self.batch_size]]
            yield self._split(batch, (step + 1) / self.steps_per_epoch)

    def in_order(self) -> Iterator[Step]:
        """Every example once, in the order of the sources (evaluation)."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self._split(self.examples[start : start + self.batch_size], 0.0)

    def _order(self, epoch: int) -> np.ndarray:
        return mixture_order(self.sizes, self.weights, seed=self.seed, epoch=epoch)

    def _split(self, batch: list[Example], epoch: float) -> Step:
        size = self.micro_batch_size
        mine = batch[self.rank :: self.world_size]
        count = math.ceil(math.ceil(len(batch) / self.world_size) / size)
        micro_batches = [mine[k * size : (k + 1) * size] for k in range(count)]
        return Step(epoch, micro_batches, sum(example.feedback.num_units for example in batch))


def hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, evaluation) examples; the same split for the same seed, both in the order of the source."""
    held = np.zeros(len(examples), dtype=bool)
    count = math.ceil(fraction * len(examples) - ROUNDING)
    held[np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:count]] = True
    pick = [[e for e, h in zip(examples, held, strict=True) if h == wanted] for wanted in (False, True)]
    return pick[0], pick[1]
