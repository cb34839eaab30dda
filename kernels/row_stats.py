"""Row kernels over float32 logits: sums for statistics, and the gradient with an entropy.

Legend: C rows, T vocabulary entries from `start` on (all of them, or a slice), a program per row;
u, z, transform and du as in rowgrad.py. Of a row with largest entry m = top, and d = z - m:

    total = sum exp(d)     moment = sum exp(d) d     squares = sum exp(2 d)     plain = sum z
    place = column of the first m

logsumexp, entropy and the rest follow from a few numbers per row; una_fast/head/row_stats.py says
how, and how the sums of slices add up. With c and e the gradients of the loss by the row's log-prob
and by the entropy H:

    du = [c (onehot - p) - e p (log p + H)] dz/du          log p = (z - lse) - tail

What never exists: z, the softmax, its logarithm, a second [C, T] buffer.

Bytes moved per logit, float32 logits and a 2-byte gradient:

    row_sums        4 read               one exp, whatever is wanted
    entropy_grad    4 read, 2 written    one exp

Sums run per lane, as in rowgrad.py: a larger logit moves the top of its lane, and with
b = exp(-|z - top|) <= 1 either what is summed or what is added shrinks by b. moment follows a move
of the top by d: b (moment - d total).

A lane keeps up to six numbers instead of two: some 80 registers a thread with everything wanted, 50
with one sum, so two to five programs on a multiprocessor. Half the logits per thread would leave
room for more programs, but spill on sm_100. Logits are float32, as the engine makes them. The
gradient lies over the logits under the rules of rowgrad.py.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels import rowgrad
from una_fast.kernels.rowgrad import affine, load_logits, logit_at

LAUNCH = rowgrad.LAUNCH

SUMS = ("moment", "squares", "plain", "place")  # that are optional

# Of a log-prob, where 0 * -inf would be NaN: its exponential is 0
DEEPEST = tl.constexpr(-1.0e4)
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _add(
    top,
    total,
    moment,
    squares,
    plain,
    place,
    z,
    at,
    width,
    MOMENT: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
    PLACE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add a block of logits, -inf beyond the row's end, to the sums of every lane."""
    d = z - top
    moves = d > 0
    b = tl.exp(-tl.abs(d))
    if MOMENT:
        moved = b * (moment - d * total)
        moment = tl.where(moves, moved, moment + b * tl.maximum(d, DEEPEST))
    if SQUARES:
        squares = tl.where(moves, squares * b * b + 1, squares + b * b)
    if PLAIN:
        plain += tl.where(at < width, z, 0.0) if MASKED else z
    if PLACE:
        place = tl.where(moves, at, place)
    total = tl.where(moves, total * b + 1, total + b)
    return tl.maximum(z, top), total, moment, squares, plain, place


@triton.jit(do_not_specialize=["start"])
def row_sums_kernel(
    u_ptr,
    targets_ptr,
    bias_ptr,
    top_ptr,
    total_ptr,
    target_logit_ptr,
    moment_ptr,
    squares_ptr,
    plain_ptr,
    place_ptr,
    u_stride,
    start,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MOMENT: tl.constexpr,
    SQUARES: tl.constexpr,
    PLAIN: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_row = u_ptr + row * u_stride
    index = tl.load(targets_ptr + row) - start
    inside = (index >= 0) & (index < width)
    target_logit = logit_at(u_row, bias_ptr, index, inside, inner, outer, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, target_logit)

    cols = tl.arange(0, BLOCK)
    # A finite start: logits of -inf then add exp(-inf) = 0, never inf - inf.
    top = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    whole = width // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        at = first + cols
        z, _ = load_logits(u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, False)
        top, total, moment, squares, plain, place = _add(
            top,
            total,
            moment,
            squares,
            plain,
            place,
            z,
            at,
            width,
            MOMENT,
            SQUARES,
            PLAIN,
            PLACE,
            False,
        )
    for first in range(whole, width, BLOCK):
        at = first + cols
        z, _ = load_logits(u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, True)
        top, total, moment, squares, plain, place = _add(
            top,
            total,
            moment,
            squares,
            plain,
            place,
            z,
            at,
            width,
            MOMENT,
            SQUARES,
            PLAIN,
            PLACE,
            True,
        )

    peak = tl.max(top, 0)
    shift = top - peak
    factor = tl.exp(shift)
    tl.store(top_ptr + row, peak)
    tl.store(total_ptr + row, tl.sum(factor * total, 0))
    if MOMENT:
        tl.store(moment_ptr + row, tl.sum(factor * (moment + shift * total), 0))
    if SQUARES:
        tl.store(squares_ptr + row, tl.sum(factor * factor * squares, 0))
    if PLAIN:
        tl.store(plain_ptr + row, tl.sum(plain, 0))
    if PLACE:
        column = tl.min(tl.where(top == peak, place, NOWHERE), 0)
        tl.store(place_ptr + row, column.to(tl.int64) + start)


@triton.jit
def _store_gradient(
    du_row, cols, width, z, slope, index, coef, upstream, entropy, lse, tail, MASKED: tl.constexpr
):
    log_p = tl.maximum((z - lse) - tail, DEEPEST)
    of_p = tl.exp(log_p) * (coef + upstream * (log_p + entropy))
    du = (tl.where(cols == index, coef, 0.0) - of_p) * slope
    tl.debug_barrier()  # du may lie over logits of this block that other threads have yet to load
    tl.store(du_row + cols, du.to(du_row.dtype.element_ty), mask=cols < width if MASKED else None)


@triton.jit(do_not_specialize=["start"])
def entropy_grad_kernel(
    u_ptr,
    du_ptr,
    targets_ptr,
    coef_ptr,
    upstream_ptr,
    entropy_ptr,
    lse_ptr,
    tail_ptr,
    bias_ptr,
    u_stride,
    du_stride,
    start,
    width,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    u_row = u_ptr + row * u_stride
    du_row = du_ptr + row * du_stride
    index = tl.load(targets_ptr + row) - start
    coef = tl.load(coef_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    lse = tl.load(lse_ptr + row)
    tail = tl.load(tail_ptr + row)
    cols = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        at = first + cols
        z, slope = load_logits(
            u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, False
        )
        _store_gradient(
            du_row, at, width, z, slope, index, coef, upstream, entropy, lse, tail, False
        )
    for first in range(whole, width, BLOCK):
        at = first + cols
        z, slope = load_logits(
            u_row, bias_ptr, at, width, inner, outer, HAS_BIAS, HAS_SOFTCAP, True
        )
        _store_gradient(
            du_row, at, width, z, slope, index, coef, upstream, entropy, lse, tail, True
        )


def row_sums(
    u: Tensor,
    targets: Tensor,
    wanted: Collection[str],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    start: int = 0,
) -> dict[str, Tensor]:
    """Return top, total, target_logit and the wanted sums by name: [C] float32, place int64.

    u: [C, T] raw logits, float32, last stride 1; kept. Rows on 16-byte boundaries for full speed
    targets: [C] indices into the whole vocabulary; a target outside the tile gives z = 0
    wanted: names of SUMS
    bias: [T] float32, or None: a narrower one takes registers for its cast, and spills
    softcap: cap of the logits; None: no cap
    logit_scale: factor of the raw logits
    temperature: divisor of the logits
    start: vocabulary index of the first column
    """
    _check(u, targets, bias)
    assert bias is None or bias.dtype == torch.float32, bias.dtype
    rows, width = u.shape
    found = {}
    for name in ("top", "total", "target_logit", *SUMS):
        dtype = torch.int64 if name == "place" else torch.float32
        if name not in SUMS or name in wanted:
            found[name] = torch.empty(rows, dtype=dtype, device=u.device)
    if rows == 0:
        return found
    inner, outer = affine(softcap, logit_scale, temperature)
    with torch.cuda.device_of(u):
        row_sums_kernel[(rows,)](
            u,
            targets,
            bias,
            found["top"],
            found["total"],
            found["target_logit"],
            *(found.get(name) for name in SUMS),
            u.stride(0),
            start,
            width,
            inner,
            outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            MOMENT="moment" in wanted,
            SQUARES="squares" in wanted,
            PLAIN="plain" in wanted,
            PLACE="place" in wanted,
            **LAUNCH,
        )
    return found


def entropy_grad(
    u: Tensor,
    targets: Tensor,
    coef: Tensor,
    lse: Tensor,
    *,
    upstream: Tensor,
    entropy: Tensor,
    tail: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    start: int = 0,
) -> None:
    """Write du of log-prob and entropy, [C, T]; u is lost where du lies over it.

    u: [C, T] raw logits, as in row_sums
    targets: [C] indices into the whole vocabulary; a target outside the tile has no onehot
    coef: [C] float32, gradient of the loss by the row's log-prob; 0 for a row without a target
    lse: [C] float32, logsumexp over the whole vocabulary
    upstream: [C] float32, gradient of the loss by the entropy; 0 for a row without a target
    entropy: [C] float32, of the whole rows
    tail: [C] float32, what rounding took from lse
    out: [C, T] for du, last stride 1: rowgrad.overlay(u, dtype), or elsewhere
    bias: [T] any float dtype, or None
    softcap, logit_scale, temperature, start: as in row_sums
    """
    _check(u, targets, bias)
    rows, width = u.shape
    for x in (coef, lse, upstream, entropy, tail):
        assert x.shape == (rows,) and x.dtype == torch.float32 and x.is_contiguous()
    if rows == 0:
        return
    inner, outer = affine(softcap, logit_scale, temperature)
    with torch.cuda.device_of(u):
        entropy_grad_kernel[(rows,)](
            u,
            out,
            targets,
            coef,
            upstream,
            entropy,
            lse,
            tail,
            bias,
            u.stride(0),
            out.stride(0),
            start,
            width,
            inner,
            outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            **LAUNCH,
        )


def _check(u: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    rows, width = u.shape
    assert u.dtype == torch.float32 and u.stride(1) == 1 and width > 0, (u.dtype, u.stride(), width)
    assert targets.shape == (rows,) and targets.is_contiguous() and not targets.is_floating_point()
    assert bias is None or (bias.shape == (width,) and bias.is_contiguous())
