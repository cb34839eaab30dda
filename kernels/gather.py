"""Per-token log-softmax gather for callers who already hold logits, and the backward pass.

Legend: M tokens, V vocabulary. z = logits / temperature, in float32.

    forward    logp = z[target] - logsumexp(z)                    M V reads, 2 M writes
    backward   dlogits = upstream * (onehot - softmax(z)) / temperature
               M V reads and M V writes, over the logits themselves or into a new tensor

What never exists: the softmax, or any copy of the logits. bfloat16 logits move 2 bytes per logit
forward and 4 backward; the rate is to be measured on a GPU. One program per token, which walks its
row as in rowgrad.py.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import LAUNCH, LOGIT_DTYPES, logit_at, row_gradient, row_logsumexp

IGNORE = tl.constexpr(-100)


@triton.jit
def gather_kernel(
    logits_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    logits_stride,
    width,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < width)
    target_logit = logit_at(
        logits_row, None, target, inside, inverse_temperature, 1.0, False, False
    )
    lse = row_logsumexp(logits_row, None, width, inverse_temperature, 1.0, False, False, BLOCK)
    tl.store(lse_ptr + row, lse)
    logp = tl.where(inside, target_logit - lse, float("nan"))
    tl.store(logps_ptr + row, tl.where(target == IGNORE, 0.0, logp))


@triton.jit
def gather_backward_kernel(
    logits_ptr,
    grad_ptr,
    targets_ptr,
    upstream_ptr,
    lse_ptr,
    logits_stride,
    grad_stride,
    width,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    grad_row = grad_ptr + row * grad_stride
    target = tl.load(targets_ptr + row)
    coef = tl.where(target != IGNORE, tl.load(upstream_ptr + row), 0.0)
    lse = tl.load(lse_ptr + row)
    row_gradient(
        logits_row,
        grad_row,
        None,
        target,
        coef,
        lse,
        width,
        inverse_temperature,
        1.0,
        False,
        False,
        BLOCK,
    )


def _check(logits: Tensor, targets: Tensor) -> None:
    assert logits.dim() == 2 and logits.dtype in LOGIT_DTYPES
    assert logits.stride(1) == 1 and logits.shape[1] > 0
    assert targets.shape == logits.shape[:1] and targets.is_contiguous()
    assert not targets.is_floating_point()


def gather_logps(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (log softmax(logits / temperature) at the targets, logsumexp), both [M] float32.

    logits: [M, V] float32, bfloat16 or float16, any row stride
    targets: [M] integers in [0, V), or -100 for a log-prob of 0; any other integer gives NaN
    """
    _check(logits, targets)
    rows, width = logits.shape
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logps)
    if rows == 0:
        return logps, lse
    with torch.cuda.device_of(logits):
        gather_kernel[(rows,)](
            logits, targets, logps, lse, logits.stride(0), width, 1 / temperature, **LAUNCH
        )
    return logps, lse


def gather_logps_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    temperature: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return dlogits, [M, V] in the dtype of the logits; 0 in rows with target -100.

    logits: [M, V], as in gather_logps
    targets: [M] integers, as in gather_logps
    lse: [M] float32, second result of gather_logps
    upstream: [M] any float dtype, gradient of the loss by the log-probs
    out: tensor that receives dlogits, or None for a new tensor; may be the logits themselves,
        which are then lost
    """
    _check(logits, targets)
    rows, width = logits.shape
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    assert out.shape == logits.shape and out.dtype == logits.dtype
    assert out.stride(1) == 1 or width == 1
    assert upstream.shape == lse.shape == (rows,) and lse.dtype == torch.float32
    if rows == 0:
        return out
    with torch.cuda.device_of(logits):
        gather_backward_kernel[(rows,)](
            logits,
            out,
            targets,
            upstream.float().contiguous(),
            lse,
            logits.stride(0),
            out.stride(0),
            width,
            1 / temperature,
            **LAUNCH,
        )
    return out
