"""Records, tokens, batches: a user's file reaches the loss, or stops the run with a reason."""

import itertools
import json
import os
import socket
import string
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import una_fast
from una_fast.attention.rows import Segment
from una_fast.data.batch import collate
from una_fast.data.encode import Encoder, text_after_answer
from una_fast.data.examples import load_examples, load_prompts
from una_fast.data.loader import mixture_order
from una_fast.data.records import Record
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source, read_rows
from una_fast.data.template_date import fix_template_date
from una_fast.feedback import BINARY, PAIR, SCORE

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BOS, EOS, START, END = 0, 1, 2, 3
USER = {"role": "user", "content": "hi there"}


def bot(text):
    return {"role": "assistant", "content": text}


def make_tokenizer(single="<s> $A", template=CHATML, **special):
    """A byte-level BPE tokenizer; `single` is what it puts around a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["the cat sat on the mat", "hi there, how are you", "good and bad answers"], trainer
    )
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "name_or_path": "tiny-bpe", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer):
    """Write rows as one JSONL file and load them. Options are keywords; rows may be raw strings."""

    def run(*rows, unit=True, prompts=False, tokenizer=tokenizer, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        source = Source(str(path), options=RecordOptions(**options))
        if prompts:
            return load_prompts(source, tokenizer, max_new_tokens=4)
        return load_examples(source, tokenizer, require_unit_scores=unit)

    return run


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def table(feedback):
    """Return units as plain tuples (kind, first, second, value)."""
    columns = (feedback.kind, feedback.first, feedback.second, feedback.value)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# ---- imports -------------------------------------------------------------------------------------


def modules_after(code: str, *names: str) -> str:
    """Run imports in a fresh process, and return the named modules that were loaded."""
    lines = ["import sys", code, f"print(*(name for name in {names!r} if name in sys.modules))"]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_data_and_rewards_need_no_transformers():
    """A batch loads no library of models for a named tuple; a reward loads one when it is built."""
    package = Path(una_fast.__file__).parent
    files = [*(package / "data").glob("[!_]*.py"), *(package / "rewards").glob("[!_]*.py")]
    names = [f"una_fast.{file.parent.name}.{file.stem}" for file in files]
    assert len(names) >= 15
    blocked = ("transformers", "datasets", "pyarrow", "peft", "httpx", "httpx2")
    code = f"sys.modules.update(dict.fromkeys({blocked!r}))\n"  # importing any of them fails
    code += f"import {', '.join(names)}"
    assert modules_after(code, "tokenizers", "huggingface_hub") == ""


def test_settings_and_records_are_light():
    """The command line reads the settings to print its help."""
    code = "import una_fast.data.records, una_fast.data.settings, una_fast.data.sources\n"
    code += "import una_fast.rewards.settings, una_fast.rewards.scale, una_fast.rewards.http"
    heavy = ("torch", "numpy", "transformers", "datasets", "pyarrow", "httpx", "httpx2")
    assert modules_after(code, *heavy) == ""


# ---- shapes --------------------------------------------------------------------------------------


def test_shapes_mixed_in_one_file(load):
    examples, report = load(
        {
            "prompt": "p",
            "chosen": "good",
            "rejected": "bad",
            "margin": 0.5,
            "weight": 2,
            "ref_logps": [-1.0, -2.5],
        },
        {"prompt": "p", "completion": "good", "label": False, "ref_logps": -3},
        {"prompt": "p", "completion": "good", "score": 0.25},
        "",
        {"prompt": "p", "completion": "good"},
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.1, 0.9, 1]},
        {
            "prompt": "p",
            "chosen": "a",
            "rejected": "b",
            "chosen_rating": 0.9,
            "rejected_rating": 0.9,
            "id": 7,
        },
        {"id": 8, "source": "x", "chosen": [USER, bot("a")], "rejected": [USER, bot("b")]},
    )
    assert [table(e.feedback) for e in examples] == [
        [(PAIR, 0, 1, 1.0)],
        [(BINARY, 0, -1, 0.0)],
        [(SCORE, 0, -1, 0.25)],
        [(BINARY, 0, -1, 1.0)],
        [(SCORE, 0, -1, 0.1), (SCORE, 1, -1, 0.9), (SCORE, 2, -1, 1.0)],
        [(SCORE, 0, -1, 0.9), (SCORE, 1, -1, 0.9)],
        [(PAIR, 0, 1, 1.0)],
    ]
    assert examples[0].feedback.margin.tolist() == [0.5]
    assert examples[0].feedback.weight.tolist() == [2.0]
    assert [e.ref_logps for e in examples[:3]] == [(-1.0, -2.5), (-3.0,), None]
    assert examples[3].origin.endswith("rows.jsonl:5")  # the empty line counts as a line
    assert examples[0].prompt_ids.dtype == np.int32 == examples[0].responses[1].dtype
    assert (report.records, report.examples, report.unlabelled) == (7, 7, 1)
    assert dict(report.units) == {"pair": 2, "binary": 2, "score": 6}
    assert dict(report.ignored_columns) == {"id": 2, "source": 1}
    text = str(report)
    assert "7 records -> 7 examples (2 pair, 2 binary, 6 score units)" in text
    assert "1 without a label" in text and "ignored columns id (2), source (1)" in text
    assert "\n" not in text


RATED = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1.0, 3.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "units", "ties"),
    [
        ({"feedback": "pairs"}, [(PAIR, 1, 0, 1.0), (PAIR, 1, 2, 1.0)], 1),
        (
            {"feedback": "pairs", "ties": "soft"},
            [(PAIR, 1, 0, 1.0), (PAIR, 0, 2, 0.5), (PAIR, 1, 2, 1.0)],
            0,
        ),
        (
            {"feedback": "both"},
            [
                (PAIR, 1, 0, 1.0),
                (PAIR, 1, 2, 1.0),
                (SCORE, 0, -1, 1.0),
                (SCORE, 1, -1, 3.0),
                (SCORE, 2, -1, 1.0),
            ],
            1,
        ),
    ],
)
def test_pairs_from_ratings(load, options, units, ties):
    examples, report = load(RATED, unit=False, **options)
    assert table(examples[0].feedback) == units and report.ties_dropped == ties


def test_rated_pair_as_pair_with_margin_from_the_mapped_gap(load):
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chosen_rating": 8,
        "rejected_rating": 3.5,
    }
    examples, _ = load(
        row, feedback="pairs", margin="rating_gap", score_map="range", score_range=[1, 10]
    )
    assert table(examples[0].feedback) == [(PAIR, 0, 1, 1.0)]
    assert examples[0].feedback.margin.item() == pytest.approx(0.5)
    examples, _ = load({**row, "margin": 2}, feedback="pairs", margin="rating_gap")
    assert examples[0].feedback.margin.item() == 2  # the record's own margin wins


def test_order_comes_from_the_ratings_even_where_the_sigmoid_is_flat(load):
    examples, report = load(
        {**RATED, "scores": [60.0, 80.0, 0.0]}, feedback="pairs", score_map="sigmoid"
    )
    assert table(examples[0].feedback)[0] == (PAIR, 1, 0, 1.0) and report.ties_dropped == 0


def test_record_of_dropped_ties_alone_is_left_out(load):
    examples, report = load(RATED, {**RATED, "scores": [1, 1, 1]}, feedback="pairs", unit=False)
    assert len(examples) == 1 and report.ties_dropped == 4 and "4 ties dropped" in str(report)


def test_prompts_keep_their_columns_for_the_rewards(load, tokenizer):
    prompts, report = load(
        {"prompt": "hi", "weight": 2}, {"prompt": [USER], "answer": "x"}, prompts=True
    )
    assert [len(p.responses) for p in prompts] == [0, 0] and prompts[0].feedback.num_units == 0
    assert [p.text for p in prompts] == ["hi", [USER]] and [p.weight for p in prompts] == [2.0, 1.0]
    assert [p.columns for p in prompts] == [{}, {"answer": "x"}] and report.examples == 2


def test_prompts_leave_room_for_a_response(load):
    message = r"rows.jsonl:1: prompt has .* over max_tokens=9; raise max_tokens"
    with pytest.raises(ValueError, match=message):
        load({"prompt": "the cat sat on a mat"}, prompts=True, max_tokens=9)
    load({"prompt": "the cat sat on a mat"}, prompts=True, max_tokens=40)


# ---- scores --------------------------------------------------------------------------------------


def test_helpsteer2_preset(load):
    row = {
        "prompt": "p",
        "response": "a",
        "helpfulness": 4,
        "correctness": 3,
        "coherence": 2,
        "verbosity": 1,
    }
    examples, report = load(row, preset="helpsteer2")
    assert examples[0].feedback.value.item() == pytest.approx((0.65 * 4 + 0.8 * 3 + 0.45 * 2) / 7.6)
    assert dict(report.ignored_columns) == {"verbosity": 1}


def test_ultrafeedback_preset_with_text_prompt_beside_whole_chats(load, tokenizer):
    row = {"prompt": "hi there", "chosen": [USER, bot("a")], "rejected": [USER, bot("b")]}
    examples, _ = load({**row, "score_chosen": 8.2, "score_rejected": 1.0}, preset="ultrafeedback")
    assert examples[0].feedback.value.tolist() == pytest.approx([0.8, 0.0])
    prompt = "<s><|im_start|>user\nhi there<|im_end|>\n" + ASSISTANT
    assert examples[0].prompt_ids.tolist() == ids(tokenizer, prompt)


def test_columns_rename_and_take_away(load):
    row = {"q": "p", "completion": "a", "label": 1, "score": 0.5}
    examples, report = load(row, columns={"prompt": "q", "label": "unused"})
    assert table(examples[0].feedback) == [(SCORE, 0, -1, 0.5)]
    assert dict(report.ignored_columns) == {"label": 1}


def test_score_maps(load):
    rows = [{"prompt": "p", "completion": "a", "score": s} for s in (-2.0, 5.0, 5.0, 700.0)]

    def values(**options):
        return [e.feedback.value.item() for e in load(*rows, **options)[0]]

    assert values(score_map="quantile") == [0.125, 0.5, 0.5, 0.875]
    expected = torch.sigmoid(torch.tensor([-2.0, 5.0, 5.0, 700.0]).double()).tolist()
    assert values(score_map="sigmoid") == pytest.approx(expected, abs=1e-12)
    expected = pytest.approx([0, 7 / 702, 7 / 702, 1])
    assert values(score_map="range", score_range=[-2, 700]) == expected
    assert values(unit=False) == [-2.0, 5.0, 5.0, 700.0]


def test_score_center(load):
    rows = [{"prompt": "p", "completion": "a", "score": s} for s in (0.1, 0.3)]
    rows.append({"prompt": "p", "completion": "a", "label": True})
    examples, report = load(*rows, score_center="dataset")
    # The offset makes an unchanged policy (r = 0) stand at the mean score; targets do not move.
    assert torch.sigmoid(examples[0].feedback.offset).item() == pytest.approx(0.2)
    assert examples[0].feedback.value.item() == 0.1 and examples[2].feedback.offset.item() == 0
    assert report.score_center == pytest.approx(0.2) and "score centre 0.2" in str(report)
    examples, report = load(*rows, score_center=0.5)
    assert examples[1].feedback.offset.item() == 0 and report.score_center == 0.5
    examples, _ = load(*rows, score_center="dataset", unit=False)
    assert examples[0].feedback.offset.item() == pytest.approx(0.2)
    message = "score_center=3 gives 3.0, but it must lie strictly between 0 and 1"
    with pytest.raises(ValueError, match=message):
        load(*rows, score_center=3)


# ---- refusals ------------------------------------------------------------------------------------

PAIR_ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}
ONE = {"prompt": "p", "completion": "a"}
NAN = float("nan")
BAD = {
    "invalid json": ('{"prompt": ', {}, "invalid JSON.*one complete JSON object per line"),
    "not an object": ("[1, 2]", {}, "must be a JSON object of columns, not list"),
    "no response": (
        {"prompt": "p", "answer": "x"},
        {},
        "no response column; found columns prompt, answer; accepted",
    ),
    "two families": ({**ONE, **PAIR_ROW}, {}, "both chosen/rejected and completion are given"),
    "no rejected": (
        {"prompt": "p", "chosen": "a"},
        {},
        "column 'rejected' is missing; found columns prompt, chosen",
    ),
    "null rejected": ({**PAIR_ROW, "rejected": None}, {}, "column 'rejected' is null"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, {}, "column 'prompt' is missing or null"),
    "renamed": (
        ONE,
        {"columns": {"prompt": "q"}},
        "column 'q' is missing or null.*prompt is read from 'q'",
    ),
    "no scores": (
        {"prompt": "p", "completions": ["a"]},
        {},
        "column 'scores' is missing.*accepted shapes",
    ),
    "nan score": ({**ONE, "score": NAN}, {}, "score is nan; it must be finite"),
    "inf score": (
        {**RATED, "scores": [0, 1, float("inf")]},
        {},
        r"scores\[2\] is inf; it must be finite",
    ),
    "huge score": (
        '{"prompt": "p", "completion": "a", "score": 1' + "0" * 400 + "}",
        {},
        "score is 1.*finite",
    ),
    "text score": ({**ONE, "score": "0.5"}, {}, r"score is '0.5' \(str\); write a number"),
    "nan rating": (
        {**PAIR_ROW, "chosen_rating": NAN, "rejected_rating": 1},
        {},
        "chosen_rating is nan",
    ),
    "nan weight": ({**PAIR_ROW, "weight": NAN}, {}, "weight is nan"),
    "negative weight": ({**PAIR_ROW, "weight": -1}, {}, "weight is -1; it must not be negative"),
    "nan margin": ({**PAIR_ROW, "margin": NAN}, {}, "margin is nan"),
    "nan ref_logps": ({**PAIR_ROW, "ref_logps": [-1.0, NAN]}, {}, r"ref_logps\[1\] is nan"),
    "ref_logps count": (
        {**PAIR_ROW, "ref_logps": -1.0},
        {},
        "ref_logps has 1 values for 2 responses",
    ),
    "score range": ({**ONE, "score": 7}, {}, r"score is 7.0, outside \[0, 1\].*score_map: range"),
    "outside declared": (
        {**ONE, "score": 11},
        {"score_map": "range", "score_range": [1, 10]},
        r"score is 11.0, outside score_range \[1, 10\]",
    ),
    "label int": (
        {**ONE, "label": 1},
        {},
        r"label is 1 \(int\), not a boolean; write true or false",
    ),
    "label text": ({**ONE, "label": "yes"}, {}, r"label is 'yes' \(str\), not a boolean"),
    "label null": ({**ONE, "label": None}, {}, "label is null; fill it in"),
    "score null": ({**ONE, "score": None}, {}, "score is null; fill it in"),
    "label and score": ({**ONE, "label": True, "score": 0.5}, {}, "both label and score are given"),
    "empty response": ({**ONE, "completion": " "}, {}, "completion is empty; fill it in"),
    "empty rejected": ({**PAIR_ROW, "rejected": ""}, {}, "rejected is empty"),
    "only eos": ({**ONE, "completion": "</s>"}, {}, "response is empty: it has no tokens but EOS"),
    "empty prompt": ({**ONE, "prompt": ""}, {}, "prompt is empty"),
    "no messages": ({**ONE, "prompt": []}, {}, "prompt is empty"),
    "empty content": ({**ONE, "completion": [bot("")]}, {}, r"completion\[0\].content is empty"),
    "equal": ({**PAIR_ROW, "rejected": "a"}, {}, "chosen and rejected are equal"),
    "swapped": (
        {**PAIR_ROW, "chosen_rating": 0.1, "rejected_rating": 0.9},
        {},
        "chosen_rating 0.1 is below rejected_rating 0.9; swap",
    ),
    "one rating": ({**PAIR_ROW, "chosen_rating": 0.1}, {}, "column 'rejected_rating' is missing"),
    "lengths": ({**RATED, "scores": [1.0]}, {}, "3 completions have 1 scores"),
    "not a list": ({**RATED, "completions": "abc"}, {}, "completions must be a list"),
    "one completion": (
        {"prompt": "p", "completions": ["a"], "scores": [1]},
        {"feedback": "pairs"},
        "one completion makes no pair",
    ),
    "no ratings": (
        PAIR_ROW,
        {"feedback": "pairs", "margin": "rating_gap"},
        "margin=rating_gap needs chosen_rating",
    ),
    "attributes": (ONE, {"score_columns": {"help": 1.0}}, "score_columns help are missing"),
    "one attribute": (
        {**ONE, "b": 1},
        {"score_columns": {"help": 1.0, "b": 1.0}},
        "score_columns help are missing",
    ),
    "prompt type": (
        {**ONE, "prompt": 3},
        {},
        r"prompt is 3 \(int\); write a string or a list of chat messages",
    ),
    "message type": ({**ONE, "prompt": ["hi"]}, {}, r"prompt\[0\] is 'hi'; a message is"),
    "content type": (
        {**ONE, "prompt": [{"role": "user", "content": 3}]},
        {},
        r"prompt\[0\].content is 3 \(int\)",
    ),
    "text and chat": (
        {**ONE, "completion": [bot("a")]},
        {},
        "prompt is plain text but completion is a list",
    ),
    "assistant last": ({**ONE, "prompt": [USER, bot("x")]}, {}, "prompt must end with a user"),
    "user last": (
        {**ONE, "prompt": [USER], "completion": [USER]},
        {},
        "must end with an assistant message",
    ),
    "other turns": (
        {"chosen": [USER, bot("a")], "rejected": [{**USER, "content": "other"}, bot("b")]},
        {},
        "rejected does not continue the prompt",
    ),
    "long prompt": (
        {**ONE, "prompt": "hi there, " * 20},
        {"max_prompt_tokens": 9},
        "over max_prompt_tokens=9; raise max_prompt_tokens.*prompt_overflow: truncate_left",
    ),
    "long response": (
        {**ONE, "completion": "qx" * 9},
        {"max_tokens": 9, "prompt_overflow": "truncate_left"},
        "leaves no room for its prompt within max_tokens=9.*never cut",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_record_stops_with_line_and_fix_or_is_skipped(load, case):
    row, options, message = BAD[case]
    good = {"prompt": "p", "completion": "a", "label": True, "b": 1, "q": "p", "help": 1}
    good = {**good, "score": 2, "label": None} if "score_range" in options else good
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*" + message):
        load(row, **options)
    if case in ("attributes", "one attribute"):
        good = {k: v for k, v in good.items() if k != "label"}
        options = {**options, "divide": 2.0}
    examples, report = load(good, row, on_bad_record="skip", **options)
    assert len(examples) == 1 and report.records == 2 and report.skipped == 1
    assert "rows.jsonl:2: " in report.skip_messages[0] and "1 skipped (first: " in str(report)


def test_not_utf8(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="x.jsonl:1: not UTF-8"):
        load_examples(Source(str(tmp_path / "x.jsonl")), tokenizer, require_unit_scores=True)


HOSTILE = {
    "half a pair": ('"x\\udfff"', r"x is 'x\\udfff', with half of a surrogate pair"),
    "half a pair in a key": ('{"\\ud800": 1}', "x key .* holds half of a surrogate pair"),
    "half a pair far inside": ('[{"y": ["\\ud800"]}]', r"x\[0\]\.y\[0\] is "),
    "nesting": ("[" * 200_000 + "]" * 200_000, "nested deeper than 100 levels"),
    "nesting that Python reads": ("[" * 150 + "]" * 150, "x.*nested deeper than 100 levels"),
    "digits": ("9" * 5000, "x is inf; it must be finite"),
    "beyond floats": ("9" * 310, "x is 999.*it must be finite"),
    "NaN": ("[1, NaN]", r"x\[1\] is nan; it must be finite .*not JSON.: write null, or"),
    "key twice": ('{"a": 1, "a": 2}', "key 'a' is given twice in one object"),
    "two objects": ("1} {", "Extra data"),
    "escape": ('"\x1b[2J"', "invalid JSON .Invalid control character"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_rows_are_strict_json_and_messages_one_line(load, case):
    value, message = HOSTILE[case]
    row = '{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + value + "}"
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*" + message) as refusal:
        load(row)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 1000
    assert load(PAIR_ROW, row, on_bad_record="skip")[1].skipped == 1


def test_names_of_columns_are_cut_and_escaped(load):
    columns = {f"\x1b[31mcolumn {k}\n": 1 for k in range(4000)}
    _, report = load({**PAIR_ROW, **columns})
    with pytest.raises(ValueError, match="and 3980 more") as refusal:
        load(columns)
    for text in (str(report), str(refusal.value)):
        assert text.isprintable() and len(text) < 2000


CALL = {"function": {"name": "f", "arguments": {"a": None}}}
CALLING = CHATML.replace(
    "{{ m.content | trim }}",
    "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
)


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_answers_may_call_tools_without_a_text(load, content):
    tokenizer = make_tokenizer(template=CALLING)
    turn = {"role": "assistant", **content, "tool_calls": [CALL]}
    prompt = [USER, turn, {"role": "tool", "content": ""}]
    row = {"prompt": prompt, "chosen": [turn], "rejected": "b"}
    (example,), _ = load(row, tokenizer=tokenizer)
    text = tokenizer.decode(example.responses[0])
    assert '"arguments": {"a": null}' in text  # a null of JSONL was written on purpose
    assert '"arguments": {"a": null}' in tokenizer.decode(example.prompt_ids)


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ({"role": "assistant", "tool_calls": "x"}, r"\.tool_calls is 'x' \(str\); write a list"),
        ({"role": "assistant", "tool_calls": [1]}, r"\.tool_calls\[0\] is 1; a call is an object"),
        ({"role": "assistant", "content": "", "tool_calls": []}, r"\.content is empty"),
        ({"role": 1, "content": "x"}, r"\.role is 1 \(int\)"),
        (
            {"role": "assistant", "content": [{"type": "image"}]},
            r"\.content\[0\] is a part of type 'image'",
        ),
    ],
)
def test_malformed_messages(load, message, refusal):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: chosen\[0\]" + refusal):
        load({"prompt": [USER], "chosen": [message], "rejected": "b"})


@pytest.mark.parametrize("sums", [[-1.0, 1e-6], [-1e300, -1.0], [-1.0, -1e7]])
def test_log_probs_that_no_model_gives(load, sums):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: ref_logps\[\d\] is .*precompute-ref"):
        load({**PAIR_ROW, "ref_logps": sums})


def test_preferences_between_equal_tokens(load):
    pair = {"prompt": [USER], "chosen": "a", "rejected": "a "}  # the template trims
    with pytest.raises(ValueError, match="chosen and rejected have the same tokens"):
        load(pair)
    several = {"prompt": [USER], "completions": ["a", "b", " a"], "scores": [0.1, 0.2, 0.3]}
    with pytest.raises(ValueError, match=r"completions\[0\] and completions\[2\] have the same"):
        load(several, feedback="pairs")
    assert len(load(several)[0]) == 1  # scores of one text are an average, no contradiction


def test_nothing_usable_is_an_error(load):
    with pytest.raises(ValueError, match="no usable record: .*1 records -> 0 examples .*1 skipped"):
        load("{", on_bad_record="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "all"}, "feedback='all' is not one of scores, pairs, both"),
        ({"columns": {"answer": "x"}}, "columns: 'answer' is not a field of a record"),
        ({"columns": ["x"]}, r"columns=\[\'x\'\] must be a mapping of names"),
        ({"columns": {"prompt": 1}}, "columns.prompt=1 must be a text"),
        ({"score_columns": {}}, "score_columns={} must map columns to factors"),
        ({"score_columns": {"a": NAN}}, "score_columns.a=nan must be a finite number"),
        ({"score_columns": {"a": 1.0}, "divide": 0}, "divide=0"),
        ({"divide": "x"}, "divide='x' must be a finite number"),
        ({"divide": 2.0}, "divide=2.0 divides the sum of score_columns, which is not set"),
        ({"score_map": "range"}, r"score_map=range needs score_range: \[lo, hi\]"),
        ({"score_map": "range", "score_range": [2, 1]}, r"score_range=\[2, 1\] must rise"),
        ({"score_range": [0, 1]}, "score_range=.* is only read with score_map: range"),
        ({"score_center": "mean"}, "score_center='mean' must be a finite number or none | dataset"),
        (
            {"margin": "rating_gap"},
            "margin=rating_gap acts on pairs built from ratings, and feedback=scores",
        ),
        ({"ties": "soft"}, "ties=soft acts on pairs"),
        ({"max_tokens": 0}, "max_tokens=0 must be a positive number of tokens"),
        ({"max_tokens": 8, "max_prompt_tokens": 8}, "max_prompt_tokens=8 leaves no room"),
        (
            {"preset": "helpsteer2", "divide": 2.0},
            "preset='helpsteer2' sets divide to 7.6; remove divide",
        ),
    ],
)
def test_options_refuse_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        RecordOptions(**options)


# ---- sources -------------------------------------------------------------------------------------


def test_source_entries(tmp_path):
    defaults = RecordOptions(preset="helpsteer2", max_tokens=99)
    assert Source.parse("a.jsonl", defaults) == Source("a.jsonl", options=defaults)
    entry = {
        "path": "x",
        "weight": 0.5,
        "split": "test",
        "preset": "none",
        "feedback": "pairs",
        "ties": "soft",
    }
    source = Source.parse(entry, defaults)
    assert (source.weight, source.split) == (0.5, "test")
    assert source.options == RecordOptions(feedback="pairs", ties="soft", max_tokens=99)
    message = "'x': unknown key 'wieght'; known keys: path, weight, split, online, columns"
    with pytest.raises(ValueError, match=message):
        Source.parse({"path": "x", "wieght": 1}, defaults)
    with pytest.raises(ValueError, match="'x': ties='hard' is not one of"):
        Source.parse({"path": "x", "ties": "hard"}, defaults)
    with pytest.raises(ValueError, match="has no path"):
        Source.parse({"weight": 1}, defaults)
    with pytest.raises(ValueError, match="must be a path or a mapping"):
        Source.parse(3, defaults)
    with pytest.raises(ValueError, match="weight=0 of x must be positive"):
        Source("x", weight=0)


def test_parquet_and_directory(tmp_path, tokenizer):
    chat = {
        "prompt": None,
        "chosen": [{**USER, "name": "me"}, bot("a")],
        "rejected": [{**USER, "name": "me"}, bot("b")],
        "label": None,
    }
    rows = [chat, {"prompt": "p", "completion": "a", "label": True}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat, chat]), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[1]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    examples, _ = load_examples(Source(str(tmp_path)), tokenizer, require_unit_scores=True)
    origins = [e.origin.rpartition("/")[2] for e in examples]
    assert origins == ["a.jsonl:1", "b.parquet:0", "b.parquet:1"]
    assert table(examples[1].feedback) == [(PAIR, 0, 1, 1.0)]
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["p"], "completion": ["a"], "label": [1]}), tmp_path / "c.parquet"
    )
    with pytest.raises(ValueError, match=r"c\.parquet:0: label is 1 \(int\)"):
        load_examples(Source(str(tmp_path)), tokenizer, require_unit_scores=True)


def test_paths_that_hold_no_data(tmp_path, tokenizer):
    def refuse(path, message, **source):
        with pytest.raises(ValueError, match=message):
            load_examples(Source(str(path), **source), tokenizer, require_unit_scores=True)

    refuse(
        tmp_path / "no.jsonl",
        "no.jsonl' is neither a file, a directory, nor a loadable dataset name",
    )
    refuse("no.jsonl", "'no.jsonl' is neither a file")
    refuse(tmp_path, "holds no data files")
    (tmp_path / "x.csv").write_text("a,b")
    refuse(tmp_path / "x.csv", "x.csv is not a CSV file")
    (tmp_path / "x.txt").write_text("a,b")
    refuse(tmp_path / "x.txt", "x.txt is not a data file; .* in .jsonl, .json, .csv or .parquet")
    refuse(tmp_path / "x.csv", "split='test' is for datasets", split="test")
    (tmp_path / "x.parquet").write_text("a,b")
    refuse(tmp_path / "x.parquet", "x.parquet is not a Parquet file")


def test_parquet_shows_the_templates_what_was_written(tmp_path):
    """Arrow gives every tool call the arguments of the others, with null."""
    tokenizer = make_tokenizer(template=CALLING)
    rows = []
    for arguments in ({"city": "Oslo"}, {"day": 3, "list": [{"a": 1}, {"b": None}]}):
        call = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
        rows.append({"prompt": [USER], "chosen": [call], "rejected": "b", "extra": {"n": None}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    examples, _ = load_examples(
        Source(str(tmp_path / "t.parquet")), tokenizer, require_unit_scores=True
    )
    texts = [tokenizer.decode(example.responses[0]) for example in examples]
    assert '{"city": "Oslo"}' in texts[0] and '{"day": 3, "list": [{"a": 1}, {}]}' in texts[1]


def test_damaged_parquet_is_named(tmp_path, tokenizer):
    def read():
        return load_examples(Source(str(path)), tokenizer, require_unit_scores=True)[0]

    path = tmp_path / "d.parquet"
    rows = pyarrow.Table.from_pylist([{**PAIR_ROW, "prompt": f"p{k}"} for k in range(20)])
    pyarrow.parquet.write_table(rows, path, row_group_size=10)
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="d.parquet: row group 1 is damaged, at its row 0"):
        read()
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="d.parquet is not a Parquet file"):
        read()
    bad = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": ["p", "p"], "completion": bad})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="d.parquet:1: column 'completion' cannot be read .*utf-8"):
        read()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fifo", "is a FIFO, and data is read from regular files alone"),
        ("socket", "is a socket"),
        ("device", "is a device"),
        ("circle", "cannot be read: Too many levels of symbolic links"),
        ("nothing", "is a symbolic link to nothing"),
        ("directory", "is a directory, and data"),
    ],
)
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind, message):
    """A FIFO waits for ever, and /dev/zero never ends."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = Path("d/x.jsonl")
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        targets = {"device": "/dev/zero", "circle": "x.jsonl", "nothing": "y.jsonl"}
        path.symlink_to(targets[kind])
    for source in [str(path.parent)] + [str(path)] * (kind != "directory"):
        with pytest.raises(ValueError, match="d/x.jsonl " + message):
            next(read_rows(Source(source)))


@pytest.mark.parametrize(
    "path",
    ["json", "csv", "text:../../etc/passwd", "-x", "a/../../etc", "org/name:..", "\u202ea/b"],
)
def test_paths_that_are_no_names_of_datasets(monkeypatch, path):
    """The readers of `datasets` (csv, text ...) would take the rest as files."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match="is neither a file.*owner/name") as refusal:
        next(read_rows(Source(path)))
    assert str(refusal.value).isprintable()


def test_dataset_by_name(monkeypatch, tokenizer):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        if name == "org/missing":
            raise ConnectionError("unreachable")
        row = {"prompt": [USER], "completion": "a", "label": True}
        return datasets.Dataset.from_list([row, {**row, "label": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"^org/set:small\[test\]:1: label is null"):
        load_examples(Source("org/set:small", split="test"), tokenizer, require_unit_scores=True)
    assert calls == [("org/set", "small", "test")]
    message = "'org/missing' is neither a file, a directory, nor a loadable.*unreachable"
    with pytest.raises(ValueError, match=message):
        load_examples(Source("org/missing"), tokenizer, require_unit_scores=True)


# ---- tokens --------------------------------------------------------------------------------------

ASSISTANT = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("single", "bos"), [("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", []), ("$A", [])]
)
def test_plain_text_has_one_bos_and_one_eos(load, single, bos):
    tokenizer = make_tokenizer(single)
    for prompt, response in (("hi there", "the cat"), ("<s>hi there", "the cat</s>")):
        examples, _ = load({"prompt": prompt, "completion": response}, tokenizer=tokenizer)
        own = [BOS] if prompt.startswith("<s>") else bos
        assert examples[0].prompt_ids.tolist() == own + ids(tokenizer, "hi there")
        assert examples[0].responses[0].tolist() == ids(tokenizer, "the cat") + [EOS]


def test_chat_ends_with_the_template_s_end_of_turn(load, tokenizer):
    system = {"role": "system", "content": "be good"}
    prompt = [system, USER]
    rows = []
    for answer in ([bot("the cat \n")], "the cat", [bot("the cat<|im_end|>")]):
        rows.append({"prompt": prompt, "completion": answer, "label": True})
    rows.append({"prompt": prompt, "chosen": [*prompt, bot("the cat")], "rejected": "no"})
    text = "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhi there<|im_end|>\n"
    text += ASSISTANT
    for example in load(*rows)[0]:
        assert example.prompt_ids.tolist() == [BOS, *ids(tokenizer, text)]
        assert example.responses[0].tolist() == [*ids(tokenizer, "the cat"), END]


def test_text_after_an_answer():
    """Where a response ends, and so what a sampler stops at."""
    assert text_after_answer(make_tokenizer(), [USER]) == ("<|im_end|>", "\n")
    assert text_after_answer(make_tokenizer(template=PLAIN_CHAT), [USER]) == ("", "\n")


def test_template_without_end_of_turn_gets_eos_and_keeps_the_text_s_own_space(load):
    tokenizer = make_tokenizer(template=PLAIN_CHAT)
    examples, _ = load({"prompt": [USER], "completion": "the cat "}, tokenizer=tokenizer)
    # "assistant: " and "the" may merge at the boundary: together they must still spell the
    # rendering.
    assert tokenizer.decode(examples[0].prompt_ids) == "user: hi there\nassistant: "
    assert tokenizer.decode(examples[0].responses[0]) == "the cat </s>"
    assert examples[0].responses[0].tolist().count(EOS) == 1


def test_tokenizer_that_puts_a_space_before_any_text():
    """Tokenised apart, the answer would start with a space that is not in the rendering."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    raw.train_from_iterator(["user", "assistant", "\n", "hi there", "the cat"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "")
    record = Record([USER], ([bot("the cat")],))
    prompt, (answer,), *_ = Encoder(tokenizer, RecordOptions()).encode(record)
    whole = tokenizer.apply_chat_template([USER, bot("the cat")], tokenize=False).rstrip("\n")
    assert [*prompt, *answer] == ids(tokenizer, whole)
    assert answer[-1] == END


def test_responses_spell_the_middle_of_a_text(load):
    """SentencePiece-like tokenizers put a space before any text: "def f( x)" was trained on."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [*string.printable, "\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(["some plain words"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    for response in ("x): return x", " words", "\nplain", ".words"):
        (example,), _ = load({"prompt": "def f(", "completion": response}, tokenizer=tokenizer)
        whole = [*example.prompt_ids, *example.responses[0][:-1]]
        assert tokenizer.decode(whole) == "def f(" + response
        assert whole[: len(example.prompt_ids)] == ids(tokenizer, "def f(")


def test_texts_with_special_tokens_are_counted(load):
    _, report = load(PAIR_ROW, {**PAIR_ROW, "prompt": "a<|im_end|>b"})
    assert report.special_tokens == 1
    assert "1 with special tokens of the tokenizer in their texts" in str(report)
    _, report = load({"prompt": [{**USER, "content": "a</s>"}], "completion": "a"})
    assert report.special_tokens == 1


def test_any_special_token_is_found_and_nothing_else():
    tokens = ["<|a|>", "<|a", "<|.|>", "<b>", "|", "é!", "é?x"]
    special = make_tokenizer(additional_special_tokens=tokens)
    encoder = Encoder(special, RecordOptions())
    for text in (*tokens, "</s>"):
        assert encoder.encode(Record(prompt=f"x{text}y", responses=("a",), label=True)).special
    for text in ("<", "<b", "b>", "é", "é?", "s>", "<x|"):
        expected = any(token in text for token in (*tokens, *special.all_special_tokens))
        record = Record(prompt=f"x{text}y", responses=("a",), label=True)
        assert encoder.encode(record).special == expected


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": (LOOP, "1 s of computing"),
    "one operation": ("{{ 9 ** (9 ** 9) }}", "1 s of computing"),
    "one text": ("{{ 'x' * 2000000000 }}", "1024 MiB of memory"),
    "for one record": (
        "{% if messages[0].content == 'z' %}" + LOOP + "{% endif %}" + CHATML,
        "1 s",
    ),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_templates_that_do_not_end(load, case):
    template, message = ENDLESS[case]
    message = f"the chat template of tiny-bpe takes more than {message}"
    row = {"prompt": [USER], "completion": "a"}
    last = {**row, "prompt": [{**USER, "content": "z"}]}
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d: " + message):
        load(row, last, tokenizer=make_tokenizer(template=template), on_bad_record="skip")


def test_template_that_prints_today_is_given_a_day(tmp_path):
    template = "\n{{ strftime_now('%d %b %Y, %A, %-d, 100%%') }}{{ messages[0].content }}"
    tokenizer = make_tokenizer(template=template)
    tokenizer.save_pretrained(tmp_path / "before")
    fix_template_date(tokenizer, "2020-02-03")
    fix_template_date(tokenizer, "2024-02-03")
    tokenizer.save_pretrained(tmp_path / "after")
    text = tokenizer.apply_chat_template([USER], tokenize=False)
    assert text == "\n03 Feb 2024, Saturday, 3, 100%hi there"
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    with pytest.raises(ValueError, match="isoformat"):
        fix_template_date(tokenizer, "today")


SHIFTING = "{{ messages | length }}" + CHATML + "{{ messages | length }}"
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
SOMETIMES = CHATML.replace("<|im_end|>", "{% if m.content != 'a' %}<|im_end|>{% endif %}")


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"eos_token": None}, "tokenizer tiny-bpe has no eos_token.*set eos_token"),
        ({"template": None}, "tokenizer tiny-bpe has no chat template; set chat_template"),
        (
            {"template": SHIFTING},
            "chat template of tiny-bpe renders prompt .* must be its beginning",
        ),
        (
            {"template": "{{ raise_exception('roles must alternate') }}"},
            "rows.jsonl:1: the chat template of tiny-bpe refuses.*roles must alternate",
        ),
        ({"template": SOMETIMES}, "does not end this response"),
        (
            {"template": THINKING},
            "tiny-bpe ends in an opened <think>, which this answer lacks.*take <think> out of",
        ),
    ],
)
def test_templates_and_tokenizers_that_cannot_work(load, special, message):
    with pytest.raises(ValueError, match=message):
        load({"prompt": [USER], "completion": "a"}, tokenizer=make_tokenizer(**special))


def test_truncation_keeps_bos_and_the_end_of_the_prompt(load, tokenizer):
    row = {"prompt": "hi there, how are you the cat", "chosen": "a", "rejected": "b b"}
    full = load(row)[0][0]
    for options in ({"max_prompt_tokens": 5}, {"max_tokens": 5 + len(full.responses[1])}):
        examples, report = load(row, prompt_overflow="truncate_left", **options)
        assert examples[0].prompt_ids.tolist() == [BOS, *full.prompt_ids[-4:]]
        assert [r.tolist() for r in examples[0].responses] == [r.tolist() for r in full.responses]
        assert report.truncated_prompts == 1 and "1 prompts truncated" in str(report)
    _, report = load(row, max_tokens=len(full.prompt_ids) + len(full.responses[1]))
    assert report.truncated_prompts == 0


def test_chats_are_cut_by_whole_turns(load, tokenizer):
    """Cut in a turn, a chat begins in a word, without its system message."""
    system = {"role": "system", "content": "be good"}
    turns = [USER, bot("the cat"), {**USER, "content": "how are you"}, bot("good"), USER]
    row = {"prompt": [system, *turns], "completion": "a"}
    wanted = load({**row, "prompt": [system, *turns[2:]]})[0][0]
    options = {"prompt_overflow": "truncate_left"}
    for spare in (0, 3):
        limit = len(wanted.prompt_ids) + spare
        (example,), report = load(row, max_prompt_tokens=limit, **options)
        assert example.prompt_ids.tolist() == wanted.prompt_ids.tolist()
        assert example.responses[0].tolist() == wanted.responses[0].tolist()
        assert report.truncated_prompts == 1
    with pytest.raises(ValueError, match="headers of the last turn alone are over max_prompt"):
        load(row, max_prompt_tokens=8, **options)


def test_a_last_turn_that_is_too_long_is_cut_in_its_text(load, tokenizer):
    """A long document in a single turn: its end stays, below the system message and the header."""
    system = {"role": "system", "content": "be good"}
    turn = {**USER, "content": "the cat sat on the mat and " * 40 + "why?"}
    options = {"prompt_overflow": "truncate_left", "max_prompt_tokens": 60}
    (example,), report = load({"prompt": [system, turn], "completion": "a"}, **options)
    text = tokenizer.decode(example.prompt_ids)
    short = load({"prompt": [system, {**turn, "content": "why?"}], "completion": "a"})[0][0]
    header = tokenizer.decode(short.prompt_ids).partition("why?")[0]
    assert text.startswith(header) and "mat and why?" in text
    assert 50 < len(example.prompt_ids) <= 60 and report.truncated_prompts == 1


# ---- mixing --------------------------------------------------------------------------------------


def test_mixture_weights_and_determinism():
    order = mixture_order([4, 10, 3], [1, 2.5, 0.5], seed=3, epoch=0)
    counts = np.bincount(order, minlength=17)
    assert order.dtype == np.int64 and len(order) == 4 + 25 + 2
    assert (counts[:4] == 1).all()
    assert sorted(counts[4:14]) == [2] * 5 + [3] * 5
    assert counts[14:].max() == 1
    assert (order == mixture_order([4, 10, 3], [1, 2.5, 0.5], seed=3, epoch=0)).all()
    assert (order != np.sort(order)).any()
    halves = [frozenset(mixture_order([100], [0.5], seed=3, epoch=epoch)) for epoch in range(4)]
    assert len(set(halves)) == 4 and all(len(half) == 50 for half in halves)
    assert set(mixture_order([100], [0.5], seed=4, epoch=0)) != halves[0]
    assert len(mixture_order([10], [0.01], seed=0, epoch=0)) == 1
    assert len(mixture_order([], [], seed=0, epoch=0)) == 0


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def examples(load):
    return load(
        {"prompt": "hi there", "chosen": "the cat", "rejected": "a", "weight": 2},
        {"prompt": [USER], "completion": "the mat", "score": 0.3},
        {
            "prompt": "how are",
            "completions": ["you", "the cat sat", "bad"],
            "scores": [0.1, 0.2, 0.2],
        },
        feedback="both",
        ties="soft",
    )[0]


def test_packed_token_by_token(examples):
    batch = collate(examples, packed=True)
    flat = batch.input_ids[0].tolist()
    positions = batch.position_ids[0].tolist()
    rows = iter(batch.rows.tolist())
    at = 0
    for example, segment in zip(examples, batch.segments, strict=True):
        length = len(example.prompt_ids)
        assert segment.prompt == (at, at + length)
        assert flat[at : at + length] == example.prompt_ids.tolist()
        assert positions[at : at + length] == list(range(length))
        at += length
        last_of_prompt = at - 1
        for response, (start, stop) in zip(example.responses, segment.responses, strict=True):
            assert (start, stop) == (at, at + len(response))
            assert flat[start:stop] == response.tolist()
            assert positions[start:stop] == list(range(length, length + len(response)))
            own_rows = [next(rows) for _ in response]
            assert own_rows == [last_of_prompt, *range(start, stop - 1)]
            at = stop
    assert at == len(flat) == batch.num_tokens
    assert next(rows, None) is None and batch.attention_mask is None


def test_padded_token_by_token(examples):
    batch = collate(examples, packed=False, pad_id=7)
    count, width = batch.input_ids.shape
    rows = iter(batch.rows.tolist())
    sequences = []
    for example in examples:
        sequences += [(example.prompt_ids.tolist(), r.tolist()) for r in example.responses]
    assert count == len(sequences) == 6 and batch.segments is None
    for b, (prompt, response) in enumerate(sequences):
        tokens = prompt + response
        padding = width - len(tokens)
        assert batch.input_ids[b].tolist() == tokens + [7] * padding
        assert batch.attention_mask[b].tolist() == [1] * len(tokens) + [0] * padding
        assert batch.position_ids[b].tolist() == list(range(width))
        first = b * width + len(prompt) - 1
        own_rows = [next(rows) for _ in response]
        assert own_rows == list(range(first, first + len(response)))
    assert next(rows, None) is None
    assert batch.num_tokens == batch.attention_mask.sum()


def test_layouts_agree(examples):
    packed, padded = collate(examples, packed=True), collate(examples, packed=False)
    responses = itertools.chain.from_iterable(example.responses for example in examples)
    targets = np.concatenate(list(responses)).tolist()
    assert packed.targets.tolist() == padded.targets.tolist() == targets
    assert packed.cu_seqlens.tolist() == padded.cu_seqlens.tolist()
    assert packed.cu_seqlens[-1] == len(targets)
    for tensor in (packed.cu_seqlens, packed.targets, packed.rows, packed.input_ids):
        assert tensor.dtype == torch.int64
    assert table(packed.feedback) == table(padded.feedback)
    assert packed.feedback.weight.tolist() == [2.0] + [1.0] * 7
    assert table(packed.feedback)[:4] == [
        (PAIR, 0, 1, 1.0),
        (SCORE, 2, -1, 0.3),
        (PAIR, 4, 3, 1.0),
        (PAIR, 5, 3, 1.0),
    ]
    # A row predicts the token after it: the same token at the same position in both layouts.
    for name in ("input_ids", "position_ids"):
        in_packed = getattr(packed, name).flatten()[packed.rows]
        in_padded = getattr(padded, name).flatten()[padded.rows]
        assert in_packed.tolist() == in_padded.tolist(), name


@pytest.mark.parametrize("packed", [True, False])
def test_no_examples_still_give_something_to_run(packed, load):
    for nothing in ([], load({"prompt": "hi"}, prompts=True)[0]):
        batch = collate(nothing, packed=packed, pad_id=5)
        assert batch.input_ids.tolist() == [[5, 5]] and batch.position_ids.tolist() == [[0, 1]]
        assert batch.rows.numel() == batch.targets.numel() == 0
        assert batch.num_tokens == batch.feedback.num_units == 0
        assert batch.cu_seqlens.tolist() == [0] and batch.ref_logps is None
        for tensor in (batch.rows, batch.targets, batch.input_ids):
            assert tensor.dtype == torch.int64
        assert batch.segments == ((Segment((0, 1), ((1, 2),)),) if packed else None)
        assert (batch.attention_mask is None) == packed


def test_cached_reference_is_all_or_nothing(load):
    cached, _ = load({**PAIR_ROW, "ref_logps": [-1, -2]}, {**ONE, "ref_logps": -3})
    batch = collate(cached, packed=True)
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -3.0] and batch.ref_logps.dtype == torch.float64
    without, _ = load(PAIR_ROW, PAIR_ROW)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1 has no ref_logps while other records"):
        collate([*cached, *without], packed=True)
