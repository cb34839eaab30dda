"""Rewards of the online demo: what a program can check of a docstring, given the prompt that it follows (demo_text.py).

Each is a function as the setting `rewards` takes them: f(prompts, completions) -> one number in [0, 1] per completion.
"""

from __future__ import annotations

import functools
import itertools
import re

WORDS = (4, 15)
"""Shortest and longest docstring that is well formed, in words."""
VERBS = frozenset(
    (
        *(
            "add",
            "build",
            "call",
            "check",
            "clear",
            "close",
            "compare",
            "compute",
            "convert",
            "copy",
            "create",
        ),
        *(
            "decode",
            "delete",
            "display",
            "encode",
            "find",
            "format",
            "generate",
            "get",
            "handle",
            "initialize",
        ),
        *(
            "insert",
            "load",
            "make",
            "open",
            "parse",
            "print",
            "raise",
            "read",
            "register",
            "remove",
            "return",
            "run",
        ),
        *("save", "send", "set", "start", "stop", "test", "update", "wait", "write"),
    )
)
"""What an imperative of PEP 257 is likely to begin with."""
_WORD = re.compile(r"[a-z0-9]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Words of Python's own documentation, which is part of the standard library."""
    from pydoc_data.topics import topics

    return frozenset(_words(" ".join(topics.values())))


def known_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the docstring's words that Python's documentation or the prompt uses too."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words, known = _words(completion), _vocabulary() | set(_words(prompt))
        rewards.append(sum(word in known for word in words) / max(len(words), 1))
    return rewards


def names_the_object(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the words of the object's name, as the prompt's first line spells it out, that the docstring has."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        name = _words(prompt.split("\n")[0].rpartition(":")[2])
        said = set(_words(completion))
        rewards.append(sum(word in said for word in name) / max(len(name), 1))
    return rewards


def well_formed(prompts: list[str], completions: list[str]) -> list[float]:
    """A quarter each for a capital letter and an imperative at the start, a full stop, and a usual length."""
    del prompts
    rewards = []
    for text in completions:
        verb = (_words(text) or [""])[0] in VERBS
        checks = (
            text[:1].isupper(),
            verb,
            text.endswith("."),
            WORDS[0] <= len(text.split()) <= WORDS[1],
        )
        rewards.append(sum(checks) / 4)
    return rewards


def repeats_nothing(prompts: list[str], completions: list[str]) -> list[float]:
    """Distinct words over words; and 0 where a word follows itself."""
    del prompts
    rewards = []
    for text in completions:
        words = _words(text)
        stutters = any(a == b for a, b in itertools.pairwise(words))
        rewards.append(0.0 if stutters or not words else len(set(words)) / len(words))
    return rewards
