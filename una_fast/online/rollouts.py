"""Rollouts: a prompt with sampled responses and rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from una_fast.data.examples import Example, Prompt
from una_fast.feedback import Feedback
from una_fast.online.sampling import Completion
from una_fast.rewards.outcome import plain_json


@dataclass(frozen=True)
class Sampled(Example):
    """A record of K responses drawn by the policy; unit k is the score of response k.

    logps: [K] float64 log-probs of the responses, by the sampler and its weights
    """

    logps: np.ndarray


@dataclass(frozen=True)
class Rollout:
    """A prompt with K samples.

    texts: the completions as text
    rewards: sums over the rewards of the run; a sample of reward None is left out of the loss
    rewards_by_name: name of a reward -> K rewards
    scores: rewards on the scale of r or sigmoid(r); empty until the rewards are scaled
    """

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: list[float | None]
    rewards_by_name: dict[str, list[float | None]]
    scores: list[float | None] = field(default_factory=list)

    def kept(self) -> list[int]:
        """Return the numbers of the samples with a reward."""
        return [k for k, reward in enumerate(self.rewards) if reward is not None]

    def known_rewards(self) -> list[float]:
        """Return the rewards of the samples with a reward."""
        return [reward for reward in self.rewards if reward is not None]

    def example(self, scores: Sequence[float | None]) -> Sampled:
        """Return the samples with a reward as a record.

        scores: [K], read where the sample has a reward
        """
        kept = self.kept()
        kept_scores = [scores[k] for k in kept]
        return Sampled(
            prompt_ids=self.prompt.prompt_ids,
            responses=tuple(self.completions[k].ids for k in kept),
            feedback=Feedback.scores(range(len(kept)), kept_scores, weight=self.prompt.weight),
            ref_logps=None,
            origin=self.prompt.origin,
            logps=np.array([self.completions[k].logp for k in kept]),
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the line of completions.jsonl of every sample."""
        for k, completion in enumerate(self.completions):
            line = {
                "policy_version": completion.version,
                "origin": self.prompt.origin,
                "prompt": self.prompt.text,
                "completion": self.texts[k],
                "tokens": len(completion.ids),
                "finished": completion.finished,
                "logp": completion.logp,
                "reward": self.rewards[k],
                "score": self.scores[k],
                "rewards": {name: values[k] for name, values in self.rewards_by_name.items()},
            }
            yield plain_json(line)
