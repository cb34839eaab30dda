"""The study: statistics that cannot flatter, a PPO that is PPO, and a page that repeats results."""

from __future__ import annotations

import json

import pytest
import torch

import report
import stats
from ppo import gae, policy_loss, whiten
from study import FULL, Store

BINS = ((0.0, 1.0), (1.0, 3.0))


def run(method, what, seed, points, lr=1.0):
    points = [{"step": k + 1, "gold": gold, "kl": kl} for k, (gold, kl) in enumerate(points)]
    place = {"part": "E3", "method": method, "what": what, "seed": seed}
    return place | {"lr": lr, "beta": 1.0, "points": points}


# -------------------------------------------------------------------------------------- statistics


def test_verdicts():
    expected = {
        (0.001, -0.002, 0.003, 0.0, -0.001): "equivalent",
        (0.05, 0.06, 0.05, 0.07, 0.06): "better",
        (-0.05, -0.06, -0.05, -0.07, -0.06): "worse",
        (0.2, -0.2, 0.1, -0.1, 0.0): "inconclusive",  # equal on average, without evidence
        (0.015, 0.025, 0.02, 0.02, 0.02): "inconclusive",  # across the margin
        (0.0,): "inconclusive",
    }
    assert {values: stats.verdict(values) for values in expected} == expected
    students = stats.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.1318 * 2.5**0.5 / 5**0.5
    assert students.mean == 3.0 and students.high - 3.0 == pytest.approx(half)
    overall = {
        ("better", "inconclusive"): "better",
        ("better", "equivalent"): "better",
        ("better", "worse"): "mixed",
        ("equivalent", "inconclusive"): "equivalent",
        (): "inconclusive",
    }
    assert {words: stats.overall(words) for words in overall} == overall


def test_selection_never_sees_the_reporting_seeds():
    edges = [stats.bin_of(kl, BINS) for kl in (0.0, 1.0, 1.001, 3.0, 3.1)]
    assert edges == [None, BINS[0], BINS[1], BINS[1], None]
    runs = [
        run("m", "select", 101, [(0.5, 0.5), (0.6, 2.0)], lr=1.0),
        run("m", "select", 102, [(0.5, 0.7), (0.6, 2.5)], lr=1.0),
        run("m", "select", 101, [(0.4, 0.5), (0.7, 2.0)], lr=2.0),
        run("m", "select", 102, [(0.4, 0.7), (0.7, 2.5)], lr=2.0),
        run("m", "select", 101, [(0.9, 0.5)], lr=3.0),  # the second seed diverged
    ]
    chosen = stats.select(runs, BINS)
    assert chosen == {BINS[0]: stats.Candidate(1.0, 1.0, 1), BINS[1]: stats.Candidate(2.0, 1.0, 2)}
    for seed in (1, 2):
        runs.append(run("m", "report", seed, [(0.99, 0.5), (0.99, 2.0)], lr=2.0))
        runs.append(run("m", "report", seed, [(0.1, 0.6), (0.1, 2.0)], lr=1.0))
    assert stats.select(runs, BINS) == chosen
    found = stats.frontier(runs, BINS)[BINS[0]]
    assert found == {1: (0.1, 0.6), 2: (0.1, 0.6)}, "the chosen is reported, not the best"
    assert not set(FULL.select_seeds) & set(FULL.report_seeds) and len(FULL.report_seeds) >= 5


def test_differences_are_paired_by_seed_and_corrected_for_kl():
    ours = {1: stats.Point(0.6, 2.0), 2: stats.Point(0.5, 1.5), 9: stats.Point(0.9, 1.0)}
    theirs = {1: stats.Point(0.5, 1.5), 2: stats.Point(0.5, 1.5), 3: stats.Point(0.0, 1.0)}
    assert stats.paired(ours, theirs) == pytest.approx([0.1, 0.0])
    assert stats.at_equal_kl(ours, theirs, per_nat=0.2) == pytest.approx([0.0, 0.0])


def test_a_finished_run_is_kept_and_a_run_of_other_code_is_not(tmp_path):
    store = Store(tmp_path / "runs.jsonl", "v1")
    store.add("a", {"seed": 1})
    store.add("b", {"seed": 1, "failed": "diverged"})
    assert set(Store(tmp_path / "runs.jsonl", "v1").runs) == {"a"}
    assert not Store(tmp_path / "runs.jsonl", "v2").runs


# --------------------------------------------------------------------------------------------- PPO


def test_gae_is_the_sum_of_its_definition():
    """A_t = sum_k lam^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V behind the end being 0."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    lengths, lam = [5, 2, 1], 0.9
    real = (torch.arange(5) < torch.tensor(lengths)[:, None]).double()
    found = gae(rewards * real, values * real, real, lam)
    for row, length in enumerate(lengths):
        for t in range(length):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1] if k + 1 < length else 0.0
                expected += lam ** (k - t) * (rewards[row, k] + following - values[row, k])
            assert found[row, t] == pytest.approx(float(expected), abs=1e-12)
    assert not found[real == 0].any()


def test_the_clipped_objective_starts_as_the_policy_gradient():
    """At pi = pi_old the mean gradient over answers, by probability, is the expected reward's."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    probability = torch.softmax(logits, 0)
    (expected,) = torch.autograd.grad(-(probability * reward).sum(), logits)
    mean = torch.zeros(5, dtype=torch.float64)
    for answer in range(5):
        logp = torch.log_softmax(logits, 0)[answer][None]
        loss = policy_loss(logp, logp.detach(), reward[answer][None], 0.2)
        (gradient,) = torch.autograd.grad(loss, logits)
        mean += probability[answer].detach() * gradient
    assert torch.allclose(mean, expected, atol=1e-12)


def test_the_clip_takes_the_gradient_away_on_one_side_only():
    logps = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    policy_loss(logps, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2).backward()
    assert [bool(g) for g in logps.grad] == [False, True, True, False]
    assert whiten(torch.tensor([1.0, 2.0, 6.0])).mean().abs() < 1e-6


# ---------------------------------------------------------------------------------------- the page


def test_the_page_says_what_the_results_say():
    written = report.page(report.read(report.RESULTS))
    assert report.PAGE.read_text(encoding="utf-8") == written, "run bench/study/report.py"
    assert report.NOT_RUN not in written, "a part of the study is missing"
    without = report.page(None)
    assert "{{" not in without and without.count(report.NOT_RUN) == len(report.SECTIONS)


def test_the_results_are_those_of_the_plan():
    found = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert found["plan"]["report_seeds"] == list(FULL.report_seeds)
    runs, timed = report.runs_of(found, "E3", "report"), report.timed(found)
    for method in ("una_group", "ppo_1", "ppo_4"):
        seeds = {run["seed"] for run in runs if run["method"] == method}
        assert seeds == set(FULL.report_seeds), f"{method} is reported on all seeds"
        assert len(timed[method]) >= 3


def test_a_verdict_of_the_page_changes_with_the_numbers():
    """The words are computed: other gold, other verdict."""
    plan = {"bins": {"E1": [BINS[0]], "E3": [BINS[0]]}}
    comparison = report.COMPARISONS["E3"][0]
    words = []
    for gain in (0.0, 0.2, -0.2):
        runs = []
        for name, gold in (("una_group", 0.5 + gain), ("ppo_1", 0.5)):
            runs.append(run(name, "select", 101, [(gold, 0.5)]))
            runs += [run(name, "report", seed, [(gold + 0.001 * seed, 0.5)]) for seed in range(5)]
        lines = report.frontiers({"plan": plan, "runs": runs}, "E3")
        (cell,) = report.compare(lines, comparison).values()
        words.append(report.outcome(comparison, cell.word))
    assert words == ["reproduces", "reproduces: better", "does not reproduce: worse"]
