"""Packed attention as transformers calls an attention, and the switch of a model to packing.

The function is registered with transformers under the name PACKED; `packed_attention(model)`
switches a model to the name, and the table of segments travels through the keyword arguments of
the model's forward: `model(input_ids, position_ids=..., una_segments=batch.segments)`. Where
ranks split the tokens of a row (ulysses.py), their group travels beside, as `una_context`.

Back-ends: a varlen kernel for half precision on CUDA (varlen.py), otherwise SDPA (sdpa.py). The
layout of a row stands in rows.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from una_fast.attention.instance import Ran, configs_of
from una_fast.attention.rows import Segments, row_layout
from una_fast.attention.sdpa import ScoreRule, attend_sdpa, mask_table
from una_fast.attention.ulysses import attend_split
from una_fast.attention.varlen import (
    VarlenKernel,
    attend_varlen,
    varlen_calls,
    varlen_kernel,
    varlen_refusal,
)
from una_fast.group import ALONE, Group
from una_fast.logs import say_once
from una_fast.turns import enter, is_alone, leave

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


# ---- the function that transformers calls ------------------------------------------------------


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
    una_context: Group = ALONE,
    una_ran: Ran | None = None,
    kernel: VarlenKernel | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a packed row: transformers' attention interface.

    module: the calling attention module
    query: [1, H, T, D]
    key, value: [1, H_kv, T, D]
    attention_mask: must be left out
    scaling: factor on q . k; default D ** -0.5
    dropout: must be 0
    sliding_window: W, a token sees itself and the W - 1 tokens before
    softcap: c of c * tanh(score / c)
    s_aux: [H], attention sinks
    is_causal: must not be False
    output_attentions: must not be True
    una_segments: table of the whole row, given to the model's forward
    una_context: ranks with T tokens of the row each, given to the model's forward
    una_ran: gets the module, given to the model's forward
    kernel: serves the row if able to, on any device; default: the kernel of a CUDA device
    extra: further arguments of transformers; HARMLESS ones are ignored

    Returns [1, T, H, D], in the dtype of the queries or of autocast, and no attention weights.
    ValueError for missing segments, for dropout, masks and caches, and for any further argument,
    because an unknown argument may change the scores.
    """
    if una_segments is None:
        raise ValueError(
            f"{type(module).__name__} runs packed attention without segments: pass "
            "una_segments=batch.segments to the model's forward, and generate outside "
            "packed_attention(model)"
        )
    if una_ran is not None:
        una_ran.modules.append(module)
    _check_layout(module, query, key, attention_mask)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(
            f"{type(module).__name__} is not causal; only causal attention can be packed"
        )
    if output_attentions:
        raise ValueError(
            "packed attention has no attention weights to return; leave output_attentions off"
        )
    _check_scores(module, dropout, extra)
    _stay_packed_in_recompute(module)
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layout = row_layout(una_segments, query.shape[2] * una_context.size)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        rule = ScoreRule(scaling, sliding_window, softcap, sinks)
        chosen = _choose_kernel(query, value, rule, kernel)
        if chosen is None:
            return attend_sdpa(query, key, value, layout, rule)
        return attend_varlen(query, key, value, layout, rule, chosen.call)

    if una_context.size == 1:
        return attend(query, key, value, s_aux), None
    return attend_split(query, key, value, s_aux, una_context, attend), None


def _check_layout(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
) -> None:
    name = type(module).__name__
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, and {name} was given {query.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name} has {key.shape[2]} keys for {query.shape[2]} queries: packed rows take no "
            "KV cache"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{name} passes an attention mask; in a packed row the segments alone say who sees whom"
        )


def _check_scores(module: nn.Module, dropout: float, extra: dict[str, Any]) -> None:
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"{name} has attention dropout {dropout}; load the model with attention_dropout=0 "
            "(attn_pdrop=0), or call remove_dropout(model) of una_fast.integrations.hf"
        )
    unknown = sorted(k for k, v in extra.items() if k not in HARMLESS and v is not None)
    if unknown:
        raise ValueError(
            f"{name} passes {', '.join(unknown)} to its attention, which packed attention does "
            "not know"
        )


def _choose_kernel(
    query: Tensor,
    value: Tensor,
    rule: ScoreRule,
    given: VarlenKernel | None,
) -> VarlenKernel | None:
    """Return the varlen kernel for a call, or None for SDPA; SDPA on CUDA is logged once."""
    if given is None and not query.is_cuda:
        return None
    kernel = varlen_kernel(query.device) if given is None else given
    refusal = varlen_refusal(query, value, rule, kernel)
    if refusal is None:
        return kernel
    if given is None:
        message = (
            "packed attention runs on the slower SDPA path: the varlen kernel is not used "
            f"because {refusal}"
        )
        say_once(logging.WARNING, message, logger)
    return None


# No mask is registered: transformers then leaves the mask out before it looks at the numbers of
# position_ids, for which every forward would wait for the device.
AttentionInterface.register(PACKED, packed_attention_forward)


@contextmanager
def fresh_tables() -> Iterator[None]:
    """Forget the tables kept between calls, before the block and after.

    For blocks with counted tensors, or with tensors without numbers.
    """
    _forget_tables()
    try:
        yield
    finally:
        _forget_tables()


def _forget_tables() -> None:
    mask_table.cache_clear()
    varlen_calls.cache_clear()


# ---- the switch of a model ---------------------------------------------------------------------


@contextmanager
def packed_attention(model: nn.Module, name: str = PACKED) -> Iterator[None]:
    """Run a model with packed attention inside the block, and restore the model's own attention.

    model: the model
    name: registered name of the packed attention

    Only the forward pass belongs inside. Activation checkpointing recomputes the attention of a
    packed row as packed attention even when `backward` runs after the block. The name in every
    config of the model's modules (nested configs and copies too) is exchanged, without validation.
    Ask `attention.probe.packing_refusal(model)` first: a model with an attention function of its
    own attends over the whole row, without an error.
    """
    refusal = model.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
    try:
        with switched_attention(model, name):
            yield
    finally:
        refusal.remove()


@contextmanager
def switched_attention(model: nn.Module, name: str = PACKED) -> Iterator[None]:
    """Run packed_attention without a look at masks, for callers that give no mask.

    A hook on the model would stop the calls of a second thread, too.
    """
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _refuse_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a padding mask, which transformers would leave out in silence."""
    masks = (*args[1:2], kwargs.get("attention_mask"))
    if any(mask is not None for mask in masks):
        raise ValueError("a packed row has no padding: pass attention_mask=None with una_segments")


# Attribute of a module that has run packed: the stack of implementations to put back.
_RECOMPUTE = "_una_implementations"


def _stay_packed_in_recompute(module: nn.Module) -> None:
    """Have an attention module run packed in every call with segments.

    A checkpointed layer is run again during backward, when the user's implementation is back. That
    implementation would ignore the segments without an error, and gradients would be wrong.
    """
    is_attention = isinstance(getattr(module, "config", None), PreTrainedConfig)
    if is_attention and not ran_packed(module):
        setattr(module, _RECOMPUTE, [])
        module.register_forward_pre_hook(_enter_packed, with_kwargs=True)
        module.register_forward_hook(_leave_packed, with_kwargs=True, always_call=True)


def ran_packed(module: nn.Module) -> bool:
    """Return whether an attention module has been called with segments."""
    return _RECOMPUTE in module.__dict__


def _enter_packed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("una_segments") is not None:
        # In a backward, while another thread may be in a forward; a forward has its turn already.
        turn = None
        if not torch.compiler.is_compiling() and not is_alone(module.config):
            turn = enter(module.config, alone=True)
        getattr(module, _RECOMPUTE).append((module.config._attn_implementation_internal, turn))
        module.config._attn_implementation_internal = PACKED


def _leave_packed(
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    output: object,
) -> None:
    # The stack is empty after the very first call, which began before the hooks were there.
    if kwargs.get("una_segments") is not None and getattr(module, _RECOMPUTE):
        before, turn = getattr(module, _RECOMPUTE).pop()
        module.config._attn_implementation_internal = before
        if turn is not None:
            leave(module.config, turn)
