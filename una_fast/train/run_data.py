"""The data of a run: records and prompts by source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.examples import Example, Prompt, SourceReport, load_examples, load_prompts
from una_fast.data.loader import hold_out
from una_fast.data.sources import Source


@dataclass
class RunData:
    """The data of a run: records by source and the sources' weights, prompts to sample from likewise, what is held out
    of both for evaluation, and what became of the records of every source."""

    records: list[list[Example]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prompts: list[list[Prompt]] = field(default_factory=list)
    prompt_weights: list[float] = field(default_factory=list)
    eval_records: list[Example] = field(default_factory=list)
    eval_prompts: list[Prompt] = field(default_factory=list)
    reports: list[SourceReport] = field(default_factory=list)

    def examples(self) -> list[Example]:
        """All records, without prompts."""
        return [example for part in self.records for example in part] + self.eval_records

    def all_prompts(self) -> list[Prompt]:
        return [prompt for part in self.prompts for prompt in part] + self.eval_prompts


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Everything that a run reads, tokenised. Raises ValueError for what cannot be used."""
    unit_scores = config.objective().scores_in_unit_interval
    found = RunData()

    def load(entry: str | dict[str, Any]) -> tuple[Source, bool, list[Any]]:
        source = Source.parse(entry, config.record_options())
        online = config.mode == "online" if source.online is None else source.online
        if online != (config.mode == "online") and config.mode != "mixed":
            raise ValueError(
                f"{source.path} is set to online: {str(online).lower()}, but the mode is {config.mode}; set mode: mixed"
            )
        if online:
            examples, report = load_prompts(source, tokenizer, max_new_tokens=config.max_new_tokens)
        else:
            examples, report = load_examples(source, tokenizer, require_unit_scores=unit_scores)
        found.reports.append(report)
        return source, online, examples

    for entry in config.data:
        source, online, examples = load(entry)
        if config.eval_fraction:
            examples, held = hold_out(examples, config.eval_fraction, config.seed)
            (found.eval_prompts if online else found.eval_records).extend(held)
            if not examples:
                raise ValueError(
                    f"eval_fraction={config.eval_fraction} leaves a source without training records"
                )
        (found.prompts if online else found.records).append(examples)
        (found.prompt_weights if online else found.weights).append(source.weight)
    for entry in config.eval_data:
        _, online, examples = load(entry)
        (found.eval_prompts if online else found.eval_records).extend(examples)
    if config.mode == "mixed" and not (found.records and found.prompts):
        raise ValueError(
            "mode=mixed needs sources of both kinds: mark those that are to be sampled from, {path: ..., online: true}"
        )
    return found
