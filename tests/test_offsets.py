"""Offsets: leave-one-out per group, and the running mean that never sees its own step."""

from __future__ import annotations

import pytest
import torch

from una_fast import Feedback, Objective, una_loss
from una_fast.offsets import EmaOffset, group_offset


def test_group_offset_leaves_the_sample_out():
    residuals = torch.tensor([1.0, 3.0, 8.0, 5.0, -2.0], requires_grad=True)
    group = torch.tensor([7, 7, 7, 3, 9])
    offset = group_offset(residuals, group)
    assert offset.tolist() == [-5.5, -4.5, -2.0, 0.0, 0.0]
    assert not offset.requires_grad
    with pytest.raises(ValueError, match="must both be"):
        group_offset(residuals, group[:3])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_residual_that_is_not_finite_stays_in_its_group(wrong):
    offset = group_offset(
        torch.tensor([1.0, 2.0, wrong, 3.0, wrong]), torch.tensor([0, 0, 1, 2, 2])
    )
    assert offset[:3].tolist() == [-2.0, -1.0, 0.0]
    assert not offset[3].isfinite() and offset[4] == -3.0


def test_ema_offset_is_that_of_the_steps_before():
    ema = EmaOffset(decay=0.5)
    assert ema.offset == 0.0
    ema.update(4.0)
    assert ema.offset == -4.0  # unbiased: not 2.0
    ema.update(1.0)
    assert ema.offset == pytest.approx(-(4.0 + 2 * 1.0) / 3)
    other = EmaOffset(decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.offset == ema.offset and other.decay == 0.5
    with pytest.raises(ValueError, match="finite"):
        ema.update(float("nan"))
    with pytest.raises(ValueError, match="decay"):
        EmaOffset(decay=1.0)


UNIFORM = 4  # answers of a one-token policy; the reference finds them equally likely


def ema_of_an_earlier_step() -> float:
    ema = EmaOffset()
    ema.update(-0.4)
    ema.update(1.3)
    return ema.offset


OFFSETS = {
    "none": lambda residuals: torch.zeros_like(residuals),
    "constant": lambda residuals: torch.full_like(residuals, 0.7),
    "ema": lambda residuals: torch.full_like(residuals, ema_of_an_earlier_step()),
    "group": lambda residuals: group_offset(residuals, torch.zeros_like(residuals).long()),
}


def sampled_gradient(
    logits: torch.Tensor, reward: torch.Tensor, draw: torch.Tensor, beta: float, offset: str
):
    """Gradient of reward_mse on one group of drawn answers."""
    leaf = logits.clone().requires_grad_()
    logps = torch.log_softmax(leaf, 0)[draw]
    ref = torch.full_like(logps, -torch.log(torch.tensor(float(len(logits)))).item()).detach()
    o = OFFSETS[offset](beta * (logps.detach() - ref) - reward[draw])
    feedback = Feedback.scores(range(len(draw)), reward[draw], offset=o)
    una_loss(
        logps, ref, feedback, objective=Objective(beta=beta, score="reward_mse")
    ).loss.backward()
    return leaf.grad


def exact_moments(
    logits: torch.Tensor, reward: torch.Tensor, beta: float, samples: int, offset: str
):
    """Mean and total variance of the gradient over all draws of `samples` answers."""
    pi = torch.softmax(logits, 0)
    draws = torch.cartesian_prod(*[torch.arange(len(pi))] * samples)
    gradients = torch.stack(
        [sampled_gradient(logits, reward, draw, beta, offset) for draw in draws]
    )
    weights = pi[draws].prod(1)
    mean = weights @ gradients
    return mean, float(weights @ (gradients - mean).square().sum(1))


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(UNIFORM, generator=generator, dtype=torch.float64)
    return logits, 1.0 + torch.randn(UNIFORM, generator=generator, dtype=torch.float64), 0.3


@pytest.mark.parametrize("offset", OFFSETS)
def test_offsets_keep_the_policy_gradient(problem, offset):
    """The mean gradient is -2 beta grad J of J = E[R] - beta KL(pi || pi_ref):
    dJ/dlogits_a = pi_a (A_a - E[A]), A = R - beta log pi/pi_ref."""
    logits, reward, beta = problem
    pi = torch.softmax(logits, 0)
    advantage = reward - beta * (pi.log() + torch.log(torch.tensor(float(UNIFORM))))
    grad_j = pi * (advantage - (pi * advantage).sum())
    mean, _ = exact_moments(logits, reward, beta, samples=3, offset=offset)
    assert torch.allclose(mean, -2 * beta * grad_j, rtol=0, atol=1e-12)


def test_the_group_offset_takes_the_level_of_the_rewards_out_of_the_variance(problem):
    logits, reward, beta = problem
    group, shifted = (exact_moments(logits, r, beta, 3, "group")[1] for r in (reward, reward + 2.0))
    none, worse = (exact_moments(logits, r, beta, 3, "none")[1] for r in (reward, reward + 2.0))
    assert shifted == pytest.approx(group, rel=1e-9)
    assert worse > 5 * none and shifted < 0.2 * worse


@pytest.mark.parametrize("offset", ["none", "ema", "group"])
def test_the_fixed_point_is_the_rlhf_optimum(problem, offset):
    """Steps on drawn answers end at pi_ref exp(R / beta) / Z: there all residuals are equal."""
    logits, reward, beta = problem
    optimum = torch.softmax(reward / beta, 0)
    generator = torch.Generator().manual_seed(1)
    ema, steps = EmaOffset(), 500
    ref = -torch.log(torch.tensor(float(UNIFORM), dtype=torch.float64)).expand(128)
    logits = logits.clone().requires_grad_()
    for step in range(steps):
        draw = torch.multinomial(
            torch.softmax(logits.detach(), 0), 128, replacement=True, generator=generator
        )
        logps = torch.log_softmax(logits, 0)[draw]
        residuals = beta * (logps.detach() - ref) - reward[draw]
        groups = torch.arange(128) // 4
        o = {"none": 0.0, "ema": ema.offset, "group": group_offset(residuals, groups)}[offset]
        ema.update(float(residuals.mean()))
        feedback = Feedback.scores(range(128), reward[draw], offset=o)
        una_loss(
            logps, ref, feedback, objective=Objective(beta=beta, score="reward_mse")
        ).loss.backward()
        with torch.no_grad():
            logits -= 4.0 * (1 - step / steps) * logits.grad
            logits.grad = None
    distance = (torch.softmax(logits, 0) - optimum).abs().sum() / 2
    assert (torch.softmax(problem[0], 0) - optimum).abs().sum() / 2 > 0.3 and distance < 1e-2
