"""From one number per token, the form of other trainers, to one number per response."""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 1e-4  # of equal numbers: bfloat16 reductions of a host may differ in the last digits


def response_sums(logps: Tensor, mask: Tensor) -> Tensor:
    """Return [B] float64, the sums over the tokens of each response.

    logps: [B, T] any float dtype, carries the gradient; numbers outside the mask may be anything
    mask: [B, T] bool or numbers, the tokens of the response

    ValueError for different shapes.
    """
    if logps.shape != mask.shape or logps.dim() != 2:
        raise ValueError(
            f"log-probs {tuple(logps.shape)} and their mask {tuple(mask.shape)} must both be "
            "[responses, tokens]"
        )
    return logps.masked_fill(~mask.bool(), 0.0).double().sum(1)


def one_per_response(name: str, values: Tensor, mask: Tensor, hint: str) -> Tensor:
    """Return [B] float64, detached: the common number of all tokens of a response.

    name: of the values, for errors
    values: [B, T] any float dtype, equal within the mask of a row
    mask: [B, T] bool or numbers; a row without tokens gives 0
    hint: what to change, for the error

    ValueError for a response whose tokens have different numbers.
    """
    inside = mask.bool()
    values = values.detach().double()
    low = values.masked_fill(~inside, float("inf")).amin(1)
    high = values.masked_fill(~inside, float("-inf")).amax(1)
    used = inside.any(1)
    allowed = SPREAD * high.abs().clamp_min(1.0)
    unequal = used & ~(high - low <= allowed)  # NaN is unequal too
    if unequal.any():
        row = int(unequal.nonzero()[0])
        least, most = low[row].item(), high[row].item()
        raise ValueError(
            f"{name} of response {row} lie between {least:.4g} and {most:.4g}, "
            f"and the loss of a response needs one number; {hint}"
        )
    return torch.where(used, high, 0.0)
