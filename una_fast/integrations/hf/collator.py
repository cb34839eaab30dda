"""From records to the batches of a patched model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from una_fast.data.batch import collate
from una_fast.data.encode import Encoder
from una_fast.data.examples import Example
from una_fast.data.records import as_object, parse_record
from una_fast.data.settings import RecordOptions
from una_fast.data.units import record_feedback, score_offset
from una_fast.layout import IGNORED
from una_fast.losses import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FeedbackCollator:
    """Make {input_ids, attention_mask, labels, feedback} of records, or of Examples.

    A record has any form of docs/records.md: a pair, a label, a score, several scored completions.
    Rows of the batch are responses, record after record; `ref_logps` [B] joins where records have
    it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: RecordOptions | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Prepare to collate.

        tokenizer: of the model
        options: settings of the records; None: RecordOptions()
        objective: says which scores are allowed; None: Objective()

        ValueError for settings that need the scores of all records at once.
        """
        self.options = (options or RecordOptions()).resolved()
        self.require_unit_scores = (objective or Objective()).scores_in_unit_interval
        for name in ("score_map", "score_center"):
            value = getattr(self.options, name)
            if value in ("quantile", "dataset"):
                raise ValueError(
                    f"{name}={value} needs every record at once: collate Examples, from "
                    "una_fast.data.load_examples"
                )
        self.encoder = Encoder(tokenizer, self.options)
        self.pad_id = tokenizer.pad_token_id or 0

    def __call__(self, rows: Sequence[dict[str, Any] | Example]) -> dict[str, Any]:
        """Return a batch; ValueError for a malformed record, by its place in the batch."""
        examples = [self._example(row, place) for place, row in enumerate(rows)]
        batch = collate(examples, packed=False, pad_id=self.pad_id)
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels.view(-1)[batch.rows + 1] = batch.targets
        made = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": labels,
            "feedback": batch.feedback,
        }
        if batch.ref_logps is not None:
            made["ref_logps"] = batch.ref_logps
        return made

    def _example(self, row: dict[str, Any] | Example, place: int) -> Example:
        if isinstance(row, Example):
            return row
        origin = f"record {place} of the batch"
        try:
            record, _ = parse_record(
                as_object(row), self.options, require_unit_scores=self.require_unit_scores
            )
            encoded = self.encoder.encode(record)
            scores = record.scores or ()
            _, offset = score_offset(
                [scores],
                self.options,
                require_unit_scores=self.require_unit_scores,
                path=origin,
            )
            feedback, _ = record_feedback(record, scores, self.options, offset)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        return Example(
            encoded.prompt,
            encoded.responses,
            feedback,
            record.ref_logps,
            origin,
            scored=encoded.scored,
        )
