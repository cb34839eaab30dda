"""docs/records.md: every example is read with the settings above it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tiny import make_tokenizer
from una_fast.data.examples import load_examples, load_prompts
from una_fast.data.records import CHATS, FAMILIES
from una_fast.data.settings import FIELDS, RecordOptions
from una_fast.data.sources import DATA_SUFFIXES, Source

PAGE = (Path(__file__).parents[1] / "docs" / "records.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def examples_of(page: str) -> list[tuple[str, str, dict]]:
    """Return (suffix, text, entry of the source) of every block of records."""
    found = []
    entry = {}
    for language, text in BLOCK.findall(page):
        if language == "yaml":
            *_, entry = yaml.safe_load(text)["data"]
            continue
        found.append((f".{language}", text, entry if isinstance(entry, dict) else {}))
        entry = {}
    return found


EXAMPLES = examples_of(PAGE)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_read_whole(tmp_path, number):
    suffix, text, entry = EXAMPLES[number]
    path = tmp_path / f"example{suffix}"
    path.write_text(text, encoding="utf-8")
    source = Source.parse({**entry, "path": str(path)}, RecordOptions())
    tokenizer = make_tokenizer()
    records = len(text.strip().splitlines()) - (suffix == ".csv")
    if source.online:
        prompts, _ = load_prompts(source, tokenizer)
        assert len(prompts) == records
        return
    examples, report = load_examples(source, tokenizer, require_unit_scores=True)
    assert len(examples) == records
    assert not report.ignored_columns, "the page names the columns that it uses"


def test_every_shape_and_field_is_shown():
    shown = set()
    for suffix, text, entry in EXAMPLES:
        if suffix == ".jsonl":
            for line in text.strip().splitlines():
                shown |= set(json.loads(line))
        shown |= set(entry.get("columns", {}))
    responses = {name for names in FAMILIES.values() for name in names}
    assert responses | set(CHATS) | set(FIELDS) <= shown
    for suffix in DATA_SUFFIXES:
        assert f"`{suffix}`" in PAGE
