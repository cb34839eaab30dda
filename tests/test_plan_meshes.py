"""The plan of a mesh is what its ranks take and send; meshes of a number of ranks are compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

from ranks import run_ranks
from tiny import make_config, make_tokenizer
from una_fast.capacity.fit import GIB, usable
from una_fast.capacity.meshes import MeshPlan, best_mesh, meshes_of
from una_fast.capacity.run_plan import mesh_lines
from una_fast.capacity.trace import Row, StepMemory, StepTracer
from una_fast.cli import main
from una_fast.config import RunConfig
from una_fast.parallel import Mesh, ParallelOptions
from una_fast.resolved import find_facts

SMALL = {
    "vocab_size": 1500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "max_position_embeddings": 4096,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "tied": transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    # Odd sizes: shards with padding.
    "qwen3": transformers.Qwen3Config(
        **SMALL | {"vocab_size": 1501, "intermediate_size": 150}, head_dim=16
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=100,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deep": transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 7, "vocab_size": 300}),
}
LORA = {"lora": {"r": 4, "alpha": 8}}
CHECKPOINTING = {"gradient_checkpointing": True}
BF16 = {"precision": "bf16"}


@dataclass
class Case:
    """A step to plan and to take."""

    model: str
    ranks: int
    parallel: dict
    settings: dict = field(default_factory=dict)
    row: tuple[int, list[int]] = (120, [60, 50])
    records: int = 1
    accumulate: bool = False

    @property
    def name(self) -> str:
        switches = [*self.parallel, *self.settings]
        return f"{self.model}-{self.ranks}-" + "-".join(switches) + "-2" * self.accumulate


CASES = [
    Case("llama", 4, {}),
    Case("llama", 4, {"replicate": 2}, {"reference": "frozen"}, accumulate=True),
    Case("qwen3", 4, {"reduce": "last"}, CHECKPOINTING, accumulate=True),
    Case("tied", 4, {"offload_parameters": True}, CHECKPOINTING | {"mlp_tile": 64}),
    Case("gemma3", 4, {"replicate": 2}, BF16 | CHECKPOINTING | {"master_weights": True}),
    Case("llama", 4, {"replicate": 2}, LORA | CHECKPOINTING, accumulate=True),
    Case("deep", 4, {"prefetch": 1}, BF16 | CHECKPOINTING),
    Case("deep", 4, {"split_vocabulary": True, "context": 2}, BF16),
    # More ranks than key heads: these are copied.
    Case("llama", 4, {"context": 4, "reduce": "last"}, BF16, accumulate=True),
    Case("qwen3", 2, {"context": 2}, LORA | CHECKPOINTING, row=(331, [90])),
    Case("qwen3", 2, {"split_vocabulary": True}, LORA | BF16),
    Case("gemma3", 2, {}, {"packing": False}, records=3, accumulate=True),
]


def settings(case: Case, model: str, output_dir: Path) -> RunConfig:
    rest = {"batch_size": 64, "workspace_mb": 2, "parallel": case.parallel, **case.settings}
    return make_config(model, ["unread.jsonl"], output_dir, **rest)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name, config in MODELS.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """Name of a case -> peak and bytes sent of every rank, of steps that were taken."""
    root = tmp_path_factory.mktemp("measured")
    cases = {}
    for case in CASES:
        config = settings(case, models[case.model], root / f"run-{case.name}")
        cases[case.name] = {
            "ranks": case.ranks,
            "settings": config.shareable(),
            "rows": [case.row] * case.records,
            "accumulate": case.accumulate,
        }
    (root / "cases.json").write_text(json.dumps(cases))
    run_ranks("plan_ranks", root / "cases.json", root / "log", 4)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in cases}


def planner(case: Case, models) -> StepTracer:
    config = settings(case, models[case.model], Path("out"))
    return StepTracer(config, find_facts(config, [], device="cpu", ranks=case.ranks))


def test_the_cases_cover_the_settings():
    given = set()
    for case in CASES:
        given.update(case.parallel, case.settings)
    names = {one.name for one in fields(ParallelOptions)}
    assert names - given == {"shard"}
    assert {"lora", "packing", "reference", "gradient_checkpointing", "precision"} <= given


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_of_a_mesh_is_what_a_rank_takes_and_sends(case, models, measured):
    batch = [Row(case.row[0], tuple(case.row[1])).example()] * case.records
    step = planner(case, models).step(batch, accumulate=case.accumulate)
    peaks = [rank["peak"] for rank in measured[case.name]]
    # A rank that waits for a slow one lets gradients go later, on a busy machine.
    assert 0.9 * min(peaks) <= step.peak <= 1.1 * max(peaks), peaks
    sent = step.sent(2 if case.accumulate else 1)
    measured_sent = {name: size for name, size in measured[case.name][0]["sent"].items() if size}
    assert sent == pytest.approx(measured_sent, rel=1e-6)


# --- meshes beside each other ---


def test_the_meshes_of_some_ranks_divide_ranks_and_heads():
    found = {str(mesh) for mesh in meshes_of(8, 12, packed=True)}
    assert len(found) == 9 and "replicate 2 x context 4" in found
    assert not any("context 8" in name for name in found), "12 heads"
    assert all(mesh.ranks == 8 for mesh in meshes_of(8, 12, packed=True))
    assert {mesh.context for mesh in meshes_of(6, 12, packed=False)} == {1}


def a_plan(mesh: Mesh, peak: int, sent: float, longest: int) -> MeshPlan:
    step = StepMemory({"forward": {"layer": peak}}, 0, 0.0, 10, True, 1, sent_last={"x": sent})
    return MeshPlan(mesh, step, 1, 10.0 * mesh.ranks, longest)


def test_the_best_mesh_fits_and_sends_least():
    plans = [
        a_plan(Mesh(4, 1, 1), 100, 1.0, 3),
        a_plan(Mesh(2, 2, 1), 60, 100.0, 5),
        a_plan(Mesh(1, 4, 1), 40, 100.0, 7),
        a_plan(Mesh(1, 1, 4), 20, 200.0, 20),
    ]
    assert best_mesh(plans, None) is plans[0]
    assert best_mesh(plans, 70) is plans[2], "of equal bytes the longer row"
    assert best_mesh(plans, 30) is plans[3] and best_mesh(plans, 10) is plans[3]
    text = "\n".join(mesh_lines([*plans, (Mesh(1, 2, 2), "a reason")], 70))
    assert "shard 4: of the meshes that fit" in text and "shard 2 x context 2: a reason" in text
    assert "none fits; context 4 needs least" in "\n".join(mesh_lines(plans, 10))


def test_the_command_compares_meshes(models, capsys):
    words = ["--prompt", "900", "--responses", "[60, 60]", "--world_size", "2", "--batch_size", "2"]
    flags = ["--meshes", "true", "--memory_gib", "0.03", "--device", "cpu", "--workspace_mb", "1"]
    assert main(["plan", "--model", models["llama"], *words, *flags]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line.split("  ")[0] for line in table[1:4]] == ["shard 2", "replicate 2", "context 2"]
    assert "best " in table[4] and "all-gather: weights" in text and "by a rank in a step" in text
    assert "parallel.split_vocabulary" in text
    longest = [int(line.split("about ")[1].split()[0].replace(",", "")) for line in table[1:4]]
    # A row of the longest length takes about what may be filled.
    config = make_config(models["llama"], ["x"], "out", batch_size=2, workspace_mb=1)
    config.parallel = ParallelOptions(context=2)
    tracer = StepTracer(config, find_facts(config, [], device="cpu", ranks=2))
    row = Row(900, (60, 60)).scaled(longest[2] / 1020)
    room = usable(int(0.03 * GIB), "cpu")
    assert tracer.step([row.example()], accumulate=True).peak == pytest.approx(room, rel=0.15)
    assert longest[2] > longest[0] > longest[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--meshes", "true"], "set world_size too"),
        (["--parallel.shard", "3", "--world_size", "2"], "and the run has 2"),
    ],
)
def test_plan_refuses(flags, message, models, capsys):
    row = ["--prompt", "5", "--responses", "[5]"]
    assert main(["plan", "--model", models["llama"], *row, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_real_group_waits_while_a_rank_is_planned(models):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        state = dist.distributed_c10d._world
        names = dict(state.pg_names), state.group_count
        planner(CASES[0], models).step([Row(9, (4,)).example()])
        assert (dict(state.pg_names), state.group_count) == names
        assert dist.get_world_size() == 1
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()


def test_a_mesh_of_many_layers_is_planned_from_few(models):
    """Time grows with traced layers: 32 layers cost what 8 do."""
    config = settings(CASES[1], models["deep"], Path("out"))
    whole = StepTracer(config, find_facts(config, [], device="cuda", ranks=4))
    assert whole.step([Row(40, (9, 9)).example()], accumulate=True).traced == 6
