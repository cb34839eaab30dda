"""Rehearse bench/gpu_session.sh on a CPU: every way in which a session on a GPU can go wrong.

    bash bench/gpu_session.sh --rehearse            # all pieces, less than three minutes
    bash bench/gpu_session.sh --rehearse head       # one of them

Pieces, each the part of the session that it names, with stubs in the place of what needs a GPU:

install   part 1 with an installation that fails: the part ends at once, its reason last
head      part 2 with a contender that hangs in a kernel, one that ends the process and one that
          raises: each is a row with its reason, and all others are timed
cut       part 4 with a contender that outlives the part: what was measured before is there
probe     part 1: the probe on tiny shapes, tests in parallel, a passing and a failing one, the bars
step      part 3: training steps, a trainer that hangs

Every piece checks the results, and that no more than eight files come back. Exit status: 0 only if
all of that holds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES = 8
SHAPE = (8, 16, 90)  # rows per response, hidden, vocabulary
STUBS = "BENCH_REHEARSAL"  # environment variable: which contenders take part

# A script in the place of bench/NAME.py: the same main, with stubs.
WRAPPER = """import sys
sys.path.insert(0, {folder!r})
import rehearsal
sys.exit(rehearsal.{name}())
"""
TESTS = """def test_passes():
    pass

def test_fails():
    assert not "as planned"
"""


def hang() -> None:
    """Hang as a kernel does: Python's alarm is not heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(3600)


# ------------------------------------------------------------------------------- inside the session


def bench_head() -> int:
    """Run bench_head.py on tiny cases, whatever the suite, with the stubs of this piece."""
    import bench_head as bench
    import contenders
    import harness
    from una_fast.bench.contenders import Eager, Una
    from una_fast.bench.inputs import Inputs

    class Stub(Eager):
        """Eager PyTorch, but for what `act` does before it."""

        def __init__(self, name: str, act: Any) -> None:
            self.name, self.act = name, act

        def loss(self, x: Inputs) -> Any:
            self.act()
            return super().loss(x)

    def fail() -> None:
        raise RuntimeError("as planned")

    stubs = {
        "plain": [],
        "broken": [Stub("hangs", hang), Stub("crashes", os.abort), Stub("raises", fail)],
        "cut": [Stub("outlives", hang)],
    }
    kind = os.environ[STUBS]
    entrants = [Una(), *stubs[kind], Eager()]

    def cases(suite: str, *_: Any) -> list[Any]:
        case = bench.pair(suite, SHAPE, heads=("trained",), runs=1)
        if kind != "cut":
            return [case]
        # A whole case first, which the one that is cut must not take along.
        return [case._replace(without=("outlives",)), case._replace(lengths=(9, 9))]

    bench.cases = cases
    bench.Run.run_forward = lambda *_: None
    contenders.everybody = lambda *_: entrants
    harness.Guard.grace = 1.0
    deadline = "600" if kind == "cut" else "15"
    return bench.main([*sys.argv[1:], "--warmup", deadline, "--runs", "1", "--threads", "1"])


def bench_step() -> int:
    """Run bench_step.py with acted sessions; TRL hangs, which a resumed run must survive."""
    import bench_step as bench
    import harness
    import step_contenders

    def ours(case: Any, setup: Any, watch: Any) -> step_contenders.Session:
        line = {"loss": 0.7, "grad_norm": 1.0, "logps/chosen": -1.0, "logps/rejected": -2.0}
        return step_contenders.Session([line] * 5, [0.1] * 3, 1, case.tokens, [], "bfloat16", True)

    def theirs(case: Any, setup: Any, watch: Any) -> step_contenders.Session:
        if case.model == "llama3-8b":
            hang()
        return ours(case, setup, watch)

    step_contenders.CONTENDERS.update(una_fast=ours, trl=theirs)
    harness.Guard.grace = 1.0
    bench.peak_of = lambda device: {"tflops": 1.0, "source": "rehearsal"}
    return bench.main([*sys.argv[1:], "--deadline", "2", "--threads", "1"])


def gpu_probe() -> int:
    """Run gpu_probe.py on tiny shapes."""
    import gpu_probe as probe

    return probe.main(sys.argv[1:])


# --------------------------------------------------------------------------------------- the pieces


class Part:
    """One part of the session, run in a folder of its own.

    out: the folder of the results
    status: exit status
    text: what was printed
    """

    def __init__(self, number: int, folder: Path, **environment: str) -> None:
        scripts = folder / "scripts"
        scripts.mkdir(parents=True)
        for name in ("bench_head", "bench_step", "gpu_probe"):
            text = WRAPPER.format(folder=str(ROOT / "bench"), name=name)
            (scripts / f"{name}.py").write_text(text, encoding="utf-8")
        self.out = folder / "out"
        settings = {
            "PYTHON": sys.executable,
            "BENCH_DEVICE": "cpu",
            "BENCH_SCRIPTS": str(scripts),
            "BENCH_INSTALL": "true",
            "BENCH_SMALL": "--small",
            "OMP_NUM_THREADS": "1",
            STUBS: "plain",
        }
        session = str(ROOT / "bench" / "gpu_session.sh")
        begin = time.perf_counter()
        done = subprocess.run(
            ["bash", session, str(self.out), str(number)],
            env={**os.environ, **settings, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.status, self.text = done.returncode, done.stdout
        self.seconds = time.perf_counter() - begin

    def report(self, name: str) -> dict[str, Any]:
        """Return a stored report."""
        return json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))

    def reasons(self, name: str) -> list[dict[str, str]]:
        """Return the rows of every entry of a report: reason by contender, "" for a timed one."""
        found = []
        for entry in self.report(name)["results"]:
            rows = [row for row in entry["table"] if row["name"] != "bare mm"]
            assert all("reason" in row or row["seconds"] > 0 for row in rows)
            found.append({row["name"]: row.get("reason", "") for row in rows})
        return found

    def logs(self) -> set[str]:
        """Return the names of the packed logs, after a look at what comes back."""
        files = sorted(path.name for path in self.out.iterdir())
        assert len(files) <= MOST_FILES, files
        assert all(name.endswith((".json", ".tar.gz")) for name in files), files
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            return {Path(name).name for name in archive.getnames()}


def install(folder: Path) -> None:
    """A failing installation ends the part at once, with its reason."""
    script = folder / "install.sh"
    folder.mkdir(parents=True)
    script.write_text("echo 'no space left on device'\nexit 1\n", encoding="utf-8")
    part = Part(1, folder, BENCH_INSTALL=f"bash {script}")
    assert part.status == 3, part.status
    assert part.text.splitlines()[-1].endswith("install: no space left on device")
    assert part.logs() >= {"install_1.log", "failed_1.log"}
    assert not list(part.out.glob("*.json"))


def head(folder: Path) -> None:
    """A hang, a crash and an exception are rows; everybody else is timed."""
    part = Part(2, folder, **{STUBS: "broken"})
    entries = part.reasons("head_peers")
    assert len(entries) == 3, entries  # smoke, peers and accuracy
    for reasons in entries:
        assert reasons["una_fast"] == reasons["eager"] == "", reasons
        assert reasons["hangs"].startswith("hung: not done in 15 s"), reasons
        assert reasons["crashes"] == "the process ended while it ran", reasons
        assert reasons["raises"] == "RuntimeError: as planned", reasons
    assert "head_peers.log" in part.logs()


def cut(folder: Path) -> None:
    """A part that runs out of time keeps what it has measured."""
    part = Part(4, folder, **{STUBS: "cut", "BENCH_SECONDS": "30"})
    assert part.status == 1 and "CUT after" in part.text, part.status
    (whole,) = part.reasons("head_long")
    assert whole == {"una_fast": "", "eager": ""}, whole
    noted = [row["name"] for row in part.report("head_long")["notes"]]
    assert noted == ["una_fast"], noted  # of the entry that was cut, before it was
    assert "head_long.log" in part.logs()


def probe(folder: Path) -> None:
    """The probe, tests and bars each leave their results, whatever the others did."""
    folder.mkdir(parents=True)
    tests = folder / "test_stub.py"
    tests.write_text(TESTS, encoding="utf-8")
    part = Part(1, folder, BENCH_TESTS=str(tests), BENCH_FEW="test", BENCH_WORKERS="2")
    report = part.report("probe")
    assert {"torch", "command", "commit"} <= report["environment"].keys()
    rows = report["results"]
    rates = [row for row in rows if row.keys() & {"tflops", "gb_per_s", "value", "ms"}]
    assert len(rows) >= 20 and len(rates) >= len(rows) - 2, rows
    assert part.reasons("head_bars") == [{"una_fast": "", "eager": ""}]
    assert part.text.count("1 failed, 1 passed") == 2, part.text
    assert part.status == 1, part.text
    assert part.logs() >= {"probe.log", "tests.log", "kernels.log", "head_bars.log"}


def step(folder: Path) -> None:
    """A trainer that hangs is a row, the other trainer is timed."""
    folder.mkdir(parents=True)
    tests = folder / "test_stub.py"
    tests.write_text(TESTS, encoding="utf-8")
    part = Part(3, folder, BENCH_TESTS=str(tests), BENCH_WORKERS="0")
    assert len(part.reasons("step_llama")) == 4
    assert part.reasons("smoke_step") == [{"una_fast": "", "trl": ""}] * 2
    for reasons in part.reasons("step_llama"):
        assert reasons["una_fast"] == "" and reasons["trl"].startswith("hung"), reasons
    assert part.logs() >= {"smoke_step.log", "step_llama.log", "tests_steps.log"}


PIECES = {"install": install, "head": head, "cut": cut, "probe": probe, "step": step}


def main(arguments: list[str]) -> int:
    """Rehearse the named pieces, and return the exit status."""
    unknown = sorted(set(arguments) - PIECES.keys())
    if unknown:
        print(f"no piece {', '.join(unknown)}; there are {', '.join(PIECES)}")
        return 2
    failed = []
    # Two at a time: much of a rehearsal is waiting for what hangs.
    with ThreadPoolExecutor(2) as pool:
        for name, seconds, fault in pool.map(rehearse, arguments or PIECES):
            print(f"{name:8} {seconds:5.1f} s  {fault or 'held'}", flush=True)
            if fault:
                failed.append(name)
    print(f"rehearsal: {'failed: ' + ', '.join(failed) if failed else 'all held'}")
    return int(bool(failed))


def rehearse(name: str) -> tuple[str, float, str | None]:
    """Rehearse one piece; return its name, its seconds, and what did not hold."""
    begin = time.perf_counter()
    fault = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            PIECES[name](Path(folder) / name)
        except Exception:  # a piece may fail in any way
            fault = "FAILED: " + traceback.format_exc(limit=-1)
    return name, time.perf_counter() - begin, fault


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
