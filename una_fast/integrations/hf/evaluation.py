"""Evaluation on ranks: full batches for all of them, and every record counted once.

All ranks take part in every forward, so each needs a batch, and accelerate repeats the first
records to fill the last batches. Here fillers, which no metric counts, stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

UNCOUNTED = "uncounted"  # of a batch: made of a filler, for the ranks to keep step


@dataclass(frozen=True)
class Filler:
    """A place in a batch without a record of its own.

    record: any record, for a batch of fillers alone
    """

    record: Any


class Filled(Dataset):
    """Records, and fillers up to full batches."""

    def __init__(self, records: Any, multiple: int) -> None:
        """Hold records.

        records: dataset with a length
        multiple: records of a batch on all ranks together
        """
        self.records = records
        self.multiple = multiple

    def __len__(self) -> int:
        """Return the places: a multiple."""
        return len(self.records) + -len(self.records) % self.multiple

    def __getitem__(self, place: int) -> Any:
        """Return a record or a filler."""
        if place < len(self.records):
            return self.records[place]
        return Filler(self.records[0])


class FilledStream(IterableDataset):
    """Records of a stream, and fillers up to full batches."""

    def __init__(self, records: Any, multiple: int) -> None:
        """Hold a stream. records: to iterate over; multiple: as in Filled"""
        self.records = records
        self.multiple = multiple

    def __iter__(self) -> Iterator[Any]:
        """Yield the records, then the fillers."""
        count = 0
        record = None
        for record in self.records:
            count += 1
            yield record
        for _ in range(-count % self.multiple):
            yield Filler(record)


def filled(records: Any, multiple: int) -> Filled | FilledStream:
    """Return a dataset with fillers. records, multiple: as in Filled"""
    kind = FilledStream if isinstance(records, IterableDataset) else Filled
    return kind(records, multiple)


@dataclass(frozen=True)
class RecordsAlone:
    """A collator that leaves fillers out, and marks the batch of a rank that has nothing else.

    collate: from records to a batch
    """

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch of the records among some rows."""
        records = [row for row in rows if not isinstance(row, Filler)]
        if records:
            return self.collate(records)
        return {**self.collate([rows[0].record]), UNCOUNTED: True}
