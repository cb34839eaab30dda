"""Settings of a model: adapters, and switches to save memory."""

from __future__ import annotations

from dataclasses import dataclass

from una_fast.checks import check_types

HIGHEST_RANK = 2**16


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters on linear layers; without dropout."""

    r: int = 32
    """Rank, at least 1."""
    alpha: int | None = None
    """The adapter's output is multiplied by alpha / r; null: alpha = r, a factor of 1."""
    target_modules: list[str] | str = "all-linear"
    """Names of the layers that get an adapter, or "all-linear": every linear layer but the head."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.r <= HIGHEST_RANK:
            raise ValueError(f"lora r={self.r} must be at least 1, at most {HIGHEST_RANK}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora alpha={self.alpha} must be positive, or null for alpha = r")
        if not self.target_modules:
            raise ValueError('lora target_modules is empty; name layers, or use "all-linear"')


@dataclass(frozen=True)
class MemoryOptions:
    """Switches to save memory, named as the fields of RunConfig."""

    gradient_checkpointing: bool = False
    """Keep one hidden state per layer and recompute the rest in backward."""
    offload_activations: bool = False
    """Move the hidden states of gradient_checkpointing to pinned host memory until backward."""
    mlp_tile: int | None = None
    """Run MLPs on so many tokens at a time; null: on all tokens at once."""
    liger: bool = False
    """Use liger-kernel's RMSNorm, RoPE and gated MLPs."""


KEEP_ALL = MemoryOptions()
