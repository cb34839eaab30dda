"""Shared by the tests of runs: a trainer with steps that a test takes itself, and comparisons."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from ranks import saved_weights
from una_fast.config import RunConfig
from una_fast.data.batch import Batch, collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.sources import Source
from una_fast.distributed import start_world
from una_fast.feedback import Feedback
from una_fast.losses import UnaOutput, una_loss
from una_fast.model.settings import LoraOptions
from una_fast.train.build import build_run, open_run
from una_fast.train.loop import Trainer
from una_fast.train.run_data import load_data

LORA = LoraOptions(r=4, alpha=8)


def open_trainer(config: RunConfig) -> Trainer:
    """Build a run; the test takes its steps."""
    world = start_world(config.device)
    torch.manual_seed(config.seed)
    Path(config.output_dir).mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    opened = open_run(config, world, load_data(config, tokenizer))
    return Trainer(build_run(opened, tokenizer), Path(config.output_dir))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by name."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def again(config: RunConfig, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run in another directory, with changes."""
    return settings_of(config) | {"output_dir": str(output_dir)} | changes


def examples_of(data: str, model: str) -> list[Example]:
    """Return the records of a file under the tokenizer of a model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_examples(Source(data), tokenizer, require_unit_scores=True)[0]


def metered(device: str) -> tuple[Batch, UnaOutput]:
    """Return a micro-batch of a pair and a score, and its loss, for a meter to add."""
    prompt, response = np.arange(3, 9, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    pair = Example(prompt, (response, response), Feedback.pairs([0], [1]), None, "pair")
    score = Example(prompt, (response,), Feedback.scores([0], [0.3]), None, "score")
    batch = collate([pair, score], packed=False, device=torch.device(device))
    logps = torch.tensor([-3.0, -5.0, -4.0], dtype=torch.float64, device=device)
    return batch, una_loss(logps, logps - 0.5, batch.feedback)


def assert_same_weights(one: str | Path, two: str | Path) -> None:
    """Assert that two saved models are bitwise equal."""
    first, second = saved_weights(Path(one)), saved_weights(Path(two))
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
