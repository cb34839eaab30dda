"""The manifest of a directory: every file with its size and SHA-256, bound to a step and a run.

A directory with a manifest was written to the end. `verify` reads all of its bytes before anything
else does, so that a flipped bit, a cut file or a file of another checkpoint is found by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from una_fast.files import sha256_of, write_json

MARKER = "COMPLETE"  # the manifest's file; a directory without it is not whole

THREADS = 8  # files hashed and flushed at once; both leave Python's lock to others

# Files that a loader takes by their names alone: one more of them would change what is loaded.
_LOADED = ("*.safetensors", "*.bin", "adapter_config.json")


class DamagedError(ValueError):
    """A file of a directory is not as its manifest says."""


@dataclass(frozen=True)
class Manifest:
    """What a directory holds.

    step: optimizer steps taken
    run: identity of the run: name -> value
    files: path below the directory -> {"bytes": size, "sha256": hash}
    result: last metrics of a finished run
    """

    step: int
    run: dict[str, Any]
    files: dict[str, dict[str, Any]]
    result: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write the manifest: from here on the directory is whole."""
        content = asdict(self)
        write_json(directory / MARKER, {"manifest": content, "sha256": _hash(content)})

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Read the manifest of a directory; DamagedError if there is none, or a damaged one."""
        path = directory / MARKER
        try:
            read = json.loads(path.read_bytes())
            content = read["manifest"]
            if read["sha256"] != _hash(content):
                raise DamagedError(f"{path} is damaged: its content has another SHA-256")
            return Manifest(**content)
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing: the directory is not whole") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(f"{path} is no manifest ({type(error).__name__})") from None

    def verify(self, directory: Path) -> None:
        """Compare all files of a directory with the manifest; DamagedError by the file's name.

        A file that cannot be read is damaged, too.
        """
        try:
            self._compare(directory)
        except OSError as error:
            raise DamagedError(f"{error.filename or directory} cannot be read: {error}") from None

    def _compare(self, directory: Path) -> None:
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                raise DamagedError(f"{path} is missing")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise DamagedError(
                    f"{path} has {size} bytes, and was written with {entry['bytes']}"
                )
        for pattern in _LOADED:
            for path in directory.glob(pattern):
                if path.name not in self.files:
                    raise DamagedError(f"{path} was not written by the run; move it away")
        hashes = hash_files(directory, self.files)
        for name, entry in hashes.items():
            if entry["sha256"] != self.files[name]["sha256"]:
                raise DamagedError(
                    f"{directory / name} has another SHA-256 than when it was written"
                )


def hash_files(
    directory: Path, names: Iterable[str], *, flush: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {"bytes": size, "sha256": hash} of files, by their names.

    directory: the names are below it
    flush: flush every file to the disk too
    """

    def entry(name: str) -> dict[str, Any]:
        path = directory / name
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}

    def flushed(name: str) -> None:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())

    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        # The disk works on a file while a core hashes it.
        flushes = [pool.submit(flushed, name) for name in names if flush]
        entries = dict(zip(names, pool.map(entry, names), strict=True))
        for done in flushes:
            done.result()
    return entries


def files_below(directory: Path) -> list[str]:
    """Return the paths of all files below a directory, relative to the directory."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file() and path.name != MARKER:
            found.append(path.relative_to(directory).as_posix())
    return sorted(found)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
