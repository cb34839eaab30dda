"""Tell whether a run fits into the memory of the device, and name the switches to make a run fit.

A run fits if the planned peak, with fragmentation and the device's own reserve, stays below the
memory of the device. The trainer refuses too large runs; `una-fast plan` shows the plan, which
run_plan.py puts into words.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from una_fast.capacity.settings import GPU_GIB
from una_fast.capacity.trace import Row, StepMemory, StepTracer
from una_fast.config import RunConfig
from una_fast.data.batch import footprint
from una_fast.data.examples import Example, Prompt
from una_fast.feedback import Feedback
from una_fast.model.settings import LoraOptions
from una_fast.parallel import Mesh, ParallelOptions
from una_fast.printable import bytes_in_words
from una_fast.resolved import Facts, ResolvedRun

logger = logging.getLogger(__name__)

GIB = 2**30

MARGIN = 1.03  # fragmentation

RESERVE = {"cuda": GIB, "cpu": 0}  # the CUDA context, cuBLAS

ROUGH = 0.25  # runs roughly below this share of the memory are not planned

SMALL_WORKSPACE_MB = 512


# --- room ----------------------------------------------------------------------------------------


def capacity(config: RunConfig, device: str) -> int | None:
    """Return the bytes of a device for the run; None for a device that is not known."""
    if config.memory_gib is not None:
        return int(config.memory_gib * GIB)
    gpu = getattr(config, "gpu", None)
    if gpu is not None:
        return int(GPU_GIB[gpu] * GIB)
    if device == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable(room: int, device: str) -> int:
    """Return the bytes for a plan to fill, of a device's memory."""
    return int((room - RESERVE[device]) / MARGIN)


# --- the batch to plan ---------------------------------------------------------------------------


def largest_batch(examples: Iterable[Example], config: RunConfig, *, packed: bool) -> list[Example]:
    """Return the largest micro-batch: the longest records allowed together."""
    limit = config.micro_batch_size
    if limit is None:
        limit = 1 if config.max_tokens_per_batch is None else config.batch_size
    limit = min(limit, config.batch_size)
    budget = config.max_tokens_per_batch or math.inf
    sized = [(*footprint(example, packed=packed), example) for example in examples]
    sized.sort(key=lambda entry: -entry[0] * entry[1])
    smallest = min((rows * width for rows, width, _ in sized), default=0)
    batch: list[Example] = []
    rows = 0
    widest = 0
    for more, width, example in sized:
        tokens = (rows + more) * max(widest, width)
        if not batch or tokens <= budget:
            batch.append(example)
            rows += more
            widest = max(widest, width)
        if len(batch) == limit or rows * widest + smallest > budget:
            break
    return batch


def longest_rollouts(prompts: Sequence[Prompt], config: RunConfig) -> list[Example]:
    """Return records as large as the rollouts of these prompts can be, to plan with."""
    response = np.zeros(config.max_new_tokens, dtype=np.int32)
    responses = (response,) * config.samples_per_prompt
    feedback = Feedback.scores(range(len(responses)), [0.0] * len(responses))
    return [
        Example(prompt.prompt_ids, responses, feedback, None, prompt.origin) for prompt in prompts
    ]


def micro_batches(config: RunConfig, mesh: Mesh, batch: Sequence[Example]) -> int:
    """Return how many batches of this size a step has, on every rank.

    config: settings of the run
    mesh: of the ranks
    batch: records of a micro-batch
    """
    return math.ceil(config.batch_size / (mesh.data * len(batch)))


def accumulates(config: RunConfig, mesh: Mesh, batch: Sequence[Example]) -> bool:
    """Return whether a step has several batches, so that a batch meets earlier gradients."""
    return micro_batches(config, mesh, batch) > 1


# --- refusal -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """Memory of the largest batch of a run, beside the memory of the device.

    batch: the batch in words
    peak: bytes; of a small run, which is not planned, more than it can need
    room: bytes that may be filled
    parts: bytes by category at the peak; empty for a small run
    mesh: of the ranks, in words
    sent: bytes that a rank sends in a step, by collective
    """

    batch: str
    peak: int
    room: int
    parts: dict[str, int]
    mesh: str = ""
    sent: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        peak = bytes_in_words(self.peak)
        held = f"{peak} planned" if self.parts else f"at most {peak}"
        return f"{held}, of {bytes_in_words(self.room)} that may be filled"


def refuse_too_large(
    config: RunConfig, facts: Facts, examples: Sequence[Example]
) -> Planned | None:
    """Check the largest micro-batch of a run against the memory of the device.

    config: settings of the run
    facts: device, ranks, model and records of the run
    examples: all records, and the longest rollouts of all prompts

    Returns the memory of the run; None for a device that is not known, and without a plan, because
    tracing failed: the run is then let through, with a warning. ValueError, with the switches to
    make the run fit.
    """
    try:
        planned, refusal = _verdict(config, facts, examples)
    except Exception as error:  # a model may do anything with tensors that have no numbers
        logger.warning("the memory of the run is not planned: %s: %s", type(error).__name__, error)
        return None
    if refusal is not None:
        raise ValueError(refusal)
    return planned


def _verdict(
    config: RunConfig, facts: Facts, examples: Sequence[Example]
) -> tuple[Planned | None, str | None]:
    """Return the memory of the run, and why it does not fit."""
    memory = capacity(config, facts.device)
    if memory is None:
        return None, None
    tracer = StepTracer(config, facts)
    room = usable(memory, facts.device)
    padded = largest_batch(examples, config, packed=False)
    rough = tracer.rough_bytes(padded)
    if rough < ROUGH * memory:
        return Planned(batch_in_words(padded), round(rough), room, {}), None
    batch = largest_batch(examples, config, packed=tracer.run.packed)
    mesh = tracer.run.mesh
    times = micro_batches(config, mesh, batch)
    accumulate = times > 1
    step = tracer.step(batch, accumulate=accumulate)
    parts = {name: size for name, size in step.categories.items() if size}
    sent = step.sent(times)
    planned = Planned(batch_in_words(batch), step.peak, room, parts, str(mesh), sent)
    if step.peak <= room:
        return planned, None
    chosen, smaller = cheapest_way(tracer, batch, room, accumulate=accumulate)
    refusal = (
        f"the largest batch of the run ({planned.batch}; first {batch[0].origin}) needs "
        f"{bytes_in_words(step.peak)}{_of_each(mesh)}, mostly for {_largest_categories(step)}, and "
        f"{bytes_in_words(room)} may be filled (memory_gib sets it). "
        f"{_advice(chosen, smaller.peak, room)}"
    )
    return planned, refusal


def _of_each(mesh: Mesh) -> str:
    return "" if mesh.ranks == 1 else f" on each rank of {mesh}"


def _advice(chosen: dict[str, Any], peak: int, room: int) -> str:
    if peak <= room:
        return f"It fits with {switch_in_words(chosen)}: {bytes_in_words(peak)}"
    still = "No switch makes it smaller than"
    if chosen:
        still = f"With {switch_in_words(chosen)} it still needs"
    mend = (
        "set max_tokens lower, train adapters (lora), use more GPUs, or split rows over GPUs "
        "(parallel.context)"
    )
    return f"{still} {bytes_in_words(peak)}: {mend}"


# --- switches ------------------------------------------------------------------------------------


def switches(config: RunConfig, run: ResolvedRun, tokens: int) -> list[dict[str, Any]]:
    """Return switches to save memory, as fields of the run to change.

    config: settings of the run
    run: decisions of the run
    tokens: tokens of the batch

    All switches but the last, LoRA, leave the training as it is.
    """
    found: list[dict[str, Any]] = []
    parallel = config.parallel or ParallelOptions()
    if run.mesh.shards > 1 and not parallel.offload_parameters and not config.offload_optimizer:
        found.append({"parallel": replace(parallel, offload_parameters=True)})
    if not config.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    elif not config.offload_activations:
        found.append({"offload_activations": True})
    if config.mlp_tile is None:
        found.append({"mlp_tile": min(1 << max(tokens // 8, 1).bit_length(), 4096)})
    if run.device == "cuda" and run.workspace > SMALL_WORKSPACE_MB * 2**20:
        found.append({"workspace_mb": SMALL_WORKSPACE_MB})
    if config.lora is not None:
        return found
    if run.reference != "cached":
        found.append({"reference": "cached"})
    if run.device == "cuda" and config.master_weights:
        found.append({"master_weights": False})
    if config.optimizer == "adamw" and not config.offload_optimizer:
        found.append({"offload_optimizer": True})
        if _has_torchao():
            found.append({"optimizer": "adamw_8bit"})
    found.append({"lora": LoraOptions()})
    return found


def _has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def savings(
    tracer: StepTracer, batch: Sequence[Example], *, accumulate: bool = False
) -> list[tuple[dict[str, Any], int]]:
    """Estimate (switch, bytes less at the peak) for every switch; largest saving first."""
    before = tracer.step(batch, accumulate=accumulate)
    tried = switches(tracer.config, tracer.run, before.tokens)
    return _savings(tracer, batch, tried, before.peak, accumulate=accumulate)


def _savings(
    tracer: StepTracer,
    batch: Sequence[Example],
    tried: list[dict[str, Any]],
    peak: int,
    *,
    accumulate: bool,
) -> list[tuple[dict[str, Any], int]]:
    found = []
    for switch in tried:
        try:
            after = tracer.step(batch, accumulate=accumulate, **switch)
        except ValueError:
            continue  # the model or another setting excludes the switch
        found.append((switch, peak - after.peak))
    return sorted(found, key=lambda entry: -entry[1])


def cheapest_way(
    tracer: StepTracer, batch: Sequence[Example], room: int, *, accumulate: bool = False
) -> tuple[dict[str, Any], StepMemory]:
    """Choose switches to make a batch fit, and plan the step with the switches.

    tracer: of the run without the switches
    batch: records of the micro-batch
    room: bytes for the step to fill
    accumulate: the batch meets gradients of earlier batches

    Switches are added until the batch fits, in the order of the bytes saved by a switch alone.
    LoRA, another training, is not chosen. Returns (fields of the run to change, step with the
    changes).
    """
    before = tracer.step(batch, accumulate=accumulate)
    known = switches(tracer.config, tracer.run, before.tokens)
    tried = [switch for switch in known if "lora" not in switch]
    found = _savings(tracer, batch, tried, before.peak, accumulate=accumulate)
    ranked = [switch for switch, saved in found if saved > 0]
    if {"gradient_checkpointing": True} in ranked:
        ranked.append({"offload_activations": True})
    chosen: dict[str, Any] = {}
    smallest = before.peak
    for switch in ranked:
        if smallest <= room:
            break
        try:
            peak = tracer.step(batch, accumulate=accumulate, **chosen, **switch).peak
        except ValueError:
            continue  # the switch excludes a chosen switch
        if peak < smallest:
            chosen |= switch
            smallest = peak
    return chosen, tracer.step(batch, accumulate=accumulate, **chosen)


def longest_row(tracer: StepTracer, row: Row, room: int, *, accumulate: bool = False) -> Row | None:
    """Return the longest fitting row of the same proportions, to two percent.

    tracer: of the run
    row: proportions, and the length at the start of the search
    room: bytes for the step to fill
    accumulate: the batch meets gradients of earlier batches

    Returns None if the shortest row does not fit.
    """

    def point(factor: float) -> tuple[float, int]:
        example = row.scaled(factor).example()
        return factor, tracer.step([example], accumulate=accumulate).peak

    fits = point(1 / row.tokens)
    if fits[1] > room:
        return None
    over = None
    before = fits
    here = point(1.0)
    for _ in range(10):
        if here[1] <= room:
            fits = here
        else:
            over = here
        if fits[1] >= 0.98 * room or (over and over[0] - fits[0] < 0.02 * over[0]):
            break
        # The peak is nearly a straight line in the length: aim a little below the limit.
        (x1, y1), (x2, y2) = (fits, over) if over else (before, here)
        slope = (y2 - y1) / (x2 - x1)
        guess = 2 * fits[0]
        if slope > 0:
            guess = fits[0] + (0.995 * room - fits[1]) / slope
        before = here
        here = point(guess)
    return row.scaled(fits[0])


# --- words ---------------------------------------------------------------------------------------


def batch_in_words(batch: Sequence[Example]) -> str:
    """Return the tokens of a batch, and the first record's, in words."""
    rows = [row_of(example) for example in batch]
    tokens = sum(row.tokens for row in rows)
    more = f" and {len(rows) - 1} more records" if len(rows) > 1 else ""
    return f"{tokens:,} tokens: {row_in_words(rows[0])}{more}"


def row_of(example: Example) -> Row:
    """Return the lengths of a record."""
    return Row(len(example.prompt_ids), tuple(map(len, example.responses)))


def row_in_words(row: Row) -> str:
    """Return the lengths of a row in words."""
    responses = ", ".join(f"{n:,}" for n in row.responses)
    return f"prompt {row.prompt:,}, responses {responses}"


def _largest_categories(step: StepMemory) -> str:
    largest = sorted(step.categories.items(), key=lambda entry: -entry[1])[:3]
    return ", ".join(f"{name} {bytes_in_words(size)}" for name, size in largest if size)


def switch_in_words(switch: dict[str, Any]) -> str:
    """Return settings to change as flags have them: `mlp_tile=4096`."""
    words = []
    for name, value in switch.items():
        if isinstance(value, LoraOptions):
            words.append(f"lora.r={value.r}")
        elif isinstance(value, ParallelOptions):
            words.append("parallel.offload_parameters=true")
        else:
            words.append(f"{name}={str(value).lower()}")
    return " ".join(words)
