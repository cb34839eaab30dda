"""Tensors of several ranks as safetensors: a file per rank, read back on any number of ranks.

A rank writes the tensors that it alone holds:

    a slice of a DTensor       with the offsets of the slice in the whole tensor, in the header
    rank-R.<name>              a tensor of rank R alone: a random state, the codes of its moments
    any other plain tensor     equal on all ranks, and written by rank 0

Of several copies of the weights (parallel.replicate) the first is written. Rank R of a copy holds,
and draws, what rank R of the first does.

Files hold tensors and JSON, and reading them runs no code; DCP's own metadata is a pickle, and its
HuggingFaceStorageReader was tried: it reads no tensor without dimensions, such as the step of Adam.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
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
    """Return the name of a tensor that a rank has for itself, among the ranks of its copy."""
    return f"rank-{world.shard_rank}.{name}"


def take_shard(tensors: dict[str, Tensor], world: World) -> Shard:
    """Return what this rank writes of some tensors.

    tensors: name -> live tensor: plain, sharded, or in 8 bits
    """
    written: dict[str, Tensor] = {}
    offsets: dict[str, list[int]] = {}
    if not world.has_first_copy:
        return Shard(written, offsets)
    for name, tensor in tensors.items():
        place = Place.of(tensor)
        is_slice = isinstance(tensor, DTensor)
        if is_slice and not place.local.numel():  # more ranks than rows
            continue
        if _is_quantized(place.local):
            for part in PARTS:
                written[f"{own(name, world)}.{part}"] = getattr(place.local, part)
            offsets[f"{own(name, world)}.{CODES}"] = list(place.offsets)
        elif is_slice:
            written[name] = place.local.contiguous()
            offsets[name] = list(place.offsets)
        elif world.is_main or name.startswith(own("", world)):
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
        self._quantized: dict[str, list[str]] = {}  # name -> names of the codes of all ranks

    def __enter__(self) -> ShardReader:
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            except (SafetensorError, ValueError) as error:
                raise DamagedError(f"{printable(path)} is damaged: {printable(error)}") from None
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self._places.setdefault(name, []).append((file, offsets.get(name)))
                quantized = _OF_A_RANK.fullmatch(name)
                if quantized is not None:
                    self._quantized.setdefault(quantized[1], []).append(name)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        """Return whether a plain tensor was saved."""
        return name in self._places

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read tensors into their own memory.

        tensors: name -> tensor to overwrite; sharded ones get their slice

        ValueError for a tensor that was not saved, or in other sizes.
        """
        for name, tensor in tensors.items():
            place = Place.of(tensor)
            if not _is_quantized(place.local):
                self._fill_numbers(name, place)
            elif not self._fill_codes(name, place):
                # Other ranks had other blocks: their numbers are put together and quantized anew.
                numbers = torch.zeros(place.local.shape)
                self._fill_numbers(name, Place(numbers, place.offsets))
                place.local.copy_(numbers.to(place.local.device))

    def _fill_codes(self, name: str, place: Place) -> bool:
        """Copy the 8-bit codes and scales of this very slice; return whether they were saved."""
        for key in self._quantized.get(name, []):
            ((file, offsets),) = self._places[key]
            shape = file.get_slice(key).get_shape()
            if tuple(offsets) == place.offsets and tuple(shape) == tuple(place.local.shape):
                for part in PARTS:
                    saved = file.get_tensor(f"{key.removesuffix(CODES)}{part}")
                    getattr(place.local, part).copy_(saved)
                return True
        return False

    def _fill_numbers(self, name: str, place: Place) -> None:
        """Copy a slice from the slices of any ranks, plain or in 8 bits."""
        missing = place.local.numel()
        for file, offsets in self._places.get(name, []):
            shape = file.get_slice(name).get_shape()
            missing -= _copy_overlap(file.get_slice(name), shape, offsets, place)
        for key in self._quantized.get(name, []):
            ((file, offsets),) = self._places[key]
            numbers = _numbers_of(file, key)
            missing -= _copy_overlap(numbers, list(numbers.shape), offsets, place)
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
            local = tensor if _is_quantized(tensor) else tensor.detach()
            return Place(local, (0,) * tensor.dim())
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        local = tensor.to_local()
        return Place(local if _is_quantized(local) else local.detach(), tuple(offsets))


def _copy_overlap(saved: Any, shape: list[int], offsets: list[int] | None, place: Place) -> int:
    """Copy what a saved part has of a place; return the count of numbers copied.

    saved: a tensor, or the slice of a file, to be indexed
    shape: of the part
    offsets: of the part in the whole; None for the whole
    """
    if len(shape) != place.local.dim():
        return 0
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
    part = saved[tuple(source)] if shape else saved[...]
    place.local[tuple(target)].copy_(part)
    return part.numel()


# ---- moments in 8 bits ----

PARTS = ("codes", "scale", "qmap")  # of torchao's OptimState8bit
CODES = PARTS[0]
_OF_A_RANK = re.compile(rf"rank-\d+\.(.*)\.{CODES}")


def _is_quantized(local: Tensor) -> bool:
    return all(hasattr(local, part) for part in PARTS)


def _numbers_of(file: Any, key: str) -> Tensor:
    """Return the numbers of saved 8-bit codes; every block of codes shares a scale."""
    codes, scale, table = (file.get_tensor(f"{key.removesuffix(CODES)}{part}") for part in PARTS)
    blocks = table[codes.long()].view(scale.numel(), -1)
    return (blocks * scale[:, None]).view(codes.shape)
