"""A packed row whose tokens are split over ranks: all tokens of some heads for every rank.

Legend: C ranks of a group, T tokens of the row (padded to a multiple of C), t = T / C of a rank, H
query heads, h = H / C of a rank, K key heads, D head size.

    query, key, value  [1, H, t, D]   own tokens, all heads
        -> all-to-all  [1, h, T, D]   all tokens, own heads
        -> attention over the whole row, as in one process
        -> all-to-all  [1, t, H, D]   own tokens, all heads

Four all-to-alls per layer forward (query, key, value, result), and the same four back in backward.
A rank sends T H D / C numbers per all-to-all, less its own; memory is that of 1 / C of the row.
(Ulysses: Jacobs et al., DeepSpeed-Ulysses, 2023.)

Ranks hold contiguous ranges of tokens. Their attention is level nevertheless: every rank has whole
rows for h heads, whatever the mask hides.

Where key heads are shared by query heads, a rank gets the key heads that its query heads read: with
K < C the same key head on several ranks. Gradients of the copies are summed where the head is from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from una_fast.attention.rows import Segment, Segments
from una_fast.group import Group

Heads = tuple[int, int]
"""Heads [start, stop) of a rank."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query [1, h, T, D], key, value, sinks [h] or None) -> [1, T, h, D_v]."""


def padded_tokens(total: int, ranks: int) -> int:
    """Return the tokens of a row of `total` tokens that ranks split evenly."""
    return -(-total // ranks) * ranks


def padded_segments(segments: Segments, total: int, padded: int) -> Segments:
    """Return the table of a padded row: the padding is a prompt of its own, and sees itself alone.

    segments: of `total` tokens
    padded: tokens with the padding
    """
    if padded == total:
        return segments
    return (*segments, Segment((total, padded), ()))


def heads_refusal(heads: int, ranks: int) -> str | None:
    """Return why so many ranks cannot share a number of query heads, with a number that can."""
    if heads % ranks == 0:
        return None
    fitting = [n for n in range(1, ranks + 1) if heads % n == 0]
    return (
        f"{heads} query heads are not divisible by {ranks} ranks ({heads} / {ranks} = "
        f"{heads / ranks:.4g}), and every rank computes whole heads; {fitting[-1]} divides them"
    )


def attend_split(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    group: Group,
    attend: Attend,
) -> Tensor:
    """Compute the attention of a row whose tokens are split over the ranks of a group.

    query: [1, H, t, D], tokens of this rank
    key: [1, K, t, D]
    value: [1, K, t, D_v]
    sinks: [H] or None
    group: the ranks, with equally many tokens each
    attend: attention over a whole row

    Returns [1, t, H, D_v]. ValueError where the ranks do not divide the query heads.
    """
    ranks = group.size
    refusal = heads_refusal(query.shape[1], ranks)
    if refusal is not None:
        raise ValueError(f"{refusal}: set parallel.context={ranks} to a divisor")
    own = query.shape[1] // ranks
    of_query = [(r * own, (r + 1) * own) for r in range(ranks)]
    sharing = query.shape[1] // key.shape[1]
    of_key = [(first // sharing, (last - 1) // sharing + 1) for first, last in of_query]

    query = _all_tokens(query, of_query, group)
    key = _all_tokens(key, of_key, group)
    value = _all_tokens(value, of_key, group)
    mine = of_query[group.rank]
    copies = _copies(mine, of_key[group.rank], sharing)
    if copies is not None:
        index = _on_device(tuple(copies), key.device)
        key, value = key.index_select(1, index), value.index_select(1, index)
    if sinks is not None:
        sinks = sinks[slice(*mine)]
    out = attend(query, key, value, sinks)
    return _OwnTokens.apply(out[0].contiguous(), of_query, group)[None]


@functools.lru_cache(maxsize=64)  # a copy to the device waits for it, and every layer asks
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def _all_tokens(states: Tensor, heads: Sequence[Heads], group: Group) -> Tensor:
    """Return own heads of all tokens, [1, h, T, D], from all heads of own tokens [1, H, t, D]."""
    # Token after token, as models make them and varlen kernels read them.
    return _AllTokens.apply(states[0].transpose(0, 1), heads, group).transpose(0, 1)[None]


def _copies(mine: Heads, keys: Heads, sharing: int) -> list[int] | None:
    """Return the place of the key head of every query head of a rank.

    mine: query heads
    keys: key heads
    sharing: query heads per key head in the model

    None where attention itself gives equally many query heads to every key head, in order.
    """
    places = [head // sharing - keys[0] for head in range(*mine)]
    held = keys[1] - keys[0]
    if len(places) % held == 0:
        each = len(places) // held
        if places == [k // each for k in range(len(places))]:
            return None
    return places


# ---- the all-to-alls -----------------------------------------------------------------------------


def _send_heads(states: Tensor, heads: Sequence[Heads], group: Group) -> Tensor:
    """Send every rank its heads of own tokens; return own heads of all tokens [T, h, D].

    states: [t, H, D]
    heads: of every rank; several ranks may ask for a head
    """
    tokens, _, size = states.shape
    pieces = [states[:, slice(*one)].reshape(-1) for one in heads]
    first, last = heads[group.rank]
    from_each = tokens * (last - first) * size
    sizes = [piece.numel() for piece in pieces]
    received = group.exchange(torch.cat(pieces), sizes, [from_each] * group.size)
    return received.view(group.size * tokens, last - first, size)


def _send_tokens(states: Tensor, heads: Sequence[Heads], total: int, group: Group) -> Tensor:
    """Send every rank its tokens of own heads; return all heads of own tokens [t, H, D].

    states: [T, h, D], contiguous
    heads: of every rank; a head that several ranks hold is the sum of theirs
    total: H
    """
    tokens, size = states.shape[0] // group.size, states.shape[2]
    sizes = [tokens * (last - first) * size for first, last in heads]
    to_each = states.numel() // group.size
    received = group.exchange(states.reshape(-1), [to_each] * group.size, sizes)
    pieces = []
    for (first, last), piece in zip(heads, received.split(sizes), strict=True):
        pieces.append(piece.view(tokens, last - first, size))
    if sum(last - first for first, last in heads) == total:
        return torch.cat(pieces, dim=1)
    # Sums are rounded once.
    wide = torch.promote_types(states.dtype, torch.float32)
    summed = states.new_zeros(tokens, total, size, dtype=wide)
    for (first, last), piece in zip(heads, pieces, strict=True):
        summed[:, first:last] += piece
    return summed.to(states.dtype)


class _AllTokens(torch.autograd.Function):
    """From all heads of own tokens to own heads of all tokens."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, heads: Sequence[Heads], group: Group) -> Tensor:
        ctx.heads, ctx.group, ctx.total = heads, group, states.shape[1]
        return _send_heads(states, heads, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        own = _send_tokens(upstream.contiguous(), ctx.heads, ctx.total, ctx.group)
        return own, None, None


class _OwnTokens(torch.autograd.Function):
    """From own heads of all tokens to all heads of own tokens; no head is on two ranks."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, heads: Sequence[Heads], group: Group) -> Tensor:
        ctx.heads, ctx.group = heads, group
        return _send_tokens(states, heads, heads[-1][1], group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _send_heads(upstream, ctx.heads, ctx.group), None, None
