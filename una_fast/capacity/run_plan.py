"""The plan of a run's memory, as text for a terminal and as plain values for a page."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from una_fast.capacity.fit import (
    batch_in_words,
    capacity,
    longest_row,
    row_in_words,
    row_of,
    savings,
    switch_in_words,
    usable,
)
from una_fast.capacity.trace import StepMemory, StepTracer
from una_fast.data.examples import Example
from una_fast.printable import bytes_in_words

COLUMNS = 100  # of a line
WIDTH = 40  # columns of the bar of the peak
WHOLE = "\N{FULL BLOCK}"
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class RunPlan:
    """The planned step of the largest batch of a run.

    model: name and size of the model
    decisions: (name, decision) of the run
    batch: the batch in words
    step: memory by category
    room: bytes to fill; None for an unknown device
    longest: the longest fitting row in words; None without a search
    switches: (settings to change, bytes less at the peak), largest saving first
    measured: bytes of the measured peak; None without a measurement
    """

    model: str
    decisions: list[tuple[str, str]]
    batch: str
    step: StepMemory
    room: int | None
    longest: str | None
    switches: list[tuple[str, int]]
    measured: int | None

    def __str__(self) -> str:
        lines = [_line("model", self.model)]
        lines += [_line(name, decision) for name, decision in self.decisions]
        lines += [_line("batch", self.batch), *self._parts(), self._peak()]
        if self.step.note is not None:
            lines.append(_line("traced", self.step.note))
        if self.step.host:
            lines.append(_line("host", f"{bytes_in_words(self.step.host):>12}"))
        if not math.isnan(self.step.flop):
            lines.append(_line("work", f"{self.work()}, recomputation included"))
        if self.longest is not None:
            lines.append(_line("longest", self.longest))
        for switch, saved in self.switches:
            lines.append(_line("switch", f"{bytes_in_words(saved):>12} less with {switch}"))
        if self.measured is not None:
            off = self.step.peak / self.measured - 1
            held = f"{bytes_in_words(self.measured):>12}"
            lines.append(_line("measured", f"{held}, from which the plan is {off:+.1%} off"))
        return "\n".join(lines)

    def _parts(self) -> list[str]:
        """Return the categories with bars; the bars of all categories make up the peak."""
        lines = []
        for name, size in self.step.categories.items():
            if size:
                bar = text_bar(size / self.step.peak)
                lines.append(_line(name, f"{bytes_in_words(size):>12}  {bar}").rstrip())
        return lines

    def _peak(self) -> str:
        verdict = ""
        if self.room is not None:
            fits = "fits" if self.step.peak <= self.room else "does not fit"
            verdict = f" of {bytes_in_words(self.room)} that may be filled: {fits}"
        return _line("peak", f"{bytes_in_words(self.step.peak):>12}{verdict}")

    def work(self) -> str:
        """Return the floating-point operations of the step in words."""
        return f"{self.step.flop / 1e12:,.3g} Tflop forward and backward"

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain values, sizes in bytes."""
        return {
            "model": self.model,
            "decisions": self.decisions,
            "batch": self.batch,
            "parts": {name: size for name, size in self.step.categories.items() if size},
            "peak": self.step.peak,
            "room": self.room,
            "host": self.step.host,
            "work": None if math.isnan(self.step.flop) else self.work(),
            "longest": self.longest,
            "switches": dict(self.switches),
            "measured": self.measured,
        }


def plan_of_run(
    tracer: StepTracer,
    batch: Sequence[Example],
    *,
    accumulate: bool,
    measured: Callable[[], int] | None = None,
) -> RunPlan:
    """Plan the step of a batch.

    tracer: of the run
    batch: records of the micro-batch
    accumulate: the batch meets gradients of earlier batches
    measured: takes the planned step, and returns the bytes of the peak

    Switches to save less than a hundredth of the peak are left out.
    """
    step = tracer.step(batch, accumulate=accumulate)
    memory = capacity(tracer.config, tracer.run.device)
    room = None if memory is None else usable(memory, tracer.run.device)
    longest = None
    is_device = tracer.run.device == "cuda" or tracer.config.memory_gib
    if room is not None and len(batch) == 1 and is_device:
        row = longest_row(tracer, row_of(batch[0]), room, accumulate=accumulate)
        longest = "not one token fits"
        if row is not None:
            longest = f"{row.tokens:,} tokens: {row_in_words(row)}"
    switches = []
    for switch, saved in savings(tracer, batch, accumulate=accumulate):
        if saved > 0.01 * step.peak:
            switches.append((switch_in_words(switch), saved))
    return RunPlan(
        model=f"{tracer.config.model}: {tracer.parameters / 1e9:.3g} B weights",
        decisions=[tuple(line.split(maxsplit=1)) for line in tracer.run.lines()],
        batch=batch_in_words(batch),
        step=step,
        room=room,
        longest=longest,
        switches=switches,
        measured=None if measured is None else measured(),
    )


def text_bar(share: float) -> str:
    """Return a bar of at most WIDTH columns, in blocks, or in # if stdout has no blocks."""
    eighths = round(8 * WIDTH * share)
    bar = WHOLE * (eighths // 8) + EIGHTHS[eighths % 8]
    try:
        bar.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(WIDTH * share)
    return bar.rstrip()


def _line(name: str, words: str) -> str:
    """Return a line of the plan; long words go on below, in the same column."""
    return textwrap.fill(
        words,
        COLUMNS,
        initial_indent=f"{name:12} ",
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )
