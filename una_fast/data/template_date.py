"""A fixed date for chat templates that print today's.

The templates of Llama 3.1 and 3.2, among others, call `strftime_now("%d %b %Y")`. A run that is
resumed on another day would tokenise its records differently.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKS_FOR_TODAY = "strftime_now"

# Every directive of strftime, and the forms without padding that templates use (%-d).
_DIRECTIVES = (*"aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ", "-d", "-m", "-e", "-H", "-I", "-j")


def fix_template_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Make the chat template of a tokenizer print a given date in place of today's.

    tokenizer: renders its chats with the date from now on; a second call replaces the date
    date: ISO date, such as "2026-11-28"; the time of day is 00:00

    Only what `strftime_now` returns is fixed: a `date_string` or any other variable of a template
    has no clock behind it. The template itself, and the tokenizer as saved, stay as they are.
    ValueError for anything but an ISO date.
    """
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    # Not a bound method: a copy of the tokenizer then renders with its own template.
    original = type(tokenizer).get_chat_template
    tokenizer.get_chat_template = functools.partial(_dated, original, tokenizer, _own_clock(day))


def _dated(
    original: Callable[..., str],
    tokenizer: PreTrainedTokenizerBase,
    clock: str,
    *args: Any,
    **settings: Any,
) -> str:
    """Return the template that a tokenizer renders now, with a clock of its own if it asks.

    original: `get_chat_template` of the tokenizer's class
    tokenizer: has the template
    clock: definition of `strftime_now`
    args, settings: of `original`
    """
    template = original(tokenizer, *args, **settings)
    return clock + template if _ASKS_FOR_TODAY in template else template


def _own_clock(day: datetime.datetime) -> str:
    """Return the definition of `strftime_now` as the first line of a template.

    transformers gives templates a `strftime_now` of its own, and lets callers pass data only. A
    macro of the same name hides it. The line break at the end is dropped by `trim_blocks`.
    """
    percent = "%%"
    swaps = [(percent, "\0")]
    for directive in _DIRECTIVES:
        swaps.append((f"%{directive}", day.strftime(f"%{directive}")))
    swaps.append(("\0", "%"))
    filters = "".join(f" | replace({_quoted(old)}, {_quoted(new)})" for old, new in swaps)
    body = "{{ format" + filters + " }}"
    return "{% macro " + _ASKS_FOR_TODAY + "(format) %}" + body + "{% endmacro %}\n"


def _quoted(text: str) -> str:
    """Return a text as a string literal of a template."""
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'
