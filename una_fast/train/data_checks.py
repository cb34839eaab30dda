"""Checks that the data of a run go with the model: token ids and positions."""

from __future__ import annotations

from collections.abc import Sequence

from una_fast.data.examples import Example, Prompt
from una_fast.model.policy import Policy


def check_token_ids(examples: Sequence[Example], policy: Policy) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has embeddings."""
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for example in examples:
        largest = max(int(ids.max()) for ids in (example.prompt_ids, *example.responses))
        if largest >= size:
            raise ValueError(
                f"{example.origin}: the tokenizer gives token {largest}, but the model has "
                f"{size} embeddings; set tokenizer to the model's own"
            )


def check_room(prompts: Sequence[Prompt], policy: Policy, max_new_tokens: int) -> None:
    """Raise ValueError for a prompt without positions of the model for a whole response."""
    positions = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
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
