"""The documents: every file that they name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [*sorted((ROOT / "bench").rglob("*.md")), *sorted((ROOT / "bench").glob("*.sh"))]
FOLDERS = ("una_fast", "kernels", "bench", "tests", "docs")

# A path that begins with a folder of the tree, with or without a suffix; a bare Python file; and a
# dotted module of the package. Names with a variable of the shell are no names.
PATHS = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*+(?!\$)")
PYTHON_FILES = re.compile(r"(?<![\w./$-])\w+\.py\b")
MODULES = re.compile(r"(?<![\w./-])una_fast(?:\.\w+)+")


def missing_from(text: str) -> list[str]:
    """Return the paths, Python files and modules named in a text that the tree does not have."""
    tree = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    tree |= {path.name for path in ROOT.glob("*.py")}
    missing = []
    for path in PATHS.findall(text):
        measured_later = path.endswith("_gpu.json")
        if not measured_later and not (ROOT / path.rstrip(".")).exists():
            missing.append(path)
    missing += [name for name in PYTHON_FILES.findall(text) if name not in tree]
    missing += [name for name in MODULES.findall(text) if not is_module(name)]
    return missing


def is_module(name: str) -> bool:
    """Return whether a dotted name is a module of the tree, or a name that a module defines."""
    if name.startswith("una_fast.kernels"):
        name = name.removeprefix("una_fast.")
    path = ROOT
    for part in name.split("."):
        if (path / part).is_dir():
            path = path / part
        elif (path / f"{part}.py").exists():
            path = path / f"{part}.py"
        else:
            return path.suffix == ".py" and part in path.read_text(encoding="utf-8")
    return True


def test_every_file_in_the_documents_exists():
    for document in DOCUMENTS:
        missing = missing_from(document.read_text(encoding="utf-8"))
        assert not missing, f"{document.relative_to(ROOT)} names {missing}"


def test_a_file_that_is_gone_is_seen():
    text = "`una_fast/engine.py`, `passes.py`, `call_loss.py`, una_fast.train, `una_fast.head.gone`"
    assert missing_from(text) == ["una_fast/engine.py", "call_loss.py", "una_fast.head.gone"]


def test_every_test_in_the_documents_exists():
    """A promise is guarded by a test of this name."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", tests, re.MULTILINE))
    named = set()
    for document in DOCUMENTS:
        named |= set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    assert named and not named - defined
