"""Reference log-probs once for a whole data set: every usable record again, with a `ref_logps` column."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from una_fast.config import RunConfig
from una_fast.data import Source, collate, load_examples, read_rows
from una_fast.packing import packing_refusal
from una_fast.policy import load_policy, load_tokenizer
from una_fast.records import as_object
from una_fast.scoring import Scoring
from una_fast.sharding import start_world


def precompute_reference(config: RunConfig) -> list[dict[str, Any]]:
    """Write output_dir/<source>.jsonl for every source of a run's configuration.

    ref_logps are sums over tokens, one per response, chosen first. Returns the `data:` entries that train on the new
    files. The same model, tokenizer and record settings must be used for training.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("una-fast precompute-ref runs as one process; start it without torchrun")
    world = start_world(config.device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    policy = load_policy(
        config.model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    policy.packed = config.packing and packing_refusal(policy.causal_lm) is None
    policy.model.to(world.device).eval()
    scoring = Scoring(config.workspace_mb, config.engine)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, entry in enumerate(config.data):
        source = Source.parse(entry, config.record_options())
        unit_scores = config.objective().scores_in_unit_interval
        examples, report = load_examples(source, tokenizer, require_unit_scores=unit_scores)
        print(report, flush=True)
        logps: dict[str, list[float]] = {}
        for start in range(0, len(examples), config.micro_batch_size):
            part = examples[start : start + config.micro_batch_size]
            batch = collate(part, packed=policy.packed, device=world.device, pad_id=tokenizer.pad_token_id)
            values = iter(scoring.logps(policy, batch).tolist())
            for example in part:
                logps[example.origin] = [next(values) for _ in example.responses]
        target = output_dir / f"{number:02d}-{Path(source.path).stem}.jsonl"
        with target.open("w", encoding="utf-8") as file:
            for origin, row in read_rows(source):
                if origin in logps:
                    record = {**as_object(row), "ref_logps": logps[origin]}
                    file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        own = dict(entry) if isinstance(entry, dict) else {}
        own.pop("split", None)
        entries.append({**own, "path": str(target)})
    return entries
