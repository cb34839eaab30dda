"""Presets: each has the gradient of the formula in its paper, written out here in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import una_fast
from una_fast import Feedback, Objective, linear_una_loss, presets, una_loss
from una_fast.head import eager
from una_fast.presets import qrpo_constant

BETA = 0.3


def log_ratios(responses: int) -> tuple[Tensor, Tensor]:
    """Return log-probs of policy and reference; log-ratios of either sign, some of them large."""
    g = torch.Generator().manual_seed(responses)
    logps = 9 * torch.randn(responses, generator=g, dtype=torch.float64) - 30
    return logps.requires_grad_(), logps.detach() + 4 * torch.randn(responses, generator=g).double()


def check(feedback: Feedback, objective: Objective, paper: Tensor, logps: Tensor, ref: Tensor):
    """Compare loss and gradient with the mean of the paper's losses."""
    out = una_loss(logps, ref, feedback, objective=objective)
    torch.testing.assert_close(out.loss, paper, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(paper, logps)
    (found,) = torch.autograd.grad(out.loss, logps)
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_dpo():
    logps, ref = log_ratios(6)
    delta = logps - ref
    paper = -torch.log(torch.sigmoid(BETA * delta[:3] - BETA * delta[3:])).mean()
    feedback = Feedback.pairs([0, 1, 2], [3, 4, 5])
    check(feedback, presets.dpo(BETA), paper, logps, ref)


def test_una():
    logps, ref = log_ratios(6)
    r = BETA * (logps - ref)
    label, score = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.2, 0.9]).double()
    units = [
        -torch.log(torch.sigmoid(r[0] - r[1])).reshape(1),
        -(
            label * torch.log(torch.sigmoid(r[2:4]))
            + (1 - label) * torch.log(1 - torch.sigmoid(r[2:4]))
        ),
        (torch.sigmoid(r[4:]) - score) ** 2,
    ]
    feedback = Feedback.merge(
        [
            Feedback.pairs([0], [1]),
            Feedback.binary([2, 3], label.bool()),
            Feedback.scores([4, 5], score),
        ]
    )
    check(feedback, presets.una(BETA), torch.cat(units).mean(), logps, ref)


@pytest.mark.parametrize("where", ["objective", "unit"])
def test_bco(where):
    """delta is the mean of both mean rewards, without gradient."""
    logps, ref = log_ratios(5)
    r = BETA * (logps - ref)
    good, bad = r[:2], r[2:]
    delta = ((good.mean() + bad.mean()) / 2).item()
    losses = [-F.logsigmoid(good - delta), -F.logsigmoid(-(bad - delta))]
    label = [True, True, False, False, False]
    if where == "objective":
        objective, feedback = presets.bco(BETA, delta), Feedback.binary(range(5), label)
    else:
        objective = presets.bco(BETA)
        feedback = Feedback.binary(range(5), label, offset=-delta)
    check(feedback, objective, torch.cat(losses).mean(), logps, ref)


@pytest.mark.parametrize("beta", [0.02, 0.3, 5.0])
def test_qrpo(beta):
    """Rewards of completions of the reference give the quantile; Z is the integral itself."""
    logps, ref = log_ratios(4)
    g = torch.Generator().manual_seed(0)
    of_reference = torch.randn(4, 50, generator=g)
    reward = torch.tensor([-0.5, 0.1, 0.9, 2.0])
    quantile = (of_reference <= reward[:, None]).double().mean(1)
    z = beta * (math.exp(1 / beta) - 1)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert z == pytest.approx((grid / beta).exp().mean().item(), rel=1e-6)
    paper = ((quantile - beta * math.log(z) - beta * (logps - ref)) ** 2).mean()
    check(Feedback.scores(range(4), quantile), presets.qrpo(beta), paper, logps, ref)


def test_the_constant_of_qrpo_neither_overflows_nor_cancels():
    """exp(1 / beta) overflows below 0.0014; above 1e6 the logarithm would cancel."""
    for beta in (0.01, 0.1, 1.0, 30.0):
        exact = beta * math.log(beta * math.expm1(1 / beta))
        assert presets.qrpo_constant(beta) == pytest.approx(exact, rel=1e-12)
    assert presets.qrpo_constant(1e-6) == pytest.approx(1 + 1e-6 * math.log(1e-6), rel=1e-15)
    assert presets.qrpo_constant(1e5) == pytest.approx(0.5 + 1 / 24e5, rel=1e-9)
    for beta in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="beta=.* must be positive and finite"):
            presets.qrpo(beta)


def test_dro():
    """The paper halves the square; its policy step holds the value fixed."""
    logps, ref = log_ratios(4)
    reward = torch.tensor([3.0, -1.0, 0.5, 10.0], dtype=torch.float64)
    value = torch.tensor([0.4, 0.4, -2.0, 1.0], dtype=torch.float64)
    tau = 0.7
    paper = 0.5 * ((reward - value - tau * (logps - ref)) ** 2).mean()
    feedback = Feedback.scores(range(4), reward, offset=value, weight=0.5)
    check(feedback, presets.dro(tau), paper, logps, ref)


def test_a_preset_goes_through_the_fused_head():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,), generator=g)
    feedback, ref = Feedback.scores([0, 1], [0.25, 0.75]), torch.tensor([-9.0, -7.0]).double()
    objective = una_fast.presets.qrpo(BETA)
    given = (targets, torch.tensor([0, 4, 7]), feedback)
    out = linear_una_loss(hidden, weight, *given, objective=objective, ref_logps=ref)
    found = torch.autograd.grad(out.loss, (hidden, weight))
    tokens = eager.token_logps(hidden, weight, targets)
    sums = torch.stack([tokens[:4].sum(), tokens[4:].sum()])
    z = BETA * (math.exp(1 / BETA) - 1)
    paper = ((feedback.value - BETA * math.log(z) - BETA * (sums - ref)) ** 2).mean()
    for ours, theirs in zip(found, torch.autograd.grad(paper, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "una", "bco", "qrpo", "dro"])
def test_beta_is_checked_by_every_preset(name):
    preset = getattr(presets, name)
    assert preset(0.25).beta == 0.25
    with pytest.raises(ValueError, match="beta=0 must be positive"):
        preset(0)


def test_the_constant_of_quantiles_has_both_limits():
    """Between 1 for small beta and 1/2 for large, without a step where the formula changes."""
    assert qrpo_constant(1e17) == 0.5 and qrpo_constant(1e-4) == pytest.approx(1, abs=1e-3)
    below, above = qrpo_constant(9999.0), qrpo_constant(10001.0)
    assert 0 < below - above < 1e-8
