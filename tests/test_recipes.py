"""Every recipe of docs/recipes/ runs, on a tiny model and the demo's kind of records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from test_docs import ROOT
from una_fast.config import RunConfig
from una_fast.demo.base_model import train_base, train_tokenizer
from una_fast.demo.questions import Function
from una_fast.demo.records import Pair, held_out_records, make_records, prompts_of, write_jsonl
from una_fast.demo.settings import QUICK
from una_fast.train.loop import train

RECIPES = sorted((ROOT / "docs/recipes").glob("*.yaml"))
SIZES = replace(QUICK, hidden_size=16, layers=1, vocab_size=300, base_epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory as the demo leaves it: data/, and a tiny chat model in base/."""
    folder = tmp_path_factory.mktemp("demo")
    functions = [Function(f"os.f{k}", "Return it. Now.", "Return it.", True) for k in range(12)]
    tokenizer = train_tokenizer(functions, SIZES.vocab_size)
    model = train_base(functions, tokenizer, SIZES, seed=0, show_progress=False)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    pairs = [Pair(function, "It is. It was.", "It is.") for function in functions]
    for kind, records in make_records(pairs, SIZES).items():
        write_jsonl(folder / f"data/{kind}.jsonl", records)
    write_jsonl(folder / "data/held_out.jsonl", held_out_records(pairs[:3]))
    write_jsonl(folder / "data/prompts.jsonl", prompts_of(functions))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # rewards are named from the root
    text = recipe.read_text(encoding="utf-8").replace("runs/demo/data", str(folder / "data"))
    settings = yaml.safe_load(text)
    assert settings["model"].startswith("HuggingFaceTB/SmolLM2")
    settings |= {"model": str(folder / "base"), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    result = train(RunConfig(**settings, progress=False, write_report=False))
    assert result.steps == 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (step,) = [line for line in map(json.loads, lines) if line.get("loss") is not None]
    assert step["learning_rate"] > 0 and step["grad_norm"] > 0
    if recipe.stem == "online":
        assert {"reward", "rewards/names_the_function/mean"} <= set(step)
    else:
        assert "eval_rewards/accuracies" in result.metrics


def test_there_are_three_recipes_and_the_page_names_them():
    page = (ROOT / "docs/recipes/README.md").read_text(encoding="utf-8")
    assert [path.stem for path in RECIPES] == ["dpo", "mixed", "online"]
    for path in RECIPES:
        assert f"una-fast train --config docs/recipes/{path.name}" in page
        assert f"docs/recipes/{path.name}" in path.read_text(encoding="utf-8")
