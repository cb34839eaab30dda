"""From a batch to log-probs or to the loss, through a policy: the fused head inside the model's forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from una_fast.data.batch import Batch
from una_fast.head.ops import linear_una_loss, sequence_logps
from una_fast.losses import Objective, UnaOutput
from una_fast.model.policy import Policy

if TYPE_CHECKING:
    pass


def autocast_dtype(policy: Policy, compute: torch.dtype) -> torch.dtype | None:
    """The dtype to run a policy under autocast in: that of the computation where trained weights, adapters too, are in
    another; None where none is."""
    return compute if any(p.dtype != compute for p in policy.trainable_parameters()) else None


def match_autocast(policy: Policy) -> None:
    """Let a frozen model of bf16 weights compute what fp32 weights of the same values compute under autocast: there
    the embeddings, and with them the residual stream, are fp32, as are the norms."""
    policy.causal_lm.get_input_embeddings().register_forward_hook(
        lambda module, given, out: out.float()
    )
    for module in policy.causal_lm.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2:
                setattr(module, name, nn.Parameter(p.detach().float(), p.requires_grad))


@dataclass(frozen=True)
class Scoring:
    """How heads are run: workspace and engine (as in linear_una_loss), the autocast dtype of the model (None: the
    model computes in the dtype of its weights), and the temperature that all log-probs are taken at."""

    workspace_mb: float | None = None
    engine: str = "auto"
    autocast: torch.dtype | None = None
    temperature: float = 1.0

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """[S] float64 log-probs of the responses, sums over tokens, without gradient."""

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return sequence_logps(
                hidden,
                weight,
                batch.targets,
                batch.cu_seqlens,
                bias=bias,
                **self._head_options(policy),
            )

        with torch.no_grad(), self.context(batch.input_ids.device):
            return policy.score(batch, scorer)

    def loss(
        self,
        policy: Policy,
        batch: Batch,
        ref_logps: Tensor,
        objective: Objective,
        num_units: int | None = None,
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

        with self.context(batch.input_ids.device):
            return policy.score(batch, scorer)

    def _head_options(self, policy: Policy) -> dict[str, Any]:
        return {
            "softcap": policy.head.softcap,
            "logit_scale": policy.head.logit_scale,
            "temperature": self.temperature,
            "workspace_mb": self.workspace_mb,
            "engine": self.engine,
        }

    def context(self, device: torch.device) -> AbstractContextManager:
        """Autocast, where the policy needs it."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)
