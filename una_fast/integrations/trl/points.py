"""An Objective in the place of TRL's losses: on pairs, and on labels and scores of a response."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.integrations.hf.units import DividesByUnits
from una_fast.losses import Objective, UnaOutput, check_units, una_loss

POINT_COLUMNS = ("chosen_label", "rejected_label", "chosen_score", "rejected_score")
# Members of a batch that TRL's methods would hand on to the model.
_OF_LOSS = ("feedback", "num_units")


class FeedbackOfPairs:
    """A collator of TRL's preference batches [chosen | rejected], with the feedback beside."""

    def __init__(self, collator: Any, objective: Objective) -> None:
        self.collator = collator
        self.objective = objective

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        count = len(examples)
        units = [Feedback.pairs(range(count), range(count, 2 * count))]
        for column in POINT_COLUMNS:
            given = [i for i, example in enumerate(examples) if example.get(column) is not None]
            values = [examples[i][column] for i in given]
            units.append(self._of_column(column, given, values, count))
        return {**self.collator(examples), "feedback": Feedback.merge(units)}

    def _of_column(self, column: str, given: list[int], values: list[Any], count: int) -> Feedback:
        """Return the units of a column; ValueError by the column, the value and the record.

        column: of POINT_COLUMNS
        given: records with a value
        values: of the given records
        count: records of the batch
        """
        start = 0 if column.startswith("chosen") else count
        try:
            return self._units(column, [start + i for i in given], values)
        except ValueError:
            for i, value in zip(given, values, strict=True):
                self._check_alone(column, i, value)
            raise

    def _check_alone(self, column: str, record: int, value: Any) -> None:
        try:
            self._units(column, [0], [value])
        except ValueError as error:
            raise ValueError(
                f"{column}={value!r} of record {record} of a batch, counted from 0: {error}"
            ) from error

    def _units(self, column: str, index: list[int], values: list[Any]) -> Feedback:
        make = Feedback.binary if column.endswith("label") else Feedback.scores
        units = make(index, values)
        check_units(units, self.objective, 1 + max(index, default=0))
        return units


def check_objective(objective: Objective, args: Any) -> None:
    """Raise ValueError for settings of TRL's losses that an objective replaces."""
    if args.beta != objective.beta:
        raise ValueError(
            f"beta={args.beta} of the DPOConfig and beta={objective.beta} of the objective differ: "
            "the rewards in TRL's metrics are made with the first; give both the same"
        )
    replaced = {
        "loss_type": args.loss_type in ("sigmoid", ["sigmoid"]),
        "f_divergence_type": args.f_divergence_type == "reverse_kl",
        "loss_weights": args.loss_weights is None,
        "ld_alpha": args.ld_alpha is None,
        "use_weighting": not args.use_weighting,
        "label_smoothing": not args.label_smoothing,
    }
    set_too = [name for name, is_default in replaced.items() if not is_default]
    if set_too:
        raise ValueError(
            f"{set_too[0]} belongs to TRL's losses, which objective= replaces; leave one out"
        )


class OnFeedback(DividesByUnits):
    """Stands before a trainer of TRL: the loss is an objective's, on `feedback` of a batch.

    objective: None: TRL's own loss
    rows_per_example: rows of a batch for a record, 2 for pairs
    """

    rows_per_example = 1
    # [2] sums of the losses, and the number, of all units of an evaluation under way.
    _evaluated: Tensor | None = None

    def _take_feedback(self, collator: Any) -> None:
        """Take the place of TRL's loss; after TRL's `__init__`.

        collator: makes batches with feedback
        """
        self.data_collator = collator
        self._say_divided()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch.

        model, inputs, return_outputs: as of the Trainer
        num_items_in_batch: with an objective the units of the step; None: of the batch alone
        """
        if self.objective is not None:
            inputs = {**inputs, "num_units": num_items_in_batch}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute TRL's reference log-probs, of a batch with or without feedback."""
        return super().compute_ref_log_probs(model, without_feedback(inputs))

    def _loss_of_units(
        self, logps: Tensor, ref_logps: Tensor, inputs: dict[str, Any], aux_loss: Tensor | None
    ) -> Tensor:
        """Return the loss of a batch, [].

        logps, ref_logps: [rows], sums over the tokens of each completion
        inputs: the batch
        aux_loss: [] load balancing of a mixture of experts, if any
        """
        feedback, num_units = inputs["feedback"], inputs.get("num_units")
        lengths = inputs["completion_mask"][:, 1:].sum(1).clamp(min=1)
        given = {"objective": self.objective, "num_units": num_units, "lengths": lengths}
        out = una_loss(logps, ref_logps, feedback, **given)
        router_loss = None if aux_loss is None else self.router_aux_loss_coef * aux_loss
        if self._evaluated is not None:
            self._add_evaluated(out, feedback, len(logps), router_loss)
        return self._part_of_step(out.loss, router_loss, feedback.num_units, num_units)

    def _add_evaluated(
        self, out: UnaOutput, feedback: Feedback, rows: int, router_loss: Tensor | None
    ) -> None:
        """Add a batch of all ranks to the sums of an evaluation.

        out, feedback: of the batch
        rows: of the batch
        router_loss: [] of the batch, if any
        """
        examples = rows // self.rows_per_example
        losses = out.unit_losses * feedback.weight.to(out.unit_losses.device)
        if router_loss is not None:
            losses = losses + router_loss.detach()
        example = (feedback.first % examples).to(losses.device)
        sums = losses.new_zeros(examples, 2)
        sums.index_add_(0, example, torch.stack([losses, torch.ones_like(losses)], 1))
        # Records that fill the last batches of the ranks are left out.
        self._evaluated = self._evaluated + self.accelerator.gather_for_metrics(sums).sum(0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's loop; with an objective, the loss is the mean over all units."""
        if self.objective is None:
            return super().evaluation_loop(*args, **kwargs)
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            losses, units = self._evaluated.tolist()
        finally:
            self._evaluated = None
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = losses / max(units, 1.0)
        return output


class OnPairs(OnFeedback):
    """Reads the labels and scores beside TRL's pairs, batches [chosen | rejected]."""

    rows_per_example = 2

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in POINT_COLUMNS:
            if column not in self._signature_columns:
                self._signature_columns.append(column)


def without_feedback(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch for TRL's methods."""
    return {name: value for name, value in inputs.items() if name not in _OF_LOSS}
