"""A head whose vocabulary is split over ranks is the whole head: results, gradients, saved models.

No rank gathers the weight of the head, and hidden gradients cross ranks once a call.
"""

from __future__ import annotations

import json

import pytest
import torch

from families import build
from ranks import run_ranks
from una_fast.head.traffic import head_traffic
from una_fast.head.vocabulary import Round, make_rounds
from una_fast.model.head_forward import head_to_split
from vocabulary_ranks import CASES, LENGTHS, RANKS, Case

ROWS = [sum(lengths) for lengths in LENGTHS]
DIM = 24

# ---- the op, on four ranks ----


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """{case: [results of a rank]}, and "refusals": [messages of a rank]."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("vocabulary")
    run_ranks("vocabulary_ranks", out, out / "log", RANKS)
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def tolerance(case: Case) -> float:
    """Return the largest relative error against float64."""
    if case.dtype == torch.float64:
        return 1e-10
    return 2e-5 if case.dtype == torch.float32 else 0.01


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_whole_head(calls, name):
    case = CASES[name]
    for rank, result in enumerate(calls[name]):
        wrong = {k: e for k, e in result["errors"].items() if not e <= tolerance(case)}
        assert not wrong, f"rank {rank}: {wrong}"
        leaves = {f"grad {leaf}" for leaf in case.train}
        assert leaves == {k for k in result["errors"] if k.startswith("grad")}
        if not case.train:
            assert "sequence_logps" in result["errors"]
        # Log-probs are float32 numbers rounded once, whatever the operands are.
        assert result["errors"]["logps"] <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_ranks_make_the_same_collectives(calls, name):
    """Whatever rows a rank has: rank 1 has none."""
    case, results = CASES[name], calls[name]
    for group in range(4 // case.ranks):
        ours = results[group * case.ranks : (group + 1) * case.ranks]
        assert all(result["collectives"] == ours[0]["collectives"] for result in ours)


@pytest.mark.parametrize("name", CASES)
def test_no_head_is_gathered_and_hidden_gradients_are_reduced_once(calls, name):
    case = CASES[name]
    for rank, result in enumerate(calls[name]):
        first = rank // case.ranks * case.ranks
        most = max(ROWS[first : first + case.ranks])
        rounds, seen = result["rounds"], result["collectives"]
        width = -(-most // rounds)
        reduced = [n for kind, n in seen if kind == "reduce_scatter"]
        expected = [case.ranks * width * DIM] * rounds if "hidden" in case.train else []
        assert reduced == expected
        # Hidden states of a round, or a number a row.
        assert max(n for kind, n in seen if kind == "gather") <= most * DIM
    assert CASES["chunks"].vocab // 4 * DIM > max(ROWS) * DIM, "rows of the weight would show"


def test_every_collective_of_a_call(calls):
    """At any number of chunks; beyond the workspace rows are gathered twice, but those at hand."""

    def scored(ranks: int, width: int) -> list:
        rows = ranks * width
        return [["gather", width * DIM], ["largest", rows], ["sum", 2 * rows]]

    sizes = [["gather", 6], ["gather", 47]]
    whole = sizes + scored(4, 47) + [["gather", 47], ["reduce_scatter", 4 * 47 * DIM]]
    assert all(result["collectives"] == whole for result in calls["frozen"])
    whole = sizes + scored(2, 47) + [["gather", 47], ["gather", 1]]
    assert calls["head alone"][0]["collectives"] == whole
    rounds = calls["rounds frozen"][0]["rounds"]
    width = -(-47 // rounds)
    back = [["gather", width * DIM], ["reduce_scatter", 2 * width * DIM]]
    several = sizes + scored(2, width) * rounds + [["gather", 47]] + back[1:] + back * (rounds - 1)
    assert rounds > 2 and calls["rounds frozen"][0]["collectives"] == several


def test_ways_through_the_workspace(calls):
    """A call in one round and several chunks, in several rounds, and in slices."""

    def shape(name: str) -> tuple[bool, bool, bool]:
        result = calls[name][0]
        return result["rounds"] > 1, result["chunks"] > result["rounds"], result["sliced"]

    assert shape("four") == (False, False, False)
    assert shape("chunks") == (False, True, False)
    assert shape("rounds")[0] and not shape("rounds")[2]
    assert shape("slices")[2]
    assert calls["few entries"][3]["chunks"] == 0, "a rank without entries"


@pytest.mark.parametrize(
    ("name", "reference", "least", "most"),
    [
        ("two", 1, 3, 3),
        ("four", 1, 3, 3),
        ("frozen", 0, 2, 2),
        ("head alone", 0, 2, 2),
        ("chunks", 1, 3.01, 3.99),
        ("rounds", 1, 3.01, 3.99),
        ("slices", 1, 4, 4),
        ("no gradient", 1, 1, 1),
        ("triton", 1, 3.01, 3.99),
        ("triton bfloat16", 1, 3, 3),
    ],
)
def test_gemm_passes(calls, name, reference, least, most):
    """3 for the rows whose logits are kept, 4 for the others, 1 without gradients."""
    for result in calls[name]:
        policy = result["passes"] - reference
        assert least - 1e-6 <= policy <= most + 1e-6


def test_memory_is_within_the_workspace(calls):
    """Logits and gathered rows together; a rank's logits of all rows alone would be too large."""
    for name in ("chunks", "rounds", "rounds frozen", "triton"):
        for result in calls[name]:
            assert result["planned"] <= CASES[name].kib * 1024, name
            assert result["largest"] <= CASES[name].kib * 1024, name
    logits = sum(ROWS) * CASES["chunks"].vocab // 4 * 8
    assert logits > CASES["chunks"].kib * 1024


def test_what_ranks_may_not_differ_in(calls):
    first, *others = calls["refusals"]
    for messages in (first, *others):
        assert "differ in workspace: [1048576, 2097152" in messages["workspace"]
        assert "were multiplied by [1.0, 2.0, 3.0, 4.0] by rank" in messages["upstream"]
        assert "has no gradient; call it under torch.no_grad()" in messages["sequence_logps"]
    assert first["target"] == "targets[0] is 101, outside the vocabulary [0, 101)"


# ---- arithmetic ----


def test_rounds():
    (alone,) = make_rounds([3, 0, 2], row_bytes=10, room=1000)
    assert alone == Round(0, 3, (3, 0, 2)) and alone.rows == 5
    assert alone.spans((0, 5)) == [(0, 3), (6, 8)]
    assert alone.spans((2, 4)) == [(2, 3), (6, 7)]
    (full,) = make_rounds([2, 2], row_bytes=10, room=40)
    assert full.spans((0, 4)) == [(0, 4)] and not full.is_padded
    rounds = make_rounds([5, 2], row_bytes=10, room=40)
    assert [r.counts for r in rounds] == [(2, 2), (2, 0), (1, 0)]
    assert len(make_rounds([5, 2], row_bytes=10, room=1)) == 5, "a row of every rank at least"
    assert make_rounds([0, 0], row_bytes=10, room=40) == []


def test_traffic():
    """A rank receives (G - 1) / G of what a collective moves."""
    gathered, split = head_traffic(1024, 4096, 131072, 8, bytes=2)
    assert gathered == 131072 * 4096 * (2 + 4) * 7 // 8
    assert split == 1024 * (4096 * (2 + 4) + 52) * 7 // 8
    frozen, of_rows = head_traffic(1024, 4096, 131072, 8, 2, trained=False)
    assert frozen == gathered // 3 and of_rows == split
    reference = head_traffic(1024, 4096, 131072, 8, 2, gradients=False)
    assert reference == (frozen, 1024 * (4096 * 2 + 48) * 7 // 8)
    assert head_traffic(1024, 4096, 131072, 1, bytes=2) == (0, 0)


# ---- refusals ----


def test_heads_that_are_not_split():
    with pytest.raises(ValueError, match=r"tied to the input embedding.*split_vocabulary=false"):
        head_to_split(build("LlamaConfig tied"))
    model = build("LlamaConfig")
    assert head_to_split(model) is model.lm_head
    model.set_output_embeddings(torch.nn.Embedding(97, 32))
    with pytest.raises(ValueError, match=r"a Embedding, and only a linear layer"):
        head_to_split(model)
