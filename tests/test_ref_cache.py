"""Cached reference log-probs: written whole, gone on with after a kill, refused where foreign."""

from __future__ import annotations

import datetime
import json
import shutil
import types
from pathlib import Path

import pytest
import torch

from runs import LORA
from tiny import make_config, make_records, make_tokenizer, read_metrics, save_llama, write_jsonl
from una_fast.signals import Stopped
from una_fast.train import precompute, ref_cache
from una_fast.train.loop import train
from una_fast.train.precompute import precompute_reference

ONE_STEP = {"max_steps": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Write 12 pairs, half of them chats."""
    pairs, chats = (make_records(kind, 6, seed=3) for kind in ("pairs", "chats"))
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", [*pairs, *chats])


@pytest.fixture(scope="module")
def cache(llamas, chats, tmp_path_factory):
    """Write log-probs of `chats`; return their folder."""
    out = tmp_path_factory.mktemp("cache") / "out"
    precompute_reference(make_config(llamas["untied"], chats, out))
    return out


@pytest.fixture
def data(cache, tmp_path):
    """Copy the data file and its sidecar to a folder of this test."""
    shutil.copytree(cache, tmp_path / "moved")
    return tmp_path / "moved" / "data-00-chats.jsonl"


def start(model, data, output_dir, **settings):
    """Take a step of training; return its metrics."""
    train(make_config(str(model), str(data), output_dir, **{**ONE_STEP, **settings}))
    return read_metrics(output_dir)[0]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


# ---- the sidecar -------------------------------------------------------------------------------


def test_a_moved_file_keeps_its_log_probs(llamas, data, tmp_path):
    """By a model elsewhere, too: an identity holds no paths."""
    shutil.copytree(llamas["untied"], tmp_path / "model")
    sidecar = json.loads(Path(f"{data}.ref.json").read_text())
    assert sidecar["records"] == 12 and str(tmp_path.parent) not in json.dumps(sidecar)
    start(tmp_path / "model", data, tmp_path / "run")
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["reference"] == "cached"


@pytest.mark.parametrize(
    "settings", [{"lora": LORA}, {"master_weights": True}], ids=["lora", "fp32"]
)
def test_other_ways_to_train_the_same_model_take_the_log_probs(llamas, data, tmp_path, settings):
    assert abs(start(llamas["untied"], data, tmp_path / "run", **settings)["log_ratio"]) < 1e-4


def other_template(model: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(" | trim", "")
    tokenizer.save_pretrained(model)


def other_tokenizer(model: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["ing"])
    tokenizer.save_pretrained(model)


FOREIGN = {
    "weights": ("another model", {}),
    "template": ("another chat template", {}),
    "tokenizer": ("another tokenizer", {}),
    "precision": ("another compute dtype .was 'float32', is 'bfloat16'.", {"precision": "bf16"}),
    "limit": ("another max tokens .was None, is 99.", {"max_tokens": 99}),
    "overflow": (
        "another prompt overflow .was 'error', is 'truncate_left'.",
        {"prompt_overflow": "truncate_left"},
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_log_probs_are_refused_by_name(name, llamas, data, tmp_path):
    message, settings = FOREIGN[name]
    model = tmp_path / "model"
    if name == "weights":
        save_llama(model, seed=9)
    else:
        shutil.copytree(llamas["untied"], model)
    if name == "template":
        other_template(model)
    if name == "tokenizer":
        other_tokenizer(model)
    with pytest.raises(ValueError, match=rf"data-00-chats.jsonl: .*{message}.*precompute-ref"):
        start(model, data, tmp_path / "run", **settings)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    # The run that computes its reference does not read them.
    start(model, data, tmp_path / "own", **settings, reference="frozen")


def cut_at_a_line(data: Path) -> None:
    data.write_bytes(b"".join(data.read_bytes().splitlines(keepends=True)[:-1]))


def swap_two_numbers(data: Path) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["ref_logps"].reverse()
    write_jsonl(data, lines)


@pytest.mark.parametrize("change", [cut_at_a_line, swap_two_numbers])
def test_a_changed_file_is_refused(change, llamas, data, tmp_path):
    change(data)
    with pytest.raises(ValueError, match=r"has changed since .*1[12] records now, 12 then"):
        start(llamas["untied"], data, tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"records": 12}'])
def test_a_damaged_sidecar_is_refused(text, llamas, data, tmp_path):
    Path(f"{data}.ref.json").write_text(text)
    with pytest.raises(ValueError, match="ref.json is no sidecar of ref_logps"):
        start(llamas["untied"], data, tmp_path / "run")


# ---- a user's own column -----------------------------------------------------------------------


def test_own_log_probs_are_compared_with_the_model(llamas, data, tmp_path):
    Path(f"{data}.ref.json").unlink()
    assert abs(start(llamas["untied"], data, tmp_path / "run")["log_ratio"]) < 1e-4
    other = save_llama(tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match=r"chats.jsonl:\d+: ref_logps\[0\] is -.* gives -"):
        start(other, data, tmp_path / "second")


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_own_log_probs_of_a_part_of_the_file_are_compared(value, llamas, data, tmp_path):
    """Such as two files joined: nonsense in its last quarter alone."""
    Path(f"{data}.ref.json").unlink()
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines[9:]:
        line["ref_logps"] = [value, value]
    write_jsonl(data, lines)
    with pytest.raises(ValueError, match=r"ref_logps\[0\] is .* but the model of the run gives"):
        start(llamas["untied"], data, tmp_path / "run")


# ---- written whole -----------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL: nothing that is written after it reaches the disk."""


def killed_after(count: int, monkeypatch):
    """Let precompute-ref die before the log-probs of its micro-batch number `count`."""
    whole = precompute._Writer._logps_of
    calls = []

    def counting(self, micro_batch):
        calls.append(micro_batch)
        if count is not None and len(calls) > count:
            raise Killed
        return whole(self, micro_batch)

    monkeypatch.setattr(precompute._Writer, "_logps_of", counting)
    return calls


@pytest.mark.parametrize("torn", [b"", b"12", b"0123456789abcdef [[-1.0, -2.0]]\n"])
def test_a_killed_command_goes_on(torn, llamas, chats, cache, tmp_path, monkeypatch):
    """Also on another day, and with a line that was torn: its files are those of `cache`."""
    config = make_config(llamas["untied"], chats, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(5, patch)
        precompute_reference(config)
    (progress,) = files_in(tmp_path / "out")
    assert progress == "data-00-chats.jsonl.logps.tmp", "nothing that looks whole"
    with (tmp_path / "out" / progress).open("ab") as file:
        file.write(torn)
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)
    calendar = types.SimpleNamespace(date=types.SimpleNamespace(today=lambda: tomorrow))
    monkeypatch.setattr(precompute, "datetime", calendar)
    calls = killed_after(None, monkeypatch)
    precompute_reference(config)
    assert len(calls) == 12 - 5 and files_in(tmp_path / "out") == files_in(cache)


def test_a_command_of_other_settings_starts_anew(llamas, chats, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(5, patch)
        precompute_reference(make_config(llamas["untied"], chats, tmp_path / "out"))
    calls = killed_after(None, monkeypatch)
    precompute_reference(make_config(llamas["tied"], chats, tmp_path / "out"))
    assert len(calls) == 12 and "starting anew" in capsys.readouterr().out


def test_a_kill_between_sidecar_and_file_leaves_no_file(
    llamas, chats, cache, data, tmp_path, monkeypatch
):
    """Where an older file is there, the new sidecar refuses it."""
    cut_at_a_line(data)

    def kill(*_):
        raise Killed

    config = make_config(llamas["untied"], chats, data.parent)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("una_fast.files.os.fsync", kill)
        precompute_reference(config)
    with pytest.raises(ValueError, match="has changed since"):
        start(llamas["untied"], data, tmp_path / "run")
    precompute_reference(config)
    assert files_in(data.parent) == files_in(cache)


def test_a_stopped_command_says_that_it_goes_on(llamas, chats, tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped(15, by_signal=True)

    monkeypatch.setattr(precompute._Writer, "_logps_of", stop)
    with pytest.raises(Stopped, match="ended by SIGTERM; the same command goes on"):
        precompute_reference(make_config(llamas["untied"], chats, tmp_path / "out"))


def test_weights_that_give_no_numbers_are_refused(llamas, chats, tmp_path, monkeypatch):
    nothing = torch.full((2,), float("nan"), dtype=torch.float64)
    monkeypatch.setattr(precompute.Scoring, "logps", lambda *_: nothing)
    with pytest.raises(ValueError, match=r"chats.jsonl:\d+: the model gives log-probs \[nan, nan"):
        precompute_reference(make_config(llamas["untied"], chats, tmp_path / "out"))


def test_a_full_disk_is_told(llamas, chats, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(precompute._Progress, "add", full)
    with pytest.raises(ValueError, match="No space left on device; .* MB are free. Make room"):
        precompute_reference(make_config(llamas["untied"], chats, tmp_path / "out"))


def test_old_log_probs_are_replaced_whatever_they_are(llamas, cache, data, tmp_path):
    """The refusal of such a column says to compute it anew, which must then be possible."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line, value in zip(lines, [7.0, "x", None, [1.0], [-1e300, -1.0], {}] * 2, strict=True):
        line["ref_logps"] = value
    write_jsonl(tmp_path / "chats.jsonl", lines)
    config = make_config(llamas["untied"], str(tmp_path / "chats.jsonl"), tmp_path / "out")
    precompute_reference(config)
    assert files_in(tmp_path / "out") == files_in(cache)


def test_columns_that_json_lacks_are_written(llamas, tmp_path):
    """Of a Parquet file: a run would refuse nan in its own new file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    extra = {"note": float("nan"), "day": datetime.date(2026, 1, 2), "deep": {"x": [float("inf")]}}
    rows = [record | extra for record in make_records("pairs", 2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    config = make_config(llamas["untied"], str(tmp_path / "x.parquet"), tmp_path / "out")
    data = precompute_reference(config)["data"][0]["path"]
    line = json.loads(Path(data).read_text().splitlines()[0])
    assert (line["note"], line["day"], line["deep"]) == (None, "2026-01-02", {"x": [None]})
    start(llamas["untied"], data, tmp_path / "run", batch_size=2)


def test_the_date_of_a_template_is_kept(llamas, chats, cache, tmp_path):
    """A template that prints the date gives other tokens tomorrow; a run takes the date along."""
    folder = make_config(llamas["untied"], [str(cache)], tmp_path / "run")
    today = ref_cache.RefCache.read(cache / "data-00-chats.jsonl").date
    assert ref_cache.date_of_caches(folder) == today
    assert ref_cache.date_of_caches(make_config(llamas["untied"], chats, tmp_path)) is None
