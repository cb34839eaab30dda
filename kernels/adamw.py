"""AdamW of bfloat16 weights with stochastic rounding, in one trip through memory.

    w' = w - lr * decay * w
    m  = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    w  = round(w' - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps))

Arithmetic is in float32, in the order of torch's fused AdamW, with IEEE division and root. `round`
goes up or down in magnitude at random, right in the mean: bfloat16 is the upper half of float32, so
that 16 random bits added to the lower half carry with a probability in proportion to the lower
half. Numbers of bfloat16, infinities and NaNs stay.

Bytes moved per weight, bfloat16 gradients: 22 (weight 2 + 2, gradient 2, two moments 8 + 8). What
never exists: a float32 copy of weights or gradients, noise in memory.

Noise is Philox4x32-10 at (seed, position): the same seed gives the same noise on any device. The
seed is a number on the device, drawn from torch's generator once a step; the position is (group of
PARTS weights, number of the slice). A Philox call gives 128 bits, 16 for each of PARTS = 8 weights
at a distance of SPAN, so that threads load SPAN weights side by side PARTS times over and no bits
change threads. A call costs some 70 integer instructions: one per weight would take as long as
the memory does.

The number of steps t stays on the device too. 1 - beta^t = -expm1(t log beta) loses no digits to
cancellation where t (1 - beta) is small.
"""

from __future__ import annotations

import math

# ruff: noqa: ANN001, ANN201 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import FUSED

GRAD_DTYPES = (torch.bfloat16, torch.float32)
PARTS = tl.constexpr(8)  # weights that share a Philox call
# 4 numbers side by side per thread: 16-byte loads of float32, 8-byte loads of bfloat16. With 8 the
# compiler would give the two dtypes different threads, and exchange numbers in shared memory.
LAUNCH = {"SPAN": 512, "num_warps": 4, **FUSED}


@triton.jit
def noise_words(seed, group, number):
    """Return four times 32 random bits, as uint32, for every group.

    seed: int64 scalar
    group: [n] int32
    number: int32 scalar, number of the slice in the step
    """
    zero = group * 0
    return tl.philox(seed, group, zero + number, zero, zero)


@triton.jit
def noise_of_part(words, part: tl.constexpr):
    """Return 16 random bits, as int32, for weight `part` of every group."""
    word = words[part // 2]
    return ((word >> (16 * (part % 2))) & 0xFFFF).to(tl.int32)


@triton.jit
def round_to_bf16(value, noise):
    """Return float32 numbers rounded to numbers of bfloat16, up or down in magnitude by noise."""
    bits = value.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (bits + noise) & -65536
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def one_minus_power(log_beta, steps):
    """Return 1 - exp(steps * log_beta), to float32 precision."""
    x = steps * log_beta
    # the series of expm1 for |x| < 1/2; its next term is below 2^-32 of the sum
    series = 1.0
    for k in tl.static_range(9, 1, -1):
        series = 1.0 + x * (1.0 / k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["number"])
def adamw_kernel(
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    seed_ptr,
    number,
    size,
    lr,
    lr_decay,
    log_beta1,
    log_beta2,
    rest1,
    beta2,
    rest2,
    eps,
    SPAN: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * (SPAN * PARTS)
    lane = tl.arange(0, SPAN)
    steps = tl.load(step_ptr) + 1
    step_size = tl.div_rn(lr, one_minus_power(log_beta1, steps))
    root = tl.sqrt_rn(one_minus_power(log_beta2, steps))
    seed = tl.load(seed_ptr)
    words = noise_words(seed, program * SPAN + lane, number)
    for part in tl.static_range(PARTS):
        at = first + part * SPAN + lane
        inside = at < size
        weight = tl.load(weight_ptr + at, mask=inside).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + at, mask=inside)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside)
        # an infinite weight stays, where inf - inf would be NaN
        shrunk = weight - lr_decay * weight
        weight = tl.where(tl.abs(weight) == float("inf"), weight, shrunk)
        exp_avg += rest1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
        below = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps
        weight -= tl.div_rn(step_size * exp_avg, below)
        weight = round_to_bf16(weight, noise_of_part(words, part))
        tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
        tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
        tl.store(weight_ptr + at, weight.to(tl.bfloat16), mask=inside)


def adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    seed: Tensor,
    number: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update a slice of weights and moments in place.

    weight: [n] bfloat16
    grad: [n] bfloat16 or float32
    exp_avg, exp_avg_sq: [n] float32, the moments
    step: [] float32, steps of the weights before this update
    seed: [1] int64, drawn once a step
    number: of the slice among all slices of the step; slices of a number get the same noise
    lr, betas, eps, weight_decay: of AdamW
    """
    columns = (weight, grad, exp_avg, exp_avg_sq)
    assert all(x.shape == weight.shape and x.is_contiguous() for x in columns), weight.shape
    assert weight.dtype == torch.bfloat16 and grad.dtype in GRAD_DTYPES, (weight.dtype, grad.dtype)
    assert exp_avg.dtype == exp_avg_sq.dtype == step.dtype == torch.float32
    assert seed.dtype == torch.int64 and seed.numel() == step.numel() == 1
    size = weight.numel()
    if size == 0:
        return
    beta1, beta2 = betas
    with torch.cuda.device_of(weight):
        adamw_kernel[(triton.cdiv(size, LAUNCH["SPAN"] * PARTS.value),)](
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            step,
            seed,
            number,
            size,
            lr,
            lr * weight_decay,
            _log(beta1),
            _log(beta2),
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            **LAUNCH,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
