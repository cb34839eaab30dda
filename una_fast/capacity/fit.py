"""What `una-fast plan` prints of a run, what the trainer refuses, and the measurement that checks both.

A run fits where its peak, with what the model of memory cannot see, stays below the device's memory.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from una_fast.capacity.settings import GPU_GIB
from una_fast.capacity.trace import Row, StepMemory, StepTracer
from una_fast.config import RunConfig
from una_fast.data.batch import footprint
from una_fast.data.examples import Example
from una_fast.model.settings import LoraOptions
from una_fast.resolved import Facts, resolve

if TYPE_CHECKING:
    pass
import numpy as np

from una_fast.data.examples import Prompt
from una_fast.feedback import Feedback

logger = logging.getLogger(__name__)


GIB = 2**30

MARGIN = 1.03  # fragmentation

RESERVE = {"cuda": GIB, "cpu": 0}  # the CUDA context, cuBLAS

ROUGH = 0.25  # runs roughly below this share of the memory are not planned


# --- capacity --------------------------------------------------------------------------------------------------------


def capacity(config: RunConfig, device: str) -> int | None:
    """Bytes that one device has for the run; None where nobody knows."""
    if config.memory_gib is not None:
        return int(config.memory_gib * GIB)
    if getattr(config, "gpu", None) is not None:
        return int(GPU_GIB[config.gpu] * GIB)
    if device == "cuda":
        return (
            torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable(room: int, device: str) -> int:
    """The bytes of a device's memory that a plan may fill."""
    return int((room - RESERVE[device]) / MARGIN)


def largest_batch(examples: Iterable[Example], config: RunConfig, *, packed: bool) -> list[Example]:
    """The most that a micro-batch can hold: the longest records that are allowed together."""
    limit = config.micro_batch_size or (
        1 if config.max_tokens_per_batch is None else config.batch_size
    )
    limit = min(limit, config.batch_size)
    budget = config.max_tokens_per_batch or math.inf
    sized = sorted(
        ((*footprint(e, packed=packed), e) for e in examples), key=lambda s: -s[0] * s[1]
    )
    batch, rows, widest, smallest = [], 0, 0, min((s[0] * s[1] for s in sized), default=0)
    for more, width, example in sized:
        tokens = (rows + more) * max(widest, width)
        if not batch or tokens <= budget:
            batch, rows, widest = [*batch, example], rows + more, max(widest, width)
        if len(batch) == limit or rows * widest + smallest > budget:
            break
    return batch


def plan_options(config: RunConfig, facts: Facts, batch: Sequence[Example]) -> dict[str, bool]:
    """How the trainer runs a batch: whether records bring ref_logps, and whether gradients of others are there."""
    cached = resolve(config, facts).reference == "cached"
    return {"cached_reference": cached, "accumulate": config.batch_size > facts.ranks * len(batch)}


def refuse_too_large(config: RunConfig, facts: Facts, examples: Sequence[Example]) -> None:
    """ValueError for a run whose largest micro-batch cannot fit, naming the switches that would make it fit."""
    try:
        refusal = _refusal(config, facts, examples)
    except Exception as error:  # a model may do anything with tensors that have no numbers
        logger.warning("the memory of the run is not planned: %s: %s", type(error).__name__, error)
        return
    if refusal is not None:
        raise ValueError(refusal)


def _refusal(config: RunConfig, facts: Facts, examples: Sequence[Example]) -> str | None:
    device = facts.device
    memory = capacity(config, device)
    if memory is None:
        return None
    planner = StepTracer(config, facts)
    if planner.rough_bytes(largest_batch(examples, config, packed=False)) < ROUGH * memory:
        return None
    room = usable(memory, device)
    batch = largest_batch(examples, config, packed=planner.packed)
    options = plan_options(config, facts, batch)
    if (
        planner.estimate(batch, **options).peak <= 0.95 * room
    ):  # seconds sooner, for a model of many layers
        return None
    step = planner.step(batch, **options)
    if step.peak <= room:
        return None
    chosen, smaller = cheapest_way(planner, batch, room, **options)
    if smaller.peak <= room:
        advice = f"It fits with {_words(chosen)}: {_gib(smaller.peak)}"
    else:
        still = (
            f"With {_words(chosen)} it still needs" if chosen else "No switch makes it smaller than"
        )
        advice = f"{still} {_gib(smaller.peak)}: set max_tokens lower, train adapters (lora), or use more GPUs"
    return (
        f"the largest batch of the run ({_describe(batch)}; first {batch[0].origin}) needs {_gib(step.peak)}, mostly "
        f"for {_largest_parts(step)}, and {_gib(room)} may be filled (memory_gib sets it). {advice}"
    )


# --- switches --------------------------------------------------------------------------------------------------------


def switches(
    config: RunConfig, device: str, tokens: int, *, cached: bool = False
) -> list[dict[str, Any]]:
    """What could be switched on to need less for a batch of so many tokens, one at a time; training stays the same but
    for the last one."""
    tile = min(1 << max(tokens // 8, 1).bit_length(), 4096)
    full = config.lora is None
    adam = config.optimizer == "adamw"
    found = [
        {"gradient_checkpointing": True} if not config.gradient_checkpointing else None,
        {"offload_activations": True}
        if config.gradient_checkpointing and not config.offload_activations
        else None,
        {"mlp_tile": tile} if config.mlp_tile is None else None,
        {"workspace_mb": 512} if device == "cuda" and (config.workspace_mb or 2048) > 512 else None,
        {"reference": "cached"} if full and not cached and config.reference != "cached" else None,
        {"master_weights": False} if full and config.master_weights and device == "cuda" else None,
        {"offload_optimizer": True} if full and adam and not config.offload_optimizer else None,
        {"optimizer": "adamw_8bit"}
        if full and adam and not config.offload_optimizer and _has_torchao()
        else None,
        {"lora": LoraOptions()} if full and config.reference != "adapter" else None,
    ]
    return [switch for switch in found if switch]


def _has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def savings(
    planner: StepTracer, batch: Sequence[Example], **options: Any
) -> list[tuple[dict[str, Any], int]]:
    """(switch, bytes less at the peak) of every switch that is off, most first; estimates."""
    before = planner.estimate(batch, **options)
    found = []
    for switch in switches(
        planner.config, planner.device, before.tokens, cached=options.get("cached_reference", False)
    ):
        try:
            found.append((switch, before.peak - planner.estimate(batch, **switch, **options).peak))
        except ValueError:
            continue  # this model cannot
    return sorted(found, key=lambda pair: -pair[1])


def cheapest_way(
    planner: StepTracer, batch: Sequence[Example], room: int, **options: Any
) -> tuple[dict[str, Any], StepMemory]:
    """Switches that make a batch fit into `room` bytes, added in the order of what each saves alone, and the step with
    them. LoRA, which trains something else, is not among them."""
    chosen: dict[str, Any] = {}
    ranked = [
        switch
        for switch, saved in savings(planner, batch, **options)
        if "lora" not in switch and saved > 0
    ]
    if {"gradient_checkpointing": True} in ranked:
        ranked.append({"offload_activations": True})
    smallest = planner.estimate(batch, **options).peak
    for switch in ranked:
        if smallest <= room:
            break
        try:
            peak = planner.estimate(batch, **chosen, **switch, **options).peak
        except ValueError:
            continue  # it excludes one that was chosen
        if peak < smallest:
            chosen, smallest = chosen | switch, peak
    return chosen, planner.step(batch, **chosen, **options)


def longest_row(planner: StepTracer, row: Row, room: int, **options: Any) -> Row | None:
    """The longest row of the same proportions that fits, to two percent; None if not even one token does."""

    def point(factor: float) -> tuple[float, int]:
        return factor, planner.estimate([row.scaled(factor).example()], **options).peak

    fits, over = point(1 / row.tokens), None
    if fits[1] > room:
        return None
    before, here = fits, point(1.0)
    for _ in range(10):
        fits, over = (here, over) if here[1] <= room else (fits, here)
        if fits[1] >= 0.98 * room or (over and over[0] - fits[0] < 0.02 * over[0]):
            break
        # The peak is nearly a straight line in the length: aim a little below the limit.
        a, b = (fits, over) if over else (before, here)
        slope = (b[1] - a[1]) / (b[0] - a[0])
        guess = fits[0] + (0.995 * room - fits[1]) / slope if slope > 0 else 2 * fits[0]
        before, here = here, point(guess)
    return row.scaled(fits[0])


# --- the report ------------------------------------------------------------------------------------------------------


def describe_run(
    planner: StepTracer,
    batch: Sequence[Example],
    options: dict[str, bool],
    measured: Callable[[], int] | None,
) -> str:
    """The plan of the step of a batch: peak by part, what fits, and what each switch would save. measured: takes the
    step, after it was planned."""
    config = planner.config
    step = planner.step(batch, **options)
    memory = capacity(config, planner.device)
    room = None if memory is None else usable(memory, planner.device)
    ranks = f" x {planner.world_size} ranks" if planner.world_size > 1 else ""
    lines = [
        f"model        {config.model}: {planner.parameters / 1e9:.3g} B weights, "
        f"{'packed' if step.packed else 'padded'} rows, {planner.device}{ranks}",
        f"batch        {_describe(batch)}",
        *(f"{name:12} {_gib(size):>12}" for name, size in step.parts.items() if size),
        f"peak         {_gib(step.peak):>12}" + ("" if room is None else _verdict(step, room)),
    ]
    if step.host:
        lines.append(f"host         {_gib(step.host):>12}")
    if not math.isnan(step.flop):
        lines.append(
            f"work         {step.flop / 1e12:,.3g} Tflop forward and backward, recomputation included"
        )
    if room is not None and len(batch) == 1 and (planner.device == "cuda" or config.memory_gib):
        shape = Row(len(batch[0].prompt_ids), tuple(map(len, batch[0].responses)))
        longest = longest_row(planner, shape, room, **options)
        lines.append(
            "longest      not one token fits"
            if longest is None
            else f"longest      {longest.tokens:,} tokens: {_row_in_words(longest)}"
        )
    for switch, saved in savings(planner, batch, **options):
        if saved > 0.01 * step.peak:
            lines.append(f"switch       {_gib(saved):>12} less with {_words(switch)}")
    if measured is not None:
        held = measured()
        lines.append(
            f"measured     {_gib(held):>12}, from which the plan is {step.peak / held - 1:+.1%} off"
        )
    return "\n".join(lines)


def _verdict(step: StepMemory, room: int) -> str:
    return f" of {_gib(room)} that may be filled: {'fits' if step.peak <= room else 'does not fit'}"


def _describe(batch: Sequence[Example]) -> str:
    rows = [Row(len(e.prompt_ids), tuple(map(len, e.responses))) for e in batch]
    more = f" and {len(rows) - 1} more records" if len(rows) > 1 else ""
    return f"{sum(row.tokens for row in rows):,} tokens: {_row_in_words(rows[0])}{more}"


def _row_in_words(row: Row) -> str:
    return f"prompt {row.prompt:,}, responses {', '.join(f'{n:,}' for n in row.responses)}"


def _largest_parts(step: StepMemory) -> str:
    largest = sorted(step.parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {_gib(size)}" for name, size in largest if size)


def _words(switch: dict[str, Any]) -> str:
    return " ".join(
        f"lora.r={value.r}" if isinstance(value, LoraOptions) else f"{name}={str(value).lower()}"
        for name, value in switch.items()
    )


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def longest_rollouts(prompts: Sequence[Prompt], config: RunConfig) -> list[Example]:
    """Records as large as the rollouts of these prompts can be, to plan with."""
    responses = (np.zeros(config.max_new_tokens, dtype=np.int32),) * config.samples_per_prompt
    feedback = Feedback.scores(range(len(responses)), [0.0] * len(responses))
    return [
        Example(prompt.prompt_ids, responses, feedback, None, prompt.origin) for prompt in prompts
    ]
