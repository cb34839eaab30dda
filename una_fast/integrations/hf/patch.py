"""A causal language model whose forward gives log-probs, or the UNA loss, without logits.

    labels -> Layout -> hidden states (packed or padded) -> rows -> head.ops, inside the forward

Everything runs within the forward that DDP, FSDP and ZeRO wrap, and the head within the call of its
own module: weights are gathered there, and gradients reduced. Calls without `una` and `feedback`
run the model's own forward, with nothing changed.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from una_fast.attention.packed import packed_attention
from una_fast.attention.probe import packing_refusal
from una_fast.feedback import Feedback
from una_fast.head import ops
from una_fast.integrations.calls import count_call
from una_fast.integrations.hf.router import router_loss
from una_fast.integrations.versions import check_version
from una_fast.layout import Layout
from una_fast.logs import say_once
from una_fast.losses import Objective, una_loss
from una_fast.model.head_forward import backbone_output, score_rows
from una_fast.model.head_probe import NoSmallCopy, plain_head, probe_head, probe_reduced
from una_fast.model.positions import has_learned_positions, positions_of

logger = logging.getLogger(__name__)

FORMS = ("responses", "tokens")
PACK = ("auto", True, False)
# Arguments of a model's forward that are about its logits, or about its own loss.
_OF_LOGITS = ("logits_to_keep", "num_logits_to_keep", "num_items_in_batch")


@dataclass
class UnaModelOutput(ModelOutput):
    """The output of a patched model's call with `una` or `feedback`; unasked members are None.

    loss: [] float64
    logps: [B] float64 sums over the scored tokens, or [B, T - 1] per token, 0 where none is scored
    ref_logps: [B] float64
    rewards: [B] float64, beta * (logps - ref_logps) without any offset
    unit_losses: [U] float64, unweighted
    entropy: [B, T - 1], with gradient, as the next three by name in `stats`
    log_sum_sq_probs: [B, T - 1]
    mean_logits: [B, T - 1]
    is_top1: [B, T - 1] bool
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


@dataclass(frozen=True)
class Patch:
    """How a patched model is scored; an attribute of the model, `_una`.

    softcap, logit_scale: of the head, see linear_una_loss
    packs: batches are packed where they can be
    moves: rows padded on the left may begin at position 0: positions are rotary, and only
        differences of positions count
    workspace_mb, engine: of the fused head
    """

    softcap: float | None
    logit_scale: float
    packs: bool
    moves: bool
    workspace_mb: float | None
    engine: str

    def head_options(self, temperature: float) -> dict[str, Any]:
        """Return the keyword arguments of the functions of head.ops."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": temperature,
            "workspace_mb": self.workspace_mb,
            "engine": self.engine,
        }


class Uncast:
    """A tensor that wrappers do not see, so that mixed precision leaves its dtype alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


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
    call the wrapped model. Idempotent; unpatch_model undoes it.

    model: causal language model of transformers, or a PeftModel of one
    pack: "auto": a prompt is computed once for the rows that share it, and padding not at all,
        where a probe shows that the model allows it; True: an error where not; False: never
    workspace_mb: MiB of the fused head, see linear_una_loss
    engine: of the fused head, see linear_una_loss

    ValueError for a model that cannot be scored truly, by its class, and for a wrapped one.
    """
    check_version("transformers", "5.6", "5.24", "5.6.2, 5.16.1, 5.23.0 and 5.24.0")
    causal_lm = inner_model(model)
    options = make_patch(causal_lm, pack, workspace_mb, engine)
    if "_una" in causal_lm.__dict__:
        causal_lm._una = options
        return model
    causal_lm._una = options
    causal_lm._una_own_forward = causal_lm.forward
    causal_lm._una_instance_forward = causal_lm.__dict__.get("forward")

    @functools.wraps(type(causal_lm).forward)  # transformers reads the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("una") is None and kwargs.get("feedback") is None:
            return self._una_own_forward(*args, **kwargs)
        return scored_forward(self, *args, **kwargs)

    # A bound method, not a closure over the model: a deep copy must run its own weights.
    causal_lm.forward = types.MethodType(forward, causal_lm)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a patched model its own forward back; return the model."""
    causal_lm = inner_model(model)
    if "_una" not in causal_lm.__dict__:
        return model
    own = causal_lm._una_instance_forward
    for name in ("forward", "_una", "_una_own_forward", "_una_instance_forward"):
        delattr(causal_lm, name)
    if own is not None:
        causal_lm.forward = own
    return model


def inner_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PeftModel, or the model itself.

    ValueError for other wrappers, and for a model that is no causal language model.
    """
    # Without an import of peft, which need not be installed.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if isinstance(base, nn.DataParallel):
        raise ValueError("nn.DataParallel splits lists and labels; use DistributedDataParallel")
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{name} is no model of transformers; patch the model before DDP, FSDP, DeepSpeed or "
            "torch.compile wrap it"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; only causal models can be scored")
    return base


def make_patch(
    causal_lm: PreTrainedModel, pack: str | bool, workspace_mb: float | None, engine: str
) -> Patch:
    """Return how a model is scored: the constants of its head, and whether it can be packed.

    causal_lm: not wrapped yet
    pack, workspace_mb, engine: as of patch_model

    ValueError as of patch_model.
    """
    if pack not in PACK:
        raise ValueError(f'pack={pack!r} is not one of "auto", True and False')
    if any(isinstance(parameter, DTensor) for parameter in causal_lm.parameters()):
        raise ValueError(
            f"{type(causal_lm).__name__} is sharded already; patch it before fully_shard"
        )
    head = head_form(causal_lm)
    packs = pack is not False
    refusal = packing_refusal(causal_lm) if packs else None
    if refusal is not None:
        if pack is True:
            raise ValueError(f"pack=True, but {refusal}")
        say_once(logging.INFO, f"batches stay padded: {refusal}", logger)
        packs = False
    return Patch(*head, packs, _has_rotary_positions(causal_lm), workspace_mb, engine)


def _has_rotary_positions(causal_lm: PreTrainedModel) -> bool:
    positions = positions_of(causal_lm)
    return positions is None or not has_learned_positions(causal_lm, positions)


def head_form(causal_lm: PreTrainedModel) -> tuple[float | None, float]:
    """Return (softcap, logit_scale) of a model whose weights may be anywhere.

    ValueError by the class where neither a small copy of the model nor the model itself shows them.
    """
    try:
        spec = probe_reduced(causal_lm)
    except NoSmallCopy:
        missing = (p.is_meta or p.numel() == 0 for p in causal_lm.parameters())
        if any(missing):
            raise
        spec = probe_head(causal_lm)
    return spec.softcap, spec.logit_scale


# --- the forward ----------------------------------------------------------------------------------


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
    layout: of the labels, if the caller made it before (else labels are read from their device)
    inputs: further arguments of the backbone
    """
    patch: Patch = causal_lm._una
    _check_request(una, feedback, ref_logps, stats)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    for name in _OF_LOGITS:
        inputs.pop(name, None)
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    if layout is None:
        layout = layout_of(causal_lm, inputs, labels, patch)
    plain_head(causal_lm)  # an adapter may have come after the patch
    options = patch.head_options(temperature)
    if feedback is not None:
        request = _Loss(Feedback.of(feedback), _reference(ref_logps), objective, num_units)
    elif una == "responses":
        request = _Responses()
    else:
        request = _Tokens(tuple(stats))
    result, aux_loss = run_scorer(causal_lm, layout, inputs, request, options)
    return UnaModelOutput(**result, aux_loss=aux_loss)


def _check_request(una: Any, feedback: Any, ref_logps: Any, stats: Sequence[str]) -> None:
    if feedback is None and una not in FORMS:
        raise ValueError(f"una={una!r} is not one of {FORMS}")
    if feedback is not None and una is not None:
        raise ValueError(f"una={una!r} beside feedback: the loss has out.logps; leave una out")
    if feedback is not None and ref_logps is None:
        raise ValueError(
            'feedback needs ref_logps=: reference(**batch, una="responses").logps, under '
            "torch.no_grad(), of a frozen copy, or of this model within model.disable_adapter()"
        )
    if stats and una != "tokens":
        raise ValueError('stats are per token: ask for them with una="tokens"')


def _reference(ref_logps: Tensor | Sequence[float] | Uncast) -> Tensor:
    """Return [B] float64 log-probs; ValueError for half precision, which loses whole nats."""
    if isinstance(ref_logps, Uncast):
        ref_logps = ref_logps.tensor
    ref_logps = torch.as_tensor(
        ref_logps, dtype=None if torch.is_tensor(ref_logps) else torch.double
    )
    if ref_logps.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ref_logps are {ref_logps.dtype}, which rounds sums by whole nats; FSDP's mixed "
            "precision casts inputs: give ref_logps as a list, or set cast_forward_inputs=False"
        )
    return ref_logps.double()


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
    if patch.packs and _can_pack(causal_lm, inputs):
        layout = Layout.from_labels(labels, mask, inputs["input_ids"])
        if patch.moves or not layout.moved:
            return layout
    return Layout.from_labels(labels, mask)


def _can_pack(causal_lm: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether a call has nothing that a packed row would lose.

    Positions, images and embeddings of the caller's own stand beside the tokens of a padded batch.
    """
    beside = set(inputs) - {"input_ids", "attention_mask"}
    if any(torch.is_tensor(inputs[name]) for name in beside) or "past_key_values" in beside:
        return False
    if inputs.get("input_ids") is None:
        return False
    if causal_lm.training and _attention_dropout(causal_lm):
        say_once(logging.WARNING, "batches stay padded: the model has attention dropout", logger)
        return False
    return True


def _attention_dropout(causal_lm: PreTrainedModel) -> float:
    config = causal_lm.config.get_text_config()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return max(getattr(config, name, None) or 0.0 for name in names)


def run_scorer(
    causal_lm: PreTrainedModel,
    layout: Layout,
    inputs: dict[str, Any],
    request: Any,
    options: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """Return a request's result over the rows of a layout, and the loss of the routers, if any.

    causal_lm: the model whose forward is running
    layout: of the labels
    inputs: of the backbone, padded
    request: called with (layout, hidden [N, D], weight, bias, options)
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
        with packed_attention(causal_lm):
            output = backbone_output(causal_lm, **inputs, una_segments=layout.segments)

    def scorer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return request(layout.to(hidden.device), hidden, weight, bias, options)

    result = score_rows(causal_lm, output[0], layout.rows, scorer)
    return result, router_loss(causal_lm, output, inputs)


def _packed_inputs(layout: Layout, inputs: dict[str, Any]) -> dict[str, Any]:
    tokens = inputs["input_ids"].flatten()[layout.tokens]
    moved = {"input_ids": tokens[None], "position_ids": layout.positions[None]}
    return {**inputs, **moved, "attention_mask": None}


# --- requests: from the rows of the head to members of the output ---------------------------------


@dataclass(frozen=True)
class _Loss:
    """The loss of the feedback."""

    feedback: Feedback
    ref_logps: Tensor
    objective: Objective | None
    num_units: int | Tensor | None

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        common = {"objective": self.objective, "num_units": self.num_units}
        if len(layout.responses) == layout.shape[0]:
            out = ops.linear_una_loss(
                hidden,
                weight,
                layout.targets,
                layout.cu_seqlens,
                self.feedback,
                ref_logps=self.ref_logps,
                bias=bias,
                **common,
                **options,
            )
            return out._asdict()
        # A response that was cut to nothing has a log-ratio of 0, and no row: the one pass does
        # not take it, and the loss of the sums does.
        logps = _Responses()(layout, hidden, weight, bias, options)["logps"]
        lengths = layout.lengths().clamp(min=1)
        ref_logps = self.ref_logps.to(logps.device)
        out = una_loss(logps, ref_logps, self.feedback, lengths=lengths, **common)
        return out._asdict()


@dataclass(frozen=True)
class _Responses:
    """Sums over the scored tokens of every batch row."""

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        sums = ops.sequence_logps(
            hidden, weight, layout.targets, layout.cu_seqlens, bias=bias, **options
        )
        return {"logps": layout.spread(sums)}


@dataclass(frozen=True)
class _Tokens:
    """Log-probs and row statistics of every token."""

    stats: tuple[str, ...]

    def __call__(
        self,
        layout: Layout,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        found = token_results(layout, hidden, weight, bias, self.stats, options)
        return {name: layout.scatter(values) for name, values in found.items()}


def token_results(
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Sequence[str],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Return "logps" and the statistics of the scored tokens, name -> [N].

    layout: of the labels
    hidden: [N, D]
    weight: [V, D]
    bias: [V], or None
    stats: names of row statistics
    options: of head.ops
    """
    found = ops.token_logps(hidden, weight, layout.targets, bias, stats=tuple(stats), **options)
    if not stats:
        return {"logps": found}
    logps, beside = found
    return {"logps": logps, **beside}
