"""What a piece of code really does: matrix-product work and live memory, counted under the dispatcher.

Shared by the benchmarks and the tests. Both counters see forward and backward (on the CPU autograd runs in the calling
thread) and every call that reaches the dispatcher, in-place and out= variants included.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # name -> place of the operands
_UNCOUNTED = {"linear", "matmul", "mv", "addmv", "addmv_", "addr", "addr_", "dot", "vdot", "_int_mm", "_scaled_mm"}


@functools.cache
def _allocates(func: Any) -> bool:
    """Whether an operator returns memory of its own; the schema of views, in-place and out= variants says not."""
    return any(returned.alias_info is None for returned in func._schema.returns)


class FlopCounter(TorchDispatchMode):
    """Flop of every matrix product, in `flop`. A product it cannot count is an error, never silently free."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _UNCOUNTED:
            raise NotImplementedError(f"{func} is a matrix product that FlopCounter does not count")
        if name in _PRODUCTS:
            a, b = args[_PRODUCTS[name] :][:2]
            self.flop += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))

    def passes(self, rows: int, dim: int, vocab: int) -> float:
        """The count in GEMM passes over the head: one is 2 N D V flop."""
        return self.flop / (2 * rows * dim * vocab)


class LiveBytes(TorchDispatchMode):
    """Every storage born while active: how large, and when it came and went.

    Storages that existed before (inputs) do not count; temporaries inside one operator are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []  # bytes of storage k, in order of birth
        self._events: list[int] = []  # k + 1 for a birth, -(k + 1) for a death
        self._alive: dict[int, int] = {}  # storage address -> k

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _allocates(func):
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self._born(x.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        serial = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self._alive[address] = serial
        self._events.append(serial + 1)
        weakref.finalize(storage, self._died, address, serial).atexit = False

    def _died(self, address: int, serial: int) -> None:
        del self._alive[address]
        self._events.append(-(serial + 1))

    def _serials(self, tensors: Iterable[Tensor]) -> set[int]:
        found = {self._alive.get(x.untyped_storage()._cdata, -1) for x in tensors}
        return found - {-1}

    def peak(self, excluding: Iterable[Tensor] = ()) -> int:
        """Largest number of bytes alive at once, without the storages of `excluding` (returned gradients, say)."""
        skip, live, peak = self._serials(excluding), 0, 0
        for event in self._events:
            serial = abs(event) - 1
            if serial not in skip:
                live += self.sizes[serial] if event > 0 else -self.sizes[serial]
                peak = max(peak, live)
        return peak

    def live(self) -> int:
        """Bytes alive now."""
        return sum(self.sizes[serial] for serial in self._alive.values())

    def largest(self, excluding: Iterable[Tensor] = ()) -> int:
        """Bytes of the largest storage, without those of `excluding`."""
        skip = self._serials(excluding)
        return max((size for k, size in enumerate(self.sizes) if k not in skip), default=0)
