"""Packed rows give what separate sequences give, on every family that can be packed, and refuse the others."""

import copy
import inspect
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from una_fast import attention, packing
from una_fast.attention import PACKED, Segment, packed_attention
from una_fast.packing import packing_refusal

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 5  # shorter than every prompt and response below


def without(*names, **changes):
    return {k: v for k, v in SMALL.items() if k not in names} | changes


FAMILIES = {
    "LlamaConfig": SMALL,
    "Qwen2Config": SMALL,
    "Qwen3Config": without(head_dim=8),
    "MistralConfig": without(head_dim=8, sliding_window=WINDOW),
    "Gemma2Config": without(head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "Gemma3TextConfig": without(
        head_dim=8,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    ),
    "CohereConfig": SMALL,
    "GraniteConfig": without(attention_multiplier=0.3, residual_multiplier=0.7),
    "PhiConfig": SMALL,
    "GPTNeoXConfig": without("num_key_value_heads"),
    "GPT2Config": without("num_key_value_heads", "intermediate_size", n_inner=48),
    "GptOssConfig": without(
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
REFUSED = {
    "GPTJConfig": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "BloomConfig": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
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


def build(name, fields, implementation=None, sharp=True):
    """A tiny model; `sharp` weights make softmaxes peaked, softcaps bend and sinks count."""
    torch.manual_seed(0)
    if "attn_logit_softcapping" in fields:
        implementation = implementation or "eager"  # transformers 5.17 defaults to sdpa, which drops the softcap
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**fields), attn_implementation=implementation, dtype=torch.float32
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for dropout in ("attention_dropout", "attn_pdrop"):
        if hasattr(model.config, dropout):
            setattr(model.config, dropout, 0.0)
    if sharp:
        with torch.no_grad():
            packing._randomize(model)
    return model


# Two prompts in one row; the first with three ragged responses.
PROMPTS, RESPONSES = (11, 7), ((9, 6, 14), (8, 13))


def packed_row(vocabulary=97):
    """ids [1, T], position_ids [1, T], segments, and the separate sequences with the columns that each row is for."""
    torch.manual_seed(1)
    segments, positions, start = [], [], 0
    for prompt, responses in zip(PROMPTS, RESPONSES, strict=True):
        bounds = [start, *accumulate((prompt, *responses), initial=start)][1:]
        segments.append(Segment((bounds[0], bounds[1]), tuple(zip(bounds[1:-1], bounds[2:], strict=True))))
        positions += [torch.arange(prompt), *(prompt + torch.arange(n) for n in responses)]
        start = bounds[-1]
    ids = torch.randint(3, vocabulary, (1, start))
    sequences = [
        torch.cat([torch.arange(*segment.prompt), torch.arange(*response)])
        for segment in segments
        for response in segment.responses
    ]
    return ids, torch.cat(positions)[None], tuple(segments), sequences


def hidden_packed(model, ids, positions, segments):
    with packed_attention(model):
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False, una_segments=segments)[0][0]


def hidden_separate(model, ids, sequences):
    return [model.base_model(input_ids=ids[:, columns], use_cache=False)[0][0] for columns in sequences]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(ours, truth):
    assert ours.keys() == truth.keys()
    scale = max(g.abs().max() for g in truth.values())
    return max(((ours[k] - truth[k]).abs().max() / scale).item() for k in truth)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_separate(name):
    model = build(name, FAMILIES[name]).train()
    ids, positions, segments, sequences = packed_row()
    weights = [torch.randn(len(columns), model.config.hidden_size) for columns in sequences]

    packed = hidden_packed(model, ids, positions, segments)
    separate = hidden_separate(model, ids, sequences)
    scale = max(h.abs().max() for h in separate)
    for columns, truth in zip(sequences, separate, strict=True):
        assert (packed[columns] - truth).abs().max() <= 1e-5 * max(1.0, scale)

    # The prompt's hidden states stand once in the row and serve every response.
    ours = gradients(model, sum((packed[c] * w).sum() for c, w in zip(sequences, weights, strict=True)))
    truth = gradients(model, sum((h * w).sum() for h, w in zip(separate, weights, strict=True)))
    assert gradient_difference(ours, truth) <= 1e-4

    # Checkpointed layers run again in backward, after the block has put the model's own implementation back.
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        packed = hidden_packed(model, ids, positions, segments)
        again = gradients(model, sum((packed[c] * w).sum() for c, w in zip(sequences, weights, strict=True)))
        assert gradient_difference(again, truth) <= 1e-4, f"use_reentrant={reentrant}"
    assert model.config._attn_implementation != PACKED


@pytest.mark.parametrize("name", FAMILIES)
def test_probe_accepts(name):
    assert packing_refusal(build(name, FAMILIES[name])) is None


@pytest.mark.parametrize("name", REFUSED)
def test_probe_refuses_with_a_reason(name):
    reason = packing_refusal(build(name, REFUSED[name], sharp=False))
    assert isinstance(reason, str) and len(reason) > 20


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("LlamaConfig", {"scaling": 0.36}),
        ("MistralConfig", {"sliding_window": None}),
        ("MistralConfig", {"sliding_window": 6}),
        ("Gemma2Config", {"softcap": None}),
        ("GptOssConfig", {"s_aux": None}),
    ],
)
def test_probe_sees_a_wrong_attention(name, change, monkeypatch):
    def wrong(*args, **kwargs):
        return attention.packed_attention_forward(*args, **(kwargs | change))

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, PACKED, wrong)
    assert "hidden states" in packing_refusal(build(name, FAMILIES[name]))


def test_probe_serves_published_sizes_and_leaves_no_trace():
    with torch.device("meta"):  # a probe that built the model itself would need gigabytes
        model = AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(), dtype=torch.bfloat16)
    before = copy.deepcopy(model.config.to_dict()), torch.get_rng_state(), model.config._attn_implementation
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert packing_refusal(model) is None
            assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    after = model.config.to_dict(), torch.get_rng_state(), model.config._attn_implementation
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_probe_names_an_sdpa_that_drops_the_softcap(monkeypatch):
    """What sdpa does with a softcap in transformers 5.17; later releases raise."""
    sdpa = transformers.AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(
        transformers.AttentionInterface._global_mapping, "sdpa", lambda *a, **k: sdpa(*a, **(k | {"softcap": None}))
    )
    model = build("Gemma2Config", FAMILIES["Gemma2Config"])
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr(type(model.model), "_supports_sdpa", True)
    assert 'load it with "eager"' in packing_refusal(model)


def test_probe_never_raises():
    class Odd(torch.nn.Module):
        pass

    assert "Odd" in packing_refusal(Odd())


def test_missing_segments_raise():
    model = build("LlamaConfig", SMALL)
    with packed_attention(model), pytest.raises(ValueError, match="una_segments"):
        model(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment((0, 3), ((3, 5),)),), "cover 5 tokens and the row has 6"),
        ((Segment((0, 3), ((4, 6),)),), r"range \[4, 6\) where one that starts at 3"),
        ((Segment((0, 3), ((3, 3), (3, 6))),), "not empty"),
    ],
)
def test_segments_must_tile_the_row(segments, message):
    model = build("LlamaConfig", SMALL)
    with packed_attention(model), pytest.raises(ValueError, match=message):
        model(torch.ones(1, 6, dtype=torch.int64), una_segments=segments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"dropout": 0.1}, "attention_dropout"),
        ({"is_causal": False}, "causal"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "mask"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_changes_the_scores_is_not_ignored(change, message):
    q = torch.randn(1, 2, 6, 8)
    segments = (Segment((0, 3), ((3, 6),)),)
    module = torch.nn.Identity()
    attention.packed_attention_forward(module, q, q, q, una_segments=segments, position_ids=torch.zeros(1, 6))
    with pytest.raises(ValueError, match=message):
        attention.packed_attention_forward(module, q, q, q, una_segments=segments, **change)


def test_padding_masks_raise():
    model = build("LlamaConfig", SMALL)
    ids = torch.ones(1, 6, dtype=torch.int64)
    with packed_attention(model), pytest.raises(ValueError, match="attention_mask=None"):
        model(ids, attention_mask=torch.ones_like(ids), una_segments=(Segment((0, 3), ((3, 6),)),))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_own_implementation_is_back_after_an_exception(implementation):
    model = build("LlamaConfig", SMALL, implementation)
    with pytest.raises(RuntimeError, match="inside"), packed_attention(model):
        assert model.config._attn_implementation == PACKED
        raise RuntimeError("inside")
    assert model.config._attn_implementation == implementation


def test_nested_and_copied_configs_are_switched_and_restored():
    model = build("LlamaConfig", SMALL, "sdpa")
    copied = copy.deepcopy(model.config)
    copied._attn_implementation_internal = "eager"
    model.model.layers[1].self_attn.config = copied
    seen = []
    with packed_attention(model), packed_attention(model):
        seen = [model.config._attn_implementation, copied._attn_implementation]
    assert seen == [PACKED, PACKED]
    assert [model.config._attn_implementation, copied._attn_implementation] == ["sdpa", "eager"]


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "GPT2Config"])
def test_left_padded_generation_is_the_same_before_and_after_scoring(name):
    model = build(name, FAMILIES[name]).eval()
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **settings)
    row, positions, segments, _ = packed_row()
    hidden_packed(model, row, positions, segments)
    assert torch.equal(model.generate(ids, **settings), before)


def full_mask_attention(query, key, value, scores):
    """The same in one piece: [H, R, E] scores, softmax, product; fp64."""
    q, k, v = query.double(), key.double(), value.double()
    groups = q.shape[1] // k.shape[1]
    z = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scores.scaling
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    queries, keys = z.shape[-2:]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = (age < 0) | (age >= (scores.window or keys))
    z = z.masked_fill(hidden, float("-inf"))
    if scores.sinks is not None:
        z = torch.cat([z, scores.sinks.double().view(1, -1, 1, 1).expand(1, -1, queries, 1)], dim=-1)
    return z.softmax(-1)[..., :keys] @ v.repeat_interleave(groups, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "wide values"])
def test_chunks_equal_the_full_mask(window, kind, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 16)
    attention._mask_table.cache_clear()
    torch.manual_seed(3)
    for queries, offset in [(1, 0), (1, 30), (15, 0), (16, 5), (17, 0), (17, 16), (33, 64), (40, 3)]:
        q = torch.randn(1, 4, queries, 8, requires_grad=True)
        k = torch.randn(1, 2, queries + offset, 8, requires_grad=True)
        v = torch.randn(1, 2, queries + offset, 12 if kind == "wide values" else 8, requires_grad=True)
        sinks = torch.randn(4, requires_grad=True) if kind == "sinks" else None
        scores = attention._Scores(0.7, window, 1.5 if kind == "softcap" else None, sinks)
        inputs = [x for x in (q, k, v, sinks) if x is not None]
        ours, truth = attention._attend(q, k, v, scores), full_mask_attention(q, k, v, scores)
        assert ours.dtype == q.dtype and (ours - truth).abs().max() <= 2e-6
        upstream = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(truth, inputs, upstream.double()),
            strict=True,
        ):
            assert (a - b).abs().max() <= 1e-5
    attention._mask_table.cache_clear()


def test_long_rows_build_no_square_mask():
    """Prompt 2048 and a response of 2048: the largest tensor made is the chunk's mask, not [2048, 4096]."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.untyped_storage().nbytes() for t in tree_leaves(out) if torch.is_tensor(t))])
            return out

    q, kv = torch.randn(1, 2, 4096, 8), torch.randn(1, 1, 4096, 8)
    with Watch():
        attention.packed_attention_forward(
            torch.nn.Identity(), q, kv, kv, una_segments=(Segment((0, 2048), ((2048, 4096),)),)
        )
    assert largest <= 4 * attention.CHUNK * 4096


def test_masks_made_in_inference_mode_serve_training():
    attention._mask_table.cache_clear()
    q = torch.randn(1, 2, 9, 8)
    segments = (Segment((0, 3), ((3, 9),)),)
    with torch.inference_mode():
        attention.packed_attention_forward(torch.nn.Identity(), q, q, q, una_segments=segments)
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    attention.packed_attention_forward(torch.nn.Identity(), q, q, q, una_segments=segments)[0].sum().backward()
    assert q.grad is not None


def test_autocast_gives_its_dtype():
    q = torch.randn(1, 2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention.packed_attention_forward(
            torch.nn.Identity(), q, q, q.bfloat16(), una_segments=(Segment((0, 3), ((3, 9),)),)
        )
    assert out.dtype == torch.bfloat16


def stand_in_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """varlen_attn of torch 2.13 on the CPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert isinstance(window_size, tuple) and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q, k, v = (
            x[cu[i] : cu[i + 1]].transpose(0, 1)[None]
            for x, cu in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        age = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])[None]
        mask = (age >= 0) & ((age <= window_size[0]) if window_size[0] >= 0 else True)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def stand_in_varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """varlen_attn of torch 2.11: key heads are shared without being asked."""
    return stand_in_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


def test_stand_in_has_the_signature_of_the_installed_torch():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    ours = list(inspect.signature(stand_in_varlen).parameters)
    assert names[:7] == ours[:7] and {"scale", "window_size"} <= set(names)
    if "enable_gqa" in names:
        assert names == ours


@pytest.mark.parametrize("stand_in", [stand_in_varlen, stand_in_varlen_2_11])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 1000])
def test_varlen_path_equals_sdpa(stand_in, window, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    kernel = attention._torch_varlen()
    _, _, segments, _ = packed_row()
    total = segments[-1].responses[-1][1]
    row = attention._row(segments, total)
    scores = attention._Scores(0.4, window, None, None)
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, 2, 2))
    ours = attention._attend_varlen(q, k, v, row, scores, kernel.call)
    truth = attention._attend_sdpa(q, k, v, row, scores)
    assert ours.shape == truth.shape == (1, total, 4, 8)
    assert (ours - truth).abs().max() <= 1e-6
    upstream = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        assert (a - b).abs().max() <= 1e-5


def test_varlen_is_used_only_where_it_is_right():
    kernel = attention._Varlen("kernel", None, softcap=False)
    half, plain = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), attention._Scores(1.0, None, None, None)
    refusal = attention._varlen_refusal
    assert refusal(half, half, plain, kernel) is None
    assert "precision" in refusal(half.float(), half.float(), plain, kernel)
    assert "head sizes" in refusal(half, half[..., :32], plain, kernel)
    assert "softcap" in refusal(half, half, plain._replace(softcap=2.0), kernel)
    assert refusal(half, half, plain._replace(softcap=2.0), kernel._replace(softcap=True)) is None
    assert "sinks" in refusal(half, half, plain._replace(sinks=torch.zeros(1)), kernel)
    assert refusal(half, half, plain, None)
