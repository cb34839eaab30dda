"""The loop: batches in, an aligned model out.

for every step:   micro-batches -> loss (divided by the units of the global batch) -> backward
                  clip -> optimizer -> schedule -> report -> evaluate -> checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, get_scheduler

from una_fast.checkpoint import complete_checkpoints, load_training_state, read_state, save_checkpoint, save_model
from una_fast.config import RunConfig
from una_fast.data import Example, Source, SourceReport, collate, load_examples
from una_fast.loader import Loader, Step, hold_out
from una_fast.losses import UnaOutput
from una_fast.optim import gradient_norm, make_optimizer
from una_fast.policy import Policy, load_policy, load_tokenizer
from una_fast.reference import (
    AdapterReference,
    CachedReference,
    FrozenReference,
    Reference,
    has_cached_logps,
    without_cached_logps,
)
from una_fast.report import Clock, Meter, Reporter, model_card, peak_gib, peak_tflops
from una_fast.run_report import refuse_too_large
from una_fast.scoring import Scoring, autocast_dtype, match_autocast, run_dtypes
from una_fast.sharding import World, local_scalar, shard, start_world


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
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    train_sets, eval_set, reports, weights = load_data(config, tokenizer)

    trainer = Trainer(config, world, tokenizer, train_sets, eval_set, weights, checkpoint)
    for report in reports:
        trainer.reporter.say(str(report))
    if world.is_main:
        config.save(output_dir / "config.yaml")
        data = json.dumps([vars(report) for report in reports], indent=1)
        (output_dir / "data.json").write_text(data + "\n", encoding="utf-8")
    metrics = trainer.run()
    save_model(output_dir, trainer.policy, tokenizer, world)
    if world.is_main:
        (output_dir / "README.md").write_text(
            model_card(config, reports, metrics, trainer.policy.is_adapter), encoding="utf-8"
        )
    world.barrier()
    return TrainResult(output_dir, trainer.total_steps, metrics)


def prepare_output(config: RunConfig, output_dir: Path, world: World) -> Path | None:
    """Create the output directory; returns the checkpoint to resume from, if any."""
    checkpoints = complete_checkpoints(output_dir)
    used = (output_dir / "metrics.jsonl").exists() or bool(checkpoints)
    if used and not config.resume:
        raise ValueError(f"{output_dir} holds an earlier run; set resume=true to continue it, or another output_dir")
    world.barrier()  # every rank looked before the first one writes
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
    return checkpoints[-1] if checkpoints else None


def load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[Example]], list[Example], list[SourceReport], list[float]]:
    """(training examples per source, evaluation examples, what became of the records, weights of the sources)."""
    unit_scores = config.objective().scores_in_unit_interval
    reports: list[SourceReport] = []

    def load(entries: Sequence[str | dict[str, Any]]) -> tuple[list[list[Example]], list[float]]:
        sets, weights = [], []
        for entry in entries:
            source = Source.parse(entry, config.record_options())
            examples, report = load_examples(source, tokenizer, require_unit_scores=unit_scores)
            if not examples:
                raise ValueError(f"{source.path} gives no usable record ({report})")
            sets.append(examples)
            weights.append(source.weight)
            reports.append(report)
        return sets, weights

    train_sets, weights = load(config.data)
    eval_set = [example for part in load(config.eval_data)[0] for example in part]
    if config.eval_fraction:
        split = [hold_out(part, config.eval_fraction, config.seed) for part in train_sets]
        train_sets, eval_set = [kept for kept, _ in split], [e for _, held in split for e in held]
        if not all(train_sets):
            raise ValueError(f"eval_fraction={config.eval_fraction} leaves a source without training records")
    return train_sets, eval_set, reports, weights


class Trainer:
    """The parts of a run, and the loop over its steps."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        train_sets: list[list[Example]],
        eval_set: list[Example],
        weights: list[float],
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.objective = config.objective()
        every = [example for part in train_sets for example in part] + eval_set
        cached = config.reference == "cached" or (config.reference == "auto" and has_cached_logps(every))
        if not cached:
            train_sets, eval_set = [without_cached_logps(part) for part in train_sets], without_cached_logps(eval_set)
        self._load_models(cached, every, checkpoint)
        options = {
            "batch_size": config.batch_size,
            "micro_batch_size": config.micro_batch_size,
            "max_tokens_per_batch": config.max_tokens_per_batch,
            "packed": self.policy.packed,
            "seed": config.seed,
            "rank": world.rank,
            "world_size": world.size,
        }
        self.loader = Loader(train_sets, weights, **options)
        self.eval_loader = Loader([eval_set], [1.0], **options) if eval_set else None
        run = {"reference": self.reference.identity, "data": self.loader.identity(), **config.trajectory()}
        self.state: dict[str, Any] = {"step": 0, "run": run}
        if checkpoint:
            self.state = read_state(checkpoint)
            refuse_another_run(checkpoint, self.state["run"], run)
        self.first_step = self.state["step"]
        self.total_steps = self.loader.num_steps(config.epochs, config.max_steps)
        self.optimizer = make_optimizer(self.policy, config)
        self.scheduler = get_scheduler(
            "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
            self.optimizer,
            num_warmup_steps=round(config.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )
        self.meter, self.clock = Meter(self.objective, world.device), Clock()
        if checkpoint:
            load_training_state(checkpoint, self.policy, self.optimizer, world)
            self.scheduler.load_state_dict(self.state["scheduler"])
            if world.is_main:  # see Meter.pool
                self.meter.sums += torch.tensor(self.state["meter"], dtype=torch.float64, device=world.device)
            self.clock.spent = self.state["seconds"]
        self.reporter = Reporter(config, world, self.total_steps, self.first_step)

    def _load_models(self, cached: bool, examples: list[Example], checkpoint: Path | None) -> None:
        """Policy (from the checkpoint, if any) and reference (always from the start of the run)."""
        config, world = self.config, self.world
        refuse_too_large(config, examples, device=world.device.type, ranks=world.size)
        compute, dtype = run_dtypes(config, world.device)
        self.bf16 = compute == torch.bfloat16

        def load(path: Any, *, trained: bool) -> Policy:
            lora = config.lora if trained and checkpoint is None else None
            return load_policy(
                path,
                dtype=dtype if trained else compute,
                lora=lora,
                memory=config.memory_options(trained=trained),
                trust_remote_code=config.trust_remote_code,
                attn_implementation=config.attn_implementation,
                packing=config.packing and trained,
            )

        self.policy = load(checkpoint or config.model, trained=True)
        check_token_ids(examples, self.policy)
        autocast = None if world.sharded else autocast_dtype(self.policy, compute)  # FSDP2 casts by itself
        self.scoring = Scoring(config.workspace_mb, config.engine, autocast)
        models = [self.policy]
        self.reference: Reference
        if cached:
            self.reference = CachedReference(examples)
        elif config.lora and config.reference != "frozen":
            self.reference = AdapterReference(self.policy, self.scoring)
        else:
            models.append(load(config.model, trained=False))
            models[1].packed = self.policy.packed
            if autocast is not None and dtype != compute:
                match_autocast(models[1])
            self.reference = FrozenReference(models[1], self.scoring)
        self.models = models
        for policy in models:
            if world.sharded:
                shard(policy.causal_lm, world, compute)  # which moves it, layer by layer
            else:
                policy.model.to(world.device)

    def run(self) -> dict[str, float]:
        """All steps that are left. Returns the last metrics."""
        config, last = self.config, self.reporter.last
        if self.first_step == 0:
            last |= self.evaluate(0)
        for step, work in enumerate(self.loader.steps(self.first_step, self.total_steps), start=self.first_step + 1):
            taken = self.take_step(work)
            self.reporter.advance()
            if step % config.log_every == 0 or step == self.total_steps:
                last |= self.log(step, {"epoch": work.epoch, **taken})
            if step == self.total_steps or (config.eval_every and step % config.eval_every == 0):
                last |= self.evaluate(step)
            if config.save_every and step % config.save_every == 0:
                self.save(step)
        self.reporter.close()
        return last

    def take_step(self, work: Step) -> dict[str, float]:
        """Gradients of the global batch, then one optimizer step. Returns the learning rate that it was taken with, and
        the gradient norm before clipping."""
        for examples in work.micro_batches:
            out = self.score(examples, work.num_units)
            out.loss.backward()
        parameters = self.policy.trainable_parameters()
        norm = gradient_norm(parameters)
        value = local_scalar(norm)
        if not value < float("inf"):
            origins = ", ".join(e.origin for part in work.micro_batches for e in part) or "another rank"
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

    def score(self, examples: list[Example], num_units: int) -> UnaOutput:
        """One micro-batch against the reference; its metrics go to the meter."""
        packed = self.policy.packed
        batch = collate(examples, packed=packed, device=self.world.device, pad_id=self.tokenizer.pad_token_id)
        ref_logps = self.reference.logps(batch)
        out = self.scoring.loss(self.policy, batch, ref_logps, self.objective, max(num_units, 1))
        self.meter.add(batch, out)
        return out

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the whole evaluation set, named eval_*; nothing if there is none."""
        if self.eval_loader is None:
            return {}
        self.clock.pause()
        training, self.meter = self.meter, Meter(self.objective, self.world.device)
        for work in self.eval_loader.in_order():
            for examples in work.micro_batches:
                self.score(examples, work.num_units)
        metrics = {f"eval_{name}": value for name, value in self.meter.take(self.world).items()}
        self.meter = training
        self.reporter.step(step, metrics)
        self.clock.go_on()
        return metrics

    def log(self, step: int, taken: dict[str, float]) -> dict[str, float]:
        """Metrics since the last report, with what the last step was taken with."""
        seconds = self.clock.take()
        metrics = self.meter.take(self.world)
        metrics |= taken | {
            "tok_per_sec": metrics["tokens"] / seconds,
            "memory/peak_gib": peak_gib(self.world.device),
        }
        peak = peak_tflops(self.world.device)
        if peak is not None and self.bf16:  # the peak is that of bf16
            metrics["mfu"] = self._flops(metrics["tokens"]) / seconds / (peak * 1e12 * self.world.size)
        self.reporter.step(step, metrics)
        return metrics

    def _flops(self, tokens: float) -> float:
        """Of the linear layers alone: 2 per weight and token forward, 4 backward (2 where weights are frozen), and 2
        for a reference that is computed. An estimate from above: the head is counted for every token."""
        model = self.policy.causal_lm
        weights = sum(p.numel() for p in model.parameters())
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            weights -= model.get_input_embeddings().weight.numel()  # a look-up
        passes = (4 if self.policy.is_adapter else 6) + (0 if isinstance(self.reference, CachedReference) else 2)
        return passes * weights * tokens

    def save(self, step: int) -> None:
        self.clock.pause()
        self.state |= {
            "step": step,
            "scheduler": self.scheduler.state_dict(),
            "meter": self.meter.pool(self.world),
            "seconds": self.clock.spent,
        }
        path = save_checkpoint(
            Path(self.config.output_dir),
            self.policy,
            self.optimizer,
            self.tokenizer,
            self.world,
            self.state,
            self.config.keep_checkpoints,
        )
        self.reporter.say(f"saved {path}")
        self.clock.go_on()


def refuse_another_run(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """ValueError, by name, for whatever would make the continued run differ from the one that was interrupted."""
    changed = [
        f"{name} was {saved.get(name)} and is {value}" for name, value in current.items() if saved.get(name) != value
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
