"""The loop: batches in, an aligned model out.

for every step:   micro-batches -> loss (divided by the units of the global batch) -> backward
                  clip -> optimizer -> schedule -> report -> evaluate -> checkpoint
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from una_fast.capacity.fit import Planned
from una_fast.config import RunConfig
from una_fast.data.batch import Batch, collate
from una_fast.data.loader import Step
from una_fast.data.template_date import fix_template_date
from una_fast.distributed import (
    World,
    local_scalar,
    reduce_gradients,
    start_ranks,
    sum_over_copies,
)
from una_fast.files import write_json
from una_fast.losses import UnaOutput, una_loss
from una_fast.model.four_bits import count_weights
from una_fast.model.loading import load_tokenizer
from una_fast.model.reference import CachedReference
from una_fast.online.anchors import AnchoredStep
from una_fast.online.sampling import SamplerError, ServerError
from una_fast.optim import gradient_norm
from una_fast.printable import told
from una_fast.report.page import write_own_report
from una_fast.resolved import ResolvedRun
from una_fast.rewards.settings import RewardError
from una_fast.signals import Stopped, requests
from una_fast.train.build import RunParts, build_run, open_run, refuse_another_run
from una_fast.train.card import model_card
from una_fast.train.checkpoint import complete_checkpoints, read_state
from una_fast.train.manifest import Manifest
from una_fast.train.metrics import Meter, peak_gib, peak_tflops
from una_fast.train.ref_cache import date_of_caches, verify_cached_logps
from una_fast.train.room import tell_of_little_room
from una_fast.train.run_data import RunData, load_data
from una_fast.train.run_dir import find_checkpoint, finished_run, line_sizes, locked
from una_fast.train.saver import Saver, save_final
from una_fast.train.summary import adapter_in_words, model_line, opening_lines

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """Gradients of several steps in a row were not finite: the run cannot go on."""


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

    A finished run that is asked to resume is returned as it is.

    ValueError for settings, data or a model that cannot be trained with, and for a directory that
    takes no checkpoint; DivergedError, RewardError and SamplerError end a run that was under way;
    Stopped (a KeyboardInterrupt) is the end by a signal.
    """
    with requests.listening():
        world = start_ranks(config.device, config.parallel)
        output_dir = Path(config.output_dir).absolute()  # a reward may change the directory
        try:
            with locked(output_dir) if world.is_main else contextlib.nullcontext():
                world.barrier()
                return _train(config, output_dir, world)
        except KeyboardInterrupt as error:
            raise _with_advice(error, output_dir) from None


def _train(config: RunConfig, output_dir: Path, world: World) -> TrainResult:
    torch.manual_seed(config.seed)
    checkpoint = world.on_main(
        lambda: find_checkpoint(output_dir, resume=config.resume, say=logger.warning)
    )
    finished = None
    if config.resume:
        finished = world.on_main(lambda: finished_run(output_dir, logger.warning))
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    date = _date_of(config, checkpoint, finished)
    fix_template_date(tokenizer, date)
    data = load_data(config, tokenizer)
    opened = open_run(config, world, data, checkpoint, show=True)
    if finished is not None and finished.step >= opened.total_steps:
        refuse_another_run(output_dir, finished.run, opened.state["run"])
        if world.is_main:
            print(f"{output_dir} is finished: {finished.step} steps were taken", flush=True)
        return TrainResult(output_dir, finished.step, finished.result)
    if finished is not None and checkpoint is None:
        raise ValueError(
            f"{output_dir} was finished after {finished.step} steps and kept no checkpoint, so "
            f"that it cannot go on to step {opened.total_steps}; set another output_dir, and "
            f"model={output_dir} to train its model further"
        )
    opened.state["date"] = date
    if world.is_main:
        print("\n".join(map(told, opening_lines(opened, output_dir))), flush=True)
    trainer = Trainer(build_run(opened, tokenizer), output_dir)
    if checkpoint is None and isinstance(trainer.reference, CachedReference):
        records, caches = opened.data.examples(), opened.data.caches
        verify_cached_logps(records, caches, trainer.policy, trainer.scoring, world)
    trainer.reporter.say(model_line(trainer.policy, config.model))
    if world.is_main:
        _save_settings(output_dir, config, trainer.resolved, data)
        _save_plan(output_dir, opened.memory)
        tell_of_little_room(output_dir, trainer.policy, config, trainer.reporter.say)
    with requests.deferred():
        steps, metrics = trainer.run()
        before = trainer.reporter.before
        adapter = adapter_in_words(trainer.policy)
        card = model_card(config, data.reports, metrics, before, adapter=adapter)
        manifest = Manifest(steps, {**trainer.state["run"], "date": date}, {}, metrics)
        texts = {"README.md": card}
        save_final(output_dir, trainer.policy, tokenizer, world, manifest, texts)
        if world.is_main and config.write_report:
            write_own_report(output_dir)
    return TrainResult(output_dir, steps, metrics)


def _date_of(config: RunConfig, checkpoint: Path | None, finished: Manifest | None) -> str:
    """Return the date that chat templates print: of the run's start, wherever it goes on.

    A run on cached log-probs takes the date that they were computed with.
    """
    if checkpoint is not None:
        return read_state(checkpoint)["date"]
    if finished is not None:
        return finished.run["date"]
    return date_of_caches(config) or datetime.date.today().isoformat()


def _with_advice(error: KeyboardInterrupt, output_dir: Path) -> Stopped:
    """Return the end of a run by a signal, with the newest checkpoint in the message."""
    if not isinstance(error, Stopped):
        error = Stopped(signal.SIGINT)
    whole = complete_checkpoints(output_dir)
    advice = f"{whole[-1]} is the newest checkpoint" if whole else "there is no checkpoint"
    return Stopped(
        error.number,
        f"ended by {error.name}; {advice}" + ("; resume=true goes on from it" if whole else ""),
        by_signal=error.by_signal,
    )


def _save_plan(output_dir: Path, memory: Planned | None) -> None:
    """Write plan.json of a run that was planned; a plan of an earlier start does not stay."""
    path = output_dir / "plan.json"
    path.unlink(missing_ok=True)
    if memory is not None and memory.parts:
        write_json(path, asdict(memory))


def _save_settings(
    output_dir: Path, config: RunConfig, resolved: ResolvedRun, data: RunData
) -> None:
    """Write config.yaml, resolved.json and data.json."""
    config.save(output_dir / "config.yaml")
    write_json(output_dir / "resolved.json", resolved.plain())
    write_json(output_dir / "data.json", [vars(report) for report in data.reports])


class Trainer:
    """The loop over the steps of a run."""

    def __init__(self, parts: RunParts, output_dir: Path) -> None:
        """Take the parts of a run; every attribute is the part of the same name.

        output_dir: of the run, absolute
        """
        self.output_dir = output_dir
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
        self.saver = Saver(
            output_dir,
            parts.world,
            parts.config.keep_checkpoints,
            in_background=parts.config.save_async,
        )
        if self.online:
            self.online.collector.tell = self.reporter.phase
        self.saved_step = self.state["step"]

    def run(self) -> tuple[int, dict[str, float]]:
        """Take all steps that are left; return (steps taken, last metrics)."""
        config, last = self.config, self.reporter.last
        number = self.state["step"]
        ended = False
        try:
            if number == 0:
                last |= self.evaluate(0)
            steps = self.source.steps(number, self.total_steps)
            while (step := self.next_step(steps, number)) is not None:
                number += 1
                taken = self.take_step(step)
                self.reporter.advance()
                if self.online:
                    self.reporter.completions(number, self.online.take_completions())
                if config.reference_refresh and number % config.reference_refresh == 0:
                    self.saver.hold()
                    self.reference.refresh(self.policy)
                if number % config.log_every == 0 or number == self.total_steps:
                    last |= self.log(number, {"epoch": step.epoch, **taken})
                if number == self.total_steps or _is_due(config.eval_every, number):
                    last |= self.evaluate(number)
                self._refuse_divergence(number, step)
                if _is_due(config.save_every, number):
                    self.save(number)
                self._heed_signals(number)
            if self.online and self.online.stopped:
                self.reporter.say(self.online.stopped)
                last |= self._stop(number)
            ended = True
        except RewardError:  # of an evaluation, on all ranks: the steps are saved all the same
            if self._may_save(number):
                self._save_once(number)
            self.saver.finish()
            raise
        finally:
            try:
                # A save in the background is finished, not lost, whatever ends the run; after an
                # error of one rank the others may not take part.
                if ended or not self.world.sharded:
                    self.saver.close()
            finally:
                if self.online:
                    self.online.close()
                self.reporter.close(failed=not ended)
        return number, last

    def next_step(self, steps: Iterator[Step], number: int) -> Step | None:
        """Return the next step, sampled from the policy in online runs; None after the last one.

        steps: of the source
        number: steps taken so far

        When sampling fails, or a signal ends it, the steps taken so far are saved: a checkpoint as
        if the step had never been asked for.
        """
        random = torch.get_rng_state()
        on_device = None
        if self.world.device.type == "cuda":
            on_device = torch.cuda.get_rng_state(self.world.device)
        at_once = contextlib.nullcontext()
        # One rank must not leave while the others wait for it in a collective; in the middle of a
        # rollout, and after the last step, there is nothing to interrupt.
        if not self.world.sharded and self._may_save(number) and number < self.total_steps:
            at_once = requests.at_once()
        try:
            with at_once:
                return next(steps, None)
        except (RewardError, SamplerError, Stopped) as error:
            # Of these only the failure of a reward or of a server is known to all ranks.
            is_of_all = not self.world.sharded or isinstance(error, (RewardError, ServerError))
            if not is_of_all or not self._may_save(number):
                raise
            torch.set_rng_state(random)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.world.device)
            saved = self._save_once(number)
            if isinstance(error, Stopped):
                raise Stopped(error.number, by_signal=not saved) from None
            if number:
                raise type(error)(
                    f"{error}. The {number} steps before are saved; set resume=true to go on from "
                    f"checkpoint-{number}"
                ) from error
            raise

    def _save_once(self, number: int) -> bool:
        """Save the run after step `number` unless that was done; return whether there is a step."""
        if number > self.saved_step:
            self.save(number)
        self.saver.finish()
        return number > 0

    def _heed_signals(self, number: int) -> None:
        """Save or end the run after step `number` if a signal asks for it; finish saves.

        The ranks agree first: signals reach them at different times. Between the steps on one
        rollout a signal waits, for the samples are in no checkpoint.
        """
        asked = (requests.stop, requests.save, not self.saver.is_done)
        stop, save, unfinished = self.world.maximum([int(value) for value in asked])
        if self.saver.is_pending and not unfinished:
            self.saver.finish()
        if not self._may_save(number):
            return
        if save:
            requests.save = 0
            self._save_once(number)
            self.reporter.say(f"{signal.Signals(save).name}: checkpoint-{number} is saved")
        if stop and number < self.total_steps:
            self._save_once(number)
            raise Stopped(stop)

    def _may_save(self, number: int) -> bool:
        """Return whether a run can go on from step `number`: not in the middle of a rollout."""
        return self.config.mode == "offline" or number % self.config.inner_epochs == 0

    def _stop(self, number: int) -> dict[str, float]:
        """Report, evaluate and save a run that ends early, after step `number`.

        Metrics and completions include the samples that stopped the run.
        """
        metrics = self.log(number, {}) | {"stopped_at_step": number}
        if not _is_due(self.config.eval_every, number):
            metrics |= self.evaluate(number)
        self._save_once(number)  # to go on from with another ceiling, and these samples again
        self.reporter.completions(number + 1, self.online.take_completions())
        return metrics

    def take_step(self, step: Step) -> dict[str, float]:
        """Compute the gradients of the global batch, and take one optimizer step.

        Returns the gradient norm before clipping, and the learning rate of the step. A gradient
        that is not finite is not stepped with, and its records leave the metrics: the step is
        counted as skipped.
        """
        sums = self.meter.sums.clone()
        count = len(step.micro_batches)  # equal on all ranks
        for number, batch in enumerate(self.ready_batches(step), start=1):
            out = self.score(batch, step.num_units)
            at_each = self.resolved.parallel.reduce == "each"
            reduce_gradients(self.policy.causal_lm, now=at_each, is_last=number == count)
            out.loss.backward()
        if self.policy.vocabulary is not None:
            sum_over_copies(self.policy.causal_lm.get_output_embeddings().parameters())
        parameters = self.policy.trainable_parameters()
        norm = gradient_norm(parameters)
        value = local_scalar(norm)
        taken = {"learning_rate": self.scheduler.get_last_lr()[0]}
        if math.isfinite(value):
            taken["grad_norm"] = value
            if self.config.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
            self.saver.hold()
            self.optimizer.step()
            self.skipped["in_row"] = 0
        else:
            self.meter.sums = sums
            self.skipped["in_row"] += 1
            self.skipped["in_all"] += 1
            logger.warning(
                "a step was skipped: the gradient norm is %s; records %s", value, _origins(step)
            )
        if self.skipped["in_all"]:
            taken["skipped_steps"] = self.skipped["in_all"]
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    @property
    def skipped(self) -> dict[str, int]:
        """Return the counts of skipped steps, which are part of the state of the run."""
        return self.state.setdefault("skipped", {"in_row": 0, "in_all": 0})

    def _refuse_divergence(self, number: int, step: Step) -> None:
        """Save and end the run if too many steps in a row were skipped; DivergedError."""
        in_row = self.skipped["in_row"]
        if in_row <= self.config.max_skipped_steps or not self._may_save(number):
            return
        self._save_once(number)
        raise DivergedError(
            f"the gradient was not finite in {in_row} steps in a row, the last one of the records "
            f"{_origins(step)}; lower learning_rate or beta, or look at these records. "
            f"checkpoint-{number} holds the weights from before these steps"
        )

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

    def _score_as_reference(self, batch: Batch, num_units: int) -> UnaOutput:
        """Compute the loss of a policy that equals the reference; parameters as in `score`."""
        out = una_loss(
            batch.ref_logps,
            batch.ref_logps,
            batch.feedback,
            objective=self.objective,
            num_units=max(num_units, 1),
            lengths=batch.cu_seqlens.diff(),
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
            # Before its first step an offline policy is the reference, whose log-probs do for both.
            score = self._score_as_reference if number == 0 and not self.online else self.score
            steps = list(self.eval_loader.in_order())
            with self.reporter.evaluating(sum(len(step.micro_batches) for step in steps)) as shown:
                for step in steps:
                    for batch in self.ready_batches(step):
                        score(batch, step.num_units)
                        shown()
            metrics = self.meter.take(self.world)
            self.meter = training_meter
        if self.eval_prompts:
            metrics |= self.online.evaluate(self.eval_prompts, number)
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
        metrics = self.meter.take(self.world)
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

    def _flops(self, tokens: float) -> float:
        """Return the floating-point operations of the linear layers for some tokens.

        2 per weight and token forward, 4 backward (2 where weights are frozen), and 2 for a
        reference that is computed. An estimate from above: the head is counted for every token.
        """
        model = self.policy.causal_lm
        weights = count_weights(model)
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
        self.state["lines"] = line_sizes(self.output_dir)
        self.saver.save(self.policy, self.optimizer, self.tokenizer, self.state, self.refreshed)
        self.saved_step = number
        done = "saving" if self.config.save_async else "saved"
        self.reporter.say(f"{done} {self.output_dir / f'checkpoint-{number}'}")
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
