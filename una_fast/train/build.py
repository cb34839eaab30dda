"""Build the parts of a run: settings and data -> models, loaders, optimizer, state.

    facts -> ResolvedRun (printed) -> memory check -> loaders -> [checkpoint's state] -> OpenedRun
          -> policy, reference -> online steps -> optimizer, schedule, metrics -> RunParts

The reference is always from the start of the run; the policy is from the checkpoint, if any.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedTokenizerBase

from una_fast.capacity.fit import Planned, longest_rollouts, refuse_too_large
from una_fast.config import RunConfig, Schedule
from una_fast.data.examples import Example, Prompt
from una_fast.data.loader import Loader, num_steps
from una_fast.distributed import World
from una_fast.model.policy import Policy, shard_policy
from una_fast.model.reference import (
    AdapterReference,
    CachedReference,
    FrozenReference,
    Reference,
)
from una_fast.model.scoring import Scoring
from una_fast.model.sharded_loading import read_shards
from una_fast.online.anchors import Anchors
from una_fast.online.collect import RolloutCollector
from una_fast.online.samplers import make_sampler
from una_fast.online.steps import Online
from una_fast.optim import make_optimizer
from una_fast.parallel import ParallelOptions
from una_fast.resolved import (
    ResolvedRun,
    find_facts,
    load_frozen,
    load_trained,
    resolve,
    scoring_of,
)
from una_fast.rewards.settings import parse_rewards
from una_fast.rewards.total import Rewards
from una_fast.train.checkpoint import read_state
from una_fast.train.data_checks import check_data
from una_fast.train.metrics import Clock, Meter
from una_fast.train.ref_cache import refuse_other_model
from una_fast.train.report import Reporter
from una_fast.train.run_data import RunData
from una_fast.train.training_state import load_training_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run, ready for the next step.

    resolved: the decisions of the run
    scoring: how heads are computed
    source: gives the steps; the loader of the records, or `online`
    online: steps that are sampled; None in an offline run
    eval_loader: held-out records; None without records
    eval_prompts: held-out prompts
    refreshed: the reference, if its weights change during the run; saved in checkpoints
    state: content of state.json of the next checkpoint, up to now
    total_steps: optimizer steps of the whole run
    """

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    resolved: ResolvedRun
    policy: Policy
    reference: Reference
    scoring: Scoring
    source: Loader | Online
    online: Online | None
    eval_loader: Loader | None
    eval_prompts: list[Prompt]
    refreshed: Policy | None
    optimizer: Optimizer
    scheduler: LRScheduler
    meter: Meter
    clock: Clock
    reporter: Reporter
    state: dict[str, Any]
    total_steps: int


@dataclass(frozen=True)
class OpenedRun:
    """A run before its models are loaded: what it is, and what is left of it to do.

    resolved: the decisions of the run
    loaders: of the data
    state: content of state.json: of the checkpoint, or of a new run
    total_steps: optimizer steps of the whole run
    checkpoint: a verified checkpoint to go on from; None starts anew
    memory: of the largest batch; None where it is not known
    """

    config: RunConfig
    world: World
    data: RunData
    resolved: ResolvedRun
    loaders: _Loaders
    state: dict[str, Any]
    total_steps: int
    checkpoint: Path | None
    memory: Planned | None


def open_run(
    config: RunConfig,
    world: World,
    data: RunData,
    checkpoint: Path | None = None,
    *,
    show: bool = False,
) -> OpenedRun:
    """Decide how a run is run, and read the state that it goes on from.

    config: settings of the run
    world: the ranks
    data: records and prompts; not changed
    checkpoint: a verified checkpoint to go on from; None starts anew
    show: print the decisions of the run

    ValueError for a run that does not fit into memory, and for a checkpoint of another run.
    """
    records, prompts = data.examples(), data.all_prompts()
    facts = find_facts(config, records, device=world.device.type, ranks=world.size)
    run = resolve(config, facts)
    if show and world.is_main:
        print("\n".join(run.lines()), flush=True)
    if run.reference != "cached":
        data = data.without_cached_logps()
    largest = records + longest_rollouts(prompts, config)
    memory = world.on_main(lambda: refuse_too_large(config, facts, largest))
    loaders = _make_loaders(config, world, data, run)
    state = _open_state(config, world, run, loaders, checkpoint)
    total_steps = num_steps(loaders.steps_per_epoch(config), config.epochs, config.max_steps)
    if config.max_steps is not None and total_steps < config.max_steps:
        raise ValueError(
            f"max_steps={config.max_steps} is more than the {total_steps} steps that "
            f"epochs={config.epochs:g} gives; raise epochs, or leave epochs out"
        )
    planned = state.setdefault("total_steps", total_steps)
    if planned != total_steps and world.is_main:
        logger.warning(
            "%s was planned for %d steps, and epochs and max_steps now give %d: from here on the "
            "learning rate follows the schedule of %d steps",
            config.output_dir,
            planned,
            total_steps,
            total_steps,
        )
    state["total_steps"] = total_steps
    return OpenedRun(config, world, data, run, loaders, state, total_steps, checkpoint, memory)


def build_run(opened: OpenedRun, tokenizer: PreTrainedTokenizerBase) -> RunParts:
    """Load the models of a run, and build the other parts.

    opened: the run
    tokenizer: of the policy

    ValueError for data that does not go with the model, and for a checkpoint of another reference.
    """
    config, world, run = opened.config, opened.world, opened.resolved
    loaders, state, checkpoint = opened.loaders, opened.state, opened.checkpoint
    prompts = opened.data.all_prompts()
    models = _load_models(config, world, tokenizer, run, opened.data, checkpoint)
    reference = {"reference": models.reference.identity}
    if checkpoint is not None:
        refuse_another_run(checkpoint, state["run"], reference)
    state["run"] |= reference
    state["resolved"] = run.plain()
    online = None
    if config.mode != "offline":
        online = _make_online(config, world, tokenizer, run, models, loaders, prompts)
    training = _make_training(config, world, models, state, opened.total_steps, checkpoint)
    if checkpoint is not None and online is not None:
        online.load_state_dict(state["online"])
    return RunParts(
        config=config,
        world=world,
        tokenizer=tokenizer,
        resolved=run,
        **vars(models),
        source=online or loaders.records,
        online=online,
        eval_loader=loaders.evaluation,
        eval_prompts=opened.data.eval_prompts,
        **vars(training),
        reporter=Reporter(config, world, opened.total_steps, state["step"], checkpoint),
        state=state,
        total_steps=opened.total_steps,
    )


# --- optimizer and clocks -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Training:
    """Parts of a run with a state that changes at every step; see RunParts."""

    refreshed: Policy | None
    optimizer: Optimizer
    scheduler: LRScheduler
    meter: Meter
    clock: Clock


def _make_training(
    config: RunConfig,
    world: World,
    models: _Models,
    state: dict[str, Any],
    total_steps: int,
    checkpoint: Path | None,
) -> _Training:
    """Build optimizer, schedule and metrics; load their state from the checkpoint, if any."""
    optimizer = make_optimizer(models.policy, config)
    scheduler = _make_scheduler(config, optimizer, total_steps)
    meter = Meter(config.objective(), world.device)
    clock = Clock(state.get("seconds", 0.0))
    refreshed = models.reference.policy if config.reference_refresh else None
    if checkpoint is not None:
        load_training_state(checkpoint, models.policy, optimizer, world, refreshed)
        scheduler.load_state_dict(state["scheduler"])
        meter.load_state_dict(state["meter"], world)
    return _Training(refreshed, optimizer, scheduler, meter, clock)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Models:
    policy: Policy
    reference: Reference
    scoring: Scoring


def _load_models(
    config: RunConfig,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    run: ResolvedRun,
    data: RunData,
    checkpoint: Path | None,
) -> _Models:
    """Load policy and reference onto the device, sharded where the run has several ranks."""
    records, prompts = data.examples(), data.all_prompts()
    policy = load_trained(config, run, checkpoint)
    check_data(records, prompts, policy, tokenizer, config.max_new_tokens)
    scoring = scoring_of(config, run, world.context)
    if world.sharded:  # a whole model is moved to the device when all models are there
        place(policy, world, run.compute, config.parallel)
    reference: Reference
    if run.reference == "cached":
        reference = CachedReference(records)
        if policy.is_adapter:  # the checkpoints do not hold the weights below the adapter
            reference.identity += "+" + AdapterReference(policy, scoring).identity
        if checkpoint is None:  # a resumed policy has moved, and its checkpoint knows the reference
            new_adapter = config.lora is not None
            refuse_other_model(data.caches, policy, run, new_adapter=new_adapter)
    elif run.reference == "adapter":
        reference = AdapterReference(policy, scoring)
    else:
        frozen = load_frozen(config, run)
        if world.sharded:
            place(frozen, world, run.compute, config.parallel)
        reference = FrozenReference(frozen, scoring)
    if not world.sharded:
        place(policy, world, run.compute)
        if isinstance(reference, FrozenReference):
            place(reference.policy, world, run.compute)
    return _Models(policy, reference, scoring)


def place(
    policy: Policy,
    world: World,
    compute: torch.dtype | None,
    parallel: ParallelOptions | None = None,
) -> None:
    """Move a policy to the device; of several ranks, each takes its shards, from the files.

    policy: as loaded for a run; changed in place
    world: the ranks; all of them must call
    compute: dtype of gathered weights; None: as loaded
    parallel: settings of the run
    """
    if not world.sharded:
        policy.model.to(world.device)
        return
    shard_policy(policy, world, compute, parallel)
    if policy.unread is not None:
        read_shards(policy.causal_lm, policy.unread, world, parallel)
        policy.unread = None


# --- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaders:
    """Loaders of the data of a run; None without data."""

    records: Loader | None
    prompts: Loader | None
    evaluation: Loader | None

    def steps_per_epoch(self, config: RunConfig) -> int:
        """Return the optimizer steps of an epoch: of the records, where there are any."""
        if self.records is not None:
            steps = self.records.steps_per_epoch
        else:
            steps = self.prompts.steps_per_epoch
        return steps * (1 if config.mode == "offline" else config.inner_epochs)


def _make_loaders(config: RunConfig, world: World, data: RunData, run: ResolvedRun) -> _Loaders:
    def loader(
        sources: Sequence[Sequence[Example]], weights: Sequence[float], batch_size: int
    ) -> Loader | None:
        if not any(sources):
            return None
        return Loader(
            sources,
            weights,
            batch_size=batch_size,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_batch=config.max_tokens_per_batch,
            packed=run.packed,
            rope_limits=run.rope_limits,
            seed=config.seed,
            rank=world.data_rank,
            world_size=world.data_size,
        )

    prompts_per_step = config.online_batch_size()
    records_per_step = config.batch_size - prompts_per_step
    return _Loaders(
        records=loader(data.records, data.weights, records_per_step),
        prompts=loader(data.prompts, data.prompt_weights, prompts_per_step),
        evaluation=loader([data.eval_records], [1.0], config.batch_size),
    )


def _make_online(
    config: RunConfig,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    run: ResolvedRun,
    models: _Models,
    loaders: _Loaders,
    prompts: Sequence[Prompt],
) -> Online:
    sampler = make_sampler(config, models.policy, tokenizer, models.scoring, world)
    rewards = Rewards(
        parse_rewards(config.rewards),
        missing_eos_penalty=config.missing_eos_penalty,
        device=world.device,
        dtype=run.compute,
        trust_remote_code=config.trust_remote_code,
    )
    anchors = Anchors(
        config,
        world,
        models.policy,
        models.reference,
        models.scoring,
        pad_id=tokenizer.pad_token_id,
        compute=run.compute,
    )
    collector = RolloutCollector(world, tokenizer, sampler, rewards, prompts)
    return Online(config, collector, anchors, loaders.prompts, loaders.records)


# --- state ---------------------------------------------------------------------------------------


def _open_state(
    config: RunConfig,
    world: World,
    run: ResolvedRun,
    loaders: _Loaders,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Return the state of a new run, or of the checkpoint.

    Settings, dtypes and data are compared with the checkpoint's before a model is loaded: another
    setting may not go with the checkpoint's weights.
    """
    used = [loader for loader in (loaders.records, loaders.prompts) if loader is not None]
    identity = {
        "data": "+".join(loader.identity() for loader in used),
        **config.trajectory(),
    }
    if config.mode != "offline":
        identity["ranks"] = world.size  # each rank draws from a random stream of its number
    if checkpoint is None:
        return {"step": 0, "run": identity}
    state = read_state(checkpoint)
    refuse_another_run(checkpoint, state["run"], identity)
    if "resolved" in state:
        decided = {name: run.plain()[name] for name in ("compute", "weights")}
        refuse_another_run(checkpoint, state["resolved"], decided)
    return state


def refuse_another_run(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError, by name, if anything would change the course of a continued run.

    checkpoint: for the message
    saved, current: name -> value of everything that determines the steps of a run
    """
    changed = []
    for name, value in current.items():
        if saved.get(name) != value:
            changed.append(f"{name} was {saved.get(name)} and is {value}")
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(changed)}. Restore these to "
            "continue it, or set another output_dir to start anew"
        )


def _make_scheduler(config: RunConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    warmup = round(config.warmup_ratio * total_steps)
    return LambdaLR(
        optimizer,
        lambda taken: rate_factor(config.lr_schedule, taken, warmup=warmup, total=total_steps),
    )


def rate_factor(schedule: Schedule, taken: int, *, warmup: int, total: int) -> float:
    """Return the factor of the learning rate for the step after `taken` steps.

    schedule: cosine | linear | constant
    taken: steps taken so far, from 0
    warmup: steps over which the factor rises to 1; the first of them has a factor above 0
    total: steps of the run; the factor falls to 0 after them, and every step has a factor above 0
    """
    if taken < warmup:
        return (taken + 1) / warmup
    past = (taken - warmup) / max(total - warmup, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(1.0 - past, 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * min(past, 1.0)))
