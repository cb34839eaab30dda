"""Online runs: what a step is made of, what is reported, what is refused, and that a killed run is the same run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fsdp_worker import run_case
from judge_server import JudgeServer, chat
from test_sharding import run_two_ranks, saved_weights, worst_error
from test_train import assert_same_weights, open_trainer, settings_of
from tiny import TIMING, make_config, make_records, read_metrics, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import una_fast.train.loop as train_module
from una_fast import cli
from una_fast.capacity.fit import largest_batch
from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.feedback import PAIR, SCORE
from una_fast.rewards.settings import RewardError, parse_rewards
from una_fast.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = Path(__file__).with_name("reward_functions.py")
SHARE, LENGTH = f"{FILE}:share_of_e", f"{FILE}:length"
TIMES = (
    *TIMING,
    "time/generate",
    "time/reward",
    "time/train",
    "eval_time/generate",
    "eval_time/reward",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """24 ragged prompts with a column of their own."""
    records = make_records("scores", 24)
    rows = [{"prompt": r["prompt"], "number": i} for i, r in enumerate(records)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def model(llamas, tmp_path_factory):
    """The tiny model, which ends its responses more often than a random one."""
    path = tmp_path_factory.mktemp("models") / "ends"
    causal_lm = AutoModelForCausalLM.from_pretrained(llamas["untied"])
    causal_lm.generation_config.eos_token_id = list(range(1, 300, 9))
    causal_lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(llamas["untied"]).save_pretrained(path)
    return str(path)


def online(model, prompts, directory, **settings) -> RunConfig:
    usual = {
        "data": prompts,
        **{
            "mode": "online",
            "rewards": [SHARE],
            "samples_per_prompt": 3,
            "max_new_tokens": 9,
            "batch_size": 6,
        },
        **{
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "beta": 0.05,
            "epochs": 9.0,
            "max_steps": 4,
        },
    }
    settings = usual | settings
    return make_config(model, settings.pop("data"), directory, **settings)


def first_step(config):
    trainer = open_trainer(config)
    return trainer, next(trainer.source.steps(0, 1))


def completions_of(directory):
    return [
        json.loads(line)
        for line in (Path(directory) / "completions.jsonl").read_text().splitlines()
    ]


# --- a step ----------------------------------------------------------------------------------------------------------


def scored(trainer, examples):
    batch = collate(examples, packed=trainer.policy.packed)
    return trainer.scoring.logps(trainer.policy, batch).numpy(), trainer.reference.logps(
        batch
    ).numpy()


@pytest.mark.parametrize("anchor", ["ref", "rollout"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_holds_samples_rewards_reference_and_offsets(
    model, prompts, tmp_path, anchor, packing
):
    config = online(
        model, prompts, tmp_path / "run", anchor=anchor, packing=packing, saved_completions=6
    )
    trainer = open_trainer(config)
    with torch.no_grad():
        for p in trainer.policy.trainable_parameters():  # a policy that is no longer the reference
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    reward_calls()
    step = next(trainer.source.steps(0, 1))
    examples = [example for part in step.micro_batches for example in part]
    assert trainer.policy.packed == packing and len(examples) == 6 and step.num_units == 18
    (call,) = reward_calls()
    texts = {}
    for prompt, text, number in zip(
        call["prompts"], call["completions"], call["number"], strict=True
    ):
        texts.setdefault(number, (prompt, []))[1].append(text)
    logps, ref_logps = scored(trainer, examples)
    start = 0
    for example in examples:
        own = slice(start, start := start + 3)
        prompt, decoded = texts[int(example.origin.rpartition(":")[2]) - 1]
        assert trainer.tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == prompt
        stops = trainer.online.sampler.sampling.stop_ids
        for ids, text in zip(example.responses, decoded, strict=True):
            kept = ids[:-1] if ids[-1] in stops else ids
            assert text == trainer.tokenizer.decode(kept, skip_special_tokens=True), (
                "the decoded text, exactly"
            )
        rewards = np.array([text.count("e") / max(len(text), 1) for text in decoded])
        np.testing.assert_allclose(example.feedback.value, rewards)
        anchors = ref_logps if anchor == "ref" else logps
        np.testing.assert_allclose(example.ref_logps, anchors[own], rtol=1e-5)
        residuals = config.beta * (logps - anchors)[own] - rewards
        others = np.array([-np.delete(residuals, k).mean() for k in range(3)])
        np.testing.assert_allclose(example.feedback.offset, others, atol=1e-6)
    metrics = trainer.online.take()
    assert metrics["kl"] == pytest.approx((logps - ref_logps).mean(), rel=1e-4)
    assert metrics["completions/count"] == 18 and metrics["completions/skipped"] == 0
    lines = trainer.online.take_completions()
    assert len(lines) == 18 and all(line["policy_version"] == 0 for line in lines)
    assert np.mean([line["reward"] for line in lines]) == pytest.approx(metrics["reward"])
    assert np.mean([line["finished"] for line in lines]) == pytest.approx(
        1 - metrics["completions/clipped_ratio"]
    )


def reward_calls() -> list[dict]:
    """The calls that the runs' own copy of reward_functions.py saw since this was last asked."""
    calls = []
    for name, module in sys.modules.items():
        if name.startswith("una_fast_reward_") and module.__file__ == str(FILE):
            calls, module.calls[:] = list(module.calls), []
    return calls


def test_ema_offset_is_that_of_earlier_steps(model, prompts, tmp_path):
    config = online(
        model, prompts, tmp_path / "run", samples_per_prompt=1, offset="ema", rewards=[LENGTH]
    )
    trainer = open_trainer(config)
    steps = trainer.source.steps(0, 3)
    offsets, means = [], []
    for _ in range(3):
        examples = [e for part in next(steps).micro_batches for e in part]
        (offset,) = {value for e in examples for value in e.feedback.offset.tolist()}
        offsets.append(offset)
        logps, ref_logps = scored(trainer, examples)
        rewards = np.array([e.feedback.value.item() for e in examples])
        means.append((config.beta * (logps - ref_logps) - rewards).mean())
    assert offsets[0] == 0 and offsets[1] == pytest.approx(-means[0], abs=1e-6)
    assert offsets[2] == pytest.approx(-(0.9 * means[0] + means[1]) / 1.9, abs=1e-6)


def test_samples_without_a_reward_are_left_out_and_counted(model, prompts, tmp_path, caplog):
    config = online(
        model, prompts, tmp_path / "run", rewards=[f"{FILE}:some"], samples_per_prompt=4, offset=0.0
    )
    trainer, step = first_step(config)
    kept = sum(len(e.responses) for part in step.micro_batches for e in part)
    alone = sum(len(e.responses) == 1 for part in step.micro_batches for e in part)
    metrics = trainer.online.take()
    assert metrics["completions/alone"] == alone
    assert 0 < kept == step.num_units == 24 - metrics["completions/skipped"] < 24
    assert all(
        value == 0.5
        for part in step.micro_batches
        for e in part
        for value in e.feedback.value.tolist()
    )
    assert metrics["reward"] == 0.5, "a skipped sample is not a 0"
    assert "some: None" in caplog.text and "some: not finite" in caplog.text
    with pytest.raises(
        RewardError, match=r"no response of the step got a reward: nothing: None \(18\)"
    ):
        first_step(online(model, prompts, tmp_path / "none", rewards=[f"{FILE}:nothing"]))


def test_scores_outside_the_interval_are_refused(model, prompts, tmp_path):
    config = online(
        model,
        prompts,
        tmp_path / "run",
        score="bce",
        rewards=[{"function": LENGTH, "weight": -1.0}],
    )
    with pytest.raises(
        RewardError,
        match=r"reward -0.* outside \[0, 1\], which score=bce compares .* set reward_map",
    ):
        first_step(config)
    _, step = first_step(online(model, prompts, tmp_path / "inside", score="bce", rewards=[LENGTH]))
    assert step.num_units == 18


def test_equal_rewards_and_responses_without_an_end_are_told(
    model, llamas, prompts, tmp_path, caplog
):
    equal = {"rewards": [f"{FILE}:equal"], "offset": 0.0}
    _, step = first_step(
        online(model, prompts, tmp_path / "equal", reward_map="quantile", score="mse", **equal)
    )
    assert {v for part in step.micro_batches for e in part for v in e.feedback.value.tolist()} == {
        0.5
    }
    assert "teach nothing" not in caplog.text, "a constant offset teaches the level"
    first_step(online(model, prompts, tmp_path / "group", rewards=[f"{FILE}:equal"]))
    assert "all 18 rewards of a step are 0.25: they teach nothing" in caplog.text
    settings = equal | {"max_new_tokens": 2, "missing_eos_penalty": 0.75}
    config = online(llamas["untied"], prompts, tmp_path / "endless", **settings)
    _, step = first_step(config)
    assert {v for part in step.micro_batches for e in part for v in e.feedback.value.tolist()} == {
        -0.5
    }
    assert "no response of a step ended within max_new_tokens=2" in caplog.text


def test_mixed_steps_hold_rollouts_and_records(model, mixed, prompts, tmp_path):
    data = [{"path": prompts, "online": True}, mixed]
    config = online(
        model, data, tmp_path / "run", mode="mixed", online_fraction=0.5, batch_size=8, max_steps=3
    )
    trainer, step = first_step(config)
    examples = [example for part in step.micro_batches for example in part]
    assert (
        sum(e.origin.startswith(prompts) for e in examples)
        == 4
        == sum(e.origin.startswith(mixed) for e in examples)
    )
    assert all(e.ref_logps is not None for e in examples), "no second reference pass"
    kinds = torch.cat([e.feedback.kind for e in examples])
    assert (kinds == PAIR).any() and (kinds == SCORE).sum() >= 12
    assert trainer.source.steps_per_epoch == 9, "of the 36 records, 4 a step"
    for e in examples:
        if e.origin.startswith(mixed):
            assert (e.feedback.offset == 0).all()
    train(replace(config, output_dir=str(tmp_path / "whole"), eval_data=data))
    last = read_metrics(tmp_path / "whole")[-1]
    assert {"eval_reward", "eval_rewards/accuracies", "eval_kl"} <= set(last)
    with pytest.raises(ValueError, match="needs sources of both kinds"):
        train(replace(config, output_dir=str(tmp_path / "one"), data=[mixed]))
    with pytest.raises(ValueError, match="online: false, but the mode is online; set mode: mixed"):
        train(online(model, [{"path": mixed, "online": False}], tmp_path / "kind"))


def test_inner_epochs_take_the_same_samples_again(model, prompts, tmp_path):
    config = online(model, prompts, tmp_path / "run", inner_epochs=2, saved_completions=6)
    trainer = open_trainer(config)
    assert trainer.source.steps_per_epoch == 8
    seen = []
    for step in trainer.source.steps(0, 4):
        seen.append(
            [ids.tolist() for part in step.micro_batches for e in part for ids in e.responses]
        )
        trainer.take_step(step)
    assert seen[0] == seen[1] != seen[2] == seen[3]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_tells(model, prompts, tmp_path):
    config = online(
        model,
        prompts,
        tmp_path / "run",
        max_steps=25,
        beta=0.01,
        learning_rate=3e-3,
        eval_data=prompts,
    )
    result = train(config)
    lines = read_metrics(tmp_path / "run", without=())
    first, last = lines[0], lines[-1]
    assert (
        last["eval_reward"] > first["eval_reward"] + 0.02
        and last["eval_kl"] > 0.05
        and abs(first["eval_kl"]) < 1e-5
    )
    step = lines[1]
    assert "log_ratio" in lines[1]
    names = (
        "reward",
        "reward_std",
        "rewards/share_of_e/mean",
        "kl",
        "completions/mean_length",
        "una/implicit_mean",
    )
    assert set(names) <= set(step) and step["completions/count"] == 18
    seconds = step["time/generate"] + step["time/reward"] + step["time/train"]
    assert step["tokens"] / step["tok_per_sec"] == pytest.approx(seconds, rel=1e-6)
    saved = completions_of(tmp_path / "run")
    assert len(saved) == 25 * 6 * 3 and {
        line["step"] - line["policy_version"] for line in saved
    } == {1}
    assert result.steps == 25 and "centred by group" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "variant",
    [
        {"samples_per_prompt": 1, "offset": "ema", "log_every": 3},
        {"score": "mse", "reward_map": "quantile", "inner_epochs": 2, "lora": {"r": 2}},
        {"anchor": "rollout", "reference_refresh": 3, "packing": False},
    ],
    ids=["ema", "quantile lora", "group refresh"],
)
def test_a_resumed_run_has_the_same_prompts_samples_state_and_metrics(
    model, prompts, tmp_path, variant
):
    """Killed inside step 6, it goes on from checkpoint-4."""
    config = online(
        *(model, prompts, tmp_path / "whole"),
        save_every=2,
        max_steps=8,
        eval_data=prompts,
        eval_every=4,
        **variant,
    )
    train(config)
    settings = settings_of(config) | {"output_dir": str(tmp_path / "run")}
    run_case(settings, die_at=6)
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_metrics(tmp_path / "run", without=TIMES) == read_metrics(
        tmp_path / "whole", without=TIMES
    )
    assert completions_of(tmp_path / "run") == completions_of(tmp_path / "whole")
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "state.json").read_text())["online"]
    assert state["scale"]["recent"] or variant.get("reward_map") != "quantile"
    with pytest.raises(ValueError, match="samples_per_prompt was"):
        train(RunConfig(**settings | {"resume": True, "samples_per_prompt": 5, "max_steps": 9}))


def test_a_refreshed_reference_is_the_policy(model, prompts, tmp_path):
    trainer = open_trainer(online(model, prompts, tmp_path / "run", reference_refresh=1))
    steps = trainer.source.steps(0, 2)
    trainer.take_step(next(steps))
    examples = next(steps).micro_batches[0]
    logps, before = scored(trainer, examples)
    assert np.abs(logps - before).max() > 1e-3
    trainer.reference.refresh(trainer.policy)
    np.testing.assert_array_equal(*scored(trainer, examples))
    trainer.take_step(next(trainer.source.steps(1, 2)))
    assert np.abs(np.subtract(*scored(trainer, examples))).max() > 1e-3, "and stays as it is"


def test_an_evaluation_without_rewards_does_not_end_the_run(model, prompts, tmp_path, caplog):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "the cat"}] * 19)  # a second chunk of one
    config = online(
        model,
        prompts,
        tmp_path / "run",
        eval_data=odd,
        rewards=[f"{FILE}:not_for_the_cat"],
        max_steps=1,
    )
    result = train(config)
    assert (
        "no sample of the evaluation got a reward" in caplog.text
        and (tmp_path / "run/model.safetensors").exists()
    )
    assert result.metrics["eval_completions/skipped"] == 19 and "eval_reward" not in result.metrics


def test_columns_that_only_some_prompts_have(model, tmp_path):
    """What a function is given does not depend on which prompts a step has."""
    rows = [{"prompt": f"the cat {i}", **({"answer": i} if i == 0 else {})} for i in range(8)]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    train(
        online(
            model,
            data,
            tmp_path / "run",
            rewards=[f"{FILE}:needs_answer"],
            batch_size=2,
            max_steps=4,
        )
    )


def test_texts_with_line_separators_survive_a_resume(model, tmp_path):
    data = write_jsonl(
        tmp_path / "lines.jsonl", [{"prompt": f"the\u2028cat\x85{i}"} for i in range(8)]
    )
    config = online(model, data, tmp_path / "run", save_every=1, max_steps=2)
    train(config)
    before = (tmp_path / "run" / "completions.jsonl").read_text()
    train(replace(config, resume=True))
    assert (tmp_path / "run" / "completions.jsonl").read_text() == before and before.count(
        "\n"
    ) == 24


def test_a_resumed_run_may_ask_its_judge_elsewhere(model, prompts, tmp_path):
    def settings(url, **more):
        judge = {"judge": f"{url}/v1", "judge_model": "m", "name": "j", **more}
        return online(
            model, prompts, tmp_path / "run", rewards=[judge], save_every=1, max_steps=2
        ).trajectory()

    assert settings("http://a:1") == settings("http://b:2", timeout=3, retries=9)
    assert settings("http://a:1") != settings("http://a:1", weight=2.0)


def test_the_ceiling_of_the_kl_stops_or_warns(model, prompts, tmp_path, caplog, capsys):
    hot = {"learning_rate": 2e-2, "beta": 0.001, "max_kl": 0.5, "max_steps": 12}
    result = train(online(model, prompts, tmp_path / "stop", eval_data=prompts, **hot))
    assert 0 < result.steps < 12 and result.metrics["stopped_at_step"] == result.steps
    assert "above max_kl=0.5: the run stops; raise beta" in capsys.readouterr().out
    assert (tmp_path / "stop" / "model.safetensors").exists() and result.metrics["eval_kl"] > 0
    lines = read_metrics(tmp_path / "stop")
    assert len(lines) == result.steps + 3 and lines[-2]["kl"] > 0.5 and "eval_kl" in lines[-1]
    assert {line["step"] for line in completions_of(tmp_path / "stop")} == set(
        range(1, result.steps + 2)
    )
    rare = hot | {"log_every": 50, "rewards": [LENGTH], "score": "mse", "reward_map": "quantile"}
    train(online(model, prompts, tmp_path / "rare", **rare))
    (line,) = read_metrics(tmp_path / "rare")
    assert line["kl"] > 0 and line["units"] == 18 * result.steps
    more = online(model, prompts, tmp_path / "rare", **rare | {"max_kl": 1e3, "resume": True})
    assert train(more).steps == 12 and len(completions_of(tmp_path / "rare")) == 12 * 18
    result = train(online(model, prompts, tmp_path / "warn", on_max_kl="warn", **hot))
    assert result.steps == 12 and "above max_kl=0.5" in caplog.text


def test_a_failing_reward_ends_the_command_by_name_and_the_run_can_go_on(
    model, prompts, tmp_path, capsys
):
    config = online(
        model,
        prompts,
        tmp_path / "run",
        rewards=[f"{FILE}:late_failure"],
        save_every=2,
        max_steps=8,
    )
    config.save(tmp_path / "run.yaml")
    reward_calls()
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert "late_failure raised KeyError: 'gone'" in error and "Traceback" not in error
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--resume", "true"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("generation", ["padded", "continuous"])
def test_a_judge_and_a_function_with_weights(model, prompts, tmp_path, generation):
    """Through the command line, with a judge that now and then fails: its samples are skipped."""

    def answer(payload, number):
        return (503, "busy", {}) if number % 7 == 3 else chat(str(40 + number % 20))

    with JudgeServer(answer) as server:
        judge = {
            "judge": f"{server.url}/v1",
            "judge_model": "m",
            "weight": 2.0,
            "retries": 0,
            "name": "judge",
        }
        config = online(
            model,
            prompts,
            tmp_path / "run",
            rewards=[judge, LENGTH],
            generation=generation,
            max_steps=2,
        )
        config.save(tmp_path / "run.yaml")
        assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
        asked = [request[2]["messages"][0]["content"] for request in server.requests]
    for line in completions_of(tmp_path / "run"):
        parts = line["rewards"]
        assert any(line["prompt"] in text and line["completion"] in text for text in asked)
        if parts["judge"] is None:
            assert line["reward"] is None and line["score"] is None
        else:
            assert line["reward"] == pytest.approx(2 * parts["judge"] + parts["length"])
    lines = read_metrics(tmp_path / "run")
    assert 0 < lines[0]["completions/skipped"] < 6 and "rewards/judge/mean" in lines[0]


def test_a_policy_with_a_chat_template_is_trained_on_what_it_said(model, tmp_path):
    reward_calls()
    chats = write_jsonl(
        tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "the cat"}]}] * 6
    )
    trainer, step = first_step(online(model, chats, tmp_path / "run"))
    (call,) = reward_calls()
    assert call["prompts"][0] == [{"role": "user", "content": "the cat"}]
    ids = step.micro_batches[0][0].prompt_ids
    assert trainer.tokenizer.decode(ids) == "<s><|user|>the cat</s><|assistant|>"


def test_prompts_without_room_for_a_response_are_refused(model, prompts, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"prompts.jsonl:\d+: a prompt of .* over the 256 positions .* max_tokens=256",
    ):
        train(online(model, prompts, tmp_path / "run", max_new_tokens=250))
    settings = {
        "max_new_tokens": 249,
        "max_tokens": 256,
        "prompt_overflow": "truncate_left",
        "max_steps": 1,
    }
    train(online(model, prompts, tmp_path / "cut", **settings))


def test_commands_that_do_not_sample_say_so(model, prompts, tmp_path, capsys):
    online(model, prompts, tmp_path / "run").save(tmp_path / "run.yaml")
    for command in (["plan", "--measure", "true"], ["precompute-ref"]):
        assert cli.main([*command, "--config", str(tmp_path / "run.yaml")]) == 1
        assert "set mode: offline" in capsys.readouterr().err


def test_the_example_of_the_readme_is_a_configuration():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(mode: online.*?)```", text, re.DOTALL)[1]
    config = RunConfig(model="m", output_dir="out", **yaml.safe_load(example))
    assert [spec.kind for spec in parse_rewards(config.rewards)] == [
        "function",
        "model",
        "judge",
        "endpoint",
    ]


def test_the_memory_of_the_longest_rollouts_is_planned(model, prompts, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(
        train_module, "refuse_too_large", lambda config, examples, **more: planned.extend(examples)
    )
    open_trainer(online(model, prompts, tmp_path / "run", max_new_tokens=70))
    assert len(planned) == 24 and all(
        [len(ids) for ids in e.responses] == [70] * 3 for e in planned
    )
    assert largest_batch(planned, online(model, prompts, tmp_path / "run"), packed=True)


# --- two ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_take_the_steps_of_one(model, mixed, prompts, tmp_path):
    """With fixed samples the gradients are those of one process, an odd number of prompts included; with drawn ones a
    killed run is the same run."""
    few = {
        "batch_size": 5,
        "micro_batch_size": 1,
        "max_steps": 3,
        "optimizer": "sgd",
        "learning_rate": 0.1,
    }
    cases = {
        "full": few | {"eval_data": [prompts]},
        "mixed": few
        | {
            "mode": "mixed",
            "online_fraction": 0.4,
            "data": [{"path": prompts, "online": True}, mixed],
        },
        "ema": few | {"offset": "ema", "score": "reward_mse", "anchor": "rollout"},
    }
    todo, configs = {}, {}
    for name, settings in cases.items():
        configs[name] = settings_of(online(model, prompts, tmp_path / "two" / name, **settings))
        todo[name] = {"config": configs[name], "fixed": True}
    drawn = {"batch_size": 5, "max_steps": 5, "save_every": 2, "reference_refresh": 2}
    whole = settings_of(online(model, prompts, tmp_path / "two" / "whole", **drawn))
    killed = whole | {"output_dir": str(tmp_path / "two" / "killed")}
    todo["whole"] = {"config": whole}
    todo["killed"] = {"config": killed, "die_at": 4}
    todo["resumed"] = {"config": killed | {"resume": True}}
    run_two_ranks(todo, tmp_path)
    for name, settings in configs.items():
        one = run_case(settings | {"output_dir": str(tmp_path / "one" / name)}, fixed=True)
        two = torch.load(tmp_path / "two" / name / "seen.pt", weights_only=False)
        assert len(two["gradients"]) == 3
        for of_two, of_one in zip(two["gradients"], one["gradients"], strict=True):
            assert worst_error(of_two, of_one) < 2e-5, name
        numbers = [read_metrics(tmp_path / ranks / name, without=TIMES) for ranks in ("one", "two")]
        for line_one, line_two in zip(*numbers, strict=True):
            assert line_one == pytest.approx(line_two, rel=1e-3, abs=1e-5)
    assert (
        saved_weights(tmp_path / "two" / "killed").keys()
        == saved_weights(tmp_path / "two" / "whole").keys()
    )
    assert_same_weights(tmp_path / "two" / "killed", tmp_path / "two" / "whole")
    metrics = [read_metrics(tmp_path / "two" / name, without=TIMES) for name in ("killed", "whole")]
    assert metrics[0] == metrics[1]
    assert completions_of(tmp_path / "two" / "killed") == completions_of(tmp_path / "two" / "whole")
