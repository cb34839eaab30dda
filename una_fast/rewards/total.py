"""Rewards of sampled completions: Python functions, reward models, judges and endpoints, summed with weights.

    prompts, completions, columns -> every reward -> one outcome per sample: a number, or why there is none
      -> total = sum of weight * reward - missing_eos_penalty where a completion did not end -> RewardScale -> scores

A sample whose reward is unknown has no total: it is left out and counted, never scored 0. What concerns one sample (a
server that stays silent, a reply that is no number, NaN) is counted; what will not mend itself (a wrong key, a function
that raises) is a `RewardError`. Settings that cannot work are a ValueError before the first sample.
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
from una_fast.rewards.outcome import Failure, Outcome, PromptText
from una_fast.rewards.settings import RewardSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewarded:
    """What a batch of samples was given. failures: how often each reason left a sample without a reward; a sample that
    two rewards failed on is counted under both."""

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failures: Counter[str]


class Rewards:
    """All rewards of a run.

    device, dtype, trust_remote_code: of the reward models. missing_eos_penalty: subtracted once from the weighted sum
    of a sample that did not end. Functions and models are loaded here; ValueError or OSError where that fails.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        missing_eos_penalty: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.penalty = check_number("missing_eos_penalty", missing_eos_penalty)
        self.specs, self.sources, self.reported = list(specs), [], set()
        kinds = {"function": FunctionReward, "judge": Judge, "endpoint": Endpoint}
        try:
            for spec in self.specs:
                if spec.kind == "model":
                    source = RewardModel(spec, device, dtype, trust_remote_code)
                else:
                    source = kinds[spec.kind](spec)
                self.sources.append(source)
        except BaseException:
            self.close()
            raise

    def __call__(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        finished: Sequence[bool],
        columns: dict[str, list[Any]],
    ) -> Rewarded:
        """Rewards of S samples.

        prompts: [S] texts, or chats as lists of messages. completions: [S] decoded texts. finished: [S], False where
        the completion has no end-of-sequence token. columns: the other columns of the records, {name: [S] values}.
        Raises RewardError.
        """
        count = len(completions)
        lengths = {
            "prompts": len(prompts),
            "finished": len(finished),
            **{k: len(v) for k, v in columns.items()},
        }
        assert set(lengths.values()) <= {count}, f"{count} completions, but {lengths}"
        failures: Counter[str] = Counter()
        parts: dict[str, list[float | None]] = {}
        for spec, source in zip(self.specs, self.sources, strict=True):
            outcomes = source(list(prompts), list(completions), columns) if count else []
            parts[spec.name] = [self._finite(spec.name, outcome, failures) for outcome in outcomes]
        total: list[float | None] = []
        for i in range(count):
            values = [parts[spec.name][i] for spec in self.specs]
            if None in values:
                total.append(None)
                continue
            value = sum(spec.weight * value for spec, value in zip(self.specs, values, strict=True))
            total.append(self._finite("total", value - self.penalty * (not finished[i]), failures))
        return Rewarded(total, parts, failures)

    def close(self) -> None:
        """Close the connections."""
        for source in self.sources:
            source.close()

    def _finite(self, name: str, outcome: Outcome, failures: Counter[str]) -> float | None:
        if not isinstance(outcome, Failure):
            if math.isfinite(outcome):
                return outcome
            outcome = Failure("not finite", repr(outcome))
        reason = f"{name}: {outcome.reason}"
        failures[reason] += 1
        if reason not in self.reported:
            self.reported.add(reason)
            detail = f" ({outcome.detail})" if outcome.detail else ""
            logger.warning(
                "reward %s%s: such samples are left out; said once, counted always", reason, detail
            )
        return None
