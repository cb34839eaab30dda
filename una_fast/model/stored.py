"""Dtypes that weights came in, and are saved in again."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from una_fast.model.directory import (
    ModelError,
    StoredTensor,
    adapter_file,
    stored_tensors,
    weight_files,
)
from una_fast.model.gguf import is_gguf, read_header
from una_fast.model.loading import load_config, model_and_adapter
from una_fast.model.quantized import is_plain

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredDtypes:
    """Dtypes of saved weights, by name; other names take the usual dtype, or stay as they are.

    base: of the weights of a model
    adapter: of the weights of an adapter
    """

    base: _Dtypes
    adapter: _Dtypes

    @classmethod
    def of(cls, path: str | os.PathLike[str], setting: str = "auto") -> StoredDtypes:
        """Look at the files of a model.

        path: model directory, hub name, or adapter directory
        setting: "auto" for the dtypes of the files; or a dtype for all weights, such as "bfloat16"
        """
        if setting != "auto":
            every = _Dtypes(getattr(torch, setting))
            return cls(every, every)
        base, adapter = model_and_adapter(path)
        own = _Dtypes()
        if adapter is not None:
            own = _Dtypes.from_headers(stored_tensors([adapter_file(Path(adapter))]))
        if is_gguf(base):
            return cls(_Dtypes.of_most(read_header(base).tensors), own)
        if Path(base).is_dir():
            try:
                return cls(_Dtypes.from_headers(stored_tensors(weight_files(Path(base)))), own)
            except ModelError:
                return cls(_Dtypes(), own)
        dtype = getattr(load_config(base), "dtype", None)
        return cls(_Dtypes(dtype if isinstance(dtype, torch.dtype) else None), own)


@dataclass(frozen=True)
class _Dtypes:
    """Dtypes of weights: the usual dtype, and the names with another."""

    usual: torch.dtype | None = None
    others: dict[str, torch.dtype] = field(default_factory=dict)

    @classmethod
    def from_headers(cls, tensors: dict[str, StoredTensor]) -> _Dtypes:
        """Take the dtype of most numbers as the usual dtype."""
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            if tensor.is_float:
                sizes[tensor.dtype] += tensor.numel
        if not sizes:
            return cls()
        usual = sizes.most_common(1)[0][0]
        others = {}
        for name, tensor in tensors.items():
            if tensor.is_float and tensor.dtype != usual:
                others[name] = _TORCH[tensor.dtype]
        return cls(_TORCH[usual], others)

    @classmethod
    def of_most(cls, tensors: dict[str, StoredTensor]) -> _Dtypes:
        """Take the dtype of most numbers for all; none if some are quantized."""
        if not all(tensor.is_float for tensor in tensors.values()):
            return cls()
        return cls(cls.from_headers(tensors).usual)

    def cast_all(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in the dtypes of their names; tied tensors stay tied."""
        made: dict[Any, Tensor] = {}
        cast = {}
        for name, tensor in state_dict.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in made:
                made[place] = self._cast(name, tensor)
            cast[name] = made[place]
        return cast

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        # The name of an adapter, "default", is in no file.
        dtype = self.others.get(name.replace(".default.", "."), self.usual)
        if dtype is None or not is_plain(tensor):
            return tensor
        return tensor.to(dtype)
