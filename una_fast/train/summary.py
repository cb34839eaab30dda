"""Texts of a run for a person, at the start and at the end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.model.four_bits import count_weights
from una_fast.model.policy import Policy
from una_fast.printable import printable
from una_fast.train.build import OpenedRun
from una_fast.train.checkpoint import complete_checkpoints
from una_fast.train.report import TOLD, told_metrics

# ---- start -------------------------------------------------------------------------------------


def opening_lines(opened: OpenedRun, output_dir: Path) -> list[str]:
    """Return the plan of a run, before models are loaded, a line per matter."""
    config = opened.config
    reports = [_line("data", report) for report in opened.data.reports]
    lines = reports
    for examples in (opened.data.examples(), opened.data.all_prompts()):
        if examples:
            lines.append(_line("lengths", lengths_in_words(examples)))
    lines.append(_line("steps", _steps_in_words(opened)))
    if opened.memory is not None:
        lines.append(_line("memory", opened.memory))
    saves = "no checkpoints on the way"
    if config.save_every:
        saves = f"a checkpoint every {config.save_every} steps"
    lines.append(_line("output", f"{output_dir}: model, metrics.jsonl, config.yaml; {saves}"))
    return lines


def model_line(policy: Policy, name: str) -> str:
    """Return the line on a loaded model: class, weights, and the share that is trained.

    name: path or hub name of the model
    """
    kind = type(policy.causal_lm).__name__
    weights = count_weights(policy.model)
    trained = sum(p.numel() for p in policy.trainable_parameters())
    share = "all of them trained"
    if trained < weights:
        share = f"{count_in_words(trained)} of them trained ({trained / weights:.1%})"
    adapter = adapter_in_words(policy)
    adapter = "" if adapter is None else f", {adapter}"
    text = f"{printable(name)}: {kind}, {count_in_words(weights)} weights, {share}{adapter}"
    return _line("model", text)


def adapter_in_words(policy: Policy) -> str | None:
    """Return the settings of a policy's adapter in words; None for a whole model."""
    if not isinstance(policy.model, PeftModel):
        return None
    settings = policy.model.active_peft_config
    rank, alpha = getattr(settings, "r", None), getattr(settings, "lora_alpha", None)
    if not rank:
        return f"an adapter of kind {printable(settings.peft_type)}"
    targets = settings.target_modules
    if not isinstance(targets, str):  # peft writes "all-linear" out, layer by layer
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
    return f"a LoRA adapter of rank {rank}, alpha {alpha}, on {printable(targets)}"


def count_in_words(number: int) -> str:
    """Return a number of weights as people say it: 134.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def lengths_in_words(examples: Sequence[Example]) -> str:
    """Return the tokens of prompts and responses by quantile; "" without examples."""
    if not examples:
        return ""
    parts = [_spread("prompts", [len(example.prompt_ids) for example in examples])]
    responses = []
    for example in examples:
        responses += [len(response) for response in example.responses]
    if responses:
        parts.append(_spread("responses", responses))
    return "; ".join(parts)


def _spread(name: str, lengths: Sequence[int]) -> str:
    low, middle, high, most = np.quantile(lengths, [0.0, 0.5, 0.9, 1.0], method="nearest")
    return f"{name} {low} to {most} tokens, half within {middle}, 90 % within {high}"


def _steps_in_words(opened: OpenedRun) -> str:
    config, taken = opened.config, opened.state["step"]
    of_prompts = config.online_batch_size()
    batch = []
    if config.batch_size > of_prompts:
        batch.append(f"{config.batch_size - of_prompts} records")
    if of_prompts:
        batch.append(f"{of_prompts} prompts x {config.samples_per_prompt} samples")
    epochs = opened.total_steps / opened.loaders.steps_per_epoch(config)
    went_on = f", {taken} of them taken" if taken else ""
    rate = f"rate {config.learning_rate:g}, {config.lr_schedule}"
    steps = f"{opened.total_steps}, each of {' and '.join(batch)}{went_on} ({epochs:.3g} epochs)"
    return f"{steps}; {rate}, {config.optimizer}, beta {config.beta:g}"


def _line(name: str, text: object) -> str:
    return f"{name:10} {text}"


# ---- end ---------------------------------------------------------------------------------------


def closing_lines(
    config: RunConfig, output_dir: Path, steps: int, metrics: dict[str, float]
) -> list[str]:
    """Return the places of the results of a finished run, and the next commands.

    config: settings of the run
    output_dir: of the run, absolute
    steps: optimizer steps taken
    metrics: the last metrics of training and evaluation
    """
    is_adapter = (output_dir / "adapter_config.json").exists()
    kind = "adapter" if is_adapter else "model"
    told = ", ".join(f"{name} {value}" for name, value in told_metrics(metrics).items())
    run = shlex.quote(str(output_dir))
    commands = [f"una-fast chat {run} --compare"]
    if is_adapter:
        commands.append(f"una-fast merge {run} --output_dir {run}-merged")
    if complete_checkpoints(output_dir):
        more = f"--max_steps {2 * steps}"
        if config.max_steps is None:
            more = f"--epochs {2 * (config.epochs or 1):g}"
        commands.append(f"una-fast train --config {run}/config.yaml --resume true {more}")
    page = f"; curves in {output_dir / 'report.html'}" if config.write_report else ""
    lines = [
        _line("done", f"{steps} steps; {told}"),
        _line(kind, f"{output_dir}, described in README.md"),
        _line("metrics", f"{output_dir / 'metrics.jsonl'}{page}"),
    ]
    lines += [_line("next" if not number else "", c) for number, c in enumerate(commands)]
    return lines


def result_line(output_dir: Path, steps: int, metrics: dict[str, float]) -> dict[str, Any]:
    """Return the result of a run for programs; every metric is in metrics.jsonl."""
    result: dict[str, Any] = {"output_dir": str(output_dir), "steps": steps}
    for name, value in metrics.items():
        if name.removeprefix("eval_") in TOLD:
            result[name] = value
    return result
