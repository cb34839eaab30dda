"""Rewards of the online demo: what a program can check of a docstring, given the prompt that it follows (demo_text.py).

Each is a function as the setting `rewards` takes them: f(prompts, completions) -> one number in [0, 1] per completion.
"""

from __future__ import annotations

import itertools
import re

WORDS = (5, 20)
"""Shortest and longest first sentence that is well formed, in words."""
_WORD = re.compile(r"[a-z0-9]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def names_the_object(prompts: list[str], completions: list[str]) -> list[float]:
    """Share of the words of the object's name, as the prompt's first line spells it out, that the docstring has."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        name = _words(prompt.split("\n")[0].rpartition(":")[2])
        said = set(_words(completion))
        rewards.append(sum(word in said for word in name) / max(len(name), 1))
    return rewards


def well_formed(prompts: list[str], completions: list[str]) -> list[float]:
    """A third each for a capital letter at the start, a full stop at the end, and a usual length."""
    del prompts
    rewards = []
    for text in completions:
        checks = text[:1].isupper(), text.endswith("."), WORDS[0] <= len(text.split()) <= WORDS[1]
        rewards.append(sum(checks) / 3)
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
