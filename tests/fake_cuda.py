"""A CUDA device that is not there: tensors with shapes and dtypes, and without numbers.

The tensors are meta tensors that give cuda:0 as their device, so that code takes the branches of
CUDA. Recorded are operations that would wait for the device, copies between host and device,
products of matrices, and launches of Triton kernels, which are not run. Operations over tensors of
both host and device are errors, as they are on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import una_fast.kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import una_fast

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30
)
SOURCES = tuple(str(Path(package.__file__).parent) for package in (una_fast, una_fast.kernels))

WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}

NATIVE = {"tensor": torch.tensor, "as_tensor": torch.as_tensor}

true_device = torch._C.TensorBase.device.__get__


def is_fake(x: object) -> bool:
    """Return whether an object is a tensor on the device that is not there."""
    return isinstance(x, Tensor) and true_device(x).type == "meta"


@dataclass
class Copy:
    """A copy between host and device. place: of the package, as "file:function"."""

    place: str
    to_device: bool
    blocking: bool
    shape: tuple[int, ...]


@dataclass
class Launch:
    """A launch of a Triton kernel. arguments: by name; tensors have no numbers."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def types(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the tensors by parameter."""
        return {name: x.dtype for name, x in self.arguments.items() if isinstance(x, Tensor)}


@dataclass
class Recorded:
    """What happened on the device, in order.

    waits: places of the package that read numbers
    paused: meta tensors are nothing but meta tensors
    """

    paused: bool = False
    waits: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    products: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the host that makes meta tensors of its own."""

        @functools.wraps(function)
        def paused(*args: Any, **kwargs: Any) -> Any:
            self.paused = True
            try:
                with pytest.MonkeyPatch.context() as patch:
                    for name, make in NATIVE.items():  # transformers knows them by identity
                        patch.setattr(torch, name, make)
                    return function(*args, **kwargs)
            finally:
                self.paused = False

        return paused


@contextlib.contextmanager
def fake_cuda() -> Iterator[Recorded]:
    """Have torch find a CUDA device inside the block; yield the record of its work."""
    recorded = Recorded()
    device = _Device(recorded)
    with pytest.MonkeyPatch.context() as patch:
        _patch_tensors(patch, device)
        _patch_module(patch, recorded)
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", _launcher(recorded))
        with device:
            yield recorded


class _Device(TorchDispatchMode):
    """Runs operations on meta tensors, and records them."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__()
        self.recorded = recorded
        self.at_work = False  # the implementation of torch sees the true devices

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.recorded.paused:
            return func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = None
        if kwargs.get("device") is not None:
            kwargs["device"] = to_meta(kwargs["device"])
            if kwargs["device"] == META and "generator" in kwargs:
                kwargs["generator"] = None  # of another device, and there are no numbers
        before, self.at_work = self.at_work, True
        try:
            return self._run(func, args, kwargs)
        finally:
            self.at_work = before

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if is_fake(x)]
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if not on_device:
            return func(*args, **kwargs)
        for x in tensors:  # a number of the host travels with the launch
            assert is_fake(x) or x.dim() == 0, f"{func} over host and device in {place()}"
        if func in WAITING and kwargs.get("output_size") is None:
            return self._wait(func, args)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            assert not masks, f"a mask as an index waits for the device in {place()}"
        if func.overloadpacket in PRODUCTS:
            self.recorded.products.append((place(), tuple(on_device)))
            if "out_dtype" in kwargs or func._overloadname.startswith("dtype"):
                return _widening_product(func, args, kwargs)
        return func(*args, **kwargs)

    def _wait(self, func: Any, args: tuple) -> Any:
        assert func is aten._local_scalar_dense.default, f"{func} waits for the device in {place()}"
        self.recorded.waits.append(place())
        return torch.ones((), dtype=args[0].dtype).item()

    def _copy(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Copy numbers of the host, and make numbers for the host."""
        if func is aten.copy_.default:
            target, source = args[:2]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            source = args[0]
            target = kwargs.get("device") or true_device(source)
            blocking = not kwargs.get("non_blocking")
        to_device = is_fake(target) if isinstance(target, Tensor) else target.type == "meta"
        if to_device == is_fake(source):
            return func(*args, **kwargs)
        self.recorded.copies.append(Copy(place(), to_device, blocking, tuple(source.shape)))
        if isinstance(target, Tensor):
            return target if to_device else target.fill_(1)
        dtype = kwargs.get("dtype") or source.dtype
        made = torch.empty_like(source, dtype=dtype, device=target)
        return made if to_device else made.fill_(1)


def _widening_product(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return float32 out of narrow operands, under the conditions of torch on CUDA."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    added, (a, b) = tensors[:-2], tensors[-2:]
    dtype = kwargs.get("out_dtype") or next(x for x in args if isinstance(x, torch.dtype))
    assert a.dtype == b.dtype and dtype in (a.dtype, torch.float32), (a.dtype, b.dtype, dtype)
    assert all(x.dtype in (dtype, a.dtype) for x in added), [x.dtype for x in added]
    assert a.shape[1] == b.shape[0], (a.shape, b.shape)
    out = kwargs.get("out")
    if out is None:
        return torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=META)
    assert out.dtype == dtype and out.shape == (a.shape[0], b.shape[1]), (out.dtype, out.shape)
    return out


def to_meta(device: Any) -> Any:
    """Return the true device of tensors that are asked for on a device."""
    is_device = isinstance(device, torch.device) or (
        isinstance(device, str) and device.split(":")[0] == "cuda"
    )
    return META if is_device and torch.device(device).type == "cuda" else device


def place() -> str:
    """Return the innermost function of the package that is running, as "file:function"."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(SOURCES):
            return f"{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


def _patch_tensors(patch: pytest.MonkeyPatch, device: _Device) -> None:
    """Have tensors, and functions that take a device, speak of cuda:0."""

    def shown(x: Tensor) -> torch.device:
        true = device.at_work or device.recorded.paused
        return CUDA if is_fake(x) and not true else true_device(x)

    own_repr = Tensor.__repr__

    def described(x: Tensor, **options: Any) -> str:
        if is_fake(x):
            return f"<{tuple(x.shape)} {x.dtype} on {CUDA}>"
        return own_repr(x, **options)

    patch.setattr(Tensor, "__repr__", described)
    patch.setattr(Tensor, "device", property(shown), raising=False)
    patch.setattr(Tensor, "is_cuda", property(lambda x: shown(x) == CUDA), raising=False)
    patch.setattr(Tensor, "is_meta", property(lambda x: shown(x) == META), raising=False)
    patch.setattr(Tensor, "get_device", lambda x: 0 if is_fake(x) else -1, raising=False)
    patch.setattr(Tensor, "pin_memory", lambda x: x, raising=False)
    patch.setattr(Tensor, "cuda", lambda x, *_, **options: x.to(CUDA, **options), raising=False)
    to = Tensor.to

    def to_(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {name: to_meta(value) for name, value in kwargs.items()}
        return to(x, *map(to_meta, args), **options)

    patch.setattr(Tensor, "to", to_, raising=False)
    # Numbers of Python are copied under torch's own eyes alone, and the host waits.
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        patch.setattr(owner, name, _from_numbers(getattr(owner, name), device), raising=False)


def _from_numbers(make: Callable[..., Tensor], device: _Device) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: to_meta(value) for name, value in kwargs.items()}
        found = make(*args, **kwargs)
        if is_fake(found) and not is_fake(args[-1]):
            device.recorded.copies.append(Copy(place(), True, True, tuple(found.shape)))
        return found

    return made


def _patch_module(patch: pytest.MonkeyPatch, recorded: Recorded) -> None:
    """Have torch.cuda speak of one H200."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls)

    class Stream:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, stream: Stream) -> None: ...

        def wait_event(self, event: Stream) -> None: ...

        def record_event(self) -> Stream:
            return self

        def synchronize(self) -> None:
            recorded.waits.append(place())

        def is_capturing(self) -> bool:
            return False

    values = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (H200.major, H200.minor),
        "get_device_name": H200.name,
        "is_current_stream_capturing": False,
        "device_of": contextlib.nullcontext(),
        "stream": contextlib.nullcontext(),
        "current_stream": Stream(),
        "set_device": None,
        "mem_get_info": (H200.total_memory, H200.total_memory),
        "max_memory_allocated": 2**30,
        "_lazy_init": None,
    }
    for name, value in values.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    patch.setattr(torch.accelerator, "current_stream", lambda *_: Stream())  # from torch 2.15 on
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "synchronize", lambda *_: recorded.waits.append(place()))


def _launcher(recorded: Recorded) -> Callable[..., None]:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        missing = set(names) - set(arguments)
        assert not missing, f"{kernel.__name__} without {missing}"
        for name, x in arguments.items():
            x = getattr(x, "base", x)  # of a tensor descriptor
            assert not isinstance(x, Tensor) or is_fake(x), f"{kernel.__name__}: {name} on the host"
        sizes = tuple(grid(arguments) if callable(grid) else grid)
        assert min(sizes) > 0, f"{kernel.__name__} over no programs"
        recorded.launches.append(Launch(kernel.__name__, sizes, arguments))

    return run
