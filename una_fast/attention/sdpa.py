"""A packed row by scaled_dot_product_attention, chunk by chunk."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from una_fast.attention.rows import RowRanges, visible_prompt

CHUNK = 512  # queries per call on the SDPA path


class Scores(NamedTuple):
    """How a score is made from q . k."""

    scaling: float
    window: int | None  # a query sees itself and the window - 1 keys before it
    softcap: float | None
    sinks: Tensor | None  # [H], one extra logit per head in the softmax's denominator

    @property
    def explicit(self) -> bool:
        """No fused kernel has it: the softmax is written out."""
        return self.softcap is not None or self.sinks is not None


def keys_per_range(
    states: Tensor, row: RowRanges, window: int | None, dim: int
) -> list[list[Tensor]]:
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
            visible = visible_prompt(size, window)
            prompts[prompt] = ranges[first].narrow(dim, size - visible, visible)
        parts.append([prompts[prompt], own])
    return parts


def join(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenated; a single part as it is, without the copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ---- scaled_dot_product_attention, chunk by chunk --------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def mask_table(
    columns: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [CHUNK, columns] of the last CHUNK of `columns` positions; smaller chunks are corners of it."""
    with torch.inference_mode(
        False
    ):  # kept between calls: a later call may save it for its backward
        query = torch.arange(columns - CHUNK, columns, device=device)[:, None]
        key = torch.arange(columns, device=device)[None, :]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        return torch.zeros(CHUNK, columns, dtype=dtype, device=device).masked_fill_(
            hidden, float("-inf")
        )


def _mask(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """Additive lower-right causal mask [queries, keys], a view of a table shared by chunks, ranges and layers."""
    columns = 1 << (max(keys, CHUNK) - 1).bit_length()
    table = mask_table(columns, window, like.dtype, like.device)
    return table[CHUNK - queries :, columns - keys :]


def _explicit_softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores
) -> Tensor:
    """Attention written out, for what fused kernels lack; the softmax is in fp32 at least."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(
        batch, kv_heads, -1, query.shape[-1]
    )  # the heads of one group stand below each other
    z = (grouped @ key.transpose(2, 3)).view(batch, heads, queries, keys) * scores.scaling
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    z = z + mask
    if scores.sinks is not None:
        z = torch.cat(
            [z, scores.sinks.to(z.dtype).view(1, heads, 1, 1).expand(batch, heads, queries, 1)],
            dim=-1,
        )
    weights = z.softmax(dim=-1)[..., :keys].to(value.dtype)
    return (weights.reshape(batch, kv_heads, -1, keys) @ value).view(batch, heads, queries, -1)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    mask = _mask(query.shape[2], key.shape[2], scores.window, query)
    if not scores.explicit:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if not torch.is_grad_enabled():
        return _explicit_softmax(query, key, value, mask, scores)
    # Recomputed in backward: otherwise several copies of [H, chunk, keys] stay alive for every chunk of the row.
    return checkpoint(
        _explicit_softmax,
        query,
        key,
        value,
        mask,
        scores,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """One range: `query` [1, H, R, D] are the last R of the positions of `key`, `value` [1, H_kv, E, D]."""
    queries, keys = query.shape[2], key.shape[2]
    if scores.window is not None and scores.window >= keys:
        scores = scores._replace(window=None)
    fused = (
        query.shape[-1] == value.shape[-1]
    )  # with other shapes SDPA writes the scores out, so chunks are needed
    if queries == keys and scores.window is None and not scores.explicit and fused:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    outputs = []
    last = keys - queries
    for chunk in query.split(CHUNK, dim=2):
        first = 0 if scores.window is None else max(0, last - scores.window + 1)
        last += chunk.shape[2]
        outputs.append(_attend_chunk(chunk, key[:, :, first:last], value[:, :, first:last], scores))
    return torch.cat(outputs, dim=2)


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, row: RowRanges, scores: Scores
) -> Tensor:
    """The whole row, range after range: [1, T, H, D]."""
    queries = query.split(row.sizes, dim=2)
    keys = keys_per_range(key, row, scores.window, dim=2)
    values = keys_per_range(value, row, scores.window, dim=2)
    outputs = [
        _attend(q, join(k, dim=2), join(v, dim=2), scores).transpose(1, 2)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(
        outputs, dim=1
    )  # always a copy: some models take a view of it, as of a contiguous tensor
