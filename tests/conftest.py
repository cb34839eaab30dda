"""Models and data that the tests of the trainer share for a whole session.

Imports are local: most other tests do without.
"""

from __future__ import annotations

import gc
import os
import signal

# Small operations on several threads mostly wait for each other, and sums then have one order.
# Processes that a test starts inherit the setting; it must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A shell starts background jobs with interrupts ignored, and tests send them to their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Kernels then run in the interpreter; must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage():
    """Leave what is imported out of garbage collections, which trainers of others ask for often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """Save tiny models: {"untied": directory, "tied": directory}."""
    from tiny import save_llama

    root = tmp_path_factory.mktemp("llamas")
    return {name: save_llama(root / name, tied=name == "tied") for name in ("untied", "tied")}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """Write a JSONL file of 36 records with every kind of feedback."""
    from tiny import make_records, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "mixed.jsonl", make_records("mixed", 36))


def pytest_sessionfinish():
    """Let everything go at the end; extensions report what is left."""
    gc.unfreeze()
