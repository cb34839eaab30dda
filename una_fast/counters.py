"""What a piece of code really does: matrix-product work and live memory, counted under the dispatcher.

Both counters see forward and backward (autograd runs in the calling thread on a CPU) and every call that reaches the
dispatcher, in-place and out= variants included. They work on fake tensors too, which have sizes but no memory.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
}  # name -> place of the operands
_UNCOUNTED = {
    "linear",
    "matmul",
    "mv",
    "addmv",
    "addmv_",
    "addr",
    "addr_",
    "dot",
    "vdot",
    "_int_mm",
    "_scaled_mm",
} | {
    "_grouped_mm",
    "_scaled_grouped_mm",
}


@functools.cache
def _allocates(func: Any) -> bool:
    """Whether an operator returns memory of its own; the schema of views, in-place and out= variants says not."""
    return any(returned.alias_info is None for returned in func._schema.returns)


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return isinstance(x, FakeTensor)


_part: list[str] = [""]


@contextmanager
def memory_category(name: str) -> Iterator[None]:
    """What runs inside belongs to this part of a step: LiveBytes says at its peak how much each part holds."""
    _part.append(name)
    try:
        yield
    finally:
        _part.pop()


class FlopCounter(TorchDispatchMode):
    """Flop of every matrix product, in `flop`. A product it cannot count is an error, or with `strict=False` noted in
    `uncounted`, never silently free."""

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self.flop = 0
        self.strict, self.uncounted = strict, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _UNCOUNTED:
            self.uncounted = True
        if self.uncounted and self.strict:
            raise NotImplementedError(f"{func} is a matrix product that FlopCounter does not count")
        if name in _PRODUCTS:
            a, b = args[_PRODUCTS[name] :][:2]
            self.flop += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))

    def passes(self, rows: int, dim: int, vocab: int) -> float:
        """The count in GEMM passes over the head: one is 2 N D V flop."""
        return self.flop / (2 * rows * dim * vocab)


class LiveBytes(TorchDispatchMode):
    """Every storage born while active: how large, in which part of the step, and when it came and went.

    Storages that existed before (inputs) do not count; temporaries inside one operator are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []  # bytes of storage k, in order of birth
        self.parts: list[str] = []  # its part
        self._events: list[int] = []  # k + 1 for a birth, -(k + 1) for a death
        self._alive: dict[int, int] = {}  # storage address -> k
        self.marks: list[int] = []  # numbers of events

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
        self.parts.append(_part[-1])
        self._alive[address] = serial
        self._events.append(serial + 1)
        weakref.finalize(storage, self._died, address, serial).atexit = False

    def _died(self, address: int, serial: int) -> None:
        del self._alive[address]
        self._events.append(-(serial + 1))

    def _serials(self, tensors: Iterable[Tensor]) -> set[int]:
        found = {self._alive.get(x.untyped_storage()._cdata, -1) for x in tensors}
        return found - {-1}

    def assign(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count these under the part `name`, wherever they were born."""
        for serial in self._serials(tensors):
            self.parts[serial] = name

    def mark(self) -> None:
        """Note this moment: `peak_parts` can look between two of them."""
        self.marks.append(len(self._events))

    def peak(self, excluding: Iterable[Tensor] = ()) -> int:
        """Largest number of bytes alive at once, without the storages of `excluding` (returned gradients, say)."""
        return self._peak(self._serials(excluding))[0]

    def peak_parts(
        self, without: Iterable[str] = (), start: int = 0, stop: int | None = None
    ) -> Counter[str]:
        """Bytes of each part at the moment of the peak, some parts left out; of events start to stop, or of all."""
        left_out = set(without)
        skip = {serial for serial, name in enumerate(self.parts) if name in left_out}
        _, moment = self._peak(skip, start, stop)
        held: Counter[str] = Counter()
        for event in self._events[:moment]:
            serial = abs(event) - 1
            if serial not in skip:
                held[self.parts[serial]] += self.sizes[serial] if event > 0 else -self.sizes[serial]
        return +held

    def _peak(self, skip: set[int], start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """(bytes, number of events up to it) of the peak between two numbers of events."""
        live, peak, moment = 0, 0, start
        for number, event in enumerate(self._events[:stop], start=1):
            serial = abs(event) - 1
            if serial not in skip:
                live += self.sizes[serial] if event > 0 else -self.sizes[serial]
            if live > peak and number >= start:
                peak, moment = live, number
        return peak, moment

    def live(self) -> int:
        """Bytes alive now."""
        return sum(self.sizes[serial] for serial in self._alive.values())

    def largest(self, excluding: Iterable[Tensor] = ()) -> int:
        """Bytes of the largest storage, without those of `excluding`."""
        skip = self._serials(excluding)
        return max((size for k, size in enumerate(self.sizes) if k not in skip), default=0)
