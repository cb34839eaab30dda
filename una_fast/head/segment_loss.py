"""From the token log-probs of a call to the loss: sums over responses, outputs, and coefficients.

The loss itself is losses.py. The fused head calls the loss on S numbers
in float64, on the device, without waiting for the device. A response is a segment of the N rows.

Where the ranks of a group hold a part of every response each, the S sums cross the group once per
call: after the log-probs of all rows of the rank, and before the first coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.group import ALONE, Group
from una_fast.head.constants import capturing, constant
from una_fast.losses import Objective, UnaOutput, una_loss


class Lengths:
    """The bounds of the responses, as Python integers and on the device.

    cu: S + 1 row offsets
    ints: S tokens per response, on this rank
    group: the ranks that hold a part of every response each
    whole: S tokens per response, on all ranks of the group
    cu_tensor, tensor, whole_tensor: the same numbers as int64 tensors on the device
    """

    def __init__(
        self,
        cu: Sequence[int],
        device: torch.device,
        group: Group = ALONE,
        whole: Sequence[int] | None = None,
    ) -> None:
        """Keep the bounds; whole: None where this rank holds all tokens."""
        self.cu = tuple(cu)
        self.ints = tuple(b - a for a, b in zip(cu[:-1], cu[1:], strict=True))
        self.group = group
        self.whole = self.ints if whole is None else tuple(whole)
        self.cu_tensor = constant(self.cu, torch.int64, device)
        self.tensor = constant(self.ints, torch.int64, device)
        self.whole_tensor = constant(self.whole, torch.int64, device)

    def per_row(self, per_response: Tensor) -> Tensor:
        """Repeat [S] numbers of responses for every row: [N]."""
        return per_response.repeat_interleave(self.tensor, output_size=self.cu[-1])


@dataclass
class SegmentLoss:
    """The loss of a call as a function of token log-probs.

    lengths: bounds of the S responses
    ref_logps: [S] float64 on the device, sums over tokens
    feedback: units over the responses
    objective: forms of the losses
    reduction: "mean" or "sum"
    num_units: denominator of "mean"; None: the units of this call
    """

    lengths: Lengths
    ref_logps: Tensor
    feedback: Feedback
    objective: Objective
    reduction: str
    num_units: int | Tensor | None
    _crossed: Tensor | None = field(default=None, init=False)

    @staticmethod
    def sums(lengths: Lengths, tokens: Tensor) -> Tensor:
        """Return the [S] float64 sums of [N] token log-probs over each response."""
        if not lengths.ints:
            return tokens.double()
        return torch.segment_reduce(tokens.double(), "sum", lengths=lengths.tensor, unsafe=True)

    def whole_sums(self, tokens: Tensor) -> Tensor:
        """Return the [S] float64 sums over each response, on all ranks of the group.

        tokens: [N] log-probs; in a group complete at the first call, in which alone the ranks meet
        """
        group = self.lengths.group
        if group.size == 1:
            return self.sums(self.lengths, tokens)
        if self._crossed is None:
            self._crossed = group.sum(self.sums(self.lengths, tokens))
        return self._crossed.clone()

    def output(self, tokens: Tensor) -> UnaOutput:
        """Return the result of the call, without a graph."""
        return self._loss(self.whole_sums(tokens))

    def coefficients(self, tokens: Tensor) -> Tensor:
        """Return the [S] float64 gradients dL/dlogps.

        A coefficient is right once all responses of the component are among the tokens.
        """
        leaf = self.whole_sums(tokens).requires_grad_()
        with torch.enable_grad():
            loss = self._loss(leaf).loss
        return torch.autograd.grad(loss, leaf)[0]

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
            lengths=self.lengths.whole_tensor,
        )
