"""The layout of packed rows: a prompt, then the responses to the prompt.

A packed row is `[prompt | response 1 | ... | response K]`, prompt after prompt. The queries of a
prompt see the prompt up to themselves; the queries of a response see the prompt, and the response
up to themselves. Both follow one rule, lower-right causal attention: R queries over E keys, and the
last query stands at the last key. Prompt and first response are a plain causal sequence:

    range           queries            keys                R          E
    first           prompt, resp 1     the same            P + R_1    P + R_1
    response i > 1  resp i             [prompt | resp i]   R_i        P + R_i

Under a sliding window W a response sees the prompt's last W - 1 tokens at most. So a row costs
P + sum R tokens where separate sequences cost K P + sum R, and `attended_pairs` (query, key) pairs.
Only the responses after the first need the keys of the prompt a second time.

Importing the file needs neither torch nor transformers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

Range = tuple[int, int]
"""Tokens [start, stop) of a packed row."""


class Segment(NamedTuple):
    """Token ranges of a prompt and of the responses to the prompt, within the packed row."""

    prompt: Range
    responses: tuple[Range, ...]


Segments = tuple[Segment, ...]


class RowLayout(NamedTuple):
    """A packed row as consecutive ranges of queries, and the prompt in front of every range.

    sizes: tokens of the ranges
    prompt_of: per range (r, n), the prompt is the first n tokens of range r; None for a range with
        the prompt inside

    Prompt 5 with responses 3, 2, 4: sizes (8, 2, 4), prompt_of (None, (0, 5), (0, 5)). Range 0 is
    the prompt and the first response; ranges 1 and 2 see the first 5 tokens of range 0.
    """

    sizes: tuple[int, ...]
    prompt_of: tuple[tuple[int, int] | None, ...]


@functools.lru_cache(maxsize=64)  # every layer asks for the same row
def row_layout(segments: Segments, total: int) -> RowLayout:
    """Return the layout of `total` tokens; ValueError unless the segments tile them in order."""
    _check_tiling(segments, total)
    sizes: list[int] = []
    prompt_of: list[tuple[int, int] | None] = []
    for segment in segments:
        first = len(sizes)
        prompt_size = _size(segment.prompt)
        # The first response goes on where its prompt ends.
        sizes.append(prompt_size + sum(map(_size, segment.responses[:1])))
        prompt_of.append(None)
        for response in segment.responses[1:]:
            sizes.append(_size(response))
            prompt_of.append((first, prompt_size))
    return RowLayout(tuple(sizes), tuple(prompt_of))


def _check_tiling(segments: Segments, total: int) -> None:
    end = 0
    for number, segment in enumerate(segments):
        for start, stop in (segment.prompt, *segment.responses):
            if start != end or stop <= start:
                raise ValueError(
                    f"una_segments[{number}] has the range [{start}, {stop}) where one that starts "
                    f"at {end} and is not empty is due: segments hold the prompt, then its "
                    "responses, and follow each other without gaps"
                )
            end = stop
    if end != total:
        raise ValueError(
            f"una_segments cover {end} tokens and the row has {total}; they must cover the whole "
            "row"
        )


def attended_pairs(segments: Segments, window: int | None = None) -> int:
    """Return how many (query, key) pairs of a packed row get a score.

    segments: the row
    window: a query sees itself and the window - 1 tokens before; default: all tokens before

    A pair costs 4 H D flop in forward, for H heads of size D.
    """
    total = 0
    for segment in segments:
        keys_before = 0
        for tokens in (segment.prompt, *segment.responses):
            total += _pairs(_size(tokens), keys_before, window)
            keys_before = _size(segment.prompt)
    return total


def _pairs(queries: int, keys_before: int, window: int | None) -> int:
    """Count the pairs of a range of queries with `keys_before` keys in front of the first query."""
    growing = queries  # queries that see one key more than the query before them
    if window is not None:
        growing = min(max(window - keys_before, 0), queries)
    pairs = growing * keys_before + growing * (growing + 1) // 2
    if growing < queries:
        pairs += (queries - growing) * window
    return pairs


def visible_prompt_tokens(prompt_size: int, window: int | None) -> int:
    """Return how many of the prompt's last tokens the queries of a response can see."""
    return prompt_size if window is None else min(prompt_size, window - 1)


def _size(tokens: Range) -> int:
    start, stop = tokens
    return stop - start
