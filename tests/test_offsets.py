"""Offsets: leave-one-out per group, and the running mean that never sees its own step."""

from __future__ import annotations

import pytest
import torch

from una_fast import Feedback, Objective, una_loss
from una_fast.offsets import EmaOffset, group_offset, lone_samples


def test_group_offset_leaves_the_sample_out():
    residuals = torch.tensor([1.0, 3.0, 8.0, 5.0, -2.0], requires_grad=True)
    group = torch.tensor([7, 7, 7, 3, 9])
    offset = group_offset(residuals, group)
    assert offset.tolist() == [-5.5, -4.5, -2.0, 0.0, 0.0]
    assert not offset.requires_grad and lone_samples(group) == 2
    with pytest.raises(ValueError, match="must both be"):
        group_offset(residuals, group[:3])


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


@torch.no_grad()
def expected_gradient(logits: torch.Tensor, reward: torch.Tensor, beta: float, samples: int, offset: str):
    """Exact mean over all draws of `samples` answers of the reward_mse gradient, and grad J, for a one-token policy.

    J = E[R] - beta KL(pi || pi_ref) with pi_ref uniform; dJ/dlogits_a = pi_a (A_a - E[A]), A = R - beta log pi/pi_ref.
    """
    pi = torch.softmax(logits, 0)
    log_ratio = torch.log_softmax(logits, 0) + torch.log(torch.tensor(float(len(pi))))
    advantage = reward - beta * log_ratio
    grad_j = pi * (advantage - (pi * advantage).sum())
    mean = torch.zeros_like(logits)
    for draw in torch.cartesian_prod(*[torch.arange(len(pi))] * samples):
        residuals = beta * log_ratio[draw] - reward[draw]
        o = (
            group_offset(residuals, torch.zeros_like(draw))
            if offset == "group"
            else torch.full((samples,), 0.7).double()
        )
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            logps = torch.log_softmax(leaf, 0)[draw]
            feedback = Feedback.scores(range(samples), reward[draw], offset=o)
            ref = torch.full((samples,), -torch.log(torch.tensor(float(len(pi)))).item(), dtype=torch.float64)
            una_loss(logps, ref, feedback, objective=Objective(beta=beta, score="reward_mse")).loss.backward()
        mean += pi[draw].prod() * leaf.grad
    return mean, grad_j


@pytest.mark.parametrize("offset", ["group", "constant"])
def test_offsets_keep_the_policy_gradient(offset):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    reward = torch.randn(4, generator=generator, dtype=torch.float64)
    beta = 0.3
    mean, grad_j = expected_gradient(logits, reward, beta, samples=3, offset=offset)
    assert torch.allclose(mean, -2 * beta * grad_j, rtol=0, atol=1e-12)
