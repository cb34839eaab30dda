"""Refusals of settings: choices, bounds and numbers, each written once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_number(name: str, value: object, else_allowed: str = "") -> float:
    """Return the value of a setting if the value is a finite number.

    name: the setting, for the error
    value: the value; True and False are no numbers
    else_allowed: further values for the error to name, such as "auto or "

    ValueError, by the name, otherwise.
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
    """Check the fields of a dataclass with a Literal as annotation.

    settings: an instance of the dataclass
    names: the fields to check; default: all; fields with other annotations pass

    ValueError, by the field's name, for a value outside the Literal.
    """
    hints = get_type_hints(type(settings))
    if names is None:
        names = hints
    for name in names:
        if get_origin(hints[name]) is Literal:
            check_one_of(name, getattr(settings, name), get_args(hints[name]))


def check_at_least(
    least: int, settings: Any, names: Iterable[str], *, or_null: bool = False
) -> None:
    """Check that fields hold numbers of at least `least`.

    least: the bound
    settings: an object with the fields as attributes
    names: the fields to check
    or_null: None is allowed too

    ValueError, by the field's name, otherwise.
    """
    for name in names:
        value = getattr(settings, name)
        if or_null and value is None:
            continue
        if value < least:
            rest = ", or null" if or_null else ""
            raise ValueError(f"{name}={value} must be at least {least}{rest}")


def check_range(map_name: str, kind: str, limits_name: str, limits: object) -> None:
    """Check that a map has limits exactly if the map is "range", and that the limits rise.

    map_name: the setting of the map, such as "score_map"
    kind: the chosen map
    limits_name: the setting of the limits, such as "score_range"
    limits: [lowest, highest], or None

    ValueError, by the names of the settings, otherwise.
    """
    if kind != "range":
        if limits is not None:
            raise ValueError(
                f"{limits_name}={limits} is only read with {map_name}: range, not {kind}"
            )
        return
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        raise ValueError(f"{map_name}=range needs {limits_name}: [lo, hi], not {limits!r}")
    lowest = check_number(limits_name, limits[0])
    highest = check_number(limits_name, limits[1])
    if not lowest < highest:
        raise ValueError(f"{limits_name}={limits} must rise from the lowest to the highest value")
