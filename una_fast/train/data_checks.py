"""Checks that the data of a run go with the model: token ids, padding and positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from una_fast.data.examples import Example, Prompt
from una_fast.logs import say_once
from una_fast.model.loading import set_padding
from una_fast.model.policy import Policy
from una_fast.model.positions import longer_records, positions_of
from una_fast.printable import shown

logger = logging.getLogger(__name__)


def check_data(
    records: Sequence[Example],
    prompts: Sequence[Prompt],
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 0,
) -> None:
    """Check that a model has embeddings and positions for all data of a run.

    records: to be scored
    prompts: to be sampled from
    policy: of the run, not sharded yet
    tokenizer: of the policy; pads with another token from now on, if the model lacks its pad token
    max_new_tokens: tokens that are sampled for a prompt

    ValueError, by the record, for a token or a position that the model does not have.
    """
    check_token_ids([*records, *prompts], policy)
    fit_padding(tokenizer, policy)
    longer_records(records, policy.causal_lm)
    check_room(prompts, policy, max_new_tokens)


def check_token_ids(examples: Sequence[Example], policy: Policy) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has embeddings."""
    size = _num_embeddings(policy)
    for example in examples:
        largest = max(int(ids.max()) for ids in (example.prompt_ids, *example.responses))
        if largest >= size:
            raise ValueError(
                f"{example.origin}: the tokenizer gives token {largest}, but the model has "
                f"{size} embeddings; set tokenizer to the model's own"
            )


def fit_padding(tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
    """Pad with a token that the model has; lengths mark padding, and the saved tokenizer stays."""
    size = _num_embeddings(policy)
    if tokenizer.pad_token_id < size:
        return
    pad = tokenizer.eos_token_id if tokenizer.eos_token_id < size else 0
    message = (
        f"the pad token {shown(tokenizer.pad_token)} has the id {tokenizer.pad_token_id}, beyond "
        f"the {size} embeddings of the model; token {pad} pads in its place"
    )
    set_padding(tokenizer, tokenizer.convert_ids_to_tokens(pad))
    say_once(logging.WARNING, message, logger)


def _num_embeddings(policy: Policy) -> int:
    return policy.causal_lm.get_input_embeddings().weight.shape[0]


def check_room(prompts: Sequence[Prompt], policy: Policy, max_new_tokens: int) -> None:
    """Raise ValueError for a prompt without positions of the model for a whole response."""
    positions = positions_of(policy.causal_lm)
    if positions is None:
        return
    for prompt in prompts:
        tokens = len(prompt.prompt_ids)
        if tokens + max_new_tokens > positions:
            raise ValueError(
                f"{prompt.origin}: a prompt of {tokens} tokens and "
                f"max_new_tokens={max_new_tokens} are over the {positions} positions of the "
                f"model; lower max_new_tokens, or set max_tokens={positions} and "
                "prompt_overflow: truncate_left"
            )
