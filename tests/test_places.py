"""Names of models on the hub, with a revision, from a local copy of the hub; places by name."""

from __future__ import annotations

import json

import pytest
import torch

from tiny import make_config, make_records, save_llama, write_jsonl
from una_fast.model.loading import load_causal_lm, load_config, load_tokenizer, model_and_adapter
from una_fast.model.places import find, pretrained
from una_fast.train.loop import train

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Save ann/tiny in two revisions as the hub's client keeps models."""
    root = tmp_path_factory.mktemp("hub")
    for seed, (branch, commit) in enumerate(COMMITS.items()):
        repository = root / "models--ann--tiny"
        save_llama(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return root


@pytest.fixture
def hub(cache, monkeypatch):
    """Let the hub's client find the copy alone; return the directory of every revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshots = cache / "models--ann--tiny" / "snapshots"
    return {branch: snapshots / commit for branch, commit in COMMITS.items()}


def head_of(path) -> torch.Tensor:
    return load_causal_lm(path, dtype=torch.float32).get_output_embeddings().weight


@pytest.mark.parametrize("revision", ["v2", COMMITS["v2"]])
def test_a_revision_is_part_of_the_name(hub, revision):
    name = f"ann/tiny@{revision}"
    assert torch.equal(head_of(name), head_of(hub["v2"]))
    assert torch.equal(head_of("ann/tiny"), head_of(hub["main"]))
    assert not torch.equal(head_of(name), head_of("ann/tiny"))
    assert load_config(name).vocab_size == len(load_tokenizer(name))


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(ValueError, match="ann/tiny@v3"):
        load_causal_lm("ann/tiny@v3", dtype=torch.float32)


def test_an_adapter_goes_back_to_the_revision_of_its_base(hub, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", make_records("pairs", 4))
    run = tmp_path / "run"
    train(make_config("ann/tiny@v2", [data], run, max_steps=1, lora={"r": 2}))
    saved = json.loads((run / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("ann/tiny", "v2")
    assert model_and_adapter(run)[0] == "ann/tiny@v2"
    assert torch.equal(head_of(run), head_of(hub["v2"]))


def test_a_directory_may_have_the_name_of_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann").mkdir()
    model = save_llama(tmp_path / "ann" / "tiny@v2")
    assert find("ann/tiny@v2", "model") == model
    assert pretrained(model) == (model, {})
