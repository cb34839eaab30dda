"""A packed row by a varlen kernel on CUDA, which is asked first whether it is right."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from una_fast.attention.rows import RowRanges, Segment, row_ranges, visible_prompt
from una_fast.attention.sdpa import Scores, attend_sdpa, join, keys_per_range

logger = logging.getLogger(__name__)


# ---- varlen kernels on CUDA ------------------------------------------------------------------------------------------
# The tests drive this path through stand-ins with the kernels' signatures. What those cannot show, that a kernel aligns
# causal masks and windows to the lower right, is asked of the kernel itself on the device (`varlen_fault`).
#
# Memory, in tokens of keys and values (4 H_kv D bytes each), for K responses to a long prompt of P tokens. One call for
# the whole row would repeat the prompt for each range: (K + 1) P, kept for backward, where a kernel makes the gradients
# of as many (flash-attn H / H_kv times as many first, one per query head). So no call gets more keys than the row has
# tokens: a long prompt's responses are run one by one, the ranges of short rows together. (K - 1) P are kept, and what
# backward makes is that of one call. With one response per prompt nothing is copied.


class VarlenKernel(NamedTuple):
    """A varlen kernel (q, k, v, cu_q, cu_k, max_q, max_k, scores) -> [T, H, D], and whether it has a softcap."""

    name: str
    call: Callable[..., Tensor]
    softcap: bool


def _window_size(scores: Scores) -> tuple[int, int]:
    return (-1 if scores.window is None else scores.window - 1, 0)


def _flash_attn() -> VarlenKernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def call(*tensors_and_lengths: Any, scores: Scores) -> Tensor:
        return flash_attn_varlen_func(
            *tensors_and_lengths,
            softmax_scale=scores.scaling,
            causal=True,
            window_size=_window_size(scores),
            softcap=scores.softcap or 0.0,
        )

    return VarlenKernel("flash-attn", call, softcap=True)


def _torch_varlen() -> VarlenKernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.13 asks for enable_gqa when key heads are shared; 2.11 shares them without being asked.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def call(*tensors_and_lengths: Any, scores: Scores) -> Tensor:
        return varlen_attn(
            *tensors_and_lengths, scale=scores.scaling, window_size=_window_size(scores), **gqa
        )

    return VarlenKernel("torch.nn.attention.varlen", call, softcap=False)


@functools.cache
def varlen_kernel(device: torch.device) -> VarlenKernel | None:
    """The first varlen kernel that is installed and right on this device."""
    for kernel in filter(None, (_flash_attn(), _torch_varlen())):
        # Compilers trace through the cache: they would put the check into every layer.
        fault = None if torch.compiler.is_compiling() else varlen_fault(kernel, device)
        if fault is None:
            logger.info("packed attention on %s in half precision: %s", device, kernel.name)
            return kernel
        logger.warning("packed attention does not use %s on %s: %s", kernel.name, device, fault)
    return None


def varlen_fault(kernel: VarlenKernel, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, by comparison with the SDPA path in float32; None if nothing is.

    Masks aligned to the upper left, or a window that is one off, would train a model on wrong numbers without a word.
    """
    total = 301
    row = row_ranges((Segment((0, 75), ((75, 104), (104, total))),), total)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, total, 64, generator=generator).to(device, torch.bfloat16)
        for heads in (4, 2, 2, 4)
    ]
    for window, softcap in [(None, None), (40, None), *([(None, 2.0)] if kernel.softcap else [])]:
        scores = Scores(0.4, window, softcap, None)  # peaked: each key counts
        results = []
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                for call in (kernel.call, None):
                    *qkv, upstream = (x.clone() if call else x.float() for x in states)
                    qkv = [x.requires_grad_() for x in qkv]
                    out = (
                        attend_varlen(*qkv, row, scores, call)
                        if call
                        else attend_sdpa(*qkv, row, scores)
                    )
                    results.append(
                        (out.detach(), *torch.autograd.grad(out, qkv, upstream.transpose(1, 2)))
                    )
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        worst = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)
        )
        if not worst < 0.05:  # half precision is 0.01 off; not: NaN is wrong too
            return f"it is {worst:.1e} off (relative) with window {window} and softcap {softcap}"
    return None


def varlen_refusal(
    query: Tensor, value: Tensor, scores: Scores, kernel: VarlenKernel | None
) -> str | None:
    """Why the varlen kernel cannot serve this call; None if it can."""
    if kernel is None:
        return "neither flash-attn nor torch.nn.attention.varlen is there and right on this device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it runs in half precision, and the model in {query.dtype}"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"head sizes {query.shape[-1]} (keys) and {value.shape[-1]} (values) are not equal, or not 8, 16, ... 256"
    if scores.sinks is not None or (scores.softcap is not None and not kernel.softcap):
        return (
            "it has no attention sinks"
            if scores.sinks is not None
            else "it has no softcap (flash-attn has)"
        )
    return None


def _groups(sizes: list[int], most: int) -> list[slice]:
    """Consecutive sizes together while their sum is `most` or less."""
    groups, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            groups.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*groups, slice(start, len(sizes))]


class _Call(NamedTuple):
    """One kernel call: consecutive ranges of a row."""

    ranges: slice
    cu_q: Tensor  # int32 offsets of the ranges' queries and keys, on the device
    cu_k: Tensor
    max_q: int
    max_k: int


@functools.lru_cache(
    maxsize=8
)  # every layer asks for the same lengths: one copy to the device per batch and window
def kernel_calls(row: RowRanges, window: int | None, device: torch.device) -> tuple[_Call, ...]:
    """The kernel calls of a row: as few as possible in order, each with at most as many keys as the row has tokens."""
    lengths_k = [
        size + (0 if prompt is None else visible_prompt(prompt[1], window))
        for size, prompt in zip(row.sizes, row.prompt_of, strict=True)
    ]
    calls = []
    for ranges in _groups(lengths_k, most=sum(row.sizes)):
        queries, keys = row.sizes[ranges], lengths_k[ranges]
        with torch.inference_mode(False):
            cu_q, cu_k = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
                for lengths in (queries, keys)
            )
        calls.append(_Call(ranges, cu_q, cu_k, max(queries), max(keys)))
    return tuple(calls)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowRanges,
    scores: Scores,
    call: Callable[..., Tensor],
) -> Tensor:
    """The whole row by a varlen kernel: [1, T, H, D]."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    calls = kernel_calls(row, scores.window, query.device)
    # Where nothing is shared, one call takes the row as it is.
    keys, values = (
        [[x]] if not any(row.prompt_of) else keys_per_range(x, row, scores.window, dim=0)
        for x in (k, v)
    )

    def run(
        queries: Tensor, one: _Call
    ) -> Tensor:  # a function: without gradients one call's copies live at a time
        own = (
            scores._replace(window=None)
            if scores.window is not None and scores.window >= one.max_k
            else scores
        )
        states = (
            join([part for parts in x[one.ranges] for part in parts], dim=0) for x in (keys, values)
        )
        return call(queries, *states, one.cu_q, one.cu_k, one.max_q, one.max_k, scores=own)

    queries = q.contiguous().split([sum(row.sizes[one.ranges]) for one in calls])
    return join([run(*pair) for pair in zip(queries, calls, strict=True)], dim=0)[None]
