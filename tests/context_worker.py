"""Split the tokens of rows over ranks, and compare with one process: a worker of ranks.py.

Its argument is a JSON file: {"out": directory, "runs": {number of ranks: cases of fsdp_worker.py,
or {"precompute": settings}}}. Writes out/ranks-N-R.pt: {name: what the case found} by rank R of N,
and gradients.pt of every run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import fsdp_worker
from families import FAMILIES, SMALL, WINDOW, build, gradient_difference, gradients, without
from helpers import (
    FOUR,
    MIXED,
    PAIR,
    TWO_PAIRS,
    WAYS,
    Problem,
    errors,
    evaluate,
    kinds,
    problem,
    reference,
    truth,
)
from una_fast import Feedback, Objective, linear_una_loss
from una_fast.config import RunConfig
from una_fast.data.batch import Batch, collate
from una_fast.data.examples import Example
from una_fast.distributed import lay_out, start_world, stop_world
from una_fast.group import ALONE, Group
from una_fast.head import passes
from una_fast.head.eager import token_logps
from una_fast.head.ops import sequence_logps
from una_fast.model.head_probe import probe_head
from una_fast.model.lora import add_lora
from una_fast.model.policy import Policy, make_policy
from una_fast.model.reference import AdapterReference
from una_fast.model.scoring import Scoring
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.parallel import ParallelOptions
from una_fast.train.precompute import precompute_reference

Found = dict[str, Any]
UPSTREAM = 0.7

# --- collectives ----------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the collectives of a block, and the numbers of all-reduces."""
    seen: Counter[str] = Counter()
    exchange, reduce = dist.all_to_all_single, dist.all_reduce

    def counting_exchange(*given: Any, **named: Any) -> Any:
        seen["exchanges"] += 1
        return exchange(*given, **named)

    def counting_reduce(values: Tensor, *given: Any, **named: Any) -> Any:
        seen["sums"] += 1
        seen["summed"] += values.numel()
        return reduce(values, *given, **named)

    with (
        mock.patch.object(dist, "all_to_all_single", counting_exchange),
        mock.patch.object(dist, "all_reduce", counting_reduce),
    ):
        yield seen


# --- the head -------------------------------------------------------------------------------------


def worst_of(found: dict[str, float]) -> float:
    """Return the largest error; infinity where one is NaN, which max() would pass over."""
    return max(error if error == error else math.inf for error in found.values())


def cuts(rows: int, ranks: int, way: str) -> list[int]:
    """Return the bounds of the ranks' rows. way: "even" | "last": most ranks have none."""
    if way == "last":
        return [0] * ranks + [rows]
    return [rows * rank // ranks for rank in range(ranks + 1)]


def local(p: Problem, first: int, stop: int) -> Problem:
    """Return the rows of a rank: of hidden states and targets, with their bounds."""
    rows = slice(first, stop)
    return replace(
        p,
        hidden=p.hidden[rows],
        ref_hidden=p.ref_hidden[rows],
        targets=p.targets[rows],
        cu_seqlens=p.cu_seqlens.clamp(first, stop) - first,
    )


def head_case(
    p: Problem, group: Group, bounds: list[int], *, workspace_mb: float, **arguments: Any
) -> Found:
    """Compare a call of a group with the truth; return errors, kinds of the plan, collectives."""
    first, stop = bounds[group.rank : group.rank + 2]
    expected = truth(p, **arguments)
    if "grad hidden" in expected:
        expected["grad hidden"] = expected["grad hidden"][first:stop]
    own = dict(arguments)
    if "ref_hidden" in own:
        own["ref_hidden"] = own["ref_hidden"][first:stop]
    made = []
    make_plan = passes.make_plan

    def recording(*given: Any, **named: Any) -> Any:
        made.append(make_plan(*given, **named))
        return made[-1]

    with mock.patch.object(passes, "make_plan", recording), counted() as seen:
        found = evaluate(
            linear_una_loss,
            local(p, first, stop),
            group=group.handle,
            lengths=p.cu_seqlens.diff(),
            workspace_mb=workspace_mb,
            **own,
        )
    for name in ("grad weight", "grad bias"):
        if name in found:
            dist.all_reduce(found[name], group=group.handle)
    plan = sorted(kinds(made[-1], len(p.weight))) if made else []
    return {"error": worst_of(errors(found, expected)), "plan": plan, **seen}


def head_cases(group: Group) -> Iterator[tuple[str, Found]]:
    """Yield every way through the plan, over every kind of reference, with ragged parts."""
    leaves = ("hidden", "weight", "bias")
    options = product(WAYS, ("even", "last"), (leaves, ("hidden",), ()))
    for k, (name, split, train) in enumerate(options):
        if group.size == 4 and split == "last" and train != leaves:
            continue
        way = WAYS[name]
        p = way.problem(dtype=torch.float64, seed=k)
        arguments = {
            "objective": Objective(
                score=("bce", "reward_mse")[k % 2], offset=0.1, length_normalize=k % 4 == 1
            ),
            "num_units": (None, 5)[k % 2],
            "softcap": (None, 30.0)[k % 2],
            "train": train,
            "upstream": UPSTREAM if train else 1.0,
            **reference(p, ("cached", "own", "policy")[k % 3]),
        }
        budget = way.workspace_mb(torch.float64, trained="weight" in train)
        # A rank has a part of the rows, and the budget of the same part.
        budget /= 1 if split == "last" else group.size
        if not train:
            arguments["upstream"] = torch.zeros((), requires_grad=True)
        bounds = cuts(len(p.hidden), group.size, split)
        label = f"{name}, {split}, {' '.join(train) or 'nothing'}"
        yield label, head_case(p, group, bounds, workspace_mb=budget, **arguments)


def one_scalar_cases(group: Group) -> Iterator[tuple[str, Found]]:
    """Yield calls whose plans are known: kinds of the plan of every rank are asserted."""
    cases = {  # feedback, lengths, rows of logits that the budget holds
        "resident": (TWO_PAIRS, (9, 5, 12, 7), 100),
        "streamed pair": (PAIR, (30, 21), 4),
        "streamed label": (Feedback.binary([1], [True]), (4, 41), 4),
        "recomputed": (FOUR, (9, 5, 12, 7), 4),
    }
    for name, (feedback, lengths, rows) in cases.items():
        p = problem(lengths=lengths, feedback=feedback, seed=2)
        row_bytes = 8 * (len(p.weight) + 3 * p.hidden.shape[1])
        arguments = {"objective": Objective(length_normalize=True), **reference(p, "cached")}
        budget = (rows * row_bytes + 8) / 2**20
        bounds = cuts(len(p.hidden), group.size, "even")
        yield name, head_case(p, group, bounds, workspace_mb=budget, **arguments)


def sums_case(group: Group) -> Found:
    """Return the errors of sequence_logps over a group, and of its gradients."""
    p = problem(seed=7, feedback=MIXED)
    first, stop = cuts(len(p.hidden), group.size, "even")[group.rank : group.rank + 2]
    upstream = torch.linspace(-1, 2, len(p.cu_seqlens) - 1, dtype=torch.float64)

    def leaves(of: Problem) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (of.hidden, of.weight)]

    hidden, weight = leaves(p)
    tokens = token_logps(hidden, weight, p.targets)
    expected = torch.segment_reduce(tokens, "sum", lengths=p.cu_seqlens.diff())
    (upstream * expected).sum().backward()
    part = local(p, first, stop)
    own, own_weight = leaves(part)
    with counted() as seen:
        found = sequence_logps(
            own,
            own_weight,
            part.targets,
            part.cu_seqlens,
            group=group,
            lengths=p.cu_seqlens.diff(),
        )
        (upstream * found).sum().backward()
    dist.all_reduce(own_weight.grad, group=group.handle)
    ours = {"logps": found.detach(), "hidden": own.grad, "weight": own_weight.grad}
    theirs = {
        "logps": expected.detach(),
        "hidden": hidden.grad[first:stop],
        "weight": weight.grad,
    }
    return {"error": worst_of(errors(ours, theirs)), **seen}


# --- models ---------------------------------------------------------------------------------------

MLA = without(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)
MODELS = {  # fields, and what is special
    "LlamaConfig": (SMALL, {}),
    "LlamaConfig one key head": (without(num_key_value_heads=1), {}),
    "LlamaConfig tied": (FAMILIES["LlamaConfig tied"], {}),
    "LlamaConfig checkpointed": (SMALL, {"memory": MemoryOptions(gradient_checkpointing=True)}),
    "LlamaConfig adapter": (SMALL, {"lora": LoraOptions(r=4, alpha=8)}),
    # Six heads on three keys: of two ranks the second key head is read by both.
    "LlamaConfig odd": (
        without(num_attention_heads=12, num_key_value_heads=3, hidden_size=48),
        {},
    ),
    "Gemma2Config": (FAMILIES["Gemma2Config"], {}),
    "Gemma3TextConfig": (FAMILIES["Gemma3TextConfig"], {}),
    "GptOssConfig": (FAMILIES["GptOssConfig"], {}),
    "DeepseekV3Config": (MLA, {}),
    "GPT2Config": (FAMILIES["GPT2Config"], {}),
    "MistralConfig": (without(head_dim=8, sliding_window=WINDOW), {}),
}


# Of two ranks; four take all.
FOR_TWO = ("LlamaConfig one key head", "LlamaConfig adapter", "LlamaConfig odd", "GptOssConfig")


def batch_of(name: str) -> Batch:
    """Return a packed row: "ragged" | "short": fewer tokens than four ranks | "none"."""
    rng = np.random.default_rng(3)

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, 97, count, dtype=np.int32)

    def example(prompt: int, responses: tuple[int, ...], feedback: Feedback) -> Example:
        return Example(ids(prompt), tuple(map(ids, responses)), feedback, None, "x:1")

    if name == "none":
        return collate([], packed=True)
    if name == "short":
        return collate([example(1, (1, 1), PAIR)], packed=True)
    scored = Feedback.merge([PAIR, Feedback.scores([2, 0], [0.8, 0.1], weight=[1.5, 0.5])])
    labels = Feedback.binary([0], [True])  # response 1 is in no unit
    turns = Example(
        ids(6),
        (ids(9),),
        Feedback.binary([0], [False]),
        None,
        "x:2",
        scored=(np.array([1, 1, 0, 0, 0, 1, 1, 1, 0], dtype=bool),),
    )
    first = [example(11, (9, 6, 14), scored), turns, example(7, (8, 13), labels)]
    return collate(first, packed=True)


def dtype_of(name: str) -> torch.dtype:
    """Return float64, or float32 for models with grouped products of experts, which lack it."""
    return torch.float32 if name.startswith(("GptOss", "Deepseek")) else torch.float64


def policy_of(name: str) -> Policy:
    """Build the tiny model of a case."""
    fields, options = MODELS[name]
    model = build(name, fields, sharp=True)
    model = model.to(dtype_of(name))
    head = probe_head(model)
    if "lora" in options:
        model = add_lora(model, options["lora"])
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn_like(parameter) * 0.2
        model = model.to(dtype_of(name))
    return make_policy(model, head, options.get("memory", MemoryOptions()), packed=True)


def model_case(name: str, row: str, group: Group) -> Found:
    """Compare loss, log-probs and gradients of the parts of a row with those of the whole.

    The first rank computes the whole, and compares.
    """
    torch.manual_seed(0)
    policy = policy_of(name)
    batch = batch_of(row)
    responses = len(batch.cu_seqlens) - 1
    ref = Scoring(group=group).logps(policy, batch)
    ref += torch.linspace(-3, 4, responses, dtype=torch.float64)
    objective = Objective(beta=0.3, length_normalize=True)

    def run(of: Group) -> tuple[dict[str, Tensor], dict[str, Tensor], Found]:
        scoring = Scoring(workspace_mb=0.02, group=of)
        logps = scoring.logps(policy, batch)
        reference = logps
        if policy.is_adapter:
            reference = AdapterReference(policy, scoring).logps(batch)
        counts = {}
        with counted() as seen:
            out = scoring.loss(policy, batch, ref, objective, num_units=7)
            counts["forward"] = dict(seen)
            seen.clear()
            grads = gradients(policy.model, UPSTREAM * out.loss)
            counts["backward"] = dict(seen)
        values = {"loss": out.loss.detach(), "logps": out.logps, "scored": logps}
        return values | {"reference": reference}, grads, counts

    found, parts, counts = run(group)
    layers = policy.causal_lm.config.num_hidden_layers
    result = {"layers": layers, "responses": responses, "loss": float(found["loss"]), **counts}
    for grad in parts.values():
        dist.all_reduce(grad, group=group.handle)
    if group.rank:
        return result
    expected, whole, alone = run(ALONE)
    assert not alone["forward"] and not alone["backward"]
    values = worst_of(errors(found, expected))
    if not responses:
        assert not any(grad.any() for grad in (*parts.values(), *whole.values()))
        return result | {"values": values, "gradients": 0.0}
    return result | {"values": values, "gradients": gradient_difference(parts, whole)}


# --- ranks ----------------------------------------------------------------------------------------


def all_cases(group: Group) -> dict[str, Found]:
    """Run the cases of the head and of models over a group."""
    found = {f"head: {name}": one for name, one in head_cases(group)}
    found |= {f"plan: {name}": one for name, one in one_scalar_cases(group)}
    found["sums"] = sums_case(group)
    for name in MODELS if group.size == 4 else FOR_TWO:
        found[f"model: {name}"] = model_case(name, "ragged", group)
    for row in ("short", "none"):
        found[f"row: {row}"] = model_case("LlamaConfig", row, group)
    return found


def main() -> None:
    """Run the cases of this number of ranks, on one of them."""
    torch.set_num_threads(1)
    todo = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    out, runs = Path(todo["out"]), todo["runs"].get(str(ranks), {})
    world = start_world("cpu")
    if ranks > 1:
        group = lay_out(world, ParallelOptions(context=ranks)).context
        found = all_cases(group)
        torch.save(found, out / f"ranks-{ranks}-{rank}.pt")
    for name, case in runs.items():
        if "precompute" in case:
            precompute_reference(RunConfig(**case["precompute"]))
            continue
        settings = case["config"]
        options = {key: value for key, value in case.items() if key != "config"}
        print(f"--- {name}, rank {rank} of {ranks}", flush=True)
        seen = fsdp_worker.run_case(settings, **options)
        if world.is_main:
            torch.save(seen["gradients"], Path(settings["output_dir"]) / "gradients.pt")
        world.barrier()
    stop_world()
