"""Runs training cases and records every gradient: under torchrun for the ranks, and imported for one process.

    torchrun --nproc-per-node 2 tests/fsdp_worker.py cases.json

cases.json: {name: {"config": settings, "die_at": step, "fixed": false}}, or {"argv": [...]} for the command line, which
comes last. fixed: samples are made of their prompts, the same on any number of ranks. A case writes what it saw to its
output_dir/seen.pt: the full gradient of every trained parameter before every optimizer step, and the dtypes of the
trained weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import una_fast.model.activations as memory_module
import una_fast.online.steps as online_module
import una_fast.train.loop as train_module
from una_fast import cli
from una_fast.config import RunConfig
from una_fast.data.loader import Step
from una_fast.distributed import start_world, stop_world
from una_fast.model.policy import Policy
from una_fast.online.sampling import Completion, Sampling
from una_fast.train.loop import Trainer

memory_module.SMALL = 1  # the hidden states of tests are worth moving


class Died(Exception):
    """A stand-in for what kills a run."""


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class FixedSampler:
    """Samples that depend on nothing but the prompt and the version of the policy."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def sample(
        self, prompts: Any, *, seed: int, samples: int | None = None, version: int = 0
    ) -> Any:
        drawn = []
        for prompt in prompts:
            rng = np.random.default_rng([version, *prompt.tolist()])
            lengths = rng.integers(
                1, self.sampling.max_new_tokens, samples or self.sampling.samples
            )
            ids = [rng.integers(3, 300, n, dtype=np.int32) for n in lengths]
            drawn.append([Completion(one, True, -float(len(one)), version) for one in ids])
        return drawn


def run_case(
    settings: dict[str, Any], die_at: int | None = None, fixed: bool = False
) -> dict[str, Any]:
    """Train, dying in the step number `die_at` of this process, before its update; returns what was seen."""
    make_sampler = online_module.make_sampler
    if fixed:
        online_module.make_sampler = lambda *given: FixedSampler(make_sampler(*given).sampling)
    seen: dict[str, Any] = {"gradients": [], "dtypes": set()}
    make_optimizer, take_step = train_module.make_optimizer, Trainer.take_step
    inside = False  # saving and loading the state of an optimizer makes it step without gradients

    def watched(policy: Policy, config: RunConfig) -> torch.optim.Optimizer:
        optimizer = make_optimizer(policy, config)

        def before_step(*_: Any) -> None:
            if not inside:
                return
            if len(seen["gradients"]) + 1 == die_at:
                raise Died
            trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
            seen["gradients"].append({name: full(p.grad) for name, p in trained.items()})
            seen["dtypes"] |= {str(p.dtype) for p in trained.values()}

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    def step(trainer: Trainer, work: Step) -> dict[str, float]:
        nonlocal inside
        inside = True
        try:
            return take_step(trainer, work)
        finally:
            inside = False

    train_module.make_optimizer, Trainer.take_step = watched, step
    try:
        train_module.train(RunConfig(**settings))
    except Died:
        assert die_at is not None
    finally:
        train_module.make_optimizer, Trainer.take_step = make_optimizer, take_step
        online_module.make_sampler = make_sampler
    return seen


def main() -> None:
    torch.set_num_threads(1)
    world = start_world("cpu")
    for name, case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        if world.is_main:
            print(f"--- {name}", flush=True)
        if "argv" in case:
            assert cli.main(case["argv"]) == 0
            return  # it has left the world
        seen = run_case(case["config"], case.get("die_at"), case.get("fixed", False))
        if world.is_main:
            seen["dtypes"] = sorted(seen["dtypes"])
            torch.save(seen, Path(case["config"]["output_dir"]) / "seen.pt")
        world.barrier()
    stop_world()


if __name__ == "__main__":
    main()
