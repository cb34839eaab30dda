"""Text for a terminal, a page or a message: one line, no control characters, of bounded length.

Column names, values of records and replies of servers come from elsewhere: an escape sequence among
them would act on the reader's terminal, and a line break would forge a line of a log or a card.
"""

from __future__ import annotations

import re
import reprlib

LONGEST = 200  # characters of a foreign value in a message
LONGEST_LINE = 1500  # of a message

# Of a URL: user:password@, whatever the password holds, every value of a query (?key=...,
# &token=...), and a query that is a value alone.
_URL = re.compile(r"://\S+")
_PASSWORD = re.compile(r"(?<=://)(?:[^/?#\s:]*:[^/\s]*|[^/?#\s]*)@")
_QUERY_VALUE = re.compile(r"([?&][^=&\s#'\"]+)=[^&\s#'\"]*")
_QUERY_ALONE = re.compile(r"(://[^\s'\"?#]*\?)[^=&\s#'\"]+(?![^&\s#'\"])")

# A secret by its name in a query without a host, such as the target of a request.
_SECRET = re.compile(
    r"(?i)([?&][^=&\s#'\"]*(?:key|token|secret|passw|auth|sig|credential)[^=&\s#'\"]*)=[^&\s#'\"]*"
)

_REDACTED = re.compile(r"://\*\*\*@|\?\*\*\*|[?&][^=&\s#'\"]+=\*\*\*(?![^&\s#'\"])")


def printable(text: object, longest: int = LONGEST) -> str:
    """Return a text as one line that is safe to print.

    text: any object; str(text) is shown
    longest: characters to keep; the rest is counted at the end of the line

    Everything that `str.isprintable` denies (control and format characters, line separators,
    lone surrogates) is written as in a Python literal, such as \\x1b.
    """
    whole = text if isinstance(text, str) else _text_of(text)
    kept = whole[:longest]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    left_out = len(whole) - len(kept)
    return f"{shown}… ({left_out} more characters)" if left_out else shown


def printable_lines(text: str) -> str:
    """Return a text of several lines that is safe to print, whole, with the lines as they are."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """Return a character as in a Python literal; a tab stays one."""
    return character if character == "\t" else character.encode("unicode_escape").decode()


def shown(value: object) -> str:
    """Return the repr of a foreign value for a message, cut in its inside, safe to print.

    Never raises, and takes a bounded time for values of any size and depth.
    """
    return printable(_REPR.repr(value))


def told(text: object) -> str:
    """Return a message as one line for a terminal or a log: printable, without secrets, bounded."""
    whole = text if isinstance(text, str) else _text_of(text)
    return printable(" ".join(without_secrets(whole).split("\n")), LONGEST_LINE)


def bytes_in_words(size: float) -> str:
    """Return bytes in GiB, or in MiB below a tenth of one."""
    if abs(size) >= 2**30 / 10:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.2f} MiB"


def without_secrets(text: str) -> str:
    """Return a text with the user, the password and the query values of its URLs left out."""
    return _SECRET.sub(r"\1=***", _URL.sub(_url_without_secrets, text))


def _url_without_secrets(found: re.Match[str]) -> str:
    url = _QUERY_VALUE.sub(r"\1=***", _PASSWORD.sub("***@", found[0]))
    return _QUERY_ALONE.sub(r"\1***", url)


def was_redacted(value: object) -> bool:
    """Return whether a plain value holds a URL that went through `without_secrets`."""
    if isinstance(value, str):
        return "://" in value and _REDACTED.search(value) is not None
    if isinstance(value, dict):
        return any(was_redacted(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(was_redacted(item) for item in value)


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # an exception's own __str__ may raise
        return f"<{type(value).__name__} without a text ({type(error).__name__})>"


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = LONGEST // 2

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        if value.bit_length() > 4000:
            return f"<an integer of {value.bit_length()} bits>"
        return super().repr_int(value, level)


_REPR = _Repr()
