"""The step bench: both loops do the same work, and verdicts follow from the work."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import bench_step
import step_contenders
import tables
from bench_step import judge, parity
from step_contenders import SHAPES, Case, Setup, attended, needed_flop
from una_fast.bench.attempts import WrongResult
from una_fast.counters import FlopCounter
from una_fast.model.activations import BLOCK

CPU = torch.device("cpu")


def run(*arguments):
    threads = str(torch.get_num_threads())
    common = ["--device", "cpu", "--threads", threads, "--models", "tiny-gemma"]
    return bench_step.main([*common, "--rounds", "1", "--steps", "1", *arguments])


@pytest.fixture
def no_ceiling(monkeypatch):
    """Skip the measurement of a square product, which takes seconds."""
    peak = {"tflops": 0.1, "source": "nothing measured"}
    monkeypatch.setattr(bench_step, "peak_of", lambda device: peak)


# ----------------------------------------------------------------------------------- one tiny step


@pytest.fixture(scope="module")
def sessions():
    """Ragged pairs in micro-batches of two, windows shorter than the sequences: name -> session."""
    pairs = ((5, 40, 9), (30, 7, 22), (3, 4, 31), (12, 12, 12))
    case = Case("ragged", "tiny-gemma", 2, "cached", pairs, micro=2)
    found = {}
    for name in step_contenders.CONTENDERS:
        found[name], reason = step_contenders.run(name, case, Setup(CPU, torch.float32), 2, 1, 60)
        assert reason is None, f"{name}: {reason}"
    return case, found


def test_both_sides_take_the_same_step(sessions):
    case, found = sessions
    ours, theirs = found["una_fast"], found["trl"]
    assert len(ours.sequences) == len(set(ours.sequences)) == 8
    assert ours.sequences == theirs.sequences
    differences = parity(case, torch.float32, 2, ours, theirs)
    assert differences["loss"] < 1e-4 and differences["steps"] == 2
    losses = [step["loss"] for step in ours.history]
    assert abs(losses[0] - math.log(2)) > 0.01, "a policy equal to its reference shows nothing"
    assert losses[0] != losses[1], "no step was taken"
    assert ours.packed and ours.row_tokens == sum(map(sum, case.pairs)) < theirs.row_tokens
    assert len(ours.seconds) == len(theirs.seconds) == 1
    gradients = 4 * 500 * 64  # of the tied head alone
    assert min(ours.peak_bytes, theirs.peak_bytes) > gradients


def test_a_difference_in_any_warm_up_step_is_refused(sessions):
    case, found = sessions
    ours, theirs = found["una_fast"], found["trl"]
    changes = [("loss", 0.01), ("grad_norm", 0.1), ("logps/rejected", 1.0), ("loss", math.nan)]
    for step in (0, 1):
        for key, change in changes:
            history = [dict(line) for line in theirs.history]
            history[step][key] += change
            with pytest.raises(WrongResult, match="off by"):
                parity(case, torch.float32, 2, ours, theirs._replace(history=history))
    others = {
        "different token ids": {"sequences": theirs.sequences[1:] + ["0"]},
        "--master-weights": {"weights": "bfloat16"},
    }
    for reason, change in others.items():
        with pytest.raises(WrongResult, match=reason):
            parity(case, torch.float32, 2, ours, theirs._replace(**change))


@pytest.mark.parametrize("mode", ["adapter", "frozen"])
def test_other_references(mode, tmp_path, no_ceiling):
    out = tmp_path / "step.json"
    assert run("--suite", "shared16", "--layers", "1", "--mode", mode, "--out", str(out)) == 0
    (entry,) = json.loads(out.read_text())["results"]
    assert entry["parity"]["loss"] < 1e-4 and entry["lora"] == (mode == "adapter")
    assert all(row["seconds"] > 0 for row in entry["table"])


def test_a_step_over_the_cap_is_out_of_memory(sessions):
    capped = sessions[0]._replace(memory_cap=1e-4)
    for name in step_contenders.CONTENDERS:
        found = step_contenders.run(name, capped, Setup(CPU, torch.float32), 2, 1, 60)
        assert found == (None, "out of memory")


def test_the_pinned_blocks_of_a_hidden_state():
    """Warmed before the timed step: the blocks that HostOffload asks for, in the same sizes."""
    tokens, width = 3 * BLOCK // 2 // 64 + 5, 64  # three blocks of bfloat16, and five tokens
    sizes = step_contenders.pinned_sizes(tokens, width, 2)
    pieces = torch.empty(tokens * width, dtype=torch.bfloat16, device="meta").split(BLOCK // 2)
    assert sizes == [piece.nbytes for piece in pieces] == [BLOCK] * 3 + [5 * 64 * 2]
    assert step_contenders.pinned_sizes(BLOCK // 128, 64, 2) == [BLOCK]


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def acted(sessions, monkeypatch, no_ceiling):
    """Contenders that act out the recorded sessions.

    A second and half a second for every layer, ours in half the time. Memory grows with the
    sequence, a byte for a token.
    """

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
    # Nothing to clean, half a second each.
    monkeypatch.setattr(step_contenders, "clean", lambda: None)
    return step_contenders.CONTENDERS


def test_results_tables_and_extrapolation(tmp_path, monkeypatch, acted):
    """The JSON feeds the tables; two depths give a third, nowhere among the measured results."""
    out = tmp_path / "bench/results/step_cpu.json"
    arguments = ("--suite", "equal", "--layers", "1,2", "--out", str(out))
    assert run(*arguments) == 0
    report = json.loads(out.read_text())
    first, second = report["results"]
    assert [first["layers"], second["layers"]] == [1, 2]
    assert [row["seconds"] for row in first["table"] + second["table"]] == [0.75, 1.5, 1.0, 2.0]
    assert first["table"][0]["x trl"] == second["table"][0]["x trl"] == pytest.approx(2)
    assert {"torch", "trl", "commit", "command", "transformers"} <= report["environment"].keys()
    (line,) = report["extrapolated"]
    assert [row["extrapolated_seconds"] for row in line["table"]] == [2.0, 4.0]  # six layers
    assert run(*arguments, "--resume") == 0 and len(json.loads(out.read_text())["results"]) == 2
    markers = [f"<!-- bench:{name} -->\n<!-- end bench:{name} -->" for name in ("head", "step")]
    monkeypatch.setattr(tables, "head_table", lambda *_: "")
    new = tables.regenerate("\n".join(markers), tmp_path)
    assert "| tiny gemma, 1 of 6 layers, full, cached: 16 + 64 | **una_fast** | 0.75 (0%) |" in new
    assert "6 layers from 1 and 2: una_fast 2 s, trl 4 s" in new


def test_a_disagreement_or_a_failure_is_a_row(tmp_path, sessions, acted):
    def wrong(case, setup, watch):
        return sessions[1]["trl"]._replace(sequences=["other"])

    def broken(case, setup, watch):
        raise RuntimeError("no such kernel")

    rows = {}
    for act in (wrong, broken):
        acted["trl"], out = act, tmp_path / f"{act.__name__}.json"
        status = run("--suite", "equal", "--layers", "1", "--out", str(out))
        rows[act] = json.loads(out.read_text())["results"][0]["table"]
        assert status == (act is wrong)
    assert all("different token ids" in row["reason"] for row in rows[wrong])
    assert not any("seconds" in row for row in rows[wrong])
    ours, theirs = rows[broken]
    assert theirs["reason"] == "RuntimeError: no such kernel"
    assert ours["seconds"] == 0.75 and "x trl" not in ours


def test_the_longest_is_searched_under_a_cap(tmp_path, acted):
    out = tmp_path / "step.json"
    cap = ("--memory-cap", str(3000 / 2**30), "--start", "64", "--grain", "64")
    assert run("--suite", "maxlen", *cap, "--layers", "1", "--out", str(out)) == 0
    report = json.loads(out.read_text())
    layouts = [entry["layout"] for entry in report["results"]]
    assert layouts == ["nothing shared", "prompt : response 16 : 1"]
    for entry in report["results"]:
        for row in entry["table"]:
            assert 3000 - 2 * 64 < row["sequence_tokens"] <= 3000
            assert dict(row["tried"])[row["sequence_tokens"]] == "ran"
            assert [4096, "out of memory"] in row["tried"]
    report["environment"] |= {"gpu": "A GPU", "driver": "1.2"}
    text = tables.any_table(report, "step.json")
    assert f"nothing shared | **una_fast** | {row['sequence_tokens']} |" in text and "A GPU" in text


# ---------------------------------------------------------------------------- arithmetic, verdicts


def test_attended_counts_by_enumeration():
    for length in (1, 5, 16, 17):
        for window in (None, 1, 5, 16, 40):
            pairs = 0
            for query in range(length):
                pairs += min(query + 1, window or length)
            assert attended(length, window) == pairs


def test_needed_flop_of_the_linear_layers_is_counted():
    """Against the products of a plain model, attention and head taken out of both."""
    case = Case("equal", "tiny-llama", 2, "cached", ((6, 5, 5),))
    model = step_contenders.build(case, Setup(CPU, torch.float32), torch.float32)
    config = case.config
    pairs = 2 * 2 * attended(11, None)
    attention = 3 * 4 * config.num_attention_heads * config.head_dim * pairs
    head = 3 * 2 * config.vocab_size * config.hidden_size * 10
    with FlopCounter() as counter:
        hidden = model.model(torch.randint(2, 100, (2, 11))).last_hidden_state
        hidden.sum().backward()
    # Fused attention is no product; the first layer's inputs get a gradient too. The angles of the
    # positions are a tiny product in some versions of transformers.
    assert needed_flop(case) - attention - head == pytest.approx(counter.flop, rel=1e-5)
    lora, frozen = case._replace(lora=True, mode="adapter"), case._replace(mode="frozen")
    assert needed_flop(case) < needed_flop(frozen) and needed_flop(lora) < needed_flop(frozen)


def test_configurations_are_the_published_configurations():
    published = {"llama3-8b": 8.030, "qwen3-8b": 8.191, "qwen3-1.7b": 1.721, "gemma3-1b": 1.000}
    for name, billions in published.items():
        case = Case("equal", name, SHAPES[name].config["num_hidden_layers"], "cached", ())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(case.config)
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=2e-3), name
    assert case.config.layer_types.count("full_attention") == 4


def entry(suite, speed, **more):
    ours = {"name": "una_fast", "seconds": 1.0, "x trl": speed}
    common = {"suite": suite, "model": "gemma3-1b", "layers": 26, "full_layers": 26}
    return common | {"memory_cap": None, "table": [ours, {"name": "trl", "seconds": 1.0}]} | more


def holds(*arguments, **more):
    """Return the verdicts on all bars of an entry."""
    return [bar["held"] for bar in judge(entry(*arguments, **more))["bars"]]


def test_bars_hold_and_miss():
    assert holds("equal", 1.7) == holds("shared16", 1.7) == [True]
    assert holds("shared64", 1.7) == holds("equal", 1.04) == [False]
    assert holds("equal", 9.0, layers=4) == holds("ragged", 0.5) == []
    ran, full = {"name": "una_fast", "seconds": 1.0}, {"reason": "out of memory"}
    assert holds("equal", 0, table=[ran, full | {"name": "trl"}]) == [True]
    missing = {"name": "trl", "reason": "ModuleNotFoundError: trl"}
    assert holds("equal", 0, table=[ran, missing]) == [False]
    both = [full | {"name": name} for name in ("una_fast", "trl")]
    assert holds("equal", 0, table=both) == [False]
    for ratio, tokens in ((0, 118784), (16, 237568)):
        for length, held in ((tokens, True), (tokens - 1, False)):
            table = [{"name": "una_fast", "sequence_tokens": length}]
            assert holds("maxlen", 0, ratio=ratio, memory_cap=79.0, table=table) == [held]
