"""Shared by the tests of models: tiny random models of many families, and one packed row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gptj import modeling_gptj

from una_fast.attention.probe import randomize_weights
from una_fast.attention.rows import Segment, Segments
from una_fast.model.dropout import remove_dropout

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 5  # shorter than the prompts and responses of packed_row


def without(*names: str, **changes: Any) -> dict[str, Any]:
    """Return SMALL without some fields, and with some changed."""
    return {k: v for k, v in SMALL.items() if k not in names} | changes


FAMILIES = {  # config class, and its special fields
    "LlamaConfig": SMALL,
    "LlamaConfig tied": without(tie_word_embeddings=True),
    "Qwen2Config": SMALL,
    "Qwen3Config": without(head_dim=8),
    "MistralConfig": without(head_dim=8, sliding_window=WINDOW),
    "Gemma2Config": without(
        head_dim=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        final_logit_softcapping=7.0,
    ),
    "Gemma3TextConfig": without(
        head_dim=8,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
        final_logit_softcapping=9.0,
    ),
    "CohereConfig": without(logit_scale=0.25),
    "GraniteConfig": without(attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=8.0),
    "HyperCLOVAXConfig": without(head_dim=8, logits_scaling=0.5),
    "MiniCPM3Config": without(
        num_key_value_heads=4,
        dim_model_base=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "PhiConfig": SMALL,
    "OPTConfig": without(
        "num_key_value_heads", "intermediate_size", ffn_dim=48, word_embed_proj_dim=16
    ),
    "GPTNeoXConfig": without("num_key_value_heads"),
    "GPT2Config": without("num_key_value_heads", "intermediate_size", n_inner=48),
    # Takes views of what attention returns.
    "JetMoeConfig": without(kv_channels=8, num_local_experts=2),
    "GptOssConfig": without(
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
HEAD_FORMS = {  # softcap and logit_scale of heads that are not plain
    "Gemma2Config": (7.0, 1.0),
    "Gemma3TextConfig": (9.0, 1.0),
    "CohereConfig": (None, 0.25),
    "GraniteConfig": (None, 0.125),
    "HyperCLOVAXConfig": (None, 0.5),
    "MiniCPM3Config": (None, 0.25),
}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
GPTJ = _TOKENS | {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "n_positions": 256,
}
REFUSED = {  # cannot be packed, but for exceptions below
    "GPTJConfig": GPTJ,
    "BloomConfig": _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "StableLmConfig": SMALL,
    "Llama4TextConfig": without(
        head_dim=8,
        num_hidden_layers=4,
        intermediate_size_mlp=48,
        attention_chunk_size=16,
        num_local_experts=2,
    ),
    "Qwen3NextConfig": without(
        head_dim=8,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}
UNPACKED = [*REFUSED]  # cannot be packed in this version of transformers
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# before 5.18, OPT hands on an attention mask
if _VERSION < (5, 18):
    UNPACKED.append("OPTConfig")
# from 5.24 on, GPT-J attends through the interface
if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
    UNPACKED.remove("GPTJConfig")
PACKABLE = [name for name in FAMILIES | REFUSED if name not in UNPACKED]


def build(
    name: str,
    fields: dict[str, Any] | None = None,
    implementation: str | None = None,
    sharp: bool = True,
) -> PreTrainedModel:
    """Build a tiny model without dropout.

    name: name of a config class, then any words
    fields: of the config; default: the family's
    implementation: attention of transformers
    sharp: weights make softmaxes peaked, softcaps bend and sinks count
    """
    if fields is None:
        fields = (FAMILIES | REFUSED)[name]
    config_class = _config_class(name.split()[0])
    torch.manual_seed(0)
    if "attn_logit_softcapping" in fields:
        # transformers 5.17 defaults to sdpa, which drops the softcap.
        implementation = implementation or "eager"
    model = AutoModelForCausalLM.from_config(
        config_class(**fields),
        attn_implementation=implementation,
        dtype=torch.float32,
    )
    remove_dropout(model)
    return randomize_weights(model) if sharp else model


# The oldest release of transformers with every family; older ones stand beside other trainers.
ALL_FAMILIES = Version("5.15")


def _config_class(name: str) -> type:
    """Return a config class; skip the test where transformers is older than the family."""
    installed = Version(transformers.__version__)
    if not hasattr(transformers, name) and installed < ALL_FAMILIES:
        pytest.skip(f"transformers {installed} has no {name}")
    return getattr(transformers, name)


# Two prompts in one row; the first with three ragged responses.
PROMPTS = (11, 7)
RESPONSES = ((9, 6, 14), (8, 13))


def segments_of(prompts: Any, responses: Any) -> Segments:
    """Return the table of a row, from the sizes of the prompts and of their responses."""
    segments = []
    start = 0
    for prompt, sizes in zip(prompts, responses, strict=True):
        bounds = [start, start + prompt]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        ranges = tuple(pairwise(bounds))
        segments.append(Segment(ranges[0], ranges[1:]))
        start = bounds[-1]
    return tuple(segments)


def packed_row(vocabulary: int = VOCAB) -> tuple[Tensor, Tensor, Segments, list[Tensor]]:
    """Return a packed row, and the separate sequences of its responses.

    ids [1, T], position_ids [1, T], segments, and per response the columns of prompt and response
    """
    torch.manual_seed(1)
    positions = []
    for prompt, sizes in zip(PROMPTS, RESPONSES, strict=True):
        positions += [torch.arange(prompt), *(prompt + torch.arange(n) for n in sizes)]
    segments = segments_of(PROMPTS, RESPONSES)
    columns = []
    for prompt, responses in segments:
        columns += [torch.cat([torch.arange(*prompt), torch.arange(*r)]) for r in responses]
    positions = torch.cat(positions)[None]
    return torch.randint(3, vocabulary, positions.shape), positions, segments, columns


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by the parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest gradient of each parameter.

    Key biases have no gradient but rounding, hence the floor.
    """
    assert ours.keys() == truth.keys()
    floor = 1e-2 * max(g.abs().max() for g in truth.values())
    differences = []
    for name, g in truth.items():
        assert ours[name].isfinite().all(), name  # max() would pass over NaN
        largest = g.abs().max().clamp(min=floor)
        differences.append(((ours[name] - g).abs().max() / largest).item())
    return max(differences)
