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

Every chunk of a trained head reads and writes the [V, D] gradient. When the budget holds few rows of logits, tiles of
many rows and a slice of the vocabulary do better although they recompute: the logsumexp of a row needs all slices.
Such a plan is *sliced*. It is chosen where the cost model says so, and where not even one row of logits fits.

Cost model (`cost`): a GEMM takes the longer of its flop and its operands' bytes; what it writes, and what the row
operations read and write, comes on top. Rates are those of a `Machine`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from una_fast.feedback import PAIR, Feedback

logger = logging.getLogger(__name__)


DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 2048}
CAST_SHARE = 8  # one in so many bytes of the workspace is for slices of a weight that GEMMs need cast

FEW_ROWS = (
    1024  # below this many rows per chunk, rereading the weight and its gradient shows in the time
)


Span = tuple[int, int]


def workspace_bytes(device: str, workspace_mb: float | None) -> int:
    """Return the bytes of the workspace: of a setting in MiB, or the default of a kind of device.

    ValueError for a setting that is not positive and finite.
    """
    if workspace_mb is None:
        workspace_mb = DEFAULT_WORKSPACE_MB.get(device, DEFAULT_WORKSPACE_MB["cuda"])
    if not 0 < workspace_mb < math.inf:
        raise ValueError(f"workspace_mb={workspace_mb} must be positive and finite")
    return int(workspace_mb * 2**20)


def cast_bytes(workspace: int) -> int:
    """Return the bytes that are set aside for slices of a weight in the dtype of the accumulator."""
    return workspace // CAST_SHARE


def tile_budget(workspace: int, *, cast: bool) -> int:
    """Return the bytes left for tiles of logits, less the slices where operands are cast."""
    return workspace - (cast_bytes(workspace) if cast else 0)


@dataclass(frozen=True)
class Machine:
    """Rates of the cost model: flop/s of a large GEMM, bytes/s of memory."""

    flops: float
    bytes: float


HOPPER = Machine(
    700e12, 4e12
)  # between an H100 and an H200; the choices below depend on the quotient alone


@dataclass(frozen=True)
class HeadSize:
    """What a plan must know of a head and of the engine that runs it.

    acc_bytes: of a logit, and of a number of an accumulator. operand_bytes: of a number that a GEMM reads. cast: hidden
    states are copied to the accumulator dtype first. align: the logits of a row are padded to a multiple of it.
    quantum: chunks of more rows than that are multiples of it. machine: rates of the device; None: unknown, the
    vocabulary is sliced only where a row does not fit."""

    vocab: int
    hidden: int
    acc_bytes: int = 4
    operand_bytes: int = 4
    cast: bool = False
    align: int = 1
    quantum: int = 1
    machine: Machine | None = None

    def stride(self, vocab: int) -> int:
        """Logits per row of a buffer for `vocab` of them."""
        return -(-vocab // self.align) * self.align

    def copied_bytes(self, gathered: bool, sliced: bool) -> int:
        """Bytes per row of copies of the hidden state and its gradient: where operands are cast, where the rows of a
        chunk are gathered from several places, and where a gradient narrower than its sum over slices is built."""
        if self.cast or gathered:
            return self.hidden * (
                (self.acc_bytes if self.cast else self.operand_bytes) + self.acc_bytes
            )
        return self.hidden * self.acc_bytes if sliced and self.operand_bytes < self.acc_bytes else 0

    def row_bytes(self, gathered: bool) -> int:
        """Bytes of a row of a chunk over the whole vocabulary."""
        return self.stride(self.vocab) * self.acc_bytes + self.copied_bytes(gathered, sliced=False)


def head_size(vocab: int, hidden: int, device: str, operand_bytes: int) -> HeadSize:
    """Of a head on a kind of device, "cuda" (the Triton engine) or "cpu"; operand_bytes: of a number of its weight."""
    if device == "cpu":
        return HeadSize(vocab, hidden, cast=operand_bytes < 4)
    return HeadSize(vocab, hidden, 4, operand_bytes, align=64, quantum=128, machine=HOPPER)


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
    """Logits that exist at once: `rows` x `vocab`. vocab < V: a sliced plan."""

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
    quantum: int = 1

    @property
    def scratch(self) -> int:
        """[V, D] accumulators needed beside the weight gradient."""
        return max((len(c.groups) - (k == 0) for k, c in enumerate(self.streamed)), default=0)

    def cuts(self, responses: Sequence[int], cu: Sequence[int]) -> list[list[Span]]:
        """The rows of `responses`, chunk by chunk."""
        return list(chunks(responses, cu, self.tile.rows, self.quantum))


def components(
    feedback: Feedback, lengths: Sequence[int], length_normalize: bool
) -> list[Component]:
    """The scored responses of a call, split into components."""
    kinds, firsts, seconds = (
        feedback.kind.tolist(),
        feedback.first.tolist(),
        feedback.second.tolist(),
    )
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


def fit_tile(size: HeadSize, rows: int, budget: int, gathered: bool) -> Tile:
    """The largest tile for at most `rows` rows that stays within `budget` bytes: whole rows of logits, or a slice."""
    whole = budget // size.row_bytes(gathered)
    if whole < 1:
        return sliced_tile(size, rows, budget, gathered)
    if rows > whole > size.quantum:
        whole -= whole % size.quantum
    return Tile(min(whole, max(rows, 1)), size.vocab)


def sliced_tile(size: HeadSize, rows: int, budget: int, gathered: bool) -> Tile:
    """A tile about as wide as high: sums over rows and sums over slices are then read and written equally often."""
    # Where the copies of one row alone would take more than a quarter, so small a budget is exceeded.
    copied, logit = min(size.copied_bytes(gathered, sliced=True), budget // 4), size.acc_bytes
    side = (math.isqrt(copied * copied + 4 * logit * budget) - copied) // (2 * logit)
    if side > size.quantum:
        side -= side % size.quantum
    height = min(max(side, 1), max(rows, 1))
    width = max((budget // height - copied) // logit, 1)
    if width > size.align:
        width -= width % size.align
    return Tile(height, min(width, size.vocab))


def forward_tile(size: HeadSize, rows: int, budget: int) -> Tile:
    """The tile of a pass without gradients over rows that lie together: whole rows, or slices where they are cheaper
    (no pass is lost to them here)."""
    whole = fit_tile(size, rows, budget, gathered=False)
    if size.machine is None or whole.rows >= rows:
        return whole
    sliced = sliced_tile(size, rows, budget, gathered=False)
    return min(whole, sliced, key=lambda tile: forward_pass(size, rows, tile).seconds(size.machine))


def make_plan(
    feedback: Feedback,
    lengths: Sequence[int],
    size: HeadSize,
    *,
    budget: int,
    accumulator_width: int,
    length_normalize: bool,
) -> Plan:
    """Plan one call. lengths: tokens per response. budget: workspace in bytes. accumulator_width: numbers per
    vocabulary entry that an accumulator of the head's gradients takes: D for the weight, 1 for the bias alone, 0 for a
    frozen head."""
    rows = sum(lengths)
    parts = components(feedback, lengths, length_normalize)
    scored = sorted(i for part in parts for i in part.responses)
    unscored = tuple(sorted(set(range(len(lengths))) - set(scored)))

    def tokens(part: Component) -> int:
        return sum(lengths[i] for i in part.responses)

    gathered = bool(unscored) or any(
        part.responses[-1] - part.responses[0] >= len(part.responses) for part in parts
    )
    tile = fit_tile(size, rows, budget, gathered)
    if not gathered and len(parts) > 1 and any(tokens(part) > tile.rows for part in parts):
        gathered = True  # blocks of what is left may have gaps
        tile = fit_tile(size, rows, budget, gathered)
    sliced = Plan(
        sliced_tile(size, rows, budget, gathered), (), (), tuple(scored), unscored, size.quantum
    )
    if tile.vocab < size.vocab:
        return sliced
    if accumulator_width:
        plan = _whole_rows(
            parts, lengths, size, tile, budget, accumulator_width, gathered, unscored
        )
    else:
        groups = tuple(Group((i,), (1.0,)) for i in scored)
        streamed = (Component(tuple(scored), groups),) if scored else ()
        plan = Plan(tile, streamed, unscored=unscored, quantum=size.quantum)
    if size.machine is None or tile.rows >= rows:
        return plan
    return min(
        plan, sliced, key=lambda p: cost(p, lengths, size, accumulator_width).seconds(size.machine)
    )


def _whole_rows(
    parts: Sequence[Component],
    lengths: Sequence[int],
    size: HeadSize,
    tile: Tile,
    budget: int,
    accumulator_width: int,
    gathered: bool,
    unscored: tuple[int, ...],
) -> Plan:
    """The plan of a trained head whose tiles span the vocabulary."""
    rows = sum(lengths)
    accumulator = size.vocab * accumulator_width * size.acc_bytes
    streamed: list[Component] = []
    recomputed: list[int] = []
    blocks: list[list[int]] = []
    room = 0

    def tokens(part: Component) -> int:
        return sum(lengths[i] for i in part.responses)

    # The first streamed component needs one accumulator less. Scratch may take half of the budget, and must leave room
    # for one row of logits.
    room_for_scratch = min(budget // 2, budget - size.row_bytes(gathered))
    long = sorted(
        (part for part in parts if tokens(part) > tile.rows), key=lambda part: len(part.groups)
    )
    for part in long:
        if (len(part.groups) - (not streamed)) * accumulator <= room_for_scratch:
            streamed.append(part)
        else:
            recomputed.extend(part.responses)
    scratch = Plan(tile, tuple(streamed)).scratch * accumulator
    if scratch:
        tile = fit_tile(size, rows, budget - scratch, gathered)
    for part in parts:
        if part in long:
            continue
        if tokens(part) > tile.rows:  # scratch took the room it would have been resident in
            recomputed.extend(part.responses)
            continue
        if not blocks or tokens(part) > room:
            blocks.append([])
            room = tile.rows
        blocks[-1].extend(part.responses)
        room -= tokens(part)
    resident = tuple(tuple(sorted(block)) for block in blocks)
    return Plan(tile, tuple(streamed), resident, tuple(sorted(recomputed)), unscored, size.quantum)


def chunks(
    responses: Sequence[int], cu: Sequence[int], rows: int, quantum: int = 1
) -> Iterator[list[Span]]:
    """Cut the rows of `responses` into the fewest chunks of at most `rows` rows, of about equal size and where that
    fits in multiples of `quantum`; spans that touch are joined."""
    total = sum(cu[i + 1] - cu[i] for i in responses)
    even = -(-total // max(-(-total // rows), 1))
    if even > quantum:
        even = -(-even // quantum) * quantum
    rows = min(even, rows)
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


# ------------------------------------------------------------------------------------------------------- cost model


@dataclass(frozen=True)
class Cost:
    """Work of one call. gemms: (flop, operand bytes) of every GEMM, of which each takes the longer time. traffic:
    bytes on top, read and written by row operations, and written or accumulated by GEMMs."""

    gemms: tuple[tuple[float, float], ...] = ()
    traffic: float = 0.0

    @property
    def flop(self) -> float:
        return sum(flop for flop, _ in self.gemms)

    def seconds(self, machine: Machine) -> float:
        products = sum(
            max(flop / machine.flops, operands / machine.bytes) for flop, operands in self.gemms
        )
        return products + self.traffic / machine.bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gemms + other.gemms, self.traffic + other.traffic)

    def __mul__(self, times: float) -> Cost:
        return Cost(
            tuple((times * flop, times * operands) for flop, operands in self.gemms),
            times * self.traffic,
        )


def forward_cost(size: HeadSize, rows: float, vocab: float) -> Cost:
    """The logits of one tile written, and read once."""
    flop, operands = (
        2 * rows * vocab * size.hidden,
        size.operand_bytes * size.hidden * (rows + vocab),
    )
    return Cost(((flop, operands),), 2 * size.acc_bytes * rows * vocab)


def forward_pass(size: HeadSize, rows: int, tile: Tile) -> Cost:
    """One pass over `rows` rows without gradients."""
    cuts = chunks([0], [0, rows], tile.rows, size.quantum) if rows else ()
    slices = -(-size.vocab // tile.vocab)
    pieces = (
        forward_cost(size, height, size.vocab / slices) * (slices * times)
        for height, times in Counter(map(span_rows, cuts)).items()
    )
    return sum(pieces, start=Cost())


def backward_cost(size: HeadSize, rows: float, vocab: float, accumulator_width: int) -> Cost:
    """The gradients of one tile whose logits are there: du over them, then dH, and dW where the head is trained."""
    narrow, wide, dim = size.operand_bytes, size.acc_bytes, size.hidden
    flop, cells = 2 * rows * vocab * dim, rows * vocab
    gemms = [(flop, narrow * (cells + vocab * dim))]
    if accumulator_width >= dim:
        gemms.append((flop, narrow * (cells + rows * dim)))
    sums = 2 * rows * dim if vocab < size.vocab else rows * dim
    return Cost(
        tuple(gemms), (wide + narrow) * cells + wide * (sums + 2 * vocab * accumulator_width)
    )


def cost(plan: Plan, lengths: Sequence[int], size: HeadSize, accumulator_width: int) -> Cost:
    """Work of the policy in one call with gradients."""
    cu = [0, *accumulate(lengths)]
    slices = -(-size.vocab // plan.tile.vocab)
    width = size.vocab / slices
    total = Cost()

    def add(responses: Sequence[int], forwards: int, backwards: int) -> None:
        nonlocal total
        for rows, times in Counter(map(span_rows, plan.cuts(responses, cu))).items():
            tile = forward_cost(size, rows, width) * forwards
            if backwards:
                tile += backward_cost(size, rows, width, accumulator_width)
            total += tile * (times * slices)

    for responses in ([i for part in plan.streamed for i in part.responses], *plan.resident):
        add(responses, 1, 1)
    add(plan.recomputed, 2, 1)
    add(plan.unscored, 1, 0)
    folds = (
        sum(len(part.groups) - (k == 0) for k, part in enumerate(plan.streamed))
        if accumulator_width
        else 0
    )
    return total + Cost(traffic=3 * folds * size.vocab * accumulator_width * size.acc_bytes)
