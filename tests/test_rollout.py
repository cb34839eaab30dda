"""Samples: drawn from the policy itself, equal for equal seeds, cut at their end."""

from __future__ import annotations

import sys
import types
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

import una_fast.online.generate as generate_module
from families import FAMILIES, build
from tiny import make_config, make_tokenizer
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.distributed import World
from una_fast.feedback import Feedback
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import load_policy
from una_fast.model.scoring import Scoring
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.online.generate import ContinuousSampler, TransformersSampler, page_setting
from una_fast.online.samplers import make_sampler
from una_fast.online.sampling import (
    Completion,
    SamplerError,
    Sampling,
    completion_text,
    stop_ids,
)

RAGGED = ([0, 5, 6, 7], [0, 9, 9, 9, 8, 7, 6, 5, 4, 40], [0], [0, 250])
PROMPTS = [np.array(ids, dtype=np.int32) for ids in RAGGED]
SAMPLERS = {"padded": TransformersSampler, "continuous": ContinuousSampler}


@pytest.fixture(scope="module")
def policy(llamas):
    return load_policy(llamas["untied"], dtype=torch.float32, packed=True)


@pytest.fixture(scope="module")
def tokenizer(llamas):
    return load_tokenizer(llamas["untied"])


def test_the_page_size_has_the_name_of_the_installed_transformers():
    """Up to transformers 5.17 the setting is block_size."""

    class Old:
        def __init__(self, block_size=256):
            """Take the old name."""

    class New:
        def __init__(self, page_size=256, block_size=None):
            """Take both names, the old one deprecated."""

    assert page_setting(Old) == "block_size" and page_setting(New) == "page_size"


def scored(policy, prompts, drawn, scoring=None):
    """Return the log-probs of the samples, prompt after prompt, as the trainer computes them."""
    no_units = Feedback.merge([])
    examples = []
    for prompt, completions in zip(prompts, drawn, strict=True):
        responses = tuple(completion.ids for completion in completions)
        examples.append(Example(prompt, responses, no_units, None, ""))
    batch = collate(examples, packed=policy.packed)
    return (scoring or Scoring()).logps(policy, batch).numpy()


def flat(drawn):
    return list(chain.from_iterable(drawn))


def ids_of(drawn):
    return [completion.ids.tolist() for completion in flat(drawn)]


def logps_of(drawn):
    return [completion.logp for completion in flat(drawn)]


def perturb_adapters(policy):
    """Give the adapters weights: new ones change nothing."""
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_log_probs_are_those_of_the_trainer(policy, tokenizer, kind):
    scoring = Scoring(temperature=0.6)
    sampling = Sampling(3, 11, temperature=0.6, stop_ids=tuple(range(1, 300, 9)))
    sampler = SAMPLERS[kind](policy, tokenizer, sampling, scoring=scoring)
    drawn = sampler.sample(PROMPTS, seed=1, version=7)
    assert [len(completions) for completions in drawn] == [3] * 4
    expected = scored(policy, PROMPTS, drawn, scoring)
    np.testing.assert_allclose(logps_of(drawn), expected, atol=2e-5)
    lengths = {len(completion.ids) for completion in flat(drawn)}
    assert len(lengths) > 2, "ragged, or the test tests nothing"
    for completion in flat(drawn):
        assert completion.ids.dtype == np.int32 and completion.version == 7
        stops = np.isin(completion.ids, sampling.stop_ids)
        assert not stops[:-1].any() and completion.finished == bool(stops[-1])
        assert completion.finished or len(completion.ids) == 11


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_seed_fixes_the_samples_and_leaves_the_random_state_alone(policy, tokenizer, kind):
    sampler = SAMPLERS[kind](policy, tokenizer, Sampling(2, 6, stop_ids=(1,)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = ids_of(sampler.sample(PROMPTS, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert ids_of(sampler.sample(PROMPTS, seed=1)) == first
    assert ids_of(sampler.sample(PROMPTS, seed=2)) != first
    assert len(set(map(tuple, first))) == len(first), "samples of one prompt differ"
    assert policy.model.training, "training goes on in train mode"


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_whole_distribution_whatever_the_model_would_like(policy, tokenizer, kind):
    """A repetition penalty or top_k in the model's generation config would change the samples."""
    own = policy.causal_lm.generation_config
    own.top_k, own.repetition_penalty, own.suppress_tokens, own.min_new_tokens = 2, 5.0, [9, 8], 5
    try:
        sampler = SAMPLERS[kind](policy, tokenizer, Sampling(1000, 1))
        (drawn,) = sampler.sample(PROMPTS[1:2], seed=0)
        assert policy.causal_lm.generation_config is own, "the config saved with the model stays"
    finally:
        own.top_k = own.repetition_penalty = own.suppress_tokens = own.min_new_tokens = None
    with torch.no_grad():
        logits = policy.causal_lm(torch.from_numpy(PROMPTS[1]).long()[None]).logits[0, -1]
    expected = torch.softmax(logits.double(), 0)
    tokens = torch.tensor([completion.ids[0] for completion in drawn])
    found = torch.bincount(tokens, minlength=len(expected)) / len(drawn)
    noise = (expected / len(drawn)).sqrt().sum() / 2
    assert (found - expected).abs().sum() / 2 < 1.2 * noise


def test_top_p_cuts_what_is_drawn_and_not_the_log_probs(policy, tokenizer):
    sampling = Sampling(40, 1, top_p=0.05)
    drawn = TransformersSampler(policy, tokenizer, sampling).sample(PROMPTS[:1], seed=0)
    assert len({int(completion.ids[0]) for completion in drawn[0]}) < 8
    np.testing.assert_allclose(logps_of(drawn), scored(policy, PROMPTS[:1], drawn), atol=1e-5)


def test_batches_of_sequences_keep_the_order_of_prompts(policy, tokenizer):
    sampler = TransformersSampler(policy, tokenizer, Sampling(2, 5), batch_size=4)
    drawn = sampler.sample(PROMPTS, seed=0)
    np.testing.assert_allclose(logps_of(drawn), scored(policy, PROMPTS, drawn), atol=1e-5)
    assert list(map(len, sampler.sample(PROMPTS, seed=0, samples=1))) == [1] * 4


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "MistralConfig", "Gemma3TextConfig", "GPT2Config", "MiniCPM3Config"]
)
def test_a_prompt_computed_once_gives_the_samples_of_one_computed_for_each(
    name, tokenizer, monkeypatch
):
    model = build(name, FAMILIES[name])
    policy = SimpleNamespace(causal_lm=model, model=model)
    prompts = [np.random.default_rng(0).integers(3, 97, n) for n in (21, 5)]
    tokens = []

    def count(module, args, kwargs):
        tokens.append(kwargs["input_ids"].numel())

    sampler = TransformersSampler(policy, tokenizer, Sampling(3, 8))
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    shared = ids_of(sampler.sample(prompts, seed=0))
    assert tokens[:2] == [2 * 20, 6], "prompts once, then the last tokens for every sample"
    monkeypatch.setattr(generate_module, "_shared_prefill", lambda *_: {})
    assert ids_of(sampler.sample(prompts, seed=0)) == shared
    handle.remove()


def test_stop_strings_end_a_response_even_where_the_policy_draws_padding(policy):
    sampling = Sampling(60, 14, stop_ids=(1,), stop_strings=("e", "a"))
    tokenizer = make_tokenizer()
    (drawn,) = TransformersSampler(policy, tokenizer, sampling).sample(PROMPTS[:1], seed=0)
    likely = np.bincount(np.concatenate([c.ids[1:-1] for c in drawn])).argmax()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(int(likely))
    (drawn,) = TransformersSampler(policy, tokenizer, sampling).sample(PROMPTS[:1], seed=0)
    assert sum(completion.finished for completion in drawn) > 10
    assert any(tokenizer.pad_token_id in completion.ids[:-1] for completion in drawn)

    def has_stop_string(ids) -> bool:
        text = tokenizer.decode(ids)
        return any(string in text for string in sampling.stop_strings)

    for completion in drawn:
        ids = completion.ids
        assert completion.finished == (has_stop_string(ids) or ids[-1] == 1)
        assert completion.finished or len(ids) == 14
        assert not has_stop_string(ids[:-1]), "a response ends with the first stop string"
    expected = scored(policy, PROMPTS[:1], [drawn])
    np.testing.assert_allclose(logps_of([drawn]), expected, atol=2e-5)


def test_adapters_checkpointing_and_autocast(llamas, tokenizer):
    memory = MemoryOptions(gradient_checkpointing=True)
    policy = load_policy(
        llamas["tied"], dtype=torch.bfloat16, lora=LoraOptions(r=2), memory=memory, packed=True
    )
    perturb_adapters(policy)
    scoring = Scoring(autocast=torch.bfloat16)
    sampler = TransformersSampler(policy, tokenizer, Sampling(4, 8), scoring=scoring)
    drawn = sampler.sample(PROMPTS, seed=0)
    with policy.reference_mode():
        assert ids_of(sampler.sample(PROMPTS, seed=0)) != ids_of(drawn), "the adapter takes part"
    expected = scored(policy, PROMPTS, drawn, scoring)
    np.testing.assert_allclose(logps_of(drawn), expected, atol=1.0)  # bf16


def test_tokens_that_end_a_response(policy, tokenizer):
    assert stop_ids(tokenizer, policy.causal_lm) == (1,)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 1]))
    assert stop_ids(tokenizer, model) == (1, 7)
    other = make_tokenizer()
    other.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>{% endfor %}"
    )
    assert stop_ids(other, model) == (1, 3, 7), "the template's end of turn"
    other.chat_template = "{{ raise_exception('no users') }}"
    assert stop_ids(other, model) == (1, 7)
    sampling = Sampling(1, 9, stop_ids=(1,))
    ids = tokenizer(" the cat", add_special_tokens=False)["input_ids"]

    def text(ids, tokenizer=tokenizer):
        completion = Completion(np.array(ids), True, 0.0, 0)
        return completion_text(tokenizer, np.array([0, 9]), completion, sampling)

    assert text([*ids, 1]) == text(ids) == text([*ids, 2]) == " the cat" and text([1]) == ""


def test_the_space_between_prompt_and_completion_is_part_of_its_text():
    """Decoders like Llama 2's take a space from the start of a text."""
    vocab = {"<s>": 0, "▁the": 1, "▁cat": 2, "▁sat": 3, "</s>": 4}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    strip = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(strip)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([3]) == "sat" and tokenizer.decode([1, 2]) == "the cat"
    completion = Completion(np.array([3, 4]), True, 0.0, 0)
    sampling = Sampling(1, 9, stop_ids=(4,))
    assert completion_text(tokenizer, np.array([0, 1, 2]), completion, sampling) == " sat"


def test_models_whose_caches_cannot_be_repeated_compute_the_prompt_for_each(tokenizer):
    config = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        pad_token_id=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config)
    policy = SimpleNamespace(causal_lm=model, model=model)
    drawn = TransformersSampler(policy, tokenizer, Sampling(3, 4)).sample(PROMPTS[:1], seed=0)
    assert [len(c.ids) for c in drawn[0]] == [4, 4, 4]


def test_a_stop_string_does_not_begin_in_the_prompt(policy):
    """A prompt that ends in x and a stop string xt: a completion t is not the end."""
    tokenizer = make_tokenizer()
    prompt = np.array(tokenizer("ca")["input_ids"], dtype=np.int32)
    sampler = TransformersSampler(policy, tokenizer, Sampling(200, 1))
    (likely,) = sampler.sample([prompt], seed=0)
    first = tokenizer.decode([np.bincount([c.ids[0] for c in likely]).argmax()])
    sampling = Sampling(60, 6, stop_strings=("a" + first,))
    (drawn,) = TransformersSampler(policy, tokenizer, sampling).sample([prompt], seed=0)
    whole = [completion.ids for completion in drawn if len(completion.ids) == 6]
    assert any(tokenizer.decode(ids).startswith(first) for ids in whole)


def test_a_policy_without_numbers_is_named(llamas, tokenizer):
    policy = load_policy(llamas["untied"], dtype=torch.float32)
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SamplerError, match="it has diverged; lower learning_rate"):
        TransformersSampler(policy, tokenizer, Sampling(2, 3)).sample(PROMPTS, seed=0)


def test_samplers_that_cannot_serve_are_refused(policy, tokenizer, llamas, tmp_path):
    online = {"mode": "online", "rewards": ["json:dumps"]}
    for generation, match in (
        ("continuous", "runs in one process, and this run has 2"),
        ("vllm", "one process"),
    ):
        config = make_config(llamas["untied"], "x.jsonl", tmp_path, generation=generation, **online)
        with pytest.raises(ValueError, match=match):
            make_sampler(config, policy, tokenizer, Scoring(), World(0, 2, torch.device("cpu")))
    alone = World(0, 1, torch.device("cpu"))
    message = "vllm is not installed; pip install vllm, or set generation: padded"
    with pytest.raises(ValueError, match=message):
        make_sampler(config, policy, tokenizer, Scoring(), alone)


def test_vllm_gets_the_policy_and_gives_ids_as_they_are(llamas, tokenizer, monkeypatch):
    """Against a stand-in with vLLM's names: the calls, and the completions made of the answers."""
    calls = {}

    class LLM:
        def __init__(self, **settings):
            calls["settings"] = settings
            model = SimpleNamespace(load_weights=lambda items: calls.update(weights=dict(items)))
            runner = SimpleNamespace(model=model)
            worker = SimpleNamespace(model_runner=runner)
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

        def reset_prefix_cache(self):
            calls["reset"] = True

        def generate(self, prompts, settings, use_tqdm):
            calls["asked"] = prompts, settings
            ids, logprob = [5, 6, 1], SimpleNamespace(logprob=-0.5)
            logprobs = [{i: logprob} for i in ids]
            whole = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop")
            cut = SimpleNamespace(token_ids=ids[:2], logprobs=logprobs[:2], finish_reason="length")
            return [SimpleNamespace(outputs=[whole, cut]) for _ in prompts]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delitem(sys.modules, "una_fast.online.vllm_sampler", raising=False)
    from una_fast.online.vllm_sampler import VllmSampler

    policy = load_policy(llamas["untied"], dtype=torch.float32, lora=LoraOptions(r=2))
    perturb_adapters(policy)
    sampling = Sampling(2, 9, stop_ids=(1,), stop_strings=("x",))
    sampler = VllmSampler(policy, tokenizer, sampling, model="m")
    drawn = sampler.sample(PROMPTS[:2], seed=5, version=3)
    monkeypatch.delitem(sys.modules, "una_fast.online.vllm_sampler")
    for completions in drawn:
        samples = [(c.ids.tolist(), c.finished, c.logp, c.version) for c in completions]
        assert samples == [([5, 6, 1], True, -1.5, 3), ([5, 6], False, -1.0, 3)]
    prompts, settings = calls["asked"]
    assert [p["prompt_token_ids"] for p in prompts] == [p.tolist() for p in PROMPTS[:2]]
    assert [s.seed for s in settings] == [5, 7]
    assert settings[0].stop_token_ids == [1] and settings[0].n == 2
    assert calls["settings"]["logprobs_mode"] == "processed_logprobs" and calls["reset"]
    plain = load_policy(llamas["untied"], dtype=torch.float32).causal_lm.state_dict()
    assert set(calls["weights"]) == set(plain), "the model's own names"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(calls["weights"][name], plain[name]), "with the adapter added in"
