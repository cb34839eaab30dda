"""Settings: each is in a group, documented, read, checked, and survives its file."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

import una_fast
from una_fast.capacity.settings import RunPlanConfig
from una_fast.config import ONLINE_TRAJECTORY, TRAJECTORY, RunConfig, setting_groups
from una_fast.data.loader import num_steps
from una_fast.data.settings import RecordOptions
from una_fast.losses import Objective
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.parallel import ParallelOptions

PACKAGE = Path(una_fast.__file__).parent
NEEDED = {"model": "some/model", "data": ["x.jsonl"], "output_dir": "out"}
ONLINE = {"mode": "online", "rewards": ["json:dumps"]}
RECORD_FIELDS = {f.name for f in fields(RecordOptions)}
OBJECTIVE_FIELDS = {f.name for f in fields(Objective)}
MEMORY_FIELDS = {f.name for f in fields(MemoryOptions)}


def config(**settings) -> RunConfig:
    return RunConfig(**NEEDED | settings)


def attributes_read(holders: set[str], skip: str = "") -> set[str]:
    """Names read as attributes of a variable, or an attribute, with a name in `holders`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == skip:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = node.value
                name = getattr(holder, "attr", None) or getattr(holder, "id", None)
                if name in holders:
                    found.add(node.attr)
    return found


def test_every_field_is_read():
    """A setting that nobody reads is accepted and ignored."""
    by_config = {"online_fraction", "off_policy_ok"}
    read = attributes_read({"config"}, skip="config.py") | by_config
    own = {f.name for f in fields(RunConfig)} - RECORD_FIELDS - OBJECTIVE_FIELDS - MEMORY_FIELDS
    assert not own - read
    options = attributes_read({"options"}, skip="config.py")
    assert not {f.name for f in fields(LoraOptions)} - options


def test_every_field_of_the_records_is_read():
    used = attributes_read({"options"}) | {"preset"}
    assert not RECORD_FIELDS - used
    assert RecordOptions(preset="helpsteer2").resolved().divide == 7.6
    settings = {
        "columns": {"completion": "answer"},
        "max_tokens": 77,
        "score_center": "dataset",
        "ties": "drop",
    }
    assert config(**settings).record_options() == RecordOptions(**settings)


@pytest.mark.parametrize("name", sorted(OBJECTIVE_FIELDS))
def test_every_field_of_the_objective_is_passed_on(name):
    other = {
        **{"beta": 0.7, "pair": "squared", "binary": "mse", "score": "reward_mse", "offset": 0.3},
        "length_normalize": True,
    }
    assert config(**{name: other[name]}).objective() == replace(Objective(), **{name: other[name]})


def test_every_memory_switch_is_passed_on():
    on = {"gradient_checkpointing": True, "offload_activations": True, "mlp_tile": 7, "liger": True}
    assert set(on) == MEMORY_FIELDS
    assert config(**on).memory_options() == MemoryOptions(**on)
    # A model that only scores keeps nothing for a backward.
    assert config(**on).memory_options(trained=False) == MemoryOptions(mlp_tile=7, liger=True)


def names_in(groups):
    return list(itertools.chain.from_iterable(group.__annotations__ for group in groups))


def test_every_field_is_in_one_group_of_the_help():
    groups = setting_groups(RunConfig)
    names = names_in(groups)
    assert names == [f.name for f in fields(RunConfig)]
    assert names[:3] == ["model", "data", "output_dir"], "the required settings come first"
    titles = [group.__doc__.split("\n")[0] for group in groups]
    assert len(set(titles)) == len(groups) == 7 and all(title.endswith(".") for title in titles)
    planned = names_in(setting_groups(RunPlanConfig))
    assert planned == [f.name for f in fields(RunPlanConfig)]


@pytest.mark.parametrize("kind", [*setting_groups(RunPlanConfig), LoraOptions, ParallelOptions])
def test_every_field_has_one_line_of_documentation(kind):
    (tree,) = ast.parse(inspect.getsource(kind)).body
    documented = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            documented[node.target.id] = following.value.value if is_text else ""
    assert set(documented) == set(kind.__annotations__)
    bad = [name for name, text in documented.items() if "\n" in text or not text.endswith(".")]
    assert not bad


def test_the_trajectory_names_settings():
    names = {f.name for f in fields(RunConfig)}
    assert set(TRAJECTORY) <= names and len(set(TRAJECTORY)) == len(TRAJECTORY)
    assert set(config().trajectory()) == set(TRAJECTORY)
    assert set(config(**ONLINE).trajectory()) == {*TRAJECTORY, *ONLINE_TRAJECTORY}
    # May change when a run is resumed: how long, how often, where, and how numbers are computed.
    free = """
        model data output_dir tokenizer trust_remote_code reference gradient_checkpointing packing
        attn_implementation workspace_mb engine device epochs max_steps micro_batch_size
        max_tokens_per_batch offload_activations mlp_tile liger memory_gib eval_data
        eval_fraction eval_every save_every save_async save_dtype max_skipped_steps
        keep_checkpoints resume log_every loggers
        progress write_report max_kl on_max_kl saved_completions off_policy_ok
        generation_server parallel
    """
    assert names - set(TRAJECTORY) - set(ONLINE_TRAJECTORY) - RECORD_FIELDS == set(free.split())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "data": "one.jsonl",
            "eval_data": [
                "a",
                {"path": "b", "weight": 2.5, "score_map": "range", "score_range": [1, 5]},
            ],
        },
        {
            "lora": LoraOptions(r=3, target_modules=["q_proj"]),
            "reference": "adapter",
            "max_grad_norm": None,
        },
        {
            "columns": {"completion": "x"},
            "score_map": "range",
            "score_range": [1.0, 5.0],
            "score_center": 0.5,
        },
        {
            "feedback": "both",
            "ties": "soft",
            "margin": "rating_gap",
            "adam_betas": (0.8, 0.95),
            "loggers": [],
        },
    ],
)
def test_settings_survive_their_file(settings, tmp_path):
    written = config(**settings)
    written.save(tmp_path / "config.yaml")
    assert RunConfig(**yaml.safe_load((tmp_path / "config.yaml").read_text())) == written


SECRETS = ["PASS", "WORD", "QUERY", "TOKEN"]
URLS = [
    "http://user:PASSWORD@h:1/v1?key=QUERY&t=TOKEN",
    "http://PASS:WO@RD@h:1/v1?TOKEN",
    "https://user:PASS@h/",
]


@pytest.mark.parametrize("url", URLS)
def test_secrets_are_not_saved_and_the_gaps_are_refused(url, tmp_path):
    os.umask(0o022)
    path = tmp_path / "config.yaml"
    path.write_text("an older file that all may read")
    rewards = [{"judge": url, "judge_model": "j", "name": "r"}]
    written = config(mode="online", rewards=rewards)
    written.save(path)
    text = path.read_text()
    assert not any(secret in text + repr(written.trajectory()) for secret in SECRETS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    saved = yaml.safe_load(text)
    assert saved["rewards"][0]["judge"].startswith(url[: url.index(":")] + "://***@h")
    with pytest.raises(
        ValueError, match=r"rewards holds \*\*\* where a secret was left out.*--rewards"
    ):
        RunConfig(**saved)
    assert RunConfig(**saved | {"rewards": rewards}) == written


def test_steps_without_epochs_are_taken():
    """max_steps alone takes as many passes as it needs; alone, epochs is one pass."""
    assert config().epochs is None
    assert num_steps(10, None, None) == 10
    assert num_steps(10, None, 25) == 25
    assert num_steps(10, 2, 25) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model is missing; set --model or `model:` in the configuration file"),
        ({"data": []}, "data is missing; set --data"),
        ({"data": ""}, "data is missing; set --data"),
        ({"output_dir": ""}, "output_dir is missing; set --output_dir"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"pair": "hinge"}, "pair='hinge' is not one of logistic, linear, squared"),
        ({"reference": "cache"}, "reference='cache' is not one of auto, frozen, adapter, cached"),
        ({"precision": "fp16"}, "precision='fp16' is not one of auto, bf16, fp32"),
        ({"optimizer": "lion"}, "optimizer='lion' is not one of adamw, adamw_8bit, sgd"),
        ({"lr_schedule": "wsd"}, "lr_schedule='wsd' is not one of cosine, linear, constant"),
        ({"engine": "cuda"}, "engine='cuda' is not one of auto, torch, triton"),
        ({"device": "mps"}, "device='mps' is not one of auto, cpu, cuda"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1 must be at least 1, or null"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0 must be at least 1, or null"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or null"),
        ({"mlp_tile": 0}, "mlp_tile=0 must be at least 1 token, or null"),
        ({"memory_gib": 0.0}, "memory_gib=0.0 must be positive and finite, or null"),
        ({"offload_activations": True}, "set gradient_checkpointing=true too"),
        ({"liger": True, "device": "cpu"}, "liger=true needs a GPU; set liger=false"),
        ({"save_every": 0}, "save_every=0 must be at least 1, or null"),
        ({"epochs": 0.0}, "epochs=0.0 must be positive"),
        ({"epochs": 1e300}, "epochs=1e\\+300 must be positive, and at most 1000000"),
        ({"batch_size": None}, "batch_size=null must be a whole number"),
        ({"batch_size": 8.0}, "batch_size=8.0 must be a whole number"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas=\[0.9, 1.0\] must lie in \[0, 1\)"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**70}, "seed=1180591620717411303424 must be a whole number"),
        ({"workspace_mb": -1}, "workspace_mb=-1 must be positive, or null"),
        ({"max_skipped_steps": -1}, "max_skipped_steps=-1 must be at least 0"),
        ({"model": 3}, "model=3 must be a text"),
        ({"lora": {"r": 10**9}}, "lora r=1000000000 must be at least 1, at most 65536"),
        ({"data": ["x", {"path": "y", "weight": 0}]}, r"data\[1\]: weight=0 of y must be positive"),
        ({"data": [{"pat": "y"}]}, r"data\[0\]: .*unknown key 'pat'"),
        ({"eval_data": [{"path": "y", "ties": "x"}]}, r"eval_data\[0\]: .*ties='x'"),
        ({"epochs": float("nan")}, "epochs=nan must be a finite number or null"),
        ({"learning_rate": -1e-6}, "learning_rate=-1e-06 must be at least 0"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio=1.5 must lie in \[0, 1\]"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be positive, or null for no clipping"),
        ({"eval_fraction": 1.0}, r"eval_fraction=1.0 must lie in \[0, 1\)"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "give eval_data or eval_fraction, not both"),
        (
            {"eval_every": 5},
            "eval_every=5 has nothing to evaluate on; set eval_data or eval_fraction",
        ),
        ({"reference": "adapter"}, "reference=adapter needs lora; use reference=frozen or cached"),
        (
            {"optimizer": "sgd", "weight_decay": 0.1},
            "weight_decay=0.1 acts on adamw and adamw_8bit only; rem",
        ),
        (
            {"optimizer": "sgd", "offload_optimizer": True},
            "offload_optimizer=true .* not that of sgd; set optimizer=adamw",
        ),
        (
            {"optimizer": "adamw_8bit", "offload_optimizer": True},
            "offload_optimizer=true .* not that of adamw_8bit",
        ),
        (
            {"output_dir": "some/../some/model"},
            "output_dir=.* is the model itself, which would be overwritten",
        ),
        (
            {"loggers": ["tensorbord"]},
            r"loggers\[0\]='tensorbord' is not one of tensorboard, wandb, trackio",
        ),
        ({"lora": {"r": 0}}, "lora r=0 must be at least 1"),
        ({"lora": {"target_modules": []}}, "lora target_modules is empty; name layers"),
        ({"score_map": "range"}, r"score_map=range needs score_range: \[lo, hi\]"),
        (
            {"max_prompt_tokens": 8, "max_tokens": 8},
            "max_prompt_tokens=8 leaves no room for a response",
        ),
        (
            {"ties": "soft"},
            "ties=soft acts on pairs built from ratings, and feedback=scores builds none",
        ),
        (
            {"preset": "helpsteer2", "divide": 2.0},
            "preset='helpsteer2' sets divide to 7.6; remove divide",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_forms_that_are_chosen_by_the_mode():
    offline, online = config(), config(**ONLINE)
    assert (offline.score, offline.offset) == ("mse", 0.0) and offline.objective() == Objective()
    assert (online.score, online.offset) == (
        "reward_mse",
        "group",
    ) and online.objective().offset == 0.0
    assert (
        config(**ONLINE, samples_per_prompt=1).offset == "ema"
        and config(**ONLINE, offset=-0.5).offset == -0.5
    )
    assert config(**ONLINE, score="mse", reward_map="sigmoid").offset == 0.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_p": 0.9}, "top_p=0.9.*off_policy_ok: true"),
        (
            {"length_normalize": True},
            "length_normalize=True.*set length_normalize: false, or off_policy_ok",
        ),
        ({"offset": "group", "samples_per_prompt": 1}, "samples_per_prompt of at least 2; use ema"),
        ({"offset": "mean"}, "offset='mean' must be a finite number or auto | group | ema"),
        (
            {"offset": "ema", "score": "bce", "reward_map": "sigmoid"},
            "set mode: online and score: reward_mse",
        ),
        (
            {"reference": "cached"},
            "reference=cached has no log-probs of responses yet to be sampled",
        ),
        ({"reference_refresh": 4, "lora": {"r": 2}}, "does not go with lora"),
        (
            {"inner_epochs": 2, "save_every": 3},
            "save_every=3 would save between the 2 inner_epochs",
        ),
        ({"rewards": []}, "needs rewards; set --rewards"),
        ({"rewards": [{"model": "a", "judge": "http://b/v1"}]}, "rewards"),
        ({"reward_map": "range"}, r"reward_map=range needs reward_range: \[lo, hi\]"),
        ({"reward_map": "range", "reward_range": [1, 1]}, "must rise from the lowest"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        (
            {"generation": "continuous", "stop_strings": ["x"]},
            "generation=continuous knows no stop_strings",
        ),
        (
            {"generation": "continuous", "top_p": 0.5, "off_policy_ok": True},
            "set top_p: 1, or generation: padded",
        ),
        (
            {"generation_batch_size": 3},
            "generation_batch_size=3 must hold the samples_per_prompt=4",
        ),
        ({"generation": "vllm", "generation_batch_size": 64}, "not read with generation=vllm"),
        ({"online_fraction": 0.3}, "online_fraction=0.3 is read with mode: mixed"),
        (
            {"feedback": "pairs"},
            "feedback='pairs' makes feedback of records, and mode=online reads prompts",
        ),
        ({"max_kl": 0.0}, "max_kl=0.0 must be positive"),
        ({"on_max_kl": "warn"}, "on_max_kl=warn acts at max_kl, which is not set"),
        ({"mode": "mixed", "temperature": 0.7}, "set temperature: 1, or mode: online"),
        (
            {"mode": "mixed", "online_fraction": 0.01},
            "leaves no prompts, or no records; raise batch_size",
        ),
        (
            {"mode": "offline"},
            "is for sampled responses, and mode is offline; set mode: online or mixed, or remove",
        ),
    ],
)
def test_online_refusals_name_the_flag(settings, match):
    with pytest.raises(ValueError, match=match):
        config(**ONLINE | settings)
