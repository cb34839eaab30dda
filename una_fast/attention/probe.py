"""Can the rows of this model be packed? A numerical probe, because no list of families stays true."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from una_fast.attention.packed import PACKED, packed_attention, ran_packed
from una_fast.attention.rows import Segment

PROBE_TOLERANCE = 1e-4  # of the largest hidden state; fp32 gives 1e-6, a wrong mask 1e-1
_PROMPT = 30  # tokens of the probe's prompt
_WINDOWS = re.compile(
    r"sliding_window(_size|s)?|attention_chunk_size|attention_window(_size)?|window_size|index_topk"
)
_WIDTHS = re.compile(r"(.*_)?intermediate_size(_.*)?|ffn_dim|ffn_hidden_size|n_inner|d_ff")
_EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")
_KV_HEADS = re.compile(r"(.*_)?num_(.*_)?(key_value|kv)_heads")
_VOCABULARIES = re.compile(r"vocab_size(_.*)?")
_TOKENS = re.compile(r".*_token_id")


def packing_refusal(model: PreTrainedModel) -> str | None:
    """None if `model` can be packed exactly, otherwise the reason in a sentence.

    A copy of the model's decoder with the same config, but fewer layers (every layer type is kept), heads and experts,
    a narrow MLP, a small vocabulary and short windows, is filled with random weights; one packed row of three ragged
    responses is compared with the three separate sequences under the model's own implementation, on the CPU in fp32.
    Every layer must also have called the packed attention, which refuses to run without segments.
    The reduced copy serves every model, however large, on whatever device and in whatever dtype: the loaded weights
    would need prompts longer than their windows. Takes well under a second for usual models, never raises, and leaves
    random state, default dtype and default device alone. Call it on the loaded model before it is sharded.
    """
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return _probe(_reduced_decoder(model))
    except (
        Exception
    ) as error:  # an unknown model may fail in any way, and each is a reason not to pack it
        return f"the packing probe of {type(model).__name__} failed with {type(error).__name__}: {error}"


def _reduced_decoder(model: PreTrainedModel) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
    decoder = base.get_decoder()
    config = decoder.config
    if config.is_encoder_decoder:
        raise ValueError("encoder-decoder models have no packed layout")
    of_the_model = {
        type(m) for m in decoder.modules() if type(m).__module__ == type(decoder).__module__
    }
    types = getattr(config, "layer_types", None) or [None]
    covering = 1 + max(types.index(kind) for kind in set(types))
    if getattr(config, "num_kv_shared_layers", 0):
        covering *= 2  # once with keys of their own, once with shared ones
    total = config.num_hidden_layers
    for layers in sorted({min(total, max(covering, n)) for n in (2, 4, 8, total)}):
        reduced = type(decoder)(_reduced_config(config, layers)).float().eval()
        if of_the_model <= {type(m) for m in reduced.modules()}:
            return _randomize(reduced)
    raise ValueError(
        "its reduced copy lacks " + ", ".join(sorted(t.__name__ for t in of_the_model))
    )


def _reduced_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture, small. Head sizes stay, so that every rope parameter still fits."""
    config = copy.deepcopy(config)
    overrides = {}  # of single layers, in configs that allow them
    if getattr(config, "is_heterogeneous", False):
        overrides = config.to_dict()["per_layer_config"]
        config.per_layer_config = None
    total, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields = {k: v for k, v in vars(config).items() if v is not None and not isinstance(v, bool)}
    windows = sorted({w for k, v in fields.items() if _WINDOWS.fullmatch(k) for w in _ints(v)})
    short = {window: 5 + 3 * rank for rank, window in enumerate(windows)}  # their order is kept
    experts = (
        2
        * max(_ints(fields.get("n_group")) + [1])
        * max(_ints(fields.get("num_experts_per_tok")) + [1])
    )
    rules = {
        _WINDOWS: lambda window: short.get(window, window),
        _WIDTHS: lambda width: min(width, 64),
        _EXPERTS: lambda count: min(count, experts),
        _KV_HEADS: lambda count: 4 if count == heads else min(count, 2),
        _VOCABULARIES: lambda size: min(size, 128),
        _TOKENS: lambda token: 0,
    }

    def reduced(name: str, value: object) -> object:
        for pattern, rule in rules.items():
            if pattern.fullmatch(name):
                return _map_ints(value, rule)
        return value

    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and len(value) == total:
            value = value[:layers]  # one entry per layer
        setattr(config, name, reduced(name, value))
    config.num_attention_heads = 4
    config.hidden_size = 4 * head_dim
    config.num_hidden_layers = layers
    if getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = layers // 2
    if overrides:
        config.per_layer_config = {
            int(layer): {name: reduced(name, value) for name, value in changes.items()}
            for layer, changes in overrides.items()
            if int(layer) < layers
        }
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation_internal = "eager"  # what the flash kernels compute, on a CPU
    return config


def _ints(value: object) -> list[int]:
    """The integers of a config field that is one, a list with some, or neither."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int)]


def _map_ints(value: object, change: Callable[[int], int]) -> object:
    """`change` applied to an integer, or to the integers of a list."""
    if isinstance(value, (list, tuple)):
        return type(value)(change(v) if isinstance(v, int) else v for v in value)
    return change(value) if isinstance(value, int) else value


def _randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that reach every term: sharp scores, and sinks, biases and norms that are not their defaults."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _probe(model: PreTrainedModel) -> str | None:
    with _windows_in_masks() as windows:
        error = _packing_error(model)
    longest = max(windows, default=0)
    if longest >= _PROMPT:
        return f"{type(model).__name__} has windows of {longest} tokens that its packing probe found no name for"
    if PROBE_TOLERANCE < error < 100 * PROBE_TOLERANCE:
        error = _packing_error(
            model.double()
        )  # a model that amplifies rounding; a real difference stays
    name, layers = type(model).__name__, model.config.num_hidden_layers
    ran = sum(map(ran_packed, model.modules()))
    if ran != layers:
        return f"{name} called the packed attention in {ran} of {layers} layers; the others are computed in another way"
    if error <= PROBE_TOLERANCE:
        return None
    reason = f"{name} gives other hidden states packed than separate (relative error {error:.1e})"
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        if (
            _packing_error(model) <= PROBE_TOLERANCE
        ):  # sdpa drops the softcap in some releases of transformers
            reason += (
                '; its sdpa attention differs from its eager attention too, load it with "eager"'
            )
    return reason


@contextmanager
def _windows_in_masks() -> Iterator[set[int]]:
    """The windows and chunks that a model asks masks for while it runs packed. They should be the shortened ones: a
    longer window is not told from none in the probe's short row."""
    windows: set[int] = set()
    own = AttentionMaskInterface()[PACKED]

    def record(*args: object, local_size: int | None = None, **kwargs: object) -> object:
        windows.update([local_size] if local_size else [])
        return own(*args, **kwargs)

    AttentionMaskInterface.register(PACKED, record)
    try:
        yield windows
    finally:
        AttentionMaskInterface.register(PACKED, own)


def _packing_error(model: PreTrainedModel) -> float:
    """The largest difference between one packed row and its sequences, relative to the largest hidden state."""
    prompt, lengths = _PROMPT, (23, 29, 19)  # all longer than the windows of the reduced config
    bounds = [0, *accumulate((prompt, *lengths))]
    responses = tuple(zip(bounds[1:-1], bounds[2:], strict=True))
    ids = torch.randint(1, model.get_input_embeddings().num_embeddings, (1, bounds[-1]))
    positions = torch.cat([torch.arange(prompt), *(prompt + torch.arange(n) for n in lengths)])[
        None
    ]

    separate = []
    for start, stop in responses:
        row = torch.cat([ids[:, :prompt], ids[:, start:stop]], dim=1)
        hidden = model(input_ids=row, use_cache=False)[0]
        separate.append(hidden[:, prompt:] if separate else hidden)
    expected = torch.cat(separate, dim=1)

    segments = (Segment((0, prompt), responses),)
    with packed_attention(model):
        packed = model(
            input_ids=ids, position_ids=positions, use_cache=False, una_segments=segments
        )[0]
    return ((packed - expected).abs().max() / expected.abs().max()).item()
