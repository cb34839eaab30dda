"""Checkpoints: everything a killed run needs to continue exactly; complete, or ignored.

checkpoint-N/   weights (safetensors, Hugging Face form) and tokenizer: usable as a model by itself
                training/     optimizer state, random states of all ranks, and a reference that has
                              changed since the start (torch.distributed.checkpoint)
                state.json    step, learning rate schedule, metrics not reported yet, the decisions
                              of the run, and the identity: reference, data and settings
                COMPLETE      written last; without this file a directory is ignored and overwritten
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
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
    """Return the complete checkpoints of a run, oldest first."""
    by_step: dict[int, Path] = {}
    for path in output_dir.glob("checkpoint-*"):
        name = _NAME.fullmatch(path.name)
        if name is not None and (path / MARKER).exists():
            by_step[int(name[1])] = path
    return [by_step[step] for step in sorted(by_step)]


def save_model(
    directory: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, world: World
) -> None:
    """Write weights and tokenizer in Hugging Face form.

    directory: written by the main rank
    policy: gathered from all ranks
    tokenizer: of the policy
    world: the ranks; all of them must call
    """
    state_dict = _whole_state_dict(policy) if world.sharded else None
    if world.is_main:
        save_pretrained(policy, directory, tokenizer, state_dict)


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
    """Write checkpoint-N, then delete the oldest complete checkpoints.

    output_dir: of the run
    policy: the model to save
    optimizer: of the policy
    tokenizer: of the policy
    world: the ranks; all of them must call
    state: content of state.json, as JSON values; N is state["step"]
    keep: complete checkpoints that stay
    reference: a reference that has changed since the start of the run

    Returns the directory of the checkpoint.
    """
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
    """Return the content of state.json."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def load_training_state(
    checkpoint: Path,
    policy: Policy,
    optimizer: Optimizer,
    world: World,
    reference: Policy | None = None,
) -> None:
    """Load the optimizer and random states, and the weights of a reference that had changed.

    checkpoint: a complete checkpoint; the weights of the policy were loaded with the model
    policy: with the weights of the checkpoint
    optimizer: of the policy
    world: the ranks; all of them must call
    reference: a reference that changes during the run; its weights are overwritten
    """
    directory = checkpoint / "training"
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    # A rank that the saved run did not have finds no random state, and keeps its own.
    states = _random_states(world)
    random = {name: state for name, state in states.items() if name in saved}
    training = {"optimizer": get_optimizer_state_dict(policy.model, optimizer), **random}
    if reference is not None:
        # The tensors of the reference itself: dcp.load writes into them.
        training["reference"] = get_model_state_dict(reference.model)
    dcp.load(training, checkpoint_id=directory, no_dist=not world.sharded)
    set_optimizer_state_dict(policy.model, optimizer, training["optimizer"])
    for name in random:
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(training[name], world.device)
        else:
            torch.set_rng_state(training[name])


def _random_states(world: World) -> dict[str, Tensor]:
    states = {f"cpu_rng_{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"cuda_rng_{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states
