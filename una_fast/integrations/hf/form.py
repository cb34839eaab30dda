"""How a causal language model is scored: its head, whether batches are packed, and by which engine.

Found on small copies of the model, so that weights may be anywhere: sharded, or on the meta device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from una_fast.attention.probe import packing_refusal
from una_fast.logs import say_once
from una_fast.model.dropout import attention_dropouts, dropout_rate
from una_fast.model.head_check import HeadCheck, has_numbers, is_replaced
from una_fast.model.head_forward import CannotBeScored, Forward
from una_fast.model.head_probe import NoSmallCopy, head_fields, probe_head, probe_reduced
from una_fast.model.positions import has_learned_positions, positions_of, row_wide_rope

logger = logging.getLogger(__name__)

PACK = ("auto", True, False)


@dataclass(frozen=True)
class Patch:
    """How a patched model is scored; an attribute of the model, `_una`.

    softcap, logit_scale: of the head, see linear_una_loss
    head_fields: name -> number of the config, behind softcap and logit_scale
    head_check: looks at the head of each call
    packs: batches are packed where they can be
    moves: rows padded on the left may begin at position 0: positions are rotary, and only
        differences of positions count
    dropouts: of attention, see attention_dropouts
    workspace_mb, engine: of the fused head
    """

    softcap: float | None
    logit_scale: float
    head_fields: dict[str, float | None]
    head_check: HeadCheck
    packs: bool
    moves: bool
    dropouts: list[tuple[Any, str]]
    workspace_mb: float | None
    engine: str

    def attention_dropout(self) -> float:
        """Return the largest dropout of attention in the model, now."""
        return max((dropout_rate(*place) for place in self.dropouts), default=0.0)

    def head_options(self, causal_lm: PreTrainedModel, temperature: float) -> dict[str, Any]:
        """Return the keyword arguments of the functions of head.ops.

        causal_lm: the patched model
        temperature: divisor of the logits

        ValueError for a config that has changed since the patch.
        """
        config = causal_lm.config.get_text_config()
        for name, before in self.head_fields.items():
            now = getattr(config, name, None)
            if now != before:
                raise ValueError(
                    f"{name} of the config of {type(causal_lm).__name__} was {before} when the "
                    f"model was patched, and is {now}; set it back, or load the model with {now} "
                    "and patch again"
                )
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": temperature,
            "workspace_mb": self.workspace_mb,
            "engine": self.engine,
        }


def inner_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PeftModel, or the model itself.

    CannotBeScored for any wrapper but PeftModel, and for a model of another kind.
    """
    # Without an import of peft, which need not be installed.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if isinstance(base, nn.DataParallel):
        raise CannotBeScored("nn.DataParallel splits lists and labels; use DistributedDataParallel")
    if not isinstance(base, PreTrainedModel):
        raise CannotBeScored(
            f"{name} is no model of transformers; patch the model before DDP, FSDP, DeepSpeed or "
            "torch.compile wrap it"
        )
    if base.config.is_encoder_decoder:
        raise CannotBeScored(
            f"{name} is an encoder-decoder model; only causal models can be scored"
        )
    return base


def make_patch(
    causal_lm: PreTrainedModel,
    function: Forward,
    pack: str | bool,
    workspace_mb: float | None,
    engine: str,
) -> Patch:
    """Return how a model is scored: the constants of its head, and whether it can be packed.

    causal_lm: not wrapped yet
    function: is to stand over its forward, or does so already
    pack, workspace_mb, engine: as of patch_model

    ValueError for pack=, and CannotBeScored, as of patch_model.
    """
    if pack not in PACK:
        raise ValueError(f'pack={pack!r} is not one of "auto", True and False')
    if any(isinstance(parameter, DTensor) for parameter in causal_lm.parameters()):
        raise CannotBeScored(
            f"{type(causal_lm).__name__} is sharded already; patch it before fully_shard"
        )
    head = head_form(causal_lm, function)
    packs = pack is not False
    refusal = (row_wide_rope(causal_lm) or packing_refusal(causal_lm)) if packs else None
    if refusal is not None:
        if pack is True:
            raise ValueError(f'pack=True, but {refusal}; give pack="auto", which pads')
        say_once(logging.WARNING, f"batches stay padded: {refusal}", logger)
        packs = False
    fields = head_fields(causal_lm.config)
    moves, dropouts = _has_rotary_positions(causal_lm), attention_dropouts(causal_lm)
    before = causal_lm.__dict__.get("_una")
    check = HeadCheck(causal_lm, None if before is None else before.head_check)
    return Patch(*head, fields, check, packs, moves, dropouts, workspace_mb, engine)


def _has_rotary_positions(causal_lm: PreTrainedModel) -> bool:
    positions = positions_of(causal_lm)
    return positions is None or not has_learned_positions(causal_lm, positions)


def head_form(causal_lm: PreTrainedModel, function: Forward) -> tuple[float | None, float]:
    """Return (softcap, logit_scale) of a model whose weights may be anywhere.

    causal_lm: the model
    function: is to stand over its forward, or does so already

    CannotBeScored by the class if neither a small copy of the model nor the model itself shows
    softcap and scale, or where the forward is replaced and weights are missing.
    """
    missing = not all(map(has_numbers, causal_lm.parameters()))
    # Hooks are compared where they can be, and are taken to change no logits elsewhere.
    replaced = is_replaced(causal_lm, function, hooks=not missing)
    if replaced and missing:
        raise CannotBeScored(
            f"the forward of {type(causal_lm).__name__} was replaced, and its weights are not here "
            "to compare logits; patch the model before the forward is replaced, or when its "
            "weights are loaded"
        )
    if replaced:
        spec = probe_head(causal_lm)
        return spec.softcap, spec.logit_scale
    try:
        spec = probe_reduced(causal_lm)
    except NoSmallCopy:
        if missing:
            raise
        spec = probe_head(causal_lm)
    return spec.softcap, spec.logit_scale
