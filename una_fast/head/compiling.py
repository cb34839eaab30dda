"""Functions that a compiled model calls as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def outside_compile(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a compiled model call a function as it is: a loop over chunks is no graph.

    The same as torch.compiler.disable, without importing the compiler (seconds) for callers that do
    not compile.
    """
    disabled: list[Callable[..., Result]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call
