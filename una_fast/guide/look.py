"""Look at data with the reader and the encoder of training, and count the refusals."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from transformers import PreTrainedTokenizerBase

from una_fast.config import OnlineOptions
from una_fast.data.examples import Example, SourceReport, load_examples, load_prompts
from una_fast.data.records import Record, as_object, has_answer, parse_prompt, parse_record
from una_fast.data.sources import Source, read_rows
from una_fast.data.template_date import fix_template_date
from una_fast.printable import told

KEPT = 3  # refusals of a kind that are shown

_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|(?<= )\([^)]*\)")


@dataclass
class Refusals(SourceReport):
    """Counts of a source, with every refusal counted by its kind.

    kinds: kind -> the number of refusals, and the first of them
    """

    kinds: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def skip(self, message: str) -> None:
        """Count a malformed record."""
        super().skip(message)
        kind = _kind_of(message)
        count, first = self.kinds.get(kind, (0, []))
        self.kinds[kind] = (count + 1, first if len(first) == KEPT else [*first, message])

    def finish(self, examples: list[Example]) -> None:
        """Count the examples; none is no error here."""
        self.examples = len(examples)


def _kind_of(message: str) -> str:
    """Return a refusal without place and values, equal for all refusals of a kind."""
    _, _, reason = message.partition(": ")
    return _VALUE.sub("...", reason.partition(";")[0])


@dataclass(frozen=True)
class Found:
    """The usable records of a source, and the counts.

    texts: records of plain text
    chats: records of chat messages
    ratings: all ratings of the responses, as in the data
    """

    examples: list[Example]
    report: Refusals
    texts: int
    chats: int
    ratings: list[float]

    def template_in_words(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return how the records are rendered."""
        parts = []
        if self.chats:
            parts.append(f"the chat template of the model renders {self.chats} records")
        if self.texts:
            beside = ", though the model has a chat template" if tokenizer.chat_template else ""
            parts.append(f"{self.texts} records are plain text, without a template{beside}")
        return "; ".join(parts) or "no records to render"

    def refusals_in_words(self) -> list[str]:
        """Return the refusals by kind, the most frequent first, with the first of each."""
        lines = []
        kinds = sorted(self.report.kinds.items(), key=lambda item: -item[1][0])
        for kind, (count, first) in kinds:
            lines.append(f"{count} x {told(kind)}")
            lines += [f"  {told(message)}" for message in first]
        return lines


def look(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    online: bool,
    require_unit_scores: bool = True,
) -> Found:
    """Read all records of a source as a run would, and count the refusals of a run.

    source: files or a dataset, and the settings of the records
    tokenizer: of the model
    online: the records are prompts to sample from
    require_unit_scores: scores must lie in [0, 1]
    """
    fix_template_date(tokenizer, datetime.date.today().isoformat())
    skipping = replace(source, options=replace(source.options, on_bad_record="skip"))
    report = Refusals(source.path)
    if online:
        room = OnlineOptions.max_new_tokens
        examples, _ = load_prompts(skipping, tokenizer, max_new_tokens=room, report=report)
    else:
        examples, _ = load_examples(
            skipping, tokenizer, require_unit_scores=require_unit_scores, report=report
        )
    records = list(_records(source, online=online))
    texts = sum(isinstance(record.prompt, str) for record in records)
    ratings = list(chain.from_iterable(record.ratings or () for record in records))
    return Found(list(examples), report, texts, len(records) - texts, ratings)


def _records(source: Source, *, online: bool) -> Iterator[Record]:
    """Yield the records of the rows that can be read."""
    options = source.options.resolved()
    for _, row in read_rows(source):
        try:
            columns = as_object(row)
            if online:
                yield parse_prompt(columns, options)[0]
            else:
                yield parse_record(columns, options, require_unit_scores=False)[0]
        except ValueError:
            continue  # counted as a refusal by the loader


def has_responses(source: Source) -> bool:
    """Return whether the first readable row of a source has a response: else it is a prompt."""
    columns = source.options.resolved().columns
    for _, row in read_rows(source):
        try:
            return has_answer(as_object(row), columns)
        except ValueError:
            continue
    return True
