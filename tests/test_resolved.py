"""The decisions of a run: each from its settings and facts, with its source, and asked once."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from families import FAMILIES, SMALL, build, randomize_weights
from tiny import make_config, make_tokenizer
from una_fast import resolved
from una_fast.attention.probe import packing_refusal
from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.feedback import Feedback
from una_fast.model.export import save_pretrained, save_tokenizer
from una_fast.model.reference import AdapterReference, FrozenReference
from una_fast.model.settings import LoraOptions
from una_fast.parallel import ParallelOptions
from una_fast.resolved import (
    Facts,
    ResolvedRun,
    find_facts,
    load_frozen,
    load_trained,
    resolve,
    scoring_of,
)
from una_fast.train.data_checks import fit_padding

ROOT = Path(__file__).resolve().parents[1]
LORA = LoraOptions(r=2)
CPU = Facts(
    device="cpu",
    ranks=1,
    is_adapter=False,
    keeps_float32=False,
    packing_refusal=None,
    has_ref_logps=False,
)
GPU = dataclasses.replace(CPU, device="cuda")


@pytest.fixture
def decide(tmp_path):
    """(facts, settings) -> ResolvedRun; no model is needed."""

    def run(facts: Facts = CPU, **settings) -> ResolvedRun:
        return resolve(make_config("a/model", "data.jsonl", tmp_path / "run", **settings), facts)

    return run


# ---- one decision after another ----------------------------------------------------------------


def dtypes(run: ResolvedRun) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", None: "no"}
    found = (run.compute, run.weights, run.trained, run.autocast)
    return " ".join(names[dtype] for dtype in found)


@pytest.mark.parametrize(
    ("facts", "settings", "expected"),
    [
        # compute, weights, trained, autocast
        ({}, {}, "fp32 fp32 fp32 no"),
        ({"device": "cuda"}, {}, "bf16 bf16 bf16 no"),
        ({"device": "cuda"}, {"precision": "fp32"}, "fp32 fp32 fp32 no"),
        ({}, {"precision": "bf16"}, "bf16 bf16 bf16 no"),
        ({}, {"master_weights": True}, "fp32 fp32 fp32 no"),
        ({}, {"precision": "bf16", "master_weights": True}, "bf16 fp32 fp32 bf16"),
        ({}, {"precision": "bf16", "lora": LORA}, "bf16 bf16 fp32 bf16"),
        ({}, {"precision": "bf16", "lora": LORA, "master_weights": True}, "bf16 bf16 fp32 bf16"),
        ({}, {"lora": LORA}, "fp32 fp32 fp32 no"),
        ({"is_adapter": True}, {"precision": "bf16"}, "bf16 bf16 fp32 bf16"),
        ({"is_adapter": True}, {}, "fp32 fp32 fp32 no"),
        ({"keeps_float32": True}, {"precision": "bf16"}, "bf16 bf16 bf16 bf16"),
        ({"keeps_float32": True}, {}, "fp32 fp32 fp32 no"),
        # FSDP2 casts by itself.
        ({"ranks": 2}, {"precision": "bf16", "master_weights": True}, "bf16 fp32 fp32 no"),
        ({"ranks": 2}, {"precision": "bf16", "lora": LORA}, "bf16 bf16 fp32 no"),
    ],
)
def test_dtypes(decide, facts, settings, expected):
    run = decide(dataclasses.replace(CPU, **facts), **settings)
    assert dtypes(run) == expected
    assert run.imitates_autocast == (expected == "bf16 fp32 fp32 bf16")


@pytest.mark.parametrize(
    ("cached", "settings", "reference", "source"),
    [
        (False, {}, "frozen", "default: lora is not set"),
        (False, {"lora": LORA}, "adapter", "default: lora is set"),
        (True, {}, "cached", "default: every record brings ref_logps"),
        (True, {"lora": LORA}, "cached", "default: every record brings ref_logps"),
        (False, {"reference": "cached"}, "cached", "given: reference=cached"),
        (True, {"reference": "frozen"}, "frozen", "given: reference=frozen"),
        (False, {"reference": "frozen", "lora": LORA}, "frozen", "given: reference=frozen"),
        (True, {"reference": "adapter", "lora": LORA}, "adapter", "given: reference=adapter"),
    ],
)
def test_reference(decide, cached, settings, reference, source):
    run = decide(dataclasses.replace(CPU, has_ref_logps=cached), **settings)
    assert (run.reference, run.sources["reference"]) == (reference, source)


@pytest.mark.parametrize(
    ("refusal", "settings", "packed", "source"),
    [
        (None, {}, True, "default: the packing probe passed"),
        ("it has windows", {}, False, "default: it has windows"),
        (None, {"packing": False}, False, "given: packing=False"),
    ],
)
def test_rows(decide, refusal, settings, packed, source):
    run = decide(dataclasses.replace(CPU, packing_refusal=refusal), **settings)
    assert (run.packed, run.sources["rows"]) == (packed, source)


def test_workspace(decide):
    run = decide()
    assert (run.workspace, run.sources["workspace"]) == (256 * 2**20, "default: on cpu")
    assert decide(GPU).workspace == 2048 * 2**20
    run = decide(workspace_mb=0.3)
    assert run.workspace == int(0.3 * 2**20)
    assert run.sources["workspace"] == "given: workspace_mb=0.3"


def test_engine(decide, monkeypatch):
    assert decide().engine == "torch" and decide().sources["engine"] == "default: on cpu"
    assert decide(engine="torch").sources["engine"] == "given: engine=torch"
    with pytest.raises(ValueError, match='engine="triton" cannot run'):
        decide(engine="triton")
    # Planned for a GPU that is not there: Triton cannot be asked.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decide(GPU).engine == decide(GPU, engine="triton").engine == "triton"
    assert decide(GPU, engine="torch").engine == "torch"
    assert decide(GPU, device="auto").sources["device"] == "default: planned for"
    assert decide(CPU, device="auto").sources["device"] == "default: cpu is there"


def test_scoring_takes_the_decisions(tmp_path):
    config = make_config(
        "a/model", "data.jsonl", tmp_path, precision="bf16", lora=LORA, workspace_mb=0.3
    )
    run = resolve(config, CPU)
    scoring = scoring_of(config, run)
    assert int(scoring.workspace_mb * 2**20) == run.workspace
    assert (scoring.engine, scoring.autocast) == (run.engine, torch.bfloat16)


# ---- print and save ----------------------------------------------------------------------------


def test_lines_and_plain_values(decide):
    facts = dataclasses.replace(CPU, ranks=2, is_adapter=True)
    run = decide(facts, precision="bf16", engine="torch")
    assert run.lines() == [
        "device     cpu, 2 ranks  [given: device=cpu]",
        "dtypes     products bfloat16, weights bfloat16  [given: precision=bf16]",
        "reference  frozen  [default: lora is not set]",
        "rows       packed  [default: the packing probe passed]",
        "workspace  256 MiB  [default: on cpu]",
        "engine     torch  [given: engine=torch]",
        "mesh       shard 2  [default: no copies]",
        "gradients  cross ranks after the last micro-batch of a step  "
        "[default: an adapter is trained]",
    ]
    plain = run.plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain.keys() == {field.name for field in dataclasses.fields(ResolvedRun)}
    assert (plain["compute"], plain["trained"], plain["autocast"]) == ("bfloat16", "float32", None)


def test_lines_of_a_mesh(decide):
    options = ParallelOptions(
        replicate=2, split_vocabulary=True, reduce="last", offload_parameters=True, prefetch=3
    )
    run = decide(dataclasses.replace(CPU, ranks=4), parallel=options)
    assert run.lines()[-2:] == [
        "mesh       replicate 2 x shard 2, the vocabulary split, shards in host memory, "
        "gathered 3 ahead  [given: parallel.replicate=2, parallel.split_vocabulary=True, "
        "parallel.offload_parameters=True, parallel.prefetch=3]",
        "gradients  cross ranks after the last micro-batch of a step  "
        "[given: parallel.reduce=last]",
    ]
    assert run.plain()["parallel"]["reduce"] == "last"


def test_a_head_that_cannot_be_split_is_refused_before_the_load(tmp_path):
    directory = save(
        build("LlamaConfig", SMALL | {"tie_word_embeddings": True}), tmp_path / "model"
    )
    split = ParallelOptions(split_vocabulary=True)
    config = make_config(directory, "data.jsonl", tmp_path / "run", parallel=split)
    with pytest.raises(ValueError, match="head of LlamaForCausalLM is tied"):
        find_facts(config, [], device="cpu", ranks=2)


def test_source_of_autocast_is_named(decide):
    run = decide(dataclasses.replace(GPU, is_adapter=True))
    assert run.lines()[1] == (
        "dtypes     products bfloat16, weights bfloat16, autocast to bfloat16  "
        "[default: on cuda, the model is an adapter]"
    )


# ---- facts, and models that agree with the decisions -------------------------------------------


def save(model, directory):
    model.save_pretrained(directory)
    return str(directory)


def records(*ref_logps):
    """One pair per argument."""
    ids = torch.arange(3, 12, dtype=torch.int32).numpy()
    found = []
    for k, logps in enumerate(ref_logps):
        pair = Feedback.pairs([0], [1])
        found.append(Example(ids[:4], (ids[4:6], ids[6:]), pair, logps, f"data.jsonl:{k + 1}"))
    return found


def ernie():
    """A family that transformers loads with some weights in float32: "gate.weight"."""
    torch.manual_seed(0)
    config = transformers.Ernie4_5_MoeConfig(
        **SMALL, moe_intermediate_size=16, moe_num_experts=4, moe_k=2, moe_layer_start_index=0
    )
    return randomize_weights(transformers.Ernie4_5_MoeForCausalLM(config))


@pytest.mark.parametrize("family", [*FAMILIES, "GPTJConfig", "Ernie4_5_MoeConfig"])
def test_decisions_agree_with_the_loaded_model(family, tmp_path):
    """load_trained asserts the autocast dtype, too; here it is asked without the resolved run."""
    model = ernie() if family.startswith("Ernie") else build(family)
    directory = save(model, tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run", precision="bf16")
    run = resolve(config, find_facts(config, [], device="cpu"))
    policy = load_trained(config, run)
    wider = any(p.dtype != run.compute for p in policy.trainable_parameters())
    assert run.autocast == (run.compute if wider else None)
    assert wider == (family == "Ernie4_5_MoeConfig")
    assert policy.packed == run.packed == (packing_refusal(policy.causal_lm) is None)
    assert policy.model.training


@pytest.mark.parametrize(
    "settings", [{"lora": LORA}, {"master_weights": True}, {"precision": "fp32"}], ids=str
)
def test_decisions_agree_with_the_settings(settings, tmp_path):
    # Saved in bf16: a float32 reference of the same numbers is possible.
    directory = save(build("LlamaConfig").bfloat16(), tmp_path / "model")
    settings = {"precision": "bf16"} | settings
    config = make_config(directory, "data.jsonl", tmp_path / "run", **settings)
    run = resolve(config, find_facts(config, [], device="cpu"))
    policy = load_trained(config, run)
    assert {p.dtype for p in policy.trainable_parameters()} == {run.trained}
    frozen = load_frozen(config, run)
    assert not frozen.trainable_parameters() and not frozen.model.training
    assert frozen.packed == policy.packed
    batch = collate(records(None), packed=run.packed)
    scoring = scoring_of(config, run)
    logps = scoring.logps(policy, batch)  # adapters do nothing yet
    assert torch.equal(FrozenReference(frozen, scoring).logps(batch), logps)


class Words:
    """No tokenizer is needed to save an adapter."""

    name_or_path = ""

    def save_pretrained(self, directory):
        pass


def test_packed_buffers_are_not_sharded(tmp_path, monkeypatch):
    """GPTQ and AWQ keep their weights as buffers, beside plain parameters."""
    directory = save(build("LlamaConfig"), tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run", precision="bf16", lora=LORA)
    run = resolve(config, find_facts(config, [], device="cpu"))
    load = resolved.load_policy

    def packed(*args, **kwargs):
        policy = load(*args, **kwargs)
        policy.causal_lm.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
        return policy

    monkeypatch.setattr(resolved, "load_policy", packed)
    with pytest.raises(ValueError, match="is quantized, and quantized weights are not sharded"):
        load_trained(config, dataclasses.replace(run, ranks=2))


def test_an_adapter_directory_is_seen(tmp_path):
    directory = save(build("LlamaConfig"), tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run", precision="bf16", lora=LORA)
    policy = load_trained(config, resolve(config, find_facts(config, [], device="cpu")))
    save_pretrained(policy, tmp_path / "adapter", Words())
    config = make_config(
        str(tmp_path / "adapter"), "data.jsonl", tmp_path / "run", precision="bf16"
    )
    facts = find_facts(config, [], device="cpu")
    run = resolve(config, facts)
    assert facts.is_adapter and dtypes(run) == "bf16 bf16 fp32 bf16"
    again = load_trained(config, run)
    assert {p.dtype for p in again.trainable_parameters()} == {torch.float32}
    # A checkpoint brings its adapter: none is added.
    checkpointed = load_trained(config, run, checkpoint=tmp_path / "adapter")
    assert len(checkpointed.trainable_parameters()) == len(again.trainable_parameters())


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config", "GptOssConfig"])
def test_flash_attention_is_resolved_without_its_kernel(family, tmp_path):
    """Models without SDPA too; the packing probe then computes as eager attention does."""
    directory = save(build(family), tmp_path / "model")
    flash = {"attn_implementation": "flash_attention_2"}
    config = make_config(directory, "data.jsonl", tmp_path / "run", **flash)
    eager = dataclasses.replace(config, attn_implementation="eager")
    found, expected = (find_facts(each, [], device="cpu") for each in (config, eager))
    assert found.packing_refusal == expected.packing_refusal


def test_an_attention_that_a_user_registered_is_padded(tmp_path, monkeypatch):
    """The packed attention would compute transformers' softmax in the place of the user's."""

    def attend(*args, **kwargs):
        raise NotImplementedError

    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setitem(type(table)._global_mapping, "mine", table["sdpa"])
    model = build("LlamaConfig", implementation="mine")
    directory = save(model, tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run", attn_implementation="mine")
    facts = find_facts(config, [], device="cpu")
    assert "the attention implementation 'mine' is not one of" in facts.packing_refusal
    assert not resolve(config, facts).packed
    # Under a name like those of transformers, too.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine_flash", attend)
    facts = find_facts(
        dataclasses.replace(config, attn_implementation="mine_flash"), [], device="cpu"
    )
    assert "not of transformers" in facts.packing_refusal


def test_a_model_that_has_no_outline_is_padded(tmp_path, monkeypatch, caplog):
    """Model code from elsewhere may fail on tensors without memory; the run goes on."""
    directory = save(build("LlamaConfig"), tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run")

    def broken(*_, **__):
        raise NotImplementedError("no such operator on meta")

    monkeypatch.setattr("una_fast.resolved.sized_outline", broken)
    facts = find_facts(config, [], device="cpu")
    assert "NotImplementedError: no such operator on meta" in facts.packing_refusal
    assert not resolve(config, facts).packed
    assert "batches are padded, not packed" in caplog.text


def test_a_refused_model_is_padded_with_one_line(tmp_path, caplog):
    directory = save(build("BloomConfig"), tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="una_fast"):
        facts = find_facts(config, [], device="cpu")
        run = resolve(config, facts)
        policy = load_trained(config, run)
    assert not run.packed and not policy.packed
    lines = [record.message for record in caplog.records if "pack" in record.message]
    assert lines == [f"batches are padded, not packed: {facts.packing_refusal}"]
    # With packing=false nobody asks.
    unasked = dataclasses.replace(config, packing=False)
    assert find_facts(unasked, [], device="cpu").packing_refusal is None


def test_cached_log_probs_are_looked_for_in_offline_runs_alone(tmp_path):
    directory = save(build("LlamaConfig"), tmp_path / "model")

    def finds(*ref_logps, **settings):
        config = make_config(directory, "data.jsonl", tmp_path / "run", packing=False, **settings)
        return find_facts(config, records(*ref_logps), device="cpu").has_ref_logps

    both = (-1.0, -2.0)
    sampled = {"mode": "mixed", "rewards": ["reward_functions.length"]}
    assert finds(both, both)
    assert not finds(None, None) and not finds()
    assert not finds(both, both, reference="frozen")
    assert not finds(both, both, **sampled)
    with pytest.raises(ValueError, match="data.jsonl:2 has no ref_logps while 1 of 2 records have"):
        finds(both, None)
    assert not finds(both, None, **sampled)
    assert not finds(both, None, reference="frozen")


# ---- asked once --------------------------------------------------------------------------------

# Setting or constant -> the files that may ask for it.
OWNERS = {
    r"(?:config|settings|self)\.reference (?:==|!=)": {"resolved.py", "config.py"},
    # compute_dtype decides, for runs and for una-fast bench.
    r"(?:config|settings|self)\.precision\b": {"resolved.py", "config.py", "head/engines.py"},
    # optim.py names it in a message; fit.py proposes to switch it off.
    r"\.master_weights\b": {"resolved.py", "config.py", "optim.py", "capacity/fit.py"},
    r"\bDEFAULT_WORKSPACE_MB\b": {"head/plan.py"},
    # una-fast check has no run, and a host's trainer none of ours.
    r"\bpacking_refusal\(": {
        "resolved.py",
        "attention/probe.py",
        "attention/packed.py",
        "guide/check.py",
        "integrations/hf/form.py",
    },
    r"\bhas_cached_logps\(": {"resolved.py", "model/reference.py"},
    r"_keep_in_fp32": {"resolved.py"},
    r"\bmatch_autocast\(": {"resolved.py", "model/scoring.py", "capacity/trace.py"},
}


@pytest.mark.parametrize("pattern", OWNERS)
def test_nobody_else_decides(pattern):
    package = ROOT / "una_fast"
    found = set()
    for path in package.rglob("*.py"):
        if re.search(pattern, path.read_text(encoding="utf-8")):
            found.add(path.relative_to(package).as_posix())
    assert found <= OWNERS[pattern], f"{pattern} is asked in {sorted(found - OWNERS[pattern])}"


# ---- what is said, and what is mended ----------------------------------------------------------


def test_what_is_left_out_is_said(decide):
    told = "1 of 4 records have more tokens; the longest, data.jsonl:4, has 164"
    facts = dataclasses.replace(CPU, router_loss=10.0, positions=64, longer_records=told)
    assert decide(facts).lines()[6:] == [
        "left out   the auxiliary loss that balances the router of the experts  [config.json: "
        "output_router_logits, router_aux_loss_coef=10]",
        f"positions  64, as the model was made for; {told}  [max_tokens=64 leaves them out]",
    ]


@pytest.mark.parametrize(("asked", "coefficient"), [(True, 10.0), (False, 0.0)])
def test_the_routers_loss_is_found_in_the_config(asked, coefficient, tmp_path):
    fields = SMALL | {"num_local_experts": 2, "router_aux_loss_coef": 10.0}
    model = build("MixtralConfig", fields | {"output_router_logits": asked})
    config = make_config(save(model, tmp_path), "data.jsonl", tmp_path / "run", packing=False)
    assert find_facts(config, [], device="cpu").router_loss == coefficient


def test_a_pad_beyond_the_embeddings_is_replaced_in_memory(tmp_path):
    tokenizer = make_tokenizer()
    embeddings = torch.nn.Embedding(len(tokenizer), 4)
    policy = SimpleNamespace(causal_lm=SimpleNamespace(get_input_embeddings=lambda: embeddings))
    fit_padding(tokenizer, policy)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    fit_padding(tokenizer, policy)
    assert tokenizer.pad_token == "</s>"
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "[PAD]"


def test_a_checkpoint_goes_on_over_the_base_of_the_settings(tmp_path):
    """The same weights may lie under another path than when the run began."""
    directory = save(build("LlamaConfig"), tmp_path / "model")
    config = make_config(directory, "data.jsonl", tmp_path / "run", lora=LORA)
    policy = load_trained(config, resolve(config, find_facts(config, [], device="cpu")))
    save_pretrained(policy, tmp_path / "checkpoint", Words())
    moved = shutil.move(directory, tmp_path / "moved")
    config = dataclasses.replace(config, model=str(moved))
    run = resolve(config, find_facts(config, [], device="cpu"))
    again = load_trained(config, run, tmp_path / "checkpoint")
    assert AdapterReference(again, scoring_of(config, run)).identity == (
        AdapterReference(policy, scoring_of(config, run)).identity
    )
