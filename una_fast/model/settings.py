"""Settings of a model: adapters, and the switches that save memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from una_fast.model.activations import apply_liger, enable_checkpointing, find_mlps, tile_mlps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def apply(self, model: PreTrainedModel) -> None:
        """Switch them on, in place; ValueError for what the model or the machine does not allow."""
        mlps = [] if self.mlp_tile is None else find_mlps(model)
        if self.liger:
            apply_liger(
                model
            )  # after the MLPs were tried, on whatever device, and before their forward is taken
        if self.mlp_tile is not None:
            tile_mlps(model, mlps, self.mlp_tile)
        if self.gradient_checkpointing:
            enable_checkpointing(model, offload=self.offload_activations)


KEEP_ALL = MemoryOptions()
