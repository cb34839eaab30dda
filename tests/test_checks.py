"""Refusals of settings name the field, the value and the choices; right values pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from una_fast.checks import (
    check_at_least,
    check_choices,
    check_number,
    check_one_of,
    check_range,
    check_types,
)
from una_fast.flags import Parser, add_settings, given_settings, in_place
from una_fast.printable import without_secrets
from una_fast.rewards.settings import shown_url


@dataclass
class Settings:
    colour: Literal["red", "green"] = "red"
    shape: Literal["round", "square"] = "round"
    text: str = "any"
    count: int = 3
    limit: int | None = None


def test_choices_come_from_the_annotations():
    check_choices(Settings(colour="green", text="blue"))
    with pytest.raises(ValueError, match=r"shape='flat' is not one of round, square"):
        check_choices(Settings(shape="flat"))
    check_choices(Settings(shape="flat"), ["colour", "text"])
    with pytest.raises(ValueError, match=r"shape='flat' is not one of"):
        check_choices(Settings(shape="flat"), ["shape"])


def test_one_of():
    check_one_of("kind", None, (None, 4))
    with pytest.raises(ValueError, match=r"kind='5' is not one of None, 4"):
        check_one_of("kind", "5", iter((None, 4)))


def test_at_least():
    check_at_least(3, Settings(), ["count"])
    check_at_least(1, Settings(), ["count", "limit"], or_null=True)
    with pytest.raises(ValueError, match=r"^count=3 must be at least 4$"):
        check_at_least(4, Settings(), ["count"])
    with pytest.raises(ValueError, match=r"^limit=0 must be at least 1, or null$"):
        check_at_least(1, Settings(limit=0), ["limit"], or_null=True)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "1", None])
def test_a_number_is_finite_and_no_truth_value(value):
    assert check_number("rate", 0.5) == 0.5
    with pytest.raises(ValueError, match=r"rate=.* must be a finite number"):
        check_number("rate", value)


def test_a_range_has_limits_that_rise():
    check_range("score_map", "range", "score_range", [1, 5])
    check_range("score_map", "sigmoid", "score_range", None)
    for limits in (None, [1], [5, 1], [1, 1], [0, "1"], 3):
        with pytest.raises(ValueError, match="score_range"):
            check_range("score_map", "range", "score_range", limits)
    with pytest.raises(ValueError, match=r"only read with score_map: range, not none"):
        check_range("score_map", "none", "score_range", [1, 5])


@dataclass
class Inner:
    rank: int = 1


@dataclass
class Typed:
    text: str = ""
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    limit: int | None = None
    form: Literal["a", "b"] = "a"
    offset: float | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.5, 0.5)
    names: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    sources: str | list[str | dict[str, Any]] = ""
    inner: Inner | None = None


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 2, "limit": 7, "offset": -1, "betas": [0, 1.5]},
        {"names": ["x"], "columns": {"a": "b"}, "inner": {"rank": 3}, "form": "b"},
        {"inner": Inner(2), "sources": ["x", {"path": "y", "weight": 0.5, "deep": [{"a": None}]}]},
    ],
)
def test_values_of_the_right_types_pass(values):
    check_types(Typed(**values))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text", 3, r"text=3 must be a text \(put it in quotes\)"),
        ("text", None, "text=null must be a text"),
        ("text", "a\0b", "text=.* holds a NUL character"),
        ("text", "\udcff", "text=.* cannot be written in UTF-8"),
        ("flag", 1, "flag=1 must be true or false"),
        ("flag", "yes", "flag='yes' must be true or false"),
        ("count", True, "count=true must be a whole number"),
        ("count", 1.0, "count=1.0 must be a whole number"),
        ("count", "1", r"count='1' must be a whole number \(take the quotes away\)"),
        ("count", 2**63, "count=9223372036854775808 must be a whole number"),
        ("count", 10**5000, "count=<an integer of 16610 bits> must be a whole number"),
        ("rate", float("nan"), "rate=nan must be a finite number"),
        ("rate", float("inf"), "rate=inf must be a finite number"),
        ("rate", 10**400, "rate=.* must be a finite number"),
        ("rate", "1e-3", r"rate='1e-3' must be a finite number \(take the quotes away\)"),
        ("limit", "many", "limit='many' must be a whole number or null"),
        ("form", "c", "form='c' is not one of a, b"),
        ("form", ["a"], r"form=\['a'\] is not one of a, b"),
        ("offset", "group", "offset='group' must be a finite number or auto"),
        ("betas", [0.5], r"betas=\[0.5\] must be a list of 2"),
        ("betas", [0.5, None], r"betas\[1\]=null must be a finite number"),
        ("names", "x", "names='x' must be a list with entries of a text"),
        ("names", ["x", 3], r"names\[1\]=3 must be a text"),
        ("columns", {"a": 1}, "columns.a=1 must be a text"),
        ("columns", {1: "a"}, "columns: the key 1 must be a text"),
        ("columns", {"\x1b[2J": 1}, r"columns.\\x1b\[2J=1 must be a text"),
        ("sources", {"a": 1}, "sources=.* must be a text or a list"),
        ("sources", ["x", None], r"sources\[1\]=null must be a text or a mapping"),
        ("sources", [{"w": float("nan")}], r"sources\[0\].w=nan must be .* finite"),
        ("sources", [{"w": object()}], r"sources\[0\].w=<object"),
        ("inner", 3, "inner=3 must be a mapping of rank or null"),
        ("inner", {"rnak": 3}, "inner: 'rnak' is not one of rank"),
        ("inner", {"rank": "3"}, "inner.rank='3' must be a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "x",
)
def test_values_of_other_types_are_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_types(Typed(**{name: value}))


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("path a&b=c.jsonl", "path a&b=c.jsonl"),
        ("what?x=1 of http://h/v1", "what?x=1 of http://h/v1"),
        ("https://u:p@ss@h/v1?key=s&b=t", "https://***@h/v1?key=***&b=***"),
        ("https://u:p#s@s@h/v1", "https://***@h/v1"),
        ("https://h/v1?s at http://u@h", "https://h/v1?*** at http://***@h"),
    ],
)
def test_secrets_of_urls_alone_are_left_out(text, shown_text):
    assert without_secrets(text) == shown_text


def test_a_url_is_shown_without_secrets():
    assert shown_url("https://u:p@ss@h:1/v1?key=s#t") == "https://h:1/v1"


@dataclass
class Texts:
    plain: str = ""
    path: str | None = None
    count: int | None = None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("plain", "runs/exp #2", "runs/exp #2"),
        ("plain", "null", "null"),
        ("plain", "10", "10"),
        ("path", "runs/exp #2", "runs/exp #2"),
        ("path", "NULL", "NULL"),
        ("path", "null", None),
        ("path", "~", None),
        ("count", "3 # three", 3),
        ("count", "null", None),
    ],
)
def test_flags_of_texts_are_taken_as_they_are(name, text, value):
    assert given_settings(Texts, [(name, text)]) == {name: value}


@dataclass
class Places:
    """Files to read."""

    files: list[str] = field(metadata=in_place("FILE"))
    """Files of records."""
    count: int = 1
    """Records to show."""


@dataclass
class Place:
    """A run."""

    run: str = field(default="runs/last", metadata=in_place("RUN"))


def test_words_without_a_flag_are_a_setting():
    places = ["null", "b c"]
    assert given_settings(Places, [("count", "2")], places) == {"count": 2, "files": places}
    assert given_settings(Place, [], ["8"]) == {"run": "8"}
    assert given_settings(Place, []) == {}
    with pytest.raises(ValueError, match="FILE is missing"):
        given_settings(Places, [])
    with pytest.raises(ValueError, match="one RUN is wanted, not a b"):
        given_settings(Place, [], ["a", "b"])


def test_words_without_a_flag_may_stand_anywhere_among_the_flags():
    parser = Parser(prog="una-fast data")
    add_settings(parser, [Places])
    parsed, places = parser.parse_known_args(["a", "--count", "2", "b"])
    assert parsed.words == [("count", "2")] and places == ["a", "b"]
    shown = parser.format_help()
    assert "una-fast data [-v] FILE [FILE ...] [--config FILE]" in shown
    assert "Files of records." in shown and "--files" not in shown
