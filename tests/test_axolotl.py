"""axolotl's plugin: beside axolotl where it is installed, and else beside a stand-in of its base.

tests/axolotl.sh runs them beside axolotl. The ids of the tests, and the header, say which it was.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pydantic = pytest.importorskip("pydantic")

from tiny import make_records, save_llama, write_jsonl  # noqa: E402
from una_fast import Objective  # noqa: E402
from una_fast.integrations.calls import una_calls  # noqa: E402

INSTALLED = importlib.util.find_spec("axolotl") is not None
HOST = f"axolotl {importlib.metadata.version('axolotl')}" if INSTALLED else "a stand-in of axolotl"
PAGE = Path(__file__).parents[1] / "docs" / "embed" / "axolotl.md"
PLUGIN = "una_fast.integrations.axolotl.UNAPlugin"
beside_axolotl = pytest.mark.skipif(
    not INSTALLED, reason="axolotl is not installed; tests/axolotl.sh builds its environment"
)


def stand_in() -> dict[str, types.ModuleType]:
    """Make the part of axolotl.integrations.base that the adapter meets, by its interface."""

    class BasePlugin:
        def register(self, cfg):
            pass

    class PluginManager:
        """Loads plugins by their dotted name, and goes on after an ImportError."""

        def __init__(self):
            self.plugins = {}

        def register(self, name):
            module, _, attribute = name.rpartition(".")
            try:
                self.plugins[name] = getattr(importlib.import_module(module), attribute)()
            except ImportError as error:
                print(f"Error: {error}")

    modules = {
        name: types.ModuleType(name)
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    }
    modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    modules["axolotl.integrations.base"].PluginManager = PluginManager
    return modules


@pytest.fixture(params=[HOST])
def manager(monkeypatch):
    """Make a manager of plugins without plugins: axolotl's, or the stand-in's."""
    if not INSTALLED:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "una_fast.integrations.axolotl", raising=False)
    base = importlib.import_module("axolotl.integrations.base")
    monkeypatch.setattr(base.PluginManager, "_instance", None, raising=False)
    made = base.PluginManager()
    made.plugins.clear()
    yield made
    if not INSTALLED:
        sys.modules.pop("una_fast.integrations.axolotl", None)


@pytest.fixture
def plugin(manager):
    manager.register(PLUGIN)
    return manager.plugins[PLUGIN]


@pytest.fixture
def adapter(plugin):
    return sys.modules["una_fast.integrations.axolotl"]


class Config(dict):
    """A config whose keys are attributes, None where they are missing."""

    __getattr__ = dict.get
    __setattr__ = dict.__setitem__


def config(**keys: Any) -> Config:
    return Config({"plugins": [PLUGIN], "rl": "dpo", **keys})


def test_the_plugin_brings_its_keys(plugin, adapter):
    module, _, name = plugin.get_input_args().rpartition(".")
    keys = getattr(importlib.import_module(module), name)
    assert keys().model_dump() == {
        "una_head": True,
        "una_pack": "auto",
        "una_workspace_mb": None,
        "una_objective": None,
    }
    with pytest.raises(pydantic.ValidationError, match="una_pack"):
        keys(una_pack="sometimes")


def test_the_page_names_the_plugin_and_its_keys(plugin, adapter):
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    shown = [yaml.safe_load(block) for block in blocks]
    assert [keys["plugins"] for keys in shown] == [[PLUGIN]] * 2
    documented = re.findall(r"^\| `(una_\w+)` ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(dict.fromkeys(documented)) == list(adapter.UNAArgs.model_fields)
    for keys in shown:
        plugin.pre_model_load(config(**keys))
    assert adapter._options["objective"] == Objective(binary="mse")


def test_the_host_swallows_an_import_error_of_a_plugin(manager, tmp_path, monkeypatch):
    """What the adapter is written against: a plugin that cannot be imported is left out."""
    (tmp_path / "broken_plugin.py").write_text("raise ImportError('a library is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    manager.register("broken_plugin.Plugin")
    assert not manager.plugins


def test_an_import_error_of_ours_ends_the_run(manager, monkeypatch):
    """The module loads without the trainers; `register`, which is not guarded, needs them."""
    monkeypatch.setitem(sys.modules, "una_fast.integrations.trl_before_seam", None)
    manager.register(PLUGIN)
    sys.modules["una_fast.integrations.axolotl"]._trainer.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be imported beside this axolotl"):
        manager.plugins[PLUGIN].register(config())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rl": None}, "this config has no rl"),
        ({"rl": "orpo"}, "rl: orpo is not among them .*no reference"),
        ({"rl": "simpo"}, "rl: simpo"),
        ({"rl": "grpo"}, "UNAGRPOTrainer"),
        ({"trainer_cls": "my.Trainer"}, "trainer_cls: my.Trainer"),
        ({"dpo_use_liger_kernel": True}, "dpo_use_liger_kernel"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
        ({"una_objective": {"shape": "square"}}, "no field shape; its fields are"),
        ({"una_objective": {"pair": "square"}}, "pair='square'"),
        ({"una_objective": "logistic"}, "una_objective: logistic has no fields; give some of"),
        ({"una_objective": {}, "rl": "ipo"}, "rl: ipo both name the loss"),
        ({"una_objective": {}, "dpo_loss_type": ["hinge"]}, "dpo_loss_type both name"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_key_before_anything_is_loaded(plugin, adapter, monkeypatch, keys, named):
    monkeypatch.setattr(adapter, "_load_trainers", lambda: pytest.fail("loaded the trainers"))
    for hook in (plugin.register, plugin.pre_model_load):
        with pytest.raises(ValueError, match=named):
            hook(config(**keys))


@pytest.mark.parametrize("keys", [{"una_head": False}, {"plugins": []}], ids=["off", "not listed"])
def test_other_configs_stay_as_they_are(plugin, adapter, keys):
    """axolotl keeps plugins registered for the next config of the process."""
    cfg = config(rl="orpo", **keys)
    before = dict(cfg)
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    plugin.post_train(cfg, None)
    assert cfg == before


@pytest.mark.parametrize(
    ("rl", "name"), [("dpo", "UNADPOTrainer"), ("ipo", "UNADPOTrainer"), ("kto", "UNAKTOTrainer")]
)
def test_the_trainer_is_named_in_the_config(plugin, adapter, rl, name):
    """A class from get_trainer_cls would be built without model and reference."""
    cfg = config(rl=types.SimpleNamespace(value=rl), una_pack=False, una_workspace_mb=64.0)
    plugin.pre_model_load(cfg)
    plugin.pre_model_load(cfg)  # for the reference
    assert cfg.trainer_cls == f"una_fast.integrations.axolotl.{name}"
    assert adapter._options == {"una_pack": False, "una_workspace_mb": 64.0, "objective": None}
    assert getattr(plugin, "get_trainer_cls", lambda cfg: None)(cfg) is None


@pytest.mark.parametrize(
    ("keys", "beta"), [({}, 0.1), ({"rl_beta": 0.3}, 0.3), ({"trl": {"beta": 0.2}}, 0.2)]
)
def test_an_objective_has_the_beta_of_the_run(plugin, adapter, keys, beta):
    plugin.pre_model_load(config(una_objective={"pair": "squared"}, **keys))
    assert adapter._options["objective"] == Objective(beta=beta, pair="squared")


def test_a_run_without_our_log_probs_is_said(plugin, adapter, monkeypatch, caplog):
    calls = {"packed": 0, "padded": 0, "fell_back": 3}
    monkeypatch.setattr(adapter, "una_calls", lambda: calls)
    with caplog.at_level(logging.INFO, logger="axolotl.una_fast"):
        logging.getLogger("axolotl").propagate = True
        plugin.post_train(config(), None)
        plugin.post_train(config(), None)  # axolotl calls the hook twice
    (record,) = [r for r in caplog.records if r.name == "axolotl.una_fast"]
    assert record.levelname == "WARNING"
    assert "3 batches used TRL's logits" in record.getMessage()


# --- beside axolotl -------------------------------------------------------------------------------


@beside_axolotl
def test_every_trainer_is_found_by_its_path(plugin):
    plugin.register(config())
    from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlKTOTrainer
    from axolotl.utils.import_helper import get_cls_from_module_str

    for rl, theirs in (("dpo", AxolotlDPOTrainer), ("kto", AxolotlKTOTrainer)):
        cfg = config(rl=rl)
        plugin.pre_model_load(cfg)
        assert issubclass(get_cls_from_module_str(cfg.trainer_cls), theirs)


def train(root: Path, rl: str, adapter: str | None, **keys: Any) -> list[dict[str, float]]:
    """Train four steps of a tiny Llama with axolotl, as its command does; return the log.

    root: directory of model and data; the run writes beside them
    adapter: "lora" or None
    keys: of the config
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train as train_with_axolotl
    from axolotl.utils.dict import DictDefault

    if not (root / "model").exists():
        save_llama(root / "model")
        rows = make_records("labels" if rl == "kto" else "pairs", 12)
        for row in rows:
            row.pop("weight", None)
        write_jsonl(root / "data.jsonl", rows)
    if adapter:
        keys |= {"adapter": adapter, "lora_r": 4, "lora_alpha": 8}
        keys |= {"lora_target_modules": ["q_proj", "v_proj"]}
    if rl == "kto":
        keys |= {"remove_unused_columns": False}  # axolotl asks for it
    number = len(list(root.glob("run*")))
    cfg = {
        "base_model": str(root / "model"),
        "rl": rl,
        "datasets": [{"path": str(root / "data.jsonl"), "ds_type": "json", "split": "train"}],
        "dataset_prepared_path": str(root / f"prepared{number}"),
        "dataset_num_proc": 1,
        "output_dir": str(root / f"run{number}"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_epochs": 1,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "max_grad_norm": 1e9,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "special_tokens": {"pad_token": "<pad>"},
        **keys,
    }
    cfg = load_cfg(DictDefault(cfg))
    meta = load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    _, _, trainer = train_with_axolotl(cfg=cfg, dataset_meta=meta)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return [line for line in trainer.state.log_history if "loss" in line]


def seed_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed torch when axolotl builds a trainer, with its adapters.

    The first run of a process draws other adapters than the next: imports draw numbers before.
    """
    from axolotl.core.builders.rl import HFRLTrainerBuilder

    own = HFRLTrainerBuilder.build

    def build(self: Any, *args: Any) -> Any:
        torch.manual_seed(3)
        return own(self, *args)

    monkeypatch.setattr(HFRLTrainerBuilder, "build", build)


@beside_axolotl
@pytest.mark.slow
@pytest.mark.parametrize(("rl", "adapter"), [("dpo", None), ("ipo", "lora"), ("kto", "lora")])
def test_axolotl_trains_the_same_with_the_plugin(manager, tmp_path, monkeypatch, rl, adapter):
    """Four SGD steps in float32: losses and gradient norms to 1e-5, every metric, our op called."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seed_builds(monkeypatch)
    before = una_calls()
    truth = train(tmp_path, rl, adapter)
    assert una_calls() == before
    found = train(tmp_path, rl, adapter, plugins=[PLUGIN])
    after = una_calls()
    assert len(found) == len(truth) == 4
    assert truth[0]["loss"] != truth[-1]["loss"]
    for mine, theirs in zip(found, truth, strict=True):
        assert set(mine) == set(theirs)
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert after["packed"] + after["padded"] >= before["packed"] + before["padded"] + 8
    assert after["fell_back"] == before["fell_back"]
    if rl == "dpo":
        objective = {"pair": "logistic"}
        again = train(tmp_path, rl, adapter, plugins=[PLUGIN], una_objective=objective)
        losses = [line["loss"] for line in again]
        assert losses == pytest.approx([line["loss"] for line in truth], rel=1e-5)
