"""The settings of `una-fast demo`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DemoConfig:
    """The demo: text, base model, alignment, and what changed. Runs on the CPU, so that it needs nothing else."""

    output_dir: str = "runs/demo"
    """Run directory. If it is not empty, the first free one of output_dir-2, output_dir-3, ... is used instead."""
    seed: int = 0
    """Seed of the split, the records, the weights and the samples."""
    online: bool = False
    """Align with rewards of the model's own samples instead of records."""
    quick: bool = False
    """A few modules and steps: shows that everything works, in seconds, and aligns nothing worth looking at."""


@dataclass(frozen=True)
class Sizes:
    """What `quick` changes."""

    max_modules: int | None = None
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    base_epochs: int = 4
    align_epochs: float = 1.0
    samples: int = 128
    online_steps: int = 40
    online_prompts: int = 32


QUICK = Sizes(
    40, 512, hidden_size=32, layers=1, base_epochs=1, align_epochs=0.2, samples=8, online_steps=3
)
