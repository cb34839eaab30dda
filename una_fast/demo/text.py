"""The text of the demo: docstrings of the Python standard library, and preference records.

The .py files are parsed; no module is imported or run. A prompt ends where a docstring would begin,

    # mailbox.Maildir: get message
    def get_message(self, key):
        \"\"\"

(with the name spelled out, since a small model cannot learn much about how identifiers are cut into
tokens), and the true answer is the first paragraph of the docstring in this place. Objects are
split three ways, for the base model, for alignment and for evaluation; a docstring text is in one
split only. Labels are true docstrings (True) and damaged docstrings (False); scores are ROUGE-2 F1
against the true docstring (`rouge_2`).
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
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "__phello__",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
"""Folders without usual library code."""
WORDS = (4, 50)
"""Shortest and longest docstring paragraph, in words."""
MAX_PROMPT = 160
"""Longest prompt, in characters; objects with longer prompts are left out."""
SHARES = (0.65, 0.25, 0.10)
"""Shares of the objects for the base model, for alignment, and for evaluation."""
MIN_OBJECTS = 100
Record = dict[str, Any]
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A class or function of the standard library: module, prompt, true docstring (a paragraph)."""

    module: str
    prompt: str
    docstring: str


@dataclass(frozen=True)
class Corpus:
    """Disjoint sets of objects: for the base model, for alignment, and for evaluation."""

    base: list[Documented]
    align: list[Documented]
    held_out: list[Documented]


def read_corpus(seed: int, max_modules: int | None = None) -> Corpus:
    """Read the documented objects of the standard library, and split them at random.

    seed: of the split
    max_modules: read so many modules, drawn at random; default: all

    A docstring in several places is kept once. ValueError where the library has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"))
    files = [path for path in paths if not SKIPPED & set(path.relative_to(root).parts)]
    rng = np.random.default_rng(seed)
    if max_modules is not None:
        files = [files[i] for i in rng.permutation(len(files))[:max_modules]]
    by_text: dict[str, Documented] = {}  # so that every docstring is in one split
    for path in files:
        for entry in _documented(path, root):
            by_text[entry.docstring.casefold()] = entry
    objects = list(by_text.values())
    if len(objects) < MIN_OBJECTS:
        raise ValueError(
            f"{root} holds {len(objects)} documented functions and classes in .py files, and the "
            f"demo needs {MIN_OBJECTS}; install the sources of Python's standard library"
        )
    shuffled = [objects[i] for i in rng.permutation(len(objects))]
    base_end = round(SHARES[0] * len(objects))
    align_end = round((SHARES[0] + SHARES[1]) * len(objects))
    return Corpus(shuffled[:base_end], shuffled[base_end:align_end], shuffled[align_end:])


def _documented(path: Path, root: Path) -> Iterator[Documented]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and examples of wrong Python
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from _walk(tree, module, module)


def _walk(node: ast.AST, module: str, owner: str) -> Iterator[Documented]:
    """Yield the documented objects below a node, outer objects first.

    owner: module and classes around the node, such as "mailbox.Maildir"
    """
    for child in ast.iter_child_nodes(node):
        inside = owner
        if isinstance(child, Definition):
            entry = _entry(child, module, owner)
            if entry is not None:
                yield entry
            if isinstance(child, ast.ClassDef):
                inside = f"{owner}.{child.name}"
        yield from _walk(child, module, inside)


def _entry(node: Definition, module: str, owner: str) -> Documented | None:
    """Return the entry of a class or function; None if prompt or docstring is out of bounds."""
    docstring = ast.get_docstring(node) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if not paragraph.isascii() or paragraph.startswith((">>>", "_")):
        return None
    if not WORDS[0] <= len(paragraph.split()) <= WORDS[1]:
        return None
    prompt = f'# {owner}: {_spelled(node.name)}\n{_signature(node)}:\n    """'
    return Documented(module, prompt, paragraph) if len(prompt) <= MAX_PROMPT else None


def _signature(node: Definition) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"def {node.name}({ast.unparse(node.args)})"
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def _spelled(name: str) -> str:
    """Return a name in words: get_payload -> "get payload", MIMEText -> "MIME text"."""
    words = []
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name):
        is_acronym = word.isupper() and len(word) > 1
        spelled = word if is_acronym else word.lower()
        words.append(spelled)
    return " ".join(words)


def rouge_2(text: str, truth: str) -> float:
    """Return ROUGE-2 F1: twice the common word pairs over the word pairs of both texts.

    A word pair is two neighbours, in lower case.
    """
    pairs = Counter(itertools.pairwise(text.lower().split()))
    true_pairs = Counter(itertools.pairwise(truth.lower().split()))
    common = (pairs & true_pairs).total()
    return 2 * common / max(pairs.total() + true_pairs.total(), 1)


def make_records(entries: Iterable[Documented], seed: int) -> dict[str, list[Record]]:
    """Make pairs, labels and scores of objects; {kind: records}.

    entries: objects; an object alone in its module gives no records
    seed: of the damage

    pairs: the true docstring is chosen; rejected is a truncated or shuffled docstring, or the
        docstring of another object of the module
    labels: the true docstring (True), or a truncated or shuffled docstring (False)
    scores: the true docstring, a truncated, a half shuffled, and another object's shuffled
        docstring
    """
    rng = np.random.default_rng(seed)
    entries = list(entries)
    neighbours: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        neighbours[entry.module].append(entry.docstring)
    records: dict[str, list[Record]] = {"pairs": [], "labels": [], "scores": []}
    for entry in entries:
        truth = entry.docstring
        prompt = {"prompt": entry.prompt}
        others = [text for text in neighbours[entry.module] if text != truth]
        if not others:
            continue
        truncated = _truncated(truth, rng)
        shuffled = _shuffled(truth, rng)
        other = others[rng.integers(len(others))]
        rejected = (truncated, shuffled, other)[rng.integers(3)]
        if rejected != truth:
            records["pairs"].append(prompt | {"chosen": truth, "rejected": rejected})
        completion = truth if rng.integers(2) else (truncated, shuffled)[rng.integers(2)]
        is_true = completion == truth
        records["labels"].append(prompt | {"completion": completion, "label": is_true})
        half_shuffled = _shuffled(truth, rng, kept=len(truth.split()) // 2)
        completions = list(dict.fromkeys([truth, truncated, half_shuffled, _shuffled(other, rng)]))
        scores = [round(rouge_2(text, truth), 3) for text in completions]
        records["scores"].append(prompt | {"completions": completions, "scores": scores})
    return records


def _shuffled(text: str, rng: np.random.Generator, kept: int = 0) -> str:
    """Return the first `kept` words, then the rest in random order."""
    words = text.split()
    rest = words[kept:]
    return " ".join(words[:kept] + [rest[i] for i in rng.permutation(len(rest))])


def _truncated(text: str, rng: np.random.Generator) -> str:
    """Return the first words, at most 3 of 4."""
    words = text.split()
    return " ".join(words[: rng.integers(1, max(2, 3 * len(words) // 4))])


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON, one per line, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
