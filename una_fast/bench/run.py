"""`una-fast bench`: a call of the fused head on the user's machine, beside eager PyTorch and peers.

sizes -> free memory -> inputs -> errors against float64 -> memory -> longest call
      -> timed rounds in turns -> table, JSON, picture

A missing, wrong, slow or large contender is a row with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from una_fast.bench.attempts import DeviceLost
from una_fast.bench.contenders import Contender, Una, of_the_head
from una_fast.bench.inputs import PLAIN, Form, Inputs, StatesInputs
from una_fast.bench.longest import Line, line_of, modelled, search
from una_fast.bench.machine import (
    PEERS,
    command_output,
    commit_of,
    free_memory,
    installed,
    machine_of,
)
from una_fast.bench.measuring import (
    Question,
    Rounds,
    costs,
    examine,
    put_times,
    sizes_of,
    time_all,
)
from una_fast.bench.picture import draw
from una_fast.bench.settings import BenchConfig
from una_fast.bench.tables import Column, table_lines
from una_fast.bench.truth import LogpTruth, check, logp_errors, logp_truth, truth
from una_fast.files import write_json
from una_fast.head.engines import choose_engine, compute_dtype
from una_fast.printable import bytes_in_words

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("una_fast", "kernels")
RESPONSES = 2  # a pair

# kind of device -> value
HIDDEN = {"cuda": 4096, "cpu": 512}
VOCAB = {"cuda": 128256, "cpu": 32000}
MOST_TOKENS = {"cuda": 8192, "cpu": 1024}  # by default
PASS_FLOP = {"cuda": 1e14, "cpu": 1.2e11}  # of a pass by default: a step in seconds
CHECKED = {"cuda": 2048, "cpu": 256}  # rows compared with float64
RUNS = {"cuda": 20, "cpu": 7}
QUICK_RUNS = 3
QUICK_SHARE = 4  # tokens are divided by
QUICK_SECONDS = 15.0
FIRST_CALL = 120.0  # seconds: kernels are compiled
SEARCH_SECONDS = 60.0  # of a contender
MARGIN = 1.1  # memory is asked for with
MOST_REAL = {"cuda": 8192, "cpu": 512}  # rows of real hidden states
GEMM_JOBS = 4  # at least: three bare products and the square product
CELL = 12  # columns
SHARES = {"seconds": "time", "extra_bytes": "extra memory", "longest_rows": "longest call"}
RESULT, PICTURE = "bench.json", "bench.png"

COLUMNS = {
    "ms": Column("seconds", ".1f", 1e-3),
    "spread %": Column("spread", ".1f", 0.01),
    "x bare mm": Column("times bare mm", ".2f"),
    "passes": Column("passes", ".2f"),
    "extra MiB": Column("extra_bytes", ",.1f", 2**20),
    "longest": Column("longest_rows", ",.0f"),
    "ratio err": Column("ratio_error", ".1e"),
    "real err": Column("real_ratio_error", ".1e"),
}
LEGEND = """\
ms          a step, policy and reference, forward and backward: the least of the runs on a CPU, the
            median on a GPU; spread: of the middle half of the runs
x bare mm   beside the matrix products that the step cannot do without (bare mm)
extra MiB   peak beyond inputs, gradients and a float32 accumulator of the head's gradient
longest     response tokens of a call that fit into the free memory, """
LONGEST = {"cuda": "searched", "cpu": "modelled from short calls"}


@dataclass(frozen=True)
class Work:
    """The measured call.

    name: of the model, or of the sizes
    rows: of a response
    dim: D
    vocab: V
    form: of the head
    device, dtype: of the tensors
    """

    name: str
    rows: int
    dim: int
    vocab: int
    form: Form
    device: torch.device
    dtype: torch.dtype

    def title(self, head: str) -> str:
        """Return the sizes, the head and the dtype as a line."""
        sizes = f"N {RESPONSES * self.rows} in {RESPONSES}  D {self.dim}  V {self.vocab}"
        extras = "".join(f", {part}" for part in self._constants())
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {sizes}  {head} head, {kind}{extras}"

    def _constants(self) -> list[str]:
        named = {"softcap": self.form.softcap, "logit scale": self.form.logit_scale, "bias": ""}
        return [f"{part} {named[part]}".strip() for part in self.form.extras()]

    def checked(self) -> int:
        """Return the rows of a response to compare with float64."""
        return min(self.rows, CHECKED[self.device.type] // RESPONSES)

    def bytes_of_check(self) -> int:
        """Return the bytes of the least measurement: heads, gradients, the truth.

        The truth holds a head and a gradient in float64, and the gradient in float32.
        """
        size = self.dtype.itemsize
        of_head = self.vocab * self.dim * (2 * size + size + 8 + 8 + 4)
        states = 2 * self.rows * RESPONSES * self.dim * size
        return int(MARGIN * (of_head + states))


@dataclass
class Progress:
    """A bar on a terminal, silent elsewhere."""

    bar: Any = None

    def tell(self, words: str, steps: int = 0) -> None:
        """Show the present work, after so many further steps."""
        if self.bar is not None:
            self.bar.update(steps)
            self.bar.set_description_str(words)


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Progress]:
    """Show a bar of `total` steps inside the block, on a terminal alone."""
    if not shown or not sys.stderr.isatty():
        yield Progress()
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, dynamic_ncols=True, leave=False) as bar:
        yield Progress(bar)


@dataclass
class Bench:
    """A bench under way.

    settings: of the command
    work: the measured call
    entrants: contenders, una_fast first
    progress: of the bar
    notes: for the reader of the table
    """

    settings: BenchConfig
    work: Work
    entrants: list[Contender]
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def measure(self, real: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the table and the reference.

        real: tensors of real hidden states, see real_states
        """
        work = self.work
        kind = {"device": work.device.type, "dtype": work.dtype, "form": work.form}
        self.progress.tell("inputs")
        x = Inputs((work.rows,) * RESPONSES, work.dim, work.vocab, **kind)
        x.head(self.settings.head)
        part = x.of_length(work.checked())
        self.progress.tell("float64 truth")
        asked = _Asked(x, part, truth(part))
        if real is not None:
            half = len(real["targets"]) // RESPONSES
            asked.real = StatesInputs(real, (half,) * RESPONSES, **kind)
            asked.real_truth = logp_truth(asked.real)
        table = {c.name: sizes_of(x) | {"name": c.name} for c in self.entrants}
        ready = [c for c in self.entrants if self._examine(c, table[c.name], asked)]
        runs = QUICK_RUNS if self.settings.quick else RUNS[work.device.type]
        budget = min(self.settings.seconds, QUICK_SECONDS if self.settings.quick else 1e9)

        def tell(job: str) -> None:
            self.progress.tell("timed rounds", steps=1)

        times = time_all(ready, x, Rounds(runs, budget, tell=tell))
        ref, roof = put_times(table, ready, x, times)
        if work.device.type == "cuda" and not self.settings.quick:
            for c in [c for c in ready if "reason" not in table[c.name]]:
                self.progress.tell(f"{c.name}: longest call", steps=1)
                table[c.name] |= search(c, x, SEARCH_SECONDS)
        return {"table": [*table.values(), roof], "reference": ref}

    def real_states(self, model: Any) -> Mapping[str, Any] | None:
        """Return real hidden states of a model, or None with a note. model: ModelHead, or None"""
        if model is None:
            return None
        from una_fast.bench.model_head import NoStates, real_states

        self.progress.tell("real hidden states")
        work = self.work
        rows = min(work.rows, MOST_REAL[work.device.type] // RESPONSES)
        own_code = {"trust_remote_code": self.settings.trust_remote_code}
        try:
            return real_states(model, rows, work.device, work.dtype, **own_code)
        except NoStates as reason:
            self.notes.append(f"no errors on real hidden states: {reason}")
            return None

    def _examine(self, contender: Contender, row: dict[str, Any], asked: _Asked) -> bool:
        """Put errors, memory and, on a CPU, the longest call into a row; False without a time."""
        self.progress.tell(contender.name, steps=1)
        row["passes"] = contender.passes[self.settings.head]
        return examine(contender, row, asked.part, asked.questions(contender))


@dataclass
class _Asked:
    """The inputs of the questions.

    x: of the timed call
    part: fewer rows, compared with float64
    true: of `part`
    real: real hidden states, if any
    real_truth: log-probs of `real`
    lines: memory by contender, on a CPU
    """

    x: Inputs
    part: Inputs
    true: Any
    real: Inputs | None = None
    real_truth: LogpTruth | None = None
    lines: dict[str, Line] = field(default_factory=dict)

    def questions(self, contender: Contender) -> list[Question]:
        """Return the questions to a contender, in order."""
        asked: list[Callable[[], dict[str, Any]]] = [
            functools.partial(check, contender, self.part, self.true),
            functools.partial(logp_errors, contender, self.part, self.true),
        ]
        if self.real is not None:
            asked.append(functools.partial(self._real_errors, contender))
        if self.x.device.type == "cpu":
            asked.append(functools.partial(self._longest, contender))
            asked.append(functools.partial(self._fits, contender))
        asked.append(functools.partial(costs, contender, self.x))
        return [Question(ask, FIRST_CALL) for ask in asked]

    def _real_errors(self, contender: Contender) -> dict[str, Any]:
        found = logp_errors(contender, self.real, self.real_truth)
        return {f"real_{name}": value for name, value in found.items()}

    def _longest(self, contender: Contender) -> dict[str, Any]:
        """Return the longest call by the model."""
        line = self.lines[contender.name] = line_of(contender, self.x)
        return modelled(line, self.x)

    def _fits(self, contender: Contender) -> dict[str, Any]:
        """Raise MemoryError for a timed call beyond the memory."""
        line = self.lines[contender.name]
        needed, free = line.needed(self.x.rows), free_memory(self.x.device)
        if MARGIN * needed > free:
            words = f"a step needs {bytes_in_words(needed)}, and {bytes_in_words(free)} are free"
            raise MemoryError(words)
        return {}


def run_bench(settings: BenchConfig) -> dict[str, Any]:
    """Measure, print the table, write the files; return the line for programs.

    settings: of the command

    ValueError for a missing model, for sizes beyond the memory, for a directory that cannot be
    written in, for an engine that cannot run, and after a bench without a time of una_fast.
    """
    device = _device_of(settings)
    dtype = compute_dtype(settings, device.type)
    entrants = of_the_head(settings.workspace_mb, settings.engine, settings.contenders)
    if any(isinstance(contender, Una) for contender in entrants):
        choose_engine(settings.engine, device, dtype)
    model = None
    if settings.model is not None:
        from una_fast.bench.model_head import head_of

        model = head_of(settings.model, trust_remote_code=settings.trust_remote_code)
    work = _work(settings, model, device, dtype)
    _refuse_too_large(work)
    out = _directory_of(settings)
    runs = QUICK_RUNS if settings.quick else RUNS[device.type]
    total = len(entrants) + (runs + 1) * (len(entrants) + GEMM_JOBS)
    print(work.title(settings.head), flush=True)
    with progress_bar(total, settings.progress) as progress:
        bench = Bench(settings, work, entrants, progress)
        found = _measured(bench, model)
    result = {
        "environment": _environment(device),
        "settings": asdict(settings),
        "head": _head_in_words(work, settings),
        "notes": bench.notes,
        **found,
        "ratios": _ratios(found["table"]),
    }
    told = _tell(result, work, settings, out)
    _refuse_unmeasured(found["table"])
    return told


def _directory_of(settings: BenchConfig) -> Path:
    """Return the directory of the results, made; ValueError if no file can be written in it."""
    try:
        out = Path(settings.out).expanduser().absolute()
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user without a home
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out={settings.out} is not a directory to write in: {reason}; set another"
        ) from error


def _refuse_unmeasured(table: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError without a time of una_fast if it takes part, or else of any contender.

    table: rows of the result, the bare products last
    """
    rows = table[:-1]
    asked = [row for row in rows if row["name"].startswith("una_fast")] or rows
    if not any("seconds" in row for row in asked):
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in asked)
        raise ValueError(f"nothing was measured of {reasons}")


def _measured(bench: Bench, model: Any) -> dict[str, Any]:
    """Return table and reference; ValueError for a GPU that a contender has broken."""
    try:
        return bench.measure(bench.real_states(model))
    except DeviceLost as error:
        raise ValueError(f"{error}; name the others with --contenders") from error


def _device_of(settings: BenchConfig) -> torch.device:
    """Return the device to measure on; ValueError for a missing GPU."""
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ValueError("device=cuda, and torch finds no GPU; set device: cpu")
    wanted = "cuda" if there else "cpu"
    return torch.device(wanted if settings.device == "auto" else settings.device)


def _work(settings: BenchConfig, model: Any, device: torch.device, dtype: torch.dtype) -> Work:
    """Return the call to measure.

    settings: of the command
    model: ModelHead, or None
    device, dtype: of the tensors
    """
    kind = device.type
    if model is None:
        dim, vocab = settings.hidden or HIDDEN[kind], settings.vocab or VOCAB[kind]
        name, form = "random numbers", PLAIN
    else:
        dim, vocab, name, form = model.dim, model.vocab, model.name, model.form
    tokens = settings.tokens
    if tokens is None:
        by_flop = int(PASS_FLOP[kind] / (2 * dim * vocab))
        tokens = max(min(MOST_TOKENS[kind], 1 << max(by_flop.bit_length() - 1, 0)), 16)
        tokens //= QUICK_SHARE if settings.quick else 1
    return Work(name, tokens // RESPONSES, dim, vocab, form, device, dtype)


def _refuse_too_large(work: Work) -> None:
    """Raise ValueError for heads beyond the memory of the device."""
    needed, free = work.bytes_of_check(), free_memory(work.device)
    if needed > free:
        raise ValueError(
            f"hidden {work.dim} and vocab {work.vocab} at {RESPONSES * work.rows} tokens need "
            f"about {bytes_in_words(needed)} to be measured, and {bytes_in_words(free)} are free "
            f"on the {work.device.type}; give smaller --hidden, --vocab or --tokens, or free memory"
        )


def _environment(device: torch.device) -> dict[str, Any]:
    """Return machine, versions of the peers, and the commit of a package in a git tree."""
    found = machine_of(device) | {name: installed(name) for name in PEERS}
    found["una-fast"] = installed("una-fast")
    if command_output(ROOT, "git", "ls-files", "--error-unmatch", "una_fast/__init__.py"):
        found |= commit_of(ROOT, SOURCES)
    return found


def _head_in_words(work: Work, settings: BenchConfig) -> dict[str, Any]:
    """Return the sizes and constants of the head as plain values."""
    return {
        "name": work.name,
        "rows": RESPONSES * work.rows,
        "responses": RESPONSES,
        "rows_checked": RESPONSES * work.checked(),
        "dim": work.dim,
        "vocab": work.vocab,
        "head": settings.head,
        "device": work.device.type,
        "dtype": str(work.dtype).removeprefix("torch."),
        **work.form._asdict(),
    }


def _tell(result: dict[str, Any], work: Work, settings: BenchConfig, out: Path) -> dict[str, Any]:
    """Print the table and the notes, write the files, return the line for programs.

    result: to be stored
    work: the measured call
    settings: of the command
    out: directory
    """
    title = work.title(settings.head)
    environment = result["environment"]
    machine = (
        environment.get("gpu") or f"{environment['machine']}, {environment['threads']} threads"
    )
    for name, shares in result["ratios"].items():
        words = [f"{share:.3g} of the {SHARES[key]}" for key, share in shares.items()]
        result["notes"].append(f"una_fast beside {name}: {', '.join(words)}")
    for row in result["table"]:
        if "longest_note" in row:
            result["notes"].append(f"{row['name']}: longest call: {row['longest_note']}")
    print(*table_lines(COLUMNS, result["table"], CELL), sep="\n")
    write_json(out / RESULT, result)
    missing = draw(result["table"], f"{title}; {machine}", out / PICTURE)
    if missing:
        result["notes"].append(f"no picture: {missing}")
        write_json(out / RESULT, result)
    print(LEGEND + LONGEST[work.device.type], *result["notes"], sep="\n")
    files = [RESULT] if missing else [RESULT, PICTURE]
    print(f"wrote {' and '.join(str(out / name) for name in files)}")
    rows = {row["name"]: row for row in result["table"]}
    return {
        "output_dir": str(out),
        "files": files,
        "seconds": {name: row.get("seconds") for name, row in rows.items()},
        "extra_bytes": {name: row.get("extra_bytes") for name, row in rows.items()},
        "reasons": {name: row["reason"] for name, row in rows.items() if "reason" in row},
        "ratios": result["ratios"],
    }


def _ratios(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return una_fast's time, extra memory and longest call as shares of every contender's.

    table: rows of the result, una_fast first if una_fast takes part
    """
    ours, *others = table
    found: dict[str, dict[str, float]] = {}
    for row in others if ours["name"].startswith("una_fast") else ():
        shares = {key: ours[key] / row[key] for key in SHARES if ours.get(key) and row.get(key)}
        if shares and "reason" not in row:
            found[row["name"]] = shares
    return found
