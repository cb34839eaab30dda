"""DeepSpeed's ZeRO-3 on two ranks: gradients of a patched model, and steps of UNATrainer.

A worker of ranks.py, imported for one process. Its argument is a directory OUT with OUT/model.
Writes OUT/<case>.pt, the gradients of a case, whole, and OUT/trainer.json, the logged steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from embedded import make_batch
from families import SMALL, build
from tiny import make_records
from una_fast import Feedback, Objective
from una_fast.integrations.hf import FeedbackCollator, UNATrainer, patch_model

RANKS = 2
# Form of the call, tied head, recomputed layers.
CASES = {
    "loss": (False, False),
    "tokens": (False, False),
    "loss, tied": (True, False),
    "tokens, checkpointing": (False, True),
}
SGD = {"type": "SGD", "params": {"lr": 0.1}}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    # No weight is whole between the calls of its module.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": SGD,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
FEEDBACK = (
    Feedback.merge([Feedback.pairs([0], [1]), Feedback.binary([2], [True])]),
    Feedback.scores([3], [0.3]),
)


def make_model(case: str) -> nn.Module:
    """Return the patched model of a case."""
    tied, checkpointing = CASES[case]
    torch.manual_seed(0)
    model = patch_model(build("LlamaConfig", SMALL | {"tie_word_embeddings": tied})).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def loss_of(model: nn.Module, case: str, rank: int) -> Tensor:
    """Return the part of a rank in a loss that is a sum over ranks."""
    batch = make_batch()
    if case.startswith("loss"):
        units = sum(feedback.num_units for feedback in FEEDBACK)
        ref_logps = [-20.0] * len(batch["input_ids"])
        given = {"objective": Objective(beta=0.3), "num_units": units, "ref_logps": ref_logps}
        return model(**batch, feedback=FEEDBACK[rank], **given).loss
    found = model(**batch, una="tokens", stats=("entropy",))
    return (rank + 1) * found.logps.sum() / 50 + found.entropy.sum() / 100


def one_process(case: str) -> dict[str, Tensor]:
    """Return the gradients of a case in this process."""
    model = make_model(case)
    sum(loss_of(model, case, rank) for rank in range(RANKS)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients(case: str, rank: int) -> dict[str, Tensor]:
    """Return the gradients of a case, whole, of weights in shards."""
    model = make_model(case)
    engine, *_ = deepspeed.initialize(model=model, config=ZERO3)
    assert not any(parameter.numel() for parameter in model.parameters())
    engine.backward(RANKS * loss_of(engine, case, rank).float())  # averaged over the ranks
    return {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}


def records(directory: Path) -> list[dict[str, Any]]:
    """Return pairs with log-probs of a reference beside: no second model is sharded."""
    rows = make_records("pairs", 8)
    reference = patch_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    batch = FeedbackCollator(AutoTokenizer.from_pretrained(directory))(rows)
    batch.pop("feedback")
    with torch.no_grad():
        logps = 1.1 * reference(**batch, una="responses").logps
    for row, of_pair in zip(rows, logps.view(-1, 2).tolist(), strict=True):
        row["ref_logps"] = of_pair
    return rows


def trained(out: Path, ranks: int) -> list[dict[str, float]]:
    """Return the logged steps of UNATrainer, each of four records."""
    directory = out / "model"
    rows = records(directory)  # before the arguments: under them, models are loaded in shards
    config = {**ZERO3, "gradient_accumulation_steps": 4 // ranks}
    arguments = TrainingArguments(
        output_dir=str(out / f"trainer-{ranks}"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // ranks,
        max_steps=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=config if ranks > 1 else None,
    )
    trainer = UNATrainer(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(directory),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    """Run the cases on this rank, then the trainer."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
    for case in CASES:
        found = gradients(case, rank)
        if rank == 0:
            torch.save(found, out / f"{case}.pt")
    steps = trained(out, RANKS)
    if rank == 0:
        (out / "trainer.json").write_text(json.dumps(steps))
