"""The policy scores what the model itself computes, or refuses: tiny random models of families."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.models.cohere import CohereForCausalLM
from transformers.models.llama import LlamaForCausalLM

from families import FAMILIES, GPTJ, HEAD_FORMS, SMALL, VOCAB, build, gradient_difference, without
from una_fast.data.examples import Example
from una_fast.feedback import Feedback
from una_fast.head.ops import token_logps
from una_fast.model import loading
from una_fast.model.dropout import remove_dropout, without_dropout
from una_fast.model.export import save_merged, save_pretrained
from una_fast.model.head_probe import probe_head
from una_fast.model.loading import load_causal_lm, load_tokenizer
from una_fast.model.lora import add_lora
from una_fast.model.policy import install_scorer, load_policy, make_policy
from una_fast.model.positions import longer_records
from una_fast.model.quantized import is_plain, quantized_weight, refuse_quantized
from una_fast.model.reference import fingerprint, saved_tensors
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.model.stored import StoredDtypes

# Prompt length, response length: right-padded to 11 tokens.
SHAPES = [(4, 7), (3, 2), (5, 5)]
LORA = LoraOptions(r=4, alpha=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> directory of the saved model."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family.replace(" ", "-"))
            build(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    longest = max(map(sum, SHAPES))
    ids = torch.zeros(len(SHAPES), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    rows, targets = [], []
    for i, (prompt, response) in enumerate(SHAPES):
        total = prompt + response
        ids[i, :total] = torch.randint(3, VOCAB, (total,), generator=generator)
        mask[i, :total] = 1
        rows.append(i * longest + torch.arange(prompt - 1, total - 1))
        targets.append(ids[i, prompt:total])
    return SimpleNamespace(
        input_ids=ids,
        attention_mask=mask,
        position_ids=torch.arange(longest).expand_as(ids).contiguous(),
        segments=None,
        rows=torch.cat(rows),
        targets=torch.cat(targets),
    )


def full_logps(model, batch):
    """[N] from the model's own logits, one unpadded sequence at a time."""
    logps = []
    for i, (prompt, response) in enumerate(SHAPES):
        ids = batch.input_ids[i : i + 1, : prompt + response]
        logits = model(input_ids=ids, use_cache=False).logits
        logp = logits[0, prompt - 1 : -1].float().log_softmax(-1)
        logps.append(logp.gather(1, ids[0, prompt:, None])[:, 0])
    return torch.cat(logps)


def score(policy, batch):
    head = policy.head

    def scorer(hidden, weight, bias):
        return token_logps(
            hidden, weight, batch.targets, bias, softcap=head.softcap, logit_scale=head.logit_scale
        )

    return policy.score(batch, scorer)


def weighted(logps):
    return (logps * torch.linspace(-1, 1, logps.numel())).sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def perturb(policy):
    """Move the adapters away from their start, where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


# ---- every family ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "GPTJConfig"])
def test_scores_are_the_models_own(family, batch):
    truth_model = build(family).train()
    model = copy.deepcopy(truth_model)
    policy = make_policy(model, probe_head(model))
    assert (policy.head.softcap, policy.head.logit_scale) == HEAD_FORMS.get(family, (None, 1.0))

    ours, truth = score(policy, batch), full_logps(truth_model, batch)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-5)
    weighted(ours).backward()
    weighted(truth).backward()
    assert gradient_difference(gradients(model), gradients(truth_model)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probe_in_half_precision(dtype):
    for family in [*HEAD_FORMS, "LlamaConfig", "GPTJConfig"]:
        head = probe_head(build(family).to(dtype))
        found = (head.softcap, head.logit_scale)
        assert found == HEAD_FORMS.get(family, (None, 1.0)), family


@pytest.mark.parametrize("family", ["GPTJConfig", "LlamaConfig tied"])
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
    # With logits of 0.1, softcap 30 changes the fp32 logits by 4e-6: the probe must stretch them.
    fields = without(head_dim=8, final_logit_softcapping=30.0)
    assert probe_head(build("Gemma2Config", fields, sharp=False)).softcap == 30.0


# ---- refusals ----------------------------------------------------------------------------------


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
        logits = hidden @ self.lm_head.weight.T * self.logit_scale + self.lm_head.bias
        return SimpleNamespace(logits=logits)


class OtherPositions(LlamaForCausalLM):
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, position_ids=position_ids * 3, **kwargs)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (HiddenScaled, "computes its logits in an unknown way.*off by"),
        (Trimmed, "gives 94 logits from a head of 97 rows"),
        (BiasIgnored, "computes its logits in an unknown way"),
        (BiasAfterScale, "computes its logits in an unknown way"),
        (OtherPositions, "plain inputs: hidden states differ"),
    ],
)
def test_unknown_heads_are_refused(cls, message):
    torch.manual_seed(0)
    model = cls(cls.config_class(**SMALL | {"logit_scale": 0.25}))
    with pytest.raises(ValueError, match=f"{cls.__name__} .*{message}"):
        probe_head(model)
    if getattr(model.lm_head, "bias", None) is not None:
        assert not model.lm_head.bias.any(), "the bias is restored when the probe fails"


def test_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        probe_head(LlamaModel(LlamaConfig(**SMALL)))


@pytest.mark.parametrize(
    ("family", "module", "message"),
    [("LlamaConfig", "lm_head", "target_modules"), ("LlamaConfig tied", "embed_tokens", "tied")],
)
def test_adapted_head_is_refused(family, module, message):
    model = add_lora(build(family), LoraOptions(target_modules=["q_proj", module]))
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has an adapted head.*{message}"):
        probe_head(model.get_base_model())


# ---- the scorer --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_generate_is_unchanged(lora, saved):
    plain = AutoModelForCausalLM.from_pretrained(saved("LlamaConfig"))
    policy = load_policy(saved("LlamaConfig"), dtype=torch.float32, lora=lora)
    install_scorer(policy.causal_lm)  # a second time changes nothing
    prompt = torch.tensor([[1, 5, 9, 33]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(policy.model.generate(prompt, **options), plain.generate(prompt, **options))
    assert inspect.signature(policy.causal_lm.forward) == inspect.signature(plain.forward)
    assert torch.equal(policy.causal_lm(prompt).logits, plain(prompt).logits)


def policy_of(family, lora=None, memory=None):
    """A policy that was not loaded; adapters away from their start."""
    model = build(family)
    head = probe_head(model)
    if lora is not None:
        model = add_lora(model, lora)
    policy = make_policy(model, head, memory or MemoryOptions())
    if lora is not None:
        perturb(policy)
    return policy


def test_a_deep_copy_scores_with_its_own_weights(batch):
    policy = policy_of("LlamaConfig")
    reference = copy.deepcopy(policy)
    before = score(policy, batch)
    with torch.no_grad():
        for p in policy.trainable_parameters():
            p.mul_(1.1)
    assert torch.equal(score(reference, batch), before)
    assert not torch.allclose(score(policy, batch), before)
    assert reference.head.weight is reference.causal_lm.lm_head.weight
    loaded = pickle.loads(pickle.dumps(reference))
    assert torch.equal(score(loaded, batch), before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_checkpointing_runs_each_layer_again(lora, batch):
    def run(checkpointing):
        policy = policy_of("Gemma2Config", lora, MemoryOptions(checkpointing))
        calls = []
        layer = policy.causal_lm.model.layers[0].mlp
        layer.register_forward_hook(lambda *_: calls.append(1))
        weighted(score(policy, batch)).backward()
        return gradients(policy.model), len(calls)

    (plain, once), (recomputed, twice) = run(False), run(True)
    assert (once, twice) == (1, 2), "checkpointing must really recompute"
    assert gradient_difference(recomputed, plain) == 0


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_sharded_scoring(lora, batch, mesh):
    single, sharded = policy_of("LlamaConfig tied", lora), policy_of("LlamaConfig tied", lora)
    for layer in sharded.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded.causal_lm, mesh=mesh)
    for policy in (single, sharded):
        # First of all, as in training: the adapters must get their gradients all the same.
        if lora is not None:
            with policy.reference_mode(), torch.no_grad():
                score(policy, batch)
        weighted(score(policy, batch)).backward()
    ours = {name: grad.full_tensor() for name, grad in gradients(sharded.model).items()}
    assert gradient_difference(ours, gradients(single.model)) <= 1e-5


# ---- LoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["LlamaConfig", "LlamaConfig tied", "GPTJConfig", "PhiConfig"])
def test_all_linear_leaves_the_head_alone(family):
    model = add_lora(build(family).bfloat16(), LORA)
    adapted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapted and adapted
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in adapted)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapter_off_is_the_base_model(batch):
    base = policy_of("Gemma2Config")
    policy = policy_of("Gemma2Config", LORA)
    trained = score(policy, batch)
    with policy.reference_mode(), torch.no_grad():
        assert torch.equal(score(policy, batch), score(base, batch))
    assert torch.equal(score(policy, batch), trained)
    weighted(trained).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())
    assert policy.head.weight.grad is None


def test_reference_mode_needs_an_adapter():
    policy = policy_of("LlamaConfig")
    with (
        pytest.raises(ValueError, match="no adapter to switch off.*ref_logps"),
        policy.reference_mode(),
    ):
        pass


@pytest.mark.parametrize("bad", [{"r": 0}, {"alpha": 0}, {"target_modules": []}])
def test_lora_options_are_checked(bad):
    with pytest.raises(ValueError, match=f"lora.*{next(iter(bad))}"):
        LoraOptions(**bad)


# ---- dropout -----------------------------------------------------------------------------------


def test_dropout_is_removed():
    """Modules (GPT-J), numbers on modules (Llama's attention) and configs have none afterwards."""
    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    gptj = transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPTJ | drops)).train()
    llama_config = LlamaConfig(**SMALL, attention_dropout=0.5, attn_implementation="eager")
    llama = LlamaForCausalLM(llama_config).train()
    ids = torch.arange(3, 12)[None]
    for model, names in ((gptj, drops), (llama, ["attention_dropout"])):
        with without_dropout(model):
            assert torch.equal(model(ids).logits, model(ids).logits)
        assert not torch.equal(model(ids).logits, model(ids).logits)
        remove_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert [getattr(model.config, name) for name in names] == [0.0] * len(names)


def test_lora_dropout_of_a_loaded_adapter_is_removed(saved, tmp_path, batch):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved("LlamaConfig"))
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    get_peft_model(base, config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32)
    perturb(policy)
    assert policy.causal_lm.training
    assert torch.equal(score(policy, batch), score(policy, batch))
    assert policy.model.peft_config["default"].lora_dropout == 0.0


# ---- messages ----------------------------------------------------------------------------------


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

    class Tokens:
        eos_token_id, pad_token_id = 2, 0

        def __call__(self, text):
            return text

    tokens = Tokens()

    def from_pretrained(name, **_):
        asked.append(name)
        return tokens

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", from_pretrained)
    assert load_tokenizer("org/name") is tokens and asked == ["org/name"]


def test_tokenizer_without_eos_is_refused(tokenizer, tmp_path):
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    message = f"{tmp_path} has no eos token.*set eos_token in its tokenizer_config.json"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_tokenizer_without_pad_uses_eos_and_says_so_once(tokenizer, tmp_path, caplog):
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="una_fast.model.loading"):
        assert load_tokenizer(tmp_path).pad_token_id == load_tokenizer(tmp_path).pad_token_id == 2
    assert [r.message for r in caplog.records if "no pad token" in r.message] == [
        f"the tokenizer of {tmp_path} has no pad token; its eos token '</s>' pads"
    ]


# ---- saving ------------------------------------------------------------------------------------


def reload_and_compare(directory, policy, batch):
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(full_logps(model, batch), score(policy, batch), rtol=0, atol=1e-5)
    return model


@pytest.mark.parametrize(
    ("family", "gathered"),
    [("LlamaConfig", False), ("LlamaConfig tied", True), ("GPTJConfig", True)],
)
def test_full_model_round_trip(family, gathered, batch, tmp_path, tokenizer):
    policy = policy_of(family, memory=MemoryOptions(gradient_checkpointing=True))
    perturb(policy)
    state = copy.deepcopy(policy.model.state_dict()) if gathered else None
    save_pretrained(policy, tmp_path, tokenizer, state)
    assert state is None or state.keys() == policy.model.state_dict().keys(), (
        "the caller's dict is left as it was"
    )
    assert (tmp_path / "model.safetensors").is_file()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["architectures"] == [type(policy.causal_lm).__name__]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"
    model = reload_and_compare(tmp_path, policy, batch)
    prompt, mask = torch.tensor([[1, 5, 9]]), torch.ones(1, 3)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
    assert out.shape == (1, 5)


@pytest.mark.parametrize(
    ("family", "gathered"),
    [("LlamaConfig tied", True), ("Gemma2Config", False), ("GPT2Config", True)],
)
def test_adapter_round_trip(family, gathered, saved, batch, tmp_path, tokenizer):
    policy = load_policy(saved(family), dtype=torch.float32, lora=LoraOptions(r=4, alpha=12))
    perturb(policy)
    before = copy.deepcopy(policy.model.state_dict())
    save_pretrained(policy, tmp_path, tokenizer, before if gathered else None)
    save_merged(policy, tmp_path / "merged", tokenizer)
    assert all(torch.equal(t, before[name]) for name, t in policy.model.state_dict().items())
    files = {p.name for p in tmp_path.iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "merged"}
    reload_and_compare(tmp_path, policy, batch)
    reload_and_compare(tmp_path / "merged", policy, batch)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()

    again = load_policy(tmp_path, dtype=torch.float32)
    assert torch.equal(score(again, batch), score(policy, batch))
    assert len(again.trainable_parameters()) == len(policy.trainable_parameters())
    with pytest.raises(ValueError, match="is an adapter already"):
        load_policy(tmp_path, dtype=torch.float32, lora=LoraOptions())


def test_an_adapter_remembers_its_base_from_anywhere(saved, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(saved("LlamaConfig").parent)
    policy = load_policy(saved("LlamaConfig").name, dtype=torch.float32, lora=LORA)
    save_pretrained(policy, tmp_path / "out", tokenizer)
    monkeypatch.chdir(tmp_path)
    loaded = load_policy("out", dtype=torch.float32)
    assert loaded.model.state_dict().keys() == policy.model.state_dict().keys()


def test_an_adapter_without_its_base_is_named(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "/gone"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = "adapter_config.json: base_model_name_or_path.*/gone does not exist"
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path, dtype=torch.float32)


def test_prompt_tuning_adapters_are_refused(tmp_path):
    config = {
        "peft_type": "PROMPT_TUNING",
        "base_model_name_or_path": "x",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PROMPT_TUNING.*LoRA"):
        load_policy(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("family", ["LlamaConfig", "LlamaConfig tied"])
def test_missing_weights_are_refused_by_name(family, saved, tmp_path):
    """transformers fills missing weights with random numbers; a tied head is not missing."""
    whole = load_file(saved(family) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del whole[name]
    for file in saved(family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights: {name}"):
        load_causal_lm(tmp_path, dtype=torch.float32)
    load_causal_lm(saved(family), dtype=torch.float32)


def test_missing_adapter_weights_are_refused(saved, tmp_path):
    policy = load_policy(saved("LlamaConfig"), dtype=torch.float32, lora=LoraOptions(r=2))
    policy.model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights: .*lora_A"):
        load_causal_lm(tmp_path, dtype=torch.float32)


# ---- damaged directories -----------------------------------------------------------------------


@pytest.fixture
def copy_of(saved, tmp_path):
    """Return a function that copies the saved model of a family, to be damaged."""

    def get(family: str = "LlamaConfig"):
        return shutil.copytree(saved(family), tmp_path / "copy")

    return get


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(directory, change):
    """Change the dictionary of weights of a directory."""
    (file,) = directory.glob("*model.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {  # change of the weights -> words of the refusal
    "another shape": (lambda w: w.update({UP: w[UP][:-1].clone()}), rf"{UP} is \[47, 32\].*\[48"),
    "one more": (lambda w: w.update({"score.weight": w[UP].clone()}), "no place for: score.weight"),
    "another layer": (
        lambda w: w.update({UP.replace("1", "2"): w[UP].clone()}),
        "no place for: model.layers.2.mlp.up_proj",
    ),
    "not finite": (lambda w: w[UP].view(-1)[7].fill_(torch.nan), f"{UP} has numbers.*not finite"),
    "infinite": (lambda w: w[UP].view(-1)[-1].fill_(-torch.inf), f"{UP} has numbers.*not finite"),
    "integers": (lambda w: w.update({UP: w[UP].to(torch.int8)}), f"{UP} is stored as I8"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_the_models_are_refused_by_name(kind, copy_of):
    change, message = WEIGHTS[kind]
    directory = copy_of()
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_causal_lm(directory, dtype=torch.float32)
    assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_vision_tower_may_be_left_out(copy_of, caplog):
    directory = copy_of()
    rewrite(directory, lambda w: w.update({"vision_tower.patch.weight": w[UP].clone()}))
    load_causal_lm(directory, dtype=torch.float32)
    assert "vision_tower.patch.weight" in caplog.text


DAMAGE = {  # damage of a directory -> words of the refusal, after the name of the directory
    "cut config": (lambda d: (d / "config.json").write_text('{"a": '), "config.json is damaged"),
    "config of a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json holds .1."),
    "NaN": (lambda d: edit(d / "config.json", rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "layers": (lambda d: edit(d / "config.json", num_hidden_layers=10**6), "more than 1000 layers"),
    "width": (lambda d: edit(d / "config.json", hidden_size=10**9), "larger model than its weight"),
    "vocabulary": (lambda d: edit(d / "config.json", vocab_size=10**8), "larger model than its"),
    "null": (lambda d: edit(d / "config.json", num_hidden_layers=None), "copy"),
    "window": (lambda d: edit(d / "config.json", sliding_window=0), "sliding_window=0 lets no"),
    "no class": (lambda d: edit(d / "config.json", model_type="none"), "copy"),
    "own code": (
        lambda d: edit(d / "config.json", model_type="x", auto_map={"AutoConfig": "evil.C"}),
        "trust_remote_code",
    ),
    "pipe": (lambda d: os.mkfifo(d / "chat_template.jinja"), "chat_template.jinja is a pipe"),
    "header": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 4000),
        "model.safetensors is damaged",
    ),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "has no model.safetensors; pytorch_model.bin is a pickle",
    ),
    "generation": (
        lambda d: (d / "generation_config.json").write_text("{"),
        "generation_config.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_refused_in_one_line(kind, copy_of):
    damage, message = DAMAGE[kind]
    directory = copy_of()
    damage(directory)
    with pytest.raises(ValueError, match=f"{directory}.*{message}|{message}.*") as refusal:
        load_causal_lm(directory, dtype=torch.float32)
    assert str(refusal.value).isprintable() and str(directory) in str(refusal.value)


def test_numbers_that_are_no_sizes_may_be_large(copy_of):
    directory = copy_of()
    edit(directory / "config.json", rope_theta=10**11, num_parameters=7 * 10**10)
    load_causal_lm(directory, dtype=torch.float32)
    for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings"):
        before = (directory / "config.json").read_text()
        edit(directory / "config.json", **{name: 2**40})
        with pytest.raises(ValueError, match=f"{name}=1099511627776 is larger than any size"):
            load_causal_lm(directory, dtype=torch.float32)
        (directory / "config.json").write_text(before)


def test_files_that_nobody_reads_are_not_blamed(copy_of):
    directory = copy_of()
    (directory / "aaa.json").write_text("{")
    (directory / "aaa.safetensors").write_bytes(b"no tensors")
    load_causal_lm(directory, dtype=torch.float32)
    edit(directory / "config.json", model_type="none")
    with pytest.raises(ValueError, match=f"model {directory} cannot be read"):
        load_causal_lm(directory, dtype=torch.float32)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "gone.safetensors", 5])
def test_an_index_names_files_beside_it(file, copy_of):
    directory = copy_of()
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {UP: file}}))
    with pytest.raises(ValueError, match="index.json.*(beside the index|is not there)"):
        load_causal_lm(directory, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"model": ', "tokenizer.json is damaged"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "cannot be read"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(name, text, message, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        load_tokenizer(tmp_path)
    assert str(refusal.value).isprintable() and str(tmp_path) in str(refusal.value)


def adapter_of(saved, directory, **options):
    policy = load_policy(saved("LlamaConfig"), dtype=torch.float32, lora=LoraOptions(r=2))
    policy.model.save_pretrained(directory)
    return directory


ADAPTERS = {
    "rank": (lambda d: edit(d / "adapter_config.json", r=10**9), r"must be \[1000000000, 48\]"),
    "one more": (
        lambda d: rewrite(d, lambda w: w.update({"more.lora_A.weight": torch.ones(2, 2)})),
        "no place for: more.lora_A.weight",
    ),
    "not finite": (
        lambda d: rewrite(d, lambda w: next(iter(w.values())).fill_(torch.nan)),
        "lora_A.*not finite",
    ),
    "integers": (
        lambda d: rewrite(d, lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()})),
        "lora_A.weight is stored as I8",
    ),
    "a regular expression without end": (
        lambda d: edit(d / "adapter_config.json", target_modules=r"(.*.*.*.*.*.*.*.*)*q_prox"),
        "target_modules.*more than 2 s of computing",
    ),
    "pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        "adapter_model.bin is a pickle",
    ),
    "no base": (
        lambda d: edit(d / "adapter_config.json", base_model_name_or_path=None),
        "base_model_name_or_path=None must be",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_damaged_adapter_is_refused(kind, saved, tmp_path):
    damage, message = ADAPTERS[kind]
    damage(adapter_of(saved, tmp_path))
    with pytest.raises(ValueError, match=message):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_an_adapter_keeps_all_bits_over_a_bf16_base(saved, tmp_path):
    """peft, asked to assign the tensors of the file, rounds them to the base's dtype."""
    policy = load_policy(saved("LlamaConfig"), dtype=torch.bfloat16, lora=LORA)
    perturb(policy)
    policy.model.save_pretrained(tmp_path)
    again = load_policy(tmp_path, dtype=torch.bfloat16)
    pairs = zip(policy.trainable_parameters(), again.trainable_parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_adapter_without_tokenizer_takes_that_of_its_base(saved, tmp_path, tokenizer, caplog):
    base = shutil.copytree(saved("LlamaConfig"), tmp_path / "base")
    tokenizer.save_pretrained(base)
    load_policy(base, dtype=torch.float32, lora=LORA).model.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").eos_token == "</s>"
    assert f"{tmp_path}/adapter has no tokenizer" in caplog.text


# ---- towers, targets, quantized bases ----------------------------------------------------------


def gemma3():
    """Build a tiny Gemma 3 with a vision tower."""
    text = without(head_dim=8, sliding_window=16, max_position_embeddings=64)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**tower, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def test_adapters_stay_in_the_text_model():
    model = add_lora(gemma3(), LORA)
    adapted = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert adapted and all("language_model" in name for name in adapted)


def test_a_tower_that_text_does_not_run_through_is_frozen(batch):
    model = gemma3()
    policy = make_policy(model, probe_head(model))
    weighted(score(policy, batch)).backward()
    assert all(p.grad is not None for p in policy.trainable_parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("vision" in name or "projector" in name for name in frozen)


@pytest.mark.parametrize("targets", [["q_proj", "value_proj"], r".*\.value_proj", ["proj"], "("])
def test_a_target_that_matches_nothing_is_named(targets):
    name = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(ValueError, match="target_modules") as refusal:
        add_lora(build("LlamaConfig"), LoraOptions(target_modules=targets))
    assert repr(name) in str(refusal.value)


def test_a_target_in_a_tower_alone_is_named():
    with pytest.raises(ValueError, match="'fc1' matches no layer that text"):
        add_lora(gemma3(), LoraOptions(target_modules=["fc1"]))


def test_quantized_weights_are_told_apart():
    class Packed(torch.Tensor):
        """A tensor with tensors inside, as torchao's."""

        def __tensor_flatten__(self):
            return ["data_of", "scale_of"], None

        def detach(self):
            return self

    packed = torch.ones(4).as_subclass(Packed)
    packed.data_of, packed.scale_of = torch.ones(4, dtype=torch.int8), torch.full((1,), 0.5)
    assert is_plain(torch.ones(4)) and not is_plain(packed)
    assert not is_plain(packed.data_of) and not is_plain(torch.ones(4).to(torch.float8_e4m3fn))
    first = fingerprint([("w", packed)])
    packed.scale_of = torch.full((1,), 0.25)
    assert fingerprint([("w", packed)]) != first
    plain = torch.ones(4, 300, dtype=torch.bfloat16)
    first = fingerprint([("w", plain)])
    plain[2, 123] = 1.0078125  # the next number after 1
    assert fingerprint([("w", plain)]) != first
    holder = torch.nn.Module()
    holder.register_parameter("w", torch.nn.Parameter(packed.data_of, requires_grad=False))
    with pytest.raises(ValueError, match="here: the weight w is quantized.*set lora"):
        refuse_quantized(holder, "here")


class PackedLinear(torch.nn.Module):
    """A linear layer as GPTQ and AWQ keep it: buffers, and no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 32, dtype=torch.float16))


@pytest.mark.parametrize("name", ["qweight", "weight"])
def test_packed_buffers_are_quantized_weights(name):
    model = build("LlamaConfig")
    model.register_buffer("steps", torch.zeros(4, 4, dtype=torch.int64))
    model.register_buffer("mask", torch.ones(4, 4, dtype=torch.int32), persistent=False)
    assert quantized_weight(model) is None
    packed = PackedLinear()
    first = fingerprint(saved_tensors(packed))
    packed.qweight[0, 0] = 2
    assert fingerprint(saved_tensors(packed)) != first
    packed._buffers[name] = packed._buffers.pop("qweight")
    model.model.layers[1].self_attn.q_proj = packed
    assert quantized_weight(model) == f"model.layers.1.self_attn.q_proj.{name}"
    with pytest.raises(ValueError, match=rf"q_proj\.{name} is quantized.*set lora"):
        refuse_quantized(model, "here")


@pytest.mark.parametrize("packed", [True, False])
def test_only_a_spent_quantization_is_dropped(packed):
    model = build("LlamaConfig")
    model.config.quantization_config = {"quant_method": "gptq"}
    if packed:
        model.model.layers[0].self_attn.q_proj = PackedLinear()
    loading._drop_spent_quantization(model)
    assert hasattr(model.config, "quantization_config") == packed


BIAS = "model.layers.1.mlp.up_proj.bias"


@pytest.mark.parametrize(
    ("quantized", "name", "value", "refused"),
    [
        (True, BIAS, 0.0, False),
        (True, BIAS, 0.5, True),
        (True, BIAS, torch.nan, True),
        (True, "score.weight", 0.0, True),
        (False, BIAS, 0.0, True),
    ],
)
def test_biases_of_zeros_beside_quantized_weights_are_left_out(
    quantized, name, value, refused, copy_of, caplog
):
    directory = copy_of()
    rewrite(directory, lambda w: w.update({name: torch.full((48,), value)}))
    found = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": {name}}
    if refused:
        with pytest.raises(ValueError, match=f"no place for: {name}"):
            loading._check_found(str(directory), found, quantized=quantized)
        return
    loading._check_found(str(directory), found, quantized=quantized)
    assert "1 weights are not part of the text model, and are left out" in caplog.text


# ---- positions ---------------------------------------------------------------------------------


def record(tokens: int) -> Example:
    ids = np.zeros(tokens - 2, dtype=np.int32)
    pair = (np.zeros(2, dtype=np.int32), np.zeros(1, dtype=np.int32))
    return Example(ids, pair, Feedback.pairs([0], [1]), None, f"data.jsonl:{tokens}")


@pytest.mark.parametrize("family", ["GPT2Config", "OPTConfig"])
def test_records_beyond_a_table_of_positions_are_refused(family):
    model = build(family, FAMILIES[family] | {"max_position_embeddings": 64})
    assert longer_records([record(64), record(9)], model) is None
    with pytest.raises(ValueError, match="data.jsonl:66: .*64 positions; 2 of 3.*max_tokens=64"):
        longer_records([record(65), record(66), record(9)], model)


def test_records_beyond_rotary_positions_are_counted():
    llama = build("LlamaConfig", SMALL | {"max_position_embeddings": 64})
    told = longer_records([record(65), record(70), record(9)], llama)
    assert told == "2 of 3 records have more tokens; the longest, data.jsonl:70, has 70"
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 64
    scaled = SMALL | {"max_position_embeddings": 64, "rope_parameters": yarn}
    assert longer_records([record(256)], build("LlamaConfig", scaled)) is None
    assert longer_records([record(257)], build("LlamaConfig", scaled))


# ---- saved as it came --------------------------------------------------------------------------


def test_a_final_model_has_the_dtypes_of_its_files(saved, tmp_path, tokenizer):
    """Masters are float32; a checkpoint keeps them, and a norm stored in float32 stays so."""
    directory = shutil.copytree(saved("LlamaConfig tied"), tmp_path / "model")

    def narrow(weights):
        for name in weights:
            weights[name] = weights[name].bfloat16()
        weights["model.norm.weight"] = weights["model.norm.weight"].float()

    rewrite(directory, narrow)
    policy = load_policy(directory, dtype=torch.float32)
    policy.stored = StoredDtypes.of(directory)
    for final in (False, True):
        save_pretrained(policy, tmp_path / str(final), tokenizer, final=final)
    exact, final = (load_file(tmp_path / str(f) / "model.safetensors") for f in (False, True))
    assert {w.dtype for w in exact.values()} == {torch.float32}
    assert "lm_head.weight" not in final and exact.keys() == final.keys()
    assert final["model.norm.weight"].dtype == torch.float32 and final[UP].dtype == torch.bfloat16
    config = json.loads((tmp_path / "True" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert StoredDtypes.of(directory, "float16").base.usual == torch.float16


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, tokenizer):
    policy = policy_of("LlamaConfig")
    with torch.no_grad():
        policy.causal_lm.get_parameter(UP)[3, 3] = torch.inf
    with pytest.raises(ValueError, match=f"the weight {UP} .*not finite, and is not saved"):
        save_pretrained(policy, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_saved_byte_by_byte(saved, tmp_path, tokenizer):
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    (base / "tokenizer_config.json").write_text(
        (base / "tokenizer_config.json").read_text() + "\n\n"
    )
    loaded = load_tokenizer(base)
    assert loaded.pad_token == "</s>"
    save_pretrained(policy_of("LlamaConfig"), tmp_path / "out", loaded)
    for file in base.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    # A tokenizer without files of its own is written anew, without the pad of the run.
    loaded.name_or_path = "org/name"
    save_pretrained(policy_of("LlamaConfig"), tmp_path / "anew", loaded)
    assert AutoTokenizer.from_pretrained(tmp_path / "anew").pad_token is None
    assert loaded.pad_token == "</s>"


def test_the_code_of_a_tokenizer_is_saved(tmp_path, tokenizer):
    """What auto_map names, and what that imports; the copy loads with the code, as the original."""
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    (base / "parts.py").write_text("WORD = 'own'\n")
    (base / "other.py").write_text("")
    (base / "own_words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "from .parts import WORD\n"
        "class OwnWords(PreTrainedTokenizerFast):\n"
        "    word = WORD\n"
    )
    names = {"AutoTokenizer": [None, "own_words.OwnWords"], "AutoProcessor": "org/name--far.Far"}
    edit(base / "tokenizer_config.json", auto_map=names, tokenizer_class="OwnWords")
    (base / "preprocessor_config.json").write_text("{}")
    loaded = load_tokenizer(base, trust_remote_code=True)
    out = tmp_path / "out"
    save_pretrained(policy_of("LlamaConfig"), out, loaded)
    assert {file.name for file in out.glob("*.py")} == {"own_words.py", "parts.py"}
    assert (out / "preprocessor_config.json").read_text() == "{}"
    assert load_tokenizer(out, trust_remote_code=True).word == "own"


def test_the_end_of_turn_stops_generation(tmp_path, tokenizer):
    """Settings that transformers refuses to write do not stop the end of a run."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}w9{% endfor %}"
    policy = policy_of("LlamaConfig")
    policy.causal_lm.generation_config = transformers.GenerationConfig(
        eos_token_id=2, do_sample=False, temperature=0.9
    )
    save_pretrained(policy, tmp_path, tokenizer)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 9] and settings["temperature"] == 0.9
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 9]


def test_a_checkpoint_of_an_adapter_has_no_card(saved, tmp_path, tokenizer):
    policy = load_policy(saved("LlamaConfig"), dtype=torch.float32, lora=LORA)
    save_pretrained(policy, tmp_path, tokenizer)
    assert not (tmp_path / "README.md").exists()
