"""Requests to the head: from the rows of a layout to the results of head.ops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.head import ops
from una_fast.head.compiling import outside_compile
from una_fast.layout import Layout
from una_fast.logs import say_once
from una_fast.losses import Objective, una_loss

logger = logging.getLogger(__name__)


class HeadRows(NamedTuple):
    """The operands of the head in a call.

    layout: of the labels, on the device of the head
    hidden: [N, D]
    weight: [V, D]
    bias: [V], or None
    options: of head.ops: constants of the head, temperature, workspace, engine
    """

    layout: Layout
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]


Request = Callable[[HeadRows], dict[str, Tensor]]
"""From the operands of the head to results by name."""


@dataclass(frozen=True)
class Loss:
    """The loss of the feedback."""

    feedback: Feedback
    ref_logps: Tensor
    objective: Objective | None
    num_units: int | Tensor | None

    def __call__(self, rows: HeadRows) -> dict[str, Tensor]:
        common = {"objective": self.objective, "num_units": self.num_units}
        layout = rows.layout
        if len(layout.responses) == layout.shape[0]:
            out = ops.linear_una_loss(
                rows.hidden,
                rows.weight,
                layout.targets,
                layout.cu_seqlens,
                self.feedback,
                ref_logps=self.ref_logps,
                bias=rows.bias,
                **common,
                **rows.options,
            )
            return out._asdict()
        # A response that was cut to nothing has a log-ratio of 0, and no row: the one pass does
        # not take it, and the loss of the sums does.
        _say_empty()
        logps = Responses()(rows)["logps"]
        if self.ref_logps.shape != logps.shape:
            raise ValueError(
                f"ref_logps {tuple(self.ref_logps.shape)} must be [{len(logps)}], a sum for each "
                "row of the batch"
            )
        lengths = layout.lengths()
        empty = (lengths == 0).to(logps.device)
        ref_logps = self.ref_logps.to(logps.device).masked_fill(empty, 0.0)
        lengths = lengths.clamp(min=1)
        out = una_loss(logps, ref_logps, self.feedback, lengths=lengths, **common)
        return out._asdict()


@outside_compile
def _say_empty() -> None:
    say_once(
        logging.WARNING,
        "a row of a batch has no scored token: its log-ratio is taken as 0, and its batch needs "
        "one more product over the head; leave such records out, or cut them at a greater length",
        logger,
    )


@dataclass(frozen=True)
class Responses:
    """Sums over the scored tokens of every batch row."""

    def __call__(self, rows: HeadRows) -> dict[str, Tensor]:
        layout = rows.layout
        bounds = (layout.targets, layout.cu_seqlens)
        operands = (rows.hidden, rows.weight)
        sums = ops.sequence_logps(*operands, *bounds, bias=rows.bias, **rows.options)
        return {"logps": layout.spread(sums)}


@dataclass(frozen=True)
class Tokens:
    """Log-probs and row statistics of every token."""

    stats: tuple[str, ...]

    def __call__(self, rows: HeadRows) -> dict[str, Tensor]:
        operands = (rows.hidden, rows.weight, rows.layout.targets, rows.bias)
        found = ops.token_logps(*operands, stats=self.stats, **rows.options)
        logps, beside = found if self.stats else (found, {})
        results = {"logps": logps, **beside}
        return {name: rows.layout.scatter(values) for name, values in results.items()}
