"""Save a policy in Hugging Face form, adapters merged where asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
)

from una_fast.model.policy import Policy

if TYPE_CHECKING:
    pass

_PEFT_PREFIX = "base_model.model."


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
    *,
    merged: bool = False,
) -> None:
    """Write the model (safetensors) and tokenizer so that AutoModelForCausalLM.from_pretrained(directory) works.

    LoRA: the adapter, and with `merged` also whole weights, with the adapter added, in directory/merged.
    state_dict: full tensors under the names of policy.model.state_dict() (sharded runs gather them); default: live.
    """
    state_dict = dict(policy.model.state_dict() if state_dict is None else state_dict)
    if isinstance(policy.model, PeftModel):
        policy.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
        if merged:
            whole = Path(directory) / "merged"
            policy.causal_lm.save_pretrained(whole, state_dict=_merge(policy, state_dict))
            tokenizer.save_pretrained(whole)
    else:
        policy.causal_lm.save_pretrained(directory, state_dict=state_dict)
    tokenizer.save_pretrained(directory)


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """The live weights under the model's own names, with adapters added in."""
    if isinstance(policy.model, PeftModel):
        return _merge(policy, dict(policy.model.state_dict()))
    return policy.causal_lm.state_dict()


def _merge(policy: Policy, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scaling * B A under the model's own names, added in float32. peft's merge would change the live weights,
    and taking it back rounds them."""
    merged = {
        name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state_dict.items()
        if ".lora_" not in name
    }
    for name, layer in policy.causal_lm.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper) or (
            isinstance(layer, BaseTunerLayer)
            and (not isinstance(layer, LoraLinear) or layer.lora_variant)
        ):
            raise ValueError(
                f"{name} is a {type(layer).__name__}; only plain LoRA on linear layers is merged"
            )
        if not isinstance(layer, LoraLinear):
            continue
        for adapter in layer.active_adapters:
            a, b = (
                state_dict[f"{_PEFT_PREFIX}{name}.lora_{side}.{adapter}.weight"].float()
                for side in "AB"
            )
            delta = layer.scaling[adapter] * (b @ a)
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (
                weight.float() + (delta.T if layer.fan_in_fan_out else delta)
            ).to(weight.dtype)
    return merged
