"""Weights at 4 bits: blocks of 64 numbers as codes of 16 normal quantiles, and their largest size.

    w[row, k] ~ absmax[row, k // 64] * LEVELS[code[row, k]]

The format is nf4 of QLoRA (arXiv 2305.14314) without double quantization: 4 bits a weight, and a
float32 per 64 weights, 4.5 bits in all. A row of a matrix is a row of bytes:

    [codes, two a byte, the first in the high bits | absmax, 4 bytes a block]

Blocks start anew in every row, and a short last block is a block of its own. So rows are packed
alike wherever the matrix is cut, and FSDP2 shards packed rows as it shards rows of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from una_fast.counters import is_fake

BLOCK = 64  # weights that share an absmax
NUMBERS_AT_ONCE = 2**23  # of a matrix on the way: float32 copies and indices are as large

# Quantiles of N(0, 1), 7 below zero and 8 above, divided by the largest (the paper's appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_tables: dict[tuple[torch.device, str], Tensor] = {}


def bytes_of_row(columns: int) -> int:
    """Return the bytes of a packed row of some numbers."""
    return _bytes_of_codes(columns) + 4 * _blocks(columns)


def _bytes_of_codes(columns: int) -> int:
    return -(-columns // 2)


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


@torch.no_grad()
def quantize(weight: Tensor) -> Tensor:
    """Return the packed rows of a matrix, [R, bytes_of_row(C)] uint8.

    weight: [R, C], finite numbers of any dtype; the nearest level is taken, in float32
    """
    rows, columns = weight.shape
    packed = weight.new_empty((rows, bytes_of_row(columns)), dtype=torch.uint8)
    middles = _table(weight, "middles")
    codes_end = _bytes_of_codes(columns)
    padding = _blocks(columns) * BLOCK - columns
    for part in _portions(rows, columns):
        values = F.pad(weight[part].float(), (0, padding))
        blocks = values.view(len(values), -1, BLOCK)
        absmax = blocks.abs().amax(dim=-1)
        shares = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        codes = torch.bucketize(shares.flatten(1), middles, out_int32=True).to(torch.uint8)
        codes = codes[:, : 2 * codes_end]
        packed[part, :codes_end] = codes[:, ::2] << 4 | codes[:, 1::2]
        packed[part, codes_end:] = absmax.view(torch.uint8)
    return packed


@torch.no_grad()
def dequantize(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of packed rows, [R, columns].

    packed: [R, bytes_of_row(columns)] uint8
    columns: numbers of a row
    dtype: of the matrix; products of level and absmax are taken in float32 and rounded once
    """
    rows = len(packed)
    weight = packed.new_empty((rows, columns), dtype=dtype)
    pairs = _table(packed, "pairs")
    codes_end = _bytes_of_codes(columns)
    padding = _blocks(columns) * BLOCK - 2 * codes_end
    for part in _portions(rows, columns):
        if is_fake(packed) and part.start:
            break  # a plan has seen the memory of the first portion
        codes = packed[part, :codes_end]
        # A copy: the first byte in place may be at any address.
        own = packed[part, codes_end:].clone(memory_format=torch.contiguous_format)
        absmax = own.view(torch.float32)
        levels = pairs.index_select(0, codes.reshape(-1).int()).view(len(codes), 2 * codes_end)
        if padding:
            levels = F.pad(levels, (0, padding))
        values = levels.view(len(codes), -1, BLOCK).mul_(absmax[..., None])
        weight[part] = values.flatten(1)[:, :columns]
    return weight


def _portions(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows with NUMBERS_AT_ONCE numbers each."""
    step = max(NUMBERS_AT_ONCE // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _table(like: Tensor, name: str) -> Tensor:
    """Return a constant in float32 on the device of a tensor, made once per device.

    like: a tensor on the device
    name: "middles" [15] between neighbouring levels | "pairs" [256, 2], the levels of every byte
    """
    if is_fake(like):  # and must not be kept
        return like.new_empty((256, 2) if name == "pairs" else 15, dtype=torch.float32)
    key = (like.device, name)
    if key not in _tables:
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=like.device)
        if name == "pairs":
            _tables[key] = torch.cartesian_prod(levels, levels)
        else:
            _tables[key] = (levels[:-1] + levels[1:]) / 2
    return _tables[key]
