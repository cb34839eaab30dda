"""E0: the exact properties of UNA, by enumeration in float64.

The policy is one head over a table of states, one per prefix, and answers are all sequences of two
tokens over a vocabulary of three, so that every expectation is a finite sum.

    pair = DPO        gradient of the pair loss against -log sigmoid(beta * (Delta_w - Delta_l))
    policy gradient   gradient of E[(r + o - R)^2], samples held fixed, against -2 beta grad J,
                      for offsets o
    BCE = BCO         binary bce against BCO with its shift at 0
    scores of 0, 1    score mse against binary mse
    fixed point       reward_mse, on-policy, descends to pi_ref exp(R / beta) / Z: total variation
    variance          of the gradient on one draw of four answers, over all draws: offset group
                      against none, on the way from the reference to the optimum, rewards in [0, 1];
                      and with rewards centred beforehand, where no offset is the best choice
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
    """All nine answers of a small policy, with rewards and with log-probs under a reference."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.states = normal(1 + VOCAB, DIM).requires_grad_()
        self.weight = normal(VOCAB, DIM).requires_grad_()
        self.rewards = normal(VOCAB**2)
        self.ref = normal(VOCAB**2).log_softmax(0)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.states, self.weight

    def logps(self) -> Tensor:
        """Return [9] log-probs of the answers."""
        first = (self.states[0] @ self.weight.T).log_softmax(0)
        second = (self.states[1:] @ self.weight.T).log_softmax(1)
        return (first.unsqueeze(1) + second).flatten()

    def gradient(self, value: Tensor) -> Tensor:
        """Return the gradient of a value, as one vector."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.parameters)])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def loss_gradient(policy: Enumerated, feedback: Feedback, **forms: str) -> Tensor:
    """Return the gradient of una_loss with the forms of an objective."""
    objective = Objective(beta=BETA, **forms)
    loss = una_loss(policy.logps(), policy.ref, feedback, objective=objective).loss
    return policy.gradient(loss)


def pair_is_dpo(policy: Enumerated) -> float:
    """Compare the pair loss with DPO."""
    better, worse = torch.tensor([0, 3, 7]), torch.tensor([5, 1, 2])
    delta = policy.logps() - policy.ref
    dpo = policy.gradient(-F.logsigmoid(BETA * (delta[better] - delta[worse])).mean())
    return difference(loss_gradient(policy, Feedback.pairs(better, worse)), dpo)


def bce_is_bco(policy: Enumerated) -> float:
    """Compare binary bce with BCO at shift 0."""
    label = policy.rewards > 0
    reward, shift = BETA * (policy.logps() - policy.ref), 0.0
    bco = torch.where(label, -F.logsigmoid(reward - shift), -F.logsigmoid(-(reward - shift))).mean()
    found = loss_gradient(policy, Feedback.binary(range(len(label)), label))
    return difference(found, policy.gradient(bco))


def scores_are_labels(policy: Enumerated) -> float:
    """Compare score mse on scores 0 and 1 with binary mse."""
    label, every = policy.rewards > 0, range(len(policy.rewards))
    by_score = loss_gradient(policy, Feedback.scores(every, label.double()), score="mse")
    by_label = loss_gradient(policy, Feedback.binary(every, label), binary="mse")
    return difference(by_score, by_label)


def on_policy_gradient(policy: Enumerated, offset: float) -> Tensor:
    """Return the gradient of E[(r + offset - R)^2], the samples held fixed."""
    logps = policy.logps()
    chances = logps.detach().exp()
    feedback = Feedback.scores(range(len(logps)), policy.rewards, weight=chances, offset=offset)
    objective = Objective(beta=BETA, score="reward_mse")
    loss = una_loss(logps, policy.ref, feedback, objective=objective, reduction="sum").loss
    return policy.gradient(loss)


def rlhf_gradient(policy: Enumerated) -> Tensor:
    """Return the gradient of J = E[R] - beta KL."""
    logps = policy.logps()
    return policy.gradient((logps.exp() * (policy.rewards - BETA * (logps - policy.ref))).sum())


def fixed_point(policy: Enumerated, steps: int = 2000) -> float:
    """Return the total variation between the optimum of J and the end of descent on reward_mse."""
    optimizer = torch.optim.Adam(policy.parameters, lr=0.03)
    for _ in range(steps):
        gradient = on_policy_gradient(policy, 0.0)
        sizes = [p.numel() for p in policy.parameters]
        for parameter, own in zip(policy.parameters, gradient.split(sizes), strict=True):
            parameter.grad = own.view_as(parameter)
        optimizer.step()
    optimum = (policy.ref + policy.rewards / BETA).softmax(0)
    return float(0.5 * (policy.logps().detach().exp() - optimum).abs().sum())


def gradient_variance(policy: Enumerated, offset: str) -> tuple[float, float]:
    """Return the variance of the gradient on one draw of DRAWN answers, and the error of the mean.

    The variance is the trace of the covariance over all draws; the error is relative, against -2
    beta grad J.
    """
    logps, count = policy.logps().detach(), len(policy.rewards)
    # [9, P], grad log pi of each answer
    rows = torch.stack([policy.gradient(policy.logps()[k]) for k in range(count)])
    residuals = BETA * (logps - policy.ref) - policy.rewards
    objective = Objective(beta=BETA, score="reward_mse")
    chances, gradients = [], []
    for draws in torch.cartesian_prod(*[torch.arange(count)] * DRAWN).split(count**2):
        drawn, draw = draws.flatten(), torch.arange(len(draws)).repeat_interleave(DRAWN)
        added = torch.zeros(len(drawn))
        if offset == "group":
            added = group_offset(residuals[drawn], draw)
        leaf = logps[drawn].requires_grad_()
        feedback = Feedback.scores(range(len(drawn)), policy.rewards[drawn], offset=added)
        # The mean per draw.
        call = {"objective": objective, "num_units": DRAWN}
        loss = una_loss(leaf, policy.ref[drawn], feedback, **call).loss
        (coefficients,) = torch.autograd.grad(loss, leaf)
        gradients.append((coefficients[:, None] * rows[drawn]).view(len(draws), DRAWN, -1).sum(1))
        chances.append(logps[draws].sum(1).exp())
    gradients, chances = torch.cat(gradients), torch.cat(chances)
    mean = chances @ gradients
    variance = float(chances @ (gradients - mean).square().sum(1))
    return variance, difference(mean, -2 * BETA * rlhf_gradient(policy))


def on_the_way(seed: int, share: float, *, centred: bool = False) -> Enumerated:
    """Return a policy with rewards in [0, 1] between the reference and the optimum.

    seed: of the policy
    share: of the way, 0 at the reference and 1 at the optimum: log pi = log pi_ref + share * R /
        beta + constant
    centred: subtract a constant from the rewards, so that the mean residual is 0
    """
    policy = Enumerated(seed)
    policy.rewards = policy.rewards.sigmoid()
    logps = policy.logps().detach()
    policy.ref = (logps - share * policy.rewards / BETA).log_softmax(0)
    if centred:
        policy.rewards += logps.exp() @ (BETA * (logps - policy.ref) - policy.rewards)
    return policy


def run(seeds: int = 5) -> dict[str, Any]:
    """Run every check on policies of several seeds, and return the worst differences.

    Checks of many values, such as the variance, return every value.
    """

    def worst(check: Any) -> float:
        return max(check(Enumerated(seed)) for seed in range(seeds))

    def identity(offset: float) -> float:
        def check(policy: Enumerated) -> float:
            return difference(on_policy_gradient(policy, offset), -2 * BETA * rlhf_gradient(policy))

        return worst(check)

    variance: dict[str, dict[str, list[float]]] = {}
    mean_errors = []
    for number, (place, way) in enumerate(PLACES.items()):
        variance[place] = {}
        for name in OFFSETS:
            found = [gradient_variance(on_the_way(seed, **way), name) for seed in range(seeds)]
            variance[place][name] = [value for value, _ in found]
            if number < 2:  # where the mean gradient is not near 0
                mean_errors += [error for _, error in found]
    return {
        "seeds": seeds,
        "pair_is_dpo": worst(pair_is_dpo),
        "policy_gradient": {str(offset): identity(offset) for offset in (0.0, 0.7, -3.0)},
        "bce_is_bco": worst(bce_is_bco),
        "scores_are_labels": worst(scores_are_labels),
        "fixed_point_tv": [fixed_point(Enumerated(seed)) for seed in range(min(seeds, 3))],
        "variance": variance,
        "mean_gradient": max(mean_errors),
    }
