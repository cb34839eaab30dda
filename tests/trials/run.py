#!/usr/bin/env python3
"""Run trials one after another: all of them, or those that are named.

    python tests/trials/run.py --short             a few cases of every kind
    python tests/trials/run.py --seed 7            all cases: about an hour, and the soak's hour
    python tests/trials/run.py damage kills        two of them

A line per trial is printed at the end; the exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from common import Trial, preload, result_of

FOLDER = Path(__file__).parent
OTHERS = ("common", "run")
LONG = ("soak", "elastic", "two_ranks")  # left out of the short form, which has no ranks


def names() -> list[str]:
    """Return the names of all trials: the soak last."""
    found = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)
    return sorted(found, key=lambda name: name == "soak")


def main() -> int:
    """Run the trials of the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    chosen = options.trials or [x for x in names() if not (options.short and x in LONG)]
    preload()
    results = {}
    root = Path(tempfile.mkdtemp(prefix="una-trials-"))
    try:
        for name in chosen:
            print(f"# {name}", flush=True)
            results[name] = run_one(name, root, options.seed, short=options.short)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, result in results.items():
        survived = result["cases"] - len(result["failures"])
        print(f"{name:12} SURVIVED {survived}/{result['cases']} in {result['seconds']} s")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["failures"] for result in results.values()))


def run_one(name: str, root: Path, seed: int, *, short: bool) -> dict[str, Any]:
    """Run a trial in a forked child, so that none changes the process of the next; its result."""
    folder = root / name
    folder.mkdir()
    file = folder / "result.json"
    start = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            trial = Trial(folder, seed, short)
            run_here(name, trial)
            file.write_text(json.dumps(result_of(trial)), encoding="utf-8")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.waitpid(pid, 0)
    result = {"cases": 1, "failures": [f"{name} did not end"]}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
    return {"seconds": round(time.monotonic() - start), **result}


def run_here(name: str, trial: Trial) -> None:
    """Run a trial: its function run(trial), or the script where it has none."""
    run = getattr(importlib.import_module(name), "run", None)
    if run is not None and [*inspect.signature(run).parameters] == ["trial"]:
        run(trial)
        return
    command = [sys.executable, str(FOLDER / f"{name}.py"), str(trial.seed)]
    trial.report(name, subprocess.run(command).returncode == 0)


if __name__ == "__main__":
    sys.exit(main())
