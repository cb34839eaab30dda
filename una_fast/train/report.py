"""What a run tells: metrics of a step, metrics.jsonl and logging back-ends, the progress bar, the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from una_fast.config import RunConfig
from una_fast.data.examples import SourceReport
from una_fast.distributed import World


class Reporter:
    """Writes metrics of a run. Only the main rank writes; the others call the same methods to no effect."""

    def __init__(self, config: RunConfig, world: World, total_steps: int, first_step: int) -> None:
        self.world = world
        self.writers: list[Any] = []
        self.bar = None
        self.last: dict[str, float] = {}  # newest value of every metric of the steps that are kept
        if not world.is_main:
            return
        output_dir = Path(config.output_dir)
        self.path, self.completions_path = (
            output_dir / "metrics.jsonl",
            output_dir / "completions.jsonl",
        )
        for line in _keep_until(self.path, first_step):
            self.last |= {name: value for name, value in line.items() if name != "step"}
        if self.completions_path.exists():
            _keep_until(self.completions_path, first_step)
        self.writers = [_make_writer(name, output_dir, first_step) for name in config.loggers]
        if config.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics; the progress bar shows the most telling ones."""
        if not self.world.is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for write in self.writers:
            write(step, metrics)
        if self.bar is not None:
            shown = {
                n: f"{metrics[n]:.4g}"
                for n in ("loss", "reward", "rewards/accuracies", "kl", "grad_norm")
                if n in metrics
            }
            self.bar.set_postfix(shown)

    def completions(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Sampled responses, one line each in completions.jsonl."""
        if self.world.is_main and lines:
            with self.completions_path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"step": step, **line}, ensure_ascii=False) + "\n" for line in lines
                )

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """A line for the reader of the terminal."""
        if self.world.is_main:
            if self.bar is not None:
                self.bar.write(text)
            else:
                print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _keep_until(path: Path, step: int) -> list[dict[str, float]]:
    """The lines that a run resumed after `step` keeps. Those of steps that it takes again, and a line that was cut
    off by a kill, leave the file."""
    kept: list[dict[str, float]] = []
    text = path.read_text(encoding="utf-8") if path.exists() and step > 0 else ""
    lines = []
    for line in text.split("\n"):  # not splitlines: texts hold other line separators
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError:
            continue
        if parsed["step"] <= step:
            kept.append(parsed)
            lines.append(line + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return kept


def _make_writer(name: str, output_dir: Path, first_step: int) -> Any:
    """A function (step, metrics) for a logging back-end of a run that continues after first_step."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(
            output_dir / "tensorboard", purge_step=first_step + 1 if first_step else None
        )

        def write(step: int, metrics: dict[str, float]) -> None:
            for key, value in metrics.items():
                board.add_scalar(key, value, step)
            board.flush()

        return write
    try:
        module = __import__(name)
    except ImportError:
        raise ValueError(
            f"loggers: {name} is not installed; pip install {name}, or remove it from loggers"
        ) from None
    run = module.init(project="una-fast", name=output_dir.name)
    return lambda step, metrics: run.log(metrics, step=step)


def model_card(
    config: RunConfig, reports: Sequence[SourceReport], metrics: dict[str, float], is_adapter: bool
) -> str:
    """README.md of the trained model."""
    mean = ", a mean over tokens" if config.length_normalize else ""
    offset = ""
    if config.offset:
        shown = (
            f"r + f(x), centred by {config.offset}"
            if isinstance(config.offset, str)
            else f"r + {config.offset:g}"
        )
        offset = f", labels and scores compared with {shown}"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    data = "\n".join(f"- {report}" for report in reports)
    return f"""---
base_model: {config.model}
library_name: {"peft" if is_adapter else "transformers"}
tags: [una, alignment, preference-optimization]
---

# {Path(config.output_dir).name}

{config.model} aligned with UNA ([arXiv 2408.15339](https://arxiv.org/abs/2408.15339)) by una_fast: the implicit reward
r = {config.beta} * (log pi - log pi_ref){mean} regressed on the feedback below (pairs: {config.pair}, labels:
{config.binary}, scores: {config.score}{offset}). All settings: `config.yaml`; every logged step: `metrics.jsonl`.

## Data

{data}

## Last metrics

| metric | value |
|---|---|
{rows}
"""
