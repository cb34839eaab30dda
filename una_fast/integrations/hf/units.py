"""The units of a step: the divisor of a loss of feedback, in a Trainer of transformers.

A batch holds as many units as the records have feedback. Divided by the units of all batches of a
step, on all ranks, N batches have the gradient of one batch, however the units are spread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.losses import Objective


class DividesByUnits:
    """Stands before a Trainer of transformers whose batches have a member `feedback`.

    objective: of the loss; None: the step is divided as the Trainer divides it
    """

    objective: Objective | None

    def _say_divided(self) -> None:
        """Mark the loss as divided already; after the `__init__` of the Trainer."""
        # Which of the two is read depends on the release.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Any:
        """Return the units of all batches of a step, on all ranks; at least 1."""
        if self.objective is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        units = sum(feedback_of(batch).num_units for batch in batch_samples)
        here = torch.tensor(units, dtype=torch.int64, device=device)
        return self.accelerator.reduce(here, reduction="sum").clamp(min=1)

    def _part_of_step(
        self,
        loss: Tensor,
        router_loss: Tensor | None,
        units: int,
        num_units: Tensor | int | None,
    ) -> Tensor:
        """Return the part of a batch in the loss of a step.

        loss: [], the sum over the units of the batch, divided by num_units
        router_loss: [], load balancing of a mixture of experts times the coefficient, if any
        units: of the batch
        num_units: of the step; None: the batch stands alone
        """
        if router_loss is not None:
            share = 1.0 if num_units is None else units / num_units
            loss = loss + share * router_loss
        if num_units is None:
            return loss
        # DDP and FSDP average the gradients of ranks, which are parts of one sum.
        return loss * self.accelerator.num_processes


def feedback_of(batch: dict[str, Any]) -> Feedback:
    """Return the feedback of a batch; ValueError without any."""
    if batch.get("feedback") is None:
        raise ValueError(
            "a batch has no feedback: a data_collator returns input_ids, attention_mask, labels "
            "and feedback, as FeedbackCollator does"
        )
    return Feedback.of(batch["feedback"])
