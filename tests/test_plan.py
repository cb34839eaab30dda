"""The block plan:
every response computed once, nothing over budget, and the cheapest way that fits.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest

from helpers import naming
from una_fast import Feedback
from una_fast.head.describe import describe_op
from una_fast.head.plan import (
    HOPPER,
    LOGIT_ROWS,
    Group,
    HeadSize,
    Plan,
    Tile,
    chunks,
    components,
    cost,
    fit_tile,
    forward_pass,
    forward_plan,
    make_plan,
    sliced_tile,
    span_rows,
)
from una_fast.head.settings import PlanConfig

PAIR = Feedback.pairs([0], [1])
BOTH_SCORES = Feedback.merge([PAIR, Feedback.scores([0, 1], [0.9, 0.2])])
ALL_PAIRS_OF_FOUR = Feedback.pairs(*zip(*combinations(range(4), 2), strict=True))


def plan(
    feedback: Feedback, lengths: list[int], *, rows: float, dim: int = 2, vocab: int = 50, **changes
) -> Plan:
    """A float32 plan whose budget holds `rows` rows of logits, with copies of hidden rows."""
    copied = dim if changes.get("accumulator_width", dim) else 0
    arguments = {
        "accumulator_width": dim,
        "length_normalize": False,
        "budget": int(rows * (vocab + copied) * 4),
    }
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    return make_plan(feedback, lengths, HeadSize(vocab, dim, **changes), **arguments)


# --- components -----------------------------------------------------------------------------------


def test_a_pair_shares_one_scalar_and_linked_responses_have_one_each():
    (pair,) = components(PAIR, [5, 3], False)
    assert pair.responses == (0, 1) and pair.groups == (Group((0, 1), (1.0, -1.0)),)
    (normalized,) = components(PAIR, [5, 4], True)
    assert normalized.groups == (Group((0, 1), (1 / 5, -1 / 4)),), "dL/dlogp of a mean carries 1/n"
    for feedback, count in [
        (BOTH_SCORES, 2),
        (ALL_PAIRS_OF_FOUR, 4),
        (Feedback.pairs([2, 1], [1, 0]), 3),
    ]:
        (linked,) = components(feedback, [1] * count, False)
        assert linked.groups == tuple(Group((i,), (1.0,)) for i in range(count))


def test_repeated_and_reversed_pairs_still_share_one_scalar():
    (pair,) = components(Feedback.pairs([0, 1, 0], [1, 0, 1]), [5, 3], False)
    assert len(pair.groups) == 1
    assert pair.groups[0].factors in [(1.0, -1.0), (-1.0, 1.0)]


def test_responses_in_no_unit_are_in_no_component():
    found = components(
        Feedback.merge([Feedback.pairs([5], [2]), Feedback.binary([3, 3], [True, False])]),
        [1] * 7,
        False,
    )
    assert sorted(part.responses for part in found) == [(2, 5), (3,)]
    assert components(Feedback.merge([]), [1, 2], False) == []


def test_long_chains_of_pairs_are_one_component():
    order = list(range(200))
    random.Random(0).shuffle(order)
    (chain,) = components(Feedback.pairs(order[:-1], order[1:]), [1] * 200, False)
    assert chain.responses == tuple(range(200))


# --- tile -----------------------------------------------------------------------------------------


def test_tile_fits_the_budget_and_the_problem():
    problems = [(0, 100, 8), (1, 1, 1), (37, 101, 64), (10_000, 3, 500)]
    budgets = [1, 7, 399, 400, 5_000, 10**6, 10**12]
    for problem, budget, size, cast in product(problems, budgets, (4, 8), (False, True)):
        rows, vocab, dim = problem
        with naming(problem=problem, budget=budget, acc_bytes=size, cast=cast):
            tile = fit_tile(HeadSize(vocab, dim, size, size, cast), rows, budget, gathered=False)
            assert 1 <= tile.rows <= max(rows, 1) and 1 <= tile.vocab <= vocab
            assert tile.rows * tile.vocab * size <= max(budget, size)


def test_tile_uses_the_budget():
    size = HeadSize(100, 8)
    assert fit_tile(size, 10_000, 400 * 12, False) == Tile(12, 100)
    assert fit_tile(size, 5, 400 * 12, False) == Tile(5, 100)
    sliced = fit_tile(size, 10_000, 399, False)
    assert sliced.vocab < 100 and sliced.rows * sliced.vocab >= 60, (
        "slices should still be near the budget"
    )


# --- paths ----------------------------------------------------------------------------------------

# (feedback, lengths, rows that the budget holds, expected plan in (streamed, resident, recomputed)
# responses, scratch)
PATHS = {
    "pair resident": (PAIR, [5, 5], 10, [], [(0, 1)], (), 0),
    "pair streamed": (PAIR, [5, 5], 9, [(0, 1)], [], (), 0),
    "pair sliced": (PAIR, [5, 5], 0.9, [], [], (0, 1), 0),
    "two pairs, blocks": (
        Feedback.pairs([0, 1], [2, 3]),
        [3, 3, 3, 3],
        6.6,
        [],
        [(0, 2), (1, 3)],
        (),
        0,
    ),
    "two pairs, one block": (
        Feedback.pairs([0, 1], [2, 3]),
        [3, 3, 3, 3],
        13,
        [],
        [(0, 1, 2, 3)],
        (),
        0,
    ),
    "two long pairs, room": (
        Feedback.pairs([0, 2], [1, 3]),
        [9, 9, 9, 9],
        8,
        [(0, 1), (2, 3)],
        [],
        (),
        1,
    ),
    "two long pairs, no room": (
        Feedback.pairs([0, 2], [1, 3]),
        [9, 9, 9, 9],
        3,
        [(0, 1)],
        [],
        (2, 3),
        0,
    ),
    "both scores, room": (BOTH_SCORES, [9, 9], 8, [(0, 1)], [], (), 1),
    "both scores, no room": (BOTH_SCORES, [9, 9], 3, [], [], (0, 1), 0),
    "four, resident": (ALL_PAIRS_OF_FOUR, [9] * 4, 36, [], [(0, 1, 2, 3)], (), 0),
    "four, room": (ALL_PAIRS_OF_FOUR, [9] * 4, 12, [(0, 1, 2, 3)], [], (), 3),
    "four, no room": (ALL_PAIRS_OF_FOUR, [9] * 4, 11, [], [], (0, 1, 2, 3), 0),
    "labels": (Feedback.binary([0, 1, 2], [1, 0, 1]), [20, 3, 4], 8, [(0,)], [(1, 2)], (), 0),
    "scratch takes the room": (
        Feedback.pairs([0, 2, 4], [1, 3, 5]),
        [9, 9, 9, 9, 3, 3],
        7,
        [(0, 1), (2, 3)],
        [],
        (4, 5),
        1,
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths(case):
    feedback, lengths, rows, streamed, resident, recomputed, scratch = PATHS[case]
    found = plan(feedback, lengths, rows=rows)
    assert [part.responses for part in found.streamed] == streamed
    assert list(found.resident) == resident
    assert found.recomputed == recomputed
    assert found.scratch == scratch


def test_scratch_leaves_room_for_a_row_of_logits():
    """Streaming needs all of the vocabulary at once:
    a plan whose scratch leaves only a slice cannot run.
    """
    two_long_pairs = Feedback.pairs([0, 2], [1, 3])
    found = plan(two_long_pairs, [9, 9, 9, 9], rows=2.02, dim=1, cast=True)
    assert found.tile.vocab == 50 or not found.streamed


@pytest.mark.parametrize(
    "feedback", [PAIR, BOTH_SCORES, ALL_PAIRS_OF_FOUR, Feedback.pairs([0, 2], [1, 3])]
)
@pytest.mark.parametrize("rows", [1.1, 9, 1000])
def test_a_frozen_head_always_streams_without_scratch(feedback, rows):
    found = plan(feedback, [9] * 5, rows=rows, accumulator_width=0)
    scored = tuple(sorted({*feedback.first.tolist(), *feedback.second.tolist()} - {-1}))
    assert [part.responses for part in found.streamed] == [scored]
    assert not found.resident and not found.recomputed and not found.scratch
    assert found.unscored == tuple(sorted({0, 1, 2, 3, 4} - set(scored)))


def random_feedback(rng: random.Random, responses: int) -> Feedback:
    parts = [Feedback.merge([])]
    for _ in range(rng.randint(0, 2 * responses)):
        if responses > 1 and rng.random() < 0.5:
            first, second = rng.sample(range(responses), 2)
            parts.append(Feedback.pairs([first], [second]))
        else:
            parts.append(Feedback.scores([rng.randrange(responses)], [rng.random()]))
    return Feedback.merge(parts)


def check_random_plans(seed: int) -> None:
    rng = random.Random(seed)
    responses = rng.randint(0, 9)
    lengths = [rng.randint(1, 20) for _ in range(responses)]
    feedback = random_feedback(rng, responses)
    vocab, dim, acc_bytes = rng.randint(1, 60), rng.randint(1, 12), rng.choice([4, 8])
    budget = int(10 ** rng.uniform(0, 6))
    width, cast = rng.choice([0, 1, dim, dim, dim + 1]), rng.random() < 0.3
    found = make_plan(
        feedback,
        lengths,
        HeadSize(vocab, dim, acc_bytes, acc_bytes, cast),
        budget=budget,
        accumulator_width=width,
        length_normalize=False,
    )
    streamed = [i for part in found.streamed for i in part.responses]
    resident = [i for block in found.resident for i in block]
    assert sorted([*streamed, *resident, *found.recomputed, *found.unscored]) == list(
        range(responses)
    )
    scored = {*feedback.first.tolist(), *feedback.second.tolist()} - {-1}
    assert set(found.unscored) == set(range(responses)) - scored
    for part in components(feedback, lengths, False):
        homes = [set(streamed), *map(set, found.resident), set(found.recomputed)]
        assert sum(bool(home & set(part.responses)) for home in homes) == 1, (
            "a component was torn apart"
        )
    for block in found.resident:
        assert sum(lengths[i] for i in block) <= found.tile.rows and list(block) == sorted(block)
    if found.streamed or found.resident:
        assert found.tile.vocab == vocab, "slices of the vocabulary cannot be streamed"
    scratch = found.scratch * vocab * width * acc_bytes
    assert found.tile.rows * found.tile.vocab * acc_bytes + scratch <= max(budget, acc_bytes)


def test_random_plans():
    """Every response stands in one list; components stay whole; logits and scratch together fit the
    budget.
    """
    for seed in range(60):
        with naming(seed=seed):
            check_random_plans(seed)


def check_chunks_cover_every_row_once_in_order(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(8)]
    cu = [sum(lengths[:i]) for i in range(9)]
    chosen, rows = sorted(rng.sample(range(8), rng.randint(0, 8))), rng.randint(1, 30)
    cut = list(chunks(chosen, cu, rows))
    flat = [row for spans in cut for start, stop in spans for row in range(start, stop)]
    assert flat == [row for i in chosen for row in range(cu[i], cu[i + 1])]
    assert len(cut) == -(-len(flat) // rows), "the fewest chunks"
    even = -(-len(flat) // max(len(cut), 1))
    assert all(span_rows(spans) == even for spans in cut[:-1]) and all(
        0 < span_rows(spans) <= even for spans in cut
    )
    for spans in cut:
        for left, right in pairwise(spans):
            assert left[1] < right[0], "adjacent spans join"


def test_chunks_cover_every_row_once_in_order():
    for seed in range(30):
        with naming(seed=seed):
            check_chunks_cover_every_row_once_in_order(seed)


# --- cost model -----------------------------------------------------------------------------------

LLAMA = HeadSize(128256, 4096, 4, 2, align=64, quantum=128, machine=HOPPER)


def llama_plan(rows: int, mb: float, width: int = 4096, size: HeadSize = LLAMA) -> Plan:
    return make_plan(
        PAIR,
        [rows // 2] * 2,
        size,
        budget=int(mb * 2**20),
        accumulator_width=width,
        length_normalize=False,
    )


@pytest.mark.parametrize("rows", [8192, 131072])
def test_chunks_on_a_gpu_are_whole_gemm_tiles(rows):
    found = llama_plan(rows, 2048)
    assert found.tile == Tile(7168, 128256, LOGIT_ROWS) and found.streamed
    heights = [span_rows(c) for c in found.cuts([0, 1], [0, rows // 2, rows])]
    assert all(height % 128 == 0 for height in heights[:-1])
    assert sum(heights) == rows and max(heights) <= 7168
    assert heights[:1] == {8192: [4096], 131072: [6912]}[rows], "chunks are of about equal size"


def test_gradients_narrower_than_logits_have_a_buffer_of_their_own():
    """Logits of 256 rows at a time, and nearly twice the rows of gradients."""
    found = llama_plan(8192, 512)
    assert found.tile.logit_rows == LOGIT_ROWS and found.tile.rows > 1.3 * (512 << 20) / 4 / 128256
    copied = found.tile.rows * LLAMA.copied_bytes(gathered=False, sliced=False, trained=True)
    used = found.tile.logit_bytes(LLAMA) + found.tile.gradient_bytes(LLAMA) + copied
    assert 0.9 * (512 << 20) < used <= 512 << 20
    wide = replace(LLAMA, operand_bytes=4)
    assert llama_plan(8192, 512, size=wide).tile.logit_rows is None
    few = llama_plan(200, 512)
    assert few.tile == Tile(200, 128256), "all rows fit: gradients lie over the logits"


def test_a_bfloat16_weight_in_one_chunk_has_no_accumulator():
    """The accumulator's other two bytes per number hold logits: the same memory in all."""
    leaf = replace(LLAMA, leaf_bytes=2)
    assert leaf.accumulator_excess == 2 * 4096 * 128256
    found = llama_plan(8192, 2048, size=leaf)
    assert found.direct and found.resident == ((0, 1),) and found.tile.rows == 8192
    assert len(found.cuts([0, 1], [0, 4096, 8192])) == 1
    used = found.tile.logit_bytes(leaf) + found.tile.gradient_bytes(leaf)
    assert used <= (2048 << 20) + leaf.accumulator_excess
    assert not llama_plan(16384, 2048, size=leaf).direct, "does not fit"
    assert not llama_plan(8192, 2048, width=0, size=leaf).direct, "nothing is accumulated"
    assert not llama_plan(8192, 2048).direct, "the gradient is the accumulator"
    times = [
        cost(llama_plan(8192, 2048, size=size), [4096, 4096], size, 4096).seconds(HOPPER)
        for size in (leaf, LLAMA)
    ]
    assert times[0] < 0.97 * times[1]


def test_a_few_rows_of_logits_lose_to_slices_of_the_vocabulary():
    """A trained head reads and writes its fp32 gradient once per chunk:
    below some hundred rows that takes longer than one more pass over square tiles. A frozen head
    has no such gradient, and streams until products starve.
    """
    assert not llama_plan(8192, 512).recomputed
    sliced = llama_plan(8192, 64)
    assert sliced.recomputed == (0, 1) and sliced.tile.vocab < 128256
    assert abs(sliced.tile.rows - sliced.tile.vocab) < 1024, (
        "both sums are read and written equally often"
    )
    frozen = llama_plan(8192, 128, width=0)
    assert frozen.streamed and frozen.tile.rows == 256
    unknown = replace(LLAMA, machine=None)
    assert llama_plan(8192, 64, size=unknown).streamed, (
        "without rates only what does not fit is sliced"
    )


def test_cost_counts_passes_and_bytes_by_hand():
    size = HeadSize(1000, 64, 4, 2)
    one_pass = 2 * 100 * 1000 * 64
    streamed = make_plan(
        PAIR,
        [50, 50],
        size,
        budget=10 * (4000 + 6 * 64),
        accumulator_width=64,
        length_normalize=False,
    )
    found = cost(streamed, [50, 50], size, 64)
    assert found.flop == 3 * one_pass
    # per logit: written, read once, narrow gradient written; dH written and scaled, hidden rows
    # scaled; dW written, nine times read and written, read and written by the backward pass
    rows = 100 * 64
    traffic = 100 * 1000 * (4 + 4 + 2) + (4 + 4) * rows + (2 + 2) * rows
    assert found.traffic == traffic + (1 + 9 * 2 + 2) * 4 * 1000 * 64
    frozen = make_plan(
        PAIR, [50, 50], size, budget=10 * 4000, accumulator_width=0, length_normalize=False
    )
    assert cost(frozen, [50, 50], size, 0).flop == 2 * one_pass
    sliced = make_plan(
        PAIR, [50, 50], size, budget=3000, accumulator_width=64, length_normalize=False
    )
    assert sliced.tile.vocab < 1000 and cost(sliced, [50, 50], size, 64).flop == pytest.approx(
        4 * one_pass
    )


def test_a_forward_pass_takes_slices_where_rows_are_few():
    """It loses no pass to them, so it does before a pass with gradients does."""
    assert forward_plan(LLAMA, 8192, 512 << 20).tile == Tile(1024, 128256)
    sliced = forward_plan(LLAMA, 8192, 16 << 20).tile
    assert sliced.vocab < 128256
    whole = fit_tile(LLAMA, 8192, 16 << 20, gathered=False)
    assert forward_pass(LLAMA, 8192, whole).seconds(HOPPER) > 4 * forward_pass(
        LLAMA, 8192, sliced
    ).seconds(HOPPER)
    assert forward_pass(LLAMA, 8192, sliced).flop == pytest.approx(2 * 8192 * 4096 * 128256)
    assert forward_plan(replace(LLAMA, machine=None), 8192, 16 << 20).tile == whole
    assert forward_pass(LLAMA, 0, whole).flop == 0


def test_scratch_is_not_free_in_the_cost_model():
    size, lengths = HeadSize(1000, 4), [40, 40]
    one, two = (
        make_plan(f, lengths, size, budget=60 * 4000, accumulator_width=4, length_normalize=False)
        for f in (PAIR, BOTH_SCORES)
    )
    assert one.scratch == 0 and two.scratch == 1
    assert (
        cost(two, lengths, size, 4).traffic - cost(one, lengths, size, 4).traffic
        >= 2 * 1000 * 4 * 4
    )


def check_sliced_tiles_stay_within_the_budget_with_their_copies(seed: int) -> None:
    rng = random.Random(seed)
    size = HeadSize(
        rng.randint(10_000, 300_000), rng.choice([1152, 2048, 4096]), 4, 2, align=64, quantum=128
    )
    budget, rows, gathered = (
        rng.randint(1 << 20, 1 << 28),
        rng.randint(1, 200_000),
        rng.random() < 0.5,
    )
    tile = sliced_tile(size, rows, budget, gathered)
    used = tile.rows * (
        size.stride(tile.vocab) * 4 + size.copied_bytes(gathered, sliced=True, trained=False)
    )
    assert used <= budget and (tile.rows == rows or used >= budget // 2)


def test_sliced_tiles_stay_within_the_budget_with_their_copies():
    for seed in range(30):
        with naming(seed=seed):
            check_sliced_tiles_stay_within_the_budget_with_their_copies(seed)


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_the_report_of_a_plan(pairs):
    text = describe_op(8192, 4096, 128256, PlanConfig(pairs=pairs))
    assert (
        "policy     3.00 passes" in text
        and "reference  1.00 passes" in text
        and "4,008 MiB in float32" in text
    )
    text = describe_op(
        8192, 4096, 128256, PlanConfig(pairs=pairs, train_head=False, cached_reference=True)
    )
    assert "policy     2.00 passes" in text and "reference  0.00 passes" in text
    assert "slices" in describe_op(8192, 4096, 128256, PlanConfig(pairs=pairs, workspace_mb=16))
    assert "cpu" in describe_op(64, 32, 1000, PlanConfig(pairs=pairs, device="cpu"))


@pytest.mark.parametrize(
    "change",
    [{"device": "tpu"}, {"pairs": -1}, {"workspace_mb": 0.0}, {"workspace_mb": float("inf")}],
)
def test_the_report_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PlanConfig(**change)
    with pytest.raises(ValueError, match="at least 6"):
        describe_op(5, 8, 8, PlanConfig(pairs=3))
