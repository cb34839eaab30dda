"""The bench itself: arithmetic, verdicts, and a contender's failure as a row and no more."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

import bench_head
import contenders
import gpu_probe
import harness
import plots
import real_states
import tables
from bench_head import Case, judge, measure
from una_fast import Objective
from una_fast.bench import attempts
from una_fast.bench.attempts import WrongResult, attempt
from una_fast.bench.contenders import Eager, Trl, Una, full_logits, lacks
from una_fast.bench.gemms import reference
from una_fast.bench.inputs import BETA, HEADS, Inputs
from una_fast.bench.timing import typical
from una_fast.bench.truth import check, logp_errors, truth
from una_fast.head import eager

CASE = Case("test", (9, 9), 16, 130, bars=("time", "peers", "memory", "accuracy"), runs=1)


@pytest.fixture(scope="module")
def small():
    x = Inputs(CASE.lengths, CASE.dim, CASE.vocab)
    return x, truth(x, block_bytes=8 * CASE.vocab * 5)


def options(**changes):
    threads = str(torch.get_num_threads())
    parsed = bench_head.parse(["--device", "cpu", "--runs", "1", "--threads", threads])
    for name, value in changes.items():
        setattr(parsed, name, value)
    return parsed


class Broken(Eager):
    """Eager PyTorch with a fault: fault(x, the right loss) is the loss."""

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def loss(self, x):
        return self.fault(x, super().loss)


def raises(error):
    def fault(x, loss):
        raise error

    return fault


# ------------------------------------------------------------------------------------------- truth


def test_truth_is_eager():
    for scores in (False, True):
        x = Inputs((5, 8, 3, 6), 12, 70, scores=scores)
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight)]
        call = {"ref_hidden": x.ref_hidden.double(), "ref_weight": x.ref_weight.double()}
        call["objective"] = Objective(beta=BETA)
        out = eager.linear_una_loss(*leaves, x.targets, x.cu_seqlens, x.feedback, **call)
        out.loss.backward()
        found = truth(x, block_bytes=8 * 70 * 4)
        assert found.loss == pytest.approx(out.loss.item(), rel=1e-12)
        torch.testing.assert_close(found.sums, out.logps.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.hidden, leaves[0].grad.float())
        torch.testing.assert_close(found.weight, leaves[1].grad.float())


@pytest.mark.parametrize("head", HEADS)
def test_stated_passes_are_the_counted_passes(head):
    x = Inputs((40, 40), 32, 300)
    x.head(head)
    for contender in (Una(), Eager(), Trl(), contenders.Liger(), contenders.Torch()):
        if not contender.unavailable(x):  # a peer may not be installed
            check(contender, x, truth(x))
            counted = bench_head.costs(contender, x)["passes"]
            assert counted == pytest.approx(contender.passes[head]), contender.name


@pytest.mark.parametrize("scores", [False, True])
def test_the_error_of_a_log_ratio_is_of_what_the_loss_sees(scores):
    """An error that policy and reference share cancels, and an error of one sum does not."""
    x = Inputs((7, 7, 5, 5), 12, 70, scores=scores)
    true = truth(x)
    found = logp_errors(Eager(), x, true)
    assert found["ratio_error"] < 1e-4

    class Shifted(Eager):
        def __init__(self, both):
            self.both = both

        def sums(self, inputs):
            is_policy = inputs is x
            shift = torch.tensor([0.5, 0.0, 0.0, 0.25])
            return super().sums(inputs) + shift * (self.both or is_policy)

    assert logp_errors(Shifted(True), x, true)["sum_error"] > 0.49
    assert logp_errors(Shifted(True), x, true)["ratio_error"] < 1e-4
    alone = logp_errors(Shifted(False), x, true)["ratio_error"]
    assert alone == pytest.approx(0.5, abs=1e-4)


def test_a_peer_with_another_signature_is_a_row():
    def renamed(hidden, weight, labels, *, how):
        """Take other arguments than this bench passes."""

    reason = lacks(renamed, 3, "reduction")
    assert "renamed has another signature" in reason and "'how'" in reason
    assert lacks(renamed, 3, "how") is None
    x = Inputs((8, 8), 16, 90)
    for contender in contenders.everybody([None]):
        reason = contender.unavailable(x)
        assert reason is None or isinstance(reason, str), contender.name
    odd = Inputs((8, 7), 16, 90)
    assert "multiple of 8" in contenders.QuackSums().unavailable(odd)


def test_a_package_loads_without_its_start(tmp_path, monkeypatch):
    """A peer's package may patch torch for everybody as it starts."""
    inner = tmp_path / "loud_peer" / "losses"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("raise ImportError('needs a GPU')\n")
    (inner / "wanted.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs a GPU"):
        importlib.import_module("loud_peer.losses.wanted")
    monkeypatch.delitem(sys.modules, "loud_peer", raising=False)
    contenders.without_start_code("loud_peer", "loud_peer.losses")
    try:
        assert importlib.import_module("loud_peer.losses.wanted").answer == 42
        with pytest.raises(ImportError, match="no package no_such_peer"):
            contenders.without_start_code("no_such_peer")
    finally:
        for name in [name for name in sys.modules if name.startswith("loud_peer")]:
            del sys.modules[name]


# -------------------------------------------------------------------------------- refusals are rows


def no_reference(x, loss):
    zero = torch.zeros(len(x.lengths))
    return x.loss_of(x.sums(full_logits(x.hidden, x.weight, x.targets)), zero)


def detached_weight(x, loss):
    sums = x.sums(full_logits(x.hidden, x.weight.detach(), x.targets))
    ref = x.sums(full_logits(x.ref_hidden, x.ref_weight, x.targets))
    return x.loss_of(sums, ref)


def grown_gradient(x, loss):
    value = loss(x)
    x.hidden.register_hook(lambda grad: grad * 1.01)
    return value


FAULTS = {  # (fault, beginning of the reason)
    "no reference": (no_reference, "wrong result: loss"),
    "no gradient": (detached_weight, "wrong result: no gradient for weight"),
    "sign": (lambda x, loss: loss(x).detach() * 2 - loss(x), "wrong result: gradient of hidden"),
    "NaN": (lambda x, loss: loss(x) * float("nan"), "wrong result: loss"),
    "memory": (raises(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
    "driver": (raises(RuntimeError("CUDA error: out of memory")), "out of memory"),
    "assertion": (raises(AssertionError("V % 128")), "AssertionError: V % 128"),
}


def test_a_fault_is_a_row_with_the_reason_and_no_time(small):
    x, true = small
    x.head("trained")

    class Missing(Eager):
        name, module = "missing", "no_such_package"

    calls = []

    def late(x, loss):
        calls.append(1)
        if len(calls) > 3:  # parity, flop and memory are through
            raise torch.OutOfMemoryError
        return loss(x)

    broken = [Broken(name, fault) for name, (fault, _) in FAULTS.items()]
    broken += [Missing(), Broken("lost", lambda x, loss: loss(x)), Broken("late", late)]
    known = options(lost={"lost": "broke the GPU's context"})
    *rows, healthy, bare = measure(CASE, x, true, [*broken, Eager()], known)["table"]
    assert "reason" not in healthy and healthy["seconds"] > 0 and bare["name"] == "bare mm"
    assert not any("seconds" in row for row in rows)
    reasons = {row["name"]: row["reason"] for row in rows}
    for name, (_, reason) in FAULTS.items():
        assert reasons[name].startswith(reason), name
    assert "no_such_package" in reasons["missing"]
    assert reasons["lost"] == "broke the GPU's context"
    assert reasons["late"] == "out of memory" and len(calls) == 5  # timed twice


def test_a_slightly_wrong_gradient_is_refused(small):
    x, true = small
    x.head("frozen")
    check(Eager(), x, true)
    hooked = Inputs(CASE.lengths, CASE.dim, CASE.vocab)
    hooked.head("frozen")
    with pytest.raises(WrongResult, match="gradient of hidden"):
        check(Broken("grown", grown_gradient), hooked, true)


def test_a_deadline_ends_a_run_and_leaves_no_alarm_behind():
    def forever():
        while True:
            pass

    assert attempt("x", forever, seconds=0.05) == (None, "not done in 0.05 s")
    assert attempt("x", lambda: sum(range(2_000_000)))[1] is None  # longer than the alarm


def test_a_process_that_ended_leaves_the_name_of_its_contender(tmp_path):
    out = tmp_path / "out.json"
    running = out.with_suffix(".running")
    report = {"lost": {}, "results": []}
    seen = []

    def outer():
        attempt("inner", lambda: seen.append(running.read_text()))
        seen.append(running.read_text())

    with harness.guarded(report, out):
        attempt("outer", outer)
    assert seen == ["inner", "outer"] and not running.exists() and report["lost"] == {}
    running.write_text("crashed")
    with harness.guarded(report, out):
        assert not running.exists()
    assert json.loads(out.read_text())["lost"] == {"crashed": "the process ended while it ran"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on a CPU need the interpreter")
def test_the_probe_runs_and_stores_every_line(tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert gpu_probe.main(["--small", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {"torch", "commit", "command", "sources", "time"} <= report["environment"].keys()
    rows = {row["name"]: row for row in report["results"]}
    assert rows["logits, float32 out, row stride V + 64"]["tflops"] > 0
    assert rows["one_read, padded rows"]["gb_per_s"] > 0
    assert capsys.readouterr().out.count("\n") == len(report["results"]) + 1
    out.unlink()
    # No time: every line of the heads is a row with the reason, and the exit status tells.
    assert gpu_probe.main(["--small", "--device", "cpu", "--seconds", "0", "--out", str(out)]) == 1
    late = [row for row in json.loads(out.read_text())["results"] if "no time" in str(row)]
    assert len(late) > 10


# ---------------------------------------------------------------------------- arithmetic, verdicts


def test_reference_takes_the_fastest_chunk_of_each_pass():
    seconds = {("logits", 4096): 1.0, ("logits", 8192): 1.8, ("logits", 16384): 4.4}
    seconds |= {("hidden", 4096): 1.5, ("hidden", 16384): 5.0}
    seconds |= {("weight", 8192): 2.0, ("weight", 16384): 3.5}
    trained, frozen = (reference(seconds, 16384, head) for head in (True, False))
    assert trained["rows of mm"] == {"logits": 8192, "hidden": 16384, "weight": 16384}
    assert trained["seconds"] == pytest.approx(3.6 + 3.6 + 5.0 + 3.5) and trained["passes"] == 4
    assert frozen["seconds"] == pytest.approx(3.6 + 3.6 + 5.0) and frozen["passes"] == 3


def row(name, **numbers):
    return {"name": name, "passes": 4, "same_work": True, **numbers}


def ours(seconds=1.1, gib=1.9, **numbers):
    fixed = {"workspace_mb": 2048, "extra_bytes": gib * 2**30}
    fixed |= {"sum_tokens": 8192, "sum_error": 0.01}
    return row("una_fast 2048 MiB", seconds=seconds, **fixed | numbers)


def verdicts(*rows, **entry):
    entry = judge(CASE._replace(dim=4096), {"head": "trained", "table": list(rows), **entry})
    return {bar["bar"]: bar["held"] for bar in entry["bars"]}


def test_bars_hold_and_miss():
    bare, worse = (
        row("bare mm", seconds=1.0),
        {"hidden_grad_error": 0.02, "weight_grad_error": 0.02},
    )
    good = {"hidden_grad_error": 0.01, "weight_grad_error": 0.01}
    names = ("trl", "cce", "liger", "eager", "torch.compile")
    peers = [row(name, seconds=3.0, extra_bytes=2**34, **worse) for name in names]
    held = verdicts(ours(**good), *peers, bare)
    assert len(held) == 10 and all(held.values())
    assert not verdicts(ours(1.2), bare)["time / bare mm"]
    slow = verdicts(ours(), bare, row("trl", seconds=3.0), reference={"valid": False})
    assert not slow["time / bare mm"] and slow["time / trl"]
    assert not verdicts(ours(), row("trl", seconds=1.2))["time / trl"]
    assert not verdicts(ours(gib=2.2))["bytes / workspace"]
    assert not verdicts(ours(sum_error=0.03))["error of 8192-token sums, nat"]
    assert not verdicts(ours(hidden_grad_error=0.03), peers[3])["hidden gradient error / eager"]


def test_a_peer_out_of_memory_is_beaten_and_a_missing_peer_is_not():
    full = row("eager", reason="out of memory")
    held = verdicts(ours(), row("trl", reason="cannot import trl"), full)
    assert held["time / eager"] and not held["time / trl"] and "time / cce" not in held
    lost = verdicts(row("una_fast", workspace_mb=512, reason="out of memory"), full)
    assert not any(lost.values())


# -------------------------------------------------------------------------------------- whole runs


def run(*arguments):
    threads = str(torch.get_num_threads())
    common = ["--device", "cpu", "--runs", "1", "--threads", threads, "--shapes", "8x16x90"]
    return bench_head.main([*common, *arguments])


def test_exit_status_and_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cpu.json"
    assert run("--contenders", "una_fast,eager", "--out", str(out)) == 0
    report = json.loads(out.read_text())
    assert [r["name"] for r in report["results"][0]["table"]] == ["una_fast", "eager", "bare mm"]
    out.with_suffix(".running").write_text("eager")  # of a run that was killed
    assert run("--contenders", "una_fast,eager", "--out", str(out)) == 0
    assert "reason" not in json.loads(out.read_text())["results"][0]["table"][1]
    assert {"torch", "commit", "command", "sources", "time"} <= report["environment"].keys()
    assert "| 16, 16, 90 | **una_fast** |" in tables.head_table(out, "cpu.json")
    monkeypatch.setitem(bench_head.BARS, (8, 16, 90), {"time / eager": 1e-9})
    assert run("--contenders", "una_fast,eager") == 1
    assert "MISSED una_fast: time / eager" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_resuming_leaves_the_contender_out(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access")

    out = tmp_path / "out.json"
    common = ["--suite", "layouts", "--heads", "frozen", "--contenders", "broken,eager"]
    common += ["--out", str(out)]
    everybody = [Broken("broken", raises(RuntimeError("misaligned address"))), Eager()]
    monkeypatch.setattr(contenders, "everybody", lambda *_: everybody)
    with monkeypatch.context() as patch:
        release = [attempts.release, lost]
        patch.setattr(attempts, "release", lambda: release.pop(0)())
        assert run(*common) == harness.GPU_LOST
    assert json.loads(out.read_text())["results"] == []
    everybody[0] = Broken("broken", lambda x, loss: loss(x))
    for _ in range(2):  # the second run has nothing left to do
        run(*common, "--resume")
        results = json.loads(out.read_text())["results"]
        assert len(results) == 2
    for entry in results:
        broken, healthy, _ = entry["table"]
        assert "misaligned address" in broken["reason"] and "seconds" in healthy


def test_the_digest_of_the_sources_sees_every_folder(tmp_path, monkeypatch):
    """A change below a subfolder makes another digest, so that a result names the sources."""
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    deep = tmp_path / "una_fast" / "head" / "passes.py"
    deep.parent.mkdir(parents=True)
    deep.write_text("a = 1\n")
    before = harness.environment(torch.device("cpu"))["sources"]
    assert harness.environment(torch.device("cpu"))["sources"] == before
    deep.write_text("a = 2\n")
    assert harness.environment(torch.device("cpu"))["sources"] != before


# -------------------------------------------------------------------------------- tables and plots


def gpu_entry(suite, rows):
    """An entry of bench_head.py with invented numbers."""
    common = {"rows": rows, "dim": 4096, "vocab": 128256}
    numbers = {"times bare mm": 1.5, "tflops": 600.0, "spread": 0.02, "extra_bytes": 2**30}
    eager = {"seconds": rows / 5e4, **numbers} if rows <= 8192 else {"reason": "out of memory"}
    bare = {"seconds": rows / 2e5, "tflops": 700.0, "times bare mm": 1.0}
    table = [row("una_fast 2048 MiB", workspace_mb=2048, seconds=rows / 1e5, **numbers)]
    table += [row("cce", reason="needs a GPU"), row("eager", **eager), row("bare mm", **bare)]
    table = [common | line for line in table]
    entry = {"suite": suite, "responses": 2, "head": "trained", "table": table, **common}
    return judge(CASE, entry | {"reference": {"valid": False, "tflops": 700.0}})


def test_results_become_a_readme_table_and_plots(tmp_path):
    folder = tmp_path / "bench/results"
    folder.mkdir(parents=True)
    stored = tables.ROOT / "bench/results/head_cpu.json"
    (folder / "head_cpu.json").write_bytes(stored.read_bytes())
    cpu = "<!-- bench:head -->\n<!-- end bench:head -->\n"
    text = cpu + "<!-- bench:head_gpu -->\nSTALE\n<!-- end bench:head_gpu -->\n"
    assert "STALE" in tables.regenerate(text, tmp_path)  # no GPU results: nothing to say
    results = [gpu_entry("peers", 8192), gpu_entry("memory", 4096), gpu_entry("memory", 32768)]
    environment = {"gpu": "A GPU", "torch": "2.11", "trl": "1.16"}
    report = {"environment": environment, "results": results}
    (folder / "head_gpu.json").write_text(json.dumps(report))
    written = plots.draw(report, folder / "head_gpu.json")
    assert [path.name for path in written] == ["head_gpu_time.png", "head_gpu_memory.png"]
    new = tables.regenerate(text, tmp_path)
    assert "STALE" not in new and tables.regenerate(new, tmp_path) == new
    assert "![head_gpu_time](bench/results/head_gpu_time.png)" in new
    cells = "**81.9 (1.50)** | – | 163.8 (1.50) | 41.0 (700 TF/s)* |"
    assert f"| Llama-3-8B, 8192, trained | {cells}" in new
    assert "| Llama-3-8B, 32768, trained | **327.7 (1.50)** | – | OOM |" in new
    assert "– cce: needs a GPU" in new
    bars = list(chain.from_iterable(entry["bars"] for entry in results))
    assert f"{sum(bar['held'] for bar in bars)} of {len(bars)} bars held" in new
    assert tables.regenerate(cpu, tmp_path).count("bench:") == 2  # without the GPU's markers


def test_results_merge_only_within_one_gpu_and_source():
    report = {"environment": {"gpu": "A GPU"}, "results": [{}]}
    merged = tables.merge([report, report])
    assert len(merged["results"]) == 2 and len(merged["parts"]) == 2
    with pytest.raises(ValueError, match="A GPU and another"):
        tables.merge([report, report | {"environment": {"gpu": "another"}}])


def test_the_tiles_that_a_threshold_leaves_out():
    """Two blocks of entries: one that a row makes likely, one that no row does."""
    weight = torch.zeros(256, 2)
    weight[:128, 0], weight[128:, 0] = 20.0, 0.0
    hidden = torch.tensor([[1.0, 0.0]]).repeat(128, 1)
    found = real_states.skipped_tiles(hidden, weight)
    assert found["kept"] == found["kept, ordered"] == 0.5
    assert found["mass"] == pytest.approx(math.exp(-20), rel=1e-3) == found["largest mass"]
    # Every second entry is likely: no tile can be left out until the entries are ordered.
    found = real_states.skipped_tiles(hidden, weight[torch.arange(256).view(2, 128).T.flatten()])
    assert found["kept"] == 1 and found["kept, ordered"] == 0.5


def test_a_real_model_is_skipped_with_the_reason_or_takes_the_place_of_noise(monkeypatch, capsys):
    monkeypatch.setattr(real_states, "PACKAGES", ("no_such_package",))
    assert bench_head.cases("real") == []
    assert "no_such_package not installed: pip install" in capsys.readouterr().out
    monkeypatch.setattr(real_states, "PACKAGES", ())
    (case,) = bench_head.cases("real", cpu=True)
    assert case.shape == real_states.SHAPE
    x = Inputs((5, 5), 12, 70)
    names = ("hidden", "ref_hidden", "weight", "ref_weight", "targets")
    monkeypatch.setattr(real_states, "states", lambda: {name: getattr(x, name) for name in names})
    real = contenders.RealInputs((5, 5), 12, 70, dtype=torch.bfloat16)
    assert real.weight.dtype == torch.bfloat16 and torch.equal(real.targets, x.targets)
    assert torch.equal(real.hidden, x.hidden.bfloat16()) and real.trained


def test_busy_programs_run_beside_the_block_and_end_with_it():
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    with harness.busy_programs(2):
        beside = set(children.read_text().split()) - set(before)
        assert len(beside) == 2
    assert children.read_text().split() == before
    assert typical([3.0, 1.0, 2.0], torch.device("cpu"), busy=2) == 2.0
