"""Few traced layers give the plan of all layers, to the byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

import una_fast.model.activations as activations
from tiny import make_config
from una_fast.capacity import trace
from una_fast.capacity.timeline import Cuts, deepened, find_copies, trace_of
from una_fast.capacity.trace import Row, StepTracer
from una_fast.data.examples import Example
from una_fast.feedback import Feedback
from una_fast.model.settings import LoraOptions
from una_fast.resolved import find_facts

SMALL = {
    "vocab_size": 150,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "max_position_embeddings": 4096,
}
MIXED_WINDOWS = {
    "num_hidden_layers": 10,
    "head_dim": 8,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"] * 5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL),
    # FSDP2 gathers layers ahead, and more layers are traced.
    "deep": transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 7}),
    "deeper": transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 9}),
    "tied": transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL | MIXED_WINDOWS, query_pre_attn_scalar=8, final_logit_softcapping=9.0
    ),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "experts": transformers.Qwen3MoeConfig(**SMALL | EXPERTS, head_dim=8),
    # Experts from the second layer on.
    "dense first": transformers.Qwen3MoeConfig(
        **SMALL | EXPERTS | {"num_hidden_layers": 8}, head_dim=8, mlp_only_layers=[0]
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=150,
        n_embd=32,
        n_layer=6,
        n_head=4,
        n_positions=4096,
        bos_token_id=0,
        eos_token_id=1,
    ),
}
LORA = {"lora": LoraOptions(r=4, alpha=8)}
EVERYWHERE = {"lora": LoraOptions(r=4, target_modules="all-linear")}
SOME_LAYERS = {"lora": LoraOptions(r=4, target_modules=r".*layers\.[01]\..*proj")}
CHECKPOINTING = {"gradient_checkpointing": True}
OFFLOADED = {"gradient_checkpointing": True, "offload_activations": True}
BF16 = {"precision": "bf16"}
PADDED = {"packing": False}
CACHED = {"reference": "cached"}
COPIES = {"parallel": {"replicate": 2}}
AHEAD = {"parallel": {"reduce": "last", "prefetch": 1}}
ON_HOST = {"parallel": {"offload_parameters": True}}
PAIR = [Row(60, (30, 20)).example()]


def mixed_records() -> list[Example]:
    """Return a pair, scored responses, and a pair with scores of both responses."""
    linked = Row(20, (9, 14)).example()
    both = Feedback.merge([linked.feedback, Feedback.scores([0, 1], [0.9, 0.2])])
    linked = Example(linked.prompt_ids, linked.responses, both, None, "linked")
    return [*PAIR, Row(40, (25, 11, 30)).example(), linked]


MIXED = mixed_records()


@dataclass
class Case:
    """A step to plan."""

    model: str
    changes: dict = field(default_factory=dict)
    batch: list = field(default_factory=lambda: PAIR)
    device: str = "cpu"
    ranks: int = 1
    accumulate: bool = False


# With torch 2.11 the memory of a checkpointed layer differs with the depth of the model: the plan
# traces all layers, and says so.
ALIKE = Version(torch.__version__) >= Version("2.12")

CASES = [
    Case("llama", {}),
    Case("llama", BF16 | {"master_weights": True}, MIXED),
    Case("llama", CHECKPOINTING | {"mlp_tile": 64}, accumulate=True),
    Case("llama", OFFLOADED | {"offload_optimizer": True}, MIXED, "cuda"),
    Case("deep", BF16 | LORA, MIXED, "cuda", ranks=2, accumulate=True),
    Case("deep", BF16 | COPIES | CHECKPOINTING, ranks=4, accumulate=True),
    Case("deeper", AHEAD | PADDED, ranks=8),
    Case("deep", ON_HOST | OFFLOADED | EVERYWHERE, ranks=8),
    Case("llama", EVERYWHERE | BF16 | CHECKPOINTING),
    Case("tied", LORA | OFFLOADED | {"mlp_tile": 32}, accumulate=True),
    Case("qwen2", PADDED | CHECKPOINTING | {"attn_implementation": "eager"}, MIXED),
    Case("gemma3", {}, MIXED),
    Case("gemma3", PADDED | OFFLOADED | BF16, MIXED, accumulate=True),
    Case("experts", BF16 | CHECKPOINTING),
    Case("dense first", BF16 | CACHED | PADDED, MIXED),
    Case("gpt2", BF16 | {"reference": "frozen"}, MIXED, "cuda"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configs of tiny models, without weights."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        config.architectures = [kind.__name__]
        config.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(autouse=True)
def small_states_move(monkeypatch):
    """The hidden states of tests are worth moving to the host."""
    monkeypatch.setattr(activations, "SMALL", 1 << 10)


def tracer(case: Case, model: str) -> StepTracer:
    settings = {"batch_size": 8, "workspace_mb": 4, **case.changes}
    config = make_config(model, ["unread.jsonl"], "out", **settings)
    return StepTracer(config, find_facts(config, [], device=case.device, ranks=case.ranks))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{'-'.join(case.changes)}")
def test_few_layers_give_the_plan_of_all(case, models):
    planner = tracer(case, models[case.model])
    few = planner.step(case.batch, accumulate=case.accumulate)
    whole = planner.step(case.batch, accumulate=case.accumulate, whole=True)
    assert whole.traced == planner.depth.total
    if ALIKE or not planner.config.gradient_checkpointing:
        assert few.traced < whole.traced and few.note is None
    else:
        assert few.traced == whole.traced and "the memory of a layer differs" in few.note
    assert few.peak == whole.peak and few.categories == whole.categories
    assert few.moments == whole.moments and few.host == whole.host
    assert few.sent(3) == pytest.approx(whole.sent(3), rel=1e-12)
    assert few.flop == pytest.approx(whole.flop, rel=1e-12, nan_ok=True)


def test_adapters_in_some_layers_alone_make_two_kinds_of_layers(models):
    planner = tracer(Case("llama", SOME_LAYERS), models["llama"])
    assert planner.depth.tries == () and planner.depth.total == 6
    assert planner.step(PAIR).traced == 6


def test_layers_that_differ_are_all_traced_and_the_plan_says_so(models, monkeypatch):
    planner = tracer(Case("llama"), models["llama"])
    monkeypatch.setattr(trace, "find_copies", lambda *_: None)
    step = planner.step(PAIR)
    assert step.traced == 6 and "a model of 5 layers" in step.note
    monkeypatch.undo()
    assert planner.step(MIXED).note is None


def test_a_switch_of_the_optimizer_needs_no_trace(models, monkeypatch):
    planner = tracer(Case("llama", BF16, device="cuda"), models["llama"])
    made = []
    traced = StepTracer._trace
    monkeypatch.setattr(StepTracer, "_trace", lambda *a, **k: made.append(0) or traced(*a, **k))
    before = planner.step(PAIR)
    after = planner.step(PAIR, offload_optimizer=True)
    assert len(made) == 1 and after.host > before.host and after.peak < before.peak
    assert planner.step(MIXED).peak > before.peak and len(made) == 2


# --- steps without a model ---


def simulated(layers: int, lag: int, *, kept: str = "") -> tuple[SimpleNamespace, list]:
    """Return the events and the pieces of a step.

    layers: of the model
    lag: layers that a layer's state outlives the layer
    kept: "scattered": something of every layer dies after the pass, between births
    """
    live = SimpleNamespace(events=[], sizes=[], categories=[])
    cuts = Cuts(live, lambda: 0.0)

    def born(size: int, category: str) -> int:
        live.sizes.append(size)
        live.categories.append(category)
        live.events.append(len(live.sizes))
        return len(live.sizes)

    cuts.begin("forward")
    states, saved, more = [], [], []
    for layer in range(layers):
        states.append(born(100, "forward"))
        saved.append(born(7, "forward"))
        if kept:
            more.append(born(30, "forward"))
        if layer >= lag:
            live.events.append(-states[layer - lag])
        cuts.cut(layer)
    live.events += [-state for state in states[max(layers - lag, 0) :]]
    for one in more:
        live.events.append(-one)
        if kept == "scattered":
            born(60, "head")
    cuts.cut(None)
    cuts.begin("backward")
    cuts.cut(None)
    for layer in reversed(range(layers)):
        born(11, "gradients")
        live.events.append(-saved[layer])
        cuts.cut(layer)
    return live, cuts.pieces


@pytest.mark.parametrize("kept", ["", "together", "scattered"])
@pytest.mark.parametrize("lag", range(5))
def test_a_copied_layer_is_the_layer_of_a_deep_model(lag, kept):
    """Storages of few layers more than the trace has, or of every layer, are no layer's own."""
    whole = trace_of(*simulated(12, lag, kept=kept))
    found = 0
    for layers in range(5, 11):
        few = trace_of(*simulated(layers, lag, kept=kept))
        copies = find_copies(few, 1, 12)
        if copies is None:
            continue
        found += 1
        deep = deepened(few, copies)
        assert deep.changes.tolist() == whole.changes.tolist()
        for start, stop in ((0, len(whole.changes)), (40, 60)):
            assert deep.peak((), start, stop) == whole.peak((), start, stop)
    assert bool(found) == (kept != "scattered")
