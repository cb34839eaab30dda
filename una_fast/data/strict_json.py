"""JSON of a line of data as the standard has it: what Python reads beyond it is refused.

Refused are NaN and infinities, numbers beyond the range of float64, keys given twice, half
surrogate pairs, and nesting deeper than `DEEPEST`: none of them is data, and each breaks something
later (a tokenizer, a template, a hash of the records).
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

from una_fast.printable import printable, shown

DEEPEST = 100  # lists and objects inside one another
MOST_DIGITS = 4000  # Python converts up to 4300 digits

_HALF_PAIR = re.compile("[\ud800-\udfff]")


class JsonFault(ValueError):
    """Refusal of a text as JSON.

    fault: what is wrong and the mend
    path: keys and indices down to the fault, innermost first; empty where the place is not known
    """

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.path: list[str | int] = []

    def __str__(self) -> str:
        if not self.path:
            return self.fault
        outermost, *inner = reversed(self.path)
        steps = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in inner)
        place = printable(f"{outermost}{steps}", 80)
        return f"{place} {self.fault}"


def parse_strictly(text: str) -> Any:
    """Return the value of a JSON text; JsonFault, by the place in the value, for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise JsonFault(
            f"invalid JSON ({printable(error.msg)}, column {error.colno}); "
            "write one complete JSON object per line"
        ) from None
    except RecursionError:
        raise JsonFault(f"a value {_too_deep()}") from None
    _check(value, depth=0)
    return value


def _too_deep() -> str:
    return f"is nested deeper than {DEEPEST} levels; flatten it or remove the record"


def _integer(digits: str) -> int | float:
    """Return an integer, or an infinity in place of one too long to convert."""
    return int(digits) if len(digits) <= MOST_DIGITS else math.inf


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonFault(f"key {shown(name)} is given twice in one object; remove one")
            seen.add(name)
    return found


def _check(value: Any, depth: int) -> None:
    """Check a value and everything inside; the fault collects its path on the way up."""
    if isinstance(value, str):
        if not value.isascii() and _HALF_PAIR.search(value):
            raise JsonFault(
                f"is {shown(value)}, with half of a surrogate pair, which no file in UTF-8 can "
                "hold; mend the text or remove the record"
            )
    elif isinstance(value, (dict, list)):
        _check_inside(value, depth)
    elif isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        raise JsonFault(
            f"is {shown(value)}; it must be finite (NaN and Infinity are not JSON): write null, "
            "or leave the record out"
        )


def _check_inside(value: dict[str, Any] | list[Any], depth: int) -> None:
    if depth == DEEPEST:
        raise JsonFault(_too_deep())
    entries = enumerate(value)
    if isinstance(value, dict):
        entries = value.items()
        for key in value:
            if not key.isascii() and _HALF_PAIR.search(key):
                raise JsonFault(f"key {shown(key)} holds half of a surrogate pair; rename it")
    for key, entry in entries:
        try:
            _check(entry, depth + 1)
        except JsonFault as fault:
            fault.path.append(key)
            raise
