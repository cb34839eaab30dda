"""Through the policy and the fused head, packed rows score and train as padded batches do, for less work."""

import copy
import logging

import numpy as np
import pytest
import torch
from test_attention import FAMILIES, REFUSED, build, gradient_difference, gradients, without
from una_fast.model.head_probe import probe_head

from una_fast import Feedback, token_logps
from una_fast.attention.rows import Segment, attended_pairs
from una_fast.counters import FlopCounter
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.model.policy import make_policy

# Prompt, responses. With windows of 5: shorter than all, than some, and than the prompt or the response alone.
SHAPES = [(11, (9, 6, 14)), (7, (8,)), (3, (13, 1)), (1, (2, 4))]


def examples(shapes=SHAPES):
    rng = np.random.default_rng(5)

    def tokens(count):
        return rng.integers(3, 97, count, dtype=np.int32)

    return [
        Example(
            tokens(prompt),
            tuple(map(tokens, responses)),
            Feedback.scores(range(len(responses)), [0.5] * len(responses)),
            None,
            "",
        )
        for prompt, responses in shapes
    ]


def policy_of(name, fields):
    model = build(name, fields)
    return make_policy(model, probe_head(model), packed=True)


def score(policy, batch):
    """[N] log-probs, from the fused head, inside the model's forward."""
    head = policy.head

    def scorer(hidden, weight, bias):
        return token_logps(
            hidden, weight, batch.targets, bias, softcap=head.softcap, logit_scale=head.logit_scale
        )

    return policy.score(batch, scorer)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_scores_are_padded_scores(name):
    policy = policy_of(name, FAMILIES[name])
    model = policy.causal_lm
    assert policy.packed
    packed, padded = (collate(examples(), packed=layout) for layout in (True, False))
    weights = torch.randn(len(packed.targets), generator=torch.Generator().manual_seed(6))

    ours, truth = score(policy, packed), score(policy, padded)
    assert (ours - truth).abs().max() <= 1e-5
    expected = gradients(model, truth @ weights)
    assert gradient_difference(gradients(model, ours @ weights), expected) <= 1e-4

    # Checkpointed layers run again in backward, after the policy has put the model's own implementation back.
    for reentrant in (False, True) if model.supports_gradient_checkpointing else ():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model, score(policy, packed) @ weights)
        assert gradient_difference(found, expected) <= 1e-4, f"use_reentrant={reentrant}"


def test_a_refused_model_is_scored_padded_with_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="una_fast"):
        policy = policy_of("GPTJConfig", REFUSED["GPTJConfig"] | {"n_positions": 256})
    assert not policy.packed
    lines = [record.message for record in caplog.records if "pack" in record.message]
    assert len(lines) == 1 and lines[0].startswith("batches are padded, not packed: GPTJModel"), (
        lines
    )
    batch = collate(examples(), packed=policy.packed)
    logits = copy.deepcopy(policy.causal_lm)(
        batch.input_ids, attention_mask=batch.attention_mask
    ).logits
    truth = logits.flatten(0, 1)[batch.rows].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert (score(policy, batch) - truth).abs().max() <= 1e-5


# ---- how much work -------------------------------------------------------------------------------------------------


def brute_force_pairs(segments, window):
    pairs = 0
    for segment in segments:
        prompt = list(range(*segment.prompt))
        for before, columns in [([], prompt), *((prompt, range(*r)) for r in segment.responses)]:
            keys = [*before, *columns]
            for query in range(len(before), len(keys)):
                pairs += sum(
                    key <= query and (window is None or key > query - window)
                    for key in range(len(keys))
                )
    return pairs


@pytest.mark.parametrize("window", [None, 1, 2, 5, 11, 12, 20, 25, 1000])
def test_attended_pairs_are_those_of_the_enumeration(window):
    segments = collate(examples(), packed=True).segments
    assert attended_pairs(segments, window) == brute_force_pairs(segments, window)


def test_a_pair_with_a_long_prompt_costs_half():
    """Prompt : response = 16 : 1. 18 of 34 tokens, 41360 of 74256 (query, key) pairs; forward and backward."""
    policy = policy_of("LlamaConfig", without(max_position_embeddings=512, intermediate_size=64))
    flop = {}
    for layout in (True, False):
        batch = collate(examples([(256, (16, 16))]), packed=layout)
        with FlopCounter() as counter:  # SDPA's products are not among those that it counts
            policy.score(batch, lambda hidden, weight, bias: hidden).sum().backward()
        flop[layout] = counter.flop
    weights = sum(p.numel() for p in policy.causal_lm.model.layers.parameters() if p.dim() == 2)
    assert flop[False] >= 6 * weights * 2 * 272, (
        "every linear layer is counted, three products each"
    )
    assert flop[True] <= 0.53 * flop[False]

    pair = (Segment((0, 256), ((256, 272), (272, 288))),)
    alone = (Segment((0, 256), ((256, 272),)),)
    assert attended_pairs(pair) <= 0.56 * 2 * attended_pairs(alone)
