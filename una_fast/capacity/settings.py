"""The settings of `una-fast plan`, and the memory of known GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from una_fast.config import RunConfig

if TYPE_CHECKING:
    pass

GPU_GIB = {
    "H200": 139.8,
    "H100": 79.1,
    "B200": 178.0,
    "A100": 79.2,
    "A100-40GB": 39.4,
    "L40S": 44.4,
    "RTX4090": 23.5,
}
"""Memory that torch sees."""


@dataclass
class RunPlanConfig(RunConfig):
    """A run to be planned: its settings, or one call of the fused head with --op."""

    prompt: int = 0
    """Tokens of the prompt of the planned row; 0: the largest batch that data gives."""
    responses: list[int] = field(default_factory=list)
    """Tokens of each of its responses; two are a pair."""
    gpu: str | None = None
    """Plan for this GPU (H200, H100, B200, A100, A100-40GB, L40S, RTX4090) where memory_gib is null."""
    world_size: int = 1
    """Ranks of FSDP2 to plan for."""
    measure: bool = False
    """Run two steps of the batch, and print what was measured beside the plan."""

    pairs: int = 1
    """With --op: pairs of two responses of N / (2 pairs) tokens each; 0: one scored response of N tokens."""
    train_head: bool = True
    """With --op: whether the head is trained (LoRA and a tied, frozen head: false)."""
    cached_reference: bool = False
    """Whether the reference log-probs are given, and cost no pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None and self.gpu not in GPU_GIB:
            raise ValueError(
                f"gpu={self.gpu!r} is not one of {', '.join(GPU_GIB)}; give memory_gib instead"
            )
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1")
        if bool(self.prompt) != bool(self.responses):
            raise ValueError("a planned row needs both --prompt and --responses")
        if self.gpu is not None and self.device == "cpu":
            raise ValueError(f"gpu={self.gpu} and device=cpu: plan for one of them")
        if self.measure and (self.world_size > 1 or self.cached_reference):
            raise ValueError(
                "measure=true takes its steps in one process, with the reference that the run computes"
            )

    def required_settings(self) -> tuple[str, ...]:
        return ("model",)
