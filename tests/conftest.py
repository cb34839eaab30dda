"""What the tests of the trainer share for a whole session. Imports are local: most other tests need none of it."""

from __future__ import annotations

import os

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before anything imports triton: kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """Directories of tiny models: {"untied": path, "tied": path}."""
    from tiny import save_llama

    root = tmp_path_factory.mktemp("llamas")
    return {name: save_llama(root / name, tied=name == "tied") for name in ("untied", "tied")}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """A JSONL file of 36 records with every kind of feedback."""
    from tiny import make_records, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "mixed.jsonl", make_records("mixed", 36))


@pytest.fixture
def one_thread():
    """Sums in the same order everywhere, subprocesses included; and small operations do not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
