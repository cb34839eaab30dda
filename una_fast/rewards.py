"""Rewards of sampled completions: Python functions, reward models, judges and endpoints, summed with weights.

    prompts, completions, columns -> every reward -> one outcome per sample: a number, or why there is none
      -> total = sum of weight * reward - missing_eos_penalty where a completion did not end -> RewardScale -> scores

A sample whose reward is unknown has no total: it is left out and counted, never scored 0. What concerns one sample (a
server that stays silent, a reply that is no number, NaN) is counted; what will not mend itself (a wrong key, a function
that raises) is a `RewardError`. Settings that cannot work are a ValueError before the first sample.
"""

from __future__ import annotations

import bisect
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from una_fast.records import check_number
from una_fast.reward_http import Endpoint, Judge
from una_fast.reward_settings import RewardError, RewardSpec, parse_rewards
from una_fast.reward_sources import Failure, FunctionReward, Outcome, Prompt, RewardModel

__all__ = ["RewardError", "RewardScale", "RewardSpec", "Rewarded", "Rewards", "parse_rewards"]

logger = logging.getLogger(__name__)

ScaleKind = Literal["none", "range", "sigmoid", "quantile"]
WINDOW = 4096  # rewards that quantile scores are ranked among
ROUNDING = 1e-9  # of the declared range: 0.6 + 0.3 + 0.1 is not 1


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
        prompts: Sequence[Prompt],
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
        lengths = {"prompts": len(prompts), "finished": len(finished), **{k: len(v) for k, v in columns.items()}}
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
            logger.warning("reward %s%s: such samples are left out; said once, counted always", reason, detail)
        return None


class RewardScale:
    """Rewards to scores: none (as they are) | range (declared limits to [0, 1]) | sigmoid | quantile.

    quantile: the mid-rank among the last `window` rewards, this batch included (all of it, if it is larger); equal
    rewards get equal scores, and 0.5 if there are no others.
    """

    def __init__(
        self, kind: ScaleKind = "none", limits: Sequence[float] | None = None, *, window: int = WINDOW
    ) -> None:
        if kind not in get_args(ScaleKind):
            raise ValueError(f"reward_map={kind!r} is not one of {', '.join(get_args(ScaleKind))}")
        if (kind == "range") != (limits is not None):
            raise ValueError(f"reward_map={kind}, reward_range={limits}: limits are needed for a range, and only there")
        if limits is not None:
            limits = [check_number("reward_range", value) for value in limits]
            if len(limits) != 2 or not limits[0] < limits[1]:
                raise ValueError(f"reward_range={limits} must be [lowest, highest]")
        self.kind, self.limits, self.window = kind, limits, window
        self.recent: list[float] = []

    def __call__(self, rewards: Sequence[float]) -> list[float]:
        """[S] scores of [S] finite rewards. Raises RewardError for one outside the limits of a range."""
        rewards = [float(reward) for reward in rewards]
        assert all(map(math.isfinite, rewards)), "samples without a finite reward are left out before"
        if self.kind == "range":
            return [self._in_range(reward) for reward in rewards]
        if self.kind == "sigmoid":
            return [0.5 + 0.5 * math.tanh(0.5 * reward) for reward in rewards]  # no overflow at either end
        if self.kind == "quantile":
            return self._ranks(rewards)
        return rewards

    def _in_range(self, reward: float) -> float:
        low, high = self.limits
        score = (reward - low) / (high - low)
        if not -ROUNDING <= score <= 1 + ROUNDING:
            raise RewardError(
                f"reward {reward} lies outside reward_range=[{low}, {high}] of reward_map=range; widen reward_range to "
                "all that the weighted sum can be, less missing_eos_penalty, or use reward_map: sigmoid or quantile"
            )
        return min(max(score, 0.0), 1.0)

    def _ranks(self, rewards: list[float]) -> list[float]:
        known = (self.recent + rewards)[-max(self.window, len(rewards)) :]
        self.recent = known[-self.window :]
        ranked = sorted(known)
        return [
            (bisect.bisect_left(ranked, reward) + bisect.bisect_right(ranked, reward)) / (2 * len(ranked))
            for reward in rewards
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same scores; JSON keeps it exactly."""
        return {"kind": self.kind, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise ValueError(f"the checkpoint was written with reward_map={state['kind']}, not {self.kind}")
        self.recent = [float(reward) for reward in state["recent"]][-self.window :]
