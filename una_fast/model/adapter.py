"""A model with its adapters off, the reference of the policy with adapters: and when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from una_fast.model.head_probe import is_adapted

# Ways of peft to begin an adapter that change the weights under it.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Parts of the names of parameters that are replaced, or left out, where the adapters are off.
_SWITCHED = ("modules_to_save", "trainable_tokens", "prompt_encoder")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of a PeftModel off inside the block.

    peft's own disable_adapter ends with every active adapter trainable, frozen ones too. Here each
    parameter stays trained or frozen, within the block and after it.

    model: with an adapter, see has_adapter; under a wrapper, the one inside
    """
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    is_peft = hasattr(model, "disable_adapter")
    try:
        with model.disable_adapter() if is_peft else layers_off(model):
            _restore(asked)
            yield
    finally:
        _restore(asked)


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model is a PeftModel, or has adapters by transformers' add_adapter."""
    return hasattr(model, "disable_adapter") or getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def layers_off(model: nn.Module) -> Iterator[None]:
    """Switch the adapted layers of a model off inside the block, and nothing else.

    peft's own disable_adapter also freezes the adapters, which FSDP2 may see in its first forward.

    model: with adapters in its layers
    """
    layers = list(filter(is_adapted, model.modules()))
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _restore(asked: list[tuple[nn.Parameter, bool]]) -> None:
    """Give parameters their `requires_grad` back."""
    for parameter, requires_grad in asked:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)


def no_reference(model: Any) -> str | None:
    """Return why a model with its adapters off is not the policy before training, or None.

    model: with an adapter, see has_adapter
    """
    is_native = not hasattr(model, "disable_adapter")
    prefix = "lora_" if is_native else getattr(model.base_model, "prefix", None)
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
