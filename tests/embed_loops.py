"""The loops of docs/embed on records: as the pages have them, and eagerly, for the truth.

    torchrun --nproc-per-node 2 tests/embed_loops.py ROOT

Runs the loops of accelerate.md and fabric.md on two ranks, on the model in ROOT/model, and writes
ROOT/<page>.pt: the trained weights. Fabric is left out where it is not installed.
"""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedded import eager_logps
from pages import DOCS, run_page
from tiny import make_records
from una_fast import Feedback, Objective, una_loss
from una_fast.integrations.hf import FeedbackCollator

RATE = 0.5
RECORDS, PER_BATCH, ACCUMULATED, RANKS = 24, 2, 3, 2
PAGES = ("accelerate", "fabric")


def load(directory: Path) -> nn.Module:
    """Return the tiny model in float64, so that weights tell their steps."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


def reference_of(model: nn.Module) -> nn.Module:
    """Return a frozen model with other weights, so that the first loss is no constant."""
    reference = copy.deepcopy(model).requires_grad_(False)
    for parameter in reference.parameters():
        parameter.mul_(0.9)
    return reference


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def make_loader(directory: Path, collator: type[FeedbackCollator] = FeedbackCollator) -> DataLoader:
    """Return batches of ragged records with unequal numbers of units, in order."""
    collate = collator(AutoTokenizer.from_pretrained(directory))
    records = make_records("mixed", RECORDS)
    return DataLoader(records, batch_size=PER_BATCH, collate_fn=collate)


def eager_steps(
    model: nn.Module,
    references: list[Tensor] | nn.Module,
    steps: list[list[dict[str, Any]]],
    objective: Objective | None = None,
) -> list[float]:
    """Train by SGD on the model's own logits; return the losses of the steps.

    model: to train
    references: [B] log-probs of the batches in order, or a model
    steps: batches of every step; a step is one mean over all its units
    objective: None: Objective()
    """
    optimizer, losses = sgd(model), []
    for batches in steps:
        units = sum(Feedback.of(batch["feedback"]).num_units for batch in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logps = eager_logps(model, batch).sum(1)
            if isinstance(references, nn.Module):
                with torch.no_grad():
                    reference = eager_logps(references, batch).sum(1)
            else:
                reference = references.pop(0)
            feedback = Feedback.of(batch["feedback"])
            out = una_loss(logps, reference, feedback, objective=objective, num_units=units)
            total = total + out.loss
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def step_error(found: dict[str, Tensor], truth: nn.Module, start: nn.Module) -> float:
    """Return the largest error of the way that weights went, relative to the longest way.

    found: weights by name
    truth: model with the true weights
    start: model with the weights before the first step
    """
    before = start.state_dict()
    ways = {name: value - before[name] for name, value in truth.state_dict().items()}
    scale = max(float(way.abs().max()) for way in ways.values())
    errors = [float((found[name] - before[name] - way).abs().max()) for name, way in ways.items()]
    return max(errors) / scale


def run_loop(page: str, root: Path) -> nn.Module:
    """Run the loop of a page on this rank; return the trained model.

    page: of PAGES
    root: holds the model
    """
    model = load(root / "model")
    reference = reference_of(model)
    names = run_page(DOCS / f"embed/{page}.md", root / "unused")
    if page == "accelerate":
        from accelerate import Accelerator

        host, collator = Accelerator(cpu=True), FeedbackCollator
    else:
        from lightning_fabric import Fabric

        # Its default precision would cast outputs to float32.
        many = {"strategy": "ddp"} if torch.distributed.is_torchelastic_launched() else {}
        devices = RANKS if many else 1
        host = Fabric(accelerator="cpu", devices=devices, precision="64-true", **many)
        host.launch()
        collator = names["PlainCollator"]
    loader = make_loader(root / "model", collator)
    names["train"](host, model, reference, sgd(model), loader, accumulate=ACCUMULATED)
    return model


def main() -> None:
    """Run every loop that can run on this rank."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for page in PAGES:
        if page == "fabric" and find_spec("lightning_fabric") is None:
            continue
        model = run_loop(page, root)
        if torch.distributed.get_rank() == 0:
            torch.save(model.state_dict(), root / f"{page}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
