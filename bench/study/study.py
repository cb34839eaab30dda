"""The study of UNA beside DPO, KTO, PPO, RLOO and GRPO, on a CPU.

    python bench/study/study.py --jobs 2            # all parts, 50 minutes, then the report
    python bench/study/study.py --only E1 --jobs 2  # one part: E0 | E1 | E2 | E3 | time
    python bench/study/study.py --quick             # toy sizes, into build/study/quick
    python bench/study/report.py                    # docs/STUDY.md and the plots, from the results

Protocol. Every method sweeps the same grid of lr x beta with the same samples on the selection
seeds. The settings chosen on these seeds, per KL bin, run again on the reporting seeds, and only
runs on reporting seeds are reported (stats.py). A finished run is a line of build/study/runs.jsonl
and is not repeated, so that an interrupted study continues; runs of other sizes, seeds or versions
of this folder do not count. Wall times are from separate runs: one process, one thread, methods
taking turns, without evaluation. Results: bench/results/study.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of harness.py

import torch

import exact
import harness
import methods
import report
import stats
import task
from methods import Size, Spec
from una_fast.bench import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("E0", "E1", "E2", "E3", "time")
OF_RUNS = ("task.py", "methods.py", "ppo.py")  # what a stored run depends on, in this folder


@dataclass(frozen=True)
class Plan:
    """Grids, seeds and bins. The same for every method of a part."""

    lrs: dict[str, tuple[float, ...]]
    betas: dict[str, tuple[float, ...]]
    select_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    bins: dict[str, tuple[stats.Bin, ...]]
    means: tuple[float, ...]
    timing: tuple[float, float]
    rounds: int


def bins(*edges: float) -> tuple[stats.Bin, ...]:
    """Return the bins between neighbouring edges."""
    return tuple(zip(edges, edges[1:], strict=False))


FULL = Plan(
    lrs={"E1": (5e-4, 1e-3), "E2": (5e-4,), "E3": (1e-3, 2e-3)},
    betas={"E1": (0.03, 0.1, 0.3), "E2": (0.03, 0.1), "E3": (0.01, 0.03, 0.1)},
    select_seeds=(101, 102),
    report_seeds=(1, 2, 3, 4, 5),
    bins={"E1": bins(0.25, 0.5, 1.0, 2.0, 3.0, 5.0), "E3": bins(0.5, 1.0, 2.0, 3.0, 4.0, 6.0)},
    means=(0.3, 0.5, 0.7),
    timing=(1e-3, 0.03),
    rounds=3,
)
QUICK = Plan(
    lrs={"E1": (1e-3,), "E2": (1e-3,), "E3": (2e-3,)},
    betas={"E1": (0.1,), "E2": (0.1,), "E3": (0.03,)},
    select_seeds=(101,),
    report_seeds=(1, 2),
    bins={"E1": bins(0.0, 0.5, 5.0), "E3": bins(0.0, 0.5, 5.0)},
    means=(0.3, 0.7),
    timing=(1e-3, 0.03),
    rounds=1,
)
QUICK_SIZE = Size(
    base_steps=60, held_out=64, prompts=64, offline_batch=16, online_steps=4, online_batch=8
)


# ----------------------------------------------------------------------------- runs and their store


class Store:
    """The finished runs, one JSON line each."""

    def __init__(self, path: Path, version: str) -> None:
        self.path, self.version = path, version
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                run = json.loads(line)
                if run.pop("version") == version and "failed" not in run:
                    self.runs[run.pop("key")] = run

    def add(self, key: str, run: dict[str, Any]) -> None:
        self.runs[key] = run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "version": self.version, **run}) + "\n")


SHOP: methods.Workshop


def start_worker(base: Path, size: Size, log: Path) -> None:
    """Use one thread, and send all output of the process to the log."""
    global SHOP
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    SHOP = methods.Workshop(base, size)


def run_one(spec: Spec) -> dict[str, Any]:
    """Make a run; a run that fails has no points and a reason."""
    start = time.perf_counter()
    try:
        run = SHOP.run(spec)
    except Exception as error:  # a diverged run is a result too
        traceback.print_exc()
        run = {**asdict(spec), "points": [], "failed": f"{type(error).__name__}: {error}"[:300]}
    return {**run, "total_seconds": time.perf_counter() - start}


class Study:
    """The runs of a plan: makes the runs that are not stored, part by part."""

    def __init__(self, plan: Plan, size: Size, work: Path, jobs: int) -> None:
        self.plan, self.size = plan, size
        self.work, self.jobs = work, jobs
        work.mkdir(parents=True, exist_ok=True)
        sources = b"".join((HERE / name).read_bytes() for name in OF_RUNS)
        self.version = hashlib.sha256(sources + repr(size).encode()).hexdigest()[:16]
        self.store = Store(work / "runs.jsonl", self.version)
        self.base = self.make_base()

    def make_base(self) -> dict[str, Any]:
        """Make the base model once, and return the model's description and evaluation."""
        self.directory = self.work / f"base-{self.version}"
        described = self.directory / "study.json"
        if not described.exists():
            with stage("base model"):
                made = task.make_base(self.directory, self.size.base_steps)
                shop = methods.Workshop(self.directory, self.size)
                model = shop.reference
                prompts = task.held_out(self.size.held_out)
                found = task.evaluate(model, model, shop.tokenizer, prompts, seed=0)
                parameters = sum(p.numel() for p in model.parameters())
                description = {**made, **found, "parameters": parameters}
                described.write_text(json.dumps(description), encoding="utf-8")
        return json.loads(described.read_text(encoding="utf-8"))

    def run_all(self, specs: Iterable[Spec], name: str, *, jobs: int | None = None) -> None:
        """Make the runs that are not stored, in order of submission."""
        wanted = [spec for spec in dict.fromkeys(specs) if spec.key not in self.store.runs]
        if not wanted:
            return
        sources, log = digest(), self.work / "workers.log"
        workers = ProcessPoolExecutor(
            min(jobs or self.jobs, len(wanted)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(self.directory, self.size, log),
        )
        with stage(f"{name}: {len(wanted)} runs"), workers as pool:
            waiting = {pool.submit(run_one, spec): spec for spec in wanted}
            for done, future in enumerate(as_completed(waiting), start=1):
                run = future.result()
                self.store.add(waiting[future].key, {**run, "sources": sources})
                if "failed" in run:
                    setting = f"lr {run['lr']} beta {run['beta']} seed {run['seed']}"
                    say(f"  {run['method']} {setting}: {run['failed']}")
                if done % 20 == 0:
                    say(f"  {done} of {len(wanted)}")

    def planned(self) -> list[dict[str, Any]]:
        """Return the stored runs of this plan's grids and seeds."""
        plan = self.plan

        def wanted(run: dict[str, Any]) -> bool:
            if run["what"] == "time":
                return (run["lr"], run["beta"]) == plan.timing and run["seed"] <= plan.rounds
            seeds = plan.select_seeds if run["what"] == "select" else plan.report_seeds
            part = run["part"]
            in_grid = run["lr"] in plan.lrs[part] and run["beta"] in plan.betas[part]
            of_mean = part != "E2" or run["mean"] in plan.means
            return in_grid and run["seed"] in seeds and of_mean

        return [run for run in self.store.runs.values() if wanted(run)]

    # --- the parts --------------------------------------------------------------------------------

    def frontiers(self, part: str, names: Iterable[str]) -> None:
        """Run the grid on the selection seeds, then the chosen settings on the reporting seeds."""
        plan, names = self.plan, list(names)
        specs = []
        for seed, lr, beta, name in product(
            plan.select_seeds, plan.lrs[part], plan.betas[part], names
        ):
            specs.append(Spec(part, "select", name, lr, beta, seed))
        self.run_all(specs, f"{part} selection")
        runs = [run for run in self.planned() if run["part"] == part]
        chosen = []
        for name in names:
            own = stats.select([run for run in runs if run["method"] == name], plan.bins[part])
            chosen += [(name, candidate) for candidate in own.values()]
        specs = []
        for seed, (name, candidate) in product(plan.report_seeds, chosen):
            specs.append(Spec(part, "report", name, candidate.lr, candidate.beta, seed))
        self.run_all(specs, f"{part} report")

    def means(self) -> None:
        """Run all settings of E2 on the reporting seeds; no setting is chosen."""
        plan = self.plan
        specs = []
        for seed, mean, name, lr, beta in product(
            plan.report_seeds, plan.means, methods.E2, plan.lrs["E2"], plan.betas["E2"]
        ):
            specs.append(Spec("E2", "report", name, lr, beta, seed, mean))
        self.run_all(specs, "E2")

    def timing(self) -> None:
        """Time the methods in turn, in one process with one thread; the first round warms up."""
        plan = self.plan
        turns = product(range(plan.rounds + 1), methods.E3)
        specs = [Spec("E3", "time", name, *plan.timing, seed) for seed, name in turns]
        if any(spec.key not in self.store.runs for spec in specs):  # all of them in one go
            for spec in specs:
                self.store.runs.pop(spec.key, None)
        self.run_all(specs, "time", jobs=1)

    def exact(self) -> None:
        """Run E0, once."""
        path = self.work / "exact.json"
        if not path.exists():
            with stage("E0"):
                found = {**exact.run(), "sources": digest()}
            path.write_text(json.dumps(found), encoding="utf-8")

    def results(self) -> dict[str, Any]:
        """Return the content of study.json."""
        path = self.work / "exact.json"
        runs = self.planned()
        return {
            "kind": "study",
            "environment": environment(),
            "size": asdict(self.size),
            "plan": asdict(self.plan),
            "jobs": self.jobs,
            "base": self.base,
            "sources": sorted({run["sources"] for run in runs}),
            "exact": json.loads(path.read_text(encoding="utf-8")) if path.exists() else None,
            "runs": [compact(run) for run in sorted(runs, key=lambda r: Spec(**own(r)).key)],
        }


def own(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in Spec.__dataclass_fields__}


def compact(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run with all numbers rounded to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    return {k: short(v) for k, v in run.items() if k != "sources" and v is not None}


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print the name of a stage and the stage's seconds."""
    say(name)
    start = time.perf_counter()
    yield
    say(f"  {time.perf_counter() - start:.0f} s")


def digest() -> str:
    """Return a digest of the library, to tell runs of different versions apart."""
    return harness.digest_of("una_fast", "kernels")


def environment() -> dict[str, Any]:
    """Return the versions, the machine and the command of the results."""
    return {
        **{name: metadata.version(name) for name in ("torch", "transformers", "trl", "numpy")},
        "python": sys.version.split()[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "command": shlex.join(["python", "bench/study/study.py", *sys.argv[1:]]),
        **machine.commit_of(harness.ROOT, ("una_fast", "kernels", "bench/study")),
        "date": machine.utc_time(),
    }


def main() -> int:
    """Make the runs and write the results and the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything work?")
    parser.add_argument("--jobs", type=int, default=1, help="processes for runs that are not timed")
    seeds = "reporting seeds, at least 5 for a verdict that counts"
    parser.add_argument("--seeds", type=int, help=seeds)
    parser.add_argument("--work", type=Path, help="where runs are stored; default build/study")
    parser.add_argument("--no-report", action="store_true")
    arguments = parser.parse_args()
    # Of the workers.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    plan, size = (QUICK, QUICK_SIZE) if arguments.quick else (FULL, Size())
    if arguments.seeds:
        plan = Plan(**{**vars(plan), "report_seeds": tuple(range(1, arguments.seeds + 1))})
    work = arguments.work or ROOT / "build" / "study" / ("quick" if arguments.quick else "")
    start = time.perf_counter()
    study = Study(plan, size, work.resolve(), arguments.jobs)
    parts = {
        "E0": study.exact,
        "E1": lambda: study.frontiers("E1", methods.E1),
        "E2": study.means,
        "E3": lambda: study.frontiers("E3", methods.E3),
        "time": study.timing,
    }
    for name in PARTS:
        if name in arguments.only:
            parts[name]()
    out = work / "study.json" if arguments.quick else report.RESULTS
    out.write_text(json.dumps(study.results()) + "\n", encoding="utf-8")
    say(f"{out}: {len(study.store.runs)} runs, {time.perf_counter() - start:.0f} s")
    if not arguments.no_report:
        page = work / "STUDY.md" if arguments.quick else report.PAGE
        report.write(out, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
