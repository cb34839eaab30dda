"""Low-rank adapters on a loaded model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from una_fast.model.directory import ModelError, reading
from una_fast.model.head_probe import outside_text, text_modules
from una_fast.model.settings import LoraOptions
from una_fast.printable import shown


def add_lora(
    model: PreTrainedModel, options: LoraOptions, *, revision: str | None = None
) -> PeftModel:
    """Freeze a model of any dtype, and add trainable adapters in float32.

    model: gets the adapters
    options: size and place of the adapters
    revision: revision of the model on the hub, which a saved adapter names

    Adapters are on layers that text runs through: in none of a vision tower. ValueError for a name
    among the target modules that no such layer has, and for layers that take no adapter.
    """
    inside = text_modules(model)
    text = [name for name, module in model.named_modules() if module in inside]
    _check_targets(options.target_modules, text, type(model).__name__)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.r if options.alpha is None else options.alpha,
        target_modules=options.target_modules,
        exclude_modules=_outside(model),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        revision=revision,
    )
    with reading(type(model).__name__, "lora target_modules: the model"):
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def _check_targets(targets: list[str] | str, names: list[str], model: str) -> None:
    """Refuse a target that matches no module of the text model.

    targets: names or ends of names, a regular expression, or "all-linear"
    names: of the modules of the text model
    model: class of the model, for the message
    """
    if targets == "all-linear":
        return
    unknown = []
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ModelError(
                f"lora target_modules={shown(targets)} is no regular expression: {error}; give "
                'a list of names, or "all-linear"'
            ) from error
        if not any(map(pattern.fullmatch, names)):
            unknown.append(targets)
    else:
        ends = set()
        for name in names:
            ends.update(name[start:] for start in _starts_of_ends(name))
        unknown += [target for target in targets if target not in ends]
    if unknown:
        leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
        kinds = [leaf for leaf in leaves if not leaf.isdecimal()]
        raise ModelError(
            f"lora target_modules: {', '.join(map(shown, unknown))} matches no layer that text "
            f"runs through in {model}; it has {', '.join(kinds)}. Correct the names, or use "
            '"all-linear"'
        )


def _starts_of_ends(name: str) -> Iterable[int]:
    """Return where the ends of a dotted name start: 0, and after every dot."""
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def _outside(model: PreTrainedModel) -> str | None:
    """Return a pattern of the names of the modules that text does not run through."""
    outside = outside_text(model)
    if not outside:
        return None
    # peft takes a list for ends of names; a text is a regular expression for whole ones.
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in outside)


def cast_outside_autocast(
    layer: BaseTunerLayer, x: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Cast the input of an adapter, but not under autocast: a method for layers of peft.

    layer: an adapted layer
    x: input of the layer, [T, D]
    dtype: dtype of the adapter

    Under autocast products cast the operands, and peft's copy of x to float32 would be wasted.
    """
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
