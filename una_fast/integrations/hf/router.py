"""The load-balancing loss of a mixture of experts, over the tokens that a forward computed."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

# Fields of configs; JetMoe has the second.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def wants_router_loss(causal_lm: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether a call, or the config, asks for the logits of the routers."""
    config = causal_lm.config.get_text_config()
    asked = inputs.get("output_router_logits")
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def router_loss(causal_lm: PreTrainedModel, output: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Return the load-balancing loss of the model's family, without its coefficient.

    In a packed row a shared prompt counts once, and padding never.

    causal_lm: the model
    output: of the backbone
    inputs: of the backbone, as it was called

    None where nobody asked for it. ValueError for a model that gives no router logits.
    """
    if not wants_router_loss(causal_lm, inputs):
        return None
    logits = getattr(output, "router_logits", None)
    if logits is None:
        raise ValueError(
            f"{type(causal_lm).__name__} gives no router logits, which its load-balancing loss "
            "needs; set output_router_logits=False in its config"
        )
    config = causal_lm.config.get_text_config()
    # Most families have a copy of Mixtral's.
    family = sys.modules[type(causal_lm).__module__]
    function = getattr(family, "load_balancing_loss_func", load_balancing_loss_func)
    experts = getattr(causal_lm, "num_experts", None) or config.num_experts
    chosen = getattr(causal_lm, "num_experts_per_tok", None) or config.num_experts_per_tok
    return function(logits, experts, chosen, inputs.get("attention_mask"))


def router_coefficient(causal_lm: PreTrainedModel) -> float | None:
    """Return the factor of the load-balancing loss in the model's own loss; None without any."""
    config = causal_lm.config.get_text_config()
    found = (getattr(config, name, None) for name in _COEFFICIENTS)
    return next((value for value in found if value is not None), None)
