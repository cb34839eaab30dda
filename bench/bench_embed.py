"""Whole steps of TRL's DPOTrainer with its own head and with ours: time, memory, the same loss.

    python bench/bench_embed.py --out bench/results/embed.json
    python bench/bench_embed.py --cases tiny-long --runs 2

One pair per step, float32 (bfloat16 on a GPU), all of TRL's metrics, AdamW; the reference is TRL's
copy of the model, or the model without its adapter. Contenders take turns in one process:

    trl              TRL as it runs on this machine: on a CPU it scores every position
    trl responses    TRL told to score the positions of responses alone, as it does on a GPU
    una_fast         UNADPOTrainer: the same trainer with our head, and the prompt computed once

Memory is what a step allocates, counted at the dispatcher in a step of its own.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

import harness
from una_fast.counters import LiveBytes
from una_fast.demo.smollm2 import find_smollm2
from una_fast.integrations.trl import UNADPOTrainer, una_calls
from una_fast.model.loading import load_causal_lm, load_tokenizer

# Bars of a step of ours against TRL's: (contender, time, memory).
BARS = {"tiny-long": (("trl", 0.15, 0.2), ("trl responses", 0.65, 0.6))}


class Case(NamedTuple):
    """A model, and the tokens of one pair.

    prompt, response: tokens
    lora: adapters are trained, and the model without them is the reference
    """

    model: str
    prompt: int
    response: int
    lora: bool = False


CASES = {
    "tiny-long": Case("tiny Llama", 512, 64),
    "tiny-short": Case("tiny Llama", 16, 256),
    "smollm2-lora": Case("SmolLM2-135M", 512, 64, lora=True),
}
TINY = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def make_model(case: Case, device: torch.device) -> PreTrainedModel:
    """Return a model in the dtype of the device, the same for every contender."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if case.model == "tiny Llama":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TINY)).to(device, dtype)
    return load_causal_lm(find_smollm2(), dtype=dtype).to(device)


def draw_pair(case: Case, vocab: int) -> dict[str, list[int]]:
    """Return the token ids of a pair, as TRL's collator takes them."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"prompt_ids": case.prompt, "chosen_ids": case.response, "rejected_ids": case.response}
    drawn = {}
    for name, size in sizes.items():
        drawn[name] = torch.randint(10, vocab, (size,), generator=generator).tolist()
    return drawn


@contextmanager
def nothing() -> Iterator[None]:
    """Change nothing."""
    yield


def responses_only() -> Any:
    """Let TRL's head leave prompt positions out, as on devices with Triton."""
    return mock.patch.object(trl_utils, "_use_triton", lambda device: True)


CONTENDERS: dict[str, tuple[type, Callable[[], Any]]] = {
    "trl": (DPOTrainer, nothing),
    "trl responses": (DPOTrainer, responses_only),
    "una_fast": (UNADPOTrainer, nothing),
}


class Stepper:
    """A trainer of TRL, and one step of it."""

    def __init__(
        self, case: Case, name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        """Build the trainer on a dataset of one row, which is never read.

        case: model and pair
        name: of the contender
        tokenizer: any; the pair is made of token ids
        device: of the models
        """
        kind, self.patch = CONTENDERS[name]
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if case.lora else None
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        self.trainer = kind(
            model=make_model(case, device),
            ref_model=None if case.lora else make_model(case, device),
            args=DPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=1,
                learning_rate=1e-5,
                max_length=None,
                bf16=False,
                report_to=[],
                use_cpu=device.type == "cpu",
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.current_gradient_accumulation_steps = 1
        vocab = trainer.model.get_input_embeddings().weight.shape[0]
        self.batch = trainer.data_collator([draw_pair(case, vocab)])
        self.device = device

    def step(self) -> float:
        """Take one optimizer step; return the loss before it."""
        trainer = self.trainer
        with self.patch():
            loss = trainer.training_step(trainer.model, dict(self.batch))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    def peak_bytes(self) -> int:
        """Return what a step allocates beyond weights, gradients kept and optimizer state."""
        live = LiveBytes()
        with live:
            self.step()
        return live.peak()


def measure(case: Case, name: str, runs: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure all contenders on a case; return a row each.

    case: model and pair
    name: of the case
    runs: steps of each contender that are timed, in turns
    device: of the models
    """
    tokenizer = load_tokenizer(find_smollm2())
    steppers = {each: Stepper(case, each, tokenizer, device) for each in CONTENDERS}
    reached = una_calls()["packed"]
    losses = {each: stepper.step() for each, stepper in steppers.items()}
    assert una_calls()["packed"] > reached, "our trainer has not reached the fused head"
    spread = max(losses.values()) - min(losses.values())
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # of bfloat16, of float32
    assert spread <= tolerance * max(losses.values()), losses
    seconds: dict[str, list[float]] = {each: [] for each in steppers}
    for _ in range(runs):
        for each, stepper in steppers.items():
            gc.collect()
            start = time.perf_counter()
            stepper.step()
            seconds[each].append(time.perf_counter() - start)
    rows = []
    for each, stepper in steppers.items():
        best = min(seconds[each])
        row = {"case": name, **case._asdict(), "contender": each, "loss": losses[each]}
        row |= {"seconds": best, "spread": max(seconds[each]) / best - 1}
        rows.append(row | {"peak_bytes": stepper.peak_bytes()})
        print(row)
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return our time and memory over every other contender's, with the bar where there is one."""
    found = []
    for case in {row["case"]: None for row in rows}:
        of_case = {row["contender"]: row for row in rows if row["case"] == case}
        ours = of_case["una_fast"]
        bars = {name: bar for name, *bar in BARS.get(case, ())}
        for name, row in of_case.items():
            if row is ours:
                continue
            time_ratio = ours["seconds"] / row["seconds"]
            memory_ratio = ours["peak_bytes"] / row["peak_bytes"]
            ratio = {"case": case, "against": name, "time": time_ratio, "memory": memory_ratio}
            if name in bars:
                most_time, most_memory = bars[name]
                is_met = time_ratio <= most_time and memory_ratio <= most_memory
                ratio |= {"most_time": most_time, "most_memory": most_memory, "met": is_met}
            found.append(ratio)
            print(ratio)
    return found


def main() -> int:
    """Measure; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--runs", default=7, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.cases.split(","):
        rows += measure(CASES[name], name, options.runs, options.device)
    report = {"environment": harness.environment(options.device), "results": rows}
    report["ratios"] = ratios(rows)
    harness.write_report(report, options.out)
    return int(not all(ratio.get("met", True) for ratio in report["ratios"]))


if __name__ == "__main__":
    sys.exit(main())
