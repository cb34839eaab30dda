#!/usr/bin/env python3
"""Run trials one after another: all of them, or those that are named.

    python tests/trials/run.py --short             a few cases of every kind, for CI
    python tests/trials/run.py --seed 7            all cases: about an hour, and the soak's hours
    python tests/trials/run.py damage kills        two of them

A line per trial is printed at the end; the exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def run_one(name: str, root: Path, seed: int, *, short: bool) -> dict:
    """Run a trial: in this process where it has a function run(trial), else as a script."""
    start = time.monotonic()
    module = importlib.import_module(name)
    if [*inspect.signature(getattr(module, "run", run_one)).parameters] == ["trial"]:
        folder = root / name
        folder.mkdir()
        trial = Trial(folder, seed, short)
        with contextlib.chdir(folder):
            module.run(trial)
    else:
        trial = Trial(root, seed, short)
        command = [sys.executable, str(FOLDER / f"{name}.py"), str(seed)]
        trial.report(name, subprocess.run(command).returncode == 0)
    return {"seconds": round(time.monotonic() - start), **result_of(trial)}


if __name__ == "__main__":
    sys.exit(main())
