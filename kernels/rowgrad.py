"""Row kernels over a chunk of raw logits: logsumexp, target logit, and the gradient over the same storage.

Legend: C rows, T vocabulary entries from `start` on (all of them, or a slice), one program per row.

    raw logits   u = W h                                               [C, T] float32, bfloat16 or float16
    logits       z = softcap * tanh(logit_scale * (u + bias) / softcap) / temperature      (always in float32)
    gradient     du = coef * (onehot - softmax(z)) * dz/du             over the storage of u, or elsewhere

What never exists: z, the softmax, a second [C, T] buffer.

Bytes moved per logit, float32 logits and a 2-byte gradient (peak rates are to be measured on a GPU):

    row_logps        4 read                             one exp
    row_grad         4 read, 2 written                  one exp
    row_logps_grad   4 read, 4 read again, 2 written    two exps; saves a launch, and the second read where it hits L2

A program walks its row in blocks of 2048 logits with 8 warps: 8 logits per thread, two independent 16-byte loads of
float32 (one of 2-byte logits), at 40 registers or fewer, so that six to eight programs share a multiprocessor and keep
some 50 KB in flight (4.8 TB/s at 700 ns asks for 25 KB of each of 132; 2-byte logits keep half of it, and 16 of them
per thread spill). With that many rows in flight the second read of row_logps_grad hits L2 for small vocabularies only.

Blocks that lie wholly inside the row carry no mask, so that a vocabulary that is no multiple of 16 still gets 16-byte
loads. Rows must start on a 16-byte boundary for that, which is the caller's row stride (padded to 64 elements).

The logsumexp keeps a running (max, sum) per lane, not per row: no reduction inside the loop, and one exp per logit,
because of exp(z - top) and exp(top - z) only the one below 1 is ever needed.

Writing a narrow gradient over wider logits: block b is stored over logits [bB/2, (b+1)B/2), which this program read in
block b or before. Other programs have other rows; other threads of this program may still be loading block b, so a
barrier stands between the load and the store. Blocks must ascend.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor

FUSED = {
    "enable_fp_fusion": True
}  # a * b + c as one instruction, whatever the installed Triton's default
BLOCKS = (
    (2048, 8),
    (4096, 8),
    (4096, 16),
)  # (BLOCK, num_warps): launches use the first, bench_head.py times them all
LAUNCH = {"BLOCK": BLOCKS[0][0], "num_warps": BLOCKS[0][1], **FUSED}
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def transform(u, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """(z, dz/du): z = outer * tanh(inner * u), or inner * u. rest = 1 - tanh keeps the slope exact near the cap."""
    if HAS_SOFTCAP:
        rest = 2 / (tl.exp(2 * inner * u) + 1)
        z = outer * (1 - rest)
        slope = inner * outer * rest * (2 - rest)
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
    """(z, dz/du) of one block of a row; z is -inf beyond the row's end."""
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
    """The running (max, sum of exp(z - max)) of every lane with one more logit each."""
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
    """logsumexp of one row of z."""
    cols = tl.arange(0, BLOCK)
    top = tl.full(
        [BLOCK], -3.0e38, tl.float32
    )  # finite: logits of -inf then add exp(-inf) = 0, never inf - inf
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
    """z of one entry of the row, 0 where it lies outside."""
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
    """du of one row, over u or elsewhere. index: the target's column, or any number outside [0, width)."""
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
    """(inner, outer) of `transform`."""
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
            0 if du is None else du.stride(0),
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
    """A [C, T] view of `dtype`, no wider than that of u, over the start of every row of u."""
    assert dtype.itemsize <= u.element_size(), (dtype, u.dtype)
    return u.view(dtype)[:, : u.shape[1]]


def row_logps(
    u: Tensor, targets: Tensor, **options: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """(logsumexp of z, z at the target or 0 where the target lies outside the tile), both [C] float32; u is kept.

    u: [C, T] raw logits, float32, bfloat16 or float16, last stride 1, rows on 16-byte boundaries for full speed.
    targets: [C] indices into the whole vocabulary. options: bias [T], softcap, logit_scale, temperature, and start,
    the vocabulary index of the first column."""
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
    dtype: torch.dtype,
    out: Tensor | None = None,
    **options: Tensor | float | None,
) -> Tensor:
    """du = coef * (onehot - softmax(z)) * dz/du, [C, T] in `dtype`, over the storage of u (which is lost) or in `out`.

    coef, lse: [C] float32, lse of the whole row. A target outside the tile has no onehot; a row without a target
    (-100) gets zeros only from coef = 0. The rest as in row_logps. Over u, the row stride of the result counted in
    its own elements is that of u times the ratio of the element sizes."""
    du = overlay(u, dtype) if out is None else out
    assert du.shape == u.shape and du.dtype == dtype and du.stride(1) == 1
    _launch(u, targets, lse=lse, du=du, coef=coef, **options)
    return du


def row_logps_grad(
    u: Tensor,
    targets: Tensor,
    coef: Tensor,
    *,
    dtype: torch.dtype,
    **options: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, target logit, du) in one launch, for a tile of the whole vocabulary whose coef is known beforehand.

    The same bits as row_logps followed by row_grad over the storage of u."""
    lse = torch.empty(u.shape[0], dtype=torch.float32, device=u.device)
    target_logit, du = torch.empty_like(lse), overlay(u, dtype)
    _launch(u, targets, lse=lse, target_logit=target_logit, du=du, coef=coef, **options)
    return lse, target_logit, du
