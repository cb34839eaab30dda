"""Rewards for the tests of online runs, given to them as `reward_functions.py:name`."""

from __future__ import annotations

calls: list[dict] = []
"""The arguments of every call."""


def share_of_e(prompts, completions, **columns):
    calls.append({"prompts": prompts, "completions": completions, **columns})
    return [text.count("e") / max(len(text), 1) for text in completions]


def length(prompts, completions):
    return [len(text) / 100 for text in completions]


def some(prompts, completions):
    """Return None for texts of even length, and NaN for a few others."""
    rewards = []
    for text in completions:
        if len(text) % 2 == 0:
            rewards.append(None)
        elif len(text) % 5 == 0:
            rewards.append(float("nan"))
        else:
            rewards.append(0.5)
    return rewards


def nothing(prompts, completions):
    return [None] * len(completions)


def not_for_the_cat(prompts, completions):
    return [None if prompt == "the cat" else 0.5 for prompt in prompts]


def needs_answer(prompts, completions, answer):
    return [0.5 if a is None else 1.0 for a in answer]


def equal(prompts, completions):
    return [0.25] * len(completions)


def late_failure(prompts, completions):
    """Fail in the sixth call."""
    calls.append({})
    if len(calls) == 6:
        raise KeyError("gone")
    return length(prompts, completions)
