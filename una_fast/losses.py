"""The UNA losses: the only copy of the loss math.

With Delta = log pi_theta(y|x) - log pi_ref(y|x), summed over the tokens of a response (or its mean over them when
`length_normalize`), the implicit reward of a response is r = beta * Delta (UNA, arXiv 2408.15339, eq. 6), and every
unit of feedback is a scalar function of one number x:

    pair            x = r_w - r_l                 loss = t * phi(x) + (1 - t) * phi(-x)     t = target
    label, score    x = r + f(x) + c (offset)     loss = phi(x, label or score)

    pair   "logistic"    phi(x) = -log sigmoid(x - margin)      eq. 10 with log sigma applied; equal to DPO
           "linear"      phi(x) = -(x - margin)                 eq. 10
           "squared"     phi(x) = (x - margin)^2
    binary "bce"         cross entropy of sigmoid(x)            eq. 12; BCO with shift 0
           "mse"         (sigmoid(x) - label)^2                 eq. 11
    score  "mse"         (sigmoid(x) - score)^2                 eq. 13
           "bce"         cross entropy of sigmoid(x)
           "reward_mse"  (x - reward)^2                         eq. 7; on-policy its gradient is -2 beta grad J of RLHF

Everything here works on one number per response, in float64: two float32 sums of 8192 token log-probs already
differ by 0.02 nat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast.feedback import BINARY, PAIR, SCORE, Feedback

PAIR_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logistic": lambda x, margin: -F.logsigmoid(x - margin),  # F.softplus is cut off at 20
    "linear": lambda x, margin: margin - x,
    "squared": lambda x, margin: (x - margin) ** 2,
}
BINARY_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda x, label: F.binary_cross_entropy_with_logits(x, label, reduction="none"),
    "mse": lambda x, label: (torch.sigmoid(x) - label) ** 2,
}
SCORE_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": BINARY_FORMS["mse"],
    "bce": BINARY_FORMS["bce"],
    "reward_mse": lambda x, reward: (x - reward) ** 2,
}
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Objective:
    """Which loss each kind of feedback gets.

    beta: scale of the implicit reward, > 0. pair, binary, score: a form of the table above. offset: constant c added
    to r (with the offset of each unit) before labels and scores are compared. length_normalize: Delta is the mean
    over the tokens of a response instead of the sum.
    """

    beta: float = 0.1
    pair: str = "logistic"
    binary: str = "bce"
    score: str = "mse"
    offset: float = 0.0
    length_normalize: bool = False

    def __post_init__(self) -> None:
        for name, forms in (("pair", PAIR_FORMS), ("binary", BINARY_FORMS), ("score", SCORE_FORMS)):
            if getattr(self, name) not in forms:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not a loss form; choose one of {sorted(forms)}"
                )
        if not self.beta > 0 or self.beta == float("inf"):
            raise ValueError(f"beta={self.beta} must be positive and finite")
        if not abs(self.offset) < float("inf"):
            raise ValueError(f"offset={self.offset} must be finite")

    @property
    def scores_in_unit_interval(self) -> bool:
        """Whether scores are compared with sigmoid(r) and so must lie in [0, 1]."""
        return self.score != "reward_mse"


class UnaOutput(NamedTuple):
    """loss: scalar, the only member that carries a gradient. logps, ref_logps, rewards: [S]; sums over tokens of the
    log-probs, and beta * Delta without any offset. unit_losses: [U], unweighted. All float64."""

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    unit_losses: Tensor


def implicit_rewards(
    logps: Tensor, ref_logps: Tensor, objective: Objective, lengths: Tensor | None = None
) -> Tensor:
    """r = beta * Delta, [S] float64. lengths [S]: tokens per response, needed when `length_normalize`."""
    delta = logps.double() - ref_logps.detach().double()
    if objective.length_normalize:
        if lengths is None or lengths.shape != logps.shape:
            raise ValueError(
                f"length_normalize=True needs lengths=, [{logps.numel()}] tokens per response"
            )
        delta = delta / lengths.to(delta.device)
    return objective.beta * delta


def una_loss(
    logps: Tensor,
    ref_logps: Tensor,
    feedback: Feedback,
    *,
    objective: Objective | None = None,
    reduction: str = "mean",
    num_units: int | Tensor | None = None,
    lengths: Tensor | None = None,
) -> UnaOutput:
    """UNA loss from sequence log-probs, in pure torch.

    logps, ref_logps: [S], sums over tokens, any float dtype (computed in float64); no gradient reaches ref_logps.
    feedback: units over those S responses. reduction: "mean" divides the weighted sum by `num_units` (int or 0-d
    tensor; default: the number of units of this call), "sum" does not. lengths: [S], for `length_normalize`.
    """
    objective = objective or Objective()
    if logps.dim() != 1 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps {tuple(logps.shape)} and ref_logps {tuple(ref_logps.shape)} must both be [S], one sum per response"
        )
    check_units(feedback, objective, logps.numel())
    rewards = implicit_rewards(logps, ref_logps, objective, lengths)
    unit_losses = _unit_losses(rewards, feedback, objective)
    loss = (unit_losses * feedback.weight.to(rewards.device, non_blocking=True)).sum()
    # The empty sum keeps a loss without units in the graph, so that collectives on its backward happen.
    loss = loss / denominator(reduction, num_units, feedback.num_units) + rewards[:0].sum()
    # Copies: a caller's cache must not change with the output.
    sums = (x.detach().to(torch.float64, copy=True) for x in (logps, ref_logps))
    return UnaOutput(loss, *sums, rewards.detach(), unit_losses.detach())


def denominator(reduction: str, num_units: int | Tensor | None, units: int) -> float | Tensor:
    """What the weighted sum of unit losses is divided by: for "mean" the (global) number of units, for "sum" 1."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {REDUCTIONS}")
    if isinstance(num_units, Tensor) and num_units.dim() == 0 and num_units.device.type == "cpu":
        num_units = num_units.item()
    if isinstance(num_units, Tensor):
        valid = num_units.dim() == 0  # its value stays on the device
    else:
        valid = num_units is None or 0 < num_units < float("inf")
    if not valid:
        raise ValueError(
            f"num_units={num_units} must be one positive number, the units of the global batch"
        )
    if reduction == "sum":
        return 1.0
    return max(units, 1) if num_units is None else num_units


def _unit_losses(rewards: Tensor, feedback: Feedback, objective: Objective) -> Tensor:
    """[U] unweighted losses. Which unit takes which form is read off the CPU table, so nothing waits for a device."""
    device = rewards.device
    losses = rewards.new_zeros(feedback.num_units)

    def column(values: Tensor, units: Tensor) -> Tensor:
        return values[units].to(device, non_blocking=True)

    for kind in (PAIR, BINARY, SCORE):
        units = (feedback.kind == kind).nonzero().squeeze(1)
        if units.numel() == 0:
            continue
        value, first = column(feedback.value, units), column(feedback.first, units)
        if kind == PAIR:
            form, margin = PAIR_FORMS[objective.pair], column(feedback.margin, units)
            lead = rewards[first] - rewards[column(feedback.second, units)]
            term = value * form(lead, margin) + (1 - value) * form(-lead, margin)
        else:
            form = (
                BINARY_FORMS[objective.binary] if kind == BINARY else SCORE_FORMS[objective.score]
            )
            term = form(rewards[first] + column(feedback.offset, units) + objective.offset, value)
        losses = losses.index_copy(0, units.to(device, non_blocking=True), term)
    return losses


def check_units(feedback: Feedback, objective: Objective, num_responses: int) -> None:
    """Raise ValueError for units on missing responses, and for scores that the objective cannot compare."""
    feedback.check(num_responses)
    scores = feedback.value[feedback.kind == SCORE]
    outside = (scores < 0) | (scores > 1)
    if objective.scores_in_unit_interval and outside.any():
        raise ValueError(
            f"score {scores[outside][0].item()} lies outside [0, 1], which score={objective.score!r} compares with "
            'sigmoid(r); rescale the scores, or use score="reward_mse" for raw rewards'
        )
