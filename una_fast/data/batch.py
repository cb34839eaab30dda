"""Batches: examples laid out for a forward pass of a model, packed or padded.

Both layouts hold the same responses, targets and feedback in the same order:

    packed   one row [1, T]: prompt | response 1 | ... | response K, example after example; the
             prompt stands once
    padded   a sequence prompt + response per response, padded on the right
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from una_fast.attention.rows import Segment
from una_fast.data.examples import Example
from una_fast.feedback import Feedback


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens for the model, and N scored tokens of S responses for the loss.

    input_ids: [B, T] int64
    position_ids: [B, T] int64
    attention_mask: [B, T] int64, 1 for tokens and 0 for padding; None in the packed layout
    segments: token ranges of the packed layout, B = 1; None in the padded layout
    rows: [N] int64, flat index into B * T of the position before a scored token, where the model
        predicts the token; the last prompt token stands once per response
    host_rows: the same numbers, always on the CPU
    targets: [N] int64, the scored tokens: of responses, all but the messages between two answers
    cu_seqlens: [S+1] int64, always on the CPU: response s has rows cu_seqlens[s]:cu_seqlens[s+1]
    feedback: units over the S responses, on the CPU
    ref_logps: [S] float64, cached reference log-probs; None without a cache or without examples
    num_tokens: tokens of the examples, padding left out
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    rows: Tensor
    host_rows: Tensor
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
    """Lay out examples as one batch.

    examples: an example without responses (a prompt) is left out
    packed: the layout
    device: of all tensors but cu_seqlens and feedback
    pad_id: token id of the padding

    Without responses (a rank ran out of examples) the batch is a dummy row of two tokens with N = 0
    and S = 0: the row runs through a model, and collectives happen.
    """
    examples = [example for example in examples if example.responses]
    if not examples:
        layout = _dummy(packed, pad_id)
    elif packed:
        layout = _pack(examples)
    else:
        layout = _pad(examples, pad_id)

    def on_device(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        return torch.from_numpy(array).to(device, non_blocking=True)

    targets = list(itertools.chain.from_iterable(map(_targets, examples)))
    cu_seqlens = np.cumsum([0, *map(len, targets)], dtype=np.int64)
    rows = _concatenate(layout.rows)
    return Batch(
        input_ids=on_device(layout.input_ids),
        position_ids=on_device(layout.position_ids),
        attention_mask=on_device(layout.attention_mask),
        segments=layout.segments,
        rows=on_device(rows),
        host_rows=torch.from_numpy(rows),
        targets=on_device(_concatenate(targets)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        feedback=_merged_feedback(examples),
        ref_logps=on_device(_ref_logps(examples)),
        num_tokens=layout.num_tokens,
    )


def _targets(example: Example) -> list[np.ndarray]:
    """Return the scored tokens of every response."""
    pairs = zip(example.responses, example.scored_tokens(), strict=True)
    return [response[scored] for response, scored in pairs]


def footprint(example: Example, *, packed: bool) -> tuple[int, int]:
    """Return (rows, width): a batch of examples takes sum(rows) * max(width) tokens.

    padded: rows are the responses, and the width is the longest sequence
    packed: examples stand one after another; rows are the tokens, and the width is 1

    An example without responses is left out of batches, and takes (0, 0).
    """
    lengths = [len(response) for response in example.responses]
    if not lengths:
        return 0, 0
    prompt = len(example.prompt_ids)
    if packed:
        return prompt + sum(lengths), 1
    return len(lengths), prompt + max(lengths)


def layout_tokens(examples: Sequence[Example], *, packed: bool) -> int:
    """Return the tokens of the layout of `collate`, padding included; 0 for the dummy row."""
    sizes = [footprint(example, packed=packed) for example in examples]
    rows = sum(rows for rows, _ in sizes)
    width = max((width for _, width in sizes), default=0)
    return rows * width


@dataclass(frozen=True)
class _Layout:
    """The layout of a batch, packed or padded, as int64 arrays; fields as in `Batch`.

    rows: an array per response
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None
    segments: tuple[Segment, ...] | None
    rows: list[np.ndarray]
    num_tokens: int


def _pack(examples: Sequence[Example]) -> _Layout:
    ids, positions = [], []
    segments, rows = [], []
    end = 0
    for example in examples:
        prompt_size = len(example.prompt_ids)
        prompt = (end, end + prompt_size)
        end += prompt_size
        ids.append(example.prompt_ids)
        positions.append(np.arange(prompt_size))
        spans = []
        for response, scored in zip(example.responses, example.scored_tokens(), strict=True):
            start = end
            end += len(response)
            ids.append(response)
            # Every response goes on from the prompt's last position.
            positions.append(np.arange(prompt_size, prompt_size + len(response)))
            # The prompt's last token predicts the first token of the response.
            before = np.concatenate([[prompt[1] - 1], np.arange(start, end - 1)])
            rows.append(before[scored])
            spans.append((start, end))
        segments.append(Segment(prompt, tuple(spans)))
    return _Layout(
        input_ids=np.concatenate(ids, dtype=np.int64)[None],
        position_ids=np.concatenate(positions)[None],
        attention_mask=None,
        segments=tuple(segments),
        rows=rows,
        num_tokens=end,
    )


def _pad(examples: Sequence[Example], pad_id: int) -> _Layout:
    sequences = []
    own_rows = []  # of each sequence, the positions that predict its scored tokens
    for example in examples:
        for response, scored in zip(example.responses, example.scored_tokens(), strict=True):
            sequences.append(np.concatenate([example.prompt_ids, response]))
            own_rows.append(len(example.prompt_ids) - 1 + scored)
    width = max(len(sequence) for sequence in sequences)
    input_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows = []
    for b, sequence in enumerate(sequences):
        length = len(sequence)
        input_ids[b, :length] = sequence
        mask[b, :length] = 1
        rows.append(b * width + own_rows[b])
    return _Layout(
        input_ids=input_ids,
        position_ids=np.tile(np.arange(width), (len(sequences), 1)),
        attention_mask=mask,
        segments=None,
        rows=rows,
        num_tokens=int(mask.sum()),
    )


def _dummy(packed: bool, pad_id: int) -> _Layout:
    """Return a row of two tokens, without responses for the loss."""
    segments = (Segment((0, 1), ((1, 2),)),) if packed else None
    mask = None if packed else np.ones((1, 2), dtype=np.int64)
    return _Layout(
        input_ids=np.full((1, 2), pad_id),
        position_ids=np.arange(2)[None],
        attention_mask=mask,
        segments=segments,
        rows=[],
        num_tokens=0,
    )


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the arrays as a single int64 array, perhaps empty."""
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _merged_feedback(examples: Sequence[Example]) -> Feedback:
    """Return the units of all examples over the responses of the batch."""
    units = []
    first_response = 0
    for example in examples:
        units.append(example.feedback.shift(first_response))
        first_response += len(example.responses)
    return Feedback.merge(units)


def _ref_logps(examples: Sequence[Example]) -> np.ndarray | None:
    """Return [S] float64 cached log-probs; None without any."""
    without = [example.origin for example in examples if example.ref_logps is None]
    if len(without) == len(examples):
        return None
    if without:
        raise ValueError(
            f"{without[0]} has no ref_logps while other records of the batch have; give them for "
            "every record (una-fast precompute-ref), or for none"
        )
    values = itertools.chain.from_iterable(example.ref_logps for example in examples)
    return np.array(list(values), dtype=np.float64)
