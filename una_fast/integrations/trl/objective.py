"""An Objective in the place of TRL's losses: on DPO's pairs, labels and scores, or KTO's labels."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from typing import Any

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.integrations.hf.units import DividesByUnits
from una_fast.logs import say_once
from una_fast.losses import Objective, UnaOutput, check_units, una_loss

logger = logging.getLogger(__name__)

_ALIKE = 0.85  # likeness of a column to one of ours from which it is taken for a slip
POINT_COLUMNS = ("chosen_label", "rejected_label", "chosen_score", "rejected_score")
# Cached reference log-probs of records.
PAIR_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
LABEL_REFERENCES = ("ref_logps", "ref_KL_logps")
# Members of a batch that TRL's methods would hand on to the model.
_OF_LOSS = ("feedback", "num_units")

# Settings of TRL's losses, with the values that say nothing; the first is the default.
PAIR_SETTINGS = {
    "loss_type": ("sigmoid", ["sigmoid"]),
    "f_divergence_type": ("reverse_kl",),
    "loss_weights": (None,),
    "ld_alpha": (None,),
    "use_weighting": (False,),
    "label_smoothing": (0.0, None),
}
LABEL_SETTINGS = {"loss_type": ("kto",)}


def check_objective(objective: Objective, args: Any, settings: dict[str, tuple]) -> None:
    """Raise ValueError for another type, and for settings of TRL's losses that it replaces.

    objective: of the run
    args: config of TRL's trainer
    settings: PAIR_SETTINGS or LABEL_SETTINGS
    """
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective={objective!r} is no Objective: give objective=Objective(beta={args.beta}), "
            "of una_fast, with the forms of the losses as its fields"
        )
    if args.beta != objective.beta:
        raise ValueError(
            f"beta={args.beta} of the {type(args).__name__} and beta={objective.beta} of the "
            "objective differ: the rewards in TRL's metrics are made with the first; give both the "
            "same"
        )
    for name, neutral in settings.items():
        if getattr(args, name) not in neutral:
            raise ValueError(
                f"{name} belongs to TRL's losses, which objective= replaces: leave {name} at "
                f"{neutral[0]!r}, or leave objective= out"
            )


def _with_references(
    batch: dict[str, Any], examples: list[dict[str, Any]], columns: tuple[str, ...]
) -> dict[str, Any]:
    """Return a batch with the cached reference log-probs in float64; TRL's collators round them."""
    given = [column for column in columns if column in examples[0]]
    exact = {
        column: torch.tensor([example[column] for example in examples], dtype=torch.float64)
        for column in given
    }
    return {**batch, **exact}


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
        batch = _with_references(self.collator(examples), examples, PAIR_REFERENCES)
        return {**batch, "feedback": Feedback.merge(units)}

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


class FeedbackOfLabels:
    """A collator of KTO's batches, with the labels as feedback beside."""

    def __init__(self, collator: Any, weights: tuple[float, float]) -> None:
        """Take TRL's collator, and the weights of bad and of good completions."""
        self.collator = collator
        self.weights = weights

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = _with_references(self.collator(examples), examples, LABEL_REFERENCES)
        good = [bool(label) for label in batch["label"]]
        weight = [self.weights[label] for label in good]
        return {**batch, "feedback": Feedback.binary(range(len(good)), good, weight=weight)}


class OnFeedback(DividesByUnits):
    """Mixin, listed before a trainer of TRL: the loss is an objective's, on `feedback` of a batch.

    objective: None: TRL's own loss
    rows_per_example: rows of a batch for a record, 2 for pairs
    settings: of TRL's losses, which an objective replaces
    references: columns of cached reference log-probs, which compute_ref_log_probs returns
    unit: what every record is to the objective
    columns: further columns that the objective reads
    """

    objective: Objective | None
    rows_per_example: int
    settings: dict[str, tuple]
    references: tuple[str, ...]
    unit: str
    columns: tuple[str, ...]
    # [2] sums of the losses, and the number, of all units of an evaluation under way.
    _evaluated: Tensor | None = None

    def _take_feedback(self) -> None:
        """Take the place of TRL's loss; after TRL's `__init__`."""
        self.data_collator = self._feedback_collator()
        self._say_divided()
        read = self._columns_read()
        for name, dataset in self._datasets().items():
            self._tell_columns(name, next(iter(dataset), {}), read)

    def _columns_read(self) -> set[str]:
        """Return the columns that TRL's losses and the objective read."""
        before = self._signature_columns
        # TRL's method: a subclass may not be ready for its own, before the end of `__init__`.
        super()._set_signature_columns_if_needed()
        read = {*self._signature_columns, *self.columns}
        self._signature_columns = before
        return read

    def _datasets(self) -> dict[str, Any]:
        """Return the datasets of the trainer by name."""
        evaluated = self.eval_dataset
        if isinstance(evaluated, dict):
            found = {f"eval_dataset[{name!r}]": one for name, one in evaluated.items()}
        else:
            found = {"eval_dataset": evaluated}
        found = {"train_dataset": self.train_dataset, **found}
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    def _tell_columns(self, dataset: str, record: dict[str, Any], read: set[str]) -> None:
        """Say once which columns of a dataset the objective reads, and which numbers it does not.

        dataset: its name
        record: the first
        read: names of columns
        """
        found = [column for column in self.columns if column in record]
        unread = [name for name in record if name not in read]
        for name in unread:
            meant = _column_meant(name, self.columns)
            if meant is not None and meant not in found:
                message = (
                    f"{dataset} has a column {name}, which objective= does not read; did you mean "
                    f"{meant}? Rename the column, or drop it"
                )
                say_once(logging.WARNING, message, logger)
        numbers = [name for name in unread if isinstance(record[name], (bool, int, float))]
        message = f"objective= trains on {self.unit} alone of {dataset}"
        if found:
            message = f"objective= trains on {self.unit}, {', '.join(found)} of {dataset}"
        if numbers:
            message += f"; numbers that it does not read: {', '.join(numbers)}"
        say_once(logging.WARNING if numbers else logging.INFO, message, logger)

    def _feedback_collator(self) -> Any:
        """Return a collator that puts feedback beside the batches of TRL's."""
        raise NotImplementedError

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor:
        """Return the [rows] reference log-probs of a batch, from the columns `references`."""
        raise NotImplementedError

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
        given = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
        prefix = given.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = losses / max(units, 1.0)
        return output


class OnPairs(OnFeedback):
    """Reads the labels and scores beside TRL's pairs, batches [chosen | rejected]."""

    rows_per_example = 2
    settings = PAIR_SETTINGS
    references = PAIR_REFERENCES
    unit = "pairs"
    columns = POINT_COLUMNS

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in POINT_COLUMNS:
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def _feedback_collator(self) -> FeedbackOfPairs:
        return FeedbackOfPairs(self.data_collator, self.objective)

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor:
        return torch.cat([inputs[column] for column in PAIR_REFERENCES])


class OnLabels(OnFeedback):
    """Reads KTO's batches: a completion and its label."""

    rows_per_example = 1
    settings = LABEL_SETTINGS
    references = LABEL_REFERENCES
    unit = "labels"
    columns = ()

    def _feedback_collator(self) -> FeedbackOfLabels:
        weights = (self.undesirable_weight, self.desirable_weight)
        return FeedbackOfLabels(self.data_collator, weights)

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["ref_logps"]


def _column_meant(name: str, columns: tuple[str, ...]) -> str | None:
    """Return the column that a name is a slip of, such as chosen_scores or score_chosen.

    name: of a column
    columns: that are read
    """
    likely = {_in_order(column): column for column in columns}
    likely |= {column: column for column in columns}
    for form in (name.lower(), _in_order(name)):
        close = difflib.get_close_matches(form, likely, 1, _ALIKE)
        if close:
            return likely[close[0]]
    return None


def _in_order(name: str) -> str:
    """Return a name with its words in the order of the alphabet."""
    return "_".join(sorted(re.findall("[a-z]+", name.lower())))


def without_feedback(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch for TRL's methods."""
    return {name: value for name, value in inputs.items() if name not in _OF_LOSS}
