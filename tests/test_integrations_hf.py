"""A patched model gives the log-probs and the loss of its own logits; other calls are its own."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from embedded import (
    RESPONSES,
    add_native_adapter,
    difference,
    eager_logps,
    gradients,
    make_batch,
    plain,
)
from families import FAMILIES, REFUSED, SMALL, UNPACKED, build
from una_fast import Feedback, Layout, Objective, turns, una_loss
from una_fast.head import ops
from una_fast.integrations.calls import una_calls
from una_fast.integrations.hf import adapter_off, patch_model, remove_dropout, unpatch_model
from una_fast.integrations.hf.scored import Uncast
from una_fast.model.head_probe import probe_head, probe_reduced

MIXED = Feedback.merge(
    [Feedback.pairs([0, 3], [1, 2], margin=[0.1, 0.0]), Feedback.scores([4, 0], [0.9, 0.3])]
)
BETA = Objective(beta=0.3)


def llama(**changes) -> LlamaForCausalLM:
    return build("LlamaConfig", SMALL | changes)


def reference_of(model, batch) -> torch.Tensor:
    """Return log-probs near the policy's."""
    with torch.no_grad():
        return eager_logps(model, batch).double().sum(1) + torch.linspace(-2, 2, 5).double()


# ---- the same numbers as the model's own logits ----


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_logits(family, left):
    """Every family with an exact packed form, and every kind of head."""
    model = patch_model(build(family)).train()
    assert model._una.packs == (family not in UNPACKED)
    batch = make_batch(left=left)
    truth = eager_logps(model, batch, temperature=0.8)
    tokens = model(**batch, una="tokens", temperature=0.8).logps
    assert (tokens - truth).abs().max() < 4e-6
    reference = reference_of(model, batch)
    out = model(**batch, feedback=MIXED, ref_logps=reference, objective=BETA, num_units=7)
    logps = eager_logps(model, batch).sum(1)
    expected = una_loss(logps, reference, MIXED, objective=BETA, num_units=7)
    for name in ("loss", "logps", "ref_logps", "rewards", "unit_losses"):
        assert torch.allclose(out[name], getattr(expected, name), atol=2e-5), name
    assert difference(gradients(out.loss, model), gradients(expected.loss, model)) < 2e-5


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_packed_are_exact(family):
    """Padded; a later release of transformers may allow what its forerunners did not."""
    model = build(family)
    try:
        patch_model(model)
    except ValueError as refusal:
        assert type(model).__name__ in str(refusal)
        return
    batch = make_batch()
    before = una_calls()
    tokens = model(**batch, una="tokens").logps
    assert (tokens - eager_logps(model, batch)).abs().max() < 4e-6
    kind = "packed" if model._una.packs else "padded"
    assert una_calls()[kind] == before[kind] + 1
    if model._una.packs:
        return
    with pytest.raises(ValueError, match="pack=True, but"):
        patch_model(model, pack=True)


def test_packed_and_padded_agree_and_are_counted():
    batch = make_batch()
    model = patch_model(llama())
    before = una_calls()
    packed = model(**batch, una="responses").logps
    patch_model(model, pack=False)
    padded = model(**batch, una="responses").logps
    assert torch.allclose(packed, padded, atol=1e-5)
    after = una_calls()
    assert [after[kind] - before[kind] for kind in ("packed", "padded")] == [1, 1]


def test_sums_and_statistics_carry_gradients():
    model = patch_model(llama())
    batch = make_batch()
    upstream = torch.randn(5, dtype=torch.float64)
    found = gradients((model(**batch, una="responses").logps * upstream).sum(), model)
    truth = gradients((eager_logps(model, batch).double().sum(1) * upstream).sum(), model)
    assert difference(found, truth) < 1e-5

    names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    out = model(**batch, una="tokens", stats=names)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1]
    log_p = logits.log_softmax(-1)
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    entropy = torch.where(scored, -(log_p.exp() * log_p).sum(-1), 0.0)
    assert torch.allclose(out.entropy, entropy, atol=1e-5)
    assert torch.equal(out.is_top1, (logits.argmax(-1) == targets) & scored)
    mean = torch.where(scored, logits.mean(-1), 0.0)
    assert torch.allclose(out.mean_logits, mean, atol=1e-5)
    squares = torch.where(scored, (2 * log_p).logsumexp(-1), 0.0)
    assert torch.allclose(out.log_sum_sq_probs, squares, atol=1e-5)
    weights = torch.randn_like(entropy)
    both = (out.entropy * weights).sum() + (out.logps * weights.flip(0)).sum()
    truth = (entropy * weights).sum() + (eager_logps(model, batch) * weights.flip(0)).sum()
    assert difference(gradients(both, model), gradients(truth, model)) < 1e-5


def test_prompts_are_computed_once():
    """Tokens that reach the model: prompt 4 + 2 and responses, in place of 5 padded rows."""
    model = patch_model(llama())
    seen = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    model(**make_batch(), una="responses")
    assert seen == [4 + 2 + 14]


def test_no_logits_are_made():
    """The largest tensor of a step is no [tokens, vocabulary]."""
    model = patch_model(llama(vocab_size=997), workspace_mb=0.05)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                # views of the whole workspace are [rows, V] too: count what is allocated
                if torch.is_tensor(tensor) and tensor.dim() == 2 and tensor.shape[-1] == 997:
                    largest = max(largest, tensor.shape[0])
            return out

    rows = [((5, 6), tuple(range(7, 47))) for _ in range(4)]
    batch = make_batch(rows)
    with Watch():
        model(**batch, una="tokens").logps.sum().backward()
    assert 0 < largest < 40


# ---- rows that are cut to nothing, and batches of a rank without records ----


def test_an_empty_response_has_a_log_ratio_of_zero():
    """One rank must not stop with an error while the others wait in a collective."""
    model = patch_model(llama())
    rows = [RESPONSES[0], ((5, 6, 7, 8), ()), *RESPONSES[2:]]
    batch = make_batch(rows)
    reference = reference_of(model, batch)
    reference[1] = 0.0
    for objective in (BETA, Objective(length_normalize=True)):
        out = model(**batch, feedback=MIXED, ref_logps=reference, objective=objective)
        logps = eager_logps(model, batch).double().sum(1)
        lengths = torch.tensor([3, 1, 2, 7, 1])
        truth = una_loss(logps, reference, MIXED, objective=objective, lengths=lengths)
        assert torch.allclose(out.loss, truth.loss, atol=1e-6) and out.logps[1] == 0
        assert difference(gradients(out.loss, model), gradients(truth.loss, model)) < 1e-5
    with pytest.raises(ValueError, match=r"ref_logps \(1,\) must be \[5\], a sum for each row"):
        model(**batch, feedback=MIXED, ref_logps=[-1.0])


def test_a_batch_without_any_response_joins_the_graph():
    model = patch_model(llama())
    batch = make_batch([((5, 6), ()), ((7,), ())])
    nothing = Feedback.merge([])
    loss = model(**batch, feedback=nothing, ref_logps=[0.0, 0.0], num_units=3).loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in model.parameters())
    assert model(**batch, una="responses").logps.tolist() == [0.0, 0.0]
    assert not model(**batch, una="tokens").logps.any()


# ---- everything else is the model's own ----


def test_other_calls_are_bitwise_the_models_own(tmp_path):
    model = llama().eval()
    batch = make_batch()
    prompt = batch["input_ids"][:1, :4]
    generate = partial(model.generate, prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    before = plain(model(**batch)), generate()
    model.save_pretrained(tmp_path / "before")
    patch_model(model)
    after = plain(model(**batch)), generate()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert torch.equal(before[1], after[1])
    model(**batch, una="responses")
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        bytes_before = (tmp_path / "before" / name).read_bytes()
        assert bytes_before == (tmp_path / "after" / name).read_bytes()
    again = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "after"))
    found = again(**batch, una="responses").logps
    assert torch.equal(found, model(**batch, una="responses").logps)


def test_unpatching_leaves_no_trace():
    model = llama()
    names = set(model.__dict__)
    own = model.forward
    patch_model(model, pack=False)
    patch_model(model)  # a second time replaces the options
    assert model._una.packs
    unpatch_model(model)
    assert set(model.__dict__) == names and model.forward == own and not model._forward_hooks
    unpatch_model(model)


def test_unpatching_restores_a_forward_of_somebody_else():
    model = llama()
    model.forward = theirs = model.forward
    unpatch_model(patch_model(model))
    assert model.__dict__["forward"] is theirs


def test_a_wrapper_over_the_patch_is_not_taken_off():
    """A wrapper by functools.wraps looks like the forward inside."""
    model = patch_model(llama())
    batch, calls, ours = make_batch(), [], model.forward
    truth = model(**batch, una="responses").logps

    @functools.wraps(ours)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    model.forward = wrapper
    with pytest.raises(ValueError, match="was replaced after patch_model"):
        unpatch_model(model)
    assert torch.equal(patch_model(model)(**batch, una="responses").logps, truth) and calls
    model.forward = ours
    assert torch.equal(patch_model(model)(**batch, una="responses").logps, truth)
    assert "forward" not in unpatch_model(model).__dict__


def test_a_patched_model_is_one_graph():
    """Of torch.compile and of torch.export, in calls of its own."""
    model = llama()
    ids = make_batch()["input_ids"]
    truth = model(input_ids=ids, use_cache=False).logits
    patch_model(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, truth)
    inputs = {"input_ids": ids, "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    assert torch.allclose(exported(**inputs).logits, truth, atol=1e-6)


def test_a_forward_that_was_lost_is_patched_again(tmp_path):
    """Others may take a forward off; the mark of the patch stays."""
    model = patch_model(llama())
    batch = make_batch()
    truth = model(**batch, una="responses").logps
    del model.forward
    assert "_una" in model.__dict__
    with pytest.raises(ValueError, match="the forward of patch_model is gone from LlamaForC"):
        model(**batch, feedback=MIXED, ref_logps=[0.0] * 5)
    assert model(**batch).logits is not None
    with pytest.raises(ValueError, match="was replaced after patch_model"):
        unpatch_model(model)
    assert torch.equal(patch_model(model)(**batch, una="responses").logps, truth)


def test_accelerate_takes_its_own_wrapper_off_and_leaves_ours():
    accelerate = pytest.importorskip("accelerate")
    model = patch_model(llama())
    batch = make_batch()
    truth = model(**batch, una="responses").logps
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = patch_model(accelerator.prepare_model(model))  # a second time, below the wrapper
    assert prepared(**batch).logits.shape[:2] == batch["input_ids"].shape
    plain_again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerate.state.AcceleratorState._reset_state(True)  # the precision is of the process
    assert torch.equal(plain_again(**batch, una="responses").logps, truth)
    assert inspect.signature(plain_again.forward) == inspect.signature(llama().forward)


def test_a_head_on_the_disk(tmp_path):
    """accelerate brings the weight within the forward that it has put on the module."""
    accelerate = pytest.importorskip("accelerate")
    model = patch_model(llama()).eval()
    batch = make_batch()
    rest = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm"), "cpu")
    places = {**rest, "model.rotary_emb": "cpu", "lm_head": "disk"}
    with torch.no_grad():
        truth = model(**batch, una="responses").logps
        placed = accelerate.dispatch_model(
            model, device_map=places, main_device="cpu", offload_dir=tmp_path
        )
        assert placed.lm_head.weight.is_meta
        assert torch.equal(placed(**batch, una="responses").logps, truth)
        logits = placed(input_ids=batch["input_ids"]).logits
    assert logits.shape[-1] == placed.config.vocab_size


def test_a_deep_copy_runs_its_own_weights():
    model = patch_model(llama())
    batch = make_batch()
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    before = frozen(**batch, una="responses").logps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(frozen(**batch, una="responses").logps, before)
    logits = frozen(input_ids=batch["input_ids"]).logits
    assert not torch.equal(logits, model(input_ids=batch["input_ids"]).logits)


def test_a_pickled_model_keeps_the_forward():
    """A bound method is pickled by its name: the class's forward came back, without an error."""
    model = patch_model(llama())
    batch = make_batch()
    call = {**batch, "feedback": MIXED, "ref_logps": [0.0] * 5}
    truth = model(**call).loss
    signature = inspect.signature(model.forward)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(loaded(**call).loss, truth)
        assert inspect.signature(loaded.forward) == signature
        with torch.no_grad():
            loaded.lm_head.weight.mul_(1.5)
        assert not torch.equal(loaded(**call).loss, truth)
        assert unpatch_model(loaded).__dict__.keys() == llama().__dict__.keys()
        assert not loaded._forward_hooks
    assert signature == inspect.signature(unpatch_model(model).forward)


# ---- wrappers ----


def test_adapters():
    """peft repeats return_dict; the reference is the adapter switched off; a head stays plain."""
    peft = pytest.importorskip("peft")
    batch = make_batch()
    base = llama()
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = patch_model(peft.get_peft_model(base, options))
    before = model(**batch, una="responses").logps
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch, una="responses").logps
    assert torch.allclose(reference, before.detach(), atol=1e-6)
    out = model(**batch, feedback=MIXED, ref_logps=reference, objective=BETA)
    truth = una_loss(eager_logps(model, batch).sum(1), reference, MIXED, objective=BETA)
    assert out.rewards.abs().min() > 1e-3
    assert difference(gradients(out.loss, model), gradients(truth.loss, model)) < 1e-5


def test_an_adapter_on_the_head_is_refused_at_the_call():
    peft = pytest.importorskip("peft")
    base = patch_model(llama())
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    model = peft.get_peft_model(base, options)
    with pytest.raises(ValueError, match="adapted head"):
        model(**make_batch(), una="responses")


def test_prompt_tuning_runs_padded():
    """peft puts virtual tokens, and labels for them, in front."""
    peft = pytest.importorskip("peft")
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(patch_model(llama()), options)
    batch = make_batch()
    found = model(**batch, una="responses").logps
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, 3:-1]
    targets = batch["labels"][:, 1:]
    log_p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    truth = torch.where(targets != -100, log_p, 0.0)
    assert torch.allclose(found, truth.sum(1).double(), atol=1e-5)
    tokens = model(**batch, una="tokens").logps
    assert torch.allclose(tokens[:, 3:], truth, atol=1e-5) and not tokens[:, :3].any()


def test_an_adapter_per_row_runs_padded():
    """peft tells the layers one name per batch row; a packed row is one row."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(patch_model(llama()), options).eval()
    batch = make_batch()
    adapted = model(**batch, una="responses").logps
    with model.disable_adapter():
        own = model(**batch, una="responses").logps
    names = ["default", "__base__"]
    found = model(**batch, una="responses", adapter_names=[names[row % 2] for row in range(5)])
    truth = torch.where(torch.arange(5) % 2 == 0, adapted, own)
    assert torch.allclose(found.logps, truth, atol=1e-5) and not torch.allclose(adapted, own)
    assert torch.equal(model(**batch, una="responses").logps, adapted)  # packed again


def test_adapters_from_a_token_on_run_padded():
    """aLoRA is active from its tokens on, at another place of every batch row."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        init_lora_weights=False,
        alora_invocation_tokens=[7],
    )
    model = peft.get_peft_model(patch_model(llama()), options).eval()
    batch = make_batch()
    batch["input_ids"][:, 3] = 7
    assert torch.allclose(model(**batch, una="tokens").logps, eager_logps(model, batch), atol=1e-5)


@pytest.mark.parametrize("column", ["token_type_ids", "special_tokens_mask", "length", "label"])
def test_what_tokenizers_put_into_a_batch_is_no_error(column):
    model = patch_model(llama())
    batch = make_batch()
    beside = {column: torch.zeros_like(batch["input_ids"])}
    before = una_calls()["padded"]
    assert torch.allclose(
        model(**batch, **beside, una="tokens").logps, eager_logps(model, batch), atol=1e-5
    )
    assert una_calls()["padded"] == before + 1


def test_prefix_tuning_runs_padded():
    """peft's mask covers the keys of the prefix, which stand in no row of labels."""
    peft = pytest.importorskip("peft")
    options = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(patch_model(llama()), options)
    nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
    batch = make_batch()
    found = model(**batch, una="responses").logps
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    log_p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    truth = torch.where(targets != -100, log_p, 0.0).sum(1)
    assert torch.allclose(found, truth.double(), atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(**batch, una="responses").logps, found, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = patch_model(llama()).train()
    batch = make_batch()
    truth = gradients(model(**batch, una="responses").logps.sum(), model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**batch, una="responses").logps.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert difference(found, truth) < 1e-6


def test_autocast_computes_from_bf16_operands():
    model = patch_model(llama())
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, una="tokens").logps
        truth = eager_logps(model, batch)
    assert out.dtype == torch.float32
    exact = eager_logps(model, batch)
    assert (out - exact).norm() < 1.5 * (truth - exact).norm()
    out.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_compiled_models():
    torch._dynamo.reset()
    model = patch_model(llama())
    batch = make_batch()
    truth = model(**batch, una="tokens").logps
    compiled = torch.compile(model, backend="eager")
    found = compiled(**batch, una="tokens").logps
    assert (found - truth).abs().max() < 1e-5
    assert difference(gradients(found.sum(), model), gradients(truth.sum(), model)) < 1e-5
    torch._dynamo.reset()


class Gathered:
    """Hooks of a head whose weight is there within its own call alone, as ZeRO-3 keeps it."""

    def __init__(self, head: nn.Module) -> None:
        self.full = head.weight.data
        head.weight.data = self.full.new_empty(0)
        head.register_forward_pre_hook(self.gather)
        head.register_forward_hook(self.release)
        head.register_full_backward_pre_hook(self.gather)

    def gather(self, head: nn.Module, *_: object) -> None:
        head.weight.data = self.full

    def release(self, head: nn.Module, *_: object) -> None:
        head.weight.data = self.full.new_empty(0)


@pytest.mark.parametrize("call", ["loss", "responses"])
def test_a_head_that_is_gathered_for_its_call(call):
    """A stand-in for ZeRO-3: outside the call of the head module its weight has no elements."""
    batch = make_batch()
    model = patch_model(llama())
    reference = reference_of(model, batch)

    def run() -> torch.Tensor:
        if call == "responses":
            return model(**batch, una="responses").logps.sum()
        return model(**batch, feedback=MIXED, ref_logps=reference, objective=BETA).loss

    truth_loss = run()
    truth = gradients(truth_loss, model)
    hooks = Gathered(model.lm_head)
    loss = run()
    assert model.lm_head.weight.numel() == 0 and torch.equal(loss, truth_loss)
    hidden_only = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    names = [name for name, _ in model.named_parameters() if not name.startswith("lm_head")]
    found = torch.autograd.grad(loss, hidden_only)
    model.lm_head.weight.data = hooks.full
    truth.pop("lm_head.weight")
    assert difference(dict(zip(names, found, strict=True)), truth) < 1e-6


# ---- the probe ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_copy_has_the_head_of_the_model(family):
    """Factors that depend on the width are those of the model, not of the copy."""
    model = build(family)
    truth = probe_head(model)
    with torch.device("meta"):
        outline = type(model)(model.config)
    state = torch.random.get_rng_state()
    found = probe_reduced(outline)
    assert (found.softcap, found.logit_scale) == (truth.softcap, truth.logit_scale)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_patching_needs_no_weights():
    """Trainers patch before weights are there: meta tensors, or shards of other ranks."""
    with torch.device("meta"):
        model = build("GraniteConfig", sharp=False)
    patch_model(model)
    assert model._una.logit_scale == 0.125 and model._una.packs


@pytest.mark.parametrize("model_class", ["GPT2", "OPT"])
def test_a_model_with_dropout_is_probed_without(model_class):
    """The default of GPT-2 and OPT is dropout, and the probe compares in train mode."""
    fields = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{model_class}Config")
    fields |= {"hidden_size": 32, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = AutoModelForCausalLM.from_config(config(**fields)).eval()
    batch = make_batch()
    for spec in (probe_head(model), probe_reduced(model)):
        assert (spec.softcap, spec.logit_scale) == (None, 1.0)
    found = patch_model(model)(**batch, una="tokens").logps
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6
    assert not torch.equal(model.train()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_width_of_a_row_are_padded(kind):
    """A padded row wider than the original positions has the long factors, a packed row has not."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
        rope |= {**factors, "original_max_position_embeddings": 6}
    model = patch_model(llama(max_position_embeddings=6, rope_parameters=rope)).eval()
    assert not model._una.packs
    batch = make_batch()
    assert (model(**batch, una="tokens").logps - eager_logps(model, batch)).abs().max() < 4e-6
    with pytest.raises(ValueError, match=f"pack=True, but .*rotary positions of type {kind}"):
        patch_model(model, pack=True)


def test_a_config_that_changed_is_refused_at_the_call():
    """The constants of the head are those of the patch."""
    model = patch_model(build("Gemma2Config"))
    batch = make_batch()
    model.config.final_logit_softcapping = None
    message = "final_logit_softcapping .* was 7.0 when the model was patched, and is None; set it"
    with pytest.raises(ValueError, match=message):
        model(**batch, una="tokens")
    found = patch_model(model)(**batch, una="tokens").logps
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6
    model.config.final_logit_softcapping = 5.0
    with pytest.raises(ValueError, match="was None when the model was patched, and is 5.0"):
        model(**batch, una="tokens")


class Cleverer(LlamaForCausalLM):
    """A model with a head that no form describes."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits.roll(1, -1)
        return out


def test_an_unknown_head_is_refused_by_the_class():
    with pytest.raises(ValueError, match="Cleverer computes its logits in an unknown way"):
        patch_model(Cleverer(LlamaConfig(**SMALL)))


# ---- requests that are refused ----


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"una": "rows"}, "una='rows' is not one of"),
        ({"una": "responses", "labels": None}, "need labels="),
        ({"feedback": MIXED}, "feedback needs ref_logps="),
        ({"una": "tokens", "feedback": MIXED, "ref_logps": [0.0] * 5}, "beside feedback"),
        ({"una": "responses", "stats": ("entropy",)}, "stats are per token"),
        ({"feedback": MIXED, "ref_logps": torch.zeros(5).bfloat16()}, "rounds sums by whole nats"),
        ({"feedback": MIXED, "ref_logps": [0.0] * 4}, "ref_logps is"),
        ({"una": "responses", "objective": BETA}, "objective is of the loss: give feedback="),
        ({"una": "tokens", "stats": "entropy"}, "stats='entropy' must be a tuple"),
        ({"una": "tokens", "output_hidden_states": True}, "output_hidden_states is not served"),
        ({"una": "tokens", "return_dict": False}, "return_dict=False is not served"),
        ({"una": "tokens", "feedbak": MIXED}, "feedbak is no .* did you mean feedback"),
        ({"una": "tokens", "temprature": 0.5}, "did you mean temperature"),
        ({"feedback": MIXED, "ref_logps": np.zeros(5, "float16")}, "rounds sums by whole nats"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    model = patch_model(llama())
    with pytest.raises(ValueError, match=message):
        model(**{**make_batch(), **request_})


def test_models_that_cannot_be_patched():
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    with pytest.raises(ValueError, match="encoder-decoder"):
        patch_model(T5ForConditionalGeneration(T5Config(**small)))
    with pytest.raises(ValueError, match="no model of transformers"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        patch_model(nn.DataParallel(llama()))
    with pytest.raises(ValueError, match="pack='always' is not one of"):
        patch_model(llama(), pack="always")


def test_attention_dropout_keeps_batches_padded(caplog):
    model = patch_model(llama())
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    before = una_calls()["padded"]
    with caplog.at_level(logging.WARNING):
        model.train()(**make_batch(), una="responses")
    assert una_calls()["padded"] == before + 1
    model.eval()(**make_batch(), una="responses")
    assert una_calls()["padded"] == before + 1
    assert "batches stay padded: the model has attention dropout" in caplog.text


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "OPTConfig"])
def test_dropout_of_the_modules_counts(family):
    """Modules keep the dropout that they were built with, whatever the config says later."""
    dropouts = {"attention_dropout": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    fields = FAMILIES[family] | dropouts | {"dropout": 0.0}
    config = getattr(transformers, family)(**fields)
    model = patch_model(AutoModelForCausalLM.from_config(config)).train()
    batch = make_batch()
    for name in dropouts:
        setattr(model.config, name, 0.0)
    before = una_calls()
    model(**batch, una="responses")
    assert una_calls()["padded"] == before["padded"] + 1
    remove_dropout(model)
    found = model(**batch, una="tokens").logps
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6
    # TRL and others set the modules to 0, and leave the config.
    for name in dropouts:
        setattr(model.config, name, 0.5)
    assert torch.equal(model(**batch, una="tokens").logps, found)
    assert una_calls()["packed"] == before["packed"] + 2 * model._una.packs


class ConfigAttention(LlamaAttention):
    """Attention that reads its dropout from the config in every call."""

    @property
    def attention_dropout(self):
        return self.config.attention_dropout


def test_dropout_that_is_read_from_the_config_counts():
    model = patch_model(llama()).train()
    for layer in model.model.layers:
        layer.self_attn.__class__ = ConfigAttention
        del layer.self_attn.__dict__["attention_dropout"]
    before = una_calls()
    model(**make_batch(), una="responses")
    model.config.attention_dropout = 0.5
    model(**make_batch(), una="responses")
    assert una_calls()["packed"] == before["packed"] + 1
    assert una_calls()["padded"] == before["padded"] + 1


def test_positions_of_the_caller_keep_batches_padded(caplog):
    model = patch_model(llama())
    batch = make_batch()
    positions = torch.arange(batch["input_ids"].shape[1]).expand(5, -1)
    before = una_calls()["padded"]
    with caplog.at_level(logging.WARNING):
        found = model(**batch, position_ids=positions, una="tokens").logps
    assert "batches stay padded: position_ids stands beside the tokens" in caplog.text
    assert una_calls()["padded"] == before + 1
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6


def test_a_layout_made_before_is_used():
    model = patch_model(llama())
    batch = make_batch()
    layout = Layout.from_labels(batch["labels"], batch["attention_mask"], batch["input_ids"])
    truth = model(**batch, una="responses").logps
    del batch["labels"]
    assert torch.equal(model(**batch, layout=layout, una="responses").logps, truth)


def test_layouts_of_other_calls_are_refused():
    """A packed layout would lose positions; on a model that cannot be packed it would be wrong."""
    model = patch_model(llama())
    batch = make_batch()
    packed = Layout.from_labels(batch["labels"], batch["attention_mask"], batch["input_ids"])
    with pytest.raises(ValueError, match="give labels= or layout=, not both"):
        model(**batch, layout=packed, una="responses")
    labels = batch.pop("labels")
    positions = torch.arange(labels.shape[1]).expand(5, -1)
    with pytest.raises(ValueError, match="the layout is packed, and this call cannot be"):
        model(**batch, layout=packed, position_ids=positions, una="responses")
    with pytest.raises(ValueError, match=r"the layout is of a batch \(5, 11\)"):
        model(input_ids=batch["input_ids"][:, 1:], layout=packed, una="responses")
    patch_model(model, pack=False)
    with pytest.raises(ValueError, match="the layout is packed, and this call cannot be"):
        model(**batch, layout=packed, una="responses")


def test_references_keep_their_dtype_through_wrappers():
    model = patch_model(llama())
    batch = make_batch()
    reference = reference_of(model, batch)
    truth = model(**batch, feedback=MIXED, ref_logps=reference).loss
    for given in (Uncast(reference), reference.tolist()):
        assert torch.equal(model(**batch, feedback=MIXED, ref_logps=given).loss, truth)
    dictionary = MIXED.to_dict()
    assert torch.equal(model(**batch, feedback=dictionary, ref_logps=reference).loss, truth)


def test_mixture_of_experts_balance_their_packed_row():
    fields = SMALL | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    }
    model = patch_model(build("MixtralConfig", fields)).train()
    batch = make_batch()
    found = model(**batch, una="responses")
    patch_model(model, pack=False)
    padded = model(**batch, una="responses")
    assert torch.allclose(found.logps, padded.logps, atol=1e-5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    truth = model(**inputs).aux_loss
    assert torch.allclose(padded.aux_loss, truth, atol=1e-6)
    # Other tokens are counted, a shared prompt once: near, and not the same.
    assert 0 < abs(found.aux_loss - truth) < 0.3 * truth
    assert model(**batch, una="responses", output_router_logits=False).aux_loss is None


def test_the_op_is_reached_through_its_module(monkeypatch):
    """Hosts and checks count the calls of head.ops."""
    calls = []
    own = ops.linear_una_loss
    monkeypatch.setattr(ops, "linear_una_loss", lambda *a, **k: calls.append(1) or own(*a, **k))
    model = patch_model(llama())
    with sdpa_kernel(SDPBackend.MATH):
        model(**make_batch(), feedback=MIXED, ref_logps=[0.0] * 5)
    assert calls == [1]


# ---- one model that differs from its class ----


class Halved(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 0.5


class WithNorm(nn.Module):
    """A head with a norm of its own, and with the weight under the usual name."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight, self.norm = head.weight, nn.LayerNorm(head.in_features)

    def forward(self, hidden):
        return nn.functional.linear(self.norm(hidden), self.weight)


class Grown(nn.Linear):
    """A head beside whose product stands another, which is zero before the first step."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.beside = nn.Parameter(torch.zeros(self.weight.shape))

    def forward(self, hidden):
        return super().forward(hidden) + nn.functional.linear(hidden, self.beside)


def halve(module, args, output):
    return output * 0.5 if torch.is_tensor(output) else output


def _other_head(model, kind):
    head = kind(32, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def _own_forward(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 0.5


def _wrapped_forward(model):
    _own_forward(model)
    model.lm_head.forward = torch.enable_grad()(model.lm_head.forward)


def _accelerated(model):
    hooks = pytest.importorskip("accelerate.hooks")

    class Halving(hooks.ModelHook):
        def post_forward(self, module, output):
            return halve(module, (), output)

    hooks.add_hook_to_module(model.lm_head, Halving())


HEADS = {
    "a subclass": lambda model: _other_head(model, Halved),
    "a module": lambda model: setattr(model, "lm_head", WithNorm(model.lm_head)),
    "zero at first": lambda model: _other_head(model, Grown),
    "a forward": _own_forward,
    "a wrapped forward": _wrapped_forward,
    "a hook": lambda model: model.lm_head.register_forward_hook(halve),
    "a wrapped hook": lambda model: model.lm_head.register_forward_hook(torch.no_grad()(halve)),
    "a hook of accelerate": _accelerated,
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_head_of_one_model_is_refused_at_the_patch_and_at_the_call(change):
    """The probe of the class does not see it: log-probs were wrong by whole nats."""
    model, batch = patch_model(llama()), make_batch()
    model(**batch, una="responses")
    change(model)
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM .* are not W h"):
        model(**batch, una="responses")
    assert torch.is_tensor(model(**batch).logits)
    for changed in (model, llama()):
        if changed is not model:
            change(changed)
        with pytest.raises(ValueError, match="the head of LlamaForCausalLM .* are not W h"):
            patch_model(changed)


def test_a_head_that_gives_the_same_logits_is_served():
    """Compared once, and not again; a hook before the head is part of every call."""
    model, batch = llama(), make_batch()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    truth = eager_logps(model, batch)
    patch_model(model)
    before = len(calls)
    patch_model(model)
    assert (model(**batch, una="tokens").logps - truth).abs().max() < 4e-6
    assert len(calls) == before + 1
    model = pickle.loads(pickle.dumps(patch_model(llama())))
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    truth = eager_logps(model, batch)
    assert (model(**batch, una="tokens").logps - truth).abs().max() < 4e-6
    before = len(calls)
    model(**batch, una="tokens")
    assert len(calls) == before + 1


def test_a_forward_of_somebody_else_is_compared_with_the_logits():
    batch = make_batch()

    def scaled(own, factor):
        def forward(*args, **kwargs):
            output = own(*args, **kwargs)
            output.logits = output.logits * factor
            return output

        return forward

    for wraps in (lambda own: lambda forward: forward, functools.wraps):
        model = llama()
        model.forward = wraps(model.forward)(scaled(model.forward, 0.5))
        with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in an unknown"):
            patch_model(model)
    model = llama()
    model.forward = scaled(model.forward, 1.0)
    truth = eager_logps(model, batch)
    assert (patch_model(model)(**batch, una="tokens").logps - truth).abs().max() < 4e-6
    model.forward = functools.wraps(model.forward)(scaled(model.forward, 0.5))
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in an unknown"):
        patch_model(model)
    model = llama()
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", -output[0]))
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in an unknown"):
        patch_model(model)
    with torch.device("meta"):
        outline = LlamaForCausalLM(LlamaConfig(**SMALL))
    outline.forward = scaled(outline.forward, 1.0)
    with pytest.raises(ValueError, match="was replaced, and its weights are not"):
        patch_model(outline)


class OwnAttention(nn.Module):
    """The same mathematics, by a call of its own; `inside` keeps the weights."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden_states, position_embeddings=None, **_):
        inside, shape = self.inside, (*hidden_states.shape[:2], -1, self.inside.head_dim)
        split = [inside.q_proj, inside.k_proj, inside.v_proj]
        query, key, value = (one(hidden_states).view(shape).transpose(1, 2) for one in split)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        options = {"is_causal": True, "enable_gqa": True, "scale": inside.scaling}
        found = nn.functional.scaled_dot_product_attention(query, key, value, **options)
        return inside.o_proj(found.transpose(1, 2).flatten(2)), None


def test_an_attention_of_one_model_is_padded_and_noticed_in_calls(caplog):
    """It attends over the whole row: packed, log-probs were wrong by whole nats."""
    batch, layers = make_batch(), "layers.1.self_attn of LlamaModel is a OwnAttention"
    model = patch_model(llama())
    truth = eager_logps(model, batch)
    model(**batch, una="tokens")
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match=r"1 of 2 layers of .*: layers\.1 \(LlamaDecoderLayer\)"):
        model(**batch, una="tokens")
    assert model.config._attn_implementation == "sdpa"
    before = una_calls()["padded"]
    found = patch_model(model)(**batch, una="tokens").logps
    assert (found - truth).abs().max() < 4e-6 and una_calls()["padded"] == before + 1
    assert layers in caplog.text
    with pytest.raises(ValueError, match=f"pack=True, but {layers}"):
        patch_model(model, pack=True)


class Mixing(nn.Module):
    """Adds the token before: right in a padded row, wrong at the seams of a packed one."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden):
        return self.inside(hidden) + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


class Batched(nn.MultiheadAttention):
    """Attends as its base class does; causal, and under the name of the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, batch_first=True)
        self.register_forward_pre_hook(_thrice, with_kwargs=True)
        self.register_forward_hook(lambda mlp, args, output: output[0])


def _thrice(module, args, kwargs):
    length = args[0].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (args[0],) * 3, {"attn_mask": mask, "is_causal": True, "need_weights": False}


def _replace_mlp(model, mlp):
    model.model.layers[0].mlp = mlp


def _mix_by_forward(model):
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: own(hidden) + hidden.roll(1, 1)


MIXERS = {
    "a module": lambda model: _replace_mlp(model, Mixing(model.model.layers[0].mlp)),
    "a forward": _mix_by_forward,
    "a hook": lambda model: model.model.layers[0].register_forward_hook(
        lambda layer, args, output: output.cumsum(1)
    ),
    "a hook before": lambda model: model.model.norm.register_forward_pre_hook(
        lambda norm, args: (args[0].cumsum(1),)
    ),
    "one of torch": lambda model: _replace_mlp(model, Batched(32, 32)),
    "a layer less": lambda model: model.model.layers.__delitem__(1),
}


@pytest.mark.parametrize("change", MIXERS.values(), ids=MIXERS)
def test_modules_that_may_mix_tokens_are_padded(change):
    model, batch = llama(), make_batch()
    change(model)
    patch_model(model)
    assert not model._una.packs
    found = model(**batch, una="tokens").logps
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6


@pytest.fixture
def registered():
    """Register an attention with a scale of its own, under a name of its own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(*args, scaling=None, **kwargs):
        return sdpa_attention_forward(*args, scaling=scaling * 0.5, **kwargs)

    tables = (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
    tables[0]["mine"], tables[1]["mine"] = attend, sdpa_mask
    yield attend
    for table in tables:
        del table["mine"]


def test_an_attention_that_a_user_registered_is_padded(registered, monkeypatch, caplog):
    """Documented by transformers; the packed attention would leave it out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    batch = make_batch()

    def error(model) -> float:
        return (model(**batch, una="tokens").logps - eager_logps(model, batch)).abs().max().item()

    model = build("LlamaConfig", implementation="mine")
    with pytest.raises(ValueError, match="pack=True, but the attention implementation 'mine'"):
        patch_model(model, pack=True)
    assert error(patch_model(model)) < 4e-6 and not model._una.packs
    model = patch_model(llama())
    assert model._una.packs and error(model) < 1e-5
    model.set_attn_implementation("mine")  # after the patch
    before = una_calls()["padded"]
    assert error(model) < 4e-6 and una_calls()["padded"] == before + 1
    assert "batches stay padded: the attention implementation 'mine'" in caplog.text
    model.set_attn_implementation("sdpa")
    assert error(model) < 1e-5 and una_calls()["padded"] == before + 1
    # Under a name of transformers.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", registered)
    assert error(model) < 4e-6 and una_calls()["padded"] == before + 2


def test_a_tuner_that_keeps_an_older_forward_is_refused():
    """AdaptionPrompt: the loss was silently the cross-entropy of the labels."""
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"Adapt\w+ keeps .* before get_peft_model"):
            patch_model(given)
    batch = make_batch()
    model = peft.get_peft_model(patch_model(llama()), config)
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            nn.init.normal_(parameter, std=0.1)
    patch_model(patch_model(model).get_base_model())
    found = model(**batch, una="tokens").logps
    assert (found - eager_logps(model, batch)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="keeps the forward of patch_model"):
        unpatch_model(model)


def test_a_model_that_accelerate_prepared_is_refused():
    """Scored calls would leave its autocast out."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    peft = pytest.importorskip("peft")
    model = accelerator.prepare_model(llama())
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = accelerator.prepare_model(adapted)
    accelerate.state.AcceleratorState._reset_state(True)  # the precision is of the process
    with pytest.raises(ValueError, match=r"runs under accelerate.*patch the model before accel"):
        patch_model(model)
    assert "_una" not in model.__dict__
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    batch = make_batch()
    truth = eager_logps(model, batch)
    assert (patch_model(model)(**batch, una="tokens").logps - truth).abs().max() < 1e-5
    other = llama()
    other.forward = torch.autocast("cpu", torch.bfloat16)(other.forward)
    with pytest.raises(ValueError, match=r"runs under torch\.amp"):
        patch_model(other)
    # The wrapper of a PeftModel stands over the forward of the model inside.
    inside = patch_model(adapted).get_base_model()
    rounded = adapted(**batch, una="tokens").logps
    assert (rounded - inside(**batch, una="tokens").logps).abs().max() > 1e-3


class OwnMLP(nn.Module):
    """An MLP of a user's class, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return self.linear(hidden).tanh()


class OwnLM(LlamaForCausalLM):
    """A class that changes the modules of its decoder when it is built."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config.hidden_size)
        self.post_init()


def outputs_asked(model):
    model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)


def compiled_layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")


def weight_normed(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("change", [outputs_asked, compiled_layers, weight_normed, None])
def test_changes_of_a_model_that_leave_it_packed(change):
    """By transformers and torch, and of modules by the class of the whole model."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = llama() if change else OwnLM(LlamaConfig(**SMALL)).eval()
    if change:
        change(model)
    batch = make_batch()
    patch_model(model, pack=True)
    before = una_calls()["packed"]
    found = model(**batch, una="tokens").logps
    assert una_calls()["packed"] == before + 1
    assert (found - eager_logps(model, batch)).abs().max() < 4e-6


def test_a_second_patch_of_experts_that_gave_router_logits_packs():
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = patch_model(build("MixtralConfig", SMALL | fields))
    batch = make_batch()
    out = model(**batch, una="tokens")
    assert out.aux_loss is not None and model._una.packs
    assert patch_model(model, workspace_mb=8)._una.packs


def test_models_without_positions_in_the_config_are_patched():
    model = patch_model(build("RecurrentGemmaConfig", RECURRENT))
    batch = make_batch()
    assert (model(**batch, una="tokens").logps - eager_logps(model, batch)).abs().max() < 4e-6


RECURRENT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "lru_width": 32,
    "attention_window_size": 64,
}


def test_hooks_that_cannot_be_compared_leave_a_model_as_it_is():
    """Of a model, where weights are not here; of its head, once they are gone."""
    with torch.device("meta"):
        outline = LlamaForCausalLM(LlamaConfig(**SMALL))
    outline.register_forward_hook(lambda *_: None)
    patch_model(outline)
    model = llama()
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    patch_model(model)
    hook.remove()
    again = pickle.loads(pickle.dumps(model))
    batch = make_batch()
    assert torch.equal(again(**batch, una="tokens").logps, model(**batch, una="tokens").logps)


def test_a_plain_head_is_not_called_by_the_patch():
    model = llama()
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    patch_model(model)
    assert not calls
    model(**make_batch(), una="tokens")
    assert len(calls) == 1


def test_layers_that_are_dropped_at_random_are_no_error():
    model = patch_model(build("OPTConfig").train())
    if not model._una.packs:
        pytest.skip("this transformers' OPT makes a mask of its own, and stays padded")
    model.model.decoder.layerdrop = 0.9
    for _ in range(4):
        assert model(**make_batch(), una="tokens").logps.isfinite().all()


def test_native_adapters_that_are_off_stay_off():
    peft = pytest.importorskip("peft")
    model = llama()
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    add_native_adapter(model, options)
    batch = make_batch()
    patch_model(model)

    def score() -> torch.Tensor:
        return model(**batch, una="tokens").logps

    with torch.no_grad():
        policy = score()
        with adapter_off(model):
            reference = score()
            with adapter_off(model):
                assert torch.equal(score(), reference)
            assert torch.equal(score(), reference) and not torch.equal(policy, reference)
        assert torch.equal(score(), policy)
        model.disable_adapters()
        with adapter_off(model):
            pass
        assert torch.equal(score(), reference)


# ---- threads ----


def _at_once(*functions):
    """Run functions in threads of their own, and return what they have raised."""
    errors = []

    def run(function):
        try:
            for _ in range(40):
                function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("pack", [True, False])
def test_threads_share_a_model(pack):
    """They broke it for good: the head kept a scorer, the config the packed attention."""
    model, twin = patch_model(llama(), pack=pack), llama()
    twin.lm_head = model.lm_head
    patch_model(twin, pack=pack)
    model.gradient_checkpointing_enable()
    batch, wrong = make_batch(), []
    truth = {one: one(**batch, una="responses").logps.detach() for one in (model, twin)}
    logits = model(input_ids=batch["input_ids"]).logits
    model.train()
    grads = gradients(model(**batch, una="responses").logps.sum(), model)

    def score(one):
        with torch.no_grad():
            wrong.append((one(**batch, una="responses").logps - truth[one]).abs().max())

    def own():
        with torch.no_grad():
            wrong.append((model(input_ids=batch["input_ids"]).logits - logits).abs().max())

    def backward():
        found = gradients(model(**batch, una="responses").logps.sum(), model)
        wrong.append(difference(found, grads))

    before = una_calls()["padded"]
    errors = _at_once(partial(score, model), partial(score, twin), own, backward)
    assert pack is False or una_calls()["padded"] == before
    assert not errors and max(wrong) < 1e-5
    assert "forward" not in model.lm_head.__dict__
    assert model.config._attn_implementation == "sdpa"
    assert copy.deepcopy(model)(**batch, una="responses").logps is not None


def test_a_thread_that_is_interrupted_does_not_keep_its_turn(monkeypatch):
    model, batch = patch_model(llama()), make_batch()
    truth = model(**batch, una="responses").logps
    interrupted = model.model.layers[1].mlp.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch, una="responses")
    interrupted.remove()
    found = []
    assert not _at_once(lambda: found.append(model(**batch, una="responses").logps))
    assert torch.equal(found[0], truth)
    monkeypatch.setattr(turns, "_LONGEST_WAIT", 0.01)
    with turns.turn(model.config, alone=False):
        (error,) = _at_once(lambda: model(**batch, una="responses"))
    assert isinstance(error, RuntimeError) and "another thread" in str(error)
    assert torch.equal(model(**batch, una="responses").logps, truth)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_layers_that_are_compiled_alone_are_counted():
    torch._dynamo.reset()
    model, batch = patch_model(llama()), make_batch()
    truth = model(**batch, una="tokens").logps
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for _ in range(3):
        assert (model(**batch, una="tokens").logps - truth).abs().max() < 1e-5
    torch._dynamo.reset()
