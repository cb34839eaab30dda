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


def embedding_noise(model: nn.Module) -> float:
    """Return alpha of the noise on the input embedding in training, NEFTune's; 0 without.

    A hook of transformers adds noise of up to alpha / sqrt(T * D) to embeddings [B, T, D], for the
    time of training: its size depends on the width T of a batch.
    """
    embedding = model.get_input_embeddings()
    alpha = getattr(embedding, "neftune_noise_alpha", None)
    return float(alpha) if alpha and embedding.training else 0.0


def attention_dropouts(model: nn.Module) -> list[tuple[Any, str]]:
    """Return the places of the dropouts of attention, (module or config, name): see dropout_rate.

    Modules keep the numbers that they were built with, and the config may say otherwise. A module
    without a number reads the config in every call.
    """
    found: list[tuple[Any, str]] = []
    for module in model.modules():
        is_attention = "Attention" in type(module).__name__
        names = (*_OF_ATTENTION, "dropout") if is_attention else _OF_ATTENTION  # OPT's plain name
        own = [(module, name) for name in names if hasattr(module, name)]
        if is_attention and not own:
            config = getattr(module, "config", None)
            own = [(config, name) for name in _OF_ATTENTION if hasattr(config, name)]
        found += own
    return found


def dropout_rate(holder: Any, name: str) -> float:
    """Return the rate of a dropout, a number or a module; 0 for anything else."""
    dropout = getattr(holder, name, None)
    rate = getattr(dropout, "p", dropout)
    return float(rate) if is_number(rate) else 0.0
