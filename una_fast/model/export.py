"""Save a policy in Hugging Face form, adapters merged if asked."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from una_fast.model.policy import Policy

_PEFT_PREFIX = "base_model.model."


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
    *,
    merged: bool = False,
) -> None:
    """Write model and tokenizer so that AutoModelForCausalLM.from_pretrained(directory) works.

    policy: the model; of LoRA the adapter is written
    directory: receives safetensors, config.json and the tokenizer's files
    tokenizer: tokenizer of the model
    state_dict: full tensors under the names of policy.model.state_dict() (sharded runs gather
        them); default: the live weights
    merged: LoRA also writes whole weights, with the adapter added, in directory/merged
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
    """Return the live weights under the model's own names, with adapters added in."""
    if isinstance(policy.model, PeftModel):
        return _merge(policy, dict(policy.model.state_dict()))
    return policy.causal_lm.state_dict()


def _merge(policy: Policy, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return W + scaling * B A under the model's own names, added in float32.

    peft's merge would change the live weights, and taking the merge back would round the weights.
    """
    merged = {
        name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state_dict.items()
        if ".lora_" not in name
    }
    for name, layer in policy.causal_lm.named_modules():
        _check_mergeable(name, layer)
        if not isinstance(layer, LoraLinear):
            continue
        for adapter in layer.active_adapters:
            prefix = f"{_PEFT_PREFIX}{name}"
            a = state_dict[f"{prefix}.lora_A.{adapter}.weight"].float()  # [r, D_in]
            b = state_dict[f"{prefix}.lora_B.{adapter}.weight"].float()  # [D_out, r]
            delta = layer.scaling[adapter] * (b @ a)
            if layer.fan_in_fan_out:
                delta = delta.T
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return merged


def _check_mergeable(name: str, layer: nn.Module) -> None:
    """Check that a module is plain LoRA or no adapter; ValueError by the module's name."""
    is_adapter = isinstance(layer, BaseTunerLayer)
    is_plain_lora = isinstance(layer, LoraLinear) and not layer.lora_variant
    if isinstance(layer, AuxiliaryTrainingWrapper) or (is_adapter and not is_plain_lora):
        raise ValueError(
            f"{name} is a {type(layer).__name__}; only plain LoRA on linear layers is merged"
        )
