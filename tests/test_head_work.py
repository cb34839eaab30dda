"""What the head costs: GEMM passes counted one by one, and no [N, V] tensor at any time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch import Tensor

from helpers import PAIR, WAYS, Problem, Way, evaluate, problem, reference
from una_fast import (
    Feedback,
    Objective,
    UnaOutput,
    gather_logps,
    linear_una_loss,
    sequence_logps,
    token_logps,
)
from una_fast.counters import FlopCounter, LiveBytes
from una_fast.head import eager, plan

VOCAB = 101
TRAINED, FROZEN = ("hidden", "weight"), ("hidden",)


def work(
    way: Way, op: Callable[..., UnaOutput] = linear_una_loss, dtype=torch.float32, **arguments
) -> float:
    """GEMM passes of one forward and backward."""
    p = way.problem(VOCAB, dtype=dtype)
    ref = reference(p, arguments.pop("ref", "cached"))
    if op is linear_una_loss:
        trained = "weight" in arguments.get("train", TRAINED)
        arguments["workspace_mb"] = way.workspace_mb(dtype, trained=trained)
    with FlopCounter() as counter:
        evaluate(op, p, **ref, **arguments)
    return counter.passes(len(p.hidden), way.dim, VOCAB)


# --- passes ---------------------------------------------------------------------------------------


def test_the_counter_counts_eager():
    assert work(WAYS["pair, resident"], eager.linear_una_loss) == 3
    assert work(WAYS["pair, resident"], eager.linear_una_loss, ref="own") == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_head(way, dtype):
    """3 passes, 4 where logits are recomputed, 1 for responses in no unit; the reference costs 1 or
    nothing.
    """
    # What a bfloat16 weight saves of its accumulator holds all logits of so small a call.
    is_direct = dtype == torch.bfloat16 and way == "pair, a few cells"
    way = WAYS[way]
    passes = 3 if is_direct else way.passes
    arguments = {"train": TRAINED, "dtype": dtype}
    assert work(way, **arguments) == pytest.approx(passes, abs=1e-9)
    assert work(way, ref="policy", **arguments) == pytest.approx(passes + 1, abs=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ref", ["cached", "own"])
def test_frozen_head(way, ref):
    """2 passes, whatever links the responses; 3 over vocabulary slices."""
    way = WAYS[way]
    p = way.problem(VOCAB)
    scored = torch.isin(
        torch.arange(len(way.lengths)), torch.cat([way.feedback.first, way.feedback.second])
    )
    share = float(p.cu_seqlens.diff()[scored].sum()) / len(p.hidden)
    policy = (3 if "sliced" in way.kinds else 2) * share + (1 - share)
    assert work(way, ref=ref, train=FROZEN) == pytest.approx(policy + (ref != "cached"), abs=1e-9)


@pytest.mark.parametrize(
    ("links", "block", "passes"),
    [
        ("pair", "resident", 3),
        ("pair", "streamed", 3),
        ("pair", "sliced", 4),
        ("two pairs", "scratch", 3),
        ("scores too", "resident", 3),
        ("scores too", "streamed", 3),
        ("scores too", "recomputed", 4),
        ("four", "resident", 3),
        ("four", "streamed", 3),
        ("four", "recomputed", 4),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_pass_counts_in_plain_numbers(links, block, passes, normalize):
    """The table of the design, independent of the arithmetic of `WAYS`."""
    way, objective = WAYS[f"{links}, {block}"], Objective(length_normalize=normalize)
    assert work(way, train=TRAINED, objective=objective) == passes
    assert work(way, train=TRAINED, objective=objective, ref="own") == passes + 1


@pytest.mark.parametrize(
    "way", ["pair, resident", "pair, streamed", "scores too, recomputed", "two pairs, no scratch"]
)
def test_weight_only_and_bias_only(way):
    way = WAYS[way]
    assert work(way, train=("weight",)) == pytest.approx(way.passes - 1, abs=1e-9), (
        "nobody asked for dL/dh"
    )
    # A sum over rows, each with a factor, is a product with a vector.
    assert work(way, train=("bias",)) == pytest.approx(1 + 1 / way.dim, abs=1e-9), (
        "a bias needs no [V, D] accumulator"
    )
    assert work(way, train=("hidden", "bias")) == pytest.approx(2 + 1 / way.dim, abs=1e-9)


@pytest.mark.parametrize(
    "way", ["pair, resident", "pair, streamed", "mixed, all at once", "mixed, sliced"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_one_pass_and_no_gradient_buffer(way, dtype):
    way = WAYS[way]
    vocab, dim = 5001, 64  # every tensor of the size of the head would stand out
    p = problem(0, lengths=way.lengths, dim=dim, vocab=vocab, feedback=way.feedback, dtype=dtype)
    arguments = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "workspace_mb": 0.5}
    p.hidden.requires_grad_(), p.weight.requires_grad_()
    with torch.no_grad(), FlopCounter() as counter, LiveBytes() as memory:
        linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **arguments)
    assert counter.passes(len(p.hidden), dim, vocab) == 2
    assert memory.largest() <= 0.5 * 2**20 < vocab * dim * 4
    with torch.no_grad(), FlopCounter() as counter, LiveBytes() as memory:
        sequence_logps(p.hidden, p.weight, p.targets, p.cu_seqlens, workspace_mb=0.5)
    assert counter.passes(len(p.hidden), dim, vocab) == 1
    assert memory.largest() <= 0.5 * 2**20


def test_inputs_without_gradients_cost_one_pass():
    """Eval that forgot no_grad: nothing requires a gradient, so none is built."""
    p = WAYS["pair, streamed"].problem(VOCAB)
    ref = reference(p, "cached")
    with FlopCounter() as counter:
        linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **ref)
    assert counter.passes(*p.hidden.shape, VOCAB) == 1


WHOLE, HALF, SLICED = 1.0, 0.5, 0.01  # share of the rows whose logits fit the workspace


def later_passes(
    train: tuple[str, ...], share: float, op: str, stats: tuple[str, ...] = ()
) -> float:
    """GEMM passes of a call with any upstream gradient, 90 rows."""
    p = problem(0, lengths=[50, 40], dtype=torch.float32, feedback=PAIR)
    hidden = p.hidden.requires_grad_("hidden" in train)
    weight = p.weight.requires_grad_("weight" in train)
    workspace_mb = (share * 90 * 101 * 4 + 1) / 2**20
    with FlopCounter() as counter:
        if op == "sequence":
            out = sequence_logps(
                hidden, weight, p.targets, p.cu_seqlens, workspace_mb=workspace_mb
            ).sum()
        else:
            found = token_logps(hidden, weight, p.targets, workspace_mb=workspace_mb, stats=stats)
            out = sum(x.sum() for x in (found[0], *found[1].values())) if stats else found.sum()
        if train:
            out.backward()
    return counter.passes(*hidden.shape, len(weight))


@pytest.mark.parametrize("op", ["token", "sequence"])
@pytest.mark.parametrize(
    ("share", "passes"), [(WHOLE, (3, 2, 2, 1)), (HALF, (3.5, 2.5, 2.5, 1)), (SLICED, (4, 3, 3, 1))]
)
def test_logits_that_fit_the_workspace_are_kept_for_any_upstream(share, passes, op):
    """No pass is spent on them again; rows that do not fit cost one more."""
    trained = (TRAINED, FROZEN, ("weight",), ())
    assert tuple(later_passes(train, share, op) for train in trained) == passes


@pytest.mark.parametrize(
    ("rows", "workspace_mb", "cuts", "kept"),
    [
        (4096, 2048, [4096], (0, 4096)),
        (5000, 2048, [904, 4096], (904, 5000)),
        (65536, 2048, [4096] * 16, (61440, 65536)),
        # More products, but fewer trips to the weight and its gradient.
        (8192, 512, [8192], None),
    ],
)
def test_the_last_chunk_is_as_large_as_the_workspace(rows, workspace_mb, cuts, kept):
    """Chunks of equal size would keep fewer rows, and cost as many trips to the weight."""
    size = plan.head_size(128256, 4096, "cuda", 2)
    made = plan.kept_plan(size, rows, workspace_mb << 20, 4096)
    assert [stop - start for start, stop in made.cuts] == cuts and made.kept == kept
    assert (made.tile.vocab == 128256) == (kept is not None)
    assert made.backward_cuts[0] == made.cuts[-1]
    assert sorted(made.backward_cuts) == list(made.cuts)


def test_statistics_cost_no_pass():
    stats = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    assert [later_passes(TRAINED, share, "token", stats) for share in (WHOLE, HALF)] == [3, 3.5]
    assert later_passes((), WHOLE, "token", stats) == 1


def test_a_second_backward_computes_the_logits_again():
    p = problem(0)
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    out = token_logps(*leaves, p.targets).sum()
    for passes in (2, 3):
        with FlopCounter() as counter:
            torch.autograd.grad(out, leaves, retain_graph=True)
        assert counter.passes(*p.hidden.shape, len(p.weight)) == passes


def test_bad_feedback_is_refused_before_any_pass():
    """One outlier must not cost a reference pass over a long batch first."""
    p = problem(0, lengths=[5], feedback=Feedback.scores([0], [3.0]))
    with FlopCounter() as counter, pytest.raises(ValueError, match="outside"):
        linear_una_loss(
            p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, ref_hidden=p.ref_hidden
        )
    assert counter.flop == 0


# --- memory ---------------------------------------------------------------------------------------


def measured(
    op: Callable[..., UnaOutput], p: Problem | Namespace, **arguments
) -> tuple[LiveBytes, list[Tensor]]:
    """Every allocation of one forward and backward, and the gradients it returned."""
    leaves = [p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()]
    with LiveBytes() as memory:
        out = op(*leaves, p.targets, p.cu_seqlens, p.feedback, **arguments)
        out.loss.backward()
    return memory, [*out, *(x.grad for x in leaves)]


LONG = (6_000, 16_000)  # rows, vocabulary: float32 logits would take 366 MiB


@pytest.mark.parametrize("workspace_mb", [16, None])
def test_no_tensor_of_rows_by_vocabulary(workspace_mb):
    """The largest tensor beside outputs and the one [V, D] accumulator is within the budget."""
    rows, vocab = LONG
    feedback = Feedback.merge([PAIR, Feedback.binary([2], [True])])
    p = Namespace(
        hidden=torch.randn(rows, 4),
        weight=torch.randn(vocab, 4),
        targets=torch.randint(vocab, (rows,)),
        cu_seqlens=torch.tensor([0, 2_700, 5_100, 5_700, rows]),
        feedback=feedback,
    )
    memory, returned = measured(
        linear_una_loss, p, ref_logps=torch.zeros(4), workspace_mb=workspace_mb
    )
    budget = (workspace_mb or 256) * 2**20
    assert memory.largest(excluding=returned) <= budget < rows * vocab * 4
    # Blocks of row operations and the rows of a chunk come on top of the budget, a few MiB whatever
    # its size.
    assert memory.peak(excluding=returned) <= budget + 8 * 2**20
    assert memory.largest(excluding=returned) >= budget // 2, "the budget is there to be used"


BUDGETED = [(way, torch.float32) for way in WAYS] + [
    (way, torch.bfloat16)
    for way in WAYS
    # The weight would be cast row by row, slowly.
    if "sliced" not in WAYS[way].kinds and way != "pair, row by row"
]


@pytest.mark.parametrize(("way", "dtype"), BUDGETED)
@pytest.mark.parametrize("train", [TRAINED, FROZEN])
def test_every_way_stays_within_its_budget(way, dtype, train, monkeypatch):
    """Scratch included. Row blocks are made small, so that the budget is not lost in them."""
    monkeypatch.setattr("una_fast.head.torch_engine.CACHE_BLOCK_BYTES", 1)
    way, scale = WAYS[way], 4
    lengths, vocab = [scale * n for n in way.lengths], VOCAB * scale
    p = problem(
        0, lengths=lengths, dim=scale * way.dim, vocab=vocab, feedback=way.feedback, dtype=dtype
    )
    budget = scale**2 * way.workspace_mb(dtype)
    p.hidden.requires_grad_(), p.weight.requires_grad_("weight" in train)
    with LiveBytes() as memory:
        arguments = {"ref_logps": torch.zeros(len(lengths)), "workspace_mb": budget}
        out = linear_una_loss(p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **arguments)
    built = [x for x in out.loss.grad_fn.grads if x is not None]
    # Beside the budget: numbers per row, and four rows of logits in the row operations.
    slack = 40 * len(p.hidden) + 4 * 8 * vocab
    assert memory.peak(excluding=built) <= budget * 2**20 + slack


@pytest.mark.parametrize(
    "way", ["pair, resident", "two pairs, scratch", "scores too, recomputed", "pair, sliced"]
)
def test_nothing_but_gradients_is_kept_for_backward(way):
    way = WAYS[way]
    p = way.problem(1001, dtype=torch.float32)
    p.hidden.requires_grad_(), p.weight.requires_grad_()
    with LiveBytes() as memory:
        ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
        loss = linear_una_loss(
            p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, **ref, workspace_mb=0.1
        ).loss
    gradients = 4 * (p.hidden.numel() + p.weight.numel())
    assert loss.requires_grad
    assert memory.live() <= gradients + 64 * len(p.hidden)


def test_peak_is_at_most_half_of_eager():
    """One pair of 2 x 256 rows over 32,000 entries, policy and reference, the budget scaled with
    the rows.
    """
    p = problem(0, lengths=[256, 256], dim=64, vocab=32_000, dtype=torch.float32, feedback=PAIR)
    ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
    ours, theirs = (
        memory.peak(excluding=returned)
        for memory, returned in (
            measured(linear_una_loss, p, workspace_mb=64, **ref),
            measured(eager.linear_una_loss, p, **ref),
        )
    )
    assert ours <= 0.5 * theirs, f"{ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"


@pytest.mark.parametrize("layout", ["contiguous", "shifted"])
def test_gather_logps_keeps_no_copy_of_the_logits(layout, monkeypatch):
    """Callers hold [B, T, V] and pass logits[:, :-1]:
    copying that is as large as the softmax that it saves.
    """
    monkeypatch.setattr("una_fast.head.torch_engine.CACHE_BLOCK_BYTES", 1)
    logits = torch.randn(2, 65, 4001).requires_grad_()
    targets = torch.randint(0, 4001, (2, 64))
    given = (
        logits[:, :-1]
        if layout == "shifted"
        else logits[:, :64].detach().contiguous().requires_grad_()
    )
    size = 2 * 64 * 4001 * 4
    with LiveBytes() as memory:
        out = gather_logps(given, targets)
    assert memory.peak() < 0.1 * size, "forward"
    with LiveBytes() as memory:
        (grad,) = torch.autograd.grad(out.sum(), given)
    assert memory.peak(excluding=[grad]) < 0.1 * size, "backward"


@pytest.mark.parametrize("stats", [(), ("entropy", "is_top1")], ids=["plain", "stats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1500, 500, 50], ids=["chunks", "a part kept", "all kept"])
def test_kept_logits_stay_within_the_workspace(rows, dtype, stats, monkeypatch):
    """From forward to the end of backward: kept logits, buffers and copies."""
    monkeypatch.setattr("una_fast.head.torch_engine.CACHE_BLOCK_BYTES", 1)
    p = problem(0, lengths=[rows], dim=8, vocab=1001, dtype=dtype, feedback=PAIR)
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    with LiveBytes() as memory:
        found = token_logps(*leaves, p.targets, workspace_mb=1, stats=stats)
        kept = memory.live()
        out = found[0].sum() + found[1]["entropy"].sum() if stats else found.sum()
        out.backward()
        del found, out
    returned = [x.grad for x in leaves]
    # Beside the budget: numbers per row, and a few rows of logits in the row operations; a bfloat16
    # gradient of several chunks has an accumulator, which is an output in float32.
    slack = 96 * rows + 6 * 4 * 1001
    if dtype == torch.bfloat16:
        slack += 4 * p.weight.numel()
    assert memory.peak(excluding=returned) <= 2**20 + slack
    full = rows * 1001 * 4
    assert kept >= 0.8 * min(full, 2**20), "the logits that fit are kept"
    assert memory.live() <= sum(x.nbytes for x in returned) + 100, "backward frees them"


def test_nothing_is_kept_without_gradients():
    p = problem(0, lengths=[200], dim=8, vocab=1001, dtype=torch.float32, feedback=PAIR)
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    with torch.no_grad(), LiveBytes() as memory:
        found = token_logps(*leaves, p.targets, stats=("entropy",))
    assert found[0].shape == (200,) and memory.live() <= 200 * 16
    with LiveBytes() as memory:
        found = token_logps(p.hidden.detach(), p.weight.detach(), p.targets)
    assert found.shape == (200,) and memory.live() <= 200 * 16


def test_calls_that_wait_keep_one_workspace_together():
    """A loss over many calls must not hold a workspace for each; a graph that is dropped gives its
    room back."""
    p = problem(0, lengths=[200], dim=8, vocab=1001, dtype=torch.float32, feedback=PAIR)
    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    logits = 200 * 1001 * 4
    workspace_mb = 2.5 * logits / 2**20

    def passes(calls: int) -> float:
        with FlopCounter() as counter, LiveBytes() as memory:
            outs = [
                token_logps(*leaves, p.targets, workspace_mb=workspace_mb) for _ in range(calls)
            ]
            assert memory.live() <= 2 * logits + calls * 8192
            torch.autograd.grad(sum(out.sum() for out in outs), leaves)
        return counter.passes(*p.hidden.shape, len(p.weight))

    assert passes(4) == 2 * 3 + 2 * 4
    held = token_logps(*leaves, p.targets, workspace_mb=workspace_mb)
    assert passes(2) == 3 + 4
    del held
    assert passes(2) == 2 * 3
