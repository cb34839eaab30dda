"""From token log-probs to the UNA loss and the derivative by each response: float64, no atomics.

Legend: N tokens in S responses, U feedback units (a pair, or a labelled or scored response),
E (response, unit) incidences: a pair stands in two.

    segment_kernel   a program per response    sums[s] = sum over the tokens of response s
    unit_kernel      a single program          rewards[s] = beta[s] * (logps[s] - ref_logps[s])
                                               losses[u]
                                               loss = sum of weight[u] * losses[u] / denominator
                                               coef[s] = dloss / dlogps[s], over the units of s,
                                                         in order

A unit needs the sums of two responses. A single launch could only wait for them by spinning, or sum
the same tokens again in every program; so two launches, ordered by the stream. Every number is
written by one program in one order: the same bits on every run. Bytes: 4 to 8 per token, read once;
the time is launch latency and one walk over the longest response (to be measured).

Every form is written as value and derivative in x, the only number that a unit depends on:

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

# forms of `_phi`, by kind of feedback
FORMS = {
    "pair": ("logistic", "linear", "squared"),
    "binary": ("bce", "mse"),
    "score": ("mse", "bce", "reward_mse"),
}
PAIR, BINARY = tl.constexpr(0), tl.constexpr(1)  # kinds of a unit; a score is 2
BLOCK = 128
TOKENS, TOKEN_WARPS = 8192, 16


@triton.jit
def _softplus_sigmoid(x):
    """Return (log(1 + exp(x)), sigmoid(x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    softplus = tl.maximum(x, 0.0) + tl.log(1 + e)
    sigmoid = tl.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return softplus, sigmoid


@triton.jit
def _phi(x, value, FORM: tl.constexpr):
    """Return (phi, dphi/dx). value: margin of a pair, label, score or reward."""
    if FORM == "logistic":
        loss, chance = _softplus_sigmoid(value - x)
        slope = -chance
    elif FORM == "linear":
        loss = value - x
        slope = tl.full(x.shape, -1, tl.float64)
    elif FORM == "bce":
        softplus, chance = _softplus_sigmoid(x)
        loss = softplus - value * x
        slope = chance - value
    elif FORM == "mse":
        _, chance = _softplus_sigmoid(x)
        miss = chance - value
        loss = miss * miss
        slope = 2 * miss * chance * (1 - chance)
    else:
        tl.static_assert(FORM == "squared" or FORM == "reward_mse", "a form that this kernel lacks")
        loss = (x - value) * (x - value)
        slope = 2 * (x - value)
    return loss, slope


@triton.jit
def _reward(s, mask, logps_ptr, ref_ptr, beta_ptr):
    logps = tl.load(logps_ptr + s, mask=mask, other=0.0)
    ref = tl.load(ref_ptr + s, mask=mask, other=0.0)
    return tl.load(beta_ptr + s, mask=mask, other=0.0) * (logps - ref)


@triton.jit
def _unit(
    u,
    mask,
    logps_ptr,
    ref_ptr,
    beta_ptr,
    ints_ptr,
    floats_ptr,
    U,
    PAIR_FORM: tl.constexpr,
    BINARY_FORM: tl.constexpr,
    SCORE_FORM: tl.constexpr,
):
    """Return (loss, dloss/dx, weight, first response) of the units u, by the form of their kind."""
    kind = tl.load(ints_ptr + u, mask=mask, other=0)
    first = tl.load(ints_ptr + U + u, mask=mask, other=0)
    second = tl.load(ints_ptr + 2 * U + u, mask=mask, other=0)
    value = tl.load(floats_ptr + u, mask=mask, other=0.0)
    shift = tl.load(floats_ptr + U + u, mask=mask, other=0.0)
    weight = tl.load(floats_ptr + 2 * U + u, mask=mask, other=0.0)
    reward = _reward(first, mask, logps_ptr, ref_ptr, beta_ptr)
    lead = reward - _reward(second, mask & (kind == PAIR), logps_ptr, ref_ptr, beta_ptr)

    right, right_slope = _phi(lead, shift, PAIR_FORM)
    wrong, wrong_slope = _phi(-lead, shift, PAIR_FORM)
    pair = value * right + (1 - value) * wrong
    pair_slope = value * right_slope - (1 - value) * wrong_slope
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
def segment_kernel(tokens_ptr, cu_ptr, sums_ptr, BLOCK: tl.constexpr):
    s = tl.program_id(0)
    low, high = tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    tl.store(sums_ptr + s, _segment_sum(tokens_ptr, low, high, BLOCK))


@triton.jit
def _store_losses(
    logps_ptr,
    ref_ptr,
    beta_ptr,
    ints_ptr,
    floats_ptr,
    losses_ptr,
    U,
    PAIR_FORM: tl.constexpr,
    BINARY_FORM: tl.constexpr,
    SCORE_FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the loss of every unit, and return the weighted sum."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for low in range(0, U, BLOCK):
        u = low + lanes
        loss, _, weight, _ = _unit(
            u,
            u < U,
            logps_ptr,
            ref_ptr,
            beta_ptr,
            ints_ptr,
            floats_ptr,
            U,
            PAIR_FORM,
            BINARY_FORM,
            SCORE_FORM,
        )
        tl.store(losses_ptr + u, loss, mask=u < U)
        total += weight * loss
    return tl.sum(total, 0)


@triton.jit
def _coefficient(
    s,
    mask,
    logps_ptr,
    ref_ptr,
    beta_ptr,
    ints_ptr,
    floats_ptr,
    start_ptr,
    entry_ptr,
    U,
    most_units,
    PAIR_FORM: tl.constexpr,
    BINARY_FORM: tl.constexpr,
    SCORE_FORM: tl.constexpr,
):
    """Return the sum of weight * dloss/dr over the units of the responses s."""
    begin = tl.load(start_ptr + s, mask=mask, other=0)
    count = tl.load(start_ptr + s + 1, mask=mask, other=0) - begin
    coef = tl.zeros(s.shape, tl.float64)
    for k in range(0, most_units):
        has_unit = k < count
        u = tl.load(entry_ptr + begin + k, mask=has_unit, other=0)
        _, slope, weight, first = _unit(
            u,
            has_unit,
            logps_ptr,
            ref_ptr,
            beta_ptr,
            ints_ptr,
            floats_ptr,
            U,
            PAIR_FORM,
            BINARY_FORM,
            SCORE_FORM,
        )
        coef += weight * tl.where(first == s, slope, -slope)
    return coef


@triton.jit(do_not_specialize=["S", "U", "most_units"])
def unit_kernel(
    logps_ptr,
    ref_ptr,
    beta_ptr,
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
    total = _store_losses(
        logps_ptr,
        ref_ptr,
        beta_ptr,
        ints_ptr,
        floats_ptr,
        losses_ptr,
        U,
        PAIR_FORM,
        BINARY_FORM,
        SCORE_FORM,
        BLOCK,
    )
    tl.store(loss_ptr, total / denominator)
    for low in range(0, S, BLOCK):
        s = low + lanes
        tl.store(rewards_ptr + s, _reward(s, s < S, logps_ptr, ref_ptr, beta_ptr), mask=s < S)
        coef = _coefficient(
            s,
            s < S,
            logps_ptr,
            ref_ptr,
            beta_ptr,
            ints_ptr,
            floats_ptr,
            start_ptr,
            entry_ptr,
            U,
            most_units,
            PAIR_FORM,
            BINARY_FORM,
            SCORE_FORM,
        )
        beta = tl.load(beta_ptr + s, mask=s < S, other=0.0)
        tl.store(coef_ptr + s, coef * beta / denominator, mask=s < S)


class UnitTable(NamedTuple):
    """The units of a call on the device, views of a single buffer.

    ints: [3, U] int64, rows kind, first, second
    floats: [3, U] float64, rows value, shift (margin or offset), weight
    start: [S+1] int64
    entry: [E] int64; the units of response s are entry[start[s] : start[s+1]]
    beta: [S] float64, reward per nat of log-ratio; beta / length with length_normalize
    denominator: [1] float64
    most_units: units of the response with most units
    """

    ints: Tensor
    floats: Tensor
    start: Tensor
    entry: Tensor
    beta: Tensor
    denominator: Tensor
    most_units: int


class UnaLosses(NamedTuple):
    """The results of `una_losses`, float64.

    loss: []
    rewards: [S]
    unit_losses: [U], unweighted
    coef: [S], dloss / dlogps
    """

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
    """Build the table that the kernel reads: on the CPU, moved in one copy.

    kind, first, second: [U] int64, columns of a Feedback
    value, margin, weight, offset: [U] float64, columns of a Feedback
    lengths: [S] int64, tokens per response
    beta: reward per nat of log-ratio
    constant: added to every offset
    length_normalize: divide beta by the length of each response
    denominator: divisor of the sum of weighted losses
    device: of the table
    """
    units, responses = len(kind), len(lengths)
    start, entry = _units_of_responses(kind, first, second, responses)
    shift = torch.where(kind == PAIR.value, margin, offset + constant)
    betas = torch.full((responses,), beta, dtype=torch.float64)
    if length_normalize:
        betas /= lengths
    columns = [
        torch.cat([kind, first, second]),
        torch.cat([value, shift, weight]),
        start,
        entry,
        betas,
        torch.tensor([denominator], dtype=torch.float64),
    ]
    ints, floats, *rest = _moved_together(columns, device)
    most_units = int(start.diff().max()) if responses else 0
    return UnitTable(ints.view(3, units), floats.view(3, units), *rest, most_units)


def _units_of_responses(
    kind: Tensor, first: Tensor, second: Tensor, responses: int
) -> tuple[Tensor, Tensor]:
    """Return ([S+1] start, [E] entry) of a UnitTable; the units of a response ascend."""
    units = len(kind)
    pairs = (kind == PAIR.value).nonzero().squeeze(1)
    response = torch.cat([first, second[pairs]])
    unit = torch.cat([torch.arange(units), pairs])
    count = torch.bincount(response, minlength=responses)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return start, unit[torch.argsort(response * units + unit)]


def _moved_together(columns: list[Tensor], device: torch.device) -> list[Tensor]:
    """Move 1-d columns of 8-byte numbers to a device in one copy; return views of the copy."""
    buffer = torch.cat([column.view(torch.int64) for column in columns])
    views = buffer.to(device, non_blocking=True).split([len(column) for column in columns])
    return [view.view(column.dtype) for view, column in zip(views, columns, strict=True)]


def segment_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sums over the tokens of each response, [S] float64.

    token_logps: [N] any float dtype, contiguous
    cu_seqlens: [S+1] integers on the device
    """
    assert token_logps.dim() == 1 and token_logps.is_contiguous()
    responses = len(cu_seqlens) - 1
    sums = token_logps.new_empty(responses, dtype=torch.float64)
    if responses == 0:
        return sums
    with torch.cuda.device_of(token_logps):
        segment_kernel[(responses,)](
            token_logps, cu_seqlens, sums, BLOCK=TOKENS, num_warps=TOKEN_WARPS, **FUSED
        )
    return sums


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
    """Return the UNA loss of response sums, and the derivative by logps.

    logps: [S] float64, contiguous
    ref_logps: [S] float64, contiguous
    table: units over the S responses
    pair, binary, score: a form of FORMS each
    denominator: one number on the device that replaces the denominator of the table, or None

    ValueError for a form that the kernel lacks.
    """
    for name, form in (("pair", pair), ("binary", binary), ("score", score)):
        if form not in FORMS[name]:
            raise ValueError(
                f"{name}={form!r} is not a form of the loss kernel; it has {FORMS[name]}"
            )
    responses, units = len(table.beta), table.ints.shape[1]
    for sums in (logps, ref_logps):
        assert sums.shape == (responses,) and sums.dtype == torch.float64 and sums.is_contiguous()
    out = UnaLosses(
        loss=logps.new_empty(()),
        rewards=logps.new_empty(responses),
        unit_losses=logps.new_empty(units),
        coef=logps.new_empty(responses),
    )
    if denominator is None:
        denominator = table.denominator
    with torch.cuda.device_of(logps):
        unit_kernel[(1,)](
            logps,
            ref_logps,
            table.beta,
            table.ints,
            table.floats,
            table.start,
            table.entry,
            denominator,
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
