"""Weights that are not plain numbers: packed integers, and tensors with scales inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from una_fast.model.directory import ModelError
from una_fast.printable import printable

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


def refuse_quantized(model: nn.Module, where: str) -> None:
    """Raise ValueError for a model with quantized weights, by the first.

    model: is trained as a whole
    where: place of the model, for the message
    """
    for name, parameter in model.named_parameters():
        if not is_plain(parameter):
            raise ModelError(
                f"{where}: the weight {printable(name)} is quantized, and cannot be trained; set "
                "lora to train adapters, or give the model in bf16"
            )
