"""Maps of scores and rewards into [0, 1]: a declared range, a sigmoid, or mid-ranks.

Scores of records and rewards of sampled responses go through the same maps. The numbers do not
depend on the machine: the maps compute in Python floats.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal

ScoreMap = Literal["none", "range", "sigmoid", "quantile"]


def to_range(value: float, lowest: float, highest: float) -> float:
    """Return the position of a value between two limits: 0 at `lowest`, 1 at `highest`."""
    return (value - lowest) / (highest - lowest)


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)); large values of either sign do not overflow."""
    return 0.5 + 0.5 * math.tanh(0.5 * value)


def mid_ranks(values: Sequence[float], among: Sequence[float]) -> list[float]:
    """Return the mid-rank of every value: the share of `among` below, and half the share of equals.

    values: [S] finite numbers
    among: [M] finite numbers, M >= 1 unless S = 0, in any order

    Example: mid_ranks([1, 5], among=[1, 5, 5, 9]) is [1/8, 1/2].
    """
    ranked = sorted(among)
    count = len(ranked)
    ranks = []
    for value in values:
        below = bisect.bisect_left(ranked, value)
        up_to = bisect.bisect_right(ranked, value)
        ranks.append((below + up_to) / (2 * count))
    return ranks
