"""The bytes of a step over time, cut into pieces where the step goes from layer to layer.

A step of a deep model repeats a piece for every layer, so that a few layers tell about all:

    traced    forward [1][2][3][4][head]        backward [head][4][3][2][1]
    deep      forward [1][2][2][2][3][4][head]  backward [head][4][3][2][2][2][1]

Further copies of layer 2 are exact if the pieces of layers 2 and 3 are equal in every pass, event
by event: bytes, category, and where the storage dies: in which pass, and how many layers further.
Equal births and deaths alone would not do: a storage that lives for three layers leaves no trace in
the second layer. Storages of all layers may die together after a pass, as autocast's copies of
weights do: then so do those of the copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from una_fast.counters import LiveBytes

BETWEEN = "between"
EARLIER = "earlier "
"""Begins the names of the phases of an earlier micro-batch."""


@dataclass(frozen=True)
class Piece:
    """The events of a step from a moment to another."""

    phase: str
    """reference | forward | backward | between; of an earlier micro-batch with EARLIER before"""
    layer: int | None
    """Layer at work; None outside the layers. The embedding belongs to the first layer."""
    start: int
    """First event."""
    stop: int
    """First event of the next piece."""
    flop: float
    """Work of the piece."""
    sent: tuple[float, ...] = ()
    """Bytes that the rank sends to others, by collective."""


class Cuts:
    """A recorder of pieces, told by a running step where they end."""

    def __init__(
        self,
        live: LiveBytes,
        flop: Callable[[], float],
        sent: Callable[[], Sequence[float]] = tuple,
    ) -> None:
        """Begin at the present event.

        live: counts the storages of the step
        flop: returns the work so far
        sent: returns the bytes sent so far, by collective
        """
        self.pieces: list[Piece] = []
        self._live, self._flop, self._sent = live, flop, sent
        self._phase = BETWEEN
        self._prefix = ""
        self._start, self._before, self._sent_before = len(live.events), flop(), tuple(sent())

    def micro_batch(self, *, earlier: bool) -> None:
        """Begin a micro-batch of the step.

        earlier: another one follows
        """
        self._prefix = EARLIER if earlier else ""

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        self.cut(None, phase=self._prefix + BETWEEN)
        self._phase = self._prefix + phase

    def cut(self, layer: int | None, *, phase: str | None = None) -> None:
        """End a piece.

        layer: was at work; None: no layer
        phase: of the piece; default: the phase begun last
        """
        stop, flop = len(self._live.events), self._flop()
        work = flop - self._before
        so_far = tuple(self._sent())
        sent = tuple(now - before for now, before in zip(so_far, self._sent_before, strict=True))
        piece = Piece(phase or self._phase, layer, self._start, stop, work, sent)
        self.pieces.append(piece)
        self._start, self._before, self._sent_before = stop, flop, so_far


@dataclass(frozen=True)
class Timeline:
    """Births and deaths of storages in the order of a step."""

    changes: np.ndarray
    """[E] int64, bytes that an event adds."""
    owners: np.ndarray
    """[E] int64, category of the event's storage, a position in names."""
    names: list[str]
    """Categories of memory."""
    pieces: list[Piece]
    """Pieces of the step, without gaps."""

    def peak(self, without: Iterable[str], start: int, stop: int) -> dict[str, int]:
        """Return the bytes by category at the peak between two events.

        without: categories that do not count
        start, stop: events to look at
        """
        left_out = [number for number, name in enumerate(self.names) if name in set(without)]
        counted = np.where(np.isin(self.owners, left_out), 0, self.changes)
        held = np.concatenate([[0], np.cumsum(counted)])
        moment = start + int(np.argmax(held[start : stop + 1]))
        totals = np.zeros(len(self.names), dtype=np.int64)
        np.add.at(totals, self.owners[:moment], counted[:moment])
        held = zip(self.names, totals.tolist(), strict=True)
        return {name: size for name, size in held if size}

    def of_phase(self, phase: str) -> list[Piece]:
        """Return the pieces of a phase."""
        return [piece for piece in self.pieces if piece.phase == phase]

    @property
    def flop(self) -> float:
        """Return the work of the last micro-batch."""
        last = [piece for piece in self.pieces if not piece.phase.startswith(EARLIER)]
        return sum(piece.flop for piece in last)

    def sent(self, *, earlier: bool) -> list[float]:
        """Return the bytes sent by collective.

        earlier: in the earlier micro-batch of the trace, or else in the last one
        """
        pieces = [piece for piece in self.pieces if not piece.phase.endswith(BETWEEN)]
        rows = [p.sent for p in pieces if p.phase.startswith(EARLIER) == earlier]
        return [sum(column) for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class Trace(Timeline):
    """The timeline of a traced step."""

    others: np.ndarray
    """[E] int64, piece of the other event of the event's storage; -1 if the storage never dies."""


def trace_of(live: LiveBytes, pieces: list[Piece]) -> Trace:
    """Return the timeline of a traced step, up to the end of the last piece.

    live: counted the storages of the step
    pieces: of the step
    """
    events = np.array(live.events[: pieces[-1].stop], dtype=np.int64)
    serials = np.abs(events) - 1
    names = sorted(set(live.categories))
    number = {name: k for k, name in enumerate(names)}
    owners = np.array([number[name] for name in live.categories], dtype=np.int64)
    sizes = np.array(live.sizes, dtype=np.int64)
    stops = [piece.stop for piece in pieces]
    piece_of = np.searchsorted(stops, np.arange(len(events)), side="right")
    born = np.full(len(sizes), -1)
    born[serials[events > 0]] = piece_of[events > 0]
    died = np.full(len(sizes), -1)
    died[serials[events < 0]] = piece_of[events < 0]
    others = np.where(events > 0, died[serials], born[serials])
    changes = np.sign(events) * sizes[serials]
    return Trace(changes, owners[serials], names, pieces, others)


# --- more layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """The layers of a deep model, as copies of traced layers."""

    traced: int
    """Layers of the trace."""
    block: range
    """Layers to be copied."""
    times: int
    """Copies of the block."""

    @property
    def source(self) -> list[int]:
        """Return the traced layer of every layer of the deep model."""
        copied = list(self.block) * self.times
        return [*range(self.block.stop), *copied, *range(self.block.stop, self.traced)]


def find_copies(trace: Trace, period: int, total: int) -> Copies | None:
    """Return the layers to copy for a deep model; None if pieces of equal layers differ.

    trace: of a model with some periods of layers less than the deep model
    period: layers until the kinds of layers repeat
    total: layers of the deep model
    """
    passes = _layered(trace.pieces)
    if not passes:
        return None
    traced = len(passes[0])
    keys = _keys(trace)
    for first in range(traced - 2 * period + 1):
        copies = Copies(traced, range(first, first + period), (total - traced) // period)
        equal = all(_is_repeated(keys, found, copies.block) for found in passes)
        if equal and _is_balanced(trace, passes, copies.block) and _die_together(trace, copies):
            return copies
    return None


def _layered(pieces: list[Piece]) -> list[list[int]]:
    """Return the passes over the layers: layer -> position of the layer's piece.

    Empty where a pass has not one piece for every layer.
    """
    passes: dict[str, dict[int, int]] = {}
    layered = 0
    for position, piece in enumerate(pieces):
        if piece.layer is not None:
            layered += 1
            passes.setdefault(piece.phase, {})[piece.layer] = position
    found = [list(dict(sorted(by_layer.items())).values()) for by_layer in passes.values()]
    most = max(map(len, found), default=0)
    complete = layered == most * len(found)
    return found if complete else []


def _keys(trace: Trace) -> list[tuple | None]:
    """Return what must be equal in pieces of equal layers; None for pieces that none repeats.

    Of every event: the bytes, the category, and the place of the storage's other event. The place
    is a pass and a number of layers further, or a piece outside the layers. A storage that a layer
    frees and none made is one of as many as there are layers: none repeats the piece.
    """
    outside = np.array([piece.layer is None for piece in trace.pieces])
    layers = np.array([-1 if piece.layer is None else piece.layer for piece in trace.pieces])
    phases = sorted({piece.phase for piece in trace.pieces})
    passes = np.array([phases.index(piece.phase) for piece in trace.pieces])
    keys: list[tuple | None] = []
    for piece in trace.pieces:
        rows = slice(piece.start, piece.stop)
        changes, others = trace.changes[rows], trace.others[rows]
        is_outside = outside[others]
        given = (changes < 0) & is_outside
        if piece.layer is None or given.any():
            keys.append(None)
            continue
        place = np.where(is_outside, others, layers[others] - piece.layer)
        place = np.where(others < 0, 0, place)
        kind = np.where(is_outside, -2, passes[others])
        kind = np.where(others < 0, -1, kind)
        table = np.stack([changes, trace.owners[rows], kind, place])
        keys.append((piece.flop, piece.sent, table.tobytes()))
    return keys


def _is_repeated(keys: list[tuple | None], layers: list[int], block: range) -> bool:
    """Return whether the pieces of a block of layers equal the pieces of the next block.

    keys: of all pieces
    layers: layer -> position of the layer's piece, in a pass
    block: layers of the block
    """
    for layer in block:
        key = keys[layers[layer]]
        if key is None or key != keys[layers[layer + len(block)]]:
            return False
    return True


def _is_balanced(trace: Trace, passes: list[list[int]], block: range) -> bool:
    """Return whether a block frees as much of other layers as other layers free of the block.

    trace: of the step
    passes: of each pass, layer -> position of the layer's piece
    block: layers of the block

    The first layers of a model free nothing of the layers before, because there are none.
    """
    place = {}
    for number, found in enumerate(passes):
        place |= {position: (number, layer) for layer, position in enumerate(found)}
    left: Counter[tuple[int, ...]] = Counter()
    for number, found in enumerate(passes):
        for layer in block:
            piece = trace.pieces[found[layer]]
            for event in range(piece.start, piece.stop):
                other = place.get(int(trace.others[event]))
                if other is None:
                    continue
                size, owner = int(trace.changes[event]), int(trace.owners[event])
                further = other[1] - layer
                if size > 0:
                    left[owner, size, number, other[0], further] += 1
                else:
                    left[owner, -size, other[0], number, -further] -= 1
    return not any(left.values())


def _deaths_outside(trace: Trace, piece: Piece, layers: range) -> np.ndarray:
    """Return [e] bool, the events of a piece that free storages of some layers."""
    rows = slice(piece.start, piece.stop)
    made_by = np.array([-1 if p.layer is None else p.layer for p in trace.pieces])
    made_by = made_by[trace.others[rows]]
    return (trace.changes[rows] < 0) & np.isin(made_by, list(layers))


def _sizes_freed(trace: Trace, piece: Piece, layers: range) -> Counter[int]:
    """Return the bytes of the storages of some layers that a piece outside the layers frees."""
    changes = trace.changes[piece.start : piece.stop]
    return Counter(changes[_deaths_outside(trace, piece, layers)].tolist())


def _die_together(trace: Trace, copies: Copies) -> bool:
    """Return whether storages that outlive their pass over the layers are freed at once.

    Nothing is born between the deaths, so that the order of the deaths has no part in any peak. All
    layers before the block must keep as much: else the last layers alone do, for they are the last.
    """
    start, period = copies.block.start, len(copies.block)
    before = [range(k, k + period) for k in range(start % period, start, period)]
    both = range(copies.block.start, copies.block.stop + len(copies.block))
    for piece in trace.pieces:
        if piece.layer is not None:
            continue
        kept = _sizes_freed(trace, piece, copies.block)
        if any(kept - _sizes_freed(trace, piece, layers) for layers in before):
            return False
        freed = np.flatnonzero(_deaths_outside(trace, piece, both))
        if len(freed):
            first, last = piece.start + freed[0], piece.start + freed[-1]
            if (trace.changes[first:last] > 0).any():
                return False
    return True


def deepened(trace: Trace, copies: Copies) -> Timeline:
    """Return the timeline of a deep model.

    trace: of the shallow model
    copies: layers to copy
    """
    ordered: list[Piece] = []
    group: list[Piece] = []
    for piece in trace.pieces:
        if piece.layer is None:
            ordered += [*_repeated(group, copies.source), piece]
            group = []
        else:
            group.append(piece)
    ordered += _repeated(group, copies.source)
    moved, events = [], []
    start = 0
    for piece in ordered:
        rows = np.arange(piece.start, piece.stop)
        if piece.layer is None:
            freed = _deaths_outside(trace, piece, copies.block)
            rows = np.repeat(rows, 1 + copies.times * freed)
        moved.append(replace(piece, start=start, stop=start + len(rows)))
        events.append(rows)
        start += len(rows)
    order = np.concatenate(events)
    return Timeline(trace.changes[order], trace.owners[order], trace.names, moved)


def _repeated(group: list[Piece], source: list[int]) -> list[Piece]:
    """Return the pieces of all layers of a pass, from the pieces of the traced layers."""
    if not group:
        return []
    by_layer = {piece.layer: piece for piece in group}
    pieces = [replace(by_layer[k], layer=layer) for layer, k in enumerate(source)]
    return pieces if group[0].layer == 0 else pieces[::-1]
