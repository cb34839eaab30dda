"""The longest call in the memory: response tokens of a step, searched on a GPU, modelled on a CPU.

A GPU says when the memory is full, and goes on: calls of growing length are tried, and the cache is
given back before every call. A CPU without room swaps, or ends the process: the memory of a
contender is measured in two short calls, and continued as a line.

    bytes(N) = base + N * (extra + states)      states: hidden, ref_hidden, dL/dhidden, targets

A contender with a workspace for logits, or with tiles of at most so many rows, has a flatter line
behind a bend.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from una_fast.bench import attempts
from una_fast.bench.contenders import Contender, step
from una_fast.bench.inputs import Inputs
from una_fast.bench.machine import free_memory
from una_fast.bench.measuring import accumulator_bytes, cleaner, extra_bytes
from una_fast.head import passes

SLOPE_BYTES = 2 << 24  # of the float32 logits of the shorter call: workspaces are full
MOST_ROWS = 1 << 24  # of a search
TRIES = 24
TAIL_VOCAB = 64
CLOSE = 1.05  # the search ends when a length that fits is so near a length that does not


class Line(NamedTuple):
    """The memory of a contender as a line, with a bend from which logits are written over logits.

    base: bytes of a call without rows, beyond the heads: gradients, accumulators, workspace
    extra: bytes of a further row before the bend, beyond states
    states: bytes of a row's states, gradient and target
    bend: rows with logits at the same time; default: all rows
    tail: bytes of a further row behind the bend, beyond states
    """

    base: float
    extra: float
    states: int
    bend: int | None = None
    tail: float = 0.0

    def needed(self, rows: int) -> float:
        """Return the bytes of a call beyond heads and states."""
        before = rows if self.bend is None else min(rows, self.bend)
        return self.base + self.extra * before + self.tail * (rows - before)

    def longest(self, free: int) -> int:
        """Return the rows of so many bytes."""
        rows = (free - self.base) / (self.extra + self.states)
        if self.bend is not None and rows > self.bend:
            left = free - self.needed(self.bend) - self.states * self.bend
            rows = self.bend + left / (self.tail + self.states)
        return max(int(rows), 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let the fused head take a small workspace inside the block without a warning."""
    logger = logging.getLogger(passes.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def line_of(contender: Contender, x: Inputs) -> Line:
    """Measure the memory of a contender in two short calls on the device of x.

    Short calls have the heads of x. A contender with a workspace is measured with a small
    workspace, and the line holds the whole workspace. A contender with tiles is measured beyond a
    tile, too.
    """
    small = contender.small()
    shorter = max(SLOPE_BYTES // (4 * x.vocab * len(x.lengths)), 4)
    extra, base = _slope(small, x, shorter)
    if contender.fixed_bytes(x) is not None:
        base += contender.fixed_bytes(x) - small.fixed_bytes(x)
    heads = x.weight.numel() * x.weight.element_size() if x.trained else 0
    heads += accumulator_bytes(x)  # left out of the extra bytes
    states = 3 * x.dim * x.hidden.element_size() + x.targets.element_size()
    bend = contender.rows_at_once()
    if bend is None:
        return Line(base + heads, extra, states)
    # Behind the bend the vocabulary does not count: a small one shows the slope.
    kind = {"device": x.device.type, "dtype": x.hidden.dtype}
    narrow = Inputs((8,) * len(x.lengths), x.dim, TAIL_VOCAB, form=x.form, **kind)
    narrow.head("trained" if x.trained else "frozen")
    tail, _ = _slope(contender, narrow, bend)
    return Line(base + heads, extra, states, bend, tail)


def _slope(contender: Contender, x: Inputs, rows: int) -> tuple[float, float]:
    """Return bytes per row, and bytes without rows, from calls of `rows` and twice as many.

    contender: of the calls
    x: gives the heads, and rows to repeat
    rows: of a response
    """
    points = []
    with _quiet():
        for length in (rows, 2 * rows):
            part = x.of_length(length)
            points.append((part.rows, extra_bytes(contender, part)))
            part.clear()
    (n1, m1), (n2, m2) = points
    extra = max((m2 - m1) / (n2 - n1), 0.0)
    return extra, max(m2 - extra * n2, 0.0)


def search(contender: Contender, x: Inputs, seconds: float) -> dict[str, Any]:
    """Search the longest call of a contender on a GPU, from the length of x.

    contender: fits at the length of x
    x: gives the heads, and rows to repeat
    seconds: of the search

    Returns longest_rows and, after an early end of the search, longest_note.
    """
    responses = len(x.lengths)
    fits, full = max(x.lengths), None
    begin, note = time.perf_counter(), None
    for _ in range(TRIES):
        if full is not None and full <= fits * CLOSE:
            break
        if full is None and 2 * fits * responses > MOST_ROWS:
            note = "or longer"
            break
        if time.perf_counter() - begin > seconds:
            note = "at least: no time to search on"
            break
        rows = 2 * fits if full is None else (fits + full) // 2
        run = functools.partial(_try, contender, x, rows)
        attempts.release()
        _, reason = attempts.attempt(contender.name, run, cleaner(x), seconds)
        if reason == "out of memory":
            full = rows
        elif reason:
            note = f"at least: {reason}"
            break
        else:
            fits = rows
    found = {"longest_rows": fits * responses, "longest_kind": "searched"}
    return found if note is None else found | {"longest_note": note}


def _try(contender: Contender, x: Inputs, rows: int) -> None:
    """Run a step of `rows` rows per response; gradients are dropped."""
    part = x.of_length(rows)
    step(contender, part)
    attempts.release()  # waits for the step


def modelled(line: Line, x: Inputs) -> dict[str, Any]:
    """Return the longest call of a contender by a line, in the free memory."""
    return {"longest_rows": line.longest(free_memory(x.device)), "longest_kind": "modelled"}
