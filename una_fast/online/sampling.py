"""Samples: prompts -> K completions per prompt, as token ids, trained on unchanged.

A sampler draws from the policy as the policy is at the call. Sampled ids are never tokenised again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from una_fast.data.encode import text_after_answer


class SamplerError(RuntimeError):
    """The sampler failed; the run cannot go on."""


class ServerError(SamplerError):
    """The server that samples failed, or serves other weights: known to all ranks."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the samples.

    samples: completions per prompt
    max_new_tokens: longest completion
    temperature: tokens are drawn from softmax(logits / temperature)
    top_p: the distribution is cut to the smallest set of tokens of this probability
    stop_ids: a completion ends with any of these tokens
    stop_strings: a completion ends with the token that completes any of these texts
    """

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sample.

    ids: [R] int32, R >= 1, stop token included
    finished: the sample ended by a stop token or text, not by max_new_tokens
    logp: sum of the sampler's log-probs of `ids`, at the sampling temperature and before any
        cut by top_p
    version: of the policy that drew the sample, in optimizer steps
    """

    ids: np.ndarray
    finished: bool
    logp: float
    version: int


class Sampler(Protocol):
    """Draws completions from the policy as the policy is at the call."""

    sampling: Sampling

    def sample(
        self,
        prompts: Sequence[np.ndarray],
        *,
        seed: int,
        samples: int | None = None,
        version: int = 0,
    ) -> list[list[Completion]]:
        """Return the completions of every prompt.

        prompts: [P] int32 token ids each
        seed: equal seed, prompts and policy give equal samples
        samples: per prompt; None: the number in `sampling`
        version: optimizer steps that the policy has taken

        SamplerError where sampling fails.
        """
        ...


def drawn_at(temperature: float) -> dict[str, Any]:
    """Return the settings of transformers' `generate` for a temperature.

    temperature: tokens are drawn from the whole distribution; 0 takes the likeliest tokens
    """
    if temperature == 0.0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """Return the tokens that end a response, sorted.

    Namely the tokenizer's EOS, the EOS tokens of the model's generation config, and the end of turn
    of the chat template if the end of turn is a single token.
    """
    found = {tokenizer.eos_token_id}
    of_model = model.generation_config.eos_token_id
    if isinstance(of_model, list):
        found.update(of_model)
    elif of_model is not None:
        found.add(of_model)
    if tokenizer.chat_template:
        ids = tokenizer(_end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            found.update(ids)
    return tuple(sorted(found))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of turn of the chat template, without white space, or ""."""
    try:
        end, _ = text_after_answer(tokenizer, [{"role": "user", "content": "a"}])
    except ValueError:  # a template that refuses these turns, for prompts that may be plain text
        return ""
    return end.strip()


def completion_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    completion: Completion,
    sampling: Sampling,
) -> str:
    """Return the text that rewards get: the text that a completion adds to the prompt's text.

    tokenizer: of the policy
    prompt: [P] int32 token ids
    completion: a sample of the prompt
    sampling: names the stop tokens

    The stop token and special tokens are left out. Prompt and completion are decoded together:
    some decoders take a space from the start of a text.
    """
    ids = _without_stop(completion, sampling)
    return _added_text(tokenizer, prompt, ids, skip_special_tokens=True)


# The tag of a thought at the end of a prompt: <think>, <thinking>, <seed:think>, [THINK] and such.
OPENED = re.compile(r"[<\[]/?[\w|:]{0,20}(?:think|thought|reason)[\w|:]{0,20}[>\]]\s*\Z", re.I)
LONGEST_TAG = 80  # characters, white space behind it included


def whole_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    completion: Completion,
    sampling: Sampling,
) -> str:
    """Return the text of a completion as the policy wrote it, for rewards that ask for it.

    Parameters as in `completion_text`. Special tokens are kept, but for the stop token; where the
    prompt ends with the opening tag of a thought, which the chat template wrote, the text begins
    with the tag.
    """
    ids = _without_stop(completion, sampling)
    text = _added_text(tokenizer, prompt, ids, skip_special_tokens=False)
    tail = tokenizer.decode(prompt, skip_special_tokens=False)[-LONGEST_TAG:]
    tag = OPENED.search(tail)
    if tag is None or "/" in tag[0]:  # a thought that is closed already
        return text
    return tag[0] + text


def _without_stop(completion: Completion, sampling: Sampling) -> np.ndarray:
    ids = completion.ids
    return ids[:-1] if ids[-1] in sampling.stop_ids else ids


def _added_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    ids: np.ndarray,
    *,
    skip_special_tokens: bool,
) -> str:
    """Return the text that token ids add to the text of a prompt."""
    special = {"skip_special_tokens": skip_special_tokens}
    before = tokenizer.decode(prompt, **special)
    whole = tokenizer.decode(np.concatenate([prompt, ids]), **special)
    if whole.startswith(before):
        return whole[len(before) :]
    # A character that begins in the prompt's last token belongs to neither text.
    return tokenizer.decode(ids, **special)
