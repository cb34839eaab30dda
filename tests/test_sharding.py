"""Two ranks are one process: records of a step, gradients, metrics, checkpoints, saved models."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_worker import run_case
from ranks import metrics_of, run_cases, saved_weights, worst_error
from tiny import make_records, read_metrics, write_jsonl
from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.data.loader import Loader, hold_out, mixture_order, num_steps
from una_fast.feedback import Feedback
from una_fast.train.checkpoint import complete_checkpoints, read_manifest

# ---- records of a step ----


def example(number: int) -> Example:
    ids = np.full(1 + number % 3, number, dtype=np.int32)
    units = number % 4 + 1
    feedback = Feedback.scores(range(units), [0.5] * units)
    return Example(ids, (ids,) * units, feedback, None, f"x.jsonl:{number}")


def loaders(count: int, weights=(1.0,), world_size: int = 1, **options) -> list[Loader]:
    """Build the loaders of all ranks over `count` examples, split evenly into sources."""
    sources = np.array_split(np.arange(count), len(weights))
    examples = [list(map(example, source.tolist())) for source in sources]
    limits = {"micro_batch_size": 2, "max_tokens_per_batch": None, "packed": True}
    options = {"batch_size": 6, "seed": 3, "world_size": world_size, **limits} | options
    return [Loader(examples, weights, rank=rank, **options) for rank in range(world_size)]


def origins(step) -> list[list[str]]:
    """Return the origins of the records of a step, by micro-batch."""
    return [[e.origin for e in micro_batch] for micro_batch in step.micro_batches]


def flat(step) -> list[str]:
    return list(chain.from_iterable(origins(step)))


def number_of(origin: str) -> int:
    return int(origin.split(":")[1])


def test_ranks_share_the_global_batch():
    """For all sizes; an epoch may end in a short batch, and a rank may have no record of a step."""
    sizes = [(13, 6), (12, 6), (1, 4), (7, 1), (5, 20)]
    for (count, batch_size), micro, world_size in itertools.product(sizes, (1, 2, 4), (1, 2, 3, 5)):
        case = f"{count=} {batch_size=} {micro=} {world_size=}"
        options = {"batch_size": batch_size, "micro_batch_size": micro}
        (whole,) = loaders(count, **options)
        ranks = loaders(count, world_size=world_size, **options)
        total = num_steps(whole.steps_per_epoch, 2, None)
        assert total == 2 * -(-count // batch_size), case
        walks = [loader.steps(0, total) for loader in [whole, *ranks]]
        for alone, *steps in zip(*walks, strict=True):
            counts = {len(step.micro_batches) for step in steps}
            assert len(counts) == 1, f"ranks would wait for each other: {case}"
            for micro_batch in chain.from_iterable(step.micro_batches for step in steps):
                assert len(micro_batch) <= micro, case
            batch = sorted(flat(alone))
            assert sorted(chain.from_iterable(map(flat, steps))) == batch, case
            assert {step.num_units for step in steps} == {alone.num_units}, case
            units = sum(number_of(origin) % 4 + 1 for origin in batch)
            assert alone.num_units == units, case
            assert {step.epoch for step in steps} == {alone.epoch}, case


@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_steps_are_the_steps(rank):
    """From any step on, over the ends of epochs, in a loader that never made the first steps."""
    options = {"weights": (1.0, 1.5), "world_size": 2}
    steps = [origins(step) for step in loaders(20, **options)[rank].steps(0, 13)]
    for first in range(13):
        resumed = loaders(20, **options)[rank].steps(first, 13)
        assert [origins(step) for step in resumed] == steps[first:], first
    # another epoch, another order: 10 + 15 records make 5 steps of 6
    assert steps[:5] != steps[5:10]


def test_an_epoch_sees_every_source_by_its_weight():
    (loader,) = loaders(20, weights=(2.0, 0.3), batch_size=7)
    assert loader.steps_per_epoch == 4  # 20 + 3 records
    seen = sorted(number_of(origin) for step in loader.steps(0, 4) for origin in flat(step))
    assert len(seen) == 23
    assert seen[:20] == sorted([*range(10)] * 2)
    assert len(set(seen[20:])) <= 3
    assert seen == sorted(mixture_order([10, 10], [2.0, 0.3], seed=3, epoch=0).tolist())


def test_fractional_epochs_and_max_steps():
    (loader,) = loaders(60)
    assert loader.steps_per_epoch == 10
    assert num_steps(10, 1.1, None) == 11  # 1.1 * 10 is 11.000000000000002
    assert num_steps(10, 0.05, None) == 1
    assert num_steps(10, 2, 7) == 7
    assert num_steps(10, 0.5, 7) == 5


def test_evaluation_sees_every_example_once():
    ranks = [list(loader.in_order()) for loader in loaders(13, world_size=2)]
    assert len(ranks[0]) == len(ranks[1]) == 3
    for mine, theirs in zip(*ranks, strict=True):
        assert len(mine.micro_batches) == len(theirs.micro_batches)
    seen = chain.from_iterable(map(flat, chain(*ranks)))
    assert sorted(seen) == sorted(f"x.jsonl:{number}" for number in range(13))


def test_held_out_examples_are_a_split():
    examples = [example(number) for number in range(30)]
    kept, held = hold_out(examples, 0.1, seed=1)
    assert len(held) == 3
    assert sorted(e.origin for e in kept + held) == sorted(e.origin for e in examples)
    assert hold_out(examples, 0.1, seed=1) == (kept, held)
    assert [e.origin for e in held] != [e.origin for e in hold_out(examples, 0.1, seed=2)[1]]


def test_identity_of_the_data():
    (one,), (two,) = loaders(20), loaders(20)
    assert one.identity() == two.identity() != loaders(19)[0].identity()
    (even,) = loaders(20, weights=(1.0, 1.0))
    (uneven,) = loaders(20, weights=(1.0, 2.0))
    assert even.identity() != uneven.identity()
    assert loaders(20, world_size=2)[1].identity() == one.identity()
    two.examples[4] = example(8)
    assert one.identity() != two.identity()


# ---- FSDP2 ----

QUIET = {"progress": False, "write_report": False, "loggers": [], "device": "cpu"}
STEPS = 6
SGD = {
    **QUIET,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": None,
    "beta": 0.2,
    "batch_size": 5,
    "micro_batch_size": 2,
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
}
# saved within a window of the log; a run that dies in step 5 has lost step 4
ADAM = {
    **QUIET,
    "learning_rate": 3e-3,
    "batch_size": 6,
    "micro_batch_size": 2,
    "max_steps": 5,
    "log_every": 2,
    "save_every": 3,
}
DIE_AT = 5
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
LORA = {"lora": {"r": 4, "alpha": 8}}
SWITCHES = {"mlp_tile": 7, "gradient_checkpointing": True, "offload_activations": True}
PARALLEL = {"reduce": "last", "offload_parameters": True, "prefetch": 2}
SPLIT = {"split_vocabulary": True}
# one or two of the records; some are longer
TOKENS = {"micro_batch_size": None, "max_tokens_per_batch": 60}

# Cases with the gradients of one process: plain; a tied embedding, padded rows, recomputed layers;
# tiled MLPs with gradients of weights, and of adapters alone; micro-batches counted in tokens;
# gradients that cross ranks once a step, shards on the host, layers gathered ahead.
# Also with a split vocabulary, of a trained and of a frozen head.
SAME = ("untied", "tied", "switches", "lora switches", "tokens", "parallel", "split", "split lora")
CLIPPED = ("adam", "adam lora offloaded", "adam split")
RESUMED = (*CLIPPED, "adam bf16", "adam 8 bits")
TRAINED = {
    "tied": 20,
    "lora switches": 28,
    "split lora": 28,
}  # tensors with a gradient; 21 in other cases


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def cases(llamas, root):
    """{name: settings without output_dir}"""
    # Steps of 5 records, 3 on one rank and 2 on the other, and a step of a single record, which
    # leaves a rank without any. Units differ by record.
    records = make_records("mixed", 5 * (STEPS - 1) + 1)
    data = {
        "data": write_jsonl(root / "many.jsonl", records),
        "eval_data": write_jsonl(root / "eval.jsonl", make_records("mixed", 7, seed=5)),
    }
    untied = {"model": llamas["untied"], **data}
    tied = {"model": llamas["tied"], **data}
    bf16 = {"precision": "bf16"}
    two_steps = {"max_steps": 2}
    cases = {
        "untied": untied | SGD,
        "tied": tied | SGD | {"packing": False, "gradient_checkpointing": True},
        "switches": untied | SGD | SWITCHES,
        "lora switches": untied | SGD | LORA | SWITCHES,
        "tokens": untied | SGD | TOKENS,
        "parallel": untied | SGD | {"parallel": PARALLEL, "micro_batch_size": 1},
        "split": untied | SGD | {"parallel": PARALLEL | SPLIT},
        "split lora": untied | SGD | LORA | {"parallel": SPLIT},
        "adam split": untied | ADAM | {"parallel": SPLIT},
        "bf16 master split": untied
        | ADAM
        | bf16
        | {"master_weights": True, "parallel": SPLIT}
        | two_steps,
        "adam": tied | ADAM,
        "adam lora offloaded": untied | ADAM | LORA | {"offload_optimizer": True},
        "adam bf16": tied | ADAM | bf16,
        "bf16 master": tied | ADAM | bf16 | {"master_weights": True} | two_steps,
        "bf16 lora": untied | ADAM | LORA | bf16 | two_steps,
    }
    if HAS_TORCHAO:
        wide = {"model": save_wider(llamas["untied"], root / "wide")}
        cases["adam 8 bits"] = untied | wide | ADAM | bf16 | {"optimizer": "adamw_8bit"}
    return cases


def save_wider(model: str, directory: Path) -> str:
    """Save a model with a vocabulary of 512: 8192 weights of the head on each of two ranks.

    torchao leaves parameters below 4096 weights in fp32.
    """
    wide = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    wide.resize_token_embeddings(512)
    wide.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def two_ranks(cases, root):
    """Output directories of all cases, run by two ranks of one launch; and the output of both."""
    todo = {}

    def add(name: str, settings: dict, die_at: int | None = None, **more: int) -> None:
        settings = settings | {"output_dir": str(root / "two" / name)}
        todo[name] = {"config": settings, "die_at": die_at, **more}
        if die_at:
            todo[f"{name}, resumed"] = {"config": settings | {"resume": True}, **more}

    for name, settings in cases.items():
        add(name, settings)
    for name in RESUMED:
        if name in cases:
            add(f"{name} again", cases[name], DIE_AT)
    in_background = {"save_async": True}
    add("files", cases["adam"] | in_background, DIE_AT, file_bytes=20_000)
    settings = cases["adam"] | {"output_dir": str(root / "two" / "cli"), "max_steps": 2}
    RunConfig(**settings).save(root / "cli.yaml")
    todo["cli"] = {"argv": ["train", "--config", str(root / "cli.yaml")]}
    output = run_cases(todo, root, 2)
    return {name: root / "two" / name for name in todo} | {"output": output}


@pytest.fixture(scope="module")
def one_process(cases, root):
    """(output directory, record of the run) of a case in this process, made once."""
    made = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in made:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            out = root / "one" / name
            settings = cases[name] | {"output_dir": str(out), "parallel": None}
            made[name] = out, run_case(settings)
            torch.set_num_threads(threads)
        return made[name]

    return get


@pytest.mark.parametrize("name", SAME)
def test_every_gradient_is_that_of_one_process(two_ranks, one_process, name):
    _, expected = one_process(name)
    seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
    assert len(seen["gradients"]) == len(expected["gradients"]) == STEPS
    assert len(seen["gradients"][0]) == TRAINED.get(name, 21)
    for step, (ours, theirs) in enumerate(
        zip(seen["gradients"], expected["gradients"], strict=True), start=1
    ):
        assert worst_error(ours, theirs) <= 1e-5, f"step {step}"
    assert seen["dtypes"] == ["torch.float32"]


def test_every_rank_read_its_own_rows(two_ranks, cases):
    """Of the policy, and of the frozen reference where there is one."""
    for name, settings in cases.items():
        seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
        assert seen["in_shards"] == (1 if "lora" in settings else 2), name


@pytest.mark.parametrize("name", SAME)
def test_every_metric_is_that_of_one_process(two_ranks, one_process, name):
    sharded, alone = metrics_of(two_ranks[name]), metrics_of(one_process(name)[0])
    assert len(sharded) == len(alone)
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        if "grad_norm" in ours:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    assert "eval_loss" in sharded[0]
    assert sharded[0] == pytest.approx(alone[0], rel=1e-6, abs=1e-9)
    assert len({line["units"] for line in alone if "units" in line}) > 1, "steps differ in units"


@pytest.mark.parametrize("name", SAME)
def test_the_saved_model_is_that_of_one_process(two_ranks, one_process, name):
    ours, theirs = two_ranks[name], one_process(name)[0]
    assert worst_error(saved_weights(ours), saved_weights(theirs)) <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(ours)
    assert model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=2, do_sample=False).shape[1] > 3
    files = {path.name for path in ours.iterdir()} - {"seen.pt"}
    assert files == {path.name for path in theirs.iterdir()}


def require(name: str) -> None:
    if name == "adam 8 bits" and not HAS_TORCHAO:
        pytest.skip("needs torchao")


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_sharded_run_is_the_same_run(two_ranks, name):
    require(name)
    whole, again = two_ranks[name], two_ranks[f"{name} again"]
    ours, theirs = saved_weights(again), saved_weights(whole)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
    assert read_metrics(again) == read_metrics(whole)
    assert [path.name for path in complete_checkpoints(again)] == ["checkpoint-3"]


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_adam_is_that_of_one_process(two_ranks, one_process, name):
    sharded, alone = two_ranks[name], one_process(name)[0]
    for ours, theirs in zip(metrics_of(sharded), metrics_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert worst_error(saved_weights(sharded), saved_weights(alone)) <= 1e-3


@pytest.mark.parametrize("name", [*CLIPPED, "adam 8 bits"])
def test_one_process_resumes_what_two_ranks_began(two_ranks, cases, tmp_path, name):
    """The optimizer state is resharded, and the order of records does not depend on the ranks.

    Moments of 8 bits are DTensors, in blocks that differ by the sharding: their steps are near.
    """
    require(name)
    run = tmp_path / "run"
    shutil.copytree(two_ranks[name] / "checkpoint-3", run / "checkpoint-3")
    run_case(cases[name] | {"output_dir": str(run), "resume": True, "parallel": None})
    ours, theirs = read_metrics(run), read_metrics(two_ranks[name])
    assert [line["step"] for line in theirs] == [0, 2, 4, 5, 5]
    assert ours[:2] == theirs[:2], "the checkpoint brings the metrics before it"
    assert [line["step"] for line in ours[2:]] == [4, 5, 5]
    if name == "adam 8 bits":
        assert ours[2]["loss"] == pytest.approx(theirs[2]["loss"], abs=0.02)
        return
    for mine, whole in zip(ours[2:], theirs[2:], strict=True):
        assert mine == pytest.approx(whole, rel=1e-3, abs=1e-4)
    assert worst_error(saved_weights(run), saved_weights(two_ranks[name])) <= 1e-3


def test_ranks_save_files_of_their_own(two_ranks):
    """The weights of a single file, tied ones once; and a run resumes from several files."""
    whole, several = two_ranks["adam"], two_ranks["files"]
    files = {path.name for path in several.glob("*.safetensors")}
    assert "model-00001-of-00005.safetensors" in files
    assert len(files) == 5
    assert len(set((several / "checkpoint-3").glob("*.safetensors"))) == 5
    weights = {}
    for name in files:
        weights |= load_file(several / name)
    expected = saved_weights(whole)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
    assert read_metrics(several) == read_metrics(whole)
    ours, theirs = map(AutoModelForCausalLM.from_pretrained, (several, whole))
    left, right = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left | right)
    settings = {"config.json", "generation_config.json"}
    assert all((several / name).read_text() == (whole / name).read_text() for name in settings)
    others = {path.name for path in whole.iterdir()} - {"model.safetensors"}
    index = {"model.safetensors.index.json"}
    assert {path.name for path in several.iterdir()} == others | files | index
    assert [path.name for path in complete_checkpoints(several)] == ["checkpoint-3"]
    assert read_manifest(several / "checkpoint-3").verify(several / "checkpoint-3") is None


@pytest.mark.parametrize("name", ["adam bf16", "bf16 master", "bf16 lora", "bf16 master split"])
def test_sharded_bf16(two_ranks, one_process, name):
    """Dtypes, and the numbers of the first two steps: later ones hang on the noise of rounding."""
    seen = torch.load(two_ranks[name] / "seen.pt", weights_only=True)
    dtype = torch.bfloat16 if name == "adam bf16" else torch.float32
    assert seen["dtypes"] == [str(dtype)]
    files = {tensor.dtype for tensor in saved_weights(two_ranks[name]).values()}
    assert files == {torch.float32}, "the final model is in the dtype that the model came in"
    sharded, alone = read_metrics(two_ranks[name])[:2], read_metrics(one_process(name)[0])[:2]
    assert [line["step"] for line in sharded] == [0, 2]
    assert sharded[1]["grad_norm"] == pytest.approx(alone[1]["grad_norm"], rel=0.05)
    assert sharded[1]["loss"] == pytest.approx(alone[1]["loss"], abs=0.02)
    assert sharded[0]["eval_loss"] == pytest.approx(alone[0]["eval_loss"], abs=0.02)


def test_the_command_line_runs_on_two_ranks(two_ranks):
    assert len(read_metrics(two_ranks["cli"])) == 3
    assert read_metrics(two_ranks["cli"])[0] == read_metrics(two_ranks["adam"])[0]
    assert two_ranks["output"].count('{"output_dir"') == 1, "one rank reports"
