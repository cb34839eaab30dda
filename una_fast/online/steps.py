"""The steps of an online run, from prompts to ready batches.

    prompts -> rollouts (collect.py) -> scores -> [+ records] -> ready batches (anchors.py) -> Step

The examples of an online step hold one score per sampled response, and the batches bring reference
log-probs and offsets f(x) + c as numbers: the loss does not depend on the source of a step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from una_fast.config import RunConfig
from una_fast.data.examples import Prompt
from una_fast.data.loader import Loader
from una_fast.logs import say_once
from una_fast.online.anchors import AnchoredStep, Anchors
from una_fast.online.collect import RolloutCollector
from una_fast.online.metrics import RolloutMeter
from una_fast.online.rollouts import Rollout
from una_fast.rewards.scale import RewardScale
from una_fast.rewards.settings import RewardError, RewardsDown

logger = logging.getLogger(__name__)

EVALUATION = 1_000_003  # the random stream of samples of an evaluation


class KlCeiling:
    """The setting max_kl: stops a run, or warns once, above a KL.

    stopped: the reason to stop; None below the ceiling
    """

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        self.ceiling = config.max_kl
        self.stops = config.on_max_kl == "stop"
        self.is_main = is_main
        self.stopped: str | None = None

    def check(self, kl: float, version: int) -> None:
        """Compare the KL of new samples, in nats per response, with the ceiling.

        version: optimizer steps that the sampling policy has taken
        """
        if self.ceiling is None or kl <= self.ceiling:
            return
        text = (
            f"the samples of step {version + 1} have a KL of {kl:.3g} nats from the reference, "
            f"above max_kl={self.ceiling:g}"
        )
        if self.stops:
            self.stopped = (
                f"{text}: the run stops; raise beta, lower learning_rate, or raise max_kl"
            )
        elif self.is_main:
            say_once(logging.WARNING, text, logger)


class Online:
    """The steps of an online or mixed run, sampled on demand."""

    def __init__(
        self,
        config: RunConfig,
        collector: RolloutCollector,
        anchors: Anchors,
        prompts: Loader,
        records: Loader | None,
    ) -> None:
        """Keep the stations of a step.

        config: settings of the run
        collector: prompts -> rollouts
        anchors: examples -> ready batches
        prompts: the prompts of every step
        records: the records of every step of a mixed run; None in an online run
        """
        self.config = config
        self.collector = collector
        self.anchors = anchors
        self.prompts = prompts
        self.records = records
        self.is_main = collector.world.is_main
        self.scale = RewardScale(config.reward_map, config.reward_range)
        self.ceiling = KlCeiling(config, is_main=self.is_main)
        self.meter = RolloutMeter()
        self._before: dict[str, Any] = {}  # state before the newest samples
        self._completions: list[dict[str, Any]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of an epoch.

        A mixed run counts epochs of the records; prompts are taken as needed.
        """
        source = self.records or self.prompts
        return source.steps_per_epoch * self.config.inner_epochs

    @property
    def stopped(self) -> str | None:
        """Return the reason why the run ends before the last step, or None."""
        return self.ceiling.stopped

    def steps(self, first: int, stop: int) -> Iterator[AnchoredStep]:
        """Yield steps first, ..., stop - 1; a run over the ceiling of the KL yields fewer.

        A step is sampled from the policy of the moment the step is asked for, and yielded
        inner_epochs times, with the same batches.

        first: a multiple of inner_epochs
        """
        inner = self.config.inner_epochs
        assert first % inner == 0, "a run resumes between rollouts"
        for number in range(first, stop):
            if number % inner == 0:
                self._before = self.state_dict()
                try:
                    step = self._roll_out(number // inner, version=number)
                except BaseException:  # a checkpoint may follow, of the steps before
                    self.load_state_dict(self._before)
                    raise
                if self.stopped:
                    return  # the completions of this step stay, for take_completions
            yield replace(step, epoch=(number + 1) / self.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values; all but times is equal on all ranks.

        The state of a stopped run is from before the samples that stopped the run: a run that
        goes on draws them again.
        """
        sums = self.meter.state_dict()
        if self.stopped:
            return self._before | {"sums": sums}
        return {
            "scale": self.scale.state_dict(),
            "ema": self.anchors.ema.state_dict(),
            "sums": sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.scale.load_state_dict(state["scale"])
        self.anchors.ema.load_state_dict(state["ema"])
        self.meter.load_state_dict(state["sums"])

    def take(self) -> dict[str, float]:
        """Return the metrics of the rollouts since the last call."""
        return self.meter.take()

    def take_completions(self) -> list[dict[str, Any]]:
        """Return the lines of completions.jsonl of the newest rollouts, once."""
        lines = self._completions
        self._completions = []
        return lines

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Return metrics of one sample per prompt, drawn with the same random stream every time."""
        meter = RolloutMeter()
        missing: Counter[str] = Counter()
        size = self.config.online_batch_size() * self.config.samples_per_prompt
        for start in range(0, len(prompts), size):
            try:
                rollouts, failures = self.collector.collect(
                    prompts[start : start + size],
                    meter,
                    seed=[self.config.seed, EVALUATION, start],
                    samples=1,
                )
            except RewardsDown as error:  # an evaluation is not worth the steps that were taken
                if self.is_main:
                    logger.warning("the evaluation is left out: %s", error)
                return {}
            missing += failures
            examples = [rollout.example(rollout.rewards) for rollout in rollouts if rollout.kept()]
            if examples:
                self.anchors.anchor(self.prompts.split(examples, 0.0), meter)
        if not meter.sums["rewarded"] and self.is_main:
            # No error: the steps that were taken must not be lost.
            logger.warning("no sample of the evaluation got a reward: %s", dict(missing))
        return meter.take()

    def close(self) -> None:
        """Close the connections of the rewards."""
        self.collector.close()

    def _roll_out(self, number: int, version: int) -> AnchoredStep:
        """Sample, score and anchor the step of rollout `number`."""
        rollouts, failures = self.collector.collect(
            self.prompts.records(number),
            self.meter,
            seed=[self.config.seed, number],
            version=version,
        )
        self._check_rewards(rollouts, failures)
        rollouts = self._with_scores(rollouts)
        examples = [rollout.example(rollout.scores) for rollout in rollouts if rollout.kept()]
        if self.records is not None:
            examples += self.records.records(number)
        step, means = self.anchors.anchor(self.prompts.split(examples, 0.0), self.meter)
        if self.config.offset == "ema":
            self.anchors.ema.update(means.residual)

        self._completions = []
        for rollout in rollouts[: self.config.saved_completions]:
            self._completions += rollout.lines()
        self.ceiling.check(means.kl, version)
        return step

    def _check_rewards(self, rollouts: Sequence[Rollout], failures: Counter[str]) -> None:
        """Raise RewardError if no sample has a reward; warn once of steps that teach little."""
        rewards = _known_rewards(rollouts)
        if not rewards:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in failures.most_common(3))
            raise RewardError(
                f"no response of the step got a reward: {reasons or 'every reward is None'}"
            )
        if not self.is_main:
            return
        if self.config.offset == "group" and len(rewards) > 1 and len(set(rewards)) == 1:
            say_once(
                logging.WARNING,
                f"all {len(rewards)} rewards of a step are {rewards[0]:g}: they teach nothing",
                logger,
            )
        if not any(_finished(rollout) for rollout in rollouts):
            say_once(
                logging.WARNING,
                "no response of a step ended within "
                f"max_new_tokens={self.config.max_new_tokens}; raise it, or set "
                "missing_eos_penalty",
                logger,
            )

    def _with_scores(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts with scores: the rewards of the step, scaled together."""
        scores = iter(self._scale(_known_rewards(rollouts)))
        scored = []
        for rollout in rollouts:
            own = [None if reward is None else next(scores) for reward in rollout.rewards]
            scored.append(replace(rollout, scores=own))
        return scored

    def _scale(self, rewards: list[float]) -> list[float]:
        """Return the scores of rewards; RewardError for a score that the loss cannot compare."""
        scores = self.scale(rewards)
        if self.config.objective().scores_in_unit_interval:
            for score in scores:
                if not 0 <= score <= 1:
                    raise RewardError(
                        f"reward {score:g} lies outside [0, 1], which score={self.config.score} "
                        "compares with sigmoid(r); set reward_map: range, sigmoid or quantile, "
                        "or score: reward_mse"
                    )
        return scores


def _known_rewards(rollouts: Sequence[Rollout]) -> list[float]:
    rewards = []
    for rollout in rollouts:
        rewards += rollout.known_rewards()
    return rewards


def _finished(rollout: Rollout) -> bool:
    """Return whether any sample ended by itself."""
    return any(completion.finished for completion in rollout.completions)
