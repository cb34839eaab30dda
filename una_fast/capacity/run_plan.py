"""The plan of a run's memory, as text for a terminal and as plain values for a page."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from una_fast.capacity.fit import (
    batch_in_words,
    capacity,
    longest_row,
    micro_batches,
    row_in_words,
    row_of,
    savings,
    switch_in_words,
    usable,
)
from una_fast.capacity.meshes import MeshPlan, best_mesh, plan_meshes, vocabulary_in_words
from una_fast.capacity.trace import StepMemory, StepTracer
from una_fast.data.examples import Example
from una_fast.parallel import Mesh
from una_fast.printable import bytes_in_words

PURPOSES = {
    "all-gather": "weights, for forward, recomputation and backward",
    "reduce-scatter": "gradients, within a copy of the weights",
    "all-reduce": "gradients over the copies of the weights, sums of responses",
    "all-to-all": "queries, keys, values and results of attention",
}
"""Collective -> what it is for."""

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
    micro_batches: of a step, on a rank
    room: bytes to fill; None for an unknown device
    longest: the longest fitting row in words; None without a search
    switches: (settings to change, bytes less at the peak), largest saving first
    measured: bytes of the measured peak; None without a measurement
    meshes: a plan, or a refusal, of every mesh of the ranks; empty without a comparison
    vocabulary: when a split vocabulary pays, in words; None where nothing can be split
    """

    model: str
    decisions: list[tuple[str, str]]
    batch: str
    step: StepMemory
    micro_batches: int
    room: int | None
    longest: str | None
    switches: list[tuple[str, int]]
    measured: int | None
    meshes: list[MeshPlan | tuple[Mesh, str]] = field(default_factory=list)
    vocabulary: str | None = None

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
        lines += self._sent()
        if self.vocabulary is not None:
            lines.append(_line("vocabulary", self.vocabulary))
        if self.longest is not None:
            lines.append(_line("longest", self.longest))
        for switch, saved in self.switches:
            lines.append(_line("switch", f"{bytes_in_words(saved):>12} less with {switch}"))
        if self.measured is not None:
            off = self.step.peak / self.measured - 1
            held = f"{bytes_in_words(self.measured):>12}"
            lines.append(_line("measured", f"{held}, from which the plan is {off:+.1%} off"))
        if self.meshes:
            lines += ["", *mesh_lines(self.meshes, self.room)]
        return "\n".join(lines)

    def _sent(self) -> list[str]:
        """Return what a rank sends in a step, a collective per line."""
        sent = self.step.sent(self.micro_batches)
        several = f"{self.micro_batches} micro-batches"
        step = "step" if self.micro_batches == 1 else f"step of {several}"
        lines = []
        for name, size in sent.items():
            words = f"{bytes_in_words(size):>12}  {name}: {PURPOSES[name]}"
            lines.append(_line("sent", words))
        if sent:
            total = f"{bytes_in_words(sum(sent.values())):>12}  by a rank in a {step}"
            lines.append(_line("sent", total))
        return lines

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
            "sent": self.step.sent(self.micro_batches),
            "micro_batches": self.micro_batches,
            "vocabulary": self.vocabulary,
            "meshes": [plan.plain() for plan in self.meshes if isinstance(plan, MeshPlan)],
        }


def plan_of_run(
    tracer: StepTracer,
    batch: Sequence[Example],
    *,
    accumulate: bool,
    measured: Callable[[], int] | None = None,
    meshes: bool = False,
) -> RunPlan:
    """Plan the step of a batch.

    tracer: of the run
    batch: records of the micro-batch
    accumulate: the batch meets gradients of earlier batches
    measured: takes the planned step, and returns the bytes of the peak
    meshes: plan the step on every mesh of the ranks, too

    Switches to save less than a hundredth of the peak are left out.
    """
    step = tracer.step(batch, accumulate=accumulate)
    mesh = tracer.run.mesh
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
        micro_batches=micro_batches(tracer.config, mesh, batch),
        room=room,
        longest=longest,
        switches=switches,
        measured=None if measured is None else measured(),
        meshes=plan_meshes(tracer, batch, room) if meshes else [],
        vocabulary=vocabulary_in_words(tracer, batch),
    )


def mesh_lines(plans: Sequence[MeshPlan | tuple[Mesh, str]], room: int | None) -> list[str]:
    """Return a table of meshes, and the best one.

    plans: a plan, or the reason of a refusal, of every mesh
    room: bytes for a step to fill; None: not known
    """
    heads = ("mesh", "peak", "longest row", "tokens/rank", "sent/rank", "sent/token")
    rows = [heads]
    refused = []
    for plan in plans:
        if isinstance(plan, MeshPlan):
            rows.append(_mesh_row(plan, room))
        else:
            refused.append(f"{plan[0]}: {plan[1]}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    planned = [plan for plan in plans if isinstance(plan, MeshPlan)]
    if planned:
        lines.append(_line("best", _best_in_words(best_mesh(planned, room), room)))
    return [*lines, *(_line("refused", words) for words in refused)]


def _mesh_row(plan: MeshPlan, room: int | None) -> tuple[str, ...]:
    """Return the cells of a mesh; a peak that does not fit has a mark."""
    peak = bytes_in_words(plan.step.peak)
    if room is not None and plan.step.peak > room:
        peak = f"too large {peak}"
    longest = "-" if plan.longest is None else "none"
    if plan.longest:
        longest = f"about {plan.longest:,}"
    tokens = f"{plan.tokens_of_rank:,.0f}"
    return (
        str(plan.mesh),
        peak,
        longest,
        tokens,
        bytes_in_words(plan.sent),
        f"{plan.sent_per_token / 2**10:,.1f} KiB",
    )


def _best_in_words(best: MeshPlan, room: int | None) -> str:
    if room is not None and best.step.peak > room:
        return f"none fits; {best.mesh} needs least"
    return f"{best.mesh}: of the meshes that fit, the one that sends least per token"


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
