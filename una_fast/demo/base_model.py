"""A tokenizer and a tiny chat model, trained from nothing on docstrings of the standard library.

The model answers a question with a docstring, and a question for a single sentence with the first
sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from una_fast.demo.questions import ONE_SENTENCE, Function
from una_fast.demo.settings import Sizes

PEAK_RATE = 3e-3  # learning rate of the base model

BATCH_SIZE = 16


TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(functions: Sequence[Function], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on questions and docstrings; all texts can be written in its tokens.

    functions: documented objects
    vocab_size: number of tokens
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.chain.from_iterable((f.question, f.docstring) for f in functions)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
    )


def train_base(
    functions: Sequence[Function],
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    seed: int,
    show_progress: bool,
) -> LlamaForCausalLM:
    """Train a small Llama that answers questions with docstrings, from random weights.

    functions: documented objects
    tokenizer: with a chat template
    sizes: of the model, and epochs
    seed: of the weights and of the order of batches
    show_progress: draw a bar

    The loss is next-token cross-entropy on whole chats.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_base_config(tokenizer, sizes))
    rows = [_token_ids(chat, tokenizer) for chat in _chats(functions)]
    batches = list(_batches(rows, BATCH_SIZE, sizes.base_epochs, np.random.default_rng(seed)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    bar = tqdm(
        batches, desc="training a model", unit="step", disable=not show_progress, leave=False
    )
    for batch in bar:
        loss = _next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()


def _base_config(tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.hidden_size * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(sizes.hidden_size // 32, 1),
        max_position_embeddings=1024,
        initializer_range=0.06,  # the usual 0.02 learns slowly at this width
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _chats(functions: Sequence[Function]) -> Iterator[tuple[str, str]]:
    """Yield questions and answers: the docstring, or the first sentence for a short question."""
    for function in functions:
        yield function.question, function.docstring
        if function.answer:
            yield function.question + ONE_SENTENCE, function.answer


def _token_ids(chat: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    turns = [{"role": "user", "content": chat[0]}, {"role": "assistant", "content": chat[1]}]
    return np.array(tokenizer.apply_chat_template(turns, return_dict=False))


def _next_token_loss(model: LlamaForCausalLM, batch: list[Tensor]) -> Tensor:
    """Return the cross-entropy of a batch; padding on the right is not seen by causal attention."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
    logits = model(input_ids=ids.clamp_min(0)[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def _batches(
    rows: list[np.ndarray], size: int, epochs: int, rng: np.random.Generator
) -> Iterator[list[Tensor]]:
    """Yield batches of rows of similar length, in random order."""
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        by_length = order[np.argsort([len(rows[i]) for i in order], kind="stable")]
        groups = [by_length[k : k + size] for k in range(0, len(rows), size)]
        for k in rng.permutation(len(groups)):
            yield [torch.from_numpy(rows[i]) for i in groups[k]]
