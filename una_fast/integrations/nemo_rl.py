"""UNA inside NeMo-RL: a loss function of the sequence level, in place of DPOLossFn.

    from una_fast.integrations.nemo_rl import UNALoss
    loss_fn = UNALoss(Objective(beta=0.1))                       # pairs, in nemo_rl.algorithms.dpo
    loss_fn = UNALoss(Objective(score="reward_mse"), "scores", column="advantages",
                      rolled_reference=False)                    # in nemo_rl.algorithms.grpo

NeMo-RL computes the log-probs of the next tokens and hands them to the loss with the columns of a
micro-batch. It averages gradients over ranks after it has multiplied the loss by their number, and
gives the number of valid sequences of the global batch: the sum of a micro-batch is divided by the
units of the global batch, which are half as many where units are pairs.

A trap in the columns: DPO's loop shifts `reference_policy_logprobs` by one, to the position before
the token as in `next_token_logprobs`; GRPO's loop does not. Nothing in the data tells them apart.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.integrations.responses import one_per_response, response_sums
from una_fast.integrations.versions import TESTED, check_version
from una_fast.losses import Objective, UnaOutput, una_loss

KINDS = ("pairs", "binary", "scores")
# Columns of a micro-batch: NeMo-RL's, and by kind ours.
_THEIRS = ("token_mask", "sample_mask", "reference_policy_logprobs")
_OPTIONAL = {
    "pairs": ("una_weight", "una_margin", "una_target"),
    "binary": ("una_weight", "una_offset"),
    "scores": ("una_weight", "una_offset"),
}
_INTERFACES = "nemo_rl.algorithms.loss.interfaces"


class UNALoss:
    """NeMo-RL's LossFunction with the UNA loss.

    Columns of a micro-batch of B rows: `token_mask` [B, T], `sample_mask` [B],
    `reference_policy_logprobs` [B, T], and for labels and scores the column named by `column`, [B]
    or [B, T] with the same number for all tokens of a response. Optional columns, [B], are
    `una_weight`, for pairs `una_margin` and `una_target`, for labels and scores `una_offset`; pairs
    read the chosen row. A further column with a name una_... is an error.
    """

    def __init__(
        self,
        objective: Objective | None = None,
        kind: str = "pairs",
        *,
        column: str = "una_value",
        rolled_reference: bool = True,
    ) -> None:
        """Take the loss and the meaning of the columns.

        objective: forms and beta; default: Objective()
        kind: "pairs", rows 2k chosen and 2k + 1 rejected; "binary", a label per row; "scores"
        column: of labels or scores
        rolled_reference: whether `reference_policy_logprobs` stands before its token, as in
            NeMo-RL's DPO; False: at its token, as in GRPO
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        check_version("nemo_rl")
        self.objective = objective or Objective()
        self.kind = kind
        self.column = column
        self.rolled_reference = rolled_reference
        try:
            interfaces = importlib.import_module(_INTERFACES)
        except ImportError as error:
            raise ImportError(
                f"this NeMo-RL has no {_INTERFACES}; install one that una_fast was tested with: "
                f"{TESTED['nemo_rl'].releases}"
            ) from error
        self.loss_type = interfaces.LossType.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        normalizer = getattr(interfaces, "MetricNormalizer", None)
        if normalizer is not None:  # after 0.7
            by_units = dict.fromkeys(_METRICS[kind], normalizer.SEQUENCES)
            self.metric_normalizations = by_units | {"num_valid_samples": normalizer.NONE}

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the loss of a micro-batch, [] in the dtype of the log-probs, and its metrics.

        next_token_logprobs: [B, T - 1], carries the gradient; of token t + 1 at position t
        data: columns of the micro-batch
        global_valid_seqs: [] rows of the global batch with a sample mask
        global_valid_toks: [] tokens of the global batch, which no loss of sequences is divided by

        ValueError for a missing column, a column una_... left unread, different shapes, and an odd
        number of rows of pairs.
        """
        self._check_columns(data)
        mask = data["token_mask"][:, 1:]
        reference = data["reference_policy_logprobs"]
        reference = reference[:, :-1] if self.rolled_reference else reference[:, 1:]
        feedback = self._feedback(data, mask)
        rows_per_unit = 2 if self.kind == "pairs" else 1
        units = torch.as_tensor(global_valid_seqs).double().clamp_min(1) / rows_per_unit
        out = una_loss(
            response_sums(next_token_logprobs, mask),
            response_sums(reference, mask),
            feedback,
            objective=self.objective,
            num_units=units,
            lengths=mask.bool().sum(1).clamp_min(1),
        )
        metrics = self._metrics(out, feedback, units)
        return out.loss.to(next_token_logprobs.dtype), metrics

    def _check_columns(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError for missing columns, and for columns una_... left unread."""
        has_values = self.kind != "pairs"
        missing = [name for name in _THEIRS if name not in data]
        if missing:
            raise ValueError(
                f"the data has no column {missing[0]!r}, of the loop of NeMo-RL; it has "
                f"{', '.join(sorted(data))}"
            )
        if has_values and self.column not in data:
            raise ValueError(
                f"the data has no column {self.column!r} with the {self.kind}; set column to one "
                f"of {', '.join(sorted(data))}"
            )
        read = {*_OPTIONAL[self.kind], *([self.column] if has_values else [])}
        unread = sorted(name for name in data if name.startswith("una_") and name not in read)
        if unread:
            raise ValueError(
                f"kind={self.kind!r} does not read the column {unread[0]!r}, only "
                f"{', '.join(sorted(read))}; leave the column out, or set kind or column"
            )

    def _feedback(self, data: Mapping[str, Any], mask: Tensor) -> Feedback:
        """Return the units of a micro-batch."""
        rows = mask.shape[0]
        weight = data["sample_mask"].double()
        if "una_weight" in data:
            weight = weight * data["una_weight"]
        if self.kind == "pairs":
            if rows % 2:
                raise ValueError(
                    f"a micro-batch of {rows} rows holds half a pair: rows 2k and 2k + 1 are "
                    "chosen and rejected; keep micro-batches even and sequence packing off"
                )
            chosen = torch.arange(0, rows, 2)
            given = {
                name: data[f"una_{name}"][::2]
                for name in ("margin", "target")
                if f"una_{name}" in data
            }
            return Feedback.pairs(chosen, chosen + 1, weight=weight[::2], **given)
        build = Feedback.binary if self.kind == "binary" else Feedback.scores
        value = self._values(data, mask)
        return build(torch.arange(rows), value, weight=weight, offset=data.get("una_offset"))

    def _values(self, data: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return the labels or scores, [B]."""
        values = torch.as_tensor(data[self.column])
        if values.dim() == 1:
            return values
        hint = "choose a column with one number per response"
        return one_per_response(self.column, values[:, 1:], mask, hint)

    def _metrics(self, out: UnaOutput, feedback: Feedback, units: Tensor) -> dict[str, Any]:
        """Return NeMo-RL's metrics: sums over the units of the micro-batch / units of all.

        NeMo-RL adds them up over micro-batches and ranks. As in its DPO, `rewards_chosen_mean` and
        `rewards_rejected_mean` are log-ratios, not yet multiplied by beta.
        """
        valid = (feedback.weight > 0).to(out.rewards.device)
        ratios = out.rewards / self.objective.beta

        def mean(values: Tensor) -> float:
            return ((values * valid).sum() / units.to(values.device)).item()

        metrics = {"loss": out.loss.item(), "num_valid_samples": int(valid.sum())}
        if self.kind == "pairs":
            chosen, rejected = ratios[::2], ratios[1::2]
            return metrics | {
                "preference_loss": metrics["loss"],
                "sft_loss": 0.0,  # UNA has no such term; NeMo-RL's DPO loop reports it
                "accuracy": mean((chosen > rejected).double()),
                "rewards_chosen_mean": mean(chosen),
                "rewards_rejected_mean": mean(rejected),
            }
        return metrics | {"rewards_mean": mean(ratios)}


_METRICS = {
    "pairs": (
        "loss",
        "preference_loss",
        "sft_loss",
        "accuracy",
        "rewards_chosen_mean",
        "rewards_rejected_mean",
    ),
    "binary": ("loss", "rewards_mean"),
    "scores": ("loss", "rewards_mean"),
}
