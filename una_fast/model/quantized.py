"""Weights that are not plain numbers: packed integers, and tensors with scales inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from una_fast.model.directory import ModelError
from una_fast.printable import printable

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COUNTS = (torch.bool, torch.int64)  # dtypes of masks, positions and tables, never of weights


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds floating-point numbers of 16 bits or more, one per element."""
    return tensor.dtype in _PLAIN and not _has_parts(tensor)


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of: packed integers, scales, or itself."""
    if not _has_parts(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_parts(getattr(tensor, name))


def _has_parts(tensor: Tensor) -> bool:
    """Return whether a tensor is of a class, such as torchao's, that keeps tensors inside."""
    return hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor)


def quantized_weight(model: nn.Module) -> str | None:
    """Return the name of the first quantized weight of a model; None if all are plain.

    GPTQ, AWQ and EETQ keep packed weights as buffers: matrices of small integers that are saved.
    """
    for name, parameter in model.named_parameters():
        if not is_plain(parameter):
            return name
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved and _is_packed(name, buffer):
                return f"{prefix}.{name}" if prefix else name
    return None


def _is_packed(name: str, buffer: Tensor) -> bool:
    """Return whether a buffer holds packed weights."""
    if is_plain(buffer) or buffer.dtype in _COUNTS:
        return False
    return name == "qweight" or sum(size > 1 for size in buffer.shape) > 1


def refuse_quantized(model: nn.Module, where: str) -> None:
    """Raise ValueError for a model with quantized weights, by the first.

    model: is trained as a whole
    where: place of the model, for the message
    """
    name = quantized_weight(model)
    if name is not None:
        raise ModelError(
            f"{where}: the weight {printable(name)} is quantized, and cannot be trained; set "
            "lora to train adapters, or give the model in bf16"
        )
