"""What activations cost, and the switches that lower it: each is exact, and none knows a model family.

    checkpointing   one hidden state [T, D] per layer is kept; the rest of the layer is computed again in backward
    offload         those hidden states wait in pinned host memory, copied out and back beside the computation
    tiled MLP       an MLP sees a tile of tokens at a time: its [T, intermediate] activations never exist
    liger           liger-kernel's RMSNorm, RoPE and gated MLPs, which save and allocate less than PyTorch's

Legend: T tokens of a row, D hidden.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from una_fast.counters import is_fake, memory_category
from una_fast.model.settings import MemoryOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def switch_on(options: MemoryOptions, model: PreTrainedModel) -> None:
    """Switch on the memory options of a model, in place.

    ValueError where the model or the machine does not allow an option.
    """
    mlps = [] if options.mlp_tile is None else find_mlps(model)
    # After the MLPs were tried, on any device, and before their forward is taken.
    if options.liger:
        apply_liger(model)
    if options.mlp_tile is not None:
        tile_mlps(model, mlps, options.mlp_tile)
    if options.gradient_checkpointing:
        enable_checkpointing(model, offload=options.offload_activations)


# --- activation checkpointing, with offload --------------------------------------------------------------------------

BLOCK = (
    1 << 26
)  # bytes. torch rounds pinned allocations up to a power of two: blocks of one lose nothing

SMALL = 1 << 20  # bytes; below this a tensor stays where it is


def enable_checkpointing(model: PreTrainedModel, *, offload: bool) -> None:
    """Checkpoint every layer of a model that transformers can checkpoint; ValueError for one that it cannot.

    offload: the hidden states that are kept wait in host memory (see HostOffload)."""
    # The name changed in transformers 5.2x; the old one warns.
    new = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if not offload:
        return
    # transformers' own offload copies on the compute stream, which then waits for the bus.
    run = HostOffload()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = run


class _Parked:
    """A tensor in host memory, in blocks; `fetched` while it is on its way back."""

    def __init__(
        self,
        tensor: Tensor,
        blocks: list[Tensor],
        before: weakref.ref[_Parked] | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.blocks, self.before, self.stream = blocks, before, stream
        self.fetched: Tensor | None = None

    def __del__(self) -> None:
        if (
            self.fetched is not None and self.stream is not None
        ):  # never asked for: the copy may still write
            self.fetched.record_stream(self.stream)


class HostOffload:
    """Runs a layer under activation checkpointing and keeps its inputs in pinned host memory until backward.

    Copies run on a stream of their own. A state that leaves is held until two more have followed, when the compute
    stream waits for its copy: how far the host runs ahead does not change what is allocated. Backward takes the layers
    in reverse, so fetching one layer's input also starts the copy of the layer before it: two are on the device at a
    time. On a CPU the copies go from host to host: the same numbers, nothing gained."""

    def __init__(self) -> None:
        self._newest: weakref.ref[_Parked] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The hooks see the inputs that checkpoint saves; inside the layer its own hooks are in force.
        with saved_tensors_hooks(self._park, self._fetch):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The copy stream of a GPU, made to wait for all that the compute stream holds so far."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        if isinstance(tensor, nn.Parameter) or tensor.numel() * tensor.itemsize < SMALL:
            return tensor
        flat = tensor.detach().reshape(-1)
        stream = self._stream(tensor.device)
        with torch.cuda.stream(stream), memory_category("host"):
            blocks = []
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
        """Drop all but the newest states that leave; the compute stream waits until their copies have read them."""
        while len(self._leaving) > keep:
            flat, copied = self._leaving.popleft()
            torch.cuda.current_stream(flat.device).wait_event(copied)

    def _fetch(self, parked: Tensor | _Parked) -> Tensor:
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
        if parked.fetched is not None:
            return
        parked.fetched = torch.empty(parked.shape, dtype=parked.dtype, device=parked.device)
        with torch.cuda.stream(self._stream(parked.device)):
            pieces = parked.fetched.view(-1).split(BLOCK // parked.dtype.itemsize)
            for piece, block in zip(pieces, parked.blocks, strict=True):
                piece.copy_(block, non_blocking=True)


# --- the MLP in tiles of tokens --------------------------------------------------------------------------------------


class _Kept(torch.autograd.Function):
    """x, saved. A node of its own before the MLP: a checkpointed layer that is run again in backward stops at the last
    tensor it must save, and that is now before the MLP, not after it. So tiles cost no second run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tiled(torch.autograd.Function):
    """y = run(x), tile by tile along the tokens; every tile is computed again in backward.

    The gradients of the weights are summed over tiles in float32, so that tiles cost no accuracy. The weights are
    inputs, so that they get their gradients as any other (FSDP's hooks, accumulation); frozen ones are left out."""

    @staticmethod
    def forward(ctx: Any, mlp: _Mlp, kept: Any, x: Tensor, *weights: Tensor) -> Tensor:
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
            y = piece.new_empty(len(rows), piece.shape[-1]) if y is None else y
            y[tile] = piece
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = (ctx if ctx.kept is None else ctx.kept).saved_tensors
        # Taken now, not in forward: FSDP2 may have gathered them again in between.
        weights = ctx.mlp.weights()
        need_x = ctx.needs_input_grad[2]
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
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
            for k, part_sum in enumerate(found):
                if part_sum is not None:  # None: an expert that no token of the tile chose
                    wide = part_sum.to(torch.promote_types(part_sum.dtype, torch.float32))
                    sums[k] = wide if sums[k] is None else sums[k].add_(wide)
        return (
            *(None, None),
            None if dx is None else dx.view_as(x),
            *(None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)),
        )


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    """Equal pieces of at most `tile` rows."""
    count = max(-(-rows // tile), 1)
    for k in range(count):
        yield slice(rows * k // count, rows * (k + 1) // count)


class _Mlp:
    """The forward of an MLP module, run in tiles of tokens."""

    def __init__(self, module: nn.Module, tile: int) -> None:
        self.module, self.tile = module, tile
        self.run = module.forward  # bound; liger's, if it was patched before

    def weights(self) -> list[nn.Parameter]:
        """Those that are trained, in a fixed order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() <= self.tile:
            return self.run(x)
        kept = None
        if torch.is_grad_enabled() and x.requires_grad:
            x = _Kept.apply(x)
            kept = x.grad_fn
        return _Tiled.apply(self, kept, x, *self.weights())


def tile_mlps(model: PreTrainedModel, mlps: Sequence[nn.Module], tile: int) -> None:
    """Run MLPs of a model (see find_mlps) on at most `tile` tokens at a time. ValueError if there is none."""
    if not mlps:
        raise ValueError(
            f"mlp_tile={tile}: {type(model).__name__} has no MLP module that works token by token; leave mlp_tile out"
        )
    for module in mlps:
        module.forward = _Mlp(module, tile)


def find_mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The MLPs of a model, found by trying, not by name: children of decoder layers that hold several matrices and map
    [1, T, D] to the same shape, each token by itself."""
    return [
        child
        for layer in decoder_layers(model)
        for child in layer.children()
        if _is_mlp(child, model)
    ]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _is_mlp(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a module maps a hidden state to one, token by token; tried on six tokens."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    if len(matrices) < 2:
        return False
    width, like = (
        model.config.get_text_config().hidden_size,
        {"dtype": matrices[0].dtype, "device": matrices[0].device},
    )
    x = torch.linspace(-1, 1, 6 * width, **like).sin().view(1, 6, -1)
    try:
        with torch.no_grad():
            whole, parts = module(x), torch.cat([module(x[:, :2]), module(x[:, 2:])], dim=1)
            # One number is compared, so that it can be done without numbers (a plan traces shapes alone).
            error, scale = (whole - parts).abs().max(), whole.abs().max()
    except TypeError:
        return False  # it wants more than hidden states, or gives more: attention
    except Exception:
        if is_fake(x):  # what fails without numbers may do with them
            raise
        return False
    if whole.shape != x.shape:
        return False
    return is_fake(error) or bool(
        error <= 0.02 * scale
    )  # bf16 rounds; another token's share would be all of it


# --- liger-kernel ----------------------------------------------------------------------------------------------------


def apply_liger(model: PreTrainedModel) -> None:
    """liger-kernel's RMSNorm, RoPE and gated MLP in a model, in place. The head stays ours.

    What liger patches in the module of the model's family is limited to tensors on a GPU: other models of the family
    are tried on a CPU. ValueError without a GPU, where it is not installed, and where it does not know the family."""
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
            f"liger=true, but liger-kernel has no kernels for the model type {kind}; set liger=false"
        )
    family = sys.modules[type(model).__module__]
    before = dict(vars(family))
    # Otherwise it replaces the forward that scoring runs in, or the loss of all of torch.
    _apply_liger_kernel_to_instance(
        model=model, fused_linear_cross_entropy=False, cross_entropy=False
    )
    for name, old in before.items():
        new = getattr(family, name)
        if (
            new is not old
        ):  # the layers of this model have what they need; of functions each call takes the right one
            setattr(family, name, old if isinstance(old, type) else _by_device(old, new))


def _by_device(on_cpu: Callable[..., Any], on_gpu: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(on_cpu)
    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (on_gpu if x.is_cuda else on_cpu)(x, *args, **kwargs)

    return chosen
