"""Labels and scores beside the pairs of a preference dataset, for an Objective in TRL's place."""

from __future__ import annotations

from typing import Any

from una_fast.feedback import Feedback
from una_fast.losses import Objective

POINT_COLUMNS = ("chosen_label", "rejected_label", "chosen_score", "rejected_score")


class FeedbackOfPairs:
    """A collator of TRL's preference batches [chosen | rejected], with the feedback beside."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        count = len(examples)
        units = [Feedback.pairs(range(count), range(count, 2 * count))]
        for column in POINT_COLUMNS:
            start = 0 if column.startswith("chosen") else count
            given = [i for i, example in enumerate(examples) if example.get(column) is not None]
            values = [examples[i][column] for i in given]
            make = Feedback.binary if column.endswith("label") else Feedback.scores
            units.append(make([start + i for i in given], values))
        return {**self.collator(examples), "feedback": Feedback.merge(units)}


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
