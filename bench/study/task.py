"""The task of the study: a small language with a verifiable reward, and a poor base model.

    prompt   topic : word word word            "animals : axe rain cat"
    answer   4 to 8 words, then EOS            "cat dog axe fox rain cow"
    gold     0.75 * share of the answer's words on topic (a repeated word counts once)
             + 0.25 * share of the prompt's three words in the answer; halved without an end

The base model is trained on answers that are on topic, or mention the prompt, only some of the
time. The model knows both habits and follows them too seldom: the gold of the answers is near 0.4,
and 0.8 costs several nats.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOPICS = {
    "animals": "cat dog fox cow hen owl",
    "tools": "axe saw pin rod jig vise",
    "weather": "rain snow hail wind fog sun",
    "foods": "rice bread soup cake plum fig",
}
WORDS_OF = {topic: words.split() for topic, words in TOPICS.items()}
WORDS = list(chain.from_iterable(WORDS_OF.values()))
MAX_NEW_TOKENS = 12
# How often a word of the training text is on topic, or a word of the prompt, beside by chance.
ON_TOPIC, MENTION = 0.25, 0.25
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def gold(prompt: str, completion: str) -> float:
    """Return the reward of an answer, in [0, 1]."""
    topic, _, wanted = prompt.partition(" : ")
    answer = completion.split()
    if not answer:
        return 0.0
    fresh = [word for before, word in zip(["", *answer], answer, strict=False) if word != before]
    on_topic = sum(word in WORDS_OF[topic] for word in fresh) / len(answer)
    mentioned = np.mean([word in answer for word in wanted.split()])
    endless = len(answer) >= MAX_NEW_TOKENS
    return float(0.75 * on_topic + 0.25 * mentioned) * (0.5 if endless else 1.0)


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the gold of a batch, as una_fast and TRL call a reward function."""
    answered = zip(prompts, completions, strict=True)
    return [gold(prompt, completion) for prompt, completion in answered]


def make_prompts(count: int, seed: Sequence[int], without: Collection[str] = ()) -> list[str]:
    """Return distinct prompts outside of `without`."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        words = rng.choice(WORDS, size=3, replace=False)
        topic = rng.choice(list(TOPICS))
        prompt = f"{topic} : {' '.join(words)} "  # TRL puts an answer right behind
        if prompt not in without:
            found[prompt] = None
    return list(found)


@functools.cache
def held_out(count: int) -> tuple[str, ...]:
    """Return the prompts of all evaluations."""
    return tuple(make_prompts(count, [0, 0]))


def plain_answer(prompt: str, rng: np.random.Generator) -> str:
    """Return an answer for the base model's training text."""
    topic, _, wanted = prompt.partition(" : ")

    def word() -> str:
        kind = rng.uniform()
        if kind < ON_TOPIC:
            return rng.choice(WORDS_OF[topic])
        words = wanted.split() if kind < ON_TOPIC + MENTION else WORDS
        return rng.choice(words)

    return " ".join(word() for _ in range(rng.integers(4, 9)))


# ----------------------------------------------------------------------------------- the base model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, and <s> before a text."""
    vocabulary = [BOS, EOS, PAD, ":", *TOPICS, *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=PAD))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Build the Llama of the study, its weights drawn."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_base(directory: Path, steps: int, seed: int = 0) -> dict[str, float]:
    """Train and save the base model, and return the last mean loss per token."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        prompts = make_prompts(64, [seed, 2, step])
        asked = tokenizer(prompts, return_tensors="pt")["input_ids"]
        answers = [f"{plain_answer(prompt, rng)} {EOS}" for prompt in prompts]
        layout = {"padding": True, "padding_side": "right", "add_special_tokens": False}
        said = tokenizer(answers, return_tensors="pt", **layout)["input_ids"]
        unscored = torch.full_like(asked, -100)
        labels = torch.cat([unscored, said.where(said != tokenizer.pad_token_id, -100)], 1)
        loss = model(input_ids=torch.cat([asked, said], 1), labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"steps": steps, "loss": float(np.mean(losses[-20:]))}


# --------------------------------------------------------------------------------------- evaluation


class Samples(NamedTuple):
    """Answers to prompts.

    texts: [S]
    lengths: [S] tokens of each answer, EOS included
    log_ratio: [S] log pi - log pi_ref, summed
    """

    prompts: list[str]
    texts: list[str]
    lengths: np.ndarray
    log_ratio: np.ndarray


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    each: int,
    seed: int,
) -> Samples:
    """Sample `each` answers to every prompt at temperature 1, and restore the global random state.

    model: the policy
    reference: scores the answers for log_ratio
    tokenizer: of both models
    prompts: of one length in tokens
    each: answers to a prompt
    seed: of the samples
    """
    training = model.training
    model.eval()
    prompts = list(chain.from_iterable([prompt] * each for prompt in prompts))
    asked = tokenizer(prompts, return_tensors="pt")["input_ids"]  # all of one length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    model.train(training)
    said = ids[:, asked.shape[1] :]
    ended = (said == tokenizer.eos_token_id).cumsum(1)
    real = (ended - (said == tokenizer.eos_token_id).long()) == 0  # up to and with the first EOS

    def logps(scorer: LlamaForCausalLM) -> Tensor:
        """Return [S, T] log-probs of the answers' tokens."""
        logits = scorer(input_ids=ids[:, :-1]).logits[:, asked.shape[1] - 1 :]
        return logits.float().log_softmax(-1).gather(-1, said[..., None]).squeeze(-1)

    log_ratio = ((logps(model) - logps(reference)).double() * real).sum(1)
    answers = said.where(real, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Samples(prompts, texts, real.sum(1).numpy(), log_ratio.numpy())


def evaluate(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int,
) -> dict[str, float]:
    """Return mean gold and mean KL of one answer per prompt, and the standard error of the gold."""
    found = sample(model, reference, tokenizer, prompts, each=1, seed=seed)
    golds = np.array(reward(found.prompts, found.texts))
    return {
        "gold": float(golds.mean()),
        "gold_se": float(golds.std(ddof=1) / len(golds) ** 0.5),
        "kl": float(found.log_ratio.mean()),
        "tokens": float(found.lengths.mean()),
    }
