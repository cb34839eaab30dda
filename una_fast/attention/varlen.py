"""A packed row by a varlen kernel on CUDA: flash-attn, or torch's varlen_attn.

A kernel is used after a comparison with the SDPA path on the device (`varlen_fault`): alignment of
causal masks and windows to the lower right is documented, and cannot be tested without the device.

Memory, in tokens of keys and values (4 H_kv D bytes a token), for K responses to a long prompt of P
tokens. A single call for the whole row would repeat the prompt for every range: (K + 1) P, kept for
backward, and a kernel makes as many gradients in backward (flash-attn H / H_kv times as many first,
a gradient per query head). So no call gets more keys than the row has tokens: the responses to a
long prompt are run in turn, the ranges of short rows together. (K - 1) P are kept, and backward
makes the gradients of a call at a time. With a single response per prompt no key is copied.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from una_fast.attention.rows import RowLayout, Segment, row_layout, visible_prompt_tokens
from una_fast.attention.sdpa import ScoreRule, attend_sdpa, concatenate, pieces_per_range

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
FAULT_TOLERANCE = 0.05  # relative to the largest entry; half precision is 0.01 off


class VarlenKernel(NamedTuple):
    """A varlen kernel, with the kernel's abilities.

    name: for messages
    call: (q, k, v, cu_q, cu_k, max_q, max_k, *, rule) -> [T, H, D], causal from the lower right
    softcap: the kernel has a softcap
    dtypes: dtypes that the kernel takes
    """

    name: str
    call: Callable[..., Tensor]
    softcap: bool
    dtypes: tuple[torch.dtype, ...] = HALF


def _window_size(rule: ScoreRule) -> tuple[int, int]:
    """Return how many keys a query sees (before it, after it), -1 for all."""
    before = -1 if rule.window is None else rule.window - 1
    return before, 0


def flash_attn_kernel() -> VarlenKernel | None:
    """Return flash-attn's kernel, or None if flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def call(*tensors_and_lengths: Any, rule: ScoreRule) -> Tensor:
        return flash_attn_varlen_func(
            *tensors_and_lengths,
            softmax_scale=rule.scaling,
            causal=True,
            window_size=_window_size(rule),
            softcap=rule.softcap or 0.0,
        )

    return VarlenKernel("flash-attn", call, softcap=True)


def torch_kernel() -> VarlenKernel | None:
    """Return torch's kernel, or None if the release of torch has no varlen attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.13 asks for enable_gqa when key heads are shared; 2.11 shares them in any case.
    gqa = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        gqa["enable_gqa"] = True

    def call(*tensors_and_lengths: Any, rule: ScoreRule) -> Tensor:
        return varlen_attn(
            *tensors_and_lengths, scale=rule.scaling, window_size=_window_size(rule), **gqa
        )

    return VarlenKernel("torch.nn.attention.varlen", call, softcap=False)


@functools.cache
def varlen_kernel(device: torch.device) -> VarlenKernel | None:
    """Return the first varlen kernel to be installed and right on a device, or None."""
    for kernel in (flash_attn_kernel(), torch_kernel()):
        if kernel is None:
            continue
        # Compilers trace through the cache: they would put the check into every layer.
        fault = None if torch.compiler.is_compiling() else varlen_fault(kernel, device)
        if fault is None:
            logger.info("packed attention on %s in half precision: %s", device, kernel.name)
            return kernel
        logger.warning("packed attention does not use %s on %s: %s", kernel.name, device, fault)
    return None


def varlen_fault(kernel: VarlenKernel, device: torch.device) -> str | None:
    """Compare a kernel in bf16 with the SDPA path in float32 on a device; return the difference.

    Masks aligned to the upper left, or a window off by a token, would train a model on wrong
    numbers without a word. Outputs and gradients are compared; NaN is a fault too. Returns None for
    a kernel without fault.
    """
    total = 301
    layout = row_layout((Segment((0, 75), ((75, 104), (104, total))),), total)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, total, 64, generator=generator).to(device, torch.bfloat16)
        for heads in (4, 2, 2, 4)
    ]
    cases: list[tuple[int | None, float | None]] = [(None, None), (40, None)]
    if kernel.softcap:
        cases.append((None, 2.0))
    for window, softcap in cases:
        rule = ScoreRule(0.4, window, softcap, None)  # peaked: each key counts
        by_kernel = functools.partial(attend_varlen, layout=layout, rule=rule, call=kernel.call)
        by_sdpa = functools.partial(attend_sdpa, layout=layout, rule=rule)
        try:
            found = _output_and_gradients(by_kernel, states, torch.bfloat16)
            expected = _output_and_gradients(by_sdpa, states, torch.float32)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        errors = []
        for a, b in zip(found, expected, strict=True):
            errors.append((a - b).abs().max() / b.abs().max())
        worst = float(torch.stack(errors).max())  # NaN if any is
        if not worst < FAULT_TOLERANCE:
            return f"it is {worst:.1e} off (relative) with window {window} and softcap {softcap}"
    return None


def _output_and_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    states: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return the output of an attention, and the gradients of query, key and value.

    attend: (query, key, value) -> [1, T, H, D]
    states: query, key, value, and the upstream gradient [1, H, T, D]
    dtype: dtype to compute in
    """
    no_autocast = torch.autocast(states[0].device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast:
        *inputs, upstream = (x.to(dtype, copy=True) for x in states)
        for x in inputs:
            x.requires_grad_()
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, upstream.transpose(1, 2))
    return out.detach(), *gradients


def varlen_refusal(
    query: Tensor,
    value: Tensor,
    rule: ScoreRule,
    kernel: VarlenKernel | None,
) -> str | None:
    """Return the reason why a varlen kernel cannot serve a call, or None.

    query: [1, H, T, D]
    value: [1, H_kv, T, D_v]
    rule: the way from products to weights
    kernel: the kernel of the device, if any
    """
    if kernel is None:
        return "neither flash-attn nor torch.nn.attention.varlen is there and right on this device"
    if query.dtype not in kernel.dtypes:
        return f"it runs in half precision, and the model in {query.dtype}"
    key_size = query.shape[-1]
    value_size = value.shape[-1]
    if key_size != value_size or key_size > 256 or key_size % 8:
        return (
            f"head sizes {key_size} (keys) and {value_size} (values) are not equal, "
            "or not 8, 16, ... 256"
        )
    if rule.sinks is not None:
        return "it has no attention sinks"
    if rule.softcap is not None and not kernel.softcap:
        return "it has no softcap (flash-attn has)"
    return None


def _groups(sizes: Sequence[int], limit: int) -> list[slice]:
    """Group consecutive sizes, as long as the sum of a group stays within `limit`."""
    groups = []
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            groups.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*groups, slice(start, len(sizes))]


class VarlenCall(NamedTuple):
    """A call of a kernel, for consecutive ranges of a row.

    ranges: the ranges
    queries: tokens of all the ranges
    cu_q, cu_k: [ranges + 1] int32, offsets of the ranges' queries and keys, on the device
    max_q, max_k: most queries and keys of a range
    """

    ranges: slice
    queries: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


# Every layer asks for the same lengths: one copy to the device per batch and window.
@functools.lru_cache(maxsize=8)
def varlen_calls(
    layout: RowLayout, window: int | None, device: torch.device
) -> tuple[VarlenCall, ...]:
    """Return the kernel calls of a row, as few as possible in the row's order.

    layout: the row
    window: sliding window of the attention, if any
    device: device of the offsets

    A call has at most as many keys as the row has tokens.
    """
    key_counts = []
    for size, prompt in zip(layout.sizes, layout.prompt_of, strict=True):
        seen = 0 if prompt is None else visible_prompt_tokens(prompt[1], window)
        key_counts.append(seen + size)
    calls = []
    for ranges in _groups(key_counts, limit=sum(layout.sizes)):
        queries, keys = layout.sizes[ranges], key_counts[ranges]
        cu_q, cu_k = _offsets(queries, device), _offsets(keys, device)
        calls.append(VarlenCall(ranges, sum(queries), cu_q, cu_k, max(queries), max(keys)))
    return tuple(calls)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        # torch.tensor on the device would copy too, and the host would wait for the copy.
        return offsets.to(device, non_blocking=True)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    rule: ScoreRule,
    call: Callable[..., Tensor],
) -> Tensor:
    """Compute the attention of a whole packed row by a varlen kernel: [1, T, H, D].

    query: [1, H, T, D]
    key, value: [1, H_kv, T, D]
    layout: the row
    rule: the way from products to weights
    call: as VarlenKernel.call
    """
    q = query[0].transpose(0, 1)  # [T, H, D]
    k = key[0].transpose(0, 1)  # [T, H_kv, D]
    v = value[0].transpose(0, 1)
    # Where nothing is shared, one call takes the row as it is.
    key_pieces, value_pieces = [[k]], [[v]]
    if any(layout.prompt_of):
        key_pieces = pieces_per_range(k, layout, rule.window, dim=0)
        value_pieces = pieces_per_range(v, layout, rule.window, dim=0)
    calls = varlen_calls(layout, rule.window, query.device)
    queries_per_call = q.contiguous().split([one.queries for one in calls])
    outputs = []
    for one, queries in zip(calls, queries_per_call, strict=True):
        # A function: without gradients the copies of one call live at a time.
        outputs.append(_run_call(one, queries, key_pieces, value_pieces, rule, call))
    return concatenate(outputs, dim=0)[None]


def _run_call(
    one: VarlenCall,
    queries: Tensor,
    key_pieces: list[list[Tensor]],
    value_pieces: list[list[Tensor]],
    rule: ScoreRule,
    call: Callable[..., Tensor],
) -> Tensor:
    keys = concatenate(chain.from_iterable(key_pieces[one.ranges]), dim=0)
    values = concatenate(chain.from_iterable(value_pieces[one.ranges]), dim=0)
    rule = rule.for_keys(one.max_k)
    return call(queries, keys, values, one.cu_q, one.cu_k, one.max_q, one.max_k, rule=rule)
