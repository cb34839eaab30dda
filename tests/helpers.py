"""Shared by the tests: random problems for the head, and the error measure of the contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast import Feedback, UnaOutput
from una_fast.head import eager
from una_fast.head.plan import Plan, components


@dataclass
class Problem:
    """A random call of linear_una_loss with peaked logits and ragged responses."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    feedback: Feedback
    ref_hidden: Tensor
    ref_weight: Tensor


def ragged(responses: int, longest: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, longest + 1, (responses,), generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def mixed_feedback(generator: torch.Generator) -> Feedback:
    """Over 8 responses:
    single pairs, a pair with both scores, all pairs of three, labels; response 7 in no unit.
    """

    def rand(n: int) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    return Feedback.merge(
        [
            Feedback.pairs([0], [2], margin=0.3, weight=1.7),
            Feedback.binary([1], [True], offset=0.2),
            Feedback.pairs([4, 4, 5], [5, 6, 6], target=[0.9, 1.0, 0.5], weight=rand(3)),
            Feedback.scores([4, 3], rand(2), weight=[0.0, 2.0], offset=-0.1),
            Feedback.binary([1, 3], [False, True]),
        ]
    )


def problem(
    seed: int = 0,
    *,
    responses: int = 8,
    longest: int = 9,
    dim: int = 24,
    vocab: int = 101,
    peak: float = 50.0,
    dtype: torch.dtype = torch.float64,
    feedback: Feedback | None = None,
    lengths: Sequence[int] | None = None,
) -> Problem:
    """Hidden states and weights in `dtype`, scaled so that the largest |logit| is `peak`.

    lengths: tokens per response; default: random ones, for `responses` responses of at most
    `longest` tokens."""
    g = torch.Generator().manual_seed(seed)
    cu = (
        ragged(responses, longest, g)
        if lengths is None
        else F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
    )
    rows = int(cu[-1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(rows, dim), normal(vocab, dim)
    if rows:
        weight *= peak / (hidden @ weight.T).abs().max()
    ref_hidden = hidden + 0.05 * normal(rows, dim)
    return Problem(
        hidden.to(dtype),
        weight.to(dtype),
        normal(vocab).to(dtype),
        torch.randint(0, vocab, (rows,), generator=g),
        cu,
        feedback or mixed_feedback(g),
        ref_hidden.to(dtype),
        (weight + 0.02 * normal(vocab, dim)).to(dtype),
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |error| / max |truth|; 0 for two empty tensors."""
    assert value.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().abs().max().clamp_min(1e-300)
    return float((value.double() - truth.double()).abs().max() / scale)


LEAVES = ("hidden", "weight", "bias")


def cast(p: Problem, dtype: torch.dtype) -> Problem:
    """The same problem, floats in another dtype."""
    floats = {
        f.name: getattr(p, f.name).to(dtype)
        for f in fields(p)
        if isinstance(getattr(p, f.name), Tensor) and getattr(p, f.name).is_floating_point()
    }
    return replace(p, **floats)


def reference(p: Problem, kind: str) -> dict[str, Tensor]:
    """Arguments that give the reference: "cached" | "own" weight | the "policy" weight and bias."""
    if kind == "cached":
        noise = torch.linspace(-3, 3, len(p.cu_seqlens) - 1, dtype=torch.float64)
        logps = eager.token_logps(p.hidden.double(), p.weight.double(), p.targets).cumsum(0)
        return {"ref_logps": torch.cat([logps.new_zeros(1), logps])[p.cu_seqlens].diff() + noise}
    if kind == "own":
        return {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "ref_bias": 0.5 * p.bias}
    return {"ref_hidden": p.ref_hidden}


def evaluate(
    op: Callable[..., UnaOutput],
    p: Problem,
    *,
    train: Sequence[str] = LEAVES,
    bias: bool = True,
    upstream: float = 1.0,
    **arguments: Any,
) -> dict[str, Tensor]:
    """Outputs of one call of linear_una_loss (eager's or ours) and, under "grad hidden" ..., the
    gradients.
    """
    leaves = {
        name: getattr(p, name).detach().clone().requires_grad_(name in train) for name in LEAVES
    }
    arguments = {"bias": leaves["bias"] if bias else None, **arguments}
    out = op(leaves["hidden"], leaves["weight"], p.targets, p.cu_seqlens, p.feedback, **arguments)
    (upstream * out.loss).backward()
    grads = {f"grad {name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {**{name: value.detach() for name, value in out._asdict().items()}, **grads}


def truth(p: Problem, **arguments: Any) -> dict[str, Tensor]:
    """`evaluate` of eager.py in float64, on the inputs as they are (already rounded)."""
    arguments = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return evaluate(eager.linear_una_loss, cast(p, torch.float64), **arguments)


def errors(value: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """relative_error of every output and gradient; the two must have the same ones.

    Rewards are differences of two sums, and are measured in proportion to the sums."""
    assert value.keys() == expected.keys()
    found = {name: relative_error(value[name], expected[name]) for name in value}
    if "rewards" in expected and len(expected["rewards"]):
        delta, sums = (
            (expected["logps"] - expected["ref_logps"]).abs().max(),
            expected["logps"].abs().max(),
        )
        found["rewards"] *= min(float(delta / sums), 1.0)
    return found


def assert_close(value: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    found = errors(value, expected)
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"over {tolerance}: {wrong}"


# --- ways through the head ------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A call that takes a known way through the block plan when the head is trained.

    rows: how many rows of logits the budget holds. kinds: which blocks the plan has. passes: GEMM
        passes of the
    policy over all rows of the call."""

    feedback: Feedback
    lengths: tuple[int, ...]
    rows: float
    dim: int
    kinds: frozenset[str]
    passes: float

    def problem(self, vocab: int = 101, **arguments: Any) -> Problem:
        return problem(
            lengths=self.lengths, dim=self.dim, vocab=vocab, feedback=self.feedback, **arguments
        )

    def workspace_mb(self, dtype: torch.dtype, vocab: int = 101, *, trained: bool = True) -> float:
        """The budget that holds `rows` rows; narrow operands need room to be cast as well, as do
        several components for rows gathered from several places.
        """
        narrow = dtype in (torch.bfloat16, torch.float16)
        acc_bytes = 8 if dtype == torch.float64 else 4
        copies = narrow or len(components(self.feedback, self.lengths, False)) > 1
        # Beside the logits: hidden rows times their factors, or the cast ones.
        row_bytes = acc_bytes * (vocab + self.dim * (2 * copies + (trained and not narrow)))
        return (self.rows * row_bytes * (8 / 7 if narrow else 1) + 8) / 2**20


def _way(
    feedback: Feedback, lengths: Sequence[int], rows: float, dim: int, kinds: str, passes: float
) -> Way:
    return Way(feedback, tuple(lengths), rows, dim, frozenset(kinds.split()), passes)


PAIR = Feedback.pairs([0], [1], margin=0.2)
TWO_PAIRS = Feedback.pairs([0, 2], [1, 3], target=[0.8, 1.0])
BOTH_SCORES = Feedback.merge([PAIR, Feedback.scores([0, 1], [0.9, 0.2])])
FOUR = Feedback.pairs(*zip(*combinations(range(4), 2), strict=True), weight=[1, 2, 3, 4, 5, 6])
MIXED = mixed_feedback(torch.Generator().manual_seed(3))
MIXED_LENGTHS = (
    5,
    3,
    7,
    4,
    6,
    8,
    5,
    9,
)  # components of 12, 3, 4 and 19 rows; response 7 is in none

WAYS = {
    "mixed, one block": _way(
        MIXED, MIXED_LENGTHS, 1000, 24, "resident unscored", (3 * 38 + 9) / 47
    ),
    "mixed, two blocks": _way(MIXED, MIXED_LENGTHS, 20, 24, "resident unscored", (3 * 38 + 9) / 47),
    "mixed, no scratch": _way(
        MIXED, MIXED_LENGTHS, 13, 24, "resident recomputed unscored", (3 * 19 + 4 * 19 + 9) / 47
    ),
    "mixed, all at once": _way(
        MIXED,
        MIXED_LENGTHS,
        16,
        3,
        "streamed scratch resident recomputed unscored",
        (3 * 26 + 4 * 12 + 9) / 47,
    ),
    "mixed, sliced": _way(
        MIXED, MIXED_LENGTHS, 0.3, 24, "sliced recomputed unscored", (4 * 38 + 9) / 47
    ),
    "pair, resident": _way(PAIR, (30, 21), 51, 24, "resident", 3),
    "pair, streamed": _way(PAIR, (30, 21), 8, 24, "streamed", 3),
    "pair, row by row": _way(PAIR, (30, 21), 1, 24, "streamed", 3),
    "pair, sliced": _way(PAIR, (30, 21), 0.9, 24, "sliced recomputed", 4),
    "pair, a few cells": _way(PAIR, (5, 3), 0.05, 24, "sliced recomputed", 4),
    "pair beside short ones": _way(TWO_PAIRS, (30, 21, 4, 3), 8, 24, "streamed resident", 3),
    "two pairs, scratch": _way(TWO_PAIRS, (30, 21, 17, 13), 8, 3, "streamed scratch", 3),
    "two pairs, no scratch": _way(
        TWO_PAIRS, (30, 21, 17, 13), 8, 24, "streamed recomputed", (3 * 51 + 4 * 30) / 81
    ),
    "scores too, resident": _way(BOTH_SCORES, (30, 21), 51, 24, "resident", 3),
    "scores too, streamed": _way(BOTH_SCORES, (30, 21), 8, 3, "streamed scratch", 3),
    "scores too, recomputed": _way(BOTH_SCORES, (30, 21), 8, 24, "recomputed", 4),
    "four, resident": _way(FOUR, (9, 5, 12, 7), 33, 24, "resident", 3),
    "four, streamed": _way(FOUR, (9, 5, 12, 7), 18, 3, "streamed scratch", 3),
    "four, recomputed": _way(FOUR, (9, 5, 12, 7), 18, 24, "recomputed", 4),
    "labels, streamed": _way(
        Feedback.binary([1, 0], [True, False]), (30, 21), 8, 3, "streamed scratch", 3
    ),
}


def kinds(plan: Plan, vocab: int) -> frozenset[str]:
    """What a plan is made of, in the words of `Way.kinds`."""
    has = {
        "streamed": plan.streamed,
        "scratch": plan.scratch,
        "resident": plan.resident,
        "recomputed": plan.recomputed,
        "unscored": plan.unscored,
        "sliced": plan.tile.vocab < vocab,
    }
    return frozenset(name for name, present in has.items() if present)


@contextmanager
def naming(**case: object) -> Iterator[None]:
    """Add the values of a case to any error of the block, for loops over many cases."""
    try:
        yield
    except Exception as error:
        error.add_note(", ".join(f"{name}={value!r}" for name, value in case.items()))
        raise
