"""The study: its statistics cannot flatter, its PPO is PPO, and its page says what its results say."""

from __future__ import annotations

import json

import pytest
import report
import stats
import torch
from ppo import gae, policy_loss, whiten
from study import FULL, Store

BINS = ((0.0, 1.0), (1.0, 3.0))


def run(method, what, seed, points, lr=1.0, beta=1.0):
    points = [{"step": k + 1, "gold": gold, "kl": kl} for k, (gold, kl) in enumerate(points)]
    return {
        "part": "E3",
        "method": method,
        "what": what,
        "seed": seed,
        "lr": lr,
        "beta": beta,
        "points": points,
    }


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.001, -0.002, 0.003, 0.0, -0.001], "equivalent"),
        ([0.05, 0.06, 0.05, 0.07, 0.06], "better"),
        ([-0.05, -0.06, -0.05, -0.07, -0.06], "worse"),
        (
            [0.2, -0.2, 0.1, -0.1, 0.0],
            "inconclusive",
        ),  # no difference on average, and no evidence of that
        ([0.015, 0.025, 0.02, 0.02, 0.02], "inconclusive"),  # across the margin
        ([0.0], "inconclusive"),
    ],
)
def test_verdicts(differences, expected):
    assert stats.verdict(differences) == expected


def test_interval_is_students():
    found = stats.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0 and found.high - found.mean == pytest.approx(
        2.1318 * (2.5**0.5) / 5**0.5
    )


def test_a_kl_is_in_one_bin():
    assert [stats.bin_of(kl, BINS) for kl in (0.0, 0.5, 1.0, 1.001, 3.0, 3.1)] == [
        *(None, BINS[0], BINS[0], BINS[1], BINS[1], None)
    ]


def test_selection_never_sees_the_reporting_seeds():
    runs = [
        run("m", "select", 101, [(0.5, 0.5), (0.6, 2.0)], lr=1.0),
        run("m", "select", 102, [(0.5, 0.7), (0.6, 2.5)], lr=1.0),
        run("m", "select", 101, [(0.4, 0.5), (0.7, 2.0)], lr=2.0),
        run("m", "select", 102, [(0.4, 0.7), (0.7, 2.5)], lr=2.0),
        run("m", "select", 101, [(0.9, 0.5)], lr=3.0),  # one seed of two: the other diverged
    ]
    chosen = stats.select(runs, BINS)
    assert chosen == {BINS[0]: stats.Candidate(1.0, 1.0, 1), BINS[1]: stats.Candidate(2.0, 1.0, 2)}
    lucky = [run("m", "report", seed, [(0.99, 0.5), (0.99, 2.0)], lr=2.0) for seed in (1, 2)]
    reported = [run("m", "report", seed, [(0.1, 0.6), (0.1, 2.0)], lr=1.0) for seed in (1, 2)]
    assert stats.select([*runs, *lucky, *reported], BINS) == chosen
    line = stats.frontier([*runs, *lucky, *reported], BINS)
    assert line[BINS[0]] == {1: (0.1, 0.6), 2: (0.1, 0.6)}, (
        "what was chosen is reported, not what was best"
    )
    assert not set(FULL.select_seeds) & set(FULL.report_seeds) and len(FULL.report_seeds) >= 5


def test_differences_are_paired_by_seed_and_corrected_for_kl():
    ours = {1: stats.Point(0.6, 2.0), 2: stats.Point(0.5, 1.5), 9: stats.Point(0.9, 1.0)}
    theirs = {1: stats.Point(0.5, 1.5), 2: stats.Point(0.5, 1.5), 3: stats.Point(0.0, 1.0)}
    assert stats.paired(ours, theirs) == pytest.approx([0.1, 0.0])
    assert stats.at_equal_kl(ours, theirs, per_nat=0.2) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["better", "inconclusive"], "better"),
        (["better", "equivalent"], "better"),
        (["better", "worse"], "mixed"),
        (["equivalent", "inconclusive"], "equivalent"),
        (["inconclusive"], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_one_word_for_all_bins(words, expected):
    assert stats.overall(words) == expected


def test_a_finished_run_is_not_repeated_and_one_of_other_code_is(tmp_path):
    store = Store(tmp_path / "runs.jsonl", "v1")
    store.add("a", {"seed": 1})
    store.add("b", {"seed": 1, "failed": "diverged"})
    assert (
        set(Store(tmp_path / "runs.jsonl", "v1").runs) == {"a"}
        and not Store(tmp_path / "runs.jsonl", "v2").runs
    )


# --- PPO -------------------------------------------------------------------------------------------------------------


def test_gae_is_its_definition():
    """A_t = sum_k lam^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V behind the end being 0; ragged answers."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (
        torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    lengths, lam = [5, 2, 1], 0.9
    real = (torch.arange(5) < torch.tensor(lengths)[:, None]).double()
    found = gae(rewards * real, values * real, real, lam)
    for row, length in enumerate(lengths):
        for t in range(5):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1] if k + 1 < length else 0.0
                expected += lam ** (k - t) * (rewards[row, k] + following - values[row, k])
            assert found[row, t] == pytest.approx(float(expected), abs=1e-12)


def test_the_clipped_objective_starts_as_the_policy_gradient():
    """At pi = pi_old the mean gradient over all answers, drawn by their probability, is that of the expected reward."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    probability = torch.softmax(logits, 0)
    (expected,) = torch.autograd.grad(-(probability * reward).sum(), logits)
    mean = torch.zeros(5, dtype=torch.float64)
    for answer in range(5):
        logp = torch.log_softmax(logits, 0)[answer][None]
        (one,) = torch.autograd.grad(
            policy_loss(logp, logp.detach(), reward[answer][None], 0.2), logits
        )
        mean += probability[answer].detach() * one
    assert torch.allclose(mean, expected, atol=1e-12)


def test_the_clip_takes_the_gradient_away_on_one_side_only():
    old = torch.zeros(4)
    logps = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    policy_loss(logps, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2).backward()
    assert [bool(g) for g in logps.grad] == [False, True, True, False]
    assert whiten(torch.tensor([1.0, 2.0, 6.0])).mean().abs() < 1e-6


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_results_say():
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.read(report.RESULTS)), (
        "run python bench/study/report.py"
    )
    without = report.page(None)
    assert "{{" not in without and without.count(report.NOT_RUN) == len(report.SECTIONS)
    assert report.NOT_RUN not in report.page(report.read(report.RESULTS)), (
        "a part of the study is missing"
    )


def test_the_results_are_those_of_the_plan():
    found = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert found["plan"]["report_seeds"] == list(FULL.report_seeds)
    runs = [r for r in found["runs"] if r["part"] == "E3" and r["what"] == "report"]
    for method in ("una_group", "ppo_1", "ppo_4"):
        seeds = {r["seed"] for r in runs if r["method"] == method}
        assert seeds == set(FULL.report_seeds), f"{method} is reported on all seeds"
    timed = report.timed(found)
    assert all(len(timed[name]) >= 3 for name in ("una_group", "ppo_1", "ppo_4"))


def test_a_verdict_of_the_page_changes_with_the_numbers():
    """The words are computed: other gold, other verdict."""
    plan = {"bins": {"E1": [BINS[0]], "E3": [BINS[0]]}}
    comparison = report.COMPARISONS["E3"][0]
    words = []
    for gain in (0.0, 0.2, -0.2):
        runs = []
        for name, gold in (("una_group", 0.5 + gain), ("ppo_1", 0.5)):
            runs += [run(name, "select", 101, [(gold, 0.5)])]
            runs += [run(name, "report", seed, [(gold + 0.001 * seed, 0.5)]) for seed in range(5)]
        lines = report.frontiers({"plan": plan, "runs": runs}, "E3")
        (cell,) = report.compare(lines, comparison).values()
        words.append(report.outcome(comparison, cell.word))
    assert words == ["reproduces", "reproduces: better", "does not reproduce: worse"]
