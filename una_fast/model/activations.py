"""Lower the memory of activations by four switches: exact, and without lists of model families.

    checkpointing   one hidden state [T, D] per layer is kept; the rest of the layer is computed
                    again in backward
    offload         the kept hidden states wait in pinned host memory, copied out and back beside
                    the computation
    tiled MLP       an MLP sees a tile of tokens at a time: [T, intermediate] never exists
    liger           liger-kernel's RMSNorm, RoPE and gated MLPs: less saved and allocated than by
                    PyTorch's

Legend: T tokens of a row, D hidden size.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from una_fast.counters import is_fake, memory_category
from una_fast.model.four_bits import Nf4Linear
from una_fast.model.head_probe import text_modules
from una_fast.model.settings import MemoryOptions

# Bytes. torch rounds pinned allocations up to a power of two: blocks of such a size lose nothing.
BLOCK = 1 << 26
SMALL = 1 << 20  # bytes; a smaller tensor stays on the device


def switch_on(options: MemoryOptions, model: PreTrainedModel) -> None:
    """Switch on the memory options of a model, in place.

    ValueError if the model or the machine does not allow an option.
    """
    mlps = [] if options.mlp_tile is None else find_mlps(model)
    # After the MLPs were tried, on any device, and before their forward is taken.
    if options.liger:
        apply_liger(model)
    if options.mlp_tile is not None:
        tile_mlps(model, mlps, options.mlp_tile)
    if options.gradient_checkpointing:
        enable_checkpointing(model, offload=options.offload_activations)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformers model, sharded or not."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    names |= {f"FSDP{name}" for name in names}  # as fully_shard calls the classes
    return [module for module in model.modules() if type(module).__name__ in names]


# ---- activation checkpointing, with offload ----------------------------------------------------


def enable_checkpointing(model: PreTrainedModel, *, offload: bool) -> None:
    """Checkpoint every layer of a model.

    model: changed in place
    offload: keep the hidden states in host memory until backward (see HostOffload)

    ValueError for a model without checkpointing in transformers.
    """
    # The name changed in transformers 5.2x; the old name warns.
    new_name = hasattr(model, "activation_checkpointing_enable")
    enable = (
        model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    if not offload:
        return
    # transformers' own offload copies on the compute stream, which then waits for the bus.
    run = HostOffload()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run


class _Parked:
    """A tensor in host memory, in blocks.

    blocks: flat pieces of the tensor
    before: the tensor parked before, if still needed
    stream: copy stream of the tensor's device, if a GPU
    fetched: the tensor on the device again, from the start of the copy until the tensor is used
    """

    def __init__(
        self,
        tensor: Tensor,
        blocks: list[Tensor],
        before: weakref.ref[_Parked] | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.blocks = blocks
        self.before = before
        self.stream = stream
        self.fetched: Tensor | None = None

    def __del__(self) -> None:
        # Fetched and never asked for: the copy may still write.
        if self.fetched is not None and self.stream is not None:
            self.fetched.record_stream(self.stream)


class HostOffload:
    """A run of layers under activation checkpointing, with inputs in pinned host memory.

    Copies run on a second stream. A leaving state is held until two more states have left; only
    then does the compute stream wait for the copy, so that memory does not depend on how far the
    host runs ahead. Backward takes the layers in reverse: fetching the input of a layer also
    starts the copy of the layer before, and two inputs are on the device at a time. On a CPU the
    copies go from host to host, with the same numbers and no gain.
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[_Parked] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a layer; called by transformers in place of torch's checkpoint."""
        # The hooks see the inputs that checkpoint saves; inside the layer checkpoint's own hooks
        # are in force.
        with saved_tensors_hooks(self._park, self._fetch):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Return the copy stream of a GPU, made to wait for the compute stream's work so far."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        """Start the copy of a tensor to the host; parameters and small tensors stay."""
        if isinstance(tensor, nn.Parameter) or tensor.numel() * tensor.itemsize < SMALL:
            return tensor
        flat = tensor.detach().reshape(-1)
        stream = self._stream(tensor.device)
        blocks = []
        with torch.cuda.stream(stream), memory_category("host"):
            for piece in flat.split(BLOCK // tensor.itemsize):
                block = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=tensor.is_cuda)
                blocks.append(block.copy_(piece, non_blocking=True))
        if stream is not None:
            self._leaving.append((flat, stream.record_event()))
            self._let_go(keep=2)
        parked = _Parked(tensor, blocks, self._newest, stream)
        self._newest = weakref.ref(parked)
        return parked

    def _let_go(self, keep: int) -> None:
        """Drop all but the newest leaving states, once the copies have read the dropped states."""
        while len(self._leaving) > keep:
            flat, copied = self._leaving.popleft()
            torch.cuda.current_stream(flat.device).wait_event(copied)

    def _fetch(self, parked: Tensor | _Parked) -> Tensor:
        """Return a tensor on the device, and start the copy of the tensor parked before."""
        if isinstance(parked, Tensor):
            return parked
        self._let_go(keep=0)
        self._start(parked)
        tensor, parked.fetched = parked.fetched, None
        if parked.stream is not None:
            torch.cuda.current_stream(parked.device).wait_stream(parked.stream)
        before = parked.before() if parked.before is not None else None
        if before is not None:
            self._start(before)
        return tensor

    def _start(self, parked: _Parked) -> None:
        """Start the copy of a parked tensor back to the device."""
        if parked.fetched is not None:
            return
        parked.fetched = torch.empty(parked.shape, dtype=parked.dtype, device=parked.device)
        with torch.cuda.stream(self._stream(parked.device)):
            pieces = parked.fetched.view(-1).split(BLOCK // parked.dtype.itemsize)
            for piece, block in zip(pieces, parked.blocks, strict=True):
                piece.copy_(block, non_blocking=True)


# ---- the MLP in tiles of tokens ----------------------------------------------------------------


class _Kept(torch.autograd.Function):
    """Save x for the MLP's backward, in a node of the graph in front of the MLP.

    Backward runs a checkpointed layer again, up to the last tensor to be saved. With x saved here,
    and no tensor saved in _Tiled, the second run stops in front of the MLP: the MLP runs once in
    forward and once in backward, tiled or not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tiled(torch.autograd.Function):
    """y = run(x), tile by tile along the tokens; every tile is computed again in backward.

    The gradients of the weights are summed over tiles in float32: tiles cost no accuracy. The
    trained weights are inputs, for FSDP's hooks and for accumulation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mlp: _Mlp,
        kept: Any,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        """Compute y.

        mlp: the module
        kept: node of _Kept with x saved; without a node x is saved here
        x: [..., D]
        weights: trained weights of the module
        """
        device = x.device.type
        ctx.mlp, ctx.kept = mlp, kept
        ctx.autocast = {
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        if kept is None:
            ctx.save_for_backward(x)
        rows = x.reshape(-1, x.shape[-1])
        y = None
        for tile in _tiles(len(rows), mlp.tile):
            piece = mlp.run(rows[None, tile])[0]
            if y is None:
                y = piece.new_empty(len(rows), piece.shape[-1])
            y[tile] = piece
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        node = ctx if ctx.kept is None else ctx.kept
        (x,) = node.saved_tensors
        # Taken now, not in forward: FSDP2 may have gathered them again in between.
        weights = ctx.mlp.weights()
        need_x = ctx.needs_input_grad[2]
        rows = x.reshape(-1, x.shape[-1])
        grads = grad.reshape(-1, grad.shape[-1])
        dx = torch.empty_like(rows) if need_x else None
        sums: list[Tensor | None] = [None] * len(weights)
        for tile in _tiles(len(rows), ctx.mlp.tile):
            piece = rows[None, tile].detach().requires_grad_(need_x)
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                y = ctx.mlp.run(piece)
            wanted = [piece, *weights] if need_x else weights
            found = list(torch.autograd.grad(y, wanted, grads[None, tile], allow_unused=True))
            if need_x:
                dx[tile] = found.pop(0)[0]
            _add_in_float32(sums, found)
        if dx is not None:
            dx = dx.view_as(x)
        dws = [None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)]
        return None, None, dx, *dws


def _add_in_float32(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to sums in float32 or wider, in place."""
    for k, gradient in enumerate(gradients):
        if gradient is None:  # of an expert that no token of the tile chose
            continue
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if sums[k] is None:
            sums[k] = wide
        else:
            sums[k].add_(wide)


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    """Yield equal pieces of at most `tile` rows."""
    count = max(-(-rows // tile), 1)
    for k in range(count):
        yield slice(rows * k // count, rows * (k + 1) // count)


class _Mlp:
    """The forward of an MLP module, run in tiles of tokens."""

    def __init__(self, module: nn.Module, tile: int) -> None:
        self.module = module
        self.tile = tile
        self.run = module.forward  # bound; liger's, if the module was patched before

    def weights(self) -> list[nn.Parameter]:
        """Return the trained weights, in a fixed order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the module's output of x [..., D]."""
        if x.shape[:-1].numel() <= self.tile:
            return self.run(x)
        kept = None
        if torch.is_grad_enabled() and x.requires_grad:
            x = _Kept.apply(x)
            kept = x.grad_fn
        return _Tiled.apply(self, kept, x, *self.weights())


def tile_mlps(model: PreTrainedModel, mlps: Sequence[nn.Module], tile: int) -> None:
    """Run MLPs on at most `tile` tokens at a time.

    model: named in errors
    mlps: MLPs of the model (see find_mlps), changed in place
    tile: tokens

    ValueError for an empty list.
    """
    if not mlps:
        raise ValueError(
            f"mlp_tile={tile}: {type(model).__name__} has no MLP module that works token by token; "
            "leave mlp_tile out"
        )
    for module in mlps:
        module.forward = _Mlp(module, tile)


def find_mlps(model: PreTrainedModel) -> list[nn.Module]:
    """Find the MLPs of a model by trying, not by name.

    An MLP is a child of a decoder layer that text runs through, holds several matrices, and maps
    [1, T, D] to the same shape, token by token.
    """
    inside = text_modules(model)
    mlps = []
    tried: dict[str, bool] = {}  # of weights without numbers: a form is tried once
    for layer in decoder_layers(model):
        for child in layer.children() if layer in inside else ():
            form = _form_on_meta(child)
            if form is None:
                found = _is_mlp(child, model)
            elif form in tried:
                found = tried[form]
            else:
                found = tried[form] = _is_mlp(_with_numbers(child), model)
            mlps += [child] if found else []
    return mlps


def _form_on_meta(module: nn.Module) -> str | None:
    """Return classes and shapes of a module on the meta device; None for a module with numbers."""
    parameters = list(module.parameters())
    if all(parameter.device.type != "meta" for parameter in parameters):
        return None
    return f"{module} {[(p.shape, p.dtype) for p in parameters]}"


@torch.no_grad()
def _with_numbers(module: nn.Module) -> nn.Module:
    """Return a copy of a module on the host; weights on the meta device become random numbers."""
    copied = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for part in copied.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            is_packed = isinstance(part, Nf4Linear) and name == "weight"
            like = {"dtype": part.numbers if is_packed else parameter.dtype, "device": "cpu"}
            shape = (part.out_features, part.in_features) if is_packed else parameter.shape
            numbers = torch.empty(shape, **like)
            numbers.normal_(std=shape[-1] ** -0.5, generator=generator)
            if is_packed:
                numbers = part.pack(numbers)
            part._parameters[name] = nn.Parameter(numbers, parameter.requires_grad)
    return copied


def _is_mlp(module: nn.Module, model: PreTrainedModel) -> bool:
    """Return whether a module maps hidden states token by token; tried on six tokens."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    if len(matrices) < 2:
        return False
    width = model.config.get_text_config().hidden_size
    dtype = model.get_input_embeddings().weight.dtype  # quantized matrices have integers inside
    like = {"dtype": dtype, "device": matrices[0].device}
    x = torch.linspace(-1, 1, 6 * width, **like).sin().view(1, 6, -1)
    try:
        with torch.no_grad():
            whole = module(x)
            pieces = torch.cat([module(x[:, :2]), module(x[:, 2:])], dim=1)
            # A number is compared, so that a plan, which traces shapes alone, can do without.
            error, largest = (whole - pieces).abs().max(), whole.abs().max()
    except TypeError:
        return False  # wants more than hidden states, or gives more: attention
    except Exception:
        if is_fake(x):  # a failure without numbers need not be one with numbers
            raise
        return False
    if whole.shape != x.shape:
        return False
    # bf16 rounds; the share of another token would be all of it.
    return is_fake(error) or bool(error <= 0.02 * largest)


# ---- liger-kernel ------------------------------------------------------------------------------


def apply_liger(model: PreTrainedModel) -> None:
    """Use liger-kernel's RMSNorm, RoPE and gated MLP in a model, in place; the head stays ours.

    Functions replaced by liger in the module of the model's family are limited to tensors on a GPU,
    because further models of the family are tried on a CPU. ValueError without a GPU, without
    liger-kernel, and for a family unknown to liger-kernel.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "liger=true needs a GPU, for its kernels are written in Triton; set liger=false"
        )
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise ValueError(
            "liger=true, but liger-kernel is not installed: pip install una-fast[liger]"
        ) from None
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"liger=true, but liger-kernel has no kernels for the model type {kind}; "
            "set liger=false"
        )
    family = sys.modules[type(model).__module__]
    before = dict(vars(family))
    # Without the two switches the forward that scoring runs in, or torch's loss, is replaced.
    _apply_liger_kernel_to_instance(
        model=model, fused_linear_cross_entropy=False, cross_entropy=False
    )
    for name, old in before.items():
        new = getattr(family, name)
        if new is old:
            continue
        # Classes are put back: the layers of this model have been patched already. Of functions
        # each call takes the right one.
        setattr(family, name, old if isinstance(old, type) else _by_device(old, new))


def _by_device(on_cpu: Callable[..., Any], on_gpu: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(on_cpu)
    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (on_gpu if x.is_cuda else on_cpu)(x, *args, **kwargs)

    return chosen
