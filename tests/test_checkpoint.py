"""Checkpoints that can be trusted: damage is named, nothing whole is lost, disks may fill."""

from __future__ import annotations

import errno
import json
import os
import pickle
import select
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

import una_fast.signals as signals_module
from helpers import naming
from runs import again, assert_same_weights
from tiny import make_config, read_metrics
from una_fast.config import RunConfig
from una_fast.distributed import World
from una_fast.files import sha256_of
from una_fast.signals import Stopped, requests
from una_fast.train import room, saver
from una_fast.train.checkpoint import complete_checkpoints, newest_whole, read_state
from una_fast.train.loop import DivergedError, Trainer, train
from una_fast.train.manifest import DamagedError, Manifest, files_below, hash_files
from una_fast.train.room import SaveError
from una_fast.train.run_dir import find_checkpoint, locked, rewind_lines
from una_fast.train.shards import ShardReader, take_shard, write_shard
from una_fast.train.training_state import (
    load_training_state,
    training_numbers,
    training_tensors,
)

ALONE = World(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """A stand-in for SIGKILL."""


def names(output_dir: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(output_dir)]


@pytest.fixture(scope="module")
def whole(llamas, mixed, tmp_path_factory):
    """Train 4 steps; return the settings, without the output directory, and the directory."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = make_config(
        llamas["untied"],
        mixed,
        out,
        batch_size=8,
        micro_batch_size=4,
        max_steps=4,
        save_every=1,
    )
    train(config)
    return config, out


@pytest.fixture
def stopped(whole, tmp_path):
    """Return (settings to resume, directory) of the run, as if killed after checkpoint-3."""
    config, out = whole
    run = tmp_path / "run"
    shutil.copytree(out, run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "COMPLETE").unlink()
    return RunConfig(**again(config, run, resume=True)), run


# ---- damage ----


def damaged(data: bytes, how: str) -> bytes | None:
    """Return a file's bytes after damage; None for a file that is gone."""
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
    return {
        "missing": None,
        "empty": b"",
        "half": data[:middle],
        "zeroed": bytes(len(data)),
        "bit": flipped,
        "pickle": pickle.dumps({"a": 1}),
    }[how]


@pytest.mark.parametrize("how", ["missing", "empty", "half", "zeroed", "bit", "pickle"])
def test_damage_to_any_file_is_found_by_name(whole, tmp_path, how):
    """The newest checkpoint is left, with a message, for the one before it."""
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    newest = run / "checkpoint-4"
    files = [*files_below(newest), "COMPLETE"]
    assert {"state.json", "metrics.jsonl", "training/rank-00000.safetensors"} < set(files)
    for name in files:
        path = newest / name
        before = path.read_bytes()
        after = damaged(before, how)
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        said: list[str] = []
        with naming(file=name):
            assert newest_whole(run, said.append) == run / "checkpoint-3"
            assert str(path) in said[0] and "damaged" in said[0] and "checkpoint-3" in said[1]
        path.write_bytes(before)
    assert newest_whole(run, pytest.fail) == newest


def test_files_that_a_loader_would_take_are_refused(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    (run / "checkpoint-4" / "notes.txt").write_text("mine")
    assert newest_whole(run, pytest.fail) == run / "checkpoint-4"
    (run / "checkpoint-4" / "adapter_config.json").write_text("{}")
    assert newest_whole(run, [].append) == run / "checkpoint-3"


def test_a_renamed_checkpoint_is_not_another_step(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    (run / "checkpoint-4").rename(run / "checkpoint-9")
    said: list[str] = []
    assert newest_whole(run, said.append) == run / "checkpoint-3"
    assert "checkpoint-9 is of step 4" in said[0]


def test_without_a_whole_checkpoint_nothing_starts_in_silence(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    for path in complete_checkpoints(run):
        (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint to resume from: .*safetensors"):
        newest_whole(run, [].append)


def test_a_damaged_checkpoint_is_kept_aside_when_its_step_comes_again(whole, tmp_path):
    """Resumed from the one before, the run ends as it would have; nothing is overwritten."""
    config, out = whole
    run = tmp_path / "run"
    shutil.copytree(out, run)
    (run / "COMPLETE").unlink()
    path = run / "checkpoint-4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(RunConfig(**again(config, run, resume=True)))
    assert_same_weights(run, out)
    assert read_metrics(run) == read_metrics(out)
    assert (run / "checkpoint-4.damaged-1" / "model.safetensors").exists()
    assert names(run) == ["checkpoint-3", "checkpoint-4"]


def test_a_damaged_model_of_a_finished_run_is_made_again(whole, tmp_path):
    config, out = whole
    run = tmp_path / "run"
    shutil.copytree(out, run)
    (run / "model.safetensors").write_bytes(b"")
    train(RunConfig(**again(config, run, resume=True)))
    assert_same_weights(run, out)


@pytest.mark.parametrize("how", ["missing", "half", "zeroed"])
def test_metrics_are_restored_from_the_checkpoint(whole, tmp_path, how):
    """What was there is moved away, and it is said; lines of later steps are cut off."""
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    metrics = run / "metrics.jsonl"
    before = metrics.read_bytes()
    said: list[str] = []
    rewind_lines(run, run / "checkpoint-3", said.append)
    known = metrics.read_bytes()
    assert not said and before.startswith(known) and len(known.splitlines()) == 3
    after = damaged(before, how)
    if after is None:
        metrics.unlink()
    else:
        metrics.write_bytes(after)
    rewind_lines(run, run / "checkpoint-4", said.append)
    assert metrics.read_bytes() == before and "restored" in said[0]
    assert (run / "metrics.jsonl.damaged-1").exists() == (how != "missing")


# ---- the disk ----


def test_a_disk_without_room_is_seen_before_writing(whole, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    settings = again(whole[0], tmp_path / "run")
    message = (
        "checkpoint-1 was not written: No space.* needs .* MB, and .*run has 0.001 MB of free space"
    )
    with pytest.raises(SaveError, match=message):
        train(RunConfig(**settings))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_too_little_room_is_said_before_the_first_step(whole, tmp_path, monkeypatch, capsys):
    """Two checkpoints are kept, and a third is written before the oldest is deleted."""
    monkeypatch.setattr(saver, "_SLACK", 0)
    config, out = whole
    files = list((out / "checkpoint-4").rglob("*.safetensors"))
    checkpoint = sum(file.stat().st_size for file in files)
    needed = 3 * checkpoint + (out / "model.safetensors").stat().st_size
    for free, is_told in ((1.1 * needed, False), (0.9 * needed, True)):
        usage = namedtuple("usage", "total used free")(10**12, 0, int(free))
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, usage=usage: usage)
        train(RunConfig(**again(config, tmp_path / str(is_told), save_every=1)))
        assert ("3 checkpoints and the model will take about" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize("name", ["save_pretrained", "write_shard", "hash_files"])
@pytest.mark.parametrize("save_async", [False, True])
def test_a_disk_that_fills_loses_nothing(whole, tmp_path, monkeypatch, name, save_async):
    """Step 3 cannot be saved: one line, the half-written checkpoint is gone, the run resumes."""
    config, out = whole
    run = tmp_path / "run"
    write = getattr(saver, name)

    def full(*args, **kwargs):
        if (run / "checkpoint-3.tmp").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(run))
        return write(*args, **kwargs)

    settings = again(config, run, save_async=save_async)
    with monkeypatch.context() as patch:
        patch.setattr(saver, name, full)
        with pytest.raises(SaveError, match="checkpoint-3 was not written: .*No space left.*-2 is"):
            train(RunConfig(**settings))
    assert names(run) == ["checkpoint-1", "checkpoint-2"] and not list(run.glob("*.tmp"))
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(run, out)
    assert read_metrics(run) == read_metrics(out)


def test_a_name_that_is_taken_is_refused(whole, tmp_path):
    """Neither a file nor what a link points at is overwritten."""
    config, _ = whole
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    for kind in ("file", "link", "directory"):
        run = tmp_path / kind
        run.mkdir()
        path = run / "checkpoint-2"
        if kind == "file":
            path.write_text("x")
        elif kind == "link":
            path.symlink_to(victim)
        else:
            shutil.copytree(victim, path)
        message = "holds an earlier run" if kind == "directory" else "has the name of a checkpoint"
        with naming(kind=kind), pytest.raises(ValueError, match=message):
            train(RunConfig(**again(config, run)))
        assert path.exists() and (victim / "precious").exists()


# ---- saving in the background ----


def test_a_background_save_is_of_its_own_step(whole, tmp_path, monkeypatch):
    """The writer runs while the weights change: it holds copies; the checkpoint is the same."""
    config, out = whole
    run = tmp_path / "run"
    going = threading.Event()
    write = saver.save_pretrained

    def slow(policy, directory, *args, **kwargs):
        if directory.name == "checkpoint-3.tmp":
            assert going.wait(60), "the run must go on while its checkpoint is written"
        return write(policy, directory, *args, **kwargs)

    take_step = Trainer.take_step

    def step(trainer, work):
        taken = take_step(trainer, work)
        if trainer.saver.is_pending and not trainer.saver.is_done:
            going.set()  # step 4 is taken
        return taken

    monkeypatch.setattr(saver, "save_pretrained", slow)
    monkeypatch.setattr(Trainer, "take_step", step)
    train(RunConfig(**again(config, run, save_async=True)))
    assert going.is_set()
    for name in ("checkpoint-3", "checkpoint-4"):
        for path in ("model.safetensors", "training/rank-00000.safetensors"):
            assert (run / name / path).read_bytes() == (out / name / path).read_bytes()
        Manifest.read(run / name).verify(run / name)
        steps = len((run / name / "metrics.jsonl").read_bytes().splitlines())
        assert name == f"checkpoint-{steps}", "no line of a later step"


# ---- signals ----


def signalled(config: RunConfig, number: int, at_step: int) -> Stopped | None:
    """Run, with a signal during a step; return the end by the signal, if it ended the run."""
    take_step = Trainer.take_step

    def step(trainer, work):
        step.number += 1
        if step.number == at_step:
            os.kill(os.getpid(), number)
        return take_step(trainer, work)

    step.number = 0
    Trainer.take_step = step
    try:
        train(config)
    except Stopped as stop:
        return stop
    finally:
        Trainer.take_step = take_step
    return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step(whole, tmp_path, number):
    config, out = whole
    run = tmp_path / "run"
    settings = again(config, run, save_every=None)
    before = signal.getsignal(number)
    stop = signalled(RunConfig(**settings | {"save_every": 100}), number, 2)
    assert signal.getsignal(number) is before
    assert names(run) == ["checkpoint-2"]
    if number == signal.SIGUSR1:
        assert stop is None and (run / "model.safetensors").exists()
    else:
        assert stop.number == number and not stop.by_signal
        assert stop.name in stop.message and "checkpoint-2" in stop.message
        assert not (run / "model.safetensors").exists()
        train(RunConfig(**settings | {"save_every": 100, "resume": True}))
    assert_same_weights(run, out)
    assert read_metrics(run) == read_metrics(out)


def test_an_interrupt_names_the_newest_checkpoint(whole, tmp_path):
    stop = signalled(RunConfig(**again(whole[0], tmp_path / "run")), signal.SIGINT, 3)
    assert stop.number == signal.SIGINT and "checkpoint-2" in stop.message


def test_a_signal_outside_of_steps_ends_at_once():
    with pytest.raises(Stopped, match="SIGTERM") as stop, requests.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.by_signal
    with requests.listening(), requests.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.stop == signal.SIGTERM
        with pytest.raises(Stopped), requests.at_once():
            pytest.fail("a stop that was asked for before")


def test_ranks_end_when_their_launcher_dies(monkeypatch, tmp_path):
    """The launcher is killed: its rank is asked to stop, and exits by itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(signals_module, "PATIENCE", 0.5)
    note = tmp_path / "stop"
    reading, writing = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            os.close(reading)
            with requests.listening(), requests.deferred():
                while not requests.stop:
                    time.sleep(0.01)
                note.write_text(str(int(requests.stop)))
                time.sleep(60)
        signal.pause()
        os._exit(1)
    os.close(writing)
    time.sleep(0.3)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([reading], [], [], 10)[0], "the rank holds the pipe open while it lives"
    assert os.read(reading, 1) == b"" and note.read_text() == str(int(signal.SIGTERM))
    os.close(reading)


# ---- one run at a time ----


def test_a_directory_in_use_is_refused_by_its_process(tmp_path):
    with locked(tmp_path / "run"):
        pid = os.fork()
        if not pid:
            try:
                with locked(tmp_path / "run"):
                    os._exit(1)
            except ValueError as error:
                os._exit(0 if f"process {os.getppid()}" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with locked(tmp_path / "run"):
        pass  # free again


def test_the_lock_of_a_dead_process_is_none(tmp_path):
    (tmp_path / ".run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be_written_in_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/null")):
        message = "is not a directory to write in"
        with naming(path=path), pytest.raises(ValueError, match=message), locked(path):
            pytest.fail("locked")


# ---- numbers ----


def poisoned(steps: set[int], monkeypatch) -> None:
    """Make the loss of some steps NaN."""
    score, take_step = Trainer.score, Trainer.take_step
    count = 0

    def step(trainer, work):
        nonlocal count
        count += 1
        return take_step(trainer, work)

    def bad(trainer, batch, num_units):
        out = score(trainer, batch, num_units)
        if count in steps and torch.is_grad_enabled():
            out = out._replace(loss=out.loss * float("nan"))
        return out

    monkeypatch.setattr(Trainer, "score", bad)
    monkeypatch.setattr(Trainer, "take_step", step)


def test_a_step_that_is_not_finite_is_skipped_and_told(whole, tmp_path, monkeypatch, caplog):
    poisoned({2}, monkeypatch)
    train(RunConfig(**again(whole[0], tmp_path / "run")))
    assert "a step was skipped: the gradient norm is nan; records " in caplog.text
    assert "mixed.jsonl:" in caplog.text
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1, 1]
    assert "loss" not in lines[1] and "grad_norm" not in lines[1]
    assert all("NaN" not in json.dumps(line) for line in lines)
    first, second = (read_state(whole[1] / f"checkpoint-{n}")["optimizer"] for n in (3, 4))
    assert first["states"] == second["states"]


def test_steps_in_a_row_that_are_not_finite_end_the_run_with_the_last_good_state(
    whole, tmp_path, monkeypatch
):
    poisoned({2, 3}, monkeypatch)
    run = tmp_path / "run"
    settings = again(whole[0], run, max_skipped_steps=1, save_every=1)
    with pytest.raises(DivergedError, match="in 2 steps in a row.*checkpoint-3 holds"):
        train(RunConfig(**settings))
    assert_same_weights(run / "checkpoint-3", run / "checkpoint-2")


def test_another_number_of_steps_is_said(stopped, caplog):
    config, run = stopped
    train(RunConfig(**again(config, run, max_steps=5)))
    assert "was planned for 4 steps, and epochs and max_steps now give 5" in caplog.text


# ---- shards ----


def test_shards_of_several_ranks_fill_one(tmp_path):
    """Slices by their offsets, tensors of no dimension, and those of one rank alone."""
    values = {"a": torch.arange(10.0).reshape(5, 2), "step": torch.tensor(7.0)}
    write_shard(tmp_path / "0", take_shard(values | {"rank-0.rng": torch.ones(3)}, ALONE))
    read = {"a": torch.zeros(5, 2), "step": torch.zeros(()), "rank-0.rng": torch.zeros(3)}
    with ShardReader([tmp_path / "0"]) as reader:
        reader.fill(read)
        assert torch.equal(read["a"], values["a"]) and read["step"] == 7
        assert reader.has("rank-0.rng") and not reader.has("rank-1.rng")
        for name, tensor in (
            ("b", torch.zeros(2)),
            ("a", torch.zeros(6, 2)),
            ("a", torch.zeros(10)),
        ):
            with naming(name=name), pytest.raises(ValueError, match=f"{name} was not saved"):
                reader.fill({name: tensor})


def test_a_parameter_without_gradients_resumes(whole, tmp_path):
    """A vision tower, say: its optimizer state is absent before and after."""
    from una_fast.model.policy import Policy

    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    policy = Policy(model, model, None, False)

    def optimizer() -> AdamW:
        return AdamW(model.parameters(), lr=0.1)

    first = optimizer()
    model["used"](torch.ones(1, 2)).sum().backward()
    first.step()
    first.zero_grad()
    tensors = training_tensors(policy, first, ALONE, None)
    (tmp_path / "training").mkdir()
    write_shard(tmp_path / "training" / "rank-00000.safetensors", take_shard(tensors, ALONE))
    numbers = training_numbers(policy, first)
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "optimizer": numbers}))
    Manifest(1, {}, hash_files(tmp_path, files_below(tmp_path)), {}).write(tmp_path)
    second = optimizer()
    load_training_state(tmp_path, policy, second, ALONE)
    assert set(second.state) == set(model["used"].parameters())
    for parameter, state in first.state.items():
        for key, value in state.items():
            assert torch.equal(second.state[parameter][key], value)


def test_a_manifest_that_is_not_one_is_damage(tmp_path):
    other = '{"manifest": {"x": 1}, "sha256": "0"}'
    for text in ("", "{", "[]", "{}", "null", other, "[" * 10**5):
        (tmp_path / "COMPLETE").write_text(text)
        with naming(text=text[:20]), pytest.raises(DamagedError):
            Manifest.read(tmp_path)


def test_a_file_that_cannot_be_read_is_damage(whole, tmp_path, monkeypatch):
    """A bad sector: the checkpoint before is taken."""
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)

    def bad(path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256_of(path)

    monkeypatch.setattr("una_fast.train.manifest.sha256_of", bad)
    said: list[str] = []
    assert newest_whole(run, said.append) == run / "checkpoint-3"
    assert "cannot be read" in said[0]


def test_a_copy_under_another_name_does_not_count_when_old_ones_go(whole, tmp_path):
    config, out = whole
    run = tmp_path / "run"
    shutil.copytree(out, run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "COMPLETE").unlink()
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-3000")
    train(RunConfig(**again(config, run, resume=True, keep_checkpoints=1)))
    assert (run / "checkpoint-4" / "COMPLETE").exists() and (run / "checkpoint-3000").exists()
    assert not (run / "checkpoint-3").exists()


def test_a_checkpoint_before_the_first_metrics_resumes(whole, tmp_path):
    config, out = whole
    run = tmp_path / "run"
    rare = {"log_every": 50, "save_every": 1}
    stop = signalled(RunConfig(**again(config, run, **rare)), signal.SIGTERM, 2)
    assert stop.number == signal.SIGTERM and not (run / "metrics.jsonl").exists()
    train(RunConfig(**again(config, run, resume=True, **rare)))
    assert_same_weights(run, out)


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with requests.listening():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_find_checkpoint_removes_what_a_kill_left(tmp_path):
    (tmp_path / "checkpoint-7.tmp" / "training").mkdir(parents=True)
    (tmp_path / "mine.tmp").mkdir()
    assert find_checkpoint(tmp_path, resume=True, say=pytest.fail) is None
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]
