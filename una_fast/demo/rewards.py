"""Rewards of the online demo: checks of a docstring by a program, given the prompt (text.py).

Every reward is a function for the setting `rewards`:

    f(prompts, completions) -> one number in [0, 1] per completion
"""

from __future__ import annotations

import functools
import itertools
import re

WORDS = (4, 15)
"""Shortest and longest docstring that is well formed, in words."""
_VERBS = """
    add build call check clear close compare compute convert copy create decode delete
    display encode find format generate get handle initialize insert load make open parse
    print raise read register remove return run save send set start stop test update wait
    write
"""
VERBS = frozenset(_VERBS.split())
"""First words of likely docstrings in the imperative of PEP 257."""
_WORD = re.compile(r"[a-z0-9]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Return the words of Python's own documentation, a part of the standard library."""
    from pydoc_data.topics import topics

    return frozenset(_words(" ".join(topics.values())))


def known_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the share of a docstring's words in Python's documentation or in the prompt."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = _words(completion)
        known = _vocabulary() | set(_words(prompt))
        rewards.append(sum(word in known for word in words) / max(len(words), 1))
    return rewards


def names_the_object(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the share of the words of the object's name that the docstring has.

    The first line of the prompt spells the name out.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        name = _words(prompt.split("\n")[0].rpartition(":")[2])
        said = set(_words(completion))
        rewards.append(sum(word in said for word in name) / max(len(name), 1))
    return rewards


def well_formed(prompts: list[str], completions: list[str]) -> list[float]:
    """Return a quarter for each of: capital letter, imperative, full stop, usual length."""
    del prompts
    rewards = []
    for text in completions:
        words = _words(text)
        checks = [
            text[:1].isupper(),
            bool(words) and words[0] in VERBS,
            text.endswith("."),
            WORDS[0] <= len(text.split()) <= WORDS[1],
        ]
        rewards.append(sum(checks) / len(checks))
    return rewards


def repeats_nothing(prompts: list[str], completions: list[str]) -> list[float]:
    """Return distinct words over words; 0 where a word follows itself."""
    del prompts
    rewards = []
    for text in completions:
        words = _words(text)
        reward = len(set(words)) / max(len(words), 1)
        if any(a == b for a, b in itertools.pairwise(words)):
            reward = 0.0
        rewards.append(reward)
    return rewards
