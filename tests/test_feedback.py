"""The feedback table: columns, joins, and refusals by name and value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from una_fast import Feedback
from una_fast.feedback import BINARY, NAMES, PAIR, SCORE

NAN, INF = float("nan"), float("inf")
EVERY_KIND = Feedback.merge(
    [
        Feedback.pairs([0, 2], [1, 3], margin=[0.5, 0.0], target=[1.0, 0.25]),
        Feedback.binary([1, 4], [True, False], weight=2.0, offset=-0.5),
        Feedback.scores([3], [0.125], offset=1.5),
    ]
)


def table(feedback: Feedback) -> list[tuple]:
    """Return the units as rows."""
    columns = [getattr(feedback, name).tolist() for name in NAMES]
    return list(zip(*columns, strict=True))


def test_columns_of_each_kind():
    pairs = Feedback.pairs(
        [0, 2], [1, 3], margin=[0.1, 0.2], weight=2.0, target=torch.tensor([1.0, 0.5])
    )
    assert table(pairs) == [(PAIR, 0, 1, 1.0, 0.1, 2.0, 0.0), (PAIR, 2, 3, 0.5, 0.2, 2.0, 0.0)]
    binary = Feedback.binary(torch.tensor([4, 5]), [True, False], offset=-0.5)
    assert table(binary) == [
        (BINARY, 4, -1, 1.0, 0.0, 1.0, -0.5),
        (BINARY, 5, -1, 0.0, 0.0, 1.0, -0.5),
    ]
    scores = Feedback.scores([1], [-3.5], weight=[0.0])
    assert table(scores) == [(SCORE, 1, -1, -3.5, 0.0, 0.0, 0.0)]


def test_columns_are_float64_and_on_the_cpu_and_detached():
    source = torch.tensor([0.25], dtype=torch.float32, requires_grad=True)
    feedback = Feedback.scores(torch.tensor([0], dtype=torch.int32), source)
    for name in ("kind", "first", "second"):
        assert getattr(feedback, name).dtype == torch.int64
    for name in ("value", "margin", "weight", "offset"):
        assert getattr(feedback, name).dtype == torch.float64
    assert not feedback.value.requires_grad
    with torch.no_grad():
        source.fill_(0.75)
    assert feedback.value.item() == 0.25, "the table must own its columns"


def test_columns_do_not_share_memory_with_float64_input():
    score = torch.tensor([0.25, 0.5], dtype=torch.float64)
    index = torch.tensor([0, 1])
    feedback = Feedback.scores(index, score)
    score.fill_(0.9)
    index.fill_(7)
    assert feedback.value.tolist() == [0.25, 0.5] and feedback.first.tolist() == [0, 1]


def test_merge_keeps_order_and_shift_leaves_missing_responses_missing():
    parts = [Feedback.binary([0], [True]), Feedback.pairs([1], [0]), Feedback.scores([2], [0.3])]
    merged = Feedback.merge(iter(parts))
    assert table(merged) == [row for part in parts for row in table(part)]
    assert merged.num_units == 3
    moved = merged.shift(10)
    assert moved.first.tolist() == [10, 11, 12] and moved.second.tolist() == [-1, 10, -1]
    assert merged.first.tolist() == [0, 1, 2], "shift must not change its table"
    with pytest.raises(ValueError, match="by=-1 would move response 0 below 0"):
        merged.shift(-1)


@pytest.mark.parametrize("empty", [lambda: Feedback.merge([]), lambda: Feedback.pairs([], [])])
def test_no_units(empty):
    feedback = empty()
    assert feedback.num_units == 0
    feedback.check(0)
    assert feedback.shift(3).num_units == 0
    assert Feedback.merge([feedback, Feedback.scores([1], [0.5])]).first.tolist() == [1]


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        (
            Feedback.scores([0, 5], [0.5, 0.5]),
            r"unit 1 \(score\) names response 5, but the call has 5 responses",
        ),
        (
            Feedback.pairs([0, 1], [9, 2]),
            r"unit 0 \(pair\) names response 9, but the call has 5 responses",
        ),
        (Feedback.binary([7], [True]), r"unit 0 \(binary\) names response 7"),
    ],
)
def test_check_names_the_unit(feedback, message):
    with pytest.raises(ValueError, match=message):
        feedback.check(5)
    feedback.check(10)


REFUSED = {
    "no indices": (
        lambda: Feedback.pairs(None, [1]),
        r"chosen must be a list of response indices",
    ),
    "indices as text": (
        lambda: Feedback.pairs([0], "ab"),
        r"rejected must be a list of response indices",
    ),
    "ragged indices": (
        lambda: Feedback.scores([[0], [1, 2]], [0.5]),
        r"index must be a list of response indices",
    ),
    "merge of another kind": (
        lambda: Feedback.merge([EVERY_KIND, 3]),
        r"feedback must be a Feedback.* not int",
    ),
    "pair with one side": (
        lambda: Feedback.pairs([0, 1], [2]),
        r"chosen has 2 indices and rejected 1",
    ),
    "pair with itself": (
        lambda: Feedback.pairs([0, 3], [1, 3]),
        r"pair 1 has response 3 as both chosen and rejected",
    ),
    "target over one": (
        lambda: Feedback.pairs([0], [1], target=1.5),
        r"target\[0\] is 1\.5; it must lie in \[0, 1\]",
    ),
    "target below zero": (
        lambda: Feedback.pairs([0, 2], [1, 3], target=[1, -0.1]),
        r"target\[1\] is -0\.1",
    ),
    "margin per unit": (
        lambda: Feedback.pairs([0], [1], margin=[1.0, 2.0]),
        r"margin has shape \(2,\).*\(1 units\)",
    ),
    "margin NaN": (
        lambda: Feedback.pairs([0], [1], margin=NAN),
        r"margin\[0\] is nan; every margin must be finite",
    ),
    "weight negative": (
        lambda: Feedback.pairs([0, 2], [1, 3], weight=[1, -1]),
        r"weight\[1\] is negative; use 0",
    ),
    "weight infinite": (lambda: Feedback.binary([0], [True], weight=INF), r"weight\[0\] is inf"),
    "label graded": (
        lambda: Feedback.binary([0, 1], [1, 0.5]),
        r"label must be True or False.*Feedback\.scores",
    ),
    "label NaN": (lambda: Feedback.binary([0], [NAN]), r"label\[0\] is nan"),
    "label count": (
        lambda: Feedback.binary([0, 1], [True]),
        r"label has shape \(1,\); .*\(2 units\)",
    ),
    "score NaN": (
        lambda: Feedback.scores([0, 1], [0.5, NAN]),
        r"score\[1\] is nan; every score must be finite",
    ),
    "score infinite": (lambda: Feedback.scores([0], [-INF]), r"score\[0\] is -inf"),
    "score count": (lambda: Feedback.scores([0], [0.1, 0.2]), r"score has shape \(2,\)"),
    "offset NaN": (lambda: Feedback.scores([0], [0.1], offset=NAN), r"offset\[0\] is nan"),
    "offset count": (
        lambda: Feedback.scores([0], [0.1], offset=[1.0, 2.0]),
        r"offset has shape \(2,\)",
    ),
    "index negative": (
        lambda: Feedback.scores([-1], [0.5]),
        r"index holds a negative response index \(-1\)",
    ),
    "chosen negative": (
        lambda: Feedback.pairs([-2], [0]),
        r"chosen holds a negative response index \(-2\)",
    ),
    "index fractional": (
        lambda: Feedback.binary([0.5], [True]),
        r"index must be a one-dimensional list .*integers",
    ),
    "index boolean": (
        lambda: Feedback.binary([True], [True]),
        r"index must be a one-dimensional list",
    ),
    "index not a list": (lambda: Feedback.pairs(0, 1), r"chosen must be a one-dimensional list"),
    "index nested": (
        lambda: Feedback.scores([[0, 1]], [0.5]),
        r"index must be a one-dimensional list",
    ),
    "lone index": (lambda: Feedback.binary(0, True), r"index must be a one-dimensional list"),
    "label text": (lambda: Feedback.binary([0], ["yes"]), r"label"),
    "label missing": (lambda: Feedback.binary([0], None), r"label"),
    "score missing": (lambda: Feedback.scores([0], None), r"score"),
}


# --- parts of a batch -----------------------------------------------------------------------------


def test_a_dict_holds_the_table_in_memory_of_its_own():
    columns = EVERY_KIND.to_dict()
    assert list(columns) == list(NAMES)
    assert all(type(x) is torch.Tensor and x.device.type == "cpu" for x in columns.values())
    assert Feedback.from_dict(columns) == EVERY_KIND
    columns["weight"].zero_()
    assert EVERY_KIND.weight.tolist() == [1, 1, 2, 2, 1]


@pytest.mark.parametrize("feedback", [EVERY_KIND, Feedback.merge([])], ids=["units", "none"])
def test_a_dict_that_was_cast_is_as_good(feedback):
    """Trainers cast what they find floating."""
    cast = {name: x.to(torch.float32) for name, x in feedback.to_dict().items()}
    assert Feedback.from_dict(cast) == feedback
    narrow = {k: x if x.is_floating_point() else x.int() for k, x in feedback.to_dict().items()}
    lists = {k: x.tolist() for k, x in narrow.items()}
    assert Feedback.from_dict(narrow) == Feedback.from_dict(lists) == feedback


def test_mixed_precision_neither_rounds_a_table_nor_a_dict():
    """FSDP casts the tensors of dataclasses and of dicts on their way into a forward."""
    from torch.distributed.utils import _cast_forward_inputs

    table = Feedback.scores([0], [0.9])
    _, cast = _cast_forward_inputs(torch.bfloat16, feedback=table, columns=table.to_dict())
    assert cast["feedback"] is table
    with pytest.raises(ValueError, match=r"is torch.bfloat16: mixed precision has rounded it"):
        Feedback.of(cast["columns"])


def test_tables_are_constant_and_copied_as_such():
    with pytest.raises(AttributeError, match="constant"):
        EVERY_KIND.value = torch.zeros(5)
    for again in (copy.deepcopy(EVERY_KIND), pickle.loads(pickle.dumps(EVERY_KIND))):
        assert again == EVERY_KIND and again is not EVERY_KIND


def test_a_table_is_taken_as_it_is_and_a_dict_as_a_table():
    assert Feedback.of(EVERY_KIND) is EVERY_KIND
    assert Feedback.of(EVERY_KIND.to_dict()) == EVERY_KIND
    assert Feedback.merge([EVERY_KIND.to_dict()]) == EVERY_KIND
    with pytest.raises(ValueError, match=r"feedback must be a Feedback.*not NoneType"):
        Feedback.of(None)


def test_tables_are_equal_by_their_units():
    """The == that a dataclass would get asks a tensor of several truths for one."""
    again = Feedback.of(EVERY_KIND.to_dict())
    assert again == EVERY_KIND and hash(again) == hash(EVERY_KIND)
    assert len({again, EVERY_KIND, Feedback.merge([])}) == 2
    assert EVERY_KIND.shift(1) != EVERY_KIND and Feedback.merge([]) != EVERY_KIND
    assert EVERY_KIND != "a table" and Feedback.pairs([0], [1]) != Feedback.pairs([1], [0])
    assert Feedback.scores([0], [0.0]) == Feedback.scores([0], [-0.0])
    assert hash(Feedback.scores([0], [0.0])) == hash(Feedback.scores([0], [-0.0]))


def test_default_collate_takes_a_dict():
    """A batch of one from a loader; tables of several batches are merged, not stacked."""
    from torch.utils.data import DataLoader, default_collate

    batch = {"input_ids": torch.zeros(5, 3), "feedback": EVERY_KIND.to_dict()}
    (loaded,) = DataLoader([batch], batch_size=None)
    assert Feedback.of(loaded["feedback"]) == EVERY_KIND
    stacked = default_collate([batch, batch])["feedback"]
    with pytest.raises(ValueError, match=r"kind has shape \(2, 5\)"):
        Feedback.of(stacked)


def test_accelerate_moves_and_joins_a_dict():
    operations = pytest.importorskip("accelerate.utils.operations")
    batch = {"feedback": EVERY_KIND.to_dict()}
    moved = operations.send_to_device(batch, torch.device("cpu"))
    assert Feedback.of(moved["feedback"]) == EVERY_KIND
    later = {"feedback": EVERY_KIND.shift(5).to_dict()}
    joined = operations.concatenate([batch, later])["feedback"]
    assert Feedback.of(joined) == Feedback.merge([EVERY_KIND, EVERY_KIND.shift(5)])


def test_lightning_applies_functions_to_a_dict():
    apply = pytest.importorskip("lightning_utilities.core.apply_func").apply_to_collection
    batch = {"feedback": EVERY_KIND.to_dict()}
    moved = apply(batch, torch.Tensor, lambda x: x.to("cpu", torch.float32))
    assert Feedback.of(moved["feedback"]) == EVERY_KIND


WRONG_COLUMNS = {
    "a missing column": (("offset", None), r"must have the columns .*'offset'.* not .*to_dict"),
    "an unknown column": (("rank", [0.0] * 5), r"must have the columns"),
    "short": (("weight", [1.0] * 4), r"weight has shape \(4,\)"),
    "text": (("value", "high"), r"value must be numbers"),
    "kind as text": (("kind", "pair"), r"kind must be numbers"),
    "NaN": (("margin", [NAN, 0, 0, 0, 0]), r"margin\[0\] is nan"),
    "kind": (("kind", [0, 0, 1, 1, 3]), r"unit 4 of a feedback dict has kind=3"),
    "fractional kind": (("kind", [0, 0.5, 1, 1, 2]), r"kind\[1\] is 0\.5; it must be an integer"),
    "negative index": (("first", [0, 2, 1, -4, 3]), r"unit 3 .* first=-4"),
    "pair without a second": (("second", [1, -1, -1, -1, -1]), r"unit 1 .* second=-1"),
    "pair with itself": (("second", [0, 3, -1, -1, -1]), r"unit 0 .* second=0"),
    "label with a second": (("second", [1, 3, 2, -1, -1]), r"unit 2 .* second=2"),
    "graded label": (("value", [1, 1, 0.5, 0, 0.1]), r"unit 2 .* value=0\.5"),
    "target over one": (("value", [1, 1.5, 1, 0, 0.1]), r"value\[1\] is 1\.5; it must lie in"),
    "margin of a score": (("margin", [0, 0, 0, 0, 1.0]), r"unit 4 .* margin=1\.0"),
    "negative weight": (("weight", [1, 1, 1, -1, 1]), r"unit 3 .* weight=-1\.0"),
    "offset of a pair": (("offset", [1.0, 0, 0, 0, 0]), r"unit 0 .* offset=1\.0"),
}


@pytest.mark.parametrize("case", WRONG_COLUMNS)
def test_a_dict_with_units_that_nobody_builds_is_refused(case):
    (name, values), message = WRONG_COLUMNS[case]
    columns = EVERY_KIND.to_dict() | {name: values}
    if values is None:
        del columns[name]
    with pytest.raises(ValueError, match=message):
        Feedback.from_dict(columns)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()
