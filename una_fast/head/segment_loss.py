"""The loss of one call as a function of its token log-probs: sums over responses, outputs, and coefficients.

The loss itself is losses.py. What stands here is how the fused head calls it: S numbers in float64, on the device,
without waiting for it. Small tensors that a call needs there (lengths, units) are copied once per content and kept, so
that a call repeated with the same cu_seqlens and feedback copies nothing and, where the loss kernel runs, can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.head.constants import capturing, constant
from una_fast.losses import Objective, UnaOutput, denominator, una_loss

BOOSTED = 2.0**10


class Lengths:
    """cu_seqlens as Python integers, and on the device."""

    def __init__(self, cu: Sequence[int], device: torch.device) -> None:
        self.cu = tuple(cu)
        self.ints = tuple(b - a for a, b in zip(cu[:-1], cu[1:], strict=True))
        self.cu_tensor = constant(self.cu, torch.int64, device)
        self.tensor = constant(self.ints, torch.int64, device)

    def per_row(self, per_response: Tensor) -> Tensor:
        """[S] -> [N]."""
        return per_response.repeat_interleave(self.tensor, output_size=self.cu[-1])


@dataclass
class CallLoss:
    """ref_logps: [S] float64 on the device. The rest as in linear_una_loss."""

    lengths: Lengths
    ref_logps: Tensor
    feedback: Feedback
    objective: Objective
    reduction: str
    num_units: int | Tensor | None

    @staticmethod
    def sums(lengths: Lengths, tokens: Tensor) -> Tensor:
        """[N] -> [S] float64 sums over each response."""
        if not lengths.ints:
            return tokens.double()
        return torch.segment_reduce(tokens.double(), "sum", lengths=lengths.tensor, unsafe=True)

    def output(self, tokens: Tensor) -> UnaOutput:
        """The result of the call, without a graph."""
        return self._loss(self.sums(self.lengths, tokens))

    def coefficients(self, tokens: Tensor) -> Tensor:
        """[S] float64 dL/dlogps, right for the responses whose component is summed."""
        leaf = self.sums(self.lengths, tokens).requires_grad_()
        with torch.enable_grad():
            loss = self._loss(leaf).loss
        return torch.autograd.grad(loss, leaf)[0]

    def boost(self) -> float | Tensor:
        """A factor that brings the coefficients up to some 2^10, for gradients of logits in float16: times a small
        probability they would be zero, and no loss scale reaches what the forward pass has built."""
        weights = torch.zeros(len(self.lengths.ints), dtype=torch.float64)
        for column in (self.feedback.first, self.feedback.second):
            weights.index_add_(0, column[column >= 0], self.feedback.weight[column >= 0])
        if self.objective.length_normalize:
            weights /= torch.tensor(self.lengths.ints)
        most = self.objective.beta * weights.max().item() if len(weights) else 0.0
        units = denominator(self.reduction, self.num_units, self.feedback.num_units)
        return units * (BOOSTED / most) if most else 1.0

    def _loss(self, logps: Tensor) -> UnaOutput:
        if capturing(logps.device):
            raise RuntimeError(
                "only the loss kernel can be captured in a CUDA graph: engine triton, a form it has"
            )
        return una_loss(
            logps,
            self.ref_logps,
            self.feedback,
            objective=self.objective,
            reduction=self.reduction,
            num_units=self.num_units,
            lengths=self.lengths.tensor,
        )
