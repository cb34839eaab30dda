"""Settings of a model: adapters, and the switches that save memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters on linear layers; without dropout."""

    r: int = 32
    """Rank, at least 1."""
    alpha: int = 16
    """The adapter's output is multiplied by alpha / r."""
    target_modules: list[str] | str = "all-linear"
    """Names of the layers that get an adapter, or "all-linear": every linear layer but the head."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0:
            raise ValueError(
                f"lora r={self.r}, alpha={self.alpha}: r must be at least 1 and alpha positive"
            )
        if not self.target_modules:
            raise ValueError('lora target_modules is empty; name layers, or use "all-linear"')


@dataclass(frozen=True)
class MemoryOptions:
    """Which switches are on; the fields of RunConfig of the same names."""

    gradient_checkpointing: bool = False
    offload_activations: bool = False
    mlp_tile: int | None = None
    liger: bool = False


KEEP_ALL = MemoryOptions()
