"""Low-rank adapters on a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

if TYPE_CHECKING:
    from una_fast.model.settings import LoraOptions


# --- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Freeze the model and add trainable adapters, in float32 whatever the dtype of the model."""
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
    """For peft's layers: under autocast the product casts its operands; peft would first copy x, [T, D], to fp32."""
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)
