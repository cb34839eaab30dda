"""Output of a run: metrics.jsonl, completions.jsonl, loggers, the progress bar, the model card."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from una_fast.config import RunConfig
from una_fast.data.examples import SourceReport
from una_fast.distributed import World
from una_fast.files import named_in_errors
from una_fast.model.gguf import is_gguf
from una_fast.model.loading import model_and_adapter
from una_fast.printable import told, without_secrets
from una_fast.train.loggers import Loggers
from una_fast.train.run_dir import rewind_lines

logger = logging.getLogger(__name__)

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
        self.loggers: Loggers | None = None
        self.bar = None
        self.last: dict[str, float] = {}
        if not world.is_main:
            return
        output_dir = Path(config.output_dir).absolute()  # a reward may change the directory
        self.metrics_path = output_dir / "metrics.jsonl"
        self.completions_path = output_dir / "completions.jsonl"
        rewind_lines(output_dir, checkpoint, logger.warning)
        if checkpoint is not None and self.metrics_path.exists():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                self.last |= json.loads(line)
            self.last.pop("step", None)
        self.loggers = Loggers(config, output_dir, first_step)
        if config.progress:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, and show the most telling metrics in the progress bar."""
        if not self.world.is_main:
            return
        _append(self.metrics_path, json.dumps({"step": step, **metrics}) + "\n")
        if self.loggers is not None:
            self.loggers.write(step, metrics)
        if self.bar is not None:
            self.bar.set_postfix({n: f"{metrics[n]:.4g}" for n in SHOWN if n in metrics})

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
    rows = "\n".join(f"| {_inline(name)} | {value:.4g} |" for name, value in metrics.items())
    data = "\n".join(f"- {_inline(report)}" for report in reports)
    front = {
        "base_model": without_secrets(config.model),
        "library_name": library,
        "tags": ["una", "alignment", "preference-optimization"],
    }
    about = [
        f"{_inline(config.model)} aligned with UNA "
        "([arXiv 2408.15339](https://arxiv.org/abs/2408.15339)) by una_fast: the implicit reward",
        f"r = {config.beta} * (log pi - log pi_ref){mean} regressed on the feedback below "
        f"(pairs: {config.pair}, labels:",
        f"{config.binary}, scores: {config.score}{offset}). All settings: `config.yaml`; "
        "every logged step: `metrics.jsonl`.",
    ]
    text = "\n".join(about) + _how_to_load(config, is_adapter)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).rstrip()}
---

# {_inline(Path(config.output_dir).name)}

{text}

## Data

{data}

## Last metrics

| metric | value |
|---|---|
{rows}
"""


def _how_to_load(config: RunConfig, is_adapter: bool) -> str:
    """Return a paragraph of the card for an adapter whose base peft cannot load by itself."""
    base = ""
    with suppress(ValueError):  # the model's directory is gone: no reason to end without a card
        base, _ = model_and_adapter(config.model)
    if not is_adapter or not is_gguf(base):
        return ""
    file = Path(base)
    return f"""

The base model is a GGUF file, which una_fast loads with the adapter (`model:` this directory).
With transformers and peft, load the base first:

```python
base = AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, gguf_file={file.name!r})
model = PeftModel.from_pretrained(base, {str(Path(config.output_dir).resolve())!r})
```"""


def _inline(text: object) -> str:
    """Return foreign text for a line of Markdown: no new line, markup, HTML or table cell."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", told(text))
