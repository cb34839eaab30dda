"""Records: rows of data, checked before a tokenizer sees the texts.

A row becomes a `Record`: a prompt, responses, and a label, a preference or ratings. Every
refusal names the field and the mend; the reader of the source adds the place of the row, such as
"file.jsonl:17".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from una_fast.data.messages import (
    Message,
    RecordError,
    Text,
    mapping,
    objects,
    text_or_messages,
)
from una_fast.data.settings import RecordOptions, reserved_variable
from una_fast.data.strict_json import parse_strictly
from una_fast.data.turns import split_texts
from una_fast.printable import printable, shown
from una_fast.score_maps import sigmoid, to_range

SHAPES = (
    "{prompt, chosen, rejected}",
    "{prompt, chosen, rejected, chosen_rating, rejected_rating}",
    "{chosen, rejected} as whole chats",
    "{prompt, completion, label}",
    "{prompt, completion, score}",
    "{prompt, completion}",
    "{prompt, completions, scores}",
    "{conversations} or {messages} as whole chats, alone or as the prompt",
    "{prompt} of an online source",
)

FAMILIES = {
    "chosen/rejected": ("chosen", "rejected"),
    "completion": ("completion",),
    "completions": ("completions",),
}

CHATS = ("conversations", "messages")  # columns of whole chats

# Nats of one token. Two logits in fp16, whose range is the narrowest in use, are at most so far
# apart; a lower log-prob is damage, or -inf written as a large number.
LOWEST_LOGP = -2 * 65504

MOST_LISTED = 20  # names of columns in a message


@dataclass(frozen=True)
class Record:
    """A prompt, K responses, and a label, ratings, or the order chosen, rejected.

    prompt: plain text, or chat messages
    responses: [K] texts of the same kind as the prompt
    label: True for a good response; None without a label
    label_implied: the row had no label, and the response counts as good
    ratings: [K] numbers as in the data; pairs are in the order of the ratings
    scores: [K] ratings after `score_map`; with score_map=quantile equal to `ratings`, until the
        whole source is read
    margin: of the pair, in units of the implicit reward, if the row has a margin
    weight: factor on the loss of every unit of the record
    ref_logps: [K] cached reference log-probs, sums over tokens, in nats
    variables: of the chat template, beside the messages: tools, enable_thinking and the like
    """

    prompt: Text
    responses: tuple[Text, ...] = ()
    label: bool | None = None
    label_implied: bool = False
    ratings: tuple[float, ...] | None = None
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    weight: float = 1.0
    ref_logps: tuple[float, ...] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


class _Texts(NamedTuple):
    """The texts of a record; fields as in `Record`."""

    prompt: Text
    responses: tuple[Text, ...]
    variables: dict[str, Any] = {}


def as_object(row: object) -> dict[str, Any]:
    """Return a row as a dict of columns; the bytes of a JSONL line are decoded.

    Raises RecordError for bytes other than UTF-8 and strict JSON, for JSON other than an object,
    and for a row that its reader could not decode: the row is then the error.
    """
    if isinstance(row, RecordError):
        raise row
    if isinstance(row, bytes):
        try:
            row = parse_strictly(row.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RecordError(
                f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from None
        except ValueError as error:
            raise RecordError(str(error)) from None
    if not isinstance(row, dict):
        raise RecordError(
            f"a record must be a JSON object of columns, not {type(row).__name__}: {shown(row)}"
        )
    return row


def listed(names: Iterable[object]) -> str:
    """Return names as a part of a message, "a, b, c": the first few, and how many more."""
    names = list(names)
    first = [printable(name, 40) for name in names[:MOST_LISTED]]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


class _Row:
    """The columns of a row under our field names; `used` collects the columns read so far."""

    def __init__(self, row: dict[str, Any], columns: dict[str, str]) -> None:
        self.row = row
        self.columns = columns
        self.used: set[str] = set()

    def column(self, name: str) -> str:
        """Return the column of the data for a field."""
        return self.columns.get(name, name)

    def has(self, name: str) -> bool:
        """Return whether a field is present and not null."""
        return self.row.get(self.column(name)) is not None

    def optional(self, name: str) -> Any:
        """Return the value of a field, or None, and count the column as used."""
        column = self.column(name)
        self.used.add(column)
        return self.row.get(column)

    def optional_number(self, name: str) -> float | None:
        """Return the number in a field, or None; RecordError for a value of another kind."""
        value = self.optional(name)
        if value is None:
            return None
        return _number(name, value)

    def required(self, name: str) -> Any:
        """Return the value of a field; RecordError for a missing or null column."""
        value = self.optional(name)
        if value is None:
            column = self.column(name)
            fault = "null" if column in self.row else "missing"
            raise RecordError(f"column {shown(column)} is {fault}; {self.found_and_accepted()}")
        return value

    def unused(self) -> list[str]:
        """Return the unused columns, in the order of the row."""
        return [column for column in self.row if column not in self.used]

    def found_and_accepted(self) -> str:
        """Return the end of a message: the columns found, and the accepted shapes."""
        renames = "".join(
            f"; {ours} is read from {shown(theirs)}" for ours, theirs in self.columns.items()
        )
        return (
            f"found columns {listed(self.row) or 'none'}{renames}; "
            f"accepted shapes: {', '.join(SHAPES)} (columns: {{field: column}} renames)"
        )


def parse_record(
    row: dict[str, Any], options: RecordOptions, *, require_unit_scores: bool
) -> tuple[Record, list[str]]:
    """Return the record of a row, and the unused columns of the row.

    row: column -> value
    options: settings of the source, resolved
    require_unit_scores: refuse scores outside [0, 1] if score_map is none

    Raises RecordError.
    """
    row = _in_our_columns(row, options.columns)
    view = _Row(row, options.columns)
    present = []
    for family, names in FAMILIES.items():
        if any(view.has(name) for name in names):
            present.append(family)
    if not present:
        raise RecordError(f"no response column; {view.found_and_accepted()}")
    if len(present) > 1:
        raise RecordError(
            f"both {' and '.join(present)} are given, which is ambiguous; remove or rename one; "
            f"{view.found_and_accepted()}"
        )
    parse = {
        "chosen/rejected": _parse_pair,
        "completion": _parse_single,
        "completions": _parse_list,
    }[present[0]]
    record = parse(view, options, require_unit_scores)
    weight = _weight(view)
    ref_logps = _ref_logps(view, len(record.responses))
    return replace(record, weight=weight, ref_logps=ref_logps), view.unused()


def parse_prompt(row: dict[str, Any], options: RecordOptions) -> tuple[Record, list[str]]:
    """Return the record of a prompt without responses, and all other columns of the row."""
    view = _Row(_asked_in_our_columns(row, options.columns), options.columns)
    texts = _read_texts(view, {}, options)
    record = Record(texts.prompt, weight=_weight(view), variables=texts.variables)
    return record, view.unused()


# ---- whole chats in one column -----------------------------------------------------------------


def _in_our_columns(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with its chat as the completion, or as the prompt of the row's responses.

    columns: our field -> column of the data
    """
    column = _chat_column(row, columns)
    if column is None:
        return row
    answered = list(chain.from_iterable(FAMILIES.values()))
    ours = "completion"
    if any(row.get(columns.get(name, name)) is not None for name in answered):
        ours = "prompt"
    others = {name: value for name, value in row.items() if name != column}
    return {**others, columns.get(ours, ours): row[column]}


def _asked_in_our_columns(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with its chat as a prompt: without a last answer, which is to be sampled."""
    column = _chat_column(row, columns)
    if column is None:
        return row
    chat = text_or_messages(column, row[column])
    if isinstance(chat, list) and chat[-1]["role"] == "assistant":
        chat = chat[:-1]
    return {**row, columns.get("prompt", "prompt"): chat}


def has_answer(row: dict[str, Any], columns: dict[str, str]) -> bool:
    """Return whether a row holds a response, or a chat with an answer at the end.

    row: column -> value
    columns: our field -> column of the data

    RecordError for a chat of another form.
    """
    names = chain.from_iterable(FAMILIES.values())
    if any(row.get(columns.get(name, name)) is not None for name in names):
        return True
    column = _chat_column(row, columns)
    chat = text_or_messages(column, row[column]) if column is not None else ""
    return isinstance(chat, list) and chat[-1]["role"] == "assistant"


def _chat_column(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """Return the column with a whole chat, if a row without a prompt has one."""
    if row.get(columns.get("prompt", "prompt")) is not None:
        return None
    names = [columns.get(name, name) for name in CHATS]
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise RecordError(f"both {' and '.join(map(shown, present))} hold a chat; remove one")
    return present[0] if present else None


# ---- numbers -----------------------------------------------------------------------------------


def _weight(view: _Row) -> float:
    weight = view.optional("weight")
    if weight is None:
        return 1.0
    if _number("weight", weight) < 0:
        raise RecordError(
            f"weight is {shown(weight)}; it must not be negative (0 leaves the record out of the "
            "loss)"
        )
    return float(weight)


def _ref_logps(view: _Row, responses: int) -> tuple[float, ...] | None:
    ref_logps = view.optional("ref_logps")
    if ref_logps is None:
        return None
    values = ref_logps if isinstance(ref_logps, list) else [ref_logps]
    if len(values) != responses:
        raise RecordError(
            f"ref_logps has {len(values)} values for {responses} responses; give one sum over "
            "tokens per response (of a pair: chosen, then rejected)"
        )
    sums = tuple(_number(f"ref_logps[{k}]", value) for k, value in enumerate(values))
    for k, value in enumerate(sums):
        if value > 0:
            raise RecordError(
                f"ref_logps[{k}] is {value}, above 0, a probability above 1; compute the column "
                "anew (una-fast precompute-ref) or remove it"
            )
    return sums


def check_ref_logps(record: Record, tokens: Sequence[int]) -> None:
    """Check cached reference log-probs against the lengths of the responses.

    record: with or without `ref_logps`
    tokens: [K] tokens of every response

    Raises RecordError for a mean below LOWEST_LOGP nats per token.
    """
    for k, (value, length) in enumerate(zip(record.ref_logps or (), tokens, strict=False)):
        if value < LOWEST_LOGP * length:
            raise RecordError(
                f"ref_logps[{k}] is {value} for {length} tokens, which no model gives; compute "
                "the column anew (una-fast precompute-ref) or remove it"
            )


def _parse_pair(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    sides = {name: view.required(name) for name in ("chosen", "rejected")}
    prompt, responses, variables = _read_texts(view, sides, options)
    if responses[0] == responses[1]:
        raise RecordError("chosen and rejected are equal, which prefers nothing; remove the record")
    rated = view.has("chosen_rating") or view.has("rejected_rating")
    if not rated:
        margin = view.optional_number("margin")
        if margin is None and options.margin == "rating_gap":
            raise RecordError(
                "margin=rating_gap needs chosen_rating and rejected_rating (or a margin column); "
                f"add them, or set margin: none for this source; {view.found_and_accepted()}"
            )
        return Record(prompt, responses, margin=margin, variables=variables)

    margin = None
    if options.feedback != "scores":  # a pair is built, which may bring its own margin
        margin = view.optional_number("margin")
    names = ("chosen_rating", "rejected_rating")
    ratings = tuple(_number(name, view.required(name)) for name in names)
    if ratings[0] < ratings[1]:
        raise RecordError(
            f"chosen_rating {ratings[0]} is below rejected_rating {ratings[1]}; "
            "swap chosen and rejected, or fix the ratings"
        )
    require_unit = require_unit_scores and options.feedback != "pairs"
    scores = _map_scores(names, ratings, options, require_unit)
    return Record(
        prompt, responses, ratings=ratings, scores=scores, margin=margin, variables=variables
    )


def _parse_single(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    completion = view.required("completion")
    texts = _read_texts(view, {"completion": completion}, options)
    record = Record(texts.prompt, texts.responses, variables=texts.variables)
    label = view.optional("label")
    if label is not None and not isinstance(label, bool):
        hint = " (graded feedback goes into score)" if isinstance(label, (int, float)) else ""
        raise RecordError(
            f"label is {shown(label)} ({type(label).__name__}), not a boolean; "
            f"write true or false{hint}"
        )
    score = _weighted_score(view, options)
    if score is None:
        score = view.optional_number("score")
    if score is not None and label is not None:
        raise RecordError(
            "both label and score are given, which is ambiguous; remove one, "
            "or rename its column away"
        )
    if score is not None:
        scores = _map_scores(("score",), (score,), options, require_unit_scores)
        return replace(record, ratings=(score,), scores=scores)
    if label is None:
        _refuse_holes(view, options)
        return replace(record, label=True, label_implied=True)
    return replace(record, label=label)


def _refuse_holes(view: _Row, options: RecordOptions) -> None:
    """Check a row without label and score; RecordError unless the row is instruction data."""
    # An absent label is instruction data; a null label is a hole in the data, and must not turn
    # into "good".
    for name in ("label", "score"):
        if view.column(name) in view.row:
            raise RecordError(
                f"{name} is null; fill it in, or leave the column out for instruction data"
            )
    if options.score_columns:
        raise RecordError(
            f"score_columns {listed(options.score_columns)} are missing; "
            f"{view.found_and_accepted()}"
        )


def _parse_list(view: _Row, options: RecordOptions, require_unit_scores: bool) -> Record:
    completions = view.required("completions")
    scores = view.required("scores")
    for name, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list) or not value:
            raise RecordError(
                f"{name} must be a list with one entry per response, not {shown(value)}"
            )
    if len(completions) != len(scores):
        raise RecordError(
            f"{len(completions)} completions have {len(scores)} scores; "
            "give one score per completion"
        )
    if len(completions) == 1 and options.feedback == "pairs":
        raise RecordError(
            "one completion makes no pair; add completions, or set feedback: scores or both"
        )
    named = {f"completions[{k}]": value for k, value in enumerate(completions)}
    prompt, responses, variables = _read_texts(view, named, options)
    names = tuple(f"scores[{k}]" for k in range(len(scores)))
    ratings = tuple(_number(name, value) for name, value in zip(names, scores, strict=True))
    require_unit = require_unit_scores and options.feedback != "pairs"
    mapped = _map_scores(names, ratings, options, require_unit)
    return Record(prompt, responses, ratings=ratings, scores=mapped, variables=variables)


def _weighted_score(view: _Row, options: RecordOptions) -> float | None:
    """Return sum(factor * column) / divide, or None for a row without any score column."""
    wanted = options.score_columns or {}
    missing = [column for column in wanted if view.row.get(column) is None]
    if len(missing) == len(wanted):
        return None
    if missing:
        raise RecordError(
            f"score_columns {listed(missing)} are missing or null; {view.found_and_accepted()}"
        )
    view.used.update(wanted)
    total = sum(factor * _number(name, view.row[name]) for name, factor in wanted.items())
    return _number("score (of score_columns)", total / options.divide)


def _map_scores(
    names: Sequence[str], ratings: tuple[float, ...], options: RecordOptions, require_unit: bool
) -> tuple[float, ...]:
    """Return ratings after score_map; "quantile" waits for the whole source."""
    if options.score_map == "sigmoid":
        return tuple(sigmoid(rating) for rating in ratings)
    if options.score_map == "range":
        low, high = options.score_range
        for name, rating in zip(names, ratings, strict=True):
            if not low <= rating <= high:
                raise RecordError(
                    f"{name} is {rating}, outside score_range [{low}, {high}]; "
                    "fix it or widen score_range"
                )
        return tuple(to_range(rating, low, high) for rating in ratings)
    if options.score_map == "none" and require_unit:
        for name, rating in zip(names, ratings, strict=True):
            if not 0 <= rating <= 1:
                raise RecordError(
                    f"{name} is {rating}, outside [0, 1], which the objective compares with "
                    "sigmoid(r); declare score_map: range with score_range: [lo, hi], "
                    "or score_map: sigmoid or quantile"
                )
    return ratings


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError(f"{name} is {shown(value)} ({type(value).__name__}); write a number")
    if not abs(value) <= sys.float_info.max:
        raise RecordError(f"{name} is {shown(value)}; it must be finite: fix or remove the record")
    return float(value)


def _read_texts(view: _Row, named: dict[str, object], options: RecordOptions) -> _Texts:
    """Return the prompt and the named responses, all as plain text, or all as chat.

    view: has the prompt, and the variables of the chat template
    named: name for messages -> response as in the row
    options: settings of the source, resolved
    """
    prompt = view.optional("prompt")
    if prompt is not None:
        prompt = text_or_messages("prompt", prompt)
    responses = {name: text_or_messages(name, value) for name, value in named.items()}
    as_chat = options.strings == "chat"
    prompt, texts = split_texts(prompt, responses, as_chat=as_chat)
    if prompt is None:
        raise RecordError(
            f"column {shown(view.column('prompt'))} is missing or null; {view.found_and_accepted()}"
        )
    variables = _variables(view, options)
    if not isinstance(prompt, str):
        return _Texts(_with_system(view, prompt), texts, variables)
    if variables:
        raise RecordError(
            f"{listed(variables)} are variables of a chat template, and the prompt is plain text; "
            "write messages, or set strings: chat"
        )
    return _Texts(prompt, texts)


def _with_system(view: _Row, prompt: list[Message]) -> list[Message]:
    """Return a prompt that begins with the text of the system column, if the row has one."""
    system = view.optional("system")
    if not system or prompt[0]["role"] == "system":
        return prompt
    if not isinstance(system, str):
        raise RecordError(f"system is {shown(system)}; write a string")
    return [{"role": "system", "content": system}, *prompt]


def _variables(view: _Row, options: RecordOptions) -> dict[str, Any]:
    """Return the variables that the chat template gets beside the messages."""
    variables = dict(options.chat_template_kwargs)
    own = view.optional("chat_template_kwargs")
    if own is not None:
        own = mapping("chat_template_kwargs", own)
        fault = reserved_variable(own)
        if fault is not None:
            raise RecordError(fault)
        variables |= own
    tools = view.optional("tools")
    if tools:
        variables["tools"] = objects("tools", tools)
    return variables
