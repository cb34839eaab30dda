"""Dropout of a model, and everything of the kind, set to 0."""

from __future__ import annotations

import re

from torch import nn

from una_fast.model.head_probe import is_number

_DROPOUT_NAME = re.compile(r"dropout|pdrop|drop_path|drop_rate|layerdrop|jitter")


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout (and router jitter) of a model to 0.

    The implicit reward compares two deterministic log-probs.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    configs |= {id(c): c for c in getattr(model, "peft_config", {}).values()}
    for holder in (*modules, *configs.values()):
        for name, value in list(vars(holder).items()):
            if _DROPOUT_NAME.search(name) and is_number(value):
                setattr(holder, name, type(value)(0))
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
