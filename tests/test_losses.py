"""The loss table: every form against the formula, equality with known methods, refusals."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from una_fast import Feedback, Objective, UnaOutput, linear_una_loss, una_loss
from una_fast.losses import BINARY_FORMS, PAIR_FORMS, SCORE_FORMS

NAN, INF = float("nan"), float("inf")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(x: float, label: float) -> float:
    return -label * math.log(sigmoid(x)) - (1 - label) * math.log(1 - sigmoid(x))


# Written out once more, in plain floats, from the equations of the paper.
PAIR_FORMULAS = {
    "logistic": lambda x, m: -math.log(sigmoid(x - m)),
    "linear": lambda x, m: -(x - m),
    "squared": lambda x, m: (x - m) ** 2,
}
POINT_FORMULAS = {
    "bce": cross_entropy,
    "mse": lambda x, y: (sigmoid(x) - y) ** 2,
    "reward_mse": lambda x, y: (x - y) ** 2,
}


def logps(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("form", PAIR_FORMS)
@pytest.mark.parametrize(
    ("margin", "target", "weight"),
    [(0.0, 1.0, 1.0), (0.7, 1.0, 2.5), (-0.3, 0.5, 1.0), (0.2, 0.0, 0.0)],
)
def test_pair_formula(form, margin, target, weight):
    objective = Objective(beta=0.3, pair=form, offset=5.0)  # offsets cancel in pairs
    feedback = Feedback.pairs([1], [0], margin=margin, target=target, weight=weight)
    out = una_loss(logps(-4.0, -1.5), logps(-2.0, -3.0), feedback, objective=objective)
    x = 0.3 * 1.5 - 0.3 * -2.0
    formula = PAIR_FORMULAS[form]
    expected = target * formula(x, margin) + (1 - target) * formula(-x, margin)
    assert out.unit_losses.item() == pytest.approx(expected, rel=1e-12)
    assert out.loss.item() == pytest.approx(weight * expected, rel=1e-12)
    assert out.rewards.tolist() == pytest.approx([-0.6, 0.45], rel=1e-12), "rewards carry no offset"


@pytest.mark.parametrize(
    ("kind", "form", "value"),
    [("binary", form, label) for form, label in product(BINARY_FORMS, (True, False))]
    + [("scores", form, score) for form, score in product(SCORE_FORMS, (0.0, 0.3, 1.0))]
    + [("scores", "reward_mse", -7.5)],
)
@pytest.mark.parametrize(("constant", "offset", "weight"), [(0.0, 0.0, 1.0), (0.4, -1.1, 3.0)])
def test_label_and_score_formula(kind, form, value, constant, offset, weight):
    field = {"binary": "binary", "scores": "score"}[kind]
    objective = Objective(beta=0.2, offset=constant, **{field: form})
    feedback = getattr(Feedback, kind)([0], [value], weight=weight, offset=offset)
    out = una_loss(logps(-4.0), logps(-9.0), feedback, objective=objective)
    expected = POINT_FORMULAS[form](1.0 + constant + offset, float(value))
    assert out.unit_losses.item() == pytest.approx(expected, rel=1e-12)
    assert out.loss.item() == pytest.approx(weight * expected, rel=1e-12)
    assert out.rewards.item() == pytest.approx(1.0, rel=1e-12), "rewards carry no offset"


FORMS = [
    *(("pair", form) for form in PAIR_FORMS),
    *(("binary", form) for form in BINARY_FORMS),
    *(("score", form) for form in SCORE_FORMS),
]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_extreme_rewards_stay_finite(kind, form):
    """log(sigmoid(x)) is -inf below -745: as a loss, gradients would be NaN after a bad step."""
    objective = Objective(beta=1.0, **{kind: form})
    feedback = {
        "pair": Feedback.pairs([0], [1], target=0.9),
        "binary": Feedback.binary([0, 1], [True, False]),
        "score": Feedback.scores([0, 1], [0.9, 0.1]),
    }[kind]
    for lead in (0.0, 1e3, -1e3, 1e5, -1e5):
        policy = logps(lead, -lead)
        out = una_loss(policy, torch.zeros(2), feedback, objective=objective)
        out.loss.backward()
        assert torch.isfinite(out.loss) and torch.isfinite(policy.grad).all(), lead


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("length_normalize", [False, True])
def test_gradcheck(kind, form, length_normalize):
    """Over units of all kinds that share responses, with each form once."""
    feedback = Feedback.merge(
        [
            Feedback.pairs(
                [0, 0, 2],
                [1, 2, 1],
                target=[1.0, 0.7, 0.5],
                margin=[0.0, 0.3, 0.0],
                weight=[1, 2, 0.5],
            ),
            Feedback.binary([3, 1], [True, False], offset=[0.1, -0.2]),
            Feedback.scores([1, 2], [0.2, 0.8], weight=0.3),
        ]
    )
    objective = Objective(beta=0.7, offset=0.2, length_normalize=length_normalize, **{kind: form})
    torch.manual_seed(0)
    policy = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 7, 2, 4])
    assert gradcheck(
        lambda x: una_loss(x, ref, feedback, objective=objective, lengths=lengths).loss, (policy,)
    )


def test_only_the_loss_is_differentiable_and_everything_is_float64():
    policy = torch.randn(3, requires_grad=True)
    ref = torch.randn(3, requires_grad=True)
    out = una_loss(
        policy, ref, Feedback.merge([Feedback.pairs([0], [1]), Feedback.scores([2], [0.4])])
    )
    assert isinstance(out, UnaOutput)
    assert {name for name, x in out._asdict().items() if x.requires_grad} == {"loss"}
    assert {x.dtype for x in out} == {torch.float64}
    assert [x.shape for x in out] == [(), (3,), (3,), (3,), (2,)]
    out.loss.backward()
    assert policy.grad.dtype == torch.float32 and ref.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logps_are_computed_in_float64(dtype):
    policy, ref = torch.randn(4).to(dtype), torch.randn(4).to(dtype)
    feedback = Feedback.merge([Feedback.pairs([0], [1]), Feedback.binary([2, 3], [True, False])])
    narrow = una_loss(policy, ref, feedback)
    wide = una_loss(policy.double(), ref.double(), feedback)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_do_not_share_memory_with_the_inputs(dtype):
    """A caller that zeroes out.ref_logps in place must not zero its cache."""
    policy, ref = torch.randn(2, dtype=dtype), torch.randn(2, dtype=dtype)
    before = policy.clone(), ref.clone()
    out = una_loss(policy, ref, Feedback.pairs([0], [1]))
    out.logps.zero_()
    out.ref_logps.zero_()
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])


@pytest.mark.parametrize(
    ("arguments", "divisor"),
    [
        ({}, 3),
        ({"reduction": "sum"}, 1),
        ({"num_units": 12}, 12),
        ({"num_units": torch.tensor(6)}, 6),
        ({"num_units": torch.tensor(2.0, dtype=torch.float64)}, 2),
        ({"reduction": "sum", "num_units": 12}, 1),
    ],
)
def test_denominator_counts_units_not_weights(arguments, divisor):
    feedback = Feedback.scores([0, 1, 1], [0.1, 0.6, 0.9], weight=[3.0, 0.0, 0.5])
    out = una_loss(logps(-1.0, -2.0), logps(0.0, -5.0), feedback, **arguments)
    assert out.loss.shape == ()
    weighted = float((out.unit_losses * feedback.weight).sum())
    assert out.loss.item() == pytest.approx(weighted / divisor, rel=1e-12)


def test_accumulated_micro_batches_equal_the_whole():
    """Dividing each micro-batch by its own count weights units by the size of their micro-batch."""
    torch.manual_seed(1)
    policy, ref = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    pair = Feedback.pairs([0], [1])
    scores = Feedback.scores([0, 1, 2], [0.1, 0.5, 1.0])
    whole = Feedback.merge([pair, scores.shift(2)])
    split = una_loss(policy[:2], ref[:2], pair, num_units=4).loss
    split += una_loss(policy[2:], ref[2:], scores, num_units=4).loss
    torch.testing.assert_close(split, una_loss(policy, ref, whole).loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("responses", [0, 2])
def test_no_units_give_a_zero_loss_that_is_still_in_the_graph(responses):
    policy = torch.randn(responses, requires_grad=True)
    out = una_loss(policy, torch.zeros(responses), Feedback.merge([]), num_units=8)
    assert out.loss.item() == 0 and out.loss.requires_grad and out.unit_losses.shape == (0,)
    out.loss.backward()
    assert torch.equal(policy.grad, torch.zeros(responses))


def test_length_normalization_is_a_mean_over_tokens_in_rewards_only():
    lengths = torch.tensor([4, 10])
    objective = Objective(beta=0.5, length_normalize=True)
    out = una_loss(
        logps(-4.0, -20.0),
        logps(-8.0, -5.0),
        Feedback.pairs([0], [1]),
        objective=objective,
        lengths=lengths,
    )
    assert out.rewards.tolist() == pytest.approx([0.5, -0.75], rel=1e-12)
    assert out.logps.tolist() == [-4.0, -20.0] and out.ref_logps.tolist() == [-8.0, -5.0]


# ---- equal to known methods ----


@pytest.mark.parametrize(
    "rewards", [[0.3, -0.1, 0.7, 1.5], [0.0, 22.0, 30.0, 0.0], [-12.0, 12.0, -11.0, 10.0]]
)
def test_pair_logistic_is_dpo(rewards):
    """Also for pairs in the wrong order by more than 20, where softplus would be cut off."""
    policy = logps(*(10 * r for r in rewards))
    ref = torch.zeros(4, dtype=torch.float64)
    chosen, rejected = (policy - ref).view(2, 2).T
    dpo = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    ours = una_loss(policy, ref, Feedback.pairs([0, 2], [1, 3]), objective=Objective(beta=0.1)).loss
    torch.testing.assert_close(ours, dpo, rtol=1e-14, atol=0)
    ours_grad, dpo_grad = (torch.autograd.grad(loss, policy)[0] for loss in (ours, dpo))
    torch.testing.assert_close(ours_grad, dpo_grad, rtol=1e-13, atol=0)


def test_binary_bce_is_bco_with_shift_zero():
    torch.manual_seed(0)
    policy = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, dtype=torch.float64)
    label = torch.tensor([True, False, True, True, False, False])
    reward, shift = 0.1 * (policy - ref), 0.0
    bco = torch.where(label, -F.logsigmoid(reward - shift), -F.logsigmoid(-(reward - shift))).mean()
    ours = una_loss(
        policy, ref, Feedback.binary(range(6), label), objective=Objective(beta=0.1)
    ).loss
    torch.testing.assert_close(ours, bco, rtol=1e-14, atol=0)
    ours_grad, bco_grad = (torch.autograd.grad(loss, policy)[0] for loss in (ours, bco))
    torch.testing.assert_close(ours_grad, bco_grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_scores_of_zero_and_one_are_labels(form):
    torch.manual_seed(0)
    policy = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(4, dtype=torch.float64)
    label = [True, False, False, True]
    objective = Objective(binary=form, score=form, offset=0.3)
    scores = Feedback.scores(range(4), [float(x) for x in label], offset=0.1)
    labels = Feedback.binary(range(4), label, offset=0.1)
    by_score = una_loss(policy, ref, scores, objective=objective)
    by_label = una_loss(policy, ref, labels, objective=objective)
    assert torch.equal(by_score.unit_losses, by_label.unit_losses)
    grads = [torch.autograd.grad(out.loss, policy)[0] for out in (by_score, by_label)]
    assert torch.equal(*grads)


def trl_dpo_loss(
    loss_type: str, token_logps: torch.Tensor, mask: torch.Tensor, ref: torch.Tensor, beta: float
):
    """Call DPOTrainer._compute_loss of TRL on given token log-probs: the formula, not a copy.

    token_logps: [2 pairs, T], chosen sequences first
    mask: [2 pairs, T + 1], True on completion tokens
    """
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl").DPOTrainer
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    this = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    extra = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(
        log_probs=token_logps, entropy=extra, mean_logits=extra, is_top1=extra.bool()
    )
    chosen, rejected = ref.chunk(2)
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "attention_mask": mask.long(),
        "completion_mask": mask.long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trainer._compute_loss(this, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("loss_type", "objective", "feedback"),
    [
        ("sigmoid", Objective(beta=0.3), Feedback.pairs([0, 1, 2], [3, 4, 5])),
        (
            "sigmoid_norm",
            Objective(beta=0.3, length_normalize=True),
            Feedback.pairs([0, 1, 2], [3, 4, 5]),
        ),
        ("bco_pair", Objective(beta=0.3), Feedback.binary(range(6), [True] * 3 + [False] * 3)),
    ],
)
def test_same_as_trl(loss_type, objective, feedback):
    torch.manual_seed(0)
    lengths = torch.tensor([3, 7, 1, 5, 2, 6])
    mask = torch.arange(9) >= 9 - lengths.unsqueeze(1)
    token_logps = (torch.randn(6, 8, dtype=torch.float64) * mask[:, 1:]).requires_grad_()
    ref = torch.randn(6, dtype=torch.float64)
    theirs = trl_dpo_loss(loss_type, token_logps, mask, ref, beta=0.3)
    sums = token_logps.sum(1)
    ours = una_loss(sums, ref, feedback, objective=objective, num_units=3, lengths=lengths).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    ours_grad, their_grad = (torch.autograd.grad(loss, token_logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(
        ours_grad * mask[:, 1:], their_grad * mask[:, 1:], rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("where", ["objective", "unit"])
def test_reward_mse_on_policy_is_the_rlhf_gradient(baseline, where):
    """On-policy, grad E_y[(r + f - R)^2] = -2 beta grad J, exactly, for any constant f.

    With r = beta log(pi/ref), and the sampling weight pi(y) of each response held fixed,
        grad sum_y pi(y) (r + f - R)^2 = 2 beta sum_y pi(y) (r + f - R) grad log pi(y).
    The regularised objective is J = E_pi[R] - beta KL(pi || ref) = sum_y pi(y) (R - r), so
        grad J = sum_y pi(y) (R - r) grad log pi(y) - beta sum_y pi(y) grad log pi(y),
    and sum_y pi(y) grad log pi(y) = grad 1 = 0 removes the last term and every constant f: the two
    sums differ by the factor -2 beta. The responses are all sequences of two tokens over a
    vocabulary of three.
    """
    beta, vocab, dim = 0.3, 3, 4
    torch.manual_seed(0)
    # a state per prefix: none, 0, 1, 2
    states = torch.randn(1 + vocab, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(vocab, vocab, dtype=torch.float64)
    ref = torch.log_softmax(torch.randn(vocab**2, dtype=torch.float64), 0).view(vocab, vocab)

    first = torch.log_softmax(states[0] @ weight.T, 0)
    second = torch.log_softmax(states[1:] @ weight.T, 1)
    log_pi = first.unsqueeze(1) + second  # [first token, second token]
    objective_j = (log_pi.exp() * (reward - beta * (log_pi - ref))).sum()
    expected = [-2 * beta * g for g in torch.autograd.grad(objective_j, (states, weight))]

    samples = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))  # [9, 2]
    prefixes = torch.stack([torch.zeros(len(samples), dtype=torch.int64), 1 + samples[:, 0]], 1)
    constant = baseline if where == "objective" else 0.0
    offset = baseline if where == "unit" else 0.0
    pi = log_pi.detach().exp().flatten()
    feedback = Feedback.scores(range(9), reward.flatten(), weight=pi, offset=offset)
    out = linear_una_loss(
        states[prefixes.flatten()],
        weight,
        samples.flatten(),
        torch.arange(0, 19, 2),
        feedback,
        objective=Objective(beta=beta, score="reward_mse", offset=constant),
        ref_logps=ref.flatten(),
        reduction="sum",
    )
    out.loss.backward()
    for got, want in zip((states.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# ---- refusals ----

ONE = Feedback.scores([0], [0.5])
REFUSED = {
    "pair form": (
        lambda: Objective(pair="hinge"),
        r"pair='hinge' is not a loss form; choose one of .*'logistic'",
    ),
    "binary form": (
        lambda: Objective(binary="reward_mse"),
        r"binary='reward_mse' .* \['bce', 'mse'\]",
    ),
    "score form": (
        lambda: Objective(score="mae"),
        r"score='mae' .* \['bce', 'mse', 'reward_mse'\]",
    ),
    "beta zero": (lambda: Objective(beta=0.0), r"beta=0\.0 must be positive and finite"),
    "beta negative": (lambda: Objective(beta=-0.1), r"beta=-0\.1"),
    "beta NaN": (lambda: Objective(beta=NAN), r"beta=nan"),
    "beta infinite": (lambda: Objective(beta=INF), r"beta=inf"),
    "offset NaN": (lambda: Objective(offset=NAN), r"offset=nan must be finite"),
    "offset infinite": (lambda: Objective(offset=-INF), r"offset=-inf must be finite"),
    "shapes differ": (
        lambda: una_loss(torch.zeros(2), torch.zeros(3), ONE),
        r"logps \(2,\) and ref_logps \(3,\)",
    ),
    "per token": (
        lambda: una_loss(torch.zeros(2, 3), torch.zeros(2, 3), ONE),
        r"must both be \[S\]",
    ),
    "missing response": (
        lambda: una_loss(torch.zeros(1), torch.zeros(1), Feedback.pairs([0], [1])),
        r"unit 0 \(pair\) names response 1, but the call has 1 responses",
    ),
    "reduction": (
        lambda: una_loss(torch.zeros(1), torch.zeros(1), ONE, reduction="none"),
        r"reduction='none' is not one of \('mean', 'sum'\)",
    ),
    "score over one": (
        lambda: una_loss(torch.zeros(2), torch.zeros(2), Feedback.scores([0, 1], [0.5, 1.25])),
        r"score 1\.25 lies outside \[0, 1\], which score='mse' .*reward_mse",
    ),
    "score below zero": (
        lambda: una_loss(
            torch.zeros(1),
            torch.zeros(1),
            Feedback.scores([0], [-2]),
            objective=Objective(score="bce"),
        ),
        r"score -2\.0 lies outside \[0, 1\], which score='bce'",
    ),
    "no lengths": (
        lambda: una_loss(
            torch.zeros(1), torch.zeros(1), ONE, objective=Objective(length_normalize=True)
        ),
        r"length_normalize=True needs lengths=",
    ),
    "lengths of another call": (
        lambda: una_loss(
            torch.zeros(2),
            torch.zeros(2),
            ONE,
            objective=Objective(length_normalize=True),
            lengths=torch.tensor([3]),
        ),
        r"lengths",
    ),
    "denominator not a number": (
        lambda: una_loss(torch.zeros(1), torch.zeros(1), ONE, num_units=torch.tensor([4])),
        r"num_units",
    ),
    "denominator zero": (
        lambda: una_loss(torch.zeros(1), torch.zeros(1), ONE, num_units=0),
        r"num_units",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_outside_the_interval_are_rewards():
    out = una_loss(
        torch.zeros(1),
        torch.zeros(1),
        Feedback.scores([0], [-7.5]),
        objective=Objective(score="reward_mse"),
    )
    assert out.loss.item() == 7.5**2
