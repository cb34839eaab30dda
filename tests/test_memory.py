"""Switches that save memory change no number, and save what they say."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from families import FAMILIES, GPTJ, SMALL, build
from una_fast.counters import LiveBytes, memory_category
from una_fast.model import activations
from una_fast.model.activations import apply_liger, decoder_layers, find_mlps, switch_on, tile_mlps
from una_fast.model.head_forward import _forward_to_scorer, runs_function
from una_fast.model.head_probe import HeadSpec
from una_fast.model.lora import add_lora
from una_fast.model.policy import make_policy
from una_fast.model.settings import LoraOptions, MemoryOptions

TOKENS, TILE = 37, 10
NO_MLP = {"GptOssConfig", "OPTConfig"}  # return their routing too, or have no module for it
NO_CHECKPOINTING = {"JetMoeConfig"}
FLOAT32 = {"GptOssConfig"}  # its grouped products have no double

CHECKPOINTING = MemoryOptions(gradient_checkpointing=True)
OFFLOAD = MemoryOptions(gradient_checkpointing=True, offload_activations=True)
TILES = MemoryOptions(mlp_tile=TILE)
ALL = MemoryOptions(gradient_checkpointing=True, offload_activations=True, mlp_tile=TILE)


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    """Tensors of tests are worth moving."""
    monkeypatch.setattr(activations, "SMALL", 1)


def gradients(model, ids):
    """The loss and all gradients of a model, for a loss with a random upstream gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, use_cache=False).logits
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    loss = (logits * upstream).sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def worst(found, expected):
    """The largest relative error of the loss and of any gradient."""
    assert found[1].keys() == expected[1].keys()
    errors = [(found[0] - expected[0]).abs() / expected[0].abs()]
    for name, g in expected[1].items():
        errors.append((found[1][name] - g).abs().max() / g.abs().max().clamp_min(1e-30))
    return float(max(errors))


def some_ids(rows=2):
    return torch.randint(3, 97, (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def family_model(family):
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    return build(family).to(dtype).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_switches_change_no_number(family):
    """All of them at once, as far as the family allows."""
    model = family_model(family)
    expected = gradients(model, some_ids())
    options = ALL
    if family in NO_MLP:
        options = OFFLOAD
    if family in NO_CHECKPOINTING:
        options = TILES
    switch_on(options, model)
    found = gradients(model, some_ids())
    assert worst(found, expected) <= (1e-11 if options.mlp_tile else 0.0)


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma3TextConfig", "GPT2Config"])
def test_recomputation_is_bitwise(family):
    model = family_model(family)
    expected = gradients(model, some_ids())
    for options in (CHECKPOINTING, OFFLOAD):
        switch_on(options, model)
        assert worst(gradients(model, some_ids()), expected) == 0.0, options


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("GptOssConfig", TILES, "mlp_tile=10: .* has no MLP module that works token by token"),
        ("OPTConfig", ALL, "mlp_tile=10: .* has no MLP module that works token by token"),
        ("JetMoeConfig", OFFLOAD, "does not support .*checkpointing"),
    ],
)
def test_a_switch_that_a_family_lacks_is_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        switch_on(options, build(family))


def test_float32_tiles_agree_to_a_millionth():
    model = build("LlamaConfig").train()
    expected = gradients(model, some_ids())
    tile_mlps(model, find_mlps(model), TILE)
    assert worst(gradients(model, some_ids()), expected) <= 1e-6


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes)).train()


def test_what_mixes_tokens_is_no_mlp():
    """A module in a layer that looks like an MLP and is not must be left alone."""

    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)

        def forward(self, x):
            return self.down(self.up(x).cumsum(1))

    model = llama()
    for layer in decoder_layers(model):
        layer.mlp = Mixer()
    with pytest.raises(ValueError, match="no MLP module"):
        tile_mlps(model, find_mlps(model), 8)


def test_tiles_never_hold_all_tokens_at_the_inner_width():
    rows, inner = 900, 64 * 4
    model = llama(hidden_size=64, intermediate_size=inner)
    mlp = decoder_layers(model)[0].mlp
    x = torch.randn(1, rows, 64, requires_grad=True)

    def peak():
        gc.collect()
        with LiveBytes() as live:
            mlp(x).sum().backward()
        return live

    whole = peak()
    tile_mlps(model, find_mlps(model), 30)
    tiled = peak()
    assert whole.largest() == rows * inner * 4 and tiled.largest() < rows * inner * 4
    assert tiled.peak() < 0.35 * whole.peak()


def test_checkpointing_runs_a_tiled_mlp_twice_not_three_times():
    """Once in forward, once in backward: recomputing the layer stops before the MLP."""
    model = llama()
    switch_on(MemoryOptions(gradient_checkpointing=True, mlp_tile=TILE), model)
    seen = []
    for layer in decoder_layers(model):
        layer.mlp.gate_proj.register_forward_pre_hook(
            lambda module, given: seen.append(given[0].shape[1])
        )
    gradients(model, some_ids(rows=1))
    assert sum(seen) == 2 * TOKENS * len(decoder_layers(model))


def test_bf16_gradients_of_weights_are_summed_in_fp32():
    """Fifty tiles summed in bf16 would lose three bits; each tile's own product is rounded."""
    model = llama(hidden_size=64, intermediate_size=96)
    mlp = decoder_layers(model)[0].mlp
    x = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    upstream = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(2)).bfloat16()

    def weight_gradients(module, dtype):
        module.zero_grad(set_to_none=True)
        (module(x.to(dtype)) * upstream.to(dtype)).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in module.parameters()])

    mlp.bfloat16()
    truth = weight_gradients(copy.deepcopy(mlp).double(), torch.float64)
    whole = weight_gradients(mlp, torch.bfloat16)
    tile_mlps(model, find_mlps(model), 20)
    tiled = weight_gradients(mlp, torch.bfloat16)
    assert (tiled - truth).norm() <= 1.3 * (whole - truth).norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_tiles(autocast):
    model = add_lora(llama(), LoraOptions(r=4, alpha=8))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(model, some_ids())

    expected = run()
    switch_on(ALL, model.get_base_model())
    found = run()
    assert all("lora_" in name for name in found[1])
    assert worst(found, expected) <= (0.03 if autocast else 1e-5)  # rounding of bf16, of fp32


def test_a_hidden_state_is_not_widened_for_adapters_under_autocast():
    """peft copies each layer's input, [T, inner] too, to the adapter's dtype: 4 bytes a number."""
    base = llama().bfloat16()
    policy = make_policy(add_lora(base, LoraOptions(r=4, alpha=8)), HeadSpec(base))
    layer = decoder_layers(policy.causal_lm)[0].mlp.down_proj
    x = torch.randn(1, 400, SMALL["intermediate_size"], dtype=torch.bfloat16)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), LiveBytes() as live:
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert live.largest() <= 400 * SMALL["intermediate_size"] * 2
    layer(x)  # outside autocast peft's own cast is in force: no mismatch of dtypes


def test_offload_leaves_no_hidden_state_of_a_layer_on_the_device():
    model = llama(num_hidden_layers=6)
    ids = some_ids(rows=1)

    def kept(options):
        copied = copy.deepcopy(model)
        switch_on(options, copied)
        gc.collect()
        with LiveBytes() as live:
            out = copied(input_ids=ids, use_cache=False).logits
        held = {"host": 0, "": 0}
        for serial in live._alive.values():
            held[live.categories[serial]] += live.sizes[serial]
        out.sum().backward()
        return held

    state = TOKENS * SMALL["hidden_size"] * 4
    before, after = kept(CHECKPOINTING), kept(OFFLOAD)
    assert before["host"] == 0 and after["host"] == 6 * state
    assert before[""] - after[""] == 6 * state  # the first input, of the embedding, too


def test_offload_serves_graphs_that_overlap_and_a_kept_graph():
    model = llama()
    expected = [gradients(model, ids[None]) for ids in some_ids()]
    switch_on(OFFLOAD, model)
    model.zero_grad(set_to_none=True)
    losses = []
    for ids in some_ids():  # two forward passes before the first backward
        logits = model(input_ids=ids[None], use_cache=False).logits
        losses.append(
            (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum()
        )
    losses[0].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    for name, p in model.named_parameters():
        wanted = 2 * expected[0][1][name] + expected[1][1][name]
        assert torch.allclose(p.grad, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())), (
            name
        )


def test_offload_copies_in_blocks(monkeypatch):
    """A tensor longer than a block, and not a whole number of them."""
    monkeypatch.setattr(activations, "BLOCK", 4 * 7)
    model = llama()
    expected = gradients(model, some_ids())
    switch_on(OFFLOAD, model)
    assert worst(gradients(model, some_ids()), expected) == 0.0


def test_parts_nest_and_end_with_their_block():
    with LiveBytes() as live:
        a = torch.ones(10)
        with memory_category("outer"):
            b = torch.ones(20)
            with memory_category("inner"):
                c = torch.ones(40)
            d = torch.ones(80)
    assert live.peak_by_category() == {"": 40, "outer": 400, "inner": 160}
    assert live.peak_by_category(without=["outer"]) == {"": 40, "inner": 160}
    live.assign("inner", [a, b])
    assert live.peak_by_category() == {"outer": 320, "inner": 280} and c.numel() + d.numel() == 120


# ---- liger -------------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel on a machine that seems to have a GPU; its patches of modules are put back."""
    pytest.importorskip("liger_kernel.transformers")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return SimpleNamespace(modeling=modeling_llama, rope=modeling_llama.apply_rotary_pos_emb)


def test_liger_patches_layers_and_leaves_the_head(liger):
    model = llama()
    policy = make_policy(model, HeadSpec(model), MemoryOptions(liger=True, mlp_tile=TILE))
    assert runs_function(policy.causal_lm, _forward_to_scorer), "scoring runs inside this forward"
    layer = decoder_layers(model)[0]
    assert "liger" in layer.input_layernorm.forward.__func__.__module__
    assert "liger" in layer.mlp.forward.run.__func__.__module__, "tiles are those of liger's MLP"
    # Other models of the family, and tensors on the CPU, are served as before.
    assert "transformers" in liger.modeling.LlamaRMSNorm.__module__
    x, angles = torch.randn(1, 4, 6, 8), torch.randn(1, 6, 8)
    assert liger.modeling.apply_rotary_pos_emb is not liger.rope
    for mine, theirs in zip(
        liger.modeling.apply_rotary_pos_emb(x, x, angles, angles),
        liger.rope(x, x, angles, angles),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_liger_is_refused_where_it_cannot_run(liger, monkeypatch):
    config = transformers.GPTJConfig(**GPTJ)
    with pytest.raises(ValueError, match="no kernels for the model type gptj; set liger=false"):
        apply_liger(transformers.GPTJForCausalLM(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="liger=true needs a GPU"):
        apply_liger(llama())
