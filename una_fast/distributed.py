"""Ranks and FSDP2: who takes part in a run, how modules are wrapped, and how sums cross ranks.

A single contract makes a sharded run equal to a single process: gradients are *summed* over ranks
(FSDP2 would average), because the loss is divided by the number of units of the global batch
already. The head stays in the root's group: gathered once per forward, kept until the gradient of
the head is built in that same forward, and reduced once. With parallel.split_vocabulary the head is
outside of FSDP2 (`keep_rows`): no rank gathers it, and its gradient is complete on every rank but
for a sum over copies (`sum_over_copies`).

parallel.py lays the ranks out. Every copy of the weights is sharded over its ranks (shard x
context); gradients are summed within a copy (reduce-scatter), then over the copies (all-reduce, of
the shards).
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from una_fast.group import ALONE, Group
from una_fast.parallel import Mesh, ParallelOptions

# A rank may hash or write hundreds of gigabytes, or ask a judge, while the others wait for it. A
# rank that has died is noticed by its launcher.
# FSDP2 takes parameters of integers, such as packed codes, from torch 2.12 on.
SHARDS_INTEGERS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
PATIENCE = datetime.timedelta(hours=3)

Result = TypeVar("Result")

# How gloo and NCCL tell that another rank is gone.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process exited|NCCL error"
)


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run.

    rank, size: of all ranks
    device: of this process
    mesh: how the ranks share the work; None: all of them shard
    context: the ranks that split the tokens of a batch with this one
    """

    rank: int
    size: int
    device: torch.device
    mesh: Mesh | None = None
    context: Group = ALONE

    @property
    def data_rank(self) -> int:
        """Return the number of this rank's context group: of the micro-batches that are its own."""
        return self.rank // self.context.size

    @property
    def data_size(self) -> int:
        """Return the number of context groups, each with micro-batches of its own."""
        return self.size // self.context.size

    @property
    def shards(self) -> int:
        """Return the number of ranks that hold one copy of the weights among themselves."""
        return self.size if self.mesh is None else self.mesh.shards

    @property
    def shard_rank(self) -> int:
        """Return the place of this rank among those of its copy of the weights."""
        return self.rank % self.shards

    @property
    def has_first_copy(self) -> bool:
        """Return whether this rank holds a shard of the first copy of the weights."""
        return self.rank < self.shards

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.size > 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; may overwrite the tensor."""
        if self.sharded:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def sum_of_data(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the context groups; may overwrite the tensor.

        values: the same on all ranks of a context group
        """
        if self.context.rank:
            values = torch.zeros_like(values)
        return self.sum(values)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of ranks. value: any object that pickles."""
        if not self.sharded:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run an action on the main rank; return its result, or raise its refusal, on every rank.

        action: returns an object that pickles, between the ranks of one run; raises ValueError or
            OSError to refuse
        """
        if not self.sharded:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def maximum(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of every number over all ranks."""
        if not self.sharded:
            return list(numbers)
        values = torch.tensor(list(numbers), device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.sharded:
            dist.barrier()


def start_world(device: str = "auto", *, on_host: bool = False) -> World:
    """Join the ranks that torchrun started, or become the only rank.

    device: "auto" | "cpu" | "cuda"; "auto" is a GPU where torch finds one
    on_host: tensors of the host cross ranks too (parallel.offload_parameters), by gloo

    ValueError for "cuda" without a GPU.
    """
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu or auto")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(index)
    if size > 1 and not dist.is_initialized():
        backend = "gloo"
        if kind == "cuda":
            backend = "cuda:nccl,cpu:gloo" if on_host else "nccl"
        dist.init_process_group(backend, timeout=PATIENCE)
    rank = dist.get_rank() if size > 1 else 0
    place = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    return World(rank, size, place)


def start_ranks(device: str, options: ParallelOptions | None) -> World:
    """Join the ranks of a run, laid out as the settings say: `start_world`, then `lay_out`."""
    on_host = options is not None and options.offload_parameters
    return lay_out(start_world(device, on_host=on_host), options)


def lay_out(world: World, options: ParallelOptions | None) -> World:
    """Return the ranks with the mesh of a run; all ranks must call.

    world: as started
    options: settings of the run; None: all ranks shard

    ValueError, with the arithmetic, where the settings do not go with the number of ranks.
    """
    mesh = (options or ParallelOptions()).mesh(world.size)
    context = ALONE
    if mesh.context > 1:
        devices = _mesh_of(world, (mesh.data, mesh.context), ("data", "context"))
        handle = devices.get_group("context")
        context = Group(world.rank % mesh.context, mesh.context, handle)
    return replace(world, mesh=mesh, context=context)


def is_loss_of_a_rank(error: Exception) -> bool:
    """Return whether an error only tells that another rank of the run is gone."""
    of_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return of_torch and dist.is_initialized() and _LOST.search(str(error)) is not None


def stop_world() -> None:
    """Leave the process group, if there is any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(
    causal_lm: nn.Module,
    layers: Sequence[nn.Module],
    world: World,
    compute_dtype: torch.dtype | None,
    options: ParallelOptions | None = None,
    split: nn.Module | None = None,
) -> None:
    """Shard every layer and then the rest (embedding, final norm, head) with FSDP2, in place.

    causal_lm: the whole model, moved to the device layer by layer; or a model on the meta device,
        for `allocate_shards`
    layers: the repeated blocks of causal_lm, in order; parameters are gathered a layer at a time
    world: the ranks to shard over
    compute_dtype: of gathered weights and activations; None: as the weights are. Gradients are
        reduced in float32
    options: settings of the run; None: the defaults
    split: a module with parameters that FSDP2 never gathers: every rank computes with its own rows
    """
    options = options or ParallelOptions()
    mesh = _weight_mesh(world)
    ignored = None
    if split is not None:
        ignored = keep_rows(split, mesh, home_of_shards(world, options))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if options.offload_parameters:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    wrapped = [*layers, causal_lm]
    for module in wrapped:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=ignored,
        )
    for module in wrapped:
        module.set_gradient_divide_factor(1.0)
        # gloo cannot fold the factor into the reduction
        module.set_force_sum_reduction_for_comms(True)
    if options.prefetch:
        _prefetch(layers, options.prefetch)


def keep_rows(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> set[nn.Parameter]:
    """Replace the parameters of a module by this rank's rows of them, outside FSDP2.

    module: changed in place; parameters may be on the meta device
    mesh: [ranks], or [copies, ranks]; rows are split over the last dimension as FSDP2 splits them
    device: of the rows

    Returns the new parameters: DTensors.
    """
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for name, whole in list(module.named_parameters(recurse=False)):
        shape, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        rows = whole.detach()[offsets[0] : offsets[0] + shape[0]]
        if not whole.is_meta:
            rows = rows.to(device, copy=True)
        tensor = DTensor.from_local(
            rows,
            mesh,
            placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        parameter = nn.Parameter(tensor, requires_grad=whole.requires_grad)
        setattr(module, name, parameter)
    return set(module.parameters(recurse=False))


def group_of_rows(tensor: DTensor) -> Group:
    """Return the ranks that hold the rows of a tensor among themselves: of one copy."""
    mesh, last = tensor.device_mesh, tensor.device_mesh.ndim - 1
    return Group(mesh.get_local_rank(last), mesh.size(last), mesh.get_group(last))


def sum_over_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients of `keep_rows` over the copies of the weights; once a step, after backward.

    parameters: of a module outside FSDP2; the gradient of a copy is complete over its ranks
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.device_mesh.ndim > 1:
            local, mesh = parameter.grad.to_local(), parameter.grad.device_mesh
            total = local.float() if local.dtype.itemsize < 4 else local
            dist.all_reduce(total, group=mesh.get_group(0))
            local.copy_(total)  # rounded once


def _weight_mesh(world: World) -> DeviceMesh:
    """Return the ranks of one copy of the weights; of several copies, in rows: [copies, ranks]."""
    copies = world.size // world.shards
    if copies == 1:
        return _mesh_of(world, (world.size,), ("shard",))
    return _mesh_of(world, (copies, world.shards), ("replicate", "shard"))


def _mesh_of(world: World, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return ranks in rows, whose groups have the patience of the whole run."""
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=names)
    set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    for group in mesh.get_all_groups():
        if set_timeout is not None and dist.get_backend(group) != "fake":
            set_timeout(PATIENCE, group)
    return mesh


def _prefetch(layers: Sequence[nn.Module], ahead: int) -> None:
    """Gather some layers ahead: the next in forward, those before in backward."""
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + ahead])
        before = layers[max(number - ahead, 0) : number]
        layer.set_modules_to_backward_prefetch(before[::-1])


def reduce_gradients(model: nn.Module, *, now: bool, is_last: bool) -> None:
    """Say which sums over ranks the next backward pass makes; no module but FSDP2's is asked.

    model: sharded or not
    now: sum the gradients within a copy of the weights; or else they stay whole on every rank, and
        a later pass sums them
    is_last: the last pass of a step, which makes all sums; those over the copies are made there
        alone
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now or is_last)
        model.set_requires_all_reduce(is_last)


def home_of_shards(world: World, options: ParallelOptions | None) -> torch.device:
    """Return the device that the shards of the weights stay on."""
    on_host = options is not None and options.offload_parameters
    return torch.device("cpu") if on_host else world.device


def allocate_shards(causal_lm: nn.Module, device: torch.device) -> dict[str, DTensor]:
    """Give memory to the shards of parameters on the meta device.

    causal_lm: the sharded model; parameters with memory stay
    device: of the shards

    Returns name -> parameter with new memory, not filled; tied parameters have several names.
    """
    made: dict[DTensor, nn.Parameter] = {}
    named: dict[str, DTensor] = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta":
            continue
        if parameter not in made:
            made[parameter] = _with_memory(parameter, device)
        named[name] = made[parameter]
    # FSDP2 takes note of new parameters in this call.
    causal_lm.load_state_dict(named, strict=False, assign=True)
    return named


@torch.no_grad()
def _with_memory(parameter: DTensor, device: torch.device) -> nn.Parameter:
    """Return a sharded parameter of the same form, with memory of its own."""
    whole = DTensor.from_local(
        torch.empty_like(parameter.to_local(), device=device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded, without its gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_rows(tensor: DTensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a sharded tensor, and the index of the first row."""
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local().detach(), offsets[0]


def reshard(*models: nn.Module) -> None:
    """Free the parameters that a forward without backward keeps gathered; shards remain."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_scalar(value: Tensor) -> float:
    """Return a norm or loss, sharded or not, as a Python number."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return float(value)
