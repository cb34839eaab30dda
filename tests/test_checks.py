"""Refusals of settings name the field, the value and the choices; right values pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from una_fast.checks import check_at_least, check_choices, check_number, check_one_of, check_range


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
    with pytest.raises(ValueError, match=r"rate=.* must be auto or a finite number"):
        check_number("rate", value, "auto or ")


def test_a_range_has_limits_that_rise():
    check_range("score_map", "range", "score_range", [1, 5])
    check_range("score_map", "sigmoid", "score_range", None)
    for limits in (None, [1], [5, 1], [1, 1], [0, "1"], 3):
        with pytest.raises(ValueError, match="score_range"):
            check_range("score_map", "range", "score_range", limits)
    with pytest.raises(ValueError, match=r"only read with score_map: range, not none"):
        check_range("score_map", "none", "score_range", [1, 5])
