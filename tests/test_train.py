"""A run from its settings to its files: what it learns and reports, and that an interrupted run is the same run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from fsdp_worker import Died, run_case
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny import make_config, make_records, read_metrics, save_llama, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import una_fast.train.checkpoint as checkpoint_module
import una_fast.train.loop as train_module
from una_fast.config import RunConfig
from una_fast.data.batch import layout_tokens
from una_fast.data.examples import Example, load_examples
from una_fast.data.loader import plan_batches
from una_fast.data.sources import Source
from una_fast.distributed import start_world
from una_fast.feedback import Feedback
from una_fast.model.settings import LoraOptions
from una_fast.train.checkpoint import complete_checkpoints
from una_fast.train.loop import Trainer, check_token_ids, train
from una_fast.train.precompute import precompute_reference
from una_fast.train.run_data import load_data

LORA = LoraOptions(r=4, alpha=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def open_trainer(config: RunConfig) -> Trainer:
    """The parts of a run whose steps the test takes by itself."""
    world = start_world(config.device)
    torch.manual_seed(config.seed)
    Path(config.output_dir).mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return Trainer(config, world, tokenizer, load_data(config, tokenizer))


def weights_of(output_dir: str | Path) -> dict[str, torch.Tensor]:
    (file,) = [
        *Path(output_dir).glob("model.safetensors"),
        *Path(output_dir).glob("adapter_model.safetensors"),
    ]
    return load_file(file)


def assert_same_weights(one: str | Path, two: str | Path) -> None:
    one, two = weights_of(one), weights_of(two)
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


# ---------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def finished(llamas, tmp_path_factory):
    """A run over every kind of feedback, strings and chats, several sources with weights."""
    root = tmp_path_factory.mktemp("finished")

    def file(kind: str, count: int = 8) -> str:
        return write_jsonl(root / f"{kind}.jsonl", make_records(kind, count))

    data = [
        file("pairs"),
        {"path": file("labels"), "weight": 2},
        file("several"),
        {"path": file("scores"), "weight": 0.5},
        file("instructions", 4),
        {"path": file("ratings"), "feedback": "both", "score_map": "range", "score_range": [1, 10]},
        {"path": file("chats"), "weight": 1.5},
    ]
    config = make_config(
        llamas["untied"],
        data,
        root / "run",
        eval_data=write_jsonl(root / "eval.jsonl", make_records("mixed", 9, seed=7)),
        batch_size=16,
        micro_batch_size=4,
        learning_rate=3e-3,
        lr_schedule="cosine",
        warmup_ratio=0.2,
        epochs=4,
        save_every=8,
        loggers=["tensorboard"],
    )
    return config, train(config)


def test_a_run_leaves_every_output(finished):
    config, result = finished
    files = {path.name for path in result.output_dir.iterdir()}
    assert {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "README.md",
        "tensorboard",
        "model.safetensors",
    } <= files
    card = (result.output_dir / "README.md").read_text()
    assert (
        "una/calibration_error" in card
        and "labels.jsonl: 8 records -> 8 examples (8 binary units)" in card
    )
    reports = json.loads((result.output_dir / "data.json").read_text())
    assert [report["examples"] for report in reports] == [8, 8, 8, 8, 4, 8, 8, 9]
    assert reports[5]["units"] == {"pair": 8, "score": 16} and reports[4]["unlabelled"] == 4
    # 52 records in sources of weight 1, 2, 1, 1/2, 1, 1, 1.5: 8 + 16 + 8 + 4 + 4 + 8 + 12 = 60, in 4 steps of 16
    assert result.steps == 16


def test_saved_settings_are_the_settings(finished):
    config, result = finished
    assert RunConfig(**yaml.safe_load((result.output_dir / "config.yaml").read_text())) == config


def test_metrics_have_the_names_of_trl(finished):
    config, result = finished
    lines = read_metrics(result.output_dir, without=())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    names = "loss grad_norm learning_rate epoch rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
    names += "logps/chosen logps/rejected una/target_mean una/implicit_mean una/calibration_error kl tok_per_sec "
    names += "memory/peak_gib units tokens response_tokens"
    everything = {name: value for line in steps for name, value in line.items()}
    assert set(names.split()) <= set(everything)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 16]
    assert (
        result.metrics["eval_loss"] == lines[-1]["eval_loss"]
        and result.metrics["loss"] == steps[-1]["loss"]
    )


def test_the_loss_falls(finished):
    _, result = finished
    lines = read_metrics(result.output_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    assert lines[-2]["rewards/accuracies"] > 0.9
    assert (
        lines[0]["eval_kl"] == 0 and lines[0]["eval_una/implicit_mean"] == 0.5
    )  # the policy starts as the reference


def test_learning_rate_is_reported_for_the_step_that_used_it(finished):
    _, result = finished
    rates = [line["learning_rate"] for line in read_metrics(result.output_dir) if "loss" in line]
    assert rates[:4] == pytest.approx(
        [0.0, 1e-3, 2e-3, 3e-3]
    )  # 0.2 of 16 steps are 3 steps of warmup
    cosine = [3e-3 * 0.5 * (1 + math.cos(math.pi * k / 13)) for k in range(13)]
    assert rates[3:] == pytest.approx(cosine)


def test_a_constant_learning_rate_has_its_warmup(llamas, mixed, tmp_path):
    settings = {
        "learning_rate": 1e-3,
        "warmup_ratio": 0.5,
        "max_steps": 4,
        "batch_size": 4,
        "micro_batch_size": 4,
    }
    train(
        make_config(llamas["untied"], mixed, tmp_path / "run", lr_schedule="constant", **settings)
    )
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "run")] == [
        0.0,
        5e-4,
        1e-3,
        1e-3,
    ]


def test_tensorboard_has_the_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = finished
    board = EventAccumulator(str(result.output_dir / "tensorboard")).Reload()
    logged = [event.value for event in board.Scalars("rewards/margins")]
    lines = [line for line in read_metrics(result.output_dir) if "rewards/margins" in line]
    assert logged == pytest.approx([line["rewards/margins"] for line in lines], rel=1e-6)


@pytest.mark.parametrize("what", ["final", "checkpoint"])
def test_the_saved_model_generates(finished, what):
    config, result = finished
    directory = (
        result.output_dir if what == "final" else complete_checkpoints(result.output_dir)[-1]
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    assert model.dtype == torch.float32
    prompt = tokenizer("the cat sat", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert prompt["input_ids"].shape[1] < out.shape[1] <= prompt["input_ids"].shape[1] + 5
    base = AutoModelForCausalLM.from_pretrained(config.model)
    assert not torch.equal(base.lm_head.weight, model.lm_head.weight)
    if what == "checkpoint":  # step 16 is the last one
        assert_same_weights(result.output_dir, directory)


def test_a_lora_run_saves_an_adapter_that_loads(llamas, mixed, tmp_path):
    train(
        make_config(
            llamas["untied"], mixed, tmp_path / "run", lora=LORA, max_steps=2, learning_rate=1e-2
        )
    )
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    changed = [
        name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0
    ]
    assert len(changed) == 14  # seven linear layers in each of two blocks
    AutoModelForCausalLM.from_pretrained(tmp_path / "run").generate(
        torch.tensor([[0, 5]]), max_new_tokens=2
    )


def test_an_adapter_is_trained_on_against_its_own_start(llamas, mixed, tmp_path):
    train(
        make_config(
            llamas["untied"], mixed, tmp_path / "one", lora=LORA, max_steps=2, learning_rate=1e-2
        )
    )
    train(
        make_config(str(tmp_path / "one"), mixed, tmp_path / "two", max_steps=2, learning_rate=1e-2)
    )
    assert read_metrics(tmp_path / "two")[0]["kl"] == 0
    assert weights_of(tmp_path / "two").keys() == weights_of(tmp_path / "one").keys()


# ---------------------------------------------------------------------- the numbers in the report


def own_logps(model_dir: str, data: str) -> list[list[float]]:
    """Log-probs of the responses of every record, from the model's full logits, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples, _ = load_examples(Source(data), tokenizer, require_unit_scores=True)
    result = []
    for example in examples:
        result.append([])
        for response in example.responses:
            ids = torch.tensor(np.concatenate([example.prompt_ids, response]), dtype=torch.int64)
            with torch.no_grad():
                logps = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
            start = len(example.prompt_ids)
            result[-1].append(float(logps[range(start - 1, len(ids) - 1), ids[start:]].sum()))
    return result


@pytest.fixture(scope="module")
def biased(llamas, mixed, tmp_path_factory):
    """The mixed records with reference log-probs that lie a few nats beside the policy's: rewards are not zero."""
    rng = np.random.default_rng(11)
    records = [json.loads(line) for line in Path(mixed).read_text().splitlines()]
    for record, logps in zip(records, own_logps(llamas["untied"], mixed), strict=True):
        record["ref_logps"] = [value + rng.normal(scale=6) for value in logps]
    return write_jsonl(tmp_path_factory.mktemp("biased") / "biased.jsonl", records)


def test_metrics_by_hand(llamas, mixed, biased, tmp_path):
    beta = 0.3
    config = make_config(
        llamas["untied"], biased, tmp_path / "run", batch_size=36, micro_batch_size=5, beta=beta
    )
    train(config)
    (line,) = read_metrics(tmp_path / "run")

    chosen, rejected, correct, points, losses, ratios, lps = [], [], [], [], [], [], []
    for text, logps in zip(
        Path(biased).read_text().splitlines(), own_logps(llamas["untied"], mixed), strict=True
    ):
        record = json.loads(text)
        delta = np.subtract(logps, record["ref_logps"])
        ratios += delta.tolist()
        r = beta * delta
        if "chosen" in record:
            chosen.append(r[0])
            rejected.append(r[1])
            lps.append(logps)
            correct.append(r[0] > r[1])
            losses.append(record.get("weight", 1.0) * np.log1p(np.exp(r[1] - r[0])))
        elif "scores" in record or "score" in record:
            for reward, score in zip(r, record.get("scores", [record.get("score")]), strict=True):
                points.append((1 / (1 + np.exp(-reward)), score))
                losses.append((points[-1][0] - score) ** 2)
        else:
            label = float(record.get("label", True))
            points.append((1 / (1 + np.exp(-r[0])), label))
            losses.append(-np.log(points[-1][0] if label else 1 - points[-1][0]))
    implied, wanted = np.array(points).T
    bins = np.minimum((implied * 10).astype(int), 9)
    gaps = [abs((implied - wanted)[bins == k].sum()) for k in range(10)]
    expected = {
        "loss": np.mean(losses),
        "units": len(losses),
        "rewards/chosen": np.mean(chosen),
        "rewards/rejected": np.mean(rejected),
        "rewards/margins": np.mean(chosen) - np.mean(rejected),
        "rewards/accuracies": np.mean(correct),
        "logps/chosen": np.mean(lps, 0)[0],
        "logps/rejected": np.mean(lps, 0)[1],
        "una/target_mean": wanted.mean(),
        "una/implicit_mean": implied.mean(),
        "una/calibration_error": sum(gaps) / len(points),
        "kl": np.mean(ratios),
        "epoch": 1.0,
        "step": 1,
    }
    assert (
        len(chosen) == 12 and len(points) > 20 and 0 < np.mean(correct) < 1 and len(set(bins)) > 5
    )
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(llamas["untied"])
    examples, _ = load_examples(Source(biased), tokenizer, require_unit_scores=True)
    responses = sum(len(response) for e in examples for response in e.responses)
    assert line["response_tokens"] == responses
    assert line["tokens"] == responses + sum(len(e.prompt_ids) for e in examples)


def test_gradient_norm_by_hand(llamas, mixed, tmp_path):
    """At the start r = 0: pairs pull with weight * beta / 2, scores with beta * (1/2 - s) / 2, labels with beta / 2."""
    config = make_config(
        llamas["tied"], mixed, tmp_path / "run", batch_size=36, beta=0.2, max_grad_norm=None
    )
    train(config)
    (line,) = read_metrics(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(llamas["tied"])
    tokenizer = AutoTokenizer.from_pretrained(llamas["tied"])
    examples, _ = load_examples(Source(mixed), tokenizer, require_unit_scores=True)
    total, units = 0.0, 0
    for text, example in zip(Path(mixed).read_text().splitlines(), examples, strict=True):
        record = json.loads(text)
        if "chosen" in record:
            pulls = [-record.get("weight", 1.0) / 2, record.get("weight", 1.0) / 2]
            units += 1
        elif "scores" in record or "score" in record:
            pulls = [0.5 * (0.5 - score) for score in record.get("scores", [record.get("score")])]
            units += len(pulls)
        else:
            pulls = [0.5 - float(record.get("label", True))]
            units += 1
        for pull, response in zip(pulls, example.responses, strict=True):
            ids = torch.tensor(np.concatenate([example.prompt_ids, response]), dtype=torch.int64)
            start = len(example.prompt_ids)
            logits = model(ids[None]).logits[0, start - 1 : -1]
            total = total - 0.2 * pull * F.cross_entropy(logits, ids[start:], reduction="sum")
    (total / units).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["units"] == units
    assert line["grad_norm"] == pytest.approx(float(norm), rel=2e-5)


def test_clipping_and_reported_norm(llamas, mixed, tmp_path):
    """The reported norm is the one before clipping; the step is that of the clipped gradient."""
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "max_steps": 1, "batch_size": 36}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", max_grad_norm=0.01, **plain))
    (line,) = read_metrics(tmp_path / "run")
    assert line["grad_norm"] > 0.1
    before, after = weights_of(llamas["untied"]), weights_of(tmp_path / "run")
    moved = math.sqrt(
        sum(float((after[name] - before[name]).double().pow(2).sum()) for name in before)
    )
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_metrics_are_averaged_over_the_steps_between_reports(llamas, mixed, tmp_path):
    frozen = {
        "learning_rate": 0.0,
        "batch_size": 10,
        "micro_batch_size": 3,
    }  # steps of 10, 10, 10 and 6 records
    train(make_config(llamas["untied"], mixed, tmp_path / "one", **frozen))
    train(make_config(llamas["untied"], mixed, tmp_path / "two", log_every=3, **frozen))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [3, 4]
    units = [line["units"] for line in one[:3]]
    assert two[0]["units"] == sum(units) and two[0]["tokens"] == sum(
        line["tokens"] for line in one[:3]
    )
    assert two[0]["loss"] == pytest.approx(
        np.average([line["loss"] for line in one[:3]], weights=units)
    )
    assert {**two[1], "epoch": 1} == one[3]


def test_score_center_reaches_the_loss_and_is_saved(llamas, tmp_path):
    """An unchanged policy stands at the mean score of each source, and the loss is the variance of the scores."""
    low = [
        {**record, "score": round(0.3 * record["score"], 3)}
        for record in make_records("scores", 12)
    ]
    sources = [
        write_jsonl(tmp_path / "a.jsonl", low),
        write_jsonl(tmp_path / "b.jsonl", make_records("several", 6)),
    ]
    config = make_config(
        llamas["untied"], sources, tmp_path / "run", score_center="dataset", batch_size=18
    )
    train(config)
    (line,) = read_metrics(tmp_path / "run")
    scores = [
        [r["score"] for r in low],
        [s for r in make_records("several", 6) for s in r["scores"]],
    ]
    reports = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [report["score_center"] for report in reports] == pytest.approx(
        [np.mean(part) for part in scores]
    )
    assert (
        line["una/implicit_mean"]
        == pytest.approx(line["una/target_mean"])
        == np.mean(sum(scores, []))
    )
    residuals = np.concatenate([np.array(part) - np.mean(part) for part in scores])
    assert line["loss"] == pytest.approx(np.mean(residuals**2))
    assert "score centre" in (tmp_path / "run" / "README.md").read_text()


# ---------------------------------------------------------------------- the same numbers whichever way it runs


@pytest.fixture(scope="module")
def two_steps(llamas, biased, tmp_path_factory):
    """loss and gradient norm of two unclipped steps under some settings."""
    root = tmp_path_factory.mktemp("ways")

    def run(**settings) -> np.ndarray:
        out = root / str(len(list(root.iterdir())))
        sgd = {
            "optimizer": "sgd",
            "learning_rate": 0.02,
            "max_grad_norm": None,
            "batch_size": 36,
            "epochs": 2,
        }
        data = settings.pop("data", biased)
        train(
            make_config(llamas["untied"], data, out, **{**sgd, "micro_batch_size": 6, **settings})
        )
        return np.array([[line["loss"], line["grad_norm"]] for line in read_metrics(out)])

    torch.set_num_threads(1)
    return run, run()


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": False},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 36},
        {"micro_batch_size": 36, "packing": False},
        {"micro_batch_size": None},
        *(
            {"micro_batch_size": None, "max_tokens_per_batch": tokens}
            for tokens in (1, 60, 150, 10**6)
        ),
        *(
            {"micro_batch_size": None, "max_tokens_per_batch": tokens, "packing": False}
            for tokens in (60, 10**6)
        ),
        {"micro_batch_size": 3, "max_tokens_per_batch": 100},
        {"seed": 5},  # another order within the batch
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "packing": False},
        {"workspace_mb": 0.02},  # 17 rows of logits
        {"workspace_mb": 0.0005},  # less than a row
        {"attn_implementation": "eager", "packing": False},
    ],
    ids=lambda settings: ", ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_loss_and_gradient_do_not_depend_on(two_steps, settings):
    run, expected = two_steps
    assert expected.shape == (2, 2) and expected[1, 0] < expected[0, 0]
    np.testing.assert_allclose(run(**settings), expected, rtol=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_file(two_steps, biased, tmp_path):
    run, expected = two_steps
    backwards = Path(biased).read_text().splitlines(keepends=True)[::-1]
    (tmp_path / "backwards.jsonl").write_text("".join(backwards))
    np.testing.assert_allclose(run(data=str(tmp_path / "backwards.jsonl")), expected, rtol=1e-5)


def test_packing_packs(llamas, mixed, tmp_path):
    """The prompt of several responses goes through the model once."""
    for packing in (True, False):
        train(
            make_config(
                llamas["untied"], mixed, tmp_path / str(packing), packing=packing, batch_size=36
            )
        )
    (packed,), (padded,) = read_metrics(tmp_path / "True"), read_metrics(tmp_path / "False")
    assert (
        packed["tokens"] < padded["tokens"]
        and packed["response_tokens"] == padded["response_tokens"]
    )


def test_padding_is_the_share_of_what_collate_adds(llamas, mixed, tmp_path):
    settings = {"batch_size": 36, "micro_batch_size": 36}
    for packing in (True, False):
        train(
            make_config(
                llamas["untied"], mixed, tmp_path / str(packing), packing=packing, **settings
            )
        )
    (packed,), (padded,) = (read_metrics(tmp_path / name, without=()) for name in ("True", "False"))
    tokenizer = AutoTokenizer.from_pretrained(llamas["untied"])
    examples, _ = load_examples(Source(mixed), tokenizer, require_unit_scores=True)
    lengths = [len(e.prompt_ids) + len(response) for e in examples for response in e.responses]
    assert packed["padding"] == 0 and padded["tokens"] == sum(lengths)
    batches = plan_batches(examples, packed=False, max_tokens=None, max_records=36)
    laid_out = sum(layout_tokens(batch, packed=False) for batch in batches)
    assert (
        padded["padding"] == pytest.approx(1 - sum(lengths) / laid_out) and padded["padding"] > 0.1
    )


# ---------------------------------------------------------------------- references


FEW = {"learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 3, "max_steps": 6}


@pytest.fixture(scope="module")
def frozen_run(llamas, mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "frozen"
    torch.set_num_threads(1)
    train(make_config(llamas["untied"], mixed, out, eval_data=mixed, **FEW))
    return read_metrics(out)


def assert_same_metrics(one: list[dict], two: list[dict], tolerance: float) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def test_cached_reference_is_the_frozen_one(llamas, mixed, tmp_path, frozen_run):
    entry = {"path": mixed, "weight": 1}
    config = make_config(
        llamas["untied"], [entry], tmp_path / "cache", eval_data=mixed, micro_batch_size=4
    )
    entries = precompute_reference(config)
    assert entries.keys() == {"data", "eval_data"} and entries["data"][0]["weight"] == 1
    lines = Path(entries["data"][0]["path"]).read_text().splitlines()
    for line, logps in zip(lines, own_logps(llamas["untied"], mixed), strict=True):
        assert json.loads(line)["ref_logps"] == pytest.approx(logps, rel=1e-5)
    train(make_config(llamas["untied"], output_dir=tmp_path / "run", **entries, **FEW))
    assert_same_metrics(read_metrics(tmp_path / "run"), frozen_run, 1e-6)


def test_precomputed_logps_do_not_depend_on_the_batches(llamas, mixed, tmp_path):
    """Batches of other records, in another order, padded and packed: each line keeps its own numbers."""
    ways = [
        {},
        {"max_tokens_per_batch": 100},
        {"max_tokens_per_batch": 150, "packing": False, "batch_size": 7},
    ]
    found = []
    for number, way in enumerate(ways):
        entries = precompute_reference(
            make_config(llamas["untied"], mixed, tmp_path / str(number), **way)
        )
        lines = Path(entries["data"][0]["path"]).read_text().splitlines()
        found.append([value for line in lines for value in json.loads(line)["ref_logps"]])
    assert len(found[0]) > 40
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


def test_precomputed_columns_keep_their_names(llamas, tmp_path):
    records = [{**record, "old": [1.0, 2.0]} for record in make_records("pairs", 3)]
    source = {"path": write_jsonl(tmp_path / "x.jsonl", records), "columns": {"ref_logps": "old"}}
    entries = precompute_reference(make_config(llamas["untied"], [source], tmp_path / "cache"))
    train(make_config(llamas["untied"], output_dir=tmp_path / "run", **entries, reference="cached"))
    assert read_metrics(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_adapter_reference_is_the_frozen_one(llamas, mixed, tmp_path):
    for reference in ("adapter", "frozen", "auto"):
        train(
            make_config(
                llamas["untied"], mixed, tmp_path / reference, lora=LORA, reference=reference, **FEW
            )
        )
    expected = read_metrics(tmp_path / "frozen")
    assert expected[-1]["kl"] != 0
    for reference in ("adapter", "auto"):
        assert_same_metrics(read_metrics(tmp_path / reference), expected, 1e-6)


def test_no_reference_model_is_kept_where_none_is_needed(
    llamas, mixed, biased, tmp_path, monkeypatch
):
    loaded = []
    load = train_module.load_policy
    monkeypatch.setattr(
        train_module, "load_policy", lambda *a, **k: loaded.append(a) or load(*a, **k)
    )
    for data, lora, models in ((mixed, None, 2), (mixed, LORA, 1), (biased, None, 1)):
        loaded.clear()
        open_trainer(
            make_config(llamas["untied"], data, tmp_path / f"{models}{lora is None}", lora=lora)
        )
        assert len(loaded) == models


# ---------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def bf16_llama(tmp_path_factory):
    """The untied model, its weights rounded to bf16, as most models come."""
    directory = save_llama(tmp_path_factory.mktemp("bf16") / "llama")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def test_bf16_master_weights(bf16_llama, mixed, tmp_path, frozen_run):
    """Computed in bf16, trained in fp32: an update of 1e-5 is not lost to the rounding of bf16 weights."""
    master = {"precision": "bf16", "master_weights": True}
    config = make_config(bf16_llama, mixed, tmp_path / "run", eval_data=mixed, **master, **FEW)
    train(config)
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["eval_kl"] == 0  # the reference is computed exactly as the policy
    assert all(math.isfinite(value) for line in lines for value in line.values())
    losses, expected = (
        [line[k] for line in run for k in line if "loss" in k] for run in (lines, frozen_run)
    )
    assert losses == pytest.approx(expected, abs=0.02) and losses != expected
    assert {w.dtype for w in weights_of(tmp_path / "run").values()} == {torch.float32}

    parts = open_trainer(make_config(bf16_llama, mixed, tmp_path / "parts", **master))
    assert {p.dtype for p in parts.policy.model.parameters()} == {torch.float32}
    reference = parts.reference.policy.model.parameters()
    assert {p.dtype for p in reference if p.dim() > 1} == {torch.bfloat16}, (
        "no fp32 copy but of the norms"
    )

    tiny_step = {
        **master,
        "optimizer": "sgd",
        "max_steps": 1,
        "learning_rate": 1e-4,
        "batch_size": 36,
    }
    train(make_config(bf16_llama, mixed, tmp_path / "tiny", **tiny_step))
    before, after = (
        weights_of(bf16_llama)["lm_head.weight"],
        weights_of(tmp_path / "tiny")["lm_head.weight"],
    )
    assert (before.float() != after).float().mean() > 0.5 and (
        before == after.bfloat16()
    ).float().mean() > 0.9


@pytest.mark.parametrize("offload", [False, True])
def test_bf16_weights(bf16_llama, mixed, tmp_path, frozen_run, offload):
    """Weights, gradients and what is saved are bf16; the run learns as one in fp32 does."""
    settings = {"precision": "bf16", "offload_optimizer": offload}
    train(make_config(bf16_llama, mixed, tmp_path / "run", eval_data=mixed, **settings, **FEW))
    lines = read_metrics(tmp_path / "run")
    assert lines[0]["eval_kl"] == 0  # the reference is computed exactly as the policy
    losses, expected = (
        [line[k] for line in run for k in line if "loss" in k] for run in (lines, frozen_run)
    )
    assert losses == pytest.approx(expected, abs=0.02) and losses != expected
    assert {w.dtype for w in weights_of(tmp_path / "run").values()} == {torch.bfloat16}


def test_bf16_weights_move_by_less_than_they_can(bf16_llama, mixed, tmp_path):
    """Four updates of 1e-6 are below half the spacing of most weights, which rounding to the nearest would not move.
    Stochastically, a weight moves as often as its spacing demands, and in the mean by what fp32 training moves it."""
    small = {"precision": "bf16", "learning_rate": 1e-6, "batch_size": 9, "max_steps": 4}
    moved = {}
    for master in (True, False):
        train(
            make_config(bf16_llama, mixed, tmp_path / str(master), master_weights=master, **small)
        )
        before, after = weights_of(bf16_llama), weights_of(tmp_path / str(master))
        moved[master] = torch.cat(
            [(after[n].double() - before[n].double()).flatten() for n in before]
        )
        if master:
            kept = torch.cat([(after[n].bfloat16() == before[n]).flatten() for n in before])
            direction = moved[True].sign()
    assert kept.double().mean() > 0.95
    along = (moved[False] * direction)[kept]
    share = float((along != 0).double().mean())
    assert 0.002 < share < 0.2
    error = along - (moved[True] * direction)[kept]
    standard_error = float(error.std()) / len(error) ** 0.5
    assert float((moved[True] * direction)[kept].mean()) > 8 * standard_error, (
        "the test can see the update"
    )
    assert abs(float(error.mean())) < 4 * standard_error


@pytest.mark.slow
def test_adamw_8bit_runs_and_resumes(llamas, mixed, tmp_path):
    """torchao's optimizer under a schedule of numbers, with some moments in 8 bits."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llamas["untied"])
    model.resize_token_embeddings(320)  # of 32 numbers: whole blocks of 256
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(llamas["untied"]).save_pretrained(tmp_path / "model")
    settings = {
        "optimizer": "adamw_8bit",
        "precision": "bf16",
        "weight_decay": 0.1,
        "lr_schedule": "cosine",
    }
    config = make_config(
        str(tmp_path / "model"), mixed, tmp_path / "whole", save_every=2, **settings, **FEW
    )
    train(config)
    lines = read_metrics(tmp_path / "whole")
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([3e-3 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5)])
    parts = open_trainer(RunConfig(**again(config, tmp_path / "parts")))
    parts.take_step(next(parts.source.steps(0, 1)))
    assert (
        parts.optimizer.state[parts.policy.causal_lm.lm_head.weight]["exp_avg"].codes.dtype
        == torch.uint8
    )
    run_case(again(config, tmp_path / "run"), 4)
    train(RunConfig(**again(config, tmp_path / "run", resume=True)))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == lines


def test_bf16_lora(llamas, mixed, tmp_path):
    losses = {}
    for precision in ("bf16", "fp32"):
        config = make_config(
            llamas["untied"],
            mixed,
            tmp_path / precision,
            eval_data=mixed,
            lora=LORA,
            precision=precision,
            **FEW,
        )
        train(config)
        losses[precision] = [
            line[k] for line in read_metrics(tmp_path / precision) for k in line if "loss" in k
        ]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["bf16"][0] == losses["fp32"][0]  # kl 0
    assert {w.dtype for w in weights_of(tmp_path / "bf16").values()} == {torch.float32}
    config = make_config(llamas["untied"], mixed, tmp_path / "parts", lora=LORA, precision="bf16")
    dtypes = {(p.requires_grad, p.dtype) for p in open_trainer(config).policy.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_bf16_cached_reference_starts_at_zero(bf16_llama, mixed, tmp_path):
    """precompute-ref computes as the trainer does: in bf16, or under autocast beside fp32 weights."""
    for name, way in {
        "lora": {"lora": LORA},
        "full": {},
        "master": {"master_weights": True},
    }.items():
        out = tmp_path / name
        settings = {"precision": "bf16", "micro_batch_size": 4, **way}
        entries = precompute_reference(make_config(bf16_llama, mixed, out, **settings))
        config = make_config(
            bf16_llama, output_dir=out / "run", **entries, **settings, batch_size=36
        )
        train(config)
        assert abs(read_metrics(out / "run")[0]["kl"]) < 1e-3


# ---------------------------------------------------------------------- counted work


class HeadWork(TorchDispatchMode):
    """Multiply-adds of matrix products with the head, and how many new tensors have the shape of its weight."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.vocab, self.dim, self.products, self.buffers = vocab, dim, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            a, b = args[-2:]
            if {self.vocab, self.dim} <= {*a.shape, *b.shape}:
                self.products += a.numel() * b.shape[-1]
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.buffers += x.numel() == self.vocab * self.dim
        return out

    def passes(self, rows: float) -> float:
        return self.products / (rows * self.vocab * self.dim)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 4), ({"lora": LORA}, 3), ({"cached": True}, 3), ({"cached": True, "lora": LORA}, 2)],
)
def test_head_passes_of_a_step_and_of_an_evaluation(
    llamas, mixed, biased, tmp_path, settings, passes
):
    data = biased if settings.pop("cached", False) else mixed
    config = make_config(
        llamas["untied"],
        data,
        tmp_path / "run",
        eval_data=data,
        batch_size=36,
        micro_batch_size=9,
        **settings,
    )
    trainer = open_trainer(config)
    vocab, dim = trainer.policy.head.weight.shape
    (step,) = trainer.source.steps(0, 1)
    rows = sum(
        len(response) for part in step.micro_batches for e in part for response in e.responses
    )
    with HeadWork(vocab, dim) as work:
        for examples in step.micro_batches:
            trainer.score(examples, step.num_units, trainer.reference).loss.backward()
    assert work.passes(rows) == passes
    assert (work.buffers > 0) == (config.lora is None)
    trainer.optimizer.zero_grad()

    with HeadWork(vocab, dim) as work:
        metrics = trainer.evaluate(0)
    assert metrics["eval_response_tokens"] == rows
    assert work.passes(rows) == (1 if data is biased else 2) and work.buffers == 0


def test_evaluation_leaves_training_as_it_was(llamas, mixed, tmp_path):
    """Neither the steps nor their metrics depend on how often the policy is evaluated."""
    train(make_config(llamas["untied"], mixed, tmp_path / "without", log_every=2, **FEW))
    train(
        make_config(
            llamas["untied"],
            mixed,
            tmp_path / "with",
            eval_data=mixed,
            eval_every=1,
            log_every=2,
            **FEW,
        )
    )
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    lines = [line for line in read_metrics(tmp_path / "with") if "loss" in line]
    assert lines == read_metrics(tmp_path / "without")


def test_held_out_records_are_not_trained_on(llamas, mixed, tmp_path):
    train(make_config(llamas["untied"], mixed, tmp_path / "run", eval_fraction=0.25, batch_size=36))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert lines[1]["units"] + lines[0]["eval_units"] == sum(
        report["units"][kind]
        for report in json.loads((tmp_path / "run/data.json").read_text())
        for kind in report["units"]
    )
    assert lines[0]["eval_units"] > 0


# ---------------------------------------------------------------------- resuming


def settings_of(config: RunConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in fields(config)}


# 36 records in steps of 8 make an epoch of 5 steps: the tenth step ends the second one.
LONG = {
    **{
        "learning_rate": 3e-3,
        "batch_size": 8,
        "micro_batch_size": 5,
        "epochs": 2.5,
        "lr_schedule": "cosine",
    },
    **{"warmup_ratio": 0.2, "save_every": 2, "eval_every": 4, "log_every": 3},
}
VARIANTS = {
    "full": ("untied", {"weight_decay": 0.1}),
    "tied": ("tied", {"gradient_checkpointing": True}),
    "lora": ("untied", {"lora": LORA}),
    "lora bf16": ("tied", {"lora": LORA, "precision": "bf16"}),
    "short": ("untied", {"max_steps": 6}),
    "sgd bf16": ("tied", {"optimizer": "sgd", "precision": "bf16", "master_weights": True}),
    "bf16": ("tied", {"precision": "bf16", "weight_decay": 0.1}),
    "bf16 offloaded": ("tied", {"precision": "bf16", "offload_optimizer": True}),
    "fp32 offloaded": ("untied", {"offload_optimizer": True}),
}


@pytest.fixture(scope="module")
def uninterrupted(llamas, mixed, tmp_path_factory):
    """(settings, output directory) of a whole run of a variant, made once."""
    root, made = tmp_path_factory.mktemp("uninterrupted"), {}
    held_out = write_jsonl(root / "eval.jsonl", make_records("mixed", 6, seed=7))

    def get(variant: str) -> tuple[RunConfig, Path]:
        if variant not in made:
            model, extra = VARIANTS[variant]
            config = make_config(
                llamas[model], mixed, root / variant, eval_data=held_out, **LONG, **extra
            )
            train(config)
            made[variant] = config
        return made[variant], Path(made[variant].output_dir)

    return get


def again(config: RunConfig, output_dir: Path, **changes) -> dict:
    return settings_of(config) | {"output_dir": str(output_dir)} | changes


@pytest.mark.parametrize(
    ("variant", "die_at"),
    [
        *(("full", 6), ("full", 13), ("tied", 8), ("lora", 7), ("lora bf16", 7), ("sgd bf16", 7)),
        *(("bf16", 7), ("bf16 offloaded", 7), ("fp32 offloaded", 8)),
    ],
)
def test_a_resumed_run_is_the_same_run(uninterrupted, tmp_path, variant, die_at):
    """Killed inside step 7, say, it goes on from checkpoint-6, in the second epoch and between two reports."""
    config, whole = uninterrupted(variant)
    settings = again(config, tmp_path / "run")
    run_case(settings, die_at)
    assert not (tmp_path / "run" / "README.md").exists()
    kept = [path.name for path in complete_checkpoints(tmp_path / "run")]
    last = (die_at - 1) // 2 * 2
    assert kept == [f"checkpoint-{step}" for step in (last - 2, last) if step > 0]
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", whole)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    assert len(complete_checkpoints(tmp_path / "run")) == 2


def test_a_run_resumed_twice_is_the_same_run(uninterrupted, tmp_path):
    config, whole = uninterrupted("short")
    settings = again(config, tmp_path / "run")
    run_case(settings, 3)
    run_case(settings | {"resume": True}, 3)  # step 5
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", whole)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


def test_a_run_that_was_killed_is_the_same_run(uninterrupted, tmp_path):
    """SIGKILL at any moment, through the command line; the torn last line of the metrics is forgotten."""
    config, whole = uninterrupted("full")
    settings = again(config, tmp_path / "run", epochs=2.5, save_every=1, keep_checkpoints=1)
    RunConfig(**settings).save(tmp_path / "run.yaml")
    slow = "import una_fast.train.loop as t, time; e = t.Trainer.take_step\n"
    slow += "t.Trainer.take_step = lambda *a: (time.sleep(0.05), e(*a))[1]\n"
    slow += "import torch; torch.set_num_threads(1)\nfrom una_fast.cli import main\nmain()"
    command = [sys.executable, "-P", "-c", slow, "train", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint-5" / "COMPLETE").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "README.md").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.1')
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", whole)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


@pytest.mark.parametrize(
    ("target", "name"),
    [(checkpoint_module, "save_model"), (checkpoint_module.dcp, "save"), (Path, "write_text")],
)
def test_a_checkpoint_that_was_not_finished_is_ignored(
    uninterrupted, tmp_path, monkeypatch, target, name
):
    """Killed when the weights of checkpoint-4 are written, or its optimizer state, or all but the marker."""
    config, whole = uninterrupted("short")
    settings = again(config, tmp_path / "run")
    write = getattr(target, name)

    def torn(*args, **kwargs):
        result = write(*args, **kwargs)
        if (tmp_path / "run" / "checkpoint-4").exists():
            raise Died
        return result

    with monkeypatch.context() as patch:
        patch.setattr(target, name, torn)
        with pytest.raises(Died):
            train(RunConfig(**settings))
    assert any((tmp_path / "run" / "checkpoint-4").iterdir())
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", whole)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


def test_a_half_deleted_checkpoint_does_not_look_complete(uninterrupted, tmp_path, monkeypatch):
    config, _ = uninterrupted("short")
    settings = again(config, tmp_path / "run", keep_checkpoints=1, max_steps=4)
    rmtree = shutil.rmtree

    def torn(path, **kwargs):
        if Path(path).name == "checkpoint-2" and not kwargs:
            (Path(path) / "state.json").unlink()
            raise Died
        rmtree(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        with pytest.raises(Died):
            train(RunConfig(**settings))
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_resuming_a_finished_run_keeps_its_metrics(uninterrupted, tmp_path):
    """There is no step left to take; the model card and the result still tell what the run ended with."""
    settings = again(uninterrupted("full")[0], tmp_path / "run", max_steps=2, log_every=1)
    first = train(RunConfig(**settings))
    assert complete_checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"
    (tmp_path / "run" / "README.md").unlink()
    second = train(RunConfig(**settings | {"resume": True}))
    assert second.metrics == first.metrics and "loss" in first.metrics
    assert "| loss |" in (tmp_path / "run" / "README.md").read_text()


def test_a_tokenizer_of_another_model_is_refused():
    embedding = SimpleNamespace(weight=torch.zeros(5, 2))
    policy = SimpleNamespace(causal_lm=SimpleNamespace(get_input_embeddings=lambda: embedding))
    example = Example(
        np.array([1, 2]), (np.array([4, 5]),), Feedback.binary([0], [True]), None, "file.jsonl:3"
    )
    with pytest.raises(
        ValueError,
        match=r"file.jsonl:3: the tokenizer gives token 5, but the model has 5 embeddings",
    ):
        check_token_ids([example], policy)


def test_resume_without_a_checkpoint_starts_afresh(uninterrupted, tmp_path):
    config, _ = uninterrupted("short")
    settings = again(config, tmp_path / "run", save_every=None, max_steps=3)
    run_case(settings, 3)
    train(RunConfig(**settings | {"resume": True}))
    train(RunConfig(**settings | {"output_dir": str(tmp_path / "whole")}))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_a_run_may_be_made_longer_and_run_in_other_ways(uninterrupted, tmp_path):
    """What does not change the steps may change: their number, micro-batches, workspace, reports."""
    config, _ = uninterrupted("short")
    steady = {
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        "eval_data": [],
        "eval_every": None,
        "log_every": 1,
    }
    train(RunConfig(**again(config, tmp_path / "whole", **steady)))
    settings = again(config, tmp_path / "run", **steady, max_steps=4)
    train(RunConfig(**settings))
    changes = {
        "resume": True,
        "max_steps": 6,
        "micro_batch_size": 2,
        "workspace_mb": 1.0,
        "keep_checkpoints": 5,
    }
    train(RunConfig(**settings | changes))
    assert len(complete_checkpoints(tmp_path / "run")) == 3
    last, expected = (read_metrics(tmp_path / name)[-1] for name in ("run", "whole"))
    assert last["step"] == 6 and last["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def interrupted(uninterrupted, tmp_path_factory):
    """Settings of runs with a checkpoint, left behind for refusals."""
    root = tmp_path_factory.mktemp("interrupted")
    made = {}
    for variant in ("full", "lora"):
        config, _ = uninterrupted(variant)
        made[variant] = again(config, root / variant)
        run_case(made[variant], 4)
    return made


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("full", {"model": "other"}, "reference was frozen:.* and is frozen:"),
        ("lora", {"model": "other"}, "model was .*untied and is .*other"),
        (
            "full",
            {"reference": "cached", "data": "biased"},
            "reference was frozen:.* and is cached:",
        ),
        ("full", {"data": "shorter"}, "data was [0-9a-f]{16} and is"),
        ("full", {"data": "reworded"}, "data was"),
        ("full", {"data": "rescored"}, "data was"),
        ("full", {"data": "weighted"}, "data was"),
        ("full", {"score_center": "dataset"}, "data was"),
        ("full", {"beta": 0.2}, "beta was 0.1 and is 0.2"),
        ("full", {"learning_rate": 1e-3}, "learning_rate was 0.003 and is 0.001"),
        ("full", {"batch_size": 9, "seed": 1}, "batch_size was 8 and is 9; seed was 0 and is 1"),
        ("lora", {"lora": LoraOptions(r=8, alpha=8)}, "lora was .*'r': 4.* and is .*'r': 8"),
        ("lora", {"lora": None}, "lora was .* and is None"),
    ],
)
def test_another_run_is_not_resumed(
    interrupted, mixed, biased, tmp_path, variant, changes, message
):
    settings = interrupted[variant] | {"resume": True}
    lines = Path(mixed).read_text().splitlines(keepends=True)
    if changes.get("model"):
        changes = changes | {"model": save_llama(tmp_path / "other", seed=9)}
    data = {
        "shorter": lambda: "".join(lines[:-1]),
        "reworded": lambda: "".join(lines).replace("stop", "halt"),
        "rescored": lambda: "".join(lines).replace('"label": true', '"label": false', 1),
    }
    if changes.get("data") == "biased":
        changes = changes | {"data": [biased], "eval_data": [biased]}
    elif changes.get("data") == "weighted":
        changes = changes | {"data": [{"path": mixed, "weight": 2}]}
    elif changes.get("data"):
        (tmp_path / "x.jsonl").write_text(data[changes["data"]]())
        changes = changes | {"data": [str(tmp_path / "x.jsonl")]}
    out = Path(settings["output_dir"])
    before = {name: (out / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    with pytest.raises(
        ValueError, match=f"checkpoint-2 belongs to another run: .*{message}.*output_dir"
    ):
        train(RunConfig(**settings | changes))
    assert {
        name: (out / name).read_bytes() for name in before
    } == before  # a refused run leaves no trace


def test_an_output_directory_in_use_is_refused(interrupted):
    with pytest.raises(
        ValueError,
        match="holds an earlier run; set resume=true to continue it, or another output_dir",
    ):
        train(RunConfig(**interrupted["full"]))


def test_settings_that_fail_may_be_mended_in_place(llamas, mixed, tmp_path):
    """A run that never took a step does not claim its directory."""
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "the cat", "chosen": "sat"}])
    with pytest.raises(ValueError, match="rejected"):
        train(make_config(llamas["untied"], bad, tmp_path / "run", max_steps=1))
    train(make_config(llamas["untied"], mixed, tmp_path / "run", max_steps=1))


# ---------------------------------------------------------------------- refusals


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_records(llamas, mixed, tmp_path):
    settings = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": None, "batch_size": 3}
    with pytest.raises(
        RuntimeError,
        match=r"gradient norm is nan in the step of the records .*mixed.jsonl:\d+, .*:\d+",
    ):
        train(make_config(llamas["untied"], mixed, tmp_path / "run", save_every=1, **settings))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_partly_cached_records_are_refused(llamas, mixed, biased, tmp_path):
    partial = (
        "".join(Path(biased).read_text().splitlines(keepends=True)[:5]) + Path(mixed).read_text()
    )
    (tmp_path / "partial.jsonl").write_text(partial)
    data = str(tmp_path / "partial.jsonl")
    with pytest.raises(
        ValueError,
        match=r"partial.jsonl:6 has no ref_logps while 5 of 41 .*una-fast precompute-ref",
    ):
        train(make_config(llamas["untied"], data, tmp_path / "auto"))
    with pytest.raises(
        ValueError, match=r"reference=cached, but .*partial.jsonl:6 has no ref_logps \(36 of 41"
    ):
        train(make_config(llamas["untied"], data, tmp_path / "cached", reference="cached"))
    with pytest.raises(
        ValueError, match="mixed.jsonl:1 has no ref_logps while 36 of 72"
    ):  # the evaluation set's
        train(make_config(llamas["untied"], biased, tmp_path / "eval", eval_data=mixed))
    train(make_config(llamas["untied"], data, tmp_path / "frozen", reference="frozen", max_steps=1))
    assert read_metrics(tmp_path / "frozen")[0]["kl"] == 0


def test_precompute_runs_as_one_process(llamas, mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="precompute-ref runs as one process; start it without torchrun"
    ):
        precompute_reference(make_config(llamas["untied"], mixed, tmp_path / "cache"))


def test_an_evaluation_fraction_must_leave_training_records(llamas, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", make_records("pairs", 1))
    with pytest.raises(
        ValueError, match="eval_fraction=0.5 leaves a source without training records"
    ):
        train(make_config(llamas["untied"], one, tmp_path / "run", eval_fraction=0.5))


def test_chats_need_a_template(tmp_path):
    model = save_llama(tmp_path / "model", chat=False)
    data = write_jsonl(tmp_path / "chats.jsonl", make_records("chats", 2))
    with pytest.raises(ValueError, match="no chat template; set chat_template"):
        train(make_config(model, data, tmp_path / "run"))
