"""The commands around a run: merge, chat, data, init; and that no command says a word too many."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny import make_records, save_llama, write_jsonl
from una_fast.cli import main
from una_fast.data.examples import load_examples
from una_fast.data.sources import Source
from una_fast.guide.chat import load_speakers, side_by_side
from una_fast.guide.data_view import example_lines
from una_fast.guide.look import has_responses
from una_fast.guide.settings import ChatConfig
from una_fast.settings_file import read_settings
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
    assert not (place / "run" / "checkpoint-4" / "README.md").exists(), "no empty card of peft's"
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


def test_chat_compares_a_whole_model_with_the_model_of_its_settings(place, capsys, tmp_path):
    run = str(tmp_path / "run")
    words = ["--model", str(place / "model"), "--data", str(place / "chats.jsonl")]
    words += ["--learning_rate", "0.01", "--max_steps", "2", "--batch_size", "4"]
    assert main(["train", *words, "--output_dir", run, "--progress", "false"]) == 0
    ask = ["--prompt", QUESTION, "--max_new_tokens", "6"]
    both = said_by(capsys, "chat", run, *ask, "--compare")
    before, after = both.removeprefix("--- before\n").split("--- after\n")
    assert said_by(capsys, "chat", str(place / "model"), *ask) == before
    assert said_by(capsys, "chat", run, *ask) == after != before


def test_a_person_ends_the_chat_with_ctrl_d(place, capsys, monkeypatch):
    typed = iter(["the cat", "", EOFError()])

    def read(_):
        line = next(typed)
        if isinstance(line, EOFError):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    out = said_by(capsys, "chat", str(place / "run"), "--max_new_tokens", "3")
    assert out.startswith("Ctrl-C stops an answer, Ctrl-D ends.\n") and out.count("\n") == 3


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


# --- data -----------------------------------------------------------------------------------------


def test_data_shows_records_as_they_are_trained_on(place, capsys, tmp_path):
    out = said_by(capsys, "data", str(place / "chats.jsonl"), "--model", str(place / "model"))
    record = make_records("chats", 1)[0]
    lines = out.splitlines()
    prompt, chosen = record["prompt"][0]["content"], record["chosen"][0]["content"]
    assert lines[0].endswith("chats.jsonl:1: pair, response 1 over 2")
    assert lines[1].endswith(f"tokens: <s><|user|>{prompt}</s><|assistant|>")
    assert lines[2].endswith(f"tokens: {chosen}[end: </s>]") and "\x1b" not in out
    assert "the chat template of the model renders 12 records" in out and out.count("---") == 3
    encoder = load_speakers(few(place / "model"))[0].encoder
    (example, *_), _ = load_examples(
        Source(str(place / "chats.jsonl")), encoder.tokenizer, require_unit_scores=True
    )
    coloured = example_lines(example, encoder.tokenizer, coloured=True)
    assert coloured[2].endswith(f"\x1b[32m{chosen}\x1b[0m\x1b[30;43m</s>\x1b[0m")
    assert json.loads(lines[-1]) == {
        "records": 12,
        "examples": 12,
        "refused": 0,
        "units": {"pair": 12},
    }


def test_data_tells_the_turns_that_are_not_trained_on(place, capsys, tmp_path):
    turns = [("user", "why"), ("assistant", "cat"), ("user", "so"), ("assistant", "mat")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = {"prompt": messages[:1], "completion": messages[1:], "label": True}
    data = write_jsonl(tmp_path / "turns.jsonl", [record])
    out = said_by(capsys, "data", data, "--model", str(place / "model"))
    between = "[not trained on: <|user|>so</s><|assistant|>]"
    assert f"tokens: cat</s>{between}mat[end: </s>]" in out


def test_a_chat_with_an_answer_is_no_prompt(tmp_path):
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    for number, (record, answered) in enumerate(
        [
            ({"messages": turns, "label": True}, True),
            ({"messages": turns[:1]}, False),
            ({"prompt": "why", "chosen": "a", "rejected": "b"}, True),
            ({"prompt": "why"}, False),
        ]
    ):
        data = write_jsonl(tmp_path / f"{number}.jsonl", [record])
        assert has_responses(Source(data)) == answered, record


def test_data_counts_every_refusal_by_its_kind(place, capsys, tmp_path):
    scores = [{"prompt": "a", "completion": "b", "score": score} for score in (7, 8.5, 0.5, 99)]
    records = [*scores, {"prompt": "a", "chosen": "b"}, {"prompt": "\x1b[2J", "completion": "x"}]
    data = write_jsonl(tmp_path / "x.jsonl", records)
    out = said_by(capsys, "data", data, "--model", str(place / "model"))
    assert "refused    4 of 6 records: a run stops at the first" in out
    assert "3 x score is ..., outside [..., ...], which the objective" in out
    assert "1 x column ... is missing" in out and f"{data}:5: column 'rejected' is missing" in out
    assert "\x1b" not in out and "6 records are plain text" not in out
    skipping = ["--on_bad_record", "skip", "--score_map", "sigmoid", "--n", "1"]
    out = said_by(capsys, "data", data, "--model", str(place / "model"), *skipping)
    assert "refused    1 of 6 records: a run leaves them out" in out


# --- init -----------------------------------------------------------------------------------------

ANY_SCORES = [{"prompt": "the", "completion": "cat sat", "score": s} for s in (1, 4.5, 5, 2)] * 3
KINDS = {
    "pairs": make_records("pairs", 12),
    "labels": make_records("labels", 12),
    "scores": ANY_SCORES,
    "online": [{"prompt": f"why the cat {n}"} for n in range(8)],
    "long": make_records("chats", 12),
}


@pytest.mark.parametrize("task", KINDS)
def test_init_writes_a_run_that_train_takes(place, capsys, tmp_path, task):
    data = write_jsonl(tmp_path / "x.jsonl", KINDS[task])
    out, run = str(tmp_path / "run.yaml"), str(tmp_path / "run")
    words = ["--model", str(place / "model"), "--data", data, "--out", out, "--output_dir", run]
    asked = ["--task", task] if task == "long" else []
    said = said_by(capsys, "init", *words, *asked)
    assert said.startswith(f"task       {task}\n") and f"next       una-fast train --config {out}"
    text = Path(out).read_text()
    settings = read_settings(out)
    assert text.count("\n# ") >= len(settings) and "# lengths    prompts" in text
    few_steps = ["--max_steps", "1", "--epochs", "null", "--progress", "false"]
    if task == "online":
        few_steps += ["--max_new_tokens", "8"]
    result = said_by(capsys, "train", "--config", out, *few_steps).splitlines()[-1]
    assert json.loads(result)["steps"] == 1
    assert settings.get("score_range") == ([1.0, 5.0] if task == "scores" else None)
    assert ("gradient_checkpointing" in settings) == (task == "long")
    is_text = task != "long"  # whose records are chats already
    assert settings.get("strings") == ("chat" if is_text else None)
    assert "the chat template of the model renders" in said
    assert main(["init", *words]) == 1 and "is there already" in capsys.readouterr().err


def test_init_fits_the_memory_and_says_what_is_refused(place, capsys, tmp_path):
    records = [*make_records("pairs", 40), {"prompt": "a", "chosen": "b"}]
    data = write_jsonl(tmp_path / "x.jsonl", records)
    words = ["init", "--model", str(place / "model"), "--data", data]
    tight = ["--out", str(tmp_path / "tight.yaml"), "--memory_gib", "0.002"]
    out = said_by(capsys, *words, *tight)
    settings = read_settings(tmp_path / "tight.yaml")
    assert settings["micro_batch_size"] < settings["batch_size"] and "GiB on this" not in out
    assert settings["on_bad_record"] == "skip" and "refused    1 of 41 records" in out
    assert main([*words, "--task", "labels", "--out", str(tmp_path / "no.yaml")]) == 1
    assert "holds pairs; set task: auto" in capsys.readouterr().err


def test_check_shows_the_tokenizer_and_a_rendered_record(place, capsys):
    out = said_by(capsys, "check", "--model", str(place / "model"))
    assert "context: 256 tokens\ntokens: eos '</s>' (1), pad '<pad>' (2), bos '<s>' (0)\n" in out
    assert "tokens: <s><|user|>What is the capital of France?</s><|assistant|>\n" in out
    assert "tokens: Paris.[end: </s>]\n" in out


# --- no word too many -----------------------------------------------------------------------------

HAPPY = """
import sys
from una_fast.cli import main

model, data, root = sys.argv[1:]
run = root + "/run"
few = ["--max_steps", "2", "--batch_size", "2", "--lora.r", "2", "--eval_fraction", "0.2"]
commands = [
    ["train", "--model", model, "--data", data, "--output_dir", run, "--save_every", "1", *few],
    ["precompute-ref", "--model", model, "--data", data, "--output_dir", root + "/cache"],
    ["plan", "--model", model, "--data", data, "--device", "cpu"],
    ["check", "--model", model],
    ["init", "--model", model, "--data", data, "--out", root + "/run.yaml"],
    ["data", data, "--model", model],
    ["chat", run, "--prompt", "why", "--max_new_tokens", "2", "--compare"],
    ["merge", run, "--output_dir", root + "/merged"],
    ["report", run],
    ["demo", "--from_scratch", "--quick", "--output_dir", root + "/demo"],
]
for words in commands:
    print("#", words[0], file=sys.stderr, flush=True)
    assert main(words) == 0, words
"""


def test_no_command_says_more_than_its_result(place, tmp_path):
    """On stderr, where warnings, tracebacks and bars of other packages go, there is nothing.

    In a process of its own, since packages warn when they are imported.
    """
    words = [str(place / "model"), str(place / "chats.jsonl"), str(tmp_path)]
    # Warnings that Python hides by default are no words to a person.
    run = subprocess.run([sys.executable, "-c", HAPPY, *words], capture_output=True, text=True)
    commands = [
        "train",
        "precompute-ref",
        "plan",
        "check",
        "init",
        "data",
        "chat",
        "merge",
        "report",
        "demo",
    ]
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [f"# {name}" for name in commands]
