"""Rewards -> scores: as they are, by range, sigmoid, or running quantile."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from una_fast.checks import check_number
from una_fast.rewards.settings import RewardError

ScaleKind = Literal["none", "range", "sigmoid", "quantile"]

WINDOW = 4096  # rewards that quantile scores are ranked among

ROUNDING = 1e-9  # of the declared range: 0.6 + 0.3 + 0.1 is not 1


class RewardScale:
    """Rewards to scores: none (as they are) | range (declared limits to [0, 1]) | sigmoid | quantile.

    quantile: the mid-rank among the last `window` rewards, this batch included (all of it, if it is larger); equal
    rewards get equal scores, and 0.5 if there are no others.
    """

    def __init__(
        self,
        kind: ScaleKind = "none",
        limits: Sequence[float] | None = None,
        *,
        window: int = WINDOW,
    ) -> None:
        if kind not in get_args(ScaleKind):
            raise ValueError(f"reward_map={kind!r} is not one of {', '.join(get_args(ScaleKind))}")
        if (kind == "range") != (limits is not None):
            raise ValueError(
                f"reward_map={kind}, reward_range={limits}: limits are needed for a range, and only there"
            )
        if limits is not None:
            limits = [check_number("reward_range", value) for value in limits]
            if len(limits) != 2 or not limits[0] < limits[1]:
                raise ValueError(f"reward_range={limits} must be [lowest, highest]")
        self.kind, self.limits, self.window = kind, limits, window
        self.recent: list[float] = []

    def __call__(self, rewards: Sequence[float]) -> list[float]:
        """[S] scores of [S] finite rewards. Raises RewardError for one outside the limits of a range."""
        rewards = [float(reward) for reward in rewards]
        assert all(map(math.isfinite, rewards)), (
            "samples without a finite reward are left out before"
        )
        if self.kind == "range":
            return [self._in_range(reward) for reward in rewards]
        if self.kind == "sigmoid":
            return [
                0.5 + 0.5 * math.tanh(0.5 * reward) for reward in rewards
            ]  # no overflow at either end
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
            (bisect.bisect_left(ranked, reward) + bisect.bisect_right(ranked, reward))
            / (2 * len(ranked))
            for reward in rewards
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same scores; JSON keeps it exactly."""
        return {"kind": self.kind, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise ValueError(
                f"the checkpoint was written with reward_map={state['kind']}, not {self.kind}"
            )
        self.recent = [float(reward) for reward in state["recent"]][-self.window :]
