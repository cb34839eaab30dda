"""Find by measurement how a model turns hidden states into logits.

    z = softcap * tanh(logit_scale * (W h + bias) / softcap)        without a softcap: the argument

A model is not trusted to be of such a form. The probe compares candidates with the model's own
logits, and refuses a model without a fitting candidate. `probe_head` runs the model itself,
`probe_reduced` a small copy with the same config: for weights that are sharded, or not there yet.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from una_fast.attention.probe import reduced_copy
from una_fast.model.dropout import is_number, without_dropout
from una_fast.model.head_forward import CannotBeScored, backbone, hidden_states
from una_fast.model.quantized import is_plain

_SOFTCAP_NAME = re.compile(r"soft_?cap")
_SCALE_NAME = re.compile(r"scal|multiplier|mup")
_BASE_WIDTH = "dim_model_base"
_PROBE_TOKENS = 16


def text_modules(causal_lm: PreTrainedModel) -> set[nn.Module]:
    """Return the modules that text runs through, and the modules that hold them.

    A model with towers of other modalities has a text model inside, its decoder; other models are
    text models as a whole.
    """
    config = causal_lm.config
    if config.get_text_config() is config:
        return set(causal_lm.modules())
    decoder = causal_lm.get_decoder()
    inside = set(decoder.modules())
    for head in (causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()):
        inside |= set() if head is None else set(head.modules())
    holders = [module for module in causal_lm.modules() if decoder in set(module.modules())]
    return inside | set(holders)


def outside_text(causal_lm: PreTrainedModel) -> list[str]:
    """Return the names of the outermost modules that text does not run through: towers."""
    inside = text_modules(causal_lm)
    outside: list[str] = []
    for name, module in causal_lm.named_modules():
        within = tuple(f"{other}." for other in outside)
        if module not in inside and not name.startswith(within):
            outside.append(name)
    return outside


def freeze_outside_text(causal_lm: PreTrainedModel) -> None:
    """Freeze the weights that text does not run through: they would never have a gradient."""
    for module in set(causal_lm.modules()) - text_modules(causal_lm):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


class NoSmallCopy(CannotBeScored):
    """A model has no small copy of the same class."""


@dataclass(frozen=True)
class HeadSpec:
    """The form of a head: z = softcap * tanh(logit_scale * (W h + bias) / softcap)."""

    causal_lm: PreTrainedModel = field(repr=False)
    """The model with the output embedding."""
    softcap: float | None = None
    """Final softcap; None: no cap."""
    logit_scale: float = 1.0
    """Factor on W h + bias."""

    # Read at every use: FSDP replaces the tensors.
    @property
    def weight(self) -> Tensor:
        """Return W [V, D], V the size of the logits."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def bias(self) -> Tensor | None:
        """Return the bias [V], if any."""
        return getattr(self.causal_lm.get_output_embeddings(), "bias", None)


@torch.no_grad()
def probe_head(causal_lm: PreTrainedModel) -> HeadSpec:
    """Find softcap and logit_scale by comparison with the model's own logits.

    Candidates are made from the numbers of the config. The model runs on 16 random tokens; the
    hidden states are stretched, in front of the head, to logits from 0.3 to 300, so that a softcap
    shows even in an untrained model, and a head bias is replaced by random numbers for the probe.
    Weights, dropout, train/eval flags and random state are restored.

    CannotBeScored, by the name of the class, when no candidate reproduces the logits.
    """
    head = plain_head(causal_lm)
    form = _fitting_form(causal_lm, head)
    return HeadSpec(causal_lm, *_candidates(causal_lm.config)[form])


@torch.no_grad()
def probe_reduced(causal_lm: PreTrainedModel) -> HeadSpec:
    """Find softcap and logit_scale on a small copy of a model with the same class and config.

    The weights of the model are not read. Fields of the config, not their values, are compared: a
    factor that depends on the width is computed for the model's own width.

    causal_lm: the model, on any device, before it is wrapped

    CannotBeScored as of `probe_head`; NoSmallCopy where none can be built.
    """
    plain_head(causal_lm)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            copy = reduced_copy(causal_lm)
        # An unknown model may fail in any way.
        except Exception as error:
            raise NoSmallCopy(
                f"{type(causal_lm).__name__} has no small copy to probe its head on "
                f"({type(error).__name__}: {error})"
            ) from error
        form = _fitting_form(copy, copy.get_output_embeddings())
    return HeadSpec(causal_lm, *_candidates(causal_lm.config)[form])


def _fitting_form(causal_lm: PreTrainedModel, head: nn.Module) -> str:
    """Return the name of the candidate that reproduces the logits, or raise CannotBeScored."""
    tolerance = max(1e-5, torch.finfo(head.weight.dtype).eps)
    devices = [head.weight.device] if head.weight.is_cuda else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for prepared in (
            in_mode(causal_lm, training=False),
            without_dropout(causal_lm),
            _random_bias(head),
        ):
            stack.enter_context(prepared)
        hidden, logits, drift = _observe(causal_lm, head)
        _check_observed(causal_lm, head, logits, drift, tolerance)
        raw = F.linear(hidden, head.weight, getattr(head, "bias", None)).float()
    errors = {}
    candidates = _candidates(causal_lm.config)
    for name, form in candidates.items():
        errors[name] = row_error(_shape_logits(raw, *form), logits.float())
    best = min(errors, key=errors.get)
    if errors[best] > tolerance:
        softcap, logit_scale = candidates[best]
        raise CannotBeScored(
            f"{type(causal_lm).__name__} computes its logits in an unknown way: the closest of "
            f"{len(errors)} forms, softcap={softcap} and logit_scale={logit_scale:g}, is off by "
            f"{errors[best]:.1e} (relative, allowed {tolerance:.0e}); this model class cannot be "
            "scored"
        )
    return best


def _check_observed(
    causal_lm: PreTrainedModel,
    head: nn.Module,
    logits: Tensor,
    drift: float,
    tolerance: float,
) -> None:
    """Check the number of logits, and the hidden states of the model's own forward."""
    name = type(causal_lm).__name__
    if logits.shape[-1] != head.weight.shape[0]:
        raise CannotBeScored(
            f"{name} gives {logits.shape[-1]} logits from a head of {head.weight.shape[0]} rows "
            "(a trimmed or padded vocabulary); this model class cannot be scored"
        )
    if not drift <= tolerance:
        raise CannotBeScored(
            f"{name} does not give its backbone the plain inputs: hidden states differ by "
            f"{drift:.1e} (relative, allowed {tolerance:.0e}); this model class cannot be scored"
        )


def is_adapted(module: nn.Module | None) -> bool:
    """Return whether peft has put an adapter, or a trained copy, around a module."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def plain_head(causal_lm: PreTrainedModel) -> nn.Module:
    """Return the output embedding.

    CannotBeScored for a model without one, and for an adapter on it or on a tied input embedding.
    """
    name = type(causal_lm).__name__
    head = causal_lm.get_output_embeddings()
    if getattr(head, "weight", None) is None and not is_adapted(head):
        raise CannotBeScored(
            f"{name} has no output embedding (get_output_embeddings() is {head}); it cannot be "
            "scored"
        )
    if not is_adapted(head) and not is_plain(head.weight):
        raise CannotBeScored(
            f"{name} has a quantized output embedding, and the fused head needs plain numbers; "
            "leave it out of the quantization"
        )
    embedding = causal_lm.get_input_embeddings()
    adapted = None
    if is_adapted(head):
        adapted = type(head).__name__
    if is_adapted(embedding) and causal_lm.config.get_text_config().tie_word_embeddings:
        adapted = f"{type(embedding).__name__}, tied"
    if adapted is not None:
        raise CannotBeScored(
            f"{name} has an adapted head ({adapted}); leave the output embedding, and an input "
            "embedding tied to it, out of target_modules and modules_to_save"
        )
    return head


def _observe(causal_lm: PreTrainedModel, head: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Run the model on random tokens, with hidden states stretched in front of the head.

    Returns the stretched hidden states [16, D], the model's own logits of the stretched states
    [16, V'], and the relative distance between hidden states in the model's own forward and hidden
    states in scoring.
    """
    inputs = _probe_inputs(causal_lm, head.weight.device)
    causal_lm.train()  # as in training, where models may run other code
    scored = hidden_states(causal_lm, **inputs)
    causal_lm.eval()
    stretch = _Stretch(head.weight)
    # OPT calls the decoder inside its backbone: both are watched, the first to return is stretched.
    watched = {backbone(causal_lm), causal_lm.get_decoder()}
    handles = [module.register_forward_hook(stretch) for module in watched]
    try:
        logits = causal_lm(**inputs, use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    if stretch.seen is None:
        raise CannotBeScored(
            f"{type(causal_lm).__name__} does not call its {causal_lm.base_model_prefix}; it "
            "cannot be scored"
        )
    drift = row_error(scored[0].float(), stretch.seen[0].float())
    return stretch.stretched.flatten(0, 1), logits.flatten(0, 1), drift


def _probe_inputs(causal_lm: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """Return ids, mask and positions [1, 16] of a sequence of random tokens."""
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator).to(device)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(_PROBE_TOKENS, device=device)[None],
    }


class _Stretch:
    """A forward hook: the first output is stretched to logits from 0.3 to 300, row by row."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen: Tensor | None = None
        self.stretched: Tensor | None = None

    def __call__(
        self,
        module: nn.Module,
        args: tuple,
        output: Any,
    ) -> Any:
        """Return the first output with stretched hidden states, later outputs unchanged."""
        if self.seen is not None:
            return output
        self.seen = output[0]  # [1, 16, D]
        size = F.linear(self.seen, self.weight).float().pow(2).mean(-1, keepdim=True).sqrt()
        target = torch.logspace(-0.5, 2.5, _PROBE_TOKENS, device=size.device)[:, None]
        self.stretched = self.seen * (target / size).to(self.seen.dtype)
        if isinstance(output, tuple):
            return (self.stretched, *output[1:])
        output.last_hidden_state = self.stretched
        return output


def _candidates(config: Any) -> dict[str, tuple[float | None, float]]:
    """Return name -> (softcap, logit_scale) from every number of a config with such a name.

    The plain form comes first. Families disagree on the meaning of a name (Granite divides by
    logits_scaling, HyperCLOVA X multiplies), so both are tried. MiniCPM divides the hidden state by
    hidden_size / dim_model_base.
    """
    softcaps: dict[str, float | None] = {"plain": None}
    scales = {"": 1.0}
    fields = head_fields(config)
    for name, value in fields.items():
        if not _is_factor(value):
            continue
        if _SOFTCAP_NAME.search(name):
            softcaps[name] = float(value)
        if _SCALE_NAME.search(name):
            scales[f" * {name}"] = float(value)
    if _is_factor(fields.get(_BASE_WIDTH)):
        scales[" * width"] = float(fields[_BASE_WIDTH]) / config.get_text_config().hidden_size
    scales |= {f" /{name[2:]}": 1 / scale for name, scale in scales.items() if name}
    forms = {}
    for scale_name, scale in scales.items():
        for cap_name, cap in softcaps.items():
            forms[f"{cap_name}{scale_name}"] = (cap, scale)
    return forms


def head_fields(config: Any) -> dict[str, Any]:
    """Return the numbers of a config, by name, that the form of a head may depend on; or None."""
    config = config.get_text_config()
    found = {}
    for name in config.to_dict():
        value = getattr(config, name, None)
        named = _SOFTCAP_NAME.search(name) or _SCALE_NAME.search(name) or name == _BASE_WIDTH
        if named and (value is None or is_number(value)):
            found[name] = value
    return found


def _is_factor(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf


def _shape_logits(raw: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = raw * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def row_error(ours: Tensor, truth: Tensor) -> float:
    """Return the largest relative error of a row (2-norm); infinity for NaN."""
    error = (ours - truth).norm(dim=-1) / truth.norm(dim=-1)
    return float(error.nan_to_num(math.inf).max())


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in training or eval mode in the block, and restore the flags of all modules."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _random_bias(head: nn.Module) -> Iterator[None]:
    """Replace the bias of a head inside the block: a fresh head has a zero bias.

    A bias ignored by the model, or scaled by itself, shows then.
    """
    bias = getattr(head, "bias", None)
    if bias is None:
        yield
        return
    saved = bias.detach().clone()
    bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)))
    try:
        yield
    finally:
        bias.copy_(saved)
