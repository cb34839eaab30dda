"""The ops of the head against full-logit autograd in float64, on every way through the plan."""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from helpers import (
    LEAVES,
    MIXED,
    PAIR,
    WAYS,
    Problem,
    assert_close,
    cast,
    errors,
    evaluate,
    kinds,
    naming,
    problem,
    reference,
    relative_error,
    truth,
)
from una_fast import (
    Feedback,
    Objective,
    gather_logps,
    linear_una_loss,
    sequence_logps,
    token_logps,
    una_loss,
)
from una_fast.counters import LiveBytes
from una_fast.head import eager, passes, plan, torch_engine
from una_fast.head.plan import Plan
from una_fast.head.torch_engine import LogitTransform, TorchEngine, one_read_
from una_fast.logs import say_once
from una_fast.losses import BINARY_FORMS, PAIR_FORMS, SCORE_FORMS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
WIDE = tuple(TOLERANCE)
NARROW = (torch.bfloat16, torch.float16)
TRAINED = (LEAVES, ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"))
TRANSFORMS = (
    {},
    {"softcap": 5.0},
    {"logit_scale": 0.3},
    {"temperature": 0.7},
    {"softcap": 30.0, "logit_scale": 1.7, "temperature": 1.3},
)


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """The plans that the calls of a test followed."""
    made = []
    make_plan = passes.make_plan

    def recording(*args, **kwargs):
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(passes, "make_plan", recording)
    return made


def workspace_bytes(monkeypatch, size: int) -> None:
    """token_logps has no workspace_mb: change the default."""
    monkeypatch.setitem(plan.DEFAULT_WORKSPACE_MB, "cpu", size / 2**20)


# --- linear_una_loss = eager ----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", WIDE)
def test_every_way_through_the_plan(way, dtype, plans):
    """Each case is a way; the plan is asserted: a changed heuristic cannot empty the test."""
    way = WAYS[way]
    p = way.problem(dtype=dtype)
    cases = list(product(TRAINED, (False, True)))
    if dtype == torch.float32:  # the same branches as in float64: each leaf set, either mean or sum
        cases = [(train, bool(k % 2)) for k, train in enumerate(TRAINED)]
    for k, (train, normalize) in enumerate(cases):
        budget = way.workspace_mb(dtype, trained="weight" in train or "bias" in train)
        arguments = {
            "objective": Objective(score="bce", offset=0.1, length_normalize=normalize),
            **reference(p, ("cached", "own", "policy")[k % 3]),
            **TRANSFORMS[k % len(TRANSFORMS)],
        }
        out = evaluate(linear_una_loss, p, train=train, workspace_mb=budget, **arguments)
        assert_close(out, truth(p, train=train, **arguments), TOLERANCE[dtype])
        frozen = (way.kinds & {"sliced", "unscored"}) | (
            {"recomputed"} if "sliced" in way.kinds else {"streamed"}
        )
        found = kinds(plans[-1], 101)
        if train == ("hidden",):
            assert found - {"scratch"} == frozen
        elif (
            "weight" in train
        ):  # accumulators of the bias alone are small enough to stream everything
            assert found == way.kinds


FORMS = list(product(PAIR_FORMS, BINARY_FORMS, SCORE_FORMS))


def test_every_objective_form():
    way = WAYS["mixed, all at once"]
    p = way.problem(dtype=torch.float64, seed=1)
    for k, forms in enumerate(FORMS):
        with naming(forms=forms):
            objective = Objective(0.3, *forms, offset=-0.2, length_normalize=bool(k % 2))
            arguments = {"objective": objective, **reference(p, "own")}
            budget = way.workspace_mb(torch.float64)
            out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
            assert_close(out, truth(p, **arguments), 1e-10)


def test_every_logit_transform_without_a_bias():
    way = WAYS["mixed, all at once"]
    p = way.problem(dtype=torch.float64, seed=2)
    for transform in TRANSFORMS:
        with naming(transform=transform):
            arguments = {**reference(p, "policy"), **transform, "bias": False}
            budget = way.workspace_mb(torch.float64)
            out = evaluate(linear_una_loss, p, workspace_mb=budget, **arguments)
            assert_close(out, truth(p, **arguments), 1e-10)


@pytest.mark.parametrize("dtype", WIDE)
def test_the_slope_of_the_softcap_at_both_caps(dtype):
    """1 - tanh(x)^2 cancels near the cap: the slope was wrong by 1 % at |x| = 6, and 0 at 9."""
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    transform = LogitTransform(softcap=30.0, logit_scale=1.7, temperature=1.3)
    u = (30.0 / 1.7 * x).to(dtype)
    exact = u.double().clone().requires_grad_()
    z = 30.0 / 1.3 * torch.tanh(exact * (1.7 / 30.0))
    # 1 - tanh^2 cancels in float64 too, at 1e-8 of the slope.
    (truth_slope,) = torch.autograd.grad(z.sum(), exact)
    slope = transform.apply_(u)
    error = (slope.double() - truth_slope).abs() / truth_slope
    assert error.max() <= 1e-5
    assert relative_error(u, z.detach()) <= 1e-6


def random_units(rng: random.Random, responses: int) -> Feedback:
    def unit() -> Feedback:
        extra = {"weight": rng.choice([0, 1, 2.5])}
        if responses > 1 and rng.random() < 0.6:
            first, second = rng.sample(range(responses), 2)
            return Feedback.pairs(
                [first], [second], target=rng.random(), margin=rng.uniform(-1, 1), **extra
            )
        index, extra["offset"] = [rng.randrange(responses)], rng.uniform(-1, 1)
        if rng.random() < 0.5:
            return Feedback.binary(index, [rng.random() < 0.5], **extra)
        return Feedback.scores(index, [rng.random()], **extra)

    return Feedback.merge([unit() for _ in range(rng.randint(0, 2 * responses))])


@pytest.mark.parametrize("dtype", WIDE)
def test_random_calls(dtype):
    for seed in range(40):
        with naming(seed=seed):
            check_random_call(seed, dtype)


def check_random_call(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    responses, dim, vocab = (
        rng.randint(1, 7),
        rng.randint(1, 12),
        rng.choice([2, 3, 17, 64, 101, 259]),
    )
    p = problem(
        seed,
        responses=responses,
        longest=rng.choice([1, 4, 40]),
        dim=dim,
        vocab=vocab,
        peak=rng.choice([0.1, 5, 50]),
        dtype=dtype,
        feedback=random_units(rng, responses),
    )
    arguments = {
        "objective": Objective(
            rng.choice([0.01, 0.1, 1.0]),
            *rng.choice(FORMS),
            offset=rng.uniform(-1, 1),
            length_normalize=rng.random() < 0.5,
        ),
        **reference(p, rng.choice(["cached", "own", "policy"])),
        **rng.choice(TRANSFORMS),
        "train": rng.choice(TRAINED[:3]),
        "reduction": rng.choice(["mean", "sum"]),
        "num_units": rng.choice([None, 7, torch.tensor(5)]),
        "upstream": rng.choice([1.0, 3.7, -0.2]),
    }
    out = evaluate(linear_una_loss, p, workspace_mb=10 ** rng.uniform(-4.5, -1.5), **arguments)
    assert_close(out, truth(p, **arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["mixed, all at once", "mixed, sliced", "pair, streamed"])
@pytest.mark.parametrize("peak", [1.0, 50.0])
@pytest.mark.parametrize("dtype", NARROW)
def test_half_precision_is_no_worse_than_eager_in_half_precision(way, peak, dtype):
    """Against float64 on the same rounded inputs; the worst of several problems, so that luck evens
    out.
    """
    way = WAYS[way]
    ours, theirs = {}, {}
    for seed, train in product(range(4), (LEAVES, ("hidden",))):
        p = way.problem(seed=seed, dtype=dtype, peak=peak)
        arguments = {**reference(p, ("cached", "own")[seed % 2]), "train": train, "upstream": 3.7}
        exact = truth(p, **arguments)
        out = evaluate(linear_una_loss, p, workspace_mb=way.workspace_mb(dtype), **arguments)
        assert {out[f"grad {name}"].dtype for name in train} == {dtype}
        for worst, result in (
            (ours, out),
            (theirs, evaluate(eager.linear_una_loss, p, **arguments)),
        ):
            for name, error in errors(result, exact).items():
                key = f"{name} (head {'trained' if 'weight' in train else 'frozen'})"
                worst[key] = max(worst.get(key, 0.0), error)
    # Two correct roundings of one number may differ in the last bit of the largest: nothing else is
    # forgiven.
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > theirs[name] + 1e-9}
    assert not worse, f"(ours, eager): {worse}"


@pytest.mark.parametrize("way", ["pair, resident", "pair, streamed", "pair, sliced"])
@pytest.mark.parametrize("normalize", [False, True])
def test_float16_survives_loss_scaling(way, normalize):
    """torch.amp.GradScaler starts at 65536:
    a factor that float16 cannot hold, on gradients it cannot hold unscaled.
    """
    way = WAYS[way]
    p = way.problem(dtype=torch.float16, peak=1.0)
    objective = Objective(beta=0.01, length_normalize=normalize)
    arguments = {
        **reference(p, "cached"),
        "upstream": 65536.0,
        "num_units": 32,
        "objective": objective,
    }
    exact = truth(p, **arguments)
    ours = errors(
        evaluate(linear_una_loss, p, workspace_mb=way.workspace_mb(torch.float16), **arguments),
        exact,
    )
    theirs = errors(evaluate(eager.linear_una_loss, p, **arguments), exact)
    worse = {
        name: (ours[name], theirs[name]) for name in ours if not ours[name] <= theirs[name] + 1e-9
    }
    assert not worse, f"(ours, eager): {worse}"


@pytest.mark.parametrize("way", ["mixed, one block", "pair, streamed", "pair, sliced"])
@pytest.mark.parametrize("upstream", [1.003, 65536.0])
@pytest.mark.parametrize("dtype", NARROW)
def test_keeping_the_graph_does_not_change_half_precision_gradients(way, upstream, dtype):
    """1.003 is not a number of either type, and 65536 is infinite in float16:
    the factor must not be rounded.
    """
    way = WAYS[way]
    p = way.problem(dtype=dtype, peak=1.0)
    leaves = trained(p)
    loss = call(
        p, ref_hidden=p.ref_hidden, num_units=4096, workspace_mb=way.workspace_mb(dtype)
    ).loss
    kept = torch.autograd.grad(upstream * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(upstream * loss, leaves)
    for a, b in zip(kept, last, strict=True):
        assert torch.isfinite(a).all() and relative_error(a, b) <= 1e-6


def test_long_sums_are_accumulated_in_float64():
    """32k tokens in one response: a float32 sum is off by hundredths of a nat."""
    p = problem(0, dim=2, vocab=5, peak=3.0, dtype=torch.float32, lengths=[32768, 5], feedback=PAIR)
    out = evaluate(linear_una_loss, p, **reference(p, "own"), workspace_mb=0.5)
    per_token = (
        torch.log_softmax(p.hidden @ p.weight.T + p.bias, 1)
        .gather(1, p.targets.unsqueeze(1))[:, 0]
        .double()
    )
    exact_sum = torch.stack([part.sum() for part in per_token.split([32768, 5])])
    assert relative_error(out["logps"], exact_sum) < 1e-8


@pytest.mark.parametrize("way", ["mixed, one block", "mixed, sliced"])
def test_masked_vocabulary_entries(way):
    """Padded vocabulary rows are switched off by a bias of -inf; a slice may hold nothing else."""
    way = WAYS[way]
    p = way.problem()
    p.bias[40:] = -torch.inf
    p.targets.clamp_(max=39)
    arguments = reference(p, "policy")
    out = evaluate(linear_una_loss, p, workspace_mb=way.workspace_mb(torch.float64), **arguments)
    assert_close(out, truth(p, **arguments), 1e-10)


# --- what must not matter -------------------------------------------------------------------------


def test_the_budget_changes_nothing_but_rounding():
    p = problem(4, dim=3, longest=30)
    arguments = reference(p, "own")
    sizes = [1e9, 1, 0.03, 0.02, 0.01, 0.005, 0.002, 0.0008, 0.0005, 1e-4]
    first, *others = [
        evaluate(linear_una_loss, p, workspace_mb=size, **arguments) for size in sizes
    ]
    for other in others:
        assert_close(other, first, 1e-11)
        assert relative_error(other["loss"], first["loss"]) <= 1e-12


@pytest.mark.parametrize(
    "way", ["mixed, one block", "mixed, all at once", "mixed, no scratch", "mixed, sliced"]
)
def test_order_of_responses_and_units_does_not_matter(way):
    way = WAYS[way]
    p, budget = way.problem(), way.workspace_mb(torch.float64)
    ref = reference(p, "cached")["ref_logps"]
    base = evaluate(linear_una_loss, p, ref_logps=ref, workspace_mb=budget)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        order = torch.randperm(8, generator=generator)  # new place -> old response
        place = order.argsort()
        spans = [range(int(p.cu_seqlens[i]), int(p.cu_seqlens[i + 1])) for i in order]
        rows = torch.tensor([row for span in spans for row in span])
        units = torch.randperm(p.feedback.num_units, generator=generator)
        columns = {name: getattr(p.feedback, name)[units] for name in vars(p.feedback)}
        columns["first"] = place[columns["first"]]
        columns["second"] = torch.where(columns["second"] < 0, -1, place[columns["second"]])
        moved = replace(
            p,
            hidden=p.hidden[rows],
            targets=p.targets[rows],
            cu_seqlens=torch.tensor([0, *map(len, spans)]).cumsum(0),
            feedback=Feedback(**columns),
        )
        out = evaluate(linear_una_loss, moved, ref_logps=ref[order], workspace_mb=budget)
        assert relative_error(out["loss"], base["loss"]) <= 1e-12
        assert relative_error(out["unit_losses"], base["unit_losses"][units]) <= 1e-12
        assert relative_error(out["grad hidden"], base["grad hidden"][rows]) <= 1e-11
        assert relative_error(out["grad weight"], base["grad weight"]) <= 1e-11


@pytest.mark.parametrize("way", WAYS)
def test_bitwise_repeatable_and_inputs_untouched(way):
    way = WAYS[way]
    p = way.problem(dtype=torch.float32)
    budget = way.workspace_mb(torch.float32)
    arguments = {**reference(p, "own"), "softcap": 20.0}
    tensors = {name: x for name, x in vars(p).items() if isinstance(x, Tensor)}
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    runs = [
        evaluate(linear_una_loss, p, workspace_mb=budget, upstream=2.5, **arguments)
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    for name, x in tensors.items():
        assert torch.equal(x, before[name][0]) and x._version == before[name][1], (
            f"{name} was written to"
        )


@pytest.mark.parametrize("op", ["tokens", "gather"])
def test_inputs_are_not_written_to(op):
    """evaluate() clones its leaves; here the op gets the very tensors that are compared."""
    p = problem(0, dtype=torch.float32)
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_(), p.bias.requires_grad_()]
    cached = reference(p, "cached")["ref_logps"]
    watched = [*leaves, p.targets, p.cu_seqlens, p.ref_hidden, p.ref_weight, cached]
    before = [x.detach().clone() for x in watched]
    if op == "tokens":
        token_logps(*leaves[:2], p.targets, p.bias, softcap=9.0).sum().backward()
    else:
        gather_logps(p.hidden, p.targets % 24, temperature=0.5).sum().backward()
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(watched, before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_uninitialised_memory_is_never_read(way, monkeypatch):
    way = WAYS[way]
    p = way.problem(dtype=torch.float32)
    budget = way.workspace_mb(torch.float32)
    cases = [
        {
            **reference(p, ("own", "cached")[k % 2]),
            "train": train,
            **TRANSFORMS[k % len(TRANSFORMS)],
        }
        for k, train in enumerate(TRAINED)
    ]
    clean = [evaluate(linear_una_loss, p, workspace_mb=budget, **case) for case in cases]

    def poisoned(allocate):
        def allocation(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocation

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    dirty = [evaluate(linear_una_loss, p, workspace_mb=budget, **case) for case in cases]
    for a, b in zip(clean, dirty, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_cu_seqlens_of_any_integer_type(dtype):
    p = problem(0)
    out = evaluate(
        linear_una_loss, replace(p, cu_seqlens=p.cu_seqlens.to(dtype)), **reference(p, "cached")
    )
    assert_close(out, truth(p, **reference(p, "cached")), 1e-10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_of_other_integer_types_work_or_are_refused(dtype):
    p = problem(0)
    narrow, logits = p.targets.to(dtype), p.hidden @ p.weight.T
    calls = (
        lambda targets: (
            linear_una_loss(
                p.hidden, p.weight, targets, p.cu_seqlens, MIXED, ref_logps=torch.zeros(8)
            ).logps
        ),
        lambda targets: token_logps(p.hidden, p.weight, targets),
        lambda targets: gather_logps(logits, targets),
    )
    for call_with in calls:
        try:
            out = call_with(narrow)
        except ValueError as error:
            assert "targets" in str(error)
        else:
            assert torch.equal(out, call_with(p.targets))


def strided(x: Tensor, how: str) -> Tensor:
    """Equal values in other strides."""
    if how == "transposed":
        return x.T.contiguous().T if x.dim() == 2 else x
    return torch.stack([x, x + 1], -1)[..., 0]


@pytest.mark.parametrize("how", ["transposed", "every other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["mixed, all at once", "mixed, sliced"])
def test_strides_do_not_matter(how, way, dtype):
    way = WAYS[way]
    p = way.problem(dtype=dtype)
    other = replace(
        p, **{name: strided(x, how) for name, x in vars(p).items() if isinstance(x, Tensor)}
    )
    assert not other.hidden.is_contiguous()
    budget = way.workspace_mb(dtype)
    names = ("hidden", "weight", "bias")

    def call(q: Problem) -> list[Tensor]:
        leaves = [getattr(q, name).detach().requires_grad_() for name in names]
        ref = {"ref_hidden": q.ref_hidden, "ref_weight": q.ref_weight}
        out = linear_una_loss(
            *leaves[:2],
            q.targets,
            q.cu_seqlens,
            q.feedback,
            bias=leaves[2],
            workspace_mb=budget,
            **ref,
        )
        return [*out, *torch.autograd.grad(out.loss, leaves)]

    tolerance = TOLERANCE.get(dtype, 1e-2)
    for got, want in zip(call(other), call(p), strict=True):
        assert relative_error(got.detach(), want.detach()) <= tolerance


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
def test_sequence_logps_are_the_sums_of_the_loss(dtype):
    for workspace_mb, transform in product([None, 0.01, 2.5e-4], TRANSFORMS):
        with naming(workspace_mb=workspace_mb, transform=transform):
            check_sequence_logps(dtype, workspace_mb, transform)


def check_sequence_logps(
    dtype: torch.dtype, workspace_mb: float | None, transform: dict[str, float]
) -> None:
    p = problem(0, dtype=dtype)
    trained(p)
    arguments = {"bias": p.bias, "workspace_mb": workspace_mb, **transform}
    sums = sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens, **arguments)
    assert sums.dtype == torch.float64 and sums.requires_grad
    with torch.no_grad():
        evaluated = sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens, **arguments)
    assert not evaluated.requires_grad
    assert relative_error(evaluated, sums.detach()) <= TOLERANCE[dtype]
    sums = sums.detach()
    assert (
        relative_error(sums, truth(p, ref_logps=torch.zeros(8), **transform)["logps"])
        <= TOLERANCE[dtype]
    )
    out = linear_una_loss(
        p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, ref_logps=sums, **arguments
    )
    assert relative_error(out.logps, sums) <= {torch.float64: 1e-13, torch.float32: 1e-6}[dtype]


def test_sequence_logps_of_no_rows_and_refusals():
    p = problem(0, lengths=[], feedback=PAIR)
    assert sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens).shape == (0,)
    p = problem(0, lengths=[4, 3], feedback=PAIR)
    with pytest.raises(ValueError, match="response 1 is empty"):
        sequence_logps(p.hidden, p.weight, p.targets, torch.tensor([0, 4, 4, 7]))
    with pytest.raises(ValueError, match='engine="triton" cannot run'):
        sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens, engine="triton")


@pytest.mark.parametrize("way", ["mixed, one block", "mixed, sliced"])
def test_cached_reference_equals_reference_from_hidden(way):
    way = WAYS[way]
    p, budget = way.problem(), way.workspace_mb(torch.float64)
    live = evaluate(linear_una_loss, p, workspace_mb=budget, **reference(p, "own"))
    cached = evaluate(linear_una_loss, p, workspace_mb=budget, ref_logps=live["ref_logps"])
    assert_close(cached, live, 1e-12)


def test_no_gradient_reaches_the_reference():
    p = problem(0)
    ref = {name: getattr(p, name).clone().requires_grad_() for name in ("ref_hidden", "ref_weight")}
    evaluate(linear_una_loss, p, **ref)
    cached = reference(p, "cached")["ref_logps"].requires_grad_()
    evaluate(linear_una_loss, p, ref_logps=cached)
    assert all(x.grad is None for x in (*ref.values(), cached))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_of_other_width_and_dtype(dtype):
    """A reference model need not have the policy's hidden size, and may be held in another
    precision.
    """
    p = problem(0)
    g = torch.Generator().manual_seed(1)
    ref_hidden, ref_weight = (
        torch.randn(n, 7, generator=g).to(dtype) for n in (len(p.hidden), len(p.weight))
    )
    out = evaluate(
        linear_una_loss, p, ref_hidden=ref_hidden, ref_weight=ref_weight, workspace_mb=0.01
    )
    expected = truth(p, ref_hidden=ref_hidden, ref_weight=ref_weight)
    assert_close(out, expected, 1e-4)


def test_policy_equal_to_reference_has_zero_reward():
    p = problem(0)
    for budget in (1.0, 0.01, 1e-4):
        arguments = {
            "ref_hidden": p.hidden,
            "ref_weight": p.weight,
            "ref_bias": p.bias,
            "workspace_mb": budget,
        }
        out = evaluate(linear_una_loss, p, softcap=7.0, **arguments)
        assert out["rewards"].abs().max() <= 1e-13 * out["logps"].abs().max()


# --- autograd rules -------------------------------------------------------------------------------


def call(p: Problem, **arguments):
    return linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **arguments)


def trained(p: Problem) -> list[Tensor]:
    return [p.hidden.requires_grad_(), p.weight.requires_grad_()]


WAYS_BACK = ["mixed, one block", "mixed, all at once", "mixed, sliced", "pair, streamed"]


@pytest.mark.parametrize("way", WAYS_BACK)
def test_second_backward_over_a_kept_graph(way):
    way = WAYS[way]
    p = way.problem()
    leaves = trained(p)
    loss = call(p, ref_hidden=p.ref_hidden, workspace_mb=way.workspace_mb(torch.float64)).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    (2.5 * loss).backward(retain_graph=True)
    third = torch.autograd.grad(-1.5 * loss, leaves)
    for leaf, one, copy, three in zip(leaves, first, copies, third, strict=True):
        assert torch.equal(one, copy), "a later backward changed gradients that were handed out"
        torch.testing.assert_close(leaf.grad, 2.5 * one, rtol=1e-12, atol=0)
        torch.testing.assert_close(three, -1.5 * one, rtol=1e-12, atol=0)


def test_second_backward_over_a_freed_graph_raises():
    p = problem(0)
    leaves = trained(p)
    loss = call(p, ref_hidden=p.ref_hidden).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, leaves)


def test_gradient_of_one_input_only_and_of_a_loss_used_twice():
    p = problem(0)
    ref = reference(p, "own")
    expected = truth(p, **ref, bias=False, train=("hidden", "weight"))
    for leaf, name in zip(trained(p), ("hidden", "weight"), strict=True):
        loss = call(p, **ref).loss
        (grad,) = torch.autograd.grad(loss + 3 * loss, leaf)
        assert relative_error(grad, 4 * expected[f"grad {name}"]) <= 1e-10


SUMS = {
    "linear_una_loss": lambda p: call(p, ref_hidden=p.ref_hidden).loss,
    "token_logps": lambda p: token_logps(p.hidden, p.weight, p.targets).sum(),
    "sequence_logps": lambda p: sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens).sum(),
    "gather_logps": lambda p: gather_logps(p.hidden, p.targets % 24).sum(),
}


@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("use", ["penalty", "gradient", "hessian", "jvp"])
def test_second_derivatives_raise(op, use):
    """Better than silently zero, also where the upstream gradient is a constant."""
    p = problem(0)
    p.weight.requires_grad_()

    def of(hidden: Tensor) -> Tensor:
        return SUMS[op](replace(p, hidden=hidden))

    hidden = p.hidden.detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        if use == "hessian":
            torch.autograd.functional.hessian(of, hidden)
        elif use == "jvp":
            torch.autograd.functional.jvp(of, hidden, torch.ones_like(hidden))
        else:
            out = of(hidden)
            (grad,) = torch.autograd.grad(out, hidden, create_graph=True)
            if use == "penalty":
                (out + grad.pow(2).sum()).backward()
            else:
                leaf = hidden if op == "gather_logps" else p.weight
                torch.autograd.grad(grad.sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("op", SUMS)
def test_a_graph_of_gradients_that_nobody_differentiates_is_harmless(op):
    p = problem(0)
    leaves = [p.hidden] if op == "gather_logps" else trained(p)
    p.hidden.requires_grad_()
    expected = torch.autograd.grad(SUMS[op](p), leaves)
    found = torch.autograd.grad(SUMS[op](p), leaves, create_graph=True)
    for one, other in zip(found, expected, strict=True):
        assert one.requires_grad and not other.requires_grad and torch.equal(one, other)


def test_a_loss_keeps_no_hidden_states():
    """Not even for the error of a second derivative: the memory is free for the backbone."""
    p = problem(0)
    hidden = p.hidden.requires_grad_() * 1.0
    memory = weakref.ref(hidden)
    loss = call(replace(p, hidden=hidden), ref_logps=torch.zeros(8)).loss
    del hidden
    assert memory() is None and loss.requires_grad
    assert all(joint.untyped_storage().nbytes() == 0 for joint in loss.grad_fn.origin.joints)


@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad", "dual", "batched"])
def test_other_derivatives_are_refused(op, transform):
    """A tangent would be zero, silently."""
    p = problem(0)

    def of(hidden: Tensor) -> Tensor:
        return SUMS[op](replace(p, hidden=hidden))

    with pytest.raises(ValueError, match=f"{op} has first derivatives in backward mode alone"):
        if transform == "jvp":
            torch.func.jvp(of, (p.hidden,), (p.hidden,))
        elif transform == "vmap":
            torch.func.vmap(of)(p.hidden[None])
        elif transform == "grad":
            torch.func.grad(of)(p.hidden)
        elif transform == "dual":
            with torch.autograd.forward_ad.dual_level():
                of(torch.autograd.forward_ad.make_dual(p.hidden, p.hidden))
        else:
            hidden = p.hidden.detach().clone().requires_grad_()
            many = torch.ones(2, dtype=torch.float64)
            torch.autograd.grad(of(hidden), hidden, many, is_grads_batched=True)


def test_gradients_follow_the_weight_of_the_forward():
    """A weight updated between forward and backward must not mix into the gradient:
    right, or an error.
    """
    p = problem(0)
    expected = truth(p, bias=False, ref_hidden=p.ref_hidden, train=("hidden", "weight"))
    leaves = trained(p)
    loss = call(p, ref_hidden=p.ref_hidden).loss
    tokens = token_logps(*leaves, p.targets)
    with torch.no_grad():
        p.weight.mul_(2)
    loss.backward()
    assert relative_error(p.hidden.grad, expected["grad hidden"]) <= 1e-10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tokens.sum().backward()


def test_only_the_loss_is_differentiable():
    p = problem(0, dtype=torch.float32)
    trained(p)
    out = call(p, ref_hidden=p.ref_hidden)
    assert [name for name, x in out._asdict().items() if x.requires_grad] == ["loss"]
    assert {x.dtype for x in out} == {torch.float64}
    assert [x.shape for x in out] == [(), (8,), (8,), (8,), (p.feedback.num_units,)]


def test_outputs_do_not_share_memory_with_the_cache():
    p = problem(0)
    cached = reference(p, "cached")["ref_logps"]
    before = cached.clone()
    for train in (False, True):
        p.hidden.requires_grad_(train)
        call(p, ref_logps=cached).ref_logps.detach().zero_()
        assert torch.equal(cached, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    p = problem(0)
    expected = truth(p, bias=False, ref_hidden=p.ref_hidden)
    trained(p)
    with mode():
        out = call(p, ref_hidden=p.ref_hidden, workspace_mb=0.005)
    assert not out.loss.requires_grad
    for name, value in out._asdict().items():
        assert relative_error(value, expected[name]) <= 1e-10


@pytest.mark.parametrize("train", [(), *TRAINED])
def test_no_rows(train):
    """A rank without data: a zero loss that is joined to the graph, so that collectives fire."""
    p = problem(0, lengths=[], feedback=Feedback.merge([]))
    leaves = {name: getattr(p, name).requires_grad_(name in train) for name in LEAVES}
    for ref in ({"ref_logps": torch.zeros(0)}, {"ref_hidden": p.ref_hidden}):
        out = linear_una_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.cu_seqlens,
            p.feedback,
            bias=p.bias,
            num_units=torch.tensor(4),
            **ref,
        )
        assert [x.shape for x in out] == [(), (0,), (0,), (0,), (0,)]
        assert out.loss.item() == 0 and out.loss.requires_grad == bool(train)
        if train:
            grads = torch.autograd.grad(out.loss, [leaves[name] for name in train])
            assert all(
                torch.equal(g, torch.zeros_like(leaves[name]))
                for g, name in zip(grads, train, strict=True)
            )


@pytest.mark.parametrize("train", [(), *TRAINED])
@pytest.mark.parametrize("workspace_mb", [None, 0.003, 1e-4])
def test_no_units(train, workspace_mb):
    p = problem(0, feedback=Feedback.merge([]))
    leaves = {name: getattr(p, name).requires_grad_(name in train) for name in LEAVES}
    out = call(p, bias=p.bias, ref_hidden=p.ref_hidden, workspace_mb=workspace_mb)
    expected = eager.linear_una_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.cu_seqlens,
        p.feedback,
        bias=p.bias,
        ref_hidden=p.ref_hidden,
    )
    assert out.loss.item() == 0 and out.loss.requires_grad == bool(train)
    assert relative_error(out.logps, expected.logps.detach()) <= 1e-10
    if train:
        grads = torch.autograd.grad(out.loss, [leaves[name] for name in train])
        assert all(
            torch.equal(g, torch.zeros_like(leaves[name]))
            for g, name in zip(grads, train, strict=True)
        )


def test_gradients_are_not_copied_by_autograd():
    """What backward returns becomes .grad itself:
    a second [V, D] would be as large as the model's head.
    """
    p = problem(0, dtype=torch.float32)
    trained(p)
    out = call(p, ref_hidden=p.ref_hidden)
    built = {x.data_ptr() for x in out.loss.grad_fn.grads if x is not None}
    out.loss.backward()
    assert {p.hidden.grad.data_ptr(), p.weight.grad.data_ptr()} <= built


@pytest.mark.parametrize("workspace_mb", [None, 0.01, 0.0004])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_is_the_cast_of_the_inputs(workspace_mb, backward_inside):
    p = problem(0, dtype=torch.float32, peak=5.0)
    narrow = cast(p, torch.bfloat16)
    arguments = {"workspace_mb": workspace_mb}
    expected = evaluate(linear_una_loss, narrow, **reference(narrow, "own"), **arguments)
    leaves = {name: getattr(p, name).clone().requires_grad_() for name in LEAVES}
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_una_loss(
            leaves["hidden"],
            leaves["weight"],
            p.targets,
            p.cu_seqlens,
            p.feedback,
            bias=leaves["bias"],
            **{**reference(p, "own"), "ref_bias": (0.5 * narrow.bias).float()},
            **arguments,
        )
        if backward_inside:
            out.loss.backward()
    if not backward_inside:
        out.loss.backward()
    found = {name: x.detach() for name, x in out._asdict().items()} | {
        f"grad {n}": x.grad for n, x in leaves.items()
    }
    assert (
        {x.dtype for x in leaves.values()}
        == {x.grad.dtype for x in leaves.values()}
        == {torch.float32}
    )
    assert {x.dtype for x in out} == {torch.float64}
    # A float32 weight gets the accumulator itself; what a cast outside would have rounded it to is
    # the same number.
    exact = errors(found, truth(narrow, **reference(narrow, "own")))
    rounded = errors(expected, truth(narrow, **reference(narrow, "own")))
    assert exact["grad weight"] < rounded["grad weight"] / 10
    for name in ("grad weight", "grad bias"):
        found[name] = found[name].bfloat16()
    assert_close(found, {name: x.double() for name, x in expected.items()}, 1e-12)


@pytest.mark.parametrize("op", ["tokens", "gather"])
def test_autocast_of_the_per_token_ops(op):
    p = problem(0, dtype=torch.float32, peak=5.0)
    hidden, weight = trained(p)
    with torch.autocast("cpu", torch.bfloat16):
        if op == "tokens":
            out = token_logps(hidden, weight, p.targets)
            expected = token_logps(hidden.bfloat16(), weight.bfloat16(), p.targets)
        else:
            logits = hidden @ weight.T
            assert logits.dtype == torch.bfloat16
            out, expected = (
                gather_logps(logits, p.targets),
                gather_logps(logits.detach(), p.targets),
            )
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


# --- gradcheck ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "normalize"), [(100, False), (4, True), (4, False), (0.4, True)])
def test_gradcheck_linear_una_loss(rows, normalize):
    feedback = Feedback.merge([PAIR, Feedback.pairs([2], [3]), Feedback.scores([3], [0.7])])
    p = problem(0, dim=2, vocab=5, peak=3.0, lengths=[3, 2, 4, 1, 1], feedback=feedback)
    objective = Objective(beta=0.5, length_normalize=normalize)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = {
            "bias": bias,
            "softcap": 4.0,
            "temperature": 0.8,
            "workspace_mb": rows * 5 * 8 / 2**20,
        }
        ref = torch.arange(5.0)
        return linear_una_loss(
            hidden,
            weight,
            p.targets,
            p.cu_seqlens,
            feedback,
            objective=objective,
            ref_logps=ref,
            **arguments,
        ).loss

    assert gradcheck(loss, tuple(getattr(p, name).requires_grad_() for name in LEAVES))


@pytest.mark.parametrize("budget", [10**6, 3 * 40, 9], ids=["whole", "chunks", "slices"])
def test_gradcheck_token_logps(budget, monkeypatch):
    workspace_bytes(monkeypatch, budget)
    p = problem(0, dim=3, vocab=5, peak=3.0, lengths=[7], feedback=PAIR)
    p.targets[2] = -100

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        transform = {"softcap": 4.0, "logit_scale": 1.2, "temperature": 0.8}
        out, stats = token_logps(hidden, weight, p.targets, bias, stats=("entropy",), **transform)
        return out, stats["entropy"]

    assert gradcheck(logps, tuple(getattr(p, name).requires_grad_() for name in LEAVES))


def test_gradcheck_gather_logps():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 4, -100], [2, 2, 1]])
    assert gradcheck(lambda x: gather_logps(x, targets, temperature=0.7), (logits,))


# --- per-token ops --------------------------------------------------------------------------------


def token_grads(
    op, p: Problem, targets: Tensor, upstream: Tensor, train=LEAVES, **arguments
) -> dict[str, Tensor]:
    leaves = {name: getattr(p, name).clone().requires_grad_(name in train) for name in LEAVES}
    out = op(leaves["hidden"], leaves["weight"], targets, leaves["bias"], **arguments)
    grads = torch.autograd.grad(out, [leaves[name] for name in train], upstream.to(out.dtype))
    return {
        "logps": out.detach(),
        **{f"grad {name}": g for name, g in zip(train, grads, strict=True)},
    }


@pytest.mark.parametrize("dtype", WIDE)
def test_token_logps(dtype, monkeypatch):
    for case, rows in product(range(len(TRAINED)), [1e6, 10, 1, 0.3, 0.1]):
        with naming(case=case, rows=rows):
            workspace_bytes(monkeypatch, int(rows * 101 * dtype.itemsize) + 1)
            check_token_logps(case, dtype)


def check_token_logps(case: int, dtype: torch.dtype) -> None:
    train, transform = TRAINED[case], TRANSFORMS[case % len(TRANSFORMS)]
    p = problem(5, responses=4, dtype=dtype)
    targets = p.targets.clone()
    targets[::4] = -100
    upstream = torch.randn(len(targets), dtype=torch.float64).to(dtype)
    out = token_grads(token_logps, p, targets, upstream, train, **transform)
    assert out["logps"].dtype == dtype
    expected = token_grads(
        eager.token_logps, cast(p, torch.float64), targets, upstream, train, **transform
    )
    assert_close(out, expected, TOLERANCE[dtype])
    assert (out["logps"][::4] == 0).all()
    if "hidden" in train:
        assert (out["grad hidden"][::4] == 0).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("peak", [1.0, 50.0])
def test_token_logps_in_half_precision_is_no_worse_than_eager(dtype, peak):
    ours, theirs = {}, {}
    for seed in range(6):
        p = problem(seed, dtype=dtype, peak=peak)
        upstream = torch.randn(len(p.targets), dtype=torch.float64).to(dtype)
        exact = token_grads(eager.token_logps, cast(p, torch.float64), p.targets, upstream)
        for worst, op in ((ours, token_logps), (theirs, eager.token_logps)):
            for name, error in errors(token_grads(op, p, p.targets, upstream), exact).items():
                worst[name] = max(worst.get(name, 0.0), error)
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > theirs[name] + 1e-9}
    assert not worse, f"(ours, eager): {worse}"
    assert token_logps(p.hidden, p.weight, p.targets).dtype == torch.float32


def test_ignored_tokens_drop_even_a_nan_upstream():
    p = problem(0)
    leaves = trained(p)
    targets = p.targets.clone()
    targets[3] = -100
    upstream = torch.ones(len(targets), dtype=torch.float64)
    upstream[3] = torch.nan
    grads = [
        *torch.autograd.grad(token_logps(*leaves, targets), leaves, upstream),
        *torch.autograd.grad(
            gather_logps(p.hidden, torch.where(targets == -100, -100, targets % 24)),
            p.hidden,
            upstream,
        ),
    ]
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [*WIDE, *NARROW])
def test_gather_logps(dtype):
    shapes = [(40,), (5, 8), (2, 0), ()]
    for shape, layout in product(shapes, ["contiguous", "shifted", "transposed"]):
        with naming(shape=shape, layout=layout):
            check_gather_logps(dtype, shape, layout)


def check_gather_logps(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(*shape, 101, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, 101, shape, generator=g)
    if targets.dim():
        targets[..., ::3] = -100
    if layout == "shifted" and len(shape):
        logits = torch.cat([logits, logits[..., :1, :]], -2)[..., :-1, :] if shape[-1] else logits
    elif layout == "transposed":
        logits = logits.transpose(0, -1).contiguous().transpose(0, -1)
    leaf = logits.detach().requires_grad_()
    upstream = torch.randn(shape, generator=g, dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    out = gather_logps(leaf, targets, temperature=0.7)
    assert out.shape == shape and out.dtype == upstream.dtype
    (grad,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True)
    assert torch.equal(grad, torch.autograd.grad(out, leaf, upstream)[0]), "second backward"
    exact = logits.detach().double().requires_grad_()
    expected = eager.gather_logps(exact, targets, temperature=0.7)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    assert grad.dtype == dtype and grad.shape == logits.shape
    assert relative_error(out.detach(), expected.detach()) <= TOLERANCE.get(dtype, 2e-5)
    assert (
        relative_error(grad, expected_grad)
        <= {torch.bfloat16: 4e-3, torch.float16: 5e-4, **TOLERANCE}[dtype]
    )
    assert (grad[targets == -100] == 0).all()


def test_token_logps_of_no_rows():
    p = problem(0, lengths=[], feedback=PAIR)
    leaves = trained(p)
    out = token_logps(*leaves, p.targets)
    assert out.shape == (0,)
    assert all(
        torch.equal(g, torch.zeros_like(x))
        for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True)
    )


def test_token_logps_second_backward_with_another_upstream():
    p = problem(0)
    leaves = trained(p)
    out = token_logps(*leaves, p.targets)
    upstream = torch.randn(len(p.targets), dtype=torch.float64)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, -2 * upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, -2 * a, rtol=1e-12, atol=1e-15)


# --- logits kept for any upstream gradient --------------------------------------------------------


STATS = ("is_top1", "entropy", "log_sum_sq_probs", "mean_logits")
PASS = {"logps", "entropy"}  # carry a gradient


@pytest.fixture
def nothing_kept(monkeypatch):
    """Return a function that lets later calls compute all logits again."""

    def forget() -> None:
        monkeypatch.setattr(passes.Head, "keep_buffer", lambda head: not head.drop_buffer())

    return forget


def later_grads(
    p: Problem, targets: Tensor, rows: float, train=LEAVES, stats=(), op=token_logps, **arguments
) -> dict[str, Tensor]:
    """Results and gradients of a call with a workspace for so many rows of logits.

    The upstream gradients are random, of the log-probs and of the entropy.
    """
    leaves = {name: getattr(p, name).clone().requires_grad_(name in train) for name in LEAVES}
    given = (leaves["hidden"], leaves["weight"], targets, leaves["bias"])
    if op is token_logps:
        size = plan.HeadSize(*p.weight.shape, p.hidden.dtype.itemsize, p.hidden.dtype.itemsize)
        if p.hidden.dtype in NARROW:
            size = plan.HeadSize(*p.weight.shape, cast=True)
        budget = int(rows * size.row_bytes(gathered=False, trained=False)) + 1
        arguments["workspace_mb"] = budget * (8 / 7 if size.cast else 1) / 2**20 + 1e-5
        out = token_logps(*given, stats=stats, **arguments)
        logps, found = out if stats else (out, {})
    else:
        logps = eager.token_logps(*given, **arguments)
        found = eager.token_stats(*given, **arguments) if stats else {}
    results = {"logps": logps, **{name: found[name] for name in stats}}
    g = torch.Generator().manual_seed(3)
    loss = 0.0
    for name, value in results.items():
        upstream = torch.randn(len(targets), generator=g, dtype=torch.float64)
        if name in PASS:
            loss = loss + (upstream.to(value.dtype) * value).sum()
    grads = torch.autograd.grad(loss, [leaves[name] for name in train])
    detached = {name: value.detach() for name, value in results.items()}
    return {**detached, **{f"grad {n}": x for n, x in zip(train, grads, strict=True)}}


def some_ignored(p: Problem) -> Tensor:
    targets = p.targets.clone()
    targets[::4] = -100
    return targets


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stats", [(), ("entropy",)], ids=["plain", "entropy"])
def test_kept_logits_change_no_bit(dtype, stats, nothing_kept):
    """The gradients are those of a call that computes every row again: for a whole call, for rows
    left over, for one row at a time, for slices of the vocabulary.
    """
    p = problem(4, dtype=dtype, peak=10.0)
    targets = some_ignored(p)
    cases = [(100, LEAVES), (22, LEAVES), (22, ("hidden",)), (7, ("weight",)), (1.2, LEAVES)]
    if dtype in WIDE:
        cases.append((0.3, LEAVES))
    transform = {"softcap": 9.0, "logit_scale": 1.2, "temperature": 0.8}
    kept = [later_grads(p, targets, *case, stats, **transform) for case in cases]
    nothing_kept()
    for case, found in zip(cases, kept, strict=True):
        again = later_grads(p, targets, *case, stats, **transform)
        with naming(case=case):
            assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("dtype", WIDE)
def test_statistics_and_their_gradients(dtype):
    """Whole rows, chunks, and slices whose sums are merged."""
    for k, rows in enumerate([100, 9, 1, 0.3, 0.05]):
        p = problem(k, dtype=dtype)
        targets = some_ignored(p)
        transform = TRANSFORMS[k]
        with naming(rows=rows):
            found = later_grads(p, targets, rows, stats=STATS, **transform)
            exact = cast(p, torch.float64)
            expected = later_grads(exact, targets, 0, stats=STATS, op=eager, **transform)
            assert found["is_top1"].dtype == torch.bool
            assert torch.equal(found.pop("is_top1"), expected.pop("is_top1"))
            assert_close(found, expected, TOLERANCE[dtype])
            assert all((found[name][::4] == 0).all() for name in ("logps", *STATS[1:]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_without_gradients_are_the_same(mode):
    p = problem(0, dtype=torch.float32)
    leaves = trained(p)
    logps, stats = token_logps(*leaves, p.targets, stats=STATS)
    assert logps.requires_grad and [n for n in STATS if stats[n].requires_grad] == ["entropy"]
    assert list(stats) == list(STATS)
    with mode():
        evaluated, found = token_logps(*leaves, p.targets, stats=STATS)
        plain = token_logps(*leaves, p.targets)
    assert not evaluated.requires_grad and not found["entropy"].requires_grad
    assert torch.equal(evaluated, logps) and torch.equal(plain, logps)
    assert all(torch.equal(found[name], stats[name]) for name in STATS)


@pytest.mark.parametrize("rows", [100, 9, 0.3])
def test_one_of_two_outputs_used(rows):
    """autograd gives None for the other, which costs no tensor of zeros, and changes nothing."""
    p = problem(0)
    budget = (rows * 101 * 8 + 1) / 2**20
    for names in (["logps"], ["entropy"], ["logps", "entropy"]):
        grads = {}
        for op in ("ours", "eager"):
            leaves = [getattr(p, name).clone().requires_grad_() for name in LEAVES]
            given = (*leaves[:2], p.targets, leaves[2])
            if op == "ours":
                logps, stats = token_logps(*given, workspace_mb=budget, stats=("entropy",))
            else:
                logps, stats = eager.token_logps(*given), eager.token_stats(*given)
            out = {"logps": logps, "entropy": stats["entropy"]}
            loss = sum((out[name] * torch.arange(len(logps))).sum() for name in names)
            grads[op] = torch.autograd.grad(loss, leaves)
        for found, expected in zip(grads["ours"], grads["eager"], strict=True):
            assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("rows", [100, 22, 0.3])
def test_second_backward_after_the_kept_logits_are_used_up(rows):
    p = problem(1)
    leaves = trained(p)
    budget = (rows * 101 * 8 + 1) / 2**20
    logps, stats = token_logps(*leaves, p.targets, workspace_mb=budget, stats=("entropy",))
    loss = (logps * stats["entropy"]).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, leaves)
    for one, copy, two in zip(first, copies, second, strict=True):
        assert torch.equal(one, copy) and torch.equal(one, two)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, leaves)


def test_statistics_of_peaked_rows_are_no_worse_than_eager():
    """|z| = 50: what rounding took from the logsumexp is more than the log-prob of the largest."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.eye(24)
    weight = torch.randn(101, 24, generator=g)
    weight[7] = 50 + torch.arange(24.0) / 7  # logits without a rounding error of their own
    weight[9] = weight[7] - torch.linspace(0.1, 24, 24)
    p = replace(problem(0), hidden=hidden, weight=weight, bias=torch.zeros(101))
    targets = torch.full((24,), 9)
    train = ("weight",)
    exact = later_grads(cast(p, torch.float64), targets, 0, train, ("entropy",), eager)
    for rows in (100, 0.3):
        ours = later_grads(p, targets, rows, train, ("entropy",))
        theirs = later_grads(p, targets, 0, train, ("entropy",), eager)
        for name in ("entropy", "grad weight"):
            errors_of = [(x[name].double() - exact[name]).abs() for x in (ours, theirs)]
            assert errors_of[0].max() <= errors_of[1].max() + 1e-9, (name, rows)


@pytest.mark.parametrize("rows", [100, 0.3, 0.05])
def test_of_equal_largest_logits_the_first_is_top1(rows):
    """As argmax has it: a target is the largest if no entry before is as large."""
    weight = torch.zeros(101, 1)
    weight[[20, 60, 90]] = 5.0
    hidden = torch.ones(4, 1)
    options = {"workspace_mb": (rows * 101 * 4 + 1) / 2**20, "stats": ("is_top1",)}
    _, stats = token_logps(hidden, weight, [20, 60, 90, 0], **options)
    assert stats["is_top1"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("rows", [100, 0.3])
def test_masked_entries_have_no_entropy(rows):
    p = problem(0)
    bias = p.bias.clone()
    bias[:60] = -torch.inf
    targets = 60 + p.targets % 41
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    options = {"workspace_mb": (rows * 101 * 8 + 1) / 2**20, "stats": ("entropy",)}
    logps, stats = token_logps(*leaves, targets, bias, **options)
    found = torch.autograd.grad((logps + 2 * stats["entropy"]).sum(), leaves)
    short = [leaves[0], leaves[1][60:]]
    expected = eager.token_stats(*short, targets - 60, bias[60:])["entropy"]
    logps = eager.token_logps(*short, targets - 60, bias[60:])
    grads = torch.autograd.grad((logps + 2 * expected).sum(), leaves)
    assert relative_error(stats["entropy"].detach(), expected.detach()) <= 1e-10
    for ours, theirs in zip(found, grads, strict=True):
        assert relative_error(ours, theirs) <= 1e-10


@pytest.mark.parametrize("rows", [100, 9, 0.3])
@pytest.mark.parametrize("train", [LEAVES, ("hidden",)])
def test_sequence_logps_have_the_gradient_of_their_sums(rows, train):
    p = problem(2)
    targets = some_ignored(p)
    leaves = {name: getattr(p, name).clone().requires_grad_(name in train) for name in LEAVES}
    given = (leaves["hidden"], leaves["weight"], targets)
    options = {"softcap": 20.0, "temperature": 0.7}
    budget = (rows * 101 * 8 + 1) / 2**20
    sums = sequence_logps(*given, p.cu_seqlens, bias=leaves["bias"], workspace_mb=budget, **options)
    tokens = eager.token_logps(*given, leaves["bias"], **options)
    parts = tokens.split(p.cu_seqlens.diff().tolist())
    expected = torch.stack([part.sum() for part in parts])
    assert sums.dtype == torch.float64
    assert relative_error(sums.detach(), expected.detach()) <= 1e-10
    upstream = torch.linspace(-1, 2, len(sums), dtype=torch.float64)
    wanted = [leaves[name] for name in train]
    found = torch.autograd.grad(sums, wanted, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, wanted, upstream), strict=True):
        assert relative_error(ours, theirs) <= 1e-10


@pytest.mark.parametrize("way", ["mixed, one block", "mixed, all at once", "mixed, sliced"])
@pytest.mark.parametrize("train", [LEAVES, ("hidden",)])
def test_a_target_of_minus_100_means_the_same_in_the_loss(way, train):
    """Log-prob 0 and no gradient, in every way through the plan, of policy and reference."""
    way = WAYS[way]
    p = way.problem()
    p = replace(p, targets=some_ignored(p))
    for ref in ("cached", "own", "policy"):
        arguments = {**reference(replace(p, targets=p.targets.clamp_min(0)), ref), "train": train}
        budget = way.workspace_mb(torch.float64, trained="weight" in train)
        out = evaluate(linear_una_loss, p, workspace_mb=budget, softcap=30.0, **arguments)
        assert_close(out, truth(p, softcap=30.0, **arguments), 1e-10)
        assert (out["grad hidden"][::4] == 0).all()


def test_lists_arrays_and_ranges_are_as_good_as_tensors():
    p = problem(0, dtype=torch.float32, lengths=[4, 3], feedback=PAIR)
    targets, cu, ref = p.targets, torch.tensor([0, 4, 7]), torch.tensor([-20.1, -9.3]).double() / 3
    given = (p.hidden, p.weight)
    expected = linear_una_loss(*given, targets, cu, PAIR, ref_logps=ref)
    for convert in (Tensor.tolist, Tensor.numpy):
        numbers = [convert(x) for x in (targets, cu)]
        out = linear_una_loss(*given, *numbers, PAIR.to_dict(), ref_logps=convert(ref))
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        assert torch.equal(sequence_logps(*given, *numbers), expected.logps)
        assert torch.equal(token_logps(*given, numbers[0]), token_logps(*given, targets))
        logits = p.hidden @ p.weight.T
        assert torch.equal(gather_logps(logits, numbers[0]), gather_logps(logits, targets))
        again = una_loss(expected.logps, convert(ref), PAIR.to_dict(), lengths=[4, 3])
        assert torch.equal(again.loss, expected.loss)
    order = torch.arange(7)
    assert torch.equal(token_logps(*given, range(7)), token_logps(*given, order))
    lengths = torch.tensor([0, *range(1, 8)])
    one_each = sequence_logps(*given, order, range(8))
    assert torch.equal(one_each, sequence_logps(*given, order, lengths))


def test_no_rows_as_empty_lists():
    p = problem(0, lengths=[], feedback=PAIR)
    leaves = trained(p)
    logps, stats = token_logps(*leaves, [], stats=STATS)
    assert logps.shape == (0,) and {x.shape for x in stats.values()} == {(0,)}
    sums = sequence_logps(*leaves, [], [0])
    assert sums.shape == (0,) and sums.dtype == torch.float64
    for out in (logps, stats["entropy"], sums):
        grads = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        for grad, leaf in zip(grads, leaves, strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


def test_token_logps_and_una_loss_compose_to_linear_una_loss():
    p = problem(0)
    arguments = reference(p, "cached")
    fused = evaluate(linear_una_loss, p, **arguments)
    leaves = [getattr(p, name).clone().requires_grad_() for name in LEAVES]
    tokens = token_logps(*leaves[:2], p.targets, leaves[2])
    sums = torch.stack([part.sum() for part in tokens.split(p.cu_seqlens.diff().tolist())])
    loss = una_loss(sums, arguments["ref_logps"], p.feedback).loss
    assert relative_error(loss.detach(), fused["loss"]) <= 1e-12
    for name, grad in zip(LEAVES, torch.autograd.grad(loss, leaves), strict=True):
        assert relative_error(grad, fused[f"grad {name}"]) <= 1e-10


# --- integration ----------------------------------------------------------------------------------


def test_a_compiled_model_calls_the_ops_as_they_are():
    """The loop over chunks is no graph:
    traced, it would be dozens of them and minutes of compilation.
    """
    from torch._dynamo.utils import counters

    p = problem(0, dtype=torch.float32)
    layer, ref = torch.nn.Linear(24, 24), torch.zeros(8)

    def loss_of(x: Tensor) -> Tensor:
        hidden = torch.tanh(layer(x))
        loss = linear_una_loss(
            hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, ref_logps=ref
        ).loss
        return (
            loss
            + token_logps(hidden, p.weight, p.targets).sum()
            + gather_logps(hidden @ p.weight.T, p.targets).sum()
        )

    expected = torch.autograd.grad(loss_of(p.hidden), layer.weight)[0]
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        found = torch.autograd.grad(
            torch.compile(loss_of, backend="eager")(p.hidden), layer.weight
        )[0]
        torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()


def test_importing_the_op_does_not_import_the_compiler():
    code = (
        "import sys, una_fast; una_fast.linear_una_loss; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gather_logps_in_place():
    """The gradient takes the storage of the logits, and whoever still needs them is told by
    autograd.
    """
    leaf = torch.randn(3, 4, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[0, 32, -100, 5]] * 3)
    (expected,) = torch.autograd.grad(gather_logps(leaf, targets, 0.7).sum(), leaf)
    for given in (leaf * 1.0, (leaf * 1.0)[:, :3]):
        labels = targets[:, : given.shape[1]]
        out = gather_logps(given, labels, 0.7, inplace_backward=True)
        (grad,) = torch.autograd.grad(out.sum(), given, retain_graph=True)
        assert (
            torch.equal(grad, expected[:, : given.shape[1]]) and grad.data_ptr() == given.data_ptr()
        )
        with pytest.raises(RuntimeError):
            torch.autograd.grad(out.sum(), given)
    logits = leaf * 1.0
    needs_logits = logits.square().sum()  # its backward comes after that of the gather
    loss = needs_logits + gather_logps(logits, targets, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


# --- log lines ------------------------------------------------------------------------------------


def test_short_chunks_are_logged_once(caplog):
    """Below 1024 rows a chunk, rereading the head costs more than the products:
    said once, never silent.
    """
    say_once.cache_clear()
    p = problem(0, dim=4, vocab=50, lengths=[1500, 1500], feedback=PAIR)
    evaluate(linear_una_loss, p, **reference(p, "cached"))
    assert not [r for r in caplog.records if "workspace" in r.getMessage()]
    for _ in range(3):
        evaluate(linear_una_loss, p, **reference(p, "cached"), workspace_mb=0.01)
    lines = [r.getMessage() for r in caplog.records if "workspace_mb" in r.getMessage()]
    assert len(lines) == 1


def test_automatic_choice_of_the_engine_is_logged_once(caplog):
    say_once.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(3):
            evaluate(linear_una_loss, problem(0), **reference(problem(0), "cached"))
            evaluate(linear_una_loss, problem(0), **reference(problem(0), "cached"), engine="torch")
    assert sum("engine torch" in r.getMessage() for r in caplog.records) == 1


# --- refusals -------------------------------------------------------------------------------------


def refuse(change: dict | None = None, op=linear_una_loss, **arguments) -> None:
    p = replace(problem(0, dtype=torch.float32, lengths=[4, 3], feedback=PAIR), **(change or {}))
    if op is token_logps:
        token_logps(p.hidden, p.weight, p.targets, **arguments)
        return
    ref = {} if {"ref_logps", "ref_hidden"} & arguments.keys() else {"ref_logps": torch.zeros(2)}
    linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **{**ref, **arguments})


SHAPES = {
    "hidden of three dimensions": (
        {"hidden": torch.zeros(1, 7, 24)},
        r"hidden \(1, 7, 24\).*\[N, D\] and \[V, D\]",
    ),
    "other widths": ({"hidden": torch.zeros(7, 5)}, r"hidden \(7, 5\) and weight \(101, 24\)"),
    "weight transposed": ({"weight": torch.zeros(24, 101)}, r"weight \(24, 101\)"),
    "too few targets": (
        {"targets": torch.zeros(6, dtype=torch.int64)},
        r"targets \(6,\) must be \[7\] integers",
    ),
    "float targets": ({"targets": torch.zeros(7)}, r"targets \(7,\) must be (\[7\] )?integers"),
    "boolean targets": (
        {"targets": torch.zeros(7, dtype=torch.bool)},
        r"targets \(7,\) must be (\[7\] )?integers",
    ),
    "dtypes differ": (
        {"weight": torch.zeros(101, 24).bfloat16()},
        r"hidden is torch.float32 and weight torch.bfloat16",
    ),
    "target over the vocabulary": (
        {"targets": torch.tensor([0, 1, 101, 3, 4, 5, 6])},
        r"targets\[2\] is 101, outside",
    ),
    "target below zero": (
        {"targets": torch.tensor([0, 1, 2, 3, -1, 5, 6])},
        r"targets\[4\] is -1, outside",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("op", [linear_una_loss, token_logps])
def test_shape_refusals(case, op):
    change, message = SHAPES[case]
    with pytest.raises(ValueError, match=message):
        refuse(change, op)


REFUSED = {
    "ignored target in a mean": (
        {"targets": torch.full((7,), -100)},
        {"objective": Objective(length_normalize=True)},
        r"targets\[0\] is -100, outside the vocabulary.*leave rows .* out",
    ),
    "targets as text": ({"targets": "abc"}, {}, r"targets must be a tensor or a list of numbers"),
    "ragged targets": ({"targets": [[1, 2], [3]]}, {}, r"targets must be a tensor or a list"),
    "float targets as a list": (
        {"targets": [0.5] * 7},
        {},
        r"targets \(7,\) must be \[7\] integers",
    ),
    "too few targets as a list": (
        {"targets": [1, 2]},
        {},
        r"targets \(2,\) must be \[7\] integers",
    ),
    "cu_seqlens as a list ends early": ({"cu_seqlens": [0, 4, 6]}, {}, r"end at N=7; .* ends at 6"),
    "cu_seqlens of truths": ({"cu_seqlens": [False, True]}, {}, r"cu_seqlens \(2,\) must be"),
    "cu_seqlens missing": ({"cu_seqlens": None}, {}, r"cu_seqlens must be a tensor or a list"),
    "ref_logps as a long list": (
        {},
        {"ref_logps": [0.0] * 7},
        r"ref_logps is \(7,\); expected \[2\]",
    ),
    "ref_logps as text": ({}, {"ref_logps": "-3"}, r"ref_logps must be a tensor or a list"),
    "feedback of another kind": (
        {"feedback": [(0, 1)]},
        {},
        r"feedback must be a Feedback.* not list",
    ),
    "cu_seqlens ends early": (
        {"cu_seqlens": torch.tensor([0, 4, 6])},
        {},
        r"end at N=7; it .* ends at 6",
    ),
    "cu_seqlens starts late": ({"cu_seqlens": torch.tensor([1, 4, 7])}, {}, r"starts at 1"),
    "cu_seqlens falls": (
        {"cu_seqlens": torch.tensor([0, 8, 7])},
        {},
        r"falls from 8 to 7 at response 1",
    ),
    "cu_seqlens empty": (
        {"cu_seqlens": torch.tensor([], dtype=torch.int64)},
        {},
        r"cu_seqlens \(0,\) must be \[S\+1\]",
    ),
    "cu_seqlens float": (
        {"cu_seqlens": torch.tensor([0.0, 4, 7])},
        {},
        r"cu_seqlens \(3,\) must be \[S\+1\] integers",
    ),
    "cu_seqlens of two dimensions": (
        {"cu_seqlens": torch.tensor([[0, 7]])},
        {},
        r"cu_seqlens \(1, 2\)",
    ),
    "empty response": ({"cu_seqlens": torch.tensor([0, 4, 4, 7])}, {}, r"response 1 is empty"),
    "empty first response": ({"cu_seqlens": torch.tensor([0, 0, 7])}, {}, r"response 0 is empty"),
    "missing response": (
        {"feedback": Feedback.pairs([0], [2])},
        {},
        r"unit 0 \(pair\) names response 2, .* 2 responses",
    ),
    "score over one": (
        {"feedback": Feedback.scores([0, 1], [0.5, 7])},
        {},
        r"score 7\.0 lies outside \[0, 1\].*reward_mse",
    ),
    "no reference": (
        {},
        {"ref_logps": None},
        r"needs a reference: give ref_logps .* or ref_hidden",
    ),
    "two references": (
        {},
        {"ref_logps": torch.zeros(2), "ref_hidden": torch.zeros(7, 24)},
        r"give ref_logps or ref_hidden, not both",
    ),
    "cached reference with a head": (
        {},
        {"ref_logps": torch.zeros(2), "ref_weight": torch.zeros(101, 24)},
        r"ref_weight",
    ),
    "cached reference with a bias": (
        {},
        {"ref_logps": torch.zeros(2), "ref_bias": torch.zeros(101)},
        r"ref_bias",
    ),
    "reference per token": (
        {},
        {"ref_logps": torch.zeros(7)},
        r"ref_logps is \(7,\); expected \[2\], one sum per",
    ),
    "reference vocabulary": (
        {},
        {"ref_hidden": torch.zeros(7, 24), "ref_weight": torch.zeros(50, 24)},
        r"ref_weight \(50, 24\) and weight \(101, 24\) must have the same vocabulary",
    ),
    "reference rows": ({}, {"ref_hidden": torch.zeros(6, 24)}, r"ref_hidden"),
    "reference width": (
        {},
        {"ref_hidden": torch.zeros(7, 5)},
        r"ref_hidden \(7, 5\) and ref_weight \(101, 24\)",
    ),
    "reference bias": (
        {},
        {"ref_hidden": torch.zeros(7, 24), "ref_bias": torch.zeros(5)},
        r"ref_bias \(5,\) must be",
    ),
    "reference dtype": (
        {},
        {"ref_hidden": torch.zeros(7, 24).bfloat16()},
        r"ref_hidden is torch.bfloat16 and ref_weight torch.float32",
    ),
    "bias shape": ({}, {"bias": torch.zeros(24)}, r"bias \(24,\) must be \[101\]"),
    "workspace zero": ({}, {"workspace_mb": 0}, r"workspace_mb=0 must be positive"),
    "workspace negative": ({}, {"workspace_mb": -1.5}, r"workspace_mb=-1\.5 must be positive"),
    "workspace NaN": ({}, {"workspace_mb": float("nan")}, r"workspace_mb=nan must be positive"),
    "workspace infinite": ({}, {"workspace_mb": float("inf")}, r"workspace_mb=inf"),
    "workspace as text": ({}, {"workspace_mb": "8"}, r"workspace_mb='8' must be positive"),
    "engine unknown": (
        {},
        {"engine": "cuda"},
        r"engine='cuda' is not one of \('auto', 'torch', 'triton'\)",
    ),
    "engine triton": (
        {},
        {"engine": "triton"},
        r'engine="triton" cannot run: tensors are on the CPU',
    ),
    "reduction": ({}, {"reduction": "none"}, r"reduction='none'"),
    "softcap": ({}, {"softcap": 0.0}, r"softcap=0\.0 must be positive, or None"),
    "temperature": ({}, {"temperature": 0.0}, r"temperature=0\.0 must be positive"),
    "temperature infinite": ({}, {"temperature": float("inf")}, r"temperature=inf"),
    "logit_scale": ({}, {"logit_scale": float("nan")}, r"logit_scale=nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    change, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        refuse(change, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "triton"}, r'engine="triton" cannot run: tensors are on the CPU'),
        ({"engine": "flash"}, r"engine='flash' is not one of"),
        ({"bias": torch.zeros(7)}, r"bias \(7,\) must be \[101\]"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be positive"),
        ({"workspace_mb": 0}, r"workspace_mb=0 must be positive"),
        (
            {"stats": ("entropie",)},
            r"stats=\('entropie',\) must be a tuple with some of \('entropy'",
        ),
        ({"stats": "entropy"}, r"stats='entropy' must be a tuple"),
        ({"stats": None}, r"stats=None must be a tuple"),
    ],
)
def test_token_logps_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        refuse(op=token_logps, **arguments)


@pytest.mark.parametrize(
    ("targets", "arguments", "message"),
    [
        (
            torch.zeros(4, dtype=torch.int64),
            {},
            r"targets \(4,\) must have the shape of logits \(3, 9\) less V",
        ),
        (torch.tensor([0, 9, 1]), {}, r"targets\[1\] is 9, outside the vocabulary \[0, 9\)"),
        (torch.tensor([0, -1, 1]), {}, r"targets\[1\] is -1"),
        (torch.zeros(3), {}, r"targets"),
        (torch.tensor([0, 1, 2]), {"temperature": 0.0}, r"temperature=0\.0 must be positive"),
    ],
)
def test_gather_logps_refusals(targets, arguments, message):
    with pytest.raises(ValueError, match=message):
        gather_logps(torch.zeros(3, 9), targets, **arguments)


# --- one read per row -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_one_read_is_exact_at_any_log_prob(dtype, softcap):
    """Beyond e^100 times the target's probability the shift is the largest logit's."""
    boosts = torch.tensor([120.0, 40.0, 0.0, -60.0, -130.0, -400.0], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(len(boosts), 999, generator=generator).to(dtype) * 12
    targets = torch.randint(999, (len(boosts),), generator=generator)
    u[torch.arange(len(boosts)), targets] += boosts
    transform = LogitTransform(softcap=softcap, temperature=0.8)
    raw = u.double().clone().requires_grad_()
    logps = torch.log_softmax(transform(raw), 1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (expected,) = torch.autograd.grad(logps.sum(), raw)
    actual, scores, factors = one_read_(u, targets, transform)
    assert scores.data_ptr() == u.data_ptr()
    exact = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(actual.double(), logps.detach(), rtol=exact / 4, atol=exact)
    du = scores.double() * factors.double().unsqueeze(1)
    largest = expected.abs().amax(1, keepdim=True).clamp_min(1e-15)
    torch.testing.assert_close(du / largest, expected / largest, rtol=30 * exact, atol=exact)


def test_a_bfloat16_weight_in_one_chunk_gets_its_gradient_in_bfloat16():
    """No [V, D] tensor but the returned gradient; errors as of a gradient rounded last."""
    p = problem(3, lengths=[40, 31], dim=32, vocab=4001, dtype=torch.bfloat16, feedback=PAIR)
    p.hidden.requires_grad_(), p.weight.requires_grad_()
    numbers = 4001 * 32
    with LiveBytes() as memory:
        out = linear_una_loss(
            p.hidden,
            p.weight,
            p.targets,
            p.cu_seqlens,
            p.feedback,
            ref_logps=torch.zeros(2),
            workspace_mb=1.5,
        )
        assert memory.peak() < 4 * numbers + 1.5 * 2**20 + 2 * numbers
        assert 4 * numbers not in memory.sizes, "no accumulator"
        (1.7 * out.loss).backward()
    assert p.weight.grad.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in (p.hidden, p.weight)]
    eager.linear_una_loss(
        *exact, p.targets, p.cu_seqlens, p.feedback, ref_logps=torch.zeros(2)
    ).loss.mul(1.7).backward()
    for mine, leaf in zip((p.hidden, p.weight), exact, strict=True):
        error = (mine.grad.double() - leaf.grad).norm() / leaf.grad.norm()
        assert error < 1.5 * 2.0**-9, f"{error:.1e}"


def test_a_weight_gradient_is_cast_slice_by_slice_on_the_device_of_the_weight():
    """Where GEMMs need casts, as on ROCm: the slices are no tensors of the CPU."""
    weight = torch.empty(100, 8, dtype=torch.bfloat16, device="meta")
    engine = TorchEngine(weight, None, LogitTransform(), cast_bytes=32 * 8 * 4)
    du = torch.empty(5, 100, device="meta")
    engine.weight_grad(du, torch.empty(5, 8, device="meta"), torch.empty_like(weight))


def test_slices_that_were_chosen_for_time_are_made_by_plain_products(monkeypatch):
    """The kernel without logits serves where whole rows do not fit."""
    asked = []
    monkeypatch.setattr(
        TorchEngine, "linear_logps", lambda self, hidden, *_: asked.append(len(hidden))
    )
    head = passes.Head(torch.randn(100, 8), None, LogitTransform(), 1.0, "torch")
    hidden, targets = torch.randn(6, 8), torch.randint(100, (6,))
    expected = (hidden @ head.engine.weight.T).log_softmax(1)
    for budget, calls in ((1 << 20, []), (100, [6])):
        head.budget = budget
        lse, target_logit = head.chunk_stats(hidden, targets, plan.Tile(6, 40))
        assert asked == calls
        found = target_logit - lse
        torch.testing.assert_close(found, expected.gather(1, targets[:, None])[:, 0])


def test_the_policy_takes_the_logits_buffer_of_the_reference(monkeypatch):
    monkeypatch.setattr(torch_engine, "CACHE_BLOCK_BYTES", 1)  # temporaries of single rows
    weight, hidden = torch.randn(200, 8, requires_grad=True), torch.randn(12, 8)
    targets, cu_seqlens = torch.randint(200, (12,)), torch.tensor([0, 7, 12])
    with LiveBytes() as memory:
        linear_una_loss(
            hidden,
            weight,
            targets,
            cu_seqlens,
            Feedback.pairs([0], [1]),
            ref_hidden=hidden,
            ref_weight=weight.detach().clone(),
        )
    assert memory.sizes.count(12 * 200 * 4) == 1
