"""Checkpoints: everything a killed run needs to continue exactly, and nothing that looks complete before it is.

checkpoint-N/   weights (safetensors, Hugging Face form) and tokenizer: usable as a model on its own
                training/     optimizer state, random states of all ranks, and a reference that is no longer that of
                              the start (torch.distributed.checkpoint)
                state.json    step, learning rate schedule, metrics not reported yet, and what identifies the run:
                              reference, data and settings
                COMPLETE      written last; a directory without it is ignored and overwritten
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from una_fast.distributed import World
from una_fast.model.export import save_pretrained
from una_fast.model.policy import Policy

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))
    ]
    return [path for _, path in sorted(found) if (path / MARKER).exists()]


def save_model(
    directory: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, world: World
) -> None:
    """Weights and tokenizer in Hugging Face form, gathered from all ranks, written by the first."""
    state_dict = None
    if world.sharded:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=policy.is_adapter
        )
        state_dict = get_model_state_dict(policy.model, options=options)
        first: dict[int, str] = {}
        for name, parameter in policy.model.named_parameters(remove_duplicate=False):
            if (
                name in state_dict
            ):  # tied weights are gathered one by one; as one tensor they are written once
                state_dict[name] = state_dict[first.setdefault(id(parameter), name)]
    if world.is_main:
        save_pretrained(policy, directory, tokenizer, state_dict)


def save_checkpoint(
    output_dir: Path,
    policy: Policy,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    state: dict[str, Any],
    keep: int,
    reference: Policy | None = None,
) -> Path:
    """Write checkpoint-N, then delete the oldest complete ones beyond `keep`. state: what state.json holds, N its
    "step". reference: a reference that is no longer that of the start."""
    directory = output_dir / f"checkpoint-{state['step']}"
    if world.is_main:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    world.barrier()
    save_model(directory, policy, tokenizer, world)
    training = {
        "optimizer": get_optimizer_state_dict(policy.model, optimizer),
        **_random_states(world),
    }
    if reference is not None:
        training["reference"] = get_model_state_dict(reference.model)
    dcp.save(training, checkpoint_id=directory / "training", no_dist=not world.sharded)
    world.barrier()
    if world.is_main:
        (directory / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        (directory / MARKER).touch()
        for old in complete_checkpoints(output_dir)[:-keep]:
            (old / MARKER).unlink()  # first: a half-deleted checkpoint must not look complete
            shutil.rmtree(old)
    world.barrier()
    return directory


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def load_training_state(
    checkpoint: Path,
    policy: Policy,
    optimizer: Optimizer,
    world: World,
    reference: Policy | None = None,
) -> None:
    """Optimizer and random states into place, and the weights of a reference that had changed. The policy's weights
    were loaded with the model, from the same directory."""
    directory = checkpoint / "training"
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    random = {
        name: state for name, state in _random_states(world).items() if name in saved
    }  # none for a new rank
    training = {"optimizer": get_optimizer_state_dict(policy.model, optimizer), **random}
    if reference is not None:
        training["reference"] = get_model_state_dict(
            reference.model
        )  # its own tensors, which are loaded into
    dcp.load(training, checkpoint_id=directory, no_dist=not world.sharded)
    set_optimizer_state_dict(policy.model, optimizer, training["optimizer"])
    for name in random:
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(training[name], world.device)
        else:
            torch.set_rng_state(training[name])


def _random_states(world: World) -> dict[str, torch.Tensor]:
    states = {f"cpu_rng_{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"cuda_rng_{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states
