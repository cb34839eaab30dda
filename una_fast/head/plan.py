"""The block plan of the fused head: the order of rows in a call, decided before any GEMM runs.

The gradient of the loss is dL/dlogp_t = c_i for every token t of response i, and c_i is known only
once every response of the *component* (the responses linked to i by units) is summed. Per component
the plan picks the cheapest way within the budget; a GEMM pass is 2 N D V flop:

    resident     the component fits in a chunk: all logits are in memory when c_i becomes known
                                                                                        3 passes
    direct       resident, and the only chunk of the call: the gradient of a bfloat16 weight is
                 written once, in its own dtype, where other ways need an accumulator in float32
                 beside it. What is saved may hold logits instead                       3 passes
    streamed     gradients are built without c_i and multiplied by c_i at the end. A component that
                 depends on one number (one response, or one pair) needs one accumulator, any other
                 component one per response. The first streamed component uses the weight gradient
                 itself; later ones need scratch                                        3 passes
    recomputed   log-probs first, then the logits again with c_i known                  4 passes

With a frozen head nothing is accumulated across rows: everything streams, each row scaled last, in
2 passes.

Where the ranks of a group hold a part of every response each, all coefficients become known at
once, when the sums of the call have crossed the group: all scored responses with rows on this rank
are one component. Ranks may go different ways.

Every chunk of a trained head reads and writes the [V, D] gradient. When the budget holds few rows
of logits, tiles of many rows and a slice of the vocabulary do better although they recompute: the
logsumexp of a row needs all slices. Such a plan is *sliced*: by decision of the cost model, or for
a budget below a row of logits.

Cost model (`cost`): a GEMM takes the longer of flop and operand bytes; bytes written by GEMMs, and
bytes read and written by row operations, come on top. Rates are the rates of a `Machine`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from numbers import Real

from una_fast.feedback import PAIR, Feedback

DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 2048}
CAST_SHARE = 8  # one byte in 8 of the workspace is for slices of a weight that GEMMs need cast
# Rows of float32 logits at once, where the gradient that replaces them is narrower and has a buffer
# of its own: a product of so many rows still takes longer than reading the weight.
LOGIT_ROWS = 256
CLEARLY = 0.97  # of the modelled time: what another kernel must save to be taken
FEW_ROWS = 1024  # below so many rows per chunk, rereading weight and gradient shows in the time

Span = tuple[int, int]  # rows [start, stop)


# --- bytes and sizes ------------------------------------------------------------------------------


def workspace_bytes(device: str, workspace_mb: float | None) -> int:
    """Return the bytes of the workspace: of a setting in MiB, or the default of a kind of device.

    ValueError unless the setting is a positive and finite number.
    """
    if workspace_mb is None:
        workspace_mb = DEFAULT_WORKSPACE_MB.get(device, DEFAULT_WORKSPACE_MB["cuda"])
    if not isinstance(workspace_mb, Real) or not 0 < workspace_mb < math.inf:
        raise ValueError(f"workspace_mb={workspace_mb!r} must be positive and finite, in MiB")
    return int(workspace_mb * 2**20)


def cast_bytes(workspace: int) -> int:
    """Return the bytes set aside for slices of a weight in the dtype of the accumulator."""
    return workspace // CAST_SHARE


def tile_budget(workspace: int, *, cast: bool) -> int:
    """Return the bytes left for tiles of logits, less slices of a weight if operands are cast."""
    return workspace - (cast_bytes(workspace) if cast else 0)


@dataclass(frozen=True)
class Machine:
    """Rates of the cost model: flop/s of a large GEMM, bytes/s of memory."""

    flops: float
    bytes: float


# Between an H100 and an H200; the choices below depend on the quotient alone.
HOPPER = Machine(700e12, 4e12)
# Of the Triton engine:
GPU_ALIGN = 64  # 16-byte loads of any row, and of the narrower gradient over it, whatever V is
GPU_QUANTUM = 128  # rows of a GEMM tile


@dataclass(frozen=True)
class HeadSize:
    """Sizes of a head and of its engine: the inputs of a plan.

    vocab: V
    hidden: D
    acc_bytes: bytes of a logit, and of a number of an accumulator
    operand_bytes: bytes of a number read by a GEMM
    cast: hidden states are copied to the accumulator dtype first
    align: the logits of a row are padded to a multiple of `align`
    quantum: chunks of more than `quantum` rows are multiples of `quantum`
    machine: rates of the device; None: unknown, and the vocabulary is sliced only if a row of
        logits does not fit
    leaf_bytes: bytes of a number of the weight's gradient, as the caller gets it; None: acc_bytes
    """

    vocab: int
    hidden: int
    acc_bytes: int = 4
    operand_bytes: int = 4
    cast: bool = False
    align: int = 1
    quantum: int = 1
    machine: Machine | None = None
    leaf_bytes: int | None = None

    def stride(self, vocab: int) -> int:
        """Return the logits per row of a buffer for `vocab` logits."""
        return -(-vocab // self.align) * self.align

    def copied_bytes(self, gathered: bool, sliced: bool, trained: bool) -> int:
        """Return the bytes per row of copies of the hidden state and of the hidden gradient.

        gathered: the rows of a chunk come from several places
        sliced: the gradient of a row is summed over slices of the vocabulary
        trained: the rows of a trained head are multiplied by factors, on both sides

        Sums and products are rounded once: they are in the accumulator dtype.
        """
        if self.cast:
            return self.hidden * 2 * self.acc_bytes
        scaled = trained and not sliced
        copied = 0
        if gathered or ((sliced or scaled) and self.operand_bytes < self.acc_bytes):
            copied += self.acc_bytes
        copied += self.operand_bytes * (gathered + scaled)
        return self.hidden * copied

    def row_bytes(self, gathered: bool, trained: bool) -> int:
        """Return the bytes of a row of a chunk over the whole vocabulary."""
        copied = self.copied_bytes(gathered, sliced=False, trained=trained)
        return self.stride(self.vocab) * self.acc_bytes + copied

    @property
    def accumulator_excess(self) -> int:
        """Return the bytes of a [V, D] accumulator beyond the bytes of the returned gradient."""
        leaf = self.acc_bytes if self.leaf_bytes is None else self.leaf_bytes
        return self.vocab * self.hidden * (self.acc_bytes - leaf)


def head_size(
    vocab: int, hidden: int, device: str, operand_bytes: int, leaf_bytes: int | None = None
) -> HeadSize:
    """Return the size of a head on a kind of device.

    device: "cuda" (the Triton engine) or "cpu"
    operand_bytes: bytes of a number of the weight
    leaf_bytes: as of HeadSize
    """
    if device == "cpu":
        return HeadSize(vocab, hidden, cast=operand_bytes < 4, leaf_bytes=leaf_bytes)
    return HeadSize(
        vocab,
        hidden,
        operand_bytes=operand_bytes,
        align=GPU_ALIGN,
        quantum=GPU_QUANTUM,
        machine=HOPPER,
        leaf_bytes=leaf_bytes,
    )


# --- components -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Responses with a common unknown scalar: c_i = scalar * factor_i."""

    responses: tuple[int, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Component:
    """Responses linked by units, in order, and the groups of equal scalar."""

    responses: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def gaps(self) -> bool:
        """Whether other responses stand between the responses of the component."""
        return self.responses[-1] - self.responses[0] >= len(self.responses)


def components(
    feedback: Feedback, lengths: Sequence[int], length_normalize: bool
) -> list[Component]:
    """Split the scored responses of a call into components.

    feedback: units over the responses
    lengths: tokens of every response
    length_normalize: log-ratios are means over tokens
    """
    pairs, alone = _links(feedback)
    root: dict[int, int] = {}
    for i in alone:
        _find(root, i)
    for first, second in pairs:
        low, high = sorted((_find(root, first), _find(root, second)))
        root[high] = low
    members: dict[int, list[int]] = {}
    for i in sorted(root):
        members.setdefault(_find(root, i), []).append(i)
    scored_alone = {_find(root, i) for i in alone}

    found = []
    for key, responses in members.items():
        if len(responses) == 2 and key not in scored_alone:
            groups = (_pair_group(responses, lengths, length_normalize),)
        else:
            groups = tuple(Group((i,), (1.0,)) for i in responses)
        found.append(Component(tuple(responses), groups))
    return found


def _links(feedback: Feedback) -> tuple[list[tuple[int, int]], set[int]]:
    """Return the pairs of responses, and the responses with a unit of a single response."""
    columns = (feedback.kind.tolist(), feedback.first.tolist(), feedback.second.tolist())
    pairs, alone = [], set()
    for kind, first, second in zip(*columns, strict=True):
        if kind == PAIR:
            pairs.append((first, second))
        else:
            alone.add(first)
    return pairs, alone


def _find(root: dict[int, int], i: int) -> int:
    """Return the representative of i in a union-find forest, with path halving."""
    root.setdefault(i, i)
    while root[i] != i:
        root[i] = root[root[i]]
        i = root[i]
    return i


def _pair_group(responses: Sequence[int], lengths: Sequence[int], length_normalize: bool) -> Group:
    """Return the group of two responses linked by pairs alone: opposite signs, one scalar."""
    first, second = responses
    if not length_normalize:
        return Group((first, second), (1.0, -1.0))
    return Group((first, second), (1.0 / lengths[first], -1.0 / lengths[second]))


def as_one(linked: Sequence[Component], lengths: Sequence[int]) -> list[Component]:
    """Join components to one, for coefficients that become known together.

    linked: components of a call
    lengths: tokens of every response on this rank

    Responses without rows on this rank are left out; without any rows there is no component.
    """
    groups = []
    for group in chain.from_iterable(component.groups for component in linked):
        here = [k for k, i in enumerate(group.responses) if lengths[i]]
        if here:
            responses = tuple(group.responses[k] for k in here)
            groups.append(Group(responses, tuple(group.factors[k] for k in here)))
    responses = sorted(chain.from_iterable(group.responses for group in groups))
    return [Component(tuple(responses), tuple(groups))] if groups else []


def tokens_of(component: Component, lengths: Sequence[int]) -> int:
    """Return the tokens of all responses of a component."""
    return sum(lengths[i] for i in component.responses)


# --- tiles and chunks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """The numbers of a chunk in memory at once: `rows` x `vocab`.

    vocab: less than V: a sliced plan
    logit_rows: rows of logits at once; their gradients, `rows` of them, have a buffer of their own.
        None: all rows, and gradients lie over the logits
    """

    rows: int
    vocab: int
    logit_rows: int | None = None

    def logit_bytes(self, size: HeadSize) -> int:
        """Return the bytes of the buffer of logits."""
        rows = self.rows if self.logit_rows is None else self.logit_rows
        return rows * size.stride(self.vocab) * size.acc_bytes

    def gradient_bytes(self, size: HeadSize) -> int:
        """Return the bytes of the buffer of gradients beside the logits."""
        if self.logit_rows is None:
            return 0
        return self.rows * size.stride(self.vocab) * size.operand_bytes


def fit_tile(
    size: HeadSize,
    rows: int,
    budget: int,
    gathered: bool,
    *,
    gradients: bool = False,
    trained: bool = False,
) -> Tile:
    """Return the largest tile for a number of rows: whole rows, or a slice.

    size: of the head
    rows: of the call
    budget: bytes
    gathered: the rows of a chunk come from several places
    gradients: gradients replace the logits
    trained: of the weight or the bias, too
    """
    whole = budget // size.row_bytes(gathered, trained)
    logit_rows = None
    if gradients and size.operand_bytes < size.acc_bytes and rows > LOGIT_ROWS:
        copied = size.copied_bytes(gathered, sliced=False, trained=trained)
        stride = size.stride(size.vocab)
        left = budget - LOGIT_ROWS * stride * size.acc_bytes
        beside = left // (stride * size.operand_bytes + copied)
        if beside > max(whole, LOGIT_ROWS):
            whole, logit_rows = beside, LOGIT_ROWS
    if whole < 1:
        return sliced_tile(size, rows, budget, gathered)
    if rows > whole > size.quantum:
        whole -= whole % size.quantum
    return Tile(min(whole, max(rows, 1)), size.vocab, logit_rows)


def sliced_tile(size: HeadSize, rows: int, budget: int, gathered: bool) -> Tile:
    """Return a tile about as wide as high.

    Sums over rows and sums over slices are then read and written equally often.
    """
    # Where the copies of one row alone would take more than a quarter, so small a budget is
    # exceeded.
    copied = min(size.copied_bytes(gathered, sliced=True, trained=False), budget // 4)
    logit = size.acc_bytes
    side = (math.isqrt(copied * copied + 4 * logit * budget) - copied) // (2 * logit)
    if side > size.quantum:
        side -= side % size.quantum
    height = min(max(side, 1), max(rows, 1))
    width = max((budget // height - copied) // logit, 1)
    if width > size.align:
        width -= width % size.align
    return Tile(height, min(width, size.vocab))


def chunks(
    responses: Sequence[int], cu: Sequence[int], rows: int, quantum: int = 1
) -> Iterator[list[Span]]:
    """Cut the rows of responses into the fewest chunks, of about equal size.

    Neighbouring spans are joined.

    responses: indices into cu
    cu: row offsets of all responses
    rows: rows of a chunk, at most
    quantum: chunks are multiples of `quantum` if they fit
    """
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
            end = min(stop, start + room)
            room -= end - start
            if chunk and chunk[-1][1] == start:
                start = chunk.pop()[0]
            chunk.append((start, end))
            start = end
            if room == 0:
                yield chunk
                chunk, room = [], rows
    if chunk:
        yield chunk


def pieces_of(rows: int, tile: Tile) -> list[int]:
    """Return the rows of every product that makes the logits of a chunk."""
    step = rows if tile.logit_rows is None else tile.logit_rows
    return [min(step, rows - start) for start in range(0, rows, step)]


def span_rows(spans: Sequence[Span]) -> int:
    """Return the number of rows in spans."""
    return sum(stop - start for start, stop in spans)


# --- a pass without gradients ---------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardPlan:
    """A pass over contiguous rows: tile, rows of every chunk.

    kept: the last chunk, with logits that may stay in the buffer for a later gradient; None where
        slices follow each other in the buffer, and without rows
    """

    tile: Tile
    cuts: tuple[Span, ...]
    kept: Span | None = None

    @property
    def backward_cuts(self) -> tuple[Span, ...]:
        """The chunks in the order of their gradients: the logits in the buffer come first."""
        return self.cuts[-1:] + self.cuts[:-1]


def kept_cuts(rows: int, tile: Tile, quantum: int = 1) -> tuple[Span, ...]:
    """Cut contiguous rows into chunks, the last as large as the tile: its logits may be kept."""
    before = max(rows - tile.rows, 0)
    spans = chain.from_iterable(chunks([0], [0, before], tile.rows, quantum))
    return (*spans, (before, rows))


def forward_plan(size: HeadSize, rows: int, budget: int) -> ForwardPlan:
    """Plan a pass without gradients: whole rows of logits, or cheaper slices.

    size: of the head
    rows: contiguous rows
    budget: bytes for tiles
    """
    tile = fit_tile(size, rows, budget, gathered=False)
    if size.machine is not None and tile.rows < rows:
        # No pass is lost to slices without gradients.
        sliced = sliced_tile(size, rows, budget, gathered=False)
        seconds = [forward_pass(size, rows, each).seconds(size.machine) for each in (tile, sliced)]
        tile = sliced if seconds[1] < CLEARLY * seconds[0] else tile
    cuts = chunks([0], [0, rows], tile.rows, size.quantum)
    return ForwardPlan(tile, tuple(chain.from_iterable(cuts)))


def kept_plan(size: HeadSize, rows: int, budget: int, accumulator_width: int) -> ForwardPlan:
    """Plan log-probs of rows, and their gradients for any upstream: later, chunk by chunk.

    The last chunk is as large as the budget allows, and keeps its logits in the buffer until
    backward: 3 passes. Chunks before share the buffer, and are computed again: 4 passes, as are
    all rows in slices of the vocabulary.

    size: of the head
    rows: contiguous rows
    budget: bytes for tiles
    accumulator_width: as in make_plan
    """
    whole = fit_tile(size, rows, budget, gathered=False)
    if whole.vocab < size.vocab or not rows:
        return forward_plan(size, rows, budget)
    spans = kept_cuts(rows, whole, size.quantum)
    plan = ForwardPlan(whole, spans, kept=spans[-1])
    if size.machine is None or len(spans) == 1:
        return plan
    sliced = sliced_tile(size, rows, budget, gathered=False)
    cuts = chain.from_iterable(chunks([0], [0, rows], sliced.rows, size.quantum))
    other = ForwardPlan(sliced, tuple(cuts))
    work = [_kept_cost(each, size, accumulator_width) for each in (plan, other)]
    seconds = [each.seconds(size.machine) for each in work]
    return other if seconds[1] < CLEARLY * seconds[0] else plan


def holds_both(size: HeadSize, rows: int, budget: int) -> bool:
    """Return whether one chunk holds copies of `rows` rows of policy and reference each."""
    return 2 * rows <= fit_tile(size, 2 * rows, budget, gathered=True).rows


# --- a call with gradients ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The order is: unscored responses, streamed components, resident blocks, recomputed responses.

    tile: logits in memory at once
    streamed: components with gradients scaled last
    resident: responses of every block of whole components
    recomputed: responses with logits computed twice
    unscored: responses without a unit
    quantum: see HeadSize
    gathered: the rows of a chunk may come from several places
    scratch: [V, D] accumulators needed beside the weight gradient
    direct: the gradient of the weight is written once, in the dtype of the leaf
    """

    tile: Tile
    streamed: tuple[Component, ...] = ()
    resident: tuple[tuple[int, ...], ...] = ()
    recomputed: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()
    quantum: int = 1
    gathered: bool = False
    scratch: int = 0
    direct: bool = False

    def streamed_responses(self) -> list[int]:
        """Return the responses of all streamed components."""
        return list(chain.from_iterable(c.responses for c in self.streamed))

    def cuts(self, responses: Sequence[int], cu: Sequence[int]) -> list[list[Span]]:
        """Return the rows of responses, chunk by chunk."""
        return list(chunks(responses, cu, self.tile.rows, self.quantum))


def accumulators(streamed: Sequence[Component]) -> list[int]:
    """Return the [V, D] accumulators of every streamed component beside the gradient."""
    return [len(component.groups) - (k == 0) for k, component in enumerate(streamed)]


def make_plan(
    feedback: Feedback,
    lengths: Sequence[int],
    size: HeadSize,
    *,
    budget: int,
    accumulator_width: int,
    length_normalize: bool,
    whole_lengths: Sequence[int] | None = None,
) -> Plan:
    """Plan a call with gradients.

    feedback: units over the responses
    lengths: tokens of every response
    size: of the head
    budget: bytes for tiles and scratch
    accumulator_width: numbers per vocabulary entry in an accumulator of the head's gradients:
        D for the weight, 1 for the bias alone, 0 for a frozen head
    length_normalize: log-ratios are means over tokens
    whole_lengths: tokens of every response on all ranks of a group; None: `lengths` are all
    """
    rows = sum(lengths)
    if whole_lengths is None:
        linked = components(feedback, lengths, length_normalize)
    else:
        linked = as_one(components(feedback, whole_lengths, length_normalize), lengths)
    scored = sorted(chain.from_iterable(c.responses for c in linked))
    others = sorted(set(range(len(lengths))) - set(scored))
    unscored = tuple(i for i in others if lengths[i])
    gathered = bool(unscored) or any(component.gaps for component in linked)
    trained = accumulator_width > 0
    wanted = {"gradients": True, "trained": trained}
    tile = fit_tile(size, rows, budget, gathered, **wanted)
    long = any(tokens_of(component, lengths) > tile.rows for component in linked)
    if not gathered and len(linked) > 1 and long:
        gathered = True  # the rows left over for resident blocks may have gaps
        tile = fit_tile(size, rows, budget, gathered, **wanted)
    common = {"unscored": unscored, "quantum": size.quantum, "gathered": gathered}
    candidates: list[Plan] = []
    if accumulator_width >= size.hidden and scored and size.accumulator_excess:
        # What the accumulator would take holds logits.
        large = fit_tile(size, rows, budget + size.accumulator_excess, gathered, **wanted)
        if large.vocab == size.vocab and large.rows >= sum(lengths[i] for i in scored):
            candidates.append(Plan(large, resident=(tuple(scored),), direct=True, **common))
    if tile.vocab == size.vocab and trained:
        accumulator = size.vocab * accumulator_width * size.acc_bytes
        empty = Plan(tile, **common)
        candidates.append(_trained_plan(linked, lengths, size, empty, budget, accumulator))
    elif tile.vocab == size.vocab:
        groups = tuple(Group((i,), (1.0,)) for i in scored)
        streamed = (Component(tuple(scored), groups),) if scored else ()
        candidates.append(Plan(tile, streamed, **common))
    if not candidates or tile.rows < rows or tile.vocab < size.vocab:
        sliced = sliced_tile(size, rows, budget, gathered)
        candidates.append(Plan(sliced, recomputed=tuple(scored), **common))
    if size.machine is None:
        return candidates[0]
    machine = size.machine

    def seconds(plan: Plan) -> float:
        modelled = cost(plan, lengths, size, accumulator_width).seconds(machine)
        return modelled if plan.tile.vocab == size.vocab else modelled / CLEARLY

    return min(candidates, key=seconds)


def _trained_plan(
    linked: Sequence[Component],
    lengths: Sequence[int],
    size: HeadSize,
    empty: Plan,
    budget: int,
    accumulator: int,
) -> Plan:
    """Return the plan of a trained head with tiles over the whole vocabulary.

    empty: the plan without the scored responses
    accumulator: bytes of an accumulator of the head's gradients
    """
    # Scratch may take half of the budget, and must leave room for one row of logits.
    room = min(budget // 2, budget - size.row_bytes(empty.gathered, trained=True))
    streamed: list[Component] = []
    recomputed: list[int] = []
    long = [c for c in linked if tokens_of(c, lengths) > empty.tile.rows]
    for component in sorted(long, key=lambda c: len(c.groups)):
        # The first streamed component builds one of its groups in the gradient itself.
        needed = len(component.groups) - (not streamed)
        if needed * accumulator <= room:
            streamed.append(component)
        else:
            recomputed.extend(component.responses)
    tile = empty.tile
    scratch = max(accumulators(streamed), default=0)
    if scratch:
        left = budget - scratch * accumulator
        tile = fit_tile(size, sum(lengths), left, empty.gathered, gradients=True, trained=True)
    short = [c for c in linked if c not in long]
    # Scratch took the room in which these would have been resident.
    crowded = [c for c in short if tokens_of(c, lengths) > tile.rows]
    recomputed.extend(chain.from_iterable(c.responses for c in crowded))
    resident = [c for c in short if c not in crowded]
    return Plan(
        tile,
        tuple(streamed),
        _resident_blocks(resident, lengths, tile.rows),
        tuple(sorted(recomputed)),
        empty.unscored,
        empty.quantum,
        empty.gathered,
        scratch,
    )


def _resident_blocks(
    fitting: Sequence[Component], lengths: Sequence[int], rows: int
) -> tuple[tuple[int, ...], ...]:
    """Fill blocks of at most `rows` rows with whole components, in order."""
    blocks: list[list[int]] = []
    room = 0
    for component in fitting:
        tokens = tokens_of(component, lengths)
        if not blocks or tokens > room:
            blocks.append([])
            room = rows
        blocks[-1].extend(component.responses)
        room -= tokens
    return tuple(tuple(sorted(block)) for block in blocks)


# --- cost model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Work of a call.

    gemms: (flop, operand bytes) of every GEMM; a GEMM takes the longer of both times
    traffic: bytes on top, read and written by row operations, and written or accumulated by GEMMs
    """

    gemms: tuple[tuple[float, float], ...] = ()
    traffic: float = 0.0

    @property
    def flop(self) -> float:
        """Flop of all GEMMs."""
        return sum(flop for flop, _ in self.gemms)

    def seconds(self, machine: Machine) -> float:
        """Return the modelled time on a machine."""
        products = 0.0
        for flop, operands in self.gemms:
            products += max(flop / machine.flops, operands / machine.bytes)
        return products + self.traffic / machine.bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gemms + other.gemms, self.traffic + other.traffic)

    def __mul__(self, times: float) -> Cost:
        gemms = tuple((times * flop, times * operands) for flop, operands in self.gemms)
        return Cost(gemms, times * self.traffic)


def forward_cost(size: HeadSize, rows: float, vocab: float) -> Cost:
    """Return the cost of the logits of a tile, written and read once."""
    flop = 2 * rows * vocab * size.hidden
    operands = size.operand_bytes * size.hidden * (rows + vocab)
    return Cost(((flop, operands),), 2 * size.acc_bytes * rows * vocab)


def forward_pass(size: HeadSize, rows: int, tile: Tile) -> Cost:
    """Return the cost of a pass over `rows` rows without gradients."""
    if not rows:
        return Cost()
    slices = -(-size.vocab // tile.vocab)
    heights = Counter(map(span_rows, chunks([0], [0, rows], tile.rows, size.quantum)))
    total = Cost()
    for height, times in heights.items():
        total += forward_cost(size, height, size.vocab / slices) * (slices * times)
    return total


def backward_cost(size: HeadSize, rows: float, vocab: float, accumulator_width: int) -> Cost:
    """Return the cost of the gradients of a tile: du written, dH, and the product of dW.

    The logits were read when their log-probs were taken; see `head_gradient_bytes` for dW.
    """
    narrow, wide, dim = size.operand_bytes, size.acc_bytes, size.hidden
    flop = 2 * rows * vocab * dim
    cells = rows * vocab
    gemms = [(flop, narrow * (cells + vocab * dim))]
    traffic = narrow * cells + 2 * wide * rows * dim
    if accumulator_width >= dim:
        gemms.append((flop, narrow * (cells + rows * dim)))
        traffic += 2 * narrow * rows * dim  # hidden rows times their factors
    return Cost(tuple(gemms), traffic)


def _kept_cost(plan: ForwardPlan, size: HeadSize, accumulator_width: int) -> Cost:
    """Return the work of a `kept_plan`, gradients included."""
    slices = -(-size.vocab // plan.tile.vocab)
    width = size.vocab / slices
    total = Cost()
    for span in plan.cuts:
        rows = span_rows([span])
        forwards = 1 if span == plan.kept else 2
        tile = forward_cost(size, rows, width) * forwards
        total += (tile + backward_cost(size, rows, width, accumulator_width)) * slices
    accumulated = 2 * len(plan.cuts) * size.vocab * accumulator_width * size.acc_bytes
    return total + Cost(traffic=accumulated)


def head_gradient_bytes(plan: Plan, adds: int, size: HeadSize, accumulator_width: int) -> float:
    """Return the bytes that the gradients of weight and bias move, the last scaling included.

    plan: of the call
    adds: chunks that add to the gradients
    size: of the head
    accumulator_width: see make_plan
    """
    if not adds:
        return 0.0
    cells = size.vocab * accumulator_width
    leaf = size.acc_bytes if size.leaf_bytes is None else size.leaf_bytes
    if plan.direct:
        return 3.0 * leaf * cells  # written, scaled
    folds = sum(accumulators(plan.streamed))
    # The first chunk of every accumulator writes it; a fold reads two and writes one.
    accumulated = 2 * adds - 1 - folds + 3 * folds
    return cells * (size.acc_bytes * (accumulated + 1) + leaf)


def cost(plan: Plan, lengths: Sequence[int], size: HeadSize, accumulator_width: int) -> Cost:
    """Return the work of the policy in a call with gradients.

    plan: of the call
    lengths: tokens of every response
    size: of the head
    accumulator_width: see make_plan
    """
    cu = [0, *accumulate(lengths)]
    slices = -(-size.vocab // plan.tile.vocab)
    width = size.vocab / slices
    # (responses, forward passes, backward passes)
    ways = [(plan.streamed_responses(), 1, 1)]
    ways += [(block, 1, 1) for block in plan.resident]
    ways += [(plan.recomputed, 2, 1), (plan.unscored, 1, 0)]
    total = Cost()
    adds = 0
    for responses, forwards, backwards in ways:
        for rows, times in Counter(map(span_rows, plan.cuts(responses, cu))).items():
            tile = Cost()
            for piece, pieces in Counter(pieces_of(rows, plan.tile)).items():
                tile += forward_cost(size, piece, width) * (forwards * pieces)
            if backwards:
                tile += backward_cost(size, rows, width, accumulator_width)
                adds += times
            total += tile * (times * slices)
    return total + Cost(traffic=head_gradient_bytes(plan, adds, size, accumulator_width))
