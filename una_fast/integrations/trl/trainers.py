"""TRL's trainers, built with the fused head."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from una_fast.integrations.trl.head import SEAM, add_una_head
from una_fast.integrations.trl.points import (
    FeedbackOfPairs,
    OnPairs,
    check_objective,
    without_feedback,
)
from una_fast.losses import Objective

# TRL's modules are shared by the threads of a process.
_swapping = threading.RLock()


@contextmanager
def _una_head_in(modules: Sequence[ModuleType], **options: Any) -> Iterator[None]:
    """Let modules of TRL find add_una_head under the name of their own function."""
    with _swapping:
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


class UNADPOTrainer(_UnaHead, OnPairs, DPOTrainer):
    """TRL's DPOTrainer on the fused head; with an objective, on its pairs, labels and scores.

    objective: losses of pairs, labels and scores, in place of args.loss_type; labels and scores are
        read from the columns chosen_label, rejected_label, chosen_score and rejected_score, each of
        which may be missing, or None in a record. None: TRL's own losses
    una_pack, una_workspace_mb: as of patch_model
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective = objective
        if objective is None:
            super().__init__(*args, **kwargs)
            return
        # Before anything is loaded, and references are computed.
        given = inspect.signature(DPOTrainer).bind_partial(*args, **_theirs(kwargs)).arguments
        check_objective(objective, given.get("args") or DPOConfig())
        super().__init__(*args, **kwargs)
        self._take_feedback(FeedbackOfPairs(self.data_collator, objective))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        own = without_feedback(inputs)
        cached = self.precompute_ref_logps
        if not cached:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, own)
            own |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        recorder = _Recorder(model)
        # TRL's method computes its metrics, from the log-probs that the loss is then made of.
        self.precompute_ref_logps = True
        try:
            result = super()._compute_loss(recorder, own, return_outputs)
        finally:
            self.precompute_ref_logps = cached
        scored = recorder.first
        mask = inputs["completion_mask"][:, 1:]
        logps = scored.log_probs[:, -mask.shape[1] :].double().sum(1)
        ref_logps = torch.cat([own["ref_chosen_logps"], own["ref_rejected_logps"]])
        aux_loss = scored.aux_loss if self.aux_loss_enabled else None
        loss = self._loss_of_units(logps, ref_logps, inputs, aux_loss)
        return (loss, result[1]) if return_outputs else loss


def _theirs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for TRL's trainer, among further arguments of ours."""
    return {name: value for name, value in kwargs.items() if not name.startswith("una_")}


class _Recorder:
    """A model with a memory of the first call: TRL asks a second time for logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.first: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        self.first = outputs if self.first is None else self.first
        return outputs
