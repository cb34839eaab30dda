"""The documents: what they name is there, and what they show is run, parsed and read.

Pages are README.md and docs/. tests/test_records_page.py reads the records of docs/records.md.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import get_args

import pytest
import torch

from pages import FENCED, blocks, python_of, run_page
from una_fast import cli
from una_fast.commands import COMMANDS, settings_from, settings_of
from una_fast.rewards.settings import Kind, parse_rewards

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
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


# ---- what the pages show -----------------------------------------------------------------------

INDENTED = re.compile(r"^    +(\S.*)$", re.MULTILINE)
SPAN = re.compile(r"`(una-fast [a-z][^`]*)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def commands_in(text: str) -> list[list[str]]:
    """Return the words after `una-fast` of every command in the code blocks of a text.

    A command begins with una-fast, in any directory, or with a torchrun of it.
    """
    code = [match[3] for match in FENCED.finditer(text)]
    code += INDENTED.findall(FENCED.sub("", text))
    found = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        if "una-fast" not in line:
            continue
        words = shlex.split(line, comments=True)
        for ends, group in groupby(words, lambda word: word in ("&&", "|", ";", ">")):
            command = [] if ends else list(group)
            names = [word.rpartition("/")[2] for word in command]
            if "una-fast" in names and names[0] in ("una-fast", "torchrun"):
                found.append(command[names.index("una-fast") + 1 :])
    return found


def parsed(words: list[str], tmp_path: Path) -> Namespace:
    """Parse a command; a --config that the tree lacks is an empty file."""
    words = list(words)
    empty = tmp_path / "empty.yaml"
    empty.touch()
    for number, word in enumerate(words[:-1]):
        if word == "--config":
            named = ROOT / words[number + 1]
            words[number + 1] = str(named if named.exists() else empty)
    return cli._parse(cli._parser(words), words)


@each_page
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    if any("trl import" in block for block in python_of(page)):
        pytest.importorskip("trl")
    torch.manual_seed(0)
    run_page(page, tmp_path / "model")


@each_page
def test_the_commands_of_a_page_are_parsed(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    for words in commands_in(text):
        parsed(words, tmp_path)
    for span in SPAN.findall(text):
        _, command, *words = span.split()
        flags = {word[2:].partition("=")[0].partition(".")[0] for word in words if word[:2] == "--"}
        known = {field.name for field in fields(settings_of(command))} | {"config", "help", "op"}
        assert flags <= known, span


def test_a_wrong_command_is_seen(tmp_path):
    text = "\n    cd x && .venv/bin/una-fast demo --onlin true\n\n```\nuna-fast trian\n```\n"
    found = commands_in(text)
    assert found == [["trian"], ["demo", "--onlin", "true"]]
    for words in found:
        with pytest.raises(cli.UsageError, match="trian|onlin"):
            parsed(words, tmp_path)


def configurations_of(page: Path, tmp_path: Path) -> list:
    """Return the yaml blocks of a page as configurations, with required settings added."""
    found = []
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        words = ["train", "--model", "m", "--data", "d.jsonl", "--output_dir", "out"]
        words += ["--config", str(path)]
        found.append(settings_from(parsed(words, tmp_path)))
    return found


@each_page
def test_the_yaml_of_a_page_is_a_configuration(page, tmp_path):
    """Other texts have another language, such as text."""
    configurations_of(page, tmp_path)


def test_the_page_on_online_runs_shows_every_kind_of_reward(tmp_path):
    online, mixed = configurations_of(DOCS / "online.md", tmp_path)
    assert (online.mode, mixed.mode) == ("online", "mixed")
    assert [spec.kind for spec in parse_rewards(online.rewards)] == list(get_args(Kind))


def test_every_command_has_a_heading_and_an_example():
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## una-fast (\S+)$", text, re.MULTILINE)
    assert headings == list(dict.fromkeys(headings)) and set(headings) == set(COMMANDS)
    assert {words[0] for words in commands_in(text)} == set(COMMANDS)


# ---- links -------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_the_links_of_a_page_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} is not there"
        if anchor:
            assert anchor in anchors_of(target), f"{link} has no such heading"


# ---- the site ----------------------------------------------------------------------------------

# What a browser loads by itself; a link is followed by a person.
LOADED = re.compile(r"""<(?:script|img|link)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def test_the_site_is_built_without_a_warning(tmp_path):
    """With every page and picture; and no page loads anything from elsewhere."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install .[docs]")
    script = Path(sys.executable).with_name("mkdocs")
    site = tmp_path / "site"
    command = [script, "build", "--strict", "-f", ROOT / "docs/site/mkdocs.yml", "-d", site]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    titles = [path.parent.name for path in site.rglob("index.html")]
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(titles)
    assert (site / "bench/results/study_e1.png").exists()
    for path in site.rglob("*.html"):
        assert not LOADED.search(path.read_text(encoding="utf-8")), path


# ---- messages ----------------------------------------------------------------------------------


@cache
def texts_of_the_code() -> list[str]:
    """Return every text in the code of the package, with … in the place of values."""
    found = []
    for path in (ROOT / "una_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [getattr(part, "value", None) for part in parts]
            whole = "".join(text if isinstance(text, str) else "…" for text in texts)
            if len(whole) > 1:
                found.append(" ".join(whole.split()))
    return found


def is_said(message: str) -> bool:
    """Return whether the code has a message; … in it stands for anything."""
    pieces = [re.escape(piece) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces))
    return any(pattern.search(text) for text in texts_of_the_code())


def test_every_message_of_the_page_is_one_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [" ".join(block.split()) for block in blocks(text, "text")]
    assert len(messages) >= 20
    assert [message for message in messages if not is_said(message)] == []
    assert not is_said("the run is too large, and … is to blame")
