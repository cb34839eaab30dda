"""Records: what one row of data says, checked before a tokenizer sees it.

A row becomes a `Record`: one prompt, its responses, and a label, a preference or ratings. Every refusal names the
field and what would mend it; the reader of the file adds where the row stands ("file.jsonl:17").
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from una_fast.checks import check_number

SHAPES = (
    "{prompt, chosen, rejected}",
    "{prompt, chosen, rejected, chosen_rating, rejected_rating}",
    "{chosen, rejected} as whole chats",
    "{prompt, completion, label}",
    "{prompt, completion, score}",
    "{prompt, completion}",
    "{prompt, completions, scores}",
    "{prompt} of an online source",
)

FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "completions", "label", "score", "scores"),
    *("chosen_rating", "rejected_rating", "margin", "weight", "ref_logps"),
)

FAMILIES = {
    "chosen/rejected": ("chosen", "rejected"),
    "completion": ("completion",),
    "completions": ("completions",),
}


FeedbackMode = Literal["scores", "pairs", "both"]

Ties = Literal["drop", "soft"]

Margin = Literal["none", "rating_gap"]

Preset = Literal["none", "helpsteer2", "ultrafeedback"]

ScoreMap = Literal["none", "range", "sigmoid", "quantile"]

OnBadRecord = Literal["error", "skip"]

PromptOverflow = Literal["error", "truncate_left"]

Message = dict[str, Any]


# UNA, arXiv 2408.15339: HelpSteer2's attributes as one score, and (rating - 1) / 9 for UltraFeedback.
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "helpsteer2": {
        "columns": {"completion": "response"},
        "score_columns": {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45},
        "divide": 7.6,
    },
    "ultrafeedback": {
        "columns": {"chosen_rating": "score_chosen", "rejected_rating": "score_rejected"},
        "score_map": "range",
        "score_range": [1.0, 10.0],
    },
}


class RecordError(ValueError):
    """One row cannot be used. The message says why; the reader of the source adds where the row stands."""


@dataclass
class RecordOptions:
    """How the records of a source become feedback. Refuses contradictory values, by the name of the field."""

    columns: dict[str, str] = field(default_factory=dict)
    """Where our fields stand in the data, {our field: column of the data}, for example {completion: response}."""
    preset: Preset = "none"
    """Columns and score settings of a known dataset: helpsteer2 | ultrafeedback; columns given as well are added."""
    feedback: FeedbackMode = "scores"
    """What several rated responses of one prompt give: scores (one unit each) | pairs (every strict order) | both."""
    ties: Ties = "drop"
    """What equal ratings give when pairs are built from them: drop (counted) | soft (a pair with target 0.5)."""
    margin: Margin = "none"
    """Margin of pairs built from ratings: none | rating_gap (score of the chosen minus score of the rejected)."""
    score_columns: dict[str, float] | None = None
    """Attributes that make up the score of a completion, {column: factor}; their weighted sum is divided by divide."""
    divide: float = 1.0
    """Divisor of the weighted sum of score_columns."""
    score_map: ScoreMap = "none"
    """How scores and ratings get into [0, 1]: none | range (score_range) | sigmoid | quantile (mid-rank in source)."""
    score_range: list[float] | None = None
    """Lowest and highest possible score, [lo, hi], for score_map: range."""
    score_center: float | Literal["none", "dataset"] = "none"
    """Score at which an unchanged policy stands: none | a number | dataset (mean of the source, computed once)."""
    on_bad_record: OnBadRecord = "error"
    """What a malformed record does: error (stop the run) | skip (leave it out, counted and reported)."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; null for no limit."""
    max_tokens: int | None = None
    """Longest prompt plus one response in tokens; null for no limit. Responses are never cut."""
    prompt_overflow: PromptOverflow = "error"
    """What a prompt over the limits does: error (a malformed record) | truncate_left (counted; BOS is kept)."""

    def __post_init__(self) -> None:
        for name, choices in (
            *(("preset", Preset), ("feedback", FeedbackMode), ("ties", Ties), ("margin", Margin)),
            *(
                ("score_map", ScoreMap),
                ("on_bad_record", OnBadRecord),
                ("prompt_overflow", PromptOverflow),
            ),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}"
                )
        _check_columns(self.columns)
        self._check_limits()
        if self.preset == "none":
            self._check_scores()
        else:
            self.resolved()  # checks the values of the preset together with the others

    def resolved(self) -> RecordOptions:
        """The same options with the values of the preset written out and preset="none"."""
        values = {f.name: getattr(self, f.name) for f in fields(RecordOptions)}
        defaults = RecordOptions()
        for name, value in PRESETS[self.preset].items():
            if name == "columns":
                value = {**value, **self.columns}
            elif values[name] not in (getattr(defaults, name), value):
                raise ValueError(
                    f"preset={self.preset!r} sets {name} to {value}; remove {name}, or set preset: none"
                )
            values[name] = value
        return RecordOptions(**{**values, "preset": "none"})

    def _check_limits(self) -> None:
        for name in ("max_prompt_tokens", "max_tokens"):
            limit = getattr(self, name)
            if limit is not None and (
                isinstance(limit, bool) or not isinstance(limit, int) or limit < 1
            ):
                raise ValueError(
                    f"{name}={limit!r} must be a positive number of tokens, or null for no limit"
                )
        if self.max_prompt_tokens and self.max_tokens and self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response within "
                f"max_tokens={self.max_tokens} (prompt and response together); raise max_tokens"
            )

    def _check_scores(self) -> None:
        if self.score_columns is not None:
            if not isinstance(self.score_columns, dict) or not self.score_columns:
                raise ValueError(
                    f"score_columns={self.score_columns!r} must map columns to factors, {{column: factor}}"
                )
            for column, factor in self.score_columns.items():
                check_number(f"score_columns.{column}", factor)
        if check_number("divide", self.divide) == 0:
            raise ValueError("divide=0 cannot divide the score")
        if self.divide != 1 and self.score_columns is None:
            raise ValueError(
                f"divide={self.divide} divides the sum of score_columns, which is not set; use score_map"
            )
        if self.score_map == "range":
            if not isinstance(self.score_range, (list, tuple)) or len(self.score_range) != 2:
                raise ValueError(
                    f"score_map=range needs score_range: [lo, hi], not {self.score_range!r}"
                )
            lo, hi = (check_number("score_range", value) for value in self.score_range)
            if not lo < hi:
                raise ValueError(
                    f"score_range={self.score_range} must rise from the lowest to the highest score"
                )
        elif self.score_range is not None:
            raise ValueError(
                f"score_range={self.score_range} is only read with score_map: range, not {self.score_map}"
            )
        if self.score_center not in ("none", "dataset"):
            check_number("score_center", self.score_center, "none, dataset or ")
        if self.feedback == "scores" and (self.margin != "none" or self.ties != "drop"):
            name = "margin" if self.margin != "none" else "ties"
            raise ValueError(
                f"{name}={getattr(self, name)} acts on pairs built from ratings, and feedback=scores builds none; "
                f"set feedback: pairs or both, or remove {name}"
            )


def _check_columns(columns: object) -> None:
    if not isinstance(columns, dict):
        raise ValueError(
            f"columns={columns!r} must map our fields to columns of the data, {{completion: response}}"
        )
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            raise ValueError(
                f"columns: {ours!r} is not a field of a record; known fields: {', '.join(FIELDS)}"
            )
        if not isinstance(theirs, str):
            raise ValueError(f"columns.{ours}={theirs!r} must be the name of a column of the data")


def as_object(row: object) -> dict[str, Any]:
    """A row as a dict of columns; decodes a JSONL line."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 ({error}); save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise RecordError(
                f"invalid JSON ({error}); write one complete JSON object per line"
            ) from None
    if not isinstance(row, dict):
        raise RecordError(
            f"a record must be a JSON object of columns, not {type(row).__name__}: {reprlib.repr(row)}"
        )
    return row


@dataclass(frozen=True)
class Record:
    """One row: a prompt, its responses, and at most one of a label, ratings, or the order chosen, rejected.

    prompt: plain text, or chat messages; responses are of the same kind. ratings: as they stand in the data (they
    give the order); scores: the same after `score_map` (identical until the quantiles of the source are known).
    """

    prompt: str | list[Message]
    responses: tuple[str | list[Message], ...] = ()
    label: bool | None = None
    label_implied: bool = False
    ratings: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    weight: float = 1.0
    ref_logps: tuple[float, ...] | None = None


class _Row:
    """The fields of one row under our names, remembering which columns were read."""

    def __init__(self, row: dict[str, Any], columns: dict[str, str]) -> None:
        self.row, self.columns, self.used = row, columns, set[str]()

    def has(self, name: str) -> bool:
        return self.row.get(self.columns.get(name, name)) is not None

    def optional(self, name: str) -> Any:
        column = self.columns.get(name, name)
        self.used.add(column)
        return self.row.get(column)

    def required(self, name: str) -> Any:
        value = self.optional(name)
        if value is None:
            column = self.columns.get(name, name)
            raise RecordError(
                f"column {column!r} is {'null' if column in self.row else 'missing'}; {self.what_is()}"
            )
        return value

    def what_is(self) -> str:
        renames = "".join(
            f"; {ours} is read from {theirs!r}" for ours, theirs in self.columns.items()
        )
        return (
            f"found columns {', '.join(self.row) or 'none'}{renames}; accepted shapes: {', '.join(SHAPES)} "
            "(columns: {field: column} renames)"
        )


def parse_record(
    row: dict[str, Any], options: RecordOptions, *, require_unit_scores: bool
) -> tuple[Record, list[str]]:
    """The record in a row, and the columns that were not used. `options` must be resolved. Raises `RecordError`."""
    view = _Row(row, options.columns)
    present = [name for name, keys in FAMILIES.items() if any(view.has(key) for key in keys)]
    if len(present) != 1:
        many = f"both {' and '.join(present)} are given, which is ambiguous; remove or rename one; "
        raise RecordError((many if present else "no response column; ") + view.what_is())
    parse = {
        "chosen/rejected": _parse_pair,
        "completion": _parse_single,
        "completions": _parse_list,
    }[present[0]]
    record = parse(view, options, require_unit_scores)
    weight, ref_logps = _weight(view), view.optional("ref_logps")
    if ref_logps is not None:
        values = ref_logps if isinstance(ref_logps, list) else [ref_logps]
        if len(values) != len(record.responses):
            raise RecordError(
                f"ref_logps has {len(values)} values for {len(record.responses)} responses; give one sum over tokens "
                "per response (of a pair: chosen, then rejected)"
            )
        ref_logps = tuple(_number(f"ref_logps[{k}]", value) for k, value in enumerate(values))
    record = replace(record, weight=weight, ref_logps=ref_logps)
    return record, [column for column in row if column not in view.used]


def parse_prompt(row: dict[str, Any], options: RecordOptions) -> tuple[Record, list[str]]:
    """The record of a prompt alone, and all other columns of the row."""
    view = _Row(row, options.columns)
    record = Record(_read_texts(view, {})[0], weight=_weight(view))
    return record, [column for column in row if column not in view.used]


def _weight(view: _Row) -> float:
    weight = view.optional("weight")
    if weight is None:
        return 1.0
    if _number("weight", weight) < 0:
        raise RecordError(
            f"weight is {weight}; it must not be negative (0 leaves the record out of the loss)"
        )
    return float(weight)


def _parse_pair(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    sides = {name: view.required(name) for name in ("chosen", "rejected")}
    prompt, responses = _read_texts(view, sides)
    if responses[0] == responses[1]:
        raise RecordError("chosen and rejected are equal, which prefers nothing; remove the record")
    rated = view.has("chosen_rating") or view.has("rejected_rating")
    builds_pair = not rated or options.feedback != "scores"
    margin = view.optional("margin") if builds_pair else None
    margin = None if margin is None else _number("margin", margin)
    if not rated:
        if margin is None and options.margin == "rating_gap":
            raise RecordError(
                "margin=rating_gap needs chosen_rating and rejected_rating (or a margin column); "
                f"add them, or set margin: none for this source; {view.what_is()}"
            )
        return Record(prompt, responses, margin=margin)
    names = ("chosen_rating", "rejected_rating")
    ratings = tuple(_number(name, view.required(name)) for name in names)
    if ratings[0] < ratings[1]:
        raise RecordError(
            f"chosen_rating {ratings[0]} is below rejected_rating {ratings[1]}; "
            "swap chosen and rejected, or fix the ratings"
        )
    scores = _map_scores(
        names, ratings, options, require_unit_scores and options.feedback != "pairs"
    )
    return Record(prompt, responses, ratings=ratings, scores=scores, margin=margin)


def _parse_single(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    prompt, responses = _read_texts(view, {"completion": view.required("completion")})
    label = view.optional("label")
    if label is not None and not isinstance(label, bool):
        raise RecordError(
            f"label is {reprlib.repr(label)} ({type(label).__name__}), not a boolean; write true or false"
            + (" (graded feedback goes into score)" if isinstance(label, (int, float)) else "")
        )
    score = _weighted_score(view, options)
    if score is None:
        score = view.optional("score")
        score = None if score is None else _number("score", score)
    if score is not None and label is not None:
        raise RecordError(
            "both label and score are given, which is ambiguous; remove one, or rename its column away"
        )
    if score is not None:
        scores = _map_scores(("score",), (score,), options, require_unit_scores)
        return Record(prompt, responses, ratings=(score,), scores=scores)
    if label is None:
        # An absent label is instruction data; a null one is a hole in the data, and must not turn into "good".
        for name in ("label", "score"):
            if view.columns.get(name, name) in view.row:
                raise RecordError(
                    f"{name} is null; fill it in, or leave the column out for instruction data"
                )
        if options.score_columns:
            raise RecordError(
                f"score_columns {', '.join(options.score_columns)} are missing; {view.what_is()}"
            )
    return Record(prompt, responses, label=label is not False, label_implied=label is None)


def _parse_list(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    completions, scores = view.required("completions"), view.required("scores")
    for name, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list) or not value:
            raise RecordError(
                f"{name} must be a list with one entry per response, not {reprlib.repr(value)}"
            )
    if len(completions) != len(scores):
        raise RecordError(
            f"{len(completions)} completions have {len(scores)} scores; give one score per completion"
        )
    if len(completions) == 1 and options.feedback == "pairs":
        raise RecordError(
            "one completion makes no pair; add completions, or set feedback: scores or both"
        )
    named = {f"completions[{k}]": value for k, value in enumerate(completions)}
    prompt, responses = _read_texts(view, named)
    names = tuple(f"scores[{k}]" for k in range(len(scores)))
    ratings = tuple(_number(name, value) for name, value in zip(names, scores, strict=True))
    scores = _map_scores(
        names, ratings, options, require_unit_scores and options.feedback != "pairs"
    )
    return Record(prompt, responses, ratings=ratings, scores=scores)


def _weighted_score(view: _Row, options: RecordOptions) -> float | None:
    """sum(factor * column) / divide, or None if the row has none of the score columns."""
    wanted = options.score_columns or {}
    missing = [column for column in wanted if view.row.get(column) is None]
    if len(missing) == len(wanted):
        return None
    if missing:
        raise RecordError(
            f"score_columns {', '.join(missing)} are missing or null; {view.what_is()}"
        )
    view.used.update(wanted)
    return (
        sum(factor * _number(name, view.row[name]) for name, factor in wanted.items())
        / options.divide
    )


def _map_scores(
    names: tuple[str, ...], ratings: tuple[float, ...], options: RecordOptions, require_unit: bool
) -> tuple[float, ...]:
    """Ratings through score_map; those of "quantile" stay as they are until the whole source is read."""
    if options.score_map == "sigmoid":
        return tuple(0.5 * (1 + math.tanh(0.5 * rating)) for rating in ratings)
    if options.score_map == "range":
        lo, hi = options.score_range
        for name, rating in zip(names, ratings, strict=True):
            if not lo <= rating <= hi:
                raise RecordError(
                    f"{name} is {rating}, outside score_range [{lo}, {hi}]; fix it or widen score_range"
                )
        return tuple((rating - lo) / (hi - lo) for rating in ratings)
    if options.score_map == "none" and require_unit:
        for name, rating in zip(names, ratings, strict=True):
            if not 0 <= rating <= 1:
                raise RecordError(
                    f"{name} is {rating}, outside [0, 1], which the objective compares with sigmoid(r); declare "
                    "score_map: range with score_range: [lo, hi], or score_map: sigmoid or quantile"
                )
    return ratings


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError(
            f"{name} is {reprlib.repr(value)} ({type(value).__name__}); write a number"
        )
    if not abs(value) <= sys.float_info.max:
        raise RecordError(f"{name} is {value}; it must be finite: fix or remove the record")
    return float(value)


def _read_texts(
    view: _Row, named: dict[str, object]
) -> tuple[str | list[Message], tuple[str | list[Message], ...]]:
    """Prompt and the named responses in one kind: all plain text, or all chat (each response one assistant message).

    A response may repeat its prompt as a whole chat; the turns before its last one are then the prompt.
    """
    prompt = view.optional("prompt")
    prompt = None if prompt is None else _text_or_messages("prompt", prompt)
    responses = []
    for name, value in named.items():
        response = _text_or_messages(name, value)
        if isinstance(response, list):
            prompt, response = _cut_chat(name, prompt, response)
        responses.append(response)
    if prompt is None:
        raise RecordError(
            f"column {view.columns.get('prompt', 'prompt')!r} is missing or null; {view.what_is()}"
        )
    if isinstance(prompt, list):
        if not prompt or prompt[-1]["role"] == "assistant":
            raise RecordError(
                "the prompt must end with a user (or tool) message, which the response then answers"
            )
        responses = [
            [{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses
        ]
    return prompt, tuple(responses)


def _cut_chat(
    name: str, prompt: str | list[Message] | None, chat: list[Message]
) -> tuple[list[Message], list[Message]]:
    """The prompt as messages, and the last assistant turn of a response given as chat."""
    *turns, last = chat
    if last["role"] != "assistant":
        raise RecordError(
            f"{name} must end with an assistant message, not with role {last['role']!r}"
        )
    # Some datasets give the text of one user turn as the prompt, beside responses that are whole chats.
    if prompt is None or (
        isinstance(prompt, str) and any(turn.get("content") == prompt for turn in turns)
    ):
        prompt = turns
    if isinstance(prompt, str):
        raise RecordError(
            f"prompt is plain text but {name} is a list of messages; write the prompt as messages too, "
            '[{"role": "user", "content": ...}]'
        )
    if turns and turns != prompt:
        raise RecordError(
            f"{name} does not continue the prompt: the turns before its last assistant message must be those of the "
            "prompt (without a prompt column: those of the first response)"
        )
    return prompt, [last]


def _text_or_messages(name: str, value: object) -> str | list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise RecordError(f"{name} is empty; fill it in or remove the record")
        return value
    if not isinstance(value, list):
        raise RecordError(
            f"{name} is {reprlib.repr(value)} ({type(value).__name__}); write a string or a list of chat messages"
        )
    if not value:
        raise RecordError(f"{name} is empty; fill it in or remove the record")
    return [_message(f"{name}[{k}]", message) for k, message in enumerate(value)]


def _message(name: str, value: object) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RecordError(
            f'{name} is {reprlib.repr(value)}; a message is {{"role": ..., "content": ...}}'
        )
    content = value.get("content")
    if not isinstance(content, str) and not (content is None and value.get("tool_calls")):
        raise RecordError(
            f"{name}.content is {reprlib.repr(content)} ({type(content).__name__}); write a string"
        )
    if isinstance(content, str) and not content.strip() and value["role"] in ("user", "assistant"):
        raise RecordError(f"{name}.content is empty; fill it in or remove the record")
    # Arrow gives every message the keys of all messages; templates ask which keys are there.
    return {key: entry for key, entry in value.items() if entry is not None}
