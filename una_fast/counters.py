"""The work and the memory of a piece of code, counted under torch's dispatcher.

FlopCounter counts matrix products, LiveBytes memory that is alive. Both see forward and backward
(autograd runs in the calling thread on a CPU) and every call that reaches the dispatcher, in-place
and out= variants included. Both work on fake tensors too, which have sizes but no memory.
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

# operator -> position of the first operand; the second follows
_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
}
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
    "_grouped_mm",
    "_scaled_grouped_mm",
}


@functools.cache
def _allocates(func: Any) -> bool:
    """Return whether an operator returns new memory; views, in-place and out= variants do not."""
    return any(returned.alias_info is None for returned in func._schema.returns)


def is_fake(x: Tensor) -> bool:
    """Return whether a tensor has a shape but no numbers."""
    return isinstance(x, FakeTensor)


_category: list[str] = [""]


@contextmanager
def memory_category(name: str) -> Iterator[None]:
    """Put the storages born inside under a category, such as "optimizer": see LiveBytes."""
    _category.append(name)
    try:
        yield
    finally:
        _category.pop()


class FlopCounter(TorchDispatchMode):
    """Flop of every matrix product, in `flop`.

    A product that the counter does not know raises NotImplementedError; with strict=False it only
    sets `uncounted`.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self.flop = 0
        self.strict = strict
        self.uncounted = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func: Any, args: tuple) -> None:
        """Count a call of an operator."""
        name = func.overloadpacket.__name__
        if name in _UNCOUNTED:
            self.uncounted = True
        if self.uncounted and self.strict:
            raise NotImplementedError(f"{func} is a matrix product that FlopCounter does not count")
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            a, b = args[first], args[first + 1]
            self.flop += 2 * a.numel() * b.shape[-1]

    def passes(self, rows: int, dim: int, vocab: int) -> float:
        """Return the count in GEMM passes over the head, 2 N D V flop for each pass."""
        return self.flop / (2 * rows * dim * vocab)


class LiveBytes(TorchDispatchMode):
    """Every storage born while active: size, memory category, birth and death.

    sizes: bytes of storage k, in order of birth
    categories: memory category of storage k
    events: births and deaths in order: k + 1 for the birth of storage k, -(k + 1) for the death

    Storages that existed before (inputs) do not count; temporaries inside an operator are not seen.
    """

    def __init__(self, products: FlopCounter | None = None) -> None:
        """Count storages, and the products of a counter, too: one mode is faster than two."""
        super().__init__()
        self.products = products
        self.sizes: list[int] = []
        self.categories: list[str] = []
        self.events: list[int] = []
        self._alive: dict[int, int] = {}  # storage address -> k

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.products is not None:
            self.products.count(func, args)
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
        self.categories.append(_category[-1])
        self._alive[address] = serial
        self.events.append(serial + 1)
        weakref.finalize(storage, self._died, address, serial).atexit = False

    def _died(self, address: int, serial: int) -> None:
        del self._alive[address]
        self.events.append(-(serial + 1))

    def _serials(self, tensors: Iterable[Tensor]) -> set[int]:
        found = {self._alive.get(x.untyped_storage()._cdata, -1) for x in tensors}
        return found - {-1}

    def assign(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Move the storages of tensors to the category `name`."""
        for serial in self._serials(tensors):
            self.categories[serial] = name

    def peak(self, excluding: Iterable[Tensor] = ()) -> int:
        """Return the largest number of bytes alive at once.

        excluding: tensors that do not count, such as returned gradients
        """
        return self._peak(self._serials(excluding))[0]

    def peak_by_category(self, without: Iterable[str] = ()) -> Counter[str]:
        """Return {category: bytes} at the moment of the peak; some categories may be left out."""
        left_out = set(without)
        skip = {serial for serial, name in enumerate(self.categories) if name in left_out}
        _, moment = self._peak(skip)
        held: Counter[str] = Counter()
        for event in self.events[:moment]:
            serial = abs(event) - 1
            if serial not in skip:
                held[self.categories[serial]] += self._change(event)
        return +held

    def _peak(self, skip: set[int]) -> tuple[int, int]:
        """Return (bytes, number of events before) of the peak."""
        live, peak, moment = 0, 0, 0
        for number, event in enumerate(self.events, start=1):
            if abs(event) - 1 not in skip:
                live += self._change(event)
            if live > peak:
                peak, moment = live, number
        return peak, moment

    def _change(self, event: int) -> int:
        """Return the bytes that a birth adds or a death takes away."""
        size = self.sizes[abs(event) - 1]
        return size if event > 0 else -size

    def live(self) -> int:
        """Return the bytes alive now."""
        return sum(self.sizes[serial] for serial in self._alive.values())

    def largest(self, excluding: Iterable[Tensor] = ()) -> int:
        """Return the bytes of the largest storage, without the storages of `excluding`."""
        skip = self._serials(excluding)
        counted = (size for serial, size in enumerate(self.sizes) if serial not in skip)
        return max(counted, default=0)
