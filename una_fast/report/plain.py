"""Plain values of files in words; a file of another version may hold anything."""

from __future__ import annotations

import json
import math
from typing import Any

from una_fast.printable import bytes_in_words


def text_of(value: Any) -> str:
    """Return a plain value as text: texts unchanged, everything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def list_of(value: Any) -> list[Any]:
    """Return a list unchanged, and an empty list for everything else."""
    return value if isinstance(value, list) else []


def mapping_of(value: Any) -> dict[str, Any]:
    """Return a mapping unchanged, and an empty mapping for everything else."""
    return value if isinstance(value, dict) else {}


def mappings_of(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list."""
    return [entry for entry in list_of(value) if isinstance(entry, dict)]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and abs(value) < 1e300 and math.isfinite(value)


def count_of(value: Any) -> int:
    """Return a count; 0 for everything but numbers."""
    return int(value) if is_number(value) else 0


def number_in_words(value: Any) -> str:
    """Return a number with four digits; a dash for everything else, and nan and inf by name."""
    if is_number(value):
        return f"{value:.4g}"
    return str(value) if isinstance(value, float) else "–"


def size_in_words(value: Any) -> str:
    """Return bytes in GiB or MiB; a dash for everything but numbers."""
    return bytes_in_words(value) if is_number(value) else "–"


def flat(settings: dict[str, Any]) -> dict[str, str]:
    """Return settings as texts by name; settings within settings are named `lora.r`."""
    texts = {}
    for name, value in settings.items():
        parts = {str(name): value}
        if isinstance(value, dict) and value:
            parts = {f"{name}.{inner}": part for inner, part in value.items()}
        texts |= {key: text_of(part) for key, part in parts.items()}
    return texts
