"""Look at a GGUF file before foreign code reads it: the header, checked against the file's size.

    "GGUF" | version | number of tensors | number of fields
    fields     key, type, value: sizes of the model, the vocabulary, the chat template
    tensors    name, dimensions, type of the numbers, place
    numbers    of every tensor, at its place

transformers turns the numbers into floating-point weights when a model is loaded. The header says
how many there are, so that a count that lies is refused before memory is taken.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from una_fast.model.directory import (
    ADAPTER_CONFIG,
    LARGEST_SIZE,
    MOST_LAYERS,
    MOST_TENSORS,
    ModelError,
    StoredTensor,
)
from una_fast.printable import printable, shown

SUFFIX = ".gguf"
VERSIONS = (2, 3)

# Types of fields, in the letters of `struct`; and two that are not of a fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING = 8
_ARRAY = 9

_ALIGNMENT = 32  # bytes; tensors begin at multiples


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    fields: single numbers and texts by key; arrays are passed over
    tensors: dtype and shape by name; the dtype of quantized tensors is a name such as "Q4_1"
    """

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: str | Path) -> bool:
    """Return whether a path is a GGUF file."""
    return Path(path).suffix == SUFFIX and Path(path).is_file()


def gguf_inside(directory: Path) -> Path | None:
    """Return the GGUF file of a directory without safetensors; None without a GGUF file.

    ModelError for several, with their names.
    """
    if any(directory.glob("*.safetensors")) or (directory / ADAPTER_CONFIG).exists():
        return None
    files = sorted(directory.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(printable(file.name) for file in files[:10])
        raise ModelError(
            f"{printable(directory)} holds {len(files)} GGUF files: {names}; give the path of one"
        )
    return files[0] if files else None


def read_header(file: str | Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    ModelError, by the file: without the package gguf; for damage; for tensors outside the file;
    for sizes that no model has; for a part of a model, and for an adapter.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{printable(file)} is a GGUF file, and the package gguf is not installed; "
            "pip install gguf"
        )
    path = Path(file)
    size = path.stat().st_size
    if size < 24:
        raise ModelError(f"{printable(path)} has {size} bytes, too few for a GGUF file")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Reader(data, path).header()
    _check_fields(header.fields, path)
    _check_layers(header, path)
    return header


class _Reader:
    """A place in the header of a GGUF file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        """Start at the beginning.

        data: bytes of the file
        path: the file, for messages
        """
        self.data = data
        self.path = path
        self.at = 0

    def header(self) -> GgufHeader:
        """Return the header; ModelError where the file ends too early, or holds no header."""
        try:
            return self._header()
        except struct.error:
            raise self._damaged("it ends inside its header") from None
        except (UnicodeDecodeError, OverflowError) as error:
            raise self._damaged(str(error)) from None

    def _header(self) -> GgufHeader:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise self._damaged(f"it begins with {shown(magic)}, not with GGUF")
        self.at = 4
        version = self._number("I")
        if version not in VERSIONS:
            raise self._damaged(f"version {version}; versions 2 and 3 are read")
        tensors, fields = self._number("Q"), self._number("Q")
        if tensors > MOST_TENSORS:
            raise self._damaged(f"{tensors:,} tensors, more than any model has")
        found = {}
        for _ in range(self._at_most(fields, 13)):
            key = self._text()
            found[key] = self._value(self._number("I"))
        return GgufHeader(found, self._tensors(tensors, found))

    def _tensors(self, count: int, fields: dict[str, Any]) -> dict[str, StoredTensor]:
        """Read the table of tensors, and check that the file holds the numbers of each."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors = {}
        places = []
        for _ in range(count):
            name = self._text()
            dimensions = self._number("I")
            if dimensions > 8:
                raise self._damaged(f"the tensor {printable(name)} has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))
            kind, offset = self._number("I"), self._number("Q")
            try:
                dtype = GGMLQuantizationType(kind)
            except ValueError:
                raise ModelError(
                    f"{printable(self.path)}: the tensor {printable(name)} has numbers of type "
                    f"{kind}, which the installed package gguf does not know; install a newer one"
                ) from None
            block, block_bytes = GGML_QUANT_SIZES[dtype]
            tensors[name] = StoredTensor(dtype.name, shape[::-1])
            places.append((name, offset + math.prod(shape) // block * block_bytes))
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment={shown(alignment)} is no size")
        start = math.ceil(self.at / alignment) * alignment
        for name, end in places:
            if start + end > len(self.data):
                raise self._damaged(
                    f"the tensor {printable(name)} ends at byte {start + end:,} of a file of "
                    f"{len(self.data):,}"
                )
        return tensors

    def _value(self, kind: int) -> Any:
        """Return the value of a field; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a field of type {kind}, which is none of GGUF")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(self._at_most(count, 8)):
                self._skip(self._number("Q"))
        else:
            raise self._damaged(f"an array of type {inner}, which no model has")
        return None

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(letter)
        return value

    def _text(self) -> str:
        start = self.at + 8
        self._skip(self._number("Q"))
        return self.data[start : self.at].decode()

    def _skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise struct.error
        self.at += size

    def _at_most(self, count: int, smallest: int) -> int:
        """Return a count of entries that each take `smallest` bytes or more, if the file has so
        many bytes."""
        if count * smallest > len(self.data) - self.at:
            raise struct.error
        return count

    def _damaged(self, fault: str) -> ModelError:
        return ModelError(
            f"{printable(self.path)} is damaged or no GGUF file ({fault}); give a whole copy"
        )


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    """Check the numbers of a header, and refuse the header of a part of a model."""
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{printable(path)} holds a GGUF file of type {shown(kind)}, not a language model"
        )
    if not isinstance(fields.get("general.architecture"), str):
        raise ModelError(f"{printable(path)} has no general.architecture, the class of its model")
    parts = _count(fields, "split.count")
    if parts > 1:
        raise ModelError(
            f"{printable(path)} is one of {parts} parts of a model; merge them "
            "(llama-gguf-split --merge) and give the whole file"
        )
    for key, value in fields.items():
        if not isinstance(value, int) or key.startswith(("general.", "tokenizer.")):
            continue
        largest = MOST_LAYERS if key.endswith(".block_count") else LARGEST_SIZE
        if value > largest:
            raise ModelError(
                f"{printable(path)}: {printable(key)}={value} is larger than any model's; give an "
                "undamaged copy"
            )


def _count(fields: dict[str, Any], key: str) -> int:
    """Return the whole number in a field; 0 without one."""
    value = fields.get(key)
    return value if isinstance(value, int) else 0


def _check_layers(header: GgufHeader, path: Path) -> None:
    """Check that the file holds as many layers as its header says.

    transformers takes a minute to look for a hundred, and its own number where the header has none.
    """
    names = (name.split(".") for name in header.tensors)
    held = {parts[1] for parts in names if parts[0] == "blk"}
    said = _count(header.fields, f"{header.fields['general.architecture']}.block_count")
    if held and not 1 <= said <= len(held):
        raise ModelError(
            f"{printable(path)} says that it has {said} layers, and holds {len(held)}; give a "
            "whole copy"
        )
