"""Rewards to scores: unchanged, by a declared range, by a sigmoid, or by a running quantile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from una_fast.checks import check_one_of, check_range
from una_fast.rewards.settings import RewardError
from una_fast.score_maps import ScoreMap, mid_ranks, sigmoid, to_range

WINDOW = 4096  # rewards that quantile scores are ranked among

ROUNDING = 1e-9  # of the declared range: 0.6 + 0.3 + 0.1 is not 1


class RewardScale:
    """The map from rewards to scores; "quantile" remembers the last WINDOW rewards of the run.

    none: scores are the rewards
    range: the declared limits become 0 and 1
    sigmoid: 1 / (1 + exp(-reward))
    quantile: the mid-rank among the remembered rewards, the batch at hand included (a batch larger
        than WINDOW is ranked as a whole); equal rewards get equal scores, a single reward gets 0.5
    """

    def __init__(self, kind: ScoreMap = "none", limits: Sequence[float] | None = None) -> None:
        """Check and keep the settings.

        kind: the setting reward_map
        limits: the setting reward_range, [lowest, highest] for "range" and None otherwise

        Raises ValueError, by the names of the settings.
        """
        check_one_of("reward_map", kind, get_args(ScoreMap))
        check_range("reward_map", kind, "reward_range", limits)
        self.kind = kind
        self.limits = limits
        self.recent: list[float] = []

    def __call__(self, rewards: Sequence[float]) -> list[float]:
        """Return [S] scores of [S] finite rewards; RewardError for a reward outside the limits."""
        rewards = [float(reward) for reward in rewards]
        finite = all(math.isfinite(reward) for reward in rewards)
        assert finite, "samples without a finite reward are left out before"
        if self.kind == "range":
            return [self._in_range(reward) for reward in rewards]
        if self.kind == "sigmoid":
            return [sigmoid(reward) for reward in rewards]
        if self.kind == "quantile":
            return self._ranks(rewards)
        return rewards

    def _in_range(self, reward: float) -> float:
        low, high = self.limits
        score = to_range(reward, low, high)
        if not -ROUNDING <= score <= 1 + ROUNDING:
            raise RewardError(
                f"reward {reward} lies outside reward_range=[{low}, {high}] of reward_map=range; "
                "widen reward_range to all that the weighted sum can be, less missing_eos_penalty, "
                "or use reward_map: sigmoid or quantile"
            )
        return min(max(score, 0.0), 1.0)

    def _ranks(self, rewards: list[float]) -> list[float]:
        ranked_among = (self.recent + rewards)[-max(WINDOW, len(rewards)) :]
        self.recent = ranked_among[-WINDOW:]
        return mid_ranks(rewards, ranked_among)

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards as JSON values; JSON keeps floats exactly."""
        return {"kind": self.kind, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the remembered rewards of a checkpoint; ValueError if the map has changed."""
        if state["kind"] != self.kind:
            raise ValueError(
                f"the checkpoint was written with reward_map={state['kind']}, not {self.kind}"
            )
        self.recent = [float(reward) for reward in state["recent"]][-WINDOW:]
