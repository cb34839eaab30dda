"""Requests to the head: from the rows of a layout to the results of head.ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.head import ops
from una_fast.layout import Layout
from una_fast.losses import Objective, una_loss


class Request(Protocol):
    """Results by name, from rows of hidden states."""

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Return results by name.

        layout: of the labels, on the device of the head
        hidden: [N, D]
        weight: [V, D]
        bias: [V], or None
        options: of head.ops: constants of the head, temperature, workspace, engine
        """
        ...


@dataclass(frozen=True)
class Loss:
    """The loss of the feedback."""

    feedback: Feedback
    ref_logps: Tensor
    objective: Objective | None
    num_units: int | Tensor | None

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        common = {"objective": self.objective, "num_units": self.num_units}
        if len(layout.responses) == layout.shape[0]:
            out = ops.linear_una_loss(
                hidden,
                weight,
                layout.targets,
                layout.cu_seqlens,
                self.feedback,
                ref_logps=self.ref_logps,
                bias=bias,
                **common,
                **options,
            )
            return out._asdict()
        # A response that was cut to nothing has a log-ratio of 0, and no row: the one pass does
        # not take it, and the loss of the sums does.
        logps = Responses()(layout, hidden, weight, bias, options)["logps"]
        lengths = layout.lengths()
        empty = (lengths == 0).to(logps.device)
        ref_logps = self.ref_logps.to(logps.device).masked_fill(empty, 0.0)
        lengths = lengths.clamp(min=1)
        out = una_loss(logps, ref_logps, self.feedback, lengths=lengths, **common)
        return out._asdict()


@dataclass(frozen=True)
class Responses:
    """Sums over the scored tokens of every batch row."""

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        sums = ops.sequence_logps(
            hidden, weight, layout.targets, layout.cu_seqlens, bias=bias, **options
        )
        return {"logps": layout.spread(sums)}


@dataclass(frozen=True)
class Tokens:
    """Log-probs and row statistics of every token."""

    stats: tuple[str, ...]

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        found = token_results(layout, hidden, weight, bias, self.stats, options)
        return {name: layout.scatter(values) for name, values in found.items()}


def token_results(
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Sequence[str],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Return "logps" and the statistics of the scored tokens, name -> [N].

    layout: of the labels
    hidden: [N, D]
    weight: [V, D]
    bias: [V], or None
    stats: names of row statistics
    options: of head.ops
    """
    found = ops.token_logps(hidden, weight, layout.targets, bias, stats=tuple(stats), **options)
    if not stats:
        return {"logps": found}
    logps, beside = found
    return {"logps": logps, **beside}
