"""The settings of `una-fast plan`, and the memory of known GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from una_fast.checks import check_at_least
from una_fast.config import RunConfig
from una_fast.head.settings import HeadCallOptions
from una_fast.printable import shown

GPU_GIB = {
    "H200": 139.8,
    "H100": 79.1,
    "B200": 178.0,
    "A100": 79.2,
    "A100-40GB": 39.4,
    "L40S": 44.4,
    "RTX4090": 23.5,
}
"""GPU -> GiB that torch sees."""

MOST_TOKENS = 2**24
MOST_RANKS = 2**16


@dataclass
class PlanOptions:
    """Plan: the batch, and the device."""

    prompt: int = 0
    """Tokens of the prompt of the planned row; 0: the largest batch that data gives."""
    responses: list[int] = field(default_factory=list)
    """Tokens of each response of the planned row; two are a pair."""
    gpu: str | None = None
    """GPU if memory_gib is null: H200, H100, B200, A100, A100-40GB, L40S, RTX4090."""
    world_size: int = 1
    """Ranks to plan for, laid out by parallel."""
    meshes: bool = False
    """Plan every mesh of world_size ranks, and mark the best; shard, replicate, context vary."""
    measure: bool = False
    """Run two steps of the batch, and print the measured peak beside the plan."""
    report: str | None = None
    """HTML file to write the plan to, with bars; null: none."""


@dataclass
class RunPlanConfig(RunConfig, HeadCallOptions, PlanOptions):
    """A run to be planned, or, with --op, a call of the fused head to be planned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None and self.gpu not in GPU_GIB:
            raise ValueError(
                f"gpu={shown(self.gpu)} is not one of {', '.join(GPU_GIB)}; give memory_gib instead"
            )
        check_at_least(1, self, ["world_size"])
        check_at_least(0, self, ["prompt", "pairs"])
        if min(self.responses, default=1) < 1:
            raise ValueError(f"responses={shown(self.responses)} must be at least 1 token each")
        if self.prompt + sum(self.responses) > MOST_TOKENS or self.world_size > MOST_RANKS:
            raise ValueError(
                f"prompt={self.prompt}, responses={shown(self.responses)}, world_size="
                f"{self.world_size}: at most {MOST_TOKENS} tokens and {MOST_RANKS} ranks"
            )
        if bool(self.prompt) != bool(self.responses):
            raise ValueError("a planned row needs both --prompt and --responses")
        if self.meshes and self.world_size == 1:
            raise ValueError("meshes=true compares the meshes of several ranks; set world_size too")
        if self.gpu is not None and self.device == "cpu":
            raise ValueError(f"gpu={self.gpu} and device=cpu: plan for one of them")
        if self.measure and (self.world_size > 1 or self.cached_reference):
            raise ValueError(
                "measure=true takes its steps in one process, with the reference that the run "
                "computes"
            )
        if self.cached_reference and self.mode != "offline":
            raise ValueError(
                f"cached_reference=true is for records, and mode={self.mode} samples; "
                "set mode: offline"
            )
        if self.measure and self.mode != "offline":
            raise ValueError(
                f"measure=true takes steps on records, and mode={self.mode} samples; "
                "set mode: offline"
            )

    def required_settings(self) -> tuple[str, ...]:
        """Return the names of the fields without a usable default."""
        return ("model",)
