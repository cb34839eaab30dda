"""The demo: a small language model of docstrings is trained, aligned with mixed feedback, and compared with itself.

Everything comes from the Python standard library (demo_data.py); nothing is downloaded. The alignment is an ordinary
run of `train`; the comparison loads the two models and scores held-out prompts as the trainer does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from una_fast.packing import packing_refusal
from una_fast.config import RunConfig
from una_fast.data import Example, Source, collate, load_examples
from una_fast.demo_data import Corpus, Documented, make_records, read_corpus, rouge_l, write_jsonl
from una_fast.feedback import Feedback
from una_fast.policy import Policy, load_policy
from una_fast.scoring import Scoring
from una_fast.train import train

KINDS = ("pairs", "labels", "scores")
BINS = 10
SCORING_BATCH = 16
NEW_TOKENS = 64


@dataclass
class DemoConfig:
    """The demo: text, base model, alignment, and what changed. Runs on the CPU, so that it needs nothing else."""

    output_dir: str = "runs/demo"
    """Run directory. If it is not empty, the first free one of output_dir-2, output_dir-3, ... is used instead."""
    seed: int = 0
    """Seed of the split, the records, the weights and the samples."""
    quick: bool = False
    """A few modules and steps: shows that everything works, in seconds, and aligns nothing worth looking at."""


@dataclass(frozen=True)
class Sizes:
    """What `quick` changes."""

    max_modules: int | None = None
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    base_epochs: int = 6
    align_epochs: float = 2.0
    samples: int = 128


QUICK = Sizes(max_modules=40, vocab_size=512, hidden_size=32, layers=1, base_epochs=1, align_epochs=0.2, samples=8)
BETA, LEARNING_RATE = 0.2, 1e-3


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo into a fresh directory and return the summary that it prints as its last line."""
    transformers_logging.disable_progress_bar()
    sizes = QUICK if config.quick else Sizes()
    output_dir = _fresh_directory(Path(config.output_dir))
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)

    corpus = read_corpus(config.seed, max_modules=sizes.max_modules)
    counts = _write_records(output_dir / "data", corpus, config.seed)
    say(
        f"docstrings of the standard library: {len(corpus.base)} for the base model, {len(corpus.align)} for alignment, "
        f"{len(corpus.held_out)} held out (other modules) -> {output_dir}/data"
    )
    base_dir = output_dir / "base"
    tokenizer = train_tokenizer(corpus.base, sizes.vocab_size)
    model = train_base(corpus.base, tokenizer, sizes, config.seed, say)
    model.save_pretrained(base_dir)
    tokenizer.save_pretrained(base_dir)

    aligned_dir = output_dir / "aligned"
    say(f"aligning with {counts} ...")
    result = train(align_config(output_dir, base_dir, aligned_dir, sizes, config.seed))
    say(f"aligned in {result.steps} steps -> {aligned_dir}")

    comparison = Comparison(base_dir, aligned_dir, tokenizer, BETA)
    summary = comparison.run(output_dir / "data", corpus.held_out, sizes.samples, config.seed)
    say("compared on held-out prompts\n")
    print(summary)
    return summary


def _fresh_directory(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that is not there or empty: earlier results are kept."""
    path, number = wanted, 1
    while path.exists() and any(path.iterdir()):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    if path != wanted:
        print(f"{wanted} is not empty and stays as it is; writing to {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_records(directory: Path, corpus: Corpus, seed: int) -> str:
    """{pairs,labels,scores}.jsonl for alignment, and held_out_*.jsonl. Returns what there is for alignment."""
    for prefix, entries in (("", corpus.align), ("held_out_", corpus.held_out)):
        records = make_records(entries, seed)
        for kind in KINDS:
            write_jsonl(directory / f"{prefix}{kind}.jsonl", records[kind])
        if not prefix:
            counts = ", ".join(f"{len(records[kind])} {kind}" for kind in KINDS)
    return counts


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
    tokenizer.train_from_iterator((text for e in entries for text in (e.prompt, e.docstring)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def train_base(
    entries: Sequence[Documented], tokenizer: PreTrainedTokenizerBase, sizes: Sizes, seed: int, say: Any
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
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Tokenised apart, as records are.
    texts = [tokenizer(e.prompt)["input_ids"] + tokenizer(e.docstring)["input_ids"] for e in entries]
    rows = [np.array([*ids, tokenizer.eos_token_id]) for ids in texts]
    batches = list(_batches(rows, 32, sizes.base_epochs, np.random.default_rng(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
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
            say(f"base model, step {step} of {len(batches)}: loss {np.mean(losses[-50:]):.2f} nats per token")
    return model.eval()


def _batches(rows: list[np.ndarray], size: int, epochs: int, rng: np.random.Generator) -> Iterator[list[Tensor]]:
    """Batches of rows of similar length, in random order."""
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        by_length = order[np.argsort([len(rows[i]) for i in order], kind="stable")]
        groups = [by_length[k : k + size] for k in range(0, len(rows), size)]
        for k in rng.permutation(len(groups)):
            yield [torch.from_numpy(rows[i]) for i in groups[k]]


# --- alignment -------------------------------------------------------------------------------------------------------


def align_config(output_dir: Path, base_dir: Path, aligned_dir: Path, sizes: Sizes, seed: int) -> RunConfig:
    data = output_dir / "data"
    return RunConfig(
        model=str(base_dir),
        data=[str(data / f"{kind}.jsonl") for kind in KINDS],
        eval_data=[str(data / f"held_out_{kind}.jsonl") for kind in KINDS],
        output_dir=str(aligned_dir),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        epochs=sizes.align_epochs,
        batch_size=64,
        micro_batch_size=32,
        device="cpu",
        seed=seed,
        loggers=[],
        progress=sys.stderr.isatty(),
    )




# --- before and after ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Held-out records of one kind with the log-probs of their responses under both models, sums over tokens.

    before, after: one array [K] per record; lengths: tokens per response.
    """

    examples: list[Example]
    before: list[np.ndarray]
    after: list[np.ndarray]

    @property
    def lengths(self) -> list[np.ndarray]:
        return [np.array([len(ids) for ids in example.responses]) for example in self.examples]


class Comparison:
    """The base model and the aligned one, on the same held-out records and prompts."""

    def __init__(self, base_dir: Path, aligned_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.base, self.aligned = (load_policy(d, dtype=torch.float32) for d in (base_dir, aligned_dir))
        for policy in (self.base, self.aligned):
            policy.packed = packing_refusal(policy.causal_lm) is None
            policy.model.eval()

    def score(self, examples: list[Example]) -> Scored:
        return Scored(examples, self._logps(self.base, examples), self._logps(self.aligned, examples))

    def _logps(self, policy: Policy, examples: list[Example]) -> list[np.ndarray]:
        parts = []
        for k in range(0, len(examples), SCORING_BATCH):
            batch = collate(examples[k : k + SCORING_BATCH], packed=policy.packed, pad_id=self.tokenizer.pad_token_id)
            parts.append(Scoring().logps(policy, batch).numpy())
        ends = np.cumsum([len(example.responses) for example in examples])
        return np.split(np.concatenate(parts), ends[:-1])

    @torch.no_grad()
    def sample(self, policy: Policy, prompts: Sequence[str], seed: int | None) -> list[np.ndarray]:
        """Token ids of one continuation per prompt, at most NEW_TOKENS, up to and with EOS. seed: drawn at temperature
        1 from the whole distribution, so that their log-probs are those of the policy; None: greedy."""
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed or 0)
        output = policy.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, **({"do_sample": False} if seed is None else drawn)
        )
        eos, samples = self.tokenizer.eos_token_id, []
        for ids in output[:, inputs["input_ids"].shape[1] :].numpy():
            ends = np.flatnonzero(ids == eos)
            samples.append(ids[: ends[0] + 1] if ends.size else ids)
        return samples

    def texts(self, samples: Sequence[np.ndarray]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]


@dataclass(frozen=True)
class Calibration:
    """sigmoid(r) of every held-out score unit, before (0.5) and after, and the scores."""

    implied: np.ndarray
    scores: np.ndarray


def pair_accuracies(pairs: Scored) -> dict[str, tuple[float, float]]:
    """(before, after) shares of pairs in which the chosen response has the higher value."""

    def share(values: list[np.ndarray]) -> float:
        return float(np.mean([(v[0] > v[1]) + 0.5 * (v[0] == v[1]) for v in values]))

    reward = [after - before for before, after in zip(pairs.before, pairs.after, strict=True)]
    per_token = [
        [logps / n for logps, n in zip(side, pairs.lengths, strict=True)] for side in (pairs.before, pairs.after)
    ]
    return {
        "pair_accuracy": (share([np.zeros(2)] * len(reward)), share(reward)),
        "logp_accuracy": (share(pairs.before), share(pairs.after)),
        "logp_per_token_accuracy": (share(per_token[0]), share(per_token[1])),
    }


def calibration(scored: Scored) -> Calibration:
    reward = BETA * (np.concatenate(scored.after) - np.concatenate(scored.before))
    targets = np.concatenate([example.feedback.value.numpy() for example in scored.examples])
    return Calibration(1 / (1 + np.exp(-reward)), targets)


def samples_and_kl(comparison: Comparison, prompts: Sequence[Documented], seed: int) -> dict[str, Any]:
    """KL per response, E[log pi - log pi_ref] over responses drawn from the aligned policy, with its standard error,
    and the mean ROUGE-L of drawn responses of both models against the true docstrings."""
    texts = [entry.prompt for entry in prompts]
    drawn = {name: comparison.sample(policy, texts, seed) for name, policy in comparison.policies.items()}
    examples = [
        Example(np.array(comparison.tokenizer(text)["input_ids"], dtype=np.int32), (ids,), Feedback.merge([]), None, text)
        for text, ids in zip(texts, drawn["aligned"], strict=True)
    ]
    scored = comparison.score(examples)
    log_ratio = np.concatenate(scored.after) - np.concatenate(scored.before)
    rouge = {
        name: float(np.mean([rouge_l(t, e.docstring) for t, e in zip(comparison.texts(ids), prompts, strict=True)]))
        for name, ids in drawn.items()
    }
    return {
        "kl": float(log_ratio.mean()),
        "kl_standard_error": float(log_ratio.std(ddof=1) / np.sqrt(len(log_ratio))),
        "rouge_l": (rouge["base"], rouge["aligned"]),
    }
