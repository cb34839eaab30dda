"""From per-token log-probs to the UNA loss and its derivative per response: float64, deterministic, no atomics.

Legend: N tokens in S responses, U feedback units (a pair, or one labelled or scored response), E (response, unit)
incidences: a pair stands in two.

    segment_kernel   one program per response    logps[s], ref_logps[s] = sums over its tokens
    unit_kernel      one program                 rewards[s] = scale[s] * (logps[s] - ref_logps[s])
                                                 losses[u], loss = sum of weight[u] * losses[u] / denominator
                                                 coef[s] = dloss / dlogps[s], over the units of s in their order

A unit needs the sums of other responses. One launch could only wait for them by spinning, or sum again in every
program what another one sums; so it is two launches, ordered by the stream. Every number is written by one program in
one order: the same bits on every run. Bytes: 4 to 8 per token, read once; the time is launch latency and one walk over
the longest response (to be measured).

Every form is written as value and derivative in x, the one number a unit depends on:

    pair           x = r_w - r_l      t * phi(x) + (1 - t) * phi(-x)
    label, score   x = r + offset     phi(x)
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import FUSED

FORMS = {  # what `_phi` knows, by kind of feedback
    "pair": ("logistic", "linear", "squared"),
    "binary": ("bce", "mse"),
    "score": ("mse", "bce", "reward_mse"),
}
PAIR, BINARY = tl.constexpr(0), tl.constexpr(1)  # kinds of a unit; a score is 2
BLOCK = 128
TOKENS, TOKEN_WARPS = 8192, 16


@triton.jit
def _softplus_sigmoid(x):
    """(log(1 + exp(x)), sigmoid(x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.log(1 + e), tl.where(x >= 0, 1 / (1 + e), e / (1 + e))


@triton.jit
def _phi(x, value, FORM: tl.constexpr):
    """(phi, dphi/dx). value: the margin of a pair, a label, a score or a reward."""
    if FORM == "logistic":
        loss, chance = _softplus_sigmoid(value - x)
        slope = -chance
    elif FORM == "linear":
        loss, slope = value - x, tl.full(x.shape, -1, tl.float64)
    elif FORM == "bce":
        loss, chance = _softplus_sigmoid(x)
        loss, slope = loss - value * x, chance - value
    elif FORM == "mse":
        _, chance = _softplus_sigmoid(x)
        miss = chance - value
        loss, slope = miss * miss, 2 * miss * chance * (1 - chance)
    else:
        tl.static_assert(FORM == "squared" or FORM == "reward_mse", "a form that this kernel lacks")
        loss, slope = (x - value) * (x - value), 2 * (x - value)
    return loss, slope


@triton.jit
def _reward(s, mask, logps_ptr, ref_ptr, scale_ptr):
    logps = tl.load(logps_ptr + s, mask=mask, other=0.0)
    ref = tl.load(ref_ptr + s, mask=mask, other=0.0)
    return tl.load(scale_ptr + s, mask=mask, other=0.0) * (logps - ref)


@triton.jit
def _unit(
    u,
    mask,
    logps_ptr,
    ref_ptr,
    scale_ptr,
    ints_ptr,
    floats_ptr,
    U,
    PAIR_FORM: tl.constexpr,
    BINARY_FORM: tl.constexpr,
    SCORE_FORM: tl.constexpr,
):
    """(loss, dloss/dx, weight, first response) of the units u, each computed in the form of its kind."""
    kind = tl.load(ints_ptr + u, mask=mask, other=0)
    first = tl.load(ints_ptr + U + u, mask=mask, other=0)
    second = tl.load(ints_ptr + 2 * U + u, mask=mask, other=0)
    value = tl.load(floats_ptr + u, mask=mask, other=0.0)
    shift = tl.load(floats_ptr + U + u, mask=mask, other=0.0)
    weight = tl.load(floats_ptr + 2 * U + u, mask=mask, other=0.0)
    reward = _reward(first, mask, logps_ptr, ref_ptr, scale_ptr)
    lead = reward - _reward(second, mask & (kind == PAIR), logps_ptr, ref_ptr, scale_ptr)

    right, right_slope = _phi(lead, shift, PAIR_FORM)
    wrong, wrong_slope = _phi(-lead, shift, PAIR_FORM)
    pair, pair_slope = (
        value * right + (1 - value) * wrong,
        value * right_slope - (1 - value) * wrong_slope,
    )
    binary, binary_slope = _phi(reward + shift, value, BINARY_FORM)
    score, score_slope = _phi(reward + shift, value, SCORE_FORM)
    loss = tl.where(kind == PAIR, pair, tl.where(kind == BINARY, binary, score))
    slope = tl.where(kind == PAIR, pair_slope, tl.where(kind == BINARY, binary_slope, score_slope))
    return loss, slope, weight, first


@triton.jit
def _segment_sum(x_ptr, low, high, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(low, high, BLOCK):
        total += tl.load(x_ptr + first + lanes, mask=first + lanes < high, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def segment_kernel(
    tokens_ptr,
    ref_tokens_ptr,
    cu_ptr,
    logps_ptr,
    ref_ptr,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    low, high = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    tl.store(logps_ptr + s, _segment_sum(tokens_ptr, low, high, BLOCK))
    if HAS_REF:
        tl.store(ref_ptr + s, _segment_sum(ref_tokens_ptr, low, high, BLOCK))


@triton.jit(do_not_specialize=["S", "U", "most_units"])
def unit_kernel(
    logps_ptr,
    ref_ptr,
    scale_ptr,
    ints_ptr,
    floats_ptr,
    start_ptr,
    entry_ptr,
    denominator_ptr,
    rewards_ptr,
    losses_ptr,
    loss_ptr,
    coef_ptr,
    S,
    U,
    most_units,
    PAIR_FORM: tl.constexpr,
    BINARY_FORM: tl.constexpr,
    SCORE_FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    denominator = tl.load(denominator_ptr).to(tl.float64)

    total = tl.zeros([BLOCK], tl.float64)
    for low in range(0, U, BLOCK):
        u = low + lanes
        loss, _, weight, _ = _unit(
            u,
            u < U,
            logps_ptr,
            ref_ptr,
            scale_ptr,
            ints_ptr,
            floats_ptr,
            U,
            PAIR_FORM,
            BINARY_FORM,
            SCORE_FORM,
        )
        tl.store(losses_ptr + u, loss, mask=u < U)
        total += weight * loss
    tl.store(loss_ptr, tl.sum(total, 0) / denominator)

    for low in range(0, S, BLOCK):
        s = low + lanes
        tl.store(rewards_ptr + s, _reward(s, s < S, logps_ptr, ref_ptr, scale_ptr), mask=s < S)
        begin = tl.load(start_ptr + s, mask=s < S, other=0)
        count = tl.load(start_ptr + s + 1, mask=s < S, other=0) - begin
        coef = tl.zeros([BLOCK], tl.float64)
        for k in range(0, most_units):
            mask = k < count
            u = tl.load(entry_ptr + begin + k, mask=mask, other=0)
            _, slope, weight, first = _unit(
                u,
                mask,
                logps_ptr,
                ref_ptr,
                scale_ptr,
                ints_ptr,
                floats_ptr,
                U,
                PAIR_FORM,
                BINARY_FORM,
                SCORE_FORM,
            )
            coef += weight * tl.where(first == s, slope, -slope)
        scale = tl.load(scale_ptr + s, mask=s < S, other=0.0)
        tl.store(coef_ptr + s, coef * scale / denominator, mask=s < S)


class UnitTable(NamedTuple):
    """The units of a call on the device, views of one buffer.

    ints: [3, U] int64 kind, first, second. floats: [3, U] float64 value, shift (margin or offset), weight.
    start: [S+1], entry: [E] int64, the units of response s are entry[start[s] : start[s+1]]. scale: [S] float64,
    reward per unit of log-ratio. denominator: [1] float64. most_units: the longest list of units."""

    ints: Tensor
    floats: Tensor
    start: Tensor
    entry: Tensor
    scale: Tensor
    denominator: Tensor
    most_units: int


class UnaLosses(NamedTuple):
    """loss: scalar. rewards, coef = dloss/dlogps: [S]. unit_losses: [U], unweighted. All float64."""

    loss: Tensor
    rewards: Tensor
    unit_losses: Tensor
    coef: Tensor


def unit_table(
    kind: Tensor,
    first: Tensor,
    second: Tensor,
    value: Tensor,
    margin: Tensor,
    weight: Tensor,
    offset: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    constant: float = 0.0,
    length_normalize: bool = False,
    denominator: float = 1.0,
    device: torch.device,
) -> UnitTable:
    """Feedback as the kernel reads it: built on the CPU, moved in one copy.

    kind, first, second, value, margin, weight, offset: [U], the columns of a Feedback. lengths: [S] tokens per
    response. constant: added to every offset. denominator: what the sum of weighted losses is divided by."""
    units, responses = len(kind), len(lengths)
    pairs = (kind == PAIR.value).nonzero().squeeze(1)
    who, unit = torch.cat([first, second[pairs]]), torch.cat([torch.arange(units), pairs])
    count = torch.bincount(who, minlength=responses)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    entry = unit[torch.argsort(who * units + unit)]
    shift = torch.where(kind == PAIR.value, margin, offset + constant)
    scale = torch.full((responses,), beta, dtype=torch.float64)
    if length_normalize:
        scale /= lengths
    ints = [torch.cat([kind, first, second]), start, entry]
    floats = [
        torch.cat([value, shift, weight]),
        scale,
        torch.tensor([denominator], dtype=torch.float64),
    ]
    buffer = torch.cat([*ints, *(x.view(torch.int64) for x in floats)]).to(
        device, non_blocking=True
    )
    parts = list(buffer.split([len(x) for x in (*ints, *floats)]))
    parts[3:] = [x.view(torch.float64) for x in parts[3:]]
    table, start, entry, numbers, scale, denominator = parts
    most_units = int(count.max()) if responses else 0
    return UnitTable(
        table.view(3, units), numbers.view(3, units), start, entry, scale, denominator, most_units
    )


def segment_sums(
    token_logps: Tensor, cu_seqlens: Tensor, ref_token_logps: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sums over the tokens of each response, [S] float64, of one or two [N] tensors in one launch.

    cu_seqlens: [S+1] integers on the device."""
    responses = len(cu_seqlens) - 1
    both = [token_logps] if ref_token_logps is None else [token_logps, ref_token_logps]
    assert all(x.shape == token_logps.shape and x.is_contiguous() for x in both)
    sums = token_logps.new_empty(len(both), responses, dtype=torch.float64)
    if responses:
        with torch.cuda.device_of(token_logps):
            segment_kernel[(responses,)](
                token_logps,
                ref_token_logps,
                cu_seqlens,
                sums[0],
                sums[-1],
                HAS_REF=ref_token_logps is not None,
                BLOCK=TOKENS,
                num_warps=TOKEN_WARPS,
                **FUSED,
            )
    return sums[0], None if ref_token_logps is None else sums[1]


def una_losses(
    logps: Tensor,
    ref_logps: Tensor,
    table: UnitTable,
    *,
    pair: str,
    binary: str,
    score: str,
    denominator: Tensor | None = None,
) -> UnaLosses:
    """The UNA loss of response sums [S] float64 and its derivative in logps.

    pair, binary, score: a form of FORMS each. denominator: one number on the device, instead of the table's."""
    for name, form in (("pair", pair), ("binary", binary), ("score", score)):
        if form not in FORMS[name]:
            raise ValueError(
                f"{name}={form!r} is not a form of the loss kernel; it has {FORMS[name]}"
            )
    responses, units = len(table.scale), table.ints.shape[1]
    assert (
        logps.shape == ref_logps.shape == (responses,)
        and logps.dtype == ref_logps.dtype == torch.float64
    )
    assert logps.is_contiguous() and ref_logps.is_contiguous()
    out = UnaLosses(
        *(logps.new_empty(shape) for shape in ((), (responses,), (units,), (responses,)))
    )
    with torch.cuda.device_of(logps):
        unit_kernel[(1,)](
            logps,
            ref_logps,
            table.scale,
            table.ints,
            table.floats,
            table.start,
            table.entry,
            table.denominator if denominator is None else denominator,
            out.rewards,
            out.unit_losses,
            out.loss,
            out.coef,
            responses,
            units,
            table.most_units,
            PAIR_FORM=pair,
            BINARY_FORM=binary,
            SCORE_FORM=score,
            BLOCK=BLOCK,
            **FUSED,
        )
    return out
