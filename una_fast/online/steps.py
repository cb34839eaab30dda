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
from una_fast.online.collect import Flight, Landed, RolloutCollector
from una_fast.online.metrics import RolloutMeter
from una_fast.online.rollouts import Rollout
from una_fast.online.sampling import ServerError
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
        self._flight: Flight | None = None  # samples of the next step, with rollout_lag
        self._before = self._state()  # before the newest samples
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
        inner_epochs times, with the same batches. With rollout_lag the server then draws the next
        step's samples from the same policy, while the caller trains; no samples are drawn for
        step `stop`.

        first: a multiple of inner_epochs
        """
        inner = self.config.inner_epochs
        assert first % inner == 0, "a run resumes between rollouts"
        for number in range(first, stop):
            if number % inner == 0:
                self._before = self._state()
                is_last = number + inner >= stop
                try:
                    step = self._roll_out(number // inner, version=number, is_last=is_last)
                except BaseException:  # a checkpoint may follow, of the steps before
                    self._go_back(self._before)
                    raise
                if self.stopped:
                    return  # the completions of this step stay, for take_completions
            yield replace(step, epoch=(number + 1) / self.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values; all but times is equal on all ranks.

        The state of a stopped run is from before the samples that stopped the run: a run that
        goes on draws them again. Samples that a server draws are waited for, and are a part of the
        state; all ranks must call.
        """
        state = self._state()
        if self.stopped:
            state = self._before | {"sums": state["sums"]}
        flight = state.pop("flight")
        if flight is not None:
            state["flight"] = self.collector.stored(flight)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        flight = None
        if state.get("flight") is not None:
            number = state["flight"]["number"]
            prompts = self.prompts.records(number)
            flight = self.collector.resumed(state["flight"], prompts, self.config.seed)
        self._go_back({**state, "flight": flight})

    def _state(self) -> dict[str, Any]:
        """Return the state of this moment, with the flight as it is."""
        return {
            "scale": self.scale.state_dict(),
            "ema": self.anchors.ema.state_dict(),
            "sums": self.meter.state_dict(),
            "flight": self._flight,
        }

    def _go_back(self, state: dict[str, Any]) -> None:
        """Take a state of `_state`; samples that are drawn for a later step are given up."""
        if self._flight is not None and self._flight is not state["flight"]:
            self._flight.ahead.stop.set()
        self._flight = state["flight"]
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

    def evaluate(self, prompts: Sequence[Prompt], version: int) -> dict[str, float]:
        """Return metrics of one sample per prompt, drawn with the same random stream every time.

        prompts: of the evaluation set
        version: optimizer steps that the policy has taken
        """
        meter = RolloutMeter()
        missing: Counter[str] = Counter()
        size = self.config.online_batch_size() * self.config.samples_per_prompt
        for start in range(0, len(prompts), size):
            try:
                rollouts, failures = self.collector.collect(
                    prompts[start : start + size],
                    meter,
                    seed=[self.config.seed, EVALUATION, start],
                    version=version,
                    samples=1,
                )
            except (RewardsDown, ServerError) as error:
                # An evaluation is not worth the steps that were taken.
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
        """Close the connections of the rewards, and of a server that samples."""
        self.collector.close()

    def _roll_out(self, number: int, version: int, *, is_last: bool) -> AnchoredStep:
        """Sample, score and anchor the step of rollout `number`.

        number: of the rollout
        version: optimizer steps that the policy has taken
        is_last: no rollout follows
        """
        landed = self._land(number, version)
        if self.config.rollout_lag and not is_last:
            prompts = self.prompts.records(number + 1)
            self._flight = self.collector.take_off(
                number + 1, prompts, self.meter, self.config.seed, version
            )
        rollouts, failures = self.collector.reward(landed, self.meter, version=version)
        self._check_rewards(rollouts, failures)
        rollouts = self._with_scores(rollouts)
        examples = [rollout.example(rollout.scores) for rollout in rollouts if rollout.kept()]
        if self.records is not None:
            examples += self.records.records(number)
        stale = landed.version != version
        split = self.prompts.split(examples, 0.0)
        step, means = self.anchors.anchor(split, self.meter, stale=stale)
        if self.config.offset == "ema":
            self.anchors.ema.update(means.residual)

        self._completions = []
        for rollout in rollouts[: self.config.saved_completions]:
            self._completions += rollout.lines()
        self.ceiling.check(means.kl, version)
        return step

    def _land(self, number: int, version: int) -> Landed:
        """Return the samples of a rollout: of its flight, or of the policy as it is."""
        flight, self._flight = self._flight, None
        if flight is not None:
            assert flight.number == number, "a flight of another rollout"
            return self.collector.land(flight, self.meter)
        return self.collector.draw(
            self.prompts.records(number),
            self.meter,
            seed=[self.config.seed, number],
            version=version,
        )

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
