"""The output directory of a run: one run at a time, and nothing of an earlier run overwritten."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from una_fast.files import named_in_errors
from una_fast.printable import printable
from una_fast.train.checkpoint import (
    all_checkpoints,
    newest_whole,
    read_state,
    remove_leftovers,
    set_aside,
)
from una_fast.train.manifest import MARKER, DamagedError, Manifest

LOCK = ".run.lock"
LINES = ("metrics.jsonl", "completions.jsonl")


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Create an output directory, and keep other runs out of it inside the block.

    The system gives the lock back when the process ends, however it ends: a lock is never stale.
    Where a file system has no locks, the process that the lock file names must be alive.
    ValueError if another run holds it, or if the directory cannot be written in.
    """
    path = output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir} is not a directory to write in: "
            f"{error.strerror or error}; set another"
        ) from error
    with file:
        _lock(file, output_dir)
        with named_in_errors(path):
            _write_holder(file)
        # The file stays, unlocked: another run may have opened it already.
        yield


def _write_holder(file: IO[str]) -> None:
    """Write this process into the lock file, for the messages of other runs."""
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()


def _lock(file: IO[str], output_dir: Path) -> None:
    """Lock a file of this process, or refuse by the process that has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except OSError as error:
        # Some network file systems have no locks: the pid in the file has to do there.
        is_held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    file.seek(0)
    holder: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        holder = json.loads(file.read())
    host, pid = holder.get("host"), holder.get("pid")
    elsewhere = host != socket.gethostname()
    if is_held or (holder and (elsewhere or _is_alive(pid))):
        raise ValueError(
            f"output_dir={output_dir} is in use by another run (process {printable(pid)} on "
            f"{printable(host)}); wait for it, or set another output_dir"
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def find_checkpoint(output_dir: Path, *, resume: bool, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that a run goes on from; None to start at the first step.

    output_dir: of the run, locked
    resume: the setting
    say: told of damaged checkpoints

    ValueError if the directory holds an earlier run and the run does not resume, and if a
    checkpoint's name is taken by something else.
    """
    for path in all_checkpoints(output_dir):
        if path.is_symlink() or not path.is_dir():
            raise ValueError(
                f"{path} has the name of a checkpoint and is no directory of a run; move it away, "
                "or set another output_dir"
            )
    used = (output_dir / "metrics.jsonl").exists() or bool(all_checkpoints(output_dir))
    if used and not resume:
        raise ValueError(
            f"{output_dir} holds an earlier run; set resume=true to continue it, "
            "or another output_dir"
        )
    remove_leftovers(output_dir)
    return newest_whole(output_dir, say) if resume else None


def finished_run(output_dir: Path, say: Callable[[str], None]) -> Manifest | None:
    """Return the manifest of a run that ended, if its model is still as it was written.

    output_dir: of the run
    say: told of a damaged model
    """
    if not (output_dir / MARKER).exists():
        return None
    try:
        manifest = Manifest.read(output_dir)
        manifest.verify(output_dir)
    except DamagedError as error:
        say(f"the model of the finished run is damaged, and is made again: {error}")
        return None
    return manifest


def line_sizes(output_dir: Path) -> dict[str, int]:
    """Return the bytes of the files of lines, for state.json."""
    sizes = {}
    for name in LINES:
        path = output_dir / name
        sizes[name] = path.stat().st_size if path.exists() else 0
    return sizes


def rewind_lines(output_dir: Path, checkpoint: Path | None, say: Callable[[str], None]) -> None:
    """Take the files of lines back to a checkpoint; without one, move those of earlier runs away.

    output_dir: of the run
    checkpoint: a verified checkpoint
    say: told of a file that is not what the checkpoint knows

    Lines of steps that are taken again are cut off at the end. Metrics that are shorter than at the
    checkpoint, or others, are restored from the checkpoint; what was there is moved away.
    """
    if checkpoint is None:
        for name in LINES:
            path = output_dir / name
            if path.exists() and path.stat().st_size:
                say(f"{path.name} of an earlier start is now {set_aside(path, '.old').name}")
        return
    sizes = read_state(checkpoint)["lines"]
    metrics = output_dir / "metrics.jsonl"
    known = b""
    if sizes[metrics.name]:
        known = (checkpoint / metrics.name).read_bytes()
    if not _starts_with(metrics, known):
        moved = ""
        if metrics.exists():
            moved = f"; what was there is now {set_aside(metrics, '.damaged').name}"
        say(f"{metrics} is not what {checkpoint.name} knows, and was restored from it{moved}")
        shutil.copyfile(checkpoint / metrics.name, metrics)
    _cut(metrics, len(known))
    completions = output_dir / "completions.jsonl"
    missing = sizes[completions.name] - line_sizes(output_dir)[completions.name]
    if missing > 0:
        say(f"{completions} is {missing} bytes shorter than at {checkpoint.name}: lines are lost")
    _cut(completions, sizes[completions.name])


def _starts_with(path: Path, known: bytes) -> bool:
    if not path.exists():
        return not known
    with path.open("rb") as file:
        return file.read(len(known)) == known


def _cut(path: Path, size: int) -> None:
    """Cut a file at a size, if it is longer."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
