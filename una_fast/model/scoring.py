"""From a batch to log-probs or to the loss, through a policy: the fused head in the forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from una_fast.data.batch import Batch
from una_fast.data.split import split_batch
from una_fast.group import ALONE, Group
from una_fast.head.ops import linear_una_loss, sequence_logps
from una_fast.losses import Objective, UnaOutput
from una_fast.model.policy import Policy


def match_autocast(policy: Policy) -> None:
    """Let a frozen bf16 model compute as float32 weights of the same values under autocast.

    policy: changed in place

    Under autocast embeddings are float32, and with them the residual stream, as are the norms.
    """
    policy.causal_lm.get_input_embeddings().register_forward_hook(
        lambda module, given, out: out.float()
    )
    for module in policy.causal_lm.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2:
                setattr(module, name, nn.Parameter(p.detach().float(), p.requires_grad))


@dataclass(frozen=True)
class Scoring:
    """How heads are run."""

    workspace_mb: float | None = None
    """Workspace of the fused head in MiB, as in linear_una_loss."""
    engine: str = "auto"
    """Engine of the fused head, as in linear_una_loss."""
    autocast: torch.dtype | None = None
    """Autocast dtype of the model; default: the model computes in the dtype of its weights."""
    temperature: float = 1.0
    """Temperature that all log-probs are taken at."""
    group: Group = ALONE
    """Ranks that split the tokens of every batch among themselves; all of them get the batch."""

    def logps(self, policy: Policy, batch: Batch) -> Tensor:
        """Return the log-probs [S] float64 of the responses, sums over tokens, without gradient."""
        part = split_batch(batch, self.group)

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return sequence_logps(
                hidden,
                weight,
                part.targets,
                part.cu_seqlens,
                bias=bias,
                **self._head_options(policy, batch),
            )

        with torch.no_grad(), self.context(batch.input_ids.device):
            return policy.score(part, scorer, self.group)

    def loss(
        self,
        policy: Policy,
        batch: Batch,
        ref_logps: Tensor,
        objective: Objective,
        num_units: int | None = None,
    ) -> UnaOutput:
        """Return the loss of a batch; over a group equal on all ranks, with a part of the gradient.

        policy: is scored
        batch: tokens and feedback
        ref_logps: [S] float64, log-probs of the responses under the reference
        objective: forms of the losses
        num_units: divides the sum, the units of the global batch; default: the batch's own
        """
        part = split_batch(batch, self.group)

        def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> UnaOutput:
            return linear_una_loss(
                hidden,
                weight,
                part.targets,
                part.cu_seqlens,
                batch.feedback,
                objective=objective,
                ref_logps=ref_logps,
                bias=bias,
                num_units=num_units,
                **self._head_options(policy, batch),
            )

        with self.context(batch.input_ids.device):
            return policy.score(part, scorer, self.group)

    def _head_options(self, policy: Policy, batch: Batch) -> dict[str, Any]:
        return {
            "softcap": policy.head.softcap,
            "logit_scale": policy.head.logit_scale,
            "temperature": self.temperature,
            "workspace_mb": self.workspace_mb,
            "engine": self.engine,
            "group": self.group,
            "lengths": batch.cu_seqlens.diff(),
            "vocabulary": policy.vocabulary,
        }

    def context(self, device: torch.device) -> AbstractContextManager:
        """Return a context with autocast, where the policy needs it."""
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)
