"""The fused head on a CPU against TRL's ChunkedLogProbFunction and eager PyTorch: time and memory of the same work.

The work: forward and backward of the DPO loss of one pair, policy and reference, head trained, float32. Beside the
time of each stands the time of the bare matrix products it cannot do without (torch.mm of reference and policy
logits, dL/dh, dL/dW: 4 passes of 2 N D V flop), and the peak of live bytes beyond inputs and returned gradients.
Loss and gradients are compared before anything is timed.

    python bench/bench_head.py --out bench/results/head_cpu.json
    python bench/bench_head.py --shapes 64x32x1000         # rows per response x hidden x vocabulary, no bars

Exit status 1 if a bar of BARS is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from counters import FlopCounter, LiveBytes
from torch import Tensor

from una_fast import Feedback, Objective, eager, linear_una_loss

BETA = 0.1
TRL_CHUNK = 32768  # as trl/trainer/utils.py calls it
TOLERANCE = 1e-4  # max |difference| / max |value| between contenders, before timing

# shape (rows per response, hidden, vocabulary) -> largest allowed ratio to TRL's time, eager's time, eager's bytes
BARS = {
    (1024, 512, 32000): {"time / trl": 0.55, "time / eager": 1.15, "bytes / eager": 0.5},
    (512, 1024, 65536): {"time / trl": 0.80},
}


class Inputs:
    """One pair of two responses of `rows` tokens, a policy and a slightly different reference."""

    def __init__(self, rows: int, dim: int, vocab: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape = (rows, dim, vocab)
        self.hidden = torch.randn(2 * rows, dim, generator=g).requires_grad_()
        self.weight = (torch.randn(vocab, dim, generator=g) * dim**-0.5).requires_grad_()
        self.ref_hidden = self.hidden.detach() + 0.02 * torch.randn(2 * rows, dim, generator=g)
        self.ref_weight = self.weight.detach() + 0.002 * torch.randn(vocab, dim, generator=g)
        self.targets = torch.randint(vocab, (2 * rows,), generator=g)
        self.cu_seqlens = torch.tensor([0, rows, 2 * rows])

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def una(x: Inputs, op: Callable = linear_una_loss) -> Tensor:
    return op(
        x.hidden,
        x.weight,
        x.targets,
        x.cu_seqlens,
        Feedback.pairs([0], [1]),
        objective=Objective(beta=BETA),
        ref_hidden=x.ref_hidden,
        ref_weight=x.ref_weight,
    ).loss


def full_logits(x: Inputs) -> Tensor:
    return una(x, eager.linear_una_loss)


def trl(x: Inputs) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    def sums(hidden: Tensor, weight: Tensor) -> Tensor:
        logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, x.targets, 1.0, TRL_CHUNK, None, 1.0, ())
        return logps.view(2, -1).sum(1)

    with torch.no_grad():
        ref = sums(x.ref_hidden, x.ref_weight)
    chosen, rejected = sums(x.hidden, x.weight) - ref
    return -F.logsigmoid(BETA * (chosen - rejected))


class BareProducts:
    """The 4 minimal passes, outputs allocated beforehand."""

    def __init__(self, x: Inputs) -> None:
        self.x, self.logits = x, torch.empty(len(x.hidden), len(x.weight))
        self.grads = torch.empty_like(x.hidden), torch.empty_like(x.weight)

    def __call__(self) -> None:
        x, z = self.x, self.logits
        hidden, weight = x.hidden.detach(), x.weight.detach()
        torch.mm(x.ref_hidden, x.ref_weight.T, out=z)
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=self.grads[0])
        torch.mm(z.T, hidden, out=self.grads[1])


def step(loss_of: Callable[[Inputs], Tensor], x: Inputs) -> Tensor:
    x.clear()
    loss = loss_of(x)
    loss.backward()
    return loss.detach()


def check_parity(contenders: dict[str, Callable], x: Inputs) -> dict[str, float]:
    """Largest relative difference of loss and gradients from eager's; raises over TOLERANCE. Also warms up."""
    expected = [step(full_logits, x).double(), *(leaf.grad.clone() for leaf in x.leaves)]
    found = {}
    for name, loss_of in contenders.items():
        got = [step(loss_of, x).double(), *(leaf.grad for leaf in x.leaves)]
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))
        if not found[name] <= TOLERANCE:
            raise SystemExit(f"{name} differs from eager by {found[name]:.1e}: times would compare different work")
    return found


def measure(shape: tuple[int, int, int], runs: int, contenders: dict[str, Callable]) -> list[dict]:
    x = Inputs(*shape)
    rows, dim, vocab = 2 * shape[0], shape[1], shape[2]
    parity = check_parity(contenders, x)
    costs = {}
    for name, loss_of in contenders.items():
        with FlopCounter() as flop:
            step(loss_of, x)
        with LiveBytes() as memory:
            step(loss_of, x)
        extra = memory.peak(excluding=[leaf.grad for leaf in x.leaves])
        costs[name] = {"passes": flop.passes(rows, dim, vocab), "extra_bytes": extra}
    x.clear()

    bare = BareProducts(x)
    timed = {name: lambda f=loss_of: step(f, x) for name, loss_of in contenders.items()} | {"bare mm": bare}
    bare()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(runs):  # alternating, so that a busy moment of the machine hits everybody
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    common = {"rows": rows, "dim": dim, "vocab": vocab}
    table = [
        {
            **common,
            "name": name,
            "seconds": best[name],
            "times bare mm": best[name] / best["bare mm"],
            "all_seconds": seconds[name],
            "difference": parity[name],
            **costs[name],
        }
        for name in contenders
    ]
    roof = {"name": "bare mm", "seconds": best["bare mm"], "times bare mm": 1.0, "all_seconds": seconds["bare mm"]}
    return [*table, {**common, **roof, "passes": 4.0}]


def ratios(table: list[dict]) -> dict[str, float]:
    by_name = {row["name"]: row for row in table}
    ours = by_name["una_fast"]
    found = {f"time / {name}": ours["seconds"] / row["seconds"] for name, row in by_name.items() if name != "una_fast"}
    if "eager" in by_name:
        found["bytes / eager"] = ours["extra_bytes"] / by_name["eager"]["extra_bytes"]
    return found


def verdicts(shape: tuple[int, int, int], found: dict[str, float]) -> list[dict]:
    return [
        {"bar": name, "allowed": allowed, "found": found.get(name), "held": name in found and found[name] <= allowed}
        for name, allowed in BARS.get(shape, {}).items()
    ]


def show(table: list[dict], found: dict[str, float], bars: list[dict]) -> None:
    first = table[0]
    print(f"\nN {first['rows']}  D {first['dim']}  V {first['vocab']}  float32, policy + reference, forward + backward")
    print(f"{'':10} {'seconds':>9} {'x bare mm':>10} {'passes':>7} {'extra MiB':>10} {'difference':>11}")
    for row in table:
        extra = f"{row['extra_bytes'] / 2**20:10.1f}" if "extra_bytes" in row else f"{'':10}"
        difference = f"{row['difference']:11.1e}" if "difference" in row else ""
        line = f"{row['name']:10} {row['seconds']:9.3f} {row['times bare mm']:10.2f} {row['passes']:7.2f}"
        print(f"{line} {extra} {difference}")
    print("una_fast  " + "   ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for bar in bars:
        value = "not measured" if bar["found"] is None else f"{bar['found']:.3f}"
        print(f"  {'held  ' if bar['held'] else 'MISSED'} {bar['bar']} <= {bar['allowed']}: {value}")


def environment(threads: int) -> dict:
    def git(*arguments: str) -> str | None:
        where = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        from trl import __version__ as trl_version
    except ImportError:
        trl_version = None
    return {
        "torch": torch.__version__,
        "trl": trl_version,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "command": shlex.join(["python", *sys.argv]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "../una_fast", ".")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    shapes = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError("give rows-per-response x hidden x vocabulary, as in 1024x512x32000")
    return shapes


def main() -> int:
    default = ",".join("x".join(map(str, shape)) for shape in BARS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default=default, help=f"default {default}")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs; the minimum counts (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    contenders = {"una_fast": una, "trl": trl, "eager": full_logits}
    try:
        import trl as _  # noqa: F401
    except ImportError:
        print("trl is not installed: its row, and bars against it, are missing (pip install una-fast[trl])")
        del contenders["trl"]
    results, missed = [], False
    for shape in arguments.shapes:
        table = measure(shape, arguments.runs, contenders)
        found = ratios(table)
        bars = verdicts(shape, found)
        show(table, found, bars)
        missed |= not all(bar["held"] for bar in bars)
        results.append({"shape": shape, "table": table, "ratios": found, "bars": bars})
    report = {"environment": environment(arguments.threads), "results": results}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {arguments.out}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
