"""Collect rollouts: sampled and rewarded responses to prompts, on all ranks.

    prompts -> sampled ids -> texts -> rewards -> Rollout

Every rank samples and rewards responses for a share of the prompts; then all ranks hold all
rollouts. With `rollout_lag` the samples of the next step are drawn while the run trains: a flight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from una_fast.data.examples import Prompt
from una_fast.distributed import World
from una_fast.online.ahead import Ahead, Drawn, stored
from una_fast.online.metrics import RolloutMeter
from una_fast.online.rollouts import Rollout
from una_fast.online.sampling import (
    Completion,
    Sampler,
    ServerError,
    completion_text,
    whole_text,
)
from una_fast.rewards.settings import RewardError
from una_fast.rewards.total import Rewards


@dataclass(frozen=True)
class _Share:
    """The rollouts of a rank, sent to all ranks.

    failures: reason -> samples without a reward
    error: of a reward, or of the server that samples; ends the run, and the rollouts are empty
    """

    rollouts: list[Rollout]
    failures: Counter[str]
    error: RewardError | ServerError | None = None


@dataclass(frozen=True)
class Part:
    """The prompts of a step, and the part of a rank.

    prompts: of the global batch, equal on all ranks
    mine: of this rank
    asked: `mine`, filled up: all ranks sample together, and a rank with a prompt less draws for the
        first prompt again
    stream: seed of the samples of this rank
    """

    prompts: Sequence[Prompt]
    mine: list[Prompt]
    asked: list[np.ndarray]
    stream: int


@dataclass(frozen=True)
class Flight:
    """The samples of a step that a server draws while the run trains.

    number: of the rollout
    version: of the policy that draws the samples
    """

    number: int
    version: int
    part: Part
    ahead: Ahead


@dataclass(frozen=True)
class Landed:
    """The samples of a step on this rank, before rewards.

    drawn: completions of every prompt that was asked, or the failure of the server
    version: of the policy that drew the samples
    """

    part: Part
    drawn: Drawn | ServerError
    version: int


class RolloutCollector:
    """Draws samples from the policy, and rewards the samples."""

    def __init__(
        self,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        rewards: Rewards,
        prompts: Sequence[Prompt],
    ) -> None:
        """Keep the stations of a sample.

        prompts: all prompts of the run; in every call rewards get the columns of all prompts,
            not only of the step's prompts
        """
        self.world = world
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.rewards = rewards
        self.tell: Callable[[str], None] = lambda phase: None  # shown by whoever has a terminal
        names: set[str] = set()
        for prompt in prompts:
            names.update(prompt.columns)
        self.columns = sorted(names)

    def collect(
        self,
        prompts: Sequence[Prompt],
        meter: RolloutMeter,
        *,
        seed: Sequence[int],
        version: int = 0,
        samples: int | None = None,
    ) -> tuple[list[Rollout], Counter[str]]:
        """Return (rollouts of all ranks in the order of the prompts, failures of rewards).

        prompts: of the global batch, equal on all ranks
        meter: counts the samples and the seconds
        seed: of the samples; every rank draws from a random stream of (seed, rank)
        version: optimizer steps that the policy has taken
        samples: per prompt; None: the setting of the run

        Failures count the samples without a reward by reason. RewardError on all ranks where a
        reward of any rank failed for good; ServerError likewise.
        """
        landed = self.draw(prompts, meter, seed=seed, version=version, samples=samples)
        return self.reward(landed, meter, version=version)

    def draw(
        self,
        prompts: Sequence[Prompt],
        meter: RolloutMeter,
        *,
        seed: Sequence[int],
        version: int,
        samples: int | None = None,
    ) -> Landed:
        """Return samples of the policy as it is; parameters as in `collect`."""
        part = self.part(prompts, seed)
        self.tell("generate")
        with meter.timed("time/generate"):
            try:
                drawn = self.sampler.sample(
                    part.asked, seed=part.stream, samples=samples, version=version
                )
            except ServerError as error:
                drawn = error
        return Landed(part, drawn, version)

    def take_off(
        self, number: int, prompts: Sequence[Prompt], meter: RolloutMeter, seed: int, version: int
    ) -> Flight:
        """Have a server draw the samples of a step from now on; all ranks together.

        number: of the rollout
        prompts: of the global batch
        meter: counts the seconds in which the server gets the weights
        seed: of the run
        version: optimizer steps that the policy has taken
        """
        part = self.part(prompts, [seed, number])
        with meter.timed("time/generate"):
            ahead = self.sampler.sample_ahead(part.asked, seed=part.stream, version=version)
        return Flight(number, version, part, ahead)

    def land(self, flight: Flight, meter: RolloutMeter) -> Landed:
        """Wait for the samples of a flight; meter: counts the seconds of the wait."""
        self.tell("generate")
        with meter.timed("time/generate"):
            try:
                drawn = flight.ahead.wait()
            except ServerError as error:
                drawn = error
        return Landed(flight.part, drawn, flight.version)

    def stored(self, flight: Flight) -> dict[str, Any] | None:
        """Return a flight for a checkpoint, as JSON values equal on all ranks, when it has landed.

        None where the server failed: the samples are drawn again then, by the policy of the moment.
        """
        plain = self.world.gather(flight.ahead.plain())
        if any(share is None for share in plain):
            return None
        return {"number": flight.number, "version": flight.version, "drawn": plain}

    def resumed(self, state: dict[str, Any], prompts: Sequence[Prompt], seed: int) -> Flight:
        """Return a flight out of a checkpoint.

        state: of `stored`
        prompts: of the global batch
        seed: of the run
        """
        number, version = state["number"], state["version"]
        ahead = stored(state["drawn"][self.world.rank], version)
        return Flight(number, version, self.part(prompts, [seed, number]), ahead)

    def part(self, prompts: Sequence[Prompt], seed: Sequence[int]) -> Part:
        """Return the part of this rank; parameters as in `collect`."""
        rank, size = self.world.rank, self.world.size
        mine = list(prompts[rank::size])
        missing = math.ceil(len(prompts) / size) - len(mine)
        asked = [prompt.prompt_ids for prompt in mine + [prompts[0]] * missing]
        stream = int(np.random.SeedSequence([*seed, rank]).generate_state(1)[0])
        return Part(prompts, mine, asked, stream)

    def reward(
        self, landed: Landed, meter: RolloutMeter, *, version: int
    ) -> tuple[list[Rollout], Counter[str]]:
        """Return the rollouts of samples, as `collect` does.

        landed: the samples of this rank
        meter: counts the samples and the seconds
        version: of the policy that is trained on the samples
        """
        part = landed.part
        self.tell("reward")
        with meter.timed("time/reward"):  # includes the wait for the slowest rank
            shares = self.world.gather(self._share(landed))
        self.tell("")

        for share in shares:
            if share.error is not None:
                raise share.error
        failures = sum((share.failures for share in shares), Counter())
        size = self.world.size
        rollouts = [shares[i % size].rollouts[i // size] for i in range(len(part.prompts))]
        meter.add_rollouts(rollouts, version)
        return rollouts, failures

    def _share(self, landed: Landed) -> _Share:
        """Return the rollouts of this rank, or the failure that all ranks must hear of."""
        if isinstance(landed.drawn, ServerError):
            return _Share([], Counter(), landed.drawn)
        mine = landed.part.mine
        return self._reward(mine, landed.drawn[: len(mine)], landed.part.stream)

    def _reward(self, prompts: list[Prompt], drawn: list[list[Completion]], seed: int) -> _Share:
        """Return the rollouts of this rank; a single call rewards all samples.

        seed: of the random numbers that rewards draw
        """
        samples: list[tuple[Prompt, Completion]] = []
        for prompt, completions in zip(prompts, drawn, strict=True):
            samples += [(prompt, completion) for completion in completions]
        texts = [self._text(prompt, completion) for prompt, completion in samples]
        whole = None
        if self.rewards.need_whole_texts:
            whole = [self._whole_text(prompt, completion) for prompt, completion in samples]
        columns = {}
        for name in self.columns:
            columns[name] = [prompt.columns.get(name) for prompt, _ in samples]
        try:
            rewarded = self.rewards(
                [prompt.text for prompt, _ in samples],
                texts,
                [completion.finished for _, completion in samples],
                columns,
                whole=whole,
                seed=seed,
            )
        except RewardError as error:  # the other ranks wait, and must hear of the failure
            return _Share([], Counter(), error)

        rollouts = []
        start = 0
        for prompt, completions in zip(prompts, drawn, strict=True):
            own = slice(start, start + len(completions))
            rollout = Rollout(
                prompt=prompt,
                completions=completions,
                texts=texts[own],
                rewards=rewarded.total[own],
                rewards_by_name={name: values[own] for name, values in rewarded.parts.items()},
            )
            rollouts.append(rollout)
            start += len(completions)
        return _Share(rollouts, rewarded.failures)

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        return completion_text(self.tokenizer, prompt.prompt_ids, completion, self.sampler.sampling)

    def _whole_text(self, prompt: Prompt, completion: Completion) -> str:
        return whole_text(self.tokenizer, prompt.prompt_ids, completion, self.sampler.sampling)

    def close(self) -> None:
        """Close the connections of the rewards, and of a server that samples."""
        self.rewards.close()
        close = getattr(self.sampler, "close", None)
        if close is not None:
            close()
