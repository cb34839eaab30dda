"""Calls of linear_una_loss that test_gpu.py repeats, watches for syncs and captures, each another
way through the head.

They are drawn at any size: large on a GPU, and tiny in Triton's interpreter, where
test_triton_engine.py runs the same checks for what they can show there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from helpers import MIXED, MIXED_LENGTHS, PAIR, TWO_PAIRS, Problem, evaluate
from una_fast import Feedback, linear_una_loss
from una_fast.head.plan import LOGIT_ROWS, HeadSize, head_size


def drawn(
    lengths: Sequence[int],
    dim: int,
    vocab: int,
    feedback: Feedback,
    *,
    device: torch.device,
    dtype: torch.dtype,
    peak: float = 24.0,
) -> Problem:
    """A problem made on the device:
    for shapes too large to make on a CPU. The largest |logit| is about `peak`.
    """
    g = torch.Generator(device).manual_seed(0)
    rows = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype)

    weight = normal(vocab, dim) * dim**-0.5
    hidden = normal(rows, dim) * (peak / 5)
    targets = torch.randint(vocab, (rows,), generator=g, device=device)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    noise = 0.05 * normal(rows, dim)
    return Problem(
        hidden, weight, normal(vocab), targets, cu, feedback, hidden + noise, weight + 0.01
    )


@dataclass(frozen=True)
class Call:
    """A call whose way through the Triton engine's block plan is known.

    At size k its lengths and the rows of logits that its budget holds are k times those given here.
    dim: hidden size on a CPU. kinds: as in Way.
    """

    feedback: Feedback
    lengths: tuple[int, ...]
    rows: float
    dim: int
    kinds: str
    train: tuple[str, ...] = ("hidden", "weight")
    bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def budget(self, size: int, head: HeadSize) -> int:
        """Bytes."""
        rows = size * self.rows
        copied = head.copied_bytes(gathered=True, sliced=False, trained=True)
        if head.operand_bytes == head.acc_bytes or rows <= LOGIT_ROWS:
            return int(rows * head.row_bytes(gathered=True, trained=True)) + 8
        # Gradients have a buffer of their own.
        stride = head.stride(head.vocab)
        logits = LOGIT_ROWS * stride * head.acc_bytes
        return int(rows * (stride * head.operand_bytes + copied)) + logits

    def drawn(
        self, size: int, dim: int, vocab: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Problem, dict[str, Any]]:
        """The problem, and the other arguments of `evaluate`."""
        lengths = [size * n for n in self.lengths]
        p = drawn(lengths, dim, vocab, self.feedback, device=device, dtype=dtype, peak=16.0)
        ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
        ref |= {"ref_bias": 0.5 * p.bias} if self.bias else {}
        budget = self.budget(size, head_size(vocab, dim, "cuda", dtype.itemsize))
        return p, {
            "train": self.train,
            "bias": self.bias,
            **ref,
            **self.options,
            "workspace_mb": budget / 2**20,
        }


# 1700 to 9000 rows. As on a CPU in "mixed in every way", an accumulator takes what the gradients of
# 3 x size rows do.
GPU_SIZE, GPU_DIM = 192, 288
STREAMED = Call(PAIR, (5, 4), 4, 8, "streamed")
CALLS = {
    "resident pairs": Call(TWO_PAIRS, (4, 3, 3, 2), 7, 24, "resident"),
    "streamed pair": STREAMED,
    "frozen head": replace(STREAMED, train=("hidden",)),
    "bias and softcap": replace(
        STREAMED,
        train=("hidden", "weight", "bias"),
        bias=True,
        options={"softcap": 30.0, "logit_scale": 1.2, "temperature": 0.8},
    ),
    "vocabulary in slices": Call(PAIR, (5, 4), 0.7, 24, "sliced recomputed"),
    "mixed feedback": Call(MIXED, MIXED_LENGTHS, 20, 24, "resident unscored"),
    "mixed in every way": Call(
        MIXED, MIXED_LENGTHS, 16, 3, "streamed scratch resident recomputed unscored"
    ),
}


def check_repeats(p: Problem, arguments: dict[str, Any], times: int) -> None:
    """The same bits every time."""
    first: dict[str, Tensor] = {}
    for _ in range(times):
        found = evaluate(linear_una_loss, p, **arguments)
        first = first or found
        different = [name for name in first if not torch.equal(first[name], found[name])]
        assert not different and all(x.isfinite().all() for x in found.values())


def check_under(
    guard: Callable[[], AbstractContextManager],
    p: Problem,
    arguments: dict[str, Any],
    times: int = 2,
) -> None:
    """The call, and one without gradients whose reference shares its head, within guard():
    the first time, and when their constants are there.
    """
    own = ("train", "bias", "ref_weight", "ref_bias")
    rest = {name: value for name, value in arguments.items() if name not in own}
    bias = p.bias if arguments["bias"] else None
    for _ in range(times):
        with guard():
            evaluate(linear_una_loss, p, **arguments)
            with torch.no_grad():
                linear_una_loss(
                    p.hidden, p.weight, p.targets, p.cu_seqlens, p.feedback, bias=bias, **rest
                )


Step = Callable[[], list[Tensor]]


def check_capture(
    capture: Callable[[Step], tuple[Callable[[], None], list[Tensor]]],
    p: Problem,
    arguments: dict[str, Any],
    factors: Sequence[float] = (1.0, -0.7),
) -> None:
    """capture(step) -> (replay, what step returned):
    replayed on the hidden states times each factor, it returns what a call does.
    """
    bias = arguments["bias"]
    leaves = [p.hidden.clone(), p.weight.clone(), *([p.bias.clone()] if bias else [])]
    trained = [
        x
        for x, name in zip(leaves, ("hidden", "weight", "bias"), strict=False)
        if name in arguments["train"]
    ]
    rest = {name: value for name, value in arguments.items() if name not in ("train", "bias")}
    for x in trained:
        x.requires_grad_()

    def step() -> list[Tensor]:
        for x in trained:
            x.grad = None
        out = linear_una_loss(
            *leaves[:2],
            p.targets,
            p.cu_seqlens,
            p.feedback,
            bias=leaves[2] if bias else None,
            **rest,
        )
        out.loss.backward()
        return [out.loss.detach(), out.logps, *(x.grad for x in trained)]

    replay, captured = capture(step)
    for factor in factors:
        with torch.no_grad():
            leaves[0].copy_(factor * p.hidden)
        replay()
        found = [x.clone() for x in captured]
        for a, b in zip(found, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
