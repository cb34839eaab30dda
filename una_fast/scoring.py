"""From a batch to log-probs or to the loss, through a policy: the fused head inside the model's forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from una_fast.data import Batch
from una_fast.head import linear_una_loss, sequence_logps
from una_fast.losses import Objective, UnaOutput
from una_fast.policy import Policy

if TYPE_CHECKING:
    from una_fast.config import RunConfig


def run_dtypes(config: RunConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(of the computation, of the loaded weights) of a run: weights that are trained stay float32, while the frozen
    base under new adapters is loaded in the dtype of the computation."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    compute = torch.bfloat16 if bf16 else torch.float32
    return compute, compute if config.lora else torch.float32


@dataclass(frozen=True)
class Scoring:
    """How heads are run: workspace and engine (as in linear_una_loss), and the autocast dtype of the model (None: the
    model computes in the dtype of its weights)."""

    workspace_mb: float | None = None
    engine: str = "auto"
    autocast: torch.dtype | None = None

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """[S] float64 log-probs of the responses, sums over tokens, without gradient."""

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return sequence_logps(
                hidden, weight, batch.targets, batch.cu_seqlens, bias=bias, **self._head_options(policy)
            )

        with torch.no_grad(), self._autocast(batch):
            return policy.score(batch, scorer)

    def loss(
        self, policy: Policy, batch: Batch, ref_logps: Tensor, objective: Objective, num_units: int | None = None
    ) -> UnaOutput:
        """The loss of a batch against [S] reference log-probs, divided by `num_units` (the global batch's)."""

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> UnaOutput:
            return linear_una_loss(
                hidden,
                weight,
                batch.targets,
                batch.cu_seqlens,
                batch.feedback,
                objective=objective,
                ref_logps=ref_logps,
                bias=bias,
                num_units=num_units,
                **self._head_options(policy),
            )

        with self._autocast(batch):
            return policy.score(batch, scorer)

    def _head_options(self, policy: Policy) -> dict[str, Any]:
        return {
            "softcap": policy.head.softcap,
            "logit_scale": policy.head.logit_scale,
            "workspace_mb": self.workspace_mb,
            "engine": self.engine,
        }

    def _autocast(self, batch: Batch) -> AbstractContextManager:
        device = batch.input_ids.device.type
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)
