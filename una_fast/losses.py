"""The UNA losses: the only copy of the loss math.

With Delta = log pi_theta(y|x) - log pi_ref(y|x), summed over the tokens of a response (or averaged
over the tokens when `length_normalize`), the implicit reward of a response is r = beta * Delta
(UNA, arXiv 2408.15339, eq. 6), and every unit of feedback is a scalar function of one number x:

    pair            x = r_w - r_l                 loss = t * phi(x) + (1 - t) * phi(-x)
    label, score    x = r + f(x) + c (offset)     loss = phi(x, label or score)

with the target t of the pair, and

    pair   "logistic"    phi(x) = -log sigmoid(x - margin)   eq. 10 with log sigma applied; DPO
           "linear"      phi(x) = -(x - margin)              eq. 10
           "squared"     phi(x) = (x - margin)^2
    binary "bce"         cross entropy of sigmoid(x)         eq. 12; BCO with shift 0
           "mse"         (sigmoid(x) - label)^2              eq. 11
    score  "mse"         (sigmoid(x) - score)^2              eq. 13
           "bce"         cross entropy of sigmoid(x)
           "reward_mse"  (x - reward)^2                      eq. 7; on-policy the gradient is
                                                             -2 beta grad J of RLHF

presets.py has these as settings of published methods.

Everything here works on one number per response, in float64: two float32 sums of 8192 token
log-probs already differ by 0.02 nat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast.feedback import BINARY, PAIR, SCORE, Feedback

PAIR_FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # F.softplus would be cut off at 20
    "logistic": lambda x, margin: -F.logsigmoid(x - margin),
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
IGNORED = -100  # the target, or the label, of a token that is not scored


@dataclass(frozen=True)
class Objective:
    """The loss of every kind of feedback.

    beta: factor of the implicit reward, > 0
    pair: form of pairs, "logistic" | "linear" | "squared"
    binary: form of labels, "bce" | "mse"
    score: form of scores, "mse" | "bce" | "reward_mse"
    offset: constant c, added to r with the unit's own offset before labels and scores are compared
    length_normalize: Delta is the mean over the tokens of a response instead of the sum

    ValueError for a form that is not in the table, or a number that is not finite.
    """

    beta: float = 0.1
    pair: str = "logistic"
    binary: str = "bce"
    score: str = "mse"
    offset: float = 0.0
    length_normalize: bool = False

    def __post_init__(self) -> None:
        for name, forms in (("pair", PAIR_FORMS), ("binary", BINARY_FORMS), ("score", SCORE_FORMS)):
            form = getattr(self, name)
            if form not in forms:
                raise ValueError(
                    f"{name}={form!r} is not a loss form; choose one of {sorted(forms)}"
                )
        if not self.beta > 0 or self.beta == float("inf"):
            raise ValueError(f"beta={self.beta} must be positive and finite")
        if not abs(self.offset) < float("inf"):
            raise ValueError(f"offset={self.offset} must be finite")

    @property
    def scores_in_unit_interval(self) -> bool:
        """Return whether scores are compared with sigmoid(r), and so must lie in [0, 1]."""
        return self.score != "reward_mse"


class UnaOutput(NamedTuple):
    """The result of a loss, float64.

    loss: [], the only member that carries a gradient
    logps: [S], log-probs of the policy summed over the tokens of each response
    ref_logps: [S], log-probs of the reference summed over the tokens of each response
    rewards: [S], beta * Delta without any offset
    unit_losses: [U], unweighted
    """

    loss: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    unit_losses: Tensor


def as_tensor(
    name: str, values: Any, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return numbers as a tensor; a tensor as it is.

    name: the argument, for errors
    values: a tensor, a list, a range or an array
    device: of a new tensor
    dtype: of a new tensor; None: that of the numbers, int64 without any

    ValueError for anything else.
    """
    if isinstance(values, Tensor):
        return values
    try:
        found = torch.tensor(values, device=device, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor or a list of numbers: {error}") from None
    return found if found.numel() or dtype else found.long()


def implicit_rewards(
    logps: Tensor, ref_logps: Tensor, objective: Objective, lengths: Tensor | None = None
) -> Tensor:
    """Return r = beta * Delta, [S] float64.

    logps: [S] any float dtype, carries the gradient
    ref_logps: [S] any float dtype
    objective: beta and length_normalize
    lengths: [S] tokens per response, needed when `length_normalize` (else ValueError)
    """
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
    ref_logps: Tensor | Sequence[float],
    feedback: Feedback | Mapping[str, Tensor],
    *,
    objective: Objective | None = None,
    reduction: str = "mean",
    num_units: int | Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> UnaOutput:
    """Compute the UNA loss from sequence log-probs, in pure torch.

    logps: [S] any float dtype (computed in float64), sums over the tokens of each response
    ref_logps: [S] any float dtype, the same sums of the reference; receives no gradient
    feedback: U units over the S responses, or the `to_dict` of such a table
    objective: forms and beta; default: Objective()
    reduction: "mean" divides the weighted sum of the unit losses by `num_units`, "sum" does not
    num_units: int or 0-d tensor, units of the global batch; default: the units of this call
    lengths: [S] tokens per response, needed when `length_normalize`

    ValueError for shapes that differ, units on missing responses, scores outside [0, 1] where the
    form needs such, an unknown reduction, or num_units that is not positive.
    """
    objective = objective or Objective()
    feedback = Feedback.of(feedback)
    ref_logps = as_tensor("ref_logps", ref_logps, logps.device, torch.float64)
    if lengths is not None:
        lengths = as_tensor("lengths", lengths, logps.device)
    if logps.dim() != 1 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps {tuple(logps.shape)} and ref_logps {tuple(ref_logps.shape)} must both be [S], "
            "one sum per response"
        )
    check_units(feedback, objective, logps.numel())
    rewards = implicit_rewards(logps, ref_logps, objective, lengths)
    unit_losses = _unit_losses(rewards, feedback, objective)
    loss = (unit_losses * feedback.weight.to(rewards.device, non_blocking=True)).sum()
    # The empty sum keeps a loss without units in the graph: collectives in backward must happen.
    loss = loss / denominator(reduction, num_units, feedback.num_units) + rewards[:0].sum()
    return UnaOutput(
        loss=loss,
        # Copies: a caller's cache must not change with the output.
        logps=logps.detach().to(torch.float64, copy=True),
        ref_logps=ref_logps.detach().to(torch.float64, copy=True),
        rewards=rewards.detach(),
        unit_losses=unit_losses.detach(),
    )


def denominator(reduction: str, num_units: int | Tensor | None, units: int) -> float | Tensor:
    """Return the divisor of the weighted sum of unit losses.

    reduction: "mean" divides by num_units, "sum" by 1
    num_units: units of the global batch, int or 0-d tensor; the value of a tensor on a device stays
        on the device; None: `units`
    units: units of this call

    ValueError for another reduction, or num_units that is not one positive number.
    """
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
    """Return [U] unweighted losses.

    The form of a unit is read off the CPU table, so no operation waits for a device.
    """
    device = rewards.device
    losses = rewards.new_zeros(feedback.num_units)

    def column(values: Tensor, units: Tensor) -> Tensor:
        return values[units].to(device, non_blocking=True)

    for kind in (PAIR, BINARY, SCORE):
        units = (feedback.kind == kind).nonzero().squeeze(1)
        if units.numel() == 0:
            continue
        value = column(feedback.value, units)
        reward = rewards[column(feedback.first, units)]
        if kind == PAIR:
            form = PAIR_FORMS[objective.pair]
            margin = column(feedback.margin, units)
            lead = reward - rewards[column(feedback.second, units)]
            term = value * form(lead, margin) + (1 - value) * form(-lead, margin)
        else:
            points = {BINARY: BINARY_FORMS[objective.binary], SCORE: SCORE_FORMS[objective.score]}
            offset = column(feedback.offset, units)
            term = points[kind](reward + offset + objective.offset, value)
        losses = losses.index_copy(0, units.to(device, non_blocking=True), term)
    return losses


def check_units(feedback: Feedback, objective: Objective, num_responses: int) -> None:
    """Raise ValueError for units on missing responses, and for scores that no form can compare."""
    feedback.check(num_responses)
    scores = feedback.value[feedback.kind == SCORE]
    outside = (scores < 0) | (scores > 1)
    if objective.scores_in_unit_interval and outside.any():
        raise ValueError(
            f"score {scores[outside][0].item()} lies outside [0, 1], which "
            f"score={objective.score!r} compares with sigmoid(r); rescale the scores, or use "
            'score="reward_mse" for raw rewards'
        )
