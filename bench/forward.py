"""The suite "forward" of bench_head.py: the ways to a log-prob, and the row kernels alone.

mm, float32 logits     the product alone
mm + row_logps         the product, then the row kernel that reads the logits
linear_logps           one kernel without logits in memory
… row stride V + 64    the product and row kernels on rows that are 256 bytes further apart: a row
                       of 262144 float32 logits is exactly 1 MiB, so that all rows start in the
                       same place of the caches
row kernels            row_logps, row_grad, one_read in every block size of rowgrad.BLOCKS
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from una_fast.bench.attempts import attempt
from una_fast.bench.inputs import Inputs
from una_fast.bench.timing import Job, alternate, seconds_of, typical

LARGEST_ERROR = 1e-3  # nat, of linear_logps against row_logps
PADDING = 64  # logits


class Rows:
    """Operands of the suite: float32 logits u = hidden @ weight.T of `rows` rows, written anew.

    padding: logits between the end of a row and the beginning of the next row
    """

    def __init__(
        self, rows: int, dim: int, vocab: int, device: torch.device, padding: int = 0
    ) -> None:
        self.narrow = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.narrow else torch.float32
        x = Inputs((rows, rows), dim, vocab, device=device.type, dtype=self.dtype)
        self.hidden = x.hidden.detach()[:rows]
        self.weight = x.weight.detach()
        self.targets = x.targets[:rows]
        self.u = torch.empty(rows, vocab + padding, device=device)[:, :vocab]
        self.coef = torch.full((rows,), 1e-3, device=device)
        self.lse = torch.empty(rows, device=device)

    def logits(self) -> None:
        widen = {"out_dtype": torch.float32} if self.narrow else {}
        torch.mm(self.hidden, self.weight.T, out=self.u, **widen)

    def again(self) -> tuple:
        """Make the logits and their logsumexp again: row kernels write over the logits."""
        self.logits()
        self.lse.copy_(self.row_logps()[0])
        return ()

    def row_logps(self) -> tuple[Tensor, Tensor]:
        from una_fast.kernels import rowgrad

        return rowgrad.row_logps(self.u, self.targets)

    def row_grad(self) -> Any:
        from una_fast.kernels import rowgrad

        over = rowgrad.overlay(self.u, self.dtype)
        rowgrad.row_grad(self.u, self.targets, self.coef, self.lse, out=over)

    def one_read(self) -> Any:
        from una_fast.kernels import one_read, rowgrad

        return one_read.one_read(self.u, self.targets, out=rowgrad.overlay(self.u, self.dtype))

    def mm_row_logps(self) -> tuple[Tensor, Tensor]:
        self.logits()
        return self.row_logps()

    def linear_logps(self) -> tuple[Tensor, Tensor]:
        from una_fast.kernels import logp_partials

        return logp_partials.linear_logps(self.hidden, self.weight, self.targets)

    def linear_logps_error(self) -> float:
        """Return the largest difference of linear_logps from row_logps, in nat."""
        expected, found = self.mm_row_logps(), self.linear_logps()
        differences = [a - b for a, b in zip(expected, found, strict=True)]
        return max(difference.abs().max().item() for difference in differences)


def blocked(block: int, warps: int, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` with row kernels launched in blocks of `block` logits at `warps` warps."""

    def call() -> None:
        from una_fast.kernels import one_read, rowgrad

        launches = (rowgrad.LAUNCH, one_read.LAUNCH)
        before = [dict(launch) for launch in launches]
        for launch in launches:
            launch.update(BLOCK=block, num_warps=warps)
        try:
            run()
        finally:
            for launch, kept in zip(launches, before, strict=True):
                launch.update(kept)

    return call


def jobs_of(x: Rows, padded: Rows) -> tuple[dict[str, Job], dict[str, int]]:
    """Return (jobs by name, bytes moved by the jobs that are row kernels).

    x: rows of logits without padding
    padded: the same with PADDING
    """
    from una_fast.kernels import rowgrad

    def nothing() -> tuple:
        return ()

    jobs = {
        "mm, float32 logits": Job(nothing, x.logits),
        "mm + row_logps": Job(nothing, x.mm_row_logps),
        "linear_logps": Job(nothing, x.linear_logps),
    }
    size = x.dtype.itemsize
    kernels = {  # name -> (bytes per logit, kernel)
        "row_logps": (4, x.row_logps),
        "row_grad": (4 + size, x.row_grad),
        "one_read": (4 + size, x.one_read),
    }
    moved = {}
    for name, (logit_bytes, run) in kernels.items():
        for block, warps in rowgrad.BLOCKS:
            key = f"{name}, {block} x {warps}"
            jobs[key] = Job(x.again, blocked(block, warps, run))
            moved[key] = logit_bytes * x.u.numel()
    apart = f", row stride V + {PADDING}"
    jobs[f"mm{apart}"] = Job(nothing, padded.logits)
    for name, run in (("row_logps", padded.row_logps), ("row_logps_grad", padded.row_logps_grad)):
        jobs[name + apart] = Job(padded.again, run)
        moved[name + apart] = kernels[name][0] * x.u.numel()
    return jobs, moved


def forward(dim: int, vocab: int, rows: int, device: torch.device, options: Any) -> dict[str, Any]:
    """Return the entry of the results for one shape: a row per way or kernel."""
    x = Rows(rows, dim, vocab, device)
    jobs, moved = jobs_of(x, Rows(rows, dim, vocab, device, PADDING))
    failed = {}
    for name, job in jobs.items():
        warm_up = functools.partial(seconds_of, job, device)
        _, reason = attempt(name, warm_up, seconds=options.warmup)
        if reason:
            failed[name] = reason
    if "linear_logps" not in failed:
        error = x.linear_logps_error()
        if not error <= LARGEST_ERROR:
            failed["linear_logps"] = f"wrong result: {error:.1e} from row_logps"
    runnable = {name: job for name, job in jobs.items() if name not in failed}
    times, late = alternate(runnable, options.runs or 20, options.seconds, device)
    failed |= late
    table = []
    for name in jobs:
        if name in failed:
            table.append({"name": name, "reason": failed[name]})
            continue
        best = typical(times[name], device)
        rate = {"tflops": 2 * rows * dim * vocab / best / 1e12}
        if name in moved:
            rate = {"gb_per_s": moved[name] / best / 1e9}
        table.append({"name": name, "seconds": best, **rate})
    return {
        "suite": "forward",
        "shape": (rows, dim, vocab),
        "responses": 1,
        "head": "none",
        "rows": rows,
        "dim": dim,
        "vocab": vocab,
        "table": table,
        "bars": [],
    }


def show_forward(entry: dict[str, Any]) -> None:
    """Print an entry: milliseconds and rate of every way."""
    print(f"\nforward: {entry['rows']} rows  D {entry['dim']}  V {entry['vocab']}")
    for row in entry["table"]:
        if "reason" in row:
            text = row["reason"]
        elif "tflops" in row:
            text = f"{row['seconds'] * 1e3:10.3f} ms {row['tflops']:8.0f} TF/s"
        else:
            text = f"{row['seconds'] * 1e3:10.3f} ms {row['gb_per_s']:8.0f} GB/s"
        print(f"{row['name']:36}{text}")
