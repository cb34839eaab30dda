"""Write the checkpoints of a run, in the foreground or in the background, and its final model.

Weights, optimizer and state are written aside, hashed, flushed to the disk, and take their name
when every rank has written its files: checkpoint.py says what is where.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from una_fast.distributed import World
from una_fast.files import ASIDE, sync_directory
from una_fast.model.export import save_pretrained
from una_fast.model.policy import Policy
from una_fast.model.sharded_export import Part, gather_part, remove_other_weights, save_part
from una_fast.model.whole_weights import whole_weights
from una_fast.train.checkpoint import complete_checkpoints, read_manifest, remove, set_aside
from una_fast.train.manifest import MARKER, DamagedError, Manifest, files_below, hash_files
from una_fast.train.room import SaveError, is_of_disk, not_written, refuse_full_disk
from una_fast.train.shards import Shard, host_copies, take_shard, write_shard
from una_fast.train.training_state import TRAINING, training_numbers, training_tensors

_SLACK = 2**20  # bytes of configs and other small files, at most about this much


@dataclass
class _Job:
    """A checkpoint that is being written.

    directory: written aside; takes its name at the end
    step, run: for the manifest
    bytes: size of the checkpoint, about
    copied: set when the live tensors are not read any more
    thread: writes in the background; None in the foreground
    files: manifest entries of this rank's files, when they are written
    error: of the writing
    """

    directory: Path
    step: int
    run: dict[str, Any]
    bytes: int
    copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    files: dict[str, Any] | None = None
    error: Exception | None = None

    def work(self, write: Callable[[_Job], dict[str, Any]]) -> None:
        """Write the files; an error is kept for the main thread."""
        try:
            self.files = write(self)
        except Exception as error:
            self.error = error
        finally:
            self.copied.set()

    @property
    def is_done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Writes the checkpoints of a run, one at a time, in the foreground or in the background.

    A background save first copies all tensors to the host, while the gradients of the next step
    are computed: weights and moments change when the optimizer steps, and `hold` waits before that.
    `finish` gives the checkpoint its name when every rank has written its files.
    """

    def __init__(self, output_dir: Path, world: World, keep: int, *, in_background: bool) -> None:
        """Prepare for saving.

        output_dir: of the run
        world: the ranks; all of them must make every call
        keep: complete checkpoints that stay
        in_background: write while the run goes on
        """
        self.output_dir = output_dir
        self.world = world
        self.keep = keep
        self.in_background = in_background
        self._job: _Job | None = None
        self._buffers: dict[str, Tensor] = {}
        self._removal: threading.Thread | None = None

    def save(
        self,
        policy: Policy,
        optimizer: Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        state: dict[str, Any],
        reference: Policy | None = None,
    ) -> None:
        """Write checkpoint-N, then delete the oldest complete checkpoints.

        policy: the model to save
        optimizer: of the policy
        tokenizer: of the policy
        state: content of state.json, as JSON values; N is state["step"]
        reference: a reference that has changed since the start of the run

        A whole checkpoint-N that is there already stays as it is. SaveError if it cannot be
        written.
        """
        self.finish()
        directory = self.output_dir / f"checkpoint-{state['step']}"
        if self.world.on_main(lambda: self._is_there(directory)):
            return
        part = gather_part(policy, self.world) if self.world.sharded else None
        weights = whole_weights(policy, self.world) if part is None else part.tensors
        shard = take_shard(training_tensors(policy, optimizer, self.world, reference), self.world)
        text = json.dumps({**state, "optimizer": training_numbers(policy, optimizer)}, indent=1)
        # The file grows while a checkpoint is written in the background.
        metrics = state["lines"]["metrics.jsonl"]
        aside = directory.with_name(directory.name + ASIDE)
        needed = _SLACK + _bytes(weights, part)
        needed += shard.nbytes * self.world.shards + _tokenizer_bytes(tokenizer) + metrics
        self.world.on_main(lambda: self._open(aside, needed))

        def write_model(directory: Path, whole: dict[str, Tensor]) -> None:
            if part is not None:
                save_part(policy, directory, tokenizer, part, self.world)
            elif self.world.is_main:
                save_pretrained(policy, directory, tokenizer, whole)
            if not self.world.is_main:
                return
            (directory / "state.json").write_text(text, encoding="utf-8")
            _copy_start(self.output_dir / "metrics.jsonl", directory, metrics)

        def write(job: _Job) -> dict[str, Any]:
            return self._write(job, shard, weights, part, write_model)

        job = _Job(aside, state["step"], state["run"], needed)
        if self.in_background:
            name = "una-fast-save"
            job.thread = threading.Thread(target=job.work, args=(write,), name=name)
            job.thread.start()
            self._job = job
        else:
            job.work(write)
            self._finish(job)

    def _write(
        self,
        job: _Job,
        shard: Shard,
        weights: dict[str, Tensor],
        part: Part | None,
        write_model: Callable[[Path, dict[str, Tensor]], None],
    ) -> dict[str, Any]:
        """Write the files of this rank; return their manifest entries.

        job: the checkpoint
        shard: of this rank, live tensors
        weights: of the whole model, live or gathered; the main rank writes them
        part: weights in the files of this rank, where every rank writes some
        write_model: writes them, and the files of JSON on the main rank, into a directory
        """
        if job.thread is not None:
            shard = shard.copied(self._buffers)
            if not self.world.sharded:  # or else they are gathered copies
                weights = host_copies(weights, self._buffers)
            job.copied.set()
        own_file = f"{TRAINING}/rank-{self.world.rank:05d}.safetensors"

        def write_state() -> dict[str, Any]:
            write_shard(job.directory / own_file, shard)
            return hash_files(job.directory, [own_file], flush=True)

        # The disk writes one part while the other is hashed.
        with ThreadPoolExecutor(1) as pool:
            state_files = pool.submit(write_state)
            write_model(job.directory, weights)
            names = _written(job.directory, part, self.world)
            files = hash_files(job.directory, names, flush=True)
            return files | state_files.result()

    def hold(self) -> None:
        """Wait until the live tensors may change: a save in the background has its copies."""
        if self._job is not None:
            self._job.copied.wait()

    @property
    def is_pending(self) -> bool:
        """Return whether a save in the background waits for `finish`, equal on all ranks."""
        return self._job is not None

    @property
    def is_done(self) -> bool:
        """Return whether this rank has written its files."""
        return self._job is None or self._job.is_done

    def finish(self) -> None:
        """Wait for the files of all ranks, and give the checkpoint its name; SaveError if it fails.

        Without a save under way nothing happens.
        """
        job, self._job = self._job, None
        if job is not None:
            job.thread.join()
            self._finish(job)

    def close(self) -> None:
        """Finish a save that is under way, and wait until old checkpoints are deleted."""
        self.finish()
        if self._removal is not None:
            self._removal.join()

    def _finish(self, job: _Job) -> None:
        errors, files = [], {}
        for error, written in self.world.gather((_cause(job.error), job.files)):
            errors += [error] if error else []
            files |= written or {}
        if errors:
            self.world.on_main(lambda: shutil.rmtree(job.directory, ignore_errors=True))
            if job.error is not None and not is_of_disk(job.error):
                raise job.error
            name = job.directory.name.removesuffix(ASIDE)
            raise not_written(name, errors[0], self.output_dir, job.bytes)
        manifest = Manifest(job.step, job.run, files, {})
        self.world.on_main(lambda: self._publish(job, manifest))

    def _is_there(self, directory: Path) -> bool:
        """Return whether a whole checkpoint has the name; what is not whole is moved away."""
        if not directory.exists() and not directory.is_symlink():
            return False
        if directory.is_symlink() or not directory.is_dir():
            raise SaveError(
                f"{directory} is in the way of a checkpoint: it is no directory of this run; "
                "move it away, and go on with resume=true"
            )
        try:
            read_manifest(directory).verify(directory)
        except DamagedError:
            set_aside(directory, ".damaged")
            return False
        return True

    def _open(self, aside: Path, needed: int) -> None:
        """Make the directory to write in; SaveError for a disk without room."""
        try:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / TRAINING).mkdir(parents=True)
            is_full = shutil.disk_usage(self.output_dir).free < needed
        except OSError as error:
            raise SaveError(f"{aside.parent} takes no checkpoint: {error}") from error
        if is_full and self._removal is not None:
            self._removal.join()  # the new checkpoint takes the room of the old one
        try:
            refuse_full_disk(aside.name.removesuffix(ASIDE), self.output_dir, needed)
        except SaveError:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _publish(self, job: _Job, manifest: Manifest) -> None:
        """Give a written checkpoint its name, and delete the oldest ones."""
        aside = job.directory
        try:
            manifest.write(aside)
            flush_names(aside)
            aside.rename(aside.with_name(aside.name.removesuffix(ASIDE)))
            sync_directory(self.output_dir)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            name = aside.name.removesuffix(ASIDE)
            raise not_written(name, error, self.output_dir, job.bytes) from error
        # Renamed first: a half-deleted checkpoint must not look whole.
        before = self._before(manifest.step)
        olds = before[: max(len(before) + 1 - self.keep, 0)]
        gone = [old.rename(old.with_name(old.name + ASIDE)) for old in olds]
        if self.in_background:  # a second per gigabyte and a half
            if self._removal is not None:
                self._removal.join()
            self._removal = threading.Thread(target=remove, args=(gone,), name="una-fast-remove")
            self._removal.start()
        else:
            remove(gone)

    def _before(self, step: int) -> list[Path]:
        """Return the complete checkpoints before a step, oldest first."""
        whole = complete_checkpoints(self.output_dir)
        return [path for path in whole if read_manifest(path).step < step]


def save_final(
    output_dir: Path,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    manifest: Manifest,
    texts: dict[str, str],
) -> None:
    """Write the model of a finished run in Hugging Face form, and the manifest of the run's end.

    output_dir: of the run; files take their names there when all of them are on the disk
    policy: gathered from all ranks
    tokenizer: of the policy
    world: the ranks; all of them must call
    manifest: of the run, without the files
    texts: further files, by name

    SaveError if the files cannot be written.
    """
    part = gather_part(policy, world) if world.sharded else None
    weights = whole_weights(policy, world) if part is None else part.tensors
    aside = output_dir / f"model{ASIDE}"
    needed = _SLACK + _bytes(weights, part)

    def refused(error: Exception) -> Exception:
        """Remove all that was written, and return the error to raise."""
        shutil.rmtree(aside, ignore_errors=True)
        return not_written("the model", error, output_dir, needed) if is_of_disk(error) else error

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        refuse_full_disk("the model", output_dir, needed)
        try:
            aside.mkdir()
        except OSError as error:
            raise refused(error) from error

    def publish() -> None:
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        names = files_below(aside)
        files = hash_files(aside, names, flush=True)
        (output_dir / MARKER).unlink(missing_ok=True)
        for name in names:
            (output_dir / name).parent.mkdir(exist_ok=True)  # of further chat templates
            (aside / name).replace(output_dir / name)
        remove_other_weights(output_dir, set(names))
        replace(manifest, files=files).write(output_dir)
        shutil.rmtree(aside)

    def write() -> None:
        try:
            if part is None:
                save_pretrained(policy, aside, tokenizer, weights, final=True)
            publish()
        except Exception as error:
            reason = refused(error)
            if reason is error:
                raise
            raise reason from error

    world.on_main(prepare)
    if part is not None:
        _write_part(
            lambda: save_part(policy, aside, tokenizer, part, world, final=True), world, refused
        )
    world.on_main(write)


def _write_part(
    write: Callable[[], None], world: World, refused: Callable[[Exception], Exception]
) -> None:
    """Write the files of this rank; an error of any rank is raised on every rank.

    write: writes them
    world: the ranks; all of them must call
    refused: error -> error to raise; removes what was written
    """
    own = None
    try:
        write()
    except Exception as error:
        own = error
    errors = [text for text in world.gather(_cause(own)) if text]
    if errors:
        raise refused(own or OSError(errors[0])) from own


# ---- weights ----


def _bytes(weights: dict[str, Tensor], part: Part | None) -> int:
    """Return the bytes of the weights of all ranks, as far as this rank knows them."""
    if part is not None:
        return part.nbytes
    return sum(tensor.nbytes for tensor in _distinct(weights))


# ---- files ----


def _written(directory: Path, part: Part | None, world: World) -> list[str]:
    """Return the files of a checkpoint that this rank has written, but for the training state."""
    if not world.is_main:
        return [] if part is None else sorted(part.own)
    others = set() if part is None else part.others
    found = []
    for name in files_below(directory):
        # safetensors writes a hidden file, which then takes its name: another rank may be at it.
        of_others = name in others or name.startswith((".", TRAINING))
        if not of_others:
            found.append(name)
    return found


def flush_names(directory: Path) -> None:
    """Flush the names of a directory and of the directories in it; the files are flushed."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
    sync_directory(directory)


def _copy_start(path: Path, directory: Path, size: int) -> None:
    """Copy the first bytes of a file, if it has any, into a directory."""
    if size:
        with path.open("rb") as file:
            (directory / path.name).write_bytes(file.read(size))


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the bytes of a tokenizer's files, where they are in a local directory."""
    directory = Path(tokenizer.name_or_path or ".")
    if not (directory / "tokenizer_config.json").is_file():
        return 0
    names = ("token", "special_tokens", "vocab", "merges", "spiece", "chat_template")
    files = [path for path in directory.iterdir() if path.name.startswith(names)]
    return sum(path.stat().st_size for path in files if path.is_file())


def _distinct(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield tensors; of several in the same memory, the first."""
    seen = set()
    for tensor in tensors.values():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


def _cause(error: Exception | None) -> str:
    return "" if error is None else f"{error}" or type(error).__name__
