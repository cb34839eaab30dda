"""The tokenizer and the base model of the demo, trained from nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from una_fast.demo.settings import Sizes
from una_fast.demo.text import Documented

PEAK_RATE = 3e-3  # learning rate of the base model

BATCH_SIZE = 16


def train_tokenizer(entries: Sequence[Documented], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on prompts and docstrings; all texts can be written in its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.chain.from_iterable((e.prompt, e.docstring) for e in entries)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def train_base(
    entries: Sequence[Documented],
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None],
) -> LlamaForCausalLM:
    """Train a small Llama that continues prompts with docstrings, from random weights.

    entries: objects of the base model
    tokenizer: with an EOS token
    sizes: of the model, and epochs
    seed: of the weights and of the order of batches
    say: takes a line of progress, four times

    The loss is next-token cross-entropy on prompt + docstring + EOS.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_base_config(tokenizer, sizes))
    rows = [_token_ids(entry, tokenizer) for entry in entries]
    batches = list(_batches(rows, BATCH_SIZE, sizes.base_epochs, np.random.default_rng(seed)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    quarter = -(-len(batches) // 4)
    losses = []
    for step, batch in enumerate(batches, start=1):
        loss = _next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % quarter == 0 or step == len(batches):
            recent = np.mean(losses[-50:])
            say(f"base model, step {step} of {len(batches)}: loss {recent:.2f} nats per token")
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


def _token_ids(entry: Documented, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the ids of prompt + docstring + EOS, tokenised apart as in records."""
    ids = tokenizer(entry.prompt)["input_ids"] + tokenizer(entry.docstring)["input_ids"]
    return np.array([*ids, tokenizer.eos_token_id])


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
