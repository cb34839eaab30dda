"""The loop: batches in, an aligned model out.

for every step:   micro-batches -> loss (divided by the units of the global batch) -> backward
                  clip -> optimizer -> schedule -> report -> evaluate -> checkpoint
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, get_scheduler

from una_fast.capacity.fit import longest_rollouts, refuse_too_large
from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, Prompt
from una_fast.data.loader import Loader, Step, num_steps
from una_fast.distributed import World, local_scalar, shard, start_world
from una_fast.losses import UnaOutput
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import Policy
from una_fast.model.reference import (
    AdapterReference,
    CachedReference,
    FrozenReference,
    GivenReference,
    Reference,
    without_cached_logps,
)
from una_fast.online.steps import Online
from una_fast.optim import gradient_norm, make_optimizer
from una_fast.resolved import Facts, find_facts, load_frozen, load_trained, resolve, scoring_of
from una_fast.train.checkpoint import (
    complete_checkpoints,
    load_training_state,
    read_state,
    save_checkpoint,
    save_model,
)
from una_fast.train.metrics import Clock, Meter, peak_gib, peak_tflops
from una_fast.train.report import Reporter, model_card
from una_fast.train.run_data import RunData, load_data


class DivergedError(RuntimeError):
    """The gradient is not finite: the run cannot go on."""


@dataclass
class TrainResult:
    """What a finished run leaves: where the model is, the steps taken, and the last training and eval metrics."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]


def train(config: RunConfig) -> TrainResult:
    """Run a configuration to its end, and save the model in Hugging Face form in config.output_dir."""
    world = start_world(config.device)
    torch.manual_seed(config.seed)
    output_dir = Path(config.output_dir)
    checkpoint = prepare_output(config, output_dir, world)
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    data = load_data(config, tokenizer)

    trainer = Trainer(config, world, tokenizer, data, checkpoint)
    for report in data.reports:
        trainer.reporter.say(str(report))
    if world.is_main:
        config.save(output_dir / "config.yaml")
        text = json.dumps([vars(report) for report in data.reports], indent=1)
        (output_dir / "data.json").write_text(text + "\n", encoding="utf-8")
    steps, metrics = trainer.run()
    save_model(output_dir, trainer.policy, tokenizer, world)
    if world.is_main:
        (output_dir / "README.md").write_text(
            model_card(config, data.reports, metrics, trainer.policy.is_adapter), encoding="utf-8"
        )
    world.barrier()
    return TrainResult(output_dir, steps, metrics)


def prepare_output(config: RunConfig, output_dir: Path, world: World) -> Path | None:
    """Create the output directory; returns the checkpoint to resume from, if any."""
    checkpoints = complete_checkpoints(output_dir)
    used = (output_dir / "metrics.jsonl").exists() or bool(checkpoints)
    if used and not config.resume:
        raise ValueError(
            f"{output_dir} holds an earlier run; set resume=true to continue it, or another output_dir"
        )
    world.barrier()  # every rank looked before the first one writes
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
    return checkpoints[-1] if checkpoints else None


class Trainer:
    """The parts of a run, and the loop over its steps."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        data: RunData,
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.objective = config.objective()
        every = data.examples()
        facts = find_facts(config, every, device=world.device.type, ranks=world.size)
        self.resolved = resolve(config, facts)
        if self.resolved.reference != "cached":
            data.records = [without_cached_logps(part) for part in data.records]
            data.eval_records = without_cached_logps(data.eval_records)
        self._load_models(facts, every, data.all_prompts(), checkpoint)
        records = self._loader(
            data.records, data.weights, config.batch_size - config.online_batch_size()
        )
        self.eval_loader = self._loader([data.eval_records], [1.0], config.batch_size)
        self.eval_prompts = data.eval_prompts
        self.online: Online | None = None
        if config.mode != "offline":
            prompts = self._loader(data.prompts, data.prompt_weights, config.online_batch_size())
            scorers = self.policy, self.reference, self.scoring
            self.online = Online(
                config,
                self.resolved,
                world,
                tokenizer,
                *scorers,
                prompts,
                records,
                data.all_prompts(),
            )
        # Steps of an online run bring the log-probs that they were sampled with.
        self.step_reference: Reference = GivenReference() if self.online else self.reference
        self.source: Loader | Online = self.online or records
        identities = [
            loader.identity() for loader in (records, self.online and self.online.prompts) if loader
        ]
        run = {
            "reference": self.reference.identity,
            "data": "+".join(identities),
            **config.trajectory(),
        }
        if self.online:
            run["ranks"] = world.size  # each draws a stream of its own
        self.state: dict[str, Any] = {"step": 0, "run": run}
        if checkpoint:
            self.state = read_state(checkpoint)
            refuse_another_run(checkpoint, self.state["run"], run)
        self.first_step = self.state["step"]
        self.total_steps = num_steps(self.source.steps_per_epoch, config.epochs, config.max_steps)
        self.optimizer = make_optimizer(self.policy, config)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
            self.optimizer,
            num_warmup_steps=round(config.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )
        self.meter, self.clock = Meter(self.objective, world.device), Clock()
        if checkpoint:
            load_training_state(checkpoint, self.policy, self.optimizer, world, self._refreshed())
            self.scheduler.load_state_dict(self.state["scheduler"])
            if world.is_main:  # see Meter.pool
                self.meter.sums += torch.tensor(
                    self.state["meter"], dtype=torch.float64, device=world.device
                )
            self.clock.spent = self.state["seconds"]
            if self.online:
                self.online.load_state_dict(self.state["online"])
        self.reporter = Reporter(config, world, self.total_steps, self.first_step)

    def _loader(
        self, sets: list[list[Any]], weights: list[float], batch_size: int
    ) -> Loader | None:
        """None where there is nothing to load."""
        if not any(sets):
            return None
        return Loader(
            sets,
            weights,
            batch_size=batch_size,
            micro_batch_size=self.config.micro_batch_size,
            max_tokens_per_batch=self.config.max_tokens_per_batch,
            packed=self.policy.packed,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _load_models(
        self,
        facts: Facts,
        examples: list[Example],
        prompts: list[Prompt],
        checkpoint: Path | None,
    ) -> None:
        """Policy (from the checkpoint, if any) and reference (always from the start of the run)."""
        config, world, run = self.config, self.world, self.resolved
        planned = examples + longest_rollouts(prompts, config)
        refuse_too_large(config, facts, planned)
        self.policy = load_trained(config, run, checkpoint)
        check_token_ids(examples + prompts, self.policy)
        check_room(prompts, self.policy, config.max_new_tokens)
        self.scoring = scoring_of(config, run)
        models = [self.policy]
        self.reference: Reference
        if run.reference == "cached":
            self.reference = CachedReference(examples)
        elif run.reference == "adapter":
            self.reference = AdapterReference(self.policy, self.scoring)
        else:
            models.append(load_frozen(config, run))
            self.reference = FrozenReference(models[1], self.scoring)
        self.models = models
        for policy in models:
            if world.sharded:
                shard(policy.causal_lm, world, run.compute)  # which moves it, layer by layer
            else:
                policy.model.to(world.device)

    def run(self) -> tuple[int, dict[str, float]]:
        """All steps that are left. Returns the steps taken, and the last metrics."""
        config, last, step = self.config, self.reporter.last, self.first_step
        if step == 0:
            last |= self.evaluate(0)
        for step, work in enumerate(
            self.source.steps(self.first_step, self.total_steps), start=self.first_step + 1
        ):
            taken = self.take_step(work)
            self.reporter.advance()
            if self.online:
                self.reporter.completions(step, self.online.take_completions())
            if config.reference_refresh and step % config.reference_refresh == 0:
                self.reference.refresh(self.policy)
            if step % config.log_every == 0 or step == self.total_steps:
                last |= self.log(step, {"epoch": work.epoch, **taken})
            if step == self.total_steps or (config.eval_every and step % config.eval_every == 0):
                last |= self.evaluate(step)
            if config.save_every and step % config.save_every == 0:
                self.save(step)
        if self.online:
            if self.online.stopped:
                self.reporter.say(self.online.stopped)
                last |= self._stop(step)
            self.online.rewards.close()
        self.reporter.close()
        return step, last

    def _stop(self, step: int) -> dict[str, float]:
        """What a run leaves that is stopped before its end: the samples and numbers that stopped it, too."""
        self.reporter.completions(step + 1, self.online.take_completions())
        metrics = self.log(step, {}) | {"stopped_at_step": step}
        if not (self.config.eval_every and step % self.config.eval_every == 0):
            metrics |= self.evaluate(step)
        if not (self.config.save_every and step % self.config.save_every == 0):
            self.save(step)  # to go on from with another ceiling
        return metrics

    def take_step(self, work: Step) -> dict[str, float]:
        """Gradients of the global batch, then one optimizer step. Returns the learning rate that it was taken with, and
        the gradient norm before clipping."""
        for examples in work.micro_batches:
            out = self.score(examples, work.num_units, self.step_reference)
            out.loss.backward()
        parameters = self.policy.trainable_parameters()
        norm = gradient_norm(parameters)
        value = local_scalar(norm)
        if not value < float("inf"):
            origins = (
                ", ".join(e.origin for part in work.micro_batches for e in part) or "another rank"
            )
            raise DivergedError(
                f"the gradient norm is {value} in the step of the records {origins}; lower learning_rate or beta, or "
                "look at these records. A checkpoint of this run, if there is one, is from before this step"
            )
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        taken = {"grad_norm": value, "learning_rate": self.scheduler.get_last_lr()[0]}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def score(self, examples: list[Example], num_units: int, reference: Reference) -> UnaOutput:
        """One micro-batch against a reference; its metrics go to the meter."""
        packed = self.policy.packed
        batch = collate(
            examples, packed=packed, device=self.world.device, pad_id=self.tokenizer.pad_token_id
        )
        out = self.scoring.loss(
            self.policy, batch, reference.logps(batch), self.objective, max(num_units, 1)
        )
        self.meter.add(batch, out)
        return out

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the whole evaluation set, named eval_*; nothing if there is none."""
        if self.eval_loader is None and not self.eval_prompts:
            return {}
        self.clock.pause()
        metrics: dict[str, float] = {}
        if self.eval_loader is not None:
            training, self.meter = self.meter, Meter(self.objective, self.world.device)
            for work in self.eval_loader.in_order():
                for examples in work.micro_batches:
                    self.score(examples, work.num_units, self.reference)
            metrics, self.meter = self._measured(), training
        if self.eval_prompts:
            metrics |= self.online.evaluate(self.eval_prompts)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.reporter.step(step, metrics)
        self.clock.go_on()
        return metrics

    def log(self, step: int, taken: dict[str, float]) -> dict[str, float]:
        """Metrics since the last report, with what the last step was taken with."""
        seconds = self.clock.take()
        metrics = self._measured()
        metrics |= taken | {
            "tok_per_sec": metrics["tokens"] / seconds,
            "memory/peak_gib": peak_gib(self.world.device),
        }
        if self.online:
            rollouts = self.online.take()  # none in a later inner epoch
            metrics |= rollouts
            metrics["time/train"] = seconds - sum(
                rollouts.get(f"time/{part}", 0.0) for part in ("generate", "reward")
            )
        peak = peak_tflops(self.world.device)
        if peak is not None and self.resolved.compute == torch.bfloat16:  # the peak is that of bf16
            spent = metrics.get("time/train", seconds)
            metrics["mfu"] = (
                self._flops(metrics["tokens"]) / spent / (peak * 1e12 * self.world.size)
            )
        self.reporter.step(step, metrics)
        return metrics

    def _measured(self) -> dict[str, float]:
        """What the meter has taken in. In online runs the KL is that of fresh samples; the meter's is of records, and
        of samples that the policy has moved on from."""
        metrics = self.meter.take(self.world)
        if self.online and "kl" in metrics:
            metrics["log_ratio"] = metrics.pop("kl")
        return metrics

    def _refreshed(self) -> Policy | None:
        """The reference, where it changes during the run."""
        return self.reference.policy if self.config.reference_refresh else None

    def _flops(self, tokens: float) -> float:
        """Of the linear layers alone: 2 per weight and token forward, 4 backward (2 where weights are frozen), and 2
        for a reference that is computed. An estimate from above: the head is counted for every token."""
        model = self.policy.causal_lm
        weights = sum(p.numel() for p in model.parameters())
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            weights -= model.get_input_embeddings().weight.numel()  # a look-up
        passes = (4 if self.policy.is_adapter else 6) + (
            0 if isinstance(self.reference, CachedReference) else 2
        )
        return passes * weights * tokens

    def save(self, step: int) -> None:
        self.clock.pause()
        self.state |= {
            "step": step,
            "scheduler": self.scheduler.state_dict(),
            "meter": self.meter.pool(self.world),
            "seconds": self.clock.spent,
        }
        if self.online:
            self.state["online"] = self.online.state_dict()
        path = save_checkpoint(
            Path(self.config.output_dir),
            self.policy,
            self.optimizer,
            self.tokenizer,
            self.world,
            self.state,
            self.config.keep_checkpoints,
            self._refreshed(),
        )
        self.reporter.say(f"saved {path}")
        self.clock.go_on()


def refuse_another_run(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """ValueError, by name, for whatever would make the continued run differ from the one that was interrupted."""
    changed = [
        f"{name} was {saved.get(name)} and is {value}"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} belongs to another run: {'; '.join(changed)}. Restore these to continue it, or set another "
            "output_dir to start anew"
        )


def check_token_ids(examples: list[Example], policy: Policy) -> None:
    """ValueError for a tokenizer with more tokens than the model has embeddings."""
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for example in examples:
        largest = max(int(ids.max()) for ids in (example.prompt_ids, *example.responses))
        if largest >= size:
            raise ValueError(
                f"{example.origin}: the tokenizer gives token {largest}, but the model has {size} embeddings; set "
                "tokenizer to the model's own"
            )


def check_room(prompts: list[Prompt], policy: Policy, max_new_tokens: int) -> None:
    """ValueError for a prompt whose responses would leave the positions that the model has."""
    positions = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        if positions is not None and len(prompt.prompt_ids) + max_new_tokens > positions:
            raise ValueError(
                f"{prompt.origin}: a prompt of {len(prompt.prompt_ids)} tokens and max_new_tokens={max_new_tokens} are "
                f"over the {positions} positions of the model; lower max_new_tokens, or set max_tokens={positions} and "
                "prompt_overflow: truncate_left"
            )
