"""The settings of `una-fast demo`."""

from __future__ import annotations

from dataclasses import dataclass

from una_fast.checks import check_at_least, check_types


@dataclass
class DemoConfig:
    """The demo: ask a chat model about Python, align it, and ask again."""

    model: str | None = None
    """Chat model: directory, GGUF file or hub name; null: SmolLM2-135M-Instruct."""
    output_dir: str = "runs/demo"
    """Run directory; if not empty, the first free of output_dir-2, output_dir-3, ... instead."""
    seed: int = 0
    """Seed of the split, the records, the weights and the samples."""
    online: bool = False
    """Align with rewards of the model's own samples instead of records."""
    from_scratch: bool = False
    """Train a tiny chat model first, and align that: nothing is downloaded, and little learnt."""
    quick: bool = False
    """A few questions and steps: shows that all works, and aligns next to nothing."""

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(0, self, ["seed"])
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty; give a directory for the results of the demo")
        if self.from_scratch and self.model is not None:
            raise ValueError(
                f"from_scratch=true trains a model, and model={self.model} names one; leave one out"
            )


@dataclass(frozen=True)
class Sizes:
    """Sizes of the demo; `quick` makes all sizes small.

    held_out: questions asked before and after, left out of the records
    pairs, labels, scores: records by kind
    batch_size: records of a step
    answer_tokens: longest answer
    online_steps, online_prompts, online_tokens: steps, questions of a step, longest sample
    max_modules: modules of the library to read; default: all
    vocab_size, hidden_size, layers, base_epochs: the model trained from scratch
    """

    held_out: int = 32
    pairs: int = 32
    labels: int = 32
    scores: int = 16
    batch_size: int = 8
    answer_tokens: int = 64
    online_steps: int = 6
    online_prompts: int = 8
    online_tokens: int = 40
    max_modules: int | None = None
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    base_epochs: int = 4


QUICK = Sizes(
    held_out=4,
    pairs=2,
    labels=2,
    scores=8,
    batch_size=6,
    answer_tokens=24,
    online_steps=2,
    online_prompts=2,
    online_tokens=16,
    max_modules=20,
    vocab_size=512,
    hidden_size=64,
    layers=1,
    base_epochs=3,
)
