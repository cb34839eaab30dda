"""A causal language model whose forward gives log-probs, or the UNA loss, without logits."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from una_fast.integrations.hf.form import inner_model, make_patch
from una_fast.integrations.hf.scored import UnaModelOutput, in_turn, scored_forward
from una_fast.integrations.versions import check_version
from una_fast.model.adapter import adapter_off
from una_fast.model.dropout import remove_dropout
from una_fast.model.head_forward import (
    CannotBeScored,
    Forward,
    ModelForward,
    forwards_of,
    is_forward_of,
    runs_function,
    take_off,
)

__all__ = ["adapter_off", "patch_model", "remove_dropout", "unpatch_model"]


def patch_model(
    model: nn.Module,
    *,
    pack: str | bool = "auto",
    workspace_mb: float | None = None,
    engine: str = "auto",
) -> nn.Module:
    """Let a model's forward give log-probs or the loss; return the model.

        model(input_ids, attention_mask=, labels=, una="responses" | "tokens", temperature=, stats=)
        model(input_ids, attention_mask=, labels=, feedback=, ref_logps=, objective=, num_units=)

    labels: [B, T], -100 outside the responses, not shifted; each batch row is one response, which
    feedback names by its row. The result is a UnaModelOutput. Any other call (generate,
    save_pretrained, logits) is the model's own. Patch before DDP, FSDP or ZeRO wrap the model, and
    call the wrapped model. A second call takes its own options, in place of the first's;
    unpatch_model undoes both.

    Threads may share a model: a scored call waits until every call of another thread ends, and a
    call of another thread until the scored call ends.

    model: causal language model of transformers, or a PeftModel of one
    pack: "auto": a prompt is computed once for the rows that share it, and padding not at all,
        where a probe shows that the model allows it; True: an error where not; False: never
    workspace_mb: MiB of the fused head, see linear_una_loss
    engine: of the fused head, see linear_una_loss

    ValueError for a wrapped model, for a peft tuner that keeps an older forward of the model, and
    for a model whose logits the fused head cannot reproduce, naming the class.
    """
    check_version("hf")
    causal_lm = inner_model(model)
    _check_holders(model, causal_lm)
    causal_lm._una = make_patch(causal_lm, _forward, pack, workspace_mb, engine)
    if "_una_guard" not in causal_lm.__dict__:
        causal_lm._una_guard = causal_lm.register_forward_hook(
            _refuse_other, prepend=True, with_kwargs=True
        )
    if not runs_function(causal_lm, _forward):
        causal_lm.forward = ModelForward(causal_lm, _forward)
    return model


def _check_holders(model: nn.Module, causal_lm: PreTrainedModel) -> None:
    """Raise CannotBeScored for a module around a model with an older forward of the model.

    The older forward passes ours by: peft's AdaptionPrompt keeps such a forward.

    model: given
    causal_lm: the model inside
    """
    holder = _holder_of(model, causal_lm, ours=False)
    if holder is None and model is causal_lm and not runs_function(causal_lm, _forward):
        # The tuner that keeps a forward is out of sight from here.
        kinds = map(type, causal_lm.modules())
        holder = next((kind.__name__ for kind in kinds if _KEEPS in kind.__module__), None)
    if holder is not None:
        raise CannotBeScored(
            f"{holder} keeps the forward that {type(causal_lm).__name__} had before, and passes "
            "the forward of patch_model by; call patch_model(model) before get_peft_model"
        )


# Modules of peft by which one sees that a tuner keeps the forward of a model.
_KEEPS = "peft.tuners.adaption_prompt"


def _holder_of(model: nn.Module, causal_lm: PreTrainedModel, *, ours: bool) -> str | None:
    """Return the class name of a module around a model with a forward of the model, if any.

    ours: look for the forward of patch_model; else for forwards without it
    """
    for holder in itertools.takewhile(lambda module: module is not causal_lm, model.modules()):
        kept = holder.__dict__.get("forward")
        if kept is None:
            continue
        # Wrappers of the module's own forward call the model inside as they should.
        chain = list(forwards_of(holder))
        is_kept = any(getattr(forward, "__self__", None) is causal_lm for forward in chain)
        is_ours = any(is_forward_of(forward, _forward) for forward in chain)
        if is_kept and is_ours is ours:
            return type(holder).__name__
    return None


def is_patched(model: nn.Module) -> bool:
    """Return whether a call of the model reaches the fused head."""
    causal_lm = inner_model(model)
    return "_una" in causal_lm.__dict__ and runs_function(causal_lm, _forward)


def _forward(causal_lm: PreTrainedModel, under: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run a scored call, or the forward underneath."""
    if _is_scored(kwargs):
        return in_turn(causal_lm, True, scored_forward, causal_lm, *args, **kwargs)
    return in_turn(causal_lm, False, under, *args, **kwargs)


def _is_scored(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("una") is not None or kwargs.get("feedback") is not None


def _refuse_other(
    causal_lm: PreTrainedModel,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Raise ValueError for a scored call that another forward has answered: a forward hook.

    The forward of the class ignores `feedback`, and returns the cross-entropy of the labels.
    """
    if _is_scored(kwargs) and not isinstance(output, UnaModelOutput):
        raise ValueError(
            f"the forward of patch_model is gone from {type(causal_lm).__name__} (it was replaced, "
            "or lost when a model under mixed precision was pickled); call patch_model(model) again"
        )


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a patched model its own forward back; return the model.

    ValueError where another forward stands over ours: it would lose what it calls.
    """
    causal_lm = inner_model(model)
    if "_una" not in causal_lm.__dict__:
        return model
    if not is_forward_of(causal_lm.forward, _forward):
        raise ValueError(
            f"the forward of {type(causal_lm).__name__} was replaced after patch_model; undo the "
            "later change first"
        )
    holder = _holder_of(model, causal_lm, ours=True)
    if holder is not None:
        raise ValueError(
            f"{holder} keeps the forward of patch_model, and would lose what it calls; unload the "
            "adapter first"
        )
    take_off(causal_lm)
    causal_lm._una_guard.remove()
    del causal_lm._una, causal_lm._una_guard
    return model
