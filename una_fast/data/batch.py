"""Batches: examples side by side, packed or padded, as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from una_fast.attention.rows import Segment
from una_fast.data.examples import Example
from una_fast.feedback import Feedback

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens for the model, and for the loss N response tokens of S responses.

    input_ids, position_ids: [B, T] int64. attention_mask: [B, T] int64 in the padded layout, None in the packed one.
    segments: token ranges in the packed layout (B = 1), None in the padded one. rows: [N] int64, flat index into
    B * T of the position that predicts each response token; the last prompt token stands once per response.
    targets: [N] int64. cu_seqlens: [S+1] int64, always on the CPU, as is feedback. ref_logps: [S] float64, or None if
    the examples have none or there are no examples. num_tokens: tokens of examples that go through the model.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    feedback: Feedback
    ref_logps: Tensor | None
    num_tokens: int


def collate(
    examples: Sequence[Example],
    *,
    packed: bool,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
) -> Batch:
    """The batch of some examples; both layouts hold the same responses in the same order.

    Without responses (a rank that ran out of examples) the batch is a dummy row of two tokens with N = 0 and S = 0:
    it runs through a model, so that collectives happen.
    """
    examples = [example for example in examples if example.responses]
    responses = [response for example in examples for response in example.responses]
    if not examples:
        layout = _dummy(packed, pad_id)
    else:
        layout = _pack(examples) if packed else _pad(examples, pad_id)
    counts = np.cumsum([0, *(len(example.responses) for example in examples)])
    on_device = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": layout.attention_mask,
        "rows": np.concatenate([np.empty(0, dtype=np.int64), *layout.rows]),
        "targets": np.concatenate([np.empty(0, dtype=np.int64), *responses]),
        "ref_logps": _ref_logps(examples),
    }
    return Batch(
        **{
            k: None if v is None else torch.from_numpy(v).to(device, non_blocking=True)
            for k, v in on_device.items()
        },
        segments=layout.segments,
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, responses)], dtype=np.int64)),
        feedback=Feedback.merge(
            [e.feedback.shift(int(n)) for e, n in zip(examples, counts[:-1], strict=True)]
        ),
        num_tokens=layout.num_tokens,
    )


@dataclass(frozen=True)
class _Layout:
    """Where the tokens stand: the parts of a batch in which packed and padded differ, as int64 arrays."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None
    segments: tuple[Segment, ...] | None
    rows: list[np.ndarray]
    num_tokens: int


def _pack(examples: Sequence[Example]) -> _Layout:
    ids, positions, segments, rows, start = [], [], [], [], 0
    for example in examples:
        length = len(example.prompt_ids)
        prompt, start = (start, start + length), start + length
        ids.append(example.prompt_ids)
        positions.append(np.arange(length))
        spans = []
        for response in example.responses:
            stop = start + len(response)
            ids.append(response)
            positions.append(np.arange(length, length + len(response)))
            rows.append(np.concatenate([[prompt[1] - 1], np.arange(start, stop - 1)]))
            spans.append((start, stop))
            start = stop
        segments.append(Segment(prompt, tuple(spans)))
    input_ids = np.concatenate(ids, dtype=np.int64)[None]
    return _Layout(input_ids, np.concatenate(positions)[None], None, tuple(segments), rows, start)


def _pad(examples: Sequence[Example], pad_id: int) -> _Layout:
    pairs = [
        (example.prompt_ids, response) for example in examples for response in example.responses
    ]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = np.full((len(pairs), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows = []
    for b, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        input_ids[b, :length] = np.concatenate([prompt, response])
        mask[b, :length] = 1
        rows.append(b * width + np.arange(len(prompt) - 1, length - 1))
    positions = np.tile(np.arange(width), (len(pairs), 1))
    return _Layout(input_ids, positions, mask, None, rows, int(mask.sum()))


def footprint(example: Example, *, packed: bool) -> tuple[int, int]:
    """(rows, width) such that a batch of examples takes sum(rows) * max(width) tokens in a layout.

    Padded, these are the responses and the longest sequence. Packed examples stand one after another: what adds up is
    their tokens, and the width is 1. An example without responses is left out of batches, and takes (0, 0).
    """
    lengths = [len(response) for response in example.responses]
    if not lengths:
        return 0, 0
    prompt = len(example.prompt_ids)
    return (prompt + sum(lengths), 1) if packed else (len(lengths), prompt + max(lengths))


def layout_tokens(examples: Sequence[Example], *, packed: bool) -> int:
    """Tokens that `collate` lays out for examples, padding included; 0 for its dummy row."""
    sizes = [footprint(example, packed=packed) for example in examples]
    return sum(rows for rows, _ in sizes) * max((width for _, width in sizes), default=0)


def _dummy(packed: bool, pad_id: int) -> _Layout:
    segments = (Segment((0, 1), ((1, 2),)),) if packed else None
    mask = None if packed else np.ones((1, 2), dtype=np.int64)
    return _Layout(np.full((1, 2), pad_id), np.arange(2)[None], mask, segments, [], 0)


def _ref_logps(examples: Sequence[Example]) -> np.ndarray | None:
    without = [example.origin for example in examples if example.ref_logps is None]
    if len(without) == len(examples):
        return None
    if without:
        raise ValueError(
            f"{without[0]} has no ref_logps while other records of the batch have; give them for every record "
            "(una-fast precompute-ref), or for none"
        )
    return np.array(
        [value for example in examples for value in example.ref_logps], dtype=np.float64
    )
