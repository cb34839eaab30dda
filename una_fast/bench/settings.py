"""The settings of `una-fast bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from una_fast.checks import check_at_least, check_choices, check_one_of, check_types
from una_fast.config import Device, Engine, Precision

Head = Literal["trained", "frozen"]
CONTENDERS = ("una_fast", "eager", "trl", "liger", "cce")


@dataclass
class BenchConfig:
    """The head to measure, and the files of the result."""

    model: str | None = None
    """Model directory, GGUF file or hub name with the head to measure; null: hidden and vocab."""
    tokens: int | None = None
    """Response tokens of a call, in two responses; null: 8192 on a GPU, by the head on a CPU."""
    hidden: int | None = None
    """Hidden size without a model; null: 4096 on a GPU, 512 on a CPU."""
    vocab: int | None = None
    """Vocabulary without a model; null: 128256 on a GPU, 32000 on a CPU."""
    head: Head = "trained"
    """trained | frozen (adapters inside the layers, or a head that is left alone)."""
    workspace_mb: float | None = None
    """Workspace of una_fast in MiB; null: 2048 on a GPU, 256 on a CPU."""
    engine: Engine = "auto"
    """Engine of the fused head."""
    precision: Precision = "auto"
    """Dtype of hidden states and head; auto: bf16 on a GPU, fp32 on a CPU."""
    device: Device = "auto"
    """Device to measure on."""
    contenders: list[str] | None = None
    """A list of una_fast, eager, trl, liger, cce, such as '["una_fast", "trl"]'; null: all."""
    quick: bool = False
    """Fewer tokens and rounds, and no search for the longest row on a GPU: about a minute."""
    seconds: float = 60.0
    """Seconds of timed rounds, after which no further round starts; three are made in any case."""
    out: str = "bench-results"
    """Directory of bench.json and bench.png; older ones are replaced."""
    progress: bool = True
    """Show a bar on a terminal."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(2, self, ["tokens", "vocab"], or_null=True)
        check_at_least(1, self, ["hidden"], or_null=True)
        if self.tokens is not None and self.tokens % 2:
            raise ValueError(f"tokens={self.tokens} must be even: a call has two equal responses")
        if self.model is not None and (self.hidden or self.vocab):
            raise ValueError("the model gives hidden and vocab; leave them out, or leave model out")
        if self.model is not None and not self.model.strip():
            raise ValueError("model is empty; name a model, or give --hidden and --vocab")
        for name in self.contenders or ():
            check_one_of("contenders", name, CONTENDERS)
        if self.contenders == []:
            raise ValueError(f"contenders is empty; name some of {', '.join(CONTENDERS)}")
        if self.workspace_mb is not None and not self.workspace_mb >= 1:
            raise ValueError(f"workspace_mb={self.workspace_mb} must be at least 1, or null")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be positive")
        if not self.out:
            raise ValueError("out is empty; name a directory")
