"""The trainer. `train(RunConfig(...))` runs a configuration to the end."""

from __future__ import annotations

from una_fast.lazy import lazy_names

_PUBLIC = {
    "train": "loop",
    "Trainer": "loop",
    "TrainResult": "loop",
    "load_data": "run_data",
    "precompute_reference": "precompute",
    "complete_checkpoints": "checkpoint",
}
__all__ = [*_PUBLIC]
__getattr__ = lazy_names(__name__, _PUBLIC)
