"""Describe a model: head, rows, tokenizer, template and a rendered record: `una-fast check`."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from una_fast.attention.probe import packing_refusal
from una_fast.data.encode import Encoder
from una_fast.data.examples import Example
from una_fast.data.records import Record
from una_fast.data.settings import RecordOptions
from una_fast.feedback import Feedback
from una_fast.guide.data_view import example_lines
from una_fast.guide.settings import CheckConfig
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import load_policy
from una_fast.model.positions import positions_of
from una_fast.printable import shown

QUESTION = "What is the capital of France?"
ANSWER = "Paris."


def model_lines(settings: CheckConfig) -> list[str]:
    """Return what a run would find about a model, as lines."""
    own_code = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(settings.model, **own_code)
    policy = load_policy(settings.model, dtype=torch.float32, **own_code)
    head = policy.head
    vocab, hidden = head.weight.shape
    refusal = packing_refusal(policy.causal_lm)
    rows = "packed, the prompt once" if refusal is None else f"padded, not packed: {refusal}"
    template = "a chat template" if tokenizer.chat_template else "no chat template: plain text"
    positions = positions_of(policy.causal_lm)
    return [
        f"model: {type(policy.causal_lm).__name__}, tokenizer of {len(tokenizer)} tokens",
        f"head: {vocab} x {hidden}, softcap {head.softcap}, logit scale {head.logit_scale:g}",
        f"rows: {rows}",
        f"context: {positions or 'an unknown number of'} tokens",
        f"tokens: eos {_token(tokenizer, 'eos')}, pad {_token(tokenizer, 'pad')}, "
        f"bos {_token(tokenizer, 'bos')}",
        f"template: {template}; a record is rendered as",
        *_rendered(tokenizer),
    ]


def _token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return a special token with its id. name: eos, pad or bos"""
    token = getattr(tokenizer, f"{name}_token")
    return "none" if token is None else f"{shown(token)} ({getattr(tokenizer, f'{name}_token_id')})"


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the lines of a made-up record, as `una-fast data` shows them."""
    record = Record(QUESTION, (ANSWER,))
    if tokenizer.chat_template:
        question = [{"role": "user", "content": QUESTION}]
        record = Record(question, ([{"role": "assistant", "content": ANSWER}],))
    encoded = Encoder(tokenizer, RecordOptions()).encode(record)
    responses = tuple(np.asarray(ids) for ids in encoded.responses)
    feedback = Feedback.binary([0], [True])
    example = Example(encoded.prompt, responses, feedback, None, "")
    _, *lines = example_lines(example, tokenizer, coloured=False)
    return [f"  {line}" for line in lines]
