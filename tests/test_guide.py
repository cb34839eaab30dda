"""The commands around a run: merge, chat, data, init; and that no command says a word too many."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny import make_records, save_llama, write_jsonl
from una_fast.cli import main
from una_fast.guide.chat import load_speakers, side_by_side
from una_fast.guide.settings import ChatConfig
from una_fast.signals import Stopped

QUESTION = "why the cat sat"
LORA = ["--lora.r", "4", "--learning_rate", "0.05", "--max_steps", "4", "--batch_size", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a bfloat16 chat model, chats, and a LoRA run on them with a checkpoint."""
    root = tmp_path_factory.mktemp("guide")
    model = save_llama(root / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    data = write_jsonl(root / "chats.jsonl", make_records("chats", 12))
    words = ["--model", model, "--data", data, "--output_dir", str(root / "run"), *LORA]
    assert main(["train", *words, "--save_every", "2", "--progress", "false"]) == 0
    return root


def said_by(capsys, *words: str) -> str:
    """Return what a command prints; it must succeed, and say nothing on stderr."""
    capsys.readouterr()
    assert main(list(words)) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


# --- merge ----------------------------------------------------------------------------------------


def test_a_merge_is_the_float32_sum_in_the_dtypes_of_the_base(place, capsys, tmp_path):
    merged = tmp_path / "deep" / "merged"
    out = said_by(capsys, "merge", str(place / "run"), "--output_dir", str(merged))
    assert json.loads(out.splitlines()[-1]) == {"output_dir": str(merged)}
    base = load_file(place / "model" / "model.safetensors")
    adapter = load_file(place / "run" / "adapter_model.safetensors")
    found = load_file(merged / "model.safetensors")
    assert found.keys() == base.keys() and {t.dtype for t in found.values()} == {torch.bfloat16}
    changed = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{prefix}.lora_A.weight" in adapter:
            a, b = adapter[f"{prefix}.lora_A.weight"], adapter[f"{prefix}.lora_B.weight"]
            expected = (weight.float() + b.float() @ a.float()).bfloat16()  # alpha / r is 1
            changed += not torch.equal(expected, weight)
        assert torch.equal(found[name], expected), name
    assert changed == 14
    assert AutoModelForCausalLM.from_pretrained(merged).config.model_type == "llama"
    assert {path.name for path in merged.parent.iterdir()} == {"merged"}


def test_merge_refuses_by_name(place, capsys, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    refusals = {
        ("model", str(tmp_path / "new")): "holds a whole model, and no adapter to merge",
        ("run", str(there)): "is there already; set another",
    }
    for (run, output_dir), message in refusals.items():
        assert main(["merge", str(place / run), "--output_dir", output_dir]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- chat -----------------------------------------------------------------------------------------


def few(run: Path, **settings) -> ChatConfig:
    return ChatConfig(str(run), max_new_tokens=6, device="cpu", **settings)


def test_chat_answers_as_the_model_of_the_run_does(place, capsys):
    """Greedily, after the prompt that training encodes; before it, as the base model does."""
    words = ["chat", str(place / "run"), "--prompt", QUESTION, "--max_new_tokens", "6"]
    both = said_by(capsys, *words, "--compare")
    before, after = both.removeprefix("--- before\n").split("--- after\n")
    assert said_by(capsys, *words) == after != before
    base = ["chat", str(place / "model"), *words[2:]]
    assert said_by(capsys, *base) == before
    checkpoint = ["chat", str(place / "run" / "checkpoint-4"), *words[2:]]
    assert said_by(capsys, *checkpoint) == after

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    (speaker,) = load_speakers(few(place / "model"))
    ids = speaker.tokenizer(f"<s><|user|>{QUESTION}</s><|assistant|>", add_special_tokens=False)
    tokens = torch.tensor([ids["input_ids"]])
    with torch.no_grad():
        expected = model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :]
    assert speaker.answer(QUESTION, show=False) == speaker.tokenizer.decode(
        expected, skip_special_tokens=True
    )
    assert [turn["role"] for turn in speaker.messages] == ["user", "assistant"]
    second = speaker.answer("and why", show=False)
    speaker.messages.clear()
    assert second != speaker.answer("and why", show=False), "earlier turns are part of the prompt"


def test_chat_reads_prompts_line_by_line(place, capsys, monkeypatch):
    """Each on its own: an equal prompt has an equal answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nwhy\nthe cat\n"))
    out = said_by(capsys, "chat", str(place / "run"), "--max_new_tokens", "3")
    parts = out.split("> ")[1:]
    assert len(parts) == 3 and parts[0] == parts[2] and parts[1].startswith("why\n")


def test_ctrl_c_stops_an_answer_and_not_the_chat(place, monkeypatch):
    (speaker,) = load_speakers(few(place / "run"))
    heard = []

    def interrupted(text, stream_end=False):
        heard.append(text)
        raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr("una_fast.guide.chat._Shown.put", lambda self, value: interrupted(value))
        assert speaker.answer(QUESTION, show=False) == ""
    assert heard and speaker.answer("go on", show=False)
    for answers in (["the\x1b[2J", "a " * 60], ["", "x"]):
        rows = side_by_side(["before", "after"], answers, 100)
        assert all(len(row) <= 100 for row in rows) and rows[0].split() == ["before", "after"]


def test_a_model_without_a_template_goes_on_with_the_text(place, capsys, tmp_path):
    plain = save_llama(tmp_path / "plain", chat=False)
    assert main(["chat", plain, "--prompt", "the", "--max_new_tokens", "2"]) == 0
    assert "has no chat template, and goes on with your text" in capsys.readouterr().err
    assert main(["chat", plain, "--prompt", "the", "--compare"]) == 1
    assert "leave --compare out" in capsys.readouterr().err
