"""Fused linear and logsumexp: target log-probs of a head without its logits. Forward only.

Legend: N rows, D hidden, V vocabulary entries, tiles of BM rows x BV entries.

    u = H W^T of a tile, accumulated in float32 in registers;  z as in rowgrad.py
    partial[v, n] = logsumexp of z over the tile             [V / BV, N] float32
    target_logit[n] = z at the target                        written by the tile that holds it
    lse[n] = logsumexp over v of partial[v, n]               a second, tiny kernel

What never exists: logits in memory. What is avoided: a running softmax across vocabulary tiles,
which would tie a program to its rows and rescale; spin locks; atomics. The partial of a tile is one
number, not (max, sum): the logsumexp of 256 logits is as exact in float32 as the [N] result itself,
and moves half the bytes.

Cost: 2 N D V flop, and N V / BV * 8 bytes for partials written and read (1.6 % of the logits at
BV = 256; a GEMM into float32 logits and row_logps move 8 bytes per logit). The epilogue costs one
exp and some ten instructions per logit, which no GEMM overlaps within a program: predicted 4 % of a
tile at D = 4096, 8 % at 2048, 15 % at 1152 on an H200; to be measured against cuBLAS + row_logps.
Policy and reference rows that share W go into one call, stacked.

Programs are persistent, one per multiprocessor. Tiles are taken in groups of GROUP row tiles,
vocabulary tile after vocabulary tile: at 132 programs a wave covers 8 row tiles x 16 vocabulary
tiles, some 2048 x 2048 logits with all operands in L2, and W is read once per GROUP * BM rows. On
sm_90 and later operands come through tensor descriptors (TMA) where base and row stride are
multiples of 16 bytes, and the loop over tiles is flattened into the loop over D, so that the loads
of the next tile start under the epilogue. Elsewhere operands come through pointers, with the same
arithmetic.

Tile shapes: at the full wgmma rate 256 x 128 asks L2 for 48 bytes per multiprocessor and cycle,
128 x 128 for 64; L2 may limit either. 128 x 256 asks for the same 48 but spills in the epilogue
(Triton 3.6 and 3.9). On sm_100 both large shapes spill, so sm_100 has 128 x 128. Operands that can
only be loaded number by number (an odd D, say) keep as many addresses in registers, and
128 x 128 x 32 is the shape that fits everywhere. No shape of the table has been timed yet.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201, ANN202 -- Triton types the parameters of a kernel
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from una_fast.kernels.rowgrad import FUSED, add_to_sum, affine, transform


class Tiling(NamedTuple):
    """Tile shape and launch options."""

    BM: int
    BV: int
    BK: int
    num_warps: int
    num_stages: int
    GROUP: int = 8


# bfloat16 and float16 operands, by architecture; one BV, so that `row_bytes` holds for any operands
NARROW = {
    "sm_80": Tiling(128, 128, 32, num_warps=8, num_stages=4),
    "sm_90": Tiling(256, 128, 64, num_warps=8, num_stages=3),
    "sm_100": Tiling(128, 128, 64, num_warps=8, num_stages=3),
    "gfx942": Tiling(128, 128, 64, num_warps=8, num_stages=2),
}
# float32 operands multiply outside the tensor cores
WIDE = Tiling(64, 64, 32, num_warps=8, num_stages=2)
# the interpreter on a CPU
TINY = Tiling(16, 32, 16, num_warps=4, num_stages=1, GROUP=2)
MERGE_ROWS, MERGE_TILES = 32, 64


@triton.jit
def _operand(x, row, k, rows, depth, stride, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Return the [BR, BK] tile of x [rows, depth] at (row, k).

    Zeros beyond `depth`; beyond `rows` numbers that the caller does not use.
    """
    if TMA:
        tile = x.load([row, k])
    else:
        r = tl.minimum(row + tl.arange(0, BR), rows - 1).to(tl.int64)
        c = k + tl.arange(0, BK)
        tile = tl.load(x + r[:, None] * stride + c[None, :], mask=(c < depth)[None, :], other=0.0)
    return tile


@triton.jit
def partials_kernel(
    hidden,
    weight,
    bias_ptr,
    targets_ptr,
    partial_ptr,
    target_logit_ptr,
    hidden_stride,
    weight_stride,
    N,
    V,
    D,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, vocab_tiles = tl.cdiv(N, BM), tl.cdiv(V, BV)
    for tile in tl.range(
        tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0), flatten=TMA
    ):
        group = tile // (GROUP * vocab_tiles)
        height = tl.minimum(row_tiles - group * GROUP, GROUP)
        within = tile - group * GROUP * vocab_tiles
        row = (group * GROUP + within % height) * BM
        vocab_tile = within // height
        entry = vocab_tile * BV

        u = tl.zeros([BM, BV], tl.float32)
        for k in range(0, D, BK):
            h = _operand(hidden, row, k, N, D, hidden_stride, BM, BK, TMA)
            w = _operand(weight, entry, k, V, D, weight_stride, BV, BK, TMA)
            u = tl.dot(h, w.T, u, input_precision="ieee")

        rows = row + tl.arange(0, BM)
        entries = entry + tl.arange(0, BV)
        if HAS_BIAS:
            u += tl.load(bias_ptr + entries, mask=entries < V, other=0.0).to(tl.float32)[None, :]
        z, _ = transform(u, inner, outer, HAS_SOFTCAP)
        z = tl.where((entries < V)[None, :], z, float("-inf"))
        peak = tl.max(z, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # logits that are all -inf add nothing
        partial = peak + tl.log(tl.sum(tl.exp(z - peak[:, None]), 1))
        tl.store(partial_ptr + vocab_tile.to(tl.int64) * N + rows, partial, mask=rows < N)

        index = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
        here = (index >= entry) & (index < tl.minimum(entry + BV, V))
        lane = (index - entry).to(tl.int32)
        is_target = tl.arange(0, BV)[None, :] == lane[:, None]
        target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
        tl.store(target_logit_ptr + rows, target_logit, mask=here)


@triton.jit
def merge_kernel(partial_ptr, lse_ptr, N, vocab_tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Store lse[n], the logsumexp over v of partial[v, n], for ROWS neighbouring rows.

    Every load is ROWS wide.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, TILES)
    top = tl.full([TILES, ROWS], -3.0e38, tl.float32)
    total = tl.zeros([TILES, ROWS], tl.float32)
    for first in range(0, vocab_tiles, TILES):
        v = (first + lanes).to(tl.int64)
        mask = (v < vocab_tiles)[:, None] & (rows < N)[None, :]
        z = tl.load(partial_ptr + v[:, None] * N + rows[None, :], mask=mask, other=float("-inf"))
        top, total = add_to_sum(top, total, z)
    peak = tl.max(top, 0)
    lse = peak + tl.log(tl.sum(total * tl.exp(top - peak[None, :]), 0))
    tl.store(lse_ptr + rows, lse, mask=rows < N)


@functools.cache
def _machine(device: torch.device) -> tuple[str, int]:
    """Return (architecture, multiprocessors) of a device, such as ("sm_90", 132)."""
    if device.type == "cpu":
        return "cpu", 3
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], processors
    return f"sm_{properties.major}0", processors


def tiling(arch: str, dtype: torch.dtype, *, by_vectors: bool = True) -> Tiling:
    """Return the tiles for an architecture and operands of `dtype`.

    An architecture that is not in NARROW takes the tiles of sm_80, as do operands that cannot be
    loaded 16 bytes at a time (by_vectors=False).
    """
    if arch == "cpu":
        return TINY
    if dtype == torch.float32:
        return WIDE
    if not by_vectors:
        return NARROW["sm_80"]
    return NARROW.get(arch, NARROW["sm_80"])


def _by_vectors(x: Tensor) -> bool:
    """Return whether Triton sees that rows of x can be loaded 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0


def _descriptors(
    arch: str, block: Tiling, hidden: Tensor, weight: Tensor
) -> list[TensorDescriptor] | None:
    """Return tensor descriptors of both operands, None where hardware or operands do not fit."""
    if hidden.dtype == torch.float32 or arch not in ("sm_90", "sm_100", "cpu"):
        return None
    for x in (hidden, weight):
        if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
            return None
    return [
        TensorDescriptor.from_tensor(hidden, [block.BM, block.BK]),
        TensorDescriptor.from_tensor(weight, [block.BV, block.BK]),
    ]


def row_bytes(device: torch.device, weight: Tensor) -> int:
    """Return the workspace of linear_logps in bytes per row."""
    arch, _ = _machine(device)
    return 4 * triton.cdiv(len(weight), tiling(arch, weight.dtype).BV)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return ([N] logsumexp of z, [N] z at the target), float32, as row_logps of hidden @ weight.T.

    hidden: [N, D] bfloat16, float16 or float32, last stride 1
    weight: [V, D] in the dtype of hidden, last stride 1
    targets: [N] indices into the vocabulary; -100, or any index outside, gives z = 0
    bias: [V] any float dtype, or None
    softcap, logit_scale, temperature: as in rowgrad.py

    Workspace: N times `row_bytes`.
    """
    _check(hidden, weight, targets, bias)
    rows, depth = hidden.shape
    entries = len(weight)
    lse = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    target_logit = torch.zeros_like(lse)
    if rows == 0:
        return lse, target_logit

    arch, processors = _machine(hidden.device)
    block = tiling(arch, hidden.dtype)
    descriptors = _descriptors(arch, block, hidden, weight)
    if descriptors is None:
        block = tiling(arch, hidden.dtype, by_vectors=_by_vectors(hidden) and _by_vectors(weight))
    row_tiles = triton.cdiv(rows, block.BM)
    vocab_tiles = triton.cdiv(entries, block.BV)
    partial = torch.empty(vocab_tiles, rows, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        partials_kernel[(min(processors, row_tiles * vocab_tiles),)](
            *(descriptors or (hidden, weight)),
            bias,
            targets,
            partial,
            target_logit,
            hidden.stride(0),
            weight.stride(0),
            rows,
            entries,
            depth,
            *affine(softcap, logit_scale, temperature),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            TMA=descriptors is not None,
            **block._asdict(),
            **FUSED,
        )
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            partial, lse, rows, vocab_tiles, ROWS=MERGE_ROWS, TILES=MERGE_TILES, **FUSED
        )
    return lse, target_logit


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    rows, depth = hidden.shape
    entries = len(weight)
    assert weight.shape[1] == depth > 0 and entries > 0 and hidden.dtype == weight.dtype
    assert hidden.dtype in (torch.bfloat16, torch.float16, torch.float32)
    assert hidden.stride(1) == weight.stride(1) == 1
    assert targets.shape == (rows,) and targets.is_contiguous() and not targets.is_floating_point()
    assert bias is None or (bias.shape == (entries,) and bias.is_contiguous())
