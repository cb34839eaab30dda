"""How often a host's calls reached the fused head, and how often they fell back to the host's."""

from __future__ import annotations

import logging
from collections import Counter

from una_fast.logs import say_once

logger = logging.getLogger(__name__)

_counts: Counter[str] = Counter()


def una_calls() -> dict[str, int]:
    """Return the calls of this process by kind.

    packed: forwards of one row that shares prompts
    padded: forwards of the batch as it came
    fell_back: forwards of the host's own head
    """
    return {kind: _counts[kind] for kind in ("packed", "padded", "fell_back")}


def count_call(kind: str) -> None:
    """Count one call of a kind of `una_calls`."""
    _counts[kind] += 1


def fall_back(host: str, reason: str) -> None:
    """Count a call that the host's own head serves, and say the reason once."""
    _counts["fell_back"] += 1
    say_once(logging.WARNING, f"una_fast leaves this call to {host}: {reason}", logger)
