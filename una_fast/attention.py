"""Attention over packed rows: one prompt, then the responses that share it.

A row is `[prompt | response 1 | ... | response K]`, prompt after prompt. The queries of a prompt see the prompt up to
themselves; the queries of a response see its prompt and the response up to themselves. Both are one rule, lower-right
causal attention of R queries over the E keys that end where the queries end. Prompt and first response are one plain
causal sequence:

    range           queries            keys                R          E
    first           prompt, resp 1     the same            P + R_1    P + R_1
    response i > 1  resp i             [prompt | resp i]   R_i        P + R_i     (window W: the prompt's last W - 1)

so the row costs P + sum R tokens where separate sequences cost K P + sum R, and `attended_pairs` (query, key) pairs.
Only the responses after the first need their prompt's keys a second time. The function is registered with
transformers under `PACKED`; `packed_attention(model)` switches a model to it, and the table of segments travels through
the model's forward keyword arguments: `model(input_ids, position_ids=..., una_segments=batch.segments)`.

Back-ends: flash-attn or torch's varlen_attn for half precision on CUDA, otherwise `scaled_dot_product_attention` in
chunks of queries, each against the keys it can see, so that no mask of the size of the row is ever built.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

logger = logging.getLogger(__name__)

PACKED = "una_packed"
CHUNK = 512  # queries per call on the SDPA path

# Keyword arguments that models hand to every attention function and that do not enter the scores.
HARMLESS = frozenset(
    {
        "cache_position",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class Segment(NamedTuple):
    """Token ranges of one prompt and its responses within the packed row."""

    prompt: tuple[int, int]  # [start, stop)
    responses: tuple[tuple[int, int], ...]  # [start, stop) each


Segments = tuple[Segment, ...]


class _Scores(NamedTuple):
    """How a score is made from q . k."""

    scaling: float
    window: int | None  # a query sees itself and the window - 1 keys before it
    softcap: float | None
    sinks: Tensor | None  # [H], one extra logit per head in the softmax's denominator

    @property
    def explicit(self) -> bool:
        """No fused kernel has it: the softmax is written out."""
        return self.softcap is not None or self.sinks is not None


# ---- the layout of a row -------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A row as consecutive ranges of queries. The keys of range i are its own tokens, after those of its prompt: the
    first n tokens of range j, `prompt_of[i]` being (j, n), or None where the prompt is in range i itself."""

    sizes: tuple[int, ...]
    prompt_of: tuple[tuple[int, int] | None, ...]


@functools.lru_cache(maxsize=64)  # every layer asks for the same row
def _row(segments: Segments, total: int) -> _Row:
    """The ranges of a row of `total` tokens; ValueError unless the segments tile it in order."""
    sizes: list[int] = []
    prompt_of: list[tuple[int, int] | None] = []
    end = 0
    for number, segment in enumerate(segments):
        first = len(sizes)
        for index, (start, stop) in enumerate((segment.prompt, *segment.responses)):
            if start != end or stop <= start:
                raise ValueError(
                    f"una_segments[{number}] has the range [{start}, {stop}) where one that starts at {end} and is not "
                    "empty is due: segments hold the prompt, then its responses, and follow each other without gaps"
                )
            end = stop
            if index == 1:  # goes on where its prompt ends
                sizes[first] += stop - start
            else:
                sizes.append(stop - start)
                prompt_of.append((first, segment.prompt[1] - segment.prompt[0]) if index else None)
    if end != total:
        raise ValueError(f"una_segments cover {end} tokens and the row has {total}; they must cover the whole row")
    return _Row(tuple(sizes), tuple(prompt_of))


def attended_pairs(segments: Segments, window: int | None = None) -> int:
    """How many (query, key) pairs a packed row computes scores of: 4 H D flop each in forward, for H heads of size D.

    window: a query sees itself and the window - 1 tokens before it."""
    total = 0
    for segment in segments:
        before = 0  # keys in front of the range's first query
        for start, stop in (segment.prompt, *segment.responses):
            queries = stop - start
            growing = queries if window is None else min(max(window - before, 0), queries)  # each sees one key more
            total += growing * before + growing * (growing + 1) // 2
            if growing < queries:
                total += (queries - growing) * window
            before = segment.prompt[1] - segment.prompt[0]
    return total


def _visible(prompt_size: int, window: int | None) -> int:
    """How many of the prompt's last tokens a response's queries can see."""
    return prompt_size if window is None else min(prompt_size, window - 1)


def _keys_per_range(states: Tensor, row: _Row, window: int | None, dim: int) -> list[list[Tensor]]:
    """For each range the parts that, concatenated along `dim`, are its keys (or values)."""
    # One split, not one slice per range: its backward is a single concatenation.
    ranges = states.split(row.sizes, dim=dim)
    parts, prompts = [], {}
    for own, prompt in zip(ranges, row.prompt_of, strict=True):
        if prompt is None:
            parts.append([own])
            continue
        if prompt not in prompts:
            first, size = prompt
            visible = _visible(size, window)
            prompts[prompt] = ranges[first].narrow(dim, size - visible, visible)
        parts.append([prompts[prompt], own])
    return parts


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenated; a single part as it is, without the copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ---- scaled_dot_product_attention, chunk by chunk --------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _mask_table(columns: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [CHUNK, columns] of the last CHUNK of `columns` positions; smaller chunks are corners of it."""
    with torch.inference_mode(False):  # kept between calls: a later call may save it for its backward
        query = torch.arange(columns - CHUNK, columns, device=device)[:, None]
        key = torch.arange(columns, device=device)[None, :]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        return torch.zeros(CHUNK, columns, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive lower-right causal mask [queries, keys], a view of a table shared by chunks, ranges and layers."""
    columns = 1 << (max(keys, CHUNK) - 1).bit_length()
    table = _mask_table(columns, window, like.dtype, like.device)
    return table[CHUNK - queries :, columns - keys :]


def _explicit_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: _Scores) -> Tensor:
    """Attention written out, for what fused kernels lack; the softmax is in fp32 at least."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # the heads of one group stand below each other
    z = (grouped @ key.transpose(2, 3)).view(batch, heads, queries, keys) * scores.scaling
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    z = z + mask
    if scores.sinks is not None:
        z = torch.cat([z, scores.sinks.to(z.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)], dim=-1)
    weights = z.softmax(dim=-1)[..., :keys].to(value.dtype)
    return (weights.reshape(batch, kv_heads, -1, keys) @ value).view(batch, heads, queries, -1)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, scores: _Scores) -> Tensor:
    mask = _mask(query.shape[2], key.shape[2], scores.window, query)
    if not scores.explicit:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scores.scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    if not torch.is_grad_enabled():
        return _explicit_softmax(query, key, value, mask, scores)
    # Recomputed in backward: otherwise several copies of [H, chunk, keys] stay alive for every chunk of the row.
    return checkpoint(_explicit_softmax, query, key, value, mask, scores, use_reentrant=False, preserve_rng_state=False)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: _Scores) -> Tensor:
    """One range: `query` [1, H, R, D] are the last R of the positions of `key`, `value` [1, H_kv, E, D]."""
    queries, keys = query.shape[2], key.shape[2]
    if scores.window is not None and scores.window >= keys:
        scores = scores._replace(window=None)
    fused = query.shape[-1] == value.shape[-1]  # with other shapes SDPA writes the scores out, so chunks are needed
    if queries == keys and scores.window is None and not scores.explicit and fused:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scores.scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    outputs = []
    last = keys - queries
    for chunk in query.split(CHUNK, dim=2):
        first = 0 if scores.window is None else max(0, last - scores.window + 1)
        last += chunk.shape[2]
        outputs.append(_attend_chunk(chunk, key[:, :, first:last], value[:, :, first:last], scores))
    return torch.cat(outputs, dim=2)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, row: _Row, scores: _Scores) -> Tensor:
    """The whole row, range after range: [1, T, H, D]."""
    queries = query.split(row.sizes, dim=2)
    keys = _keys_per_range(key, row, scores.window, dim=2)
    values = _keys_per_range(value, row, scores.window, dim=2)
    outputs = [
        _attend(q, _join(k, dim=2), _join(v, dim=2), scores).transpose(1, 2)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1)  # always a copy: some models take a view of it, as of a contiguous tensor


# ---- varlen kernels on CUDA ------------------------------------------------------------------------------------------
# The tests drive this path through stand-ins with the kernels' signatures. What those cannot show, that a kernel aligns
# causal masks and windows to the lower right, is asked of the kernel itself on the device (`_varlen_fault`).
#
# Memory, in tokens of keys and values (4 H_kv D bytes each), for K responses to a long prompt of P tokens. One call for
# the whole row would repeat the prompt for each range: (K + 1) P, kept for backward, where a kernel makes the gradients
# of as many (flash-attn H / H_kv times as many first, one per query head). So no call gets more keys than the row has
# tokens: a long prompt's responses are run one by one, the ranges of short rows together. (K - 1) P are kept, and what
# backward makes is that of one call. With one response per prompt nothing is copied.


class _Varlen(NamedTuple):
    """A varlen kernel (q, k, v, cu_q, cu_k, max_q, max_k, scores) -> [T, H, D], and whether it has a softcap."""

    name: str
    call: Callable[..., Tensor]
    softcap: bool


def _window_size(scores: _Scores) -> tuple[int, int]:
    return (-1 if scores.window is None else scores.window - 1, 0)


def _flash_attn() -> _Varlen | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def call(*tensors_and_lengths: Any, scores: _Scores) -> Tensor:
        return flash_attn_varlen_func(
            *tensors_and_lengths,
            softmax_scale=scores.scaling,
            causal=True,
            window_size=_window_size(scores),
            softcap=scores.softcap or 0.0,
        )

    return _Varlen("flash-attn", call, softcap=True)


def _torch_varlen() -> _Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # torch 2.13 asks for enable_gqa when key heads are shared; 2.11 shares them without being asked.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def call(*tensors_and_lengths: Any, scores: _Scores) -> Tensor:
        return varlen_attn(*tensors_and_lengths, scale=scores.scaling, window_size=_window_size(scores), **gqa)

    return _Varlen("torch.nn.attention.varlen", call, softcap=False)


@functools.cache
def _varlen_kernel(device: torch.device) -> _Varlen | None:
    """The first varlen kernel that is installed and right on this device."""
    for kernel in filter(None, (_flash_attn(), _torch_varlen())):
        # Compilers trace through the cache: they would put the check into every layer.
        fault = None if torch.compiler.is_compiling() else _varlen_fault(kernel, device)
        if fault is None:
            logger.info("packed attention on %s in half precision: %s", device, kernel.name)
            return kernel
        logger.warning("packed attention does not use %s on %s: %s", kernel.name, device, fault)
    return None


def _varlen_fault(kernel: _Varlen, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, by comparison with the SDPA path in float32; None if nothing is.

    Masks aligned to the upper left, or a window that is one off, would train a model on wrong numbers without a word.
    """
    total = 301
    row = _row((Segment((0, 75), ((75, 104), (104, total))),), total)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, total, 64, generator=generator).to(device, torch.bfloat16) for heads in (4, 2, 2, 4)
    ]
    for window, softcap in [(None, None), (40, None), *([(None, 2.0)] if kernel.softcap else [])]:
        scores = _Scores(0.4, window, softcap, None)  # peaked: each key counts
        results = []
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                for call in (kernel.call, None):
                    *qkv, upstream = (x.clone() if call else x.float() for x in states)
                    qkv = [x.requires_grad_() for x in qkv]
                    out = _attend_varlen(*qkv, row, scores, call) if call else _attend_sdpa(*qkv, row, scores)
                    results.append((out.detach(), *torch.autograd.grad(out, qkv, upstream.transpose(1, 2))))
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
        if not worst < 0.05:  # half precision is 0.01 off; not: NaN is wrong too
            return f"it is {worst:.1e} off (relative) with window {window} and softcap {softcap}"
    return None


_stand_in: _Varlen | None = None


@contextmanager
def traced_attention(kernel: Callable[..., Tensor] | None) -> Iterator[None]:
    """For tensors that have no numbers: tables kept between calls are made anew, before and after, and `kernel`, called
    as a varlen kernel is, serves as that of a GPU on whatever device (None: the path of the device)."""
    global _stand_in
    tables = (_mask_table, _cu_seqlens)
    try:
        for table in tables:
            table.cache_clear()
        _stand_in = None if kernel is None else _Varlen("traced", kernel, softcap=True)
        yield
    finally:
        _stand_in = None
        for table in tables:
            table.cache_clear()


def _varlen_refusal(query: Tensor, value: Tensor, scores: _Scores, kernel: _Varlen | None) -> str | None:
    """Why the varlen kernel cannot serve this call; None if it can."""
    if kernel is None:
        return "neither flash-attn nor torch.nn.attention.varlen is there and right on this device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it runs in half precision, and the model in {query.dtype}"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return (
            f"head sizes {query.shape[-1]} (keys) and {value.shape[-1]} (values) are not equal, or not 8, 16, ... 256"
        )
    if scores.sinks is not None or (scores.softcap is not None and not kernel.softcap):
        return "it has no attention sinks" if scores.sinks is not None else "it has no softcap (flash-attn has)"
    return None


@functools.cache  # once per reason
def _log_slow_path(reason: str) -> None:
    logger.warning("packed attention runs on the slower SDPA path: the varlen kernel is not used because %s", reason)


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


@functools.lru_cache(maxsize=8)  # every layer asks for the same lengths: one copy to the device per batch and window
def _cu_seqlens(row: _Row, window: int | None, device: torch.device) -> tuple[_Call, ...]:
    """The kernel calls of a row: as few as possible in order, each with at most as many keys as the row has tokens."""
    lengths_k = [
        size + (0 if prompt is None else _visible(prompt[1], window))
        for size, prompt in zip(row.sizes, row.prompt_of, strict=True)
    ]
    calls = []
    for ranges in _groups(lengths_k, most=sum(row.sizes)):
        queries, keys = row.sizes[ranges], lengths_k[ranges]
        with torch.inference_mode(False):
            cu_q, cu_k = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (queries, keys)
            )
        calls.append(_Call(ranges, cu_q, cu_k, max(queries), max(keys)))
    return tuple(calls)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, row: _Row, scores: _Scores, call: Callable[..., Tensor]
) -> Tensor:
    """The whole row by a varlen kernel: [1, T, H, D]."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    calls = _cu_seqlens(row, scores.window, query.device)
    # Where nothing is shared, one call takes the row as it is.
    keys, values = ([[x]] if not any(row.prompt_of) else _keys_per_range(x, row, scores.window, dim=0) for x in (k, v))

    def run(queries: Tensor, one: _Call) -> Tensor:  # a function: without gradients one call's copies live at a time
        own = scores._replace(window=None) if scores.window is not None and scores.window >= one.max_k else scores
        states = (_join([part for parts in x[one.ranges] for part in parts], dim=0) for x in (keys, values))
        return call(queries, *states, one.cu_q, one.cu_k, one.max_q, one.max_k, scores=own)

    queries = q.contiguous().split([sum(row.sizes[one.ranges]) for one in calls])
    return _join([run(*pair) for pair in zip(queries, calls, strict=True)], dim=0)[None]


# ---- what transformers calls -----------------------------------------------------------------------------------------


def _check_call(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float, extra: dict[str, Any]
) -> None:
    name = type(module).__name__
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, and {name} was given {query.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{name} has {key.shape[2]} keys for {query.shape[2]} queries: packed rows take no KV cache")
    if attention_mask is not None:
        raise ValueError(f"{name} passes an attention mask; in a packed row the segments alone say who sees whom")
    if dropout:
        raise ValueError(
            f"{name} has attention dropout {dropout}; set attention_dropout (attn_pdrop) to 0 in the config"
        )
    unknown = sorted(k for k, v in extra.items() if k not in HARMLESS and v is not None)
    if unknown:
        raise ValueError(f"{name} passes {', '.join(unknown)} to its attention, which packed attention does not know")


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    una_segments: Segments | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for packed rows.

    query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D], in the queries' dtype (autocast's, if it is on).
    una_segments: the table of the row, given to the model's forward. sliding_window: W, a token sees itself and W - 1
    before it. s_aux: [H] attention sinks. ValueError for missing segments, for dropout, masks and caches, and for any
    keyword argument that may change the scores and is not known here.
    """
    if una_segments is None:
        raise ValueError(
            f"{type(module).__name__} runs packed attention without segments: pass una_segments=batch.segments to the "
            "model's forward, and generate outside packed_attention(model)"
        )
    _check_call(module, query, key, attention_mask, dropout, extra)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal; only causal attention can be packed")
    if output_attentions:
        raise ValueError("packed attention has no attention weights to return; leave output_attentions off")
    _stay_packed_in_recompute(module)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    row = _row(una_segments, query.shape[2])
    scores = _Scores(query.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window, softcap, s_aux)
    if query.is_cuda or _stand_in is not None:
        kernel = _stand_in or _varlen_kernel(query.device)
        refusal = _varlen_refusal(query, value, scores, kernel)
        if refusal is None:
            return _attend_varlen(query, key, value, row, scores, kernel.call), None
        if _stand_in is None:
            _log_slow_path(refusal)
    return _attend_sdpa(query, key, value, row, scores), None


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """transformers' mask interface: the segments say everything, so a padding mask would be lost in silence."""
    if attention_mask is not None:
        raise ValueError("a packed row has no padding: pass attention_mask=None with una_segments")


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, _no_mask)


# ---- switching a model -----------------------------------------------------------------------------------------------


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Run `model` with packed attention inside the block; its own implementation is back afterwards, whatever happens.

    Only the forward pass belongs inside. Activation checkpointing recomputes the attention of a packed row as packed
    attention even when `backward` runs after the block. Nothing is validated or rebuilt: the name in every config that
    a module of the model holds (nested ones and copies too) is exchanged. Ask `packing.packing_refusal(model)` first: a
    model that does not call the registered function attends over the whole row, and nothing here would notice.
    """
    configs = {id(c): c for m in model.modules() if isinstance(c := m.__dict__.get("config"), PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = PACKED
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


_RECOMPUTE = "_una_implementations"  # on a module that has run packed: the implementations to put back, a stack


def _stay_packed_in_recompute(module: nn.Module) -> None:
    """Have an attention module run packed whenever it is called with segments.

    A checkpointed layer is run again during backward, when the user's implementation is back, and that one would
    ignore the segments without a word and give wrong gradients.
    """
    if _RECOMPUTE not in module.__dict__ and isinstance(getattr(module, "config", None), PreTrainedConfig):
        setattr(module, _RECOMPUTE, [])
        module.register_forward_pre_hook(_enter_packed, with_kwargs=True)
        module.register_forward_hook(_leave_packed, with_kwargs=True, always_call=True)


def ran_packed(module: nn.Module) -> bool:
    """Whether this attention module has been called with segments."""
    return _RECOMPUTE in module.__dict__


def _enter_packed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("una_segments") is not None:
        getattr(module, _RECOMPUTE).append(module.config._attn_implementation_internal)
        module.config._attn_implementation_internal = PACKED


def _leave_packed(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> None:
    # The stack is empty after the very first call, which began before the hooks were there.
    if kwargs.get("una_segments") is not None and getattr(module, _RECOMPUTE):
        module.config._attn_implementation_internal = getattr(module, _RECOMPUTE).pop()
