"""The meshes of a number of ranks, beside each other: memory, bytes over the wire, longest row.

    bytes per token    what all ranks send in a step / tokens of the step
    best               of the meshes that fit, the one that sends the least per token; of equal ones
                       the one with the longest row

Only bytes are compared: how fast the wires between two ranks are is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from una_fast.capacity.fit import micro_batches, row_of
from una_fast.capacity.trace import StepMemory, StepTracer
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.head.traffic import head_traffic
from una_fast.parallel import Mesh, ParallelOptions
from una_fast.printable import bytes_in_words

FURTHER = 4.0
"""Times the planned row is as long as the second row that is planned for a context size."""


@dataclass(frozen=True)
class MeshPlan:
    """A step on a mesh.

    mesh: of the ranks
    step: memory and traffic of a rank
    micro_batches: of a data rank in a step
    tokens: of a step, on all ranks
    longest: tokens of the longest row that fits, about, of the proportions of the planned row;
        None: the memory is not known
    """

    mesh: Mesh
    step: StepMemory
    micro_batches: int
    tokens: float
    longest: int | None

    @property
    def sent(self) -> float:
        """Return the bytes that a rank sends in a step."""
        return sum(self.step.sent(self.micro_batches).values())

    @property
    def tokens_of_rank(self) -> float:
        """Return the tokens that a rank computes in a step."""
        return self.tokens / self.mesh.ranks

    @property
    def sent_per_token(self) -> float:
        """Return the bytes that all ranks send in a step, per token of the step."""
        return self.sent / self.tokens_of_rank

    def plain(self) -> dict[str, Any]:
        """Return the plan of the mesh as plain values, sizes in bytes."""
        return {
            "mesh": vars(self.mesh),
            "peak": self.step.peak,
            "host": self.step.host,
            "sent": self.step.sent(self.micro_batches),
            "sent_per_token": self.sent_per_token,
            "micro_batches": self.micro_batches,
            "tokens_of_rank": self.tokens_of_rank,
            "longest": self.longest,
        }


def meshes_of(ranks: int, heads: int | None, *, packed: bool) -> list[Mesh]:
    """Return the meshes of a number of ranks.

    ranks: of the run
    heads: query heads of the model, which the ranks of a context group share; None: not known
    packed: rows are packed; padded rows cannot be split over ranks
    """
    found = []
    for context in _divisors(ranks):
        if context > 1 and (not packed or heads is None or heads % context):
            continue
        for replicate in _divisors(ranks // context):
            found.append(Mesh(replicate, ranks // context // replicate, context))
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def plan_meshes(
    tracer: StepTracer, batch: Sequence[Example], room: int | None
) -> list[MeshPlan | tuple[Mesh, str]]:
    """Plan the step of a batch on every mesh of a run's ranks.

    tracer: of the run
    batch: records of the micro-batch of a data rank
    room: bytes for a step to fill; None: not known

    Returns a plan per mesh, or the reason why a setting of the run excludes the mesh.
    """
    found: list[MeshPlan | tuple[Mesh, str]] = []
    text_config = tracer.model_config.get_text_config()
    heads = getattr(text_config, "num_attention_heads", None)
    slopes: dict[int, float] = {}  # context -> bytes per token of a row
    for mesh in meshes_of(tracer.facts.ranks, heads, packed=tracer.run.packed):
        try:
            found.append(_plan_mesh(tracer, batch, mesh, room, slopes))
        except ValueError as refusal:
            found.append((mesh, str(refusal)))
    return found


def _plan_mesh(
    tracer: StepTracer,
    batch: Sequence[Example],
    mesh: Mesh,
    room: int | None,
    slopes: dict[int, float],
) -> MeshPlan:
    """Plan the step of a batch on a mesh; ValueError where a setting of the run excludes the mesh.

    tracer, batch, room: as for plan_meshes
    slopes: context -> bytes per token of a row; filled in

    The peak is nearly a straight line in the length of a row, and its slope belongs to the tokens
    alone: two rows are planned for a context size, and one for every further mesh of the size.
    """
    given = tracer.config.parallel or ParallelOptions()
    switches = {"parallel": replace(given, **vars(mesh))}
    config = replace(tracer.config, **switches)
    times = micro_batches(config, mesh, batch)
    accumulate = times > 1
    step = tracer.step(batch, accumulate=accumulate, **switches)
    longest = None
    if room is not None:
        row = row_of(batch[0])
        if mesh.context not in slopes:
            further = row.scaled(FURTHER)
            peak = tracer.step([further.example()], accumulate=accumulate, **switches).peak
            slopes[mesh.context] = (peak - step.peak) / (further.tokens - step.tokens)
        more = (room - step.peak) / max(slopes[mesh.context], 1.0)
        longest = max(int(step.tokens + more), 0)
    tokens = step.tokens * config.batch_size / len(batch)
    return MeshPlan(mesh, step, times, tokens, longest)


def best_mesh(plans: Sequence[MeshPlan], room: int | None) -> MeshPlan:
    """Return the best of some meshes; see the top of the file. Where none fits, the smallest peak.

    plans: of the meshes, at least one
    room: bytes for a step to fill; None: every mesh fits
    """
    fitting = [plan for plan in plans if room is None or plan.step.peak <= room]
    if not fitting:
        return min(plans, key=lambda plan: plan.step.peak)
    return min(fitting, key=_cost)


def _cost(plan: MeshPlan) -> tuple[float, int]:
    """Return what is compared of meshes: bytes sent per token, then the longest row."""
    return round(plan.sent_per_token), -(plan.longest or 0)


def vocabulary_in_words(tracer: StepTracer, batch: Sequence[Example]) -> str | None:
    """Say which head sends less per micro-batch: gathered, or with its vocabulary split over ranks.

    tracer: of the run
    batch: records of the micro-batch of a context group

    Returns None where no ranks hold one copy of the weights among themselves, and for a head that
    is tied to the input embedding, whose rows stay together.
    """
    run, model_config = tracer.run, tracer.model_config.get_text_config()
    if run.mesh.shards == 1 or model_config.tie_word_embeddings:
        return None
    rows = int(collate(batch, packed=run.packed).cu_seqlens[-1]) * run.mesh.shard
    gathered, split = head_traffic(
        rows,
        model_config.hidden_size,
        model_config.vocab_size,
        run.mesh.shards,
        run.compute.itemsize,
        trained=tracer.trains_head,
    )
    verdict = "pays" if split < gathered else "does not pay"
    return (
        f"a rank receives {bytes_in_words(gathered)} of the head per micro-batch, and would "
        f"receive {bytes_in_words(split)} with parallel.split_vocabulary: it {verdict} for "
        f"{rows:,} scored rows"
    )
