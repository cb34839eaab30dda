"""Measure peaks of training steps on four ranks, for tests/test_plan_meshes.py.

Its argument is a JSON file: name -> {"ranks": 4 or 2, "settings": of the run, "rows": [[prompt,
[responses]], ...], "accumulate": whether a step takes the batch twice}. First all ranks take the
cases of four; then there are two pairs of ranks, who take turns at the cases of two. Rank 0 of a
case writes NAME.json beside it: of every rank the peak, in bytes, and the bytes sent.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tiny import make_tokenizer
from una_fast.capacity.trace import Row
from una_fast.config import RunConfig
from una_fast.counters import COLLECTIVES, LiveBytes, Traffic
from una_fast.data.loader import Step
from una_fast.distributed import World, lay_out, start_world, stop_world
from una_fast.train import measure
from una_fast.train.build import build_run, open_run
from una_fast.train.loop import Trainer
from una_fast.train.run_data import RunData


def run_case(case: dict[str, Any], ranks: World) -> dict[str, Any]:
    """Return the peak of this rank, and the bytes that it sent in the second step."""
    config = RunConfig(**case["settings"])
    batch = [Row(prompt, tuple(responses)).example() for prompt, responses in case["rows"]]
    world = lay_out(ranks, config.parallel)
    examples = batch * (2 * world.data_size)
    opened = open_run(config, world, RunData([examples], [1.0]))
    trainer = Trainer(build_run(opened, make_tokenizer()), Path(config.output_dir))
    traffic = Traffic()
    marks: list[list[float]] = []
    take_step = trainer.take_step

    def marked(step: Step) -> dict[str, float]:
        taken = take_step(step)
        marks.append(list(traffic.sent))
        return taken

    trainer.take_step = marked
    counting = mock.patch.object(measure, "LiveBytes", lambda: LiveBytes(traffic=traffic))
    with counting:
        peak = measure.measured_peak(trainer, batch, accumulate=case["accumulate"])
    sent = [second - first for first, second in zip(*marks, strict=True)]
    return {"peak": peak, "sent": dict(zip(COLLECTIVES, sent, strict=True))}


def take_cases(cases: dict[str, dict[str, Any]], directory: Path) -> None:
    """Run cases on all ranks of this world."""
    world = start_world("cpu")
    for name, case in cases.items():
        Path(case["settings"]["output_dir"]).mkdir(exist_ok=True)
        found = world.gather(run_case(case, world))
        if world.is_main:
            (directory / f"{name}.json").write_text(json.dumps(found))
    stop_world()


def main() -> None:
    """Run the cases of a file on this rank."""
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text(encoding="utf-8"))
    take_cases({name: case for name, case in cases.items() if case["ranks"] == 4}, path.parent)
    rank = int(os.environ["RANK"])
    pair = rank // 2
    dist.init_process_group(
        "gloo", init_method=f"file://{path.parent}/pair-{pair}", rank=rank % 2, world_size=2
    )
    os.environ["WORLD_SIZE"] = "2"
    of_two = [name for name, case in cases.items() if case["ranks"] == 2]
    take_cases({name: cases[name] for name in of_two[pair::2]}, path.parent)
