"""From labels to the rows of the head: shift, padding, unscored tokens, shared prompts.

    labels[b, t] = -100      the token is not scored: prompts, padding, turns of the user
    labels[b, t] = token     the state at position t - 1 predicts the token (the shift by one)

    padded   the batch [B, T] as it is given
    packed   one row [1, T']: a prompt once, then its responses, prompt after prompt; what follows
             the last scored token of a response, and all padding, is left out

Labels are read on the CPU: reading them on a GPU waits for the GPU once per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from una_fast.attention.rows import Segment, Segments

IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """N scored tokens of S responses in a batch of B rows and T positions.

    shape: (B, T)
    rows: [N] int64, flat position of the state that predicts a scored token: in B * T, or in the
        packed row
    targets: [N] int64, the scored tokens
    cu_seqlens: [S + 1] int64 on the CPU; response s has rows cu_seqlens[s]:cu_seqlens[s + 1]
    responses: (S,) the batch row of every response; a batch row without scored tokens has none
    places: [N] int64, flat positions in [B, T - 1], where a per-token result belongs
    segments: token ranges of the packed row; None in the padded layout
    tokens: [T'] int64, flat positions in B * T of the tokens of the packed row; None if padded
    positions: [T'] int64, positions of the tokens within their sequences; None if padded
    moved: packed from rows padded on the left, whose tokens stood at later positions
    """

    shape: tuple[int, int]
    rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    responses: tuple[int, ...]
    places: Tensor
    segments: Segments | None = None
    tokens: Tensor | None = None
    positions: Tensor | None = None
    moved: bool = False

    @staticmethod
    def from_labels(
        labels: Tensor,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Layout:
        """Return the layout of a batch: packed if input_ids are given and the batch allows it.

        labels: [B, T] integers, -100 for tokens that are not scored
        attention_mask: [B, T], 0 for padding; None: no padding
        input_ids: [B, T]; rows with equal prompts share the prompt. None: padded

        A batch cannot be packed where a row has padding between its tokens, or begins with a scored
        token; without any scored token there is nothing to pack. Such a batch stays padded.

        ValueError for shapes that differ, and for a scored token that is padding.
        """
        _check_shapes(labels, attention_mask, input_ids)
        labels = labels.detach().cpu().long()
        real = torch.ones_like(labels) if attention_mask is None else attention_mask.detach().cpu()
        real = real != 0
        spans = _spans(labels, real)
        if input_ids is not None and spans is not None:
            return _packed(labels, input_ids.detach().cpu(), spans)
        return _padded(labels)

    @property
    def scored(self) -> int:
        """Return N."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> Layout:
        """Return the layout with all tensors but cu_seqlens on a device."""
        moved = {}
        for name in ("rows", "targets", "places", "tokens", "positions"):
            tensor = getattr(self, name)
            moved[name] = None if tensor is None else tensor.to(device, non_blocking=True)
        return replace(self, **moved)

    def scatter(self, values: Tensor) -> Tensor:
        """Return per-token results [B, T - 1], 0 where no token is scored.

        values: [N], on the device of the layout; carries a gradient
        """
        batch, width = self.shape
        places = values.new_zeros(batch * (width - 1)).index_put((self.places,), values)
        return places.view(batch, width - 1)

    def sums(self, values: Tensor) -> Tensor:
        """Return the [B] float64 sums of per-token results, 0 for a batch row without any.

        values: [N], on the device of the layout; carries a gradient
        """
        rows = torch.div(self.places, self.shape[1] - 1, rounding_mode="floor")
        empty = values.new_zeros(self.shape[0], dtype=torch.float64)
        return empty.index_add(0, rows, values.double())

    def spread(self, per_response: Tensor) -> Tensor:
        """Return [B] from [S]: 0 for a batch row without scored tokens."""
        if len(self.responses) == self.shape[0]:
            return per_response
        out = per_response.new_zeros(self.shape[0])
        out[list(self.responses)] = per_response
        return out

    def lengths(self) -> Tensor:
        """Return the scored tokens of every batch row, [B] int64 on the CPU."""
        return self.spread(self.cu_seqlens.diff())


class _Span(NamedTuple):
    """Token ranges of a batch row: the prompt, and the response up to its last scored token."""

    row: int
    start: int
    first: int
    stop: int


def _check_shapes(labels: Tensor, *others: Tensor | None) -> None:
    if labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be [B, T] integers, -100 for tokens without a loss"
        )
    for name, other in zip(("attention_mask", "input_ids"), others, strict=True):
        if other is not None and other.shape != labels.shape:
            raise ValueError(
                f"{name} {tuple(other.shape)} and labels {tuple(labels.shape)} must have one shape"
            )


def _spans(labels: Tensor, real: Tensor) -> list[_Span] | None:
    """Return the span of every row with scored tokens; None where a batch cannot be packed.

    labels: [B, T]
    real: [B, T] bool, False for padding
    """
    scored = labels != IGNORED
    wrong = (scored & ~real).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"labels[{row}, {place}] is {int(labels[row, place])} where attention_mask is 0; give "
            "padding the label -100"
        )
    spans = []
    for row in scored.any(1).nonzero().flatten().tolist():
        tokens = real[row].nonzero().flatten()
        start, end = int(tokens[0]), int(tokens[-1]) + 1
        places = scored[row].nonzero().flatten()
        first, stop = int(places[0]), int(places[-1]) + 1
        if end - start != len(tokens) or first == start:
            return None
        spans.append(_Span(row, start, first, stop))
    return spans or None


def _scored_places(labels: Tensor) -> tuple[Tensor, list[int], tuple[int, ...]]:
    """Return the flat [N] places in [B, T - 1], tokens per response, and the responses' rows."""
    scored = labels[:, 1:] != IGNORED
    counts = scored.sum(1).tolist()
    responses = tuple(row for row, count in enumerate(counts) if count)
    return scored.flatten().nonzero().flatten(), [n for n in counts if n], responses


def _bounds(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _padded(labels: Tensor) -> Layout:
    batch, width = labels.shape
    places, counts, responses = _scored_places(labels)
    # Place i of [B, T - 1] is row i + i // (T - 1) of [B, T]: the last position predicts nothing.
    rows = places + torch.div(places, max(width - 1, 1), rounding_mode="floor")
    targets = labels[:, 1:].flatten()[places]
    return Layout((batch, width), rows, targets, _bounds(counts), responses, places)


def _packed(labels: Tensor, input_ids: Tensor, spans: Sequence[_Span]) -> Layout:
    """Return one row of all spans; those with equal prompts, wherever they stand, share one."""
    batch, width = labels.shape
    places, counts, responses = _scored_places(labels)
    groups: dict[tuple[int, ...], list[_Span]] = {}
    for span in spans:
        prompt = tuple(input_ids[span.row, span.start : span.first].tolist())
        groups.setdefault(prompt, []).append(span)
    tokens, positions, segments = [], [], []
    at = torch.full((batch, width), -1)  # position in the batch -> position in the packed row
    end = 0
    for prompt, members in groups.items():
        size = len(prompt)
        head = members[0]
        prompt_range = (end, end + size)
        tokens.append(head.row * width + torch.arange(head.start, head.first))
        positions.append(torch.arange(size))
        end += size
        ranges = []
        for span in members:
            length = span.stop - span.first
            tokens.append(span.row * width + torch.arange(span.first, span.stop))
            positions.append(torch.arange(size, size + length))
            at[span.row, span.first - 1] = prompt_range[1] - 1
            at[span.row, span.first : span.stop] = torch.arange(end, end + length)
            ranges.append((end, end + length))
            end += length
        segments.append(Segment(prompt_range, tuple(ranges)))
    return Layout(
        (batch, width),
        at[:, :-1].flatten()[places],
        labels[:, 1:].flatten()[places],
        _bounds(counts),
        responses,
        places,
        tuple(segments),
        torch.cat(tokens),
        torch.cat(positions),
        any(span.start for span in spans),
    )
