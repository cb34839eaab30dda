"""Triton's interpreter with the arithmetic of a GPU.

The interpreter keeps bfloat16 as 16-bit integers. Its casts from float32 cut the lower half off,
where a GPU rounds to the nearest, and its dot products multiply the integers. Its exponentials and
quotients are exact, where a GPU's may err by 2^-22.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

# The largest relative error of ex2.approx and of div.full (PTX), less what rounding to float32 adds
APPROXIMATE = 2.0**-22 - 2.0**-24
LOG2_E = np.float32(1.4426950408889634)


def mend(monkeypatch: pytest.MonkeyPatch, *, approximate: bool = False) -> None:
    """Make the interpreter compute as a GPU does, for the rest of a test.

    approximate: float32 exponentials and quotients err as much as those of a GPU may
    """

    methods = {"cast_impl": _rounding_cast, "create_dot": _widened_dot}
    if approximate:
        methods["create_exp"] = _in_float32(lambda x: _power(x, LOG2_E))
        methods["create_exp2"] = _in_float32(lambda x: _power(x, np.float32(1)))
        methods["create_fdiv"] = _in_float32(_quotient)
    for name, mended in methods.items():
        own = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, functools.partialmethod(mended, own))
    _patch_once(monkeypatch)


def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a launch prepare triton.language once per module, not in every call of a function.

    The interpreter spends half of the time on it.
    """
    patch, launch = interpreter._patch_lang, GridExecutor.__call__
    prepared: set[int] = set()

    def patch_first(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in prepared:
            return interpreter._LangPatchScope()
        prepared.add(module)
        return patch(function)

    def launch_anew(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_first)
    monkeypatch.setattr(GridExecutor, "__call__", launch_anew)


Method = Callable[..., TensorHandle]


def _rounding_cast(
    builder: InterpreterBuilder, own: Method, src: TensorHandle, to: tl.dtype
) -> TensorHandle:
    """Return numbers of another type: bfloat16 is widened first, and rounded to last."""
    src = _widened(src)
    if to.scalar != tl.bfloat16:
        return own(builder, src, to)
    wide = torch.from_numpy(np.array(src.data, dtype=np.float32, order="C"))
    return TensorHandle(wide.bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _widened_dot(
    builder: InterpreterBuilder, own: Method, a: TensorHandle, b: TensorHandle, *rest: Any
) -> TensorHandle:
    """Return a product of bfloat16 numbers, not of the bits of them."""
    return own(builder, _widened(a), _widened(b), *rest)


def _widened(handle: TensorHandle) -> TensorHandle:
    """Return bfloat16 as float32 of the same values; other types as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _in_float32(rough: Callable[..., np.ndarray]) -> Method:
    """Return a method that computes float32 numbers by `rough`, and others as before."""

    def method(builder: InterpreterBuilder, own: Method, *operands: TensorHandle) -> TensorHandle:
        if operands[0].dtype.scalar != tl.float32:
            return own(builder, *operands)
        with np.errstate(all="ignore"):
            found = rough(*(operand.data for operand in operands)).astype(np.float32)
        return TensorHandle(found, tl.float32)

    return method


def _power(x: np.ndarray, factor: np.float32) -> np.ndarray:
    """Return 2^(factor * x) as ex2.approx may: 1 at 0, 0 below 2^-126, and off elsewhere."""
    exponent = x * factor  # rounded to float32, as on a GPU
    power = np.exp2(exponent.astype(np.float64))
    power = np.where(exponent == 0, 1.0, power * _off(exponent))
    return np.where(power < np.finfo(np.float32).tiny, 0.0, power)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b as div.full may."""
    quotient = np.divide(a, b, dtype=np.float64)
    return quotient * _off(quotient)


def _off(number: np.ndarray) -> np.ndarray:
    """Return 1 plus or minus the error, by the last bit of a number: the same for the same one."""
    bits = np.asarray(number, dtype=np.float32).view(np.uint32)
    return np.where(bits & np.uint32(1), 1 + APPROXIMATE, 1 - APPROXIMATE)
