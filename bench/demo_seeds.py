"""The online demo on several seeds: the rise of the held-out reward, in standard errors, and the
KL.

    python bench/demo_seeds.py --seeds 0,1,2 --out bench/results/demo_online.json

Finished runs in --runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from harness import environment, write_report
from una_fast.demo.run import MAX_KL, run_demo
from una_fast.demo.settings import DemoConfig

BAR = 5.0  # standard errors


def main() -> int:
    """Run the demo on the seeds, store the results, and return 1 if a seed misses the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", default="runs/demo-online", type=Path)
    parser.add_argument("--out", default="bench/results/demo_online.json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in map(int, options.seeds.split(",")):
        directory = options.runs / f"seed-{seed}"
        if not (directory / "summary.json").exists():
            run_demo(DemoConfig(output_dir=str(directory), seed=seed, online=True))
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        summary.pop("output_dir")
        holds = summary["rise_in_standard_errors"] >= BAR and summary["kl"] < MAX_KL
        rows.append({"seed": seed, **summary, "max_kl": MAX_KL, "holds": holds})
    write_report({"environment": environment(torch.device("cpu")), "results": rows}, options.out)
    for row in rows:
        before, after = row["reward"]
        rise = f"{before:.3f} -> {after:.3f} ({row['rise_in_standard_errors']} errors)"
        verdict = "holds" if row["holds"] else "misses"
        print(f"seed {row['seed']}: reward {rise} at KL {row['kl']} of {MAX_KL}: {verdict}")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
