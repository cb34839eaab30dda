"""Feedback on the responses of a call: pairs, labels and scores in one table of units.

A *unit* is one term of the loss: a pair of responses, or a labelled or scored response. A response
may stand in several units (a pair and two scores of the same two responses) or in no unit. The
table lives on the CPU: its shape decides which work is done, so reading the table must never wait
for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PAIR, BINARY, SCORE = 0, 1, 2
KIND_NAMES = ("pair", "binary", "score")
NAMES = ("kind", "first", "second", "value", "margin", "weight", "offset")

_HALF = (torch.float16, torch.bfloat16)
# What torch raises for values that make no tensor.
_NO_NUMBERS = (TypeError, ValueError, RuntimeError)

Numbers = Sequence[float] | Tensor | float | None


def _column(name: str, values: Numbers, units: int, default: float | None = None) -> Tensor:
    """Return a column of the table, [units] float64.

    name: the argument, for errors
    values: [units] numbers, or a number for all units, or None for the default
    default: None makes values=None an error

    ValueError for other shapes, and for values other than finite numbers.
    """
    if values is None:
        values = default
    try:
        column = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except _NO_NUMBERS as error:
        raise ValueError(f"{name} must be numbers, one per unit ({units} units): {error}") from None
    if column.dim() == 0:
        column = column.expand(units)
    if column.shape != (units,):
        raise ValueError(
            f"{name} has shape {tuple(column.shape)}; "
            f"give one number, or one per unit ({units} units)"
        )
    if not torch.isfinite(column).all():
        bad = int((~torch.isfinite(column)).nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {column[bad].item()}; every {name} must be finite")
    return column.clone()


def _indices(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """Return indices of responses, [U] int64; ValueError for anything but integers >= 0."""
    try:
        column = torch.as_tensor(values).detach().cpu()
    except _NO_NUMBERS as error:
        raise ValueError(f"{name} must be a list of response indices (integers): {error}") from None
    if column.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if column.dim() != 1 or column.is_floating_point() or column.dtype == torch.bool:
        raise ValueError(f"{name} must be a one-dimensional list of response indices (integers)")
    if (column < 0).any():
        raise ValueError(f"{name} holds a negative response index ({int(column.min())})")
    return column.to(torch.int64, copy=True)


class Feedback:
    """A table of U feedback units over the responses of a call.

    Build a table with `pairs`, `binary`, `scores` and `merge`. Tables are constant, and equal if
    their units are, in order. In batches for a trainer to move, cast or pin, carry the
    `to_dict` of a table: wherever feedback is taken, such a dict is as good. A trainer that joins
    batches joins the columns as they stand: `shift` every later table first. All columns are CPU
    tensors:

    kind: [U] int64, PAIR, BINARY or SCORE
    first: [U] int64, the chosen or the only response
    second: [U] int64, the rejected response; -1 for labels and scores
    value: [U] float64, pair target, label or score
    margin: [U] float64, 0 for labels and scores
    weight: [U] float64
    offset: [U] float64, 0 for pairs
    """

    # No dataclass: FSDP's mixed precision would cast its tensors on the way into a forward, and
    # Lightning refuses frozen ones in a batch.
    kind: Tensor
    first: Tensor
    second: Tensor
    value: Tensor
    margin: Tensor
    weight: Tensor
    offset: Tensor

    def __init__(self, **columns: Tensor) -> None:
        """Hold columns by name; the static methods check what they hold."""
        for name in NAMES:
            self.__dict__[name] = columns.pop(name)
        assert not columns, f"no columns of a table: {tuple(columns)}"

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: batches share tables."""
        raise AttributeError(f"a Feedback table is constant; make another one to change {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy, also in another process, is made."""
        return Feedback.from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        """Return the columns as text."""
        columns = ", ".join(f"{name}={getattr(self, name).tolist()}" for name in NAMES)
        return f"Feedback({columns})"

    @staticmethod
    def pairs(
        chosen: Sequence[int] | Tensor,
        rejected: Sequence[int] | Tensor,
        *,
        margin: Numbers = None,
        weight: Numbers = None,
        target: Numbers = None,
    ) -> Feedback:
        """Build units in which response `chosen[u]` is preferred to response `rejected[u]`.

        chosen: [U] indices of responses
        rejected: [U] indices of responses
        margin: lead of r_w over r_l to reach; [U] or a number, default 0
        weight: factor on the unit's loss, >= 0; [U] or a number, default 1
        target: probability in [0, 1] that the order is right; [U] or a number, default 1; 0.5 is a
            tie

        ValueError, by the argument and the entry, for anything else.
        """
        first = _indices("chosen", chosen)
        second = _indices("rejected", rejected)
        units = first.numel()
        if second.numel() != units:
            raise ValueError(
                f"chosen has {units} indices and rejected {second.numel()}; "
                "a pair needs one of each"
            )
        same = first == second
        if same.any():
            bad = int(same.nonzero()[0])
            raise ValueError(
                f"pair {bad} has response {int(first[bad])} as both chosen and rejected"
            )
        value = _column("target", target, units, 1.0)
        _check_unit_interval("target", value)
        return Feedback(
            kind=torch.full((units,), PAIR),
            first=first,
            second=second,
            value=value,
            margin=_column("margin", margin, units, 0.0),
            weight=_weight(weight, units),
            offset=torch.zeros(units, dtype=torch.float64),
        )

    @staticmethod
    def binary(
        index: Sequence[int] | Tensor,
        label: Sequence[bool] | Tensor,
        *,
        weight: Numbers = None,
        offset: Numbers = None,
    ) -> Feedback:
        """Build units in which response `index[u]` is good (True) or bad (False).

        index: [U] indices of responses
        label: [U] True or False
        weight: factor on the unit's loss, >= 0; [U] or a number, default 1
        offset: f(x) + c, added to r before the comparison; [U] or a number, default 0

        ValueError, by the argument and the entry, for anything else.
        """
        index = _indices("index", index)
        value = _column("label", label, index.numel())
        if ((value != 0) & (value != 1)).any():
            raise ValueError(
                "label must be True or False for every response; "
                "use Feedback.scores for graded feedback"
            )
        return Feedback._pointwise(BINARY, index, value, weight, offset)

    @staticmethod
    def scores(
        index: Sequence[int] | Tensor,
        score: Sequence[float] | Tensor,
        *,
        weight: Numbers = None,
        offset: Numbers = None,
    ) -> Feedback:
        """Build units in which response `index[u]` was given `score[u]`.

        index: [U] indices of responses
        score: [U] numbers; in [0, 1] for the forms on sigmoid(r), any reward for "reward_mse"
        weight: factor on the unit's loss, >= 0; [U] or a number, default 1
        offset: f(x) + c, added to r before the comparison; [U] or a number, default 0

        ValueError, by the argument and the entry, for anything else.
        """
        index = _indices("index", index)
        value = _column("score", score, index.numel())
        return Feedback._pointwise(SCORE, index, value, weight, offset)

    @staticmethod
    def _pointwise(
        kind: int, first: Tensor, value: Tensor, weight: Numbers, offset: Numbers
    ) -> Feedback:
        units = first.numel()
        return Feedback(
            kind=torch.full((units,), kind),
            first=first,
            second=torch.full((units,), -1),
            value=value,
            margin=torch.zeros(units, dtype=torch.float64),
            weight=_weight(weight, units),
            offset=_column("offset", offset, units, 0.0),
        )

    @staticmethod
    def merge(parts: Sequence[Feedback | Mapping[str, Any]]) -> Feedback:
        """Join tables into one, in order. An empty list gives a table without units.

        parts: tables over the responses of a call; `shift` moves the table of a later batch
        """
        tables = [Feedback.of(part) for part in parts] or [Feedback.pairs([], [])]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(table, name) for table in tables])

        return Feedback(**{name: joined(name) for name in NAMES})

    # --- parts of a batch ---

    def to_dict(self) -> dict[str, Tensor]:
        """Return the columns by name: plain CPU tensors [U], of their own memory."""
        return {name: getattr(self, name).clone() for name in NAMES}

    @staticmethod
    def from_dict(columns: Mapping[str, Any]) -> Feedback:
        """Build a table from the columns that `to_dict` gave.

        columns: name -> [U] numbers, on any device and in any dtype that holds them

        ValueError for missing or unknown names, unequal lengths, values that no unit has, and
        columns of half precision: mixed precision has rounded them.
        """
        if set(columns) != set(NAMES):
            raise ValueError(
                f"a feedback dict must have the columns {NAMES}, not {tuple(columns)}; "
                "make one with Feedback.to_dict()"
            )
        for name, column in columns.items():
            if getattr(column, "dtype", None) in _HALF and column.numel():
                raise ValueError(
                    f"the column {name} of a feedback dict is {column.dtype}: mixed precision has "
                    "rounded it on its way; give the Feedback itself, or set "
                    "cast_forward_inputs=False"
                )
        try:
            units = torch.as_tensor(columns["kind"]).numel()
        except _NO_NUMBERS:
            units = 0  # the column itself says what is wrong
        table = {name: _column(name, columns[name], units) for name in NAMES}
        for name in ("kind", "first", "second"):
            table[name] = _whole(name, table[name])
        return _checked(Feedback(**table))

    @staticmethod
    def of(feedback: Feedback | Mapping[str, Any]) -> Feedback:
        """Return a table as it is, and a dict of columns as a table; ValueError otherwise."""
        if isinstance(feedback, Feedback):
            return feedback
        if isinstance(feedback, Mapping):
            return Feedback.from_dict(feedback)
        raise ValueError(
            f"feedback must be a Feedback, or the dict of Feedback.to_dict(), not "
            f"{type(feedback).__name__}"
        )

    def __eq__(self, other: object) -> bool:
        """Return whether another table has the same units in the same order."""
        if not isinstance(other, Feedback):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in NAMES)

    def __hash__(self) -> int:
        """Return a hash of the units."""
        return hash(tuple(tuple(getattr(self, name).tolist()) for name in NAMES))

    @property
    def num_units(self) -> int:
        """Return U."""
        return self.kind.numel()

    def shift(self, by: int) -> Feedback:
        """Return the units with every response index moved up by `by`: records join in a batch.

        ValueError for an index that would fall below 0.
        """
        if self.first.numel() and int(self.first.min()) + by < 0:
            raise ValueError(f"by={by} would move response {int(self.first.min())} below 0")
        second = torch.where(self.second < 0, self.second, self.second + by)
        return self.replaced(first=self.first + by, second=second)

    def replaced(self, **columns: Tensor) -> Feedback:
        """Return the units with other columns, by name."""
        return Feedback(**{name: columns.get(name, getattr(self, name)) for name in NAMES})

    def check(self, num_responses: int) -> None:
        """Raise ValueError if a unit names a response beyond the responses of the call."""
        for column in (self.first, self.second):
            if column.numel() == 0 or int(column.max()) < num_responses:
                continue
            unit = int(column.argmax())
            kind = KIND_NAMES[int(self.kind[unit])]
            raise ValueError(
                f"unit {unit} ({kind}) names response {int(column[unit])}, but the call has "
                f"{num_responses} responses, counted from 0: rows of the batch, or ranges of "
                "cu_seqlens"
            )


def _whole(name: str, column: Tensor) -> Tensor:
    """Return a column of integers as int64; ValueError for fractions."""
    fractions = column != column.round()
    if fractions.any():
        bad = int(fractions.nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {column[bad].item()}; it must be an integer")
    return column.long()


def _checked(table: Feedback) -> Feedback:
    """Return a table with units as `pairs`, `binary` and `scores` build them; else ValueError."""
    kind, first, second, value = table.kind, table.first, table.second, table.value
    is_pair = kind == PAIR
    is_label = kind == BINARY
    none = torch.zeros_like(is_pair)
    wrong = {
        "kind": (kind < PAIR) | (kind > SCORE),
        "first": first < 0,
        "second": torch.where(is_pair, (second < 0) | (second == first), second != -1),
        "value": torch.where(is_label, (value != 0) & (value != 1), none),
        "margin": ~is_pair & (table.margin != 0),
        "weight": table.weight < 0,
        "offset": is_pair & (table.offset != 0),
    }
    for name, units in wrong.items():
        if units.any():
            bad = int(units.nonzero()[0])
            raise ValueError(
                f"unit {bad} of a feedback dict has {name}={getattr(table, name)[bad].item()}, "
                f"which no unit of kind {int(kind[bad])} has ({KIND_NAMES}); make the dict with "
                "Feedback.to_dict()"
            )
    _check_unit_interval("value", torch.where(is_pair, value, 0.0))
    return table


def _check_unit_interval(name: str, value: Tensor) -> None:
    outside = (value < 0) | (value > 1)
    if outside.any():
        bad = int(outside.nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {value[bad].item()}; it must lie in [0, 1]")


def _weight(weight: Numbers, units: int) -> Tensor:
    column = _column("weight", weight, units, 1.0)
    negative = column < 0
    if negative.any():
        bad = int(negative.nonzero()[0])
        raise ValueError(f"weight[{bad}] is negative; use 0 to leave a unit out")
    return column
