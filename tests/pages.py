"""Shared by the tests of the documents: the code blocks of a page, and Python that runs.

A page names a model where a reader has to name one: in Python blocks the text MODEL stands for it,
and the tests put the directory of a tiny model in its place. Nothing else is changed.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODEL = "path/or/hub-name"
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    found = [match for match in FENCED.finditer(text) if match[2] == language]
    return [textwrap.dedent(match[3]) for match in found]


def python_of(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return blocks(page.read_text(encoding="utf-8"), "python")


def run_page(page: Path, directory: Path, **names: Any) -> dict[str, Any]:
    """Run the Python of a page in order, in one namespace; return the namespace.

    page: Markdown file
    directory: where the tiny model is saved, if the page names one
    names: before the first block
    """
    namespace = {"__name__": page.stem, **names}
    for block in python_of(page):
        if MODEL in block:
            if not (directory / "config.json").exists():
                from tiny import save_llama  # most pages do without transformers

                save_llama(directory)
            block = block.replace(MODEL, str(directory))
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


def lines_of(block: str) -> int:
    """Return the lines of a block that are not empty."""
    return sum(1 for line in block.splitlines() if line.strip())
