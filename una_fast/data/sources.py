"""Sources of records: files, directories and dataset names -> rows."""

from __future__ import annotations

import itertools
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from una_fast.checks import check_number
from una_fast.data.messages import RecordError, without_nulls
from una_fast.data.records import listed
from una_fast.data.settings import RecordOptions
from una_fast.data.strict_json import parse_strictly
from una_fast.printable import printable, shown

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# owner/name, as the hub spells it. A name without an owner may be one of the readers of `datasets`
# (csv, text, ...), which takes the rest of its settings for files to read.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
HUB_CONFIG = re.compile(r"[\w+=,@ -][\w.+=,@ -]{0,199}")

HUB_SECONDS = 5.0  # until a hub counts as out of reach

# Files by which a directory of `save_to_disk` is known: of several splits, or of one.
_SAVED = ("dataset_dict.json", "dataset_info.json")

# Cells of a CSV file that are text however they look; chats in them are JSON text, and so are the
# lists of the second line.
TEXT_CELLS = ("prompt", "chosen", "rejected", "completion", "conversations", "messages", "system")
TEXT_CELLS += ("tools", "chat_template_kwargs")
LIST_CELLS = ("completions", "scores", "ref_logps")

ROWS_AT_ONCE = 1024  # of a Parquet file in memory

LONGEST_LINE = 1 << 28  # bytes of a JSONL line: more is a damaged file, or not JSONL

_OF_CHATS = {"role", "from", "function"}  # keys by which a message or a tool is known

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclass
class Source:
    """A place of records: a file, a directory or a dataset.

    path: a .jsonl, .json, .csv or .parquet file, a directory of files (read in the order of names)
        or of a dataset that `save_to_disk` wrote, or the name of a dataset for `datasets`
        ("owner/name" or "owner/name:config")
    weight: how many times a record is seen in an epoch; the fractional part is drawn anew in every
        epoch
    split: the split of a dataset
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
        if not isinstance(self.path, (str, Path)) or not str(self.path).strip():
            raise ValueError(
                f"path={shown(self.path)} of a data source must be a file, a directory or the name "
                "of a dataset"
            )
        self.path = str(self.path)
        place = printable(self.path)
        if check_number(f"weight of {place}", self.weight) <= 0:
            raise ValueError(
                f"weight={self.weight} of {place} must be positive; "
                "remove the source to leave it out"
            )
        if not isinstance(self.split, str) or not self.split.strip():
            raise ValueError(
                f"split={shown(self.split)} of {place} must name a split, such as test"
            )
        if not isinstance(self.online, (bool, type(None))):
            raise ValueError(f"online={shown(self.online)} of {place} must be true or false")

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
            raise ValueError(f"data source {shown(entry)} must be a path or a mapping with a path")
        own = [f.name for f in fields(Source) if f.name != "options"]
        options = {f.name: getattr(defaults, f.name) for f in fields(RecordOptions)}
        known = [*own, *options]
        for key in entry:
            if key not in known:
                raise ValueError(
                    f"data source {shown(entry.get('path'))}: unknown key {shown(key)}; "
                    f"known keys: {', '.join(known)}"
                )
        if "path" not in entry:
            raise ValueError(f"data source {shown(entry)} has no path")
        options.update({key: value for key, value in entry.items() if key in options})
        try:
            resolved = RecordOptions(**options)
        except ValueError as error:
            raise ValueError(f"data source {shown(entry['path'])}: {error}") from None
        given = {key: value for key, value in entry.items() if key in own}
        return Source(**given, options=resolved)


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (origin, row) for every row of a source.

    origin: the place of the row for messages: "file.jsonl:LINE" with lines from 1,
        "file.parquet:ROW", "file.json:ROW", "file.csv:ROW" or "dataset[split]:ROW" with rows from 0
    row: a dict, the undecoded bytes of a JSONL line, or the RecordError of a row that cannot be
        decoded

    Raises ValueError for a path without data, and for files that cannot be read. Only regular files
    are read: a FIFO, a socket or a device could wait for ever, or never end.
    """
    path = Path(source.path)
    kind = _kind(path)
    if kind is None:
        yield from _read_dataset(source)
        return
    if kind == "directory" and any((path / name).is_file() for name in _SAVED):
        yield from _numbered(_load_saved(path, source.split), source)
        return
    if source.split != "train":
        raise ValueError(
            f"split={shown(source.split)} is for datasets, but {_place(path)} is a path; "
            "give the split's own files"
        )
    files = _data_files(path) if kind == "directory" else [path]
    for file in files:
        yield from _read_file(file, source.options.resolved().columns)


def _place(path: Path) -> str:
    """Return a path for messages and origins."""
    return printable(path, 4096)


def _kind(path: Path) -> str | None:
    """Return what a path leads to, such as "file" or "FIFO"; None where nothing is there.

    ValueError for a path that leads nowhere: a broken link, a circle of links, a closed directory.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ValueError(f"{_place(path)} is a symbolic link to nothing") from None
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{_place(path)} cannot be read: {printable(reason)}") from None
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def _data_files(directory: Path) -> list[Path]:
    with _readable(directory):
        paths = list(directory.iterdir())
    found = [path for path in sorted(paths) if not path.name.startswith((".", "_"))]
    files = [path for path in found if path.suffix in DATA_SUFFIXES]
    # Beside files of records a .json file is a description: a sidecar, a dataset's card.
    records = [path for path in files if path.suffix != ".json"] or files
    for path in records:
        _check_regular(path)
    if not records:
        raise ValueError(
            f"directory {_place(directory)} holds no data files ({_either(DATA_SUFFIXES)})"
        )
    return records


def _either(names: Sequence[str]) -> str:
    """Return names as a part of a message: "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _check_regular(path: Path) -> None:
    """Check that a path leads to a regular file; ValueError otherwise, by its kind."""
    kind = _kind(path)
    if kind != "file":
        raise ValueError(
            f"{_place(path)} is a {kind or 'path to nothing'}, and data is read from regular files "
            "alone; write it into a file, or give it another name"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error of the system into a ValueError that names the path."""
    try:
        yield
    except OSError as error:
        reason = printable(error.strerror or error)
        raise ValueError(f"{_place(path)} cannot be read: {reason}") from None


def _read_file(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, Any]]:
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(
            f"{_place(path)} is not a data file; its name must end in {_either(DATA_SUFFIXES)}"
        )
    _check_regular(path)
    with _readable(path), path.open("rb") as file:
        # Rows are yielded inside the block; an error of the reader's user does not come this way.
        if path.suffix == ".csv":
            yield from _read_csv(_place(path), file, columns)
        else:
            yield from _READERS[path.suffix](_place(path), file)


def _read_jsonl(place: str, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    for number in itertools.count(start=1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{place}:{number}: a line of more than {LONGEST_LINE >> 20} MiB is not a record; "
                "the file is damaged, or not JSONL"
            )
        if not line.isspace():
            yield f"{place}:{number}", line


def _read_json(place: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a list in a file, or of its lines."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start != b"[":
        yield from _read_jsonl(place, file)
        return
    content = file.read(LONGEST_LINE + 1)
    if len(content) > LONGEST_LINE:
        raise ValueError(
            f"{place} is a list of more than {LONGEST_LINE >> 20} MiB; write an object a line"
        )
    try:
        rows = parse_strictly(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    for number, row in enumerate(rows):
        yield f"{place}:{number}", row


def _read_csv(place: str, file: IO[bytes], columns: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table with a header: texts as they are, numbers and labels as such.

    columns: our field -> column of the data

    Lists in cells, such as chats, are JSON text.
    """
    import pyarrow
    from pyarrow import csv

    fields = {columns.get(name, name): name for name in (*TEXT_CELLS, *LIST_CELLS)}
    options = csv.ConvertOptions(
        column_types=dict.fromkeys(fields, pyarrow.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    lines = csv.ParseOptions(newlines_in_values=True)
    try:
        table = csv.read_csv(file, parse_options=lines, convert_options=options)
        rows = table.to_pylist()
    except Exception as error:  # Arrow has an error of its own for everything
        raise ValueError(f"{place} is not a CSV file: {printable(error)}") from None
    _refuse_twice(place, table.column_names)
    for number, row in enumerate(rows):
        yield f"{place}:{number}", _with_lists(row, fields)


def _with_lists(row: dict[str, Any], fields: dict[str, str]) -> dict[str, Any] | RecordError:
    """Return a row of a CSV file with the lists in its cells, or the error of a cell.

    fields: column of the data -> our field
    """
    for column in fields.keys() & row.keys():
        cell = row[column] or ""
        if not cell.startswith("[" if fields[column] in LIST_CELLS else "[{"):
            continue
        try:
            row[column] = parse_strictly(cell)
        except ValueError as error:
            return RecordError(f"{printable(column)}: {error}")
    return row


def _refuse_twice(place: str, names: list[str]) -> None:
    """Refuse a table with two columns of one name."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{place}: columns {listed(twice)} are given twice; rename one of each")


def _read_parquet(place: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        expected = table.metadata.num_rows
    except Exception as error:  # damage shows as any error of Arrow, of the system or of memory
        raise ValueError(f"{place} is not a Parquet file: {printable(error)}") from None
    _refuse_twice(place, names)
    number = 0
    for group in range(table.num_row_groups):
        for rows in _batches_of(table, group, f"{place}: row group {group}"):
            for row in rows:
                yield f"{place}:{number}", row
                number += 1
    if number != expected:
        raise ValueError(
            f"{place}: {number} rows were found, but its footer says {expected}; the file is "
            "damaged: write it anew"
        )


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _batches_of(table: Any, group: int, place: str) -> Iterator[list[Any]]:
    """Yield the rows of a row group of a ParquetFile in lists."""
    read = 0
    batches = table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group])
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else _rows_of(batch)
        except Exception as error:  # as above
            raise ValueError(
                f"{place} is damaged, at its row {read} or later ({printable(error)}); "
                "write the file anew"
            ) from None
        if batch is None:
            return
        read += len(rows)
        yield rows


def _rows_of(batch: Any) -> list[Any]:
    """Return the rows of a batch of Arrow as dicts, or as the RecordError of a row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond Python's
        rows = [_row_of(batch, k) for k in range(batch.num_rows)]
    return [_without_added_nulls(row) for row in rows]


def _row_of(batch: Any, k: int) -> dict[str, Any] | RecordError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[k].as_py()
        except (ValueError, OverflowError) as error:
            return RecordError(
                f"column {shown(name)} cannot be read ({printable(error)}); fix or remove the "
                "record"
            )
    return row


def _without_added_nulls(row: Any) -> Any:
    """Return a row of Arrow whose chat messages have the keys they were written with.

    Arrow gives every object the keys of all objects in its column, with null: a tool call would
    show the arguments of the others to the template. Null keys inside messages are dropped, those
    that were written as null too; null columns stay, and objects other than messages and tools.
    """
    if not isinstance(row, dict):
        return row
    return {name: _clean_messages(value) for name, value in row.items()}


def _clean_messages(value: Any) -> Any:
    if isinstance(value, list):
        return [_clean_messages(entry) for entry in value]
    if isinstance(value, dict) and not _OF_CHATS.isdisjoint(value):
        return without_nulls(value)
    return value


def _read_dataset(source: Source) -> Iterator[tuple[str, Any]]:
    problem = f"{shown(source.path)} is neither a file, a directory, nor a loadable dataset name"
    name, _, config = source.path.partition(":")
    # Anything else is refused at once: asking a hub for a missing path would only cost the timeouts
    # of its retries.
    known = HUB_NAME.fullmatch(name) and not name.endswith(DATA_SUFFIXES) and ".." not in name
    if not known or (config and not HUB_CONFIG.fullmatch(config)):
        raise ValueError(f"{problem} (owner/name or owner/name:config); check the path")
    split = shown(source.split)
    try:
        rows = _load_dataset(name, config or None, source.split)
    except Exception as error:  # the hub, the disk and the dataset's own code each raise their own
        raise ValueError(f"{problem} (split={split}): {printable(error)}") from error
    yield from _numbered(rows, source)


def _load_saved(path: Path, split: str) -> Any:
    """Return the dataset of a directory that `save_to_disk` wrote; of several splits, one."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise ValueError(f"{_place(path)} is no whole dataset: {printable(error)}") from error
    if not isinstance(found, datasets.DatasetDict):
        if split != "train":
            raise ValueError(f"{_place(path)} is a dataset without splits; remove split={split}")
        return found
    if split not in found:
        raise ValueError(
            f"{_place(path)} has no split {shown(split)}; set split to one of {listed(found)}"
        )
    return found[split]


def _numbered(dataset: Iterable[Any], source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (origin, row) for every row of a dataset."""
    place = printable(source.path)
    rows = iter(dataset)
    for number in itertools.count():
        origin = f"{place}[{printable(source.split)}]:{number}"
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            raise ValueError(f"{origin} cannot be read: {printable(error)}") from error
        if row is None:
            return
        yield origin, _without_added_nulls(row)


def _load_dataset(name: str, config: str | None, split: str) -> Any:
    """Return a split of a dataset, from the copy on this machine if the hub is out of reach."""
    import datasets

    with _offline_unless_reachable(name):
        return datasets.load_dataset(name, config, split=split)


@contextmanager
def _offline_unless_reachable(name: str) -> Iterator[None]:
    """Take the hub as offline, after one question about a dataset that it does not answer.

    Left alone, `datasets` asks again and again for half a minute.
    """
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        pass  # an answer, if a refusal, which `datasets` tells in its own words
    except Exception:  # no answer: every version of the client raises errors of another library
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
