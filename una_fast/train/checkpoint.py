"""Checkpoints: everything a killed run needs to continue exactly; whole, or not there.

checkpoint-N/   weights (safetensors, Hugging Face form) and tokenizer: usable as a model by itself
                training/     optimizer state, random states of all ranks, and a reference that has
                              changed since the start: a safetensors file per rank (shards.py)
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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from una_fast.distributed import World, reshard
from una_fast.files import ASIDE, sync_directory
from una_fast.model.export import save_pretrained
from una_fast.model.policy import Policy
from una_fast.train.manifest import MARKER, DamagedError, Manifest, files_below, hash_files
from una_fast.train.shards import Shard, ShardReader, host_copies, own, take_shard, write_shard

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_TRAINING = "training"
_SLACK = 2**20  # bytes of configs and other small files, at most about this much


class SaveError(ValueError):
    """A checkpoint or a model could not be written; nothing half-written remains."""


# ---- which checkpoints are there ----


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
        _remove([path])


# ---- weights ----


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
    weights = _weights(policy, world)
    aside = output_dir / f"model{ASIDE}"
    needed = sum(tensor.nbytes for tensor in _distinct(weights)) + _SLACK

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        refuse_full_disk("the model", output_dir, needed)
        try:
            aside.mkdir()
            save_pretrained(policy, aside, tokenizer, weights, final=True)
            for name, text in texts.items():
                (aside / name).write_text(text, encoding="utf-8")
            names = files_below(aside)
            files = hash_files(aside, names, flush=True)
            (output_dir / MARKER).unlink(missing_ok=True)
            for name in names:
                (output_dir / name).parent.mkdir(exist_ok=True)  # of further chat templates
                (aside / name).replace(output_dir / name)
            replace(manifest, files=files).write(output_dir)
            shutil.rmtree(aside)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not _is_of_disk(error):
                raise
            raise SaveError(
                f"the model was not written: {error}; {_room(output_dir)}. {_newest(output_dir)}"
            ) from error

    world.on_main(write)


def _weights(policy: Policy, world: World) -> dict[str, Tensor]:
    """Return the weights to save, live or gathered on the main rank: of an adapter, its own."""
    if world.sharded:
        return _whole_state_dict(policy)
    state_dict = policy.model.state_dict()
    if not policy.is_adapter:
        return state_dict
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state_dict.items() if name in trained}


def _whole_state_dict(policy: Policy) -> dict[str, Tensor]:
    """Gather the weights of a sharded policy on the host of the main rank."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=policy.is_adapter
    )
    state_dict = get_model_state_dict(policy.model, options=options)
    # Tied weights are gathered one by one; as one tensor they are written once.
    first_name: dict[int, str] = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        if name in state_dict:
            state_dict[name] = state_dict[first_name.setdefault(id(parameter), name)]
    return state_dict


# ---- saving ----


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
        weights = _weights(policy, self.world)
        shard = take_shard(_training_tensors(policy, optimizer, self.world, reference), self.world)
        text = json.dumps({**state, "optimizer": _training_numbers(policy, optimizer)}, indent=1)
        # The file grows while a checkpoint is written in the background.
        metrics = state["lines"]["metrics.jsonl"]
        aside = directory.with_name(directory.name + ASIDE)
        needed = sum(tensor.nbytes for tensor in _distinct(weights)) + _SLACK
        needed += shard.nbytes * self.world.size + _tokenizer_bytes(tokenizer) + metrics
        self.world.on_main(lambda: self._open(aside, needed))

        def write_model(directory: Path, whole: dict[str, Tensor]) -> None:
            save_pretrained(policy, directory, tokenizer, whole)
            (directory / "state.json").write_text(text, encoding="utf-8")
            _copy_start(self.output_dir / "metrics.jsonl", directory, metrics)

        def write(job: _Job) -> dict[str, Any]:
            return self._write(job, shard, weights, write_model)

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
        write_model: Callable[[Path, dict[str, Tensor]], None],
    ) -> dict[str, Any]:
        """Write the files of this rank; return their manifest entries.

        job: the checkpoint
        shard: of this rank, live tensors
        weights: of the whole model, live or gathered; the main rank writes them
        write_model: writes them, and the files of JSON, into a directory
        """
        if job.thread is not None:
            shard = shard.copied(self._buffers)
            if not self.world.sharded:  # or else they are gathered copies
                weights = host_copies(weights, self._buffers)
            job.copied.set()
        own_file = f"{_TRAINING}/rank-{self.world.rank:05d}.safetensors"

        def write_state() -> dict[str, Any]:
            write_shard(job.directory / own_file, shard)
            return hash_files(job.directory, [own_file], flush=True)

        # The disk writes one part while the other is hashed.
        with ThreadPoolExecutor(1) as pool:
            state_files = pool.submit(write_state)
            files = {}
            if self.world.is_main:
                write_model(job.directory, weights)
                names = files_below(job.directory)
                others = [name for name in names if not name.startswith(_TRAINING)]
                files = hash_files(job.directory, others, flush=True)
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
            if job.error is not None and not _is_of_disk(job.error):
                raise job.error
            name = job.directory.name.removesuffix(ASIDE)
            raise SaveError(
                f"{name} was not written: {errors[0]}; it needs {_size(job.bytes)}, and "
                f"{_room(self.output_dir)}. {_newest(self.output_dir)}"
            )
        manifest = Manifest(job.step, job.run, files, {})
        self.world.on_main(lambda: self._publish(job.directory, manifest))

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
            (aside / _TRAINING).mkdir(parents=True)
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

    def _publish(self, aside: Path, manifest: Manifest) -> None:
        """Give a written checkpoint its name, and delete the oldest ones."""
        try:
            manifest.write(aside)
            flush_names(aside)
            aside.rename(aside.with_name(aside.name.removesuffix(ASIDE)))
            sync_directory(self.output_dir)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise SaveError(
                f"{aside.name} was not written: {error}. {_newest(self.output_dir)}"
            ) from error
        # Renamed first: a half-deleted checkpoint must not look whole.
        before = self._before(manifest.step)
        olds = before[: max(len(before) + 1 - self.keep, 0)]
        gone = [old.rename(old.with_name(old.name + ASIDE)) for old in olds]
        if self.in_background:  # a second per gigabyte and a half
            if self._removal is not None:
                self._removal.join()
            self._removal = threading.Thread(target=_remove, args=(gone,), name="una-fast-remove")
            self._removal.start()
        else:
            _remove(gone)

    def _before(self, step: int) -> list[Path]:
        """Return the complete checkpoints before a step, oldest first."""
        whole = complete_checkpoints(self.output_dir)
        return [path for path in whole if read_manifest(path).step < step]


def set_aside(path: Path, ending: str) -> Path:
    """Rename a file or directory to its name with an ending and a free number; return the name."""
    number = 1
    while (free := path.with_name(f"{path.name}{ending}-{number}")).exists():
        number += 1
    return path.rename(free)


def flush_names(directory: Path) -> None:
    """Flush the names of a directory and of the directories in it; the files are flushed."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
    sync_directory(directory)


def _remove(directories: list[Path]) -> None:
    """Delete directories; one that a reader keeps open is left, with a warning."""
    for directory in directories:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            logger.warning("%s is not deleted: %s", directory, error)


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


def _is_of_disk(error: Exception) -> bool:
    """Return whether an error is the disk's: writers in Rust raise their own classes."""
    return isinstance(error, OSError) or "os error" in str(error)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _room(directory: Path) -> str:
    return f"{directory} has {_size(shutil.disk_usage(directory).free)} of free space"


def refuse_full_disk(what: str, output_dir: Path, needed: int) -> None:
    """Raise SaveError where a disk has no room for something to be written.

    what: name of the thing, for the message
    output_dir: a directory on the disk
    needed: bytes
    """
    if shutil.disk_usage(output_dir).free < needed:
        raise SaveError(
            f"{what} was not written: No space on the disk. It needs {_size(needed)}, and "
            f"{_room(output_dir)}. {_newest(output_dir)}"
        )


def _newest(output_dir: Path) -> str:
    """Say how to go on after something that was not written."""
    whole = complete_checkpoints(output_dir)
    newest = f"{whole[-1].name} is the newest checkpoint" if whole else "there is no checkpoint yet"
    return f"Nothing half-written remains, and {newest}; make room, and set resume=true to go on"


# ---- the state of training ----


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of state.json; ValueError, by the file, if it is none of ours."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_bytes())
        assert isinstance(state["step"], int)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} is not the state of a run ({type(error).__name__})") from None
    return state


def load_training_state(
    checkpoint: Path,
    policy: Policy,
    optimizer: Optimizer,
    world: World,
    reference: Policy | None = None,
) -> None:
    """Load the optimizer and random states, and the weights of a reference that had changed.

    checkpoint: a verified checkpoint; the weights of the policy were loaded with the model
    policy: with the weights of the checkpoint
    optimizer: of the policy
    world: the ranks; all of them must call
    reference: a reference that changes during the run; its weights are overwritten

    ValueError for a state of other parameters.
    """
    numbers = read_state(checkpoint)["optimizer"]
    names = Manifest.read(checkpoint).files
    paths = [checkpoint / name for name in names if name.startswith(f"{_TRAINING}/")]
    # Makes the state of every parameter: all moments, of the right kinds, to be overwritten.
    get_optimizer_state_dict(policy.model, optimizer)
    try:
        with ShardReader(paths) as reader:
            # A parameter that never had a gradient has no state, then as now.
            for name in _states(policy, optimizer).keys() - set(numbers["states"]):
                optimizer.state.pop(_parameters(policy)[name])
            tensors = _training_tensors(policy, optimizer, world, reference)
            random = {name: tensors.pop(name) for name in _random_states(world)}
            reader.fill(tensors, world)
            # A rank that the saved run did not have finds no random state, and keeps its own.
            found = {name: tensor for name, tensor in random.items() if reader.has(name)}
            reader.fill(found, world)
    except ValueError as error:
        raise ValueError(f"{checkpoint} does not go with this run: {error}") from None
    for group, rate in zip(optimizer.param_groups, numbers["rates"], strict=True):
        group["lr"] = rate
    for name, state in _states(policy, optimizer).items():
        for key in state:
            state[key] = numbers["values"].get(f"{name}.{key}", state[key])
    for name, tensor in found.items():
        if name.endswith("cuda"):
            torch.cuda.set_rng_state(tensor, world.device)
        else:
            torch.set_rng_state(tensor)


def _training_tensors(
    policy: Policy, optimizer: Optimizer, world: World, reference: Policy | None
) -> dict[str, Tensor]:
    """Return the live tensors of the state of training, by their names in the files."""
    tensors = {}
    for name, state in _states(policy, optimizer).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    if reference is not None:
        reshard(reference.model)
        for name, parameter in reference.model.named_parameters():
            tensors[f"reference.{name}"] = parameter
    return tensors | _random_states(world)


def _training_numbers(policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Return what of the optimizer is no tensor, as JSON values.

    rates: learning rate by group
    states: names of the parameters with a state
    values: numbers of these states
    """
    states = _states(policy, optimizer)
    values = {}
    for name, state in states.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                values[f"{name}.{key}"] = value
    rates = [group["lr"] for group in optimizer.param_groups]
    return {"rates": rates, "states": [*states], "values": values}


def _states(policy: Policy, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state of every parameter that has one, by the parameter's name."""
    states = {}
    for name, parameter in _parameters(policy).items():
        if optimizer.state.get(parameter):
            states[name] = optimizer.state[parameter]
    return states


def _parameters(policy: Policy) -> dict[str, Tensor]:
    reshard(policy.model)  # sharded models show their whole parameters until they are resharded
    return dict(policy.model.named_parameters())


def _random_states(world: World) -> dict[str, Tensor]:
    states = {own("random.cpu", world): torch.get_rng_state()}
    if world.device.type == "cuda":
        states[own("random.cuda", world)] = torch.cuda.get_rng_state(world.device)
    return states
