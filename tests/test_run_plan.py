"""The plan of a run is the memory that the run takes; a run that cannot fit is refused."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import una_fast.model.activations as activations
from tiny import make_config, make_records, make_tokenizer, write_jsonl
from una_fast.attention.rows import Segment, attended_pairs
from una_fast.capacity.fit import GIB, cheapest_way, largest_batch, longest_row, savings, usable
from una_fast.capacity.run_plan import text_bar
from una_fast.capacity.settings import RunPlanConfig
from una_fast.capacity.trace import CATEGORIES, Row, StepMemory, StepTracer
from una_fast.cli import main
from una_fast.config import RunConfig
from una_fast.counters import FlopCounter, memory_category
from una_fast.data.batch import collate
from una_fast.data.loader import Step
from una_fast.distributed import start_world
from una_fast.model.lora import add_lora
from una_fast.model.settings import LoraOptions
from una_fast.optim import make_optimizer
from una_fast.resolved import find_facts
from una_fast.train.build import build_run, open_run
from una_fast.train.loop import Trainer, train
from una_fast.train.measure import measured_peak
from una_fast.train.run_data import RunData

SMALL = {
    "vocab_size": 1500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
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
    "wide": transformers.LlamaConfig(**SMALL | {"vocab_size": 9000, "tie_word_embeddings": True}),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 2},
        head_dim=16,
        sliding_window=100,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=1500,
        n_embd=64,
        n_layer=1,
        n_head=4,
        n_positions=4096,
        bos_token_id=0,
        eos_token_id=1,
    ),
}
LORA = LoraOptions(r=4, alpha=8)
CHECKPOINTING = {"gradient_checkpointing": True}
OFFLOADED = {"gradient_checkpointing": True, "offload_activations": True}
BF16 = {"precision": "bf16"}
PADDED = {"packing": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models; "config" and "deep" have no weights."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name, config in MODELS.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, layers in (("config", 1), ("deep", 8)):
        sizes = SMALL | {"num_hidden_layers": layers}
        config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
        config.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("records") / "pairs.jsonl", make_records("pairs", 6))


@pytest.fixture
def small_states_move(monkeypatch):
    """The hidden states of tests are worth moving to the host."""
    monkeypatch.setattr(activations, "SMALL", 1 << 10)


def settings(model, output_dir="out", **changes) -> RunConfig:
    changes = {"data": ["unread.jsonl"], "batch_size": 1, "workspace_mb": 4, **changes}
    return make_config(model, changes.pop("data"), Path(output_dir), **changes)


def tracer(config: RunConfig, device: str = "cpu", ranks: int = 1) -> StepTracer:
    return StepTracer(config, find_facts(config, [], device=device, ranks=ranks))


def make_trainer(config: RunConfig, examples) -> Trainer:
    Path(config.output_dir).mkdir(exist_ok=True)
    data = RunData([examples], [1.0])
    opened = open_run(config, start_world("cpu"), data)
    return Trainer(build_run(opened, make_tokenizer()), Path(config.output_dir))


def measure(config: RunConfig, batch) -> int:
    return measured_peak(make_trainer(config, batch), batch)


PAIRS = Row(20, (110, 90))  # eight records of the row are a batch
CASES = [
    ("llama", Row(300, (100, 80)), {"reference": "frozen"}),
    ("tied", Row(500, (120,)), BF16 | OFFLOADED | {"offload_optimizer": True, "workspace_mb": 1}),
    ("qwen3", Row(240, (60, 50, 50)), PADDED | {"lora": LORA, "workspace_mb": 0.5}),
    ("gemma3", Row(180, (60, 50)), BF16 | CHECKPOINTING | {"master_weights": True}),
    ("gpt2", Row(150, (100, 60)), PADDED | {"offload_optimizer": True, "mlp_tile": 200}),
    # Several pairs: a frozen head streams them without accumulators [V, D].
    ("wide", PAIRS, {"lora": LORA, "workspace_mb": 2}),
    ("wide", PAIRS, BF16 | CHECKPOINTING | {"lora": LORA, "workspace_mb": 1}),
    ("wide", PAIRS, BF16 | {"lora": LORA, "quantize_base": "nf4", "workspace_mb": 1}),
    ("wide", PAIRS, {"workspace_mb": 4, "reference": "frozen"}),
    ("llama", Row(400, (90,)), BF16 | OFFLOADED | {"master_weights": True, "mlp_tile": 300}),
]


def test_the_cases_cover_the_switches():
    on = Counter()
    for model, row, changes in CASES:
        on.update([model, len(row.responses)])
        on.update(name for name, value in changes.items() if value)
        on["padded"] += changes.get("packing") is False
    wanted = {*MODELS, 1, 2, 3, "precision", "padded", "lora", "gradient_checkpointing", "mlp_tile"}
    wanted.add("quantize_base")
    assert not wanted - set(on)
    twice = ("offload_activations", "offload_optimizer", "master_weights", "mlp_tile", "padded")
    assert min(on[name] for name in twice) >= 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[2])}")
def test_the_plan_is_within_a_tenth_of_the_measured_peak(case, models, tmp_path, small_states_move):
    model, row, changes = case
    batch = [row.example()] * (8 if row is PAIRS else 1)
    config = settings(models[model], tmp_path / "run", batch_size=len(batch), **changes)
    step = tracer(config).step(batch)
    assert step.peak == pytest.approx(measure(config, batch), rel=0.1), step.categories
    tokens = row.tokens if step.packed else sum(row.prompt + n for n in row.responses)
    assert step.tokens == tokens * len(batch)
    assert step.packed == changes.get("packing", True)
    assert set(step.categories) == set(CATEGORIES) and min(step.categories.values()) >= 0


def test_a_scored_response_needs_its_own_row_alone(models, tmp_path):
    """No padded pair: half of the tokens of a pair where nothing is shared."""
    one, two = [Row(2, (400,)).example()], [Row(2, (400, 400)).example()]
    assert collate(one, packed=True).input_ids.numel() == 402
    assert collate(one, packed=False).input_ids.shape == (1, 402)
    config = settings(models["llama"], tmp_path / "one", workspace_mb=1)
    planner = tracer(config)
    fixed = 20 * planner.parameters
    small, large = planner.step(one).peak, planner.step(two).peak
    assert small - fixed <= 0.6 * (large - fixed)
    assert measure(config, one) == pytest.approx(small, rel=0.1)


def test_micro_batches_that_follow_the_first_hold_all_gradients(models, tmp_path):
    """A step of two batches: the second forward has every gradient beside it."""
    config = settings(models["llama"], tmp_path / "run", batch_size=2, **CHECKPOINTING)
    batch = [Row(60, (20, 30)).example()]
    one, two = (tracer(config).step(batch, accumulate=more) for more in (False, True))
    measured = measured_peak(make_trainer(config, batch * 2), batch, accumulate=True)
    assert two.peak == pytest.approx(measured, rel=0.1)
    assert two.peak > one.peak


def test_flop_of_a_step_are_those_that_run(models, tmp_path):
    config = settings(models["llama"], tmp_path / "run", mlp_tile=128, **CHECKPOINTING)
    batch = [Row(300, (100, 60)).example()]
    planned = tracer(config).step(batch).flop
    trainer = make_trainer(config, batch)
    with FlopCounter() as counter:
        trainer.take_step(Step(0.0, [batch], 1))
    pairs = attended_pairs((Segment((0, 300), ((300, 400), (400, 460))),))
    # Attention runs in the reference, in forward, again for backward, and there at 2.5 times.
    attention = 5.5 * 4 * pairs * SMALL["hidden_size"] * SMALL["num_hidden_layers"]
    assert planned == pytest.approx(counter.flop + attention, rel=0.01)


def test_a_plan_needs_no_weights_and_leaves_nothing_behind(models, tmp_path):
    planner = tracer(settings(models["config"]), "cuda")  # there is none here
    batch = [Row(64, (16, 16)).example()]
    state = torch.get_rng_state()
    planner.step(batch)
    assert torch.equal(state, torch.get_rng_state())
    # Packed attention runs on real tensors, with tables of its own.
    assert measure(settings(models["llama"], tmp_path / "after"), batch) > 0


def test_offloaded_states_are_counted_on_the_host(models, small_states_move):
    row = Row(400, (100,))
    planner = tracer(settings(models["config"], offload_optimizer=True, **OFFLOADED), "cuda")
    step = planner.step([row.example()])
    states = row.tokens * SMALL["hidden_size"] * 2
    assert step.host >= states + 12 * planner.parameters
    assert step.categories["optimizer"] == 0


def test_ranks_share_weights_gradients_and_state(models):
    config = settings(models["config"])
    batch = [Row(640, (160, 160)).example()]
    one, four = (tracer(config, "cuda", n).step(batch).categories for n in (1, 4))
    for name in ("weights", "optimizer"):
        assert four[name] == pytest.approx(one[name] / 4, rel=0.01)
    assert four["gathered"] > 0 and one["gathered"] == 0


def test_ranks_gather_weights_in_the_dtype_of_the_computation(models):
    """FSDP2 casts fp32 weights, and fp32 adapters, before anything is computed with them."""
    batch = [Row(640, (160, 160)).example()]

    def held(**changes):
        config = settings(models["config"], **BF16, **CHECKPOINTING, **changes)
        return tracer(config, "cuda", 4).step(batch).categories

    narrow = held()
    masters = held(master_weights=True)
    lora = held(lora=LORA)
    for name in ("activations", "layer", "attention"):
        assert masters[name] == narrow[name] and lora[name] <= 1.3 * narrow[name], name
    assert masters["weights"] == pytest.approx(2 * narrow["weights"], rel=0.01)


def test_an_adapter_is_planned_on_its_base(models, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    add_lora(base, LORA).save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    adapter_config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(adapter_config.read_text()) | {"base_model_name_or_path": models["llama"]}
    adapter_config.write_text(json.dumps(fields))
    config = settings(str(tmp_path / "adapter"), tmp_path / "run")
    batch = [Row(300, (80, 60)).example()]
    assert tracer(config).step(batch).peak == pytest.approx(measure(config, batch), rel=0.1)


def test_an_optimizer_has_the_bytes_that_are_planned(models):
    """state_bytes is a formula: hold it against a step."""
    config = settings(models["tied"], optimizer="adamw")
    step = tracer(config).step([Row(30, (10, 10)).example()])
    model = transformers.AutoModelForCausalLM.from_pretrained(models["tied"])
    parameters = list(model.parameters())
    policy = type("Policy", (), {"trainable_parameters": lambda self: parameters})()
    optimizer = make_optimizer(policy, config)
    with memory_category("optimizer"):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    held = 0
    for state in optimizer.state.values():
        held += sum(x.numel() * x.itemsize for x in state.values() if x.dim())
    assert step.categories["optimizer"] == held


def test_the_largest_batch_is_what_the_limits_allow():
    examples = [Row(10, (n,)).example() for n in (5, 40, 20, 30)]

    def lengths(**limits):
        config = RunConfig(model="m", data=["d"], output_dir="o", **{"batch_size": 32, **limits})
        return [len(e.responses[0]) for e in largest_batch(examples, config, packed=True)]

    assert lengths() == [40] and lengths(micro_batch_size=2) == [40, 30]
    assert lengths(max_tokens_per_batch=82) == [40, 20] and lengths(max_tokens_per_batch=8) == [40]
    assert lengths(max_tokens_per_batch=1000, micro_batch_size=3) == [40, 30, 20]
    assert len(lengths(max_tokens_per_batch=1000)) == 4
    # No batch holds more records than a step.
    assert lengths(max_tokens_per_batch=1000, batch_size=2) == [40, 30]


def test_memory_is_left_for_what_no_plan_sees():
    assert usable(100 * GIB, "cuda") == int(99 * GIB / 1.03)
    assert usable(GIB, "cpu") == int(GIB / 1.03)


# --- switches ---


@pytest.fixture(scope="module")
def long_row(models):
    """A plan for a GPU, a batch of a long row, and the savings of every switch."""
    planner = tracer(settings(models["config"]), "cuda")
    batch = [Row(2000, (200, 200)).example()]
    return planner, batch, savings(planner, batch)


def test_every_switch_saves_what_the_plan_with_it_says(long_row):
    planner, batch, found = long_row
    names = {next(iter(switch)) for switch, _ in found}
    assert {"gradient_checkpointing", "mlp_tile", "reference", "lora"} <= names
    assert "workspace_mb" not in names, "4 MiB are less than the switch would give"
    bytes_saved = [saved for _, saved in found]
    assert bytes_saved == sorted(bytes_saved, reverse=True) and bytes_saved[0] > 0
    before = planner.step(batch).peak
    for switch, saved in found[:2]:
        assert before - planner.step(batch, **switch).peak == saved


def test_no_switch_gives_a_reference_that_is_cached_already(models):
    """Also where the records bring it, and the setting says auto."""
    config = settings(models["config"])
    batch = [Row(64, (16, 16)).example()]
    facts = find_facts(config, [], device="cpu")
    given = StepTracer(config, type(facts)(**vars(facts) | {"has_ref_logps": True}))
    assert given.step(batch).categories["reference"] == 0
    assert {"reference": "cached"} not in [switch for switch, _ in savings(given, batch)]


def test_the_cheapest_way_fits_and_its_switches_train(models, tmp_path):
    planner, batch = tracer(settings(models["llama"])), [Row(600, (200, 200)).example()]
    whole = planner.step(batch).peak
    room = int(0.6 * whole)
    chosen, step = cheapest_way(planner, batch, room)
    assert step.peak <= room < whole and "lora" not in chosen and len(chosen) >= 2
    assert measure(settings(models["llama"], tmp_path / "with", **chosen), batch) <= 1.1 * step.peak


def test_the_longest_row_fits_and_a_longer_one_does_not(models):
    planner = tracer(settings(models["config"], **CHECKPOINTING), "cuda")
    row = Row(160, (10, 10))
    room = 40 << 20
    longest = longest_row(planner, row, room)
    assert longest.tokens > 2 * row.tokens
    assert longest.prompt / longest.responses[0] == pytest.approx(16, rel=0.05)
    assert planner.step([longest.example()]).peak <= 1.01 * room
    assert planner.step([longest.scaled(1.1).example()]).peak > room
    assert longest_row(planner, row, 1 << 20) is None


# --- the command and the trainer ---


def command(model, data, output_dir, *flags: str) -> list[str]:
    paths = ["--model", model, "--data", data, "--output_dir", str(output_dir)]
    quiet = ["--loggers", "[]", "--progress", "false", "--write_report", "false"]
    # One record per step: no gradients of earlier micro-batches, which cost a second pass.
    small = ["--device", "cpu", "--workspace_mb", "1", "--batch_size", "1", "--max_steps", "1"]
    return ["train", *paths, *quiet, *small, *flags]


def test_a_run_that_cannot_be_planned_is_trained(models, records, tmp_path, monkeypatch, caplog):
    def broken(*_, **__) -> StepMemory:
        raise RuntimeError("an operator without a shape function")

    monkeypatch.setattr(StepTracer, "step", broken)
    limits = {"memory_gib": 1e-6, "batch_size": 6}
    config = settings(models["llama"], tmp_path / "run", data=[records], **limits)
    assert train(config).steps == 1
    assert "the memory of the run is not planned: RuntimeError: an operator without" in caplog.text


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    models, records, tmp_path, capsys
):
    # There are no weights: loading would fail.
    words = command(models["config"], records, tmp_path / "run", "--tokenizer", models["llama"])
    config = settings(models["config"], workspace_mb=1.0)
    smallest = tracer(config).step([Row(2, (2, 2)).example()]).peak
    assert main([*words, "--memory_gib", str(smallest / GIB)]) == 1
    error = capsys.readouterr().err
    for text in ("the largest batch of the run", "pairs.jsonl:", "weights"):
        assert text in error
    assert "=" in error.split("It fits with")[1]
    # All switches that go with LoRA are on.
    flags = ["--lora.r", "4", "--gradient_checkpointing", "true"]
    flags += ["--offload_activations", "true", "--mlp_tile", "64"]
    assert main([*words, *flags, "--memory_gib", "0.0001"]) == 1
    assert "No switch makes it smaller than" in capsys.readouterr().err


def test_a_run_that_fits_with_the_named_switches_runs_with_them(models, records, tmp_path, capsys):
    planner = tracer(settings(models["llama"], workspace_mb=1.0))
    whole = planner.step([Row(20, (16, 8)).example()]).peak
    limit = ["--memory_gib", str(whole / GIB)]  # three percent are left for fragmentation
    assert main(command(models["llama"], records, tmp_path / "refused", *limit)) == 1
    advice = capsys.readouterr().err.split("It fits with ")[1].split(":")[0].split()
    flags = []
    for switch in advice:
        name, value = switch.split("=")
        if name != "reference":
            flags += [f"--{name}", value]
    assert main(command(models["llama"], records, tmp_path / "run", *limit, *flags)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert 0 < plan["peak"] <= plan["room"] and sum(plan["parts"].values()) == plan["peak"]


def test_plan_of_a_row_shows_decisions_memory_limits_and_switches(models, tmp_path, capsys):
    row = ["--prompt", "4000", "--responses", "[250, 250]"]
    flags = ["--memory_gib", "2", "--batch_size", "1", "--lora.r", "4"]
    flags += ["--report", str(tmp_path / "plan.html")]
    assert main(["plan", "--model", models["config"], *row, *flags]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "packed  [default: the packing probe passed]" in lines["rows"]
    assert "cuda, 1 rank" in lines["device"] and "adapter  [default: lora is set]" in text
    assert "4,500 tokens" in lines["batch"]
    for name in ("weights", "activations", "peak", "longest"):
        assert name in lines
    assert "Tflop" in lines["work"]
    assert "less with gradient_checkpointing=true" in text
    assert max(map(len, text.splitlines())) <= 100
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<h2>Parts at the peak</h2>" in page and "gradient_checkpointing=true" in page
    assert "4,500 tokens" in page and '<span style="width: 100.0%">' in page


def test_bars_of_a_terminal_without_blocks(monkeypatch):
    assert text_bar(0.5) == "█" * 20 and text_bar(0.01) == "▍" and text_bar(0.0) == ""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert text_bar(0.5) == "#" * 20 and text_bar(1.0) == "#" * 40


def test_plan_measures_beside_its_prediction(models, records, capsys):
    words = ["--data", records, "--measure", "true", "--batch_size", "1"]
    assert main(["plan", "--model", models["tied"], *words]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    off = float(lines["measured"].split("the plan is ")[1].split("%")[0])
    assert abs(off) <= 10


def cached(path: Path, count: int) -> str:
    """Pairs with reference log-probs."""
    pairs = make_records("pairs", count)
    return write_jsonl(path, [record | {"ref_logps": [-9.0, -8.0]} for record in pairs])


def test_plan_of_records_with_reference_log_probs_has_no_reference(models, tmp_path, capsys):
    words = ["plan", "--model", models["llama"], "--device", "cpu", "--batch_size", "1", "--data"]
    assert main([*words, cached(tmp_path / "pairs.jsonl", 3)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(maxsplit=1)[1] for line in lines if line.startswith("reference")]
    assert found == ["cached  [default: every record brings ref_logps]"]


def test_plan_of_a_mixed_run_with_cached_records(models, tmp_path, capsys):
    """Sampled prompts have no ref_logps: the run computes the reference, as its trainer does."""
    prompts = [{"prompt": record["prompt"]} for record in make_records("pairs", 3)]
    path = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    sources = [cached(tmp_path / "pairs.jsonl", 9), {"path": path, "online": True}]
    flags = ["--mode", "mixed", "--rewards", "[json.dumps]", "--max_new_tokens", "12"]
    # Batches hold records and rollouts together.
    flags += ["--batch_size", "4", "--micro_batch_size", "4", "--device", "cpu"]
    flags += ["--data", json.dumps(sources)]
    assert main(["plan", "--model", models["llama"], *flags]) == 0
    said = capsys.readouterr()
    lines = {line.split()[0]: line for line in said.out.splitlines()}
    assert "frozen" in said.out and "more records" in lines["batch"] and not said.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "what is to be planned?"),
        (["--prompt", "5"], "both --prompt and --responses"),
        (["--prompt", "5", "--responses", "[0]"], "at least 1 token"),
        (["--prompt", "5", "--responses", "[5]", "--gpu", "H900"], "gpu='H900' is not one of H200"),
        (["--world_size", "0"], "world_size=0 must be at least 1"),
        (["--gpu", "H200", "--device", "cpu"], "plan for one of them"),
        (["--measure", "true", "--world_size", "2"], "in one process"),
        (
            ["--measure", "true", "--mode", "online", "--rewards", "[json.dumps]"],
            "mode=online samples; set mode: offline",
        ),
        (["--prompt", "5", "--responses", "[5]", "--pairs", "2"], "give it with --op N D V"),
        (["--op", "64", "32", "1000", "--prompt", "5"], "which model, prompt do not enter"),
        (["--op", "64", "32", "1000", "--responses", "[5]"], "which model, responses do not enter"),
    ],
)
def test_plan_refuses(flags, message, models, capsys):
    assert main(["plan", "--model", models["config"], *flags]) == 1
    assert message in capsys.readouterr().err


def test_plan_without_a_model_says_so(capsys):
    assert main(["plan", "--prompt", "5", "--responses", "[5]"]) == 1
    assert "model is missing" in capsys.readouterr().err
    assert isinstance(RunPlanConfig(model="m"), RunConfig)
