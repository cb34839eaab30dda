"""From labels to rows: the shift by one, padding, holes, shared prompts."""

from __future__ import annotations

import pytest
import torch

from embedded import IGNORED, make_batch
from una_fast import Layout
from una_fast.attention.rows import Segment, row_layout
from una_fast.layout import ScoredPadding


def positions_before(labels: torch.Tensor) -> list[tuple[int, int]]:
    """Return (batch row, position) of the state that predicts each scored token, in order."""
    scored = (labels[:, 1:] != IGNORED).nonzero().tolist()
    return [(row, place) for row, place in scored]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows_predict_their_targets(left):
    batch = make_batch(left=left)
    layout = Layout.from_labels(batch["labels"], batch["attention_mask"])
    width = batch["labels"].shape[1]
    expected = [row * width + place for row, place in positions_before(batch["labels"])]
    assert layout.rows.tolist() == expected
    assert layout.targets.tolist() == batch["labels"].flatten()[layout.rows + 1].tolist()
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 6, 13, 14]
    assert layout.responses == (0, 1, 2, 3, 4) and layout.segments is None


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_packed_row_holds_every_prompt_once(left):
    batch = make_batch(left=left)
    layout = Layout.from_labels(batch["labels"], batch["attention_mask"], batch["input_ids"])
    first = Segment((0, 4), ((4, 7), (7, 8)))
    second = Segment((8, 10), ((10, 12), (12, 19), (19, 20)))
    assert layout.segments == (first, second)
    row_layout(layout.segments, len(layout.tokens))  # the segments tile the row
    ids = batch["input_ids"].flatten()[layout.tokens]
    assert ids[:8].tolist() == [5, 6, 7, 8, 11, 12, 13, 14]
    assert layout.positions[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 4]
    # The last prompt token predicts the first token of every response.
    assert layout.rows.tolist() == [3, 4, 5, 3, 9, 10, 9, *range(12, 18), 9]
    assert layout.moved == left


def test_prompts_are_shared_wherever_they_stand():
    """TRL's batches are [chosen | rejected]: the rows of a prompt are far from each other."""
    rows = [((1, 2), (3,)), ((4, 5), (6,)), ((1, 2), (7, 8)), ((4, 5), (9,))]
    batch = make_batch(rows)
    layout = Layout.from_labels(batch["labels"], batch["attention_mask"], batch["input_ids"])
    assert [len(segment.responses) for segment in layout.segments] == [2, 2]
    # Targets stay in the order of the batch rows.
    assert layout.targets.tolist() == [3, 6, 7, 8, 9]
    ids = batch["input_ids"].flatten()[layout.tokens].tolist()
    assert ids == [1, 2, 3, 7, 8, 4, 5, 6, 9]


def test_turns_of_the_user_are_seen_and_not_scored():
    labels = torch.tensor([[-100, -100, 3, 4, -100, -100, 7, 8, -100]])
    ids = torch.arange(1, 10)[None]
    layout = Layout.from_labels(labels, None, ids)
    assert layout.segments == (Segment((0, 2), ((2, 8),)),)  # what follows is left out
    assert layout.rows.tolist() == [1, 2, 5, 6] and layout.targets.tolist() == [3, 4, 7, 8]


def test_a_row_without_scored_tokens_is_no_response():
    batch = make_batch([((1, 2), (3, 4)), ((5, 6), ()), ((7,), (8,))])
    for ids in (None, batch["input_ids"]):
        layout = Layout.from_labels(batch["labels"], batch["attention_mask"], ids)
        assert layout.responses == (0, 2) and layout.cu_seqlens.tolist() == [0, 2, 3]
        assert layout.lengths().tolist() == [2, 0, 1]
        assert layout.spread(torch.tensor([5.0, 6.0])).tolist() == [5.0, 0.0, 6.0]


def test_nothing_scored_is_a_padded_layout_without_rows():
    labels = torch.full((2, 4), IGNORED)
    layout = Layout.from_labels(labels, None, torch.ones(2, 4, dtype=torch.int64))
    assert (
        layout.segments is None and len(layout.targets) == 0 and layout.cu_seqlens.tolist() == [0]
    )


@pytest.mark.parametrize(
    "mask, labels",
    [
        ([[1, 0, 1, 1]], [[-100, -100, 7, 8]]),  # padding inside
        ([[0, 1, 1, 1]], [[-100, 7, 7, 8]]),  # no prompt behind the padding
    ],
)
def test_a_batch_that_cannot_be_packed_stays_padded(mask, labels):
    mask, labels = torch.tensor(mask), torch.tensor(labels)
    layout = Layout.from_labels(labels, mask, torch.ones_like(mask))
    assert layout.segments is None and len(layout.targets)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [0, 1, 1, 1]], ids=["real", "padding"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_label_in_the_first_column_is_no_target(packed, mask):
    """No state stands before it: the layout is that of the labels without it."""
    labels = torch.tensor([[6, -100, 7, 8]])
    given = [torch.tensor([mask]), torch.tensor([[6, 5, 7, 8]]) if packed else None]
    found = Layout.from_labels(labels, *given)
    truth = Layout.from_labels(torch.tensor([[-100, -100, 7, 8]]), *given)
    assert found.targets.tolist() == [7, 8] and found.rows.tolist() == truth.rows.tolist()
    assert found.segments == truth.segments and (found.segments is not None) == packed
    assert labels[0, 0] == 6, "the caller's labels stay"


def test_scored_padding_has_an_error_of_its_own():
    with pytest.raises(ScoredPadding, match="labels.0, 1. is 4 where attention_mask is 0"):
        Layout.from_labels(torch.tensor([[-100, 4]]), torch.tensor([[1, 0]]))


def test_scatter_puts_results_where_they_belong():
    batch = make_batch()
    layout = Layout.from_labels(batch["labels"], batch["attention_mask"], batch["input_ids"])
    values = torch.arange(1.0, len(layout.targets) + 1, requires_grad=True)
    spread = layout.scatter(values)
    assert spread.shape == (5, batch["labels"].shape[1] - 1)
    assert spread[batch["labels"][:, 1:] != IGNORED].tolist() == values.tolist()
    upstream = torch.randn(5)
    (spread.sum(1) * upstream).sum().backward()
    assert torch.equal(values.grad, upstream.repeat_interleave(layout.lengths()))


@pytest.mark.parametrize(
    "labels, mask, message",
    [
        (torch.zeros(4, dtype=torch.int64), None, r"labels \(4,\) must be \[B, T\] integers"),
        (torch.zeros(2, 4), None, "must be .* integers"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 3), "must have one shape"),
        (torch.tensor([[-100, 4, 5]]), torch.tensor([[1, 1, 0]]), r"labels\[0, 2\] is 5 where"),
        ([[-100, 4]], None, r"labels must be a tensor \[B, T\], not list"),
        (None, None, r"labels must be a tensor \[B, T\], not NoneType"),
        (torch.tensor([[-100, 4]]), [[1, 1]], r"attention_mask must be a tensor"),
    ],
)
def test_wrong_labels_are_refused(labels, mask, message):
    with pytest.raises(ValueError, match=message):
        Layout.from_labels(labels, mask)
