"""Data: sources -> rows -> records -> `Example` (token ids and feedback) -> `Batch` (what the model and the loss take).

A batch has one of two layouts, with the same responses, targets and feedback in the same order:

    packed   one row [1, T]: prompt | response 1 | ... | response K, example after example; the prompt stands once
    padded   one sequence prompt + response per response, padded on the right
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from una_fast.data.encode import Encoder
from una_fast.data.records import (
    Record,
    RecordError,
    RecordOptions,
    as_object,
    parse_prompt,
    parse_record,
)
from una_fast.data.sources import Source, read_rows
from una_fast.feedback import KIND_NAMES, Feedback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KEPT_MESSAGES = 5


@dataclass(frozen=True)
class Example:
    """One prompt, its responses, and what is known about them.

    prompt_ids: int32 [P], P >= 1, with BOS where the tokenizer or the template has one. responses: int32 [R_k] each,
    ending with EOS or the template's end of turn. feedback: units over responses 0..K-1. ref_logps: cached reference
    log-probs, sums over tokens, one per response. origin: where the record stands, for messages.
    """

    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]
    feedback: Feedback
    ref_logps: tuple[float, ...] | None
    origin: str


@dataclass(frozen=True)
class Prompt(Example):
    """An example that has no responses yet. text: the prompt of the record, as text or as chat messages; columns: the
    other columns of the record; weight: of the loss of its responses."""

    text: str | list[dict[str, Any]] = ""
    columns: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass
class SourceReport:
    """What became of the records of one source.

    units: feedback units by kind. unlabelled: records without a label, taken as label True. ignored_columns: records
    that had the column, by name. score_center: the centre that the offsets of the score units were computed from.
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
    score_center: float | None = None

    def of(self, examples: Sequence[Example]) -> SourceReport:
        """The report, with the examples counted; ValueError if there are none."""
        self.examples = len(examples)
        if not examples:
            raise ValueError(f"no usable record: {self}")
        return self

    def __str__(self) -> str:
        units = ", ".join(f"{self.units[kind]} {kind}" for kind in KIND_NAMES if self.units[kind])
        notes = [
            f"{count} {what}"
            for count, what in (
                (self.truncated_prompts, "prompts truncated on the left"),
                (self.ties_dropped, "ties dropped"),
                (self.unlabelled, "without a label, taken as good"),
            )
            if count
        ]
        if self.skipped:
            notes.append(f"{self.skipped} skipped (first: {self.skip_messages[0]})")
        if self.ignored_columns:
            notes.append(
                "ignored columns "
                + ", ".join(f"{name} ({n})" for name, n in self.ignored_columns.items())
            )
        if self.score_center is not None:
            notes.append(f"score centre {self.score_center:.6g}")
        head = f"{self.path}: {self.records} records -> {self.examples} examples ({units or 'no'} units)"
        return "; ".join([head, *notes])


def load_examples(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, require_unit_scores: bool
) -> tuple[list[Example], SourceReport]:
    """Every record of a source, tokenised, and the report of what became of them.

    require_unit_scores: the objective compares scores with sigmoid(r), so they must lie in [0, 1]. Raises ValueError
    at the first malformed record, naming where it stands, or leaves such records out and counts them
    (`on_bad_record=skip`).
    """
    options, report = source.options.resolved(), SourceReport(source.path)
    encoder = Encoder(tokenizer, options)

    def read(row: dict[str, Any]) -> tuple[Record, np.ndarray, tuple[np.ndarray, ...]]:
        record, ignored = parse_record(row, options, require_unit_scores=require_unit_scores)
        prompt, responses, truncated = encoder.encode(record)
        report.truncated_prompts += truncated
        report.unlabelled += record.label_implied
        report.ignored_columns.update(ignored)
        return record, prompt, responses

    kept = list(_usable(source, options, report, read))
    scores = _source_scores([record for _, (record, _, _) in kept], options)
    report.score_center, offset = _score_center(scores, options, require_unit_scores, source.path)
    examples = []
    for (origin, (record, prompt, responses)), own_scores in zip(kept, scores, strict=True):
        feedback, ties = _feedback(record, own_scores, options, offset)
        report.ties_dropped += ties
        if feedback.num_units:
            examples.append(Example(prompt, responses, feedback, record.ref_logps, origin))
            report.units.update(KIND_NAMES[kind] for kind in feedback.kind.tolist())
    return examples, report.of(examples)


def load_prompts(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int = 0
) -> tuple[list[Prompt], SourceReport]:
    """The prompts of a source, tokenised, and the report. Whatever else the records hold goes to the rewards.

    max_new_tokens: room that `max_tokens` must leave for a response. Errors as those of load_examples.
    """
    options, report = source.options.resolved(), SourceReport(source.path)
    encoder = Encoder(tokenizer, options)
    nothing = Feedback.merge([])

    def read(row: dict[str, Any]) -> tuple[Record, np.ndarray, dict[str, Any]]:
        record, columns = parse_prompt(row, options)
        prompt, _, truncated = encoder.encode(record, room=max_new_tokens)
        report.truncated_prompts += truncated
        return record, prompt, {name: row[name] for name in columns}

    prompts = [
        Prompt(ids, (), nothing, None, origin, record.prompt, columns, record.weight)
        for origin, (record, ids, columns) in _usable(source, options, report, read)
    ]
    return prompts, report.of(prompts)


def _usable(
    source: Source,
    options: RecordOptions,
    report: SourceReport,
    read: Callable[[dict[str, Any]], Any],
) -> Iterator[tuple[str, Any]]:
    """(origin, what `read` makes of the row) of every row that it does not refuse."""
    for origin, row in read_rows(source):
        report.records += 1
        try:
            found = read(as_object(row))
        except RecordError as error:
            if options.on_bad_record == "error":
                raise ValueError(
                    f"{origin}: {error} (on_bad_record: skip leaves such records out)"
                ) from None
            report.skipped += 1
            if len(report.skip_messages) < KEPT_MESSAGES:
                report.skip_messages.append(f"{origin}: {error}")
            continue
        yield origin, found


def _source_scores(records: list[Record], options: RecordOptions) -> list[tuple[float, ...]]:
    """Final scores of every record, () where it has none; "quantile" needs all the ratings of the source at once."""
    if options.score_map != "quantile":
        return [record.scores or () for record in records]
    ranked = np.sort([rating for record in records for rating in record.ratings or ()])

    def mid_rank(rating: float) -> float:
        below, upto = (
            np.searchsorted(ranked, rating, "left"),
            np.searchsorted(ranked, rating, "right"),
        )
        return float(below + upto) / (2 * len(ranked))

    return [tuple(mid_rank(rating) for rating in record.ratings or ()) for record in records]


def _score_center(
    scores: list[tuple[float, ...]], options: RecordOptions, require_unit_scores: bool, path: str
) -> tuple[float | None, float]:
    """The centre c, and the offset f(x) + c of the UNA paper that puts an unchanged policy (r = 0) at score c."""
    values = [score for own in scores if _gives_scores(own, options) for score in own]
    if options.score_center == "none" or not values:
        return None, 0.0
    center = (
        float(np.mean(values)) if options.score_center == "dataset" else float(options.score_center)
    )
    if not require_unit_scores:
        return center, center
    if not 0 < center < 1:
        raise ValueError(
            f"{path}: score_center={options.score_center} gives {center}, but it must lie strictly between 0 and 1, "
            "as scores are compared with sigmoid(r); give another score_center or none"
        )
    return center, float(np.log(center) - np.log1p(-center))


def _gives_scores(scores: tuple[float, ...], options: RecordOptions) -> bool:
    return options.feedback != "pairs" or len(scores) == 1


def _feedback(
    record: Record, scores: tuple[float, ...], options: RecordOptions, offset: float
) -> tuple[Feedback, int]:
    """The units of one record, and how many tied pairs were dropped. The order within pairs is that of the ratings:
    a score map may round two of them to the same number."""
    weight, margin = record.weight, record.margin
    if not scores:
        if record.label is not None:
            return Feedback.binary([0], [record.label], weight=weight), 0
        pair = [(0, 1, 1.0, margin or 0.0)] if record.responses else []
        return _pairs(pair, weight), 0
    parts, ties = [], 0
    if options.feedback != "scores" and len(scores) > 1:
        pairs = []
        for i in range(len(scores)):
            for j in range(i + 1, len(scores)):
                tied = record.ratings[i] == record.ratings[j]
                if tied and options.ties == "drop":
                    ties += 1
                    continue
                better, worse = (i, j) if record.ratings[i] >= record.ratings[j] else (j, i)
                gap = scores[better] - scores[worse] if options.margin == "rating_gap" else 0.0
                pairs.append(
                    (better, worse, 0.5 if tied else 1.0, gap if margin is None else margin)
                )
        parts.append(_pairs(pairs, weight))
    if _gives_scores(scores, options):
        parts.append(Feedback.scores(range(len(scores)), scores, weight=weight, offset=offset))
    return Feedback.merge(parts), ties


def _pairs(pairs: list[tuple[int, int, float, float]], weight: float) -> Feedback:
    chosen, rejected, target, margin = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    return Feedback.pairs(chosen, rejected, target=target, margin=margin, weight=weight)
