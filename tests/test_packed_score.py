"""Packed rows score and train, through policy and fused head, as padded batches; for less."""

import numpy as np
import pytest
import torch

from families import PACKABLE, build, gradient_difference, gradients, without
from una_fast import Feedback, token_logps
from una_fast.attention.rows import attended_pairs
from una_fast.counters import FlopCounter
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.model.head_probe import probe_head
from una_fast.model.lora import add_lora
from una_fast.model.policy import make_policy
from una_fast.model.settings import LoraOptions, MemoryOptions

# Prompt, responses. With windows of 5: shorter than all, than some, and than the prompt or the
# response alone.
SHAPES = [(11, (9, 6, 14)), (7, (8,)), (3, (13, 1)), (1, (2, 4))]


def examples(shapes=SHAPES):
    rng = np.random.default_rng(5)

    def tokens(count):
        return rng.integers(3, 97, count, dtype=np.int32)

    found = []
    for prompt, responses in shapes:
        feedback = Feedback.scores(range(len(responses)), [0.5] * len(responses))
        found.append(Example(tokens(prompt), tuple(map(tokens, responses)), feedback, None, ""))
    return found


def score(policy, batch):
    """[N] log-probs, from the fused head, inside the model's forward."""
    head = policy.head

    def scorer(hidden, weight, bias):
        return token_logps(
            hidden, weight, batch.targets, bias, softcap=head.softcap, logit_scale=head.logit_scale
        )

    return policy.score(batch, scorer)


def enable_checkpointing(model, reentrant):
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_scores_are_padded_scores(name):
    model = build(name)
    policy = make_policy(model, probe_head(model), packed=True)
    packed, padded = (collate(examples(), packed=layout) for layout in (True, False))
    weights = torch.randn(len(packed.targets), generator=torch.Generator().manual_seed(6))

    ours, truth = score(policy, packed), score(policy, padded)
    assert (ours - truth).abs().max() <= 1e-5
    expected = gradients(model, truth @ weights)
    assert gradient_difference(gradients(model, ours @ weights), expected) <= 1e-4

    # Checkpointed layers run again in backward, after the policy has put the model's own
    # implementation back.
    for reentrant in (False, True) if model.supports_gradient_checkpointing else ():
        enable_checkpointing(model, reentrant)
        found = gradients(model, score(policy, packed) @ weights)
        assert gradient_difference(found, expected) <= 1e-4, f"use_reentrant={reentrant}"


def test_adapters_train_packed_as_padded():
    found = {}
    for layout in (True, False):
        base = build("Gemma2Config")
        head = probe_head(base)
        model = add_lora(base, LoraOptions(r=4))
        generator = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1, generator=generator)
        policy = make_policy(model, head, MemoryOptions(gradient_checkpointing=True), packed=layout)
        logps = score(policy, collate(examples(), packed=layout))
        found[layout] = logps.detach(), gradients(model, logps.sin().sum())
    assert (found[True][0] - found[False][0]).abs().max() <= 1e-5
    assert gradient_difference(found[True][1], found[False][1]) <= 1e-4


# ---- how much work -----------------------------------------------------------------------------


def brute_force_pairs(segments, window):
    pairs = 0
    for segment in segments:
        prompt = list(range(*segment.prompt))
        for before, columns in [([], prompt), *((prompt, range(*r)) for r in segment.responses)]:
            keys = len(before) + len(columns)
            query, key = np.arange(len(before), keys)[:, None], np.arange(keys)[None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            pairs += int(visible.sum())
    return pairs


@pytest.mark.parametrize("window", [None, 1, 2, 5, 11, 12, 20, 25, 1000])
def test_attended_pairs_are_those_of_the_enumeration(window):
    segments = collate(examples(), packed=True).segments
    assert attended_pairs(segments, window) == brute_force_pairs(segments, window)


def test_a_pair_with_a_long_prompt_costs_half():
    """Prompt : response = 16 : 1. 18 of 34 tokens, 41360 of 74256 (query, key) pairs."""
    model = build("LlamaConfig", without(max_position_embeddings=512, intermediate_size=64))
    policy = make_policy(model, probe_head(model), packed=True)
    flop = {}
    for layout in (True, False):
        batch = collate(examples([(256, (16, 16))]), packed=layout)
        with FlopCounter() as counter:  # SDPA's products are not among those that it counts
            policy.score(batch, lambda hidden, weight, bias: hidden).sum().backward()
        flop[layout] = counter.flop
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert flop[False] >= 6 * weights * 2 * 272, "every linear layer is counted, three products"
    assert flop[True] <= 0.53 * flop[False]

    pair = collate(examples([(256, (16, 16))]), packed=True).segments
    alone = collate(examples([(256, (16,))]), packed=True).segments
    assert attended_pairs(pair) <= 0.56 * 2 * attended_pairs(alone)
