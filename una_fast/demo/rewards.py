"""Rewards of the online demo: checks of an answer by a program.

Every reward is a function for the setting `rewards`:

    f(completions, **columns of the records) -> a number in [0, 1] per completion
"""

from __future__ import annotations

from una_fast.demo.measures import brevity, is_one_sentence, names_function


def one_sentence(completions: list[str]) -> list[float]:
    """Return 1 for an answer of one whole sentence, else 0."""
    return [float(is_one_sentence(text)) for text in completions]


def brief(completions: list[str]) -> list[float]:
    """Return 1 for at most 20 words, falling to 0 at 40."""
    return [brevity(text) for text in completions]


def names_the_function(completions: list[str], function: list[str]) -> list[float]:
    """Return 1 for an answer with the name of the function, else 0."""
    pairs = zip(completions, function, strict=True)
    return [float(names_function(text, name)) for text, name in pairs]
