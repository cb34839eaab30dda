"""Refusals of settings: types, choices, bounds and numbers, each written once."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from una_fast.printable import printable, shown

LARGEST = 2**63 - 1  # whole numbers are kept in 64 bits by torch, numpy and Arrow

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
}


def check_types(settings: Any) -> None:
    """Check every field of a dataclass against its annotation; ValueError by the field's name.

    Numbers are finite, whole numbers fit into 64 bits, and texts can be written in UTF-8.
    """
    for name, hint in field_types(type(settings)).items():
        problem = mismatch(name, getattr(settings, name), hint)
        if problem:
            raise ValueError(problem)


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the annotations of the fields of a dataclass, evaluated, in the order of fields."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def described(hint: Any) -> str:
    """Return an annotation in words: "a whole number or null"."""
    if hint in _NAMES:
        return _NAMES[hint]
    origin = get_origin(hint)
    members = get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, members))
    if origin in (Union, types.UnionType):
        return " or ".join(described(member) for member in members)
    if origin is tuple:
        return f"a list of {len(members)}: {', '.join(described(member) for member in members)}"
    if origin is list:
        return f"a list with entries of {described(members[0])}"
    if origin is dict:
        return "a mapping of names"
    if is_dataclass(hint):
        return f"a mapping of {', '.join(field_types(hint))}"
    return "null, true, false, a number, a text, a list or a mapping"


def mismatch(name: str, value: Any, hint: Any) -> str | None:
    """Return why a value does not fit an annotation, for a message; None if the value fits.

    name: the setting; an entry of a list is named `name[3]`, a key of a mapping `name.key`
    value: plain values; a mapping in the place of a dataclass is checked by the fields
    hint: bool, int, float, str, None, Literal, list, tuple, dict, a dataclass, Any, or a union
    """
    origin = get_origin(hint)
    members = get_args(hint)
    if origin in (Union, types.UnionType):
        return _mismatch_of_union(name, value, members, hint)
    if origin is Literal:
        return None if value in members else _not_one_of(name, value, members)
    if origin is list and isinstance(value, (list, tuple)):
        return _first_mismatch(name, value, members * len(value))
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(members):
        return _first_mismatch(name, value, members)
    if origin is dict and isinstance(value, dict):
        return _mismatch_of_mapping(name, value, dict.fromkeys(value, members[1]))
    if is_dataclass(hint) and isinstance(value, hint):
        return None  # checked when it was built
    if is_dataclass(hint) and isinstance(value, dict):
        return _mismatch_of_mapping(name, value, field_types(hint))
    if hint is Any:
        return _not_plain(name, value)
    if origin is None and _fits(value, hint):
        return _not_text(name, value) if hint is str else None
    return _not_a(name, value, hint)


def _not_a(name: str, value: Any, hint: Any) -> str:
    """Return the refusal of a value of another type."""
    quotes = ""
    if hint is str and isinstance(value, (bool, int, float)):
        quotes = " (put it in quotes)"
    elif hint in (int, float) and isinstance(value, str) and _reads_as_number(value):
        quotes = " (take the quotes away)"
    return f"{name}={as_given(value)} must be {described(hint)}{quotes}"


def as_given(value: Any) -> str:
    """Return a value for a message, as it stands in YAML if it is null, true or false."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return shown(value)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _fits(value: Any, hint: type) -> bool:
    """Return whether a value is one of bool, int, float, str or None, as asked; 1 is a float."""
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, int) and abs(value) <= LARGEST
    if hint is float:
        return _is_number(value)
    return isinstance(value, hint)


def _is_number(value: object) -> bool:
    """Return whether a value is a finite float, or a whole number of 64 bits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def _mismatch_of_union(name: str, value: Any, members: tuple[Any, ...], hint: Any) -> str | None:
    found = [mismatch(name, value, member) for member in members]
    if None in found:
        return None
    # A list in the place of a list is at fault by an entry, which the message names.
    for member, problem in zip(members, found, strict=True):
        kind = dict if is_dataclass(member) else get_origin(member) or member
        if kind in (list, dict, str) and isinstance(value, kind):
            return problem
    return _not_a(name, value, hint)


def _first_mismatch(name: str, values: Iterable[Any], hints: Iterable[Any]) -> str | None:
    for number, (value, hint) in enumerate(zip(values, hints, strict=True)):
        problem = mismatch(f"{name}[{number}]", value, hint)
        if problem:
            return problem
    return None


def _mismatch_of_mapping(name: str, values: dict[Any, Any], hints: dict[str, Any]) -> str | None:
    for key, value in values.items():
        if not isinstance(key, str):
            return f"{name}: the key {shown(key)} must be a text (put it in quotes)"
        if key not in hints:
            return f"{name}: {shown(key)} is not one of {', '.join(hints)}"
        problem = _not_text(f"a key of {name}", key)
        problem = problem or mismatch(f"{name}.{printable(key)}", value, hints[key])
        if problem:
            return problem
    return None


def _not_plain(name: str, value: Any) -> str | None:
    """Return why a value is no plain value, to be written as YAML or JSON; None if it is."""
    if isinstance(value, str):
        return _not_text(name, value)
    if isinstance(value, (list, tuple)):
        return _first_mismatch(name, value, [Any] * len(value))
    if isinstance(value, dict):
        return _mismatch_of_mapping(name, value, dict.fromkeys(value, Any))
    if value is None or isinstance(value, bool) or _is_number(value):
        return None
    return f"{name}={shown(value)} must be {described(Any)}, finite"


def _not_text(name: str, value: str) -> str | None:
    """Return why a text can be in no file or path; None if it can."""
    if "\0" in value:
        return f"{name}={shown(value)} holds a NUL character; remove it"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name}={shown(value)} cannot be written in UTF-8; give text in UTF-8"
    return None


def check_number(name: str, value: object) -> float:
    """Return the value of a setting if the value is a finite number.

    name: the setting, for the error
    value: the value; True and False are no numbers

    ValueError, by the name, otherwise.
    """
    if not _is_number(value):
        raise ValueError(f"{name}={as_given(value)} must be a finite number")
    return value


def check_one_of(name: str, value: object, choices: Iterable[Any]) -> None:
    """Check that the value of a setting is among its choices; ValueError otherwise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(_not_one_of(name, value, choices))


def _not_one_of(name: str, value: object, choices: tuple[Any, ...]) -> str:
    return f"{name}={as_given(value)} is not one of {', '.join(map(str, choices))}"


def check_choices(settings: Any, names: Iterable[str] | None = None) -> None:
    """Check the fields of a dataclass with a Literal as annotation.

    settings: an instance of the dataclass
    names: the fields to check; default: all; fields with other annotations pass

    ValueError, by the field's name, for a value outside the Literal.
    """
    hints = field_types(type(settings))
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
                f"{limits_name}={shown(limits)} is only read with {map_name}: range, not {kind}"
            )
        return
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        raise ValueError(f"{map_name}=range needs {limits_name}: [lo, hi], not {shown(limits)}")
    lowest = check_number(limits_name, limits[0])
    highest = check_number(limits_name, limits[1])
    if not lowest < highest:
        raise ValueError(f"{limits_name}={limits} must rise from the lowest to the highest value")
