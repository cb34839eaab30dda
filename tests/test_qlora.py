"""Adapters on a base at 4 bits: the format, the layers, and two ranks against one process."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from families import build
from fsdp_worker import run_case
from ranks import needs_sharded_integers, run_cases, saved_weights, worst_error
from runs import open_trainer
from tiny import make_config, make_records, make_tokenizer, read_metrics, write_jsonl
from una_fast.capacity.trace import Row, StepTracer
from una_fast.config import RunConfig
from una_fast.counters import LiveBytes
from una_fast.distributed import SHARDS_INTEGERS
from una_fast.guide.merge import merge
from una_fast.guide.settings import MergeConfig
from una_fast.logs import say_once
from una_fast.model.directory import ModelError
from una_fast.model.four_bits import Nf4Linear, pack_base, pack_linears, packed_layers
from una_fast.model.head_probe import HeadSpec
from una_fast.model.nf4 import BLOCK, LEVELS, bytes_of_row, dequantize, quantize
from una_fast.model.policy import load_policy, make_policy
from una_fast.model.settings import LoraOptions
from una_fast.resolved import find_facts, resolve
from una_fast.train.precompute import precompute_reference

LORA = LoraOptions(r=4, alpha=8)

# ---- the format ----


def test_levels_are_quantiles_of_the_normal_distribution():
    """8 steps above zero and 7 below, between 1/2 and the mean of 1 - 1/30 and 1 - 1/32."""
    last = 1 - (1 / 30 + 1 / 32) / 2

    def quantiles(steps: int) -> list[float]:
        step = (last - 0.5) / steps
        return [NormalDist().inv_cdf(0.5 + step * (k + 1)) for k in range(steps)]

    above, below = quantiles(8), quantiles(7)
    expected = [-value for value in reversed(below)] + [0.0] + above
    largest = above[-1]
    assert pytest.approx([value / largest for value in expected], abs=1e-6) == list(LEVELS)


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 101, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_becomes_its_nearest_level(columns, dtype):
    """Against a search over all levels in float64, block by block; and the bound that follows."""
    torch.manual_seed(columns)
    weight = (torch.randn(7, columns) * torch.logspace(-30, 20, 7)[:, None]).to(dtype)
    weight[3, : columns // 2] = 0
    packed = quantize(weight)
    assert packed.shape == (7, bytes_of_row(columns)) and packed.dtype == torch.uint8
    found = dequantize(packed, columns, torch.float64)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    gap = levels.diff().max() / 2
    for start in range(0, columns, BLOCK):
        block = weight[:, start : start + BLOCK].double()
        absmax = block.abs().amax(dim=1)[:, None, None]
        candidates = levels * absmax
        errors = (block[..., None] - candidates).abs()
        error = (found[:, start : start + BLOCK] - block).abs()
        slack = 1e-6 * absmax[..., 0]
        assert (error <= errors.amin(dim=-1) + slack).all(), "not the nearest"
        assert (error <= gap * absmax[..., 0] + slack).all()
        assert ((error == 0) | (block.abs() < absmax[..., 0])).all(), "the largest is kept"


def test_a_byte_holds_the_first_of_two_codes_in_its_high_bits():
    """As bitsandbytes and torchao have them."""
    weight = torch.tensor([LEVELS[3:7]]) * 8
    weight[0, 0] = -8.0
    packed = quantize(weight)[0]
    assert packed[:2].tolist() == [0 << 4 | 4, 5 << 4 | 6]
    assert packed[2:].clone().view(torch.float32).tolist() == [8.0]


def test_rows_are_packed_alike_wherever_they_are_cut(monkeypatch):
    weight = torch.randn(23, 101)
    whole = quantize(weight)
    for cut in (0, 1, 11, 23):
        assert torch.equal(torch.cat([quantize(weight[:cut]), quantize(weight[cut:])]), whole)
    monkeypatch.setattr("una_fast.model.nf4.NUMBERS_AT_ONCE", 300)
    assert torch.equal(quantize(weight), whole)
    numbers = dequantize(whole, 101, torch.bfloat16)
    for row in (0, 7, 22):
        assert torch.equal(dequantize(whole[row : row + 1], 101, torch.bfloat16)[0], numbers[row])
    assert dequantize(whole[:0], 101, torch.bfloat16).shape == (0, 101)


# ---- the layer ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_layer_is_the_layer_of_its_numbers(bias, autocast):
    """Forward and backward, with a random upstream; the numbers are rounded once."""
    torch.manual_seed(0)
    plain = nn.Linear(101, 37, bias=bias).requires_grad_(False)
    ours = Nf4Linear(plain)
    with torch.no_grad():
        plain.weight.copy_(ours.unpacked())
    x = torch.randn(2, 5, 101)
    outs = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(leaf)
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape).to(out.dtype))
        outs.append((out.detach(), leaf.grad))
    assert outs[0][0].dtype == outs[1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for mine, expected in zip(*outs, strict=True):
        assert torch.equal(mine, expected)


def test_numbers_live_as_long_as_a_product():
    """Between forward and backward neither a weight nor an index of a code is kept."""
    layers = nn.Sequential(*[Nf4Linear(nn.Linear(256, 256, bias=False)) for _ in range(8)])
    x = torch.randn(4, 256, requires_grad=True)
    whole = 4 * 256 * 256
    with LiveBytes() as held:
        out = layers(x).sum()
        kept = held.live()
        out.backward()
    assert kept < whole / 4
    assert held.peak() < 5 * whole, "one weight at a time, with the indices of its codes"


# ---- a model ----


def save_ragged(directory: Path, *, tied: bool = False, layers: int = 2) -> str:
    """Save a Llama whose rows end in short blocks, and shard unevenly; and its tokenizer."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=72,
        intermediate_size=101,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("qlora")


@pytest.fixture(scope="module")
def models(root):
    return {"untied": save_ragged(root / "untied"), "tied": save_ragged(root / "tied", tied=True)}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_linear_layers_are_packed_and_the_rest_is_not(models, name):
    policy = load_policy(models[name], dtype=torch.bfloat16, lora=LORA, quantize_base="nf4")
    packed = dict(packed_layers(policy.causal_lm))
    assert len(packed) == 2 * 7
    assert all(layer.numbers == torch.bfloat16 for layer in packed.values())
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    for n, p in policy.model.named_parameters():
        is_packed = n.endswith("_proj.base_layer.weight")
        wanted = torch.uint8 if is_packed else torch.float32 if n in trained else torch.bfloat16
        assert p.dtype == wanted, n
    assert policy.head.weight.dtype == torch.bfloat16
    # 4 bits a number and a float32 a block, of storages; rows of 72 and 101 end in short blocks.
    numbers = sum(layer.in_features * layer.out_features for layer in packed.values())
    nbytes = sum(layer.weight.untyped_storage().nbytes() for layer in packed.values())
    blocks = sum(-(-layer.in_features // 64) * layer.out_features for layer in packed.values())
    assert nbytes == pytest.approx(numbers / 2 + 4 * blocks, rel=0.01)


def test_full_blocks_take_four_and_a_half_bits():
    layer = Nf4Linear(nn.Linear(512, 64, bias=False))
    assert layer.weight.untyped_storage().nbytes() == 4.5 / 8 * 512 * 64


def test_a_line_says_what_stays_numbers(caplog):
    """A warning, where that is most of the model."""
    for family, level, kind in (
        ("GptOssConfig", logging.WARNING, "Experts"),
        ("MiniCPM3Config", logging.INFO, "Embedding"),
    ):
        say_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            pack_base(build(family), family)
        (line,) = [r for r in caplog.records if "at 4 bits" in r.getMessage()]
        assert line.levelno == level and kind in line.getMessage(), line.getMessage()


def test_models_without_plain_linear_layers_are_refused():
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no plain linear layers"):
        pack_linears(build("GPT2Config"), "x")


def test_a_packed_model_is_not_packed_again():
    model = build("LlamaConfig")
    pack_linears(model, "x")
    with pytest.raises(ModelError, match="is quantized already; leave quantize_base out"):
        pack_linears(model, "x")


def test_shared_and_wider_layers_stay_numbers():
    model = build("LlamaConfig").bfloat16()
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    second.self_attn.q_proj.float()
    pack_linears(model, "x")
    packed = {name for name, _ in packed_layers(model)}
    assert len(packed) == 14 - 3
    assert not any("up_proj" in name for name in packed)
    assert "model.layers.1.self_attn.q_proj" not in packed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": None}, "quantize_base=nf4: weights at 4 bits are not trained; set lora"),
        ({"quantize_base": "int4"}, "quantize_base"),
        ({"quantize_base": None, "lora": {"target_modules": ["lm_head"]}}, "adapted head"),
        ({"lora": {"target_modules": ["lm_head"]}}, "adapted head"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(models, tmp_path, settings, message):
    data = write_jsonl(tmp_path / "data.jsonl", make_records("pairs", 2))
    with pytest.raises(ValueError, match=message):
        open_trainer(make_config(models["untied"], data, tmp_path / "run", **QLORA | settings))


def test_a_torch_that_shards_no_integers_is_refused(models, tmp_path, monkeypatch):
    """Before anything is loaded; in one process it serves."""
    monkeypatch.setattr("una_fast.resolved.SHARDS_INTEGERS", False)
    data = write_jsonl(tmp_path / "data.jsonl", make_records("pairs", 2))
    config = make_config(models["untied"], data, tmp_path / "run", **QLORA)
    resolve(config, find_facts(config, [], device="cpu"))
    with pytest.raises(ValueError, match="quantize_base=nf4 on 2 ranks needs torch 2.12 or newer"):
        resolve(config, find_facts(config, [], device="cpu", ranks=2))


def test_a_server_samples_from_another_base(models, tmp_path):
    settings = {
        "mode": "online",
        "rewards": ["reward_functions.py:brief"],
        "generation": "vllm_server",
        "generation_server": {"url": "http://127.0.0.1:1"},
    }
    with pytest.raises(ValueError, match="samples from a base of its own precision"):
        make_config(models["untied"], "x.jsonl", tmp_path, **QLORA, **settings)


def test_trained_copies_of_modules_are_off_in_the_reference():
    """modules_to_save of an adapter, beside its low-rank factors."""
    model = build("LlamaConfig")
    ids = torch.arange(3, 15)[None]
    before = model.eval()(ids).logits.detach()
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    policy = make_policy(get_peft_model(model, adapter), HeadSpec(model))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.5)
    policy.model.eval()
    assert (policy.causal_lm(ids).logits - before).abs().max() > 1e-2
    with policy.reference_mode():
        assert torch.equal(policy.causal_lm(ids).logits, before)


# ---- runs ----

QUIET = {"progress": False, "write_report": False, "loggers": [], "device": "cpu"}
QLORA = {"lora": {"r": 4, "alpha": 8}, "quantize_base": "nf4"}
STEPS = 10
SGD = {
    **QUIET,
    **QLORA,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": None,
    "beta": 0.2,
    "batch_size": 3,
    "micro_batch_size": 2,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
}
SWITCHES = {"mlp_tile": 7, "gradient_checkpointing": True, "offload_activations": True}
ON_EMBEDDING = {"r": 4, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}
FEW = {"max_steps": 2}

# Long, with a rank without records in the last step; padded rows of a tied model, tiled MLPs and
# recomputed layers; a frozen copy as reference; an adapter on the embedding.
SAME = ("long", "switches", "frozen", "embedding")


@pytest.fixture(scope="module")
def cases(root, models):
    """{name: settings without output_dir}"""
    records = make_records("mixed", 3 * (STEPS - 1) + 1)
    data = {"data": write_jsonl(root / "many.jsonl", records)}
    untied = {"model": models["untied"], **data} | SGD
    return {
        "long": untied | {"save_every": 6},
        "switches": untied | SWITCHES | {"model": models["tied"], "packing": False, "max_steps": 3},
        "frozen": untied | FEW | {"reference": "frozen"},
        "embedding": untied | FEW | {"lora": ON_EMBEDDING},
        "bf16": untied | FEW | {"precision": "bf16"},
    }


@pytest.fixture(scope="module")
def two_ranks(cases, root):
    if not SHARDS_INTEGERS:
        pytest.skip("FSDP2 shards packed codes from torch 2.12 on")
    todo = {}
    for name, settings in cases.items():
        todo[name] = {"config": settings | {"output_dir": str(root / "two" / name)}}
    run_cases(todo, root, 2)
    return {name: root / "two" / name for name in todo}


@pytest.fixture(scope="module")
def one_process(cases, root):
    """(output directory, record of the run) of a case in this process, made once."""
    made = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            out = root / "one" / name
            made[name] = out, run_case(cases[name] | {"output_dir": str(out)})
            torch.set_num_threads(threads)
        return made[name]

    return get


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_are_one_process(two_ranks, one_process, name):
    """Every gradient, every metric, and the saved adapter."""
    out, expected = one_process(name)
    seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
    assert seen["in_shards"] == (2 if name == "frozen" else 1)
    assert len(seen["gradients"]) == len(expected["gradients"]) > 0
    for step, (ours, theirs) in enumerate(
        zip(seen["gradients"], expected["gradients"], strict=True), start=1
    ):
        assert worst_error(ours, theirs) <= 1e-5, f"step {step}"
    for ours, theirs in zip(read_metrics(two_ranks[name]), read_metrics(out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert worst_error(saved_weights(two_ranks[name]), saved_weights(out)) <= 1e-5


def test_gathered_codes_are_not_cast(two_ranks, one_process):
    """bf16 products, fp32 adapters and codes are in one group of FSDP2."""
    sharded, alone = read_metrics(two_ranks["bf16"]), read_metrics(one_process("bf16")[0])
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


def test_one_process_resumes_what_two_ranks_began(two_ranks, cases, tmp_path):
    """The identity of the reference covers the packed base, sharded or whole."""
    run = tmp_path / "run"
    shutil.copytree(two_ranks["long"] / "checkpoint-6", run / "checkpoint-6")
    settings = cases["long"] | {"output_dir": str(run), "resume": True}
    with pytest.raises(ValueError, match="quantize_base was nf4 and is None"):
        run_case(settings | {"quantize_base": None})  # before a model is loaded
    run_case(settings)
    assert worst_error(saved_weights(run), saved_weights(two_ranks["long"])) <= 1e-5


def test_training_is_that_of_a_model_with_the_numbers_of_the_base(cases, one_process, tmp_path):
    """A plain base with the dequantized numbers gives the run; the base as stored another."""
    policy = load_policy(cases["long"]["model"], dtype=torch.float32, quantize_base="nf4")
    plain = AutoModelForCausalLM.from_pretrained(cases["long"]["model"])
    with torch.no_grad():
        for name, layer in packed_layers(policy.causal_lm):
            plain.get_submodule(name).weight.copy_(layer.unpacked())
    plain.save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    settings = cases["long"] | {"quantize_base": None, "max_steps": 3}
    changed = settings | {"model": str(tmp_path / "plain"), "output_dir": str(tmp_path / "same")}
    stored = settings | {"output_dir": str(tmp_path / "stored")}
    expected = one_process("long")[1]["gradients"][:3]
    for ours, theirs in zip(run_case(changed)["gradients"], expected, strict=True):
        assert worst_error(ours, theirs) <= 1e-5
    assert worst_error(run_case(stored)["gradients"][0], expected[0]) > 1e-2


@pytest.mark.parametrize("name", ["long", "bf16"])
def test_merged_weights_are_those_of_the_trained_policy(one_process, tmp_path, name):
    """`una-fast merge` adds the adapter to the numbers that it was trained on, also of a base in
    float32 that was rounded before it was packed.
    """
    out, _ = one_process(name)
    merge(MergeConfig(run=str(out), output_dir=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    policy = load_policy(out, dtype=torch.float32, quantize_base="nf4")
    policy.model.eval()
    ids = torch.tensor([[0, 5, 6, 9, 14]])
    with torch.no_grad():
        ours, theirs = merged(ids).logits, policy.causal_lm(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert "base at 4 bits" in (out / "README.md").read_text(encoding="utf-8")
    form = json.loads((out / "base_form.json").read_text())
    assert form == {
        "quantize_base": "nf4",
        "packed_from": "bfloat16" if name == "bf16" else "float32",
    }
    if name == "bf16":
        layers = dict(packed_layers(policy.causal_lm))
        base = AutoModelForCausalLM.from_pretrained(
            policy.model.peft_config["default"].base_model_name_or_path
        )
        for place, layer in layers.items():
            weight = base.get_submodule(place.replace(".base_layer", "")).weight
            assert torch.equal(layer.weight, quantize(weight.bfloat16())), place


def test_an_adapter_goes_on_over_the_base_it_was_trained_on(one_process, cases, tmp_path):
    """Refused over plain numbers, wherever the directory lies, with the setting."""
    out, _ = one_process("long")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base_form.json"):
        shutil.copy(out / name, moved / name)
    load_policy(moved, dtype=torch.float32, quantize_base="nf4")
    for in_shards in (False, True):
        with pytest.raises(ModelError, match="trained on its base at 4 bits.*quantize_base: nf4"):
            load_policy(moved, dtype=torch.float32, in_shards=in_shards)
    (moved / "base_form.json").write_text('{"quantize_base": "fp1", "packed_from": "float32"}')
    with pytest.raises(ModelError, match="form of the base that is not known"):
        load_policy(moved, dtype=torch.float32, quantize_base="nf4")


def test_cached_log_probs_belong_to_the_packed_base(cases, tmp_path):
    settings = cases["frozen"] | {"reference": "auto", "output_dir": str(tmp_path / "cache")}
    written = precompute_reference(RunConfig(**settings))
    cached = settings | written | {"output_dir": str(tmp_path / "run")}
    seen = run_case(cached)["gradients"]
    assert seen
    with pytest.raises(ValueError, match="were computed with another model"):
        run_case(cached | {"quantize_base": None, "output_dir": str(tmp_path / "other")})


# ---- the plan ----


@needs_sharded_integers
def test_a_plan_counts_four_bits(tmp_path):
    """Per rank, and of gathered layers: codes are not cast."""
    model = save_ragged(tmp_path / "model", layers=1)
    config = make_config(model, "x.jsonl", tmp_path / "run", precision="bf16", lora=LORA)
    batch = [Row(30, (20, 20)).example()]

    def held(ranks: int, **changes):
        changed = RunConfig(**vars(config) | changes)
        facts = find_facts(changed, [], device="cuda", ranks=ranks)
        return StepTracer(changed, facts).step(batch).categories

    policy = load_policy(model, dtype=torch.bfloat16, lora=LORA, quantize_base="nf4")
    nbytes = sum(p.nbytes for p in policy.model.parameters())
    assert held(1, quantize_base="nf4")["weights"] == pytest.approx(nbytes, rel=0.01)
    two = held(2, quantize_base="nf4")
    assert two["weights"] == pytest.approx(nbytes / 2, rel=0.01)
    layers = [layer for _, layer in packed_layers(policy.causal_lm.model.layers[0])]
    packed = sum(layer.weight.nbytes for layer in layers)
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    saved = held(2)["gathered"] - two["gathered"]
    # Two layers at a time, in shards that torch pads.
    assert saved == pytest.approx(2 * (2 * numbers - packed), rel=0.01)
