"""Sources of records: files, directories and dataset names -> rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from una_fast.checks import check_number
from una_fast.data.records import (
    RecordOptions,
)

if TYPE_CHECKING:
    pass


DATA_SUFFIXES = (".jsonl", ".parquet")

HUB_NAME = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)?")


@dataclass
class Source:
    """One place that records come from.

    path: a .jsonl or .parquet file, a directory of them (read in the order of their names), or the name of a dataset
    that `datasets` can load ("name" or "name:config"), of which `split` is read. weight: how many times each record
    is seen in an epoch; the fractional part is drawn anew in every epoch. online: whether its records are prompts that
    the policy answers, or None, as the mode of the run says.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    online: bool | None = None
    options: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)) or not str(self.path):
            raise ValueError(
                f"path={self.path!r} of a data source must be a file, a directory or a dataset name"
            )
        self.path = str(self.path)
        if check_number(f"weight of {self.path}", self.weight) <= 0:
            raise ValueError(
                f"weight={self.weight} of {self.path} must be positive; remove the source to leave it out"
            )
        if self.online not in (True, False, None):
            raise ValueError(f"online={self.online!r} of {self.path} must be true or false")

    @staticmethod
    def parse(entry: str | dict[str, Any], defaults: RecordOptions) -> Source:
        """A source from a configuration entry: a path, or a dict of path, weight, split, online and any field of
        `RecordOptions`, which then replaces the value in `defaults` for this source alone."""
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            raise ValueError(f"data source {entry!r} must be a path or a mapping with a path")
        own = [f.name for f in fields(Source) if f.name != "options"]
        options = {f.name: getattr(defaults, f.name) for f in fields(RecordOptions)}
        for key in entry:
            if key not in own and key not in options:
                raise ValueError(
                    f"data source {entry.get('path')!r}: unknown key {key!r}; known keys: {', '.join([*own, *options])}"
                )
        if "path" not in entry:
            raise ValueError(f"data source {entry} has no path")
        options.update({key: value for key, value in entry.items() if key in options})
        try:
            resolved = RecordOptions(**options)
        except ValueError as error:
            raise ValueError(f"data source {entry['path']!r}: {error}") from None
        return Source(**{key: entry[key] for key in own if key in entry}, options=resolved)


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(origin, row) of every row of a source; a row is a dict, or the undecoded bytes of a JSONL line.

    origin is "file.jsonl:LINE" with lines from 1, and "file.parquet:ROW" or "dataset[split]:ROW" with rows from 0.
    """
    path = Path(source.path)
    if path.exists() and source.split != "train":
        raise ValueError(
            f"split={source.split!r} is for dataset names, but {path} is a path; give the split's own files"
        )
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.suffix in DATA_SUFFIXES and p.name[0] not in "._"
        )
        if not files:
            raise ValueError(f"directory {path} holds no data files ({' or '.join(DATA_SUFFIXES)})")
        for file in files:
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    else:
        yield from _read_dataset(source)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from None
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}:{number}", row
                number += 1
    else:
        raise ValueError(
            f"{path} is not a data file; its name must end in {' or '.join(DATA_SUFFIXES)}"
        )


def _read_dataset(source: Source) -> Iterator[tuple[str, Any]]:
    problem = f"{source.path!r} is neither a file, a directory, nor a loadable dataset name"
    name, _, config = source.path.partition(":")
    # A missing path is refused at once: asking a hub for it would only cost the timeouts of its retries.
    if not HUB_NAME.fullmatch(name) or name.endswith(DATA_SUFFIXES):
        raise ValueError(f"{problem}; check the path")
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:  # the hub, the disk and the dataset's own code each raise their own
        raise ValueError(f"{problem} (split={source.split!r}): {error}") from error
    for number, row in enumerate(rows):
        yield f"{source.path}[{source.split}]:{number}", row
