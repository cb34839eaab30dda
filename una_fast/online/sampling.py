"""Rollouts: prompts -> K sampled completions each, as token ids that are trained on as they are.

A sampler draws from the policy as it stands; nothing is ever tokenised again. Both samplers of transformers compute a
prompt once for all its samples: `padded` repeats its cache, `continuous` shares its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

if TYPE_CHECKING:
    pass


class SamplerError(RuntimeError):
    """The sampler failed; the run cannot go on."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), cut to the smallest set of tokens that has
    probability `top_p`; up to one of `stop_ids`, or the token that completes one of `stop_strings`, or
    max_new_tokens."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sample. ids: int32 [R], R >= 1, with the token that stopped it. finished: it stopped by itself. logp: sum of
    the log-probs of `ids` at the sampling temperature (whatever top_p is), as the sampler computed them. version: of
    the policy that drew it, in optimizer steps."""

    ids: np.ndarray
    finished: bool
    logp: float
    version: int


class Sampler(Protocol):
    """Draws completions from the policy as it stands.

    prompts: int32 [P] each. seed: the same seed, prompts and policy give the same samples. samples: per prompt, None
    for those of the Sampling. version: optimizer steps that the policy has taken. Returns one list per prompt.
    """

    sampling: Sampling

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]: ...


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's EOS, those that the model's generation config names, and the end of
    turn of the chat template where that is one token."""
    found = {tokenizer.eos_token_id}
    of_model = model.generation_config.eos_token_id
    found.update(of_model if isinstance(of_model, list) else [] if of_model is None else [of_model])
    if tokenizer.chat_template:
        ids = tokenizer(_end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        found.update(ids if len(ids) == 1 else [])
    return tuple(sorted(found))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts after an answer, without white space."""
    answer = "una-answer"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2].strip()
    except Exception:  # a template that refuses these turns, for prompts that may be plain text
        return ""


def completion_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    completion: Completion,
    sampling: Sampling,
) -> str:
    """The text that rewards are given: what the completion adds to the prompt's text, without the stop token and
    without special tokens. Decoded behind the prompt, since some decoders take a space from the start of a text."""
    ids = completion.ids[:-1] if completion.ids[-1] in sampling.stop_ids else completion.ids
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(np.concatenate([prompt, ids]), skip_special_tokens=True)
    # A character that begins in the prompt's last token belongs to neither: then the completion is decoded alone.
    return (
        whole[len(before) :]
        if whole.startswith(before)
        else tokenizer.decode(ids, skip_special_tokens=True)
    )
