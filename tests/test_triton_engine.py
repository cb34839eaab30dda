"""The whole op on the Triton engine: in Triton's interpreter, or on a GPU where there is one.

The interpreter runs the kernels, with the arithmetic of a GPU (interpreter.py). What torch.mm does
on CUDA with narrow operands (float32 out of bfloat16) is done here in float32. So the loop, the
plan with padded rows, the gradient over the logits' storage and the loss kernel are those of a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from head_calls import CALLS, GPU_DIM, GPU_SIZE, check_capture, check_repeats, check_under
from helpers import (
    LEAVES,
    MIXED,
    PAIR,
    assert_close,
    errors,
    evaluate,
    kinds,
    problem,
    reference,
    relative_error,
    truth,
)
from una_fast.counters import LiveBytes

pytest.importorskip("triton")
from una_fast.kernels import one_read, rowgrad, una_loss

import interpreter
from una_fast import (
    Feedback,
    Objective,
    gather_logps,
    linear_una_loss,
    sequence_logps,
    token_logps,
)
from una_fast.group import Group
from una_fast.head import constants, eager, ops, passes, segment_loss, torch_engine
from una_fast.head.engines import choose_engine
from una_fast.head.plan import Tile, head_size, make_plan
from una_fast.head.row_stats import STATS
from una_fast.head.triton_engine import TritonEngine, TritonSegmentLoss
from una_fast.losses import PAIR_FORMS

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log"),
    # in the branch that tl.where does not take
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply"),
    pytest.mark.skipif(CUDA, reason="tests/test_gpu.py runs the engine itself"),
]


class Interpreted(TritonEngine):
    """The engine on CPU tensors: its kernels in the interpreter, its GEMMs in float32."""

    products = 0

    def _mm(self, a, b, out, accumulate=False):
        Interpreted.products += 1
        assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32), (
            "operands are never cast"
        )
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    interpreter.mend(monkeypatch, approximate=True)
    for module in (passes, ops):
        monkeypatch.setattr(module, "choose_engine", lambda name, device, dtype: Interpreted)
    monkeypatch.setattr(
        Interpreted, "machine", None
    )  # tiny shapes: the cost model would slice them all
    # A row of 101 logits is one ragged block, as in the blocks of a GPU, whose other columns are
    # masked and would take most of the interpreter's time. Kernel tests have rows of many blocks.
    for launch in (rowgrad.LAUNCH, one_read.LAUNCH):
        monkeypatch.setitem(launch, "BLOCK", 128)
    return Interpreted


@pytest.fixture
def plans(monkeypatch):
    made, make_plan = [], passes.make_plan
    monkeypatch.setattr(
        passes, "make_plan", lambda *a, **k: made.append(make_plan(*a, **k)) or made[-1]
    )
    return made


def budget_mb(
    rows: float,
    vocab: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    gathered: bool = True,
    trained: bool = True,
) -> float:
    """A budget that holds `rows` rows of logits."""
    p = problem(0, dim=dim, vocab=vocab, dtype=dtype, lengths=[1], feedback=Feedback.merge([]))
    size = Interpreted(p.weight, None, None, 1).size()
    return (rows * size.row_bytes(gathered, trained) + 8) / 2**20


CALL_NAMES = [
    "resident pairs",
    "streamed pair",
    "vocabulary in slices",
    "mixed feedback",
    "mixed in every way",
]


@pytest.mark.parametrize("way", CALL_NAMES)
def test_every_way_in_float32(way, plans):
    call = CALLS[way]
    p = problem(
        1,
        lengths=call.lengths,
        dim=call.dim,
        vocab=101,
        feedback=call.feedback,
        dtype=torch.float32,
    )
    arguments = {
        **reference(p, "own"),
        "objective": Objective(score="bce", offset=0.1),
        "upstream": 3.7,
        "softcap": 30.0,
        "logit_scale": 1.7,
        "temperature": 1.3,
    }
    budget = budget_mb(call.rows, 101, call.dim)
    out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
    assert_close(out, truth(p, **arguments), 2e-5)
    assert kinds(plans[-1], 101) == frozenset(call.kinds.split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["streamed pair", "mixed in every way"])
def test_narrow_operands_are_no_worse_than_eager(way, dtype):
    """GEMMs read bfloat16 as it is; float16 is cast to float32 slice by slice."""
    call = CALLS[way]
    budget = budget_mb(call.rows, 101, call.dim, dtype)
    ours, theirs = {}, {}
    for seed, train in product(range(2), (LEAVES, ("hidden",))):
        p = problem(
            seed,
            lengths=call.lengths,
            dim=call.dim,
            vocab=101,
            feedback=call.feedback,
            dtype=dtype,
            peak=20.0,
        )
        arguments = {**reference(p, ("cached", "own")[seed % 2]), "train": train}
        exact = truth(p, **arguments)
        out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
        for worst, result in (
            (ours, out),
            (theirs, evaluate(eager.linear_una_loss, p, **arguments)),
        ):
            for name, error in errors(result, exact).items():
                worst[name] = max(worst.get(name, 0.0), error)
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > theirs[name] + 1e-9}
    assert not worse, f"(ours, eager): {worse}"


@pytest.mark.parametrize(
    ("rows", "normalize", "lengths"), [(20, True, (13, 12)), (0.4, False, (5, 4))]
)
def test_float16_with_small_coefficients(rows, normalize, lengths):
    """A coefficient of a large batch times a small probability underflows in float16, and a loss
    scale comes too late for gradients that the forward pass has built: streamed and sliced."""
    p = problem(0, lengths=lengths, dim=8, vocab=400, feedback=PAIR, dtype=torch.float16, peak=3.0)
    scale = 65536.0
    arguments = {
        **reference(p, "cached"),
        "objective": Objective(length_normalize=normalize),
        "num_units": 1000,
        "upstream": scale,
    }
    exact = truth(p, **arguments)
    budget = budget_mb(rows, 400, 8, torch.float16, gathered=False)
    out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
    for name in ("grad hidden", "grad weight", "grad bias"):
        assert relative_error(out[name], exact[name]) < 2e-3, name


@pytest.mark.parametrize("layout", ["column", "expanded"])
def test_cached_reference_of_any_stride(layout):
    p = problem(0, lengths=[4, 3], dtype=torch.float32, feedback=PAIR)
    table = torch.tensor([[-300.0, 7.0], [-290.0, 9.0]], dtype=torch.float64)
    ref = table[:, 0] if layout == "column" else table[0, :1].expand(2)
    arguments = {"ref_logps": ref, "train": ("hidden",)}
    assert_close(evaluate(linear_una_loss, p, **arguments), truth(p, **arguments), 2e-5)


def test_rows_are_padded_and_gradients_lie_over_the_logits():
    p = problem(0, vocab=101, dtype=torch.bfloat16)
    one = passes.Head(p.weight, None, torch_engine.LogitTransform(), 1.0, "triton")
    u = one.logits(p.hidden[:3], (0, 101), Tile(3, 101))
    assert u.shape == (3, 101) and u.stride() == (128, 1) and u.dtype == torch.float32
    du = one.engine.row_grad_(u, p.targets[:3], (0, 101), torch.ones(3), torch.logsumexp(u, 1))
    assert du.dtype == torch.bfloat16 and du.data_ptr() == u.data_ptr() and du.stride() == (256, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1000, 5, 0.8])
@pytest.mark.parametrize("stats", [(), STATS], ids=["plain", "stats"])
def test_token_logps(rows, dtype, stats):
    """All logits kept, some kept, and slices of the vocabulary."""
    p = problem(2, lengths=[11], dim=24, vocab=101, dtype=dtype, peak=10.0)
    workspace_mb = budget_mb(rows, 101, 24, dtype, gathered=False)
    p.targets[3] = -100
    leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    exact = [x.double().detach().requires_grad_() for x in leaves]
    g = torch.Generator().manual_seed(0)
    upstream = torch.randn(11, generator=g, dtype=torch.float64)
    of_entropy = torch.randn(11, generator=g, dtype=torch.float64)
    options = {"softcap": 30.0, "workspace_mb": workspace_mb, "stats": stats}
    found = token_logps(leaves[0], leaves[1], p.targets, leaves[2], **options)
    out, statistics = found if stats else (found, {})
    given = (exact[0], exact[1], p.targets, exact[2])
    expected = eager.token_logps(*given, softcap=30.0)
    true = eager.token_stats(*given, softcap=30.0) if stats else {}
    ours, truth_ = (out * upstream.float()).sum(), (expected * upstream).sum()
    if stats:
        ours = ours + (statistics["entropy"] * of_entropy.float()).sum()
        truth_ = truth_ + (true["entropy"] * of_entropy).sum()
        assert torch.equal(statistics["is_top1"], true["is_top1"])
    ours.backward()
    truth_.backward()
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(leaves, exact, strict=True))]
    pairs += [(statistics[name], true[name]) for name in stats if name != "is_top1"]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stats", [(), ("entropy",)], ids=["plain", "entropy"])
@pytest.mark.parametrize("rows", [1000, 9])
def test_kept_logits_change_no_bit_and_save_a_product(rows, stats, monkeypatch):
    """All 17 rows are kept, or 9 of them."""
    p = problem(2, lengths=[17], dim=24, vocab=101, dtype=torch.bfloat16, peak=10.0)
    workspace_mb = budget_mb(rows, 101, 24, torch.bfloat16, gathered=False)

    def grads() -> tuple[int, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight)]
        found = token_logps(*leaves, p.targets, workspace_mb=workspace_mb, stats=stats)
        out = found[0] + found[1]["entropy"] if stats else found
        before = Interpreted.products
        found = torch.autograd.grad(out.square().sum(), leaves)
        return Interpreted.products - before, list(found)

    products, kept = grads()
    monkeypatch.setattr(passes.Head, "keep_buffer", lambda head: not head.drop_buffer())
    again, recomputed = grads()
    assert again == products + 1
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("rows", [1000, 9, 0.8])
def test_sequence_logps_in_one_launch_of_sums(rows):
    p = problem(2, lengths=[9, 8], dim=24, vocab=101, dtype=torch.float32, peak=10.0)
    leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight)]
    exact = [x.double().detach().requires_grad_() for x in leaves]
    workspace_mb = budget_mb(rows, 101, 24, gathered=False)
    sums = sequence_logps(*leaves, p.targets, p.cu_seqlens, workspace_mb=workspace_mb)
    tokens = eager.token_logps(*exact, p.targets)
    expected = torch.stack([part.sum() for part in tokens.split([9, 8])])
    upstream = torch.tensor([1.0, -2.5], dtype=torch.float64)
    found = torch.autograd.grad(sums, leaves, upstream)
    true = torch.autograd.grad(expected, exact, upstream)
    for a, b in zip((sums, *found), (expected, *true), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("way", CALL_NAMES)
def test_ignored_rows_of_the_loss(way):
    call = CALLS[way]
    p = problem(
        1,
        lengths=call.lengths,
        dim=call.dim,
        vocab=101,
        feedback=call.feedback,
        dtype=torch.float32,
    )
    p.targets[::3] = -100
    arguments = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "softcap": 30.0}
    budget = budget_mb(call.rows, 101, call.dim)
    out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
    assert_close(out, truth(p, **arguments), 2e-5)
    assert (out["grad hidden"][::3] == 0).all()


@pytest.mark.parametrize("layout", ["matrix", "shifted", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gather_logps(layout, inplace):
    base = (
        torch.randn(
            2, 6, 2300 if layout == "matrix" else 37, generator=torch.Generator().manual_seed(1)
        )
        * 8
    )
    targets = torch.randint(0, base.shape[-1], (2, 6))
    targets[0, 1] = -100
    if layout == "transposed":
        logits = base.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        logits = base[:, :-1] if layout == "shifted" else base
    targets = targets[:, : logits.shape[1]]
    exact = logits.double().requires_grad_()
    expected = eager.gather_logps(exact, targets, 1.7)
    expected.backward(torch.ones_like(expected) * 0.3)
    leaf = base.clone().requires_grad_()
    given = (leaf[:, :-1] if layout == "shifted" else leaf) * 1.0
    out = gather_logps(given, targets, 1.7, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(out, given, torch.full_like(out, 0.3))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert (grad.data_ptr() == given.data_ptr()) == inplace


def test_a_form_without_a_kernel_runs_losses_py(monkeypatch):
    monkeypatch.setitem(PAIR_FORMS, "cubic", lambda x, margin: (x - margin) ** 3)
    p = problem(3, lengths=(4, 3), feedback=PAIR, dtype=torch.float32)
    arguments = {**reference(p, "cached"), "objective": Objective(pair="cubic")}
    assert_close(evaluate(linear_una_loss, p, **arguments), truth(p, **arguments), 2e-4)


class OfTwo(Group):
    """The first of two ranks; the other one has as much of every sum."""

    def sum(self, values):
        return values.mul_(2.0)


@pytest.mark.parametrize("units", [None, 3, torch.tensor(11)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("group", [Group(), OfTwo(0, 2)], ids=["alone", "group"])
def test_the_loss_of_a_call_equals_that_of_pure_torch(reduction, units, group):
    g = torch.Generator().manual_seed(5)
    cu, whole = [0, 5, 8, 15, 19, 25, 33, 38, 47], None
    if group.size == 2:  # without rows of responses 2 and 5 here
        cu, whole = [0, 5, 8, 8, 19, 33, 33, 38, 47], [10, 6, 7, 22, 28, 3, 10, 18]
    lengths = segment_loss.Lengths(cu, torch.device("cpu"), group, whole)
    tokens = -10 * torch.rand(47, generator=g)
    ref = -40 * torch.rand(8, generator=g, dtype=torch.float64)
    objective = Objective(offset=0.2, length_normalize=True)
    both = [
        kind(lengths, ref, MIXED, objective, reduction, units)
        for kind in (segment_loss.SegmentLoss, TritonSegmentLoss)
    ]
    for a, b in zip(both[0].output(tokens), both[1].output(tokens), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert not b.requires_grad
    torch.testing.assert_close(
        both[0].coefficients(tokens), both[1].coefficients(tokens), rtol=1e-12, atol=1e-14
    )
    assert both[1].output(tokens).ref_logps.data_ptr() != ref.data_ptr()


def test_a_repeated_call_copies_nothing_to_the_device(monkeypatch):
    """What makes CUDA graph capture possible:
    lengths and units come from the first call's tensors.
    """
    p = problem(0, dtype=torch.float32)
    arguments = reference(p, "cached")
    first = evaluate(linear_una_loss, p, **arguments)

    def no_table(*_, **__):
        raise AssertionError("built again")

    monkeypatch.setattr(una_loss, "unit_table", no_table)
    misses = constants.constant.cache_info().misses
    second = evaluate(linear_una_loss, p, **arguments)
    assert constants.constant.cache_info().misses == misses
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(AssertionError, match="built again"):
        evaluate(linear_una_loss, replace(p, feedback=Feedback.pairs([0], [1])), **arguments)


def test_constants_made_in_inference_mode_serve_training():
    constants.constant.cache_clear()
    p = problem(0, dtype=torch.float32, lengths=[3, 4], feedback=PAIR)
    arguments = {**reference(p, "cached"), "objective": Objective(length_normalize=True)}
    with torch.inference_mode():
        linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **arguments)
    assert_close(evaluate(linear_una_loss, p, **arguments), truth(p, **arguments), 2e-5)


def test_policy_and_reference_that_share_a_head_are_one_product_in_evaluation():
    p = problem(4, lengths=[6, 5], dim=24, vocab=101, dtype=torch.float32, feedback=PAIR)
    exact = truth(p, ref_hidden=p.ref_hidden, bias=False)
    for rows, products in ((22, 1), (21, 2)):
        Interpreted.products = 0
        with torch.no_grad():
            out = linear_una_loss(
                p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback,
                ref_hidden=p.ref_hidden, workspace_mb=budget_mb(rows, 101, 24, trained=False),
            )  # fmt: skip
        assert Interpreted.products == products
        for name in ("loss", "logps", "ref_logps"):
            torch.testing.assert_close(getattr(out, name), exact[name], rtol=1e-5, atol=1e-5)


def test_the_budget_holds_with_padded_rows():
    """Row strides are multiples of 64 logits:
    at a vocabulary of 101 that is a quarter more than the logits.
    """
    p = problem(0, lengths=[130, 90], dim=4, vocab=101, dtype=torch.float16, feedback=PAIR)
    budget = budget_mb(64, 101, 4, torch.float16, gathered=False)
    p.hidden.requires_grad_(), p.weight.requires_grad_()
    with LiveBytes() as memory:
        ref = {"ref_logps": torch.zeros(2, dtype=torch.float64)}
        out = linear_una_loss(
            p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, workspace_mb=budget, **ref
        )
    built = [x for x in out.loss.grad_fn.grads if x is not None]
    emulation = 2 * 64 * 101 * 4 + 101 * 4 * 4  # float32 products of the GEMMs above
    assert memory.peak(excluding=built) <= budget * 2**20 + 40 * 220 + emulation
    assert memory.largest(excluding=built) <= budget * 2**20


# --- what test_gpu.py runs large ------------------------------------------------------------------


def rerun(step):
    """In place of a CUDA graph: the step once more, into what it returned first."""
    kept = step()

    def replay():
        for result, again in zip(kept, step(), strict=True):
            result.copy_(again)

    return replay, kept


@pytest.mark.parametrize("name", CALLS)
def test_checks_of_the_gpu_tests(name, plans):
    """Their bodies in the interpreter. That no step waits for the device is for a GPU to show."""
    p, arguments = CALLS[name].drawn(
        1, CALLS[name].dim, 101, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    check_repeats(p, arguments, times=2)
    assert kinds(plans[0], 101) >= frozenset(CALLS[name].kinds.split())
    check_under(nullcontext, p, arguments, times=1)
    check_capture(rerun, p, arguments, factors=(-0.7,))


@pytest.mark.parametrize("vocab", [5003, 10_007, 50_257])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_gpu_tests_go_their_way_at_full_size(name, vocab):
    """By the cost model of a GPU, which the small ones leave out."""
    call, size = CALLS[name], head_size(vocab, GPU_DIM, "cuda", operand_bytes=2)
    plan = make_plan(
        call.feedback,
        [GPU_SIZE * n for n in call.lengths],
        size,
        budget=call.budget(GPU_SIZE, size),
        accumulator_width=GPU_DIM if "weight" in call.train else 0,
        length_normalize=False,
    )
    assert kinds(plan, vocab) >= frozenset(call.kinds.split())


# --- GEMM without cuBLAS --------------------------------------------------------------------------


def test_where_torch_cannot_widen_the_engine_multiplies_itself(monkeypatch):
    """ROCm: the same results through our own GEMM."""
    monkeypatch.setattr(Interpreted, "_mm", TritonEngine._mm)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    p = problem(1, lengths=(9, 8), dim=24, vocab=101, feedback=PAIR, dtype=torch.float16, peak=10.0)
    arguments = {**reference(p, "cached"), "train": ("weight",)}
    out = evaluate(
        linear_una_loss, p, workspace_mb=budget_mb(4, 101, 24, torch.float16), **arguments
    )
    assert_close(out, truth(p, **arguments), 2e-3)


# --- choosing an engine ---------------------------------------------------------------------------


def test_choice_of_the_engine(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("una_fast.head.engines._no_triton", lambda device: None)
    assert (
        choose_engine("auto", cuda, torch.bfloat16)
        is choose_engine("triton", cuda, torch.float32)
        is TritonEngine
    )
    assert choose_engine("torch", cuda, torch.bfloat16).name == "torch"
    assert choose_engine("auto", cuda, torch.float64).name == "torch"
    with pytest.raises(ValueError, match="float64"):
        choose_engine("triton", cuda, torch.float64)
    monkeypatch.setattr(
        "una_fast.head.engines._no_triton", lambda device: "Triton cannot be imported (no module)"
    )
    with pytest.raises(ValueError, match="cannot be imported"):
        choose_engine("triton", cuda, torch.bfloat16)
    assert choose_engine("auto", cuda, torch.bfloat16).name == "torch"
