"""Kernels compile for GPUs that are not there, without a spill, and the committed tables agree.

Compilation needs Triton's compiler, and the other tests of the kernels need the interpreter; so a
separate process compiles. bench/kernels_compile.py without arguments rewrites the table of the
installed Triton; there is one of the pinned Triton and one of the oldest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "kernels_compile.py"
TABLES = sorted((SCRIPT.parent / "results").glob("kernels_compile*.json"))
REMEDY = "run python bench/kernels_compile.py, with the pinned and with the oldest Triton"


@pytest.fixture(scope="module", params=TABLES, ids=lambda path: path.stem)
def table(request):
    return json.loads(request.param.read_text())


@pytest.fixture(scope="module")
def fresh():
    """Compile a few rows per target; also the names of all rows that the table should have."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--subset"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_table_has_every_variant(table, fresh):
    assert list(table["rows"]) == fresh["names"], REMEDY


def test_nothing_spills(table, fresh):
    """Neither as recorded nor, in part, as this compiler has it.

    The assembler of Triton 3.6 may keep 8 bytes per thread on the stack, outside the loops, to stay
    at 64 registers (32 for gather). A bound of 72 registers leaves 7 programs of 8 on a
    multiprocessor, and spills in other kernels.
    """
    for version, rows in ((table["triton"], table["rows"]), (fresh["triton"], fresh["rows"])):
        spilled = {name: row for name, row in rows.items() if row["spills"]}
        if version == "3.6.0":
            assert all(row["spills"] <= 8 for row in spilled.values())
            spilled = {k: row for k, row in spilled.items() if row.get("spills_in_body", 1)}
        assert not spilled


def test_the_table_is_what_the_compiler_says(table, fresh):
    """Spills included: a kernel that changed so that it spills is a row that differs."""
    if table["triton"] != fresh["triton"]:
        pytest.skip(f"the table was made with Triton {table['triton']}, this is {fresh['triton']}")
    assert {name: table["rows"][name] for name in fresh["rows"]} == fresh["rows"], REMEDY


def test_a_barrier_stands_between_loads_and_the_stores_over_them(table, fresh):
    """A narrow gradient over wider logits is a race that only a GPU would show, now and then."""
    for rows in (table["rows"], fresh["rows"]):
        assert all(row.get("barrier", True) for row in rows.values())
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert any("barrier" in row for name, row in rows.items() if name.endswith(target))


def test_rows_move_in_accesses_of_16_bytes(table):
    """Where rows start on a 16-byte boundary, whatever the vocabulary's size."""
    for name, row in table["rows"].items():
        if "per_logit" in row and not {"unaligned", "one"} & set(name.split()):
            for accesses in (row["loads"], row["stores"]):
                assert all(access.endswith("x128") for access in accesses.split()), name


def test_shared_memory_fits(table):
    """Shared memory of one program within the architecture's limit, in bytes."""
    limits = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
    for name, row in table["rows"].items():
        assert row["shared"] <= limits[name.rsplit(" ", 1)[1]], name
