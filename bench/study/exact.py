"""E0: what is exact about UNA, by enumeration in float64.

The policy is one head over a table of states, one per prefix, and answers are all sequences of two tokens over a
vocabulary of three, so that every expectation is a finite sum.

    pair = DPO            gradient of the pair loss against that of -log sigmoid(beta * (Delta_w - Delta_l))
    policy gradient       gradient of E[(r + o - R)^2], samples held fixed, against -2 beta grad J, for offsets o
    BCE = BCO             binary bce against BCO with its shift at 0
    scores of 0 and 1     score mse against binary mse
    fixed point           reward_mse, on-policy, descends to pi_ref exp(R / beta) / Z: total variation
    variance              of the gradient on one draw of four answers, over all draws: offset group against none, on
                          the way from the reference to the optimum, rewards in [0, 1]; and with rewards centred
                          beforehand, where no offset is the best one
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast import Feedback, Objective, una_loss
from una_fast.offsets import group_offset

VOCAB, DIM, BETA, DRAWN = 3, 4, 0.3, 4
TOLERANCE, TV_BOUND = 1e-10, 1e-2
OFFSETS = ("none", "group")
PLACES = {
    "at the reference": {"share": 0.0},
    "half-way": {"share": 0.5},
    "at the optimum": {"share": 1.0},
    "at the reference, rewards centred": {"share": 0.0, "centred": True},
}


class Enumerated:
    """All nine answers of a small policy, their rewards and their log-probs under a reference."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.states, self.weight = (
            normal(1 + VOCAB, DIM).requires_grad_(),
            normal(VOCAB, DIM).requires_grad_(),
        )
        self.rewards, self.ref = normal(VOCAB**2), normal(VOCAB**2).log_softmax(0)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.states, self.weight

    def logps(self) -> Tensor:
        """[9] log-probs of the answers."""
        first = (self.states[0] @ self.weight.T).log_softmax(0)
        second = (self.states[1:] @ self.weight.T).log_softmax(1)
        return (first.unsqueeze(1) + second).flatten()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.parameters)])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def pair_is_dpo(policy: Enumerated) -> float:
    better, worse = torch.tensor([0, 3, 7]), torch.tensor([5, 1, 2])
    delta = policy.logps() - policy.ref
    dpo = policy.gradient(-F.logsigmoid(BETA * (delta[better] - delta[worse])).mean())
    loss = una_loss(
        policy.logps(), policy.ref, Feedback.pairs(better, worse), objective=Objective(beta=BETA)
    ).loss
    return difference(policy.gradient(loss), dpo)


def bce_is_bco(policy: Enumerated) -> float:
    label = policy.rewards > 0
    reward, shift = BETA * (policy.logps() - policy.ref), 0.0
    bco = torch.where(label, -F.logsigmoid(reward - shift), -F.logsigmoid(-(reward - shift))).mean()
    feedback = Feedback.binary(range(len(label)), label)
    loss = una_loss(policy.logps(), policy.ref, feedback, objective=Objective(beta=BETA)).loss
    return difference(policy.gradient(loss), policy.gradient(bco))


def scores_are_labels(policy: Enumerated) -> float:
    label, every = policy.rewards > 0, range(len(policy.rewards))
    objective = Objective(beta=BETA, binary="mse", score="mse")
    by_score, by_label = (
        policy.gradient(una_loss(policy.logps(), policy.ref, feedback, objective=objective).loss)
        for feedback in (Feedback.scores(every, label.double()), Feedback.binary(every, label))
    )
    return difference(by_score, by_label)


def on_policy_gradient(policy: Enumerated, offset: float) -> Tensor:
    logps = policy.logps()
    feedback = Feedback.scores(
        range(len(logps)), policy.rewards, weight=logps.detach().exp(), offset=offset
    )
    objective = Objective(beta=BETA, score="reward_mse")
    return policy.gradient(
        una_loss(logps, policy.ref, feedback, objective=objective, reduction="sum").loss
    )


def rlhf_gradient(policy: Enumerated) -> Tensor:
    """Of J = E[R] - beta KL."""
    logps = policy.logps()
    return policy.gradient((logps.exp() * (policy.rewards - BETA * (logps - policy.ref))).sum())


def fixed_point(policy: Enumerated, steps: int = 2000) -> float:
    """Total variation between the optimum of J and where gradient descent on reward_mse ends."""
    optimizer = torch.optim.Adam(policy.parameters, lr=0.03)
    for _ in range(steps):
        gradient = on_policy_gradient(policy, 0.0)
        sizes = [p.numel() for p in policy.parameters]
        for parameter, part in zip(policy.parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    optimum = (policy.ref + policy.rewards / BETA).softmax(0)
    return float(0.5 * (policy.logps().detach().exp() - optimum).abs().sum())


def gradient_variance(policy: Enumerated, offset: str) -> tuple[float, float]:
    """(trace of the covariance of the gradient on one draw of DRAWN answers, relative error of its mean against
    -2 beta grad J), over all draws."""
    logps, count = policy.logps().detach(), len(policy.rewards)
    rows = torch.stack(
        [policy.gradient(policy.logps()[k]) for k in range(count)]
    )  # [9, P] grad log pi of each answer
    residuals = BETA * (logps - policy.ref) - policy.rewards
    chances, gradients = [], []
    for draws in torch.cartesian_prod(*[torch.arange(count)] * DRAWN).split(count**2):
        drawn, draw = draws.flatten(), torch.arange(len(draws)).repeat_interleave(DRAWN)
        added = (
            group_offset(residuals[drawn], draw) if offset == "group" else torch.zeros(len(drawn))
        )
        leaf = logps[drawn].requires_grad_()
        feedback = Feedback.scores(range(len(drawn)), policy.rewards[drawn], offset=added)
        objective = Objective(beta=BETA, score="reward_mse")
        loss = una_loss(
            leaf, policy.ref[drawn], feedback, objective=objective, num_units=DRAWN
        ).loss  # mean per draw
        (coefficients,) = torch.autograd.grad(loss, leaf)
        gradients.append((coefficients[:, None] * rows[drawn]).view(len(draws), DRAWN, -1).sum(1))
        chances.append(logps[draws].sum(1).exp())
    gradients, chances = torch.cat(gradients), torch.cat(chances)
    mean = chances @ gradients
    variance = float(chances @ (gradients - mean).square().sum(1))
    return variance, difference(mean, -2 * BETA * rlhf_gradient(policy))


def on_the_way(seed: int, share: float, *, centred: bool = False) -> Enumerated:
    """A policy with rewards in [0, 1] that has gone this share of the way from its reference (0) to the optimum (1):
    log pi = log pi_ref + share * R / beta + constant. centred: less a constant that makes the mean residual 0."""
    policy = Enumerated(seed)
    policy.rewards = policy.rewards.sigmoid()
    logps = policy.logps().detach()
    policy.ref = (logps - share * policy.rewards / BETA).log_softmax(0)
    if centred:
        policy.rewards += logps.exp() @ (BETA * (logps - policy.ref) - policy.rewards)
    return policy


def run(seeds: int = 5) -> dict[str, Any]:
    """Every check on policies of several seeds: the worst difference, or all values of what is measured."""

    def worst(check: Any) -> float:
        return max(check(Enumerated(seed)) for seed in range(seeds))

    def identity(offset: float) -> float:
        return worst(
            lambda p: difference(on_policy_gradient(p, offset), -2 * BETA * rlhf_gradient(p))
        )

    spread = {
        place: {
            name: [gradient_variance(on_the_way(seed, **way), name) for seed in range(seeds)]
            for name in OFFSETS
        }
        for place, way in PLACES.items()
    }
    return {
        "seeds": seeds,
        "pair_is_dpo": worst(pair_is_dpo),
        "policy_gradient": {str(offset): identity(offset) for offset in (0.0, 0.7, -3.0)},
        "bce_is_bco": worst(bce_is_bco),
        "scores_are_labels": worst(scores_are_labels),
        "fixed_point_tv": [fixed_point(Enumerated(seed)) for seed in range(min(seeds, 3))],
        "variance": {
            k: {n: [value for value, _ in found] for n, found in own.items()}
            for k, own in spread.items()
        },
        "mean_gradient": max(
            e for place in list(PLACES)[:2] for own in spread[place].values() for _, e in own
        ),
    }
