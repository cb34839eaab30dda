"""Merge an adapter into its base model: `una-fast merge`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from una_fast.files import ASIDE
from una_fast.guide.run_of import model_of, quantize_base_of
from una_fast.guide.settings import MergeConfig
from una_fast.model.export import save_merged
from una_fast.model.loading import load_tokenizer, model_and_adapter
from una_fast.model.policy import load_policy
from una_fast.model.stored import StoredDtypes
from una_fast.printable import printable


def merge(settings: MergeConfig) -> Path:
    """Write the base model with the adapter added in; return the absolute directory.

    The sum is taken in float32, and rounded once, to the dtypes of the base model's files. An
    adapter that was trained on a base at 4 bits is added to the numbers of that base.

    ValueError for a run without an adapter, and for a directory that is there already.
    """
    output_dir = Path(settings.output_dir).expanduser().absolute()
    if output_dir.exists():
        raise ValueError(f"output_dir={printable(output_dir)} is there already; set another")
    path = model_of(settings.run)
    base, adapter = model_and_adapter(path)
    if adapter is None:
        raise ValueError(
            f"{printable(path)} holds a whole model, and no adapter to merge; it is used as it is"
        )
    tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    policy = load_policy(
        path,
        dtype=torch.float32,
        trust_remote_code=settings.trust_remote_code,
        quantize_base=quantize_base_of(path),
    )
    policy.stored = StoredDtypes.of(base)
    aside = output_dir.with_name(output_dir.name + ASIDE)
    try:
        save_merged(policy, aside, tokenizer)
        aside.rename(output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return output_dir
