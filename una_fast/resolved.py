"""The decisions of a run, made once before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from una_fast.config import RunConfig


def run_dtypes(config: RunConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(of the computation, of the weights of the policy as it is loaded) of a run.

    The two differ under master_weights alone. bf16 weights have bf16 gradients, which micro-batches are added up in;
    with fp32 weights both are fp32. New adapters are fp32 in any case, over a base in the dtype of the computation,
    which every frozen reference has too.
    """
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    compute = torch.bfloat16 if bf16 else torch.float32
    return compute, torch.float32 if config.master_weights and not config.lora else compute
