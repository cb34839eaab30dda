"""Log-probs and gradient of a chunk of raw logits in a single read of every row.

Legend: C rows, V vocabulary entries, a program per row; y target, s gradient of the loss by the
row's log-prob.

    raw logits   u = W h                                       [C, V] float32, bfloat16 or float16
    logits       z = softcap * tanh(logit_scale * (u + bias) / softcap) / temperature    float32
    gradient     du = s * (onehot - softmax(z)) * dz/du

The softmax needs a sum over the row before its first number is known, and s may be known later
still. Both are one number per row, so they are left out of what is written. With any shift m,

    E_j = exp(z_j - m) for j != y         R = sum of E_j          T = exp(z_y - m)
    E_y = -R                              logp = -log(1 + R / T)
    du_j = s * factor * E_j * dz/du_j     factor = -1 / (T + R)

because onehot - softmax is R / (T + R) at the target. E is written over the logits while they are
read; the products that need du multiply their rows by s * factor:

    dH = (s * factor) * (E W)             dW = E^T ((s * factor) * H)

Without a softcap dz/du is one number, and part of the factor; with a softcap E_j carries its slope.

Bytes moved per logit, float32 logits and a 2-byte E: 4 read, 2 written; one exp, two with a
softcap. Two reads (rowgrad.py) move 4 + 4 + 2 and need two exps.

The shift is the target's logit plus SHIFT: E keeps its precision from e^-47 times the target's
probability up to e^100 times (bfloat16 and float32 share their exponents). A block of a row with a
logit beyond that moves the shift to its largest logit, and what was written of the row is scaled
down. So every row is exact; rows with a log-prob below -100 cost one more trip.

Differences z_j - z_y are taken before anything is multiplied, in units of log2 e, so that the
rounding error is in proportion to the difference, not to the logits.

E may lie over the logits. Block b of a 2-byte E then lies over logits [bB/2, (b+1)B/2), which the
program read in block b or before; other threads of the program may still be loading block b, so a
barrier stands between load and store, and blocks ascend. The target's logit is read first, and E_y
is written last.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import FUSED, LOGIT_DTYPES, affine, transform

# Half the programs of rowgrad.py, with as many logits per thread: barriers between fewer threads,
# and ten programs on a multiprocessor.
LAUNCH = {"BLOCK": 1024, "num_warps": 4, **FUSED}

LN_2 = tl.constexpr(math.log(2))
LOG2_E = math.log2(math.e)
SHIFT = tl.constexpr(40 * LOG2_E)  # of the target's E below 1, as a power of 2
LARGEST = tl.constexpr(60 * LOG2_E)  # power of 2; 2^18 such numbers times a weight fit bfloat16


@triton.jit
def _load(
    u_row,
    bias_ptr,
    cols,
    mask,
    inner,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return (t, slope) at columns of a row: the logit less its last factor, and its slope."""
    u = tl.load(u_row + cols, mask=mask).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=mask).to(tl.float32)
    if HAS_SOFTCAP:
        t, slope = transform(u, inner, 1.0, HAS_SOFTCAP)
    else:
        t, slope = u, 1.0
    return t, slope


@triton.jit
def _log_of_one_plus(x):
    """Return log(1 + x), x >= 0, where 1 + x rounds small numbers away."""
    one_more = 1 + x
    # (1 + x) - 1 is the x that the logarithm has seen.
    corrected = tl.log(one_more) * (x / (one_more - 1))
    return tl.where(one_more == 1, x, tl.where(one_more > 2, tl.log(one_more), corrected))


@triton.jit
def _scale_down(e_row, stop, factor, BLOCK: tl.constexpr):
    """Multiply what is written of a row by a factor."""
    cols = tl.arange(0, BLOCK)
    for first in range(0, stop, BLOCK):
        tl.debug_barrier()  # the stores of all threads
        e = tl.load(e_row + first + cols).to(tl.float32) * factor
        tl.debug_barrier()
        tl.store(e_row + first + cols, e.to(e_row.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def _step(
    u_row,
    e_row,
    bias_ptr,
    first,
    width,
    index,
    origin,
    shift,
    total,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write E of a block; return the shift and the sums of E per lane, with the block added."""
    at = first + tl.arange(0, BLOCK)
    mask = at < width if MASKED else None
    t, slope = _load(u_row, bias_ptr, at, mask, inner, HAS_BIAS, HAS_SOFTCAP)
    x = outer * (t - origin) - shift
    if MASKED:
        x = tl.where(mask, x, float("-inf"))
    top = tl.max(x, 0)
    if top > LARGEST:
        _scale_down(e_row, first, tl.exp2(-top), BLOCK)
        total *= tl.exp2(-top)
        shift += top
        x -= top
    e = tl.where(at == index, 0.0, tl.exp2(x))
    total += e
    if HAS_SOFTCAP:
        e *= slope
    tl.debug_barrier()  # E may lie over logits of this block that other threads have yet to load
    tl.store(e_row + at, e.to(e_row.dtype.element_ty), mask=mask)
    return shift, total


@triton.jit(do_not_specialize=["width"])
def one_read_kernel(
    u_ptr,
    e_ptr,
    targets_ptr,
    bias_ptr,
    logp_ptr,
    factor_ptr,
    u_stride,
    e_stride,
    width,
    inner,
    outer,
    slope_of_all,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_row = u_ptr + row * u_stride
    e_row = e_ptr + row * e_stride
    target_index = tl.load(targets_ptr + row)
    inside = (target_index >= 0) & (target_index < width)
    index = tl.where(inside, target_index, -1).to(tl.int32)  # half the registers of 64 bits
    target, target_slope = _load(u_row, bias_ptr, index, inside, inner, HAS_BIAS, HAS_SOFTCAP)
    # A masked target, or none, is no place to measure differences from.
    origin = tl.where(inside & (target > -1.0e30), target, 0.0)
    tl.debug_barrier()  # before any thread writes over the target's logit
    shift = tl.full([], SHIFT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    whole = width // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        shift, total = _step(
            u_row,
            e_row,
            bias_ptr,
            first,
            width,
            index,
            origin,
            shift,
            total,
            inner,
            outer,
            HAS_BIAS,
            HAS_SOFTCAP,
            False,
            BLOCK,
        )
    for first in range(whole, width, BLOCK):
        shift, total = _step(
            u_row,
            e_row,
            bias_ptr,
            first,
            width,
            index,
            origin,
            shift,
            total,
            inner,
            outer,
            HAS_BIAS,
            HAS_SOFTCAP,
            True,
            BLOCK,
        )
    rest = tl.sum(total, 0)
    x = outer * (target - origin) - shift  # of the target
    own = tl.where(inside, tl.exp2(x), 0.0)
    ratio = rest / own
    logp = tl.where(ratio < 1e30, -_log_of_one_plus(ratio), x * LN_2 - tl.log(rest))
    tl.store(logp_ptr + row, logp)
    tl.store(factor_ptr + row, -slope_of_all / (own + rest))
    tl.debug_barrier()  # after the E = 0 that stands at the target
    tl.store(e_row + index, (-rest * target_slope).to(e_row.dtype.element_ty), mask=inside)


def one_read(
    u: Tensor,
    targets: Tensor,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Write E [C, V]; return ([C] log-probs, [C] factors), with du = coef * factor * E row by row.

    u: [C, V] raw logits, float32, bfloat16 or float16, last stride 1; lost where E lies over them.
        Rows on 16-byte boundaries for full speed
    targets: [C] integers; a target outside the vocabulary gives a log-prob of no meaning, and a
        gradient without onehot
    out: [C, V] for E, float32 or bfloat16, last stride 1: rowgrad.overlay(u, dtype), or elsewhere
    bias: [V] any float dtype, or None
    softcap: cap of the logits; None: no cap
    logit_scale: factor of the raw logits
    temperature: divisor of the logits

    Log-probs and factors are float32.
    """
    rows, width = u.shape
    assert u.dtype in LOGIT_DTYPES and u.stride(1) == 1 and width > 0, (u.dtype, u.stride(), width)
    assert out.shape == u.shape and out.stride(1) == 1, (out.shape, out.stride())
    assert out.dtype != torch.float16, "E needs the exponents of float32"
    assert targets.shape == (rows,) and targets.is_contiguous() and not targets.is_floating_point()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())
    logps = torch.empty(rows, dtype=torch.float32, device=u.device)
    factors = torch.empty_like(logps)
    if rows == 0:
        return logps, factors
    inner, outer = affine(softcap, logit_scale, temperature)
    if softcap is None:
        inner, outer, slope_of_all = 1.0, inner, inner
    else:
        slope_of_all = outer  # `transform` gives the slope of tanh alone
    with torch.cuda.device_of(u):
        one_read_kernel[(rows,)](
            u,
            out,
            targets,
            bias,
            logps,
            factors,
            u.stride(0),
            out.stride(0),
            width,
            inner,
            outer * LOG2_E,
            slope_of_all,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            **LAUNCH,
        )
    return logps, factors
