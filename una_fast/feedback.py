"""What is known about the responses of one call: pairs, labels and scores as one table of feedback units.

A *unit* is one term of the loss: a pair of responses, or one labelled or scored response. A response may stand in
several units (a pair and two scores of the same two responses) or in none. The table lives on the CPU: its shape
decides which work is done, so reading it must never wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

PAIR, BINARY, SCORE = 0, 1, 2
KIND_NAMES = ("pair", "binary", "score")

Numbers = Sequence[float] | Tensor | float | None


def _column(name: str, values: Numbers, units: int, default: float | None = None) -> Tensor:
    """One float64 value per unit; a number is repeated, None is the default (an error where there is none)."""
    try:
        column = (
            torch.as_tensor(default if values is None else values, dtype=torch.float64)
            .detach()
            .cpu()
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, one per unit ({units} units): {error}") from None
    if column.dim() == 0:
        column = column.expand(units)
    if column.shape != (units,):
        raise ValueError(
            f"{name} has shape {tuple(column.shape)}; give one number, or one per unit ({units} units)"
        )
    if not torch.isfinite(column).all():
        bad = int((~torch.isfinite(column)).nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {column[bad].item()}; every {name} must be finite")
    return column.clone()


def _indices(name: str, values: Sequence[int] | Tensor) -> Tensor:
    column = torch.as_tensor(values).detach().cpu()
    if column.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if column.dim() != 1 or column.is_floating_point() or column.dtype == torch.bool:
        raise ValueError(f"{name} must be a one-dimensional list of response indices (integers)")
    if (column < 0).any():
        raise ValueError(f"{name} holds a negative response index ({int(column.min())})")
    return column.to(torch.int64, copy=True)


@dataclass(frozen=True)
class Feedback:
    """A table of U feedback units over the responses of one call. Build it with `pairs`, `binary`, `scores`, `merge`.

    All columns are CPU tensors of shape [U]: `kind` (PAIR, BINARY, SCORE), `first` (the chosen or the only response),
    `second` (the rejected response, -1 where there is none), and float64 `value` (pair target, label or score),
    `margin` (pairs), `weight`, `offset` (labels and scores).
    """

    kind: Tensor
    first: Tensor
    second: Tensor
    value: Tensor
    margin: Tensor
    weight: Tensor
    offset: Tensor

    @staticmethod
    def pairs(
        chosen: Sequence[int] | Tensor,
        rejected: Sequence[int] | Tensor,
        *,
        margin: Numbers = None,
        weight: Numbers = None,
        target: Numbers = None,
    ) -> Feedback:
        """Response `chosen[u]` is preferred to `rejected[u]`.

        margin: how far r_w must lead r_l (default 0). weight: factor on the unit's loss (default 1).
        target: probability in [0, 1] that the order is right (default 1; 0.5 is a tie).
        """
        first, second = _indices("chosen", chosen), _indices("rejected", rejected)
        units = first.numel()
        if second.numel() != units:
            raise ValueError(
                f"chosen has {units} indices and rejected {second.numel()}; a pair needs one of each"
            )
        if (first == second).any():
            bad = int((first == second).nonzero()[0])
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
        """Response `index[u]` is good (True) or bad (False). offset: f(x) + c, added to r before the comparison."""
        index = _indices("index", index)
        value = _column("label", label, index.numel())
        if ((value != 0) & (value != 1)).any():
            raise ValueError(
                "label must be True or False for every response; use Feedback.scores for graded feedback"
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
        """Response `index[u]` was given `score[u]`: in [0, 1] for the forms on sigmoid(r), any finite reward for
        "reward_mse". offset: f(x) + c, added to r before the comparison."""
        index = _indices("index", index)
        return Feedback._pointwise(
            SCORE, index, _column("score", score, index.numel()), weight, offset
        )

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
    def merge(parts: Sequence[Feedback]) -> Feedback:
        """The units of all parts, in order, as one table. An empty list gives a table of no units."""
        parts = list(parts) or [Feedback.pairs([], [])]
        return Feedback(
            **{
                f.name: torch.cat([getattr(part, f.name) for part in parts])
                for f in fields(Feedback)
            }
        )

    @property
    def num_units(self) -> int:
        return self.kind.numel()

    def shift(self, by: int) -> Feedback:
        """The same units with every response index moved up by `by`: how records join into a batch."""
        return replace(
            self,
            first=self.first + by,
            second=torch.where(self.second < 0, self.second, self.second + by),
        )

    def check(self, num_responses: int) -> None:
        """Raise ValueError if a unit names a response that the call does not have."""
        for column in (self.first, self.second):
            if column.numel() and int(column.max()) >= num_responses:
                unit = int(column.argmax())
                raise ValueError(
                    f"unit {unit} ({KIND_NAMES[int(self.kind[unit])]}) names response {int(column[unit])}, "
                    f"but the call has {num_responses} responses (cu_seqlens has one more entry than responses)"
                )


def _check_unit_interval(name: str, value: Tensor) -> None:
    outside = (value < 0) | (value > 1)
    if outside.any():
        bad = int(outside.nonzero()[0])
        raise ValueError(f"{name}[{bad}] is {value[bad].item()}; it must lie in [0, 1]")


def _weight(weight: Numbers, units: int) -> Tensor:
    column = _column("weight", weight, units, 1.0)
    if (column < 0).any():
        raise ValueError(
            f"weight[{int((column < 0).nonzero()[0])}] is negative; use 0 to leave a unit out"
        )
    return column
