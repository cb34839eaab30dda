"""The layout of packed rows: who sees whom. Needs neither torch nor transformers."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Segment(NamedTuple):
    """Token ranges of one prompt and its responses within the packed row."""

    prompt: tuple[int, int]  # [start, stop)
    responses: tuple[tuple[int, int], ...]  # [start, stop) each


Segments = tuple[Segment, ...]


# ---- the layout of a row -------------------------------------------------------------------------------------------


class RowRanges(NamedTuple):
    """A row as consecutive ranges of queries. The keys of range i are its own tokens, after those of its prompt: the
    first n tokens of range j, `prompt_of[i]` being (j, n), or None where the prompt is in range i itself."""

    sizes: tuple[int, ...]
    prompt_of: tuple[tuple[int, int] | None, ...]


@functools.lru_cache(maxsize=64)  # every layer asks for the same row
def row_ranges(segments: Segments, total: int) -> RowRanges:
    """The ranges of a row of `total` tokens; ValueError unless the segments tile it in order."""
    sizes: list[int] = []
    prompt_of: list[tuple[int, int] | None] = []
    end = 0
    for number, segment in enumerate(segments):
        first = len(sizes)
        for index, (start, stop) in enumerate((segment.prompt, *segment.responses)):
            if start != end or stop <= start:
                raise ValueError(
                    f"una_segments[{number}] has the range [{start}, {stop}) where one that starts at {end} and is not "
                    "empty is due: segments hold the prompt, then its responses, and follow each other without gaps"
                )
            end = stop
            if index == 1:  # goes on where its prompt ends
                sizes[first] += stop - start
            else:
                sizes.append(stop - start)
                prompt_of.append((first, segment.prompt[1] - segment.prompt[0]) if index else None)
    if end != total:
        raise ValueError(
            f"una_segments cover {end} tokens and the row has {total}; they must cover the whole row"
        )
    return RowRanges(tuple(sizes), tuple(prompt_of))


def attended_pairs(segments: Segments, window: int | None = None) -> int:
    """How many (query, key) pairs a packed row computes scores of: 4 H D flop each in forward, for H heads of size D.

    window: a query sees itself and the window - 1 tokens before it."""
    total = 0
    for segment in segments:
        before = 0  # keys in front of the range's first query
        for start, stop in (segment.prompt, *segment.responses):
            queries = stop - start
            growing = (
                queries if window is None else min(max(window - before, 0), queries)
            )  # each sees one key more
            total += growing * before + growing * (growing + 1) // 2
            if growing < queries:
                total += (queries - growing) * window
            before = segment.prompt[1] - segment.prompt[0]
    return total


def visible_prompt(prompt_size: int, window: int | None) -> int:
    """How many of the prompt's last tokens a response's queries can see."""
    return prompt_size if window is None else min(prompt_size, window - 1)
