"""Low-rank adapters on a loaded model."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from una_fast.model.settings import LoraOptions


def add_lora(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Freeze a model of any dtype, and add trainable adapters in float32."""
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=options.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


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
