"""Look at a model directory before foreign code reads it, and name what is wrong with it.

transformers, tokenizers and peft trust their files: a pipe in place of a file blocks them, damage
ends in an exception of any kind, and a config of a million layers is built. So

    check_directory     kinds and sizes of the files, JSON that must be an object, numbers of the
                        config, file names of a sharded index
    stored_tensors      name -> dtype and shape of every tensor, from the headers of the safetensors
    reading             a block of foreign code: whatever it raises becomes one line
    within_budget       a block that builds a model: stopped once it is larger than its files
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from una_fast.printable import printable, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

LARGEST_TEXT = 1 << 28  # bytes of a JSON file or a template; the largest tokenizers have 2**25
MOST_LAYERS = 1000  # the deepest models have 130
MOST_TENSORS = 200_000  # of a model; 256 experts in 61 layers, each in three parts, are 47,000
LARGEST_SIZE = 2**31
LARGEST_INTEGER = 2**63  # of any other number, such as rope_theta

# Small files that are JSON objects; tokenizer.json is large, and looked at after a failure alone.
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    ADAPTER_CONFIG,
    INDEX,
)
# Every JSON file of a directory that transformers reads; others are nobody's.
_READ = (
    *_OBJECTS,
    "tokenizer.json",
    "vocab.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_TEXTS = (".json", ".jinja", ".txt")
_LAYERS = re.compile(r"(.*_)?(layers?|depths?)")
# Sizes and counts in a config: whole numbers, not negative, or null.
_SIZES = re.compile(
    r"(.*_)?(size|dim|window|embeddings)|n_(head|embd|positions|ctx)|num_.*(heads|experts)"
)
_WINDOWS = ("sliding_window", "attention_chunk_size")
_FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes of safetensors


class ModelError(ValueError):
    """A model, adapter or tokenizer that cannot be used; the text is one line."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: dtype in the words of safetensors, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Return whether the elements are plain floating-point numbers of 16 bits or more."""
        return self.dtype in _FLOATS


# ---- foreign code ------------------------------------------------------------------------------


@contextmanager
def reading(
    path: str, kind: str, only: tuple[type[BaseException], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what foreign code raises in the block into a ModelError that names the directory.

    path: the directory or hub name that is read
    kind: kind of the content, for the message
    only: exceptions that are turned; a panic of the Rust code in tokenizers is, in any case

    A damaged file of the directory is looked for, and named. MemoryError passes.
    """
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"  # of Rust, and no Exception
        if not panicked and not isinstance(error, only):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError) or not text:
            text = f"{type(error).__name__}: {text}"
        where = _damaged_file(path) or f"{kind} {printable(path)} cannot be read"
        raise ModelError(f"{where}: {printable(text, 600)}") from error


def _damaged_file(path: str) -> str | None:
    """Return the name of a file that is read and is no JSON or no safetensors file, if any."""
    directory = Path(path)
    if not directory.is_dir():
        return None
    files = [directory / name for name in (*_READ, ADAPTER)]
    with suppress(ModelError):  # no weights: a tokenizer, or an adapter
        files += weight_files(directory)
    for file in files:
        if not file.is_file():
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            else:
                with safe_open(file, "pt"):
                    pass
        except Exception:
            return f"{printable(file)} is damaged"
    return None


# ---- files -------------------------------------------------------------------------------------


def check_directory(path: str) -> None:
    """Check the files of a local model, tokenizer or adapter directory; hub names pass.

    ModelError by the file: for a pipe, socket or device; for a text of more than 256 MiB; for JSON
    that is damaged or no object; for a number in config.json that no model has; for an index that
    names a file that is missing or outside the directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        return
    for entry in _entries(directory):
        _check_kind(entry)
    for name in _OBJECTS:
        file = directory / name
        if file.exists():
            content = read_object(file)
            if name == ADAPTER_CONFIG:
                _check_depth(content, file)
            if name == "config.json":
                check_config(content, file)
    if (directory / INDEX).exists():
        index_files(directory / INDEX)


def _entries(directory: Path) -> Iterator[Path]:
    """Yield the files of a directory, and of the folder with further chat templates."""
    for entry in sorted(directory.iterdir()):
        yield entry
        if entry.name == "additional_chat_templates" and entry.is_dir():
            yield from sorted(entry.iterdir())


def _check_kind(file: Path) -> None:
    """Check that a directory entry is a file of sane size, a folder, or a link that leads nowhere.

    Nobody opens the last.
    """
    try:
        status = file.stat()
    except OSError:
        return
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ModelError(f"{printable(file)} is a pipe, socket or device, not a file; remove it")
    if file.suffix in _TEXTS and status.st_size > LARGEST_TEXT and stat.S_ISREG(status.st_mode):
        raise ModelError(
            f"{printable(file)} has {status.st_size:,} bytes, more than the {LARGEST_TEXT:,} of "
            "any text of a model; give a whole copy of the model"
        )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ModelError that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"{printable(file)} is damaged ({printable(error)}); give a whole copy of the model"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{printable(file)} holds {shown(content)}, and must hold a JSON object")
    return content


def check_config(content: dict[str, Any], file: Path) -> None:
    """Check the numbers of a model's config; ModelError by file and key."""
    _check_depth(content, file)
    _check_sizes(content, file)


def _check_depth(content: dict[str, Any], file: Path) -> None:
    """Check the numbers of a config, however deep it is."""
    try:
        _check_numbers(content, file, "")
    except RecursionError:
        raise ModelError(f"{printable(file)} is nested too deep for a config") from None


def _check_sizes(content: dict[str, Any], file: Path) -> None:
    """Check the sizes of a text model in a config: those of towers may be anything."""
    inner = content.get("text_config")
    for fields in (content, inner if isinstance(inner, dict) else {}):
        for key, value in fields.items():
            wrong = isinstance(value, str) or (isinstance(value, int | float) and value < 0)
            if wrong and _SIZES.fullmatch(key):
                _refuse_number(file, key, value, "is no size")


def _check_numbers(value: object, file: Path, key: str) -> None:
    """Check every number in a config; ModelError that names file and key.

    Infinity is allowed in lists alone: an open interval.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, file, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            if inner not in (math.inf, -math.inf):
                _check_numbers(inner, file, key)
    elif isinstance(value, float) and not math.isfinite(value):
        _refuse_number(file, key, value, "is not a finite number")
    elif isinstance(value, int):
        _check_integer(value, file, key)


def _check_integer(value: int, file: Path, key: str) -> None:
    """Check a whole number in a config by what its key names: layers, a size, or anything."""
    name = key.split(".")[-1]
    if abs(value) > LARGEST_INTEGER:
        _refuse_number(file, key, value, "is larger than any number of a model")
    elif abs(value) > LARGEST_SIZE and (_SIZES.fullmatch(name) or _LAYERS.fullmatch(name)):
        _refuse_number(file, key, value, "is larger than any size of a model")
    elif value > MOST_LAYERS and _LAYERS.fullmatch(name):
        _refuse_number(file, key, value, f"is more than {MOST_LAYERS} layers")
    elif value == 0 and name in _WINDOWS:
        _refuse_number(file, key, value, "lets no token see any; null is no window")


def _refuse_number(file: Path, key: str, value: object, fault: str) -> None:
    raise ModelError(f"{printable(file)}: {printable(key)}={shown(value)} {fault}; correct it")


# ---- weights -----------------------------------------------------------------------------------


def index_files(index: Path) -> list[Path]:
    """Return the weight files that a sharded index names.

    index: model.safetensors.index.json

    ModelError for an index without files, and for a file outside the directory, or missing.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{printable(index)} has no weight_map from weights to files")
    files = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise ModelError(
                f"{printable(index)}: {printable(name)} is in {shown(file)}, which must be the "
                "name of a file beside the index"
            )
        files.append(index.parent / file)
    files = sorted(set(files))
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{printable(index)} names {printable(file.name)}, which is not there; give a "
                "whole copy of the model"
            )
    return files


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, as transformers chooses them.

    ModelError for a directory without any: other files are pickles, which may run code.
    """
    named = {}
    if (directory / "config.json").is_file():
        named = read_object(directory / "config.json")
    name = named.get("transformers_weights")
    if name is not None:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ModelError(
                f"{printable(directory)}/config.json: transformers_weights={shown(name)} must be "
                "the name of a file beside it"
            )
        file = directory / name
        if file.is_file():
            return index_files(file) if name.endswith(".json") else [file]
    elif (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    elif (directory / INDEX).is_file():
        return index_files(directory / INDEX)
    raise ModelError(_no_safetensors(directory, name or WEIGHTS))


def _no_safetensors(directory: Path, name: str) -> str:
    """Return the message for a directory without weights in safetensors."""
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    text = f"{printable(directory)} has no {printable(name)}"
    if pickles:
        return (
            f"{text}; {printable(pickles[0])} is a pickle, which may run code and is not read. "
            "Save the weights as safetensors"
        )
    return f"{text}; give a directory with weights as safetensors"


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return dtype and shape of every tensor in safetensors files, from the headers."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    piece = opened.get_slice(name)
                    tensors[name] = StoredTensor(piece.get_dtype(), tuple(piece.get_shape()))
        except Exception as error:  # safetensors' own, and OSError
            text = " ".join(str(error).split())
            raise ModelError(
                f"{printable(file)} is damaged ({printable(text)}); give a whole copy of the model"
            ) from error
    return tensors


def adapter_file(directory: Path) -> Path:
    """Return the weight file of an adapter directory; ModelError for one without safetensors."""
    file = directory / ADAPTER
    if not file.is_file():
        raise ModelError(_no_safetensors(directory, ADAPTER))
    return file


# ---- sizes -------------------------------------------------------------------------------------


@contextmanager
def within_budget(path: str, elements: int | None) -> Iterator[None]:
    """Stop the building of a model in the block once it is larger than its weight files.

    path: for the message
    elements: elements that the parameters may have; None: as many as fit into 200,000 tensors
    """
    count = built = 0

    def look(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, built
        if parameter is None:
            return
        count += 1
        built += parameter.numel()
        if count > MOST_TENSORS:
            raise ModelError(
                f"the config of {printable(path)} describes a model of more than "
                f"{MOST_TENSORS:,} tensors; correct its sizes"
            )
        if elements is not None and built > elements:
            raise ModelError(
                f"the config of {printable(path)} describes a larger model than its weight files "
                f"hold (at {type(module).__name__}.{name}); correct the sizes in config.json, or "
                "give the weights that belong to it"
            )

    handle = register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()
