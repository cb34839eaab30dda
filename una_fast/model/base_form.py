"""How an adapter's base was held while the adapter was trained: a file beside the adapter.

    base_form.json    {"quantize_base": "nf4", "packed_from": "bfloat16"}

An adapter makes up for the rounding of the base that it was trained on: over other numbers it is
another model. Numbers rounded to bfloat16 first get other codes than numbers in float32. Without
the file the base is plain.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from una_fast.files import write_json
from una_fast.model.directory import ModelError
from una_fast.model.four_bits import packed_layers
from una_fast.printable import printable

BASE_FORM = "base_form.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseForm:
    """A base at 4 bits.

    quantize_base: the format, nf4
    packed_from: name of the dtype of the numbers that were packed
    """

    quantize_base: str
    packed_from: str

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers that were packed."""
        return getattr(torch, self.packed_from)


def write_base_form(model: nn.Module, directory: Path) -> None:
    """Write the form of the base beside an adapter; no file for a plain base.

    model: with the adapter
    directory: of the adapter
    """
    for _, layer in packed_layers(model):
        form = BaseForm("nf4", str(layer.packed_from).removeprefix("torch."))
        write_json(directory / BASE_FORM, asdict(form))
        return


def read_base_form(adapter: str | None) -> BaseForm | None:
    """Return the form of the base of an adapter; None for a plain base, or without an adapter.

    adapter: directory of the adapter

    ModelError for a damaged file.
    """
    if adapter is None:
        return None
    path = Path(adapter) / BASE_FORM
    if not path.is_file():
        return None
    try:
        form = BaseForm(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{printable(path)} is damaged: {printable(error)}") from None
    if form.quantize_base != "nf4" or form.packed_from not in DTYPES:
        raise ModelError(f"{printable(path)} names a form of the base that is not known")
    return form


def form_to_pack(
    adapter: str | None, quantize_base: str | None, dtype: torch.dtype
) -> torch.dtype | None:
    """Return the dtype that the weights of a base are packed from; None for a plain base.

    adapter: directory of the adapter over the base, if any
    quantize_base: as asked for: "nf4" or None
    dtype: of the weights, where nothing else is known

    ModelError, with the setting, where the adapter was trained on a base of another form.
    """
    form = read_base_form(adapter)
    if form is not None and quantize_base is None:
        raise ModelError(
            f"{printable(adapter)} was trained on its base at 4 bits, and over plain numbers it is "
            f"another model; set quantize_base: {form.quantize_base}"
        )
    if quantize_base is None:
        return None
    return dtype if form is None else form.dtype
