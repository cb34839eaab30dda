"""The block plan of one call of the fused head, in words and numbers: what `una-fast plan --op N D V` prints.

Times come from the cost model of plan.py and the rates of its machine: to compare plans, not to promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from una_fast.feedback import Feedback
from una_fast.head.plan import (
    DEFAULT_WORKSPACE_MB,
    Cost,
    HeadSize,
    Machine,
    Plan,
    cost,
    forward_pass,
    forward_tile,
    head_size,
    make_plan,
    span_rows,
)

CPU = Machine(0.3e12, 20e9)  # two cores of a server, float32
WAYS = {
    "streamed": "gradients in the forward pass, their coefficients multiplied in last",
    "resident": "whole components per chunk, coefficients known before the gradient",
    "recomputed": "log-probs first, then the logits again",
    "unscored": "log-probs only",
}


@dataclass
class PlanConfig:
    """One call of linear_una_loss on N rows."""

    pairs: int = 1
    """Pairs of two responses of N / (2 pairs) tokens each; 0: one scored response of N tokens."""
    train_head: bool = True
    """Whether the head is trained (LoRA and a tied, frozen head: false)."""
    cached_reference: bool = False
    """Whether the reference log-probs are given, and cost no pass."""
    workspace_mb: float | None = None
    """Workspace in MiB; null: 2048 on a GPU, 256 on a CPU."""
    device: str = "cuda"
    """cuda: bfloat16 operands, float32 logits; cpu: all float32."""

    def __post_init__(self) -> None:
        if self.device not in DEFAULT_WORKSPACE_MB:
            raise ValueError(f"device={self.device!r} is not one of {sorted(DEFAULT_WORKSPACE_MB)}")
        if self.pairs < 0:
            raise ValueError(f"pairs={self.pairs} must be 0 or more")
        if self.workspace_mb is not None and not 0 < self.workspace_mb < math.inf:
            raise ValueError(f"workspace_mb={self.workspace_mb} must be positive and finite")


def describe_op(rows: int, hidden: int, vocab: int, settings: PlanConfig) -> str:
    """The plan of a call, its memory and its modelled time, as text."""
    responses = max(2 * settings.pairs, 1)
    if min(rows, hidden, vocab) < 1 or rows < responses:
        raise ValueError(
            f"--op {rows} {hidden} {vocab}: N, D and V must be positive, and N at least {responses} here"
        )
    gpu = settings.device == "cuda"
    size = head_size(vocab, hidden, settings.device, 2 if gpu else 4)
    machine = size.machine or CPU
    budget = int((settings.workspace_mb or DEFAULT_WORKSPACE_MB[settings.device]) * 2**20)
    bounds = [rows * i // responses for i in range(responses + 1)]
    lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    feedback = (
        Feedback.pairs(range(0, responses, 2), range(1, responses, 2)) if settings.pairs else None
    )
    width = hidden if settings.train_head else 0
    plan = make_plan(
        feedback or Feedback.scores([0], [0.5]),
        lengths,
        size,
        budget=budget,
        accumulator_width=width,
        length_normalize=False,
    )
    one_pass = 2 * rows * hidden * vocab
    policy = cost(plan, lengths, size, width)
    tile = forward_tile(size, rows, budget)
    reference = Cost() if settings.cached_reference else forward_pass(size, rows, tile)
    minimal = (3 if width else 2) + (not settings.cached_reference)
    ideal = minimal * one_pass / machine.flops
    total = (policy + reference).seconds(machine)

    logits = plan.tile.rows * size.stride(plan.tile.vocab) * size.acc_bytes
    lines = [
        f"N {rows}, D {hidden}, V {vocab}: {responses} responses, head {'trained' if width else 'frozen'}, "
        f"{settings.device}, workspace {_mib(budget)}",
        f"policy     {policy.flop / one_pass:.2f} passes of 2 N D V = {one_pass / 1e12:.2f} Tflop",
        *_ways(plan, lengths, size),
        f"reference  {reference.flop / one_pass:.2f} passes"
        + (f", tiles of at most {tile.rows} x {tile.vocab} logits" if reference.gemms else ""),
        f"workspace  logits {_mib(logits)}"
        + (
            f", {plan.scratch} more accumulators of {_mib(vocab * width * size.acc_bytes)}"
            if plan.scratch and width
            else ""
        ),
        f"gradients  hidden {_mib(rows * hidden * size.operand_bytes)}"
        + (f", head {_mib(vocab * hidden * size.acc_bytes)} in float32" if width else ""),
        f"never      [N, V] logits: {_mib(rows * vocab * size.acc_bytes)} in float32",
        f"model      {1e3 * total:.1f} ms, {total / ideal:.2f} x the bare products of {minimal} passes, "
        f"at {machine.flops / 1e12:g} Tflop/s and {machine.bytes / 1e12:g} TB/s",
    ]
    return "\n".join(lines)


def _ways(plan: Plan, lengths: Sequence[int], size: HeadSize) -> list[str]:
    cu = [0, *accumulate(lengths)]
    groups = {
        "streamed": [[i for part in plan.streamed for i in part.responses]],
        "resident": [list(block) for block in plan.resident],
        "recomputed": [list(plan.recomputed)],
        "unscored": [list(plan.unscored)],
    }
    lines = []
    for way, blocks in groups.items():
        rows = [span_rows(spans) for block in blocks for spans in plan.cuts(block, cu)]
        if rows:
            tile = f"{max(rows)} x {plan.tile.vocab}"
            slices = -(-size.vocab // plan.tile.vocab)
            count = f"{len(rows)} chunk{'s' * (len(rows) > 1)}" + (
                f" x {slices} slices" if slices > 1 else ""
            )
            lines.append(f"  {way:10} {count} of at most {tile} logits: {WAYS[way]}")
    return lines


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
