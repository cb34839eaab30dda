"""Run training cases and record every gradient: a worker of ranks.py, imported for one process.

Its argument is a JSON file of cases by name, in order:

    {"config": settings, "die_at": 4, "fixed": true}    a run; all but config may be left out
    {"precompute": settings}                            reference log-probs of the records
    {"argv": ["train", ...]}                            the command line; must come last

die_at: the process dies in this step, before the update, when saves are done. fixed: samples
depend on the prompts alone, and are the same on any number of ranks. file_bytes: size of a weight
file. begun: a checkpoint of another case, to go on from.

A run writes output_dir/seen.pt: the full gradient of every trained parameter before every optimizer
step, the dtypes of the trained weights, the number of models whose ranks read their own rows, and a
hash of the trained weights that every rank holds at the end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import una_fast.model.activations as memory_module
import una_fast.model.sharded_export as export_module
import una_fast.train.build as build_module
from una_fast import cli
from una_fast.config import RunConfig
from una_fast.distributed import reshard, start_world, stop_world
from una_fast.model.policy import Policy
from una_fast.model.sharded_export import FILE_BYTES
from una_fast.online.sampling import Completion, Sampling
from una_fast.train.loop import Trainer, train
from una_fast.train.precompute import precompute_reference


class Died(Exception):
    """A stand-in for the death of a process."""


def full(tensor: Tensor) -> Tensor:
    """Copy a gradient, gathered if it is sharded."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()


class Collectives(TorchDispatchMode):
    """Counts the calls of torch's collectives in a block.

    calls: name -> calls of this rank
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


class FixedSampler:
    """Samples that depend on nothing but the prompt and the version of the policy."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def sample(
        self, prompts: Any, *, seed: int, samples: int | None = None, version: int = 0
    ) -> Any:
        count = samples or self.sampling.samples
        drawn = []
        for prompt in prompts:
            rng = np.random.default_rng([version, *prompt.tolist()])
            lengths = rng.integers(1, self.sampling.max_new_tokens, count)
            ids = [rng.integers(3, 300, n, dtype=np.int32) for n in lengths]
            drawn.append([Completion(one, True, -float(len(one)), version) for one in ids])
        return drawn


def run_case(
    settings: dict[str, Any],
    die_at: int | None = None,
    fixed: bool = False,
    file_bytes: int = FILE_BYTES,
) -> dict[str, Any]:
    """Train, dying in step number `die_at` of this process, before the update; return the record.

    {"gradients": [{name: gradient} per step], "dtypes": dtypes of the trained weights,
    "in_shards": models that were read in shards, "held": [hash of the trained weights of a rank],
    "collectives": calls by name, of the first step}
    """
    make_sampler = build_module.make_sampler
    make_optimizer = build_module.make_optimizer
    take_step = Trainer.take_step
    read_shards = build_module.read_shards
    seen: dict[str, Any] = {"gradients": [], "dtypes": set(), "in_shards": 0}
    trained_policy: list[Policy] = []
    inside = False  # saving and loading the state of an optimizer steps without gradients

    def fixed_sampler(*given: Any) -> FixedSampler:
        return FixedSampler(make_sampler(*given).sampling)

    def counted(*given: Any) -> None:
        seen["in_shards"] += 1
        read_shards(*given)

    def watched(policy: Policy, config: RunConfig) -> torch.optim.Optimizer:
        optimizer = make_optimizer(policy, config)
        trained_policy.append(policy)

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

    def step(trainer: Trainer, work: Any) -> dict[str, float]:
        nonlocal inside
        if len(seen["gradients"]) + 1 == die_at:
            # What a death leaves of a save in the background depends on the disk; tests do not.
            trainer.saver.finish()
        inside = True
        made = Collectives()
        # Counting doubles the time of a step, and a dispatch mode does not go with compiled code.
        counts = "collectives" not in seen and settings.get("optimizer") != "adamw_8bit"
        try:
            with made if counts else contextlib.nullcontext():
                return take_step(trainer, work)
        finally:
            inside = False
            if counts:
                seen["collectives"] = dict(made.calls)

    sampler = fixed_sampler if fixed else make_sampler
    # torchao compiles its step: traced as ever, but without a C++ compiler
    compiled = functools.partial(torch.compile, backend="aot_eager")
    with (
        mock.patch.object(build_module, "make_sampler", sampler),
        mock.patch.object(build_module, "make_optimizer", watched),
        mock.patch.object(build_module, "read_shards", counted),
        mock.patch.object(export_module, "FILE_BYTES", file_bytes),
        mock.patch.object(Trainer, "take_step", step),
        mock.patch.object(torch, "compile", compiled),
        # The hidden states of tests are worth moving.
        mock.patch.object(memory_module, "SMALL", 1),
    ):
        try:
            train(RunConfig(**settings))
        except Died:
            assert die_at is not None
    seen["held"] = hashes_of_ranks(trained_policy[0])
    return seen


def hashes_of_ranks(policy: Policy) -> list[str]:
    """Return a hash of the trained weights that a rank holds, of every rank."""
    reshard(policy.causal_lm)
    digest = hashlib.sha256()
    for parameter in policy.trainable_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        digest.update(local.detach().float().numpy().tobytes())
    if not dist.is_initialized():
        return [digest.hexdigest()]
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, digest.hexdigest())
    return found


def main() -> None:
    """Run the cases of a file on this rank."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    for name, case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        if world.is_main:
            print(f"--- {name}", flush=True)
        if "precompute" in case:
            precompute_reference(RunConfig(**case["precompute"]))
            continue
        if "argv" in case:
            assert cli.main(case["argv"]) == 0
            return  # the command line has left the world
        settings = case.pop("config")
        begun = case.pop("begun", None)
        if begun is not None and world.is_main:
            shutil.copytree(begun, Path(settings["output_dir"], Path(begun).name))
        world.barrier()
        seen = run_case(settings, **case)
        if world.is_main:
            seen["dtypes"] = sorted(seen["dtypes"])
            torch.save(seen, Path(settings["output_dir"]) / "seen.pt")
        world.barrier()
    stop_world()
