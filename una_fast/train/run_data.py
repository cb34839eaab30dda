"""The data of a run: records and prompts by source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.examples import Example, Prompt, SourceReport, load_examples, load_prompts
from una_fast.data.loader import hold_out
from una_fast.data.sources import Source
from una_fast.model.reference import without_cached_logps
from una_fast.train.ref_cache import RefCache, read_caches, uses_caches


@dataclass(frozen=True)
class RunData:
    """All data of a run.

    records: examples to train on, by source
    weights: times per epoch that the records of a source are seen, by source
    prompts: prompts to sample from, by source
    prompt_weights: as `weights`, for prompts
    eval_records: records held out for evaluation
    eval_prompts: prompts held out for evaluation
    reports: counts of every source, in the order of data and eval_data
    caches: sidecars of files with ref_logps that the run would use
    """

    records: list[list[Example]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    prompts: list[list[Prompt]] = field(default_factory=list)
    prompt_weights: list[float] = field(default_factory=list)
    eval_records: list[Example] = field(default_factory=list)
    eval_prompts: list[Prompt] = field(default_factory=list)
    reports: list[SourceReport] = field(default_factory=list)
    caches: list[RefCache] = field(default_factory=list)

    def examples(self) -> list[Example]:
        """Return all records, held-out records too, and no prompts."""
        return [*itertools.chain.from_iterable(self.records), *self.eval_records]

    def all_prompts(self) -> list[Prompt]:
        """Return all prompts, held-out prompts too."""
        return [*itertools.chain.from_iterable(self.prompts), *self.eval_prompts]

    def without_cached_logps(self) -> RunData:
        """Return the same data without the ref_logps of the records."""
        return replace(
            self,
            records=[without_cached_logps(source) for source in self.records],
            eval_records=without_cached_logps(self.eval_records),
            caches=[],
        )


@dataclass(frozen=True)
class _Loaded:
    """A source that was read.

    sampled: the source gives prompts to sample from, not records
    caches: sidecars of its files
    """

    weight: float
    sampled: bool
    examples: list[Any]
    report: SourceReport
    caches: list[RefCache]


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Read and tokenise all sources of a run.

    config: settings of the run
    tokenizer: of the policy

    ValueError for malformed records, for sources that do not go with the mode of the run, and for
    ref_logps of other tokens.
    """
    data = RunData()
    for entry in config.data:
        loaded = _load_source(config, tokenizer, entry)
        data.reports.append(loaded.report)
        data.caches.extend(loaded.caches)
        training = _hold_out(config, data, loaded)
        if loaded.sampled:
            data.prompts.append(training)
            data.prompt_weights.append(loaded.weight)
        else:
            data.records.append(training)
            data.weights.append(loaded.weight)
    for entry in config.eval_data:
        loaded = _load_source(config, tokenizer, entry)
        data.reports.append(loaded.report)
        data.caches.extend(loaded.caches)
        _add_to_evaluation(data, loaded, loaded.examples)
    if config.mode == "mixed" and not (data.records and data.prompts):
        raise ValueError(
            "mode=mixed needs sources of both kinds: mark those that are to be sampled from, "
            "{path: ..., online: true}"
        )
    return data


def _load_source(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, entry: str | dict[str, Any]
) -> _Loaded:
    source = Source.parse(entry, config.record_options())
    sampled = config.mode == "online" if source.online is None else source.online
    if sampled != (config.mode == "online") and config.mode != "mixed":
        raise ValueError(
            f"{source.path} is set to online: {str(sampled).lower()}, but the mode is "
            f"{config.mode}; set mode: mixed"
        )
    caches: list[RefCache] = []
    if sampled:
        examples, report = load_prompts(source, tokenizer, max_new_tokens=config.max_new_tokens)
    else:
        unit_scores = config.objective().scores_in_unit_interval
        examples, report = load_examples(source, tokenizer, require_unit_scores=unit_scores)
        if uses_caches(config):
            caches = read_caches(examples, tokenizer, source.options)
    return _Loaded(source.weight, sampled, examples, report, caches)


def _hold_out(config: RunConfig, data: RunData, loaded: _Loaded) -> list[Any]:
    """Return the training examples of a source; the others join the evaluation set."""
    if not config.eval_fraction:
        return loaded.examples
    training, held_out = hold_out(loaded.examples, config.eval_fraction, config.seed)
    if not training:
        raise ValueError(
            f"eval_fraction={config.eval_fraction} leaves a source without training records"
        )
    _add_to_evaluation(data, loaded, held_out)
    return training


def _add_to_evaluation(data: RunData, loaded: _Loaded, examples: Sequence[Any]) -> None:
    if loaded.sampled:
        data.eval_prompts.extend(examples)
    else:
        data.eval_records.extend(examples)
