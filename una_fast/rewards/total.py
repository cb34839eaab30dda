"""Rewards of sampled completions: functions, reward models, judges and endpoints, summed.

    prompts, completions, columns -> every reward -> per sample a number, or a failure
      -> total = sum of weight * reward, less missing_eos_penalty if the completion did not end
      -> RewardScale -> scores

Rewards, and their total, lie within LARGEST: beyond, sums of squares and gradients overflow in
float32, and the sample is left out like one whose reward is NaN.

A sample with an unknown reward has no total: the sample is left out and counted, never scored 0.
Trouble of a single sample (a silent server, a reply without a number, NaN) is counted; lasting
trouble (a wrong key, an exception in a function) is a `RewardError`. Unusable settings are a
ValueError before the first sample.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from una_fast.checks import check_number
from una_fast.rewards.functions import FunctionReward
from una_fast.rewards.http import Endpoint, Judge
from una_fast.rewards.models import RewardModel
from una_fast.rewards.outcome import Failure, Outcome, PromptText, Reward
from una_fast.rewards.settings import RewardSpec
from una_fast.rewards.shelter import unharmed

logger = logging.getLogger(__name__)

LARGEST = 1e9  # size of a reward


@dataclass(frozen=True)
class Rewarded:
    """The rewards of a batch of S samples.

    total: [S] weighted sums less the penalty; None for a sample without a reward
    parts: name of the reward -> [S] unweighted rewards, None for a failure
    failures: reason -> samples without a reward; a sample with two failures is counted twice
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failures: Counter[str]


class Rewards:
    """All rewards of a run, and the weighted sum."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        missing_eos_penalty: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        """Load functions and reward models.

        specs: the setting `rewards`, parsed
        missing_eos_penalty: subtracted once from the weighted sum of an unfinished sample
        device: of the reward models
        dtype: of the reward models
        trust_remote_code: run code that comes with the reward models

        Raises ValueError or OSError for an unusable or missing function or model.
        """
        self.penalty = check_number("missing_eos_penalty", missing_eos_penalty)
        self.specs = list(specs)
        self.rewards: list[Reward] = []
        self.logged: set[str] = set()  # reasons of failures
        try:
            for spec in self.specs:
                with unharmed():  # importing runs code
                    self.rewards.append(_load(spec, device, dtype, trust_remote_code))
        except BaseException:
            self.close()
            raise

    def __call__(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        finished: Sequence[bool],
        columns: dict[str, list[Any]],
        *,
        whole: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Rewarded:
        """Return the rewards of S samples.

        prompts: [S] texts, or chats as lists of messages
        completions: [S] decoded texts
        finished: [S], False for a completion without an end-of-sequence token
        columns: name -> [S] values, the other columns of the records
        whole: [S] texts with special tokens, for rewards that keep them; None: completions
        seed: of random numbers that rewards draw; None: from the generators as they are

        Raises RewardError if the run cannot go on.
        """
        count = len(completions)
        lengths = {name: len(values) for name, values in columns.items()}
        lengths["prompts"] = len(prompts)
        lengths["finished"] = len(finished)
        assert set(lengths.values()) <= {count}, f"{count} completions, but {lengths}"

        failures: Counter[str] = Counter()
        parts: dict[str, list[float | None]] = {}
        for spec, reward in zip(self.specs, self.rewards, strict=True):
            texts = completions if whole is None or not spec.keep_special_tokens else whole
            outcomes: list[Outcome] = []
            if count:
                with unharmed(seed):
                    outcomes = reward(list(prompts), list(texts), columns)
            parts[spec.name] = [self._finite(spec.name, outcome, failures) for outcome in outcomes]

        total: list[float | None] = []
        for i in range(count):
            weighted = self._weighted_sum({name: values[i] for name, values in parts.items()})
            if weighted is None:
                total.append(None)
                continue
            penalty = self.penalty * (not finished[i])
            total.append(self._finite("total", weighted - penalty, failures))
        return Rewarded(total, parts, failures)

    @property
    def need_whole_texts(self) -> bool:
        """Return whether any reward keeps special tokens."""
        return any(spec.keep_special_tokens for spec in self.specs)

    def close(self) -> None:
        """Close the connections."""
        for reward in self.rewards:
            reward.close()

    def _weighted_sum(self, rewards: dict[str, float | None]) -> float | None:
        """Return the sum over the rewards of a sample, or None if any reward failed."""
        if None in rewards.values():
            return None
        return sum(spec.weight * rewards[spec.name] for spec in self.specs)

    def _finite(self, name: str, outcome: Outcome, failures: Counter[str]) -> float | None:
        """Return an outcome within LARGEST; count others as failures, and log a reason once."""
        if not isinstance(outcome, Failure):
            if abs(outcome) <= LARGEST:
                return outcome
            beyond = math.isfinite(outcome)
            reason = f"larger than {LARGEST:g}" if beyond else "not finite"
            outcome = Failure(reason, repr(outcome))
        reason = f"{name}: {outcome.reason}"
        failures[reason] += 1
        if reason not in self.logged:
            self.logged.add(reason)
            detail = f" ({outcome.detail})" if outcome.detail else ""
            logger.warning(
                "reward %s%s: such samples are left out; said once, counted always", reason, detail
            )
        return None


def _load(
    spec: RewardSpec, device: torch.device | str, dtype: torch.dtype, trust_remote_code: bool
) -> Reward:
    if spec.kind == "model":
        return RewardModel(spec, device, dtype, trust_remote_code)
    if spec.kind == "function":
        return FunctionReward(spec)
    if spec.kind == "judge":
        return Judge(spec)
    return Endpoint(spec)
