"""Generation does not notice that a model is trained on packed rows."""

import numpy as np
import pytest
import torch
from test_attention import FAMILIES, build
from transformers import PreTrainedConfig
from una_fast.model.head_probe import probe_head

from una_fast import Feedback, token_logps
from una_fast.attention.packed import PACKED, packed_attention
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.model.policy import make_policy

CHECKPOINTING = {"plain": None, "checkpointed": False, "reentrant": True}  # use_reentrant


def generate(model, batched=True):
    """Greedy and sampled continuations of two prompts; the shorter is padded on the left."""
    model.eval()
    prompts = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    prompts[0, :4], mask[0, :4] = 0, 0
    settings = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    if not batched:
        return [
            model.generate(p[m.bool()][None], **settings)[0, -9:]
            for p, m in zip(prompts, mask, strict=True)
        ]
    torch.manual_seed(7)
    sampled = model.generate(prompts, attention_mask=mask, do_sample=True, **settings)
    greedy = model.generate(prompts, attention_mask=mask, do_sample=False, **settings)
    return torch.cat([greedy, sampled])[:, 11:]


def policy_of(name, reentrant=None):
    model = build(name, FAMILIES[name])
    policy = make_policy(model, probe_head(model), packed=True)
    assert policy.packed
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return policy


def step(policy, lr):
    """One packed training step: forward, backward, SGD."""
    policy.model.train()
    rng = np.random.default_rng(3)
    tokens = [rng.integers(3, 97, n, dtype=np.int32) for n in (8, 7, 12)]
    example = Example(tokens[0], tuple(tokens[1:]), Feedback.pairs([0], [1]), None, "")
    batch = collate([example], packed=True)
    loss = policy.score(
        batch, lambda hidden, weight, bias: token_logps(hidden, weight, batch.targets, bias).sum()
    )
    policy.model.zero_grad()
    loss.backward()
    torch.optim.SGD(policy.trainable_parameters(), lr=lr).step()


def assert_clean(model):
    assert all(
        c._attn_implementation != PACKED
        for m in model.modules()
        if isinstance(c := vars(m).get("config"), PreTrainedConfig)
    )


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma3TextConfig", "GPT2Config"])
def test_generation_before_between_and_after_packed_steps(name, reentrant):
    policy = policy_of(name, reentrant)
    model = policy.causal_lm
    before = generate(model)
    assert torch.equal(before[:2], torch.stack(generate(model, batched=False))), (
        "left padding is masked"
    )
    for _ in range(2):
        step(policy, lr=0.0)
        assert torch.equal(generate(model), before)

    step(policy, lr=3e-2)
    fresh = build(name, FAMILIES[name])
    fresh.load_state_dict(model.state_dict())
    changed = generate(fresh)
    assert not torch.equal(changed, before), "the step must matter"
    assert torch.equal(generate(model), changed)
    step(policy, lr=0.0)
    assert torch.equal(generate(model), changed)


@pytest.mark.parametrize("call", [0, 1, 2], ids=["first forward", "later forward", "recomputation"])
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_generation_after_an_exception_in_a_packed_pass(part, call):
    policy = policy_of("MistralConfig", reentrant=False)
    before = generate(policy.causal_lm)
    if call:
        step(policy, lr=0.0)
    calls, layer = 0, policy.causal_lm.model.layers[0]

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == max(call, 1):
            raise RuntimeError("out of memory")

    handle = (
        layer.self_attn.o_proj if part == "attention" else layer.mlp
    ).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(policy, lr=0.0)
    handle.remove()
    assert_clean(policy.causal_lm)
    assert torch.equal(generate(policy.causal_lm), before)
    step(policy, lr=0.0)
    assert torch.equal(generate(policy.causal_lm), before)


def test_generation_inside_the_block_is_refused():
    model = build("LlamaConfig", FAMILIES["LlamaConfig"])
    with (
        packed_attention(model),
        pytest.raises(ValueError, match="attention_mask=None|una_segments"),
    ):
        generate(model)
    assert_clean(model)
