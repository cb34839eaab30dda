"""The Triton kernels against float64 torch: on a GPU if torch finds one, else in the interpreter.

The interpreter has the arithmetic of a GPU (interpreter.py). It runs programs one after another:
races and alignment, which only a GPU can show, are in test_kernels_compile.py and bench/.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from una_fast import losses
from una_fast.feedback import Feedback
from una_fast.head.row_stats import RowSums
from una_fast.head.torch_engine import LogitTransform
from una_fast.losses import Objective

pytest.importorskip("triton")
from una_fast.kernels import gather, gemm, logp_partials, one_read, row_stats, rowgrad, una_loss

import interpreter

CUDA = torch.cuda.is_available()
pytestmark = [
    # numpy of the interpreter warns of log(0), in unused lanes and in tiles that are all -inf,
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log"),
    # of ratios to a target without probability,
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in (div|mul)"),
    # and of exp(2x) above x = 44, which the softcap takes as inf
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]
# on a GPU the tests of the interpreter are tests of the GPU too
if CUDA:
    pytestmark.append(pytest.mark.gpu)
DEVICE = torch.device("cuda" if CUDA else "cpu")
NARROW = [torch.float16, torch.bfloat16]
BLOCK = rowgrad.LAUNCH["BLOCK"]
TRANSFORMS = {
    "scaled": LogitTransform(logit_scale=0.7, temperature=1.3),
    "softcap": LogitTransform(softcap=30.0, logit_scale=1.2, temperature=0.8),
}


@pytest.fixture(autouse=True)
def approximate(request, monkeypatch) -> bool:
    """Return whether exp and division err by 2^-22, as on a GPU."""
    wanted = getattr(request, "param", False)
    if not CUDA:
        interpreter.mend(monkeypatch, approximate=wanted)
    return CUDA or wanted


in_both_arithmetics = pytest.mark.parametrize(
    "approximate", [False, True], ids=["exact", "approximate"], indirect=True
)
if CUDA:  # which has one
    in_both_arithmetics = pytest.mark.usefixtures("approximate")


@pytest.fixture
def softcap_error(approximate) -> float:
    """Return the error of numbers with a softcap: that of tanh, a few ulps of 1, times the cap."""
    return 2e-5 if approximate else 4e-6


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill uninitialised tensors with NaN (or a large integer): shows elements never written."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**15)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(values: torch.Tensor, dtype: torch.dtype, extra: int = 5) -> torch.Tensor:
    """Put [C, T] values into a wider buffer of NaN, with a row stride that is a multiple of 64."""
    rows, width = values.shape
    stride = (width + extra + 63) // 64 * 64
    buffer = torch.full((rows, stride), float("nan"), dtype=dtype, device=DEVICE)
    buffer[:, :width] = values
    return buffer


def peaked(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return logits up to |u| = 50, some rows dominated by one entry."""
    u = torch.randn(rows, width, generator=generator(seed)) * 12
    u[::2] /= 6
    u[0, width // 2] = 50.0
    u[-1, -1] = -50.0
    return u.clamp(-50, 50)


def truth(u, targets, transform, bias, start, coef):
    """Return (lse, target logit, du) in float64, by autograd."""
    raw = u.double().cpu().requires_grad_()
    z = transform(raw if bias is None else raw + bias.double().cpu())
    lse = torch.logsumexp(z, 1)
    index = targets.cpu() - start
    inside = (index >= 0) & (index < u.shape[1])
    at_index = z.gather(1, torch.where(inside, index, 0).unsqueeze(1)).squeeze(1)
    target_logit = torch.where(inside, at_index, 0.0)
    du = torch.autograd.grad(target_logit - lse, raw, coef.double().cpu())[0]
    return lse.detach(), target_logit.detach(), du


def row_case(rows: int, width: int, dtype: torch.dtype, start: int, seed: int = 0):
    g = generator(seed)
    buffer = padded(peaked(rows, width, seed), dtype)
    targets = torch.randint(0, start + width + 3, (rows,), generator=g)
    targets[0] = start + width // 2
    targets[-1] = -100 if rows > 1 else start
    coef = torch.randn(rows, generator=g)
    coef[targets == -100] = 0
    return buffer, buffer[:, :width], targets.to(DEVICE), coef.to(DEVICE)


# Rounding to the nearest, in proportion to the number; cutting off errs by twice as much.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check an error of at most `tolerance` and rounding, in proportion to the number or to 1."""
    rounding = ROUNDING.get(actual.dtype, 0.0)
    assert_close(actual.double().cpu(), expected, rtol=rounding + tolerance, atol=tolerance)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


@in_both_arithmetics
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("logits", "grad"), DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, BLOCK), (4, BLOCK + 1)])
def test_row_kernels(rows, width, logits, grad, transform, softcap_error):
    with_bias = (rows + width) % 2 == 1
    start = 0 if with_bias else 11
    buffer, u, targets, coef = row_case(rows, width, logits, start)
    bias = torch.randn(width, generator=generator(1)).to(DEVICE, grad) if with_bias else None
    options = {"bias": bias, "start": start, **vars(transform)}
    lse, target_logit, du = truth(u, targets, transform, bias, start, coef)
    exact = 1e-6 if transform.softcap is None else softcap_error
    kept = buffer.clone()

    stats = rowgrad.row_logps(u, targets, **options)
    assert torch.equal(buffer.nan_to_num(), kept.nan_to_num()), "row_logps keeps the logits"
    check(stats[0], lse, exact)
    check(stats[1], target_logit, exact)

    over = rowgrad.overlay(u, grad)
    rowgrad.row_grad(u, targets, coef, stats[0], out=over, **options)
    check(over, du, 2 * exact)
    assert buffer[:, width:].isnan().all(), "the guard columns are as they were"

    beside = torch.empty(rows, width, dtype=grad, device=DEVICE)
    rowgrad.row_grad(kept[:, :width], targets, coef, stats[0], out=beside, **options)
    assert torch.equal(beside, over), "the same blocks: the same bits"


@in_both_arithmetics
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_slope_of_a_softcap_is_exact_at_both_caps(dtype):
    """1 - tanh^2, or 2 - (1 - tanh), cancels: at x = -9 nothing of the slope would be left.

    With a single vocabulary entry that is not the target, du = -coef * dz/du; coef brings du to 1.
    """
    softcap = 5.0
    x = torch.linspace(-9, 9, 37, device=DEVICE)
    u = (softcap * x).to(dtype).unsqueeze(1)
    slope = torch.cosh(u.double().squeeze(1) / softcap) ** -2
    coef = (-1 / slope).float()
    targets = torch.full((len(x),), -100, device=DEVICE)
    lse, _ = rowgrad.row_logps(u, targets, softcap=softcap)
    du = rowgrad.overlay(u, dtype)
    rowgrad.row_grad(u, targets, coef, lse, out=du, softcap=softcap)
    error = (du.squeeze(1).double() - 1).abs()
    worst = int(error.argmax())
    tolerance = ROUNDING[dtype] + 1e-5
    assert error[worst] <= tolerance, f"slope off by {error[worst]:.1e} at x = {x[worst]:.2f}"


@in_both_arithmetics
def test_a_softcap_of_extreme_logits_is_finite(softcap_error):
    """exp(2x) overflows at x = 45; the slope there is 0, not 0 * inf."""
    u = torch.tensor([[1e30, -1e30, 300.0, -300.0, 0.0]], device=DEVICE)
    targets = torch.tensor([4], device=DEVICE)
    coef = torch.ones(1, device=DEVICE)
    lse, target_logit, du = truth(u, targets, LogitTransform(softcap=2.0), None, 0, coef)
    stats = rowgrad.row_logps(u, targets, softcap=2.0)
    check(stats[0], lse, softcap_error)
    check(stats[1], target_logit, softcap_error)
    logps, actual = one_read_of(u.clone(), targets, coef, softcap=2.0)
    check(logps, target_logit - lse, softcap_error)
    check(actual, du, softcap_error)
    rowgrad.row_grad(u, targets, coef, stats[0], out=u, softcap=2.0)
    check(u, du, softcap_error)


@in_both_arithmetics
def test_row_kernels_on_logits_of_minus_infinity():
    """Vocabulary entries masked by a bias of -inf, even a whole block, have probability 0."""
    rows, width = 2, BLOCK + 40
    _, u, targets, coef = row_case(rows, width, torch.float32, 0)
    bias = torch.zeros(width, device=DEVICE)
    bias[: BLOCK + 3] = float("-inf")
    targets[:] = torch.tensor([BLOCK + 5, BLOCK + 9])
    lse, target_logit, du = truth(u, targets, LogitTransform(), bias, 0, coef)
    stats = rowgrad.row_logps(u, targets, bias=bias)
    check(stats[0], lse, 1e-6)
    check(stats[1], target_logit, 1e-6)
    logps, actual = one_read_of(u.clone(), targets, coef, bias=bias)
    check(logps, target_logit - lse, 1e-6)
    check(actual, du.nan_to_num(), 1e-6)
    rowgrad.row_grad(u, targets, coef, stats[0], out=u, bias=bias)
    check(u, du.nan_to_num(), 1e-6)


# ---- statistics ----


def stats_truth(u, transform, bias):
    """Return ([C] entropy, log sum of squares, sum, place, gradient of the entropy), float64."""
    raw = u.double().cpu().requires_grad_()
    z = transform(raw if bias is None else raw + bias.double().cpu())
    logps = torch.log_softmax(z, 1)
    entropy = -(logps.exp() * logps.clamp_min(-1e30)).sum(1)
    (slope,) = torch.autograd.grad(entropy.sum(), raw)
    squares = torch.logsumexp(2 * logps, 1)
    return [x.detach() for x in (entropy, squares, z.sum(1), z.argmax(1), slope)]


def sums_of(u, targets, wanted=row_stats.SUMS, **options) -> RowSums:
    return RowSums(**row_stats.row_sums(u, targets, wanted, **options))


@in_both_arithmetics
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, BLOCK), (4, BLOCK + 1)])
def test_statistics_and_the_gradient_of_the_entropy(rows, width, grad, transform, softcap_error):
    with_bias = (rows + width) % 2 == 1
    start = 0 if with_bias else 11
    buffer, u, targets, coef = row_case(rows, width, torch.float32, start)
    bias = torch.randn(width, generator=generator(1)).to(DEVICE) if with_bias else None
    options = {"bias": bias, "start": start, **vars(transform)}
    lse, target_logit, of_logp = truth(u, targets, transform, bias, start, coef)
    entropy, squares, plain, place, of_entropy = stats_truth(u, transform, bias)
    exact = 2e-6 if transform.softcap is None else 2 * softcap_error
    kept = buffer.clone()

    sums = sums_of(u, targets, **options)
    assert torch.equal(buffer.nan_to_num(), kept.nan_to_num()), "row_sums keeps the logits"
    found = sums.finished(targets, width)
    check(found["lse"], lse, exact)
    check(found["target_logit"], target_logit, exact)
    check(found["entropy"], entropy, exact)
    check(found["log_sum_sq_probs"], squares, exact)
    check(found["mean_logits"], plain / width, exact)
    assert torch.equal(sums.place.cpu(), place + start)
    assert torch.equal(found["is_top1"].cpu(), place + start == targets.cpu())

    upstream = torch.randn(rows, generator=generator(2)).to(DEVICE)
    term = {"upstream": upstream, "entropy": found["entropy"], "tail": found["tail"]}
    du = of_logp + upstream.double().cpu().unsqueeze(1) * of_entropy
    over = rowgrad.overlay(u, grad)
    row_stats.entropy_grad(u, targets, coef, found["lse"], out=over, **term, **options)
    check(over, du, 4 * exact)
    assert buffer[:, width:].isnan().all(), "the guard columns are as they were"
    beside = torch.empty(rows, width, dtype=grad, device=DEVICE)
    row_stats.entropy_grad(
        kept[:, :width], targets, coef, found["lse"], out=beside, **term, **options
    )
    assert torch.equal(beside, over), "the same blocks: the same bits"


@pytest.mark.parametrize("name", row_stats.SUMS)
def test_a_sum_that_is_asked_for_alone_is_the_same(name):
    _, u, targets, _ = row_case(3, BLOCK + 7, torch.float32, 0)
    everything, alone = sums_of(u, targets), sums_of(u, targets, (name,))
    for given in ("top", "total", "target_logit", name):
        assert torch.equal(getattr(everything, given), getattr(alone, given))
    assert [x for x in row_stats.SUMS if getattr(alone, x) is not None] == [name]


def test_sums_of_slices_add_up():
    """Slices of falling, rising and equal tops, and one that is masked altogether."""
    width = 900
    _, u, targets, _ = row_case(6, width, torch.float32, 0)
    u[2, 10] = u[2, 700] = 60.0
    bias = torch.zeros(width, device=DEVICE)
    bias[300:600] = float("-inf")
    targets = torch.tensor([5, 700, 10, 2, 899, -100], device=DEVICE)
    whole = sums_of(u, targets, bias=bias).finished(targets, width)
    joined = None
    for start in range(0, width, 300):
        part = slice(start, start + 300)
        sums = sums_of(u[:, part], targets, bias=bias[part], start=start)
        joined = sums if joined is None else joined.joined(sums)
    found = joined.finished(targets, width)
    assert found["is_top1"][2] and torch.equal(found["is_top1"], whole["is_top1"])
    for name in ("lse", "target_logit", "entropy", "log_sum_sq_probs"):
        check(found[name], whole[name].double().cpu(), 2e-6)
    assert (found["mean_logits"] == -torch.inf).all()
    entropy = stats_truth(u, LogitTransform(), bias)[0]
    check(found["entropy"], entropy, 2e-6)
    term = {"upstream": torch.ones(6, device=DEVICE), "entropy": found["entropy"]}
    row_stats.entropy_grad(
        u,
        targets,
        torch.zeros(6, device=DEVICE),
        found["lse"],
        tail=found["tail"],
        out=u,
        bias=bias,
        **term,
    )
    assert u.isfinite().all() and (u[:, 300:600] == 0).all()


@in_both_arithmetics
def test_the_entropy_of_peaked_rows_is_no_worse_than_in_float32_torch():
    """What rounding took from a logsumexp of 50 is more than the log-prob of the largest entry."""
    rows, width = 12, 300
    u = torch.randn(rows, width, generator=generator(3)).to(DEVICE)
    u[:, 7] = 50 + torch.arange(rows, device=DEVICE) / 7
    u[:, 9] = u[:, 7] - torch.linspace(0.5, 20, rows, device=DEVICE)
    targets = torch.full((rows,), -100, device=DEVICE)
    zeros, ones = torch.zeros(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    entropy, *_, slope = stats_truth(u, LogitTransform(), None)
    leaf = u.clone().requires_grad_()
    logps = torch.log_softmax(leaf, 1)
    eager = -(logps.exp() * logps).sum(1)
    (eager_slope,) = torch.autograd.grad(eager.sum(), leaf)
    found = sums_of(u, targets, ("moment",)).finished(targets, width)
    du = torch.empty_like(u)
    term = {"upstream": ones, "entropy": found["entropy"], "tail": found["tail"]}
    row_stats.entropy_grad(u, targets, zeros, found["lse"], out=du, **term)
    pairs = [(found["entropy"], eager.detach(), entropy), (du, eager_slope, slope)]
    for ours, theirs, exact in pairs:
        error, eager_error = [(x.double().cpu() - exact).abs().max() for x in (ours, theirs)]
        # An exponential of a GPU errs by 2^-22.
        assert error <= eager_error + 3e-7


# ---- one read ----


def one_read_of(u, targets, coef, out=None, **options):
    """Return ([C] log-probs, [C, V] float64 gradient) of one_read; E over the logits, or in out."""
    out = u if out is None else out
    logps, factors = one_read.one_read(u, targets, out=out, **options)
    return logps, out.double() * (coef.double() * factors.double()).unsqueeze(1)


# what is added to the targets' logits: log-probs from -1e-30 down to -400
BOOSTS = (120.0, 40.0, 0.0, -60.0, -130.0, -400.0)


@in_both_arithmetics
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, BLOCK, 3 * BLOCK + 5])
def test_one_read_is_exact_at_any_log_prob(width, grad, transform, softcap_error):
    """Beyond e^100 times the target's probability the shift moves, once or block after block."""
    rows = len(BOOSTS)
    buffer, u, targets, coef = row_case(rows, width, torch.float32, 0)
    targets.clamp_(0, width - 1)
    coef = torch.randn(rows, generator=generator(3)).to(DEVICE)
    u[torch.arange(rows), targets] += torch.tensor(BOOSTS, device=DEVICE)
    # The largest logits come last: every block moves the shift of the last rows.
    u += torch.arange(width, device=DEVICE) // BLOCK * 70.0 * (coef < 0).unsqueeze(1)
    bias = torch.randn(width, generator=generator(1)).to(DEVICE) if width > 1 else None
    options = {"bias": bias, **vars(transform)}
    lse, target_logit, du = truth(u, targets, transform, bias, 0, coef)
    beside = torch.empty(rows, width, dtype=grad, device=DEVICE)
    logps, apart = one_read_of(u.clone(), targets, coef, beside, **options)
    exact = 2e-6 if transform.softcap is None else softcap_error
    assert_close(logps.double().cpu(), target_logit - lse, rtol=5e-7, atol=exact)
    largest = du.abs().amax(1, keepdim=True).clamp_min(1e-15)
    rounded = ROUNDING[grad] + 30 * exact
    assert_close(apart.cpu() / largest, du / largest, rtol=rounded, atol=exact)

    over = rowgrad.overlay(u, grad)
    again, above = one_read_of(u, targets, coef, over, **options)
    assert torch.equal(again, logps) and torch.equal(above, apart), "the same blocks: the same bits"
    assert buffer[:, width:].isnan().all(), "the guard columns are as they were"


def test_one_read_of_a_target_that_is_not_there():
    """Masked: a log-prob of -inf, and no NaN in the gradient. Outside: no onehot."""
    u = torch.randn(2, 9, generator=generator()).to(DEVICE)
    u[0, 4] = float("-inf")
    targets = torch.tensor([4, 9], device=DEVICE)
    coef = torch.ones(2, device=DEVICE)
    logps, du = one_read_of(u.clone(), targets, coef)
    assert logps[0] == float("-inf")
    expected = -torch.softmax(u.double(), 1)
    expected[0, 4] = 1.0
    check(du, expected.cpu(), 1e-6)


def test_row_kernels_take_any_row_stride_and_no_rows():
    values = peaked(3, 37)
    u = torch.full((3, 2, 37), float("nan"), device=DEVICE)
    u[:, 1] = values
    targets = torch.tensor([0, 36, 5], device=DEVICE)
    check(rowgrad.row_logps(u[:, 1], targets)[0], torch.logsumexp(values.double(), 1), 1e-6)
    assert rowgrad.row_logps(u[:0, 1], targets[:0])[0].shape == (0,)


# ---- gather ----


@in_both_arithmetics
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (4, 9), (3, 2 * BLOCK + 1)])
def test_gather(rows, width, dtype, inplace):
    buffer, logits, targets, upstream = row_case(rows, width, dtype, 0)
    targets.clamp_(max=width - 1)
    # not zero where the target is -100
    upstream = torch.randn(rows, generator=generator(2)).to(DEVICE)
    raw = logits.double().cpu().requires_grad_()
    z, known = raw / 1.7, targets.cpu() != -100
    expected = torch.log_softmax(z, 1).gather(1, targets.cpu().clamp_min(0).unsqueeze(1)).squeeze(1)
    expected = torch.where(known, expected, 0.0)
    (grad,) = torch.autograd.grad(expected, raw, upstream.double().cpu())

    logps, lse = gather.gather_logps(logits, targets, 1.7)
    check(logps, expected.detach(), 2e-6)
    check(lse, torch.logsumexp(z.detach(), 1), 1e-6)
    # the gradient that .sum().backward() sends: every stride is 0
    ones = torch.ones((), device=DEVICE).expand(rows)
    assert gather.gather_logps_backward(logits, targets, lse, ones, 1.7).isfinite().all()
    out = logits if inplace else None
    actual = gather.gather_logps_backward(logits, targets, lse, upstream, 1.7, out=out)
    check(actual, grad, 2e-6)
    assert (actual.data_ptr() == logits.data_ptr()) == inplace
    assert buffer[:, width:].isnan().all()


def test_gather_of_a_target_outside_the_vocabulary_is_nan():
    """And reads no memory that is not the row's."""
    logps, lse = gather.gather_logps(
        torch.zeros(4, 9, device=DEVICE), torch.tensor([9, -1, 2**40, 3], device=DEVICE)
    )
    assert logps[:3].isnan().all() and lse.isfinite().all() and logps[3].isfinite()


# ---- fused linear ----


@in_both_arithmetics
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "entries", "stride"),
    [(1, 8, 1, 8), (17, 40, 33, 40), (16, 16, 32, 16), (37, 21, 70, 21), (5, 24, 95, 27)],
)
def test_linear_logps(rows, depth, entries, stride, dtype, transform, softcap_error):
    """Both paths: strides that are no multiple of 16 bytes have no tensor descriptors."""
    g = generator(entries)
    hidden = torch.full((rows, stride), float("nan"), dtype=dtype, device=DEVICE)
    weight = torch.full((entries, stride), float("nan"), dtype=dtype, device=DEVICE)
    hidden[:, :depth] = torch.randn(rows, depth, generator=g) * 3
    weight[:, :depth] = torch.randn(entries, depth, generator=g)
    hidden, weight = hidden[:, :depth], weight[:, :depth]
    bias = torch.randn(entries, generator=g).to(DEVICE, dtype) if entries % 2 else None
    targets = torch.randint(0, entries + 4, (rows,), generator=g).to(DEVICE)
    targets[-1] = -100
    targets[0] = entries - 1
    u = hidden.double() @ weight.double().T
    lse, target_logit, _ = truth(u, targets, transform, bias, 0, torch.ones(rows))

    options = {"bias": bias, **vars(transform)}
    actual = logp_partials.linear_logps(hidden, weight, targets, **options)
    exact = 5e-6 if transform.softcap is None else softcap_error
    check(actual[0], lse, exact)
    check(actual[1], target_logit, exact)


def test_linear_logps_uses_descriptors_only_where_they_fit():
    block = logp_partials.TINY
    fits = torch.zeros(4, 16, dtype=torch.float16)
    odd = torch.zeros(4, 17, dtype=torch.float16)[:, :16]
    assert logp_partials._descriptors("sm_90", block, fits, fits) is not None
    assert logp_partials._descriptors("sm_90", block, fits, odd) is None
    assert logp_partials._descriptors("sm_80", block, fits, fits) is None


def test_operands_that_are_loaded_number_by_number_get_tiles_that_do_not_spill():
    """The table of kernels_compile.py holds both. Workspace counts on one width of tiles."""
    fits = torch.zeros(64, 64, dtype=torch.float16)
    row = fits[:, 1:33]
    stride = torch.zeros(64, 70, dtype=torch.float16)[:, :64]
    depth = fits[:, :63]
    assert logp_partials._by_vectors(fits)
    for view in (row, stride, depth):
        assert not logp_partials._by_vectors(view)
    assert gemm._by_vectors(fits) and gemm._by_vectors(fits.T)
    for view in (fits[::2, ::2], row, stride.T):
        assert not gemm._by_vectors(view)
    for arch in logp_partials.NARROW:
        tiles = logp_partials.tiling(arch, torch.float16, by_vectors=False)
        assert tiles == logp_partials.NARROW["sm_80"]
    assert len({tiles.BV for tiles in logp_partials.NARROW.values()}) == 1


def test_linear_logps_with_a_vocabulary_tile_of_minus_infinity():
    """Padding entries of a vocabulary may be masked by a bias of -inf."""
    g = generator(4)
    hidden = torch.randn(3, 16, generator=g).to(DEVICE)
    weight = torch.randn(200, 16, generator=g).to(DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    bias = torch.zeros(200, device=DEVICE)
    bias[64:] = float("-inf")
    lse, _ = logp_partials.linear_logps(hidden, weight, targets, bias=bias)
    check(lse, torch.logsumexp((hidden.double() @ weight[:64].double().T).cpu(), 1), 5e-6)


def test_merge_over_many_vocabulary_tiles():
    """More vocabulary tiles than one block of the merge holds, one of them all -inf."""
    tiles = logp_partials.MERGE_TILES
    partial = torch.randn(tiles * 2 + 3, 45, generator=generator(6)).to(DEVICE) * 20
    partial[1] = float("-inf")
    lse = torch.empty(45, device=DEVICE)
    logp_partials.merge_kernel[(2,)](partial, lse, 45, len(partial), ROWS=32, TILES=tiles)
    check(lse, torch.logsumexp(partial.double().cpu(), 0), 1e-6)


# ---- loss kernel ----

LENGTHS = torch.tensor([5, 1, 9000, 130, 3, 17, 8])


def table_of(
    feedback: Feedback, objective: Objective, denominator: float = 1.0, lengths=LENGTHS
) -> una_loss.UnitTable:
    return una_loss.unit_table(
        **vars(feedback),
        lengths=lengths,
        beta=objective.beta,
        constant=objective.offset,
        length_normalize=objective.length_normalize,
        denominator=denominator,
        device=DEVICE,
    )


def feedback_of(kind: str, form: str) -> Feedback:
    """Return units of one kind that share responses, not in the order of the responses."""
    weight = [0.5, 2.0, 1.0, 0.0]
    offset = [0.3, -1.0, 0.0, 2.0]
    if kind == "pair":
        return Feedback.pairs(
            [4, 0, 0, 1], [0, 2, 4, 5], margin=offset, weight=weight, target=[1.0, 0.8, 0.5, 0.0]
        )
    if kind == "binary":
        return Feedback.binary(
            [4, 0, 0, 1], [True, False, True, True], weight=weight, offset=offset
        )
    score = [0.1, 0.9, 0.5, 1.0] if form != "reward_mse" else [-3.0, 40.0, 0.5, 1.0]
    return Feedback.scores([4, 0, 0, 1], score, weight=weight, offset=offset)


FORMS = [
    *(("pair", form) for form in losses.PAIR_FORMS),
    *(("binary", form) for form in losses.BINARY_FORMS),
    *(("score", form) for form in losses.SCORE_FORMS),
]


@pytest.mark.parametrize(
    ("spread", "normalize"), [(1.0, True), (400.0, False)], ids=["usual", "saturated"]
)
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_loss_kernel_has_every_form_of_losses(kind, form, normalize, spread):
    """Value and derivative of each form against losses.py by autograd.

    A new form in losses.py fails here until the kernel has it.
    """
    g = generator(7)
    logps = (torch.randn(7, generator=g, dtype=torch.float64) * 10 * spread).to(DEVICE)
    ref = (torch.randn(7, generator=g, dtype=torch.float64) * 10).to(DEVICE)
    objective = Objective(**{kind: form}, beta=0.37, offset=0.21, length_normalize=normalize)
    feedback = feedback_of(kind, form)
    leaf = logps.clone().requires_grad_()
    expected = losses.una_loss(
        leaf, ref, feedback, objective=objective, num_units=3, lengths=LENGTHS
    )
    (coef,) = torch.autograd.grad(expected.loss, leaf)

    forms = {"pair": objective.pair, "binary": objective.binary, "score": objective.score}
    actual = una_loss.una_losses(logps, ref, table_of(feedback, objective, 3), **forms)
    exact = {"rtol": 1e-13, "atol": 1e-14}
    assert_close(actual.loss, expected.loss.detach(), **exact)
    assert_close(actual.unit_losses, expected.unit_losses, **exact)
    assert_close(actual.rewards, expected.rewards, **exact)
    assert_close(actual.coef, coef, **exact)


def test_loss_kernel_mixes_kinds_and_takes_the_denominator_from_the_device():
    g = generator(8)
    objective = Objective(score="reward_mse")
    tables = [feedback_of(kind, "reward_mse") for kind in ("score", "pair", "binary")]
    feedback = Feedback.merge(tables * 11)
    assert feedback.num_units > una_loss.BLOCK, "more than one block of units"
    logps = torch.randn(7, generator=g, dtype=torch.float64).to(DEVICE) * 9
    ref = torch.randn(7, generator=g, dtype=torch.float64).to(DEVICE) * 9
    leaf = logps.clone().requires_grad_()
    expected = losses.una_loss(leaf, ref, feedback, objective=objective, num_units=11)
    (coef,) = torch.autograd.grad(expected.loss, leaf)
    actual = una_loss.una_losses(
        logps,
        ref,
        table_of(feedback, objective),
        pair="logistic",
        binary="bce",
        score="reward_mse",
        denominator=torch.tensor(11, device=DEVICE),
    )
    assert_close(actual.loss, expected.loss.detach(), rtol=1e-13, atol=0)
    assert_close(actual.coef, coef, rtol=1e-12, atol=1e-14)
    assert coef[3] == 0 and actual.coef[3] == 0, "a response in no unit"


def test_loss_kernel_without_units_or_responses():
    lengths = torch.empty(0, dtype=torch.int64)
    table = table_of(Feedback.merge([]), Objective(), lengths=lengths)
    empty = torch.zeros(0, dtype=torch.float64, device=DEVICE)
    actual = una_loss.una_losses(empty, empty, table, pair="logistic", binary="bce", score="mse")
    assert actual.loss.item() == 0 and actual.coef.shape == actual.unit_losses.shape == (0,)
    cu = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert una_loss.segment_sums(empty.float(), cu).shape == (0,)


def test_loss_kernel_refuses_a_form_it_lacks():
    zeros = torch.zeros(7, dtype=torch.float64, device=DEVICE)
    table = table_of(feedback_of("pair", "logistic"), Objective())
    with pytest.raises(ValueError, match="cubic"):
        una_loss.una_losses(zeros, zeros, table, pair="cubic", binary="bce", score="mse")


def test_segment_sums():
    """float64 over float32 tokens; a response longer than a block; no token of a neighbour."""
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).to(DEVICE)
    tokens = -10 * torch.rand(int(LENGTHS.sum()), generator=generator(9)).to(DEVICE)
    expected = torch.stack([x.sum() for x in tokens.double().split(LENGTHS.tolist())])
    assert_close(una_loss.segment_sums(tokens, cu), expected, rtol=1e-14, atol=0)


# ---- GEMM ----


# On a GPU tiles are larger, and every layout of a shape is compiled.
SHAPES = [(256, 128, 64), (1100, 300, 150)] if CUDA else [(1, 1, 1), (37, 70, 21), (5, 130, 40)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemm_of_any_strides(m, n, k, dtype, transposed, accumulate):
    g = generator(m)
    a = torch.randn(m, k, generator=g).to(DEVICE, dtype)
    b = torch.randn(k, n, generator=g).to(DEVICE, dtype)
    if transposed:
        a = a.T.contiguous().T
        b = b.T.contiguous().T
    out = torch.full((m, n + 3), float("nan"), device=DEVICE)
    expected = a.double() @ b.double()
    if accumulate:
        out[:, :n] = torch.randn(m, n, generator=g).to(DEVICE)
        expected += out[:, :n]
    gemm.mm(a, b, out[:, :n], accumulate=accumulate)
    check(out[:, :n], expected.cpu(), 1e-4 if CUDA else 1e-5)
    assert out[:, n:].isnan().all()


# ---- extreme shapes ----


def test_no_rows_launch_nothing(monkeypatch):
    """A launch of no programs is an error on a GPU; the interpreter takes it."""
    for module, name in (
        (rowgrad, "rows_kernel"),
        (row_stats, "row_sums_kernel"),
        (row_stats, "entropy_grad_kernel"),
        (gather, "gather_kernel"),
        (gather, "gather_backward_kernel"),
        (logp_partials, "partials_kernel"),
        (logp_partials, "merge_kernel"),
        (gemm, "mm_kernel"),
    ):
        monkeypatch.setattr(module, name, None)
    logits = torch.zeros(0, 9, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(5, 9, dtype=torch.float16, device=DEVICE)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    none = torch.zeros(0, device=DEVICE)
    stats = rowgrad.row_logps(logits, targets)
    rowgrad.row_grad(logits, targets, none, stats[0], out=logits)
    scores = one_read.one_read(logits, targets, out=logits.float())
    both = gather.gather_logps(logits, targets)
    linear = logp_partials.linear_logps(logits, weight, targets)
    sums = row_stats.row_sums(logits.float(), targets, ("moment",))
    term = dict.fromkeys(("upstream", "entropy", "tail"), none)
    row_stats.entropy_grad(logits.float(), targets, none, none, out=logits.float(), **term)
    for x in (*stats, *scores, *both, *linear, *sums.values()):
        assert x.shape == (0,) and x.dtype == torch.float32
    for out in (None, logits):
        grad = gather.gather_logps_backward(logits, targets, none, none, out=out)
        assert grad.shape == (0, 9) and grad.dtype == torch.float16
    assert gemm.mm(logits, logits.T[:, :0], torch.zeros(0, 0, device=DEVICE)).shape == (0, 0)


def far_apart(stride: int, dtype: type = np.float16) -> torch.Tensor:
    """Return [3, 192] of a dtype, the last row some 2^31 elements behind the first.

    Memory between the rows is never touched, so a CPU does not spend it.
    """
    storage = torch.from_numpy(np.empty(2 * stride + 192, dtype=dtype)).to(DEVICE)
    return storage.as_strided((3, 192), (stride, 1))


FAR = 2**30 + 64


def test_offsets_beyond_32_bits():
    """A 32-bit product of row and stride would reach foreign memory."""
    width = 70
    u = far_apart(FAR)[:, :width]
    u.copy_(peaked(3, width))
    kept = u.clone()
    targets = torch.tensor([3, 4, 69], device=DEVICE)
    coef = torch.tensor([1.0, -2.0, 3.0], device=DEVICE)
    lse, target_logit, du = truth(u, targets, LogitTransform(), None, 0, coef)
    logps, sums = gather.gather_logps(u, targets)
    check(logps, target_logit - lse, 1e-5)
    check(sums, lse, 1e-5)
    stats = rowgrad.row_logps(u, targets)
    check(stats[0], lse, 1e-3)
    check(stats[1], target_logit, 1e-3)
    rowgrad.row_grad(u, targets, coef, stats[0], out=u)
    check(u, du, 1e-3)
    u.copy_(kept)
    wide = torch.empty(3, u.shape[1], device=DEVICE)
    logps, apart = one_read_of(u, targets, coef, wide)
    check(logps, target_logit - lse, 1e-5)
    check(apart, du, 1e-5)
    u.copy_(kept)
    check(gather.gather_logps_backward(u, targets, sums, coef, out=u), du, 1e-3)


def test_offsets_of_statistics_beyond_32_bits():
    width = 70
    u = far_apart(FAR, np.float32)[:, :width]
    u.copy_(peaked(3, width))
    targets = torch.tensor([3, 4, 69], device=DEVICE)
    zeros, ones = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    entropy, squares, _, _, slope = stats_truth(u, LogitTransform(), None)
    found = sums_of(u, targets).finished(targets, width)
    check(found["entropy"], entropy, 1e-5)
    check(found["log_sum_sq_probs"], squares, 1e-5)
    term = {"upstream": ones, "entropy": found["entropy"], "tail": found["tail"]}
    row_stats.entropy_grad(u, targets, zeros, found["lse"], out=u, **term)
    check(u, slope, 1e-5)


@pytest.mark.parametrize("stride", [FAR, FAR + 1], ids=["descriptors", "pointers"])
def test_linear_offsets_beyond_32_bits(stride):
    """Of hidden states and of vocabulary entries."""
    both = far_apart(stride)
    hidden, weight = both[:, :24], both[:, 128:152]
    hidden.copy_(torch.randn(3, 24, generator=generator(1)) * 3)
    weight.copy_(torch.randn(3, 24, generator=generator(2)))
    targets = torch.tensor([2, 0, 1], device=DEVICE)
    product = (hidden.double() @ weight.double().T).cpu()
    lse, target_logit = logp_partials.linear_logps(hidden, weight, targets)
    check(lse, torch.logsumexp(product, 1), 5e-6)
    check(target_logit, product.gather(1, targets.cpu().unsqueeze(1)).squeeze(1), 5e-6)
    out = torch.zeros(3, 3, device=DEVICE)
    check(gemm.mm(hidden, weight.T, out), product, 1e-4 if CUDA else 1e-5)
