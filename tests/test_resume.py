"""An interrupted run is the same run: killed anywhere, it goes on from its checkpoint, exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fsdp_worker import run_case
from runs import LORA, again, assert_same_weights
from tiny import make_config, make_records, read_metrics, save_llama, write_jsonl
from una_fast.config import RunConfig
from una_fast.model.settings import LoraOptions
from una_fast.train import saver
from una_fast.train.checkpoint import complete_checkpoints
from una_fast.train.loop import train
from una_fast.train.manifest import Manifest, hash_files
from una_fast.train.precompute import precompute_reference

# 36 records in steps of 8 make an epoch of 5 steps; a run takes 9.
LONG = {
    "learning_rate": 3e-3,
    "batch_size": 8,
    "micro_batch_size": 5,
    "epochs": 1.75,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.2,
    "save_every": 2,
    "eval_every": 4,
    "log_every": 3,
}
# Every kind of stored state: fp32 moments; tied weights, rounded at random; adapters; moments and
# masters on the host.
VARIANTS = {
    "full": ("untied", {"weight_decay": 0.1}),
    "tied bf16": ("tied", {"gradient_checkpointing": True, "precision": "bf16"}),
    "lora bf16": ("tied", {"lora": LORA, "precision": "bf16"}),
    "bf16 offloaded": ("tied", {"precision": "bf16", "offload_optimizer": True}),
    "short": ("untied", {"max_steps": 6}),
}


@pytest.fixture(scope="module")
def uninterrupted(llamas, mixed, tmp_path_factory):
    """Return a function from a variant to (settings, output directory) of a whole run."""
    root = tmp_path_factory.mktemp("uninterrupted")
    held_out = write_jsonl(root / "eval.jsonl", make_records("mixed", 6, seed=7))
    configs: dict[str, RunConfig] = {}

    def whole_run(variant: str) -> tuple[RunConfig, Path]:
        if variant not in configs:
            model, extra = VARIANTS[variant]
            settings = {"eval_data": held_out, **LONG, **extra}
            configs[variant] = make_config(llamas[model], mixed, root / variant, **settings)
            train(configs[variant])
        return configs[variant], root / variant

    return whole_run


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_weights(one, two)
    assert read_metrics(one) == read_metrics(two)


def checkpoints_in(output_dir: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(output_dir)]


@pytest.mark.parametrize(
    ("variant", "die_at"),
    [("full", 9), ("tied bf16", 8), ("lora bf16", 7), ("bf16 offloaded", 5)],
)
def test_a_resumed_run_is_the_same_run(uninterrupted, tmp_path, variant, die_at):
    """Killed inside step 9, say, it goes on from checkpoint-8, in the second epoch and between two
    reports."""
    config, whole = uninterrupted(variant)
    settings = again(config, tmp_path / "run")
    run_case(settings, die_at)
    assert not (tmp_path / "run" / "README.md").exists()
    last = (die_at - 1) // 2 * 2
    assert checkpoints_in(tmp_path / "run") == [f"checkpoint-{last - 2}", f"checkpoint-{last}"]
    train(RunConfig(**settings | {"resume": True}))
    assert_same_run(tmp_path / "run", whole)
    assert len(checkpoints_in(tmp_path / "run")) == 2


def test_a_run_resumed_twice_is_the_same_run(uninterrupted, tmp_path):
    config, whole = uninterrupted("short")
    settings = again(config, tmp_path / "run")
    run_case(settings, 3)
    run_case(settings | {"resume": True}, 3)  # step 5
    train(RunConfig(**settings | {"resume": True}))
    assert_same_run(tmp_path / "run", whole)


KILLED = """
import os, signal, torch
from una_fast.cli import main
from una_fast.train.loop import Trainer

take_step = Trainer.take_step

def killed(trainer, step):
    if trainer.state["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(trainer, step)

Trainer.take_step = killed
torch.set_num_threads(1)
main()
"""


def test_a_run_that_was_killed_is_the_same_run(uninterrupted, tmp_path):
    """SIGKILL, through the command line; the torn last line of the metrics is forgotten."""
    config, whole = uninterrupted("short")
    settings = again(config, tmp_path / "run", save_every=1, keep_checkpoints=1)
    RunConfig(**settings).save(tmp_path / "run.yaml")
    command = [sys.executable, "-P", "-c", KILLED, "train", "--config", tmp_path / "run.yaml"]
    process = subprocess.run(list(map(str, command)), env=os.environ, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-3"]
    assert not (tmp_path / "run" / "README.md").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.1')
    train(RunConfig(**settings | {"resume": True}))
    assert_same_run(tmp_path / "run", whole)


class Killed(BaseException):
    """A stand-in for SIGKILL: nothing that the library does on an error runs."""


@pytest.mark.parametrize("name", ["save_pretrained", "write_shard", "hash_files", "flush_names"])
def test_a_checkpoint_that_was_not_finished_is_ignored(uninterrupted, tmp_path, monkeypatch, name):
    """Killed with the weights of checkpoint-4 written, its training state, or all but its name."""
    config, whole = uninterrupted("short")
    run = tmp_path / "run"
    settings = again(config, run)
    write = getattr(saver, name)

    def torn(*args, **kwargs):
        result = write(*args, **kwargs)
        if (run / "checkpoint-4.tmp").exists():
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(saver, name, torn)
        with pytest.raises(Killed):
            train(RunConfig(**settings))
    assert any((run / "checkpoint-4.tmp").iterdir())
    assert checkpoints_in(run) == ["checkpoint-2"]
    train(RunConfig(**settings | {"resume": True}))
    assert_same_run(run, whole)
    assert not list(run.glob("*.tmp")), "what was half-written is gone"


def test_a_half_deleted_checkpoint_does_not_look_complete(uninterrupted, tmp_path, monkeypatch):
    config, _ = uninterrupted("short")
    settings = again(config, tmp_path / "run", keep_checkpoints=1, max_steps=4)
    rmtree = shutil.rmtree

    def torn(path, **kwargs):
        if Path(path).name.startswith("checkpoint-2") and not kwargs:
            (Path(path) / "state.json").unlink()
            raise Killed
        rmtree(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        with pytest.raises(Killed):
            train(RunConfig(**settings))
    assert (tmp_path / "run" / "checkpoint-2.tmp").is_dir()
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-4"]


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a run, but for those of TensorBoard and of the lock."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file() and path.name != ".run.lock" and "tensorboard" not in path.parts:
            found[str(path)] = path.read_bytes()
    return found


@pytest.mark.parametrize("save_every", [2, None])
def test_a_finished_run_is_not_trained_again(uninterrupted, tmp_path, save_every):
    """Resumed, it gives its result; asked for more steps without a checkpoint, it refuses."""
    more = {"max_steps": 2, "log_every": 1, "save_every": save_every}
    settings = again(uninterrupted("short")[0], tmp_path / "run", **more)
    first = train(RunConfig(**settings))
    before = contents(tmp_path / "run")
    second = train(RunConfig(**settings | {"resume": True}))
    assert second.metrics == first.metrics and "loss" in first.metrics
    with pytest.raises(ValueError, match="belongs to another run: learning_rate was"):
        train(RunConfig(**settings | {"resume": True, "learning_rate": 0.1}))
    if save_every is None:
        with pytest.raises(ValueError, match="finished after 2 steps and kept no checkpoint"):
            train(RunConfig(**settings | {"resume": True, "max_steps": 3}))
    assert contents(tmp_path / "run") == before


def test_resume_without_a_checkpoint_starts_afresh(uninterrupted, tmp_path):
    config, whole = uninterrupted("short")
    settings = again(config, tmp_path / "run", save_every=None)
    run_case(settings, 3)
    train(RunConfig(**settings | {"resume": True}))
    assert_same_run(tmp_path / "run", whole)


def test_a_run_may_be_made_longer_and_run_in_other_ways(uninterrupted, tmp_path):
    """Settings that leave the steps as they are may change: micro-batches, workspace, reports."""
    config, _ = uninterrupted("short")
    steady = {
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "eval_data": [],
        "eval_every": None,
        "log_every": 1,
    }
    train(RunConfig(**again(config, tmp_path / "whole", **steady)))
    settings = again(config, tmp_path / "run", **steady, max_steps=4)
    train(RunConfig(**settings))
    changes = {
        "resume": True,
        "max_steps": 6,
        "micro_batch_size": 2,
        "workspace_mb": 1.0,
        "keep_checkpoints": 5,
    }
    train(RunConfig(**settings | changes))
    assert len(checkpoints_in(tmp_path / "run")) == 3
    last, expected = (read_metrics(tmp_path / name)[-1] for name in ("run", "whole"))
    assert last["step"] == 6 and last["loss"] == pytest.approx(expected["loss"], rel=1e-3)


# ---- refusals ----


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint anew, as if its files had always been so."""
    manifest = Manifest.read(checkpoint)
    replace(manifest, files=hash_files(checkpoint, manifest.files)).write(checkpoint)


@pytest.fixture(scope="module")
def interrupted(uninterrupted, tmp_path_factory):
    """Leave runs with a checkpoint behind; return their settings by variant."""
    root = tmp_path_factory.mktemp("interrupted")
    settings = {}
    for variant in ("short", "lora bf16"):
        config, _ = uninterrupted(variant)
        settings[variant] = again(config, root / variant)
        run_case(settings[variant], 3)
    return settings


def another_data(kind: str, mixed: str, tmp_path: Path) -> dict:
    """Return settings that name other data than the file `mixed`."""
    if kind == "weighted":
        return {"data": [{"path": mixed, "weight": 2}]}
    lines = Path(mixed).read_text().splitlines(keepends=True)
    if kind == "shorter":
        lines = lines[:-1]
    text = "".join(lines)
    if kind == "rescored":
        text = text.replace('"label": true', '"label": false', 1)
    (tmp_path / "x.jsonl").write_text(text)
    return {"data": [str(tmp_path / "x.jsonl")]}


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("short", {"model": "other"}, "reference was frozen:.* and is frozen:"),
        ("lora bf16", {"model": "other"}, "reference was adapter:.* and is adapter:"),
        ("short", {"data": "shorter"}, "data was [0-9a-f]{16} and is"),
        ("short", {"data": "rescored"}, "data was"),
        ("short", {"data": "weighted"}, "data was"),
        ("short", {"score_center": "dataset"}, "data was"),
        ("short", {"beta": 0.2, "learning_rate": 1e-3}, "beta was 0.1 and is 0.2; .*_rate was"),
        ("short", {"batch_size": 9, "seed": 1}, "batch_size was 8 and is 9; seed was 0 and is 1"),
        ("lora bf16", {"lora": LoraOptions(r=8, alpha=8)}, "lora was .*'r': 4.* and is .*'r': 8"),
        ("lora bf16", {"lora": None}, "lora was .* and is None"),
    ],
)
def test_another_run_is_not_resumed(interrupted, mixed, tmp_path, variant, changes, message):
    settings = interrupted[variant] | {"resume": True}
    if "model" in changes:
        changes = {"model": save_llama(tmp_path / "other", seed=9)}
    elif "data" in changes:
        changes = another_data(changes["data"], mixed, tmp_path)
    out = Path(settings["output_dir"])
    before = {name: (out / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    whole_message = f"checkpoint-2 belongs to another run: .*{message}.*output_dir"
    with pytest.raises(ValueError, match=whole_message):
        train(RunConfig(**settings | changes))
    after = {name: (out / name).read_bytes() for name in before}
    assert after == before, "a refused run leaves no trace"


def test_another_reference_is_not_resumed(interrupted, tmp_path):
    """The same records with log-probs in a column."""
    entries = precompute_reference(
        RunConfig(**interrupted["short"] | {"output_dir": str(tmp_path)})
    )
    changes = {"resume": True, **entries}
    with pytest.raises(ValueError, match="reference was frozen:.* and is cached:"):
        train(RunConfig(**interrupted["short"] | changes))


def test_a_run_is_not_resumed_in_another_dtype(interrupted, tmp_path):
    """precision=auto is bf16 on a GPU, where this checkpoint claims to be from."""
    shutil.copytree(interrupted["short"]["output_dir"], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    state["resolved"]["compute"] = "bfloat16"
    path.write_text(json.dumps(state))
    seal(path.parent)
    changes = {"resume": True, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="compute was bfloat16 and is float32"):
        train(RunConfig(**interrupted["short"] | changes))


def test_an_output_directory_in_use_is_refused(interrupted):
    message = "holds an earlier run; set resume=true to continue it, or another output_dir"
    with pytest.raises(ValueError, match=message):
        train(RunConfig(**interrupted["short"]))


def test_settings_that_fail_may_be_mended_in_place(llamas, mixed, tmp_path):
    """A run that never took a step does not claim its directory."""
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "the cat", "chosen": "sat"}])
    with pytest.raises(ValueError, match="rejected"):
        train(make_config(llamas["untied"], bad, tmp_path / "run", max_steps=1))
    few = {"max_steps": 1, "batch_size": 4}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", **few))
