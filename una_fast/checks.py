"""Refusals of settings: choices, bounds and numbers, each written once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_number(name: str, value: object, else_allowed: str = "") -> float:
    """Return the value of a setting that is a finite number; ValueError for any other value.

    else_allowed: further values that the message names, such as "auto or "
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be {else_allowed}a finite number")
    return value


def check_one_of(name: str, value: object, choices: Iterable[Any]) -> None:
    """Check that the value of a setting is among its choices; ValueError otherwise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def check_choices(settings: Any, names: Iterable[str] | None = None) -> None:
    """Check every field of a dataclass that is annotated with a Literal.

    settings: an instance of a dataclass
    names: the fields to check; default: all

    ValueError, by the field's name, for a value that its Literal does not hold.
    """
    hints = get_type_hints(type(settings))
    for name in hints if names is None else names:
        if get_origin(hints[name]) is Literal:
            check_one_of(name, getattr(settings, name), get_args(hints[name]))


def check_at_least(
    least: int, settings: Any, names: Iterable[str], *, or_null: bool = False
) -> None:
    """Check that fields hold numbers of at least `least`; ValueError, by the field's name, otherwise.

    or_null: None is allowed too
    """
    for name in names:
        value = getattr(settings, name)
        if or_null and value is None:
            continue
        if value < least:
            rest = ", or null" if or_null else ""
            raise ValueError(f"{name}={value} must be at least {least}{rest}")
