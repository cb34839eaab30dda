"""out (+)= a b in float32 from narrow operands, for devices without torch.mm(out_dtype=) (ROCm).

    out [M, N] float32, any row stride;  a [M, K], b [K, N] bfloat16 or float16, any strides

Cost: 2 M N K flop; a is read once per column of tiles, b once per row of tiles; out is written
once, and read once to accumulate. What never exists: operands cast to float32. One program per
BM x BN tile, rows of tiles in groups so that the operands of neighbours stay in L2. A plain kernel:
where torch.mm can do the same, torch.mm is faster.
"""

from __future__ import annotations

# ruff: noqa: ANN001, ANN201 -- Triton types the parameters of a kernel
import torch
import triton
import triton.language as tl
from torch import Tensor
from una_fast.kernels.rowgrad import FUSED

TILES = {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}
# For operands loaded number by number: their addresses take registers, and TILES would spill.
SINGLES = {**TILES, "BN": 64}
# For the interpreter on a CPU.
TINY = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2, "num_warps": 4, "num_stages": 1}


@triton.jit
def mm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    K,
    a_row,
    a_col,
    b_row,
    b_col,
    out_row,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tile - group * GROUP * across
    m = (group * GROUP + within % height) * BM + tl.arange(0, BM)
    n = (within // height) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows and columns beyond the edge read the last one, and are not stored.
    a = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_row
    b = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * b_col
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        depth = (first + k).to(tl.int64)
        left = tl.load(a + depth[None, :] * a_col, mask=(depth < K)[None, :], other=0.0)
        right = tl.load(b + depth[:, None] * b_row, mask=(depth < K)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = out_ptr + m.to(tl.int64)[:, None] * out_row + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total, mask=inside)


def _by_vectors(x: Tensor) -> bool:
    """Return whether Triton sees that x can be loaded 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and min(x.stride()) == 1 and max(x.stride()) % 16 == 0


def _tiles(a: Tensor, b: Tensor, out: Tensor) -> dict[str, int]:
    if a.device.type == "cpu":
        return TINY
    return TILES if all(map(_by_vectors, (a, b, out))) else SINGLES


def mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """Write a @ b to out, or add a @ b to out, and return out.

    a: [M, K] bfloat16 or float16, any strides
    b: [K, N] in the dtype of a, any strides
    out: [M, N] float32, last stride 1, overlapping neither operand
    accumulate: add instead of write
    """
    (rows, depth), columns = a.shape, b.shape[1]
    assert b.shape[0] == depth and out.shape == (rows, columns)
    assert a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    assert out.dtype == torch.float32 and out.stride(1) == 1
    if out.numel() == 0:
        return out
    tiles = _tiles(a, b, out)
    programs = triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"])
    with torch.cuda.device_of(a):
        mm_kernel[(programs,)](
            a,
            b,
            out,
            rows,
            columns,
            depth,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            accumulate,
            **tiles,
            **FUSED,
        )
    return out
