"""On a CUDA device: steps take the planned memory, and data moved beside a step arrives."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runs import metered
from tiny import make_config, make_records, make_tokenizer, write_jsonl
from una_fast.capacity.trace import Row, StepTracer
from una_fast.data.loader import Step
from una_fast.distributed import start_world
from una_fast.losses import Objective
from una_fast.train.build import build_run, open_run
from una_fast.train.loop import Trainer, train
from una_fast.train.measure import measured_peak
from una_fast.train.metrics import NAMES, Meter
from una_fast.train.run_data import RunData

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def llama_200m(tmp_path_factory):
    """A Llama of 200 M weights on disk, large enough for allocator roundings not to show."""
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory), tokenizer


MEMORY_SETTINGS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "offload": {"gradient_checkpointing": True, "offload_activations": True, "mlp_tile": 2048},
    "lora": {"lora": {"r": 16, "alpha": 16}, "gradient_checkpointing": True, "mlp_tile": 2048},
    "host optimizer": {"gradient_checkpointing": True, "offload_optimizer": True},
    "masters": {"gradient_checkpointing": True, "master_weights": True},
}


def open_trainer(directory, tokenizer, output_dir, batch, **changes):
    settings = {
        "device": "cuda",
        "batch_size": 1,
        "workspace_mb": 256,
        "learning_rate": 1e-4,
        "max_grad_norm": None,
    }
    config = make_config(directory, ["unread.jsonl"], output_dir, **settings | changes)
    output_dir.mkdir()
    torch.manual_seed(0)
    data = RunData([batch], [1.0])
    opened = open_run(config, start_world("cuda"), data)
    return config, Trainer(build_run(opened, tokenizer), Path(config.output_dir))


@pytest.mark.parametrize("name", MEMORY_SETTINGS)
def test_the_plan_of_a_step_is_within_a_tenth_of_what_is_allocated(name, llama_200m, tmp_path):
    batch = [Row(12000, (1000, 1500)).example()]
    before = torch.cuda.memory_allocated()
    config, trainer = open_trainer(*llama_200m, tmp_path / "run", batch, **MEMORY_SETTINGS[name])
    measured = measured_peak(trainer, batch) - before
    planned = StepTracer(config).step(batch)
    assert planned.peak == pytest.approx(measured, rel=0.1), planned.parts


@pytest.mark.parametrize("name", ["offload", "host optimizer"])
def test_what_travels_beside_the_computation_arrives(name, llama_200m, tmp_path):
    """Copies on separate streams are awaited: three steps give a plain run's numbers.

    To within ten times the difference of two plain runs: the backward of flash attention adds with
    atomics, so that a run does not repeat itself bitwise.
    """
    batch = [Row(3000, (500, 700)).example()]
    on = MEMORY_SETTINGS[name]
    off = {**on, "offload_activations": False}
    if name == "host optimizer":  # the moments of fp32 weights on the device, by torch's own
        on, off = (
            on | {"master_weights": True},
            {"gradient_checkpointing": True, "master_weights": True},
        )
    norms = []
    for number, changes in enumerate((on, off, off)):
        _, trainer = open_trainer(*llama_200m, tmp_path / f"run{number}", batch, **changes)
        norms.append([trainer.take_step(Step(0.0, [batch], 1))["grad_norm"] for _ in range(3)])
    moved, plain, repeat = norms
    repeats = [abs(a - b) / b for a, b in zip(repeat, plain, strict=True)]
    least = 1e-7 if name == "offload" else 1e-5  # the host's optimizer rounds in another order
    assert moved == pytest.approx(plain, rel=max(least, 10 * max(repeats)))


def test_the_meter_does_not_wait_for_the_device():
    batch, out = metered("cuda")
    meter = Meter(Objective(), torch.device("cuda"))
    meter.add(batch, out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add(batch, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.sums[NAMES.index("units")].item() == 2 * batch.feedback.num_units


def test_a_packed_step_waits_for_its_gradient_norm_alone(llama_200m, tmp_path):
    batch = [Row(300, (50, 70)).example()]
    _, trainer = open_trainer(*llama_200m, tmp_path / "run", batch)
    trainer.take_step(Step(0.0, [batch], 1))  # the first one fills caches
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.take_step(Step(0.0, [batch], 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.filename) for each in found if "synchronizing" in str(each.message)]
    assert len(waits) <= 1, waits


def test_liger_computes_what_the_model_does(llama_200m, tmp_path):
    pytest.importorskip("liger_kernel")
    batch = [Row(300, (50, 70)).example()]
    norms = []
    for number, liger in enumerate(
        (False, True)
    ):  # in this order: liger patches the family for the whole process
        _, trainer = open_trainer(
            *llama_200m, tmp_path / f"run{number}", batch, liger=liger, mlp_tile=100
        )
        norms.append(trainer.take_step(Step(0.0, [batch], 1))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 8}}], ids=["full", "lora"])
@pytest.mark.parametrize("generation", ["padded", "continuous"])
def test_an_online_run_samples_from_its_policy(generation, settings, llama_200m, tmp_path):
    """Sampler and packed step differ by rounding alone in bf16: the KL starts near 0."""
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in make_records("scores", 16)]
    )
    reward = f"{Path(__file__).with_name('reward_functions.py')}:length"
    config = make_config(
        *(llama_200m[0], prompts, tmp_path / "run"),
        **{
            "mode": "online",
            "rewards": [reward],
            "generation": generation,
            "device": "cuda",
            "max_steps": 3,
        },
        **{
            "batch_size": 8,
            "max_tokens_per_batch": 4096,
            "max_new_tokens": 32,
            "learning_rate": 1e-5,
            **settings,
        },
    )
    train(config)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert abs(lines[0]["kl"]) < 0.5 and lines[-1]["completions/skipped"] == 0
