"""The records of a step: the order, the rank and the micro-batch of every record.

Every rank holds all records and derives the same step from (seed, epoch, step). A resumed run
continues with exactly the records due, and the number of units of the global batch is
known without communication.

The records of a step are packed into micro-batches by MULTIFIT (Coffman, Garey and Johnson 1978):
each record, widest first, goes to the first bin with room; then the room of the bins is made as
small as possible without another round of the ranks, and the micro-batches are level. An example
takes rows x width of a layout (`batch.footprint`) and a micro-batch takes sum(rows) x max(width);
the same rule serves both layouts:

    packed   rows add up tokens and width is 1: no padding, every micro-batch is nearly full
    padded   widths descend, and a micro-batch holds neighbours in width; a bin stays closed to a
             record with more padding than another micro-batch costs

Some models have other rotary factors in long rows (model/positions.py): records on either side of
such a length never share a micro-batch, for then the neighbours of a record would change its
log-probs.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from una_fast.data.batch import footprint, layout_tokens
from una_fast.data.examples import Example, Prompt
from una_fast.feedback import NAMES
from una_fast.logs import say_once

logger = logging.getLogger(__name__)

# Tokens of padding that records of unequal width may cost a micro-batch: an estimate of the cost
# of one more micro-batch in kernel launches, gathers and reads of the weights, in tokens. 64
# records of 100..4000 tokens (log-uniform) and a budget of 16384: 512 gives 13 micro-batches with
# 6 % padding, 1024 gives 10 with 10 %, and no limit of padding gives 6 with 20 %.
MAX_PADDING = 512

ROUNDING = 1e-9  # 1.1 epochs of 10 steps are 11.000000000000002 steps


@dataclass(frozen=True)
class Step:
    """The work of an optimizer step on a rank.

    epoch: passes over the mixture, the step included
    micro_batches: examples per forward pass; empty lists at the end give all ranks equal numbers
    num_units: feedback units of the global batch, the divisor of the loss on every rank
    """

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
        rope_limits: Sequence[int] = (),
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Keep the records of all sources, and draw the order of the first epoch.

        sources: examples by source
        weights: times that a record of a source is seen in an epoch
        batch_size: records per step, over all ranks
        micro_batch_size: records per micro-batch at most; without any limit, 1
        max_tokens_per_batch: tokens per micro-batch at most, padding included; a longer record runs
            alone
        packed: the layout of the micro-batches
        rope_limits: lengths in tokens; a micro-batch has no records on both sides of one
        seed: of the order
        rank, world_size: of the process
        """
        self.examples = list(itertools.chain.from_iterable(sources))
        self.sizes = [len(source) for source in sources]
        self.weights = list(weights)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.packed = packed
        self.rope_limits = rope_limits
        self.max_tokens = max_tokens_per_batch
        self.max_records = micro_batch_size
        if micro_batch_size is None and max_tokens_per_batch is None:
            self.max_records = 1
        self._epoch = 0
        self._order = self._order_of(0)
        self.steps_per_epoch = math.ceil(len(self._order) / batch_size)
        if rank == 0:
            self._warn_of_longer_records()

    def _warn_of_longer_records(self) -> None:
        limit = self.max_tokens or math.inf
        longer = 0
        for example in self.examples:
            longer += layout_tokens([example], packed=self.packed) > limit
        if longer:
            say_once(
                logging.WARNING,
                f"{longer} of {len(self.examples)} records are longer than "
                f"max_tokens_per_batch={limit}; each of them runs alone",
                logger,
            )

    def identity(self) -> str:
        """Return a hash of all examples and of the mixture, equal for equal data in any process."""
        digest = hashlib.sha256(repr((self.sizes, self.weights)).encode())
        for example in self.examples:
            if isinstance(example, Prompt):
                columns = sorted(example.columns.items())
                digest.update(repr((example.text, columns, example.weight)).encode())
            ids = [example.prompt_ids, *example.responses]
            digest.update(repr([len(array) for array in ids]).encode())
            units = [getattr(example.feedback, name).numpy() for name in NAMES]
            for array in (*ids, *units, *example.scored):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def steps(self, first: int, stop: int) -> Iterator[Step]:
        """Yield steps first, first + 1, ..., stop - 1 of the run."""
        for step in range(first, stop):
            yield self.split(self.records(step), (step + 1) / self.steps_per_epoch)

    def records(self, step: int) -> list[Example]:
        """Return the records of the global batch of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = self._order_of(epoch)
        start = within * self.batch_size
        return [self.examples[i] for i in self._order[start : start + self.batch_size]]

    def in_order(self) -> Iterator[Step]:
        """Yield steps that hold every example once, in the order of the sources (evaluation)."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.split(self.examples[start : start + self.batch_size], 0.0)

    def _order_of(self, epoch: int) -> np.ndarray:
        return mixture_order(self.sizes, self.weights, seed=self.seed, epoch=epoch)

    def split(self, batch: list[Example], epoch: float) -> Step:
        """Return the step of a global batch: the micro-batches of the rank.

        batch: at least one example
        epoch: passes over the mixture, the step included
        """
        micro_batches = pack_batches(
            batch,
            packed=self.packed,
            rope_limits=self.rope_limits,
            max_tokens=self.max_tokens,
            max_records=self.max_records,
            world_size=self.world_size,
        )
        rounds = math.ceil(len(micro_batches) / self.world_size)
        empty = rounds * self.world_size - len(micro_batches)
        micro_batches += [[]] * empty
        num_units = sum(example.feedback.num_units for example in batch)
        return Step(epoch, micro_batches[self.rank :: self.world_size], num_units)


@dataclass(eq=False)
class _Bin:
    """A micro-batch in the making, of rows * width tokens.

    width: of the first example, the widest
    passed: rotary limits that every example is longer than
    rows: of all examples
    unpadded: tokens of all examples, laid out alone
    """

    width: int
    passed: int
    rows: int = 0
    unpadded: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class _Sized:
    """An example, its footprint, and the number of rotary limits that it is longer than."""

    rows: int
    width: int
    passed: int
    example: Example


def pack_batches(
    examples: Sequence[Example],
    *,
    packed: bool,
    max_tokens: int | None,
    max_records: int | None,
    rope_limits: Sequence[int] = (),
    world_size: int = 1,
) -> list[list[Example]]:
    """Return every example once, in the few and even micro-batches of MULTIFIT.

    examples: at least one
    packed: the layout
    max_tokens: tokens per micro-batch at most, padding included; a longer example is alone
    max_records: examples per micro-batch at most
    rope_limits: lengths in tokens; a micro-batch has no examples on both sides of one
    world_size: micro-batches r, r + world_size, ... belong to rank r; the micro-batches of a round
        are of similar size
    """
    sized = []
    for example in examples:
        rows, width = footprint(example, packed=packed)
        passed = bisect.bisect_left(rope_limits, example.longest)
        sized.append(_Sized(rows, width, passed, example))
    sized.sort(key=lambda item: (item.width, item.rows), reverse=True)
    whole = sum(item.rows for item in sized) * sized[0].width
    capacity = min(whole, max_tokens or whole)
    bins = _first_fit(sized, capacity, max_records)

    # Bisect for the smallest capacity that needs no further round.
    most = math.ceil(len(bins) / world_size) * world_size
    low = (sum(item.rows * item.width for item in sized) - 1) // most
    while capacity - low > 1 + capacity // 128:
        middle = (low + capacity) // 2
        fitted = _first_fit(sized, middle, max_records)
        if len(fitted) <= most:
            bins = fitted
            capacity = middle
        else:
            low = middle

    # Largest first, to a sixteenth: among equals the longest records come first, whose attention
    # costs more.
    bins.sort(key=lambda filled: -16 * filled.rows * filled.width // capacity)
    return [filled.examples for filled in bins]


def _first_fit(sized: Sequence[_Sized], capacity: int, max_records: int | None) -> list[_Bin]:
    """Return the examples in bins, every example in the first bin with room.

    sized: widest first
    capacity: tokens per bin at most; a longer example has a bin to itself
    """
    bins: list[_Bin] = []
    unfilled: list[_Bin] = []
    for item in sized:
        alone = item.rows * item.width
        for target in unfilled:
            tokens = (target.rows + item.rows) * target.width
            padding = tokens - target.unpadded - alone
            fits = tokens <= capacity and padding <= MAX_PADDING
            if fits and target.passed == item.passed:
                break
        else:  # no bin has room
            target = _Bin(item.width, item.passed)
            bins.append(target)
            unfilled.append(target)
        target.rows += item.rows
        target.unpadded += alone
        target.examples.append(item.example)
        if len(target.examples) == max_records:
            unfilled.remove(target)
    return bins


def num_steps(steps_per_epoch: int, epochs: float | None, max_steps: int | None) -> int:
    """Return the optimizer steps of a run; epochs may be fractional.

    Without epochs, max_steps decides; without both there is one pass.
    """
    if epochs is None:
        return steps_per_epoch if max_steps is None else max_steps
    steps = math.ceil(epochs * steps_per_epoch - ROUNDING)
    return steps if max_steps is None else min(steps, max_steps)


def hold_out(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (training, evaluation) examples, both in the order of the source.

    The same seed and number of examples give the same split.
    """
    count = math.ceil(fraction * len(examples) - ROUNDING)
    shuffled = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    held = np.zeros(len(examples), dtype=bool)
    held[shuffled[:count]] = True
    training = [example for example, is_held in zip(examples, held, strict=True) if not is_held]
    evaluation = [example for example, is_held in zip(examples, held, strict=True) if is_held]
    return training, evaluation


def mixture_order(
    sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> np.ndarray:
    """Return the examples of one epoch, as shuffled int64 indices into all sources in a row.

    sizes: examples per source
    weights: a source of weight w gives every example floor(w) times, and a random share of the
        examples (the fraction of w, rounded, at least 1) once more
    seed, epoch: the same seed and epoch give the same order on every machine
    """
    rng = np.random.default_rng([seed, epoch])
    indices = [np.empty(0, dtype=np.int64)]
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        times = int(weight)
        indices += [np.arange(start, start + size)] * times
        if weight > times:
            extra = max(1, int((weight - times) * size + 0.5))
            indices.append(start + rng.permutation(size)[:extra])
        start += size
    return rng.permutation(np.concatenate(indices))
