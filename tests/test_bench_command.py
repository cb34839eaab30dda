"""`una-fast bench`: rows, reasons, files and refusals, and the arithmetic of the longest call."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch

from una_fast.bench import contenders, longest, run
from una_fast.bench.attempts import DeviceLost, attempt
from una_fast.bench.contenders import Eager, Liger, Trl, Una
from una_fast.bench.inputs import HEADS, PLAIN, Form, Inputs
from una_fast.bench.longest import Line, line_of, search
from una_fast.bench.measuring import extra_bytes
from una_fast.bench.picture import draw
from una_fast.bench.run import PICTURE, RESULT
from una_fast.bench.settings import BenchConfig
from una_fast.bench.truth import check, logp_errors, logp_truth, truth
from una_fast.cli import main

SMALL = ("--tokens", "24", "--hidden", "16", "--vocab", "90")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_slopes(monkeypatch):
    """Slopes of memory need no millions of logits here."""
    monkeypatch.setattr(longest, "SLOPE_BYTES", 1 << 16)
    monkeypatch.setattr(contenders, "SMALL_WORKSPACE_MB", 1 / 64)


@pytest.fixture
def bench(tmp_path, capsys):
    """Run the command quickly; returns (exit status, stdout, stderr, stored result or None)."""

    def call(*words):
        out = tmp_path / "out"
        status = main(["bench", "--quick", "--device", "cpu", "--out", str(out), *words])
        said = capsys.readouterr()
        file = out / RESULT
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return status, said.out, said.err, stored

    return call


def lines_of(text):
    """The lines of the table, by the first word."""
    return {line.split()[0]: line for line in text.splitlines() if line.split()}


class Broken(Eager):
    """Eager PyTorch that raises."""

    name = "broken"

    def loss(self, x):
        raise RuntimeError("as\nplanned")


class Absent(Eager):
    """A peer that nobody has installed."""

    name, module, install = "absent", "no_such_peer.ops", "no-such-peer"


class Huge(Eager):
    """A contender whose step would not fit."""

    name = "huge"


def test_a_quick_run_fills_the_table_and_the_files(bench, tmp_path, monkeypatch):
    """A contender that raises, is missing, needs a GPU or does not fit is named with the reason."""
    entrants = [Una(), Eager(), Broken(), Absent(), contenders.Cce(), Huge()]
    monkeypatch.setattr(run, "of_the_head", lambda *_: entrants)

    def line(contender, x):
        return Line(1e15 if contender.name == "huge" else 1e3, 10.0, 8)

    monkeypatch.setattr(run, "line_of", line)
    status, said, _, stored = bench(*SMALL)
    assert status == 0
    last = json.loads(said.splitlines()[-1])
    assert last["output_dir"] == str(tmp_path / "out") and last["files"] == [RESULT, PICTURE]
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    shown = lines_of(said)
    assert "RuntimeError: as planned" in shown["broken"]
    assert "no_such_peer is not installed: pip install no-such-peer" in shown["absent"]
    assert "needs a GPU" in shown["cce"]
    assert "out of memory: a step needs" in shown["huge"]
    heading = next(text for text in said.splitlines() if "x bare mm" in text)
    for name in run.COLUMNS:
        assert name in heading
    rows = {row["name"]: row for row in stored["table"]}
    for name in ("una_fast", "eager"):
        row = rows[name]
        assert 0 < row["seconds"] == last["seconds"][name] and row["longest_kind"] == "modelled"
        assert row["ratio_error"] < 1e-3 and row["extra_bytes"] > 0
        assert row["quartiles"] and len(row["all_seconds"]) == run.QUICK_RUNS
    assert rows["bare mm"]["seconds"] > 0
    assert last["reasons"].keys() == {"broken", "absent", "cce", "huge"}
    assert rows["huge"]["longest_rows"] == 0
    shares = last["ratios"]["eager"]
    assert shares["seconds"] == rows["una_fast"]["seconds"] / rows["eager"]["seconds"]
    assert f"una_fast beside eager: {shares['seconds']:.3g} of the time" in said
    assert "modelled from short calls" in said
    environment = stored["environment"]
    assert {"torch", "trl", "machine", "threads", "command", "time"} <= environment.keys()
    head = stored["head"]
    assert (head["rows"], head["dim"], head["vocab"]) == (24, 16, 90)


def test_a_model_gives_sizes_and_real_states(bench, llamas):
    words = ["--contenders", "[una_fast, eager]", "--tokens", "16", "--head", "frozen"]
    status, said, _, stored = bench("--model", llamas["tied"], *words)
    assert status == 0, said
    head = stored["head"]
    assert (head["dim"], head["vocab"], head["head"]) == (32, 300, "frozen")
    ours, eager, _ = stored["table"]
    assert 0 < ours["real_ratio_error"] < 1e-3 and 0 < eager["real_sum_error"] < 1e-3
    assert not any("real hidden states" in note for note in stored["notes"])
    assert ours["passes"] == 3


def test_without_weights_or_matplotlib_the_rest_is_measured(bench, llamas, monkeypatch, tmp_path):
    """Sizes and constants come from config.json alone; what is left out is said."""
    only_config = tmp_path / "config-only"
    only_config.mkdir()
    with open(f"{llamas['untied']}/config.json", encoding="utf-8") as file:
        (only_config / "config.json").write_text(file.read(), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["--contenders", "[una_fast]", "--tokens", "16"]
    status, said, _, stored = bench("--model", str(only_config), *words)
    assert status == 0
    assert json.loads(said.splitlines()[-1])["files"] == [RESULT]
    assert "no picture: matplotlib is not installed: pip install matplotlib" in said
    assert "no errors on real hidden states: the weights are not in a directory" in said
    assert "seconds" in stored["table"][0] and "real_ratio_error" not in stored["table"][0]


def test_a_picture_that_fails_is_a_note(tmp_path, capsys):
    """The table is printed and the numbers are stored before, for the note once more."""
    (tmp_path / PICTURE).mkdir()
    row = {"name": "una_fast", "seconds": 1.0}
    environment = {"machine": "a machine", "threads": 1}
    result = {"environment": environment, "table": [row], "notes": [], "ratios": {}}
    work = run.Work("random numbers", 8, 4, 30, PLAIN, CPU, torch.float32)
    told = run._tell(result, work, BenchConfig(), tmp_path)
    assert told["files"] == [RESULT] and "una_fast" in lines_of(capsys.readouterr().out)
    (note,) = json.loads((tmp_path / RESULT).read_text())["notes"]
    assert note.startswith("no picture: IsADirectoryError")


def test_a_name_in_the_title_is_no_formula(tmp_path):
    file = tmp_path / PICTURE
    row = {"name": "una_fast", "seconds": 1.0}
    assert draw([row], r"./a_$b_$c and m$\frac$", file) is None and file.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "0"), "tokens=0 must be at least 2"),
        (("--hidden", "0"), "hidden=0 must be at least 1"),
        (("--vocab", "1"), "vocab=1 must be at least 2"),
        (("--hidden", "4000000", "--vocab", "4000000"), "give smaller --hidden, --vocab"),
        (("--model", "./nowhere"), "model directory ./nowhere does not exist"),
        (("--model", "m", "--vocab", "90"), "the model gives hidden and vocab"),
        (("--workspace_mb", "0"), "workspace_mb=0.* must be at least 1"),
        (("--contenders", "[una_fast, trll]"), "contenders='trll' is not one of una_fast, eager"),
        (("--contenders", "[]"), "contenders is empty"),
        (("--seconds", "-1"), "seconds=-1.* must be positive"),
    ],
)
def test_bad_input_is_refused(bench, words, message):
    status, _, said, stored = bench(*words)
    assert status == 1 and re.search(f"una-fast bench: error: .*{message}", said), said
    assert "Traceback" not in said and stored is None


def test_an_engine_that_cannot_run_is_refused_before_the_bench(bench):
    """The rest would be measured, and una_fast, which was asked for, not at all."""
    words = ("--engine", "triton", "--contenders")
    status, said, error, stored = bench(*SMALL, *words, "[una_fast, eager]")
    assert status == 1 and 'engine="triton" cannot run: tensors are on the CPU' in error
    assert stored is None and not said
    assert bench(*SMALL, *words, "[eager]")[0] == 0, "the engine is una_fast's alone"


class BrokenUna(Una):
    """una_fast that raises."""

    def loss(self, x):
        raise RuntimeError("as planned")


@pytest.mark.parametrize(
    "entrants", [[BrokenUna(), Eager()], [Broken()]], ids=["without una_fast", "of nothing"]
)
def test_a_bench_without_the_measurement_asked_for_fails(bench, monkeypatch, entrants):
    """After the table and the file, which say what else was found."""
    monkeypatch.setattr(run, "of_the_head", lambda *_: entrants)
    status, said, error, stored = bench(*SMALL)
    assert status == 1 and f"nothing was measured of {entrants[0].name}: RuntimeError" in error
    assert "as planned" in lines_of(said)[entrants[0].name]
    assert len(stored["table"]) == len(entrants) + 1


def test_results_need_a_directory_to_write_in(tmp_path, capsys):
    """Before the bench, and by the name of the setting, whatever the system says."""
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below", "/proc", "/proc/x", "~no_such_user_of_una/x"):
        status = main(["bench", "--quick", "--device", "cpu", "--out", str(out), *SMALL])
        said = capsys.readouterr()
        assert status == 1 and "error: out=" in said.err and "set another" in said.err
        assert "Traceback" not in said.err and "una_fast" not in said.out


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, and torch finds no GPU"):
        run.run_bench(BenchConfig(device="cuda"))


def test_a_gpu_that_a_contender_broke_is_told(monkeypatch, tmp_path):
    def lost(self, real):
        raise DeviceLost("liger", "RuntimeError: misaligned address")

    monkeypatch.setattr(run.Bench, "measure", lost)
    settings = BenchConfig(tokens=8, hidden=8, vocab=30, device="cpu", out=str(tmp_path))
    with pytest.raises(ValueError, match="liger broke the GPU's context .*misaligned.*contenders"):
        run.run_bench(settings)


def test_a_run_of_a_shape_needs_torch_alone(tmp_path):
    """Peers, transformers and matplotlib may all be absent: each is named, none is needed."""
    absent = ["transformers", "peft", "datasets", "safetensors", "matplotlib", "trl"]
    absent += ["liger_kernel", "cut_cross_entropy"]
    # -v: the command does not quieten packages, which are None here.
    words = ["-v", "bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "out"), *SMALL]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from una_fast.bench import longest
from una_fast.cli import main
longest.SLOPE_BYTES = 1 << 16
sys.exit(main({words!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = lines_of(done.stdout)
    assert "trl" in shown["trl"] and "liger_kernel" in shown["liger"]
    assert "seconds" in json.loads(done.stdout.splitlines()[-1])


def test_every_setting_is_read(monkeypatch, tmp_path):
    """A setting that nobody reads is a bug."""
    read = set()

    class Watched(BenchConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    settings = Watched(tokens=8, hidden=8, vocab=30, out=str(tmp_path), quick=True, device="cpu")
    settings.contenders = ["una_fast"]
    read.clear()
    monkeypatch.setattr(run, "asdict", lambda settings: {})
    run.run_bench(settings)
    unread = {field.name for field in dataclasses.fields(BenchConfig)} - read
    assert unread == {"trust_remote_code"}  # of a model


# ---------------------------------------------------------------------------- heads of every form

FORMS = [Form(30.0), Form(None, 0.25, True), Form(20.0, 2.0, True), Form(has_bias=True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_contenders_agree_with_float64_for_every_form(form, head):
    """A softcap, a scale and a bias, with their gradients; peers that lack a part say so."""
    x = Inputs((7, 7), 12, 70, form=form)
    x.head(head)
    true = truth(x, block_bytes=8 * 70 * 4)
    light = logp_truth(x, block_bytes=8 * 70 * 4)
    assert torch.equal(true.sums, light.sums) and torch.equal(true.ref_sums, light.ref_sums)
    measured = 0
    for contender in (Una(), Eager(), Trl(), Liger()):
        if contender.unavailable(x):
            continue
        errors = check(contender, x, true) | logp_errors(contender, x, true)
        assert ("bias_grad_error" in errors) == (form.has_bias and head == "trained")
        assert errors["ratio_error"] < 1e-4
        measured += 1
    assert measured >= 2
    reason = Liger().unavailable(x) or ""
    assert ("softcap" in reason) == (form.softcap is not None)
    assert ("logit scale" in reason) == (form.logit_scale != 1.0)


def test_the_truth_of_a_form_is_autograd_s():
    form = Form(20.0, 2.0, True)
    x = Inputs((5, 5), 8, 40, form=form, dtype=torch.float64)
    Eager().loss(x).backward()  # full rows of logits; float32 log-softmax
    found = truth(x, block_bytes=8 * 40 * 3)
    for name, leaf in x.leaves.items():
        torch.testing.assert_close(
            getattr(found, name), leaf.grad.float(), rtol=1e-3, atol=1e-6, msg=name
        )


# --------------------------------------------------------------------------------- the longest call


def test_other_lengths_have_the_same_heads():
    x = Inputs((5, 5), 8, 30)
    part = x.of_length(3)
    assert part.lengths == [3, 3] and part.weight.data_ptr() == x.weight.data_ptr()
    assert torch.equal(part.hidden, x.hidden[[0, 1, 2, 5, 6, 7]])
    repeated = x.of_length(7)
    assert torch.equal(repeated.targets[5:7], x.targets[:2])
    Eager().loss(part).backward()
    assert x.weight.grad is None and part.weight.grad is not None


def test_the_line_of_memory_is_the_memory(monkeypatch):
    """Of a longer call than was measured, to the percent; of a full workspace too."""
    monkeypatch.setattr(longest, "SLOPE_BYTES", 1 << 21)
    monkeypatch.setattr(contenders, "SMALL_WORKSPACE_MB", 1)
    x = Inputs((32, 32), 8, 2000)
    gradient = 4 * x.weight.numel()
    longer = x.of_length(1500)
    for contender in (Eager(), Una(workspace_mb=4), Trl()):
        if contender.unavailable(x):
            continue
        line = line_of(contender, x)
        predicted = line.needed(longer.rows) - gradient
        within = 0.01 if contender.name == "eager" else 0.2
        assert predicted == pytest.approx(extra_bytes(contender, longer), rel=within)


def test_the_longest_call_of_a_line():
    line = Line(base=100.0, extra=8.0, states=2)
    assert line.longest(1100) == 100 and line.longest(50) == 0
    bent = line._replace(bend=10, tail=0.0)
    assert bent.longest(150) == 5
    # 100 + 10 * (8 + 2) up to the bend, then 2 bytes a row.
    assert bent.longest(1200) == 10 + 500
    assert bent.needed(20) == 100 + 80


def test_a_search_ends_close_below_the_full_memory(monkeypatch):
    x = Inputs((4, 4), 8, 30)
    tried = []

    def step_of(contender, part):
        tried.append(part.lengths[0])
        if part.rows > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(longest, "step", step_of)
    found = search(Eager(), x, 60.0)
    assert 1000 / 1.06 <= found["longest_rows"] <= 1000 and found["longest_kind"] == "searched"
    assert "longest_note" not in found and len(tried) < 20
    monkeypatch.setattr(longest, "MOST_ROWS", 64)
    assert search(Eager(), x, 60.0) == {
        "longest_rows": 64,
        "longest_kind": "searched",
        "longest_note": "or longer",
    }

    def broken(contender, part):
        raise RuntimeError("misaligned")

    monkeypatch.setattr(longest, "step", broken)
    assert "misaligned" in search(Eager(), x, 60.0)["longest_note"]


def test_memory_that_is_full_is_told_with_the_sizes():
    def full(error):
        def act():
            raise error

        return attempt("x", act)[1]

    assert full(MemoryError("a step needs 2 GiB")) == "out of memory: a step needs 2 GiB"
    assert full(MemoryError()) == "out of memory"
    assert full(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"


def test_default_tokens_follow_the_head():
    """A step takes seconds, whatever the head."""
    settings = BenchConfig()
    small = run._work(settings, None, CPU, torch.float32)
    assert small.rows * run.RESPONSES == run.MOST_TOKENS["cpu"]
    large = run._work(BenchConfig(hidden=4096, vocab=128256), None, CPU, torch.float32)
    flop = 2 * large.rows * run.RESPONSES * large.dim * large.vocab
    assert run.PASS_FLOP["cpu"] / 2 <= flop <= run.PASS_FLOP["cpu"]
