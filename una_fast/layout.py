"""From labels to the rows of the head: shift, padding, unscored tokens, shared prompts.

    labels[b, t] = -100      an unscored token: prompts, padding, turns of the user
    labels[b, t] = token     the state at position t - 1 predicts the token (the shift by one)

    padded   the batch [B, T] as given
    packed   a single row [1, T']: prompt after prompt, each followed by its responses; padding, and
             tokens after the last scored token of a response, are left out

Labels are read on the CPU: reading labels on a GPU waits for the GPU once per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from una_fast.attention.rows import Segment, Segments
from una_fast.losses import IGNORED


class ScoredPadding(ValueError):
    """A label stands where the attention mask is 0."""


@dataclass(frozen=True)
class Layout:
    """N scored tokens of S responses in a batch of B rows and T positions.

    shape: (B, T)
    rows: [N] int64, flat position of the state before a scored token: in B * T, or in the packed
        row
    targets: [N] int64, the scored tokens
    cu_seqlens: [S + 1] int64 on the CPU; response s has rows cu_seqlens[s]:cu_seqlens[s + 1]
    responses: (S,) the batch row of every response; batch rows without scored tokens are left out
    places: [N] int64, flat positions of per-token results in [B, T - 1]
    segments: token ranges of the packed row; None: padded
    tokens: [T'] int64, flat positions in B * T of the tokens of the packed row; None: padded
    positions: [T'] int64, positions of the tokens within a prompt and response; None: padded
    moved: packed from rows padded on the left, with tokens at later positions
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
        """Return the layout of a batch: packed if input_ids are given and the batch can be packed.

        labels: [B, T] integers, a tensor, -100 for unscored tokens
        attention_mask: [B, T], 0 for padding; None: no padding
        input_ids: [B, T]; rows with equal prompts share the prompt. None: padded

        The first column is never scored: no state stands before it. A batch stays padded if a row
        has padding between tokens, or a scored token right behind padding on the left, and without
        any scored token.

        ValueError for anything but tensors, and shapes that differ; ScoredPadding, a ValueError,
        for scored padding.
        """
        _check_shapes(labels, attention_mask, input_ids)
        labels = labels.detach().to("cpu", torch.int64, copy=True)
        labels[:, 0] = IGNORED
        real = torch.ones_like(labels) if attention_mask is None else attention_mask.detach().cpu()
        real = real != 0
        spans = _spans(labels, real)
        if input_ids is not None and spans is not None:
            return _packed(labels, input_ids.detach().cpu(), spans)
        return _padded(labels)

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


def _check_shapes(labels: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> None:
    """Raise ValueError unless all are tensors of one shape [B, T], and labels are integers."""
    given = {"labels": labels}
    others = {"attention_mask": attention_mask, "input_ids": input_ids}
    given |= {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor [B, T], not {type(tensor).__name__}")
    if labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] < 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be [B, T] integers, -100 for tokens without a loss"
        )
    for name, tensor in given.items():
        if tensor.shape != labels.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and labels {tuple(labels.shape)} must have one shape"
            )


def _spans(labels: Tensor, real: Tensor) -> list[_Span] | None:
    """Return the span of every row with scored tokens; None for a batch that cannot be packed.

    labels: [B, T]
    real: [B, T] bool, False for padding
    """
    scored = labels != IGNORED
    wrong = (scored & ~real).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ScoredPadding(
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
    """Return one row of all spans; spans with equal prompts share the prompt, from any place."""
    batch, width = labels.shape
    row = _PackedRow(batch, width)
    for members in _by_prompt(input_ids, spans).values():
        row.add(members)
    places, counts, responses = _scored_places(labels)
    return Layout(
        shape=(batch, width),
        rows=row.new_place[:, :-1].flatten()[places],
        targets=labels[:, 1:].flatten()[places],
        cu_seqlens=_bounds(counts),
        responses=responses,
        places=places,
        segments=tuple(row.segments),
        tokens=torch.cat(row.tokens),
        positions=torch.cat(row.positions),
        moved=any(span.start for span in spans),
    )


def _by_prompt(input_ids: Tensor, spans: Sequence[_Span]) -> dict[tuple[int, ...], list[_Span]]:
    """Return prompt -> spans with the prompt, in order of the first."""
    groups: dict[tuple[int, ...], list[_Span]] = {}
    for span in spans:
        prompt = input_ids[span.row, span.start : span.first]
        groups.setdefault(tuple(prompt.tolist()), []).append(span)
    return groups


class _PackedRow:
    """A packed row under construction.

    new_place: [B, T] position in the packed row of every token of the batch; -1 for others
    """

    def __init__(self, batch: int, width: int) -> None:
        self.width = width
        self.end = 0
        self.tokens: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.segments: list[Segment] = []
        self.new_place = torch.full((batch, width), -1)

    def add(self, members: Sequence[_Span]) -> None:
        """Add a prompt, and the responses of all spans with the prompt."""
        head = members[0]
        prompt_size = head.first - head.start
        prompt = self._take(head.row, head.start, head.first, position=0)
        responses = []
        for span in members:
            response = self._take(span.row, span.first, span.stop, position=prompt_size)
            self.new_place[span.row, span.first : span.stop] = torch.arange(*response)
            # The last token of the prompt predicts the first token of every response.
            self.new_place[span.row, span.first - 1] = prompt[1] - 1
            responses.append(response)
        self.segments.append(Segment(prompt, tuple(responses)))

    def _take(self, row: int, start: int, stop: int, position: int) -> tuple[int, int]:
        """Append tokens [start, stop) of a batch row; return their range in the packed row."""
        size = stop - start
        first = row * self.width + start
        self.tokens.append(torch.arange(first, first + size))
        self.positions.append(torch.arange(position, position + size))
        begin, self.end = self.end, self.end + size
        return begin, self.end
