"""Models that also read images, trained on text: the tower frozen, named, and saved as it came."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
)

from tiny import make_config, make_records, make_tokenizer, write_jsonl
from una_fast.attention.probe import packing_refusal
from una_fast.data.batch import collate
from una_fast.data.examples import load_examples
from una_fast.data.sources import Source
from una_fast.model.activations import find_mlps
from una_fast.model.loading import load_causal_lm, load_tokenizer
from una_fast.model.policy import load_policy
from una_fast.model.scoring import Scoring
from una_fast.train.loop import train

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=299,
    )
    return LlavaForConditionalGeneration(config)


def gemma3():
    config = Gemma3Config(
        vision_config=VISION, text_config={**TEXT, "head_dim": 8}, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=tower)
    return Qwen2VLForConditionalGeneration(config)


MODELS = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl}
TOWERS = {
    "llava": "model.vision_tower, model.multi_modal_projector",
    "gemma3": "model.vision_tower, model.multi_modal_projector",
    "qwen2_vl": "model.visual",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Save a tiny model of every kind, with the tokenizer of the tests."""
    root = tmp_path_factory.mktemp("vision")
    found = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        found[name] = str(root / name)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("d") / "data.jsonl", make_records("chats", 4))


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_model(directories, data, name):
    """Packed, where the probe allows, against the model's own logits."""
    path = directories[name]
    own = load_causal_lm(path, dtype=torch.float32)
    assert type(own) is type(MODELS[name]())
    packed = packing_refusal(own) is None
    policy = load_policy(path, dtype=torch.float32, packed=packed)
    examples, _ = load_examples(Source(data), load_tokenizer(path), require_unit_scores=True)
    found = Scoring().logps(policy, collate(examples, packed=packed))
    truth = []
    for example in examples:
        for response in example.responses:
            ids = torch.from_numpy(np.concatenate([example.prompt_ids, response])).long()
            logits = own(input_ids=ids[None]).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(1, ids[1:, None])
            truth.append(logps[-len(response) :].sum())
    torch.testing.assert_close(found, torch.stack(truth).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_trains_the_text_model_alone(directories, data, tmp_path, capsys, name, lora):
    settings = {"lora": {"r": 2}} if lora else {"learning_rate": 1e-3}
    config = make_config(
        directories[name], [data], tmp_path / "run", max_steps=2, batch_size=2, **settings
    )
    train(config)
    assert f"frozen     {TOWERS[name]}: text does not run through" in capsys.readouterr().out
    before = load_causal_lm(directories[name], dtype=torch.float32).state_dict()
    trained = load_causal_lm(tmp_path / "run", dtype=torch.float32)
    if lora:
        adapted = [key for key, _ in trained.named_parameters() if ".lora_" in key]
        assert adapted and not any("vis" in key for key in adapted)
        return
    changed = {k for k, w in trained.state_dict().items() if not torch.equal(w, before[k])}
    towers = tuple(TOWERS[name].split(", "))
    assert changed and not any(key.startswith(towers) for key in changed)
    assert type(MODELS[name]()).from_pretrained(tmp_path / "run") is not None


@pytest.mark.parametrize("name", MODELS)
def test_mlps_are_those_of_the_text_model(directories, name):
    model = load_causal_lm(directories[name], dtype=torch.float32)
    text = set(model.get_decoder().modules())
    mlps = find_mlps(model)
    assert len(mlps) == 2 and text.issuperset(mlps)


def test_a_model_without_text_is_refused_by_its_class(tmp_path):
    ViTConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTConfig") as error:
        load_causal_lm(tmp_path, dtype=torch.float32)
    assert "\n" not in str(error.value)
