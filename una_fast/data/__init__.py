"""Rows of data -> records -> token ids -> examples -> batches."""

from __future__ import annotations

from una_fast.lazy import lazy_names

_PUBLIC = {
    "Source": "sources",
    "RecordOptions": "settings",
    "Example": "examples",
    "Prompt": "examples",
    "load_examples": "examples",
    "load_prompts": "examples",
}
__all__ = [*_PUBLIC]
__getattr__ = lazy_names(__name__, _PUBLIC)
