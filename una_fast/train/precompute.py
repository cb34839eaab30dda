"""Compute reference log-probs once for a whole data set, as a column of its records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.loader import Loader
from una_fast.data.records import as_object
from una_fast.data.sources import Source, read_rows
from una_fast.distributed import start_world
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring
from una_fast.resolved import find_facts, load_frozen, resolve, scoring_of


def precompute_reference(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Write the usable records of a run again, with a column of reference log-probs.

    config: settings of the run; the same model, tokenizer, precision and record settings must be
        used for training

    Files are output_dir/data-NN-<source>.jsonl for every source of the data, and
    eval_data-NN-<source>.jsonl likewise. A value of the column is a sum over tokens per response,
    chosen first. Returns the `data:` and `eval_data:` entries that train on the new files.

    ValueError for more than one process, and for runs that sample.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("una-fast precompute-ref runs as one process; start it without torchrun")
    if config.mode != "offline":
        raise ValueError(
            f"mode={config.mode}: only records have reference log-probs to compute; "
            "set mode: offline"
        )
    writer = _open_writer(config)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    written: dict[str, list[dict[str, Any]]] = {}
    for name, entries in (("data", config.data), ("eval_data", config.eval_data)):
        for number, entry in enumerate(entries):
            new_entry = writer.rewrite(entry, f"{name}-{number:02d}")
            written.setdefault(name, []).append(new_entry)
    return written


def _open_writer(config: RunConfig) -> _Writer:
    """Load the reference as a training run does."""
    device = start_world(config.device).device
    run = resolve(config, find_facts(config, [], device=device.type))
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    reference = load_frozen(config, run)
    reference.model.to(device)
    return _Writer(config, tokenizer, reference, scoring_of(config, run), device)


@dataclass(frozen=True)
class _Writer:
    """Writes sources again with the log-probs of a frozen model."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    reference: Policy
    scoring: Scoring
    device: torch.device

    def rewrite(self, entry: str | dict[str, Any], prefix: str) -> dict[str, Any]:
        """Write the new file of a source, and return the entry that trains on the file.

        entry: of the setting data or eval_data
        prefix: first part of the file's name
        """
        source = Source.parse(entry, self.config.record_options())
        unit_scores = self.config.objective().scores_in_unit_interval
        examples, report = load_examples(source, self.tokenizer, require_unit_scores=unit_scores)
        print(report, flush=True)
        target = Path(self.config.output_dir) / f"{prefix}-{Path(source.path).stem}.jsonl"
        _write_with(target, source, dict(self._logps(examples)))
        settings = dict(entry) if isinstance(entry, dict) else {}
        settings.pop("split", None)
        return {**settings, "path": str(target)}

    def _logps(self, examples: Sequence[Example]) -> Iterator[tuple[str, list[float]]]:
        """Yield (origin, log-probs of the responses) of every example."""
        loader = Loader(
            [examples],
            [1.0],
            batch_size=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            max_tokens_per_batch=self.config.max_tokens_per_batch,
            packed=self.reference.packed,
            seed=self.config.seed,
        )
        for step in loader.in_order():
            for micro_batch in step.micro_batches:
                yield from self._logps_of(micro_batch)

    def _logps_of(self, micro_batch: Sequence[Example]) -> Iterator[tuple[str, list[float]]]:
        batch = collate(
            micro_batch,
            packed=self.reference.packed,
            device=self.device,
            pad_id=self.tokenizer.pad_token_id,
        )
        logps = iter(self.scoring.logps(self.reference, batch).tolist())
        for example in micro_batch:
            yield example.origin, [next(logps) for _ in example.responses]


def _write_with(target: Path, source: Source, logps: dict[str, list[float]]) -> None:
    """Write the rows of a source that have log-probs, with the log-probs as a column.

    target: the new file
    source: the rows; its settings name the column
    logps: origin of a row -> log-probs of its responses
    """
    column = source.options.resolved().columns.get("ref_logps", "ref_logps")
    with target.open("w", encoding="utf-8") as file:
        for origin, row in read_rows(source):
            if origin in logps:
                record = {**as_object(row), column: logps[origin]}
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
