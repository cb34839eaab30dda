"""The work and the memory of a piece of code, counted under torch's dispatcher.

FlopCounter counts matrix products, LiveBytes memory that is alive, and Traffic what crosses ranks.
All see forward and backward (autograd runs in the calling thread on a CPU) and every call that
reaches the dispatcher, in-place and out= variants included. All work on fake tensors too, which
have sizes but no memory.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# operator of torch.distributed -> name of the collective
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
"""Names of the collectives that Traffic counts."""


@functools.cache
def _allocates(func: Any) -> bool:
    """Return whether an operator returns new memory.

    Views, in-place and out= variants do not, and collectives return the tensors that they fill.
    """
    if func.namespace == "c10d":
        return False
    return any(returned.alias_info is None for returned in func._schema.returns)


def is_fake(x: Tensor) -> bool:
    """Return whether a tensor has a shape but no numbers."""
    return isinstance(x, FakeTensor)


def _local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, or the tensor itself."""
    return x._local_tensor if isinstance(x, DTensor) else x


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


class Traffic:
    """The bytes that a rank sends in collectives.

    sent: bytes by collective, in the order of COLLECTIVES
    calls: number of calls by collective, in the same order

    Counted is what a rank of n sends where all ranks pass their parts round in a ring, which is
    also the least that can be sent: (n - 1) / n of the whole tensor for a gather, a reduce-scatter
    or an all-to-all, and twice as much for an all-reduce.
    """

    def __init__(self) -> None:
        self.sent = [0.0] * len(COLLECTIVES)
        self.calls = [0] * len(COLLECTIVES)

    def count(self, func: Any, args: tuple) -> list[Tensor]:
        """Count a call of an operator; return the tensors of a collective, and none otherwise."""
        name = _COLLECTIVES.get(func.overloadpacket.__name__)
        if func.namespace != "c10d" or name is None:
            return []
        leaves = tree_leaves(args)
        groups = [x for x in leaves if isinstance(x, torch.ScriptObject)]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        sizes = [_bytes(side) for side in args[:2]]  # of what is filled, and of what is given
        share = (ranks - 1) / ranks
        if name == "all-reduce":
            share *= 2
        kind = COLLECTIVES.index(name)
        self.sent[kind] += share * max(sizes)
        self.calls[kind] += 1
        return _flat(args)


def _bytes(side: Any) -> int:
    """Return the bytes of the tensors among the arguments of a collective."""
    return sum(x.numel() * x.itemsize for x in _flat(side))


def _flat(side: Any) -> list[Tensor]:
    """Return the tensors among the nested arguments of a collective."""
    return [x for x in tree_leaves(side) if isinstance(x, Tensor)]


class LiveBytes(TorchDispatchMode):
    """Every storage born while active: size, memory category, birth and death.

    sizes: bytes of storage k, in order of birth
    categories: memory category of storage k
    events: births and deaths in order: k + 1 for the birth of storage k, -(k + 1) for the death

    Storages that existed before (inputs) do not count; temporaries inside an operator are not seen.
    A storage that is emptied dies, and a storage that is filled again is born: FSDP2 keeps the
    storages of gathered weights, without memory, from one use to the next. They are of the category
    "gathered", as the tensors of all-gathers and reduce-scatters are. Of a DTensor the rank's part
    counts.
    """

    def __init__(self, products: FlopCounter | None = None, traffic: Traffic | None = None) -> None:
        """Count storages, and with other counters too: one mode is faster than two.

        products: counts matrix products
        traffic: counts collectives
        """
        super().__init__()
        self.products = products
        self.traffic = traffic or Traffic()
        self.sizes: list[int] = []
        self.categories: list[str] = []
        self.events: list[int] = []
        self._alive: dict[int, int] = {}  # storage address -> k

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch.UntypedStorage.resize_ = self._resize

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.products is not None:
            self.products.count(func, args)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            tensors = self.traffic.count(func, args)
            if func.overloadpacket.__name__ in ("_allgather_base_", "_reduce_scatter_base_"):
                self.assign("gathered", tensors)
        if _allocates(func):
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self._born(_local(x).untyped_storage())
        return out

    def _resized(self) -> Any:
        """Return a method to resize a storage, which counts."""
        resize = self._resize

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            serial = self._alive.get(storage._cdata)
            if serial is not None and size != before:
                self.categories[serial] = "gathered"
                self._died(storage._cdata, serial)
            out = resize(storage, size)
            if size and size != before:
                with memory_category("gathered"):
                    self._born(storage)
            return out

        return counted

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
        if self._alive.get(address) == serial:  # or else the storage was emptied before
            del self._alive[address]
            self.events.append(-(serial + 1))

    def _serials(self, tensors: Iterable[Tensor]) -> set[int]:
        found = {self._alive.get(_local(x).untyped_storage()._cdata, -1) for x in tensors}
        return found - {-1}

    def assign_living(self, name: str, *, of: str) -> None:
        """Move the storages of a category that are alive to the category `name`."""
        for serial in self._alive.values():
            if self.categories[serial] == of:
                self.categories[serial] = name

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
