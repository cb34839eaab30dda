"""The forward of a patched model: labels -> layout -> hidden states -> rows -> head.ops.

Everything runs within the forward wrapped by DDP, FSDP and ZeRO, and the head within the call of
the head module: weights are gathered for both, and gradients reduced after both.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, TransformersKwargs

from una_fast.attention.instance import Ran, attention_refusal, check_ran
from una_fast.attention.packed import packed_attention, switched_attention
from una_fast.feedback import Feedback
from una_fast.head.compiling import outside_compile
from una_fast.head.row_stats import check_stats
from una_fast.integrations.calls import count_call
from una_fast.integrations.hf.form import Patch
from una_fast.integrations.hf.requests import HeadRows, Loss, Request, Responses, Tokens
from una_fast.integrations.hf.router import router_loss
from una_fast.layout import Layout
from una_fast.logs import say_once
from una_fast.losses import Objective
from una_fast.model.dropout import embedding_noise
from una_fast.model.head_forward import (
    Forward,
    backbone,
    backbone_output,
    call_head,
    select_rows,
)
from una_fast.model.head_probe import is_adapted, plain_head
from una_fast.turns import turn

logger = logging.getLogger(__name__)

FORMS = ("responses", "tokens")
# Arguments of a backbone that a packed row has, too.
_PACKABLE = {"input_ids", "attention_mask", "output_router_logits", "return_dict", "use_cache"}
# Names of cached keys, such as those of peft's prefix tuning.
_CACHES = {"past_key_values", "cache"}
# Arguments of peft's layers: adapters by name, activated from a token on (aLoRA), or mixed (Poly).
_ADAPTERS_PER_ROW = {"adapter_names", "alora_offsets", "task_ids"}
_ALIKE = 0.85  # likeness of a keyword to one of ours from which it is taken for an error
# Arguments of a model's forward for its logits, or for its own loss.
_OF_LOGITS = ("logits_to_keep", "num_logits_to_keep", "num_items_in_batch")


@dataclass
class UnaModelOutput(ModelOutput):
    """The output of a patched model's call with `una` or `feedback`; other members are None.

    loss: [] float64
    logps: [B] float64 sums over the scored tokens, or [B, T - 1] per token, 0 where none is
        scored; T counts the virtual tokens of prompt tuning, which stand in front
    ref_logps: [B] float64
    rewards: [B] float64, beta * (logps - ref_logps) without any offset
    unit_losses: [U] float64, unweighted
    entropy: [B, T - 1], if named in `stats`; carries a gradient
    log_sum_sq_probs, mean_logits: [B, T - 1], if named in `stats`; without a gradient
    is_top1: [B, T - 1] bool, if named in `stats`
    aux_loss: [] load balancing of a mixture of experts, if the model's config or the call asks for
        router logits; not part of `loss`

    Of a call with `feedback` the loss alone carries a gradient.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rewards: Tensor | None = None
    unit_losses: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None


class Uncast:
    """A tensor that wrappers do not see, so that mixed precision leaves its dtype alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def scored_forward(
    causal_lm: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    una: str | None = None,
    feedback: Feedback | dict[str, Tensor] | None = None,
    ref_logps: Tensor | Sequence[float] | Uncast | None = None,
    objective: Objective | None = None,
    num_units: int | Tensor | None = None,
    temperature: float = 1.0,
    stats: Sequence[str] = (),
    layout: Layout | None = None,
    **inputs: Any,
) -> UnaModelOutput:
    """Run a patched model's forward up to log-probs, or up to the loss.

    causal_lm: the model, with the attribute `_una`
    input_ids, attention_mask: [B, T]
    labels: [B, T] integers, -100 outside the responses
    una: "responses" or "tokens"; not beside feedback
    feedback: units over the B batch rows
    ref_logps: [B] sums under the reference, float32 or wider
    objective: forms of the losses; None: Objective()
    num_units: denominator of the loss; None: the units of this call
    temperature: divisor of the logits
    stats: names of row statistics, for una="tokens"
    layout: of the labels, if the caller made it before (else labels are read from their device);
        of a batch of the same shape it is trusted
    inputs: further arguments of the backbone
    """
    patch: Patch = causal_lm._una
    of_loss = {"ref_logps": ref_logps, "objective": objective, "num_units": num_units}
    _check_request(una, feedback, of_loss, stats)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    _check_outputs(inputs)
    _check_names(causal_lm, inputs)
    for name in _OF_LOGITS:
        inputs.pop(name, None)
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    if layout is None:
        layout = layout_of(causal_lm, inputs, labels, patch)
    else:
        _check_layout(causal_lm, layout, inputs, labels, patch)
    plain_head(causal_lm)  # an adapter may have come after the patch
    options = patch.head_options(causal_lm, temperature)
    if feedback is not None:
        request = Loss(Feedback.of(feedback), _reference(ref_logps), objective, num_units)
    elif una == "responses":
        request = Responses()
    else:
        request = Tokens(tuple(stats))
    result, aux_loss = run_scorer(causal_lm, patch, layout, inputs, request, options)
    return UnaModelOutput(**result, aux_loss=aux_loss)


def _check_request(una: Any, feedback: Any, of_loss: dict[str, Any], stats: Sequence[str]) -> None:
    """Raise ValueError for a request that means nothing.

    una, feedback, stats: of the call
    of_loss: arguments for the loss alone
    """
    if feedback is None and una not in FORMS:
        raise ValueError(f"una={una!r} is not one of {FORMS}")
    if feedback is not None and una is not None:
        raise ValueError(f"una={una!r} beside feedback: the loss has out.logps; leave una out")
    if feedback is not None and of_loss["ref_logps"] is None:
        raise ValueError(
            'feedback needs ref_logps=: reference(**batch, una="responses").logps, under '
            "torch.no_grad(), of a frozen copy, or of this model within adapter_off(model)"
        )
    unused = [name for name, value in of_loss.items() if value is not None]
    if feedback is None and unused:
        raise ValueError(f"{unused[0]} is of the loss: give feedback= too, or leave it out")
    if stats and una != "tokens":
        raise ValueError('stats are per token: ask for them with una="tokens"')
    check_stats(stats)


@outside_compile
def _check_names(causal_lm: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that was meant to be one of ours, such as `temprature`.

    Most forwards ignore keywords that they do not know, and batches bring some: token_type_ids.

    causal_lm: the model
    inputs: of the call, besides our keywords
    """
    known = _arguments_of(type(causal_lm)) | _arguments_of(type(backbone(causal_lm)))
    for name in sorted(set(inputs) - known - _PACKABLE):
        meant = difflib.get_close_matches(name, _keywords(), 1, _ALIKE)
        if meant:
            raise ValueError(
                f"{name} is no argument of {type(causal_lm).__name__}, nor of a call with una= or "
                f"feedback=; did you mean {meant[0]}? Rename it, or leave it out"
            )


@functools.cache
def _keywords() -> list[str]:
    """Return the keywords of a scored call but labels: `label` is a column of KTO's records."""
    parameters = inspect.signature(scored_forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    return [name for name in names if name != "labels"]


@functools.cache
def _arguments_of(model_class: type) -> frozenset[str]:
    """Return the keywords that the forward of a class reads."""
    parameters = inspect.signature(model_class.forward).parameters
    return frozenset({*_OF_LOGITS, *TransformersKwargs.__annotations__, *parameters})


def _check_outputs(inputs: dict[str, Any]) -> None:
    """Raise ValueError for outputs that a scored call does not have."""
    wrong = [name for name in ("output_hidden_states", "output_attentions") if inputs.get(name)]
    if inputs.get("return_dict") is False:
        wrong.append("return_dict=False")
    if wrong:
        raise ValueError(f"{wrong[0]} is not served beside una= and feedback=: leave it out")


def _check_layout(
    causal_lm: PreTrainedModel,
    layout: Layout,
    inputs: dict[str, Any],
    labels: Tensor | None,
    patch: Patch,
) -> None:
    """Raise ValueError for a layout that is not of this call, or that the model cannot have.

    causal_lm: the model
    layout: of the caller
    inputs: of the backbone
    labels: of the call; not beside a layout
    patch: says what the model can do
    """
    if labels is not None:
        raise ValueError("give labels= or layout=, not both: a layout has the targets")
    ids = inputs["input_ids"]
    if ids is None or tuple(ids.shape) != layout.shape:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"the layout is of a batch {layout.shape}, and input_ids are {shape}")
    if layout.segments is None:
        return
    packs = (
        patch.packs and _can_pack(causal_lm, inputs, patch) and (patch.moves or not layout.moved)
    )
    if not packs:
        raise ValueError(
            "the layout is packed, and this call cannot be: the model, its dropout or other "
            "inputs forbid it; make the layout without input_ids"
        )


def _reference(ref_logps: Tensor | Sequence[float] | Uncast) -> Tensor:
    """Return [B] float64 log-probs; ValueError for half precision, which loses whole nats."""
    if isinstance(ref_logps, Uncast):
        ref_logps = ref_logps.tensor
    # Lists of numbers have no dtype, and torch would make them float32.
    dtype = None if hasattr(ref_logps, "dtype") else torch.double
    ref_logps = torch.as_tensor(ref_logps, dtype=dtype)
    if ref_logps.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ref_logps are {ref_logps.dtype}, which rounds sums by whole nats; FSDP's mixed "
            "precision casts inputs: give ref_logps as a list, or set cast_forward_inputs=False"
        )
    return ref_logps.double()


@outside_compile
def layout_of(
    causal_lm: PreTrainedModel, inputs: dict[str, Any], labels: Tensor | None, patch: Patch
) -> Layout:
    """Return the layout of a call.

    causal_lm: the model
    inputs: of the backbone
    labels: [B, T]
    patch: says what the model can do
    """
    if labels is None:
        raise ValueError("una= and feedback= need labels=, -100 outside the responses")
    mask = inputs.get("attention_mask")
    if mask is not None and not _CACHES.isdisjoint(inputs):
        mask = mask[:, mask.shape[1] - labels.shape[1] :]  # its first columns are of cached keys
    if patch.packs and _can_pack(causal_lm, inputs, patch):
        layout = Layout.from_labels(labels, mask, inputs["input_ids"])
        if patch.moves or not layout.moved:
            return layout
    return Layout.from_labels(labels, mask)


@outside_compile
def _can_pack(causal_lm: PreTrainedModel, inputs: dict[str, Any], patch: Patch) -> bool:
    """Return whether a call can be packed, and say once why not.

    A packed row would lose positions, images, embeddings and adapters per batch row.

    causal_lm: the model
    inputs: of the backbone
    patch: of the model
    """
    reason = None
    beside = sorted(set(inputs) - _PACKABLE)
    if inputs.get("input_ids") is None:
        reason = "a call has no input_ids"
    elif beside:
        reason = f"{beside[0]} stands beside the tokens"
    elif of_rows := _adapters_per_row(causal_lm):
        reason = f"every row has an adapter of its own ({of_rows})"
    elif causal_lm.training and patch.attention_dropout():
        reason = "the model has attention dropout (remove_dropout sets it to 0)"
    elif embedding_noise(causal_lm):
        reason = "the size of NEFTune's noise depends on the width of a row (neftune_noise_alpha)"
    else:
        # An attention implementation may have been set after the patch.
        decoder = causal_lm.get_decoder()
        for config in (causal_lm.config, getattr(decoder, "config", causal_lm.config)):
            reason = reason or attention_refusal(config)
    if reason is not None:
        say_once(logging.WARNING, f"batches stay padded: {reason}", logger)
    return reason is None


def _adapters_per_row(causal_lm: PreTrainedModel) -> str | None:
    """Return the argument with an adapter per row in the running call of a PeftModel, if any.

    peft hands the argument to its layers, by hooks for the time of the call.
    """
    if not hasattr(causal_lm, "peft_config"):
        return None
    adapted = next(filter(is_adapted, causal_lm.modules()), None)
    hooks = () if adapted is None else adapted._forward_pre_hooks.values()
    given = {name for hook in hooks for name in getattr(hook, "keywords", ())}
    return min(given & _ADAPTERS_PER_ROW, default=None)


def in_turn(
    causal_lm: PreTrainedModel, alone: bool, function: Forward, /, *args: Any, **kwargs: Any
) -> Any:
    """Run a function of a patched model in the turn of the running thread.

    A scored call changes the config for a time, and models may share a config.

    causal_lm: the model
    alone: wait for all calls of other threads, for a scored call; else for scored calls
    function: gets args and kwargs
    """
    if torch.compiler.is_compiling():  # turns are no part of a graph
        return function(*args, **kwargs)
    config = getattr(causal_lm.get_decoder(), "config", causal_lm.config)
    with turn(config, alone=alone):
        return function(*args, **kwargs)


def run_scorer(
    causal_lm: PreTrainedModel,
    patch: Patch,
    layout: Layout,
    inputs: dict[str, Any],
    request: Request,
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Return a request's result over the rows of a layout, and the loss of the routers, if any.

    causal_lm: the model whose forward is running
    patch: of the model
    layout: of the labels
    inputs: of the backbone, padded
    request: from the operands of the head to results
    options: of head.ops
    """
    device = causal_lm.get_input_embeddings().weight.device
    if inputs.get("input_ids") is not None:
        device = inputs["input_ids"].device
    layout = layout.to(device)
    if layout.segments is None:
        count_call("padded")
        output = backbone_output(causal_lm, **inputs)
    else:
        count_call("packed")
        inputs = _packed_inputs(layout, inputs)
        ran = Ran()
        # The hook of packed_attention ends a graph. Within one, torch 2.11 does not see the switch.
        switch = packed_attention if torch.compiler.is_compiling() else switched_attention
        with switch(causal_lm):
            beside = {"una_segments": layout.segments, "una_ran": ran}
            output = backbone_output(causal_lm, **inputs, **beside)
        if not torch.compiler.is_compiling():  # a graph keeps what was traced
            check_ran(causal_lm, ran)

    def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return request(HeadRows(layout.to(hidden.device), hidden, weight, bias, options))

    aux_loss = router_loss(causal_lm, output, inputs)
    chosen = select_rows(output[0], layout.rows)
    del output  # the states of the prompts are not needed by the head
    patch.head_check.look(causal_lm, chosen)
    return call_head(causal_lm.get_output_embeddings(), chosen, scorer), aux_loss


def _packed_inputs(layout: Layout, inputs: dict[str, Any]) -> dict[str, Any]:
    tokens = inputs["input_ids"].flatten()[layout.tokens]
    moved = {"input_ids": tokens[None], "position_ids": layout.positions[None]}
    return {**inputs, **moved, "attention_mask": None}
