"""A model with its adapters off, the reference of the policy with adapters: and when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Ways of peft to begin an adapter that change the weights under it.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parts of the names of parameters that are replaced, or left out, where the adapters are off.
_SWITCHED = ("modules_to_save", "trainable_tokens", "prompt_encoder")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of a PeftModel off inside the block.

    peft's own disable_adapter ends with every active adapter trainable, frozen ones too. Here each
    parameter stays trained or frozen, within the block and after it.

    model: PeftModel; under a wrapper, the one inside
    """
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            _restore(asked)
            yield
    finally:
        _restore(asked)


def _restore(asked: list[tuple[nn.Parameter, bool]]) -> None:
    """Give parameters their `requires_grad` back."""
    for parameter, requires_grad in asked:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


def no_reference(model: Any) -> str | None:
    """Return why a PeftModel with its adapters off is not the policy before training, or None.

    model: PeftModel
    """
    prefix = getattr(model.base_model, "prefix", None)
    if prefix is not None:  # of the names of the adapters' parameters
        switched = (prefix, *_SWITCHED)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not any(part in name for part in switched):
                return f"{name} is trained, and stays as trained where the adapter is off"
    for config in model.peft_config.values():
        start = str(getattr(config, "init_lora_weights", ""))
        if start.startswith(_CHANGES_BASE):
            return f"init_lora_weights={start!r} changes the weights under the adapter"
    return None
