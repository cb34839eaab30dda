"""Meshes of four ranks: the steps of one process, and runs that go on over another mesh."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fsdp_worker import run_case
from ranks import metrics_of, run_cases, saved_weights, worst_error
from tiny import make_records, read_metrics, write_jsonl
from una_fast.config import RunConfig
from una_fast.distributed import SHARDS_INTEGERS
from una_fast.parallel import Mesh, ParallelOptions
from una_fast.train.precompute import precompute_reference

STEPS = 10
QUIET = {"progress": False, "write_report": False, "loggers": [], "device": "cpu", "beta": 0.2}
SGD = {
    **QUIET,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": None,
    "batch_size": 5,
    "micro_batch_size": 1,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
}
ADAM = {
    **QUIET,
    "learning_rate": 3e-3,
    "batch_size": 6,
    "micro_batch_size": 2,
    "max_steps": 5,
    "save_every": 3,
}
LORA = {"lora": {"r": 4, "alpha": 8}}
HYBRID = {"replicate": 2}

# Gradients of the steps of one process. A step of five records leaves ranks without any.
SAME = {
    "shard 4": SGD,
    "split vocabulary lora": SGD | LORA | {"parallel": {"split_vocabulary": True}},
    "hybrid": SGD | {"parallel": HYBRID},
    # With a few rows of logits at a time.
    "hybrid, once a step": SGD | {"parallel": HYBRID | {"reduce": "last"}, "workspace_mb": 0.01},
    "hybrid lora": SGD | LORA | {"parallel": HYBRID},
    "hybrid qlora": SGD | LORA | {"quantize_base": "nf4", "parallel": HYBRID},
    "split rows, split vocabulary": SGD | {"parallel": {"context": 2, "split_vocabulary": True}},
    "hybrid, split vocabulary": SGD | {"parallel": HYBRID | {"split_vocabulary": True}},
}
if not SHARDS_INTEGERS:
    del SAME["hybrid qlora"]
# Begun by two copies, gone on with by other meshes.
BEGUN = ADAM | {"parallel": HYBRID}
OTHERS = {
    "shard 4": {},
    "copies": {"replicate": 4},
    "split vocabulary": {"split_vocabulary": True},
    "split rows": {"context": 2},
}

# Reference log-probs by several ranks: of one process, bit for bit.
REFERENCES = {
    "fp32 reference": QUIET | {"max_tokens_per_batch": 90},
    "wide reference": QUIET | {"precision": "bf16", "master_weights": True},
}
CACHED = {"data": "data-00-many.jsonl", "eval_data": "eval_data-00-eval.jsonl"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def data(llamas, root):
    """Settings of model and data: the last step has a single record."""
    records = make_records("mixed", 5 * (STEPS - 1) + 1)
    return {
        "model": llamas["untied"],
        "data": write_jsonl(root / "many.jsonl", records),
        "eval_data": write_jsonl(root / "eval.jsonl", make_records("mixed", 7, seed=5)),
    }


@pytest.fixture(scope="module")
def four_ranks(data, root):
    """Output directories of all cases, run by four ranks."""
    todo = {name: {"config": data | settings} for name, settings in SAME.items()}
    todo["bf16"] = {"config": data | BEGUN | {"precision": "bf16", "max_steps": 2}}
    todo["whole"] = {"config": data | BEGUN}
    begun = str(root / "whole" / "checkpoint-3")
    for name, parallel in OTHERS.items():
        settings = data | ADAM | {"parallel": parallel, "resume": True}
        todo[f"on {name}"] = {"config": settings, "begun": begun}
    files = {name: str(root / "fp32 reference" / file) for name, file in CACHED.items()}
    todo["cached"] = {"config": data | SAME["hybrid"] | files | {"reference": "cached"}}
    for name, case in todo.items():
        case["config"] = case["config"] | {"output_dir": str(root / name)}
    before = {}
    for name, settings in REFERENCES.items():
        settings = data | settings | {"output_dir": str(root / name), "parallel": HYBRID}
        before[name] = {"precompute": settings}
    run_cases(before | todo, root, 4)
    return {name: root / name for name in [*before, *todo]}


@pytest.fixture(scope="module")
def one_process(data, root):
    """settings -> (output directory, record of the run) in this process, made once."""
    made = {}

    def get(settings: dict) -> tuple[Path, dict]:
        settings = data | settings | {"parallel": None}
        key = str(settings)
        if key not in made:
            out = root / f"one-{len(made)}"
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made[key] = out, run_case(settings | {"output_dir": str(out)})
            torch.set_num_threads(threads)
        return made[key]

    return get


def seen_by(directory: Path) -> dict:
    return torch.load(directory / "seen.pt", weights_only=True)


@pytest.mark.parametrize("name", SAME)
def test_every_step_is_that_of_one_process(four_ranks, one_process, name):
    out, expected = one_process(SAME[name])
    seen = seen_by(four_ranks[name])
    assert len(seen["gradients"]) == len(expected["gradients"]) == STEPS
    steps = zip(seen["gradients"], expected["gradients"], strict=True)
    for step, (ours, theirs) in enumerate(steps, start=1):
        assert worst_error(ours, theirs) <= 1e-5, f"step {step}"
    for ours, theirs in zip(metrics_of(four_ranks[name]), metrics_of(out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert worst_error(saved_weights(four_ranks[name]), saved_weights(out)) <= 1e-5


@pytest.mark.parametrize(
    "name", ["hybrid", "hybrid, split vocabulary", "bf16", "whole", "on copies"]
)
def test_copies_hold_the_same_bits(four_ranks, name):
    """Also where weights are rounded at random, and after a resume by more copies."""
    held = seen_by(four_ranks[name])["held"]
    copies = 4 if name == "on copies" else 2
    shards = 4 // copies
    assert len(held) == 4
    for rank, digest in enumerate(held):
        assert digest == held[rank % shards], rank
    assert len(set(held)) == shards, "shards differ"


@pytest.mark.parametrize("name", [*OTHERS, "one process"])
def test_a_run_goes_on_over_another_mesh(four_ranks, data, tmp_path, name):
    """The same records in the same order, and the same steps."""
    whole, other = four_ranks["whole"], tmp_path
    if name == "one process":
        shutil.copytree(four_ranks["whole"] / "checkpoint-3", tmp_path / "checkpoint-3")
        run_case(data | ADAM | {"output_dir": str(tmp_path), "resume": True})
    else:
        other = four_ranks[f"on {name}"]
    ours, theirs = read_metrics(other), read_metrics(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert ours[:4] == theirs[:4], "the checkpoint brings the metrics before"
    for mine, of_whole in zip(ours[4:], theirs[4:], strict=True):
        assert mine == pytest.approx(of_whole, rel=1e-5, abs=1e-5)
    assert worst_error(saved_weights(other), saved_weights(whole)) <= 1e-4


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_log_probs_do_not_depend_on_the_ranks(four_ranks, data, tmp_path, name):
    """Files and sidecars, byte for byte: the same batches, the same dtypes, the same weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = data | REFERENCES[name] | {"output_dir": str(tmp_path)}
    precompute_reference(RunConfig(**settings))
    torch.set_num_threads(threads)
    ours, theirs = (
        {path.name: path.read_bytes() for path in directory.glob("*data*")}
        for directory in (four_ranks[name], tmp_path)
    )
    assert len(ours) == 4 and ours == theirs


def test_a_cached_reference_is_the_frozen_one(four_ranks):
    """On ranks that hold copies and shards."""
    cached, frozen = (seen_by(four_ranks[name])["gradients"] for name in ("cached", "hybrid"))
    for ours, theirs in zip(cached, frozen, strict=True):
        assert worst_error(ours, theirs) <= 1e-5


def test_collectives_of_a_step(four_ranks):
    """A sum per layer and one of the rest with the head, whatever the chunks of the head."""
    calls = {name: seen_by(four_ranks[name])["collectives"] for name in SAME}
    each, last = calls["hybrid"], calls["hybrid, once a step"]
    assert each == {"_allgather_base_": 14, "_reduce_scatter_base_": 6, "allreduce_": 3}
    assert last == each | {"_reduce_scatter_base_": 3}
    # An adapter, in the layers alone, is summed once a step of two micro-batches.
    lora = calls["hybrid lora"]
    assert (lora["_reduce_scatter_base_"], lora["allreduce_"]) == (2, 2)
    # The ranks of a copy split the vocabulary. In two micro-batches 3 gathers of the reference and
    # 5 of the policy, a maximum and a sum of each, one sum of hidden gradients; once a step a sum
    # of the head's gradient over the copies.
    split = calls["hybrid, split vocabulary"]
    assert split == {
        "_allgather_base_": 14 + 2 * (3 + 5),
        "_reduce_scatter_base_": 6 + 2 * 1,
        "allreduce_": 3 + 2 * (2 + 2) + 1,
    }


def test_copies_are_saved_once(four_ranks):
    """The state of training is in the files of one copy."""
    files = sorted((four_ranks["whole"] / "checkpoint-3" / "training").iterdir())
    sizes = [path.stat().st_size for path in files]
    assert len(sizes) == 4
    assert max(sizes[2:]) < 1000 < min(sizes[:2])


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("options", "ranks", "mesh", "words"),
    [
        ({}, 1, Mesh(1, 1, 1), "1 rank"),
        ({}, 6, Mesh(1, 6, 1), "shard 6"),
        ({"replicate": 2}, 6, Mesh(2, 3, 1), "replicate 2 x shard 3"),
        ({"context": 4}, 8, Mesh(1, 2, 4), "shard 2 x context 4"),
        ({"context": 2, "replicate": 2, "shard": 2}, 8, Mesh(2, 2, 2), None),
    ],
)
def test_meshes(options, ranks, mesh, words):
    made = ParallelOptions(**options).mesh(ranks)
    assert made == mesh and made.ranks == ranks
    assert words is None or str(made) == words
    assert made.data * made.context == made.shards * made.replicate == ranks


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"replicate": 2}, 5, "replicate 2 x context 1 = 2 does not divide the 5 ranks"),
        ({"shard": 3}, 4, "shard 3 x replicate 1 x context 1 = 3 ranks, and the run has 4"),
        ({"context": 2}, 1, "replicate 1 x context 2 = 2 does not divide the 1 ranks"),
        ({"prefetch": 1}, 1, "parallel.prefetch=1 is for several ranks"),
        ({"reduce": "last"}, 1, "parallel.reduce=last is for several ranks"),
        ({"offload_parameters": True}, 1, "parallel.offload_parameters=True is for several ranks"),
        ({"split_vocabulary": True, "replicate": 2}, 2, "shard 1 x context 1 a copy has 1 rank"),
    ],
)
def test_products_that_do_not_match_are_refused(options, ranks, message):
    with pytest.raises(ValueError, match=message):
        ParallelOptions(**options).mesh(ranks)


@pytest.mark.parametrize("options", [{"context": 0}, {"shard": -1}, {"prefetch": -1}])
def test_sizes_below_one_are_refused(options):
    with pytest.raises(ValueError, match=f"parallel.{next(iter(options))}=.* must"):
        ParallelOptions(**options)
