"""Sources of records: files, directories and dataset names -> rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from una_fast.checks import check_number
from una_fast.data.settings import RecordOptions

DATA_SUFFIXES = (".jsonl", ".parquet")

HUB_NAME = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)?")

ROWS_AT_ONCE = 1024  # of a Parquet file in memory


@dataclass
class Source:
    """A place of records: a file, a directory or a dataset.

    path: a .jsonl or .parquet file, a directory of files (read in the order of names), or the name
        of a dataset for `datasets` ("name" or "name:config")
    weight: how many times a record is seen in an epoch; the fractional part is drawn anew in every
        epoch
    split: the split of a dataset name
    online: whether the policy answers the prompts of the records; None follows the run's mode
    options: how the records become feedback

    Raises ValueError for unusable values.
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
                f"weight={self.weight} of {self.path} must be positive; "
                "remove the source to leave it out"
            )
        if self.online not in (True, False, None):
            raise ValueError(f"online={self.online!r} of {self.path} must be true or false")

    @staticmethod
    def parse(entry: str | dict[str, Any], defaults: RecordOptions) -> Source:
        """Build a source from an entry of the `data` setting.

        entry: a path, or a dict of path, weight, split, online and any field of `RecordOptions`,
            such as {"path": "pairs.jsonl", "weight": 0.5, "max_tokens": 4096}
        defaults: record options of the run, for the fields left out of the entry

        Raises ValueError for an unknown key, a missing path, or an unusable value.
        """
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            raise ValueError(f"data source {entry!r} must be a path or a mapping with a path")
        own = [f.name for f in fields(Source) if f.name != "options"]
        options = {f.name: getattr(defaults, f.name) for f in fields(RecordOptions)}
        known = [*own, *options]
        for key in entry:
            if key not in known:
                raise ValueError(
                    f"data source {entry.get('path')!r}: unknown key {key!r}; "
                    f"known keys: {', '.join(known)}"
                )
        if "path" not in entry:
            raise ValueError(f"data source {entry} has no path")
        options.update({key: value for key, value in entry.items() if key in options})
        try:
            resolved = RecordOptions(**options)
        except ValueError as error:
            raise ValueError(f"data source {entry['path']!r}: {error}") from None
        given = {key: value for key, value in entry.items() if key in own}
        return Source(**given, options=resolved)


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (origin, row) for every row of a source.

    origin: the place of the row for messages: "file.jsonl:LINE" with lines from 1,
        "file.parquet:ROW" or "dataset[split]:ROW" with rows from 0
    row: a dict, or the undecoded bytes of a JSONL line

    Raises ValueError for a path without data.
    """
    path = Path(source.path)
    if path.exists() and source.split != "train":
        raise ValueError(
            f"split={source.split!r} is for dataset names, but {path} is a path; "
            "give the split's own files"
        )
    if path.is_dir():
        for file in _data_files(path):
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    else:
        yield from _read_dataset(source)


def _data_files(directory: Path) -> list[Path]:
    files = []
    for path in directory.iterdir():
        hidden = path.name.startswith((".", "_"))
        if path.suffix in DATA_SUFFIXES and not hidden:
            files.append(path)
    if not files:
        suffixes = " or ".join(DATA_SUFFIXES)
        raise ValueError(f"directory {directory} holds no data files ({suffixes})")
    return sorted(files)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise ValueError(
            f"{path} is not a data file; its name must end in {' or '.join(DATA_SUFFIXES)}"
        )


def _read_jsonl(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    number = 0
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield f"{path}:{number}", row
            number += 1


def _read_dataset(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    problem = f"{source.path!r} is neither a file, a directory, nor a loadable dataset name"
    name, _, config = source.path.partition(":")
    # A missing path is refused at once: asking a hub for it would only cost the timeouts of its
    # retries.
    if not HUB_NAME.fullmatch(name) or name.endswith(DATA_SUFFIXES):
        raise ValueError(f"{problem}; check the path")
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:  # the hub, the disk and the dataset's own code each raise their own
        raise ValueError(f"{problem} (split={source.split!r}): {error}") from error
    for number, row in enumerate(rows):
        yield f"{source.path}[{source.split}]:{number}", row
