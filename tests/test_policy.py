"""The policy scores what the model itself computes, or refuses: tiny random-weight models of every family."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.cohere import CohereForCausalLM
from transformers.models.llama import LlamaForCausalLM
from una_fast.model.head_probe import probe_head

from una_fast.attention.rows import Segment
from una_fast.head.ops import token_logps
from una_fast.model import loading
from una_fast.model.export import save_pretrained
from una_fast.model.loading import load_causal_lm, load_tokenizer
from una_fast.model.lora import add_lora
from una_fast.model.policy import install_scorer, load_policy
from una_fast.model.settings import LoraOptions, MemoryOptions

VOCAB = 131
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# family -> (model type, config, softcap, logit_scale)
FAMILIES = {
    "llama": ("llama", HEADS, None, 1.0),
    "llama-tied": ("llama", HEADS | {"tie_word_embeddings": True}, None, 1.0),
    "qwen2": ("qwen2", {}, None, 1.0),
    "qwen3": ("qwen3", HEADS, None, 1.0),
    "mistral": ("mistral", HEADS, None, 1.0),
    "gemma2": ("gemma2", HEADS | {"final_logit_softcapping": 7.0}, 7.0, 1.0),
    "gemma3": ("gemma3_text", HEADS, None, 1.0),
    "gemma3-softcap": ("gemma3_text", HEADS | {"final_logit_softcapping": 9.0}, 9.0, 1.0),
    "cohere": ("cohere", {"logit_scale": 0.25}, None, 0.25),
    "granite": ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.5}, None, 0.125),
    "hyperclovax": ("hyperclovax", HEADS | {"logits_scaling": 0.5}, None, 0.5),
    "minicpm3": (
        "minicpm3",
        {
            "num_key_value_heads": 4,
            "dim_model_base": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        None,
        0.25,
    ),
    "phi": ("phi", {}, None, 1.0),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}, None, 1.0),
    "gpt2": ("gpt2", GPT, None, 1.0),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, None, 1.0),
}
# Prompt length, response length: right-padded to 11 tokens.
SHAPES = [(4, 7), (3, 2), (5, 5)]


def build(family: str, dtype: torch.dtype = torch.float32):
    """A random model whose logits are large enough for a softcap and a bias to matter."""
    kind, extra, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(SIZES | extra)), dtype=dtype
    )
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> directory of the saved model."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    longest = max(map(sum, SHAPES))
    ids, mask = (
        torch.zeros(len(SHAPES), longest, dtype=torch.int64),
        torch.zeros(len(SHAPES), longest, dtype=torch.int64),
    )
    rows, targets = [], []
    for i, (prompt, response) in enumerate(SHAPES):
        ids[i, : prompt + response] = torch.randint(
            3, VOCAB, (prompt + response,), generator=generator
        )
        mask[i, : prompt + response] = 1
        rows.append(i * longest + torch.arange(prompt - 1, prompt + response - 1))
        targets.append(ids[i, prompt : prompt + response])
    positions = torch.arange(longest).expand_as(ids).contiguous()
    return SimpleNamespace(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        segments=None,
        rows=torch.cat(rows),
        targets=torch.cat(targets),
    )


def full_logps(model, batch):
    """[N] from the model's own logits, one unpadded sequence at a time."""
    logps = []
    for i, (prompt, response) in enumerate(SHAPES):
        ids = batch.input_ids[i : i + 1, : prompt + response]
        logp = (
            model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].float().log_softmax(-1)
        )
        logps.append(logp.gather(1, ids[0, prompt:, None])[:, 0])
    return torch.cat(logps)


def scorer_of(policy, batch):
    def scorer(hidden, weight, bias):
        head = policy.head
        return token_logps(
            hidden, weight, batch.targets, bias, softcap=head.softcap, logit_scale=head.logit_scale
        )

    return scorer


def score(policy, batch):
    return policy.score(batch, scorer_of(policy, batch))


def weighted(logps):
    return (logps * torch.linspace(-1, 1, logps.numel())).sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, truth):
    assert ours.keys() == truth.keys() and truth
    for name in truth:
        # Relative to the largest entry; a key projection's bias has a zero gradient but for rounding.
        torch.testing.assert_close(
            ours[name], truth[name], rtol=0, atol=1e-5 * float(truth[name].abs().max()) + 1e-6
        )


def perturb(policy):
    """Move the adapters away from their start, where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_own(family, saved, batch):
    policy = load_policy(saved(family), dtype=torch.float32)
    truth_model = AutoModelForCausalLM.from_pretrained(saved(family))
    assert (policy.head.softcap, policy.head.logit_scale) == FAMILIES[family][2:]

    ours, truth = score(policy, batch), full_logps(truth_model, batch)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-5)
    weighted(ours).backward()
    weighted(truth).backward()
    assert_same_gradients(gradients(policy.causal_lm), gradients(truth_model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "hyperclovax", "gptj"])
def test_probe_in_half_precision(family, dtype):
    head = probe_head(build(family, dtype))
    assert (head.softcap, head.logit_scale) == FAMILIES[family][2:]


@pytest.mark.parametrize("family", ["gptj", "llama-tied"])
def test_probe_leaves_no_trace(family):
    model = build(family)
    model.train()
    next(model.children()).eval()

    def draw_numbers(*_):  # as some models do
        torch.rand(1)

    draw = model.register_forward_pre_hook(draw_numbers)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    probe_head(model)
    draw.remove()
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def test_softcap_shows_in_an_untrained_model():
    # With logits of 0.1, softcap 30 changes the fp32 logits by 4e-6: invisible unless the probe stretches them.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **(SIZES | HEADS)))
    assert probe_head(model).softcap == 30.0


# --- refusals --------------------------------------------------------------------------------------------------------


class HiddenScaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden * 0.7))


class Trimmed(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :-3]
        return out


class BiasIgnored(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))

    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.lm_head.weight.T)


class BiasAfterScale(CohereForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))

    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        return SimpleNamespace(
            logits=hidden @ self.lm_head.weight.T * self.logit_scale + self.lm_head.bias
        )


class OtherPositions(LlamaForCausalLM):
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, position_ids=position_ids * 3, **kwargs)


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (HiddenScaled, "computes its logits in an unknown way.*off by"),
        (Trimmed, "gives 128 logits from a head of 131 rows"),
        (BiasIgnored, "computes its logits in an unknown way"),
        (BiasAfterScale, "computes its logits in an unknown way"),
        (OtherPositions, "plain inputs: hidden states differ"),
    ],
)
def test_unknown_heads_are_refused(cls, what):
    torch.manual_seed(0)
    kind = "cohere" if issubclass(cls, CohereForCausalLM) else "llama"
    model = cls(
        AutoConfig.for_model(kind, **(SIZES | {"logit_scale": 0.25} if kind == "cohere" else SIZES))
    )
    with pytest.raises(ValueError, match=f"{cls.__name__} .*{what}"):
        probe_head(model)
    if getattr(model.lm_head, "bias", None) is not None:
        assert not model.lm_head.bias.any(), "the bias is restored when the probe fails"


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        probe_head(AutoModel.from_config(AutoConfig.for_model("llama", **SIZES)))


def test_adapted_head_is_refused(saved):
    with pytest.raises(ValueError, match="LlamaForCausalLM has an adapted head.*target_modules"):
        load_policy(
            saved("llama"),
            dtype=torch.float32,
            lora=LoraOptions(target_modules=["q_proj", "lm_head"]),
        )
    with pytest.raises(ValueError, match="adapted head.*tied"):
        load_policy(
            saved("llama-tied"),
            dtype=torch.float32,
            lora=LoraOptions(target_modules=["embed_tokens"]),
        )


# --- the scorer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
def test_generate_is_unchanged(lora, saved):
    plain = AutoModelForCausalLM.from_pretrained(saved("llama"))
    policy = load_policy(saved("llama"), dtype=torch.float32, lora=lora)
    install_scorer(policy.causal_lm)  # a second time changes nothing
    prompt = torch.tensor([[1, 5, 9, 33]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(policy.model.generate(prompt, **options), plain.generate(prompt, **options))
    assert inspect.signature(policy.causal_lm.forward) == inspect.signature(plain.forward)
    assert torch.equal(policy.causal_lm(prompt).logits, plain(prompt).logits)


def test_a_deep_copy_scores_with_its_own_weights(saved, batch):
    policy = load_policy(saved("llama"), dtype=torch.float32)
    reference = copy.deepcopy(policy)
    before = score(policy, batch)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.mul_(1.1)
    assert torch.equal(score(reference, batch), before)
    assert not torch.allclose(score(policy, batch), before)
    assert reference.head.weight is reference.causal_lm.lm_head.weight


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
def test_gradient_checkpointing(lora, saved, batch):
    def run(checkpointing):
        torch.manual_seed(0)
        policy = load_policy(
            saved("gemma2"),
            dtype=torch.float32,
            lora=lora,
            memory=MemoryOptions(gradient_checkpointing=checkpointing),
        )
        perturb(policy)
        calls = []
        layer = policy.causal_lm.model.layers[0].mlp
        layer.register_forward_hook(lambda *_: calls.append(1))
        weighted(score(policy, batch)).backward()
        return gradients(policy.model), len(calls)

    (plain, once), (recomputed, twice) = run(False), run(True)
    assert (once, twice) == (1, 2), "checkpointing must really recompute"
    assert_same_gradients(recomputed, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
def test_packed_rows_score_as_separate_sequences(lora, checkpointing, saved):
    generator = torch.Generator().manual_seed(4)
    prompt, first, second = (torch.randint(3, VOCAB, (n,), generator=generator) for n in (4, 5, 3))
    targets = torch.cat([first, second])
    padded = SimpleNamespace(
        input_ids=torch.stack(
            [
                torch.cat([prompt, first]),
                torch.cat([prompt, second, torch.zeros(2, dtype=torch.int64)]),
            ]
        ),
        attention_mask=torch.tensor([[1] * 9, [1] * 7 + [0] * 2]),
        position_ids=torch.arange(9).repeat(2, 1),
        segments=None,
        rows=torch.tensor([3, 4, 5, 6, 7, 12, 13, 14]),
        targets=targets,
    )
    packed = SimpleNamespace(
        input_ids=torch.cat([prompt, first, second])[None],
        attention_mask=None,
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]]),
        segments=(Segment((0, 4), ((4, 9), (9, 12))),),
        rows=torch.tensor([3, 4, 5, 6, 7, 3, 9, 10]),
        targets=targets,
    )
    logps, grads = [], []
    for batch in (padded, packed):
        torch.manual_seed(0)
        policy = load_policy(
            saved("gemma2"),
            dtype=torch.float32,
            lora=lora,
            memory=MemoryOptions(gradient_checkpointing=checkpointing),
            packed=True,
        )
        perturb(policy)
        logps.append(score(policy, batch))
        weighted(logps[-1]).backward()
        grads.append(gradients(policy.model))
    torch.testing.assert_close(logps[1], logps[0], rtol=0, atol=1e-5)
    assert_same_gradients(grads[1], grads[0])


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [None, LoraOptions(r=4)], ids=["full", "lora"])
def test_sharded_scoring(lora, saved, batch, mesh):
    def load():
        torch.manual_seed(0)
        policy = load_policy(saved("llama-tied"), dtype=torch.float32, lora=lora)
        perturb(policy)
        return policy

    single, sharded = load(), load()
    for layer in sharded.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded.causal_lm, mesh=mesh)
    for policy in (single, sharded):
        if (
            lora is not None
        ):  # first of all, as in training: the adapters must get their gradients all the same
            with policy.reference_mode(), torch.no_grad():
                score(policy, batch)
        weighted(score(policy, batch)).backward()
    ours = {name: grad.full_tensor() for name, grad in gradients(sharded.model).items()}
    assert_same_gradients(ours, gradients(single.model))


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gptj", "phi"])
def test_all_linear_leaves_the_head_alone(family):
    model = add_lora(build(family, torch.bfloat16), LoraOptions(r=4))
    adapted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapted and adapted
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in adapted)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapter_off_is_the_base_model(saved, batch):
    base = load_policy(saved("gemma2"), dtype=torch.float32)
    policy = load_policy(saved("gemma2"), dtype=torch.float32, lora=LoraOptions(r=4, alpha=8))
    perturb(policy)
    trained = score(policy, batch)
    with policy.reference_mode(), torch.no_grad():
        assert torch.equal(score(policy, batch), score(base, batch))
    assert torch.equal(score(policy, batch), trained)
    weighted(trained).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())
    assert policy.head.weight.grad is None


def test_reference_mode_needs_an_adapter(saved):
    policy = load_policy(saved("llama"), dtype=torch.float32)
    with (
        pytest.raises(ValueError, match="no adapter to switch off.*ref_logps"),
        policy.reference_mode(),
    ):
        pass


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0}, {"target_modules": []}])
def test_lora_options_are_checked(bad):
    with pytest.raises(ValueError, match=f"lora.*{next(iter(bad))}"):
        LoraOptions(**bad)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_removed(tmp_path, batch):
    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gptj", **(SIZES | GPT | {"rotary_dim": 4} | drops))
    )
    model.save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", dtype=torch.float32)
    assert policy.causal_lm.training
    assert torch.equal(score(policy, batch), score(policy, batch))
    torch.testing.assert_close(
        score(policy, batch), full_logps(model.eval(), batch), rtol=0, atol=1e-5
    )
    assert [policy.causal_lm.config.to_dict()[name] for name in drops] == [0.0] * 3


def test_functional_dropout_is_removed(tmp_path, batch):
    # Llama keeps the rate as a number on each attention module.
    config = AutoConfig.for_model("llama", **SIZES, attention_dropout=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(score(policy, batch), score(policy, batch))
    assert policy.causal_lm.config.attention_dropout == 0.0


def test_lora_dropout_of_a_loaded_adapter_is_removed(saved, tmp_path, batch):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved("llama"))
    get_peft_model(
        base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    ).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32)
    perturb(policy)
    assert torch.equal(score(policy, batch), score(policy, batch))
    assert policy.model.peft_config["default"].lora_dropout == 0.0


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


@pytest.mark.parametrize("name", ["{tmp}/none", "./none", "../none", "~/none", "{tmp}/here/none"])
def test_a_missing_directory_is_named(name, tmp_path):
    name = name.format(tmp=tmp_path)
    with pytest.raises(ValueError, match="model directory .*none does not exist; give a directory"):
        load_policy(name, dtype=torch.float32)
    with pytest.raises(ValueError, match="tokenizer directory .*none does not exist"):
        load_tokenizer(name)


def test_a_path_into_an_existing_directory_is_local(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model directory runs/mine does not exist"):
        load_causal_lm("runs/mine", dtype=torch.float32)


def test_hub_names_are_passed_through(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        loading.AutoTokenizer,
        "from_pretrained",
        lambda name, **_: asked.append(name) or tokens,
    )
    tokens = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    assert load_tokenizer("org/name") is tokens and asked == ["org/name"]


def test_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"{tmp_path} has no eos token.*set eos_token in its tokenizer_config.json"
    ):
        load_tokenizer(tmp_path)


def test_tokenizer_without_pad_uses_eos_and_says_so_once(tokenizer, tmp_path, caplog):
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="una_fast.model.loading"):
        assert load_tokenizer(tmp_path).pad_token_id == load_tokenizer(tmp_path).pad_token_id == 2
    assert [r.message for r in caplog.records if "no pad token" in r.message] == [
        f"the tokenizer of {tmp_path} has no pad token; its eos token '</s>' pads"
    ]


# --- saving ----------------------------------------------------------------------------------------------------------


def reload_and_compare(directory, policy, batch):
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(full_logps(model, batch), score(policy, batch), rtol=0, atol=1e-5)
    out = model.generate(
        torch.tensor([[1, 5, 9]]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=4,
        min_new_tokens=4,
    )
    assert out.shape == (1, 7)
    return model


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gptj"])
@pytest.mark.parametrize("gathered", [False, True])
def test_full_model_round_trip(family, gathered, saved, batch, tmp_path, tokenizer):
    policy = load_policy(
        saved(family), dtype=torch.float32, memory=MemoryOptions(gradient_checkpointing=True)
    )
    perturb(policy)
    state = copy.deepcopy(policy.model.state_dict()) if gathered else None
    save_pretrained(policy, tmp_path, tokenizer, state)
    assert state is None or state.keys() == policy.model.state_dict().keys(), (
        "the caller's dict is left as it was"
    )
    assert (tmp_path / "model.safetensors").is_file()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True and config["architectures"] == [
        type(policy.causal_lm).__name__
    ]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"
    reload_and_compare(tmp_path, policy, batch)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gpt2"])
def test_adapter_round_trip(family, gathered, saved, batch, tmp_path, tokenizer):
    policy = load_policy(saved(family), dtype=torch.float32, lora=LoraOptions(r=4, alpha=12))
    perturb(policy)
    before = copy.deepcopy(policy.model.state_dict())
    save_pretrained(policy, tmp_path, tokenizer, before if gathered else None, merged=True)
    assert all(torch.equal(t, before[name]) for name, t in policy.model.state_dict().items())
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "merged",
    }
    reload_and_compare(tmp_path, policy, batch)
    reload_and_compare(tmp_path / "merged", policy, batch)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()

    again = load_policy(tmp_path, dtype=torch.float32)
    assert torch.equal(score(again, batch), score(policy, batch))
    assert len(again.trainable_parameters()) == len(policy.trainable_parameters())
    with pytest.raises(ValueError, match="is an adapter already"):
        load_policy(tmp_path, dtype=torch.float32, lora=LoraOptions())


def test_an_adapter_remembers_its_base_from_anywhere(
    saved, tmp_path, tokenizer, monkeypatch, batch
):
    monkeypatch.chdir(saved("llama").parent)
    policy = load_policy(saved("llama").name, dtype=torch.float32, lora=LoraOptions(r=4))
    save_pretrained(policy, tmp_path / "out", tokenizer)
    monkeypatch.chdir(tmp_path)
    reload_and_compare("out", policy, batch)


def test_an_adapter_without_its_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/gone"})
    )
    with pytest.raises(
        ValueError, match="adapter_config.json: base_model_name_or_path.*/gone does not exist"
    ):
        load_policy(tmp_path, dtype=torch.float32)


def test_prompt_tuning_adapters_are_refused(tmp_path):
    config = {
        "peft_type": "PROMPT_TUNING",
        "base_model_name_or_path": "x",
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match="PROMPT_TUNING.*LoRA"):
        load_policy(tmp_path, dtype=torch.float32)
