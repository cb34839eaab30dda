"""Tensors of several ranks as safetensors: a file per rank, read back on any number of ranks.

A rank writes the tensors that it alone holds:

    a slice of a DTensor       with the offsets of the slice in the whole tensor, in the header
    rank-R.<name>              a tensor of rank R alone: a random state, moments in 8 bits
    any other plain tensor     equal on all ranks, and written by rank 0

Files hold tensors and JSON, and reading them runs no code; DCP's own metadata is a pickle, and its
HuggingFaceStorageReader was tried: it reads no tensor without dimensions, such as the step of Adam.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from una_fast.distributed import World
from una_fast.printable import printable
from una_fast.train.manifest import DamagedError

OFFSETS = "offsets"  # key of the header


@dataclass(frozen=True)
class Shard:
    """The tensors that a rank writes.

    tensors: name -> plain tensor, contiguous
    offsets: name -> first index of a slice in every dimension of the whole tensor
    """

    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copied(self, buffers: dict[str, Tensor]) -> Shard:
        """Return the shard with copies of its tensors on the host; see `host_copies`."""
        return Shard(host_copies(self.tensors, buffers), self.offsets)


def host_copies(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the host; tensors that share their memory share it in the copies too.

    tensors: by name
    buffers: copies of an earlier call, by name, which are overwritten; gets the new ones. The
        system gives fresh memory page by page, which costs more than the copy itself
    """
    copies: dict[Any, Tensor] = {}
    copied = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in copies or not tensor.numel():
            buffer = buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = buffers[name] = torch.empty_like(tensor.detach(), device="cpu")
            copies[place] = buffer.copy_(tensor.detach())
        copied[name] = copies[place]
    return copied


def own(name: str, world: World) -> str:
    """Return the name of a tensor that a rank has for itself."""
    return f"rank-{world.rank}.{name}"


def take_shard(tensors: dict[str, Tensor], world: World) -> Shard:
    """Return what this rank writes of some tensors.

    tensors: name -> live tensor: plain, sharded, or a subclass made of plain tensors
    """
    written: dict[str, Tensor] = {}
    offsets: dict[str, list[int]] = {}
    for name, tensor in _plain_parts(tensors, world):
        place = Place.of(tensor)
        is_own = name.startswith(own("", world))
        if isinstance(tensor, DTensor):
            if not place.local.numel():  # more ranks than rows
                continue
            offsets[name] = list(place.offsets)
        elif not (world.is_main or is_own):
            continue
        written[name] = place.local.contiguous()
    return Shard(written, offsets)


def write_shard(path: Path, shard: Shard) -> None:
    """Write the file of a rank."""
    save_file(shard.tensors, path, metadata={OFFSETS: json.dumps(shard.offsets)})


class ShardReader:
    """The files of all ranks of a saved state."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files, written by `write_shard`; use as a context manager."""
        self._paths = list(paths)
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[Any, list[int] | None]]] = {}

    def __enter__(self) -> ShardReader:
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            except (SafetensorError, ValueError) as error:
                raise DamagedError(f"{printable(path)} is damaged: {printable(error)}") from None
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self._places.setdefault(name, []).append((file, offsets.get(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def has(self, name: str, tensor: Tensor, world: World) -> bool:
        """Return whether all parts of a tensor were saved."""
        return all(part in self._places for part, _ in _plain_parts({name: tensor}, world))

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor], world: World) -> None:
        """Read tensors into their own memory.

        tensors: name -> tensor to overwrite; sharded ones get their slice
        world: the ranks of today

        ValueError for a tensor that was not saved, or in other sizes.
        """
        for name, tensor in _plain_parts(tensors, world):
            place = Place.of(tensor)
            missing = place.local.numel()
            for file, offsets in self._places.get(name, []):
                missing -= _copy_overlap(file, name, offsets, place)
            if missing:
                raise ValueError(f"{name} was not saved, or in other sizes")


@dataclass(frozen=True)
class Place:
    """The part of a tensor that a rank holds.

    local: the part, plain
    offsets: first index of the part in every dimension of the whole
    """

    local: Tensor
    offsets: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Place:
        """Return the part of a tensor that this rank holds: a slice, or the whole."""
        if not isinstance(tensor, DTensor):
            return Place(tensor.detach(), (0,) * tensor.dim())
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return Place(tensor.to_local().detach(), tuple(offsets))


def _copy_overlap(file: Any, name: str, offsets: list[int] | None, place: Place) -> int:
    """Copy what a saved part has of a place; return the count of numbers copied."""
    saved = file.get_slice(name)
    shape = saved.get_shape()
    if len(shape) != place.local.dim():
        return 0
    if not shape:
        place.local.copy_(file.get_tensor(name))
        return 1
    source, target = [], []
    starts = offsets or [0] * len(shape)
    for start, length, own_start, own_length in zip(
        starts, shape, place.offsets, place.local.shape, strict=True
    ):
        first = max(start, own_start)
        last = min(start + length, own_start + own_length)
        if first >= last:
            return 0
        source.append(slice(first - start, last - start))
        target.append(slice(first - own_start, last - own_start))
    part = saved[tuple(source)]
    place.local[tuple(target)].copy_(part)
    return part.numel()


def _plain_parts(tensors: dict[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), a subclass such as torchao's 8-bit moments as its inner tensors.

    Inner tensors of a sharded subclass belong to their rank: blocks of 256 numbers share a scale,
    and another number of ranks would cut the blocks.
    """
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        if not hasattr(local, "__tensor_flatten__"):
            yield name, tensor
            continue
        inner, _ = local.__tensor_flatten__()
        prefix = own(name, world) if world.sharded else name
        for part in inner:
            yield f"{prefix}.{part}", getattr(local, part)
