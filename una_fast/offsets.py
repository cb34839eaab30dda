"""Offsets f(x) + c of the implicit reward, computed before the loss and given as numbers.

UNA's reward is r = beta * Delta + f(x) + c (eq. 6). On-policy, any offset that does not depend on
the sample itself leaves the gradient of `reward_mse` at -2 beta grad J, so a good offset only
lowers the variance of the gradient, by centring the residual beta * Delta - R. Both offsets here
are detached, and leave the sample itself out: an offset that carries a gradient would multiply the
gradient by K / (K - 1), an offset that includes the sample by (K - 1) / K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_offset(residuals: Tensor, group: Tensor) -> Tensor:
    """Return the leave-one-out offset o, [S] float64, detached.

    o_i = -mean of the residuals of the other samples of group i; 0 for a sample alone in a group.

    residuals: [S] any float dtype, beta * Delta - R of each sample
    group: [S] integers, the prompt of each sample

    ValueError for other shapes.
    """
    if residuals.shape != group.shape or residuals.dim() != 1 or group.is_floating_point():
        shapes = f"residuals {tuple(residuals.shape)} and integer group {tuple(group.shape)}"
        raise ValueError(f"{shapes} must both be [S]")
    residuals = residuals.detach().double()
    same = (group[:, None] == group[None, :]).fill_diagonal_(False)
    # Of the others alone: a residual that is not finite stays in its group.
    sums = torch.where(same, residuals, 0.0).sum(1)
    return -sums / same.sum(1).clamp_min(1)


class EmaOffset:
    """The offset o = -m, with m a running mean of the residuals beta * Delta - R of earlier steps.

    Read `offset` for all micro-batches of a step, then `update` once with the mean residual of the
    global batch: the offset of a step never depends on the samples of the step. The mean is
    unbiased from the first update on.

    decay: weight of the past, in [0, 1) (else ValueError)
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    @property
    def offset(self) -> float:
        """Return o; 0 before the first update."""
        return -self.total / self.weight if self.weight else 0.0

    def update(self, mean_residual: float) -> None:
        """Add the mean residual of a step; ValueError if the number is not finite."""
        if not abs(mean_residual) < float("inf"):
            raise ValueError(f"the mean residual of a step is {mean_residual}; it must be finite")
        self.total = self.decay * self.total + (1 - self.decay) * mean_residual
        self.weight = self.decay * self.weight + (1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"decay": self.decay, "total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.decay = state["decay"]
        self.total = state["total"]
        self.weight = state["weight"]
