"""Records as people have them: ShareGPT, dialogues, parts of text, tools, files, several turns."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from tiny import CHAT_TEMPLATE, make_tokenizer, write_jsonl
from una_fast.data.batch import collate
from una_fast.data.chat_template import render_chat
from una_fast.data.examples import load_examples, load_prompts
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import load_policy
from una_fast.model.scoring import Scoring

SHORT = "{% if short %}in short: {% endif %}"
TOOL_TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
TOOL_TEMPLATE = TOOL_TEMPLATE.replace("<|assistant|>{% endif", f"<|assistant|>{SHORT}{{% endif")
TOOL_TEMPLATE = TOOL_TEMPLATE.replace(
    "{{ m.content", "{% if m.role == 'assistant' %}" + SHORT + "{% endif %}{{ m.content"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer):
    """Load records, perhaps as prompts or with another tokenizer; options are keywords."""

    def run(*records, prompts=False, tokenizer=tokenizer, **options):
        path = write_jsonl(tmp_path / "rows.jsonl", records)
        source = Source(path, options=RecordOptions(**options))
        if prompts:
            return load_prompts(source, tokenizer)[0]
        return load_examples(source, tokenizer, require_unit_scores=True)[0]

    return run


def turn(role, content):
    return {"role": role, "content": content}


def said(speaker, value):
    return {"from": speaker, "value": value}


def texts(example, tokenizer):
    """Return the prompt and the responses of an example as text."""
    return [tokenizer.decode(ids) for ids in (example.prompt_ids, *example.responses)]


PROMPT = [turn("user", "the cat")]
PAIR = {"prompt": PROMPT, "chosen": [turn("assistant", "sat")], "rejected": "ran"}


# ---- other names, the same record --------------------------------------------------------------

SAME = {
    "whole chats": {
        "chosen": [*PROMPT, turn("assistant", "sat")],
        "rejected": [*PROMPT, turn("assistant", "ran")],
    },
    "sharegpt": {
        "conversations": [said("human", "the cat")],
        "chosen": said("gpt", "sat"),
        "rejected": said("gpt", "ran"),
    },
    "messages": {"messages": PROMPT, "chosen": "sat", "rejected": "ran"},
    "parts": {
        "prompt": [turn("user", [{"type": "text", "text": "the "}, {"text": "cat"}])],
        "chosen": "sat",
        "rejected": "ran",
    },
    "dialogues": {
        "chosen": "\n\nHuman: the cat\n\nAssistant: sat",
        "rejected": "\n\nHuman: the cat\n\nAssistant: ran",
    },
    "a dialogue to go on with": {
        "prompt": "\n\nHuman: the cat\n\nAssistant:",
        "chosen": "sat",
        "rejected": "ran",
    },
    "dialogues beside their beginning": {
        "prompt": "\n\nHuman: the cat",
        "chosen": "\n\nHuman: the cat\n\nAssistant: sat",
        "rejected": "\n\nHuman: the cat\n\nAssistant: ran",
    },
    "texts": {"prompt": "the cat", "chosen": "sat", "rejected": "ran"},
    "text beside chats": {
        "prompt": "the cat",
        "chosen": [*PROMPT, turn("assistant", "sat")],
        "rejected": [*PROMPT, turn("assistant", "ran")],
    },
    "text and a message": {
        "prompt": "the cat",
        "chosen": turn("assistant", "sat"),
        "rejected": "ran",
    },
}


@pytest.mark.parametrize("shape", SAME)
def test_other_shapes_are_the_same_record(load, tokenizer, shape):
    (truth,), (example,) = load(PAIR), load(SAME[shape], strings="chat")
    assert texts(example, tokenizer) == texts(truth, tokenizer)
    assert not example.scored


def test_a_system_column_is_the_first_message(load, tokenizer):
    (example,) = load({**SAME["sharegpt"], "system": "be brief"})
    (truth,) = load({**PAIR, "prompt": [turn("system", "be brief"), *PROMPT]})
    assert texts(example, tokenizer) == texts(truth, tokenizer)


def test_a_whole_chat_is_answered_by_its_last_turn(load, tokenizer):
    chat = [said("human", "the cat"), said("gpt", "sat"), said("human", "why"), said("gpt", "rain")]
    (example,) = load({"conversations": chat})
    prompt, response = texts(example, tokenizer)
    assert prompt.endswith("<|user|>why</s><|assistant|>") and response == "rain</s>"
    (asked,) = load({"conversations": chat, "topic": "cats"}, prompts=True)
    assert np.array_equal(asked.prompt_ids, example.prompt_ids)
    assert asked.columns["topic"] == "cats" and asked.columns["conversations"] == chat


def test_dialogues_stay_text_unless_asked(load, tokenizer):
    (example,) = load(SAME["dialogues"])
    prompt, chosen, rejected = texts(example, tokenizer)
    assert prompt == "<s>\n\nHuman: the cat\n\nAssistant:"
    assert (chosen, rejected) == (" sat</s>", " ran</s>")


def test_the_prompt_is_what_all_responses_share(load, tokenizer):
    """Up to an answer: a user's turn that differs belongs to the responses."""
    first = [turn("user", "the cat"), turn("assistant", "sat")]
    sides = {}
    for side, question, answer in (("chosen", "why", "rain"), ("rejected", "why not", "mat")):
        sides[side] = [*first, turn("user", question), turn("assistant", answer)]
    (example,) = load(sides)
    prompt, chosen, rejected = texts(example, tokenizer)
    assert prompt == "<s><|user|>the cat</s><|assistant|>"
    assert chosen == "sat</s><|user|>why</s><|assistant|>rain</s>"
    assert rejected == "sat</s><|user|>why not</s><|assistant|>mat</s>"
    with pytest.raises(ValueError, match="more than its last answer from chosen.*strings: chat"):
        load(
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d",
            }
        )


def test_a_call_of_sharegpt_is_a_call_of_tools(load):
    template = CHAT_TEMPLATE.replace("m.content | trim", "m.tool_calls | tojson if m.tool_calls")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.replace("if m.tool_calls", "if m.tool_calls else m.content")
    call = '{"name": "f", "arguments": {"a": 1}}'
    (example,) = load(
        {
            "conversations": [said("human", "the cat"), said("function_call", call)],
        },
        tokenizer=tokenizer,
    )
    assert '"function": {"name": "f", "arguments": {"a": 1}}' in texts(example, tokenizer)[1]
    with pytest.raises(ValueError, match=r"completion\[1\].value: invalid JSON"):
        load({"conversations": [said("human", "the cat"), said("function_call", "f(")]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**PAIR, "prompt": [turn("user", [{"type": "image_url"}])]}, "part of type 'image_url'"),
        ({"conversations": [said("human", "a")], "messages": PROMPT}, "both .* hold a chat"),
        ({**PAIR, "prompt": "the cat", "chosen": "sat", "tools": [{}]}, "tools .* strings: chat"),
        ({**PAIR, "tools": "{"}, "tools: invalid JSON"),
        ({**PAIR, "tools": 3}, "tools is 3; write a list of objects"),
        ({**PAIR, "chat_template_kwargs": {"tokenize": True}}, "tokenize is given .* remove it"),
        ({**PAIR, "chosen": [turn("user", "a"), turn("assistant", "b")]}, "chosen does not cont"),
        ({"conversations": [said(3, "a"), said("gpt", "b")]}, r"completion\[0\].from is 3"),
    ],
)
def test_what_is_refused_is_named(load, record, message):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*" + message):
        load(record)


# ---- variables of the template -----------------------------------------------------------------


def test_tools_and_variables_reach_the_template(load):
    """For the prompt and for the answers, and from the column before the setting."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {**PAIR, "tools": tools}
    (example,) = load(record, tokenizer=tokenizer, chat_template_kwargs={"short": True})
    prompt, chosen, _ = texts(example, tokenizer)
    whole = [*PROMPT, turn("assistant", "sat")]
    truth = render_chat(tokenizer, whole, variables={"tools": tools, "short": True})
    assert prompt + chosen == truth and "in short: sat" in truth and '"name": "f"' in prompt
    as_json = {**PAIR, "tools": json.dumps(tools), "chat_template_kwargs": '{"short": false}'}
    (example,) = load(as_json, tokenizer=tokenizer, chat_template_kwargs={"short": True})
    assert texts(example, tokenizer)[:2] == [prompt.removesuffix("in short: "), "sat</s>"]


def test_reserved_variables_are_refused():
    with pytest.raises(ValueError, match="chat_template_kwargs: tools is given"):
        RecordOptions(chat_template_kwargs={"tools": []})


# ---- plain text beside a template --------------------------------------------------------------


def test_plain_text_beside_a_template_is_told(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, SAME["texts"], SAME["texts"]])

    def told(tokenizer=tokenizer, **options):
        source = Source(path, options=RecordOptions(**options))
        return str(load_examples(source, tokenizer, require_unit_scores=True)[1])

    assert "2 of plain text, trained on as it is" in told() and "strings: chat" in told()
    assert "plain text" not in told(strings="chat")
    write_jsonl(tmp_path / "rows.jsonl", [SAME["texts"]])
    assert "plain text" not in told(make_tokenizer(chat=False))


# ---- several turns -----------------------------------------------------------------------------

SEVERAL = {
    "prompt": PROMPT,
    "chosen": [
        turn("assistant", "sat"),
        turn("user", "why did it"),
        turn("assistant", "rain fell"),
        turn("tool", "a mat"),
        turn("assistant", "stop"),
    ],
    "rejected": [turn("assistant", "nobody asked")],
}


def test_answers_alone_are_scored(load, tokenizer):
    (example,) = load(SEVERAL)
    text = "sat</s><|user|>why did it</s><|assistant|>rain fell</s><|tool|>a mat</s><|assistant|>"
    assert tokenizer.decode(example.responses[0]) == text + "stop</s>"
    scored = [ids[own] for ids, own in zip(example.responses, example.scored, strict=True)]
    assert tokenizer.decode(scored[0]) == "sat</s>rain fell</s>stop</s>"
    assert tokenizer.decode(scored[1]) == "nobody asked</s>"


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_are_sums_over_answers(load, llamas, packed):
    """In both layouts: all tokens are seen, those of answers are summed."""
    tokenizer = load_tokenizer(llamas["untied"])
    examples = [*load(SEVERAL, tokenizer=tokenizer), *load(PAIR, tokenizer=tokenizer)]
    policy = load_policy(llamas["untied"], dtype=torch.float32, packed=packed)
    batch = collate(examples, packed=packed, pad_id=2)
    found = Scoring().logps(policy, batch)
    truth = []
    for example in examples:
        for response, scored in zip(example.responses, example.scored_tokens(), strict=True):
            ids = torch.from_numpy(np.concatenate([example.prompt_ids, response])).long()
            logits = policy.causal_lm(input_ids=ids[None]).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            own = logps[len(example.prompt_ids) - 1 :]
            truth.append(own[torch.from_numpy(scored)].sum())
    torch.testing.assert_close(found, torch.stack(truth).detach(), rtol=0, atol=1e-5)
    assert len(batch.targets) == sum(len(s) for e in examples for s in e.scored_tokens())


def test_a_template_that_renders_earlier_turns_anew_is_refused(load):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m.content", "{% if loop.last and m.role == 'assistant' %}last: {% endif %}{{ m.content"
    )
    with pytest.raises(ValueError, match="differently from the prompt"):
        load(SEVERAL, tokenizer=tokenizer)


# ---- files -------------------------------------------------------------------------------------


def as_json(path: Path, records):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def as_json_lines(path: Path, records):
    return Path(write_jsonl(path.with_suffix(".json"), records))


def as_json_with_a_mark(path: Path, records):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(records), encoding="utf-8-sig")
    return path


def as_csv(path: Path, records):
    path = path.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*records))))
        writer.writeheader()
        for record in records:
            cells = {}
            for name, value in record.items():
                cells[name] = json.dumps(value) if isinstance(value, list) else value
            writer.writerow(cells)
    return path


def as_dataset(path: Path, records):
    datasets.Dataset.from_list(records).save_to_disk(str(path))
    return path


RECORDS = [
    {"prompt": "007", "completion": "two\nlines, a comma", "label": True},
    {"prompt": "[1] says", "completion": "null", "label": False},
]
CHATS = [{"prompt": PROMPT, "completions": ["sat", "ran"], "scores": [0.5, 0.25]}] * 2


@pytest.mark.parametrize("records", [RECORDS, CHATS], ids=["labels", "chats"])
@pytest.mark.parametrize("write", [as_json, as_json_with_a_mark, as_json_lines, as_csv, as_dataset])
def test_files_of_every_kind_hold_the_same_records(tmp_path, load, tokenizer, write, records):
    path = write(tmp_path / "records", records)
    found, _ = load_examples(Source(str(path)), tokenizer, require_unit_scores=True)
    truth = load(*records)
    assert [texts(e, tokenizer) for e in found] == [texts(e, tokenizer) for e in truth]
    assert [e.feedback.value.tolist() for e in found] == [e.feedback.value.tolist() for e in truth]


def test_columns_of_a_csv_file_may_have_other_names(tmp_path, tokenizer):
    path = as_csv(tmp_path / "r", [{"question": "12", "answer": "[3]", "good": False}])
    columns = {"prompt": "question", "completion": "answer", "label": "good"}
    source = Source(str(path), options=RecordOptions(columns=columns))
    (example,), _ = load_examples(source, tokenizer, require_unit_scores=True)
    assert texts(example, tokenizer) == ["<s>12", "[3]</s>"]


def test_splits_of_a_saved_dataset(tmp_path, tokenizer):
    split = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"dev": split}).save_to_disk(str(tmp_path / "d"))
    source = Source(str(tmp_path / "d"), split="dev")
    examples, _ = load_examples(source, tokenizer, require_unit_scores=True)
    assert len(examples) == 2 and examples[1].origin.endswith("d[dev]:1")
    with pytest.raises(ValueError, match="has no split 'train'; set split to one of dev"):
        load_examples(Source(str(tmp_path / "d")), tokenizer, require_unit_scores=True)
    (tmp_path / "d" / "dev" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is no whole dataset"):
        load_examples(source, tokenizer, require_unit_scores=True)


def test_a_json_file_beside_records_is_a_description(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "a.jsonl.ref.json").write_text("[3]")
    examples, _ = load_examples(Source(str(tmp_path)), tokenizer, require_unit_scores=True)
    assert len(examples) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"prompt": "a"', "a.json: invalid JSON"),
        ("a.json", b'["\xff"]', "a.json is not UTF-8"),
        ("a.json", "[3]", "a.json:0: a record must be a JSON object"),
        ("a.csv", "prompt,prompt\na,b\n", "columns prompt are given twice"),
        ("a.csv", "prompt,label\na\n", "a.csv is not a CSV file"),
        ("a.csv", 'prompt,completions,scores\na,"[""b""",[1]\n', "a.csv:0: completions: invalid"),
    ],
)
def test_damaged_files_are_named(tmp_path, tokenizer, name, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(Source(str(tmp_path / name)), tokenizer, require_unit_scores=True)
    assert "\n" not in str(error.value)
