"""The state of training in a checkpoint: optimizer, random states, a reference that has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

from una_fast.distributed import World, reshard
from una_fast.model.policy import Policy
from una_fast.train.checkpoint import read_state
from una_fast.train.manifest import Manifest
from una_fast.train.shards import ShardReader, own

TRAINING = "training"  # directory in a checkpoint


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
    paths = [checkpoint / name for name in names if name.startswith(f"{TRAINING}/")]
    # Makes the state of every parameter: all moments, of the right kinds, to be overwritten.
    get_optimizer_state_dict(policy.model, optimizer)
    try:
        with ShardReader(paths) as reader:
            # A parameter that never had a gradient has no state, then as now.
            for name in _states(policy, optimizer).keys() - set(numbers["states"]):
                optimizer.state.pop(_parameters(policy)[name])
            tensors = training_tensors(policy, optimizer, world, reference)
            random = {name: tensors.pop(name) for name in _random_states(world)}
            reader.fill(tensors)
            # A rank that the saved run did not have finds no random state, and keeps its own.
            found = {name: tensor for name, tensor in random.items() if reader.has(name)}
            reader.fill(found)
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


def training_tensors(
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


def training_numbers(policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
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
