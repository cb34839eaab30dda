"""What a run tells others: the model card, and the runs of loggers."""

from __future__ import annotations

import sys
import types

import pytest
import yaml

from una_fast.config import RunConfig
from una_fast.data.examples import SourceReport
from una_fast.distributed import World
from una_fast.train.card import model_card
from una_fast.train.loggers import IDS, Loggers
from una_fast.train.report import Reporter


def config(**settings) -> RunConfig:
    needed = {"model": "some/model", "data": ["x.jsonl"], "output_dir": "out"}
    return RunConfig(**needed | {"loggers": ["wandb"]} | settings)


FORGED = "q\x1b[2J\n---\nlicense: evil\n| a | b |<img src=x>[link](x)`code`"


def test_foreign_text_stays_in_its_line_of_the_card():
    report = SourceReport(path=f"data/{FORGED}.jsonl")
    report.ignored_columns[FORGED] = 3
    chosen = config(output_dir=f"runs/{FORGED}")
    card = model_card(chosen, [report], {f"rewards/{FORGED}": 0.5, "loss": 0.25})
    lines = card.split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith(("license", "| a")) for line in lines)
    assert lines.count("---") == 2, "the front matter alone"
    assert "<img" not in card.replace("\\<", "") and "[link]" not in card
    (row,) = [line for line in lines if line.startswith("| rewards/")]
    assert row.replace("\\|", "").count("|") == 4
    assert "| loss |  | 0.25 |" in lines


@pytest.mark.parametrize("model", ["a: b", "- x", "'q", "&x", "line\nlicense: evil", "#", "true"])
def test_the_front_matter_is_yaml_whatever_the_model_is_called(model):
    card = model_card(config(model=model), [], {}, adapter="an adapter")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": model,
        "library_name": "peft",
        "tags": ["una", "alignment", "preference-optimization"],
    }


def test_the_card_tells_data_from_evaluation_and_before_from_after(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    chosen = config(model=str(tmp_path), eval_data=["held.jsonl"])
    reports = [SourceReport("x.jsonl"), SourceReport("held.jsonl")]
    metrics = {"eval_loss": 0.5, "eval_padding": 0.0, "tok_per_sec": 9.0, "time/train": 1.0}
    adapter = "a LoRA adapter of rank 4, alpha 4, on q_proj"
    card = model_card(chosen, reports, metrics, {"eval_loss": 0.7}, adapter=adapter)
    assert "license: apache-2.0\n---" in card and "AutoPeftModelForCausalLM" in card
    marked = [line for line in card.splitlines() if line.endswith("(evaluation)")]
    assert len(marked) == 1 and "held.jsonl" in marked[0] and adapter in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["| metric | before | after |", "| eval_loss | 0.7 | 0.5 |"]


@pytest.fixture
def backend(monkeypatch):
    """A stand-in for wandb or trackio; returns the list of what it was told."""

    def put(name: str, fails_at: int | None = None) -> list:
        told = []

        class Run:
            id = "r1"
            name = "named"

            def log(self, metrics, step):
                if step == fails_at:
                    raise ConnectionError("no route")
                told.append(("log", step))

            def finish(self, **options):
                told.append(("finish", options))

        def init(**options):
            told.append(("init", options))
            return Run()

        module = types.ModuleType(name)
        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return told

    return put


@pytest.mark.parametrize(
    ("name", "again"),
    [("wandb", {"name": "o", "id": "r1"}), ("trackio", {"name": "named"})],
)
def test_a_resumed_run_goes_on_in_the_same_run(backend, tmp_path, name, again):
    told = backend(name)
    out = tmp_path / "o"
    out.mkdir()
    chosen = config(loggers=[name])
    for first_step in (0, 2):
        loggers = Loggers(chosen, out, first_step)
        loggers.write(first_step + 1, {"loss": 1.0})
        loggers.close(failed=bool(first_step))
    starts = [options for kind, options in told if kind == "init"]
    settings = {"project": "una-fast", "config": chosen.shareable()}
    assert starts == [
        {**settings, "name": "o"},
        {**settings, **again, "resume": "allow"},
    ]
    ends = [options for kind, options in told if kind == "finish"]
    assert ends == ([{"exit_code": 0}, {"exit_code": 1}] if name == "wandb" else [{}, {}])
    Loggers(chosen, out, 0)
    assert "resume" not in told[-1][1], "a run from the start is a new one"
    (out / IDS).write_text("[damaged")
    Loggers(chosen, out, 2)
    assert "resume" not in told[-1][1]


def test_settings_that_are_shared_hold_no_secrets(backend, tmp_path):
    told = backend("wandb")
    url = "http://user:PASS@h:1/?key=SECRET"
    Loggers(config(mode="online", rewards=[{"endpoint": url}]), tmp_path, 0)
    assert "PASS" not in repr(told) and "SECRET" not in repr(told) and "h:1" in repr(told)


def test_a_logger_that_fails_does_not_end_the_run(backend, tmp_path, caplog):
    told = backend("wandb", fails_at=2)
    loggers = Loggers(config(), tmp_path, 0)
    for step in (1, 2, 3):
        loggers.write(step, {"loss": 1.0})
    loggers.close(failed=False)
    assert [entry for entry in told if entry[0] != "init"] == [("log", 1)]
    assert "loggers: wandb failed at step 2" in caplog.text and "no route" in caplog.text


def test_a_logger_that_does_not_start_is_refused(monkeypatch, tmp_path):
    class UsageError(Exception):
        pass

    def init(**options):
        raise UsageError("no api_key configured")

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"loggers: wandb did not start \(UsageError: no api_key"):
        Loggers(config(), tmp_path, 0)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    is_terminal, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    chosen = config(output_dir=str(tmp_path), loggers=[])
    reporter = Reporter(chosen, World(0, 1, None), 300, 0, None)
    for step in (1, 2, 3):
        reporter.step(step, {"loss": 0.5, "rewards/accuracies": 0.75, "tok_per_sec": 1234.0})
        reporter.advance()
    with reporter.evaluating(2) as shown:
        shown()
        during = reporter.bar.desc if is_terminal else None
    reporter.step(3, {"eval_loss": 0.25})
    reporter.close()
    said = capsys.readouterr()
    if is_terminal:
        assert during == "evaluate 1/2" and "accuracy=0.75" in said.err and said.out == ""
        return
    first, last = said.out.splitlines()
    assert first.startswith("step 3/300  loss 0.5  accuracy 0.75  tokens/s 1,234  0:0")
    assert last == "step 3/300 evaluation  loss 0.25" and said.err == ""


def test_what_is_said_is_printable_and_a_closed_terminal_is_no_end(monkeypatch, capsys):
    reporter = object.__new__(Reporter)
    reporter.world = World(0, 1, None)
    reporter.bar = None
    reporter.say("a\x1b[2J\nb")
    assert capsys.readouterr().out == "a\\x1b[2J b\n"

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    reporter.say("more")
