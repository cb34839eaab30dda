"""Small tensors that a call needs on its device, copied once per content and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


_captured: list[object] = []  # what a CUDA graph points to lives as long as the process


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kept_on_device(make: Callable[..., Made]) -> Callable[..., Made]:
    """make(*content, device), called once per content: its tensors are shared, and never to be written to. They belong
    to the stream of the first call; another one must wait for it, as for any tensor."""

    @functools.lru_cache(maxsize=1024)
    def cached(*content: Any) -> Made:
        if capturing(content[-1]):  # a copy from the CPU cannot be part of a graph
            raise RuntimeError(
                "while a CUDA graph is captured, lengths, feedback and objective must be those of an earlier call: run "
                "the call once before the capture"
            )
        with torch.inference_mode(False):
            return make(*content)

    @functools.wraps(make)
    def call(*content: Any) -> Made:
        made = cached(*content)
        if capturing(content[-1]):
            _captured.append(made)
        return made

    call.cache_info, call.cache_clear = cached.cache_info, cached.cache_clear
    return call


@kept_on_device
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A one-dimensional tensor of a few numbers."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
