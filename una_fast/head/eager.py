"""The truth: the functions of ops.py with all logits in memory, and autograd for every gradient.

Short enough to check by eye. Used by tests (in float64) and benchmarks only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.losses import Objective, UnaOutput, una_loss


def gather_logps(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the targets; 0 where a target is -100.

    logits: [..., V]
    targets: [...]
    """
    logps = torch.log_softmax(logits / temperature, dim=-1)
    picked = logps.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, torch.zeros_like(picked), picked)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the [N] log-probs of the targets, from [N, V] logits."""
    return gather_logps(_logits(hidden, weight, bias, softcap, logit_scale) / temperature, targets)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the statistics of ops.token_logps by name, [N] each."""
    z = _logits(hidden, weight, bias, softcap, logit_scale) / temperature
    logps = torch.log_softmax(z, dim=-1)
    stats = {
        "entropy": -(logps.exp() * logps.clamp_min(-1e30)).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": torch.logsumexp(2 * logps, dim=-1),
    }
    return {name: x.masked_fill(targets == -100, 0) for name, x in stats.items()}


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """Return [N, V] logits before the temperature."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_una_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    feedback: Feedback,
    *,
    objective: Objective | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_units: int | Tensor | None = None,
) -> UnaOutput:
    """Compute the loss of ops.linear_una_loss."""
    lengths = cu_seqlens.diff()

    def sums(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        logps = token_logps(h, w, targets, b, softcap, logit_scale, temperature).double()
        if not len(lengths):
            return logps
        return torch.stack([response.sum() for response in logps.split(lengths.tolist())])

    if ref_logps is None:
        with torch.no_grad():
            ref_bias = bias if ref_weight is None and ref_bias is None else ref_bias
            ref_logps = sums(ref_hidden, weight if ref_weight is None else ref_weight, ref_bias)
    return una_loss(
        sums(hidden, weight, bias),
        ref_logps,
        feedback,
        objective=objective,
        reduction=reduction,
        num_units=num_units,
        lengths=lengths,
    )
