"""The questions of the demo: functions of Python's standard library, and their documentation.

    What does the Python function `textwrap.dedent` do?

The .py files are parsed; no module is imported or run. The written answer is the first sentence of
the docstring. A text shared by several functions is kept once, so that no held-out answer stands
in a record.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
WORDS = (5, 20)
"""Shortest and longest written answer, in words."""
MOST_WORDS = 60
"""Words of a docstring that are kept."""
MIN_FUNCTIONS = 12
ONE_SENTENCE = " Answer in one sentence."
"""Asks for a short answer."""

# A full stop inside a word, a number or a name ends no sentence.
_SENTENCE = re.compile(r"[A-Z][^.!?]*(?:[.!?]\S[^.!?]*)*[.!?](?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.?g|i\.?e|etc|vs|cf)\.", re.IGNORECASE)


@dataclass(frozen=True)
class Function:
    """A documented function, method or class of the standard library.

    name: with the module, such as "textwrap.dedent"
    docstring: first words of the docstring
    answer: first sentence of the docstring; "" for docstrings that begin otherwise
    is_plain: a public function of a public module, not a method or a class
    """

    name: str
    docstring: str
    answer: str
    is_plain: bool

    @property
    def question(self) -> str:
        """Return the question about the function."""
        return f"What does the Python function `{self.name}` do?"


@dataclass(frozen=True)
class Questions:
    """Functions to ask about, in random order, and all other documented objects.

    held_out: asked before and after the alignment
    train: for records and rewards
    others: objects with different names and docstrings, to train a model from scratch
    """

    held_out: list[Function]
    train: list[Function]
    others: list[Function]


def read_questions(seed: int, held_out: int, max_modules: int | None = None) -> Questions:
    """Read the documented objects of the standard library, and split the functions at random.

    seed: of the split
    held_out: number of functions to hold out
    max_modules: read so many modules, drawn at random; default: all

    ValueError where the library has no source files.
    """
    rng = np.random.default_rng(seed)
    objects = read_documented(rng, max_modules)
    asked = []
    others = []
    for found in objects:
        is_asked = found.is_plain and WORDS[0] <= len(found.answer.split()) <= WORDS[1]
        (asked if is_asked else others).append(found)
    if len(asked) < held_out + MIN_FUNCTIONS:
        raise ValueError(
            f"{sysconfig.get_path('stdlib')} holds {len(asked)} documented functions in .py files, "
            f"and the demo needs {held_out + MIN_FUNCTIONS}; install the sources of Python's "
            "standard library"
        )
    shuffled = [asked[i] for i in rng.permutation(len(asked))]
    return Questions(shuffled[:held_out], shuffled[held_out:], others)


def read_documented(rng: np.random.Generator, max_modules: int | None = None) -> list[Function]:
    """Read the documented objects of the standard library, one for every first sentence.

    rng: draws the modules
    max_modules: number of modules; default: all
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"))
    files = [path for path in paths if not SKIPPED & set(path.relative_to(root).parts)]
    if max_modules is not None:
        files = [files[i] for i in rng.permutation(len(files))[:max_modules]]
    by_text: dict[str, Function] = {}
    for path in files:
        for found in _documented(path, root):
            text = found.answer or found.docstring
            by_text.setdefault(text.casefold(), found)
    return list(by_text.values())


def _documented(path: Path, root: Path) -> Iterator[Function]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates, and examples of wrong Python
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from _walk(tree, module, is_plain="._" not in f".{module}")


def _walk(node: ast.AST, owner: str, *, is_plain: bool) -> Iterator[Function]:
    """Yield the documented objects below a node, outer objects first.

    owner: module and classes around the node, such as "mailbox.Maildir"
    is_plain: functions below the node are public
    """
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = " ".join((ast.get_docstring(child) or "").split()[:MOST_WORDS])
        name = f"{owner}.{child.name}"
        if docstring.isascii() and docstring:
            is_function = isinstance(child, ast.FunctionDef) and not child.name.startswith("_")
            yield Function(name, docstring, first_sentence(docstring), is_plain and is_function)
        yield from _walk(child, name, is_plain=False)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text; "" for a text that begins with no whole sentence."""
    found = _SENTENCE.match(text)
    if found is None or _ABBREVIATION.search(found[0]):
        return ""
    return found[0]
