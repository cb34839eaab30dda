"""TRL's trainers, built with the fused head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from una_fast.feedback import Feedback
from una_fast.integrations.trl.head import SEAM, add_una_head
from una_fast.integrations.trl.points import POINT_COLUMNS, FeedbackOfPairs, check_objective
from una_fast.losses import Objective, una_loss


@contextmanager
def _una_head_in(modules: Sequence[ModuleType], **options: Any) -> Iterator[None]:
    """Let modules of TRL find add_una_head under the name of their own function."""
    before = [getattr(module, SEAM) for module in modules]
    for module in modules:
        setattr(module, SEAM, functools.partial(add_una_head, **options))
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            setattr(module, SEAM, own)


class _UnaHead:
    """A trainer of TRL that is built with our head.

    una_pack: as of patch_model
    una_workspace_mb: MiB of the fused head, see linear_una_loss
    """

    def __init__(
        self,
        *args: Any,
        una_pack: str | bool = "auto",
        una_workspace_mb: float | None = None,
        **kwargs: Any,
    ) -> None:
        names = {kind.__module__ for kind in type(self).__mro__}
        loaded = [importlib.import_module(name) for name in names if name.startswith("trl.")]
        modules = [module for module in loaded if hasattr(module, SEAM)]
        with _una_head_in(modules, pack=una_pack, workspace_mb=una_workspace_mb):
            super().__init__(*args, **kwargs)


class UNAKTOTrainer(_UnaHead, KTOTrainer):
    """TRL's KTOTrainer on the fused head."""


class UNAGRPOTrainer(_UnaHead, GRPOTrainer):
    """TRL's GRPOTrainer on the fused head."""


class UNARLOOTrainer(_UnaHead, RLOOTrainer):
    """TRL's RLOOTrainer on the fused head."""


class UNADPOTrainer(_UnaHead, DPOTrainer):
    """TRL's DPOTrainer on the fused head; with an objective, on its pairs, labels and scores.

    objective: losses of pairs, labels and scores, in place of args.loss_type; labels and scores are
        read from the columns chosen_label, rejected_label, chosen_score and rejected_score, each of
        which may be missing, or None in a record. None: TRL's own losses
    una_pack, una_workspace_mb: as of patch_model
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective = objective
        super().__init__(*args, **kwargs)
        if objective is not None:
            check_objective(objective, self.args)
            self.data_collator = FeedbackOfPairs(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in POINT_COLUMNS:
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute TRL's reference log-probs, of a batch that may hold feedback."""
        own = {name: value for name, value in inputs.items() if name != "feedback"}
        return super().compute_ref_log_probs(model, own)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        feedback = inputs["feedback"]
        inputs = {name: value for name, value in inputs.items() if name != "feedback"}
        cached = self.precompute_ref_logps
        if not cached:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        recorder = _Recorder(model)
        # TRL's method computes its metrics, from the log-probs that the loss is then made of.
        self.precompute_ref_logps = True
        try:
            super()._compute_loss(recorder, inputs, False)
        finally:
            self.precompute_ref_logps = cached
        outputs = recorder.outputs
        loss = self._objective_loss(outputs, inputs, feedback)
        return (loss, outputs) if return_outputs else loss

    def _objective_loss(self, outputs: Any, inputs: dict[str, Any], feedback: Feedback) -> Tensor:
        mask = inputs["completion_mask"][:, 1:]
        logps = outputs.log_probs[:, -mask.shape[1] :].double().sum(1)
        ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        lengths = mask.sum(1).clamp(min=1)
        out = una_loss(logps, ref_logps, feedback, objective=self.objective, lengths=lengths)
        if self.aux_loss_enabled:
            return out.loss + self.router_aux_loss_coef * outputs.aux_loss
        return out.loss


class _Recorder:
    """A model that keeps the output of its last call."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **kwargs: Any) -> Any:
        self.outputs = self.model(**kwargs)
        return self.outputs
