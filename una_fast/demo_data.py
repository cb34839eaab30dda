"""The text of the demo: docstrings of the Python standard library, and preference records made of them.

Nothing is imported or run: the .py files are parsed. A prompt is where a docstring would begin,

    # mailbox.Maildir: get message
    def get_message(self, key):
        \"\"\"

(the name spelled out, since a small model cannot learn much about how identifiers are cut into tokens), and the true
answer is the first paragraph of the docstring that stands there. Whole modules are held out, so that
no prompt, docstring or neighbour of an evaluation prompt is seen before. Labels are true docstrings (True) and damaged
ones (False); scores are ROUGE-L F1 against the true docstring (`rouge_l`).
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections import defaultdict
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
    """Objects of disjoint sets of modules: for the base model, for alignment, and for evaluation."""

    base: list[Documented]
    align: list[Documented]
    held_out: list[Documented]


def read_corpus(seed: int, root: Path | None = None, max_modules: int | None = None) -> Corpus:
    """Documented objects of the standard library (or of the .py files under `root`), split by module.

    A docstring that stands in several places is kept once. max_modules: only so many modules, drawn at random.
    Raises ValueError where the library has no source files.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    rng = np.random.default_rng(seed)
    if max_modules is not None:
        files = [files[i] for i in rng.permutation(len(files))[:max_modules]]
    # By their text, so that every docstring is on one side of the split.
    objects = list({entry.docstring.casefold(): entry for path in files for entry in _documented(path, root)}.values())
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
    except (SyntaxError, UnicodeDecodeError):  # templates, and files that show how not to write Python
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
            if plain and WORDS[0] <= len(paragraph.split()) <= WORDS[1] and len(prompt) <= MAX_PROMPT:
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


def rouge_l(text: str, truth: str) -> float:
    """ROUGE-L F1 of two texts: twice their longest common subsequence of words (lower case), over the words of both."""
    a, b = text.lower().split(), truth.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def make_records(entries: Iterable[Documented], seed: int) -> dict[str, list[Record]]:
    """Pairs, labels and scores, by kind; every object whose module has another one gives one record of each."""
    rng = np.random.default_rng(seed)
    neighbours: dict[str, list[str]] = defaultdict(list)
    entries = list(entries)
    for entry in entries:
        neighbours[entry.module].append(entry.docstring)
    records: dict[str, list[Record]] = {"pairs": [], "labels": [], "scores": []}
    for entry in entries:
        truth, prompt = entry.docstring, entry.prompt
        others = [text for text in neighbours[entry.module] if text != truth]
        if not others:
            continue

        def other(others: list[str] = others) -> str:
            return others[rng.integers(len(others))]

        records["pairs"].append({"prompt": prompt, "chosen": truth, "rejected": other()})
        label = bool(rng.integers(2))
        damage = (_shuffled, _truncated)[rng.integers(2)]
        records["labels"].append(
            {"prompt": prompt, "completion": truth if label else damage(truth, rng), "label": label}
        )
        damaged = [_truncated(truth, rng), _shuffled(truth, rng), _shuffled(other(), rng)]
        completions = list(dict.fromkeys([truth, *damaged]))
        scores = [round(rouge_l(text, truth), 3) for text in completions]
        records["scores"].append({"prompt": prompt, "completions": completions, "scores": scores})
    return records


def _shuffled(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def _truncated(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    return " ".join(words[: rng.integers(1, max(2, 3 * len(words) // 4))])


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
