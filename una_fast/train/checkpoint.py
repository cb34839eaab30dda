"""Checkpoints on a disk: what is in them, which are whole, and which are left over.

checkpoint-N/   weights (safetensors, Hugging Face form) and tokenizer: usable as a model by itself
                training/     optimizer state, random states of all ranks, and a reference that has
                              changed since the start: a safetensors file per rank (shards.py,
                              training_state.py)
                state.json    step, learning rate schedule, metrics not reported yet, the decisions
                              of the run, and the identity: reference, data and settings
                metrics.jsonl the metrics up to the step
                COMPLETE      the manifest: size and SHA-256 of every file (manifest.py)

A checkpoint is written aside as checkpoint-N.tmp, flushed to the disk, and renamed: a kill at any
instant leaves the checkpoints that were there before. Nothing in a checkpoint is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from una_fast.files import ASIDE
from una_fast.train.manifest import DamagedError, Manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Return everything named checkpoint-N in a directory, whole or not, in order of N."""
    by_step: dict[int, Path] = {}
    for path in output_dir.glob("checkpoint-*"):
        name = _NAME.fullmatch(path.name)
        if name is not None:
            by_step[int(name[1])] = path
    return [by_step[step] for step in sorted(by_step)]


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run with a readable manifest, oldest first."""
    found = []
    for path in all_checkpoints(output_dir):
        with contextlib.suppress(DamagedError):
            read_manifest(path)
            found.append(path)
    return found


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint; DamagedError for none, or for that of another step."""
    manifest = Manifest.read(checkpoint)
    if checkpoint.name != f"checkpoint-{manifest.step}":
        raise DamagedError(f"{checkpoint} is of step {manifest.step}; give it back its name")
    return manifest


def newest_whole(output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; None without any.

    output_dir: of the run
    say: told of every damaged checkpoint, by the file

    ValueError if there are checkpoints, and all of them are damaged.
    """
    checkpoints = all_checkpoints(output_dir)
    fault = ""
    for path in reversed(checkpoints):
        try:
            read_manifest(path).verify(path)
        except DamagedError as error:
            fault = str(error)
            say(f"{path.name} is damaged and not used: {fault}")
            continue
        if fault:
            say(f"going on from {path.name}, the newest whole checkpoint")
        return path
    if checkpoints:
        raise ValueError(
            f"{output_dir} has no whole checkpoint to resume from: {fault}. Restore it from a "
            "backup, or set another output_dir to start anew"
        )
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Remove the half-written and half-deleted directories that a killed run left behind.

    ValueError for a file or a link of such a name, which no run leaves.
    """
    for path in output_dir.glob(f"*{ASIDE}"):
        name = path.name.removesuffix(ASIDE)
        if not _NAME.fullmatch(name) and name != "model":
            continue
        if path.is_symlink() or not path.is_dir():
            raise ValueError(
                f"{path} is in the way: {name} is written there before it takes its name; move it "
                "away, or set another output_dir"
            )
        remove([path])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of state.json; ValueError, by the file, if it is none of ours."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_bytes())
        assert isinstance(state["step"], int)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} is not the state of a run ({type(error).__name__})") from None
    return state


def set_aside(path: Path, ending: str) -> Path:
    """Rename a file or directory to its name with an ending and a free number; return the name."""
    number = 1
    while (free := path.with_name(f"{path.name}{ending}-{number}")).exists():
        number += 1
    return path.rename(free)


def remove(directories: list[Path]) -> None:
    """Delete directories; one that a reader keeps open is left, with a warning."""
    for directory in directories:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("%s is not deleted: %s", directory, error)
