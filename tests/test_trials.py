"""The short form of trials: damaged checkpoints, and kills at random instants.

The others, and the long forms, are run by `python tests/trials/run.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TRIALS = Path(__file__).parent / "trials"


@pytest.mark.parametrize("name", ["damage", "kills", "settings"])
def test_short_form(name, monkeypatch, tmp_path):
    """Children are forked from this process: nothing is imported twice."""
    monkeypatch.syspath_prepend(TRIALS)
    trial = importlib.import_module("common").Trial(tmp_path, short=True)
    importlib.import_module(name).run(trial)
    assert trial.total and not trial.failures


def test_a_fault_is_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(TRIALS)
    trial = importlib.import_module("common").Trial(tmp_path)
    trial.report("sound", True)
    trial.report("broken", False, "why")
    assert (trial.total, trial.failures) == (2, ["broken"])
    assert "FAIL broken" in capsys.readouterr().out


def test_all_trials_are_found_by_their_runner(monkeypatch):
    monkeypatch.syspath_prepend(TRIALS)
    names = importlib.import_module("run").names()
    assert {"damage", "disk", "elastic", "kills", "small", "soak", "two_ranks"} <= set(names)
    assert names[-1] == "soak" and "common" not in names
