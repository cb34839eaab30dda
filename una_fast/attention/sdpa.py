"""A packed row by scaled_dot_product_attention, chunk of queries by chunk.

Each chunk meets only the keys that its queries can see: no mask of the size of the row is built.
SDPA has neither softcaps nor attention sinks: such a softmax is written out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from una_fast.attention.rows import RowLayout, visible_prompt_tokens

CHUNK = 512  # queries per call


class ScoreRule(NamedTuple):
    """The way from a product q . k to a weight of the softmax.

    scaling: factor on q . k
    window: a query sees itself and the window - 1 keys before; without a window all keys before
    softcap: c of c * tanh(score / c)
    sinks: [H], an extra logit per head in the denominator of the softmax
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def explicit(self) -> bool:
        """Return whether the softmax must be written out, because fused kernels lack a term."""
        return self.softcap is not None or self.sinks is not None

    def for_keys(self, keys: int) -> ScoreRule:
        """Return the rule for a range of so many keys: a window as long as the range is dropped."""
        if self.window is None or self.window < keys:
            return self
        return self._replace(window=None)


def pieces_per_range(
    states: Tensor,
    layout: RowLayout,
    window: int | None,
    dim: int,
) -> list[list[Tensor]]:
    """Return, for every range of a row, the tensors to concatenate along `dim` to the keys.

    states: keys or values of the whole row
    layout: the row
    window: sliding window of the attention, if any
    dim: dimension of the tokens
    """
    # One split, not one slice per range: its backward is a single concatenation.
    ranges = states.split(layout.sizes, dim=dim)
    prompts: dict[tuple[int, int], Tensor] = {}
    pieces = []
    for tokens, prompt in zip(ranges, layout.prompt_of, strict=True):
        if prompt is None:
            pieces.append([tokens])
            continue
        if prompt not in prompts:
            first_range, size = prompt
            visible = visible_prompt_tokens(size, window)
            prompts[prompt] = ranges[first_range].narrow(dim, size - visible, visible)
        pieces.append([prompts[prompt], tokens])
    return pieces


def concatenate(pieces: Iterable[Tensor], dim: int) -> Tensor:
    """Concatenate tensors; a single tensor is returned without a copy."""
    pieces = list(pieces)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


@functools.lru_cache(maxsize=8)
def mask_table(
    columns: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Build the additive causal mask [CHUNK, columns] of the last CHUNK of `columns` positions.

    columns: keys, at least CHUNK
    window: sliding window, if any
    dtype: dtype of the scores
    device: device of the scores

    The masks of smaller chunks are the lower right corners of the table.
    """
    # The table is kept between calls: a later call may save it for backward.
    with torch.inference_mode(False):
        query = torch.arange(columns - CHUNK, columns, device=device)[:, None]
        key = torch.arange(columns, device=device)[None, :]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        table = torch.zeros(CHUNK, columns, dtype=dtype, device=device)
        return table.masked_fill_(hidden, float("-inf"))


def _mask(
    queries: int,
    keys: int,
    window: int | None,
    like: Tensor,
) -> Tensor:
    """Return the additive lower-right causal mask [queries, keys], a view of a shared table."""
    columns = 1 << (max(keys, CHUNK) - 1).bit_length()
    table = mask_table(columns, window, like.dtype, like.device)
    return table[CHUNK - queries :, columns - keys :]


def _explicit_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    rule: ScoreRule,
) -> Tensor:
    """Compute attention with the softmax written out, in float32 at least.

    query: [1, H, R, D]
    key, value: [1, H_kv, E, D]
    mask: [R, E], added to the scores
    """
    batch, heads, queries, head_size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # The heads of one group stand below each other: [1, H_kv, H / H_kv * R, D].
    grouped = query.reshape(batch, kv_heads, -1, head_size)
    products = grouped @ key.transpose(2, 3)
    scores = products.view(batch, heads, queries, keys) * rule.scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores + mask
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(1, heads, 1, 1)
        scores = torch.cat([scores, sinks.expand(batch, heads, queries, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :keys].to(value.dtype)
    grouped_weights = weights.reshape(batch, kv_heads, -1, keys)
    out = grouped_weights @ value
    return out.view(batch, heads, queries, -1)


def _attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
) -> Tensor:
    """Compute the attention of a chunk of queries; the last query stands at the last key."""
    mask = _mask(query.shape[2], key.shape[2], rule.window, query)
    if not rule.explicit:
        return _fused(query, key, value, rule, attn_mask=mask)
    if not torch.is_grad_enabled():
        return _explicit_softmax(query, key, value, mask, rule)
    # Recomputed in backward: several copies of [H, chunk, keys] would live for every chunk.
    return checkpoint(
        _explicit_softmax,
        query,
        key,
        value,
        mask,
        rule,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
    **mask: Tensor | bool,
) -> Tensor:
    shared_keys = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, scale=rule.scaling, enable_gqa=shared_keys, **mask
    )


def attend_range(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
) -> Tensor:
    """Compute the attention of a range, the last R of E positions: [1, H, R, D_v].

    query: [1, H, R, D]
    key: [1, H_kv, E, D]
    value: [1, H_kv, E, D_v]
    rule: the way from products to weights
    """
    queries = query.shape[2]
    keys = key.shape[2]
    rule = rule.for_keys(keys)
    # With values of another size SDPA writes all scores out, so that chunks are needed.
    same_size = query.shape[-1] == value.shape[-1]
    fused = same_size and not rule.explicit
    if queries == keys and rule.window is None and fused:
        return _fused(query, key, value, rule, is_causal=True)
    outputs = []
    last = keys - queries
    for chunk in query.split(CHUNK, dim=2):
        first = 0 if rule.window is None else max(0, last - rule.window + 1)
        last += chunk.shape[2]
        visible_keys = key[:, :, first:last]
        visible_values = value[:, :, first:last]
        outputs.append(_attend_chunk(chunk, visible_keys, visible_values, rule))
    return torch.cat(outputs, dim=2)


def attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    rule: ScoreRule,
) -> Tensor:
    """Compute the attention of a whole packed row, range after range: [1, T, H, D_v].

    query: [1, H, T, D]
    key: [1, H_kv, T, D]
    value: [1, H_kv, T, D_v]
    layout: the row
    rule: the way from products to weights
    """
    queries = query.split(layout.sizes, dim=2)
    key_pieces = pieces_per_range(key, layout, rule.window, dim=2)
    value_pieces = pieces_per_range(value, layout, rule.window, dim=2)
    outputs = []
    for q, k, v in zip(queries, key_pieces, value_pieces, strict=True):
        keys = concatenate(k, dim=2)
        values = concatenate(v, dim=2)
        out = attend_range(q, keys, values, rule)
        outputs.append(out.transpose(1, 2))
    # Always a copy: some models take a view of the result, as of a contiguous tensor.
    return torch.cat(outputs, dim=1)
