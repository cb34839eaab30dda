"""The session on a GPU, rehearsed on a CPU: what goes wrong costs nothing but itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rehearsal

SESSION = str(Path(__file__).resolve().parents[1] / "bench" / "gpu_session.sh")


def session(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", SESSION, *arguments], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_a_failing_install_a_hang_and_a_crash():
    """The pieces that need no transformers; all of them: gpu_session.sh --rehearse."""
    status, text = session("--rehearse", "install", "head")
    assert status == 0, text
    assert "rehearsal: all held" in text


def test_a_rehearsal_fails_where_a_piece_fails(monkeypatch, capsys):
    def wrong(folder):
        raise AssertionError("a result is missing")

    monkeypatch.setattr(rehearsal, "PIECES", {"wrong": wrong, "right": lambda folder: None})
    assert rehearsal.main([]) == 1 and rehearsal.main(["right"]) == 0
    assert rehearsal.main(["else"]) == 2
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "AssertionError: a result is missing" in printed


@pytest.mark.parametrize("arguments", [(), ("out",), ("out", "0"), ("out", "10")], ids=str)
def test_a_wrong_call_is_refused(arguments, tmp_path):
    places = [str(tmp_path / name) if name == "out" else name for name in arguments]
    status, text = session(*places)
    assert status != 0 and ("usage" in text or "neither" in text)
    assert not list(tmp_path.iterdir())
