"""The rates that the design of the head stands on, in a minute and a half.

Every rate is printed and stored as soon as it is known, so that a machine that is lost leaves what
it had shown. To be run before anything else on a GPU: a rate that is not there changes the plan.

    python bench/gpu_probe.py --out OUT/probe.json
    # on a CPU, tiny: whether the probe runs
    python bench/gpu_probe.py --small

Lines, by the name of the model with the head's shape (C rows of a chunk, D hidden, V vocabulary):

machine       copy bandwidth (bytes read and written); a square product; the time of an empty launch
              and of an empty product
logits        C x D x V: float32 out against bfloat16 out, tight rows and rows 64 logits further
              apart
dH            C x V x D: from a tight bfloat16 dZ, and from a dZ that lies over its float32 logits
dW            V x C x D: bfloat16 out; float32 out with beta 0 and, adding to what is there, beta 1
copies        bytes that torch.mm and torch.addmm with `out_dtype` and `out` allocate beside `out`:
              with a padded row stride, any is a copy
row kernels   bytes per second of row_logps, row_grad, one_read and the float32 -> bfloat16
              cast of a finished dW

Exit status: 1 if a line failed, 0 otherwise; a line that fails is a row with the reason.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harness
from bench_head import MODELS
from una_fast.bench import attempts
from una_fast.bench.timing import Job, ceilings, seconds_of, typical

PADDING = 64  # logits between the rows of a padded buffer
CHUNK_BYTES = 1 << 31  # of the float32 logits of a chunk, the default workspace
PROBED = ("llama3-8b", "gemma3-1b", "qwen3-1.7b")
SMALL = {"small": (32, 300)}  # hidden, vocabulary


class Line(NamedTuple):
    """One rate to be measured.

    flop, size: work of one run: flop or bytes; a line with neither is a time alone
    before: makes the operands anew before every run, outside of the timing
    """

    name: str
    run: Callable[[], Any]
    flop: float = 0.0
    size: float = 0.0
    before: Callable[[], Any] | None = None


class Probe:
    """Measures lines, prints and stores each as it comes.

    options: of the command line
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.begin = time.perf_counter()
        environment = harness.environment(self.device)
        self.report: dict[str, Any] = {
            "kind": "probe",
            "environment": environment,
            "results": [],
        }
        shown = ("gpu", "driver", "cuda", "torch", "triton", "python", "commit")
        print({name: environment[name] for name in shown if name in environment}, flush=True)

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.begin > self.options.seconds

    def add(self, row: dict[str, Any]) -> None:
        """Store and print one row: a name, and numbers or a reason."""
        self.report["results"].append(row)
        harness.write_report(self.report, self.options.out)
        cells = []
        for key, value in row.items():
            if key not in ("model", "name"):
                cells.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        where = row.get("model", "machine")
        print(f"{where:11} {row['name']:44} {', '.join(cells)}", flush=True)

    def measure(self, model: str, line: Line) -> None:
        """Time a line: the median of the runs after two that warm up."""
        row: dict[str, Any] = {"model": model, "name": line.name}
        if self.late:
            self.add(row | {"reason": f"no time left of {self.options.seconds:g} s"})
            return
        work = functools.partial(self.median, line)
        seconds, reason = attempts.attempt(line.name, work, seconds=30)
        if reason:
            self.add(row | {"reason": reason})
            return
        row["ms"] = seconds * 1e3
        if line.flop:
            row["tflops"] = line.flop / seconds / 1e12
        if line.size:
            row["gb_per_s"] = line.size / seconds / 1e9
        self.add(row)

    def median(self, line: Line) -> float:
        """Return the typical seconds of a line."""

        def prepare() -> tuple:
            if line.before is not None:
                line.before()
            return ()

        job = Job(prepare, line.run)
        times = [seconds_of(job, self.device) for _ in range(self.options.runs + 2)]
        return typical(times[2:], self.device)

    def allocated(self, model: str, name: str, run: Callable[[], Any], whole: int) -> None:
        """Tell how many bytes a call allocates beside its `out`, and whether that is a copy.

        whole: bytes of the operand that a copy would double
        """
        row = {"model": model, "name": name}
        if self.device.type != "cuda":
            self.add(row | {"reason": "needs a GPU: a CPU has no `out_dtype`"})
            return

        def peak() -> int:
            run()  # cuBLAS makes its workspace
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

        extra, reason = attempts.attempt(name, peak, seconds=30)
        if reason:
            self.add(row | {"reason": reason})
        else:
            self.add(row | {"extra_mib": extra / 2**20, "copies": extra >= whole // 2})


# -------------------------------------------------------------------------------------- the machine


def machine(probe: Probe) -> None:
    """Measure the machine's own rates."""
    for name, value in ceilings(probe.device).items():
        probe.add({"name": name, "value": value})
    tiny = torch.zeros(1, device=probe.device)
    square = torch.zeros(64, 64, device=probe.device)
    count = 100  # launches, one after another: the host's time for each

    def launches(run: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                run()

        return call

    probe.measure("machine", Line(f"{count} empty launches", launches(tiny.zero_)))
    products = launches(lambda: torch.mm(square, square, out=torch.empty_like(square)))
    probe.measure("machine", Line(f"{count} products of 64 x 64", products))


# ----------------------------------------------------------------------------------------- the head


class Head:
    """Operands of one chunk of a head.

    hidden: [C, D]; weight: [V, D]; narrow: [C, V] of the operands' dtype
    logits: [C, V] float32, rows PADDING logits apart where `padded` says so
    """

    def __init__(self, probe: Probe, dim: int, vocab: int) -> None:
        cuda = probe.device.type == "cuda"
        self.device = probe.device
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.rows = 4
        if cuda:
            self.rows = CHUNK_BYTES // (4 * (vocab + PADDING)) // 128 * 128
        self.dim, self.vocab = dim, vocab
        g = torch.Generator(self.device).manual_seed(0)
        kind = {"generator": g, "device": self.device, "dtype": self.dtype}
        self.hidden = torch.randn(self.rows, dim, **kind) * 4
        self.weight = torch.randn(vocab, dim, **kind) * dim**-0.5
        self.targets = torch.randint(vocab, (self.rows,), generator=g, device=self.device)
        self.narrow = torch.empty(self.rows, vocab, device=self.device, dtype=self.dtype)
        buffer = torch.empty(self.rows * (vocab + PADDING), device=self.device)
        self.tight = buffer[: self.rows * vocab].view(self.rows, vocab)
        self.padded = buffer.view(self.rows, vocab + PADDING)[:, :vocab]
        self.wide = {"out_dtype": torch.float32} if cuda else {}
        self.flop = 2.0 * self.rows * dim * vocab

    def multiply(self, out: Tensor) -> Callable[[], Any]:
        """Return the product of the logits into a float32 buffer."""
        return lambda: torch.mm(self.hidden, self.weight.T, out=out, **self.wide)

    def over(self, logits: Tensor) -> Tensor:
        """Return the [C, V] gradient that lies over its float32 logits, in the operands' dtype."""
        if self.dtype == torch.float32:
            return logits
        return logits.view(self.dtype)[:, : self.vocab]


def products(probe: Probe, model: str, x: Head) -> None:
    """Measure the three products of a chunk."""
    flop = x.flop
    narrow_logits = functools.partial(torch.mm, x.hidden, x.weight.T, out=x.narrow)
    probe.measure(model, Line("logits, narrow out", narrow_logits, flop))
    probe.measure(model, Line("logits, float32 out", x.multiply(x.tight), flop))
    apart = f"row stride V + {PADDING}"
    probe.measure(model, Line(f"logits, float32 out, {apart}", x.multiply(x.padded), flop))
    padded_bytes = x.padded.numel() * 4
    probe.allocated(model, "mm(out_dtype, out), padded", x.multiply(x.padded), padded_bytes)

    grad_over = x.over(x.padded)
    grad_over.copy_(x.narrow)
    grad_hidden = torch.empty_like(x.hidden)
    tight_grad = functools.partial(torch.mm, x.narrow, x.weight, out=grad_hidden)
    probe.measure(model, Line("dH, tight dZ", tight_grad, flop))
    over_grad = functools.partial(torch.mm, grad_over, x.weight, out=grad_hidden)
    probe.measure(model, Line("dH, dZ over its float32 logits", over_grad, flop))

    narrow_weight = torch.empty_like(x.weight)
    narrow_dw = functools.partial(torch.mm, x.narrow.T, x.hidden, out=narrow_weight)
    probe.measure(model, Line("dW, tight dZ, narrow out", narrow_dw, flop))
    total = torch.zeros(x.vocab, x.dim, device=x.device)
    first = functools.partial(torch.mm, grad_over.T, x.hidden, out=total, **x.wide)
    probe.measure(model, Line("dW, dZ over its logits, float32, beta 0", first, flop))
    more = functools.partial(torch.addmm, total, grad_over.T, x.hidden, out=total, **x.wide)
    probe.measure(model, Line("dW, dZ over its logits, float32, beta 1", more, flop))
    probe.allocated(model, "addmm(out_dtype, out = self), strided dZ", more, total.nbytes)

    factor = torch.full((1, 1), 1e-3, device=x.device)
    cast = functools.partial(torch.mul, total, factor, out=narrow_weight)
    moved = total.nbytes + narrow_weight.nbytes
    probe.measure(model, Line("dW * c, float32 -> narrow", cast, size=moved))


def row_kernels(probe: Probe, model: str, x: Head) -> None:
    """Measure the row kernels over tight and padded rows of logits."""
    from una_fast.kernels import one_read, rowgrad

    coef = torch.full((x.rows,), 1e-3, device=x.device)
    lse = torch.zeros(x.rows, device=x.device)
    itemsize = x.dtype.itemsize
    for where, logits in (("tight", x.tight), ("padded", x.padded)):
        kernels = {
            "row_logps": (4, lambda u: rowgrad.row_logps(u, x.targets)),
            "row_grad": (
                4 + itemsize,
                lambda u: rowgrad.row_grad(
                    u, x.targets, coef, lse, out=rowgrad.overlay(u, x.dtype)
                ),
            ),
            "one_read": (
                4 + itemsize,
                lambda u: one_read.one_read(u, x.targets, out=rowgrad.overlay(u, x.dtype)),
            ),
        }
        for name, (logit_bytes, kernel) in kernels.items():
            run = functools.partial(kernel, logits)
            size = float(logit_bytes * x.rows * x.vocab)
            again = x.multiply(logits)  # a gradient was written over the logits
            probe.measure(model, Line(f"{name}, {where} rows", run, size=size, before=again))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--models", default=",".join(PROBED), help=f"of {', '.join(MODELS)} (default: three)")
    add("--small", action="store_true", help="tiny shapes, two runs of each")
    add("--runs", type=int, default=9, help="timed runs of a line (9)")
    add("--seconds", type=float, default=90, help="after which no line starts (90)")
    add("--out", type=Path, help="write the results there as JSON, after every line")
    options = parser.parse_args(arguments)
    options.shapes = {name: MODELS[name] for name in options.models.split(",") if name in MODELS}
    if len(options.shapes) != len(options.models.split(",")):
        parser.error(f"--models={options.models}: there are {', '.join(MODELS)}")
    if options.small:
        options.shapes, options.runs = SMALL, 2
    elif options.device == "cpu":
        parser.error("the shapes of real heads need a GPU; on a CPU give --small")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Probe the machine and the heads, and return the exit status."""
    probe = Probe(parse(arguments))
    machine(probe)
    for model, (dim, vocab) in probe.options.shapes.items():
        made, reason = attempts.attempt("operands", functools.partial(Head, probe, dim, vocab))
        if reason:
            probe.add({"model": model, "name": "operands", "reason": reason})
            continue
        products(probe, model, made)
        row_kernels(probe, model, made)
        del made
        attempts.release()
    failed = [row for row in probe.report["results"] if "reason" in row]
    expected = [row for row in failed if row["reason"].startswith("needs a GPU")]
    return int(len(failed) > len(expected))


if __name__ == "__main__":
    sys.exit(main())
