"""Dropout of a model, and everything of the kind, set to 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_DROPOUT_NAME = re.compile(r"dropout|pdrop|drop_path|drop_rate|layerdrop|jitter")
# Of attention, as fields of configs, and as numbers or modules within a model.
_OF_ATTENTION = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


def is_number(value: object) -> bool:
    """Return whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout (and router jitter) of a model to 0.

    The implicit reward compares two deterministic log-probs.
    """
    for holder, name, value in list(_dropouts(model)):
        setattr(holder, name, type(value)(0))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Remove the dropout of a model inside the block, and restore the numbers after."""
    before = list(_dropouts(model))
    remove_dropout(model)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _dropouts(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Yield (module or config, name, value) of every dropout."""
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    configs |= {id(c): c for c in getattr(model, "peft_config", {}).values()}
    for holder in (*modules, *configs.values()):
        for name, value in vars(holder).items():
            if _DROPOUT_NAME.search(name) and is_number(value):
                yield holder, name, value
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            yield holder, "p", holder.p


def attention_dropout(model: nn.Module) -> float:
    """Return the largest dropout of attention in a model.

    Modules keep the numbers that they were built with, and the config may say otherwise. A module
    without a number reads the config in every call.
    """
    found = [0.0]
    for module in model.modules():
        # In the dictionaries: this runs in every call, and a module's getattr is slow.
        members = vars(module)
        children = members["_modules"]
        names = _OF_ATTENTION
        if "Attention" in type(module).__name__:
            names = (*_OF_ATTENTION, "dropout")  # OPT's plain name
        own = [members.get(name, children.get(name)) for name in names]
        if names is not _OF_ATTENTION and own.count(None) == len(own):
            own = [getattr(members.get("config"), name, None) for name in _OF_ATTENTION]
        found += map(_rate, own)
    return max(found)


def _rate(dropout: object) -> float:
    """Return the rate of a dropout, a number or a module; 0 for anything else."""
    rate = getattr(dropout, "p", dropout)
    return float(rate) if is_number(rate) else 0.0
