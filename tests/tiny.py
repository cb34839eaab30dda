"""Shared by the tests of the trainer: tiny tokenizer and Llamas, records of every kind, runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from una_fast.config import RunConfig

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the cat sat on a mat while rain fell and nobody asked why it would ever stop or begin again"
WORDS = TEXT.split()
TIMING = ("tok_per_sec", "memory/peak_gib", "mfu", "padding", "eval_padding")
Record = dict[str, Any]


def make_tokenizer(*, chat: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE of 300 tokens: <s> before a text, </s> ends responses and turns."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 3, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "pad_token": "<pad>"} | ({"eos_token": "</s>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def save_llama(
    directory: Path, *, tied: bool = False, chat: bool = True, eos: bool = True, seed: int = 0
) -> str:
    """Save a random two-layer Llama with peaked logits, and its tokenizer, in a directory."""
    tokenizer = make_tokenizer(chat=chat, eos=eos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    torch.random.set_rng_state(state)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_records(kind: str, count: int, seed: int = 0) -> list[Record]:
    """Make ragged random records.

    kind: pairs | labels | several | scores | instructions | ratings | chats | mixed
    count: records
    seed: of the random numbers
    """
    if kind == "mixed":
        kinds = ("pairs", "labels", "several", "scores", "instructions", "chats")
        of_each = -(-count // len(kinds))
        columns = [make_records(name, of_each, seed + k) for k, name in enumerate(kinds)]
        return list(itertools.chain.from_iterable(zip(*columns, strict=True)))[:count]
    rng = np.random.default_rng([seed, *kind.encode()])

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(2, longest)))

    def turn(role: str, longest: int) -> list[Record]:
        return [{"role": role, "content": text(longest)}]

    def score() -> float:
        return round(float(rng.uniform()), 3)

    def record(number: int) -> Record:
        prompt = text(12)
        if kind == "pairs":
            return {
                "prompt": prompt,
                "chosen": text(16),
                "rejected": text(6) + " stop",
                "weight": 1.0 + number % 2,
            }
        if kind == "labels":
            return {"prompt": prompt, "completion": text(9), "label": bool(rng.integers(2))}
        if kind == "several":
            texts = [text(20) for _ in range(rng.integers(1, 5))]
            return {"prompt": prompt, "completions": texts, "scores": [score() for _ in texts]}
        if kind == "scores":
            return {"prompt": prompt, "completion": text(10), "score": score()}
        if kind == "instructions":
            return {"prompt": prompt, "completion": text(14)}
        if kind == "ratings":
            drawn = rng.choice(np.arange(1, 11), size=2, replace=False).tolist()
            high, low = sorted(drawn, reverse=True)
            answers = {"chosen": text(8), "rejected": text(8) + " begin"}
            return {"prompt": prompt, **answers, "chosen_rating": high, "rejected_rating": low}
        assert kind == "chats", kind
        answers = {"chosen": turn("assistant", 10), "rejected": turn("assistant", 5)}
        answers["rejected"][0]["content"] += " again"
        return {"prompt": turn("user", 8), **answers}

    return [record(number) for number in range(count)]


def write_jsonl(path: Path, records: Iterable[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_config(model: str, data: Any, output_dir: Path, **settings: Any) -> RunConfig:
    """Return the settings of a quiet run without schedule, on the CPU."""
    quiet = {
        "progress": False,
        "write_report": False,
        "loggers": [],
        "device": "cpu",
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return RunConfig(model=model, data=data, output_dir=str(output_dir), **{**quiet, **settings})


def read_metrics(
    output_dir: str | Path, *, without: Sequence[str] = TIMING
) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl, less the fields that two equal runs do not share."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for name in without:
            record.pop(name, None)
    return records
