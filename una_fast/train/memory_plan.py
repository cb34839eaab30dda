"""Plan the memory of a whole run, from settings and data: `una-fast plan`."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from una_fast.capacity.fit import accumulates, largest_batch, longest_rollouts
from una_fast.capacity.run_plan import RunPlan, plan_of_run
from una_fast.capacity.settings import RunPlanConfig
from una_fast.capacity.trace import Row, StepTracer
from una_fast.data.examples import Example
from una_fast.distributed import start_world
from una_fast.model.loading import load_tokenizer
from una_fast.report.plan_page import write_plan
from una_fast.resolved import find_facts
from una_fast.train.build import build_run, open_run
from una_fast.train.loop import Trainer
from una_fast.train.measure import measured_peak
from una_fast.train.run_data import RunData, load_data


def plan_run(settings: RunPlanConfig) -> RunPlan:
    """Return the plan of the largest batch of a run, and write the page of it if one is asked for.

    The batch is a given row, or the largest batch that the data gives. With settings.measure the
    run is loaded, too, and takes two steps in a directory that is thrown away.

    ValueError where neither a row nor data is given.
    """
    if settings.cached_reference:
        settings = replace(settings, reference="cached")
    records: list[Example] = []
    if settings.prompt:
        examples = [Row(settings.prompt, tuple(settings.responses)).example()]
    elif settings.data:
        data = load_data(settings, _tokenizer(settings))
        records = data.examples()
        # Batches of evaluation have no backward pass.
        prompts = list(itertools.chain.from_iterable(data.prompts))
        examples = list(itertools.chain.from_iterable(data.records))
        examples += longest_rollouts(prompts, settings)
    else:
        raise ValueError(
            "what is to be planned? Give a row (--prompt 8000 --responses '[1000, 1000]'), "
            "or --data"
        )
    device = _planned_device(settings)
    facts = find_facts(settings, records, device=device, ranks=settings.world_size)
    tracer = StepTracer(settings, facts)
    batch = largest_batch(examples, settings, packed=tracer.run.packed)
    accumulate = accumulates(settings, tracer.run.mesh, batch)
    measured = None
    if settings.measure:
        measured = functools.partial(_measure, settings, device, batch, accumulate)
    plan = plan_of_run(
        tracer, batch, accumulate=accumulate, measured=measured, meshes=settings.meshes
    )
    if settings.report is not None:
        write_plan(plan.plain(), Path(settings.report))
    return plan


def _planned_device(settings: RunPlanConfig) -> str:
    """Return the device to plan for: without a choice a GPU, or the one there is to measure on."""
    if settings.device != "auto":
        return settings.device
    measured_here = settings.measure and settings.gpu is None
    return "cpu" if measured_here and not torch.cuda.is_available() else "cuda"


def _measure(
    settings: RunPlanConfig, device: str, batch: Sequence[Example], accumulate: bool
) -> int:
    """Take two steps of a batch, and return the bytes of the peak."""
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"progress": False, "loggers": [], "resume": False, "epochs": None}
        run = replace(settings, output_dir=scratch, **quiet)
        data = RunData([list(batch)], [1.0])
        opened = open_run(run, start_world(device), data)
        trainer = Trainer(build_run(opened, _tokenizer(settings)), Path(scratch))
        return measured_peak(trainer, list(batch), accumulate=accumulate)


def _tokenizer(settings: RunPlanConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(
        settings.tokenizer or settings.model, trust_remote_code=settings.trust_remote_code
    )
