"""The loop: batches in, an aligned model out.

for every step:   micro-batches -> loss (divided by the units of the global batch) -> backward
                  clip -> optimizer -> schedule -> report -> evaluate -> checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from una_fast.config import RunConfig
from una_fast.data.batch import Batch, collate
from una_fast.data.loader import Step
from una_fast.distributed import World, local_scalar, start_world
from una_fast.losses import UnaOutput
from una_fast.model.loading import load_tokenizer
from una_fast.model.reference import CachedReference
from una_fast.online.anchors import AnchoredStep
from una_fast.optim import gradient_norm
from una_fast.resolved import ResolvedRun
from una_fast.train.build import RunParts, build_run
from una_fast.train.checkpoint import complete_checkpoints, save_checkpoint, save_model
from una_fast.train.metrics import Meter, peak_gib, peak_tflops
from una_fast.train.report import model_card
from una_fast.train.run_data import RunData, load_data


class DivergedError(RuntimeError):
    """The gradient is not finite: the run cannot go on."""


@dataclass
class TrainResult:
    """The result of a finished run.

    output_dir: holds the model
    steps: optimizer steps taken
    metrics: the last metrics of training and evaluation
    """

    output_dir: Path
    steps: int
    metrics: dict[str, float]


def train(config: RunConfig) -> TrainResult:
    """Run a configuration to the end; the model in Hugging Face form is in config.output_dir.

    ValueError for settings, data or a model that cannot be trained with; DivergedError,
    RewardError and SamplerError end a run that was under way.
    """
    world = start_world(config.device)
    torch.manual_seed(config.seed)
    output_dir = Path(config.output_dir)
    checkpoint = prepare_output(config, output_dir, world)
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    data = load_data(config, tokenizer)

    trainer = Trainer(build_run(config, world, tokenizer, data, checkpoint, show=True))
    for report in data.reports:
        trainer.reporter.say(str(report))
    if world.is_main:
        _save_settings(output_dir, config, trainer.resolved, data)
    steps, metrics = trainer.run()
    save_model(output_dir, trainer.policy, tokenizer, world)
    if world.is_main:
        card = model_card(config, data.reports, metrics, trainer.policy.is_adapter)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
    world.barrier()
    return TrainResult(output_dir, steps, metrics)


def prepare_output(config: RunConfig, output_dir: Path, world: World) -> Path | None:
    """Create the output directory, and return the checkpoint to resume from, if any.

    ValueError if the directory holds an earlier run and the run does not resume.
    """
    checkpoints = complete_checkpoints(output_dir)
    used = (output_dir / "metrics.jsonl").exists() or bool(checkpoints)
    if used and not config.resume:
        raise ValueError(
            f"{output_dir} holds an earlier run; set resume=true to continue it, "
            "or another output_dir"
        )
    world.barrier()  # every rank looked before the first one writes
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
    return checkpoints[-1] if checkpoints else None


def _save_settings(
    output_dir: Path, config: RunConfig, resolved: ResolvedRun, data: RunData
) -> None:
    """Write config.yaml, resolved.json and data.json."""
    config.save(output_dir / "config.yaml")
    reports = [vars(report) for report in data.reports]
    for name, content in (("resolved.json", resolved.plain()), ("data.json", reports)):
        (output_dir / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Trainer:
    """The loop over the steps of a run."""

    def __init__(self, parts: RunParts) -> None:
        """Take the parts of a run; every attribute is the part of the same name."""
        self.config = parts.config
        self.world = parts.world
        self.tokenizer = parts.tokenizer
        self.resolved = parts.resolved
        self.policy = parts.policy
        self.reference = parts.reference
        self.scoring = parts.scoring
        self.source = parts.source
        self.online = parts.online
        self.eval_loader = parts.eval_loader
        self.eval_prompts = parts.eval_prompts
        self.refreshed = parts.refreshed
        self.optimizer = parts.optimizer
        self.scheduler = parts.scheduler
        self.meter = parts.meter
        self.clock = parts.clock
        self.reporter = parts.reporter
        self.state = parts.state
        self.total_steps = parts.total_steps
        self.objective = parts.config.objective()

    def run(self) -> tuple[int, dict[str, float]]:
        """Take all steps that are left; return (steps taken, last metrics)."""
        config, last = self.config, self.reporter.last
        first = self.state["step"]
        number = first
        if number == 0:
            last |= self.evaluate(0)
        for number, step in enumerate(self.source.steps(first, self.total_steps), start=first + 1):
            taken = self.take_step(step)
            self.reporter.advance()
            if self.online:
                self.reporter.completions(number, self.online.take_completions())
            if config.reference_refresh and number % config.reference_refresh == 0:
                self.reference.refresh(self.policy)
            if number % config.log_every == 0 or number == self.total_steps:
                last |= self.log(number, {"epoch": step.epoch, **taken})
            if number == self.total_steps or _is_due(config.eval_every, number):
                last |= self.evaluate(number)
            if _is_due(config.save_every, number):
                self.save(number)
        if self.online:
            if self.online.stopped:
                self.reporter.say(self.online.stopped)
                last |= self._stop(number)
            self.online.close()
        self.reporter.close()
        return number, last

    def _stop(self, number: int) -> dict[str, float]:
        """Report, evaluate and save a run that ends early, after step `number`.

        Metrics and completions include the samples that stopped the run.
        """
        self.reporter.completions(number + 1, self.online.take_completions())
        metrics = self.log(number, {}) | {"stopped_at_step": number}
        if not _is_due(self.config.eval_every, number):
            metrics |= self.evaluate(number)
        if not _is_due(self.config.save_every, number):
            self.save(number)  # to go on from with another ceiling
        return metrics

    def take_step(self, step: Step) -> dict[str, float]:
        """Compute the gradients of the global batch, and take one optimizer step.

        Returns the gradient norm before clipping, and the learning rate of the step.
        DivergedError for a gradient that is not finite.
        """
        for batch in self.ready_batches(step):
            out = self.score(batch, step.num_units)
            out.loss.backward()
        parameters = self.policy.trainable_parameters()
        norm = gradient_norm(parameters)
        value = local_scalar(norm)
        if not value < float("inf"):
            raise DivergedError(
                f"the gradient norm is {value} in the step of the records {_origins(step)}; "
                "lower learning_rate or beta, or look at these records. A checkpoint of this run, "
                "if there is one, is from before this step"
            )
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        taken = {"grad_norm": value, "learning_rate": self.scheduler.get_last_lr()[0]}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def ready_batches(self, step: Step) -> Iterator[Batch]:
        """Yield the batches of a step, on the device and with reference log-probs."""
        if isinstance(step, AnchoredStep):
            yield from step.batches
            return
        for examples in step.micro_batches:
            batch = collate(
                examples,
                packed=self.policy.packed,
                device=self.world.device,
                pad_id=self.tokenizer.pad_token_id,
            )
            yield replace(batch, ref_logps=self.reference.logps(batch))

    def score(self, batch: Batch, num_units: int) -> UnaOutput:
        """Compute the loss of one micro-batch, and count its metrics.

        batch: with reference log-probs
        num_units: feedback units of the global batch, by which the loss is divided
        """
        out = self.scoring.loss(
            self.policy, batch, batch.ref_logps, self.objective, max(num_units, 1)
        )
        self.meter.add(batch, out)
        return out

    @torch.no_grad()
    def evaluate(self, number: int) -> dict[str, float]:
        """Return metrics eval_* of the whole evaluation set, and report them for step `number`.

        Without an evaluation set there are no metrics.
        """
        if self.eval_loader is None and not self.eval_prompts:
            return {}
        self.clock.pause()
        metrics: dict[str, float] = {}
        if self.eval_loader is not None:
            training_meter = self.meter
            self.meter = Meter(self.objective, self.world.device)
            for step in self.eval_loader.in_order():
                for batch in self.ready_batches(step):
                    self.score(batch, step.num_units)
            metrics = self._take_metrics()
            self.meter = training_meter
        if self.eval_prompts:
            metrics |= self.online.evaluate(self.eval_prompts)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.reporter.step(number, metrics)
        self.clock.go_on()
        return metrics

    def log(self, number: int, taken: dict[str, float]) -> dict[str, float]:
        """Return and report the metrics since the last report.

        number: the step
        taken: numbers of the step itself, reported as they are
        """
        seconds = self.clock.take()
        metrics = self._take_metrics()
        metrics |= taken
        metrics["tok_per_sec"] = metrics["tokens"] / seconds
        metrics["memory/peak_gib"] = peak_gib(self.world.device)
        train_seconds = seconds
        if self.online:
            rollouts = self.online.take()  # none in a later inner epoch
            for name in ("time/generate", "time/reward"):
                train_seconds -= rollouts.get(name, 0.0)
            metrics |= rollouts
            metrics["time/train"] = train_seconds
        peak = peak_tflops(self.world.device)
        if peak is not None and self.resolved.compute == torch.bfloat16:  # the peak is for bf16
            flops = self._flops(metrics["tokens"])
            metrics["mfu"] = flops / train_seconds / (peak * 1e12 * self.world.size)
        self.reporter.step(number, metrics)
        return metrics

    def _take_metrics(self) -> dict[str, float]:
        """Return the metrics of the meter.

        In online runs `kl` is measured on fresh samples; the mean log ratio of the meter is over
        records, and over samples that the policy has moved on from, and is named log_ratio.
        """
        metrics = self.meter.take(self.world)
        if self.online and "kl" in metrics:
            metrics["log_ratio"] = metrics.pop("kl")
        return metrics

    def _flops(self, tokens: float) -> float:
        """Return the floating-point operations of the linear layers for some tokens.

        2 per weight and token forward, 4 backward (2 where weights are frozen), and 2 for a
        reference that is computed. An estimate from above: the head is counted for every token.
        """
        model = self.policy.causal_lm
        weights = sum(p.numel() for p in model.parameters())
        embeddings = model.get_input_embeddings().weight
        if embeddings is not model.get_output_embeddings().weight:
            weights -= embeddings.numel()  # a look-up
        per_weight = 4 if self.policy.is_adapter else 6
        if not isinstance(self.reference, CachedReference):
            per_weight += 2
        return per_weight * weights * tokens

    def save(self, number: int) -> None:
        """Write the checkpoint of step `number`."""
        self.clock.pause()
        self.state |= {
            "step": number,
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
            self.refreshed,
        )
        self.reporter.say(f"saved {path}")
        self.clock.go_on()


def _is_due(every: int | None, number: int) -> bool:
    """Return whether step `number` is a multiple of `every`; None is never due."""
    return bool(every) and number % every == 0


def _origins(step: Step) -> str:
    """Return the places of the records of a step on this rank, for messages."""
    origins = []
    for examples in step.micro_batches:
        origins += [example.origin for example in examples]
    return ", ".join(origins) or "another rank"
