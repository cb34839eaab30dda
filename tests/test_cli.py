"""The command line, in this process: a wrong setting is named, with its mend; no word of others."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import yaml

from tiny import make_records, make_tokenizer, read_metrics, save_llama, write_jsonl
from una_fast import cli
from una_fast.cli import main
from una_fast.signals import Stopped

PAIR = {"prompt": "the cat", "chosen": "sat on", "rejected": "fell"}
SCORE = {"prompt": "the cat", "completion": "sat", "score": 0.5}


@pytest.fixture
def run(llamas, tmp_path, capsys):
    """Run `una-fast train` on some records; returns (exit status, output).

    A setting of None is left out.
    """

    def call(records=None, *flags: str, command: str = "train", **settings):
        defaults = {
            "model": llamas["untied"],
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "max_steps": 1,
        }
        if records is not None:
            defaults["data"] = write_jsonl(tmp_path / "x.jsonl", records)
        quiet = {"progress": False, "loggers": [], "write_report": False}
        given = {**defaults, **quiet, **settings}
        given = {name: value for name, value in given.items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
        capsys.readouterr()
        try:
            status = main([command, "--config", str(tmp_path / "run.yaml"), *flags])
        except SystemExit as stopped:  # how the parser of the arguments ends
            status = stopped.code
        return status, capsys.readouterr()

    return call


def test_train_and_precompute(run, llamas, tmp_path):
    """A whole way: reference log-probs, then training on the printed entries, with flags."""
    records = make_records("mixed", 6)
    status, said = run(records, command="precompute-ref", output_dir=str(tmp_path / "cache"))
    assert status == 0
    entries = yaml.safe_load(said.out[said.out.index("data:") :])
    flags = ["--max_steps", "2", "--batch_size", "3", "--learning_rate", "1e-3", "--lora.r", "2"]
    flags += ["--adam_betas", "[0.8, 0.9]", "--score_center", "dataset"]
    status, said = run(None, *flags, **entries)
    assert status == 0, said.err
    result = json.loads(said.out.splitlines()[-1])  # the last line is for programs
    assert result["steps"] == 2 and result["output_dir"] == str(tmp_path / "run")
    assert result["loss"] == read_metrics(tmp_path / "run")[-1]["loss"]
    names = [line.split()[0] for line in said.out.splitlines()]
    told = "data lengths steps memory output model done adapter metrics next"
    assert [name for name in names if name in told.split()] == told.split()
    assert f"una-fast merge {tmp_path / 'run'} --output_dir" in said.out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["lora"] == {"r": 2, "alpha": None, "target_modules": "all-linear"}
    assert saved["learning_rate"] == 1e-3 and saved["adam_betas"] == [0.8, 0.9]
    assert saved["score_center"] == "dataset"
    assert not any("lora" in p.name for p in tmp_path.iterdir())
    # The file that a run leaves starts the same run.
    again = tmp_path / "again"
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["train", "--config", config, "--output_dir", str(again)]) == 0
    assert read_metrics(again) == read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        (["--learning_rte", "1"], {}, "learning_rte"),
        (["--learning", "1"], {}, "learning"),  # no abbreviations
        ([], {"learning_rte": 1}, "learning_rte"),
        ([], {"lora": {"rank": 4}}, "rank"),
        (["--batch_size", "many"], {}, "batch_size"),
        (["--pair", "hinge"], {}, "logistic"),
        (["--loggers", "[mlflow]"], {}, "mlflow"),
        (["--precision", "fp16"], {}, "bf16"),
        (["--tokenizer", "null", "--learning_rate", "'1e-3'"], {}, "take the quotes away"),
        ([], {"lora": {"r": "4"}}, "lora.r='4' must be a whole number"),
        ([], {"adam_betas": [0.9]}, "adam_betas=[0.9] must be a list of 2"),
        ([], {"data": [{"path": "x", 3: 1}]}, "data[0]: the key 3 must be a text"),
        (["--batch_size=true"], {}, "batch_size=true must be a whole number"),
        (["--seed", "9" * 5000], {}, "seed="),
    ],
)
def test_unknown_keys_and_values(run, flags, settings, message):
    status, said = run([PAIR], *flags, **settings)
    assert status == 2
    assert message in said.err and said.err.count("\n") == 1


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "trian" in capsys.readouterr().err


RECORDS = {
    "missing column": ({"prompt": "a", "chosen": "b"}, {}, "column 'rejected' is missing"),
    "score over 1": (
        SCORE | {"score": 7},
        {},
        r"score is 7.0, outside \[0, 1\].*score_map: range with score_range",
    ),
    "long prompt": (
        PAIR | {"prompt": "why " * 9},
        {"max_prompt_tokens": 5},
        "over max_prompt_tokens=5; raise max_",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_malformed_records(run, tmp_path, name):
    """File, line, field and fix."""
    record, settings, message = RECORDS[name]
    status, said = run([SCORE, record], **settings)
    assert status == 1
    last = said.err.splitlines(True)[-1]
    assert re.fullmatch(rf"una-fast train: error: .*x\.jsonl:2: .*{message}.*\n", last)
    assert "Traceback" not in said.err


def test_malformed_records_are_skipped_and_counted(run):
    records = [record for record, _, _ in RECORDS.values()]
    status, said = run([SCORE, *records], on_bad_record="skip", max_prompt_tokens=8)
    assert status == 0 and f"{len(records)} skipped (first: " in said.out


def test_any_finite_reward_is_accepted_by_reward_mse(run, tmp_path):
    status, _ = run([SCORE | {"score": 7}, SCORE | {"score": -2}], score="reward_mse")
    assert status == 0
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx((49 + 4) / 2) and line["una/target_mean"] == 2.5
    assert "una/calibration_error" not in line


def test_a_declared_range_is_accepted(run, tmp_path):
    records = [SCORE | {"score": 7}, SCORE | {"score": 1}]
    status, _ = run(records, score_map="range", score_range=[1, 9])
    assert status == 0
    assert read_metrics(tmp_path / "run")[0]["una/target_mean"] == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "model is missing; set --model"),
        (
            {"model": "./nowhere"},
            r"directory ./nowhere does not exist; give a directory in Hugging Face form",
        ),
        (
            {"data": "nowhere.jsonl"},
            "'nowhere.jsonl' is neither a file, a directory, nor a loadable dataset",
        ),
        (
            {"reference": "cached"},
            r"reference=cached, but .*x.jsonl:1 has no ref_logps .*una-fast precompute-ref",
        ),
        ({"loggers": ["wandb"]}, "loggers: wandb is not installed; pip install wandb"),
        ({"engine": "triton"}, 'engine="triton" cannot run: tensors are on the CPU'),
        ({"workspace_mb": -1}, "workspace_mb=-1.* must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_settings(run, monkeypatch, settings, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, said = run([SCORE, SCORE] if "data" not in settings else None, **settings)
    assert status == 1
    assert re.search(rf"^una-fast train: error: .*{message}", said.err, re.M), said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("records", [[], [PAIR | {"chosen": "fell"}]])
def test_nothing_to_train_on(run, records):
    status, said = run(records, on_bad_record="skip")
    message = "error: no usable record: .*x.jsonl: . records -> 0 examples"
    assert status == 1 and re.search(message, said.err)


def test_a_tokenizer_without_eos(run, tmp_path):
    status, said = run([PAIR], model=save_llama(tmp_path / "model", eos=False))
    message = "the tokenizer of .*model has no eos token.*set eos_token in its tokenizer_config"
    assert status == 1 and re.search(f"error: {message}", said.err)


def test_a_tokenizer_of_its_own(run, tmp_path):
    """A tokenizer apart from the model; without a pad token, its eos token pads."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    padded = {"packing": False, "micro_batch_size": 2}
    status, _ = run([PAIR, SCORE], tokenizer=str(tmp_path / "tokenizer"), **padded)
    assert status == 0
    status, said = run([PAIR], tokenizer="./nowhere", output_dir=str(tmp_path / "other"))
    assert status == 1 and "tokenizer directory ./nowhere does not exist" in said.err


def test_a_hub_name_that_cannot_be_loaded(run, monkeypatch):
    """Not a bug of ours to be read from a traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, said = run([PAIR], model="una-fast-tests/no-such-model")
    assert status == 1
    assert "una-fast train: error: " in said.err and "Traceback" not in said.err


def test_a_directory_in_use(run):
    assert run([PAIR])[0] == 0
    status, said = run([PAIR])
    message = ".*run holds an earlier run; set resume=true to continue it, or another output_dir"
    assert status == 1 and re.search(f"error: {message}", said.err)
    assert run([PAIR], "--resume", "true")[0] == 0


def test_check(capsys, llamas):
    assert main(["check", "--model", llamas["tied"]]) == 0
    said = capsys.readouterr().out
    assert "engine of the fused head on cpu: torch" in said
    assert "model: LlamaForCausalLM" in said and "softcap None, logit scale 1" in said
    assert "rows: packed, the prompt once" in said


def test_help_and_refused_settings_need_neither_torch_nor_transformers():
    """Both are fast: modules of a run, and other packages, are not imported."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "peft", "datasets", "numpy"]))
from una_fast.cli import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    try:
        main([*words, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, words
needed = ["--model", "a", "--data", "b", "--output_dir", "c"]
for words in (["train", *needed, "--beta", "-1"], ["precompute-ref", *needed, "--seed", "-1"],
              ["plan", "--model", "a", "--prompt", "-1"], ["demo", "--seed", "-1"]):
    assert main(["-v", *words]) == 1, words
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: una-fast") == 1 + len(cli.COMMANDS)


def test_help_shows_every_setting_in_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    said = " ".join(" ".join(lines).split())
    for text in ("--lora LORA", "--score_center", "Peak learning rate", "--workspace_mb"):
        assert text in said
    groups = [line for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    first_words = [re.split(r"\W", group)[0] for group in groups]
    assert first_words[:5] == ["Model", "Objective", "Optimizer", "Memory", "Online"]
    assert first_words[-1] == "Evaluation" and len(groups) == 7
    flags = [line.split()[0] for line in lines[lines.index(groups[0]) :] if line.startswith("  --")]
    assert flags[:3] == ["--model", "--data", "--output_dir"]


def warn_of_everything(parsed) -> None:
    """A command: warnings of una_fast, of a package, and of a user's module."""
    logging.getLogger("una_fast.somewhere").warning("ours")
    logging.getLogger("torch").warning("of a package")
    for module in ("torch.nn", "users_rewards", "torchlight"):
        warnings.warn_explicit(f"from {module}", FutureWarning, "x.py", 1, module=module)


@pytest.mark.parametrize("verbose", [[], ["-v", "check"], ["check", "--verbose"]], ids=str)
def test_only_warnings_of_other_packages_are_hidden(monkeypatch, caplog, verbose):
    check = cli.COMMANDS["check"]._replace(run=warn_of_everything)
    monkeypatch.setitem(cli.COMMANDS, "check", check)
    level = logging.getLogger("torch").level
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert main(verbose or ["check"]) == 0
    assert "ours" in caplog.messages
    assert ("of a package" in caplog.messages) <= bool(
        verbose
    )  # torch's loggers need not propagate
    found = [str(warning.message) for warning in shown]
    theirs = ["from torch.nn"] if verbose else []
    assert found == [*theirs, "from users_rewards", "from torchlight"]
    assert logging.getLogger("torch").level == level


def test_plan_of_one_call(capsys):
    assert main(["plan", "--op", "8192", "4096", "128256", "--workspace_mb", "512"]) == 0
    said = capsys.readouterr().out
    assert "6 chunks of at most 1408 x 128256 logits" in said and "policy     3.00 passes" in said
    assert main(["plan", "--op", "1", "4096", "128256"]) == 1
    assert "N at least 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--op", "8192", "4096", "128256", "--device", "tpu"])
    assert "device='tpu' is not one of auto, cpu, cuda" in capsys.readouterr().err


@pytest.fixture
def fail(monkeypatch, capsys):
    """Run a command that raises an exception; returns (exit status, stderr)."""

    def call(error):
        def run(parsed):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "check", cli.COMMANDS["check"]._replace(run=run))
        status = main(["check"])
        return status, capsys.readouterr().err

    return call


class OutOfMemoryError(RuntimeError):
    """torch's, by its name."""


class OwnError(RuntimeError):
    """An exception class of una_fast's own."""


OwnError.__module__ = "una_fast.somewhere"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("x.jsonl:3:\n  the column \x1b[2J\x9b is bad"), 1, r"x.jsonl:3:   the column"),
        (OSError(28, "No space left on device", "out/x"), 1, r"No space left on device: 'out/x'"),
        (OwnError("the judge is down"), 1, "the judge is down"),
        (OutOfMemoryError("CUDA out of memory"), 1, "out of memory: lower micro_batch_size"),
        (MemoryError(), 1, "out of memory: lower micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower micro_batch_size"),
        (
            ValueError("http://u:PASS@h/?key=SECRET " + "x" * 9000),
            1,
            "http://\\*\\*\\*@h/\\?key=\\*",
        ),
        (KeyboardInterrupt(), 130, "una-fast check: ended by SIGINT"),
        (Stopped(signal.SIGTERM, "SIGTERM; o/checkpoint-3 is whole"), 143, "checkpoint-3 is whole"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_end_is_said_in_one_printable_line(fail, error, status, text):
    found, said = fail(error)
    assert found == status and re.search(text, said)
    assert said.count("\n") == 1 and said.rstrip("\n").isprintable() and len(said) < 1700
    assert "PASS" not in said and "SECRET" not in said


def test_a_bug_of_ours_gives_a_traceback_and_says_so(fail):
    status, said = fail(KeyError("gone"))
    assert status == 70 and said.startswith("Traceback")
    assert said.endswith("this is a bug of una_fast; please report it with the traceback above\n")
    _, said = fail(RuntimeError("\x1b[2J https://u:PASS@h/?key=SECRET"))
    assert "RuntimeError: \\x1b[2J https://***@h/?key=***\n" in said
    assert "\x1b" not in said and "PASS" not in said and "SECRET" not in said


def test_a_reader_of_stdout_that_goes_away_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)

    def run(parsed):
        print("x", file=sys.stdout, flush=True)

    monkeypatch.setitem(cli.COMMANDS, "check", cli.COMMANDS["check"]._replace(run=run))
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["check"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_the_launcher_is_told_the_error_of_a_rank(fail, monkeypatch, tmp_path):
    """torchrun shows the text of this file last, after a traceback of its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    status, said = fail(ValueError("x.jsonl:1: bad"))
    assert status == 1 and said == "una-fast check: error: x.jsonl:1: bad\n"
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"] == said.strip() == message["message"]
    assert waited == [cli.RANK_PATIENCE], "rank 0 speaks first, and may speak for all"


def test_lines_of_other_loggers_are_escaped(monkeypatch, capsys):
    def run(parsed):
        logging.getLogger("somebody").warning("\x1b[2J a\nb http://u:PASS@h/?key=SECRET")

    monkeypatch.setitem(cli.COMMANDS, "check", cli.COMMANDS["check"]._replace(run=run))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main(["check"]) == 0
    said = capsys.readouterr().err
    assert said == "somebody: \\x1b[2J a b http://***@h/?key=***\n"


def test_a_thread_left_behind_does_not_keep_the_process():
    code = """
import signal, sys, threading, time
from una_fast import cli, command
assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # while the rest is imported
def run(words):
    threading.Thread(target=time.sleep, args=(99,), name="\x1b[2J").start()
    return 3
cli.main, command.PATIENCE = run, 0.2
sys.exit(command.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    message = r"una-fast: ended without waiting for the threads '\x1b[2J'"
    assert (run.returncode, run.stderr) == (3, message + "\n")


def test_words_without_a_flag_stand_anywhere(capsys):
    def given(*words):
        return cli._parse(cli._parser(words), list(words)).given

    for words in (["chat", "runs/a", "--compare"], ["chat", "--compare", "runs/a"]):
        assert given(*words) == {"run": "runs/a", "compare": True}
    assert given("chat", "--compare", "false", "runs/a") == {"run": "runs/a", "compare": False}
    with pytest.raises(cli.UsageError, match=r"^unrecognized: --temprature 1; .*--temperature"):
        given("chat", "runs/a", "--temprature", "1")
    with pytest.raises(cli.UsageError, match="unrecognized: --run a$"):
        given("chat", "--run", "a")
