"""The plans that pages of docs/ show are what `una-fast plan` prints.

A page shows a plan between <!-- output --> and <!-- end output -->: the command, then the lines of
its output, all of them indented. MODEL is the directory of the model below. Other versions of torch
and transformers compute a step in other temporaries, so the plans are those of the pinned versions.
"""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import LlamaConfig

from una_fast.capacity import run_plan
from una_fast.cli import main

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = re.compile(r"<!-- output -->\n(.*?)<!-- end output -->", re.DOTALL)


def plans_of(page: Path) -> list[tuple[str, list[str]]]:
    """Return (command, lines of its output) of every plan on a page."""
    found = []
    for text in OUTPUT.findall(page.read_text(encoding="utf-8")):
        command, *lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
        found.append((command, lines))
    return found


PLANS = [plan for page in sorted((ROOT / "docs").glob("*.md")) for plan in plans_of(page)]


def other_versions() -> list[str]:
    """Return the packages whose installed version is not that of constraints.txt."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = ("torch", "transformers")
    return [name for name in names if f"{name}=={version(name).split('+')[0]}" not in pins]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write the configuration of a Llama of 1.5 B weights, without the weights."""
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def without_searches(monkeypatch):
    """Leave out the longest row and the switches: most of the time of a plan.

    tests/test_run_plan.py has tests of both.
    """
    monkeypatch.setattr(run_plan, "longest_row", lambda tracer, row, room, *, accumulate: row)
    monkeypatch.setattr(run_plan, "savings", lambda tracer, batch, *, accumulate: [])


def without_findings(lines: list[str]) -> list[str]:
    """Return the lines of a plan but those of the longest row and of the switches."""
    kept = [line for line in lines if line and not line.startswith(("longest", "switch"))]
    return [line.rstrip() for line in kept]


@pytest.mark.skipif(bool(other_versions()), reason=f"not pinned: {other_versions()}")
@pytest.mark.parametrize(("command", "lines"), PLANS, ids=[command for command, _ in PLANS])
def test_a_plan_on_a_page_is_what_the_command_prints(
    command, lines, model, without_searches, capsys
):
    words = [word.replace("MODEL", model) for word in shlex.split(command)]
    assert main(words[1:]) == 0
    printed = capsys.readouterr().out.replace(model, "MODEL").splitlines()
    assert without_findings(printed) == without_findings(lines)


def test_pages_show_plans():
    commands = " ".join(command for command, _ in PLANS)
    assert len(PLANS) == 5 and "--op" in commands and "126976" in commands
