"""Outcomes of rewards: a number, or the reason for a missing number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PromptText = str | list[dict[str, Any]]
"""Plain text, or chat messages."""

EXCERPT = 200  # characters of an answer in a message


@dataclass(frozen=True)
class Failure:
    """The reason for a sample without a reward.

    reason: a short text; failures are counted by reason
    detail: an excerpt of the answer, logged with the first failure of a reason
    """

    reason: str
    detail: str = ""


Outcome = float | Failure


class Reward:
    """A reward of a run, as a function of samples."""

    def __call__(
        self, prompts: list[PromptText], completions: list[str], columns: dict[str, list[Any]]
    ) -> list[Outcome]:
        """Return [S] outcomes of S samples, in order.

        prompts: [S] texts or chats
        completions: [S] decoded texts
        columns: name -> [S] values, the other columns of the records

        Raises RewardError if the run cannot go on.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close connections, if the reward holds any."""


def as_number(value: object) -> float | None:
    """Return a number as a float, and a value of another kind as None.

    A bool is no number: True is more often a slip than a reward.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf
