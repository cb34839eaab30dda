"""A run from its settings to its files: learning, metrics, references, precision, counted work."""

from __future__ import annotations

import functools
import json
import math
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import una_fast.resolved as resolved_module
from fsdp_worker import run_case
from ranks import saved_weights
from runs import LORA, again, assert_same_weights, examples_of, metered, open_trainer
from tiny import make_config, make_records, read_metrics, save_llama, write_jsonl
from una_fast.config import RunConfig
from una_fast.data.batch import collate, layout_tokens
from una_fast.data.examples import Example
from una_fast.data.loader import pack_batches
from una_fast.feedback import PAIR, Feedback
from una_fast.losses import Objective, una_loss
from una_fast.resolved import find_facts, resolve
from una_fast.train import loop
from una_fast.train.build import rate_factor
from una_fast.train.checkpoint import complete_checkpoints
from una_fast.train.data_checks import check_token_ids
from una_fast.train.loop import train
from una_fast.train.metrics import NAMES, Meter
from una_fast.train.precompute import precompute_reference

# ---- end to end ----


@pytest.fixture(scope="module")
def finished(llamas, tmp_path_factory):
    """Run over every kind of feedback, strings and chats, several sources with weights."""
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
    outputs = "config.yaml resolved.json data.json metrics.jsonl README.md tensorboard"
    assert {*outputs.split(), "model.safetensors"} <= files
    card = (result.output_dir / "README.md").read_text()
    assert "una/calibration_error" in card
    assert "labels.jsonl: 8 records -\\> 8 examples (8 binary units)" in card
    reports = json.loads((result.output_dir / "data.json").read_text())
    assert [report["examples"] for report in reports] == [8, 8, 8, 8, 4, 8, 8, 9]
    assert reports[5]["units"] == {"pair": 8, "score": 16} and reports[4]["unlabelled"] == 4
    # 52 records in sources of weight 1, 2, 1, 1/2, 1, 1, 1.5: 8 + 16 + 8 + 4 + 4 + 8 + 12 = 60,
    # in 4 steps of 16
    assert result.steps == 16


def test_saved_settings_are_the_settings(finished):
    config, result = finished
    assert RunConfig(**yaml.safe_load((result.output_dir / "config.yaml").read_text())) == config


def test_the_decisions_of_a_run_are_printed_first_and_saved(llamas, mixed, tmp_path, capsys):
    """With the source of each, before a model is loaded; in a checkpoint, too."""
    settings = {"max_steps": 1, "batch_size": 2, "save_every": 1, "packing": False}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", **settings))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "device     cpu, 1 rank  [given: device=cpu]"
    assert "rows       padded  [given: packing=False]" in said[:6]
    assert "36 records" in said[6], "decisions stand before anything else"
    saved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert saved["compute"] == "float32" and saved["reference"] == "frozen"
    assert saved["sources"]["reference"] == "default: lora is not set"
    state = (tmp_path / "run" / "checkpoint-1" / "state.json").read_text()
    assert json.loads(state)["resolved"] == saved


def test_metrics_have_the_names_of_trl(finished):
    config, result = finished
    lines = read_metrics(result.output_dir, without=())
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 17))
    names = "loss grad_norm learning_rate epoch rewards/chosen rewards/rejected rewards/margins "
    names += "rewards/accuracies logps/chosen logps/rejected una/target_mean una/implicit_mean "
    names += "una/calibration_error log_ratio tok_per_sec memory/peak_gib units tokens "
    names += "response_tokens"
    assert set(names.split()) <= set().union(*steps)
    assert all(map(math.isfinite, chain.from_iterable(line.values() for line in lines)))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 16]
    assert result.metrics["eval_loss"] == lines[-1]["eval_loss"]
    assert result.metrics["loss"] == steps[-1]["loss"]


def test_the_loss_falls(finished):
    _, result = finished
    lines = read_metrics(result.output_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    assert lines[-2]["rewards/accuracies"] > 0.9
    # The policy starts as the reference, and orders no pair, rightly or wrongly.
    assert lines[0]["eval_log_ratio"] == 0 and lines[0]["eval_una/implicit_mean"] == 0.5
    assert "eval_rewards/accuracies" in lines[-1] and "eval_rewards/accuracies" not in lines[0]
    assert not any(name.rpartition("/")[2] == "kl" or name.endswith("_kl") for name in lines[-1])


def test_learning_rate_is_reported_for_the_step_that_used_it(finished):
    _, result = finished
    rates = [line["learning_rate"] for line in read_metrics(result.output_dir) if "loss" in line]
    # 0.2 of 16 steps are 3 steps of warmup.
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    cosine = [3e-3 * 0.5 * (1 + math.cos(math.pi * k / 13)) for k in range(13)]
    assert rates[3:] == pytest.approx(cosine)


def test_a_constant_learning_rate_has_its_warmup(llamas, mixed, tmp_path):
    settings = {"learning_rate": 1e-3, "warmup_ratio": 0.5, "lr_schedule": "constant"}
    few = {"max_steps": 4, "batch_size": 2, "micro_batch_size": 2}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", **settings, **few))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run")]
    assert rates == [5e-4, 1e-3, 1e-3, 1e-3]


def test_every_step_of_a_short_run_moves_the_weights():
    """A rate of 0 would lose a step, and with it the samples of an online step."""
    for schedule in ("cosine", "linear", "constant"):
        for total in range(1, 9):
            for ratio in (0.0, 0.1, 0.5, 1.0):
                steps = {"warmup": round(ratio * total), "total": total}
                rates = [rate_factor(schedule, taken, **steps) for taken in range(total)]
                assert min(rates) > 0 and max(rates) == 1.0


def test_tensorboard_has_the_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = finished
    board = EventAccumulator(str(result.output_dir / "tensorboard")).Reload()
    logged = [event.value for event in board.Scalars("rewards/margins")]
    lines = [line for line in read_metrics(result.output_dir) if "rewards/margins" in line]
    assert logged == pytest.approx([line["rewards/margins"] for line in lines], rel=1e-6)


@pytest.mark.parametrize("kind", ["final", "checkpoint"])
def test_the_saved_model_generates(finished, kind):
    config, result = finished
    directory = result.output_dir
    if kind == "checkpoint":
        directory = complete_checkpoints(result.output_dir)[-1]  # of step 16, the last one
        assert_same_weights(result.output_dir, directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    prompt = tokenizer("the cat sat", return_tensors="pt")
    width = prompt["input_ids"].shape[1]
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert width < out.shape[1] <= width + 5
    base = AutoModelForCausalLM.from_pretrained(config.model)
    assert not torch.equal(base.lm_head.weight, model.lm_head.weight)


def test_an_adapter_loads_and_is_trained_on_against_its_own_start(llamas, mixed, tmp_path):
    few = {"max_steps": 2, "learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 8}
    train(make_config(llamas["untied"], mixed, tmp_path / "one", lora=LORA, **few))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 14  # seven linear layers in each of two blocks
    assert all(p.abs().max() > 0 for p in trained)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").generate(
        torch.tensor([[0, 5]]), max_new_tokens=2
    )
    train(make_config(str(tmp_path / "one"), mixed, tmp_path / "two", **few))
    # A pass with gradients rounds otherwise than one without.
    assert read_metrics(tmp_path / "two")[0]["log_ratio"] == pytest.approx(0, abs=1e-5)
    assert saved_weights(tmp_path / "two").keys() == saved_weights(tmp_path / "one").keys()


# ---- the numbers in the report ----


def logps_of(model, examples: list[Example]) -> torch.Tensor:
    """Return [S] log-probs of all responses, from the model's full logits, one by one."""
    logps = []
    for example in examples:
        for response in example.responses:
            ids = torch.tensor(np.concatenate([example.prompt_ids, response]), dtype=torch.int64)
            log_probs = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)
            of_tokens = log_probs.gather(1, ids[1:, None])[len(example.prompt_ids) - 1 :]
            logps.append(of_tokens.sum())
    return torch.stack(logps)


@pytest.fixture(scope="module")
def own_logps(llamas, mixed):
    """[S] log-probs of the mixed records by the untied model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(llamas["untied"], dtype=torch.float64)
    with torch.no_grad():
        return logps_of(model, examples_of(mixed, llamas["untied"]))


@pytest.fixture(scope="module")
def biased(llamas, mixed, own_logps, tmp_path_factory):
    """The mixed records with ref_logps a few nats beside the policy's: rewards are not zero.

    A run would refuse them as log-probs of another model.
    """
    rng = np.random.default_rng(11)
    records = [json.loads(line) for line in Path(mixed).read_text().splitlines()]
    logps = iter(own_logps.tolist())
    for record, example in zip(records, examples_of(mixed, llamas["untied"]), strict=True):
        moved = [next(logps) + rng.normal(scale=6) for _ in example.responses]
        record["ref_logps"] = [min(logp, -0.1) for logp in moved]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "verify_cached_logps", lambda *_: None)
        yield write_jsonl(tmp_path_factory.mktemp("biased") / "biased.jsonl", records)


def test_metrics_by_hand(llamas, biased, own_logps, tmp_path):
    settings = {"batch_size": 36, "micro_batch_size": 5, "beta": 0.3}
    train(make_config(llamas["untied"], biased, tmp_path / "run", **settings))
    (line,) = read_metrics(tmp_path / "run")

    whole = collate(examples_of(biased, llamas["untied"]), packed=True)
    feedback = whole.feedback
    out = una_loss(own_logps, whole.ref_logps, feedback, objective=Objective(beta=0.3))
    pairs, points = feedback.kind == PAIR, feedback.kind != PAIR
    chosen, rejected = feedback.first[pairs], feedback.second[pairs]
    margins = out.rewards[chosen] - out.rewards[rejected]
    wanted = feedback.value[points]
    implied = torch.sigmoid(out.rewards[feedback.first[points]])
    bins = (implied * 10).long().tolist()
    gaps = np.bincount(bins, weights=(implied - wanted).numpy())
    expected = {
        "loss": float(out.loss),
        "units": feedback.num_units,
        "rewards/chosen": float(out.rewards[chosen].mean()),
        "rewards/rejected": float(out.rewards[rejected].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).double().mean()),
        "logps/chosen": float(own_logps[chosen].mean()),
        "logps/rejected": float(own_logps[rejected].mean()),
        "una/target_mean": float(wanted.mean()),
        "una/implicit_mean": float(implied.mean()),
        "una/calibration_error": np.abs(gaps).sum() / len(bins),
        "log_ratio": float((own_logps - whole.ref_logps).mean()),
        "tokens": whole.num_tokens,
        "response_tokens": len(whole.targets),
        "epoch": 1.0,
        "step": 1,
    }
    assert len(chosen) == 12 and len(wanted) > 20 and len(set(bins)) > 5
    assert 0 < expected["rewards/accuracies"] < 1
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradient_norm_by_hand(llamas, mixed, tmp_path):
    settings = {"batch_size": 36, "micro_batch_size": 9, "beta": 0.2, "max_grad_norm": None}
    train(make_config(llamas["tied"], mixed, tmp_path / "run", **settings))
    (line,) = read_metrics(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(llamas["tied"])
    examples = examples_of(mixed, llamas["tied"])
    feedback = collate(examples, packed=True).feedback
    logps = logps_of(model, examples)
    una_loss(logps, logps.detach(), feedback, objective=Objective(beta=0.2)).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["units"] == feedback.num_units
    assert line["grad_norm"] == pytest.approx(float(norm), rel=2e-5)


def test_clipping_and_reported_norm(llamas, mixed, tmp_path):
    """The reported norm is from before clipping; the step is along the clipped gradient."""
    sgd = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.01}
    few = {"max_steps": 1, "batch_size": 18, "micro_batch_size": 18}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", **sgd, **few))
    (line,) = read_metrics(tmp_path / "run")
    assert line["grad_norm"] > 0.1
    before, after = saved_weights(Path(llamas["untied"])), saved_weights(tmp_path / "run")
    moved = [(after[name] - before[name]).double().pow(2).sum() for name in before]
    assert math.sqrt(sum(moved)) == pytest.approx(0.01, rel=1e-3)


def test_metrics_are_averaged_over_the_steps_between_reports(llamas, mixed, tmp_path):
    # steps of 10, 10, 10 and 6 records
    settings = {"learning_rate": 0.0, "batch_size": 10, "micro_batch_size": 5}
    train(make_config(llamas["untied"], mixed, tmp_path / "one", **settings))
    train(make_config(llamas["untied"], mixed, tmp_path / "two", log_every=3, **settings))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [3, 4]
    units, losses, tokens = (
        [line[name] for line in one[:3]] for name in ("units", "loss", "tokens")
    )
    assert two[0]["units"] == sum(units) and two[0]["tokens"] == sum(tokens)
    assert two[0]["loss"] == pytest.approx(np.average(losses, weights=units))
    assert {**two[1], "epoch": 1} == one[3]


def test_score_center_reaches_the_loss_and_is_saved(llamas, tmp_path):
    """An unchanged policy stands at the mean score of a source; the loss is their variance."""
    low = make_records("scores", 12)
    for record in low:
        record["score"] = round(0.3 * record["score"], 3)
    several = make_records("several", 6)
    sources = [
        write_jsonl(tmp_path / "a.jsonl", low),
        write_jsonl(tmp_path / "b.jsonl", several),
    ]
    settings = {"score_center": "dataset", "batch_size": 18, "micro_batch_size": 6}
    train(make_config(llamas["untied"], sources, tmp_path / "run", **settings))
    (line,) = read_metrics(tmp_path / "run")
    scores = [
        np.array([record["score"] for record in low]),
        np.concatenate([record["scores"] for record in several]),
    ]
    means = [own.mean() for own in scores]
    reports = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [report["score_center"] for report in reports] == pytest.approx(means)
    mean = np.concatenate(scores).mean()
    assert line["una/implicit_mean"] == pytest.approx(line["una/target_mean"])
    assert line["una/target_mean"] == pytest.approx(mean)
    residuals = np.concatenate([own - own.mean() for own in scores])
    assert line["loss"] == pytest.approx(np.mean(residuals**2))
    assert "score centre" in (tmp_path / "run" / "README.md").read_text()


def test_a_micro_batch_sends_its_numbers_to_the_device_at_once(monkeypatch):
    """torch.as_tensor(number, device="cuda") would wait for the device, number after number."""
    batch, out = metered("cpu")
    made = []
    for name in ("tensor", "as_tensor"):
        make = getattr(torch, name)

        def counted(value, *args, make=make, **kwargs):
            made.append(value)
            return make(value, *args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    meter = Meter(Objective(), torch.device("cpu"))
    meter.add(batch, out)
    assert made == [[2, 1, 1, 3, batch.num_tokens, 12, batch.input_ids.numel()]]
    sums = dict(zip(NAMES, meter.sums.tolist(), strict=False))
    expected = {"units": 2, "pairs": 1, "points": 1, "responses": 3, "response_tokens": 12}
    assert {name: sums[name] for name in expected} == expected
    assert sums["log_ratio"] == 1.5 and sums["loss"] == pytest.approx(out.unit_losses.sum().item())


# ---- the same numbers whichever way a run goes ----


@pytest.fixture(scope="module")
def two_steps(llamas, biased, tmp_path_factory):
    """Return (function from settings to [loss, gradient norm] of two steps, its plain result)."""
    root = tmp_path_factory.mktemp("ways")
    sgd = {"optimizer": "sgd", "learning_rate": 0.02, "max_grad_norm": None}

    def run(data: str = biased, **settings) -> np.ndarray:
        out = root / str(len(list(root.iterdir())))
        settings = {"batch_size": 36, "epochs": 2, "micro_batch_size": 6, **sgd, **settings}
        train(make_config(llamas["untied"], data, out, **settings))
        return np.array([[line["loss"], line["grad_norm"]] for line in read_metrics(out)])

    torch.set_num_threads(1)
    return run, run()


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 36},
        {"micro_batch_size": 36, "packing": False, "attn_implementation": "eager"},
        {"micro_batch_size": None, "max_tokens_per_batch": 60},
        {"micro_batch_size": None, "max_tokens_per_batch": 60, "packing": False},
        {"micro_batch_size": 3, "max_tokens_per_batch": 100},
        {"seed": 5},  # another order within the batch
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "packing": False},
        {"workspace_mb": 0.01},  # eight rows of logits
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


def test_packing_packs_and_padding_is_the_share_that_collate_adds(llamas, mixed, tmp_path):
    """The prompt of several responses goes through the model once."""
    settings = {"batch_size": 36, "micro_batch_size": 36}
    lines = []
    for packing in (True, False):
        out = tmp_path / str(packing)
        train(make_config(llamas["untied"], mixed, out, packing=packing, **settings))
        lines += read_metrics(out, without=())
    packed, padded = lines
    examples = examples_of(mixed, llamas["untied"])
    lengths = []
    for example in examples:
        lengths += [len(example.prompt_ids) + len(response) for response in example.responses]
    assert packed["tokens"] < padded["tokens"] == sum(lengths)
    assert packed["response_tokens"] == padded["response_tokens"]
    batches = pack_batches(examples, packed=False, max_tokens=None, max_records=36)
    laid_out = sum(layout_tokens(batch, packed=False) for batch in batches)
    assert packed["padding"] == 0 and padded["padding"] > 0.1
    assert padded["padding"] == pytest.approx(1 - sum(lengths) / laid_out)


# ---- references ----


FEW = {"learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 4, "max_steps": 6}


@pytest.fixture(scope="module")
def frozen_run(llamas, mixed, tmp_path_factory):
    """Metrics of a run with a frozen reference."""
    out = tmp_path_factory.mktemp("reference") / "frozen"
    torch.set_num_threads(1)
    train(make_config(llamas["untied"], mixed, out, eval_data=mixed, **FEW))
    return read_metrics(out)


def assert_same_metrics(one: list[dict], two: list[dict], tolerance: float) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def losses_of(lines: list[dict]) -> list[float]:
    """Return all losses, of training and evaluation."""
    losses = []
    for line in lines:
        losses += [value for name, value in line.items() if "loss" in name]
    return losses


def ref_logps_in(file: str) -> list[float]:
    records = map(json.loads, Path(file).read_text().splitlines())
    return list(chain.from_iterable(record["ref_logps"] for record in records))


def test_cached_reference_is_the_frozen_one(llamas, mixed, own_logps, tmp_path, frozen_run):
    entry = {"path": mixed, "weight": 1}
    settings = {"eval_data": mixed, "micro_batch_size": 4}
    config = make_config(llamas["untied"], [entry], tmp_path / "cache", **settings)
    entries = precompute_reference(config)
    assert entries.keys() == {"data", "eval_data"} and entries["data"][0]["weight"] == 1
    assert ref_logps_in(entries["data"][0]["path"]) == pytest.approx(own_logps.tolist(), rel=1e-5)
    train(make_config(llamas["untied"], output_dir=tmp_path / "run", **entries, **FEW))
    assert_same_metrics(read_metrics(tmp_path / "run"), frozen_run, 1e-6)


def test_precomputed_logps_do_not_depend_on_the_batches(llamas, mixed, own_logps, tmp_path):
    """Batches of other records, in another order, padded: each line keeps its own numbers."""
    way = {"max_tokens_per_batch": 150, "packing": False, "batch_size": 7}
    entries = precompute_reference(make_config(llamas["untied"], mixed, tmp_path / "out", **way))
    assert ref_logps_in(entries["data"][0]["path"]) == pytest.approx(own_logps.tolist(), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_rows_with_other_rotary_factors_hold_no_short_records(mixed, tmp_path, packing):
    """Long rows have other factors: log-probs of a record must not depend on its neighbours."""
    model = save_llama(tmp_path / "model")
    lengths = sorted(example.longest for example in examples_of(mixed, model))
    limit = lengths[len(lengths) // 2]
    assert lengths[0] <= limit < lengths[-1]
    config = AutoConfig.from_pretrained(model)
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": limit,
    }
    config.save_pretrained(model)
    found = []
    for records in (1, 36):
        settings = {"micro_batch_size": records, "batch_size": 36, "packing": packing}
        config = make_config(model, mixed, tmp_path / str(records), **settings)
        entries = precompute_reference(config)
        found.append(ref_logps_in(entries["data"][0]["path"]))
    alone, together = found
    assert together == pytest.approx(alone, rel=1e-5)
    told = resolve(config, find_facts(config, [], device="cpu")).lines()
    assert any(line.startswith(f"rotary     rows of more than {limit} tokens") for line in told)


def test_precomputed_columns_keep_their_names(llamas, tmp_path):
    records = [{**record, "old": [-1.0, -2.0]} for record in make_records("pairs", 3)]
    source = {"path": write_jsonl(tmp_path / "x.jsonl", records), "columns": {"ref_logps": "old"}}
    entries = precompute_reference(make_config(llamas["untied"], [source], tmp_path / "cache"))
    train(make_config(llamas["untied"], output_dir=tmp_path / "run", **entries, reference="cached"))
    assert read_metrics(tmp_path / "run")[0]["log_ratio"] == pytest.approx(0, abs=1e-5)


def test_adapter_reference_is_the_frozen_one(llamas, mixed, tmp_path):
    for reference in ("adapter", "frozen"):
        settings = {"lora": LORA, "reference": reference, **FEW}
        train(make_config(llamas["untied"], mixed, tmp_path / reference, **settings))
    expected = read_metrics(tmp_path / "frozen")
    assert expected[-1]["log_ratio"] != 0
    assert_same_metrics(read_metrics(tmp_path / "adapter"), expected, 1e-6)


def test_no_reference_model_is_kept_where_none_is_needed(
    llamas, mixed, biased, tmp_path, monkeypatch
):
    loaded = []
    load = resolved_module.load_policy

    def counted(*arguments, **options):
        loaded.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(resolved_module, "load_policy", counted)
    for data, lora, models in ((mixed, None, 2), (mixed, LORA, 1), (biased, None, 1)):
        loaded.clear()
        out = tmp_path / f"{models}{lora is None}"
        open_trainer(make_config(llamas["untied"], data, out, lora=lora))
        assert len(loaded) == models


# ---- precision ----


@pytest.fixture(scope="module")
def bf16_llama(tmp_path_factory):
    """Save the untied model with weights rounded to bf16, as most models come."""
    directory = save_llama(tmp_path_factory.mktemp("bf16") / "llama")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def assert_learns_in_bf16(output_dir: Path, frozen_run: list[dict]) -> None:
    """Assert that a run starts at its reference and learns as the run in fp32 does."""
    lines = read_metrics(output_dir)
    assert lines[0]["eval_log_ratio"] == 0  # the reference is computed exactly as the policy
    losses, expected = losses_of(lines), losses_of(frozen_run)
    assert losses == pytest.approx(expected, abs=0.02) and losses != expected


def dtypes_in(output_dir: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in saved_weights(output_dir).values()}


def test_bf16_master_weights(bf16_llama, mixed, tmp_path, frozen_run):
    """An update of 1e-5 is not lost to the rounding of bf16 weights: fp32 weights are trained."""
    master = {"precision": "bf16", "master_weights": True}
    config = make_config(bf16_llama, mixed, tmp_path / "run", eval_data=mixed, **master, **FEW)
    train(config)
    assert_learns_in_bf16(tmp_path / "run", frozen_run)
    assert dtypes_in(tmp_path / "run") == {torch.bfloat16}, "the dtype that the model came in"

    tiny_step = {"optimizer": "sgd", "max_steps": 1, "learning_rate": 1e-4, "batch_size": 36}
    trainer = open_trainer(
        make_config(bf16_llama, mixed, tmp_path / "tiny", **master, **FEW | tiny_step)
    )
    assert {p.dtype for p in trainer.policy.model.parameters()} == {torch.float32}
    matrices = [p for p in trainer.reference.policy.model.parameters() if p.dim() > 1]
    assert {p.dtype for p in matrices} == {torch.bfloat16}, "no fp32 copy but of the norms"
    trainer.run()
    before = saved_weights(Path(bf16_llama))["lm_head.weight"]
    after = trainer.policy.causal_lm.lm_head.weight
    assert (before.float() != after).float().mean() > 0.5
    assert (before == after.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("offload", [False, True])
def test_bf16_weights(bf16_llama, mixed, tmp_path, frozen_run, offload):
    """Weights, gradients and saved weights are bf16; the run learns as one in fp32 does."""
    settings = {"precision": "bf16", "offload_optimizer": offload, "eval_data": mixed}
    train(make_config(bf16_llama, mixed, tmp_path / "run", **settings, **FEW))
    assert_learns_in_bf16(tmp_path / "run", frozen_run)
    assert dtypes_in(tmp_path / "run") == {torch.bfloat16}


def test_bf16_weights_move_by_less_than_they_can(bf16_llama, mixed, tmp_path):
    """Four updates of 1e-6 are below half the spacing of most weights: rounding to the nearest
    would lose them. Rounded stochastically, a weight moves as often as its spacing demands, and in
    the mean by as much as fp32 training moves the weight."""
    small = {"precision": "bf16", "learning_rate": 1e-6, "max_steps": 4}
    before = saved_weights(Path(bf16_llama))
    moves, masters = {}, {}
    for master in (True, False):
        out = tmp_path / str(master)
        settings = {"batch_size": 9, "micro_batch_size": 9, "master_weights": master, **small}
        asked = "float32" if master else "auto"
        train(make_config(bf16_llama, mixed, out, save_dtype=asked, **settings))
        after = saved_weights(out)
        differences = [(after[n].double() - before[n].double()).flatten() for n in before]
        moves[master] = torch.cat(differences)
        masters = after if master else masters
    kept = torch.cat([(masters[n].bfloat16() == before[n]).flatten() for n in before])
    assert kept.double().mean() > 0.95
    direction = moves[True].sign()
    expected = (moves[True] * direction)[kept]
    along = (moves[False] * direction)[kept]
    assert 0.002 < float((along != 0).double().mean()) < 0.2
    error = along - expected
    standard_error = float(error.std()) / len(error) ** 0.5
    assert float(expected.mean()) > 8 * standard_error, "the test can see the update"
    assert abs(float(error.mean())) < 4 * standard_error


@pytest.mark.slow
def test_adamw_8bit_runs_and_resumes(llamas, mixed, tmp_path, monkeypatch):
    """torchao's optimizer under a schedule of numbers, with some moments in 8 bits."""
    pytest.importorskip("torchao")
    # torchao compiles its step: traced as ever, but without a C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
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
        "save_every": 2,
        **FEW,
        "max_steps": 4,
    }
    config = make_config(str(tmp_path / "model"), mixed, tmp_path / "whole", **settings)
    train(config)
    lines = read_metrics(tmp_path / "whole")
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([3e-3 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    trainer = open_trainer(RunConfig(**again(config, tmp_path / "parts")))
    trainer.take_step(next(trainer.source.steps(0, 1)))
    moments = trainer.optimizer.state[trainer.policy.causal_lm.lm_head.weight]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    run_case(again(config, tmp_path / "run"), 4)
    train(RunConfig(**again(config, tmp_path / "run", resume=True)))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == lines


def test_bf16_lora(llamas, mixed, tmp_path):
    losses = {}
    for precision in ("bf16", "fp32"):
        out = tmp_path / precision
        settings = {"eval_data": mixed, "lora": LORA, "precision": precision, **FEW, "max_steps": 3}
        train(make_config(llamas["untied"], mixed, out, **settings))
        losses[precision] = losses_of(read_metrics(out))
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["bf16"][0] == losses["fp32"][0]  # kl 0
    assert dtypes_in(tmp_path / "bf16") == {torch.float32}
    config = make_config(llamas["untied"], mixed, tmp_path / "parts", lora=LORA, precision="bf16")
    dtypes = {(p.requires_grad, p.dtype) for p in open_trainer(config).policy.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.fixture(scope="module")
def bf16_adapter(bf16_llama, mixed, tmp_path_factory):
    """Train an adapter of the bf16 model, and return its directory."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    settings = {"lora": LORA, "precision": "bf16", **FEW, "learning_rate": 3e-2}
    train(make_config(bf16_llama, mixed, out, **settings))
    return str(out)


@pytest.mark.parametrize(
    ("start", "way"),
    [
        ("bf16_llama", {}),
        ("bf16_llama", {"lora": LORA}),
        ("bf16_llama", {"master_weights": True}),
        ("bf16_adapter", {}),
        ("bf16_adapter", {"master_weights": True}),
    ],
    ids=["full", "lora", "masters", "adapter", "adapter and masters"],
)
def test_bf16_cached_reference_starts_at_zero(start, way, mixed, tmp_path, request):
    """precompute-ref computes as the trainer does: in bf16, or by autocast of fp32 weights."""
    model = request.getfixturevalue(start)
    settings = {"precision": "bf16", "micro_batch_size": 4, **way}
    entries = precompute_reference(make_config(model, mixed, tmp_path / "cache", **settings))
    train(make_config(model, output_dir=tmp_path / "run", **entries, **settings, batch_size=36))
    assert abs(read_metrics(tmp_path / "run")[0]["log_ratio"]) < 1e-3


# ---- counted work ----


class HeadWork(TorchDispatchMode):
    """Counts multiply-adds of matrix products with the head, and new tensors of its shape."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.dim = dim
        self.products = 0
        self.buffers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            a, b = args[-2:]
            if {self.vocab, self.dim} <= {*a.shape, *b.shape}:
                self.products += a.numel() * b.shape[-1]
        given = {self.storage(x) for x in tree_leaves((args, kwargs))}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and self.storage(x) not in given:
                self.buffers += x.numel() == self.vocab * self.dim
        return out

    @staticmethod
    def storage(x):
        return x.untyped_storage()._cdata if isinstance(x, torch.Tensor) else None

    def passes(self, rows: float) -> float:
        return self.products / (rows * self.vocab * self.dim)


@pytest.mark.parametrize(
    ("is_cached", "lora", "passes"),
    [(False, None, 4), (False, LORA, 3), (True, None, 3), (True, LORA, 2)],
)
def test_head_passes_of_a_step_and_of_an_evaluation(
    llamas, mixed, biased, tmp_path, is_cached, lora, passes
):
    data = biased if is_cached else mixed
    settings = {"eval_data": data, "batch_size": 36, "micro_batch_size": 9, "lora": lora}
    trainer = open_trainer(make_config(llamas["untied"], data, tmp_path / "run", **settings))
    vocab, dim = trainer.policy.head.weight.shape
    (step,) = trainer.source.steps(0, 1)
    responses = chain.from_iterable(e.responses for e in chain.from_iterable(step.micro_batches))
    rows = sum(map(len, responses))
    with HeadWork(vocab, dim) as work:
        for batch in trainer.ready_batches(step):
            trainer.score(batch, step.num_units).loss.backward()
    assert work.passes(rows) == passes
    assert (work.buffers > 0) == (lora is None)
    trainer.optimizer.zero_grad()

    # Before the first step the policy is the reference, and is not computed.
    for number, of_policy in ((0, 0), (1, 1)):
        with HeadWork(vocab, dim) as work:
            metrics = trainer.evaluate(number)
        assert metrics["eval_response_tokens"] == rows
        assert work.passes(rows) == of_policy + (not is_cached) and work.buffers == 0


def test_evaluation_leaves_training_as_it_was(llamas, mixed, tmp_path):
    """Neither the steps nor their metrics depend on how often the policy is evaluated."""
    few = FEW | {"log_every": 2, "max_steps": 3}
    train(make_config(llamas["untied"], mixed, tmp_path / "without", **few))
    evaluated = {"eval_data": mixed, "eval_every": 1}
    train(make_config(llamas["untied"], mixed, tmp_path / "with", **evaluated, **few))
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    lines = [line for line in read_metrics(tmp_path / "with") if "loss" in line]
    assert lines == read_metrics(tmp_path / "without")


def test_held_out_records_are_not_trained_on(llamas, mixed, tmp_path):
    settings = {"eval_fraction": 0.25, "batch_size": 36, "micro_batch_size": 9}
    train(make_config(llamas["untied"], mixed, tmp_path / "run", **settings))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 1]
    (report,) = json.loads((tmp_path / "run/data.json").read_text())
    assert lines[1]["units"] + lines[0]["eval_units"] == sum(report["units"].values())
    assert lines[0]["eval_units"] > 0


# ---- refusals ----


def test_a_tokenizer_of_another_model_is_refused():
    embedding = SimpleNamespace(weight=torch.zeros(5, 2))
    policy = SimpleNamespace(causal_lm=SimpleNamespace(get_input_embeddings=lambda: embedding))
    example = Example(
        np.array([1, 2]), (np.array([4, 5]),), Feedback.binary([0], [True]), None, "file.jsonl:3"
    )
    message = r"file.jsonl:3: the tokenizer gives token 5, but the model has 5 embeddings"
    with pytest.raises(ValueError, match=message):
        check_token_ids([example], policy)


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_records(llamas, mixed, tmp_path):
    settings = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": None, "batch_size": 3}
    message = (
        r"not finite in 1 steps in a row, the last one of the records .*mixed.jsonl:\d+, .*:\d+"
    )
    settings |= {"max_skipped_steps": 0, "save_every": 1}
    with pytest.raises(RuntimeError, match=message):
        train(make_config(llamas["untied"], mixed, tmp_path / "run", **settings))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    saved = [path.name for path in complete_checkpoints(tmp_path / "run")]
    assert saved == ["checkpoint-1", "checkpoint-2"], "both with the weights of step 1"


def test_partly_cached_records_are_refused(llamas, mixed, biased, tmp_path):
    cached = Path(biased).read_text().splitlines(keepends=True)[:5]
    data = str(tmp_path / "partial.jsonl")
    Path(data).write_text("".join(cached) + Path(mixed).read_text())
    message = r"partial.jsonl:6 has no ref_logps while 5 of 41 .*una-fast precompute-ref"
    with pytest.raises(ValueError, match=message):
        train(make_config(llamas["untied"], data, tmp_path / "auto"))
    message = r"reference=cached, but .*partial.jsonl:6 has no ref_logps \(36 of 41"
    with pytest.raises(ValueError, match=message):
        train(make_config(llamas["untied"], data, tmp_path / "cached", reference="cached"))
    # records of the evaluation set count, too
    with pytest.raises(ValueError, match="mixed.jsonl:1 has no ref_logps while 36 of 72"):
        train(make_config(llamas["untied"], biased, tmp_path / "eval", eval_data=mixed))
    few = {"max_steps": 1, "batch_size": 4}
    train(make_config(llamas["untied"], data, tmp_path / "frozen", reference="frozen", **few))
    # Rounding of products of other shapes; the cached numbers of another model are nats away.
    assert read_metrics(tmp_path / "frozen")[0]["log_ratio"] == pytest.approx(0, abs=1e-5)


def test_an_evaluation_fraction_must_leave_training_records(llamas, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", make_records("pairs", 1))
    message = "eval_fraction=0.5 leaves a source without training records"
    with pytest.raises(ValueError, match=message):
        train(make_config(llamas["untied"], one, tmp_path / "run", eval_fraction=0.5))


def test_chats_need_a_template(tmp_path):
    model = save_llama(tmp_path / "model", chat=False)
    data = write_jsonl(tmp_path / "chats.jsonl", make_records("chats", 2))
    with pytest.raises(ValueError, match="no chat template; set chat_template"):
        train(make_config(model, data, tmp_path / "run"))
