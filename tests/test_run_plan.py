"""The plan of a run is what the run then takes, and a run that cannot fit is refused by the name of a switch."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tiny import make_config, make_records, make_tokenizer, write_jsonl

import una_fast.model.activations as memory_module
from una_fast.attention.rows import Segment, attended_pairs
from una_fast.capacity.fit import GIB, cheapest_way, largest_batch, longest_row, savings, usable
from una_fast.capacity.settings import RunPlanConfig
from una_fast.capacity.trace import PARTS, StepTracer, Row
from una_fast.cli import main
from una_fast.config import RunConfig
from una_fast.counters import FlopCounter, memory_category
from una_fast.data.batch import collate
from una_fast.data.loader import Step
from una_fast.distributed import start_world
from una_fast.model.lora import add_lora
from una_fast.model.settings import LoraOptions
from una_fast.optim import make_optimizer
from una_fast.train.loop import Trainer, train
from una_fast.train.measure import measured_peak
from una_fast.train.run_data import RunData

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
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=100,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=1500,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=4096,
        bos_token_id=0,
        eos_token_id=1,
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models; "config" and "deep" have no weights."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name, config in MODELS.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, layers in (("config", 2), ("deep", 9)):
        config = transformers.LlamaConfig(
            **SMALL | {"num_hidden_layers": layers}, architectures=["LlamaForCausalLM"]
        )
        config.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("records") / "pairs.jsonl", make_records("pairs", 6))


def settings(model, output_dir, **changes) -> RunConfig:
    changes = {"data": ["unread.jsonl"], "batch_size": 1, "workspace_mb": 4, **changes}
    return make_config(model, changes.pop("data"), Path(output_dir), **changes)


def measure(config: RunConfig, batch) -> int:
    Path(config.output_dir).mkdir(exist_ok=True)
    trainer = Trainer(config, start_world("cpu"), make_tokenizer(), RunData([batch], [1.0]))
    return measured_peak(trainer, batch)


def drawn(seed: int) -> tuple[str, Row, dict]:
    """A configuration: model, row, and settings."""
    rng = random.Random(seed)
    lora = rng.random() < 0.35
    changes = {
        "lora": LoraOptions(r=4, alpha=8) if lora else None,
        "precision": rng.choice(["fp32", "bf16"]),
        "gradient_checkpointing": rng.random() < 0.6,
        "workspace_mb": rng.choice([1.0, 4.0, 16.0]),
        "packing": rng.random() < 0.75,
        "mlp_tile": rng.choice([None, 200]),
        "reference": rng.choice(["auto", "frozen"]),
        "master_weights": not lora and rng.random() < 0.4,
        "offload_optimizer": not lora and rng.random() < 0.3,
        "optimizer": "adamw",
    }
    changes["offload_activations"] = changes["gradient_checkpointing"] and rng.random() < 0.5
    row = Row(
        rng.randint(100, 700), tuple(rng.randint(50, 200) for _ in range(rng.choice([1, 2, 2, 3])))
    )
    return sorted(MODELS)[seed % len(MODELS)], row, changes


SEEDS = range(16)


def test_the_drawn_configurations_cover_the_switches():
    on = Counter()
    for seed in SEEDS:
        model, row, changes = drawn(seed)
        on.update([model, len(row.responses), changes["precision"], changes["packing"]])
        on.update(name for name, value in changes.items() if value)
    wanted = {*MODELS, 1, 2, 3, "fp32", "bf16", False, "lora", "gradient_checkpointing", "mlp_tile"}
    assert not wanted - set(on)
    assert min(on[n] for n in ("offload_activations", "offload_optimizer", "master_weights")) >= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(seed, models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory_module, "SMALL", 1 << 10
    )  # the hidden states of tests are worth moving
    model, row, changes = drawn(seed)
    config = settings(models[model], tmp_path / "run", **changes)
    batch = [row.example()]
    step = StepTracer(config).step(batch)
    measured = measure(config, batch)
    assert step.peak == pytest.approx(measured, rel=0.1), (model, row, changes, step.parts)
    assert step.tokens == (
        row.tokens if step.packed else sum(row.prompt + n for n in row.responses)
    )
    assert set(step.parts) == set(PARTS) and min(step.parts.values()) >= 0


def test_a_scored_response_needs_its_own_row_alone(models, tmp_path):
    """No padded pair, no second response resident: half of the tokens of a pair where nothing is shared."""
    one, two = [Row(2, (400,)).example()], [Row(2, (400, 400)).example()]
    assert collate(one, packed=True).input_ids.numel() == 402
    assert collate(one, packed=False).input_ids.shape == (1, 402)
    peaks = [
        measure(settings(models["llama"], tmp_path / str(len(b[0].responses)), workspace_mb=1), b)
        for b in (one, two)
    ]
    fixed = 20 * StepTracer(settings(models["llama"], tmp_path)).parameters
    assert peaks[0] - fixed <= 0.6 * (peaks[1] - fixed)


def test_micro_batches_that_follow_the_first_hold_all_gradients(models, tmp_path):
    """A step of two batches: the second forward has every gradient beside it."""
    config = settings(models["llama"], tmp_path / "run", gradient_checkpointing=True, batch_size=2)
    batch = [Row(60, (20, 30)).example()]
    one, two = (StepTracer(config).step(batch, accumulate=more) for more in (False, True))
    Path(config.output_dir).mkdir()
    trainer = Trainer(config, start_world("cpu"), make_tokenizer(), RunData([batch * 2], [1.0]))
    assert two.peak == pytest.approx(measured_peak(trainer, batch, accumulate=True), rel=0.1)
    assert two.peak > one.peak


def test_flop_of_a_step_are_those_that_run(models, tmp_path):
    config = settings(models["llama"], tmp_path / "run", gradient_checkpointing=True, mlp_tile=128)
    row = Row(300, (100, 60))
    batch = [row.example()]
    planned = StepTracer(config).step(batch).flop
    Path(config.output_dir).mkdir()
    trainer = Trainer(config, start_world("cpu"), make_tokenizer(), RunData([batch], [1.0]))
    with FlopCounter() as counter:
        trainer.take_step(Step(0.0, [batch], 1))
    segments = (Segment((0, 300), ((300, 400), (400, 460))),)
    # Attention runs in the reference, in forward, again for backward, and there at 2.5 times the cost.
    attention = (
        5.5 * 4 * attended_pairs(segments) * SMALL["hidden_size"] * SMALL["num_hidden_layers"]
    )
    assert planned == pytest.approx(counter.flop + attention, rel=0.01)


def test_an_estimate_from_few_layers_is_the_whole_plan(models, tmp_path, monkeypatch):
    """Also where the peak of few layers is in another phase than that of many."""
    monkeypatch.setattr(memory_module, "SMALL", 1 << 10)
    planner = StepTracer(
        settings(models["deep"], tmp_path / "run", gradient_checkpointing=True), device="cuda"
    )
    for row, switches in (
        (Row(500, (100, 100)), {"offload_activations": True}),
        (Row(60, (10, 10)), {}),
    ):
        whole, estimate = (f([row.example()], **switches) for f in (planner.step, planner.estimate))
        assert estimate.peak == pytest.approx(whole.peak, rel=0.03)
        assert estimate.flop == pytest.approx(whole.flop, rel=0.02)


def test_a_plan_needs_no_weights_and_leaves_nothing_behind(models, tmp_path):
    planner = StepTracer(
        settings(models["config"], tmp_path / "run"), device="cuda"
    )  # there is none here
    batch = [Row(64, (16, 16)).example()]
    state = torch.get_rng_state()
    planner.step(batch)
    assert torch.equal(state, torch.get_rng_state())
    config = settings(models["llama"], tmp_path / "after")
    assert (
        measure(config, batch) > 0
    )  # packed attention runs on real tensors, with tables of its own


def test_offloaded_states_are_counted_on_the_host(models, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_module, "SMALL", 1 << 10)
    row = Row(400, (100,))
    on = {"gradient_checkpointing": True, "offload_activations": True, "offload_optimizer": True}
    planner = StepTracer(settings(models["config"], tmp_path / "run", **on), device="cuda")
    step = planner.step([row.example()])
    states = 2 * row.tokens * SMALL["hidden_size"] * 2
    assert step.host >= states + 12 * planner.parameters
    assert step.parts["optimizer"] == 0


def test_ranks_share_weights_gradients_and_state(models, tmp_path):
    config = settings(models["config"], tmp_path / "run")
    batch = [Row(640, (160, 160)).example()]
    one, four = (StepTracer(config, device="cuda", world_size=n).step(batch) for n in (1, 4))
    for name in ("weights", "optimizer"):
        assert four.parts[name] == pytest.approx(one.parts[name] / 4, rel=0.01)
    assert four.parts["gathered"] > 0 and one.parts["gathered"] == 0


def test_ranks_gather_weights_in_the_dtype_of_the_computation(models, tmp_path):
    """FSDP2 casts fp32 weights, and fp32 adapters, before anything is computed with them."""
    batch = [Row(640, (160, 160)).example()]

    def parts(**changes):
        config = settings(
            models["config"],
            tmp_path / "run",
            precision="bf16",
            gradient_checkpointing=True,
            **changes,
        )
        return StepTracer(config, device="cuda", world_size=4).step(batch).parts

    narrow, masters, lora = (
        parts(),
        parts(master_weights=True),
        parts(lora=LoraOptions(r=4, alpha=8)),
    )
    for name in ("activations", "layer", "attention"):
        assert masters[name] == narrow[name] and lora[name] <= 1.3 * narrow[name], name
    assert masters["weights"] == pytest.approx(2 * narrow["weights"], rel=0.01)


def test_an_adapter_is_planned_on_its_base(models, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    add_lora(base, LoraOptions(r=4, alpha=8)).save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    adapter_config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(adapter_config.read_text()) | {"base_model_name_or_path": models["llama"]}
    adapter_config.write_text(json.dumps(fields))
    config = settings(str(tmp_path / "adapter"), tmp_path / "run")
    batch = [Row(300, (80, 60)).example()]
    assert StepTracer(config).step(batch).peak == pytest.approx(measure(config, batch), rel=0.1)


def test_a_run_that_cannot_be_planned_is_trained(models, records, tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("an operator without a shape function")

    monkeypatch.setattr(StepTracer, "step", broken)
    config = settings(
        models["llama"], tmp_path / "run", data=[records], memory_gib=1e-6, batch_size=6
    )
    assert train(config).steps == 1
    assert "the memory of the run is not planned: RuntimeError: an operator without" in caplog.text


def test_every_switch_saves_what_the_plan_with_it_says(models, tmp_path):
    planner = StepTracer(settings(models["config"], tmp_path / "run"), device="cuda")
    batch = [Row(2000, (200, 200)).example()]
    found = savings(planner, batch)
    names = [next(iter(switch)) for switch, _ in found]
    assert names[0] == "gradient_checkpointing" and {"mlp_tile", "reference", "lora"} <= set(names)
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    before = planner.estimate(batch).peak
    for switch, saved in found:
        assert before - planner.estimate(batch, **switch).peak == saved


def test_the_cheapest_way_fits_and_its_switches_train(models, tmp_path):
    config = settings(models["llama"], tmp_path / "run")
    planner, batch = StepTracer(config), [Row(600, (200, 200)).example()]
    whole = planner.step(batch).peak
    room = whole // 2
    chosen, step = cheapest_way(planner, batch, room)
    assert step.peak <= room < whole and "lora" not in chosen and len(chosen) >= 2
    assert measure(settings(models["llama"], tmp_path / "with", **chosen), batch) <= 1.1 * step.peak


def test_the_longest_row_fits_and_a_longer_one_does_not(models, tmp_path):
    planner = StepTracer(
        settings(models["config"], tmp_path / "run", gradient_checkpointing=True), device="cuda"
    )
    row = Row(160, (10, 10))
    room = 40 << 20
    longest = longest_row(planner, row, room)
    assert longest.tokens > 2 * row.tokens
    assert longest.prompt / longest.responses[0] == pytest.approx(16, rel=0.05)
    assert planner.step([longest.example()]).peak <= 1.01 * room
    assert planner.step([longest.scaled(1.1).example()]).peak > room
    assert longest_row(planner, row, 1 << 20) is None


def test_the_largest_batch_is_what_the_limits_allow():
    examples = [Row(10, (n,)).example() for n in (5, 40, 20, 30)]

    def lengths(**limits):
        config = RunConfig(model="m", data=["d"], output_dir="o", **{"batch_size": 32, **limits})
        return [len(e.responses[0]) for e in largest_batch(examples, config, packed=True)]

    assert lengths() == [40] and lengths(micro_batch_size=2) == [40, 30]
    assert lengths(max_tokens_per_batch=82) == [40, 20] and lengths(max_tokens_per_batch=8) == [40]
    assert lengths(max_tokens_per_batch=1000, micro_batch_size=3) == [40, 30, 20]
    assert len(lengths(max_tokens_per_batch=1000)) == 4
    assert lengths(max_tokens_per_batch=1000, batch_size=2) == [40, 30], (
        "no batch holds more records than a step"
    )


def test_memory_is_left_for_what_no_plan_sees():
    assert usable(100 * GIB, "cuda") == int(99 * GIB / 1.03) and usable(GIB, "cpu") == int(
        GIB / 1.03
    )


# --- the command and the trainer ---


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    models, records, tmp_path, capsys
):
    command = [
        "train",
        "--model",
        models["config"],
        "--data",
        records,
        "--tokenizer",
        models["llama"],
    ]
    common = ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--workspace_mb", "1"]
    smallest = (
        StepTracer(settings(models["config"], tmp_path / "x", workspace_mb=1.0))
        .step([Row(2, (2, 2)).example()])
        .peak
    )
    limit = str(smallest / GIB)
    assert (
        main([*command, *common, "--memory_gib", limit]) == 1
    )  # there are no weights: loading would fail
    error = capsys.readouterr().err
    assert (
        "the largest batch of the run" in error and "pairs.jsonl:" in error and "weights" in error
    )
    assert "It fits with" in error and "=" in error.split("It fits with")[1]
    assert main([*command, *common, "--memory_gib", "0.001"]) == 1
    assert "it still needs" in capsys.readouterr().err


def test_a_run_that_fits_with_the_named_switches_runs_with_them(models, records, tmp_path, capsys):
    command = [
        "train",
        "--model",
        models["llama"],
        "--data",
        records,
        "--device",
        "cpu",
        "--progress",
        "false",
    ]
    command += ["--workspace_mb", "1", "--loggers", "[]", "--memory_gib"]
    config = settings(models["llama"], tmp_path / "x", workspace_mb=1.0)
    planner = StepTracer(config)
    whole = planner.step([Row(20, (16, 8)).example()]).peak
    limit = str(whole / GIB)  # three percent are left for fragmentation
    assert main([*command, limit, "--output_dir", str(tmp_path / "refused")]) == 1
    advice = capsys.readouterr().err.split("It fits with ")[1].split(":")[0].split()
    flags = [
        word for switch in advice for word in ("--" + switch.split("=")[0], switch.split("=")[1])
    ]
    flags = [flag for flag in flags if flag not in ("--reference", "cached")]
    assert main([*command, limit, "--output_dir", str(tmp_path / "run"), *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1


def test_plan_of_a_row_prints_parts_limits_and_switches(models, capsys):
    row = ["--prompt", "4000", "--responses", "[250, 250]"]
    assert main(["plan", "--model", models["config"], *row, "--memory_gib", "2"]) == 0
    text = capsys.readouterr().out
    for word in (
        "packed rows, cuda",
        "4,500 tokens",
        "weights",
        "activations",
        "peak",
        "Tflop",
        "longest",
    ):
        assert word in text
    assert "less with gradient_checkpointing=true" in text


def test_plan_measures_beside_its_prediction(models, records, capsys):
    assert (
        main(
            [
                "plan",
                "--model",
                models["tied"],
                "--data",
                records,
                "--device",
                "cpu",
                "--measure",
                "true",
            ]
        )
        == 0
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    off = float(lines["measured"].split("the plan is ")[1].split("%")[0])
    assert abs(off) <= 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "what is to be planned?"),
        (["--prompt", "5"], "both --prompt and --responses"),
        (["--prompt", "5", "--responses", "[0]"], "at least 1 token"),
        (["--prompt", "5", "--responses", "[5]", "--gpu", "H900"], "gpu='H900' is not one of H200"),
        (
            ["--prompt", "5", "--responses", "[5]", "--world_size", "0"],
            "world_size=0 must be at least 1",
        ),
        (
            ["--prompt", "5", "--responses", "[5]", "--gpu", "H200", "--device", "cpu"],
            "plan for one of them",
        ),
        (
            ["--prompt", "5", "--responses", "[5]", "--measure", "true", "--world_size", "2"],
            "in one process",
        ),
        (["--prompt", "5", "--responses", "[5]", "--pairs", "2"], "give it with --op N D V"),
        (["--op", "64", "32", "1000", "--prompt", "5"], "which model, prompt do not enter"),
    ],
)
def test_plan_refuses(flags, message, models, capsys):
    assert main(["plan", "--model", models["config"], *flags]) == 1
    assert message in capsys.readouterr().err


def test_plan_without_a_model_says_so(capsys):
    assert main(["plan", "--prompt", "5", "--responses", "[5]"]) == 1
    assert "model is missing" in capsys.readouterr().err


def test_an_optimizer_has_the_bytes_that_are_planned(models, tmp_path):
    """state_bytes is a formula: hold it against a step."""
    config = settings(models["tied"], tmp_path / "run", optimizer="adamw")
    assert isinstance(RunPlanConfig(model="m"), RunConfig)
    step = StepTracer(config).step([Row(30, (10, 10)).example()])
    model = transformers.AutoModelForCausalLM.from_pretrained(models["tied"])
    optimizer = make_optimizer(
        type("Policy", (), {"trainable_parameters": lambda self: list(model.parameters())})(),
        config,
    )
    with memory_category("optimizer"):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    held = sum(
        x.numel() * x.itemsize
        for state in optimizer.state.values()
        for x in state.values()
        if x.dim()
    )
    assert step.parts["optimizer"] == held
