"""Calls of the fused head with a split vocabulary on four ranks, against the whole head in float64.

A worker of ranks.py. Its argument is a directory OUT. Writes OUT/<case>.json, a list by rank: the
largest relative error of every result, and the collectives of the call. The ranks of a case form
groups of `ranks` neighbours; every rank has rows, responses and feedback of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import interpreter
from helpers import Problem, cast, errors, problem, relative_error
from test_triton_engine import Interpreted
from una_fast import Feedback, Objective, linear_una_loss, sequence_logps
from una_fast.counters import FlopCounter, LiveBytes
from una_fast.distributed import start_world, stop_world
from una_fast.group import Group
from una_fast.head import eager, ops, passes
from una_fast.head.engines import choose_engine
from una_fast.head.vocabulary import SplitHead

RANKS = 4
UPSTREAM = 3.7  # of every loss
NONE = Feedback.merge([])
SOFT = {"softcap": 30.0, "logit_scale": 1.7, "temperature": 1.3}
# Responses of ranks 0 to 3: mixed feedback and a response in no unit, none at all, one, a pair.
LENGTHS = ((5, 3, 7, 4, 6, 8, 5, 9), (), (11,), (2, 6))
FEEDBACK = (None, NONE, Feedback.scores([0], [0.3], weight=1.4), Feedback.pairs([1], [0]))
COLLECTIVES = ("gather", "largest", "sum", "reduce_scatter")
OWN = {name: getattr(Group, name) for name in COLLECTIVES}


@dataclass(frozen=True)
class Case:
    """A call on every rank.

    ranks: of a group
    vocab: entries, split as FSDP2 splits rows
    dtype: of the operands
    engine: "torch", or "triton" for the kernels in the interpreter
    train: leaves with a gradient; empty: the call is made under no_grad
    reference: cached | own (weight and bias) | policy (the same head)
    kib: workspace in KiB; None: the default
    options: further arguments
    ignored: whether every third row has no target
    """

    ranks: int = 4
    vocab: int = 101
    dtype: torch.dtype = torch.float64
    engine: str = "torch"
    train: tuple[str, ...] = ("hidden", "weight", "bias")
    reference: str = "own"
    kib: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ignored: bool = False


BF16 = {"dtype": torch.bfloat16}
CASES = {
    "two": Case(ranks=2, options=SOFT),
    "four": Case(options=SOFT, ignored=True),
    "few entries": Case(vocab=5, reference="policy"),
    "frozen": Case(train=("hidden",), reference="cached", options=SOFT),
    "head alone": Case(ranks=2, train=("weight",), reference="cached"),
    "means": Case(options={"objective": Objective(length_normalize=True, score="bce")}),
    "chunks": Case(vocab=1601, kib=190, options=SOFT),
    "rounds": Case(kib=24, options=SOFT),
    "rounds frozen": Case(ranks=2, kib=12, train=("hidden",), reference="cached"),
    "slices": Case(ranks=2, vocab=4001, kib=10, ignored=True),
    "no gradient": Case(train=(), reference="policy", options=SOFT),
    "no gradient, rounds": Case(train=(), reference="own", kib=12),
    "bfloat16": Case(**BF16, train=("hidden", "weight")),
    "triton": Case(dtype=torch.float32, engine="triton", kib=30, options=SOFT, ignored=True),
    "triton bfloat16": Case(**BF16, ranks=2, engine="triton", train=("hidden", "weight")),
}


def problem_of(case: Case, rank: int) -> Problem:
    """Return the call of a rank; weights are the same on all ranks."""
    head = problem(7, dim=24, vocab=case.vocab, lengths=[9], feedback=NONE, dtype=case.dtype)
    own = problem(
        20 + rank,
        dim=24,
        vocab=case.vocab,
        lengths=LENGTHS[rank],
        feedback=FEEDBACK[rank],
        dtype=case.dtype,
    )
    if case.ignored:
        own.targets[::3] = -100
    for name in ("weight", "bias", "ref_weight"):
        setattr(own, name, getattr(head, name))
    return own


def reference_of(case: Case, p: Problem) -> dict[str, Tensor]:
    """Return the arguments of the reference, for the whole head."""
    if case.reference == "cached":
        return {"ref_logps": torch.linspace(-40, -3, len(p.cu_seqlens) - 1, dtype=torch.float64)}
    if case.reference == "policy":
        return {"ref_hidden": p.ref_hidden}
    return {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight, "ref_bias": 0.5 * p.bias}


def evaluate(op: Any, case: Case, p: Problem, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return outputs and gradients of a call."""
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        leaves[name] = getattr(p, name).detach().clone().requires_grad_(name in case.train)
    head = (leaves["hidden"], leaves["weight"], p.targets, p.cu_seqlens, p.feedback)
    with torch.set_grad_enabled(bool(case.train)):
        out = op(*head, bias=leaves["bias"], num_units=11, **given)
    found = {name: value.detach() for name, value in out._asdict().items()}
    if case.train:
        (UPSTREAM * out.loss).backward()
    for name in case.train:
        found[f"grad {name}"] = leaves[name].grad
    return found


def rows_of(group: Group, vocab: int) -> slice:
    """Return the entries of a rank, as FSDP2 gives them."""
    most = -(-vocab // group.size)
    first = min(group.rank * most, vocab)
    return slice(first, min(first + most, vocab))


def truth(case: Case, p: Problem, group: Group) -> dict[str, Tensor]:
    """Return results in float64 by eager.py: gradients of the head of all ranks, own entries."""
    whole = {k: v.double() for k, v in reference_of(case, p).items()}
    found = evaluate(eager.linear_una_loss, case, cast(p, torch.float64), whole | case.options)
    for name in ("grad weight", "grad bias"):
        if name in found:
            found[name] = group.sum(found[name])[rows_of(group, case.vocab)]
    return found


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Record (name, numbers given) of the collectives in a block."""
    seen: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:

            def counted(
                group: Group, values: Tensor, name: str = name, own: Any = OWN[name]
            ) -> Tensor:
                if group.size > 1:
                    seen.append((name, values.numel()))
                return own(group, values)

            patch.setattr(Group, name, counted)
        yield seen


def planned_bytes(head: SplitHead) -> int:
    """Return the bytes of logits and gathered rows, with their gradients, of a trained head."""
    numbers = head.engine.weight.element_size() + head.engine.acc.itemsize
    gathered = head.group.size * head.rounds[0].width * head.dim * numbers
    return gathered + head.tile.logit_bytes(head.size)


def run_case(case: Case, group: Group) -> dict[str, Any]:
    """Return the errors of a rank, the collectives, and the rounds of the policy's rows."""
    rank = dist.get_rank()
    p = problem_of(case, rank)
    expected = truth(case, p, group)
    own = rows_of(group, case.vocab)
    given = reference_of(case, p)
    for name in ("ref_weight", "ref_bias"):
        if name in given:
            given[name] = given[name][own]
    given |= {"vocabulary": group, "engine": case.engine}
    given["workspace_mb"] = None if case.kib is None else case.kib / 1024
    mine = cast(p, case.dtype)
    mine.weight, mine.bias = p.weight[own], p.bias[own]
    heads: list[SplitHead] = []
    make = SplitHead.__init__

    def watched(head: SplitHead, *arguments: Any, **rest: Any) -> None:
        make(head, *arguments, **rest)
        heads.append(head)

    counter = FlopCounter(strict=False)
    memory = LiveBytes()
    with mock.patch.object(SplitHead, "__init__", watched), collectives() as seen, counter, memory:
        found = evaluate(linear_una_loss, case, mine, given | case.options)
    policy = heads[0]
    rows = sum(policy.shares.rows)
    passes = counter.passes(rows, 24, policy.vocab) if policy.vocab else None
    result = {
        "errors": errors(found, expected),
        "collectives": seen,
        "rounds": len(policy.rounds),
        "chunks": sum(len(plan.cuts) for plan in policy.plans),
        "sliced": policy.tile.vocab < policy.vocab,
        "passes": passes,
        "largest": memory.largest(excluding=found.values()),
        "planned": planned_bytes(policy),
    }
    if not case.train:
        head = {"bias": mine.bias, **{k: v for k, v in case.options.items() if k != "objective"}}
        head |= {name: given[name] for name in ("vocabulary", "workspace_mb")}
        rows = (mine.hidden, mine.weight, p.targets, p.cu_seqlens)
        with torch.no_grad():
            sums = sequence_logps(*rows, **head)
        result["errors"]["sequence_logps"] = relative_error(sums, expected["logps"])
    return result


def refusals(group: Group) -> dict[str, str]:
    """Return the messages of calls that are refused; all ranks go on together after each."""
    case = Case(reference="cached")
    p = problem_of(case, dist.get_rank())
    own = rows_of(group, case.vocab)
    reference = reference_of(case, p)

    def call(scale: float = 1.0, **given: Any) -> None:
        leaves = (p.hidden.clone().requires_grad_(), p.weight[own].clone().requires_grad_())
        rows = (p.targets, p.cu_seqlens, p.feedback)
        out = linear_una_loss(*leaves, *rows, **reference, vocabulary=group, **given)
        (scale * out.loss).backward()

    messages = {}
    with pytest.raises(ValueError) as refused:
        call(workspace_mb=1.0 + group.rank)
    messages["workspace"] = str(refused.value)
    with pytest.raises(ValueError) as refused:
        call(scale=1.0 + group.rank)
    messages["upstream"] = str(refused.value)
    with pytest.raises(ValueError) as refused:
        hidden = p.hidden.clone().requires_grad_()
        rows = (hidden, p.weight[own], p.targets, p.cu_seqlens)
        sequence_logps(*rows, vocabulary=group)
    messages["sequence_logps"] = str(refused.value)
    p.targets[:1] = case.vocab
    if group.rank == 0:
        with pytest.raises(ValueError) as refused:
            call()
        messages["target"] = str(refused.value)
    else:
        # This rank has met the others already, and would wait for them for ever.
        with (
            mock.patch.object(SplitHead, "score", side_effect=ValueError),
            pytest.raises(ValueError),
        ):
            call()
    return messages


def main() -> None:
    """Run all cases on this rank."""
    torch.set_num_threads(1)
    rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
    world = start_world("cpu")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {
        2: Group(rank % 2, 2, pairs[rank // 2]),
        4: Group(rank, 4, dist.group.WORLD),
    }
    patch = pytest.MonkeyPatch()
    interpreter.mend(patch, approximate=True)
    patch.setattr(Interpreted, "machine", None)

    def choose(name: str, device: torch.device, dtype: torch.dtype) -> Any:
        return Interpreted if name == "triton" else choose_engine(name, device, dtype)

    for module in (passes, ops):
        patch.setattr(module, "choose_engine", choose)
    for name, case in CASES.items():
        results = world.gather(run_case(case, groups[case.ranks]))
        if world.is_main:
            (out / f"{name}.json").write_text(json.dumps(results), encoding="utf-8")
    messages = world.gather(refusals(groups[4]))
    if world.is_main:
        (out / "refusals.json").write_text(json.dumps(messages), encoding="utf-8")
    stop_world()
