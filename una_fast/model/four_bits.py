"""Hold the frozen linear weights under an adapter at 4 bits (nf4.py): QLoRA.

A weight is dequantized, in the dtype of the layer's input, for a product in forward, and once more
in backward; the copy lives as long as the product. `weight` is the name of the packed rows too:
integers [R, bytes], sharded and gathered by FSDP2, and never cast.

Plain linear layers of the text model are packed, but for the head. Embeddings, norms, biases,
layers kept wider by the model's class, and matrices outside linear layers (Conv1D of GPT-2, fused
experts) stay numbers; a line says how many bytes these take.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from una_fast.logs import say_once
from una_fast.model.directory import ModelError
from una_fast.model.head_probe import text_modules
from una_fast.model.nf4 import bytes_of_row, dequantize, quantize
from una_fast.model.quantized import quantized_weight
from una_fast.printable import printable

logger = logging.getLogger(__name__)


class Nf4Linear(nn.Linear):
    """A frozen linear layer with a weight packed at 4 bits.

    weight: [out_features, bytes] uint8, see nf4.py
    numbers: dtype of the weight before, and of an unpacked copy
    packed_from: dtype that the numbers are rounded to before they are packed
    """

    def __init__(self, linear: nn.Linear, packed_from: torch.dtype | None = None) -> None:
        """Pack the weight of a linear layer, and take over its bias.

        linear: the layer
        packed_from: see the class; None: the dtype of the weight
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.numbers = linear.weight.dtype
        self.packed_from = packed_from or self.numbers
        weight = linear.weight.detach()
        if weight.is_meta:
            size = (self.out_features, bytes_of_row(self.in_features))
            packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        else:
            packed = quantize(weight.to(self.packed_from))
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def pack(self, rows: Tensor) -> Tensor:
        """Return some rows of the weight, packed. rows: [R, in_features], in any dtype."""
        return quantize(rows.to(self.packed_from))

    def unpacked(self) -> Tensor:
        """Return the numbers of the weight, [out_features, in_features]."""
        return dequantize(self.weight, self.in_features, self.numbers)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias. x: [..., in_features]; gives the dtype of the product."""
        bias = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if bias is not None:
            bias = bias.to(x.dtype)
        return _Product.apply(x, self.weight, bias, self.in_features)


class _Product(torch.autograd.Function):
    """x W^T + bias of a packed W, dequantized in forward and in backward, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.columns = columns
        return F.linear(x, dequantize(packed, columns, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dequantize(packed, ctx.columns, grad.dtype)
        if ctx.needs_input_grad[2]:
            dbias = grad.flatten(0, -2).sum(dim=0)
        return dx, None, dbias, None


# ---- a model's layers --------------------------------------------------------------------------


def pack_base(model: PreTrainedModel, where: str, packed_from: torch.dtype | None = None) -> None:
    """Pack the linear weights of a model, and log once how many bytes are packed, and are not.

    model, where, packed_from: as for `pack_linears`
    """
    words = pack_linears(model, where, packed_from)
    packed = sum(layer.in_features * layer.out_features for _, layer in packed_layers(model))
    others = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    # Of fused experts, say, little is saved.
    level = logging.WARNING if others > packed else logging.INFO
    say_once(level, f"{where}: {words}", logger)


def pack_linears(model: PreTrainedModel, where: str, packed_from: torch.dtype | None = None) -> str:
    """Pack the weights of a model's linear layers at 4 bits, in place.

    model: without adapters; on the meta device its packed weights have no numbers either
    where: place of the model, for refusals
    packed_from: dtype that weights are rounded to before; None: their own

    Returns the bytes packed, and the bytes left as numbers, in words. ModelError for a model
    quantized already, or without such layers.
    """
    name = quantized_weight(model)
    if name is not None:
        raise ModelError(
            f"{where}: the weight {printable(name)} is quantized already; leave quantize_base out, "
            "or give the model in bf16"
        )
    names = _packable(model)
    if not names:
        raise ModelError(
            f"{where}: {type(model).__name__} has no plain linear layers (nn.Linear) to hold at 4 "
            "bits; leave quantize_base out"
        )
    before = sum(parameter.nbytes for parameter in model.parameters())
    numbers = 0
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        linear = holder._modules[child]
        numbers += linear.weight.nbytes
        holder._modules[child] = Nf4Linear(linear, packed_from)
    packed = sum(layer.weight.nbytes for _, layer in packed_layers(model))
    return (
        f"{len(names)} linear layers at 4 bits, {_mib(packed)} instead of {_mib(numbers)}; "
        f"{_mib(before - numbers)} stay numbers: {_others(model)}"
    )


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """Yield the names and layers of a model with packed weights."""
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            yield name, module


def count_weights(model: nn.Module) -> int:
    """Count the numbers in the weights of a model: tied weights once, packed weights unpacked."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in packed_layers(model):
        count += layer.in_features * layer.out_features - layer.weight.numel()
    return count


def _packable(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers to pack."""
    inside = text_modules(model)
    head = model.get_output_embeddings()
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    linears = []
    widths: Counter[torch.dtype] = Counter()
    for name, module in model.named_modules():
        # A subclass may compute something else with its weight.
        if type(module) is not nn.Linear or module not in inside or module is head:
            continue
        if uses[id(module.weight)] == 1:
            linears.append((name, module.weight.dtype))
            widths[module.weight.dtype] += module.weight.numel()
    usual = max(widths, key=widths.get, default=None)
    return [name for name, dtype in linears if dtype == usual]


def _others(model: PreTrainedModel) -> str:
    """Return the kinds of modules with weights left as numbers, the largest first, in words."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    head = model.get_output_embeddings()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or parameter.dtype == torch.uint8:
                continue
            seen.add(id(parameter))
            kind = type(module).__name__
            if isinstance(module, Nf4Linear):
                kind = "biases"
            elif module is head:
                kind = "head"
            sizes[kind] += parameter.nbytes
    return ", ".join(f"{kind} {_mib(size)}" for kind, size in sizes.most_common())


def _mib(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"
