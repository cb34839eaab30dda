"""Outcomes of rewards: a number, or the reason for a missing number; texts for messages."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from una_fast.printable import printable, without_secrets

PromptText = str | list[dict[str, Any]]
"""Plain text, or chat messages."""

EXCERPT = 200  # characters of an answer in a message

LONGEST_INT = 4000  # bits; Python does not write longer integers as decimals

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
SHORTEST_SECRET = 8  # characters; shorter values of such variables are words like "true"


@dataclass(frozen=True)
class Failure:
    """The reason for a sample without a reward.

    reason: a short text; failures are counted by reason
    detail: an excerpt of the answer, logged with the first failure of a reason
    passes: a server's failure that may be over soon
    """

    reason: str
    detail: str = ""
    passes: bool = False


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

    True is 1.0 and False is 0.0, as of a verifier.
    """
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf


def chat_text(messages: Iterable[dict[str, Any]]) -> str:
    """Return chat messages as lines of text, such as "user: Hi".

    Parts of text are joined; tool calls and other contents are written as JSON.
    """
    lines = []
    for message in messages:
        texts = []
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if text is None and part is not None:
                text = json.dumps(plain_json(part), ensure_ascii=False)
            if text is not None:
                texts.append(str(text))
        if message.get("tool_calls"):
            texts.append(json.dumps(plain_json(message["tool_calls"]), ensure_ascii=False))
        lines.append(f"{message.get('role', 'unknown')}: {' '.join(texts)}")
    return "\n".join(lines)


def plain_json(value: Any) -> Any:
    """Return a value of a record as JSON holds it.

    NaN and infinities become None, dates ISO 8601, decimals and fractions floats, bytes text,
    arrays lists, and anything else its str().
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < LONGEST_INT else hex(value)
    if isinstance(value, (float, Decimal, Fraction)):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", errors="backslashreplace")
    if hasattr(value, "tolist"):  # scalars and arrays of NumPy, tensors
        return plain_json(value.tolist())
    return str(value)


def redacted(text: object, secrets: Iterable[str] = ()) -> str:
    """Return a foreign text for a message: one printable line of bounded length, without secrets.

    secrets: texts that must not be seen; besides, values of environment variables that are named
        like keys, and the secrets of URLs, are left out
    """
    try:
        whole = text if isinstance(text, str) else str(text)
    except Exception:  # an exception's own __str__ may raise
        return printable(text)
    hidden = {secret for secret in secrets if secret}
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and any(word in name.upper() for word in SECRET_NAMES):
            hidden.add(value)
    for secret in sorted(hidden, key=len, reverse=True):  # a secret may hold another
        whole = whole.replace(secret, "***")
    return printable(without_secrets(whole[: 20 * EXCERPT]), EXCERPT)


def excerpt(value: object, secrets: Iterable[str] = ()) -> str:
    """Return the beginning of a parsed JSON value, or of a text, as `redacted` shows it."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):  # an int of thousands of digits
            value = f"a {type(value).__name__}"
    return redacted(value, secrets)


def basic_secret(user: str, password: str) -> str:
    """Return the form in which a user and a password of a URL are sent to a server."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()
