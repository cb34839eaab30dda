"""The loss of one call as a function of its token log-probs: sums over responses, outputs, and coefficients.

The loss itself is losses.py. What stands here is how the fused head calls it: S numbers in float64, on the device,
without waiting for it. Small tensors that a call needs there (lengths, units) are copied once per content and kept, so
that a call repeated with the same cu_seqlens and feedback copies nothing and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.losses import Objective, UnaOutput, una_loss


def refuse_in_capture(device: torch.device) -> None:
    """A copy from the CPU cannot be part of a CUDA graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "while a CUDA graph is captured, lengths, feedback and objective must be those of an earlier call: run the "
            "call once before the capture"
        )


@functools.lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one-dimensional tensor of a few numbers, the same one for the same numbers: never to be written to."""
    refuse_in_capture(device)
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


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

    def _loss(self, logps: Tensor) -> UnaOutput:
        return una_loss(
            logps,
            self.ref_logps,
            self.feedback,
            objective=self.objective,
            reduction=self.reduction,
            num_units=self.num_units,
            lengths=self.lengths.tensor,
        )
