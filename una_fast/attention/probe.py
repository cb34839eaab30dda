"""Find out by a numerical probe whether a model can be packed: no list of families stays true."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from una_fast.attention.instance import attention_refusal, configs_of, module_refusal
from una_fast.attention.packed import PACKED, packed_attention, ran_packed
from una_fast.attention.rows import Segment, Segments

# Packed attention under a name with a mask function, which sees the windows that models ask for.
PROBED = "una_packed_probe"
PROBE_TOLERANCE = 1e-4  # of the largest hidden state; fp32 gives 1e-6, a wrong mask 1e-1
# Tokens of the probe's row; all are longer than the windows of the reduced config.
_PROMPT = 30
_RESPONSES = (23, 29, 19)

_WINDOWS = re.compile(
    r"sliding_window(_size|s)?|attention_chunk_size|attention_window(_size)?|window_size|index_topk"
)
_WIDTHS = re.compile(r"(.*_)?intermediate_size(_.*)?|ffn_dim|ffn_hidden_size|n_inner|d_ff")
_EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")
_KV_HEADS = re.compile(r"(.*_)?num_(.*_)?(key_value|kv)_heads")
_VOCABULARIES = re.compile(r"vocab_size(_.*)?")
_TOKENS = re.compile(r".*_token_id")

_Rules = dict[re.Pattern[str], Callable[[int], int]]


def packing_refusal(model: PreTrainedModel) -> str | None:
    """Return the reason why a model cannot be packed exactly, or None.

    A copy of the model's decoder with the same config, but fewer layers (every layer type is kept),
    heads and experts, a narrow MLP, a small vocabulary and short windows, is filled with random
    weights. A packed row of three ragged responses is compared with the three separate sequences
    under the model's own implementation, on the CPU in fp32. Every layer must also have called the
    packed attention, with segments.

    Modules, forwards, hooks and the attention function of the model at hand must come from its
    class and config, or from a few trusted packages: see instance.py.

    The reduced copy serves every model, however large, on any device and in any dtype; the loaded
    weights would need prompts longer than the model's windows. The probe takes well under a second
    for usual models, never raises, and leaves random state, default dtype and default device alone.
    Probe a model before sharding.
    """
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return _instance_refusal(model)
    # An unknown model may fail in any way, and each is a reason not to pack it.
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        return f"the packing probe of {type(model).__name__} failed with {failure}"


def _instance_refusal(model: PreTrainedModel) -> str | None:
    """Return the reason of packing_refusal: of the model's attention, its class or its modules."""
    base = _base(model)
    decoder = base.get_decoder()
    copy = reduced_copy(decoder)
    reason = _probe(copy)
    for config in configs_of(model):
        reason = reason or attention_refusal(config)
    if reason is not None:
        return reason
    reason = _unlike(decoder, copy)
    if reason is None:
        return None
    # The class of the whole model may have changed the modules that the decoder's class builds.
    try:
        copy = reduced_copy(base).get_decoder()
    except Exception:  # not every class can be built small
        return reason
    if type(copy) is not type(decoder):
        return reason
    return _probe(copy) or _unlike(decoder, copy)


def _unlike(decoder: PreTrainedModel, copy: PreTrainedModel) -> str | None:
    """Return why a decoder at hand is unlike a reduced copy, which has run packed rows, or None."""
    ran = {type(module).forward for module in copy.modules() if ran_packed(module)}
    return module_refusal(decoder, copy, ran)


def _base(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft


def reduced_decoder(model: PreTrainedModel) -> PreTrainedModel:
    return reduced_copy(_base(model).get_decoder())


def reduced_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a small float32 model of the class and the config of a model, with random weights.

    Fewer layers (every layer type is kept), heads and experts, a narrow MLP, a small vocabulary,
    short windows. The weights of the model are not read: they may be sharded, or on the meta
    device.

    ValueError where no number of layers keeps every kind of module.
    """
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError("encoder-decoder models have no packed layout")
    family = type(model).__module__
    all_types = _module_types(model, family)
    for layers in _layer_counts(config):
        reduced = type(model)(_reduced_config(config, layers)).float().eval()
        if all_types <= _module_types(reduced, family):
            return randomize_weights(reduced)
    names = ", ".join(sorted(kind.__name__ for kind in all_types))
    raise ValueError(f"its reduced copy lacks {names}")


def _module_types(model: nn.Module, family: str) -> set[type]:
    """Return the types of a model's modules that the Python module `family` defines."""
    types = set(map(type, model.modules()))
    return {kind for kind in types if kind.__module__ == family}


def _layer_counts(config: PreTrainedConfig) -> list[int]:
    """Return the numbers of layers to try, ascending; all types of layers are covered."""
    types = getattr(config, "layer_types", None) or [None]
    covering = 1 + max(types.index(kind) for kind in set(types))
    if getattr(config, "num_kv_shared_layers", 0):
        covering *= 2  # once with keys of their own, once with shared ones
    total = config.num_hidden_layers
    return sorted({min(total, max(covering, n)) for n in (2, 4, 8, total)})


def _reduced_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same architecture, small.

    Head sizes stay, so that every rope parameter still fits.
    """
    config = copy.deepcopy(config)
    overrides = {}  # of single layers, in configs that allow them
    if getattr(config, "is_heterogeneous", False):
        overrides = config.to_dict()["per_layer_config"]
        config.per_layer_config = None
    total = config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {}
    for name, value in vars(config).items():
        if value is not None and not isinstance(value, bool):
            fields[name] = value
    rules = _reducing_rules(fields, heads)
    for name, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == total:
            value = value[:layers]  # one entry per layer
        setattr(config, name, _reduce(rules, name, value))
    config.num_attention_heads = 4
    config.hidden_size = 4 * head_dim
    config.num_hidden_layers = layers
    if getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = layers // 2
    if overrides:
        config.per_layer_config = _reduced_overrides(overrides, rules, layers)
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation_internal = "eager"  # the flash kernels' result, on a CPU
    return config


def _reducing_rules(fields: dict[str, Any], heads: int) -> _Rules:
    """Return name of fields -> function of every integer in such a field."""
    named = [value for name, value in fields.items() if _WINDOWS.fullmatch(name)]
    windows = sorted(set(chain.from_iterable(map(_ints, named))))
    short = {window: 5 + 3 * rank for rank, window in enumerate(windows)}  # their order is kept
    groups = max([*_ints(fields.get("n_group")), 1])
    chosen_experts = max([*_ints(fields.get("num_experts_per_tok")), 1])
    experts = 2 * groups * chosen_experts
    return {
        _WINDOWS: lambda window: short.get(window, window),
        _WIDTHS: lambda width: min(width, 64),
        _EXPERTS: lambda count: min(count, experts),
        _KV_HEADS: lambda count: 4 if count == heads else min(count, 2),
        _VOCABULARIES: lambda size: min(size, 128),
        _TOKENS: lambda token: 0,
    }


def _reduce(rules: _Rules, name: str, value: object) -> object:
    """Return the value of a field in the reduced config."""
    for pattern, rule in rules.items():
        if pattern.fullmatch(name):
            return _map_ints(value, rule)
    return value


def _reduced_overrides(
    overrides: dict[Any, dict[str, Any]], rules: _Rules, layers: int
) -> dict[int, dict[str, Any]]:
    """Return the settings of single layers in the reduced config."""
    reduced = {}
    for layer, changes in overrides.items():
        if int(layer) < layers:
            reduced[int(layer)] = {k: _reduce(rules, k, v) for k, v in changes.items()}
    return reduced


def _ints(value: object) -> list[int]:
    """Return the integers of a config field: an integer, a list with some, or neither."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int)]


def _map_ints(value: object, change: Callable[[int], int]) -> object:
    """Apply `change` to an integer, or to the integers of a list."""
    if isinstance(value, list | tuple):
        return type(value)(change(v) if isinstance(v, int) else v for v in value)
    if isinstance(value, int):
        return change(value)
    return value


@torch.no_grad()
def randomize_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Fill a model, in place, with weights that reach every term of the formulas.

    Scores become sharp; sinks, biases and norms leave the default values. Returns the model.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _probe(model: PreTrainedModel) -> str | None:
    name, layers = type(model).__name__, model.config.num_hidden_layers
    windows = _register_probed()
    error = _packing_error(model)
    longest = max(windows, default=0)
    if longest >= _PROMPT:
        return f"{name} has windows of {longest} tokens that its packing probe found no name for"
    if PROBE_TOLERANCE < error < 100 * PROBE_TOLERANCE:
        # The model may amplify rounding; a real difference stays.
        error = _packing_error(model.double())
    ran = sum(map(ran_packed, model.modules()))
    if ran != layers:
        return (
            f"{name} called the packed attention in {ran} of {layers} layers; the others are "
            "computed in another way"
        )
    if error <= PROBE_TOLERANCE:
        return None
    reason = f"{name} gives other hidden states packed than separate (relative error {error:.1e})"
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        # sdpa drops the softcap in some releases of transformers.
        if _packing_error(model) <= PROBE_TOLERANCE:
            return (
                f"{reason}; its sdpa attention differs from its eager attention too, load it with "
                '"eager"'
            )
    return reason


def _register_probed() -> set[int]:
    """Register PROBED; return a set, for the windows and chunks that models will ask masks for.

    All should be shortened windows: in the short row of the probe a longer window hides no token.
    """
    windows: set[int] = set()

    def record(
        *_: object,
        local_size: int | None = None,
        attention_mask: Tensor | None = None,
        **__: object,
    ) -> None:
        # Of the model's own making; a packed forward would leave the mask out in silence.
        if attention_mask is not None:
            raise ValueError("a packed row has no padding, and the model makes a mask for it")
        if local_size:
            windows.add(local_size)

    AttentionInterface.register(PROBED, AttentionInterface()[PACKED])
    AttentionMaskInterface.register(PROBED, record)
    return windows


def _packing_error(model: PreTrainedModel) -> float:
    """Compare a packed row with the same responses as separate sequences.

    Returns the largest difference, relative to the largest hidden state.
    """
    segments, positions = probe_row()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(1, vocabulary, (1, positions.shape[1]))
    run = functools.partial(model, use_cache=False)
    prompt = ids[:, :_PROMPT]
    separate = []
    for start, stop in segments[0].responses:
        sequence = torch.cat([prompt, ids[:, start:stop]], dim=1)
        hidden = run(input_ids=sequence)[0]
        if separate:  # the prompt once
            hidden = hidden[:, _PROMPT:]
        separate.append(hidden)
    expected = torch.cat(separate, dim=1)
    with packed_attention(model, PROBED):
        packed = run(input_ids=ids, position_ids=positions, una_segments=segments)[0]
    error = (packed - expected).abs().max()
    return (error / expected.abs().max()).item()


def probe_row() -> tuple[Segments, Tensor]:
    """Return the segments and the position_ids [1, T] of the probe's row."""
    ends = list(accumulate((_PROMPT, *_RESPONSES)))
    responses = tuple(pairwise(ends))
    positions = [torch.arange(_PROMPT)]
    for size in _RESPONSES:
        positions.append(_PROMPT + torch.arange(size))
    return (Segment((0, _PROMPT), responses),), torch.cat(positions)[None]
