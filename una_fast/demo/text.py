"""The text of the demo: docstrings of the Python standard library, and preference records made of them.

Nothing is imported or run: the .py files are parsed. A prompt is where a docstring would begin,

    # mailbox.Maildir: get message
    def get_message(self, key):
        \"\"\"

(the name spelled out, since a small model cannot learn much about how identifiers are cut into tokens), and the true
answer is the first paragraph of the docstring that stands there. Objects are split three ways, and every docstring
text is on one side only: for the base model, for alignment, and held out from both for evaluation. Labels are true
docstrings (True) and damaged ones (False); scores are ROUGE-2 F1 against the true docstring (`rouge_2`).
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SKIPPED = {
    *("test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__phello__", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
WORDS = (4, 50)
"""Shortest and longest docstring paragraph, in words."""
MAX_PROMPT = 160
"""Longest prompt, in characters; objects with longer ones are left out."""
SHARES = (0.65, 0.25, 0.10)
"""Parts of the objects for the base model, for alignment, and for evaluation."""
MIN_OBJECTS = 100
Record = dict[str, Any]


@dataclass(frozen=True)
class Documented:
    """A class or function of the standard library: its module, the prompt, and the true docstring (one paragraph)."""

    module: str
    prompt: str
    docstring: str


@dataclass(frozen=True)
class Corpus:
    """Disjoint sets of objects: for the base model, for alignment, and for evaluation."""

    base: list[Documented]
    align: list[Documented]
    held_out: list[Documented]


def read_corpus(seed: int, root: Path | None = None, max_modules: int | None = None) -> Corpus:
    """Documented objects of the standard library (or of the .py files under `root`), split at random.

    A docstring that stands in several places is kept once. max_modules: only so many modules, drawn at random.
    Raises ValueError where the library has no source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(root).parts)
    ]
    rng = np.random.default_rng(seed)
    if max_modules is not None:
        files = [files[i] for i in rng.permutation(len(files))[:max_modules]]
    # By their text, so that every docstring is on one side of the split.
    objects = list(
        {
            entry.docstring.casefold(): entry for path in files for entry in _documented(path, root)
        }.values()
    )
    if len(objects) < MIN_OBJECTS:
        raise ValueError(
            f"{root} holds {len(objects)} documented functions and classes in .py files, and the demo needs "
            f"{MIN_OBJECTS}; install the sources of Python's standard library"
        )
    shuffled = [objects[i] for i in rng.permutation(len(objects))]
    first, second = (round(share * len(objects)) for share in (SHARES[0], SHARES[0] + SHARES[1]))
    return Corpus(shuffled[:first], shuffled[first:second], shuffled[second:])


def _documented(path: Path, root: Path) -> Iterator[Documented]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (
        SyntaxError,
        UnicodeDecodeError,
    ):  # templates, and files that show how not to write Python
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from _walk(tree, module, module)


def _walk(node: ast.AST, module: str, owner: str) -> Iterator[Documented]:
    for child in ast.iter_child_nodes(node):
        inside = owner
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = f"{owner}.{child.name}" if isinstance(child, ast.ClassDef) else owner
            paragraph = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            prompt = f'# {owner}: {_spelled(child.name)}\n{_signature(child)}:\n    """'
            plain = paragraph.isascii() and not paragraph.startswith((">>>", "_"))
            if (
                plain
                and WORDS[0] <= len(paragraph.split()) <= WORDS[1]
                and len(prompt) <= MAX_PROMPT
            ):
                yield Documented(module, prompt, paragraph)
        yield from _walk(child, module, inside)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def _spelled(name: str) -> str:
    """get_payload -> "get payload", MIMEText -> "MIME text"."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)


def rouge_2(text: str, truth: str) -> float:
    """ROUGE-2 F1: twice the word pairs (neighbours, lower case) that both texts have, over the word pairs of both."""
    a, b = (Counter(itertools.pairwise(side.lower().split())) for side in (text, truth))
    return 2 * (a & b).total() / max(a.total() + b.total(), 1)


def make_records(entries: Iterable[Documented], seed: int) -> dict[str, list[Record]]:
    """Pairs, labels and scores, by kind; every object whose module has another one gives one record of each.

    The true docstring is chosen over, or labelled True against, one that is truncated, shuffled, or (in pairs) that of
    another object of the module. Scored are the true one, a truncated and a half shuffled one, and another object's
    shuffled one.
    """
    rng = np.random.default_rng(seed)
    entries = list(entries)
    neighbours: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        neighbours[entry.module].append(entry.docstring)
    records: dict[str, list[Record]] = {"pairs": [], "labels": [], "scores": []}
    for entry in entries:
        truth, prompt = entry.docstring, entry.prompt
        others = [text for text in neighbours[entry.module] if text != truth]
        if not others:
            continue
        truncated, shuffled = _truncated(truth, rng), _shuffled(truth, rng)
        other = others[rng.integers(len(others))]
        rejected = (truncated, shuffled, other)[rng.integers(3)]
        if rejected != truth:
            records["pairs"].append({"prompt": prompt, "chosen": truth, "rejected": rejected})
        completion = truth if rng.integers(2) else (truncated, shuffled)[rng.integers(2)]
        records["labels"].append(
            {"prompt": prompt, "completion": completion, "label": completion == truth}
        )
        half_shuffled = _shuffled(truth, rng, kept=len(truth.split()) // 2)
        completions = list(dict.fromkeys([truth, truncated, half_shuffled, _shuffled(other, rng)]))
        scores = [round(rouge_2(text, truth), 3) for text in completions]
        records["scores"].append({"prompt": prompt, "completions": completions, "scores": scores})
    return records


def _shuffled(text: str, rng: np.random.Generator, kept: int = 0) -> str:
    """The first `kept` words, then the others in random order."""
    words = text.split()
    return " ".join(words[:kept] + [words[kept + i] for i in rng.permutation(len(words) - kept)])


def _truncated(text: str, rng: np.random.Generator) -> str:
    """The first words, at most 3 of 4."""
    words = text.split()
    return " ".join(words[: rng.integers(1, max(2, 3 * len(words) // 4))])


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
