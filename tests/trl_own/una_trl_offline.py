"""A pytest plugin: TRL's tests without a network; with UNA=1, with our trainers in TRL's place.

UNA_TRL_DATA: folder of the datasets that hub.py made. UNA_CALLS: a file; every test adds a line,
the calls of our op in it, so that trainers that fell back to TRL's head are seen.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

SWAPPED = ("DPOTrainer", "KTOTrainer")
_DATA = Path(os.environ["UNA_TRL_DATA"])
_load_dataset = datasets.load_dataset


def load_dataset(path: str, name: str | None = None, *args: Any, **options: Any) -> Any:
    """Load a dataset of hub.py; anything else as ever."""
    folder = _DATA / str(path) / (name or "default")
    if not folder.is_dir():
        return _load_dataset(path, name, *args, **options)
    files = {file.stem: str(file) for file in folder.glob("*.parquet")}
    kept = {key: options[key] for key in ("split", "streaming") if key in options}
    return _load_dataset("parquet", data_files=files, **kept)


datasets.load_dataset = load_dataset
import trl  # noqa: E402
import trl.trainer  # noqa: E402

if os.environ.get("UNA") == "1":
    ours = importlib.import_module("una_fast.integrations.trl")
    for trainer in SWAPPED:
        for module in (trl, trl.trainer):
            setattr(module, trainer, getattr(ours, f"UNA{trainer}"))

helpers = importlib.import_module("trl.import_utils")


def _absent(name: str) -> Any:
    """Stand for a helper of another release: nothing more is installed."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda *args, **kwargs: False
    raise AttributeError(name)


if not hasattr(helpers, "__getattr__"):
    helpers.__getattr__ = _absent
# Liger's layers are Triton kernels, patched into transformers for the whole process: without a GPU
# its tests fail, and every test after them.
if not torch.cuda.is_available():
    helpers.is_liger_kernel_available = lambda *args, **kwargs: False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Write down the calls of our op in a test."""
    from una_fast.head import ops

    own, calls = ops.token_logps, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    ops.token_logps = counted
    try:
        yield
    finally:
        ops.token_logps = own
        with open(os.environ["UNA_CALLS"], "a", encoding="utf-8") as file:
            file.write(f"{len(calls)}\t{item.nodeid}\n")
