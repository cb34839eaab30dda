"""The last factor of a gradient and its cast, in one trip through memory.

Legend: M rows of K numbers.

    out = factor * grad          product in float32, rounded once to the dtype of out

The factor, a single number or a number per row, stays on the device: no step waits.

What never exists: a float32 copy of the gradient, a factor rounded to the dtype of the gradient.
Bytes moved per number: 6 for a float32 gradient of bfloat16 weights.

A program scales a block of a row. A contiguous gradient with a single factor is one long row: only
the last block is not whole. Whole blocks carry no mask and get 16-byte loads whatever K is. `out`
may be `grad`: every thread stores the numbers of its own loads.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import FUSED

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTOR_DTYPES = (torch.float32, torch.float64)
# 8 numbers a thread: 16-byte loads and stores of 2-byte numbers, two of float32
LAUNCH = {"BLOCK": 2048, "num_warps": 8, **FUSED}


@triton.jit
def _scale_block(grad_row, out_row, cols, width, factor, MASKED: tl.constexpr):
    mask = cols < width if MASKED else None
    grad = tl.load(grad_row + cols, mask=mask).to(tl.float32)
    tl.store(out_row + cols, (factor * grad).to(out_row.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    grad_ptr,
    out_ptr,
    factor_ptr,
    grad_stride,
    out_stride,
    factor_stride,
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
    grad_row = grad_ptr + row * grad_stride
    out_row = out_ptr + row * out_stride
    cols = first + tl.arange(0, BLOCK)
    if first + BLOCK <= width:
        _scale_block(grad_row, out_row, cols, width, factor, False)
    else:
        _scale_block(grad_row, out_row, cols, width, factor, True)


def scale(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write out = factor * grad, and return out.

    grad: [M, K] or [K] float32, bfloat16 or float16; numbers of a row lie together
    factor: [] or [M, 1], float32 or float64, on the device of grad; read as float32
    out: shape of grad, float32, bfloat16 or float16; grad itself, or no overlap with grad
    """
    assert grad.dtype in GRAD_DTYPES, grad.dtype
    assert out.dtype in GRAD_DTYPES, out.dtype
    assert factor.dtype in FACTOR_DTYPES, factor.dtype
    assert grad.shape == out.shape, (grad.shape, out.shape)
    if grad.numel() == 0:
        return out
    per_row = factor.dim() > 0
    assert not per_row or factor.shape == (len(grad), 1), (factor.shape, grad.shape)
    source, target = grad, out
    # one long row
    if not per_row and grad.is_contiguous() and out.is_contiguous():
        source = grad.view(1, -1)
        target = out.view(1, -1)
    rows, width = source.shape
    assert width == 1 or source.stride(1) == target.stride(1) == 1
    blocks = triton.cdiv(width, LAUNCH["BLOCK"])
    with torch.cuda.device_of(grad):
        scale_kernel[(rows * blocks,)](
            source,
            target,
            factor,
            source.stride(0),
            target.stride(0),
            factor.stride(0) if per_row else 0,
            width,
            blocks,
            **LAUNCH,
        )
    return out
