"""Outcomes: a number, or the reason why a sample has no reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


PromptText = str | list[dict[str, Any]]

EXCERPT = 200  # characters of an answer in a message


@dataclass(frozen=True)
class Failure:
    """Why a sample has no reward: a short reason that is counted, and a detail that is logged the first time."""

    reason: str
    detail: str = ""


Outcome = float | Failure


class Reward:
    """One reward: outcomes of samples, in their order."""

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to close, unless a kind says so."""


def as_number(value: object) -> float | None:
    """A number as a float; None for anything else, bool included: True is more often a slip than a reward."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf
