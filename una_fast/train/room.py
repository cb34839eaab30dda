"""Room on a disk: looked at before something is written, and told after a failure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from una_fast.config import RunConfig
from una_fast.model.policy import Policy
from una_fast.train.checkpoint import complete_checkpoints


class SaveError(ValueError):
    """A checkpoint or a model could not be written; nothing half-written remains."""


def is_of_disk(error: Exception) -> bool:
    """Return whether an error is the disk's: writers in Rust raise their own classes."""
    return isinstance(error, OSError) or "os error" in str(error)


def not_written(what: str, reason: object, output_dir: Path, needed: int) -> SaveError:
    """Return the error that says what was not written, and how the run goes on.

    what: a checkpoint, or the model
    reason: the disk's words
    output_dir: of the run
    needed: bytes
    """
    whole = complete_checkpoints(output_dir)
    newest = f"{whole[-1].name} is the newest checkpoint" if whole else "there is no checkpoint yet"
    return SaveError(
        f"{what} was not written: {reason}; it needs {in_words(needed)}, and {output_dir} has "
        f"{in_words(_free(output_dir))} of free space. Nothing half-written remains, and {newest}; "
        "make room, and set resume=true to go on"
    )


def refuse_full_disk(what: str, output_dir: Path, needed: int) -> None:
    """Raise SaveError where a disk has no room for something to be written.

    what, output_dir, needed: as for `not_written`
    """
    if _free(output_dir) < needed:
        raise not_written(what, "No space on the disk", output_dir, needed)


def tell_of_little_room(
    output_dir: Path, policy: Policy, config: RunConfig, say: Callable[[str], None]
) -> None:
    """Say before the first step that a run will not find room for what it is going to write.

    output_dir: of the run
    policy: of the run
    config: settings of the run
    say: told where the room is short

    The count is of weights and of two moments each: 8 bytes, or 2 in 8 bits.
    """
    saved = [p for p in policy.model.parameters() if p.requires_grad or not policy.is_adapter]
    weights = sum(p.numel() * p.element_size() for p in saved)
    moments = 2 if config.optimizer == "adamw_8bit" else 8
    state = sum(p.numel() * moments for p in policy.trainable_parameters())
    there = len(complete_checkpoints(output_dir))
    # One more than are kept: the oldest is deleted when the newest is whole.
    coming = max(config.keep_checkpoints + 1 - there, 1) if config.save_every else 0
    needed = coming * (weights + state) + weights
    if _free(output_dir) < needed:
        say(
            f"{output_dir} has {in_words(_free(output_dir))} of free space; {coming} checkpoints "
            f"and the model will take about {in_words(needed)}: make room, or lower "
            f"keep_checkpoints={config.keep_checkpoints}"
        )


def in_words(count: int) -> str:
    """Return a number of bytes as GB or MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free
