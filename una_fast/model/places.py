"""Places of models: directories, GGUF files, and names on the hub, perhaps with a revision.

runs/first                a directory in Hugging Face form, or with a GGUF file alone
models/small.Q4_1.gguf    a GGUF file: weights, config, tokenizer and chat template
owner/name                the newest version on the hub
owner/name@revision       a branch, a tag or a commit; a revision in the name goes wherever a
                          model is named: rewards, the base of an adapter, the records' cache
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from una_fast.model.directory import (
    ModelError,
    StoredTensor,
    check_directory,
    stored_tensors,
    weight_files,
)
from una_fast.model.gguf import SUFFIX, gguf_inside, is_gguf, read_header

_REVISION = re.compile(r"([\w.-]+(?:/[\w.-]+)?)@([\w.+/-]+)")


def find(path: str | os.PathLike[str], kind: str) -> str:
    """Return the absolute path of a local directory or GGUF file, or a hub name as given.

    path: a directory, a GGUF file or a hub name; a directory with one GGUF file is the file
    kind: kind of the content, for the message

    ValueError for a local path without a directory or GGUF file.
    """
    text = str(path)
    expanded = Path(text).expanduser()
    if is_gguf(expanded):
        return str(expanded.resolve())
    if expanded.is_dir():
        return str(gguf_inside(expanded.resolve()) or expanded.resolve())
    looks_local = expanded.is_absolute() or text.startswith(("./", "../", "~"))
    if looks_local or expanded.suffix == SUFFIX or Path(expanded.parts[0]).exists():
        raise ValueError(
            f"{kind} directory {text} does not exist; give a directory in Hugging Face form "
            "(config.json, tokenizer files, *.safetensors), a GGUF file, or a hub name such as "
            "org/name"
        )
    return text


def pretrained(path: str) -> tuple[str, dict[str, str]]:
    """Return how transformers finds a model: a name or directory, and keywords.

    path: as `find` returns it

    Examples: ("/models", {"gguf_file": "small.gguf"}), ("owner/name", {"revision": "v2"}).
    """
    if is_gguf(path):
        file = Path(path)
        return str(file.parent), {"gguf_file": file.name}
    name, revision = split_revision(path)
    return name, {} if revision is None else {"revision": revision}


def split_revision(path: str) -> tuple[str, str | None]:
    """Return the name and the revision of "owner/name@revision"; None without a revision."""
    match = _REVISION.fullmatch(path)
    if match is None or Path(path).exists():
        return path, None
    return match[1], match[2]


def with_revision(name: str, revision: str | None) -> str:
    """Return a name on the hub with its revision, if it has any."""
    return f"{name}@{revision}" if revision else name


def check_place(path: str) -> None:
    """Check the files of a local model, tokenizer or adapter; hub names pass.

    ModelError as in `check_directory` and `read_header`.
    """
    if is_gguf(path):
        read_header(path)
    else:
        check_directory(path)


def stored_in(path: str) -> dict[str, StoredTensor] | None:
    """Return dtype and shape of every stored weight of a model; None for a hub name.

    ModelError for weights that are damaged or absent.
    """
    if is_gguf(path):
        return read_header(path).tensors
    if Path(path).is_dir():
        return stored_tensors(weight_files(Path(path)))
    return None


def element_budget(path: str, *, quantized: bool) -> int | None:
    """Return the elements that the model of a place may have, generously; None: unknown.

    path: model directory, GGUF file, or hub name
    quantized: a stored element may hold eight weights; GGUF counts weights

    A head tied to the embedding is built, and counted, up to three times.
    """
    try:
        tensors = stored_in(path)
    except ModelError:
        return None  # a plan needs no weights; loading says what is wrong
    if tensors is None:
        return None
    stored = sum(tensor.numel for tensor in tensors.values())
    return (8 if quantized else 1) * 4 * stored + 2**24
