"""The step bench: both loops do the same work, and what it says about them follows from what they did."""

from __future__ import annotations

import json
import math

import bench_step
import harness
import pytest
import step_contenders
import tables
import torch
from bench_step import Session, judge, parity, search
from contenders import WrongResult
from step_contenders import SHAPES, Case, Setup, attended, needed_flop

CPU = torch.device("cpu")


def run(*arguments):
    threads = str(torch.get_num_threads())
    common = [
        "--device",
        "cpu",
        "--threads",
        threads,
        "--models",
        "tiny-gemma",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    return bench_step.main([*common, *arguments])


@pytest.fixture
def no_ceiling(monkeypatch):
    """The rate of a square product, which takes seconds to measure."""
    monkeypatch.setattr(
        bench_step, "peak_of", lambda device: {"tflops": 0.1, "source": "nothing measured"}
    )


# ---------------------------------------------------------------------------------------------------- one tiny step


@pytest.fixture(scope="module")
def sessions():
    """Ragged pairs in micro-batches of two, windows shorter than the sequences: name -> session."""
    case = Case(
        "ragged",
        "tiny-gemma",
        2,
        "cached",
        ((5, 40, 9), (30, 7, 22), (3, 4, 31), (12, 12, 12)),
        micro=2,
    )
    found = {}
    for name in step_contenders.CONTENDERS:
        found[name], reason = step_contenders.run(name, case, Setup(CPU, torch.float32), 2, 1, 60)
        assert reason is None, f"{name}: {reason}"
    return case, found


def test_both_sides_take_the_same_step(sessions):
    case, found = sessions
    ours, theirs = found["una_fast"], found["trl"]
    assert (
        len(ours.sequences) == len(set(ours.sequences)) == 8 and ours.sequences == theirs.sequences
    )
    differences = parity(case, torch.float32, 2, ours, theirs)
    assert differences["loss"] < 1e-4 and differences["steps"] == 2
    assert abs(ours.history[0]["loss"] - math.log(2)) > 0.01, (
        "a policy equal to its reference would show nothing"
    )
    assert ours.history[0]["loss"] != ours.history[1]["loss"], "no step was taken"
    assert ours.packed and ours.row_tokens == sum(map(sum, case.pairs)) < theirs.row_tokens
    assert len(ours.seconds) == len(theirs.seconds) == 1
    gradients = 4 * 500 * 64  # of the tied head alone
    assert min(ours.peak_bytes, theirs.peak_bytes) > gradients


CHANGES = {
    "loss": {"loss": 0.01},
    "grad_norm": {"grad_norm": 0.1},
    "logps": {"logps/rejected": 1.0},
    "not a number": {"loss": math.nan},
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("step", [0, 1])
def test_a_difference_in_any_warm_up_step_is_refused(sessions, what, step):
    case, found = sessions
    history = [dict(line) for line in found["trl"].history]
    for key, value in CHANGES[what].items():
        history[step][key] += value
    with pytest.raises(WrongResult, match="off by"):
        parity(case, torch.float32, 2, found["una_fast"], found["trl"]._replace(history=history))


def test_other_tokens_and_other_weights_are_refused(sessions):
    case, found = sessions
    ours, theirs = found["una_fast"], found["trl"]
    with pytest.raises(WrongResult, match="different token ids"):
        parity(
            case, torch.float32, 2, ours, theirs._replace(sequences=theirs.sequences[1:] + ["0"])
        )
    with pytest.raises(WrongResult, match="--master-weights"):
        parity(case, torch.float32, 2, ours, theirs._replace(weights="bfloat16"))


@pytest.mark.parametrize("mode", ["adapter", "frozen"])
def test_other_references(mode, tmp_path, no_ceiling):
    out = tmp_path / "step.json"
    assert run("--suite", "shared16", "--layers", "1", "--mode", mode, "--out", str(out)) == 0
    (entry,) = json.loads(out.read_text())["results"]
    assert entry["parity"]["loss"] < 1e-4 and entry["lora"] == (mode == "adapter")
    assert all(row["seconds"] > 0 for row in entry["table"])


def test_a_step_over_the_cap_is_out_of_memory(sessions):
    case, _ = sessions
    capped = case._replace(memory_cap=1e-4)
    for name in step_contenders.CONTENDERS:
        assert step_contenders.run(name, capped, Setup(CPU, torch.float32), 2, 1, 60) == (
            None,
            "out of memory",
        )


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def acted(sessions, monkeypatch, no_ceiling):
    """Contenders that act out what was recorded: a second and half a second for every layer, ours in half the time.
    Memory grows with the sequence, a byte for a token."""

    def act(name, speed):
        def session(case, setup, watch):
            longest = max(sum(pair[:2]) for pair in case.pairs)
            if case.memory_cap and longest > case.memory_cap * 2**30:
                raise torch.OutOfMemoryError
            seconds = (1 + 0.5 * case.layers) / speed
            return sessions[1][name]._replace(seconds=[seconds], peak_bytes=longest)

        return session

    for name, speed in (("una_fast", 2), ("trl", 1)):
        monkeypatch.setitem(step_contenders.CONTENDERS, name, act(name, speed))
    monkeypatch.setattr(
        step_contenders, "clean", lambda: None
    )  # nothing to clean, half a second each
    return step_contenders.CONTENDERS


def test_results_tables_and_extrapolation(tmp_path, monkeypatch, acted):
    """The JSON has what the tables need; two depths give a third, which is nowhere among the measured."""
    out = tmp_path / "bench/results/step_cpu.json"
    arguments = ("--suite", "equal", "--layers", "1,2", "--out", str(out))
    assert run(*arguments) == 0
    report = json.loads(out.read_text())
    assert [entry["layers"] for entry in report["results"]] == [1, 2]
    assert [row["seconds"] for entry in report["results"] for row in entry["table"]] == [
        0.75,
        1.5,
        1.0,
        2.0,
    ]
    assert all(entry["table"][0]["x trl"] == pytest.approx(2) for entry in report["results"])
    assert {"torch", "trl", "commit", "command", "transformers"} <= report["environment"].keys()
    (line,) = report["extrapolated"]
    assert [row["extrapolated_seconds"] for row in line["table"]] == [2.0, 4.0]  # six layers
    assert run(*arguments, "--resume") == 0 and len(json.loads(out.read_text())["results"]) == 2
    text = "<!-- bench:step -->\n<!-- end bench:step -->\n<!-- bench:step_gpu -->\n<!-- end bench:step_gpu -->\n"
    monkeypatch.setattr(tables, "head_table", lambda *_: "")
    new = tables.regenerate("<!-- bench:head -->\n<!-- end bench:head -->\n" + text, tmp_path)
    assert "| tiny gemma, 1 of 6 layers, full, cached: 16 + 64 | **una_fast** | 0.75 (0%) |" in new
    assert "6 layers from 1 and 2: una_fast 2 s, trl 4 s" in new and "No GPU has run it yet" in new


def test_a_disagreement_leaves_no_times_and_fails(tmp_path, sessions, acted):
    def wrong(case, setup, watch):
        return sessions[1]["una_fast"]._replace(sequences=["other"])

    acted["una_fast"], out = wrong, tmp_path / "step.json"
    assert run("--suite", "equal", "--layers", "1", "--out", str(out)) == 1
    rows = json.loads(out.read_text())["results"][0]["table"]
    assert len(rows) == 2 and all(
        "different token ids" in row["reason"] and "seconds" not in row for row in rows
    )


def test_a_failure_is_a_row_and_leaves_the_other_without_a_ratio(tmp_path, acted):
    def broken(case, setup, watch):
        raise RuntimeError("no such kernel")

    acted["trl"], out = broken, tmp_path / "step.json"
    run("--suite", "equal", "--layers", "1", "--out", str(out))
    ours, theirs = json.loads(out.read_text())["results"][0]["table"]
    assert (
        theirs["reason"] == "RuntimeError: no such kernel"
        and ours["seconds"] == 0.75
        and "x trl" not in ours
    )


def test_the_longest_is_searched_under_a_cap(tmp_path, acted):
    out = tmp_path / "step.json"
    arguments = (
        "--suite",
        "maxlen",
        "--memory-cap",
        str(3000 / 2**30),
        "--start",
        "64",
        "--grain",
        "64",
    )
    assert run(*arguments, "--layers", "1", "--out", str(out)) == 0
    results = json.loads(out.read_text())["results"]
    assert [entry["layout"] for entry in results] == ["nothing shared", "prompt : response 16 : 1"]
    for row in (row for entry in results for row in entry["table"]):
        assert 3000 - 2 * 64 < row["sequence_tokens"] <= 3000
        assert (
            dict(row["tried"])[row["sequence_tokens"]] == "ran"
            and [4096, "out of memory"] in row["tried"]
        )


def test_a_spent_budget_measures_nothing_and_fails(tmp_path, no_ceiling):
    out = tmp_path / "step.json"
    assert run("--suite", "equal", "--budget", "-1", "--out", str(out)) == 1 and not out.exists()


# ---------------------------------------------------------------------------------------------- arithmetic, verdicts


def test_attended_counts_by_enumeration():
    for length in (1, 5, 16, 17):
        for window in (None, 1, 5, 16, 40):
            pairs = sum(
                1 for q in range(length) for k in range(q + 1) if window is None or q - k < window
            )
            assert attended(length, window) == pairs


def test_needed_flop_is_that_of_the_linear_layers_counted():
    """Against the products that a plain model runs, its attention and head taken out of both."""
    from una_fast.counters import FlopCounter

    case = Case("equal", "tiny-llama", 2, "cached", ((6, 5, 5),))
    model = step_contenders.build(case, Setup(CPU, torch.float32), torch.float32)
    config = case.config
    pairs = 2 * 2 * attended(11, None)
    attention = 3 * 4 * config.num_attention_heads * config.head_dim * pairs
    head = 3 * 2 * config.vocab_size * config.hidden_size * 10
    with FlopCounter() as counter:
        hidden = model.model(torch.randint(2, 100, (2, 11)).requires_grad_(False)).last_hidden_state
        hidden.sum().backward()
    linear = (
        counter.flop
    )  # fused attention is not a product; the first layer's inputs get their gradient too
    assert needed_flop(case) - attention - head == pytest.approx(linear, rel=1e-6)
    lora, frozen = case._replace(lora=True, mode="adapter"), case._replace(mode="frozen")
    assert needed_flop(case) < needed_flop(frozen) and needed_flop(lora) < needed_flop(frozen)


def test_configurations_are_the_published_ones():
    sizes = {
        name: Case("equal", name, shape.config["num_hidden_layers"], "cached", ())
        for name, shape in SHAPES.items()
    }
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        count = {
            name: sum(p.numel() for p in AutoModelForCausalLM.from_config(case.config).parameters())
            / 1e9
            for name, case in sizes.items()
            if not name.startswith("tiny")
        }
    published = {"llama3-8b": 8.030, "qwen3-8b": 8.191, "qwen3-1.7b": 1.721, "gemma3-1b": 1.000}
    assert count == pytest.approx(published, abs=2e-3)
    assert sizes["gemma3-1b"].config.layer_types.count("full_attention") == 4


def test_search_finds_the_limit():
    for limit in (0, 1, 3, 40, 77, 500):
        tried = []

        def runs(length, limit=limit, tried=tried):
            tried.append(length)
            return length <= limit

        found = search(runs, 32, grain=8, limit=1 << 12)
        assert found <= limit < found + max(8, found // 32) + 8 and len(tried) == len(set(tried))


def entry(suite, speed, **more):
    ours = {"name": "una_fast", "seconds": 1.0, "x trl": speed}
    common = {
        "suite": suite,
        "model": "gemma3-1b",
        "layers": 26,
        "full_layers": 26,
        "memory_cap": None,
    }
    return common | {"table": [ours, {"name": "trl", "seconds": 1.0}]} | more


def test_bars_hold_and_miss():
    held = {
        suite: judge(entry(suite, 1.7))["bars"][0]["held"]
        for suite in ("equal", "shared16", "shared64")
    }
    assert held == {"equal": True, "shared16": True, "shared64": False}
    assert judge(entry("equal", 1.04))["bars"][0]["held"] is False
    assert (
        judge(entry("equal", 9.0, layers=4))["bars"] == []
        and judge(entry("ragged", 0.5))["bars"] == []
    )
    full = [{"name": "una_fast", "seconds": 1.0}, {"name": "trl", "reason": "out of memory"}]
    assert judge(entry("equal", 0, table=full))["bars"][0]["held"]
    missing = [full[0], {"name": "trl", "reason": "ModuleNotFoundError: trl"}]
    assert not judge(entry("equal", 0, table=missing))["bars"][0]["held"]
    both = [{"name": "una_fast", "reason": "out of memory"}, full[1]]
    assert not judge(entry("equal", 0, table=both))["bars"][0]["held"]

    def longest(ratio, tokens):
        table = [{"name": "una_fast", "sequence_tokens": tokens}]
        return judge(entry("maxlen", 0, ratio=ratio, memory_cap=79.0, table=table))["bars"][0][
            "held"
        ]

    assert [longest(0, 118784), longest(0, 118783), longest(16, 237568), longest(16, 237567)] == [
        True,
        False,
    ] * 2


def test_suites_are_what_they_say():
    for model, shape in SHAPES.items():
        for ratio in (16, 64):
            ((prompt, chosen, rejected),), _ = bench_step.pairs_of(f"shared{ratio}", shape.tokens)
            assert prompt == ratio * chosen == ratio * rejected, model
        pairs, micro = bench_step.pairs_of("ragged", shape.tokens)
        assert len(set(pairs)) > micro > 1 and len(pairs) % micro == 0
    assert (
        sum(bench_step.longest_pair(1700, 16)[:2])
        == sum(bench_step.longest_pair(1700, 0)[:2])
        == 1700
    )
    rows = [sum(case.pairs[0]) for case in bench_step.long_cases("llama3-8b")]
    assert rows == [131072 + 1024, 262144 + 1024, 393216 + 1024]
    capped = [case for case in bench_step.long_cases("gemma3-1b") if case.memory_cap]
    assert [sum(case.pairs[0][:2]) for case in capped] == [2 * 59392, 4 * 59392]


# ------------------------------------------------------------------------------------------------------------- tables


def gpu_report():
    """Invented numbers, of the form that bench_step.py writes."""
    options = bench_step.parse(["--device", "cpu"])
    options.peak = {"tflops": 989.0}
    history = [{"loss": 0.7, "grad_norm": 1.0}]
    session = Session(history, [2.0, 2.2], 40 * 2**30, 8208, [], "bfloat16", True)
    results = []
    for suite in ("equal", "shared16", "shared64", "ragged"):
        (case,) = bench_step.step_cases(suite, "llama3-8b", [32], options)
        slow = session._replace(seconds=[4.0, 4.2], packed=False)
        table = [bench_step.row_of("una_fast", case, [session], 989.0, "cuda")]
        table.append(bench_step.row_of("trl", case, [slow], 989.0, "cuda"))
        table[0]["x trl"] = table[0]["tokens_per_s"] / table[1]["tokens_per_s"]
        made = bench_step.entry_of(
            case, Setup(CPU, torch.bfloat16), bench_step.layout_of(case.pairs)
        )
        results.append(
            judge(made | {"tokens": case.tokens, "parity": {"loss": 0.01}, "table": table})
        )
    case = Case("maxlen", "gemma3-1b", 26, "cached", (), memory_cap=79.0)
    found = {
        "name": "una_fast",
        "sequence_tokens": 120832,
        "row_tokens": 241648,
        "seconds": 9.0,
        "peak_bytes": 78 * 2**30,
    }
    made = bench_step.entry_of(case, Setup(CPU, torch.bfloat16), bench_step.searched_layout(0))
    full = {
        "name": "trl",
        "sequence_tokens": 49152,
        "row_tokens": 98304,
        "seconds": 8.0,
        "peak_bytes": 78 * 2**30,
    }
    results.append(
        judge(made | {"ratio": 0, "parity": {}, "table": [found, full | {"unfinished": True}]})
    )
    where = {
        "gpu": "A GPU",
        "driver": "1.2",
        "torch": "2.11",
        "trl": "1.16",
        "transformers": "5",
        "command": "python x",
    }
    return {
        "kind": "step",
        "environment": where,
        "peak": {"source": "the data sheet"},
        "results": results,
    }


def test_gpu_results_become_tables(tmp_path, monkeypatch):
    folder = tmp_path / "bench/results"
    folder.mkdir(parents=True)
    text = "<!-- bench:step_gpu -->\nold\n<!-- end bench:step_gpu -->\n"
    monkeypatch.setattr(tables, "head_table", lambda *_: "")
    text = "<!-- bench:head -->\n<!-- end bench:head -->\n" + text
    report = gpu_report()
    harness.write_report(report, folder / "step_gpu.json")
    new = tables.regenerate(text, tmp_path)
    assert "old" not in new and tables.regenerate(new, tmp_path) == new
    equal = needed_flop(
        bench_step.step_cases("equal", "llama3-8b", [32], bench_step.parse(["--device", "cpu"]))[0]
    )
    rate = f"{equal / 2.1 / 1e12:.3g} ({equal / 2.1 / 989e12:.0%})"
    assert (
        "| Llama-3-8B, LoRA, adapter: 16 + 4096 | **una_fast** |" in new
        and f"| 8208 | {rate} | 40 | 0.7000 | 1.95 |" in new
    )
    assert "| Llama-3-8B, LoRA, adapter: 8192 + 512 |" in new and "8 pairs, responses of" in new
    assert "nothing shared | **una_fast** | 120832 | 241648 |" in new and "| trl | ≥ 49152 |" in new
    bars = [bar for result in report["results"] for bar in result["bars"]]
    assert len(bars) == 4 and f"{sum(bar['held'] for bar in bars)} of 4 bars held." in new
    merged = tables.merge([report, report])
    assert len(merged["results"]) == 2 * len(report["results"])
    with pytest.raises(ValueError, match="different kind"):
        tables.merge([report, report | {"kind": None}])
