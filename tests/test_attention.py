"""Packed rows give what separate sequences give, on every family that can be packed, and refuse the others."""

import copy
import importlib.util
import inspect
import sys
import types
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from una_fast.attention import packed, rows, sdpa, varlen
from una_fast.attention import probe as packing
from una_fast.attention.packed import PACKED, packed_attention
from una_fast.attention.probe import packing_refusal
from una_fast.attention.rows import Segment
from una_fast.model.loading import remove_dropout

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


FAMILIES = {  # config class, and what is special
    "LlamaConfig": SMALL,
    "LlamaConfig tied": without(tie_word_embeddings=True),
    "Qwen2Config": SMALL,
    "Qwen3Config": without(head_dim=8),
    "MistralConfig": without(head_dim=8, sliding_window=WINDOW),
    "Gemma2Config": without(
        head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "Gemma3TextConfig": without(
        head_dim=8,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    ),
    "CohereConfig": SMALL,
    "GraniteConfig": without(attention_multiplier=0.3, residual_multiplier=0.7),
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
    "JetMoeConfig": without(
        kv_channels=8, num_local_experts=2
    ),  # takes views of what attention returns
    "GptOssConfig": without(
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
REFUSED = {
    "GPTJConfig": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 64,
    },
    "BloomConfig": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
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
        implementation = (
            implementation or "eager"
        )  # transformers 5.17 defaults to sdpa, which drops the softcap
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, name.split()[0])(**fields),
        attn_implementation=implementation,
        dtype=torch.float32,
    )
    remove_dropout(model)
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
        segments.append(
            Segment((bounds[0], bounds[1]), tuple(zip(bounds[1:-1], bounds[2:], strict=True)))
        )
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
        return model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, una_segments=segments
        )[0][0]


def hidden_separate(model, ids, sequences):
    return [
        model.base_model(input_ids=ids[:, columns], use_cache=False)[0][0] for columns in sequences
    ]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(ours, truth):
    """Of each parameter, relative to its largest gradient; key biases have none but rounding, hence the floor."""
    assert ours.keys() == truth.keys()
    floor = 1e-2 * max(g.abs().max() for g in truth.values())
    return max(
        ((ours[k] - truth[k]).abs().max() / truth[k].abs().max().clamp(min=floor)).item()
        for k in truth
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_separate(name):
    model = build(name, FAMILIES[name]).train()
    ids, positions, segments, sequences = packed_row()
    packed = hidden_packed(model, ids, positions, segments)
    weights = [torch.randn(len(columns), packed.shape[-1]) for columns in sequences]
    separate = hidden_separate(model, ids, sequences)
    scale = max(h.abs().max() for h in separate)
    for columns, truth in zip(sequences, separate, strict=True):
        assert (packed[columns] - truth).abs().max() <= 1e-5 * max(1.0, scale)

    # The prompt's hidden states stand once in the row and serve every response.
    ours = gradients(
        model, sum((packed[c] * w).sum() for c, w in zip(sequences, weights, strict=True))
    )
    truth = gradients(model, sum((h * w).sum() for h, w in zip(separate, weights, strict=True)))
    assert gradient_difference(ours, truth) <= 1e-4

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
        return packed.packed_attention_forward(*args, **(kwargs | change))

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, PACKED, wrong)
    assert "hidden states" in packing_refusal(build(name, FAMILIES[name]))


def test_probe_serves_published_sizes_and_leaves_no_trace():
    with torch.device("meta"):  # a probe that built the model itself would need gigabytes
        model = AutoModelForCausalLM.from_config(
            transformers.Gemma3TextConfig(), dtype=torch.bfloat16
        )
    before = (
        copy.deepcopy(model.config.to_dict()),
        torch.get_rng_state(),
        model.config._attn_implementation,
    )
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
        transformers.AttentionInterface._global_mapping,
        "sdpa",
        lambda *a, **k: sdpa(*a, **(k | {"softcap": None})),
    )
    model = build("Gemma2Config", FAMILIES["Gemma2Config"])
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr(type(model.model), "_supports_sdpa", True)
    assert 'load it with "eager"' in packing_refusal(model)


class WindowOfItsOwn(transformers.MistralModel):
    """A window that only the mask knows, under a name of its own, longer than the probe's row."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.config = copy.deepcopy(config)
        config.sliding_window = config.its_own


def test_probe_refuses_a_window_that_it_cannot_shorten():
    model = build("MistralConfig", without(head_dim=8, sliding_window=None))
    assert packing_refusal(model) is None
    model.config.its_own = 64
    model.model = WindowOfItsOwn(model.config)
    ids, positions, segments, _ = packed_row()
    assert packing_refusal(model) == (
        "WindowOfItsOwn has windows of 64 tokens that its packing probe found no name for"
    )
    hidden_packed(model, ids, positions, segments)  # and the probe has put the mask function back


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
    packed.packed_attention_forward(
        module, q, q, q, una_segments=segments, position_ids=torch.zeros(1, 6)
    )
    with pytest.raises(ValueError, match=message):
        packed.packed_attention_forward(module, q, q, q, una_segments=segments, **change)


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


def full_mask_attention(query, key, value, scores, shift=0):
    """The same in one piece: [H, R, E] scores, softmax, product; fp64. `shift`: keys too few that a query sees."""
    q, k, v = query.double(), key.double(), value.double()
    groups = q.shape[1] // k.shape[1]
    z = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scores.scaling
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    queries, keys = z.shape[-2:]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = (age < shift) | (age >= (scores.window or keys) + shift)
    hidden[:, 0] &= shift == 0  # no query without a key
    z = z.masked_fill(hidden, float("-inf"))
    if scores.sinks is not None:
        z = torch.cat(
            [z, scores.sinks.double().view(1, -1, 1, 1).expand(1, -1, queries, 1)], dim=-1
        )
    return z.softmax(-1)[..., :keys] @ v.repeat_interleave(groups, 1)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "wide values"])
def test_chunks_equal_the_full_mask(window, kind, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK", 16)
    sdpa.mask_table.cache_clear()
    torch.manual_seed(3)
    for queries, offset in [
        (1, 0),
        (1, 30),
        (15, 0),
        (16, 5),
        (17, 0),
        (17, 16),
        (33, 64),
        (40, 3),
    ]:
        q = torch.randn(1, 4, queries, 8, requires_grad=True)
        k = torch.randn(1, 2, queries + offset, 8, requires_grad=True)
        v = torch.randn(
            1, 2, queries + offset, 12 if kind == "wide values" else 8, requires_grad=True
        )
        sinks = torch.randn(4, requires_grad=True) if kind == "sinks" else None
        scores = sdpa.Scores(0.7, window, 1.5 if kind == "softcap" else None, sinks)
        inputs = [x for x in (q, k, v, sinks) if x is not None]
        ours, truth = sdpa._attend(q, k, v, scores), full_mask_attention(q, k, v, scores)
        assert ours.dtype == q.dtype and (ours - truth).abs().max() <= 2e-6
        upstream = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(truth, inputs, upstream.double()),
            strict=True,
        ):
            assert (a - b).abs().max() <= 1e-5
    sdpa.mask_table.cache_clear()


def test_long_rows_build_no_square_mask():
    """Prompt 2048 and a response of 2048: the largest tensor made is the chunk's mask, not [2048, 4096]."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(t.untyped_storage().nbytes() for t in tree_leaves(out) if torch.is_tensor(t)),
                ]
            )
            return out

    q, kv = torch.randn(1, 2, 4096, 8), torch.randn(1, 1, 4096, 8)
    with Watch():
        packed.packed_attention_forward(
            torch.nn.Identity(), q, kv, kv, una_segments=(Segment((0, 2048), ((2048, 4096),)),)
        )
    assert largest <= 4 * sdpa.CHUNK * 4096


def test_masks_made_in_inference_mode_serve_training():
    sdpa.mask_table.cache_clear()
    q = torch.randn(1, 2, 9, 8)
    segments = (Segment((0, 3), ((3, 9),)),)
    with torch.inference_mode():
        packed.packed_attention_forward(torch.nn.Identity(), q, q, q, una_segments=segments)
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    packed.packed_attention_forward(torch.nn.Identity(), q, q, q, una_segments=segments)[
        0
    ].sum().backward()
    assert q.grad is not None


def test_autocast_gives_its_dtype():
    q = torch.randn(1, 2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed.packed_attention_forward(
            torch.nn.Identity(), q, q, q.bfloat16(), una_segments=(Segment((0, 3), ((3, 9),)),)
        )
    assert out.dtype == torch.bfloat16


# ---- varlen kernels: stand-ins with their signatures -----------------------------------------------------------------


def varlen_truth(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window, softcap=0.0, shift=0):
    """What the kernels are documented to compute: [T, H, D], causal from the lower right. `shift`: wrong masks."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
    assert window[1] == 0, "causal"
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k)) and all(x.stride(-1) == 1 for x in (q, k, v))
    outputs = []
    for i in range(len(cu_q) - 1):
        parts = (
            x[cu[i] : cu[i + 1]].transpose(0, 1)[None].double()
            for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        size = None if window[0] < 0 else window[0] + 1
        scores = sdpa.Scores(scale, size, softcap or None, None)
        outputs.append(full_mask_attention(*parts, scores, shift)[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8."""
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    window = (window_size[0], 0 if causal else window_size[1])  # as the kernel's launcher does
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_truth(q, k, v, *lengths, scale=softmax_scale, window=window, softcap=softcap)


def varlen_attn_2_11(
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
):
    """torch 2.11: key heads are shared without being asked."""
    return varlen_truth(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size
    )


def varlen_attn_2_13(
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
    """torch 2.13: key heads are shared when asked."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_truth(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size
    )


KERNELS = {
    "flash-attn": flash_attn_varlen_func,
    "torch 2.11": varlen_attn_2_11,
    "torch 2.13": varlen_attn_2_13,
}


def install(monkeypatch, flash=None, torch_varlen=None):
    """Let the import lines of una_fast.attention find these functions, or none."""
    module = None
    if flash is not None:
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)  # None: ImportError
    if torch_varlen is None:
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)


def kernel_of(monkeypatch, name):
    if name == "flash-attn":
        install(monkeypatch, flash=KERNELS[name])
        return varlen._flash_attn()
    install(monkeypatch, torch_varlen=KERNELS[name])
    return varlen._torch_varlen()


def arguments(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_stand_ins_have_the_signatures_of_what_is_installed():
    from torch.nn.attention.varlen import varlen_attn

    known = [arguments(varlen_attn_2_11), arguments(varlen_attn_2_13)]
    assert arguments(varlen_attn) in known, (
        "torch changed varlen_attn: read its notes, then add a stand-in"
    )
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func as real

        assert arguments(real) == arguments(flash_attn_varlen_func)


def separate_attention(q, k, v, segments, scores):
    """[1, T, H, D]: every response after its prompt as a sequence of its own, in float64."""
    outputs = []
    for (start, end), responses in segments:
        for i, (first, last) in enumerate(responses):
            columns = torch.cat([torch.arange(start, end), torch.arange(first, last)])
            out = full_mask_attention(*(x[:, :, columns] for x in (q, k, v)), scores)
            outputs.append(out if i == 0 else out[:, :, end - start :])
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 9, 12, 18, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "softcap"), [*((name, None) for name in KERNELS), ("flash-attn", 1.5)]
)
def test_varlen_path_is_separate_attention(name, heads, window, softcap, monkeypatch):
    kernel = kernel_of(monkeypatch, name)
    _, _, segments, _ = packed_row()
    total = segments[-1].responses[-1][1]
    scores = sdpa.Scores(0.4, window, softcap, None)
    torch.manual_seed(4)
    q, k, v = (
        torch.randn(1, n, total, 8, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    ours = varlen.attend_varlen(q, k, v, rows.row_ranges(segments, total), scores, kernel.call)
    truth = separate_attention(q, k, v, segments, scores)
    assert ours.shape == truth.shape == (1, total, heads[0], 8)
    assert (ours - truth).abs().max() <= 1e-6
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(truth, (q, k, v), upstream.double()),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma2Config", "GraniteConfig"])
def test_models_through_a_varlen_kernel(name, kernel, monkeypatch):
    """Scaling, windows and softcaps reach the kernel; what it has not (torch has no softcap) goes the other way."""
    model = build(name, FAMILIES[name])
    ids, positions, segments, sequences = packed_row()
    calls = []
    function = kernel_of(monkeypatch, kernel)
    served = function._replace(
        call=lambda *args, **kwargs: calls.append(1) or function.call(*args, **kwargs)
    )
    refusal = varlen.varlen_refusal  # float32, for a sharp comparison
    monkeypatch.setattr(
        packed, "varlen_refusal", lambda q, v, *rest: refusal(q.bfloat16(), v.bfloat16(), *rest)
    )
    monkeypatch.setattr(packed, "_stand_in", served)
    states = hidden_packed(model, ids, positions, segments)
    for columns, truth in zip(sequences, hidden_separate(model, ids, sequences), strict=True):
        assert (states[columns] - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max())
    assert bool(calls) == (name != "Gemma2Config" or function.softcap)


def test_the_first_right_kernel_is_used(monkeypatch, caplog):
    """A kernel that aligns its masks elsewhere, or fails on this device, does not get to train anything."""

    def shifted(shift):
        return lambda *args, softmax_scale, causal, window_size, softcap: varlen_truth(
            *args, scale=softmax_scale, window=window_size, softcap=softcap, shift=shift
        )

    def upper_left(*args, softmax_scale, causal, window_size, softcap):
        q, k, v, cu_q, cu_k, *_ = args
        queries, keys = (cu.diff().tolist() for cu in (cu_q, cu_k))
        outputs = []
        for a, b, c, n, m in zip(
            q.split(queries), k.split(keys), v.split(keys), queries, keys, strict=True
        ):
            a, b, c = (x.transpose(0, 1)[None].float() for x in (a, b, c))
            mask = torch.ones(n, m, dtype=torch.bool).tril()
            out = F.scaled_dot_product_attention(
                a, b, c, mask, scale=softmax_scale, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1).to(q.dtype))
        return torch.cat(outputs)

    def window_one_off(*args, window_size, **kwargs):
        left = window_size[0]
        return flash_attn_varlen_func(*args, window_size=(left + (left > 0), 0), **kwargs)

    def no_gradient(q, *args, **kwargs):
        return flash_attn_varlen_func(q, *args, **kwargs).detach() + 0 * q

    def too_old(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        raise AssertionError("called without the softcap")

    def no_kernel(*_, **__):
        raise RuntimeError("only supports Ampere GPUs or newer")

    def chosen():
        varlen.varlen_kernel.cache_clear()
        kernel = varlen.varlen_kernel(torch.device("cpu"))
        return kernel and kernel.name

    caplog.set_level("INFO", logger="una_fast")
    right = varlen_attn_2_13
    install(monkeypatch, flash=flash_attn_varlen_func, torch_varlen=right)
    assert chosen() == "flash-attn" and "does not use" not in caplog.text
    for wrong in (
        shifted(1),
        shifted(-1),
        upper_left,
        window_one_off,
        no_gradient,
        too_old,
        no_kernel,
    ):
        caplog.clear()
        install(monkeypatch, flash=wrong, torch_varlen=right)
        assert chosen() == "torch.nn.attention.varlen", wrong
        assert "does not use flash-attn on cpu: " in caplog.text
    install(monkeypatch, torch_varlen=no_kernel)
    assert chosen() is None
    install(monkeypatch)
    assert chosen() is None
    varlen.varlen_kernel.cache_clear()


def test_keys_are_repeated_as_little_as_possible():
    """Calls get at most as many keys as the row has tokens; one response per prompt costs no copy at all."""
    seen = []

    def kernel(q, k, v, *_, scores):
        seen.append(k)
        return q

    def calls(*shapes):
        segments, start = [], 0
        for prompt, responses in shapes:
            bounds = [*accumulate((prompt, *responses), initial=start)]
            segments.append(
                Segment((bounds[0], bounds[1]), tuple(zip(bounds[1:-1], bounds[2:], strict=True)))
            )
            start = bounds[-1]
        seen.clear()
        q, k = (
            torch.arange(start * 8.0).view(1, start, 4, 2).transpose(1, 2),
            torch.randn(1, 2, start, 2),
        )
        row, scores = (
            rows.row_ranges(tuple(segments), start),
            sdpa.Scores(1.0, None, None, None),
        )
        out = varlen.attend_varlen(q, k, k, row, scores, kernel)
        assert torch.equal(out, q.transpose(1, 2)), "the outputs stand in the row's order"
        assert all(len(keys) <= start for keys in seen)
        copied = sum(
            len(x) for x in seen if x.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        )
        return [len(keys) for keys in seen], copied

    assert calls((100, (5,)), (7, (3,))) == ([115], 0)
    assert calls((100, (5, 7))) == ([105, 107], 107)
    assert calls((100, (5, 7, 9))) == ([105, 107, 109], 107 + 109)
    assert calls((10, (50, 70)), (10, (30, 40))) == ([60 + 80 + 40, 50], 230)


def test_varlen_is_used_only_where_it_is_right():
    kernel = varlen.VarlenKernel("kernel", None, softcap=False)
    half, plain = (
        torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16),
        sdpa.Scores(1.0, None, None, None),
    )
    refusal = varlen.varlen_refusal
    assert refusal(half, half, plain, kernel) is None
    assert "precision" in refusal(half.float(), half.float(), plain, kernel)
    assert "head sizes" in refusal(half, half[..., :32], plain, kernel)
    assert "softcap" in refusal(half, half, plain._replace(softcap=2.0), kernel)
    assert refusal(half, half, plain._replace(softcap=2.0), kernel._replace(softcap=True)) is None
    assert "sinks" in refusal(half, half, plain._replace(sinks=torch.zeros(1)), kernel)
    assert refusal(half, half, plain, None)
