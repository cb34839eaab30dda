"""Settings of records: the columns, scores, pairs and lengths of a source of data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from una_fast.checks import check_range, check_types
from una_fast.score_maps import ScoreMap

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "label",
    "score",
    "scores",
    "chosen_rating",
    "rejected_rating",
    "margin",
    "weight",
    "ref_logps",
    "conversations",
    "messages",
    "system",
    "tools",
    "chat_template_kwargs",
)

FeedbackMode = Literal["scores", "pairs", "both"]

Ties = Literal["drop", "soft"]

Margin = Literal["none", "rating_gap"]

Preset = Literal["none", "helpsteer2", "ultrafeedback"]

OnBadRecord = Literal["error", "skip"]

PromptOverflow = Literal["error", "truncate_left"]

Strings = Literal["raw", "chat"]

# What a run itself gives to the renderer of a chat template: no variables of a record.
RESERVED = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


# UNA, arXiv 2408.15339: HelpSteer2's attributes as one score, and (rating - 1) / 9 for
# UltraFeedback.
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


@dataclass
class RecordOptions:
    """Settings for turning the records of a source into feedback.

    Raises ValueError for contradictory values, by the name of the field.
    """

    columns: dict[str, str] = field(default_factory=dict)
    """Columns of our fields, {our field: column of the data}, such as {completion: response}."""
    preset: Preset = "none"
    """Columns and scores of a known dataset: helpsteer2 | ultrafeedback; columns are added."""
    feedback: FeedbackMode = "scores"
    """Several rated responses of a prompt give: scores (each) | pairs (strict orders) | both."""
    ties: Ties = "drop"
    """Equal ratings, where pairs are built, give: drop (counted) | soft (a pair of target 0.5)."""
    margin: Margin = "none"
    """Margin of pairs from ratings: none | rating_gap (score of the chosen minus the rejected)."""
    score_columns: dict[str, float] | None = None
    """Attributes of the score, {column: factor}; the weighted sum is divided by divide."""
    divide: float = 1.0
    """Divisor of the weighted sum of score_columns."""
    score_map: ScoreMap = "none"
    """Scores into [0, 1]: none | range (score_range) | sigmoid | quantile (mid-rank in source)."""
    score_range: list[float] | None = None
    """Lowest and highest possible score, [lo, hi], for score_map: range."""
    score_center: float | Literal["none", "dataset"] = "none"
    """Score of an unchanged policy: none | a number | dataset (mean of the source, taken once)."""
    on_bad_record: OnBadRecord = "error"
    """A malformed record: error (stop the run) | skip (leave it out, counted and reported)."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; null for no limit."""
    max_tokens: int | None = None
    """Longest prompt plus one response in tokens; null: no limit. Responses are never cut."""
    prompt_overflow: PromptOverflow = "error"
    """Over the limits: error | truncate_left (counted; BOS stays; of a chat old turns go first)."""
    strings: Strings = "raw"
    """Texts that are no messages: raw (as they are) | chat (a user's turn, and its answers)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; a column overrides them."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_columns(self.columns)
        fault = reserved_variable(self.chat_template_kwargs)
        if fault is not None:
            raise ValueError(fault)
        self._check_limits()
        if self.preset == "none":
            self._check_scores()
        else:
            self.resolved()  # checks the values of the preset together with the others

    def resolved(self) -> RecordOptions:
        """Return the same options with the values of the preset written out and preset="none"."""
        values = {f.name: getattr(self, f.name) for f in fields(RecordOptions)}
        defaults = RecordOptions()
        for name, value in PRESETS[self.preset].items():
            if name == "columns":
                value = {**value, **self.columns}
            elif values[name] not in (getattr(defaults, name), value):
                raise ValueError(
                    f"preset={self.preset!r} sets {name} to {value}; remove {name}, "
                    "or set preset: none"
                )
            values[name] = value
        values["preset"] = "none"
        return RecordOptions(**values)

    def _check_limits(self) -> None:
        for name in ("max_prompt_tokens", "max_tokens"):
            limit = getattr(self, name)
            if limit is None:
                continue
            if limit < 1:
                raise ValueError(
                    f"{name}={limit} must be a positive number of tokens, or null for no limit"
                )
        if self.max_prompt_tokens and self.max_tokens and self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response within "
                f"max_tokens={self.max_tokens} (prompt and response together); raise max_tokens"
            )

    def _check_scores(self) -> None:
        self._check_score_columns()
        check_range("score_map", self.score_map, "score_range", self.score_range)
        if self.feedback == "scores" and (self.margin != "none" or self.ties != "drop"):
            name = "margin" if self.margin != "none" else "ties"
            raise ValueError(
                f"{name}={getattr(self, name)} acts on pairs built from ratings, and "
                "feedback=scores builds none; set feedback: pairs or both, "
                f"or remove {name}"
            )

    def _check_score_columns(self) -> None:
        if self.score_columns == {}:
            raise ValueError("score_columns={} must map columns to factors, {column: factor}")
        if self.divide == 0:
            raise ValueError("divide=0 cannot divide the score")
        if self.divide != 1 and self.score_columns is None:
            raise ValueError(
                f"divide={self.divide} divides the sum of score_columns, which is not set; "
                "use score_map"
            )


def reserved_variable(variables: dict[str, Any]) -> str | None:
    """Return why variables of a chat template are refused, by name; None if they are not."""
    names = sorted(RESERVED.intersection(variables))
    if not names:
        return None
    return (
        f"chat_template_kwargs: {', '.join(names)} is given to the chat template by the run itself "
        "(tools: from the column tools); remove it"
    )


def _check_columns(columns: dict[str, str]) -> None:
    for ours in columns:
        if ours not in FIELDS:
            raise ValueError(
                f"columns: {ours!r} is not a field of a record; known fields: {', '.join(FIELDS)}"
            )
