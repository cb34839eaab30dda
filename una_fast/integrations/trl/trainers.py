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

from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOConfig, KTOTrainer, RLOOTrainer

from una_fast.integrations.trl.head import SEAM, add_una_head
from una_fast.integrations.trl.objective import (
    OnFeedback,
    OnLabels,
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
        if "objective" in kwargs:
            raise ValueError(
                f"{type(self).__name__} keeps TRL's losses; objective= is for UNADPOTrainer and "
                "UNAKTOTrainer"
            )
        names = {kind.__module__ for kind in type(self).__mro__}
        loaded = [importlib.import_module(name) for name in names if name.startswith("trl.")]
        modules = [module for module in loaded if hasattr(module, SEAM)]
        with _una_head_in(modules, pack=una_pack, workspace_mb=una_workspace_mb):
            super().__init__(*args, **kwargs)


class UNAGRPOTrainer(_UnaHead, GRPOTrainer):
    """TRL's GRPOTrainer on the fused head."""


class UNARLOOTrainer(_UnaHead, RLOOTrainer):
    """TRL's RLOOTrainer on the fused head."""


class _OnObjective(_UnaHead, OnFeedback):
    """A trainer of TRL that is built with our head, and may have an objective for its loss."""

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective = objective
        if objective is not None:
            # Before anything is loaded, and references are computed.
            given = inspect.signature(self.theirs).bind_partial(*args, **_theirs(kwargs)).arguments
            check_objective(objective, given.get("args") or self.config(), self.settings)
        super().__init__(*args, **kwargs)
        if objective is not None:
            self._take_feedback()

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Compute TRL's reference log-probs; with an objective, sums in float64."""
        if self.objective is not None:
            model = _Exact(model)
        return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        own = without_feedback(inputs)
        cached = self.precompute_ref_logps
        if not cached:
            reference = self.model if self.ref_model is None else self.ref_model
            own |= zip(self.references, self.compute_ref_log_probs(reference, own), strict=True)
        exact = _Exact(model)
        # TRL's method computes its metrics, from the log-probs that the loss is then made of.
        self.precompute_ref_logps = True
        try:
            result = super()._compute_loss(exact, own, return_outputs)
        finally:
            self.precompute_ref_logps = cached
        scored = exact.outputs[self._calls_before()]
        # Without the virtual tokens in front.
        logps = scored.log_probs[:, 1 - inputs["input_ids"].shape[1] :].sum(1)
        aux_loss = scored.aux_loss if self.aux_loss_enabled else None
        loss = self._loss_of_units(logps, self._ref_logps(own), inputs, aux_loss)
        return (loss, result[1]) if return_outputs else loss

    def _calls_before(self) -> int:
        """Return how often TRL's loss calls the policy before it scores the completions."""
        return 0


class UNADPOTrainer(_OnObjective, OnPairs, DPOTrainer):
    """TRL's DPOTrainer on the fused head; with an objective, on its pairs, labels and scores.

    objective: losses of pairs, labels and scores, in place of args.loss_type; labels and scores are
        read from the columns chosen_label, rejected_label, chosen_score and rejected_score, each of
        which may be missing, or None in a record. None: TRL's own losses
    una_pack, una_workspace_mb: as of patch_model
    """

    theirs, config = DPOTrainer, DPOConfig


class UNAKTOTrainer(_OnObjective, OnLabels, KTOTrainer):
    """TRL's KTOTrainer on the fused head; with an objective, on its labels.

    objective: loss of labels, in place of args.loss_type, with the weights desirable_weight and
        undesirable_weight. None: TRL's own losses
    una_pack, una_workspace_mb: as of patch_model
    """

    theirs, config = KTOTrainer, KTOConfig

    def _calls_before(self) -> int:
        return 1 if self.calculate_KL else 0  # other completions, for the estimate of the KL


def _theirs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for TRL's trainer, among further arguments of ours."""
    return {name: value for name, value in kwargs.items() if not name.startswith("una_")}


class _Exact:
    """A model whose log-probs are float64, for sums without rounding; remembers its outputs."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.outputs: list[Any] = []

    def __call__(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs)
        if kwargs.get("fused_lm_head"):  # and no call for logits, for compute_metrics
            output.log_probs = output.log_probs.double()
        self.outputs.append(output)
        return output
