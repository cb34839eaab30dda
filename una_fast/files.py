"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK = 2**22  # bytes read at a time

ASIDE = ".tmp"  # suffix of files and directories that are not whole yet


@contextmanager
def written_whole(path: Path, mode: int = 0o666) -> Iterator[IO[str]]:
    """Open a UTF-8 file for writing that takes its name at the end, when every byte is on the disk.

    path: the file; an older one is replaced in the same instant
    mode: permissions of the new file, before the umask

    After an error, or a kill, the older file is untouched; after an error nothing else remains.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        aside.unlink(missing_ok=True)  # of a kill: its permissions would stay
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with named_in_errors(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Name a file in the OSErrors of a block that writes it: a full disk gives none by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file, whole or not at all; see `written_whole`."""
    with written_whole(path, mode) as file:
        file.write(text)


def write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    """Write a value as JSON, whole or not at all; see `written_whole`."""
    write_text(path, json.dumps(value, indent=1) + "\n", mode)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk: new files, removals, renames."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # Not mapped: a page that the disk cannot give would end the process without a word.
        buffer = memoryview(bytearray(BLOCK))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
