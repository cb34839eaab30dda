"""Data: sources -> rows -> records -> `Example` (token ids and feedback) -> `Batch` (what the model and the loss take).

A batch has one of two layouts, with the same responses, targets and feedback in the same order:

    packed   one row [1, T]: prompt | response 1 | ... | response K, example after example; the prompt stands once
    padded   one sequence prompt + response per response, padded on the right
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from una_fast.attention import Segment
from una_fast.encode import Encoder
from una_fast.feedback import KIND_NAMES, Feedback
from una_fast.records import (
    Record,
    RecordError,
    RecordOptions,
    as_object,
    check_number,
    parse_prompt,
    parse_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    *("Batch", "Example", "Prompt", "RecordOptions", "Source", "SourceReport"),
    *("collate", "footprint", "layout_tokens", "load_examples", "load_prompts", "mixture_order", "read_rows"),
]

DATA_SUFFIXES = (".jsonl", ".parquet")
HUB_NAME = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)?")
KEPT_MESSAGES = 5


@dataclass
class Source:
    """One place that records come from.

    path: a .jsonl or .parquet file, a directory of them (read in the order of their names), or the name of a dataset
    that `datasets` can load ("name" or "name:config"), of which `split` is read. weight: how many times each record
    is seen in an epoch; the fractional part is drawn anew in every epoch. online: whether its records are prompts that
    the policy answers, or None, as the mode of the run says.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    online: bool | None = None
    options: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise ValueError(f"path={self.path!r} of a data source must be a file, a directory or a dataset name")
        self.path = str(self.path)
        if check_number(f"weight of {self.path}", self.weight) <= 0:
            raise ValueError(f"weight={self.weight} of {self.path} must be positive; remove the source to leave it out")
        if self.online not in (True, False, None):
            raise ValueError(f"online={self.online!r} of {self.path} must be true or false")

    @staticmethod
    def parse(entry: str | dict[str, Any], defaults: RecordOptions) -> Source:
        """A source from a configuration entry: a path, or a dict of path, weight, split, online and any field of
        `RecordOptions`, which then replaces the value in `defaults` for this source alone."""
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            raise ValueError(f"data source {entry!r} must be a path or a mapping with a path")
        own = [f.name for f in fields(Source) if f.name != "options"]
        options = {f.name: getattr(defaults, f.name) for f in fields(RecordOptions)}
        for key in entry:
            if key not in own and key not in options:
                raise ValueError(
                    f"data source {entry.get('path')!r}: unknown key {key!r}; known keys: {', '.join([*own, *options])}"
                )
        if "path" not in entry:
            raise ValueError(f"data source {entry} has no path")
        options.update({key: value for key, value in entry.items() if key in options})
        try:
            resolved = RecordOptions(**options)
        except ValueError as error:
            raise ValueError(f"data source {entry['path']!r}: {error}") from None
        return Source(**{key: entry[key] for key in own if key in entry}, options=resolved)


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(origin, row) of every row of a source; a row is a dict, or the undecoded bytes of a JSONL line.

    origin is "file.jsonl:LINE" with lines from 1, and "file.parquet:ROW" or "dataset[split]:ROW" with rows from 0.
    """
    path = Path(source.path)
    if path.exists() and source.split != "train":
        raise ValueError(
            f"split={source.split!r} is for dataset names, but {path} is a path; give the split's own files"
        )
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in DATA_SUFFIXES and p.name[0] not in "._")
        if not files:
            raise ValueError(f"directory {path} holds no data files ({' or '.join(DATA_SUFFIXES)})")
        for file in files:
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    else:
        yield from _read_dataset(source)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from None
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}:{number}", row
                number += 1
    else:
        raise ValueError(f"{path} is not a data file; its name must end in {' or '.join(DATA_SUFFIXES)}")


def _read_dataset(source: Source) -> Iterator[tuple[str, Any]]:
    problem = f"{source.path!r} is neither a file, a directory, nor a loadable dataset name"
    name, _, config = source.path.partition(":")
    # A missing path is refused at once: asking a hub for it would only cost the timeouts of its retries.
    if not HUB_NAME.fullmatch(name) or name.endswith(DATA_SUFFIXES):
        raise ValueError(f"{problem}; check the path")
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:  # the hub, the disk and the dataset's own code each raise their own
        raise ValueError(f"{problem} (split={source.split!r}): {error}") from error
    for number, row in enumerate(rows):
        yield f"{source.path}[{source.split}]:{number}", row


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
            notes.append("ignored columns " + ", ".join(f"{name} ({n})" for name, n in self.ignored_columns.items()))
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
    source: Source, options: RecordOptions, report: SourceReport, read: Callable[[dict[str, Any]], Any]
) -> Iterator[tuple[str, Any]]:
    """(origin, what `read` makes of the row) of every row that it does not refuse."""
    for origin, row in read_rows(source):
        report.records += 1
        try:
            found = read(as_object(row))
        except RecordError as error:
            if options.on_bad_record == "error":
                raise ValueError(f"{origin}: {error} (on_bad_record: skip leaves such records out)") from None
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
        below, upto = np.searchsorted(ranked, rating, "left"), np.searchsorted(ranked, rating, "right")
        return float(below + upto) / (2 * len(ranked))

    return [tuple(mid_rank(rating) for rating in record.ratings or ()) for record in records]


def _score_center(
    scores: list[tuple[float, ...]], options: RecordOptions, require_unit_scores: bool, path: str
) -> tuple[float | None, float]:
    """The centre c, and the offset f(x) + c of the UNA paper that puts an unchanged policy (r = 0) at score c."""
    values = [score for own in scores if _gives_scores(own, options) for score in own]
    if options.score_center == "none" or not values:
        return None, 0.0
    center = float(np.mean(values)) if options.score_center == "dataset" else float(options.score_center)
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


def _feedback(record: Record, scores: tuple[float, ...], options: RecordOptions, offset: float) -> tuple[Feedback, int]:
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
                pairs.append((better, worse, 0.5 if tied else 1.0, gap if margin is None else margin))
        parts.append(_pairs(pairs, weight))
    if _gives_scores(scores, options):
        parts.append(Feedback.scores(range(len(scores)), scores, weight=weight, offset=offset))
    return Feedback.merge(parts), ties


def _pairs(pairs: list[tuple[int, int, float, float]], weight: float) -> Feedback:
    chosen, rejected, target, margin = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    return Feedback.pairs(chosen, rejected, target=target, margin=margin, weight=weight)


def mixture_order(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """The examples of one epoch, as shuffled int64 indices into the concatenation of the sources.

    A source of weight w gives every example floor(w) times, and a random part of its examples (the fraction of w,
    rounded, at least one) once more. The same seed and epoch give the same order on every machine.
    """
    rng = np.random.default_rng([seed, epoch])
    parts, start = [np.empty(0, dtype=np.int64)], 0
    for size, weight in zip(sizes, weights, strict=True):
        times = int(weight)
        parts += [np.arange(start, start + size)] * times
        if weight > times:
            extra = max(1, int((weight - times) * size + 0.5))
            parts.append(start + rng.permutation(size)[:extra])
        start += size
    return rng.permutation(np.concatenate(parts))


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens for the model, and for the loss N response tokens of S responses.

    input_ids, position_ids: [B, T] int64. attention_mask: [B, T] int64 in the padded layout, None in the packed one.
    segments: token ranges in the packed layout (B = 1), None in the padded one. rows: [N] int64, flat index into
    B * T of the position that predicts each response token; the last prompt token stands once per response.
    targets: [N] int64. cu_seqlens: [S+1] int64, always on the CPU, as is feedback. ref_logps: [S] float64, or None if
    the examples have none or there are no examples. num_tokens: tokens of examples that go through the model.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    feedback: Feedback
    ref_logps: Tensor | None
    num_tokens: int


def collate(examples: Sequence[Example], *, packed: bool, device: torch.device | str = "cpu", pad_id: int = 0) -> Batch:
    """The batch of some examples; both layouts hold the same responses in the same order.

    Without responses (a rank that ran out of examples) the batch is a dummy row of two tokens with N = 0 and S = 0:
    it runs through a model, so that collectives happen.
    """
    examples = [example for example in examples if example.responses]
    responses = [response for example in examples for response in example.responses]
    if not examples:
        layout = _dummy(packed, pad_id)
    else:
        layout = _pack(examples) if packed else _pad(examples, pad_id)
    counts = np.cumsum([0, *(len(example.responses) for example in examples)])
    on_device = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": layout.attention_mask,
        "rows": np.concatenate([np.empty(0, dtype=np.int64), *layout.rows]),
        "targets": np.concatenate([np.empty(0, dtype=np.int64), *responses]),
        "ref_logps": _ref_logps(examples),
    }
    return Batch(
        **{k: None if v is None else torch.from_numpy(v).to(device, non_blocking=True) for k, v in on_device.items()},
        segments=layout.segments,
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, responses)], dtype=np.int64)),
        feedback=Feedback.merge([e.feedback.shift(int(n)) for e, n in zip(examples, counts[:-1], strict=True)]),
        num_tokens=layout.num_tokens,
    )


@dataclass(frozen=True)
class _Layout:
    """Where the tokens stand: the parts of a batch in which packed and padded differ, as int64 arrays."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None
    segments: tuple[Segment, ...] | None
    rows: list[np.ndarray]
    num_tokens: int


def _pack(examples: Sequence[Example]) -> _Layout:
    ids, positions, segments, rows, start = [], [], [], [], 0
    for example in examples:
        length = len(example.prompt_ids)
        prompt, start = (start, start + length), start + length
        ids.append(example.prompt_ids)
        positions.append(np.arange(length))
        spans = []
        for response in example.responses:
            stop = start + len(response)
            ids.append(response)
            positions.append(np.arange(length, length + len(response)))
            rows.append(np.concatenate([[prompt[1] - 1], np.arange(start, stop - 1)]))
            spans.append((start, stop))
            start = stop
        segments.append(Segment(prompt, tuple(spans)))
    input_ids = np.concatenate(ids, dtype=np.int64)[None]
    return _Layout(input_ids, np.concatenate(positions)[None], None, tuple(segments), rows, start)


def _pad(examples: Sequence[Example], pad_id: int) -> _Layout:
    pairs = [(example.prompt_ids, response) for example in examples for response in example.responses]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = np.full((len(pairs), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows = []
    for b, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        input_ids[b, :length] = np.concatenate([prompt, response])
        mask[b, :length] = 1
        rows.append(b * width + np.arange(len(prompt) - 1, length - 1))
    positions = np.tile(np.arange(width), (len(pairs), 1))
    return _Layout(input_ids, positions, mask, None, rows, int(mask.sum()))


def footprint(example: Example, *, packed: bool) -> tuple[int, int]:
    """(rows, width) such that a batch of examples takes sum(rows) * max(width) tokens in a layout.

    Padded, these are the responses and the longest sequence. Packed examples stand one after another: what adds up is
    their tokens, and the width is 1. An example without responses is left out of batches, and takes (0, 0).
    """
    lengths = [len(response) for response in example.responses]
    if not lengths:
        return 0, 0
    prompt = len(example.prompt_ids)
    return (prompt + sum(lengths), 1) if packed else (len(lengths), prompt + max(lengths))


def layout_tokens(examples: Sequence[Example], *, packed: bool) -> int:
    """Tokens that `collate` lays out for examples, padding included; 0 for its dummy row."""
    sizes = [footprint(example, packed=packed) for example in examples]
    return sum(rows for rows, _ in sizes) * max((width for _, width in sizes), default=0)


def _dummy(packed: bool, pad_id: int) -> _Layout:
    segments = (Segment((0, 1), ((1, 2),)),) if packed else None
    mask = None if packed else np.ones((1, 2), dtype=np.int64)
    return _Layout(np.full((1, 2), pad_id), np.arange(2)[None], mask, segments, [], 0)


def _ref_logps(examples: Sequence[Example]) -> np.ndarray | None:
    without = [example.origin for example in examples if example.ref_logps is None]
    if len(without) == len(examples):
        return None
    if without:
        raise ValueError(
            f"{without[0]} has no ref_logps while other records of the batch have; give them for every record "
            "(una-fast precompute-ref), or for none"
        )
    return np.array([value for example in examples for value in example.ref_logps], dtype=np.float64)
