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
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from una_fast.attention.rows import Segments, row_ranges
from una_fast.attention.sdpa import Scores, attend_sdpa, mask_table
from una_fast.attention.varlen import (
    VarlenKernel,
    attend_varlen,
    kernel_calls,
    varlen_kernel,
    varlen_refusal,
)

logger = logging.getLogger(__name__)


PACKED = "una_packed"


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


_stand_in: VarlenKernel | None = None


@contextmanager
def traced_attention(kernel: Callable[..., Tensor] | None) -> Iterator[None]:
    """For tensors that have no numbers: tables kept between calls are made anew, before and after, and `kernel`, called
    as a varlen kernel is, serves as that of a GPU on whatever device (None: the path of the device)."""
    global _stand_in
    tables = (mask_table, kernel_calls)
    try:
        for table in tables:
            table.cache_clear()
        _stand_in = None if kernel is None else VarlenKernel("traced", kernel, softcap=True)
        yield
    finally:
        _stand_in = None
        for table in tables:
            table.cache_clear()


@functools.cache  # once per reason
def _log_slow_path(reason: str) -> None:
    logger.warning(
        "packed attention runs on the slower SDPA path: the varlen kernel is not used because %s",
        reason,
    )


# ---- what transformers calls -----------------------------------------------------------------------------------------


def _check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    extra: dict[str, Any],
) -> None:
    name = type(module).__name__
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, and {name} was given {query.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name} has {key.shape[2]} keys for {query.shape[2]} queries: packed rows take no KV cache"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{name} passes an attention mask; in a packed row the segments alone say who sees whom"
        )
    if dropout:
        raise ValueError(
            f"{name} has attention dropout {dropout}; set attention_dropout (attn_pdrop) to 0 in the config"
        )
    unknown = sorted(k for k, v in extra.items() if k not in HARMLESS and v is not None)
    if unknown:
        raise ValueError(
            f"{name} passes {', '.join(unknown)} to its attention, which packed attention does not know"
        )


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
        raise ValueError(
            f"{type(module).__name__} is not causal; only causal attention can be packed"
        )
    if output_attentions:
        raise ValueError(
            "packed attention has no attention weights to return; leave output_attentions off"
        )
    _stay_packed_in_recompute(module)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (
            x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value)
        )
    row = row_ranges(una_segments, query.shape[2])
    scores = Scores(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window,
        softcap,
        s_aux,
    )
    if query.is_cuda or _stand_in is not None:
        kernel = _stand_in or varlen_kernel(query.device)
        refusal = varlen_refusal(query, value, scores, kernel)
        if refusal is None:
            return attend_varlen(query, key, value, row, scores, kernel.call), None
        if _stand_in is None:
            _log_slow_path(refusal)
    return attend_sdpa(query, key, value, row, scores), None


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
    configs = {
        id(c): c
        for m in model.modules()
        if isinstance(c := m.__dict__.get("config"), PreTrainedConfig)
    }
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
    if _RECOMPUTE not in module.__dict__ and isinstance(
        getattr(module, "config", None), PreTrainedConfig
    ):
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
