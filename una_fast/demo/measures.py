"""Measures of an answer by a program: the form, and the words in common with another text."""

from __future__ import annotations

import re
from collections import Counter

_END = re.compile(r"[.!?](?=\s|$)")
_WORD = re.compile(r"[a-z0-9]+")

FEW_WORDS = 20
MANY_WORDS = 40


def is_one_sentence(text: str) -> bool:
    """Return whether a text is a single sentence, full stop included."""
    text = text.rstrip()
    return text[-1:] in (".", "!", "?") and len(_END.findall(text)) == 1


def first_sentences(text: str) -> str:
    """Return a text up to the end of the last whole sentence; a text without any stays whole."""
    ends = [found.end() for found in _END.finditer(text)]
    return text[: ends[-1]] if ends else text


def brevity(text: str) -> float:
    """Return 1 for at most FEW_WORDS words, falling to 0 at MANY_WORDS."""
    words = len(text.split())
    return min(max((MANY_WORDS - words) / (MANY_WORDS - FEW_WORDS), 0.0), 1.0)


def names_function(text: str, name: str) -> bool:
    """Return whether a text has the name of a function.

    text: an answer
    name: of the function, with the module, such as "textwrap.dedent"
    """
    return name.rpartition(".")[2] in text


def overlap(text: str, written: str) -> float:
    """Return the F1 of words: twice the common words over the words of both texts.

    Words are compared in lower case, as often as they stand in both.
    """
    words = Counter(_WORD.findall(text.lower()))
    wanted = Counter(_WORD.findall(written.lower()))
    common = (words & wanted).total()
    return 2 * common / max(words.total() + wanted.total(), 1)
