"""The demo at a tiny size, through the code of the real demo, and its records and measures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from una_fast.data.examples import load_examples
from una_fast.data.settings import RecordOptions
from una_fast.data.sources import Source
from una_fast.demo import run as demo_module
from una_fast.demo.compare import reliability
from una_fast.demo.rewards import known_words, names_the_object, repeats_nothing, well_formed
from una_fast.demo.run import REWARDS, run_demo
from una_fast.demo.settings import QUICK, DemoConfig
from una_fast.demo.text import make_records, read_corpus, rouge_2

TINY = replace(QUICK, max_modules=20, samples=4, online_steps=2, online_prompts=8)


@pytest.fixture(scope="module", autouse=True)
def tiny_demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "QUICK", TINY)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """An offline demo, (wanted directory, which is not empty; summary)."""
    wanted = tmp_path_factory.mktemp("runs") / "demo"
    wanted.mkdir()
    (wanted / "earlier").touch()
    summary = run_demo(DemoConfig(output_dir=str(wanted), quick=True))
    return wanted, summary


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quick_demo_leaves_everything_and_keeps_an_earlier_run(demo):
    wanted, summary = demo
    directory = wanted.with_name("demo-2")
    assert summary["output_dir"] == str(directory)
    assert [path.name for path in wanted.iterdir()] == ["earlier"]
    assert (directory / "demo.png").stat().st_size > 10_000
    assert json.loads((directory / "summary.json").read_text()) == summary
    names = "pair_accuracy score_gap calibration_error kl kl_standard_error seconds"
    assert set(summary) >= set(names.split())
    model = AutoModelForCausalLM.from_pretrained(directory / "aligned")
    tokenizer = AutoTokenizer.from_pretrained(directory / "aligned")
    assert model.generate(**tokenizer("# os: ", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    # Held-out records are evaluated by the trainer.
    lines = read_lines(directory / "aligned/metrics.jsonl")
    assert any("eval_rewards/accuracies" in line for line in lines)


def test_quick_online_demo(tmp_path, capsys):
    summary = run_demo(DemoConfig(output_dir=str(tmp_path / "demo"), quick=True, online=True))
    lines = read_lines(tmp_path / "demo/aligned/metrics.jsonl")
    evaluations = [line for line in lines if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert (tmp_path / "demo/demo.png").exists()
    assert summary["reward"] == [round(evaluations[k]["eval_reward"], 4) for k in (0, -1)]
    for k in (0, 1):
        means = {name: summary[f"rewards/{name}/mean"][k] for name in REWARDS}
        total = sum(weight * means[name] for name, weight in REWARDS.items())
        assert summary["reward"][k] == pytest.approx(total, abs=2e-4)
    shown = capsys.readouterr().out
    assert "standard errors" in shown
    assert shown.count("\n  before  ") == 3 == shown.count("\n  after  ")


def test_rewards_of_the_online_demo_are_what_they_say():
    prompt = '# os: get the path\ndef get_path():\n    """'
    texts = ["Return the path of get.", "the the path", "", "Path of a file"]
    prompts = [prompt] * len(texts)
    assert names_the_object(prompts, texts) == [1.0, 2 / 3, 0.0, 1 / 3]
    assert well_formed(prompts, texts) == [1.0, 0.0, 0.0, 0.5]
    assert known_words(prompts[:3], ["Return the qzx of os.", "", "qzx"]) == [4 / 5, 0.0, 0.0]
    assert repeats_nothing(prompts, texts) == [1.0, 0.0, 0.0, 1.0]
    assert repeats_nothing(prompts[:1], ["a b a"]) == [2 / 3]


def texts_of(entries):
    return {entry.docstring.casefold() for entry in entries}


def test_records_are_real_text_split_without_leaks():
    corpus = read_corpus(0, max_modules=60)
    base, align, held_out = map(texts_of, (corpus.base, corpus.align, corpus.held_out))
    assert base and align and held_out
    assert not (base & align or base & held_out or align & held_out)
    records = make_records(corpus.align, 0)
    assert records == make_records(corpus.align, 0), "the same seed gives the same records"
    for record in records["scores"]:
        assert record["scores"][0] == 1.0 and max(record["scores"][1:]) <= 1.0
    labels = [record["label"] for record in records["labels"]]
    assert 0.2 < np.mean(labels) < 0.8


def test_scores_are_the_stated_overlap():
    assert rouge_2("a b c", "a b c") == 1.0 and rouge_2("b a", "a b") == rouge_2("a", "a") == 0.0
    assert rouge_2("x A b", "a b c d") == pytest.approx(2 * 1 / 5)


def test_reliability_bins_cover_everything():
    implied, scores = np.array([0.0, 0.05, 0.5, 1.0]), np.array([0.0, 1.0, 0.25, 0.75])
    assert reliability(implied, scores) == [(0.025, 0.5, 2), (0.5, 0.25, 1), (1.0, 0.75, 1)]


def test_the_records_load_as_any_others(demo):
    directory = demo[0].with_name("demo-2")
    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    for kind, unit in (("pairs", "pair"), ("labels", "binary"), ("scores", "score")):
        source = Source(str(directory / f"data/{kind}.jsonl"), options=RecordOptions())
        _, report = load_examples(source, tokenizer, require_unit_scores=True)
        assert report.units[unit] == sum(report.units.values()) > 0
