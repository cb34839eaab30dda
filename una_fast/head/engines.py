"""The choice of the engine of a call: the Triton kernels if possible, else PyTorch."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch

from una_fast.head.torch_engine import TorchEngine
from una_fast.logs import say_once

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "triton")


def choose_engine(name: str, device: torch.device, dtype: torch.dtype) -> type[TorchEngine]:
    """Return the engine class for operands on a device.

    name: "auto", "torch" or "triton"
    device: device of the operands
    dtype: dtype of the operands

    ValueError for an unknown name, and for "triton" if the kernels cannot run.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is not one of {ENGINES}")
    if name == "torch":
        return TorchEngine
    reason = triton_refusal(device, dtype)
    if reason is None:
        from una_fast.head.triton_engine import TritonEngine

        return TritonEngine
    if name == "triton":
        raise ValueError(f'engine="triton" cannot run: {reason}; use engine="auto" or "torch"')
    if device.type != "cpu":
        say_once(
            logging.WARNING,
            f"the Triton kernels of the fused head cannot run: {reason}; falling back to PyTorch",
            logger,
        )
    return TorchEngine


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the Triton kernels cannot run; None if possible."""
    if device.type != "cuda":
        return f"tensors are on the {device.type.upper()}"
    if dtype == torch.float64:
        return "it computes in float32, and the operands are float64"
    return _no_triton(device)


@functools.cache
def _no_triton(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


class HasPrecision(Protocol):
    """Settings with a precision."""

    precision: str


def compute_dtype(config: HasPrecision, device: str) -> torch.dtype:
    """Return the dtype of the products: bf16 if asked for, or by default on a GPU.

    config: settings of a run or of a chat
    device: "cpu" or "cuda"
    """
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
    return torch.bfloat16 if bf16 else torch.float32
