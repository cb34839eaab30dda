"""The block plan of a call of the fused head, in words and numbers: `una-fast plan --op N D V`.

Times come from the cost model of plan.py and the rates of a machine: to compare plans, not to
promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from una_fast.feedback import Feedback
from una_fast.head.plan import (
    Cost,
    ForwardPlan,
    HeadSize,
    Machine,
    Plan,
    cost,
    forward_pass,
    forward_plan,
    head_size,
    make_plan,
    span_rows,
    workspace_bytes,
)
from una_fast.head.settings import PlanConfig

CPU = Machine(0.3e12, 20e9)  # two cores of a server, float32
WAYS = {
    "streamed": "gradients in the forward pass, their coefficients multiplied in last",
    "resident": "whole components per chunk, coefficients known before the gradient",
    "recomputed": "log-probs first, then the logits again",
    "unscored": "log-probs only",
}


def describe_op(rows: int, hidden: int, vocab: int, settings: PlanConfig) -> str:
    """Return plan, memory and modelled time of a call, as text.

    rows: N
    hidden: D
    vocab: V
    settings: responses, device and workspace of the call

    ValueError for sizes too small for the responses.
    """
    responses = max(2 * settings.pairs, 1)
    if min(rows, hidden, vocab) < 1 or rows < responses:
        raise ValueError(
            f"--op {rows} {hidden} {vocab}: N, D and V must be positive, and N at least "
            f"{responses} here"
        )
    number = 2 if settings.device == "cuda" else 4
    size = head_size(vocab, hidden, settings.device, number, number)
    budget = workspace_bytes(settings.device, settings.workspace_mb)
    bounds = [rows * i // responses for i in range(responses + 1)]
    lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    if settings.pairs:
        feedback = Feedback.pairs(range(0, responses, 2), range(1, responses, 2))
    else:
        feedback = Feedback.scores([0], [0.5])
    width = hidden if settings.train_head else 0
    plan = make_plan(
        feedback,
        lengths,
        size,
        budget=budget,
        accumulator_width=width,
        length_normalize=False,
    )
    reference = None if settings.cached_reference else forward_plan(size, rows, budget)
    head = "trained" if width else "frozen"
    lines = [
        f"N {rows}, D {hidden}, V {vocab}: {responses} responses, head {head}, "
        f"{settings.device}, workspace {_mib(budget)}",
        *_work(plan, reference, lengths, size, width),
        *_memory(plan, rows, size, width),
        _time(plan, reference, lengths, size, width),
    ]
    return "\n".join(lines)


def _reference_cost(reference: ForwardPlan | None, rows: int, size: HeadSize) -> Cost:
    return Cost() if reference is None else forward_pass(size, rows, reference.tile)


def _work(
    plan: Plan, reference: ForwardPlan | None, lengths: Sequence[int], size: HeadSize, width: int
) -> list[str]:
    """Return the lines on GEMM passes, of policy and reference."""
    rows = sum(lengths)
    one_pass = 2 * rows * size.hidden * size.vocab
    policy_flop = cost(plan, lengths, size, width).flop
    reference_flop = _reference_cost(reference, rows, size).flop
    tiles = ""
    if reference is not None:
        tile = reference.tile
        tiles = f", tiles of at most {tile.rows} x {tile.vocab} logits"
    return [
        f"policy     {policy_flop / one_pass:.2f} passes of 2 N D V = {one_pass / 1e12:.2f} Tflop",
        *_ways(plan, lengths, size),
        f"reference  {reference_flop / one_pass:.2f} passes{tiles}",
    ]


def _memory(plan: Plan, rows: int, size: HeadSize, width: int) -> list[str]:
    """Return the lines on bytes: workspace, gradients, and the [N, V] logits of other methods."""
    logits = _mib(plan.tile.logit_bytes(size))
    if plan.tile.logit_rows is not None:
        logits += f", their gradients {_mib(plan.tile.gradient_bytes(size))}"
    number, name = (size.leaf_bytes, "bfloat16") if plan.direct else (size.acc_bytes, "float32")
    accumulator = _mib(size.vocab * width * number)
    scratch = ""
    if plan.scratch and width:
        scratch = f", {plan.scratch} more accumulators of {accumulator}"
    of_head = f", head {accumulator} in {name}" if width else ""
    return [
        f"workspace  logits {logits}{scratch}",
        f"gradients  hidden {_mib(rows * size.hidden * size.operand_bytes)}{of_head}",
        f"never      [N, V] logits: {_mib(rows * size.vocab * size.acc_bytes)} in float32",
    ]


def _time(
    plan: Plan, reference: ForwardPlan | None, lengths: Sequence[int], size: HeadSize, width: int
) -> str:
    """Return the line on the modelled time, beside the bare products of the fewest passes."""
    rows = sum(lengths)
    machine = size.machine or CPU
    work = cost(plan, lengths, size, width) + _reference_cost(reference, rows, size)
    seconds = work.seconds(machine)
    passes = (3 if width else 2) + (reference is not None)
    ideal = passes * 2 * rows * size.hidden * size.vocab / machine.flops
    return (
        f"model      {1e3 * seconds:.1f} ms, {seconds / ideal:.2f} x the bare products of {passes} "
        f"passes, at {machine.flops / 1e12:g} Tflop/s and {machine.bytes / 1e12:g} TB/s"
    )


def _ways(plan: Plan, lengths: Sequence[int], size: HeadSize) -> list[str]:
    """Return a line for every way in the plan: chunks, tiles, and the meaning of the way."""
    cu = [0, *accumulate(lengths)]
    blocks = {
        "streamed": [plan.streamed_responses()],
        "resident": [list(block) for block in plan.resident],
        "recomputed": [list(plan.recomputed)],
        "unscored": [list(plan.unscored)],
    }
    slices = -(-size.vocab // plan.tile.vocab)
    sliced = f" x {slices} slices" if slices > 1 else ""
    lines = []
    for way, responses_of_blocks in blocks.items():
        heights: list[int] = []
        for responses in responses_of_blocks:
            heights += map(span_rows, plan.cuts(responses, cu))
        if heights:
            tile = f"{max(heights)} x {plan.tile.vocab}"
            plural = "s" if len(heights) > 1 else ""
            count = f"{len(heights)} chunk{plural}{sliced}"
            lines.append(f"  {way:10} {count} of at most {tile} logits: {WAYS[way]}")
    return lines


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
