"""Small tensors of a call on the device, copied once per content and kept.

A call repeated with the same cu_seqlens and feedback copies no tensor and, if the loss kernel
runs, can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_captured: list[object] = []  # tensors that a CUDA graph points to live as long as the process


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kept_on_device(make: Callable[..., Made]) -> Callable[..., Made]:
    """Cache make(*content, device) by content.

    The tensors are shared by all callers, and never written to. The stream of the first
    call owns the tensors; another stream must wait, as for any tensor. RuntimeError for new content
    while a CUDA graph is captured.
    """

    @functools.lru_cache(maxsize=1024)
    def cached(*content: Any) -> Made:
        # A copy from the CPU cannot be part of a graph.
        if capturing(content[-1]):
            raise RuntimeError(
                "while a CUDA graph is captured, lengths, feedback and objective must be those of "
                "an earlier call: run the call once before the capture"
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
    """Return a one-dimensional tensor of a few numbers."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
