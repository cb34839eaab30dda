"""Output of a run: metrics.jsonl, completions.jsonl, loggers, the progress bar, the model card."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from una_fast.config import RunConfig
from una_fast.data.examples import SourceReport
from una_fast.distributed import World
from una_fast.train.run_dir import rewind_lines

logger = logging.getLogger(__name__)

Writer = Callable[[int, dict[str, float]], None]
"""A logging back-end: writes (step, metrics)."""

SHOWN = ("loss", "reward", "rewards/accuracies", "kl", "grad_norm")  # in the progress bar


class Reporter:
    """Writes the metrics of a run on the main rank; calls on other ranks have no effect.

    last: newest value of every metric, up to the step that the run goes on from
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        total_steps: int,
        first_step: int,
        checkpoint: Path | None,
    ) -> None:
        """Open the files, loggers and the progress bar.

        config: settings of the run
        world: the ranks
        total_steps: optimizer steps of the whole run
        first_step: steps taken already
        checkpoint: the files of lines are taken back to it; None for a new run
        """
        self.world = world
        self.writers: list[Writer] = []
        self.bar = None
        self.last: dict[str, float] = {}
        if not world.is_main:
            return
        output_dir = Path(config.output_dir).absolute()  # a reward may change the directory
        self.metrics_path = output_dir / "metrics.jsonl"
        self.completions_path = output_dir / "completions.jsonl"
        rewind_lines(output_dir, checkpoint, logger.warning)
        if checkpoint is not None:
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                self.last |= json.loads(line)
            self.last.pop("step", None)
        self.writers = [_make_writer(name, output_dir, first_step) for name in config.loggers]
        if config.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, and show the most telling metrics in the progress bar."""
        if not self.world.is_main:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for write in self.writers:
            write(step, metrics)
        if self.bar is not None:
            self.bar.set_postfix({n: f"{metrics[n]:.4g}" for n in SHOWN if n in metrics})

    def completions(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Write sampled responses, a line per response, to completions.jsonl."""
        if self.world.is_main and lines:
            with self.completions_path.open("a", encoding="utf-8") as file:
                for line in lines:
                    file.write(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n")

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """Print a line on the terminal."""
        if not self.world.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


def _make_writer(name: str, output_dir: Path, first_step: int) -> Writer:
    """Return the back-end `name` of a run that goes on from first_step."""
    if name == "tensorboard":
        return _tensorboard_writer(output_dir, first_step)
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"loggers: {name} is not installed; pip install {name}, or remove it from loggers"
        ) from None
    run = module.init(project="una-fast", name=output_dir.name)
    return lambda step, metrics: run.log(metrics, step=step)


def _tensorboard_writer(output_dir: Path, first_step: int) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    purge_step = first_step + 1 if first_step else None
    board = SummaryWriter(output_dir / "tensorboard", purge_step=purge_step)

    def write(step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            board.add_scalar(key, value, step)
        board.flush()

    return write


def model_card(
    config: RunConfig, reports: Sequence[SourceReport], metrics: dict[str, float], is_adapter: bool
) -> str:
    """Return README.md of the trained model.

    config: settings of the run
    reports: counts of every source
    metrics: last metrics of the run
    is_adapter: the model is an adapter directory
    """
    mean = ", a mean over tokens" if config.length_normalize else ""
    offset = ""
    if config.offset:
        shown = f"r + f(x), centred by {config.offset}"
        if not isinstance(config.offset, str):
            shown = f"r + {config.offset:g}"
        offset = f", labels and scores compared with {shown}"
    library = "peft" if is_adapter else "transformers"
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    data = "\n".join(f"- {report}" for report in reports)
    about = [
        f"{config.model} aligned with UNA ([arXiv 2408.15339](https://arxiv.org/abs/2408.15339)) "
        "by una_fast: the implicit reward",
        f"r = {config.beta} * (log pi - log pi_ref){mean} regressed on the feedback below "
        f"(pairs: {config.pair}, labels:",
        f"{config.binary}, scores: {config.score}{offset}). All settings: `config.yaml`; "
        "every logged step: `metrics.jsonl`.",
    ]
    text = "\n".join(about)
    return f"""---
base_model: {config.model}
library_name: {library}
tags: [una, alignment, preference-optimization]
---

# {Path(config.output_dir).name}

{text}

## Data

{data}

## Last metrics

| metric | value |
|---|---|
{rows}
"""
