"""TRL's one seam: the head that gives its trainers per-token log-probs, without logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer import utils as trl_utils

from una_fast.integrations.calls import fall_back
from una_fast.integrations.hf.form import Patch, make_patch
from una_fast.integrations.hf.requests import HeadRows, Tokens
from una_fast.integrations.hf.router import router_coefficient
from una_fast.integrations.hf.scored import in_turn, layout_of, run_scorer
from una_fast.integrations.versions import check_version
from una_fast.layout import IGNORED, Layout, ScoredPadding
from una_fast.logs import say_once
from una_fast.model.head_forward import CannotBeScored, Forward, ModelForward, runs_function
from una_fast.model.head_probe import plain_head

logger = logging.getLogger(__name__)

SEAM = "add_fused_lm_head"
if not hasattr(trl_utils, SEAM):
    raise ImportError(
        "this TRL has no add_fused_lm_head: una_fast.integrations.trl needs trl >= 1.15; for TRL "
        "1.9 to 1.14 there is una_fast.integrations.trl_before_seam"
    )
_TRL_HEAD = trl_utils.add_fused_lm_head


def add_una_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    pack: str | bool = "auto",
    workspace_mb: float | None = None,
) -> None:
    """Let `model(..., labels=, fused_lm_head=True)` return TRL's output from the fused head.

    In place of trl.trainer.utils.add_fused_lm_head, before PEFT and FSDP wrap the model. TRL's head
    serves a model whose logits the fused head cannot reproduce, and calls out of its reach
    (pre-shifted labels, a prefix of keys); both are logged once, and counted.

    model: causal language model
    temperature: divisor of the logits
    cast_lm_head_to_fp32: logits from float32 operands; the fused head accumulates them in float32
        either way
    outputs: per-token members of the output
    pack: as of patch_model
    workspace_mb: MiB of the fused head, see linear_una_loss
    """
    check_version("trl")
    settings = _settings(model, temperature, cast_lm_head_to_fp32, outputs, pack, workspace_mb)
    model._una_trl = settings
    if not runs_function(model, _forward):
        model.forward = ModelForward(model, _forward)


def _forward(
    model: PreTrainedModel,
    under: Forward,
    *args: Any,
    fused_lm_head: bool = False,
    labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Run a call of TRL's trainers through the fused head or TRL's, or the forward underneath."""
    if fused_lm_head and labels is None and kwargs.get("shift_labels") is None:
        raise ValueError("fused_lm_head=True scores targets: give labels= or shift_labels=")
    if fused_lm_head and _is_served(model, args, labels, kwargs):
        return in_turn(model, True, _fused_output, model, labels, kwargs)
    if labels is not None:
        kwargs["labels"] = labels
    if fused_lm_head:
        return _trl_forward(model)(*args, fused_lm_head=True, **kwargs)
    return in_turn(model, False, under, *args, **kwargs)


def _trl_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the forward that TRL's function puts on a model.

    Made for each call: TRL's forward can neither be pickled nor be copied.
    """
    settings: _Settings = model._una_trl
    before = model.__dict__["forward"]
    outputs = ("log_probs", *settings.stats)
    try:
        _TRL_HEAD(model, settings.temperature, settings.cast_to_float32, outputs)
        return model.forward
    finally:
        model.forward = before


def _settings(
    model: PreTrainedModel,
    temperature: float,
    cast_to_float32: bool,
    outputs: tuple[str, ...],
    pack: str | bool,
    workspace_mb: float | None,
) -> _Settings:
    """Return what a trainer asks of a model's head; arguments as of add_una_head."""
    stats = tuple(name for name in outputs if name != "log_probs")
    try:
        patch, refusal = make_patch(model, _forward, pack, workspace_mb, "auto"), None
    except CannotBeScored as error:
        if pack is True:
            raise
        patch, refusal = None, str(error)
    return _Settings(patch, refusal, temperature, cast_to_float32, stats)


@dataclass(frozen=True)
class _Settings:
    """Requests of a trainer to the head of its model.

    patch: how the model is scored; None where it is refused
    refusal: the reason
    temperature: divisor of the logits
    cast_to_float32: logits from float32 operands
    stats: names of row statistics
    """

    patch: Patch | None
    refusal: str | None
    temperature: float
    cast_to_float32: bool
    stats: tuple[str, ...]


def _is_served(
    model: PreTrainedModel, args: tuple, labels: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Return whether the fused head serves a call; a call left to TRL's head is counted."""
    reason = _why_not(model, args, labels, kwargs)
    if reason is not None:
        fall_back("TRL's head", reason)
    return reason is None


def _why_not(
    model: PreTrainedModel, args: tuple, labels: Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    """Return the reason why a call cannot be served; None if it can."""
    if model._una_trl.refusal is not None:
        return model._una_trl.refusal
    if args:
        return "it has positional arguments"
    if kwargs.get("shift_labels") is not None:
        return "it gives shift_labels, labels that are shifted already"
    if kwargs.get("past_key_values") is not None:
        return "it has past_key_values, as in prefix tuning"
    for name in ("input_ids", "attention_mask"):
        given = kwargs.get(name)
        # A mask of the attention itself has four dimensions.
        if given is not None and getattr(given, "shape", None) != labels.shape:
            return f"its {name} has another shape than its labels"
    try:
        plain_head(model)
    except CannotBeScored as refusal:
        return str(refusal)
    return None


def _fused_output(model: PreTrainedModel, labels: Tensor, kwargs: dict[str, Any]) -> Any:
    """Return TRL's output of a call, from our rows and our head."""
    settings: _Settings = model._una_trl
    items = kwargs.pop("num_items_in_batch", None)
    kwargs.pop("shift_labels", None)
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    inputs.pop("logits_to_keep", None)
    layout = _layout_of(model, inputs, labels, settings.patch)
    options = settings.patch.head_options(model, settings.temperature)
    request = _TokenFields(settings.stats, settings.cast_to_float32)
    found, aux_loss = run_scorer(model, settings.patch, layout, inputs, request, options)
    mask = labels[:, 1:] != IGNORED
    log_probs = found.pop("logps")
    total = mask.sum().clamp(min=1) if items is None else items
    loss = -log_probs.sum() / total
    if aux_loss is not None:
        loss = loss + (router_coefficient(model) or 0.0) * aux_loss
    return trl_utils.FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=aux_loss, **found
    )


def _layout_of(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    labels: Tensor,
    patch: Patch,
) -> Layout:
    """Return the layout of a call; labels of padding are scored, as TRL's head scores them."""
    try:
        return layout_of(model, inputs, labels, patch)
    except ScoredPadding:
        reason = "labels stand where attention_mask is 0"
        say_once(logging.WARNING, f"batches stay padded: {reason}", logger)
        return Layout.from_labels(labels)


@dataclass(frozen=True)
class _TokenFields:
    """Per-token members of TRL's output, [B, T - 1]."""

    stats: tuple[str, ...]
    cast_to_float32: bool

    def __call__(self, rows: HeadRows) -> dict[str, Tensor]:
        if not self.cast_to_float32:
            return Tokens(self.stats)(rows)
        # Operands of 16 bits are exact in float32, and are accumulated there: no copy of the
        # weight is needed. Autocast would round a float32 weight.
        with torch.autocast(rows.hidden.device.type, enabled=False):
            return Tokens(self.stats)(rows._replace(hidden=rows.hidden.to(rows.weight.dtype)))
