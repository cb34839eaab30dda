"""The tokenizer and the base model of the demo, trained from nothing."""

from __future__ import annotations

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

PEAK_RATE = 3e-3  # of the base model


# --- the base model --------------------------------------------------------------------------------------------------


def train_tokenizer(entries: Sequence[Documented], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over prompts and docstrings; every text can be written in it."""
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
    tokenizer.train_from_iterator(
        (text for e in entries for text in (e.prompt, e.docstring)), trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def train_base(
    entries: Sequence[Documented],
    tokenizer: PreTrainedTokenizerBase,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None],
) -> LlamaForCausalLM:
    """A small Llama that continues prompts with docstrings: next-token training on prompt + docstring + EOS."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
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
    )
    # Tokenised apart, as records are.
    texts = [
        tokenizer(e.prompt)["input_ids"] + tokenizer(e.docstring)["input_ids"] for e in entries
    ]
    rows = [np.array([*ids, tokenizer.eos_token_id]) for ids in texts]
    batches = list(_batches(rows, 16, sizes.base_epochs, np.random.default_rng(seed)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    losses = []
    for step, batch in enumerate(batches, start=1):
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        # Padding stands on the right, where causal attention does not look.
        logits = model(input_ids=ids.clamp_min(0)[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % -(-len(batches) // 4) == 0 or step == len(batches):
            say(
                f"base model, step {step} of {len(batches)}: loss {np.mean(losses[-50:]):.2f} nats per token"
            )
    return model.eval()


def _batches(
    rows: list[np.ndarray], size: int, epochs: int, rng: np.random.Generator
) -> Iterator[list[Tensor]]:
    """Batches of rows of similar length, in random order."""
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        by_length = order[np.argsort([len(rows[i]) for i in order], kind="stable")]
        groups = [by_length[k : k + size] for k in range(0, len(rows), size)]
        for k in rng.permutation(len(groups)):
            yield [torch.from_numpy(rows[i]) for i in groups[k]]
