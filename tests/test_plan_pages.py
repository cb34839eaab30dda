"""The plans that pages of docs/ show are what the commands print.

A page shows an output between <!-- output --> and <!-- end output -->: the command, then its lines,
all of them indented. MODEL stands for the directory of the model below.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig

from una_fast.cli import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUTPUT = re.compile(r"<!-- output -->\n(.*?)<!-- end output -->", re.DOTALL)


def outputs_of(page: str) -> list[tuple[str, list[str]]]:
    """Return (command, lines of its output) of every output on a page."""
    found = []
    for text in OUTPUT.findall(page):
        shown = [line[4:] for line in text.splitlines() if line.startswith("    ")]
        found.append((shown[0], shown[1:]))
    return found


OUTPUTS = []
for path in sorted(DOCS.glob("*.md")):
    OUTPUTS += outputs_of(path.read_text(encoding="utf-8"))


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


@pytest.mark.parametrize(("command", "lines"), OUTPUTS, ids=[command for command, _ in OUTPUTS])
def test_an_output_of_a_page_is_what_the_command_prints(command, lines, model, capsys):
    words = [word.replace("MODEL", model) for word in shlex.split(command)]
    assert main(words[1:]) == 0
    printed = capsys.readouterr().out.replace(model, "MODEL").splitlines()
    assert [line.rstrip() for line in printed] == lines


def test_every_page_on_memory_shows_a_plan():
    commands = " ".join(command for command, _ in OUTPUTS)
    assert len(OUTPUTS) == 3 and "--op" in commands and "131072" in commands
