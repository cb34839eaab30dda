"""Packed rows give what separate sequences give, on every family that can be packed."""

import copy
import importlib.util
import inspect
import subprocess
import sys
import types
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from families import (
    PACKABLE,
    PROMPTS,
    RESPONSES,
    UNPACKED,
    build,
    gradient_difference,
    gradients,
    packed_row,
    segments_of,
    without,
)
from una_fast.attention import packed, rows, sdpa, varlen
from una_fast.attention.packed import PACKED, packed_attention
from una_fast.attention.probe import packing_refusal
from una_fast.attention.rows import RowLayout, Segment

ATTENTIONS = transformers.AttentionInterface._global_mapping


def hidden_packed(model, ids, positions, segments):
    with packed_attention(model):
        return model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, una_segments=segments
        )[0][0]


def hidden_separate(model, ids, sequences):
    return [
        model.base_model(input_ids=ids[:, columns], use_cache=False)[0][0] for columns in sequences
    ]


# Other families: the probe compares hidden states, test_packed_score.py log-probs and gradients.
@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "GptOssConfig", "JetMoeConfig"])
def test_packed_is_separate(name):
    model = build(name).train()
    ids, positions, segments, sequences = packed_row()
    packed = hidden_packed(model, ids, positions, segments)
    weights = [torch.randn(len(columns), packed.shape[-1]) for columns in sequences]
    separate = hidden_separate(model, ids, sequences)
    scale = max(h.abs().max() for h in separate)
    for columns, truth in zip(sequences, separate, strict=True):
        assert (packed[columns] - truth).abs().max() <= 1e-5 * max(1.0, scale)

    # The prompt's hidden states stand once in the row and serve every response.
    ours = sum((packed[c] * w).sum() for c, w in zip(sequences, weights, strict=True))
    truth = sum((h * w).sum() for h, w in zip(separate, weights, strict=True))
    assert gradient_difference(gradients(model, ours), gradients(model, truth)) <= 1e-4

    assert model.config._attn_implementation != PACKED


# ---- the layout --------------------------------------------------------------------------------


def test_layout_in_plain_numbers():
    """The example of RowLayout's docstring, and a second prompt after it."""
    segments = segments_of((5,), ((3, 2, 4),))
    assert rows.row_layout(segments, 14) == RowLayout((8, 2, 4), (None, (0, 5), (0, 5)))
    two = segments_of((5, 3), ((3, 2), (1, 6)))
    assert rows.row_layout(two, 20) == RowLayout((8, 2, 4, 6), (None, (0, 5), None, (2, 3)))


@pytest.mark.parametrize("module", ["una_fast.attention.rows", "una_fast.model.settings"])
def test_light_files_need_neither_torch_nor_transformers(module):
    blocked = ["torch", "transformers", "peft", "numpy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment((0, 3), ((3, 5),)),), "cover 5 tokens and the row has 6"),
        (
            (Segment((0, 3), ((4, 6),)),),
            r"una_segments\[0\] .* \[4, 6\) where one that starts at 3",
        ),
        ((Segment((0, 3), ((3, 3), (3, 6))),), "not empty"),
    ],
)
def test_segments_must_tile_the_row(segments, message):
    with pytest.raises(ValueError, match=message):
        rows.row_layout(segments, 6)


# ---- the probe ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_probe_accepts(name):
    assert packing_refusal(build(name)) is None


@pytest.mark.parametrize("name", UNPACKED)
def test_probe_refuses_with_a_reason(name):
    reason = packing_refusal(build(name, sharp=False))
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

    monkeypatch.setitem(ATTENTIONS, PACKED, wrong)
    assert "hidden states" in packing_refusal(build(name))


def test_probe_serves_published_sizes_and_leaves_no_trace():
    with torch.device("meta"):  # a probe that built the model itself would need gigabytes
        config = transformers.Gemma3TextConfig(num_hidden_layers=8)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert packing_refusal(model) is None
            assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert (model.config.to_dict(), model.config._attn_implementation) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_names_an_sdpa_that_drops_the_softcap(monkeypatch):
    """What sdpa does with a softcap in transformers 5.17; later releases raise."""
    sdpa = ATTENTIONS["sdpa"]
    monkeypatch.setitem(ATTENTIONS, "sdpa", lambda *a, **k: sdpa(*a, **(k | {"softcap": None})))
    model = build("Gemma2Config")
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


# ---- refusals, and the switch of a model -------------------------------------------------------


def test_missing_segments_raise():
    model = build("LlamaConfig")
    with packed_attention(model), pytest.raises(ValueError, match="una_segments"):
        model(torch.ones(1, 4, dtype=torch.int64))


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
    call = partial(
        packed.packed_attention_forward,
        torch.nn.Identity(),
        q,
        q,
        q,
        una_segments=segments_of((3,), ((3,),)),
    )
    call(position_ids=torch.zeros(1, 6))
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_padding_masks_raise():
    model = build("LlamaConfig")
    ids = torch.ones(1, 6, dtype=torch.int64)
    with packed_attention(model), pytest.raises(ValueError, match="attention_mask=None"):
        model(ids, attention_mask=torch.ones_like(ids), una_segments=segments_of((3,), ((3,),)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_own_implementation_is_back_after_an_exception(implementation):
    model = build("LlamaConfig", implementation=implementation)
    with pytest.raises(RuntimeError, match="inside"), packed_attention(model):
        assert model.config._attn_implementation == PACKED
        raise RuntimeError("inside")
    assert model.config._attn_implementation == implementation


def test_nested_and_copied_configs_are_switched_and_restored():
    model = build("LlamaConfig", implementation="sdpa")
    copied = copy.deepcopy(model.config)
    copied._attn_implementation_internal = "eager"
    model.model.layers[1].self_attn.config = copied
    seen = []
    with packed_attention(model), packed_attention(model):
        seen = [model.config._attn_implementation, copied._attn_implementation]
    assert seen == [PACKED, PACKED]
    assert [model.config._attn_implementation, copied._attn_implementation] == ["sdpa", "eager"]


# ---- SDPA, chunk by chunk ----------------------------------------------------------------------


def full_mask_attention(query, key, value, rule, shift=0):
    """The same in one piece: [H, R, E] scores, softmax, product; fp64. `shift`: keys hidden."""
    q, k, v = query.double(), key.double(), value.double()
    groups = q.shape[1] // k.shape[1]
    z = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * rule.scaling
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    queries, keys = z.shape[-2:]
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = (age < shift) | (age >= (rule.window or keys) + shift)
    hidden[:, 0] &= shift == 0  # no query without a key
    z = z.masked_fill(hidden, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.double().view(1, -1, 1, 1).expand(1, -1, queries, 1)
        z = torch.cat([z, sinks], dim=-1)
    return z.softmax(-1)[..., :keys] @ v.repeat_interleave(groups, 1)


def assert_same(ours, truth, inputs, place):
    """Outputs agree, and the gradients of the inputs for one random upstream gradient."""
    assert ours.shape == truth.shape, place
    assert (ours - truth).abs().max() <= 2e-6, place
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(truth, inputs, upstream.double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5, place


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "wide values"])
def test_chunks_equal_the_full_mask(kind, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK", 16)
    torch.manual_seed(3)
    shapes = [(1, 0), (1, 30), (16, 5), (17, 0), (33, 64), (40, 3)]
    with packed.fresh_tables():
        for window in (None, 1, 16, 40):
            for queries, offset in shapes:
                keys = queries + offset
                width = 12 if kind == "wide values" else 8
                q = torch.randn(1, 4, queries, 8, requires_grad=True)
                k = torch.randn(1, 2, keys, 8, requires_grad=True)
                v = torch.randn(1, 2, keys, width, requires_grad=True)
                sinks = torch.randn(4, requires_grad=True) if kind == "sinks" else None
                rule = sdpa.ScoreRule(0.7, window, 1.5 if kind == "softcap" else None, sinks)
                inputs = [x for x in (q, k, v, sinks) if x is not None]
                ours, truth = sdpa.attend_range(q, k, v, rule), full_mask_attention(q, k, v, rule)
                assert ours.dtype == q.dtype
                assert_same(ours, truth, inputs, (window, queries, offset))


def test_long_rows_build_no_square_mask():
    """Prompt 2048, response 2048: the largest tensor is a chunk's mask, not [2048, 4096]."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in filter(torch.is_tensor, tree_leaves(out)):
                largest = max(largest, t.untyped_storage().nbytes())
            return out

    q, kv = torch.randn(1, 2, 4096, 8), torch.randn(1, 1, 4096, 8)
    segments = segments_of((2048,), ((2048,),))
    with Watch():
        packed.packed_attention_forward(torch.nn.Identity(), q, kv, kv, una_segments=segments)
    assert largest <= 4 * sdpa.CHUNK * 4096


def test_masks_made_in_inference_mode_serve_training():
    call = partial(
        packed.packed_attention_forward,
        torch.nn.Identity(),
        una_segments=segments_of((3,), ((6,),)),
    )
    with packed.fresh_tables():
        with torch.inference_mode():
            q = torch.randn(1, 2, 9, 8)
            call(q, q, q)
        q = torch.randn(1, 2, 9, 8, requires_grad=True)
        call(q, q, q)[0].sum().backward()
    assert q.grad is not None


def test_autocast_gives_its_dtype():
    q = torch.randn(1, 2, 9, 8)
    segments = segments_of((3,), ((6,),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed.packed_attention_forward(
            torch.nn.Identity(), q, q, q.bfloat16(), una_segments=segments
        )
    assert out.dtype == torch.bfloat16


# ---- varlen kernels: stand-ins with their signatures -------------------------------------------


def varlen_truth(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window, softcap=0.0, shift=0):
    """The kernels' documented result: [T, H, D], causal from the lower right. `shift`: wrong."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
    assert window[1] == 0, "causal"
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k)) and all(x.stride(-1) == 1 for x in (q, k, v))
    size = None if window[0] < 0 else window[0] + 1
    rule = sdpa.ScoreRule(scale, size, softcap or None, None)
    outputs = []
    for i in range(len(cu_q) - 1):
        states = (
            x[cu[i] : cu[i + 1]].transpose(0, 1)[None].double()
            for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        outputs.append(full_mask_attention(*states, rule, shift)[0].transpose(0, 1).to(q.dtype))
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
        return varlen.flash_attn_kernel()
    install(monkeypatch, torch_varlen=KERNELS[name])
    return varlen.torch_kernel()


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


def separate_attention(q, k, v, segments, rule):
    """[1, T, H, D]: every response after its prompt as a sequence of its own, in float64."""
    outputs = []
    for (start, end), responses in segments:
        for i, (first, last) in enumerate(responses):
            columns = torch.cat([torch.arange(start, end), torch.arange(first, last)])
            out = full_mask_attention(*(x[:, :, columns] for x in (q, k, v)), rule)
            outputs.append(out if i == 0 else out[:, :, end - start :])
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "softcap"), [*((name, None) for name in KERNELS), ("flash-attn", 1.5)]
)
def test_varlen_path_is_separate_attention(name, softcap, monkeypatch):
    kernel = kernel_of(monkeypatch, name)
    segments = segments_of(PROMPTS, RESPONSES)
    total = segments[-1].responses[-1][1]
    layout = rows.row_layout(segments, total)
    torch.manual_seed(4)
    windows = (None, 1, 9, 12, 18, 1000)
    for heads, kv_heads, window in [*((4, 2, w) for w in windows), (4, 4, 4), (6, 1, 4)]:
        rule = sdpa.ScoreRule(0.4, window, softcap, None)
        qkv = [torch.randn(1, n, total, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
        ours = varlen.attend_varlen(*qkv, layout, rule, kernel.call)
        truth = separate_attention(*qkv, segments, rule)
        assert ours.shape == (1, total, heads, 8)
        assert_same(ours, truth, qkv, (heads, kv_heads, window))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("MistralConfig", "flash-attn"),
        ("Gemma2Config", "flash-attn"),
        ("GraniteConfig", "torch 2.11"),
        ("MistralConfig", "torch 2.13"),
        ("Gemma2Config", "torch 2.13"),
    ],
)
def test_models_through_a_varlen_kernel(name, kernel, monkeypatch):
    """Scaling, windows and softcaps reach the kernel; without a softcap (torch's) SDPA serves."""
    model = build(name)
    ids, positions, segments, sequences = packed_row()
    calls = []
    function = kernel_of(monkeypatch, kernel)

    def counted(*args, **kwargs):
        calls.append(1)
        return function.call(*args, **kwargs)

    # float32, for a sharp comparison
    served = function._replace(call=counted, dtypes=(torch.float32,))
    forward = partial(packed.packed_attention_forward, kernel=served)
    monkeypatch.setitem(ATTENTIONS, PACKED, forward)
    states = hidden_packed(model, ids, positions, segments)
    for columns, truth in zip(sequences, hidden_separate(model, ids, sequences), strict=True):
        assert (states[columns] - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max())
    served_all = name != "Gemma2Config" or function.softcap
    assert len(calls) >= served_all * model.config.num_hidden_layers
    assert served_all or not calls


def test_a_kernel_runs_on_its_dtypes_alone(monkeypatch):
    """A kernel handed over for half precision (the planner's) leaves a float32 model to SDPA."""
    kernel = kernel_of(monkeypatch, "flash-attn")._replace(call=None)
    q = torch.randn(1, 2, 6, 8)
    segments = segments_of((3,), ((3,),))
    run = partial(packed.packed_attention_forward, torch.nn.Identity(), una_segments=segments)
    assert torch.equal(run(q, q, q, kernel=kernel)[0], run(q, q, q)[0])


def shifted(shift):
    return lambda *args, softmax_scale, causal, window_size, softcap: varlen_truth(
        *args, scale=softmax_scale, window=window_size, softcap=softcap, shift=shift
    )


def upper_left(q, k, v, cu_q, cu_k, *lengths, softmax_scale, causal, window_size, softcap):
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    outputs = []
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        mask = torch.ones(len(a), len(b), dtype=torch.bool).tril()
        a, b, c = (x.transpose(0, 1)[None].float() for x in (a, b, c))
        out = F.scaled_dot_product_attention(a, b, c, mask, scale=softmax_scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def window_one_off(*args, window_size, **kwargs):
    left = window_size[0]
    return flash_attn_varlen_func(*args, window_size=(left + (left > 0), 0), **kwargs)


def no_gradient(q, *args, **kwargs):
    return flash_attn_varlen_func(q, *args, **kwargs).detach() + 0 * q


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("nan"))


def nan_gradient(q, k, v, *args, **kwargs):
    return flash_attn_varlen_func(q, k, NanGradient.apply(v), *args, **kwargs)


def too_old(
    q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, window_size=(-1, -1)
):
    raise AssertionError("called without the softcap")


def no_kernel(*_, **__):
    raise RuntimeError("only supports Ampere GPUs or newer")


WRONG_KERNELS = {
    "a key more": shifted(-1),
    "a key less": shifted(1),
    "upper left": upper_left,
    "window one off": window_one_off,
    "no gradient": no_gradient,
    "NaN in the last gradient": nan_gradient,
    "too old": too_old,
    "no kernel": no_kernel,
}


def chosen_kernel():
    varlen.varlen_kernel.cache_clear()
    try:
        kernel = varlen.varlen_kernel(torch.device("cpu"))
    finally:
        varlen.varlen_kernel.cache_clear()
    return kernel and kernel.name


@pytest.mark.parametrize("wrong", WRONG_KERNELS)
def test_a_wrong_kernel_is_passed_over(wrong, monkeypatch, caplog):
    """A kernel that aligns its masks elsewhere, or fails here, does not get to train anything."""
    caplog.set_level("INFO", logger="una_fast")
    install(monkeypatch, flash=WRONG_KERNELS[wrong], torch_varlen=varlen_attn_2_13)
    assert chosen_kernel() == "torch.nn.attention.varlen"
    assert "does not use flash-attn on cpu: " in caplog.text


def test_the_first_right_kernel_is_used(monkeypatch, caplog):
    caplog.set_level("INFO", logger="una_fast")
    install(monkeypatch, flash=flash_attn_varlen_func, torch_varlen=varlen_attn_2_13)
    assert chosen_kernel() == "flash-attn" and "does not use" not in caplog.text
    install(monkeypatch, torch_varlen=no_kernel)
    assert chosen_kernel() is None
    install(monkeypatch)
    assert chosen_kernel() is None


def test_keys_are_repeated_as_little_as_possible():
    """Calls get at most as many keys as the row has tokens; one response costs no copy at all."""
    seen = []

    def kernel(q, k, v, *_, rule):
        seen.append(k)
        return q

    def calls(prompts, responses):
        segments = segments_of(prompts, responses)
        total = segments[-1].responses[-1][1]
        seen.clear()
        q = torch.arange(total * 8.0).view(1, total, 4, 2).transpose(1, 2)
        k = torch.randn(1, 2, total, 2)
        rule = sdpa.ScoreRule(1.0, None, None, None)
        out = varlen.attend_varlen(q, k, k, rows.row_layout(segments, total), rule, kernel)
        assert torch.equal(out, q.transpose(1, 2)), "the outputs stand in the row's order"
        assert all(len(keys) <= total for keys in seen)
        storage = k.untyped_storage().data_ptr()
        copied = [len(x) for x in seen if x.untyped_storage().data_ptr() != storage]
        return [len(keys) for keys in seen], sum(copied)

    assert calls((100, 7), ((5,), (3,))) == ([115], 0)
    assert calls((100,), ((5, 7),)) == ([105, 107], 107)
    assert calls((100,), ((5, 7, 9),)) == ([105, 107, 109], 107 + 109)
    assert calls((10, 10), ((50, 70), (30, 40))) == ([60 + 80 + 40, 50], 230)


def test_varlen_is_used_only_where_it_is_right():
    kernel = varlen.VarlenKernel("kernel", None, softcap=False)
    half = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    plain = sdpa.ScoreRule(1.0, None, None, None)
    refusal = varlen.varlen_refusal
    assert refusal(half, half, plain, kernel) is None
    assert "precision" in refusal(half.float(), half.float(), plain, kernel)
    assert "head sizes" in refusal(half, half[..., :32], plain, kernel)
    assert "softcap" in refusal(half, half, plain._replace(softcap=2.0), kernel)
    assert refusal(half, half, plain._replace(softcap=2.0), kernel._replace(softcap=True)) is None
    assert "sinks" in refusal(half, half, plain._replace(sinks=torch.zeros(1)), kernel)
    assert refusal(half, half, plain, None)


def test_cached_tables_are_forgotten_around_a_block():
    """Tables without numbers, or made outside of a count, must not be met on the other side."""
    layout = rows.row_layout(segments_of((3,), ((3, 2),)), 8)
    device = torch.device("cpu")

    def tables():
        return sdpa.mask_table(512, 7, torch.float32, device), varlen.varlen_calls(
            layout, 7, device
        )

    before = tables()
    assert all(map(lambda a, b: a is b, before, tables()))
    with packed.fresh_tables():
        inside = tables()
    after = tables()
    for first, second in pairwise((before, inside, after)):
        assert all(a is not b for a, b in zip(first, second, strict=True))
