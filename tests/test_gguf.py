"""GGUF files as models: the same numbers, ordinary weights after a run, damage by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import save_gguf
from tiny import make_config, make_records, write_jsonl
from una_fast.model.gguf import read_header
from una_fast.model.loading import load_causal_lm, load_tokenizer, sized_outline
from una_fast.model.places import find
from una_fast.model.stored import StoredDtypes
from una_fast.train.loop import train


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write tiny GGUF files: {"plain": (file, model), "half": ..., "blocks": ...}."""
    root = tmp_path_factory.mktemp("gguf")
    return {
        "plain": save_gguf(root / "plain.gguf"),
        "half": save_gguf(root / "half.gguf", half=True),
        "blocks": save_gguf(root / "blocks.gguf", quantized=True),
    }


@pytest.mark.parametrize("kind", ["plain", "half", "blocks"])
def test_weights_are_the_numbers_of_the_file(models, kind):
    file, truth = models[kind]
    model = load_causal_lm(file, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    theirs = truth.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    bf16 = load_causal_lm(file, dtype=torch.bfloat16)
    for name, tensor in bf16.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name].bfloat16(), rtol=0, atol=0)


def test_the_table_of_names_is_made_once(models, monkeypatch):
    """Once for every module, as transformers asks for it, takes a minute for 100 layers."""
    made = []

    def table(*arguments):
        made.append(arguments)
        return original(*arguments)

    original = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", table)
    load_causal_lm(models["plain"][0], dtype=torch.float32)
    assert len(made) == 1 and gguf.get_tensor_name_map is table


def test_tokenizer_and_template_come_from_the_file(models):
    file, _ = models["plain"]
    ours = load_tokenizer(file)
    theirs = AutoTokenizer.from_pretrained(Path(file).with_suffix(""))
    text = "the cat sat on a mat <|user|> why"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_an_outline_and_the_stored_dtypes_need_no_numbers(models):
    file, truth = models["plain"]
    shapes = {name: tensor.shape for name, tensor in sized_outline(file).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in truth.state_dict().items()}
    usual = {kind: StoredDtypes.of(models[kind][0]).base.usual for kind in models}
    assert usual == {"plain": torch.float32, "half": torch.float16, "blocks": None}


def test_a_directory_with_one_file_is_the_file(models, tmp_path):
    file, _ = models["plain"]
    (tmp_path / "model.gguf").symlink_to(file)
    assert find(tmp_path, "model") == str(tmp_path / "model.gguf")
    (tmp_path / "other.gguf").symlink_to(file)
    with pytest.raises(ValueError, match="2 GGUF files: model.gguf, other.gguf; give the path"):
        find(tmp_path, "model")


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_saves_ordinary_weights(models, tmp_path, lora):
    """A whole model loads by transformers alone; an adapter by una_fast, from the named file."""
    file, truth = models["blocks"]
    data = write_jsonl(tmp_path / "data.jsonl", make_records("chats", 4))
    settings = {"lora": {"r": 2}} if lora else {}
    config = make_config(file, [data], tmp_path / "run", max_steps=2, batch_size=2, **settings)
    train(config)
    model = load_causal_lm(tmp_path / "run", dtype=torch.float32)
    if lora:
        saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == file
        name = "base_model.model.model.embed_tokens.weight"
        torch.testing.assert_close(
            model.state_dict()[name], truth.model.embed_tokens.weight, rtol=0, atol=0
        )
        card = (tmp_path / "run" / "README.md").read_text()
        assert "gguf_file='blocks.gguf'" in card
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
        assert not torch.equal(plain.lm_head.weight, truth.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer("the cat")["input_ids"] == load_tokenizer(file)("the cat")["input_ids"]


# ---- damage ------------------------------------------------------------------------------------


def rewritten(file: str, target: Path, change) -> Path:
    content = bytearray(Path(file).read_bytes())
    target.write_bytes(change(content))
    return target


def first_shape(content: bytes) -> int:
    """Return where the dimensions of the table's first tensor stand."""
    return content.index(b"token_embd.weight") + len("token_embd.weight") + 4


def with_huge_shape(content):
    content[first_shape(content) : first_shape(content) + 8] = struct.pack("<Q", 10**12)
    return content


def with_many_fields(content):
    content[16:24] = struct.pack("<Q", 2**60)
    return content


def with_long_array(content):
    at = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    content[at : at + 8] = struct.pack("<Q", 2**50)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "ends at byte"),
        (lambda content: content[:200], "ends inside its header"),
        (lambda content: content[:10], "10 bytes, too few"),
        (lambda content: b"PK\3\4" + content[4:], "not with GGUF"),
        (lambda content: content[:4] + b"\0\0\0\3" + content[8:], "version 50331648"),
        (with_huge_shape, "ends at byte"),
        (with_many_fields, "ends inside its header"),
        (with_long_array, "ends inside its header"),
    ],
)
def test_damage_is_named_in_one_line(models, tmp_path, change, message):
    file = rewritten(models["plain"][0], tmp_path / "damaged.gguf", change)
    for load in (load_tokenizer, lambda path: load_causal_lm(path, dtype=torch.float32)):
        with pytest.raises(ValueError, match=message) as error:
            load(file)
        assert "damaged.gguf" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "nonsense"}, "nonsense"),
        ({"llama__block_count": 10**6}, "block_count=1000000 is larger"),
        ({"llama__block_count": 100}, "says that it has 100 layers, and holds 2"),
        ({"llama__embedding_length": 2**20}, "larger model than its weight files"),
        ({"general__type": "adapter"}, "type 'adapter', not a language model"),
        ({"split__count": 3}, "one of 3 parts"),
    ],
)
def test_another_header_is_refused_by_name(tmp_path, fields, message):
    file, _ = save_gguf(tmp_path / "strange.gguf", **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_causal_lm(file, dtype=torch.float32)
    assert "strange" in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_the_command_is_named(models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        read_header(models["plain"][0])
