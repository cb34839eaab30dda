"""Models and data that the tests of the trainer share for a whole session.

Imports are local: most other tests do without.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels then run in the interpreter; must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


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


@pytest.fixture
def one_thread():
    """Compute on one thread: sums have one order everywhere, and small operations do not wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
