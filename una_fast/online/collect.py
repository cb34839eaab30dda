"""Collect rollouts: sampled and rewarded responses to prompts, on all ranks.

    prompts -> sampled ids -> texts -> rewards -> Rollout

Every rank samples and rewards responses for a share of the prompts; then all ranks hold all
rollouts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from una_fast.data.examples import Prompt
from una_fast.distributed import World
from una_fast.online.metrics import RolloutMeter
from una_fast.online.rollouts import Rollout
from una_fast.online.sampling import Completion, Sampler, completion_text, whole_text
from una_fast.rewards.settings import RewardError, RewardsDown
from una_fast.rewards.total import Rewards


@dataclass(frozen=True)
class _Share:
    """The rollouts of a rank, sent to all ranks.

    failures: reason -> samples without a reward
    error: the failure of a reward, which ends the run; the rollouts are empty then
    is_down: the failure is a server that is down
    """

    rollouts: list[Rollout]
    failures: Counter[str]
    error: str | None
    is_down: bool = False


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
        reward of any rank failed for good.
        """
        rank, size = self.world.rank, self.world.size
        mine = list(prompts[rank::size])
        # All ranks sample together: a rank with a prompt less draws for the first prompt again.
        missing = math.ceil(len(prompts) / size) - len(mine)
        asked = mine + [prompts[0]] * missing
        stream = int(np.random.SeedSequence([*seed, rank]).generate_state(1)[0])
        self.tell("generate")
        with meter.timed("time/generate"):
            drawn = self.sampler.sample(
                [prompt.prompt_ids for prompt in asked],
                seed=stream,
                samples=samples,
                version=version,
            )
        self.tell("reward")
        with meter.timed("time/reward"):  # includes the wait for the slowest rank
            shares = self.world.gather(self._reward(mine, drawn[: len(mine)], stream))
        self.tell("")

        for share in shares:
            if share.error:
                raise (RewardsDown if share.is_down else RewardError)(share.error)
        failures = sum((share.failures for share in shares), Counter())
        rollouts = [shares[i % size].rollouts[i // size] for i in range(len(prompts))]
        meter.add_rollouts(rollouts)
        return rollouts, failures

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
            return _Share([], Counter(), str(error), isinstance(error, RewardsDown))

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
        return _Share(rollouts, rewarded.failures, None)

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        return completion_text(self.tokenizer, prompt.prompt_ids, completion, self.sampler.sampling)

    def _whole_text(self, prompt: Prompt, completion: Completion) -> str:
        return whole_text(self.tokenizer, prompt.prompt_ids, completion, self.sampler.sampling)

    def close(self) -> None:
        """Close the connections of the rewards."""
        self.rewards.close()
