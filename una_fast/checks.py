"""Refusals of single settings, written once."""

from __future__ import annotations

import math


def check_number(name: str, value: object, else_allowed: str = "") -> float:
    """The value of an option, if it is a finite number; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be {else_allowed}a finite number")
    return value
