"""The settings of a planned call of the fused head: `una-fast plan --op N D V`."""

from __future__ import annotations

from dataclasses import dataclass

from una_fast.checks import check_one_of, check_types

DEVICES = ("cpu", "cuda")

MOST_PAIRS = 2**16


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
        check_types(self)
        check_one_of("device", self.device, DEVICES)
        if not 0 <= self.pairs <= MOST_PAIRS:
            raise ValueError(f"pairs={self.pairs} must be at least 0, and at most {MOST_PAIRS}")
        if self.workspace_mb is not None and not self.workspace_mb >= 1:
            raise ValueError(f"workspace_mb={self.workspace_mb} must be at least 1, or null")
