"""The settings of `una-fast demo`."""

from __future__ import annotations

from dataclasses import dataclass

from una_fast.checks import check_at_least, check_types


@dataclass
class DemoConfig:
    """The demo, on the CPU: text, base model, alignment, and a comparison of both models."""

    output_dir: str = "runs/demo"
    """Run directory; if not empty, the first free of output_dir-2, output_dir-3, ... instead."""
    seed: int = 0
    """Seed of the split, the records, the weights and the samples."""
    online: bool = False
    """Align with rewards of the model's own samples instead of records."""
    quick: bool = False
    """A few modules and steps, in seconds: shows that all works, and aligns next to nothing."""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(0, self, ["seed"])
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a directory for the results of the demo")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the demo: text, model, training; `quick` makes all of them small."""

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
