"""Output of a run: metrics.jsonl, completions.jsonl, loggers, the progress."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from una_fast.config import RunConfig
from una_fast.distributed import World
from una_fast.files import named_in_errors
from una_fast.printable import told
from una_fast.train.loggers import Loggers
from una_fast.train.run_dir import rewind_lines

logger = logging.getLogger(__name__)

# Metric -> name in the progress bar and at the end of a run.
TOLD = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
    "kl": "KL",
    "tok_per_sec": "tokens/s",
}


def told_metrics(metrics: dict[str, float]) -> dict[str, str]:
    """Return the most telling metrics in words, by their short names."""
    found = {}
    for name, short in TOLD.items():
        if name in metrics:
            spec = ",.0f" if name == "tok_per_sec" else ".4g"
            found[short] = format(metrics[name], spec)
    return found


class Reporter:
    """Writes the metrics of a run on the main rank; calls on other ranks have no effect.

    On a terminal there is a bar, and elsewhere a line for every hundredth of the run.

    last: newest value of every metric, up to the step that the run goes on from
    before: metrics of the evaluation before the first step
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
        self.loggers: Loggers | None = None
        self.bar = None
        self.shown: dict[str, str] = {}  # beside the bar
        self.last: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self.every: int | None = None  # steps between two lines of progress
        self.told_step = first_step
        self.total_steps = total_steps
        self.first_step = first_step
        self.start = time.perf_counter()
        if not world.is_main:
            return
        output_dir = Path(config.output_dir).absolute()  # a reward may change the directory
        self.metrics_path = output_dir / "metrics.jsonl"
        self.completions_path = output_dir / "completions.jsonl"
        rewind_lines(output_dir, checkpoint, logger.warning)
        if checkpoint is not None and self.metrics_path.exists():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                metrics = json.loads(line)
                self.last |= metrics
                self._keep_first(metrics)
            self.last.pop("step", None)
        self.loggers = Loggers(config, output_dir, first_step)
        if config.progress and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        elif config.progress:
            self.every = max(total_steps // 100, 1)

    def _keep_first(self, metrics: dict[str, float]) -> None:
        """Keep the metrics of the evaluation before the first step."""
        if metrics.get("step") == 0:
            self.before = metrics

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, and show the most telling metrics in the progress bar."""
        if not self.world.is_main:
            return
        line = {"step": step, **metrics}
        self._keep_first(line)
        _append(self.metrics_path, json.dumps(line) + "\n")
        if self.loggers is not None:
            self.loggers.write(step, metrics)
        if self.bar is not None:
            self.shown |= told_metrics(metrics)
            self.bar.set_postfix(self.shown)
        is_evaluation = "loss" not in metrics
        if self.every is None:
            return
        is_due = step - self.told_step >= self.every or step == self.total_steps
        if is_due or is_evaluation:
            self.say(self._progress_line(step, metrics))
        if is_due and not is_evaluation:
            self.told_step = step

    def _progress_line(self, step: int, metrics: dict[str, float]) -> str:
        """Return the progress of a run as a line of a log."""
        told_of = told_metrics(metrics)
        evaluated = {}
        for name, value in metrics.items():
            if name.startswith("eval_"):
                evaluated[name.removeprefix("eval_")] = value
        if evaluated:
            told_of = told_metrics(evaluated)
        parts = [f"step {step}/{self.total_steps}" + (" evaluation" if evaluated else "")]
        parts += [f"{name} {value}" for name, value in told_of.items()]
        taken = step - self.first_step
        if taken and not evaluated:
            left = (time.perf_counter() - self.start) / taken * (self.total_steps - step)
            parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def phase(self, name: str) -> None:
        """Show the work at hand in the bar, such as "generate"; "" for a step of training."""
        if self.bar is not None:
            self.bar.set_description_str(name)

    @contextmanager
    def evaluating(self, batches: int) -> Iterator[Callable[[], None]]:
        """Show the progress of an evaluation in the bar; the block calls what it is given.

        batches: calls to come
        """
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.phase(f"evaluate {done}/{batches}")

        self.phase("evaluate")
        yield advance
        self.phase("")

    def completions(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Write sampled responses, a line per response, to completions.jsonl."""
        if self.world.is_main and lines:
            texts = [json.dumps({"step": step, **line}, ensure_ascii=False) for line in lines]
            _append(self.completions_path, "\n".join(texts) + "\n")

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str) -> None:
        """Print a text on the terminal as one line; control characters are escaped.

        A terminal that is gone does not end the run.
        """
        if not self.world.is_main:
            return
        try:
            if self.bar is not None:
                self.bar.write(told(text))
            else:
                print(told(text), flush=True)
        except BrokenPipeError:
            logger.debug("nobody reads stdout")

    def close(self, *, failed: bool = False) -> None:
        """Close the progress bar, and end the runs of the loggers, as failed after an error."""
        if self.bar is not None:
            self.bar.close()
        if self.loggers is not None:
            self.loggers.close(failed=failed)


def _append(path: Path, text: str) -> None:
    """Add lines to a file; an OSError names the file."""
    # A lone surrogate of a decoded sample becomes its JSON escape.
    with named_in_errors(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
