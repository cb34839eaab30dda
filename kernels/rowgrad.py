"""Row kernels over a chunk of raw logits: logsumexp, target logit, gradient over the same storage.

Legend: C rows, T vocabulary entries from `start` on (all of them, or a slice), a program per row.

    raw logits   u = W h                                       [C, T] float32, bfloat16 or float16
    logits       z = softcap * tanh(logit_scale * (u + bias) / softcap) / temperature    float32
    gradient     du = coef * (onehot - softmax(z)) * dz/du     over the storage of u

What never exists: z, the softmax, a second [C, T] buffer.

Bytes moved per logit, float32 logits and a 2-byte gradient (peak rates are to be measured):

    row_logps   4 read               one exp
    row_grad    4 read, 2 written    one exp; the logsumexp is known

one_read.py does both in one read of a whole row. A softcap costs a second exp per logit and read:
with x = inner * u, e = exp(2x), r = 2 / (e + 1),

    tanh(x) = 1 - r        1 - tanh(x)^2 = (1 - tanh(x)) (1 + tanh(x)) = r * (r e)

so that the slope keeps its relative precision at both caps, where 1 - tanh^2 would cancel.

A program walks its row in blocks of 2048 logits with 8 warps: 8 logits per thread, two independent
16-byte loads of float32 (one of 2-byte logits), at 40 registers or fewer, so that six to eight
programs share a multiprocessor and keep some 50 KB in flight (4.8 TB/s at 700 ns asks for 25 KB of
each of 132; 2-byte logits keep half of that, and 16 logits per thread spill).

Blocks that lie wholly inside the row carry no mask, so that a vocabulary that is no multiple of 16
still gets 16-byte loads. Rows must start on a 16-byte boundary for that, which is the caller's row
stride (padded to 64 elements).

The logsumexp keeps a running (max, sum) per lane, not per row: no reduction inside the loop, and a
single exp per logit, because only the smaller of exp(z - top) and exp(top - z) is ever needed.

Writing a narrow gradient over wider logits: block b is stored over logits [bB/2, (b+1)B/2), which
the same program read in block b or before. Other programs have other rows; other threads of the
program may still be loading block b, so a barrier stands between the load and the store. Blocks
must ascend.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor

# a * b + c as one instruction, whatever the default of the installed Triton
FUSED = {"enable_fp_fusion": True}
# (BLOCK, num_warps): launches use the first, bench_head.py times all
BLOCKS = ((2048, 8), (1024, 4), (4096, 8), (4096, 16))
LAUNCH = {"BLOCK": BLOCKS[0][0], "num_warps": BLOCKS[0][1], **FUSED}
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def transform(u, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Return (z, dz/du) of z = outer * tanh(inner * u), or of z = inner * u without a softcap."""
    if HAS_SOFTCAP:
        e = tl.exp(2 * inner * u)
        rest = 2 / (e + 1)  # 1 - tanh
        z = outer * (1 - rest)
        # 1 + tanh is rest * e, where 2 - rest would cancel at the negative cap. rest is 0 where e
        # overflows: 0 * 1e38, not 0 * inf.
        slope = inner * outer * rest * (rest * tl.minimum(e, 1e38))
    else:
        z = inner * u
        slope = inner
    return z, slope


@triton.jit
def load_logits(
    u_row,
    bias_ptr,
    cols,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return (z, dz/du) of a block of a row; z is -inf beyond the row's end."""
    mask = cols < width if MASKED else None
    u = tl.load(u_row + cols, mask=mask).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=mask).to(tl.float32)
    z, slope = transform(u, inner, outer, HAS_SOFTCAP)
    if MASKED:
        z = tl.where(mask, z, float("-inf"))
    return z, slope


@triton.jit
def add_to_sum(top, total, z):
    """Add a logit to the running (max, sum of exp(z - max)) of every lane."""
    below_one = tl.exp(-tl.abs(z - top))
    total = tl.where(z > top, total * below_one + 1, total + below_one)
    return tl.maximum(z, top), total


@triton.jit
def row_logsumexp(
    u_row,
    bias_ptr,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the logsumexp of a row of z."""
    cols = tl.arange(0, BLOCK)
    # A finite start: logits of -inf then add exp(-inf) = 0, never inf - inf.
    top = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    whole = width // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        z, _ = load_logits(
            u_row, bias_ptr, first + cols, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, False
        )
        top, total = add_to_sum(top, total, z)
    for first in range(whole, width, BLOCK):
        z, _ = load_logits(
            u_row, bias_ptr, first + cols, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, True
        )
        top, total = add_to_sum(top, total, z)
    peak = tl.max(top, 0)
    return peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))


@triton.jit
def logit_at(
    u_row, bias_ptr, index, inside, inner, outer, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return z at an index of the row, 0 where the index lies outside."""
    u = tl.load(u_row + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + index, mask=inside, other=0.0).to(tl.float32)
    z, _ = transform(u, inner, outer, HAS_SOFTCAP)
    return tl.where(inside, z, 0.0)


@triton.jit
def _store_gradient(du_row, cols, width, z, slope, index, coef, lse, MASKED: tl.constexpr):
    du = (tl.where(cols == index, 1.0, 0.0) - tl.exp(z - lse)) * (slope * coef)
    tl.debug_barrier()  # du may lie over logits of this block that other threads have yet to load
    tl.store(du_row + cols, du.to(du_row.dtype.element_ty), mask=cols < width if MASKED else None)


@triton.jit
def row_gradient(
    u_row,
    du_row,
    bias_ptr,
    index,
    coef,
    lse,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store du of a row, over u or elsewhere.

    index: column of the target, or any number outside [0, width)
    """
    cols = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        at = first + cols
        z, slope = load_logits(
            u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, False
        )
        _store_gradient(du_row, at, width, z, slope, index, coef, lse, False)
    for first in range(whole, width, BLOCK):
        at = first + cols
        z, slope = load_logits(
            u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, True
        )
        _store_gradient(du_row, at, width, z, slope, index, coef, lse, True)


@triton.jit(do_not_specialize=["start"])
def rows_kernel(
    u_ptr,
    du_ptr,
    targets_ptr,
    coef_ptr,
    bias_ptr,
    lse_ptr,
    target_logit_ptr,
    u_stride,
    du_stride,
    start,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LOGPS: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_row = u_ptr + row * u_stride
    index = tl.load(targets_ptr + row) - start
    if LOGPS:
        inside = (index >= 0) & (index < width)
        target_logit = logit_at(u_row, bias_ptr, index, inside, inner, outer, HAS_BIAS, HAS_SOFTCAP)
        lse = row_logsumexp(u_row, bias_ptr, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        tl.store(lse_ptr + row, lse)
        tl.store(target_logit_ptr + row, target_logit)
    else:
        lse = tl.load(lse_ptr + row)
    if GRAD:
        coef = tl.load(coef_ptr + row)
        du_row = du_ptr + row * du_stride
        row_gradient(
            u_row,
            du_row,
            bias_ptr,
            index,
            coef,
            lse,
            width,
            inner,
            outer,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK,
        )


def affine(softcap: float | None, logit_scale: float, temperature: float) -> tuple[float, float]:
    """Return (inner, outer) of `transform`."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature


def _launch(
    u: Tensor,
    targets: Tensor,
    *,
    lse: Tensor,
    target_logit: Tensor | None = None,
    du: Tensor | None = None,
    coef: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    start: int = 0,
) -> None:
    rows, width = u.shape
    assert u.dtype in LOGIT_DTYPES and u.stride(1) == 1 and width > 0, (u.dtype, u.stride(), width)
    assert targets.shape == (rows,) and targets.is_contiguous() and not targets.is_floating_point()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())
    for x in (lse, target_logit, coef):
        assert x is None or (x.shape == (rows,) and x.dtype == torch.float32 and x.is_contiguous())
    if rows == 0:
        return
    inner, outer = affine(softcap, logit_scale, temperature)
    du_stride = 0 if du is None else du.stride(0)
    with torch.cuda.device_of(u):
        rows_kernel[(rows,)](
            u,
            du,
            targets,
            coef,
            bias,
            lse,
            target_logit,
            u.stride(0),
            du_stride,
            start,
            width,
            inner,
            outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            LOGPS=target_logit is not None,
            GRAD=du is not None,
            **LAUNCH,
        )


def overlay(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [C, T] view of `dtype`, no wider than u's, over the start of every row of u."""
    assert dtype.itemsize <= u.element_size(), (dtype, u.dtype)
    return u.view(dtype)[:, : u.shape[1]]


def row_logps(
    u: Tensor, targets: Tensor, **options: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """Return ([C] logsumexp of z, [C] z at the target), float32; u is kept.

    u: [C, T] raw logits, float32, bfloat16 or float16, last stride 1; rows on 16-byte boundaries
        for full speed
    targets: [C] indices into the whole vocabulary; a target outside the tile gives z = 0
    options:
        bias: [T] any float dtype, or None
        softcap: float, or None
        logit_scale: float
        temperature: float
        start: vocabulary index of the first column
    """
    lse = torch.empty(u.shape[0], dtype=torch.float32, device=u.device)
    target_logit = torch.empty_like(lse)
    _launch(u, targets, lse=lse, target_logit=target_logit, **options)
    return lse, target_logit


def row_grad(
    u: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    *,
    out: Tensor,
    **options: Tensor | float | None,
) -> None:
    """Write du = coef * (onehot - softmax(z)) * dz/du, [C, T]; u is lost where du lies over it.

    u: [C, T] raw logits, as in row_logps
    targets: [C] indices into the whole vocabulary; a target outside the tile has no onehot
    coef: [C] float32, gradient of the loss by the row's log-prob; must be 0 for a row without a
        target (-100), to get zeros
    lse: [C] float32, logsumexp over the whole vocabulary
    out: [C, T] for du, last stride 1: overlay(u, dtype), or elsewhere
    options: as in row_logps
    """
    _launch(u, targets, lse=lse, du=out, coef=coef, **options)
