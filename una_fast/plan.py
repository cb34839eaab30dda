"""Which rows are computed when: the block plan of the fused head. Plain Python, decided before any GEMM runs.

The gradient of the loss is dL/dlogp_t = c_i for every token t of response i, and c_i is known only once every
response of its *component* (the responses that pairs link to it) is summed. Per component the plan picks the
cheapest way that fits the budget; one GEMM pass is 2 N D V flop:

    resident     the component fits in one chunk: its logits are all there when c_i becomes known      3 passes
    streamed     gradients are built without c_i and multiplied by it at the end. A component that depends on one
                 number (one response, or one pair) needs one accumulator, any other one per response. The first
                 streamed component uses the weight gradient itself; later ones need scratch            3 passes
    recomputed   log-probs first, then the logits again with c_i known                                  4 passes

With a frozen head there is nothing to accumulate across rows: everything streams, each row scaled last, in 2 passes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

from una_fast.feedback import PAIR, Feedback

logger = logging.getLogger(__name__)

DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 2048}
FEW_ROWS = 1024  # below this many rows per chunk, rereading the weight and its gradient shows in the time

Span = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Responses whose gradient shares one unknown scalar: c_i = scalar * unit_i."""

    responses: tuple[int, ...]
    units: tuple[float, ...]


@dataclass(frozen=True)
class Component:
    """Responses linked by pairs, in order, and the scalars their coefficients depend on."""

    responses: tuple[int, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Tile:
    """Logits that exist at once: `rows` x `vocab`. vocab < V means the vocabulary-sliced, recomputing path."""

    rows: int
    vocab: int


@dataclass(frozen=True)
class Plan:
    """The order is: streamed components, resident blocks, recomputed responses, then responses without feedback."""

    tile: Tile
    streamed: tuple[Component, ...] = ()
    resident: tuple[tuple[int, ...], ...] = ()
    recomputed: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()

    @property
    def scratch(self) -> int:
        """[V, D] accumulators needed beside the weight gradient."""
        return max((len(c.groups) - (k == 0) for k, c in enumerate(self.streamed)), default=0)


def components(feedback: Feedback, lengths: Sequence[int], length_normalize: bool) -> list[Component]:
    """The scored responses of a call, split into components."""
    kinds, firsts, seconds = feedback.kind.tolist(), feedback.first.tolist(), feedback.second.tolist()
    root: dict[int, int] = {}

    def find(i: int) -> int:
        root.setdefault(i, i)
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    pointwise = set()
    for kind, first, second in zip(kinds, firsts, seconds, strict=True):
        if kind == PAIR:
            low, high = sorted((find(first), find(second)))
            root[high] = low
        else:
            pointwise.add(find(first))
    members: dict[int, list[int]] = {}
    for i in sorted(root):
        members.setdefault(find(i), []).append(i)
    scored_alone = {find(i) for i in pointwise}

    def unit(i: int) -> float:
        return 1.0 / lengths[i] if length_normalize else 1.0

    result = []
    for key, members_of in members.items():
        if len(members_of) == 2 and key not in scored_alone:
            first, second = members_of
            groups: tuple[Group, ...] = (Group((first, second), (unit(first), -unit(second))),)
        else:
            groups = tuple(Group((i,), (1.0,)) for i in members_of)
        result.append(Component(tuple(members_of), groups))
    return result


def row_bytes(vocab: int, hidden: int, acc_bytes: int, copies: bool) -> int:
    """Bytes of a row of a chunk: its logits, and copies of its hidden state and the gradient of that, where operands
    are narrower than the accumulator or the rows of a chunk are gathered from several places."""
    return vocab * acc_bytes + (2 * hidden * acc_bytes if copies else 0)


def fit_tile(rows: int, vocab: int, hidden: int, acc_bytes: int, copies: bool, budget: int) -> Tile:
    """The largest tile whose rows (row_bytes) stay within `budget` bytes."""
    whole = budget // row_bytes(vocab, hidden, acc_bytes, copies)
    if whole >= 1:
        return Tile(min(whole, max(rows, 1)), vocab)
    cells = max(budget // acc_bytes, 1)
    slice_rows = min(max(isqrt(cells), 1), max(rows, 1))
    return Tile(slice_rows, max(min(cells // slice_rows, vocab), 1))


def make_plan(
    feedback: Feedback,
    lengths: Sequence[int],
    *,
    vocab: int,
    hidden: int,
    acc_bytes: int,
    cast: bool,
    budget: int,
    accumulator_width: int,
    length_normalize: bool,
) -> Plan:
    """Plan one call. lengths: tokens per response. cast: operands are narrower than the accumulator. budget: workspace
    in bytes. accumulator_width: numbers per vocabulary entry that an accumulator of the head's gradients takes: D for
    the weight, 1 for the bias alone, 0 for a frozen head.
    """
    rows = sum(lengths)
    parts = components(feedback, lengths, length_normalize)
    scored = sorted(i for part in parts for i in part.responses)
    unscored = tuple(sorted(set(range(len(lengths))) - set(scored)))

    def size(part: Component) -> int:
        return sum(lengths[i] for i in part.responses)

    in_place = all(part.responses[-1] - part.responses[0] < len(part.responses) for part in parts) and not unscored
    copies = cast or not in_place
    tile = fit_tile(rows, vocab, hidden, acc_bytes, copies, budget)
    if not copies and len(parts) > 1 and any(size(part) > tile.rows for part in parts):
        copies = True  # blocks of what is left may have gaps
        tile = fit_tile(rows, vocab, hidden, acc_bytes, copies, budget)
    if tile.vocab < vocab:
        return Plan(tile, recomputed=tuple(scored), unscored=unscored)
    if not accumulator_width:
        groups = tuple(Group((i,), (1.0,)) for i in scored)
        return Plan(tile, streamed=(Component(tuple(scored), groups),) if scored else (), unscored=unscored)

    accumulator = vocab * accumulator_width * acc_bytes
    streamed: list[Component] = []
    recomputed: list[int] = []
    blocks: list[list[int]] = []
    room = 0

    # The first streamed component needs one accumulator less. Scratch may take half of the budget, and must leave room
    # for one row of logits.
    room_for_scratch = min(budget // 2, budget - row_bytes(vocab, hidden, acc_bytes, copies))
    long = sorted((part for part in parts if size(part) > tile.rows), key=lambda part: len(part.groups))
    for part in long:
        if (len(part.groups) - (not streamed)) * accumulator <= room_for_scratch:
            streamed.append(part)
        else:
            recomputed.extend(part.responses)
    scratch = Plan(tile, tuple(streamed)).scratch * accumulator
    if scratch:
        tile = fit_tile(rows, vocab, hidden, acc_bytes, copies, budget - scratch)
    for part in parts:
        if part in long:
            continue
        if size(part) > tile.rows:  # scratch took the room it would have been resident in
            recomputed.extend(part.responses)
            continue
        if not blocks or size(part) > room:
            blocks.append([])
            room = tile.rows
        blocks[-1].extend(part.responses)
        room -= size(part)
    return Plan(
        tile, tuple(streamed), tuple(tuple(sorted(block)) for block in blocks), tuple(sorted(recomputed)), unscored
    )


def chunks(responses: Sequence[int], cu: Sequence[int], rows: int) -> Iterator[list[Span]]:
    """Cut the rows of `responses` into the fewest chunks of at most `rows` rows, of about equal size; spans that touch
    are joined."""
    total = sum(cu[i + 1] - cu[i] for i in responses)
    rows = -(-total // max(-(-total // rows), 1))
    chunk: list[Span] = []
    room = rows
    for i in responses:
        start, stop = cu[i], cu[i + 1]
        while start < stop:
            take = min(stop - start, room)
            if chunk and chunk[-1][1] == start:
                chunk[-1] = (chunk[-1][0], start + take)
            else:
                chunk.append((start, start + take))
            start, room = start + take, room - take
            if room == 0:
                yield chunk
                chunk, room = [], rows
    if chunk:
        yield chunk


def span_rows(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log a choice or a slow path once per process."""
    logger.log(level, message)
