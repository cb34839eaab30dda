"""The weights of a policy as plain tensors by name: to save, or to hand to a server."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from una_fast.distributed import World
from una_fast.model.policy import Policy


def whole_weights(policy: Policy, world: World) -> dict[str, Tensor]:
    """Return weights by name, the trained ones alone for an adapter.

    policy: the model
    world: the ranks; a sharded policy is gathered on the host of the main rank

    Without shards the tensors are the model's own.
    """
    if world.sharded:
        return _gathered(policy)
    state_dict = policy.model.state_dict()
    if not policy.is_adapter:
        return state_dict
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state_dict.items() if name in trained}


def _gathered(policy: Policy) -> dict[str, Tensor]:
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
