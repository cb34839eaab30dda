"""Objectives of published methods, as settings of the loss in losses.py.

With Delta = log pi - log pi_ref of a response, r = beta Delta, and an offset that is added to r:

    dpo     pairs     -log sigmoid(r_w - r_l)
    una     any       pairs as DPO, labels by cross entropy, scores by (sigmoid(r) - score)^2
    bco     labels    cross entropy of sigmoid(r - delta)
    qrpo    scores    (r + beta log Z - quantile)^2
    dro     scores    (r + value - reward)^2

    objective = presets.qrpo(beta=0.1)
    out = linear_una_loss(..., Feedback.scores(index, quantiles), objective=objective)
"""

from __future__ import annotations

import math

from una_fast.losses import Objective


def dpo(beta: float = 0.1) -> Objective:
    """Return DPO (arXiv 2305.18290, eq. 7), for pairs.

    L = -log sigmoid(beta (Delta_w - Delta_l)), the mean over pairs. Its "conservative" variant
    (smoothed labels) is the target of `Feedback.pairs`.

    beta: strength of the KL penalty, > 0
    """
    return Objective(beta, pair="logistic")


def una(beta: float = 0.1) -> Objective:
    """Return UNA (arXiv 2408.15339), for pairs, labels and scores in [0, 1].

    Pairs by eq. 10 with log sigmoid applied, labels by eq. 12, scores by eq. 13:

        -log sigmoid(r_w - r_l)        cross entropy of sigmoid(r)        (sigmoid(r) - score)^2

    beta: factor of the implicit reward, > 0
    """
    return Objective(beta, pair="logistic", binary="bce", score="mse")


def bco(beta: float = 0.1, delta: float = 0.0) -> Objective:
    """Return BCO (arXiv 2404.04656), for labels.

    L = -log sigmoid(r - delta) of a good response, -log sigmoid(-(r - delta)) of a bad one. The
    shift delta = (mean r of good responses + mean r of bad ones) / 2 is a running mean without
    gradient, which the caller keeps: from `out.rewards` of earlier steps. A shift that differs from
    prompt to prompt is -offset of `Feedback.binary(..., offset=-delta)`.

    beta: strength of the KL penalty, > 0
    delta: shift of the reward
    """
    return Objective(beta, binary="bce", offset=-delta)


def qrpo(beta: float = 0.1) -> Objective:
    """Return QRPO (arXiv 2507.08068), for scores that are quantiles in [0, 1].

    L = (R - beta log Z - beta Delta)^2. The score R of a response is the share of completions of
    the reference, for the same prompt, whose reward is not larger. R of the reference is uniform,
    so that Z is exact: the mean of exp(R / beta), beta (exp(1 / beta) - 1).

    beta: strength of the KL penalty, > 0
    """
    return Objective(beta, score="reward_mse", offset=qrpo_constant(beta))


def qrpo_constant(beta: float) -> float:
    """Return beta log Z with Z = beta (exp(1 / beta) - 1), between 0.5 (large beta) and 1.

    ValueError unless beta is positive and finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be positive and finite")
    if beta > 1e4:
        # The cumulants of a uniform number: what follows is smaller by beta^2.
        return 0.5 + 1 / (24 * beta)
    # exp(1 / beta) overflows at beta = 0.0014: it is taken out of the logarithm.
    return 1 + beta * math.log(-beta * math.expm1(-1 / beta))


def dro(beta: float = 1.0) -> Objective:
    """Return the policy's part of DRO (arXiv 2405.19107), for scores that are rewards.

    L = (reward - V(x) - beta Delta)^2, twice the loss of the paper, whose tau is beta: for its
    scale give `weight=0.5`. The value V(x) of the prompt, of a model that the caller trains by the
    same residual, comes as `Feedback.scores(index, reward, offset=value)`, without gradient.

    beta: strength of the KL penalty, > 0
    """
    return Objective(beta, score="reward_mse")
