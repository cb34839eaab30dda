"""The settings of a planned call of the fused head: `una-fast plan --op N D V`."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEVICES = ("cpu", "cuda")


@dataclass
class HeadCallOptions:
    """A call of the fused head (--op)."""

    pairs: int = 1
    """--op: pairs of two responses of N / (2 pairs) tokens each; 0: one scored response of N."""
    train_head: bool = True
    """--op: whether the head is trained (LoRA and a tied, frozen head: false)."""
    cached_reference: bool = False
    """Whether the reference log-probs are given, and cost no pass."""


@dataclass
class PlanConfig(HeadCallOptions):
    """A call of linear_una_loss on N rows; ValueError for values out of bounds."""

    workspace_mb: float | None = None
    """Workspace in MiB; null: 2048 on a GPU, 256 on a CPU."""
    device: str = "cuda"
    """cuda: bfloat16 operands, float32 logits; cpu: all float32."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r} is not one of {list(DEVICES)}")
        if self.pairs < 0:
            raise ValueError(f"pairs={self.pairs} must be 0 or more")
        if self.workspace_mb is not None and not 0 < self.workspace_mb < math.inf:
            raise ValueError(f"workspace_mb={self.workspace_mb} must be positive and finite")
