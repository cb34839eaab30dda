"""How the ranks of a run share the work: settings, and the mesh that follows from them.

    rank = (copy * shard + part) * context + place       copy < replicate, part < shard,
                                                         place < context

    context     neighbours, who split the tokens of every micro-batch among themselves
    data        replicate x shard context groups, each with micro-batches of its own
    shards      shard x context ranks, who hold one copy of the weights among themselves
    replicate   copies of the weights, whose gradients are summed

Importing the file needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from una_fast.checks import check_types


@dataclass(frozen=True)
class Mesh:
    """Ranks by what they share: replicate x shard x context of them."""

    replicate: int = 1
    shard: int = 1
    context: int = 1

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.replicate * self.shard * self.context

    @property
    def data(self) -> int:
        """Return the number of ranks, or groups of ranks, with micro-batches of their own."""
        return self.replicate * self.shard

    @property
    def shards(self) -> int:
        """Return the number of ranks that hold one copy of the weights among themselves."""
        return self.shard * self.context

    def __str__(self) -> str:
        sizes = {"replicate": self.replicate, "shard": self.shard, "context": self.context}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return " x ".join(named) or "1 rank"


@dataclass(frozen=True)
class ParallelOptions:
    """How the ranks of torchrun share the work; their product is the number of ranks."""

    shard: int | None = None
    """Ranks or context groups with batches of their own, per copy; null: all that are left."""
    replicate: int = 1
    """Copies of the weights, each over its own ranks; gradients are summed once a step."""
    context: int = 1
    """Ranks that split the tokens of every batch among themselves, and the weights too."""
    split_vocabulary: bool = False
    """Every rank keeps its rows of the head and sees all tokens, instead of gathering the head."""
    reduce: Literal["auto", "each", "last"] = "auto"
    """Gradients cross ranks after each micro-batch or the last; auto: the last of an adapter."""
    offload_parameters: bool = False
    """Keep the shards of the weights, gradients and moments in host memory."""
    prefetch: int = 0
    """Layers gathered ahead of the layer that is computed; 0: torch's own choice."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("shard", "replicate", "context"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"parallel.{name}={size} must be at least 1 rank")
        if self.prefetch < 0:
            raise ValueError(f"parallel.prefetch={self.prefetch} must not be negative")

    def mesh(self, ranks: int) -> Mesh:
        """Return the mesh of some ranks.

        ValueError, with the arithmetic, if there is none; by the name of a setting that a single
        process would not read.
        """
        if ranks == 1:
            self._refuse_unread()
        others = self.replicate * self.context
        product = f"replicate {self.replicate} x context {self.context}"
        if self.shard is None:
            if ranks % others:
                raise ValueError(
                    f"parallel: {product} = {others} does not divide the {ranks} ranks of the "
                    "run; change parallel, or start another number of processes"
                )
            mesh = Mesh(self.replicate, ranks // others, self.context)
        elif self.shard * others != ranks:
            raise ValueError(
                f"parallel: shard {self.shard} x {product} = {self.shard * others} ranks, and the "
                f"run has {ranks}; change parallel, or start {self.shard * others} processes"
            )
        else:
            mesh = Mesh(self.replicate, self.shard, self.context)
        if self.split_vocabulary and mesh.shards == 1 < ranks:
            raise ValueError(
                "parallel.split_vocabulary=true splits the head over the ranks of a copy, and with "
                f"shard {mesh.shard} x context {mesh.context} a copy has 1 rank; lower "
                "parallel.replicate, or set split_vocabulary=false"
            )
        return mesh

    def words(self) -> list[str]:
        """Return what the ranks do beside the default, for the decisions of a run."""
        words = []
        if self.split_vocabulary:
            words.append("the vocabulary split")
        if self.offload_parameters:
            words.append("shards in host memory")
        if self.prefetch:
            words.append(f"gathered {self.prefetch} ahead")
        return words

    def _refuse_unread(self) -> None:
        for name in ("split_vocabulary", "reduce", "offload_parameters", "prefetch"):
            value = getattr(self, name)
            if value != getattr(ParallelOptions, name):
                raise ValueError(
                    f"parallel.{name}={value} is for several ranks, and this run is one process; "
                    "start it with torchrun, or remove the setting"
                )
