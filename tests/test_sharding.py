"""Two ranks are one process: the records of a step, every gradient, metrics, checkpoints and the saved model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fsdp_worker import run_case
from safetensors.torch import load_file
from tiny import make_records, read_metrics, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.data.loader import Loader, hold_out, mixture_order, num_steps
from una_fast.feedback import Feedback
from una_fast.train.checkpoint import complete_checkpoints
from una_fast.train.loop import train

TESTS = Path(__file__).parent
TIMEOUT = 240  # seconds; a missing collective hangs for ever

# ---------------------------------------------------------------------- records of a step


def example(number: int) -> Example:
    ids = np.full(1 + number % 3, number, dtype=np.int32)
    units = number % 4 + 1
    return Example(
        ids, (ids,) * units, Feedback.scores(range(units), [0.5] * units), None, f"x.jsonl:{number}"
    )


def loaders(count: int, weights=(1.0,), world_size: int = 1, **options) -> list[Loader]:
    """The loaders of all ranks over `count` examples, split evenly into sources."""
    sources = [part.tolist() for part in np.array_split(np.arange(count), len(weights))]
    examples = [[example(number) for number in part] for part in sources]
    limits = {"micro_batch_size": 2, "max_tokens_per_batch": None, "packed": True}
    options = {"batch_size": 6, "seed": 3, "world_size": world_size, **limits} | options
    return [Loader(examples, weights, rank=rank, **options) for rank in range(world_size)]


def origins(step) -> list[list[str]]:
    return [[e.origin for e in part] for part in step.micro_batches]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize(("count", "batch_size"), [(13, 6), (12, 6), (1, 4), (7, 1), (5, 20)])
def test_ranks_share_the_global_batch(count, batch_size, micro_batch_size, world_size):
    options = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    (whole,) = loaders(count, **options)
    ranks = loaders(count, world_size=world_size, **options)
    total = num_steps(whole.steps_per_epoch, 2, None)
    assert total == 2 * -(-count // batch_size)
    for alone, *steps in zip(*(loader.steps(0, total) for loader in [whole, *ranks]), strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1, (
            "ranks would wait for each other"
        )
        assert all(len(part) <= micro_batch_size for step in steps for part in step.micro_batches)
        batch = sorted(sum(origins(alone), []))
        assert sorted(sum((part for step in steps for part in origins(step)), [])) == batch
        assert {step.num_units for step in steps} == {alone.num_units}
        assert alone.num_units == sum(int(origin.split(":")[1]) % 4 + 1 for origin in batch)
        assert {step.epoch for step in steps} == {alone.epoch}


@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_steps_are_the_steps(rank):
    """From any step on, over the ends of epochs, in a loader that was never asked for the first ones."""
    options = {"weights": (1.0, 1.5), "world_size": 2}
    steps = [origins(step) for step in loaders(20, **options)[rank].steps(0, 13)]
    for first in range(13):
        assert [origins(step) for step in loaders(20, **options)[rank].steps(first, 13)] == steps[
            first:
        ]
    assert (
        steps[:5] != steps[5:10]
    )  # another epoch, another order: 10 + 15 records make 5 steps of 6


def test_an_epoch_sees_every_source_by_its_weight():
    (loader,) = loaders(20, weights=(2.0, 0.3), batch_size=7)
    assert loader.steps_per_epoch == 4  # 20 + 3 records
    seen = [
        int(origin.split(":")[1])
        for step in loader.steps(0, 4)
        for part in origins(step)
        for origin in part
    ]
    assert (
        sorted(seen)[:20] == sorted([*range(10)] * 2)
        and len(set(seen[20:])) <= 3
        and len(seen) == 23
    )
    assert sorted(seen) == sorted(mixture_order([10, 10], [2.0, 0.3], seed=3, epoch=0).tolist())


def test_fractional_epochs_and_max_steps():
    (loader,) = loaders(60)
    assert loader.steps_per_epoch == 10
    assert num_steps(10, 1.1, None) == 11  # 1.1 * 10 is 11.000000000000002
    assert (
        num_steps(10, 0.05, None) == 1 and num_steps(10, 2, 7) == 7 and num_steps(10, 0.5, 7) == 5
    )


def test_evaluation_sees_every_example_once():
    ranks = loaders(13, world_size=2)
    steps = [list(loader.in_order()) for loader in ranks]
    assert len(steps[0]) == len(steps[1]) == 3
    for mine, theirs in zip(*steps, strict=True):
        assert len(mine.micro_batches) == len(theirs.micro_batches)
    seen = [origin for rank in steps for step in rank for part in origins(step) for origin in part]
    assert sorted(seen) == sorted(f"x.jsonl:{number}" for number in range(13))


def test_held_out_examples_are_a_split():
    examples = [example(number) for number in range(30)]
    kept, held = hold_out(examples, 0.1, seed=1)
    assert len(held) == 3 and sorted(e.origin for e in kept + held) == sorted(
        e.origin for e in examples
    )
    assert hold_out(examples, 0.1, seed=1) == (kept, held)
    assert [e.origin for e in held] != [e.origin for e in hold_out(examples, 0.1, seed=2)[1]]


def test_identity_of_the_data():
    (one,), (two,) = loaders(20), loaders(20)
    assert one.identity() == two.identity() != loaders(19)[0].identity()
    assert (
        loaders(20, weights=(1.0, 1.0))[0].identity()
        != loaders(20, weights=(1.0, 2.0))[0].identity()
    )
    assert loaders(20, world_size=2)[1].identity() == one.identity()
    two.examples[4] = example(8)
    assert one.identity() != two.identity()


# ---------------------------------------------------------------------- FSDP2

STEPS = 20
SGD = {
    **{
        "optimizer": "sgd",
        "learning_rate": 0.02,
        "max_grad_norm": None,
        "beta": 0.2,
        "batch_size": 5,
    },
    **{"micro_batch_size": 2, "lr_schedule": "constant", "warmup_ratio": 0.0},
}
ADAM = {
    "learning_rate": 3e-3,
    "batch_size": 6,
    "micro_batch_size": 2,
    "max_steps": 6,
    "log_every": 2,
    "save_every": 3,
}
QUIET = {"progress": False, "loggers": [], "device": "cpu"}
LORA = {"lora": {"r": 4, "alpha": 8}}
SWITCHES = {"mlp_tile": 7, "gradient_checkpointing": True, "offload_activations": True}
TOKENS = {
    "micro_batch_size": None,
    "max_tokens_per_batch": 60,
}  # one or two of the records; some are longer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def cases(llamas, root):
    """{name: (settings without output_dir, step to die in)}"""
    # 96 records: 19 steps of 5 (3 on one rank, 2 on the other), and one of a single record. Units differ by record.
    many = write_jsonl(root / "many.jsonl", make_records("mixed", 5 * (STEPS - 1) + 1))
    held_out = write_jsonl(root / "eval.jsonl", make_records("mixed", 7, seed=5))
    sgd = {"data": many, "eval_data": held_out, **SGD, **QUIET}
    adam = {"model": llamas["tied"], "data": many, "eval_data": held_out, **ADAM, **QUIET}
    lora = {**adam, "model": llamas["untied"], **LORA}
    return {
        "untied": ({"model": llamas["untied"], **sgd}, None),
        "tied": (
            {"model": llamas["tied"], **sgd, "packing": False, "gradient_checkpointing": True},
            None,
        ),
        "lora": ({"model": llamas["untied"], **sgd, **LORA}, None),
        "switches": ({"model": llamas["untied"], **sgd, **SWITCHES}, None),
        "lora switches": ({"model": llamas["untied"], **sgd, **LORA, **SWITCHES}, None),
        "tokens": ({"model": llamas["untied"], **sgd, **TOKENS}, None),
        "tokens, padded": ({"model": llamas["untied"], **sgd, **TOKENS, "packing": False}, None),
        "one record a step": (
            {"model": llamas["untied"], **sgd, "batch_size": 1, "max_steps": 3},
            None,
        ),
        "adam": (adam, None),
        "adam again": (adam, 5),
        "adam lora": (lora, None),
        "adam lora again": (lora, 5),
        "adam offloaded": ({**adam, "offload_optimizer": True}, None),
        "adam offloaded again": ({**adam, "offload_optimizer": True}, 5),
        "adam bf16": ({**adam, "precision": "bf16"}, None),
        "adam bf16 again": ({**adam, "precision": "bf16"}, 5),
        "bf16": ({**adam, "precision": "bf16", "max_steps": 2}, None),
        "bf16 master": (
            {**adam, "precision": "bf16", "master_weights": True, "max_steps": 2},
            None,
        ),
        "bf16 lora": ({**lora, "precision": "bf16", "max_steps": 2}, None),
    }


@pytest.fixture(scope="module")
def two_ranks(cases, root):
    """Output directories of all cases, run by two ranks of one torchrun; what was interrupted is resumed."""
    todo = {}
    for name, (settings, die_at) in cases.items():
        settings = settings | {"output_dir": str(root / "two" / name)}
        todo[name] = {"config": settings, "die_at": die_at}
        if die_at:
            todo[f"{name}, resumed"] = {"config": settings | {"resume": True}, "die_at": None}
    config = RunConfig(
        **cases["adam"][0] | {"output_dir": str(root / "two" / "cli"), "max_steps": 2}
    )
    config.save(root / "cli.yaml")
    todo["cli"] = {"argv": ["train", "--config", str(root / "cli.yaml")]}
    run_two_ranks(todo, root)
    return {name: root / "two" / name for name in [*cases, "cli"]}


def run_two_ranks(todo: dict[str, dict], root: Path) -> None:
    """Cases of fsdp_worker.py under one torchrun."""
    (root / "cases.json").write_text(json.dumps(todo))
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        str(torchrun),
        "--standalone",
        "--nproc-per-node",
        "2",
        str(TESTS / "fsdp_worker.py"),
    ]
    log = (root / "log").open("w+")
    process = subprocess.Popen(
        [*command, str(root / "cases.json")],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = "a timeout"
    log.seek(0)
    assert code == 0, f"torchrun ended with {code}:\n{log.read()[-6000:]}"


@pytest.fixture(scope="module")
def one_process(cases, root):
    """(output directory, what was seen) of a case in this process, made once."""
    made = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            out = root / "one" / name
            made[name] = out, run_case(cases[name][0] | {"output_dir": str(out)})
            torch.set_num_threads(threads)
        return made[name]

    return get


def saved_weights(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*model.safetensors")
    return load_file(file)


def worst_error(values: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest max|e| / max|truth| of a tensor; a tensor that is zero in truth must be zero."""
    assert values.keys() == truth.keys()
    scales = {name: truth[name].abs().max().clamp_min(1e-30) for name in truth}
    return max(float((values[name] - truth[name]).abs().max() / scales[name]) for name in truth)


SAME = [
    "untied",
    "tied",
    "lora",
    "switches",
    "lora switches",
    "tokens",
    "tokens, padded",
    "one record a step",
]


@pytest.mark.parametrize("name", SAME)
def test_every_gradient_is_that_of_one_process(two_ranks, one_process, name):
    _, expected = one_process(name)
    seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
    steps = 3 if name == "one record a step" else STEPS
    assert len(seen["gradients"]) == len(expected["gradients"]) == steps
    assert len(seen["gradients"][0]) == {"tied": 20, "lora": 28, "lora switches": 28}.get(name, 21)
    errors = [
        worst_error(*pair) for pair in zip(seen["gradients"], expected["gradients"], strict=True)
    ]
    assert max(errors) <= 1e-5, errors
    assert seen["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("name", SAME)
def test_every_metric_is_that_of_one_process(two_ranks, one_process, name):
    sharded, alone = read_metrics(two_ranks[name]), read_metrics(one_process(name)[0])
    assert len(sharded) == len(alone)
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        if "grad_norm" in ours:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    assert sharded[0] == pytest.approx(alone[0], rel=1e-6, abs=1e-9) and "eval_loss" in sharded[0]
    if name != "one record a step":
        assert len({line["units"] for line in alone if "units" in line}) > 1, (
            "steps are to differ in their units"
        )


@pytest.mark.parametrize("name", SAME)
def test_the_saved_model_is_that_of_one_process(two_ranks, one_process, name):
    ours, theirs = saved_weights(two_ranks[name]), saved_weights(one_process(name)[0])
    assert worst_error(ours, theirs) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(two_ranks[name])
    assert model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=2, do_sample=False).shape[1] > 3
    assert sorted(p.name for p in two_ranks[name].iterdir() if p.name != "seen.pt") == sorted(
        p.name for p in one_process(name)[0].iterdir()
    )


@pytest.mark.parametrize("name", ["adam", "adam lora", "adam offloaded", "adam bf16"])
def test_a_resumed_sharded_run_is_the_same_run(two_ranks, name):
    whole, again = two_ranks[name], two_ranks[f"{name} again"]
    ours, theirs = saved_weights(again), saved_weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_metrics(again) == read_metrics(whole)
    assert [path.name for path in complete_checkpoints(again)] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("name", ["adam", "adam lora", "adam offloaded"])
def test_clipped_adam_is_that_of_one_process(two_ranks, one_process, name):
    sharded, alone = read_metrics(two_ranks[name]), read_metrics(one_process(name)[0])
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert worst_error(saved_weights(two_ranks[name]), saved_weights(one_process(name)[0])) <= 1e-3


@pytest.mark.parametrize("name", ["adam", "adam lora", "adam offloaded"])
def test_one_process_resumes_what_two_ranks_began(two_ranks, cases, tmp_path, name):
    """The optimizer state is resharded, and the order of records does not depend on the ranks."""
    settings = cases[name][0] | {"output_dir": str(tmp_path / "run"), "resume": True}
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.parent.mkdir()
    (two_ranks[name] / "checkpoint-3").rename(checkpoint)
    train(RunConfig(**settings))
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(two_ranks[name])
    assert [line["step"] for line in ours] == [4, 6, 6]
    for mine, whole in zip(ours, theirs[2:], strict=True):
        assert mine == pytest.approx(whole, rel=1e-3, abs=1e-4)
    assert worst_error(saved_weights(tmp_path / "run"), saved_weights(two_ranks[name])) <= 1e-3


@pytest.mark.parametrize("name", ["bf16", "bf16 master", "bf16 lora"])
def test_sharded_bf16(two_ranks, one_process, name):
    seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    assert seen["dtypes"] == [str(dtype)]
    assert {tensor.dtype for tensor in saved_weights(two_ranks[name]).values()} == {dtype}
    norms = [
        [line["grad_norm"] for line in read_metrics(out) if "grad_norm" in line]
        for out in (two_ranks[name], one_process(name)[0])
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    losses = [
        [line[key] for line in read_metrics(out) for key in line if "loss" in key]
        for out in (two_ranks[name], one_process(name)[0])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and len(losses[0]) == 3


@pytest.mark.slow
def test_sharded_moments_in_8_bits(llamas, tmp_path):
    """torchao's states are DTensors of 8 bits: they step, resume exactly, and are resharded."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llamas["untied"])
    model.resize_token_embeddings(512)  # of 32 numbers: 8192 on each of two ranks
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llamas["untied"]).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", make_records("mixed", 24))
    settings = {
        "model": str(tmp_path / "model"),
        "data": data,
        **ADAM,
        **QUIET,
        "precision": "bf16",
        "save_every": 2,
    }
    settings |= {"optimizer": "adamw_8bit", "max_steps": 4}
    whole, again = (settings | {"output_dir": str(tmp_path / name)} for name in ("whole", "again"))
    todo = {"whole": {"config": whole}, "again": {"config": again, "die_at": 4}}
    run_two_ranks(todo | {"again, resumed": {"config": again | {"resume": True}}}, tmp_path)
    ours, theirs = saved_weights(tmp_path / "again"), saved_weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_metrics(tmp_path / "again") == read_metrics(tmp_path / "whole")

    (tmp_path / "alone").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "alone" / "checkpoint-2")
    train(RunConfig(**settings | {"output_dir": str(tmp_path / "alone"), "resume": True}))
    (mine,) = read_metrics(tmp_path / "alone")
    assert mine["loss"] == pytest.approx(read_metrics(tmp_path / "whole")[-1]["loss"], abs=0.02)


def test_the_command_line_runs_on_two_ranks(two_ranks):
    assert len(read_metrics(two_ranks["cli"])) == 3
    assert read_metrics(two_ranks["cli"])[0] == read_metrics(two_ranks["adam"])[0]
    log = (two_ranks["cli"].parents[1] / "log").read_text()
    assert log.count('{"output_dir"') == 1, "one rank reports"
