"""The bare matrix products of the work: the least time of any contender.

The time of a pass is the fastest torch.mm among chunks of 4096, 8192 and N rows, scaled to N rows;
the work takes the logits of reference and policy, dL/dh and, with a trained head, dL/dW.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from una_fast.bench.inputs import Inputs
from una_fast.bench.machine import total_memory
from una_fast.bench.timing import Job, ceiling_job

GEMM_ROWS = (4096, 8192)


def gemm_jobs(x: Inputs) -> dict[Any, Job]:
    """Return one torch.mm for every (pass, rows of a chunk), and the square product "ceiling"."""
    weight, hidden = x.weight.detach(), x.hidden.detach()
    device = x.device
    room = total_memory(device) // 8
    most = min(x.rows, room // (x.vocab * weight.element_size()))
    counts = {rows for rows in (*GEMM_ROWS, x.rows) if rows <= most} or {most}

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a, b, out=out)

    def logits(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return hidden[:rows], weight.T, weight.new_empty(rows, x.vocab)

    def hidden_grad(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return hidden[:rows] @ weight.T, weight, weight.new_empty(rows, x.dim)

    def weight_grad(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return (hidden[:rows] @ weight.T).T, hidden[:rows], torch.empty_like(weight)

    passes = {"logits": logits, "hidden": hidden_grad}
    if x.trained:
        passes["weight"] = weight_grad
    found: dict[Any, Job] = {}
    for name, operands in passes.items():
        for rows in sorted(counts):
            found[name, rows] = Job(functools.partial(operands, rows), multiply)
    return found | {"ceiling": ceiling_job(device, weight.dtype)}


def reference(seconds: dict[tuple[str, int], float], rows: int, trained: bool) -> dict[str, Any]:
    """Return the time of the bare products of the minimal passes over N rows.

    seconds: time of one torch.mm by (pass, rows of the chunk)
    rows: N
    trained: whether the head is trained, for one pass more
    """
    each: dict[str, float] = {}
    chunk: dict[str, int] = {}
    for (name, count), value in seconds.items():
        whole = value * rows / count
        if whole < each.get(name, float("inf")):
            each[name], chunk[name] = whole, count
    passes = ["logits", "logits", "hidden", *["weight"] * trained]
    return {
        "seconds": sum(each[name] for name in passes),
        "passes": len(passes),
        "each": each,
        "rows of mm": chunk,
    }
