"""The kernels over gradients and weights: the last factor of a gradient, and AdamW of bf16 weights.

On a GPU if torch finds one, else in the interpreter with the arithmetic of a GPU (interpreter.py).
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import una_fast.optim as optim_module
from una_fast import optim
from una_fast.head.torch_engine import TorchEngine

pytest.importorskip("triton")
import triton
import triton.language as tl
from una_fast.kernels import adamw, scale

import interpreter
from una_fast.head.triton_engine import TritonEngine

CUDA = torch.cuda.is_available()
pytestmark = [
    # numpy of the interpreter warns of what IEEE arithmetic does with infinities
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
if CUDA:
    pytestmark.append(pytest.mark.gpu)
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = scale.LAUNCH["BLOCK"]
GROUPS = adamw.LAUNCH["SPAN"]
PROGRAM = GROUPS * adamw.PARTS.value
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    """Give the interpreter the arithmetic of a GPU."""
    if not CUDA:
        interpreter.mend(monkeypatch, approximate=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- scale ----


def scale_case(rows: int, width: int, grad: torch.dtype, per_row: bool):
    """Return ([M, K] gradient in a wider buffer of NaN, factor in float64)."""
    g = generator(rows + width)
    buffer = torch.full((rows, width + 5), float("nan"), dtype=grad, device=DEVICE)
    buffer[:, :width] = torch.randn(rows, width, generator=g)
    shape = (rows, 1) if per_row else ()
    factor = torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)
    return buffer, buffer[:, :width], factor


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, BLOCK), (2, BLOCK + 1), (5, 2 * BLOCK - 3)])
def test_scale_is_a_product_in_float32_rounded_once(shape, grad_dtype, out_dtype, per_row):
    buffer, view, factor = scale_case(*shape, grad_dtype, per_row)
    kept = buffer.clone()
    expected = (view.float() * factor.float()).to(out_dtype)
    for grad in (view, view.contiguous()):
        for number in (factor, factor.float()):
            out = torch.full(shape, float("nan"), dtype=out_dtype, device=DEVICE)
            assert scale.scale(grad, number, out) is out
            assert torch.equal(out, expected)
    assert torch.equal(buffer.nan_to_num(), kept.nan_to_num()), "the gradient is as it was"
    if grad_dtype == out_dtype:
        assert torch.equal(scale.scale(view, factor, view), expected)
        assert buffer[:, shape[1] :].isnan().all(), "the guard columns are as they were"


def test_scale_takes_vectors_and_nothing(monkeypatch):
    """A launch of no programs is an error on a GPU; the interpreter takes it."""
    bias = torch.randn(BLOCK + 7, generator=generator()).to(DEVICE)
    two = torch.tensor(2.0, device=DEVICE)
    assert torch.equal(scale.scale(bias, two, bias.clone()), 2 * bias)
    monkeypatch.setattr(scale, "scale_kernel", None)
    per_row = torch.zeros(0, 1, device=DEVICE)
    for shape, factor in (((0, 9), two), ((0, 9), per_row), ((4, 0), two), ((0,), two)):
        empty = torch.zeros(shape, device=DEVICE)
        out = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
        assert scale.scale(empty, factor, out) is out


def test_scale_reaches_rows_beyond_32_bits():
    """Memory between the rows is never touched, so a CPU does not spend it."""
    stride = 2**30 + 64
    storage = torch.from_numpy(np.empty(2 * stride + 70, dtype=np.float16)).to(DEVICE)
    grad = storage.as_strided((3, 70), (stride, 1))
    values = torch.randn(3, 70, generator=generator()).half().to(DEVICE)
    grad.copy_(values)
    scale.scale(grad, torch.tensor(3.0, device=DEVICE), grad)
    assert torch.equal(grad, (3 * values.float()).half())


@pytest.mark.skipif(not CUDA, reason="a million programs in the interpreter")
def test_scale_of_more_numbers_than_32_bits_count():
    grad = torch.ones(2**31 + 9, dtype=torch.bfloat16, device=DEVICE)
    scale.scale(grad, torch.tensor(2.0, device=DEVICE), grad)
    assert bool((grad == 2).all())


@pytest.mark.parametrize("engine", [TorchEngine, TritonEngine], ids=lambda e: e.name)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("leaf", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engines_scale_alike_and_round_no_factor(dtype, leaf, per_row, keep, engine):
    """A factor of 1 + 1/300 in bfloat16 would be 1."""
    grad = torch.randn(7, 33, generator=generator()).to(DEVICE, dtype)
    kept = grad.clone()
    shape = (7, 1) if per_row else ()
    factor = torch.full(shape, 1 + 1 / 300, dtype=torch.float64, device=DEVICE)
    expected = (grad.float() * factor.float()).to(leaf)
    actual = engine.scaled(grad, factor, leaf, keep)
    assert actual.dtype == leaf and torch.equal(actual, expected)
    if keep:
        assert torch.equal(grad, kept), "needed again"
    overwritten = actual.data_ptr() == grad.data_ptr()
    assert overwritten == (leaf == dtype and not keep)


@pytest.mark.parametrize("shape", [(7, 33), (5,), (0, 4)])
def test_float64_gradients_are_scaled_in_float64(shape):
    grad = torch.randn(shape, generator=generator(), dtype=torch.float64)
    factor = torch.tensor(1 + 2.0**-40, dtype=torch.float64)
    assert torch.equal(TorchEngine.scaled(grad, factor, torch.float64, True), grad * factor)


# ---- AdamW ----


@triton.jit
def noise_kernel(out_ptr, seed_ptr, number, SPAN: tl.constexpr, PARTS: tl.constexpr):
    lane = tl.arange(0, SPAN)
    group = tl.program_id(0) * SPAN + lane
    words = adamw.noise_words(tl.load(seed_ptr), group, number)
    for part in tl.static_range(PARTS):
        at = tl.program_id(0) * SPAN * PARTS + part * SPAN + lane
        tl.store(out_ptr + at, adamw.noise_of_part(words, part))


@triton.jit
def round_kernel(values_ptr, noise_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(values_ptr + at, mask=inside)
    noise = tl.load(noise_ptr + at, mask=inside, other=0)
    tl.store(out_ptr + at, adamw.round_to_bf16(value, noise), mask=inside)


@triton.jit
def power_kernel(log_beta, steps_ptr, out_ptr, SIZE: tl.constexpr):
    for k in range(SIZE):
        tl.store(out_ptr + k, adamw.one_minus_power(log_beta, tl.load(steps_ptr + k)))


def philox(seed: int, counter: list[np.ndarray]) -> list[np.ndarray]:
    """Return the four words of Philox4x32-10 (Salmon et al. 2011) as uint64."""
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    low = np.uint64(2**32 - 1)
    key = [seed & (2**32 - 1), seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        keys = [np.uint64(k) for k in key]
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ keys[0], b & low, (a >> shift) ^ c[3] ^ keys[1], a & low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


def noise_of(seed: int, number: int, size: int) -> torch.Tensor:
    """Return the [n] int32 noise of a slice, at the positions that kernels/adamw.py documents."""
    programs = -(-size // PROGRAM)
    group = np.arange(programs * GROUPS)
    zero = np.zeros_like(group)
    words = philox(seed, [group, zero + number, zero, zero])
    halves = []
    for word in words:
        halves += [word & np.uint64(0xFFFF), word >> np.uint64(16)]
    noise = np.stack([half.reshape(programs, GROUPS) for half in halves], axis=1)
    return torch.from_numpy(noise.reshape(-1)[:size].astype(np.int32))


def test_the_philox_of_this_test_is_philox():
    """The known answers of Random123."""
    zeros = philox(0, [np.zeros(1)] * 4)
    assert [int(x[0]) for x in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox(2**64 - 1, [np.full(1, 2**32 - 1)] * 4)
    assert [int(x[0]) for x in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("seed", "number"), [(0, 0), (1234567890123456789, 7), (2**63 - 2, 2**31)])
def test_noise_is_philox_at_the_position_of_the_weight(seed, number):
    out = torch.empty(2 * PROGRAM, dtype=torch.int32, device=DEVICE)
    number = min(number, 2**31 - 1)
    noise_kernel[(2,)](out, torch.tensor([seed], device=DEVICE), number, GROUPS, adamw.PARTS.value)
    assert torch.equal(out.cpu(), noise_of(seed, number, 2 * PROGRAM))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_corrections_lose_no_digits(beta):
    """1 - beta^t in float32 would have 2 digits left at beta = 0.99999, t = 1."""
    steps = torch.tensor([1.0, 2, 3, 10, 100, 693, 694, 1e4, 1e6], device=DEVICE)
    out = torch.empty_like(steps)
    power_kernel[(1,)](adamw._log(beta), steps, out, len(steps))
    expected = 1 - beta ** steps.double().cpu()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=4e-7, atol=0)


def rounded(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(values)
    grid = (triton.cdiv(len(values), 1024),)
    round_kernel[grid](values, noise, out, len(values), BLOCK=1024)
    return out


def bits(*patterns: int) -> torch.Tensor:
    """Return float32 numbers of given bits."""
    return torch.tensor(np.array(patterns, dtype=np.uint32).view(np.float32), device=DEVICE)


def test_rounding_is_that_of_the_pytorch_form(monkeypatch):
    """The same noise, the same bits: zeros, subnormals, the largest numbers, infinities, NaNs."""
    special = bits(0, 1 << 31, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000)
    nans = bits(0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)
    values = torch.randn(9000, generator=generator()).to(DEVICE)
    values = torch.cat([special, nans, values, values.bfloat16().float()])
    noise = torch.randint(2**16, values.shape, generator=generator(1), dtype=torch.int32)
    noise[: len(special)] = 2**16 - 1
    noise = noise.to(DEVICE)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: noise.clone())
    expected = optim.stochastic_bf16_(values.clone())
    actual = rounded(values, noise)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(actual[-9000:], values[-9000:]), "numbers of bfloat16 stay"
    start = len(special)
    assert actual[start : start + len(nans)].bfloat16().isnan().all()


@pytest.mark.parametrize("value", [1.003, -3.3, 1e-40, 3.3e38])
def test_rounding_is_exact_in_the_mean(value):
    """Every noise once: the mean is the number itself, and only the two neighbours appear."""
    noise = torch.arange(2**16, dtype=torch.int32, device=DEVICE)
    exact = torch.full((2**16,), value, device=DEVICE)
    actual = rounded(exact, noise).double()
    assert float(actual.mean()) == pytest.approx(float(exact[0]), rel=1e-12, abs=0)
    low, high = actual.unique().tolist()
    assert low < float(exact[0]) < high
    steps = torch.tensor([low, high]).bfloat16().view(torch.int16).int()
    assert abs(int(steps[0] - steps[1])) == 1


def adamw_case(size: int, grad: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {
        "weight": torch.randn(size, generator=g).to(DEVICE, torch.bfloat16),
        "grad": torch.randn(size, generator=g).to(DEVICE, grad),
        "exp_avg": (torch.randn(size, generator=g) * 0.1).to(DEVICE),
        "exp_avg_sq": torch.rand(size, generator=g).to(DEVICE),
    }


def pytorch_form(case: dict[str, torch.Tensor], steps: float, **settings) -> torch.Tensor:
    """Update the moments of a case by the PyTorch form; return the weights before rounding."""
    wide = case["weight"].float()
    step = torch.tensor(steps, device=DEVICE)
    piece = optim_module._Slice(**case, master=wide, step=step, group=settings)
    piece.update(wide, case["grad"])
    return wide


def kernel_form(case, steps: float, seed: int, number: int, **settings) -> None:
    """Update weights and moments of a case by the kernel."""
    case = {
        **case,
        "step": torch.tensor(steps, device=DEVICE),
        "seed": torch.tensor([seed], device=DEVICE),
    }
    adamw.adamw(**case, number=number, **settings)


@pytest.mark.parametrize("steps", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 5, PROGRAM, 2 * PROGRAM + 77])
def test_adamw_is_the_pytorch_form_up_to_the_noise(size, grad, steps):
    ours, theirs = adamw_case(size, grad), adamw_case(size, grad)
    wide = pytorch_form(theirs, steps, **SETTINGS)
    kernel_form(ours, steps, 99, 3, **SETTINGS)
    assert torch.equal(ours["grad"], theirs["grad"])
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=3e-7, atol=1e-7)
    noise = noise_of(99, 3, size).to(DEVICE)
    expected = rounded(wide, noise)
    # the last bit of a float32 carries into bfloat16 once in 2^16
    differs = ours["weight"].float() != expected
    assert float(differs.double().mean()) <= 1e-3
    spacing = torch.exp2(torch.frexp(wide).exponent.float() - 8)
    assert ((ours["weight"].float() - wide).abs() <= 1.001 * spacing).all()


def test_adamw_takes_a_few_last_bits_at_most():
    """Against float64, the kernel errs no more than torch's fused AdamW, within 20 %."""
    size, steps = PROGRAM, 20
    g = generator(5)
    ours, theirs = adamw_case(size, torch.float32), adamw_case(size, torch.float32)
    exact = {name: theirs[name].double() for name in ("exp_avg", "exp_avg_sq")}
    beta1, beta2 = SETTINGS["betas"]
    for step in map(float, range(steps)):
        grad = torch.randn(size, generator=g).to(DEVICE)
        ours["grad"], theirs["grad"] = grad, grad
        kernel_form(ours, step, 1, 0, **SETTINGS)
        pytorch_form(theirs, step, **SETTINGS)
        exact["exp_avg"].lerp_(grad.double(), 1 - beta1)
        exact["exp_avg_sq"].lerp_(grad.double().square(), 1 - beta2)
    for name, truth in exact.items():
        error = (ours[name] - truth).abs().max()
        assert error <= 1.2 * (theirs[name] - truth).abs().max(), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_of_infinities_and_nans_is_that_of_the_pytorch_form(weight_decay):
    inf, nan = float("inf"), float("nan")
    weights = [inf, -inf, nan, 1.0, 1.0, 1.0, -0.0, 0.0]
    grads = [1.0, 1.0, 1.0, inf, nan, 1e30, 0.0, 0.0]
    settings = {**SETTINGS, "lr": 1e-30, "weight_decay": weight_decay}

    def case() -> dict[str, torch.Tensor]:
        return {
            "weight": torch.tensor(weights, dtype=torch.bfloat16, device=DEVICE),
            "grad": torch.tensor(grads, device=DEVICE),
            "exp_avg": torch.zeros(len(weights), device=DEVICE),
            "exp_avg_sq": torch.zeros(len(weights), device=DEVICE),
        }

    ours, theirs = case(), case()
    wide = pytorch_form(theirs, 0.0, **settings)
    kernel_form(ours, 0.0, 1, 0, **settings)
    torch.testing.assert_close(ours["weight"].float(), wide, equal_nan=True, rtol=0, atol=0)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, rtol=1e-6, atol=0)


def test_adamw_without_a_rate_changes_no_weight():
    case = adamw_case(PROGRAM + 3, torch.bfloat16)
    before = case["weight"].clone()
    kernel_form(case, 0.0, 1, 0, **{**SETTINGS, "lr": 0.0})
    assert torch.equal(case["weight"], before)


def test_adamw_is_right_in_the_mean():
    """The same weight, gradient and moments many times over; updates below half a spacing."""
    size = 16 * PROGRAM
    case = {
        "weight": torch.full((size,), 1.5, dtype=torch.bfloat16, device=DEVICE),
        "grad": torch.full((size,), 0.3, dtype=torch.bfloat16, device=DEVICE),
        "exp_avg": torch.full((size,), 0.2, device=DEVICE),
        "exp_avg_sq": torch.full((size,), 0.1, device=DEVICE),
    }
    settings = {**SETTINGS, "lr": 1e-3}
    exact = float(pytorch_form(copy.deepcopy(case), 5.0, **settings)[0])
    kernel_form(case, 5.0, 7, 0, **settings)
    drawn = case["weight"].double()
    low, high = drawn.unique().tolist()
    assert (low, high) == (1.5 - 1 / 128, 1.5) and low < exact < high
    standard_error = float(drawn.std()) / size**0.5
    assert abs(float(drawn.mean()) - exact) < 4 * standard_error
    assert abs(1.5 - exact) > 8 * standard_error, "the test can see the update"


def test_noise_differs_between_seeds_and_slices_and_repeats():
    def run(seed: int, number: int) -> torch.Tensor:
        case = adamw_case(PROGRAM, torch.bfloat16)
        kernel_form(case, 0.0, seed, number, **SETTINGS)
        return case["weight"]

    assert torch.equal(run(1, 0), run(1, 0))
    different = [run(1, 0), run(2, 0), run(1, 1), run(1 + 2**40, 0)]
    for i, a in enumerate(different):
        assert not any(torch.equal(a, b) for b in different[:i])


def test_no_weights_launch_nothing(monkeypatch):
    monkeypatch.setattr(adamw, "adamw_kernel", None)
    kernel_form(adamw_case(0, torch.bfloat16), 0.0, 1, 0, **SETTINGS)


# ---- the optimizer on the kernel ----


@pytest.fixture
def on_kernel(monkeypatch):
    """Let the optimizer take the kernel wherever the dtypes allow it; count its launches."""
    launches = []
    whole, launch = optim_module._has_kernel, adamw.adamw
    monkeypatch.setattr(optim_module, "triton_refusal", lambda device, dtype: None)
    monkeypatch.setattr(
        optim_module, "_has_kernel", lambda device, *dtypes: whole(torch.device("cuda"), *dtypes)
    )

    def counting(weight, *args, **kwargs):
        launches.append(weight.numel())
        launch(weight, *args, **kwargs)

    monkeypatch.setattr(adamw, "adamw", counting)
    monkeypatch.setattr(optim_module, "SLICE", 1024)
    return launches


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    matrix = torch.randn(37, 101, generator=generator(1))
    vector = torch.randn(53, generator=generator(2))
    return [nn.Parameter(x.to(DEVICE, dtype)) for x in (matrix, vector)]


def take_steps(optimizer: optim.AdamW, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for k, p in enumerate(params):
            noise = torch.randn(p.shape, generator=generator(10 * step + k))
            p.grad = noise.to(DEVICE, p.dtype)
        optimizer.step()


def test_the_optimizer_updates_every_slice_by_one_launch(on_kernel, monkeypatch):
    params = [*parameters(), nn.Parameter(torch.ones(9, device=DEVICE))]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    take_steps(optim.AdamW(params, **SETTINGS), params, range(3))
    assert on_kernel == 3 * [1024, 1024, 1024, 665, 53], "fp32 weights take torch's"
    monkeypatch.setattr(optim_module, "_has_kernel", lambda *args: False)
    theirs = optim.AdamW(alone, **SETTINGS)
    take_steps(theirs, alone, range(3))
    for p, q in zip(params, alone, strict=True):
        # three steps, each to one of two neighbours
        torch.testing.assert_close(p, q, rtol=3 / 120, atol=1e-3)
    assert float((params[0] != alone[0]).double().mean()) > 0.1, "noise of another kind"


def test_a_resumed_run_repeats_the_noise(on_kernel):
    def seeded() -> None:
        torch.manual_seed(3)

    whole, halves = parameters(), parameters()
    seeded()
    take_steps(optim.AdamW(whole, **SETTINGS), whole, range(4))
    seeded()
    first = optim.AdamW(halves, **SETTINGS)
    take_steps(first, halves, range(2))
    get, put = torch.get_rng_state, torch.set_rng_state
    if CUDA:
        get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    state, saved = get(), copy.deepcopy(first.state_dict())
    torch.rand(5, device=DEVICE)
    second = optim.AdamW(halves, **SETTINGS)
    second.load_state_dict(saved)
    put(state)
    take_steps(second, halves, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    other = parameters()
    torch.manual_seed(4)
    take_steps(optim.AdamW(other, **SETTINGS), other, range(4))
    assert not torch.equal(whole[0], other[0])


@pytest.mark.skipif(CUDA, reason="gloo on the CPU")
def test_the_shard_of_a_dtensor_is_updated(on_kernel):
    plain = parameters()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def shard(x: torch.Tensor) -> DTensor:
            return distribute_tensor(x.detach().clone(), mesh, [Shard(0)])

        sharded = [nn.Parameter(shard(p)) for p in plain]
        optimizers = [optim.AdamW(x, **SETTINGS) for x in (plain, sharded)]
        for p, q in zip(plain, sharded, strict=True):
            p.grad = torch.ones_like(p)
            q.grad = shard(p.grad)
        for optimizer in optimizers:
            torch.manual_seed(0)
            optimizer.step()
        for p, q in zip(plain, sharded, strict=True):
            assert torch.equal(p, q.to_local())
    finally:
        torch.distributed.destroy_process_group()


def test_the_kernel_takes_bf16_weights_on_cuda(monkeypatch, caplog):
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    cuda = torch.device("cuda")
    monkeypatch.setattr(optim_module, "triton_refusal", lambda device, dtype: None)
    assert optim_module._has_kernel(cuda, bf16, bf16) and optim_module._has_kernel(cuda, bf16, fp32)
    for device, weight, grad in (
        (torch.device("cpu"), bf16, bf16),
        (cuda, fp32, fp32),
        (cuda, fp16, fp16),
        (cuda, bf16, fp16),
    ):
        assert not optim_module._has_kernel(device, weight, grad)
    monkeypatch.setattr(optim_module, "triton_refusal", lambda device, dtype: "no Triton here")
    with caplog.at_level(logging.WARNING):
        assert not optim_module._has_kernel(cuda, bf16, bf16)
    assert "no Triton here" in caplog.text


def test_a_step_by_the_kernel_is_planned_without_temporaries():
    from una_fast.config import RunConfig

    config = RunConfig(model="m", data="d", output_dir="o")
    params = parameters()
    assert optim.step_bytes(params, config, "cuda") == 0
    assert optim.step_bytes(params, config, "cpu") > 0
    assert optim.step_bytes(parameters(torch.float16), config, "cuda") > 0
