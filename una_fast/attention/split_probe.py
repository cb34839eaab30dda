"""Find out by a numerical probe whether ranks can split the tokens of a model's packed rows.

In a model that can be packed, tokens meet in attention alone. Left to go wrong are the arguments of
attention: heads in another order, or numbers that depend on the length of the row. So a reduced
copy of the model runs on the parts of a row, a thread per rank, and the hidden states are compared
with those of the whole row.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from una_fast.attention.packed import packed_attention
from una_fast.attention.probe import PROBE_TOLERANCE, probe_row, reduced_decoder
from una_fast.attention.rows import Segments
from una_fast.attention.ulysses import heads_refusal, padded_segments, padded_tokens
from una_fast.group import Group

_RANKS = 4  # as many as the query heads of a reduced copy: key heads are shared
_PATIENCE = 300  # seconds that a thread waits for the others


@dataclass
class Meeting:
    """Where the threads of a probe hand each other tensors.

    sent: per rank, a piece for every rank
    """

    barrier: threading.Barrier
    sent: list[Sequence[Tensor]]


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A thread among threads that act as ranks."""

    meeting: Meeting = field(kw_only=True)

    def exchange(self, sent: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Return the pieces that the threads send; parameters as in `Group.exchange`."""
        self.meeting.sent[self.rank] = sent.split(list(to))
        self.meeting.barrier.wait()
        received = torch.cat([pieces[self.rank] for pieces in self.meeting.sent])
        self.meeting.barrier.wait()  # all have read
        assert received.numel() == sum(of)
        return received


def split_refusal(model: PreTrainedModel, ranks: int) -> str | None:
    """Return the reason why ranks cannot split the tokens of a packed row exactly, or None.

    model: can be packed (probe.py); weights are not read
    ranks: of a group

    Takes well under a second for usual models, never raises, and leaves random state, default dtype
    and default device alone.
    """
    name = type(model).__name__
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int):
        refusal = heads_refusal(heads, ranks)
        if refusal is not None:
            return f"in {name} {refusal}"
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            reduced = reduced_decoder(model)
            error = _split_error(reduced)
            if PROBE_TOLERANCE < error < 100 * PROBE_TOLERANCE:
                # The model may amplify rounding; a real difference stays.
                error = _split_error(reduced.double())
    # An unknown model may fail in any way, and each is a reason not to split its rows.
    except Exception as failure:
        told = f"{type(failure).__name__}: {failure}"
        return f"the probe of {name} with split tokens failed with {told}"
    if error <= PROBE_TOLERANCE:
        return None
    return (
        f"{name} gives other hidden states with split tokens than with the whole row (relative "
        f"error {error:.1e})"
    )


def _split_error(model: PreTrainedModel) -> float:
    """Compare the parts of a packed row with the whole row.

    Returns the largest difference, relative to the largest hidden state.
    """
    segments, positions = probe_row()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(1, vocabulary, positions.shape)
    total = ids.shape[1]
    padded = padded_tokens(total, _RANKS)
    segments = padded_segments(segments, total, padded)
    ids, positions = (_padded(x, padded) for x in (ids, positions))
    expected = _run(model, ids, positions, segments, Group())[:, :total]
    found = torch.cat(_run_parts(model, ids, positions, segments), dim=1)[:, :total]
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _padded(row: Tensor, padded: int) -> Tensor:
    return torch.cat([row, torch.arange(padded - row.shape[1])[None]], dim=1)


def _run(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, segments: Segments, group: Group
) -> Tensor:
    """Return the hidden states of the tokens of a rank."""
    tokens = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with packed_attention(model):
        return model(**tokens, una_segments=segments, una_context=group)[0]


def _run_parts(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, segments: Segments
) -> list[Tensor]:
    """Return the hidden states of every rank; a thread per rank, with a model of its own."""
    meeting = Meeting(threading.Barrier(_RANKS, timeout=_PATIENCE), [()] * _RANKS)
    parts = zip(ids.chunk(_RANKS, dim=1), positions.chunk(_RANKS, dim=1), strict=True)

    def run(rank: int, own: PreTrainedModel, part: tuple[Tensor, Tensor]) -> Tensor:
        group = ThreadGroup(rank, _RANKS, meeting=meeting)
        try:
            with torch.device("cpu"), torch.no_grad():  # modes of a thread
                return _run(own, *part, segments, group)
        except BaseException:
            meeting.barrier.abort()  # the other threads end, too
            raise

    with ThreadPoolExecutor(_RANKS) as pool:
        running = []
        for rank, part in enumerate(parts):
            running.append(pool.submit(run, rank, copy.deepcopy(model), part))
        failures = [one.exception() for one in running]
    for failure in failures:
        if failure is not None and not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return [one.result() for one in running]
