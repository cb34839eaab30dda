"""How a model turns hidden states into logits, found by measurement.

    z = softcap * tanh(logit_scale * (W h + bias) / softcap)

A model is not trusted to be of this form. The probe compares candidates with the model's own logits, and refuses what
does not fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

_SOFTCAP_NAME = re.compile(r"soft_?cap")
_SCALE_NAME = re.compile(r"scal|multiplier|mup")
_PROBE_TOKENS = 16


def backbone(causal_lm: PreTrainedModel) -> nn.Module:
    found = getattr(causal_lm, causal_lm.base_model_prefix or "_none", None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(causal_lm).__name__} has no backbone (base_model_prefix is {causal_lm.base_model_prefix!r}); it "
            "cannot be scored"
        )
    return found


def hidden_states(causal_lm: PreTrainedModel, **inputs: Any) -> Tensor:
    """[B, T, D]"""
    return backbone(causal_lm)(**inputs, use_cache=False, return_dict=True)[0]


@dataclass(frozen=True)
class HeadSpec:
    """How a model turns hidden states into logits: z = softcap * tanh(logit_scale * (W h + bias) / softcap)."""

    causal_lm: PreTrainedModel = field(repr=False)
    """The model whose output embedding is read."""
    softcap: float | None = None
    """Final softcap; None where there is none."""
    logit_scale: float = 1.0
    """Factor on W h + bias."""

    # Read at every use: FSDP replaces the tensors.
    @property
    def weight(self) -> Tensor:
        """[V, D], V the size of the logits."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        return getattr(self.causal_lm.get_output_embeddings(), "bias", None)


@torch.no_grad()
def probe_head(causal_lm: PreTrainedModel) -> HeadSpec:
    """Find softcap and logit_scale among the numbers of the config by comparison with the model's own logits.

    The model runs on 16 random tokens; the hidden states that enter its head are stretched to logits from 0.3 to 300,
    so that a softcap shows even in an untrained model, and a head bias is replaced by a random one for the probe.
    Leaves weights, train/eval flags and random state as they were. Raises ValueError, naming the class, when no
    candidate reproduces the logits.
    """
    name, head = type(causal_lm).__name__, _plain_head(causal_lm)
    tolerance = max(1e-5, torch.finfo(head.weight.dtype).eps)
    devices = [head.weight.device] if head.weight.is_cuda else []
    with torch.random.fork_rng(devices=devices), _evaluating(causal_lm), _random_bias(head):
        hidden, logits, drift = _observe(causal_lm, head)
        if logits.shape[-1] != head.weight.shape[0]:
            raise ValueError(
                f"{name} gives {logits.shape[-1]} logits from a head of {head.weight.shape[0]} rows (a trimmed "
                "or padded vocabulary); this model class cannot be scored"
            )
        if not drift <= tolerance:
            raise ValueError(
                f"{name} does not give its backbone the plain inputs: hidden states differ by {drift:.1e} (relative, "
                f"allowed {tolerance:.0e}); this model class cannot be scored"
            )
        raw = F.linear(hidden, head.weight, getattr(head, "bias", None)).float()
        errors = {
            form: _row_error(_shape_logits(raw, *form), logits.float())
            for form in _candidates(causal_lm.config)
        }
    (softcap, logit_scale), error = min(errors.items(), key=lambda item: item[1])
    if error > tolerance:
        raise ValueError(
            f"{name} computes its logits in an unknown way: the closest of {len(errors)} forms, softcap={softcap} and "
            f"logit_scale={logit_scale:g}, is off by {error:.1e} (relative, allowed {tolerance:.0e}); this model class "
            "cannot be scored"
        )
    return HeadSpec(causal_lm, softcap, logit_scale)


def _plain_head(causal_lm: PreTrainedModel) -> nn.Module:
    """The output embedding; refused when it is missing, adapted, or changed through a tied, adapted embedding."""
    name, head = type(causal_lm).__name__, causal_lm.get_output_embeddings()
    if getattr(head, "weight", None) is None and not isinstance(
        head, (BaseTunerLayer, AuxiliaryTrainingWrapper)
    ):
        raise ValueError(
            f"{name} has no output embedding (get_output_embeddings() is {head}); it cannot be scored"
        )
    embedding, tied = causal_lm.get_input_embeddings(), False
    if isinstance(embedding, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        tied = bool(causal_lm.config.get_text_config().tie_word_embeddings)
    if tied or isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"{name} has an adapted head ({type(embedding if tied else head).__name__}{', tied' if tied else ''}); "
            "leave the output embedding, and an input embedding tied to it, out of target_modules and modules_to_save"
        )
    return head


def _observe(causal_lm: PreTrainedModel, head: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Stretched hidden states [16, D], the model's own logits of them [16, V'], and how far the hidden states of the
    model's own forward are from those of scoring (relative)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        causal_lm.get_input_embeddings().weight.shape[0], (1, _PROBE_TOKENS), generator=generator
    )
    tokens = tokens.to(head.weight.device)
    positions = torch.arange(_PROBE_TOKENS, device=tokens.device)[None]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": positions,
    }
    scored = hidden_states(causal_lm, **inputs)
    seen: list[Tensor] = []

    def stretch(module: nn.Module, args: tuple, output: Any) -> Any:
        if seen:
            return output
        size = F.linear(output[0], head.weight).float().pow(2).mean(-1, keepdim=True).sqrt()
        target = torch.logspace(-0.5, 2.5, _PROBE_TOKENS, device=size.device)[:, None]
        seen.extend((output[0], output[0] * (target / size).to(output[0].dtype)))
        if isinstance(output, tuple):
            return (seen[1], *output[1:])
        output.last_hidden_state = seen[1]
        return output

    # OPT calls the decoder inside its backbone, so both are watched, and the first to return is stretched.
    handles = [
        module.register_forward_hook(stretch)
        for module in {backbone(causal_lm), causal_lm.get_decoder()}
    ]
    try:
        logits = causal_lm(**inputs, use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(
            f"{type(causal_lm).__name__} does not call its {causal_lm.base_model_prefix}; it cannot be scored"
        )
    return (
        seen[1].flatten(0, 1),
        logits.flatten(0, 1),
        _row_error(scored[0].float(), seen[0][0].float()),
    )


def _candidates(config: Any) -> list[tuple[float | None, float]]:
    """(softcap, logit_scale) from every number of the config with such a name; the plain form first. Families
    disagree on the meaning of one name (Granite divides by logits_scaling, HyperCLOVA X multiplies), so both are
    tried; MiniCPM divides the hidden state by hidden_size / dim_model_base."""
    config = config.get_text_config()
    numbers = {
        k: float(v) for k, v in config.to_dict().items() if is_number(v) and 0 < v < math.inf
    }
    softcaps = [None, *(v for k, v in numbers.items() if _SOFTCAP_NAME.search(k))]
    factors = [v for k, v in numbers.items() if _SCALE_NAME.search(k) or k == "logit_scale"]
    if "dim_model_base" in numbers:
        factors.append(numbers["dim_model_base"] / config.hidden_size)
    scales = [1.0, *factors, *(1 / v for v in factors)]
    return list(dict.fromkeys((softcap, scale) for scale in scales for softcap in softcaps))


def _shape_logits(raw: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = raw * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _row_error(ours: Tensor, truth: Tensor) -> float:
    """The largest relative error of a row (2-norm); infinite where it is not a number."""
    error = (ours - truth).norm(dim=-1) / truth.norm(dim=-1)
    return float(error.nan_to_num(math.inf).max())


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def _random_bias(head: nn.Module) -> Iterator[None]:
    """A fresh head has a zero bias: replace it, so that one which is ignored or scaled by itself shows."""
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
