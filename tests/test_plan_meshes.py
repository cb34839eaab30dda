"""The plan of a mesh is what its ranks take and send; meshes of a number of ranks are compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import transformers

from tiny import make_config, make_tokenizer
from two_ranks import torchrun
from una_fast.capacity.trace import Row, StepTracer
from una_fast.config import RunConfig
from una_fast.resolved import find_facts

WORKER = Path(__file__).with_name("plan_ranks.py")

SMALL = {
    "vocab_size": 1500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
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
        **SMALL | {"num_hidden_layers": 2},
        head_dim=16,
        sliding_window=100,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deep": transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 8, "vocab_size": 300}),
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
    Case("llama", 2, {"reduce": "last"}, {"packing": False}, accumulate=True),
    Case("deep", 2, {"reduce": "each"}, LORA | BF16, accumulate=True),
    Case("tied", 2, {"replicate": 2}, {"optimizer": "sgd"}, records=2),
    Case("qwen3", 2, {"offload_parameters": True}, LORA, row=(300, [90]), accumulate=True),
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
    torchrun(WORKER, root / "cases.json", root / "log", ranks=4)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in cases}


def planner(case: Case, models) -> StepTracer:
    config = settings(case, models[case.model], Path("out"))
    return StepTracer(config, find_facts(config, [], device="cpu", ranks=case.ranks))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_of_a_mesh_is_what_a_rank_takes(case, models, measured):
    batch = [Row(case.row[0], tuple(case.row[1])).example()] * case.records
    step = planner(case, models).step(batch, accumulate=case.accumulate)
    peaks = [rank["peak"] for rank in measured[case.name]]
    assert step.peak == pytest.approx(max(peaks), rel=0.1)
