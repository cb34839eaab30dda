"""Online runs: the content of a step, metrics, refusals, and a killed run is the same run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import una_fast.capacity.fit as fit_module
import una_fast.train.build as build_module
from fsdp_worker import run_case
from judge_server import JudgeServer, chat
from ranks import run_cases, worst_error
from runs import assert_same_weights, open_trainer, settings_of
from tiny import TIMING, make_config, make_records, read_metrics, write_jsonl
from una_fast import cli
from una_fast.capacity.fit import largest_batch
from una_fast.config import RunConfig
from una_fast.feedback import PAIR, SCORE
from una_fast.rewards.settings import RewardError
from una_fast.train.loop import train

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
    """Write 24 ragged prompts with a column for the rewards."""
    rows = []
    for number, record in enumerate(make_records("scores", 24)):
        rows.append({"prompt": record["prompt"], "number": number})
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def model(llamas, tmp_path_factory):
    """Save the tiny model so that it ends its responses more often than a random one."""
    path = tmp_path_factory.mktemp("models") / "ends"
    causal_lm = AutoModelForCausalLM.from_pretrained(llamas["untied"])
    causal_lm.generation_config.eos_token_id = list(range(1, 300, 9))
    causal_lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(llamas["untied"]).save_pretrained(path)
    return str(path)


def online(model, prompts, directory, **settings) -> RunConfig:
    """Return the settings of a short online run."""
    usual = {
        "mode": "online",
        "rewards": [SHARE],
        "samples_per_prompt": 3,
        "max_new_tokens": 9,
        "batch_size": 6,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "beta": 0.05,
        "epochs": 9.0,
        "max_steps": 4,
    }
    return make_config(model, prompts, directory, **usual | settings)


def first_step(config):
    trainer = open_trainer(config)
    return trainer, next(trainer.source.steps(0, 1))


def examples_in(step):
    return list(chain.from_iterable(step.micro_batches))


def values_in(step) -> set[float]:
    """Return the scores, labels and pair targets of a step."""
    return set(torch.cat([batch.feedback.value for batch in step.batches]).tolist())


def completions_of(directory):
    text = (Path(directory) / "completions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def reward_calls() -> list[dict]:
    """Return the calls, since the last question, of the runs' own copy of reward_functions.py."""
    calls = []
    for name, module in sys.modules.items():
        if name.startswith("una_fast_reward_") and module.__file__ == str(FILE):
            calls = list(module.calls)
            module.calls.clear()
    return calls


# ---- a step ----


def scored(trainer, batch):
    """Return [S] log-probs of a batch by the policy and by the reference."""
    logps = trainer.scoring.logps(trainer.policy, batch)
    return logps.numpy(), trainer.reference.logps(batch).numpy()


@pytest.mark.parametrize(("anchor", "packing"), [("ref", True), ("rollout", False)])
def test_a_step_holds_samples_rewards_reference_and_offsets(
    model, prompts, tmp_path, anchor, packing
):
    settings = {"anchor": anchor, "packing": packing, "saved_completions": 6}
    config = online(model, prompts, tmp_path / "run", **settings)
    trainer = open_trainer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.policy.trainable_parameters():  # a policy that is not the reference
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    reward_calls()
    step = next(trainer.source.steps(0, 1))
    assert trainer.policy.packed == packing
    assert len(examples_in(step)) == 6 and step.num_units == 18
    assert list(trainer.ready_batches(step)) == step.batches, "scored as they are"

    (call,) = reward_calls()
    texts: dict[int, list[str]] = {}
    for prompt, text, number in zip(
        call["prompts"], call["completions"], call["number"], strict=True
    ):
        texts.setdefault(number, [prompt]).append(text)
    stops = trainer.online.collector.sampler.sampling.stop_ids
    decode = trainer.tokenizer.decode
    log_ratios = []
    for batch, examples in zip(step.batches, step.micro_batches, strict=True):
        logps, ref_logps = scored(trainer, batch)
        log_ratios += (logps - ref_logps).tolist()
        anchors = ref_logps if anchor == "ref" else logps
        np.testing.assert_allclose(batch.ref_logps, anchors, rtol=1e-5)
        residuals = config.beta * (logps - batch.ref_logps.numpy()) - batch.feedback.value.numpy()
        for k, example in enumerate(examples):
            prompt, *decoded = texts[int(example.origin.rpartition(":")[2]) - 1]
            assert decode(example.prompt_ids, skip_special_tokens=True) == prompt
            for ids, text in zip(example.responses, decoded, strict=True):
                kept = ids[:-1] if ids[-1] in stops else ids
                assert text == decode(kept, skip_special_tokens=True), "the decoded text, exactly"
            own = slice(3 * k, 3 * k + 3)
            rewards = [text.count("e") / max(len(text), 1) for text in decoded]
            np.testing.assert_allclose(batch.feedback.value[own], rewards)
            others = [-np.delete(residuals[own], i).mean() for i in range(3)]
            np.testing.assert_allclose(batch.feedback.offset[own], others, atol=1e-6)

    metrics = trainer.online.take()
    assert metrics["kl"] == pytest.approx(np.mean(log_ratios), rel=1e-4)
    assert metrics["completions/count"] == 18 and metrics["completions/skipped"] == 0
    lines = trainer.online.take_completions()
    assert len(lines) == 18 and all(line["policy_version"] == 0 for line in lines)
    assert np.mean([line["reward"] for line in lines]) == pytest.approx(metrics["reward"])
    clipped = 1 - np.mean([line["finished"] for line in lines])
    assert clipped == pytest.approx(metrics["completions/clipped_ratio"])


def test_ema_offset_is_the_mean_of_earlier_steps(model, prompts, tmp_path):
    settings = {"samples_per_prompt": 1, "offset": "ema", "rewards": [LENGTH]}
    config = online(model, prompts, tmp_path / "run", **settings)
    trainer = open_trainer(config)
    offsets, means = [], []
    for step in trainer.source.steps(0, 3):
        residuals = []
        own_offsets = set()
        for batch in step.batches:
            logps, ref_logps = scored(trainer, batch)
            residuals += (config.beta * (logps - ref_logps) - batch.feedback.value.numpy()).tolist()
            own_offsets.update(batch.feedback.offset.tolist())
        (offset,) = own_offsets
        offsets.append(offset)
        means.append(np.mean(residuals))
    assert offsets[0] == 0 and offsets[1] == pytest.approx(-means[0], abs=1e-6)
    assert offsets[2] == pytest.approx(-(0.9 * means[0] + means[1]) / 1.9, abs=1e-6)


def test_samples_without_a_reward_are_left_out_and_counted(model, prompts, tmp_path, caplog):
    settings = {"rewards": [f"{FILE}:some"], "samples_per_prompt": 4, "offset": 0.0}
    trainer, step = first_step(online(model, prompts, tmp_path / "run", **settings))
    counts = [len(example.responses) for example in examples_in(step)]
    metrics = trainer.online.take()
    assert metrics["completions/alone"] == counts.count(1)
    assert 0 < sum(counts) == step.num_units == 24 - metrics["completions/skipped"] < 24
    assert values_in(step) == {0.5}
    assert metrics["reward"] == 0.5, "a skipped sample is not a 0"
    assert "some: None" in caplog.text and "some: not finite" in caplog.text
    message = r"no response of the step got a reward: nothing: None \(18\)"
    with pytest.raises(RewardError, match=message):
        first_step(online(model, prompts, tmp_path / "none", rewards=[f"{FILE}:nothing"]))


def test_scores_outside_the_interval_are_refused(model, prompts, tmp_path):
    below = {"score": "bce", "rewards": [{"function": LENGTH, "weight": -1.0}]}
    message = r"reward -0.* outside \[0, 1\], which score=bce compares .* set reward_map"
    with pytest.raises(RewardError, match=message):
        first_step(online(model, prompts, tmp_path / "run", **below))
    _, step = first_step(online(model, prompts, tmp_path / "inside", score="bce", rewards=[LENGTH]))
    assert step.num_units == 18


def test_equal_rewards_and_responses_without_an_end_are_told(
    model, llamas, prompts, tmp_path, caplog
):
    equal = {"rewards": [f"{FILE}:equal"], "offset": 0.0}
    ranked = {"reward_map": "quantile", "score": "mse", **equal}
    _, step = first_step(online(model, prompts, tmp_path / "equal", **ranked))
    assert values_in(step) == {0.5}
    assert "teach nothing" not in caplog.text, "a constant offset teaches the level"
    first_step(online(model, prompts, tmp_path / "group", rewards=[f"{FILE}:equal"]))
    assert "all 18 rewards of a step are 0.25: they teach nothing" in caplog.text
    endless = {"max_new_tokens": 2, "missing_eos_penalty": 0.75, **equal}
    _, step = first_step(online(llamas["untied"], prompts, tmp_path / "endless", **endless))
    assert values_in(step) == {-0.5}
    assert "no response of a step ended within max_new_tokens=2" in caplog.text


def test_mixed_steps_hold_rollouts_and_records(model, mixed, prompts, tmp_path):
    data = [{"path": prompts, "online": True}, mixed]
    settings = {"mode": "mixed", "online_fraction": 0.5, "batch_size": 8, "max_steps": 2}
    settings["rewards"] = [LENGTH]  # equal for no three samples
    config = online(model, data, tmp_path / "run", **settings)
    trainer, step = first_step(config)
    origins = [example.origin for example in examples_in(step)]
    assert sum(origin.startswith(prompts) for origin in origins) == 4
    assert sum(origin.startswith(mixed) for origin in origins) == 4
    assert trainer.source.steps_per_epoch == 9, "of the 36 records, 4 a step"
    kinds = torch.cat([batch.feedback.kind for batch in step.batches])
    assert (kinds == PAIR).any() and (kinds == SCORE).sum() >= 12
    for batch, examples in zip(step.batches, step.micro_batches, strict=True):
        np.testing.assert_array_equal(batch.ref_logps, trainer.reference.logps(batch))
        offsets = iter(batch.feedback.offset.tolist())
        for example in examples:
            own = [next(offsets) for _ in range(example.feedback.num_units)]
            assert any(own) == example.origin.startswith(prompts), "records keep their offset, 0"
    train(replace(config, output_dir=str(tmp_path / "whole"), eval_data=data))
    last = read_metrics(tmp_path / "whole")[-1]
    assert {"eval_reward", "eval_rewards/accuracies", "eval_kl"} <= set(last)
    with pytest.raises(ValueError, match="needs sources of both kinds"):
        train(replace(config, output_dir=str(tmp_path / "one"), data=[mixed]))
    with pytest.raises(ValueError, match="online: false, but the mode is online; set mode: mixed"):
        train(online(model, [{"path": mixed, "online": False}], tmp_path / "kind"))


def test_cached_log_probs_of_records_do_not_switch_off_the_check_of_a_mixed_run(
    model, prompts, tmp_path, monkeypatch, caplog
):
    """Sampled responses have no cached log-probs: the reference is computed, and planned."""
    pairs = [record | {"ref_logps": [-9.0, -8.0]} for record in make_records("pairs", 12)]
    records = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    data = [{"path": prompts, "online": True}, records]
    settings = {"mode": "mixed", "batch_size": 8, "micro_batch_size": 1, "max_steps": 1}
    trainer, step = first_step(online(model, data, tmp_path / "fits", **settings))
    assert trainer.resolved.reference == "frozen"
    assert trainer.take_step(step)["grad_norm"] > 0
    monkeypatch.setattr(fit_module, "switches", lambda *_: [])  # no plan of other settings
    with pytest.raises(ValueError, match="and .* may be filled"):
        train(online(model, data, tmp_path / "small", memory_gib=0.001, **settings))
    assert "not planned" not in caplog.text


def test_inner_epochs_take_the_same_batches_again(model, prompts, tmp_path):
    config = online(model, prompts, tmp_path / "run", inner_epochs=2, saved_completions=6)
    trainer = open_trainer(config)
    assert trainer.source.steps_per_epoch == 8
    seen = []
    for step in trainer.source.steps(0, 4):
        seen.append(step.batches)
        trainer.take_step(step)
    assert seen[0] is seen[1] and seen[2] is seen[3]
    assert not torch.equal(seen[1][0].targets, seen[2][0].targets)


# ---- runs ----


def test_a_run_learns_and_tells(model, prompts, tmp_path):
    settings = {"max_steps": 25, "beta": 0.01, "learning_rate": 3e-3, "eval_data": prompts}
    result = train(online(model, prompts, tmp_path / "run", **settings))
    lines = read_metrics(tmp_path / "run", without=())
    first, step, *_, last = lines
    assert last["eval_reward"] > first["eval_reward"] + 0.02
    assert last["eval_kl"] > 0.05 and abs(first["eval_kl"]) < 1e-5
    names = "reward reward_std rewards/share_of_e/mean kl log_ratio completions/mean_length "
    names += "una/implicit_mean"
    assert set(names.split()) <= set(step) and step["completions/count"] == 18
    seconds = step["time/generate"] + step["time/reward"] + step["time/train"]
    assert step["tokens"] / step["tok_per_sec"] == pytest.approx(seconds, rel=1e-6)
    saved = completions_of(tmp_path / "run")
    assert len(saved) == 25 * 6 * 3
    assert {line["step"] - line["policy_version"] for line in saved} == {1}
    assert result.steps == 25
    assert "centred by group" in (tmp_path / "run" / "README.md").read_text()


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
    settings = {"save_every": 2, "max_steps": 6, "eval_data": prompts, "eval_every": 4}
    config = online(model, prompts, tmp_path / "whole", **settings, **variant)
    train(config)
    settings = settings_of(config) | {"output_dir": str(tmp_path / "run")}
    run_case(settings, die_at=6)
    train(RunConfig(**settings | {"resume": True}))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    lines = [read_metrics(tmp_path / name, without=TIMES) for name in ("run", "whole")]
    assert lines[0] == lines[1]
    assert completions_of(tmp_path / "run") == completions_of(tmp_path / "whole")
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "state.json").read_text())
    assert state["online"]["scale"]["recent"] or variant.get("reward_map") != "quantile"
    with pytest.raises(ValueError, match="samples_per_prompt was"):
        train(RunConfig(**settings | {"resume": True, "samples_per_prompt": 5, "max_steps": 9}))


def test_a_refreshed_reference_is_the_policy(model, prompts, tmp_path):
    trainer = open_trainer(online(model, prompts, tmp_path / "run", reference_refresh=1))
    steps = trainer.source.steps(0, 2)
    trainer.take_step(next(steps))
    batch = next(steps).batches[0]
    logps, before = scored(trainer, batch)
    assert np.abs(logps - before).max() > 1e-3
    trainer.reference.refresh(trainer.policy)
    np.testing.assert_array_equal(*scored(trainer, batch))
    trainer.take_step(next(trainer.source.steps(1, 2)))
    assert np.abs(np.subtract(*scored(trainer, batch))).max() > 1e-3, "and stays as it is"


def test_an_evaluation_without_rewards_does_not_end_the_run(model, prompts, tmp_path, caplog):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "the cat"}] * 19)  # a second chunk of one
    settings = {"eval_data": odd, "rewards": [f"{FILE}:not_for_the_cat"], "max_steps": 1}
    result = train(online(model, prompts, tmp_path / "run", **settings))
    assert "no sample of the evaluation got a reward" in caplog.text
    assert (tmp_path / "run/model.safetensors").exists()
    assert result.metrics["eval_completions/skipped"] == 19 and "eval_reward" not in result.metrics


def test_columns_that_only_some_prompts_have(model, tmp_path):
    """The columns that a function gets do not depend on the prompts of a step."""
    rows = [{"prompt": "the cat 0", "answer": 0}]
    rows += [{"prompt": f"the cat {i}"} for i in range(1, 8)]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    settings = {"rewards": [f"{FILE}:needs_answer"], "batch_size": 2, "max_steps": 4}
    train(online(model, data, tmp_path / "run", **settings))


def test_texts_with_line_separators_survive_a_resume(model, tmp_path):
    rows = [{"prompt": f"the\u2028cat\x85{i}"} for i in range(8)]
    data = write_jsonl(tmp_path / "lines.jsonl", rows)
    config = online(model, data, tmp_path / "run", save_every=1, max_steps=1)
    train(config)
    before = (tmp_path / "run" / "completions.jsonl").read_text()
    train(replace(config, resume=True))
    assert (tmp_path / "run" / "completions.jsonl").read_text() == before
    assert before.count("\n") == 18


def test_a_resumed_run_may_ask_its_judge_elsewhere(model, prompts, tmp_path):
    def trajectory(url, **more):
        judge = {"judge": f"{url}/v1", "judge_model": "m", "name": "j", **more}
        return online(model, prompts, tmp_path / "run", rewards=[judge]).trajectory()

    assert trajectory("http://a:1") == trajectory("http://b:2", timeout=3, retries=9)
    assert trajectory("http://a:1") != trajectory("http://a:1", weight=2.0)


def test_the_ceiling_of_the_kl_stops_or_warns(model, prompts, tmp_path, caplog, capsys):
    hot = {"learning_rate": 2e-2, "beta": 0.001, "max_kl": 0.5, "max_steps": 8}
    result = train(online(model, prompts, tmp_path / "stop", eval_data=prompts, **hot))
    assert 0 < result.steps < 8 and result.metrics["stopped_at_step"] == result.steps
    assert "above max_kl=0.5: the run stops; raise beta" in capsys.readouterr().out
    assert (tmp_path / "stop" / "model.safetensors").exists() and result.metrics["eval_kl"] > 0
    lines = read_metrics(tmp_path / "stop")
    assert len(lines) == result.steps + 3 and lines[-2]["kl"] > 0.5 and "eval_kl" in lines[-1]
    steps = {line["step"] for line in completions_of(tmp_path / "stop")}
    assert steps == set(range(1, result.steps + 2))

    # Stopped between reports, it goes on with another ceiling and the same samples.
    rare = hot | {"log_every": 50, "rewards": [LENGTH], "score": "mse", "reward_map": "quantile"}
    result = train(online(model, prompts, tmp_path / "rare", **rare))
    (line,) = read_metrics(tmp_path / "rare")
    assert line["kl"] > 0 and line["units"] == 18 * result.steps
    more = online(model, prompts, tmp_path / "rare", **rare | {"max_kl": 1e3, "resume": True})
    assert train(more).steps == 8 and len(completions_of(tmp_path / "rare")) == 8 * 18

    result = train(online(model, prompts, tmp_path / "warn", on_max_kl="warn", **hot))
    assert result.steps == 8 and "above max_kl=0.5" in caplog.text


def test_a_failing_reward_ends_the_command_by_name_and_the_run_can_go_on(
    model, prompts, tmp_path, capsys
):
    settings = {"rewards": [f"{FILE}:late_failure"], "save_every": 2, "max_steps": 6}
    online(model, prompts, tmp_path / "run", **settings).save(tmp_path / "run.yaml")
    reward_calls()
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert "late_failure raised KeyError: 'gone'" in error and "Traceback" not in error
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--resume", "true"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 7))


def test_a_failed_step_leaves_no_trace_in_the_state(model, prompts, tmp_path, monkeypatch):
    """Rewards were counted and ranked already: a checkpoint must be of the steps before."""
    settings = {"reward_map": "quantile", "score": "mse", "rewards": [LENGTH]}
    trainer = open_trainer(online(model, prompts, tmp_path / "run", **settings))
    steps = trainer.source.steps(0, 2)
    next(steps)
    before = json.dumps(trainer.online.state_dict())

    def fail(*_, **__):
        raise RewardError("late")

    monkeypatch.setattr(trainer.online.anchors, "anchor", fail)
    with pytest.raises(RewardError, match="late"):
        next(steps)
    assert json.dumps(trainer.online.state_dict()) == before and '"recent": [' in before


@pytest.mark.parametrize("generation", ["padded", "continuous"])
def test_a_judge_and_a_function_with_weights(model, prompts, tmp_path, generation):
    """Through the command line, with a judge that now and then fails: its samples are skipped."""

    def answer(payload, number):
        return (503, "busy", {}) if number % 7 == 3 else chat(str(40 + number % 20))

    with JudgeServer(answer) as server:
        judge = {"judge": f"{server.url}/v1", "judge_model": "m", "name": "judge"}
        judge |= {"weight": 2.0, "retries": 0}
        settings = {"rewards": [judge, LENGTH], "generation": generation, "max_steps": 2}
        online(model, prompts, tmp_path / "run", **settings).save(tmp_path / "run.yaml")
        assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
        asked = [request[2]["messages"][0]["content"] for request in server.requests]
    for line in completions_of(tmp_path / "run"):
        rewards = line["rewards"]
        assert any(line["prompt"] in text and line["completion"] in text for text in asked)
        if rewards["judge"] is None:
            assert line["reward"] is None and line["score"] is None
        else:
            assert line["reward"] == pytest.approx(2 * rewards["judge"] + rewards["length"])
    lines = read_metrics(tmp_path / "run")
    assert 0 < lines[0]["completions/skipped"] < 6 and "rewards/judge/mean" in lines[0]


def test_a_policy_with_a_chat_template_is_trained_on_what_it_said(model, tmp_path):
    reward_calls()
    chat_prompt = [{"role": "user", "content": "the cat"}]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat_prompt}] * 6)
    trainer, step = first_step(online(model, chats, tmp_path / "run"))
    (call,) = reward_calls()
    assert call["prompts"][0] == chat_prompt
    ids = examples_in(step)[0].prompt_ids
    assert trainer.tokenizer.decode(ids) == "<s><|user|>the cat</s><|assistant|>"


def test_prompts_without_room_for_a_response_are_refused(model, prompts, tmp_path):
    message = r"prompts.jsonl:\d+: a prompt of .* over the 256 positions .* max_tokens=256"
    with pytest.raises(ValueError, match=message):
        train(online(model, prompts, tmp_path / "run", max_new_tokens=250))
    cut = {"max_new_tokens": 249, "max_tokens": 256, "prompt_overflow": "truncate_left"}
    open_trainer(online(model, prompts, tmp_path / "cut", **cut))


def test_commands_that_do_not_sample_say_so(model, prompts, tmp_path, capsys):
    online(model, prompts, tmp_path / "run").save(tmp_path / "run.yaml")
    for command in (["plan", "--measure", "true"], ["precompute-ref"]):
        assert cli.main([*command, "--config", str(tmp_path / "run.yaml")]) == 1
        assert "set mode: offline" in capsys.readouterr().err


def test_the_memory_of_the_longest_rollouts_is_planned(model, prompts, tmp_path, monkeypatch):
    planned = []

    def refuse(config, facts, examples):
        planned.extend(examples)

    monkeypatch.setattr(build_module, "refuse_too_large", refuse)
    config = online(model, prompts, tmp_path / "run", max_new_tokens=70)
    open_trainer(config)
    assert len(planned) == 24
    for example in planned:
        assert [len(ids) for ids in example.responses] == [70] * 3
    assert largest_batch(planned, config, packed=True)


# ---- two ranks ----


def test_two_ranks_take_the_steps_of_one(model, mixed, prompts, tmp_path):
    """With fixed samples the gradients are those of one process, an odd number of prompts included;
    with drawn samples a killed run is the same run."""
    few = {"batch_size": 5, "micro_batch_size": 1, "max_steps": 2}
    few |= {"optimizer": "sgd", "learning_rate": 0.1}
    sources = [{"path": prompts, "online": True}, mixed]
    ema = {"offset": "ema", "score": "reward_mse", "anchor": "rollout", "eval_data": [prompts]}
    cases = {
        "mixed": {"mode": "mixed", "online_fraction": 0.4, "data": sources},
        "ema": ema,
    }
    configs = {}
    todo = {}
    for name, settings in cases.items():
        data = settings.pop("data", prompts)
        config = online(model, data, tmp_path / "two" / name, **few, **settings)
        configs[name] = settings_of(config)
        todo[name] = {"config": configs[name], "fixed": True}
    drawn = {"batch_size": 5, "max_steps": 3, "save_every": 1, "reference_refresh": 1}
    whole = settings_of(online(model, prompts, tmp_path / "two" / "whole", **drawn))
    killed = whole | {"output_dir": str(tmp_path / "two" / "killed")}
    todo["whole"] = {"config": whole}
    todo["killed"] = {"config": killed, "die_at": 3}
    todo["resumed"] = {"config": killed | {"resume": True}}
    split = {"output_dir": str(tmp_path / "two" / "split"), "max_steps": 2}
    todo["split"] = {"config": whole | split | {"parallel": {"split_vocabulary": True}}}
    run_cases(todo, tmp_path, 2)

    for name, settings in configs.items():
        one = run_case(settings | {"output_dir": str(tmp_path / "one" / name)}, fixed=True)
        two = torch.load(tmp_path / "two" / name / "seen.pt", weights_only=False)
        assert len(two["gradients"]) == 2
        for of_two, of_one in zip(two["gradients"], one["gradients"], strict=True):
            assert worst_error(of_two, of_one) < 2e-5, name
        lines = [read_metrics(tmp_path / ranks / name, without=TIMES) for ranks in ("one", "two")]
        for line_one, line_two in zip(*lines, strict=True):
            assert line_one == pytest.approx(line_two, rel=1e-3, abs=1e-5)

    assert_same_weights(tmp_path / "two" / "killed", tmp_path / "two" / "whole")
    metrics = [read_metrics(tmp_path / "two" / name, without=TIMES) for name in ("killed", "whole")]
    assert metrics[0] == metrics[1]
    completions = completions_of(tmp_path / "two" / "whole")
    assert completions_of(tmp_path / "two" / "killed") == completions
    # Ranks that split the vocabulary gather the head to sample.
    drawn = [line for line in completions if line["step"] == 1]
    of_split = [line for line in completions_of(tmp_path / "two" / "split") if line["step"] == 1]
    assert [line["completion"] for line in of_split] == [line["completion"] for line in drawn]
    assert len(read_metrics(tmp_path / "two" / "split", without=TIMES)) == 2
