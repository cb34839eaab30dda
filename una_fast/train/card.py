"""The model card: README.md of the trained model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from una_fast.config import RunConfig
from una_fast.data.examples import SourceReport
from una_fast.model.gguf import is_gguf
from una_fast.model.loading import model_and_adapter
from una_fast.printable import told, without_secrets

# Metrics of the machine and of the course of a run, which say nothing of the model.
_OF_THE_COURSE = re.compile(
    r"(eval_)?(padding|tokens|response_tokens|units|epoch|learning_rate|grad_norm|tok_per_sec"
    r"|mfu|skipped_steps|memory/.*|time/.*)"
)
_LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]{1,60})['\"]?\s*$", re.MULTILINE | re.ASCII)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LONGEST_CARD = 2**20  # characters that are read of the base model's card


def model_card(
    config: RunConfig,
    reports: Sequence[SourceReport],
    metrics: dict[str, float],
    before: dict[str, float] | None = None,
    *,
    adapter: str | None = None,
) -> str:
    """Return README.md of the trained model.

    config: settings of the run
    reports: counts of every source, first of `data`, then of `eval_data`
    metrics: last metrics of the run
    before: metrics of the evaluation before the first step, if any
    adapter: settings of the adapter in words; None for a whole model
    """
    library = "transformers" if adapter is None else "peft"
    front: dict[str, Any] = {
        "base_model": without_secrets(config.model),
        "library_name": library,
        "tags": ["una", "alignment", "preference-optimization"],
    }
    licence = licence_of(config.model)
    if licence is not None:
        front["license"] = licence
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).rstrip()}\n---",
        f"# {_inline(Path(config.output_dir).name)}",
        _about(config, adapter),
        f"## Use\n\n{_use(config, adapter is not None)}",
        "## Data\n\n" + "\n".join(_data_lines(config, reports)),
        "## Metrics\n\n" + "\n".join(_metric_rows(metrics, before or {})),
    ]
    return "\n\n".join(sections) + "\n"


def _about(config: RunConfig, adapter: str | None) -> str:
    mean = ", a mean over tokens" if config.length_normalize else ""
    offset = ""
    if config.offset:
        shown = f"r + f(x), centred by {config.offset}"
        if not isinstance(config.offset, str):
            shown = f"r + {config.offset:g}"
        offset = f", labels and scores compared with {shown}"
    lines = [
        f"{_inline(config.model)} aligned with UNA "
        "([arXiv 2408.15339](https://arxiv.org/abs/2408.15339)) by una_fast: the implicit reward",
        f"r = {config.beta} * (log pi - log pi_ref){mean} regressed on the feedback below "
        f"(pairs: {config.pair}, labels:",
        f"{config.binary}, scores: {config.score}{offset}). All settings: `config.yaml`; "
        "every logged step: `metrics.jsonl`.",
    ]
    if adapter is not None:
        lines.append(f"The files hold {_inline(adapter)}, and no other weights.")
    if config.quantize_base is not None:
        lines.append(
            f"The adapter was trained on the base at 4 bits ({config.quantize_base}, QLoRA); "
            "`una-fast merge` adds the adapter to the numbers of that base."
        )
    return "\n".join(lines)


def _use(config: RunConfig, is_adapter: bool) -> str:
    """Return how the model is loaded: a block of Python."""
    kind = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    package = "peft" if is_adapter else "transformers"
    names = "AutoTokenizer"
    loading = [f"model = {kind}.from_pretrained(path)"]
    base = _gguf_base(config) if is_adapter else None
    if base is not None:
        # peft cannot load such a base by itself.
        kind = "PeftModel"
        names = "AutoModelForCausalLM, AutoTokenizer"
        where = f"{str(base.parent)!r}, gguf_file={base.name!r}"
        loading = [
            f"base = AutoModelForCausalLM.from_pretrained({where})",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    lines = [
        "```python",
        f"from {package} import {kind}",
        f"from transformers import {names}",
        "",
        'path = "."  # this directory',
        *loading,
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        "```",
    ]
    return "\n".join(lines)


def _gguf_base(config: RunConfig) -> Path | None:
    """Return the GGUF file under the adapter of a run; None for a base of another form."""
    with suppress(ValueError):  # the model's directory is gone: no reason to end without a card
        base, _ = model_and_adapter(config.model)
        return Path(base) if is_gguf(base) else None
    return None


def _data_lines(config: RunConfig, reports: Sequence[SourceReport]) -> list[str]:
    lines = []
    for number, report in enumerate(reports):
        mark = " (evaluation)" if number >= len(config.data) else ""
        lines.append(f"- {_inline(report)}{mark}")
    return lines


def _metric_rows(metrics: dict[str, float], before: dict[str, float]) -> list[str]:
    """Return a table of the metrics of the model, before the first step and after the last."""
    rows = ["| metric | before | after |", "|---|---|---|"]
    for name, value in metrics.items():
        if _OF_THE_COURSE.fullmatch(name):
            continue
        earlier = f"{before[name]:.4g}" if name in before else ""
        rows.append(f"| {_inline(name)} | {earlier} | {value:.4g} |")
    return rows


def licence_of(model: str) -> str | None:
    """Return the licence in the card of a local model directory, or None."""
    path = Path(model).expanduser() / "README.md"
    try:
        if not path.is_file():
            return None
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_CARD)
    except (OSError, ValueError):
        return None
    front = _FRONT_MATTER.match(text)
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else None


def _inline(text: object) -> str:
    """Return foreign text for a line of Markdown: no new line, markup, HTML or table cell."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", told(text))
