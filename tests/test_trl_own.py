"""TRL's own tests of its DPO and KTO trainers, with TRL's trainers and with ours.

    TRL_SOURCE=checkout pytest tests/test_trl_own.py      # some ten minutes

TRL_SOURCE: a checkout of huggingface/trl with tests/ and scripts/; nothing of TRL's is in our tree.
Liger's cases are skipped without a GPU, and cases with images always: their models and processors
are not made here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).with_name("trl_own")
SOURCE = os.environ.get("TRL_SOURCE")
DPO, KTO = "tests/test_dpo_trainer.py", "tests/test_kto_trainer.py"
WITHOUT_IMAGES = "not Vision and not vlm"
LEAST_DPO_CASES = 60  # of those in which our op must be called
LEAST_PASSED = {DPO: 80, KTO: 50}

pytestmark = [
    pytest.mark.skipif(SOURCE is None, reason="TRL_SOURCE names no checkout of huggingface/trl"),
]


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    """Return a folder with a copy of TRL's tests, and the models and datasets they name."""
    root = tmp_path_factory.mktemp("trl")
    for part in ("tests", "scripts"):  # the installed package is tested, not the checkout's
        shutil.copytree(Path(SOURCE) / part, root / "source" / part)
    command = [sys.executable, "-P", HERE / "hub.py", root / "source", root / "hub"]
    subprocess.run(command, check=True, capture_output=True)
    return root


def run_tests(root: Path, file: str, *, ours: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Run a file of TRL's tests; return outcomes and calls of our op by the name of a test.

    root: the fixture's
    file: within the checkout
    ours: our trainers in TRL's place
    """
    calls = root / f"calls-{Path(file).stem}-{ours}"
    hub = root / "hub"
    environment = {
        **os.environ,
        "HF_HOME": str(hub / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(hub / "cache"),
        "UNA_TRL_DATA": str(hub / "data"),
        "UNA_CALLS": str(calls),
        "UNA": str(int(ours)),
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    options = ["-q", "-rA", "--no-header", "-W", "ignore", "--tb=no", "-c", os.devnull]
    plugins = ["-p", "una_trl_offline", "-p", "no:cacheprovider"]
    markers = ["-o", "markers=slow: s\nlow_priority: l"]
    command = [sys.executable, "-P", "-m", "pytest", *plugins, *options, *markers]
    command += [f"--rootdir={root / 'source'}", "-k", WITHOUT_IMAGES, file]
    done = subprocess.run(
        command, cwd=root / "source", env=environment, capture_output=True, text=True
    )
    found = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    counted = (line.split("\t") for line in calls.read_text(encoding="utf-8").splitlines())
    return {name: outcome for outcome, name in found}, {name: int(n) for n, name in counted}


@pytest.mark.parametrize("file", [DPO, KTO])
def test_their_tests_have_one_outcome_with_both_trainers(offline, file):
    theirs, _ = run_tests(offline, file, ours=False)
    ours, calls = run_tests(offline, file, ours=True)
    differing = {name for name in theirs | ours if theirs.get(name) != ours.get(name)}
    assert not differing
    reached = sum(count > 0 for count in calls.values())
    print(file, dict(Counter(ours.values())), f"our op in {reached} of {len(calls)} cases")
    assert Counter(ours.values())["PASSED"] >= LEAST_PASSED[file]
    if file == DPO:
        assert reached >= LEAST_DPO_CASES
