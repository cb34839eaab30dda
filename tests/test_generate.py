"""Generation does not notice that a model is trained on packed rows."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from families import build
from una_fast import Feedback, token_logps
from una_fast.attention.packed import PACKED, packed_attention
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.model.head_probe import probe_head
from una_fast.model.policy import make_policy

NEW_TOKENS = 7


def generate(model):
    """Greedy and sampled continuations of two prompts; the shorter is padded on the left."""
    model.eval()
    prompts, mask = padded_prompts()
    settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(7)
    sampled = model.generate(prompts, attention_mask=mask, do_sample=True, **settings)
    greedy = model.generate(prompts, attention_mask=mask, do_sample=False, **settings)
    return torch.cat([greedy, sampled])[:, -NEW_TOKENS:]


def generate_alone(model):
    """Greedy continuations of the two prompts, one by one and without padding."""
    prompts, mask = padded_prompts()
    settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
    alone = [p[m.bool()][None] for p, m in zip(prompts, mask, strict=True)]
    return torch.cat([model.generate(p, **settings)[:, -NEW_TOKENS:] for p in alone])


def padded_prompts():
    prompts = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    prompts[0, :4], mask[0, :4] = 0, 0
    return prompts, mask


def policy_of(name, reentrant=None):
    """A packed policy; reentrant: use_reentrant of checkpointing, None without checkpointing."""
    model = build(name)
    policy = make_policy(model, probe_head(model), packed=True)
    if reentrant is not None:
        old = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", old)
        enable({"use_reentrant": reentrant})
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
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            assert config._attn_implementation != PACKED


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        ("LlamaConfig", True),
        ("MistralConfig", False),
        ("Gemma3TextConfig", None),
        ("GPT2Config", False),
    ],
)
def test_generation_before_between_and_after_packed_steps(name, reentrant):
    policy = policy_of(name, reentrant)
    model = policy.causal_lm
    before = generate(model)
    assert torch.equal(before[:2], generate_alone(model)), "left padding is masked"
    for _ in range(2):
        step(policy, lr=0.0)
        assert torch.equal(generate(model), before)

    step(policy, lr=3e-2)
    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    changed = generate(fresh)
    assert not torch.equal(changed, before), "the step must matter"
    assert torch.equal(generate(model), changed)


@pytest.mark.parametrize(
    ("place", "call"),
    [("attention", 0), ("attention", 1), ("attention", 2), ("mlp", 1), ("mlp", 2)],
    ids=str,
)
def test_generation_after_an_exception_in_a_packed_pass(place, call):
    """In the first forward (call 0), in a later forward (1), in the recomputation (2)."""
    policy = policy_of("MistralConfig", reentrant=False)
    before = generate(policy.causal_lm)
    if call:
        step(policy, lr=0.0)
    layer = policy.causal_lm.model.layers[0]
    module = layer.self_attn.o_proj if place == "attention" else layer.mlp
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == max(call, 1):
            raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(policy, lr=0.0)
    handle.remove()
    assert_clean(policy.causal_lm)
    assert torch.equal(generate(policy.causal_lm), before)
    step(policy, lr=0.0)
    assert_clean(policy.causal_lm)


def test_generation_inside_the_block_is_refused():
    model = build("LlamaConfig")
    message = "attention_mask=None|una_segments"
    with packed_attention(model), pytest.raises(ValueError, match=message):
        generate(model)
    assert_clean(model)
