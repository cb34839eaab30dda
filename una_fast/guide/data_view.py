"""Show records as they will be trained on: `una-fast data`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from una_fast.data.examples import Example
from una_fast.data.sources import Source
from una_fast.feedback import KIND_NAMES, PAIR
from una_fast.guide.look import look
from una_fast.guide.settings import DataConfig
from una_fast.model.loading import load_tokenizer
from una_fast.printable import printable_lines, told
from una_fast.train.summary import lengths_in_words

# Colours of a terminal, and marks without colours: of the prompt, of a response, of turns within it
# that are not trained on, of the token that ends it.
COLOURS = {
    "prompt": "\x1b[36m",
    "response": "\x1b[32m",
    "between": "\x1b[36m",
    "end": "\x1b[30;43m",
}
MARKS = {"response": "{}", "between": "[not trained on: {}]", "end": "[end: {}]"}
PLAIN = "\x1b[0m"

LONGEST = 1500  # characters of a text that are shown
BEGINNING = 1000  # of them from the start


def show_data(settings: DataConfig) -> dict[str, Any]:
    """Print the first records of a source, the counts and the refusals; return the counts.

    ValueError if no record is usable.
    """
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    source = Source(settings.data, split=settings.split, options=settings.record_options())
    found = look(source, tokenizer, online=settings.online)
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for example in found.examples[: settings.n]:
        print("\n".join(example_lines(example, tokenizer, coloured=is_coloured)) + "\n")
    report = found.report
    print(f"data       {told(report)}")
    if found.examples:
        print(f"lengths    {lengths_in_words(found.examples)}")
    print(f"template   {found.template_in_words(tokenizer)}")
    if report.skipped:
        stops = "a run leaves them out"
        if settings.on_bad_record == "error":
            stops = "a run stops at the first; on_bad_record: skip leaves them out"
        print(f"refused    {report.skipped} of {report.records} records: {stops}")
        print("\n".join(f"  {line}" for line in found.refusals_in_words()))
    if not found.examples:
        raise ValueError(f"no usable record in {told(settings.data)}")
    counts = {"records": report.records, "examples": report.examples, "refused": report.skipped}
    return {**counts, "units": dict(report.units)}


def example_lines(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, coloured: bool
) -> list[str]:
    """Return an example as lines: its place and feedback, the prompt, the responses.

    example: as trained on
    tokenizer: of the model
    coloured: parts are told apart by colours, besides names and marks
    """
    lines = [f"--- {told(example.origin)}: {'; '.join(_feedback(example)) or 'a prompt'}"]
    prompt = _shown(tokenizer, example.prompt_ids, "prompt", coloured=coloured)
    lines.append(f"prompt     {len(example.prompt_ids)} tokens: {prompt}")
    for number, ids in enumerate(example.responses):
        text = ""
        for part, span in _parts(ids, example.scored_tokens()[number]):
            shown_part = _shown(tokenizer, ids[span], part, coloured=coloured)
            text += shown_part if coloured else MARKS[part].format(shown_part)
        lines.append(f"response {number + 1} {len(ids)} tokens: {text}")
    return lines


def _parts(ids: np.ndarray, scored: np.ndarray) -> Iterator[tuple[str, slice]]:
    """Yield the parts of a response, and the places of the tokens.

    ids: [R] tokens of the response
    scored: places of the tokens in the loss; the rest are turns between two answers
    """
    is_scored = np.zeros(len(ids), dtype=bool)
    is_scored[scored] = True
    last = len(ids) - 1
    cuts = [*(np.flatnonzero(is_scored[1:last] != is_scored[: last - 1]) + 1), last]
    start = 0
    for cut in cuts:
        if cut > start:
            yield ("response" if is_scored[start] else "between"), slice(start, cut)
        start = cut
    yield "end", slice(last, len(ids))


def _feedback(example: Example) -> Iterator[str]:
    """Yield the units of an example in words."""
    feedback = example.feedback
    columns = (feedback.kind, feedback.first, feedback.second, feedback.value)
    for kind, first, second, value in zip(*(c.tolist() for c in columns), strict=True):
        if kind == PAIR:
            verb = "over" if value > 0.5 else "equals"
            yield f"pair, response {first + 1} {verb} {second + 1}"
        else:
            yield f"{KIND_NAMES[kind]} {value:g} of response {first + 1}"


def _shown(
    tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, part: str, *, coloured: bool
) -> str:
    """Return tokens as text, special tokens too, shortened in the middle."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) > LONGEST:
        left_out = len(text) - LONGEST
        rest = text[BEGINNING - LONGEST :]
        text = f"{text[:BEGINNING]} … ({left_out} more characters) … {rest}"
    text = printable_lines(text)
    return f"{COLOURS[part]}{text}{PLAIN}" if coloured else text
