"""Print the figures of the house: how dense the lines are, and how the docstrings are worded.

    python bench/house.py                     una_fast/ and kernels/
    python bench/house.py una_fast/head       the files of one room, each with its own figures

Lines of code are the lines that are neither blank, comment nor docstring. Nodes are the nodes of
the syntax tree. A comprehension is nested if it has two `for`s or stands inside another
comprehension. Words of docstrings (of modules, classes and functions) are runs of letters; POINTERS
are counted among them. Figures are per line, per 1,000 lines and per 1,000 words.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100  # columns
LONG = 60  # lines of a function
POINTERS = frozenset(
    [
        "what",
        "whatever",
        "that",
        "those",
        "whose",
        "which",
        "it",
        "its",
        "they",
        "them",
        "their",
        "this",
        "one",
        "ones",
        "there",
        "where",
        "other",
        "others",
        "nothing",
        "nobody",
        "each",
        "none",
    ]
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@dataclass
class Figures:
    """Counts over one or several files."""

    lines: int = 0
    nodes: int = 0
    nested: int = 0
    wide: int = 0
    words: int = 0
    pointers: int = 0
    functions: dict[str, int] = field(default_factory=dict)

    def add(self, other: Figures) -> None:
        """Add the counts of another file."""
        for name in ("lines", "nodes", "nested", "wide", "words", "pointers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.functions |= other.functions

    def row(self, name: str) -> str:
        """Return the figures as one line of the table."""
        median = statistics.median(self.functions.values()) if self.functions else 0
        lines, words = max(self.lines, 1), max(self.words, 1)
        return (
            f"{name:34} {self.lines:6} {self.nodes / lines:6.2f} {1000 * self.nested / lines:7.2f} "
            f"{self.wide:5} {1000 * self.pointers / words:9.1f} {self.words:6} {median:7.1f}"
        )


def figures_of(path: Path) -> Figures:
    """Count one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstrings = _docstrings(tree)
    found = Figures(wide=sum(len(line) > WIDTH for line in text.splitlines()))
    found.lines = len(_code_lines(text) - _lines_of(docstrings))
    for node in ast.walk(tree):
        found.nodes += 1
        if isinstance(node, COMPREHENSIONS):
            found.nested += len(node.generators) > 1
            inside = (child for child in ast.walk(node) if child is not node)
            found.nested += any(isinstance(child, COMPREHENSIONS) for child in inside)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            found.functions[place] = node.end_lineno - node.lineno + 1
    for docstring in docstrings:
        words = re.findall(r"[a-z]+", docstring.value.value.lower())
        found.words += len(words)
        found.pointers += sum(word in POINTERS for word in words)
    return found


def _docstrings(tree: ast.Module) -> list[ast.Expr]:
    """Return the docstrings of the module, its classes and its functions."""
    scopes = [node for node in ast.walk(tree) if isinstance(node, SCOPES) and node.body]
    return [scope.body[0] for scope in scopes if _is_text(scope.body[0])]


def _is_text(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _lines_of(nodes: list[ast.Expr]) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


def _code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold more than a comment."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def main() -> None:
    """Print the table and the longest functions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="Folders or files; default: all.")
    paths = parser.parse_args().paths
    whole = not paths
    total = Figures()
    print(f"{'':34}  lines  nodes  nested  wide  pointers  words  median")
    for path in paths or [ROOT / "una_fast", ROOT / "kernels"]:
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            found = figures_of(file.resolve())
            total.add(found)
            if found.lines and not whole:
                print(found.row(str(file)))
    print(total.row("all"))
    for place, length in sorted(total.functions.items(), key=lambda item: -item[1]):
        if length > LONG:
            print(f"{length:4} lines  {place}")


if __name__ == "__main__":
    main()
