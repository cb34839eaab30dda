"""Micro-batches by tokens: every record once, within the limits, in as few and as even batches as there can be.

Which records make up a step, and that ranks agree on it, is tested in test_sharding.py, as are two ranks that train.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from una_fast.data.batch import collate, layout_tokens
from una_fast.data.examples import Example
from una_fast.data.loader import MAX_PADDING, Loader, Step, plan_batches
from una_fast.feedback import Feedback
from una_fast.logs import say_once

BUDGET = 16384
LAYOUTS = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 8])


def example(number: int, prompt: int, responses: list[int]) -> Example:
    arrays = [np.full(length, number, dtype=np.int32) for length in (prompt, *responses)]
    feedback = Feedback.scores(range(len(responses)), [0.5] * len(responses))
    return Example(arrays[0], tuple(arrays[1:]), feedback, None, f"x.jsonl:{number}")


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


def ragged(count: int, seed: int) -> list[Example]:
    """Prompts of 5..400 tokens, one to four responses of 5..1000 tokens each."""
    rng = np.random.default_rng([seed, count])
    return [
        example(
            k,
            log_uniform(rng, 5, 400),
            [log_uniform(rng, 5, 1000) for _ in range(rng.integers(1, 5))],
        )
        for k in range(count)
    ]


def one_response(count: int, seed: int) -> list[Example]:
    """Single responses; lengths, the prompt of 50 included, log-uniform in 100..4000 tokens."""
    rng = np.random.default_rng([seed, count])
    return [example(k, 50, [log_uniform(rng, 100, 4000) - 50]) for k in range(count)]


def plan(
    examples: list[Example],
    *,
    packed: bool,
    tokens: int | None,
    records: int | None = None,
    world_size: int = 1,
):
    """(batches of the step, tokens that each is laid out in)"""
    batches = plan_batches(
        examples, packed=packed, max_tokens=tokens, max_records=records, world_size=world_size
    )
    return batches, [layout_tokens(batch, packed=packed) for batch in batches]


def seconds(tokens: list[int], world_size: int) -> int:
    """What a step takes where every rank waits for the largest batch of each round, in tokens."""
    return sum(max(tokens[k : k + world_size]) for k in range(0, len(tokens), world_size))


# ---------------------------------------------------------------------- the layout


@LAYOUTS
def test_layout_tokens_are_what_collate_lays_out(packed):
    examples = ragged(40, seed=1)
    prompt_only = example(40, 700, [])
    for part in ([examples[0]], examples[3:5], examples, [prompt_only, *examples[:3]]):
        assert layout_tokens(part, packed=packed) == collate(part, packed=packed).input_ids.numel()
    assert layout_tokens([], packed=packed) == layout_tokens([prompt_only], packed=packed) == 0


# ---------------------------------------------------------------------- limits


@LAYOUTS
@WORLDS
@pytest.mark.parametrize(
    ("tokens", "records"),
    [(None, None), (None, 1), (None, 5), (3000, None), (3000, 3), (700, None), (1, None)],
)
@pytest.mark.parametrize("count", [1, 7, 60])
def test_batches_of_a_step(count, tokens, records, world_size, packed):
    """Every record once, both limits held, as many micro-batches on each rank, and the same ones every time."""
    limits = {"max_tokens_per_batch": tokens, "micro_batch_size": records, "packed": packed}
    options = {"batch_size": 23, "seed": 3, "world_size": world_size, **limits}

    def steps_of(rank: int, **changes) -> list[Step]:
        loader = Loader([ragged(count, 0)], [1.0], rank=rank, **options | changes)
        return list(loader.steps(0, math.ceil(count / 23)))

    expected, again = steps_of(0, world_size=1), steps_of(0)
    ranks = [steps_of(rank) for rank in range(world_size)]

    def origins(batches):
        return [[e.origin for e in batch] for batch in batches]

    largest = 1 if tokens is None and records is None else records or math.inf
    for alone, first, steps in zip(expected, again, zip(*ranks, strict=True), strict=True):
        assert origins(first.micro_batches) == origins(steps[0].micro_batches)
        assert len({len(step.micro_batches) for step in steps}) == 1, (
            "ranks would wait for each other"
        )
        batches = [batch for step in steps for batch in step.micro_batches]
        assert sum(1 for batch in batches if not batch) < world_size, "a round that nobody needs"
        seen = sorted(origin for batch in origins(batches) for origin in batch)
        assert seen == sorted(origin for batch in origins(alone.micro_batches) for origin in batch)
        rounds = [
            batch
            for turn in zip(*(step.micro_batches for step in steps), strict=True)
            for batch in turn
            if batch
        ]
        _, tokens_of = plan(
            sum(batches, []), packed=packed, tokens=tokens, records=largest, world_size=world_size
        )
        assert [layout_tokens(batch, packed=packed) for batch in rounds] == tokens_of, (
            "ranks take turns"
        )
        assert len(set(seen)) == len(seen) == min(23, len(seen))
        assert all(len(batch) <= largest for batch in batches)
        for batch in batches:
            assert len(batch) <= 1 or layout_tokens(batch, packed=packed) <= (tokens or math.inf)
        assert {step.num_units for step in steps} == {
            sum(e.feedback.num_units for b in batches for e in b)
        }
    assert sum(len(b) for step in expected for b in step.micro_batches) == count


@WORLDS
def test_without_limits_records_run_one_by_one(world_size):
    options = {
        "batch_size": 23,
        "micro_batch_size": None,
        "max_tokens_per_batch": None,
        "packed": True,
        "seed": 0,
    }
    for rank in range(world_size):
        (step,) = Loader([ragged(23, 0)], [1.0], rank=rank, world_size=world_size, **options).steps(
            0, 1
        )
        assert len(step.micro_batches) == math.ceil(23 / world_size)
        assert {len(batch) for batch in step.micro_batches} <= {0, 1}


@LAYOUTS
@WORLDS
@pytest.mark.parametrize("records", [1, 4, 100])
def test_a_limit_on_records_alone_needs_the_fewest_rounds(records, world_size, packed):
    """Records so short that padding them is cheaper than another batch."""
    rng = np.random.default_rng(0)
    examples = [example(k, 3, [int(rng.integers(1, 9))]) for k in range(42)]
    batches, _ = plan(examples, packed=packed, tokens=None, records=records, world_size=world_size)
    assert math.ceil(len(batches) / world_size) == math.ceil(math.ceil(42 / records) / world_size)


@LAYOUTS
def test_longer_records_run_alone_and_are_counted_once(packed, caplog):
    examples = [example(k, 10, [length]) for k, length in enumerate([500, 20, 90, 91, 30, 700])]
    options = {
        "batch_size": 6,
        "micro_batch_size": None,
        "max_tokens_per_batch": 100,
        "packed": packed,
        "seed": 0,
    }
    with caplog.at_level(logging.WARNING):
        say_once.cache_clear()
        other = Loader([examples], [1.0], rank=1, world_size=2, **options)
        assert not caplog.records, "one rank says it"
        loaders = [
            other,
            *(Loader([examples], [1.0], rank=0, world_size=2, **options) for _ in range(2)),
        ]
    message = "3 of 6 records are longer than max_tokens_per_batch=100; each of them runs alone"
    assert [record.getMessage() for record in caplog.records] == [message]
    batches = [
        batch
        for loader in loaders[:2]
        for step in loader.steps(0, 1)
        for batch in step.micro_batches
    ]
    alone = sorted(
        batch[0].origin for batch in batches if batch and len(batch[0].responses[0]) > 90
    )
    assert alone == ["x.jsonl:0", "x.jsonl:3", "x.jsonl:5"]
    assert all(len(batch) == 1 for batch in batches if any(len(e.responses[0]) > 90 for e in batch))


# ---------------------------------------------------------------------- few batches, evenly


@WORLDS
@pytest.mark.parametrize("seed", range(10))
def test_packed_batches_are_as_few_as_their_tokens_allow(seed, world_size):
    """A batch is opened when no other has room: all others hold more than BUDGET less the longest record."""
    for examples in (one_response(64, seed), ragged(64, seed)):
        batches, tokens = plan(examples, packed=True, tokens=BUDGET, world_size=world_size)
        total = sum(tokens)
        assert total == sum(collate(batch, packed=True).num_tokens for batch in batches), (
            "nothing is padding"
        )
        longest = max(layout_tokens([e], packed=True) for e in examples)
        rounds = math.ceil(len(batches) / world_size)
        assert rounds <= math.ceil((math.floor(total / (BUDGET - longest)) + 1) / world_size)
        assert rounds == math.ceil(math.ceil(total / BUDGET) / world_size), (
            "the ideal, where records are many"
        )


@WORLDS
@pytest.mark.parametrize("seed", range(10))
def test_packed_batches_are_level(seed, world_size):
    batches, tokens = plan(
        one_response(64, seed), packed=True, tokens=BUDGET, world_size=world_size
    )
    assert len(batches) % world_size == 0
    assert max(tokens) <= 1.03 * sum(tokens) / len(tokens)
    assert seconds(tokens, world_size) <= 1.02 * sum(tokens) / world_size
    ranks = [sum(tokens[rank::world_size]) for rank in range(world_size)]
    assert max(ranks) <= 1.02 * sum(ranks) / world_size


def test_a_limit_on_records_levels_too():
    """Four records a batch, with no room to choose how many: the four longest are not put together."""
    examples = one_response(64, 0)
    _, tokens = plan(examples, packed=True, tokens=None, records=4, world_size=4)
    longest = sorted((layout_tokens([e], packed=True) for e in examples), reverse=True)
    assert len(tokens) == 16 and max(tokens) <= 0.8 * sum(longest[:4])
    assert seconds(tokens, 4) <= 1.25 * sum(tokens) / 4


@pytest.mark.parametrize("seed", range(5))
def test_ranks_run_records_of_similar_length_at_the_same_time(seed):
    """Attention costs the square of a length, so that batches of the same tokens are not yet the same work."""
    batches, tokens = plan(one_response(256, seed), packed=True, tokens=BUDGET, world_size=4)
    work = [
        t + sum(len(e.responses[0]) ** 2 for e in b) / 2**13
        for b, t in zip(batches, tokens, strict=True)
    ]
    shuffled = np.random.default_rng(seed).permutation(work).tolist()
    assert seconds(work, 4) - sum(work) / 4 <= 0.5 * (seconds(shuffled, 4) - sum(work) / 4)


# ---------------------------------------------------------------------- padding


def least_tokens(lengths: list[int]) -> list[float]:
    """The fewest tokens, padding included, in 0, 1, 2, ... batches of neighbours in length within the budget."""
    lengths = sorted(lengths, reverse=True)
    best = [0.0] + [math.inf] * len(lengths)  # for the first n lengths
    found = [math.inf]
    while found[-1] > 1.02 * sum(lengths):
        longer = [math.inf] * len(best)
        for start, width in enumerate(lengths):
            for stop in range(start + 1, min(len(lengths), start + BUDGET // width) + 1):
                longer[stop] = min(longer[stop], best[start] + (stop - start) * width)
        best = longer
        found.append(best[-1])
    return found


@pytest.mark.parametrize("seed", range(10))
def test_padded_batches_waste_little(seed):
    """3 % of padding or less takes 15 to 20 batches of these 64 records, three or four records each; the budget alone
    would take 4 to 8 batches and 20 %. In between, padding is within 3 % of the tokens of the best there is for the
    number of batches, and never more than MAX_PADDING a batch."""
    examples = one_response(64, seed)
    lengths = [50 + len(e.responses[0]) for e in examples]
    batches, tokens = plan(examples, packed=False, tokens=BUDGET)
    best = least_tokens(lengths)
    fewest = next(k for k, least in enumerate(best) if least <= sum(lengths) / 0.97)
    assert sum(tokens) <= 1.03 * best[len(batches)]
    assert 1 - sum(lengths) / sum(tokens) <= 0.08
    assert len(batches) < fewest, "3 % is reached by more batches only"
    assert len(batches) <= 4 * math.ceil(sum(lengths) / BUDGET)
    for batch, laid_out in zip(batches, tokens, strict=True):
        assert laid_out - sum(layout_tokens([e], packed=False) for e in batch) <= MAX_PADDING


@WORLDS
@pytest.mark.parametrize("seed", range(5))
def test_padded_batches_of_a_round_are_similar(seed, world_size):
    """Sixteen records a rank and more; with few, lengths leave no choice."""
    examples = one_response(256, seed)
    batches, tokens = plan(examples, packed=False, tokens=BUDGET, world_size=world_size)
    assert 1 - sum(layout_tokens([e], packed=False) for e in examples) / sum(tokens) <= 0.05
    assert (
        seconds(tokens, world_size) <= (1.0 if world_size == 1 else 1.2) * sum(tokens) / world_size
    )
    ideal = math.ceil(math.ceil(sum(tokens) / BUDGET) / world_size)
    assert math.ceil(len(batches) / world_size) <= 2 * ideal
