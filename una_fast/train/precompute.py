"""Reference log-probs once for a whole data set: every usable record again, with a `ref_logps` column."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.loader import Loader
from una_fast.data.records import as_object
from una_fast.data.sources import Source, read_rows
from una_fast.distributed import start_world
from una_fast.model.loading import load_tokenizer
from una_fast.resolved import find_facts, load_frozen, resolve, scoring_of


def precompute_reference(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Write output_dir/data-NN-<source>.jsonl for every source of a run's data, and eval_data-NN-... likewise.

    ref_logps are sums over tokens, one per response, chosen first. Returns the `data:` and `eval_data:` entries that
    train on the new files. The same model, tokenizer, precision and record settings must be used for training.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("una-fast precompute-ref runs as one process; start it without torchrun")
    if config.mode != "offline":
        raise ValueError(
            f"mode={config.mode}: only records have reference log-probs to compute; set mode: offline"
        )
    world = start_world(config.device)
    run = resolve(config, find_facts(config, [], device=world.device.type))
    tokenizer = load_tokenizer(
        config.tokenizer or config.model, trust_remote_code=config.trust_remote_code
    )
    policy = load_frozen(config, run)
    policy.model.to(world.device)
    scoring = scoring_of(config, run)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    def logps(examples: list[Example]) -> Iterator[tuple[str, list[float]]]:
        loader = Loader(
            [examples],
            [1.0],
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_batch=config.max_tokens_per_batch,
            packed=policy.packed,
            seed=config.seed,
        )
        for part in (part for step in loader.in_order() for part in step.micro_batches):
            batch = collate(
                part, packed=policy.packed, device=world.device, pad_id=tokenizer.pad_token_id
            )
            values = iter(scoring.logps(policy, batch).tolist())
            for example in part:
                yield example.origin, [next(values) for _ in example.responses]

    def rewrite(entry: str | dict[str, Any], prefix: str) -> dict[str, Any]:
        source = Source.parse(entry, config.record_options())
        unit_scores = config.objective().scores_in_unit_interval
        examples, report = load_examples(source, tokenizer, require_unit_scores=unit_scores)
        print(report, flush=True)
        target = output_dir / f"{prefix}-{Path(source.path).stem}.jsonl"
        _write_with(target, source, dict(logps(examples)))
        own = dict(entry) if isinstance(entry, dict) else {}
        own.pop("split", None)
        return {**own, "path": str(target)}

    return {
        name: [rewrite(entry, f"{name}-{number:02d}") for number, entry in enumerate(entries)]
        for name, entries in (("data", config.data), ("eval_data", config.eval_data))
        if entries
    }


def _write_with(target: Path, source: Source, logps: dict[str, list[float]]) -> None:
    """The rows of a source that have reference log-probs, with these, under the name that the source reads."""
    column = source.options.resolved().columns.get("ref_logps", "ref_logps")
    with target.open("w", encoding="utf-8") as file:
        for origin, row in read_rows(source):
            if origin in logps:
                record = {**as_object(row), column: logps[origin]}
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
