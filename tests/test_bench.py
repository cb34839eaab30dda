"""The bench itself: its arithmetic, its verdicts, and that a contender's failure is a row and no more."""

from __future__ import annotations

import json
import re

import bench_head
import contenders
import plots
import pytest
import tables
import torch
from bench_head import Case, attempt, judge, measure, reference
from contenders import Eager, Inputs, Trl, Una, WrongResult, check, logp_errors, truth

from una_fast import Objective
from una_fast.head import eager

CASE = Case("test", (9, 9), 16, 130, bars=("time", "peers", "memory", "accuracy"), runs=1)


@pytest.fixture(scope="module")
def small():
    x = Inputs(CASE.lengths, CASE.dim, CASE.vocab)
    return x, truth(x, block_bytes=8 * CASE.vocab * 5)


def options(**changes):
    parsed = bench_head.parse(
        ["--device", "cpu", "--runs", "1", "--threads", str(torch.get_num_threads())]
    )
    for name, value in changes.items():
        setattr(parsed, name, value)
    return parsed


class Broken(Eager):
    """Eager PyTorch with a fault."""

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def loss(self, x):
        return self.fault(x, super().loss)


def raises(error):
    def fault(x, loss):
        raise error

    return fault


# ------------------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize("scores", [False, True])
def test_truth_is_that_of_eager(scores):
    x = Inputs((5, 8, 3, 6), 12, 70, scores=scores)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight)]
    ref = {"ref_hidden": x.ref_hidden.double(), "ref_weight": x.ref_weight.double()}
    objective = Objective(beta=contenders.BETA)
    out = eager.linear_una_loss(
        *leaves, x.targets, x.cu_seqlens, x.feedback, objective=objective, **ref
    )
    out.loss.backward()
    found = truth(x, block_bytes=8 * 70 * 4)
    assert found.loss == pytest.approx(out.loss.item(), rel=1e-12)
    torch.testing.assert_close(found.sums, out.logps.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.hidden, leaves[0].grad.float())
    torch.testing.assert_close(found.weight, leaves[1].grad.float())


@pytest.mark.parametrize("head", contenders.HEADS)
def test_passes_are_those_counted(head):
    x = Inputs((40, 40), 32, 300)
    x.head(head)
    for contender in (Una(), Eager(), Trl(), contenders.Liger()):
        if contender.unavailable(x):  # a peer that is not installed
            continue
        check(contender, x, truth(x))
        assert bench_head.costs(contender, x)["passes"] == pytest.approx(contender.passes[head]), (
            contender.name
        )


def test_bfloat16_is_within_the_tolerances():
    x = Inputs((300, 300), 64, 1000, dtype=torch.bfloat16)
    true = truth(x)
    ours, theirs = (check(c, x, true) | logp_errors(c, x, true) for c in (Una(), Eager()))
    assert ours["sum_error"] < 0.01 < theirs["sum_error"] < 6 * contenders.sum_noise(x)
    assert ours["hidden_grad_error"] < theirs["hidden_grad_error"]


# ------------------------------------------------------------------------------------------------- refusals are rows


def no_reference(x, loss):
    zero = torch.zeros(len(x.lengths))
    return x.loss_of(x.sums(contenders.full_logits(x.hidden, x.weight, x.targets)), zero)


def detached_weight(x, loss):
    sums = x.sums(contenders.full_logits(x.hidden, x.weight.detach(), x.targets))
    ref = x.sums(contenders.full_logits(x.ref_hidden, x.ref_weight, x.targets))
    return x.loss_of(sums, ref)


def grown(x, loss):
    value = loss(x)
    x.hidden.register_hook(lambda grad: grad * 1.01)
    return value


FAULTS = {
    "no reference": (no_reference, "wrong result: loss"),
    "no gradient": (detached_weight, "wrong result: no gradient for weight"),
    "other sign": (
        lambda x, loss: loss(x).detach() * 2 - loss(x),
        "wrong result: gradient of hidden",
    ),
    "NaN": (lambda x, loss: loss(x) * float("nan"), "wrong result: loss"),
    "memory": (raises(torch.OutOfMemoryError("CUDA out of memory")), "out of memory"),
    "driver": (raises(RuntimeError("CUDA error: out of memory")), "out of memory"),
    "assertion": (raises(AssertionError("V % 128")), "AssertionError: V % 128"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_row_with_its_reason_and_no_time(small, name):
    x, true = small
    x.head("trained")
    fault, reason = FAULTS[name]
    entry = measure(CASE, x, true, [Broken("broken", fault), Eager()], options())
    broken, healthy, bare = entry["table"]
    assert broken["reason"].startswith(reason) and "seconds" not in broken
    assert "reason" not in healthy and healthy["seconds"] > 0 and bare["name"] == "bare mm"


def test_a_slightly_wrong_gradient_is_refused(small):
    x, true = small
    x.head("frozen")
    hooked = Inputs(CASE.lengths, CASE.dim, CASE.vocab)
    hooked.head("frozen")
    check(Eager(), x, true)
    with pytest.raises(WrongResult, match="gradient of hidden"):
        check(Broken("grown", grown), hooked, true)


def test_missing_lost_and_slow_contenders_are_rows(small):
    x, true = small
    x.head("trained")

    class Missing(Eager):
        name, module = "missing", "no_such_package"

    def forever(x, loss):
        while True:
            pass

    entrants = [
        Missing(),
        contenders.Cce(),
        Broken("slow", forever),
        Broken("lost", lambda x, loss: loss(x)),
    ]
    entry = measure(
        CASE, x, true, entrants, options(warmup=0.2, lost={"lost": "broke the GPU's context"})
    )
    reasons = {row["name"]: row.get("reason") for row in entry["table"]}
    assert "no_such_package" in reasons["missing"] and reasons["lost"] == "broke the GPU's context"
    assert reasons["slow"] == "not done in 0.2 s"
    assert torch.cuda.is_available() or reasons["cce"] == "needs a GPU"


def test_running_out_of_memory_while_timed_drops_the_contender_alone(small):
    x, true = small
    x.head("trained")
    calls = []

    def late(x, loss):
        calls.append(1)
        if len(calls) > 3:  # parity, flop and memory are through
            raise torch.OutOfMemoryError
        return loss(x)

    table = measure(CASE, x, true, [Broken("late", late), Eager()], options())["table"]
    assert (
        table[0]["reason"] == "out of memory" and "seconds" in table[1] and len(calls) == 5
    )  # tried twice


# ------------------------------------------------------------------------------------------------ arithmetic, verdicts


def test_reference_takes_the_fastest_chunk_of_each_pass():
    seconds = {("logits", 4096): 1.0, ("logits", 8192): 1.8, ("logits", 16384): 4.4, ("hidden", 4096): 1.5,
               ("hidden", 16384): 5.0, ("weight", 8192): 2.0, ("weight", 16384): 3.5}  # fmt: skip
    trained, frozen = reference(seconds, 16384, True), reference(seconds, 16384, False)
    assert trained["rows of mm"] == {"logits": 8192, "hidden": 16384, "weight": 16384}
    assert trained["seconds"] == pytest.approx(3.6 + 3.6 + 5.0 + 3.5) and trained["passes"] == 4
    assert frozen["seconds"] == pytest.approx(3.6 + 3.6 + 5.0) and frozen["passes"] == 3


def row(name, **numbers):
    return {"name": name, "passes": 4, "same_work": True, **numbers}


def ours(seconds=1.1, gib=1.9, **numbers):
    fixed = {
        "workspace_mb": 2048,
        "extra_bytes": gib * 2**30,
        "sum_tokens": 8192,
        "sum_error": 0.01,
    }
    return row("una_fast 2048 MiB", seconds=seconds, **fixed | numbers)


def verdicts(*rows, **entry):
    entry = judge(CASE._replace(dim=4096), {"head": "trained", "table": list(rows), **entry})
    return {bar["bar"]: bar["held"] for bar in entry["bars"]}


def test_bars_hold_and_miss():
    peers = [row(name, seconds=3.0, extra_bytes=2**34, hidden_grad_error=0.02, weight_grad_error=0.02)
             for name in ("trl", "cce", "liger", "eager", "torch.compile")]  # fmt: skip
    good = {"hidden_grad_error": 0.01, "weight_grad_error": 0.01}
    held = verdicts(ours(**good), *peers, row("bare mm", seconds=1.0))
    assert len(held) == 10 and all(held.values())
    assert not verdicts(ours(1.2), row("bare mm", seconds=1.0))["time / bare mm"]
    slow = verdicts(
        ours(), row("bare mm", seconds=1.0), row("trl", seconds=3.0), reference={"valid": False}
    )
    assert not slow["time / bare mm"] and slow["time / trl"]
    assert not verdicts(ours(), row("trl", seconds=1.2))["time / trl"]
    assert not verdicts(ours(gib=2.2))["bytes / workspace"]
    assert not verdicts(ours(sum_error=0.03))["error of 8192-token sums, nat"]
    worse = verdicts(ours(hidden_grad_error=0.03), row("eager", hidden_grad_error=0.02))
    assert not worse["hidden gradient error / eager"]


def test_a_peer_out_of_memory_is_beaten_and_a_missing_one_is_not():
    held = verdicts(
        ours(), row("trl", reason="cannot import trl"), row("eager", reason="out of memory")
    )
    assert held["time / eager"] and not held["time / trl"] and "time / cce" not in held
    lost = verdicts(
        row("una_fast", workspace_mb=512, reason="out of memory"),
        row("eager", reason="out of memory"),
    )
    assert not any(lost.values())


def test_every_shape_of_the_anchors_has_its_bars():
    shapes = {(case.dim, case.vocab, sum(case.lengths)) for case in bench_head.cases("peers", None)}
    assert shapes == {(4096, 128256, 8192), (4096, 151936, 8192), (4096, 151936, 32768), (2048, 151936, 16384),
                      (1152, 262144, 32768)}  # fmt: skip
    for case in bench_head.cases("bars", None):
        bars = [bench_head.allowed(case, "trained", mb, True) for mb in (2048, 512)]
        assert bars[0]["time / bare mm"] < bars[1]["time / bare mm"]
        assert "time / bare mm" in bench_head.allowed(case, "frozen", 512, False)
    lengths = [sum(case.lengths) for case in bench_head.cases("memory", None)]
    assert lengths == [4096, 8192, 16384, 32768, 65536, 131072]
    assert [len(case.lengths) for case in bench_head.cases("layouts", None)] == [16, 64]
    assert all(max(case.lengths) == 8192 for case in bench_head.cases("accuracy", None))


# -------------------------------------------------------------------------------------------------------- whole runs


def run(*arguments):
    threads = str(torch.get_num_threads())
    return bench_head.main(
        ["--device", "cpu", "--runs", "1", "--threads", threads, "--shapes", "8x16x90", *arguments]
    )


def test_exit_status_and_results(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cpu.json"
    assert run("--contenders", "una_fast,eager", "--out", str(out)) == 0
    report = json.loads(out.read_text())
    assert [r["name"] for r in report["results"][0]["table"]] == ["una_fast", "eager", "bare mm"]
    assert {"torch", "commit", "command", "sources", "time"} <= report["environment"].keys()
    assert "| 16, 16, 90 | **una_fast** |" in tables.head_table(out, "cpu.json")
    monkeypatch.setitem(bench_head.BARS, (8, 16, 90), {"time / eager": 1e-9})
    assert run("--contenders", "una_fast,eager") == 1
    assert "MISSED una_fast: time / eager" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_resuming_leaves_its_contender_out(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access")

    out = tmp_path / "out.json"
    common = (
        "--suite",
        "layouts",
        "--heads",
        "frozen",
        "--contenders",
        "broken,eager",
        "--out",
        str(out),
    )
    everybody = [Broken("broken", raises(RuntimeError("misaligned address"))), Eager()]
    monkeypatch.setattr(contenders, "everybody", lambda *_: everybody)
    with monkeypatch.context() as patch:
        release = [bench_head.release] * 1 + [lost]
        patch.setattr(bench_head, "release", lambda: release.pop(0)())
        assert run(*common) == bench_head.GPU_LOST
    assert json.loads(out.read_text())["results"] == []
    everybody[0] = Broken("broken", lambda x, loss: loss(x))
    run(*common, "--resume")
    report = json.loads(out.read_text())
    assert len(report["results"]) == 2
    for entry in report["results"]:
        assert (
            "misaligned address" in entry["table"][0]["reason"] and "seconds" in entry["table"][1]
        )
    run(*common, "--resume")
    assert len(json.loads(out.read_text())["results"]) == 2


def test_attempt_leaves_no_alarm_behind():
    assert attempt("x", lambda: 3, seconds=0.05) == (3, None)
    assert attempt("x", lambda: sum(range(2_000_000)))[1] is None  # longer than the alarm above


# ---------------------------------------------------------------------------------------------------- tables and plots


def gpu_report():
    """Invented numbers, of the form that bench_head.py writes."""
    results = []
    for suite, rows in [
        ("bars", 8192),
        ("peers", 8192),
        *(("memory", 4096 << k) for k in range(4)),
    ]:
        common = {"rows": rows, "dim": 4096, "vocab": 128256}
        numbers = {"times bare mm": 1.5, "tflops": 600.0, "spread": 0.02, "extra_bytes": 2**30}
        table = [
            {**common, **row("una_fast 2048 MiB", workspace_mb=2048, seconds=rows / 1e5, **numbers)}
        ]
        if suite != "bars":
            table.append({**common, **row("cce", reason="needs a GPU")})
            full = (
                {"reason": "out of memory"} if rows > 8192 else {"seconds": rows / 5e4, **numbers}
            )
            table.append({**common, **row("eager", **full)})
        bare = {"seconds": rows / 2e5, "times bare mm": 1.0, "tflops": 700.0}
        entry = {
            "suite": suite,
            "shape": [rows // 2, 4096, 128256],
            "responses": 2,
            "head": "trained",
            **common,
        }
        ref = {"valid": False, "tflops": 700.0}
        results.append(
            judge(
                CASE,
                entry | {"reference": ref, "table": [*table, {**common, **row("bare mm", **bare)}]},
            )
        )
    return {"environment": {"gpu": "A GPU", "torch": "2.11", "trl": "1.16"}, "results": results,
            "ceilings": {"gemm_tflops": 800.0}}  # fmt: skip


def test_results_become_a_readme_table_and_plots(tmp_path):
    folder = tmp_path / "bench/results"
    folder.mkdir(parents=True)
    (folder / "head_cpu.json").write_bytes(
        (tables.ROOT / "bench/results/head_cpu.json").read_bytes()
    )
    cpu = "<!-- bench:head -->\n<!-- end bench:head -->\n"
    text = cpu + "<!-- bench:head_gpu -->\nold\n<!-- end bench:head_gpu -->\n"
    assert "old" in tables.regenerate(text, tmp_path)  # no GPU results: nothing to say
    report = gpu_report()
    (folder / "head_gpu.json").write_text(json.dumps(report))
    written = plots.draw(report, folder / "head_gpu.json")
    assert [path.name for path in written] == ["head_gpu_time.png", "head_gpu_memory.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    new = tables.regenerate(text, tmp_path)
    assert "old" not in new and tables.regenerate(new, tmp_path) == new
    assert "![head_gpu_time](bench/results/head_gpu_time.png)" in new
    assert (
        "| Llama-3-8B, 8192, trained | **81.9 (1.50)** | – | 163.8 (1.50) | 41.0 (700 TF/s)* |"
        in new
    )
    assert "| Llama-3-8B, 32768, trained | **327.7 (1.50)** | – | OOM |" in new
    assert "– cce: needs a GPU" in new
    found = int(re.search(r"(\d+) of \d+ bars held", new)[1])
    assert found == sum(bar["held"] for entry in report["results"] for bar in entry["bars"])
    assert (
        tables.regenerate(cpu, tmp_path).count("bench:") == 2
    )  # a README without the GPU's markers


def test_curves_leave_out_what_was_not_measured():
    lines = plots.curves(gpu_report()["results"], "seconds")
    assert [n for n, _ in lines["una_fast 2048 MiB"]] == [4096, 8192, 16384, 32768]
    assert [n for n, _ in lines["eager"]] == [4096, 8192] and "cce" not in lines
    assert "bare mm" not in plots.curves(gpu_report()["results"], "extra_bytes")


def test_parts_merge_only_within_one_gpu_and_source():
    report = gpu_report()
    merged = tables.merge([report, report])
    assert len(merged["results"]) == 2 * len(report["results"]) and len(merged["parts"]) == 2
    other = report | {"environment": report["environment"] | {"gpu": "another"}}
    with pytest.raises(ValueError, match="A GPU and another"):
        tables.merge([report, other])
