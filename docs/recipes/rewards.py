"""Rewards of online.yaml: f(prompts, completions, **columns of the records) -> a number each."""

import re


def one_short_sentence(completions: list[str]) -> list[float]:
    """Return 1 for one sentence of at most 20 words, 0.5 for a longer one, else 0."""
    rewards = []
    for text in completions:
        is_sentence = re.fullmatch(r"[^.!?]*(?:[.!?]\S[^.!?]*)*[.!?]", text.strip()) is not None
        is_short = len(text.split()) <= 20
        rewards.append(0.5 * is_sentence + 0.5 * (is_sentence and is_short))
    return rewards


def names_the_function(completions: list[str], function: list[str]) -> list[float]:
    """Return 1 for an answer with the name of the function, from the column `function`."""
    names = [name.rpartition(".")[2] for name in function]
    return [float(name in text) for text, name in zip(completions, names, strict=True)]
