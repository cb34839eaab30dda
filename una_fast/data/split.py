"""The part of a packed batch that a rank computes, where ranks split the tokens of a row.

    row     [prompt | response 1 | response 2 | padding]      T tokens, a multiple of C ranks
    rank r  tokens [r t, (r + 1) t)                            t = T / C

Positions and the table of segments are of the whole row, as attention is (attention/ulysses.py).
The rows of a response may lie on several ranks, or all on one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from una_fast.attention.ulysses import padded_segments, padded_tokens
from una_fast.data.batch import Batch
from una_fast.group import Group


def split_batch(batch: Batch, group: Group) -> Batch:
    """Return a rank's part of a batch; the batch itself for a group of one.

    batch: packed, equal on all ranks of the group
    group: the ranks

    The fields of the part:

    input_ids, position_ids: [1, t]
    segments: of the whole row, padding included
    rows, targets: [n], places within the t tokens, and their targets
    cu_seqlens: [S + 1], bounds of the responses within the n rows
    feedback, ref_logps, num_tokens: of the whole batch

    ValueError for a padded batch.
    """
    if group.size == 1:
        return batch
    if batch.segments is None:
        raise ValueError(
            "a padded batch cannot be split over ranks, because its attention is the model's own; "
            "set parallel.context=1, or packing=true"
        )
    total = batch.input_ids.shape[1]
    padded = padded_tokens(total, group.size)
    tokens = padded // group.size
    first = group.rank * tokens
    is_mine = (batch.host_rows >= first) & (batch.host_rows < first + tokens)
    counted = torch.cat([torch.zeros(1, dtype=torch.int64), is_mine.cumsum(0)])
    mine = is_mine.nonzero().flatten()
    host_rows = batch.host_rows[mine] - first
    device = batch.input_ids.device
    return replace(
        batch,
        input_ids=_part(batch.input_ids, first, tokens, padding=0),
        position_ids=_part(batch.position_ids, first, tokens, padding=1),
        segments=padded_segments(batch.segments, total, padded),
        rows=host_rows.to(device, non_blocking=True),
        host_rows=host_rows,
        targets=batch.targets[mine.to(device, non_blocking=True)],
        cu_seqlens=counted[batch.cu_seqlens],
    )


def _part(row: Tensor, first: int, tokens: int, *, padding: int) -> Tensor:
    """Return some tokens of a row [1, T], with padding after the last one.

    first: token of the row, or of the padding
    tokens: of the part
    padding: step from number to number of the padding: 0 repeats token 0, 1 counts positions
    """
    total = row.shape[1]
    own = row[:, first : first + tokens]
    missing = tokens - own.shape[1]
    if not missing:
        return own
    start = max(first - total, 0)
    added = torch.arange(start, start + missing, device=row.device, dtype=row.dtype) * padding
    return torch.cat([own, added[None]], dim=1)
