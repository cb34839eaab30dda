"""Examples: the rows of a source as token ids and feedback, with a report of the rows left out.

Source -> row -> `Record` -> `Example` (token ids and feedback) -> `Batch` (laid out for a model)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from una_fast.data.encode import Encoded, Encoder
from una_fast.data.messages import RecordError, Text
from una_fast.data.records import (
    Record,
    as_object,
    listed,
    parse_prompt,
    parse_record,
)
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source, read_rows
from una_fast.data.units import record_feedback, score_offset, source_scores
from una_fast.feedback import KIND_NAMES, Feedback
from una_fast.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_MESSAGES = 5


@dataclass(frozen=True)
class Example:
    """A prompt, K responses, and the feedback on the responses.

    prompt_ids: [P] int32, P >= 1, with BOS if the tokenizer or the template has a BOS
    responses: [R_k] int32 for every response k, ending with EOS or the template's end of turn
    feedback: units over responses 0..K-1
    ref_logps: [K] cached reference log-probs, sums over tokens, in nats; None without a cache
    origin: the place of the record for messages, such as "file.jsonl:17"
    scored: [R_k] bool for every response k, True for tokens whose log-probs are summed; () if all
        are. Others, such as a user's turn between two answers, are only seen by the model.
    """

    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]
    feedback: Feedback
    ref_logps: tuple[float, ...] | None
    origin: str
    scored: tuple[np.ndarray, ...] = field(default=(), kw_only=True)

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses), default=0)

    def scored_tokens(self) -> list[np.ndarray]:
        """Return, for every response, the indices of the tokens whose log-probs are summed."""
        if self.scored:
            return [np.flatnonzero(own) for own in self.scored]
        return [np.arange(len(response)) for response in self.responses]


@dataclass(frozen=True)
class Prompt(Example):
    """An example without responses so far.

    text: the prompt of the record, as text or as chat messages
    columns: the other columns of the record, for the rewards
    weight: factor on the loss of the responses
    """

    text: Text = ""
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass
class SourceReport:
    """Counts of a source: records read, examples made, and the losses on the way.

    path: the source
    records: rows read, empty lines left out
    examples: records with a usable unit
    units: feedback units by kind
    skipped: malformed records left out
    skip_messages: the first KEPT_MESSAGES refusals
    truncated_prompts: prompts cut on the left
    ties_dropped: pairs of equal ratings without a unit
    unlabelled: records without a label, taken as label True
    ignored_columns: unused column -> records with the column
    special_tokens: records whose texts spell a special token of the tokenizer
    raw: records of plain text, beside a tokenizer with a chat template
    score_center: centre of the scores, the source of the offset of score units
    """

    path: str
    records: int = 0
    examples: int = 0
    units: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    skip_messages: list[str] = field(default_factory=list)
    truncated_prompts: int = 0
    ties_dropped: int = 0
    unlabelled: int = 0
    ignored_columns: Counter[str] = field(default_factory=Counter)
    special_tokens: int = 0
    raw: int = 0
    score_center: float | None = None

    def read(self, encoded: Encoded) -> None:
        """Count a record that was tokenised."""
        self.truncated_prompts += encoded.truncated
        self.special_tokens += encoded.special
        self.raw += encoded.raw

    def skip(self, message: str) -> None:
        """Count a malformed record."""
        self.skipped += 1
        if len(self.skip_messages) < KEPT_MESSAGES:
            self.skip_messages.append(message)

    def finish(self, examples: Sequence[Example]) -> None:
        """Count the examples; ValueError if the source gave no example."""
        self.examples = len(examples)
        if not examples:
            raise ValueError(f"no usable record: {self}")

    def __str__(self) -> str:
        units = ", ".join(f"{self.units[kind]} {kind}" for kind in KIND_NAMES if self.units[kind])
        made = f"{self.examples} examples ({units or 'no'} units)"
        if self.examples and not units:
            made = f"{self.examples} prompts"
        notes = [f"{printable(self.path)}: {self.records} records -> {made}"]
        if self.truncated_prompts:
            notes.append(f"{self.truncated_prompts} prompts truncated on the left")
        if self.ties_dropped:
            notes.append(f"{self.ties_dropped} ties dropped")
        if self.unlabelled:
            notes.append(f"{self.unlabelled} without a label, taken as good")
        if self.skipped:
            notes.append(f"{self.skipped} skipped (first: {self.skip_messages[0]})")
        if self.special_tokens:
            notes.append(
                f"{self.special_tokens} with special tokens of the tokenizer in their texts"
            )
        if self.raw:
            notes.append(
                f"{self.raw} of plain text, trained on as it is, not through the tokenizer's chat "
                "template (strings: chat makes user's turns of it)"
            )
        if self.ignored_columns:
            counts = self.ignored_columns.items()
            columns = listed(f"{printable(name, 30)} ({n})" for name, n in counts)
            notes.append(f"ignored columns {columns}")
        if self.score_center is not None:
            notes.append(f"score centre {self.score_center:.6g}")
        return "; ".join(notes)


def load_examples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    require_unit_scores: bool,
    report: SourceReport | None = None,
) -> tuple[list[Example], SourceReport]:
    """Return every record of a source as an example, and the report of the source.

    source: files or a dataset, and the settings of the records
    tokenizer: of the policy
    require_unit_scores: the objective compares scores with sigmoid(r), and scores must lie in
        [0, 1]
    report: counts the records; default: a new one

    Raises ValueError at the first malformed record, by place and field; with
    on_bad_record=skip, malformed records are left out and counted.
    """
    options = source.options.resolved()
    report = report or SourceReport(source.path)
    encoder = Encoder(tokenizer, options)

    def read(row: dict[str, Any]) -> tuple[Record, Encoded]:
        record, ignored = parse_record(row, options, require_unit_scores=require_unit_scores)
        encoded = encoder.encode(record)
        report.read(encoded)
        report.unlabelled += record.label_implied
        report.ignored_columns.update(ignored)
        return record, encoded

    found = list(_usable(source, options, report, read))
    # Quantiles and the centre need the scores of the whole source.
    scores = source_scores([record for _, (record, _) in found], options)
    report.score_center, offset = score_offset(
        scores, options, require_unit_scores=require_unit_scores, path=source.path
    )
    examples = []
    for (origin, (record, encoded)), own_scores in zip(found, scores, strict=True):
        try:
            feedback, ties_dropped = record_feedback(record, own_scores, options, offset)
        except ValueError as error:  # a number that is finite, but not the difference of two
            raise ValueError(f"{origin}: {error}") from None
        report.ties_dropped += ties_dropped
        if not feedback.num_units:  # ratings with nothing but dropped ties
            continue
        report.units.update(KIND_NAMES[kind] for kind in feedback.kind.tolist())
        example = Example(
            prompt_ids=encoded.prompt,
            responses=encoded.responses,
            feedback=feedback,
            ref_logps=record.ref_logps,
            origin=origin,
            scored=() if all(own.all() for own in encoded.scored) else encoded.scored,
        )
        examples.append(example)
    report.finish(examples)
    return examples, report


def load_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 0,
    report: SourceReport | None = None,
) -> tuple[list[Prompt], SourceReport]:
    """Return the prompts of a source, and the report; other columns are kept for the rewards.

    source: files or a dataset, and the settings of the records
    tokenizer: of the policy
    max_new_tokens: room for a response within `max_tokens`
    report: counts the records; default: a new one

    Errors as in `load_examples`.
    """
    options = source.options.resolved()
    report = report or SourceReport(source.path)
    encoder = Encoder(tokenizer, options)
    no_feedback = Feedback.merge([])

    def read(row: dict[str, Any]) -> tuple[Record, Encoded, dict[str, Any]]:
        record, others = parse_prompt(row, options)
        encoded = encoder.encode(record, room=max_new_tokens)
        report.read(encoded)
        return record, encoded, {name: row[name] for name in others}

    prompts = []
    for origin, (record, encoded, columns) in _usable(source, options, report, read):
        prompt = Prompt(
            prompt_ids=encoded.prompt,
            responses=(),
            feedback=no_feedback,
            ref_logps=None,
            origin=origin,
            text=record.prompt,
            columns=columns,
            weight=record.weight,
        )
        prompts.append(prompt)
    report.finish(prompts)
    return prompts, report


def _usable(
    source: Source,
    options: RecordOptions,
    report: SourceReport,
    read: Callable[[dict[str, Any]], Any],
) -> Iterator[tuple[str, Any]]:
    """Yield (origin, read(row)) for every row, unless `read` refuses the row.

    A refused row stops the run, with the origin in the message, or is counted in the report.
    """
    for origin, row in read_rows(source):
        report.records += 1
        try:
            found = read(as_object(row))
        except RecordError as error:
            if options.on_bad_record == "error":
                raise ValueError(
                    f"{origin}: {error} (on_bad_record: skip leaves such records out)"
                ) from None
            report.skip(f"{origin}: {error}")
            continue
        except ValueError as error:  # of the tokenizer or its template, for whatever record
            raise ValueError(f"{origin}: {error}") from None
        yield origin, found
