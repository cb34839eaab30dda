"""Samples of a vLLM server: proved to be of the policy's weights, or refused; and drawn ahead."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import una_fast.online.server as server_module
from fsdp_worker import run_case
from ranks import run_cases
from runs import assert_same_weights, open_trainer, settings_of
from test_online import TIMES, completions_of, online
from test_online import model as model
from test_online import prompts as prompts
from test_rollout import PROMPTS, flat, logps_of, perturb_adapters, scored
from tiny import read_metrics
from una_fast.config import RunConfig
from una_fast.distributed import World
from una_fast.generation_server import ServerOptions
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import load_policy
from una_fast.model.scoring import Scoring
from una_fast.model.settings import LoraOptions
from una_fast.online.sampling import Sampling, ServerError
from una_fast.online.server_sampler import ServerSampler
from una_fast.train.loop import Trainer, train
from vllm_stand_in import FAILED, StandInServer

SAMPLING = Sampling(3, 7, temperature=0.7, stop_ids=tuple(range(1, 300, 9)))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server_module, "BACKOFF", 0.01)


@pytest.fixture
def server(model):
    with StandInServer(model) as server:
        yield server


def make_sampler(server, directory, *, lora=None, sampling=SAMPLING, **options) -> ServerSampler:
    policy = load_policy(server.directory, dtype=torch.float32, lora=lora, packed=True)
    return ServerSampler(
        policy,
        load_tokenizer(server.directory),
        sampling,
        options=ServerOptions(url=server.url, **options),
        scoring=Scoring(temperature=sampling.temperature),
        world=World(0, 1, torch.device("cpu")),
        directory=directory,
    )


@torch.no_grad()
def move(policy, seed=0) -> None:
    """Take a large step in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable_parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator))


# ---- weights and samples ----


@pytest.mark.parametrize("lora", [None, LoraOptions(r=2, alpha=8)], ids=["full", "lora"])
def test_every_version_is_handed_over_and_its_log_probs_are_the_policys(server, tmp_path, lora):
    sampler = make_sampler(server, tmp_path / "weights", lora=lora)
    scoring = Scoring(temperature=SAMPLING.temperature)
    if lora:
        perturb_adapters(sampler.policy)
    seen = []
    for version in (0, 1, 2):
        move(sampler.policy, seed=version)
        drawn = sampler.sample(PROMPTS, seed=5, version=version)
        expected = scored(sampler.policy, PROMPTS, drawn, scoring)
        np.testing.assert_allclose(logps_of(drawn), expected, atol=2e-4)
        assert {completion.version for completion in flat(drawn)} == {version}
        seen.append(logps_of(drawn))
        (place,) = (tmp_path / "weights").iterdir()  # the weights before are removed
        (file,) = place.glob("*model.safetensors")
        assert all("lora_" in name for name in load_file(file)) == bool(lora)
    assert seen[0] != seen[1] != seen[2]
    assert logps_of(sampler.sample(PROMPTS, seed=5, version=2)) == seen[2]
    loads = server.asked("/v1/load_lora_adapter" if lora else "/collective_rpc")
    assert len(loads) == 3, "a version that is served is not handed over again"
    asked = [p for p in server.asked("/v1/completions") if "prompt_logprobs" not in p]
    assert asked[0]["prompt"] == PROMPTS[asked[0]["seed"] // 3 - 1].tolist()
    if lora:
        assert len({payload["model"] for payload in asked}) == 3
        assert len(server.asked("/v1/unload_lora_adapter")) == 2
    sampler.close()
    assert not list((tmp_path / "weights").iterdir())
    assert not server.adapters, "the server is left as it was"


def test_prompts_and_samples_are_token_ids_with_their_stop_token(server, tmp_path):
    sampler = make_sampler(server, tmp_path)
    drawn = sampler.sample(PROMPTS, seed=5)
    asked = [p for p in server.asked("/v1/completions") if "prompt_logprobs" not in p]
    assert sorted(p["prompt"] for p in asked) == sorted(p.tolist() for p in PROMPTS)
    assert sorted(p["seed"] for p in asked) == [5, 8, 11, 14], "no two samples share a seed"
    finished = [completion for completion in flat(drawn) if completion.finished]
    assert 0 < len(finished) < 12
    for completion in flat(drawn):
        assert completion.ids.dtype == np.int32
        assert (completion.ids[-1] in SAMPLING.stop_ids) == completion.finished
    assert [c.ids.tolist() for c in flat(sampler.sample(PROMPTS, seed=5))] == [
        completion.ids.tolist() for completion in flat(drawn)
    ]
    assert [len(completions) for completions in sampler.sample(PROMPTS, seed=5, samples=1)] == [
        1
    ] * 4


def test_stop_strings_end_a_sample(server, tmp_path):
    sampler = make_sampler(server, tmp_path, sampling=Sampling(30, 9, stop_strings=("e", "a")))
    (drawn,) = sampler.sample(PROMPTS[:1], seed=0)
    ended = [completion for completion in drawn if completion.finished]
    assert ended
    for completion in ended:
        text = sampler.tokenizer.decode(completion.ids)
        assert "e" in text or "a" in text


# ---- refusals ----


def changed(**values):
    """Return a change of every choice of the answers for samples."""

    def change(path, answer):
        if path == "/v1/completions" and "prompt_logprobs" not in answer["choices"][0]:
            for choice in answer["choices"]:
                choice.update(values)
        return answer

    return change


REFUSED = {
    "label": ({"weight_versions": [{"version": "default"}]}, "of the weights default, and not of"),
    "old vllm": ({"weight_versions": None}, "vLLM 0.33 or later is needed"),
    "no ids": ({"token_ids": None}, "no completion with token ids .* vLLM 0.33 or later"),
    "prompt": ({"prompt_token_ids": [1, 2]}, "the tokens of the prompt were changed"),
    "vocabulary": (
        {"token_ids": [300], "logprobs": {"token_logprobs": [-1.0]}},
        "token 300 lies outside the vocabulary of 300; serve the run's model",
    ),
    "aborted": ({"finish_reason": "abort"}, "ended by 'abort'"),
    "cut": (
        {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"},
        "cut after 1 tokens, below max_new_tokens=7; raise the server's --max-model-len",
    ),
    "log-probs": ({"logprobs": {"token_logprobs": []}}, "no completion with token ids"),
    "too many": ({"index": 7}, "3 samples were asked for, and 3 came"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_answer_that_proves_nothing_is_refused(server, tmp_path, case):
    values, match = REFUSED[case]
    server.after = changed(**values)
    with pytest.raises(ServerError, match=match):
        make_sampler(server, tmp_path).sample(PROMPTS[:2], seed=0)


def test_a_server_that_says_it_loaded_the_weights_is_not_believed(server, tmp_path):
    sampler = make_sampler(server, tmp_path)
    sampler.sample(PROMPTS[:1], seed=0, version=0)
    move(sampler.policy)
    server.ignores_weights = True
    match = "loaded the weights of step 1, and its log-probs differ .* nats per token, above"
    with pytest.raises(ServerError, match=match):
        sampler.sample(PROMPTS[:1], seed=0, version=1)
    server.ignores_weights = False
    assert flat(sampler.sample(PROMPTS[:1], seed=0, version=1)), "and is handed the weights again"


def test_an_answer_of_another_model_is_refused(server, tmp_path):
    sampler = make_sampler(server, tmp_path)
    server.after = lambda path, answer: (
        {**answer, "model": "another"} if path[-3:] == "ons" else answer
    )
    with pytest.raises(ServerError, match="the-model was asked, and 'another' answered"):
        sampler.sample(PROMPTS[:1], seed=0)


def test_weights_wait_for_the_samples_that_are_being_drawn(server, tmp_path):
    """Or the rest of the samples would be of the new weights."""
    sampler = make_sampler(server, tmp_path)
    sampler.hand_over(0, PROMPTS[0])
    release, held = threading.Event(), threading.Event()

    def hold(path, payload, number):
        if path == "/v1/completions":
            held.set()
            assert release.wait(30)

    server.before = hold
    ahead = sampler.sample_ahead(PROMPTS, seed=0, version=0)
    assert held.wait(30)
    move(sampler.policy)
    later = threading.Thread(target=sampler.hand_over, args=(1, PROMPTS[0]))
    later.start()
    later.join(0.3)
    assert len(server.asked("/collective_rpc")) == 1, "the new weights are not loaded yet"
    release.set()
    later.join(30)
    assert len(server.asked("/collective_rpc")) == 2
    assert {completion.version for completion in flat(ahead.wait())} == {0}


def test_a_server_that_was_started_anew_is_noticed(server, tmp_path):
    for lora, match in ((None, "of the weights default"), (LoraOptions(r=2), "does not exist")):
        sampler = make_sampler(server, tmp_path / str(lora is None), lora=lora)
        sampler.sample(PROMPTS[:1], seed=0)
        server.start()
        with pytest.raises(ServerError, match=f"{match}.*started anew"):
            sampler.sample(PROMPTS[:1], seed=0)


def test_a_model_of_other_sizes_is_refused(server, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(server.directory)
    config.hidden_size = 64
    other = make_sampler(server, tmp_path)
    server.model = LlamaForCausalLM(config)
    with pytest.raises(ServerError, match="/collective_rpc: HTTP 500: .*size mismatch"):
        other.sample(PROMPTS[:1], seed=0)


def test_an_end_of_the_servers_own_is_refused(server, tmp_path):
    server.eos = [token for token in range(300) if token not in SAMPLING.stop_ids]
    with pytest.raises(ServerError, match="--generation-config vllm"):
        make_sampler(server, tmp_path).sample(PROMPTS, seed=0)


def test_failed_requests_are_repeated_with_the_same_seed(server, tmp_path):
    calls = []

    def busy(path, payload, number):
        calls.append((path, payload))
        return (503, FAILED) if len(calls) % 3 else None

    sampler = make_sampler(server, tmp_path)
    server.before = busy
    drawn = sampler.sample(PROMPTS[:1], seed=4)
    seeds = [payload["seed"] for path, payload in calls if payload and "seed" in payload]
    assert seeds == [4, 4, 4] and len(drawn[0]) == 3
    server.before = lambda *_: (503, FAILED)
    with pytest.raises(ServerError, match="HTTP 503: .*the engine is not well"):
        sampler.sample(PROMPTS[:1], seed=4)


def test_a_slow_server_is_a_timeout(server, tmp_path):
    sampler = make_sampler(server, tmp_path, timeout=0.3, retries=0)
    sampler.hand_over(0, PROMPTS[0])
    release = threading.Event()
    server.before = lambda *_: release.wait(5) and None
    with pytest.raises(ServerError, match=r"timeout \(after 0.3 s\); see that the server answers"):
        sampler.sample(PROMPTS[:1], seed=4)
    release.set()


def test_a_server_without_its_addresses_is_told_how_to_start(server, tmp_path):
    for lora, path, match in (
        (None, "/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
        (None, "/update_weight_version", "vLLM 0.33 or later"),
        (LoraOptions(r=2), "/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    ):
        missing = {path}
        server.before = lambda path, *_, missing=missing: (404, {}) if path in missing else None
        with pytest.raises(ServerError, match=match):
            make_sampler(server, tmp_path, lora=lora).sample(PROMPTS[:1], seed=0)


def test_what_is_wrong_before_the_first_sample(server, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="generation_server.model=x is not served: .* the-model"):
        make_sampler(server, tmp_path, model="x")
    with pytest.raises(ValueError, match="VARIABLE_OF_THE_KEY, which holds no key"):
        make_sampler(server, tmp_path, api_key_env="VARIABLE_OF_THE_KEY")
    monkeypatch.setenv("VARIABLE_OF_THE_KEY", "abc-secret-key")
    server.before = lambda *_: (401, {"error": "abc-secret-key is wrong"})
    with pytest.raises(ValueError, match="check generation_server.api_key_env") as refusal:
        make_sampler(server, tmp_path, api_key_env="VARIABLE_OF_THE_KEY")
    assert "abc-secret-key" not in str(refusal.value)
    server.before = lambda *_: (404, {})
    with pytest.raises(ValueError, match="check generation_server.url"):
        make_sampler(server, tmp_path)
    server.server.server_close()
    with pytest.raises(ValueError, match="no connection .*; see that the server answers"):
        make_sampler(server, tmp_path, retries=0)


def test_settings_that_do_not_go_together(model, prompts, tmp_path):
    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            online(model, prompts, tmp_path / "run", **settings)

    url = {"url": "http://localhost:8000"}
    lagged = {"generation": "vllm_server", "generation_server": url, "rollout_lag": 1}
    refused("needs the address of the server", generation="vllm_server")
    refused("generation_server is read with generation=vllm_server", generation_server=url)
    refused("without /v1", generation_server={"url": "http://localhost:8000/v1"})
    refused(
        "generation_server.timeout=0.0 must be positive", generation_server={**url, "timeout": 0.0}
    )
    refused("generation=padded samples with these very weights", rollout_lag=1)
    refused("rollout_lag=2 must be 0 or 1", **lagged | {"rollout_lag": 2})
    refused("more than one step old", **lagged, inner_epochs=2)
    refused("set rollout_lag: 0, or off_policy_ok: true", **lagged)
    refused("generation_batch_size is not read", **lagged, generation_batch_size=8)
    refused("top_p=0.5 has cut", **lagged, top_p=0.5)
    secret = {"url": "http://me:pass-word@localhost:8000"}
    config = online(
        model,
        prompts,
        tmp_path / "run",
        **lagged | {"generation_server": secret},
        score="mse",
        reward_map="sigmoid",
    )
    assert "pass-word" not in repr(config) + json.dumps(config.shareable())


# ---- runs ----


def served(model, prompts, directory, server, **settings) -> RunConfig:
    """Return the settings of a short run that a server samples for."""
    usual = {"generation": "vllm_server", "generation_server": {"url": server.url}}
    return online(model, prompts, directory, **usual | settings)


LAG = {"rollout_lag": 1, "off_policy_ok": True}


def test_a_run_trains_on_the_servers_samples(model, prompts, server, tmp_path):
    config = served(model, prompts, tmp_path / "run", server, eval_data=prompts)
    train(config)
    lines = completions_of(tmp_path / "run")
    assert {line["step"] - line["policy_version"] for line in lines} == {1}
    first, *steps, last = read_metrics(tmp_path / "run")
    assert all(line["completions/staleness"] == 0 for line in steps)
    assert abs(first["eval_kl"]) < 1e-4 and last["eval_kl"] > 1e-3
    labels = [p["new_version"] for p in server.asked("/update_weight_version")]
    assert [label.rpartition("-")[2] for label in labels] == ["0", "1", "2", "3", "4"]
    assert not list((tmp_path / "run" / "handed_over").iterdir())


def test_a_server_of_raw_log_probs_is_refused(model, prompts, server, tmp_path):
    """The log-probs of a temperature must be those of the distribution that is sampled from."""
    server.raw_logprobs = True
    train(served(model, prompts, tmp_path / "one", server, max_steps=1))
    hot = {"temperature": 2.5, "off_policy_ok": True}
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        train(served(model, prompts, tmp_path / "hot", server, **hot))
    server.raw_logprobs = False
    train(served(model, prompts, tmp_path / "mended", server, max_steps=1, **hot))


@pytest.mark.parametrize("anchor", ["ref", "rollout"])
def test_a_lagged_step_is_anchored_at_the_policy_that_drew_it(
    model, prompts, server, tmp_path, anchor
):
    config = served(model, prompts, tmp_path / "run", server, anchor=anchor, **LAG)
    trainer = open_trainer(config)
    before = None  # log-probs of the samples by the policy that drew them
    for number, step in enumerate(trainer.source.steps(0, 3)):
        lines = trainer.online.take_completions()
        assert {line["policy_version"] for line in lines} == {max(number - 1, 0)}
        assert trainer.online.take()["completions/staleness"] == min(number, 1)
        drawn_by = before or logps_by(trainer, step)
        for batch, logps in zip(step.batches, drawn_by(step) if before else drawn_by, strict=True):
            reference = trainer.reference.logps(batch).numpy()
            anchors = logps if anchor == "rollout" else reference
            np.testing.assert_allclose(batch.ref_logps, anchors, atol=2e-4)
            residuals = config.beta * (logps - anchors) - batch.feedback.value.numpy()
            for start in range(0, len(residuals), 3):
                own = slice(start, start + 3)
                others = [-np.delete(residuals[own], i).mean() for i in range(3)]
                np.testing.assert_allclose(batch.feedback.offset[own], others, atol=1e-5)
        weights = [p.detach().clone() for p in trainer.policy.trainable_parameters()]
        before = with_weights(trainer, weights)
        move(trainer.policy, seed=number)


def logps_by(trainer, step):
    return [trainer.scoring.logps(trainer.policy, batch).numpy() for batch in step.batches]


def with_weights(trainer, weights):
    """Return a function: log-probs of a step by the policy of these weights."""

    @torch.no_grad()
    def by_them(step):
        now = [p.detach().clone() for p in trainer.policy.trainable_parameters()]
        for p, old in zip(trainer.policy.trainable_parameters(), weights, strict=True):
            p.copy_(old)
        logps = logps_by(trainer, step)
        for p, new in zip(trainer.policy.trainable_parameters(), now, strict=True):
            p.copy_(new)
        return logps

    return by_them


def test_the_server_samples_while_the_run_trains(model, prompts, server, tmp_path, monkeypatch):
    """The samples of a step are held back until the step before has been trained on."""
    trained = [threading.Event() for _ in range(5)]
    held = []

    take_step = Trainer.take_step
    taken = []

    def step(trainer, work):
        found = take_step(trainer, work)
        taken.append(found)
        trained[len(taken) - 1].set()
        return found

    monkeypatch.setattr(Trainer, "take_step", step)

    def hold_later(path, payload, number):
        if path != "/v1/completions" or "prompt_logprobs" in payload:
            return None
        samples = [p for p in server.asked(path) if "prompt_logprobs" not in p]
        rollout = (len(samples) - 1) // 6  # prompts of a step
        if rollout:
            held.append(trained[rollout - 1].wait(30))
        return None

    server.before = hold_later
    train(served(model, prompts, tmp_path / "run", server, **LAG))
    assert held == [True] * 18, "three rollouts were drawn ahead, of six prompts each"


def test_a_lagged_run_resumes_with_the_samples_that_were_drawn_ahead(
    model, prompts, server, tmp_path
):
    """Killed inside step 6, it goes on from checkpoint-4, which holds the samples of step 5."""
    more = {"save_every": 2, "max_steps": 6, "eval_data": prompts, "eval_every": 3}
    config = served(model, prompts, tmp_path / "whole", server, **LAG, **more)
    train(config)
    settings = settings_of(config) | {"output_dir": str(tmp_path / "run")}
    run_case(settings, die_at=6)
    state = json.loads((tmp_path / "run/checkpoint-4/state.json").read_text())
    flight = state["online"]["flight"]
    assert flight["number"] == 4 and flight["version"] == 3 and len(flight["drawn"][0]) == 6
    server.start()
    server.requests.clear()
    train(RunConfig(**settings | {"resume": True}))
    asked = [p for p in server.asked("/v1/completions") if p.get("n") == 3]
    assert len(asked) == 6, "step 6 alone was drawn"
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    lines = [read_metrics(tmp_path / name, without=TIMES) for name in ("run", "whole")]
    assert lines[0] == lines[1]
    assert completions_of(tmp_path / "run") == completions_of(tmp_path / "whole")
    versions = {line["step"]: line["policy_version"] for line in completions_of(tmp_path / "run")}
    assert versions == {1: 0, 2: 0, 3: 1, 4: 2, 5: 3, 6: 4}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_server_that_dies_costs_no_step(model, prompts, server, tmp_path, lag):
    settings = {**LAG, "rollout_lag": lag, "max_steps": 5}
    config = served(model, prompts, tmp_path / "run", server, **settings)

    def dead(path, payload, number):
        """Die while the fourth rollout is drawn."""
        drawn = [p for p in server.asked("/v1/completions") if p.get("n") == 3]
        return (500, FAILED) if len(drawn) > 20 else None

    server.before = dead
    with pytest.raises(ServerError, match="The 3 steps before are saved; set resume=true"):
        train(config)
    assert (tmp_path / "run" / "checkpoint-3").exists()
    server.before = lambda *_: None
    server.start()
    train(RunConfig(**settings_of(config) | {"resume": True}))
    lines = completions_of(tmp_path / "run")
    assert sorted({line["step"] for line in lines}) == [1, 2, 3, 4, 5]
    ages = {line["step"] - line["policy_version"] for line in lines}
    assert ages == ({1} if not lag else {1, 2})


def test_the_failure_of_a_server_saves_the_steps_of_all_ranks(
    model, prompts, server, tmp_path, monkeypatch
):
    """All ranks hear of it, as of a reward that fails, and can save together."""
    trainer = open_trainer(served(model, prompts, tmp_path / "run", server))
    trainer.world = World(0, 2, torch.device("cpu"))
    saved = []
    monkeypatch.setattr(trainer, "_save_once", saved.append)

    def fails():
        raise ServerError("gone")
        yield

    with pytest.raises(ServerError, match="gone. The 2 steps before are saved"):
        trainer.next_step(fails(), 2)
    assert saved == [2]


def test_two_ranks_share_a_server(model, prompts, server, tmp_path):
    """Their samples are of weights gathered from both; a killed run is the same run."""
    few = {"batch_size": 5, "max_steps": 3, "save_every": 1, "eval_data": prompts, **LAG}
    whole = settings_of(served(model, prompts, tmp_path / "whole", server, **few))
    whole["generation_server"] = {"url": server.url}
    killed = whole | {"output_dir": str(tmp_path / "killed")}
    todo = {
        "whole": {"config": whole},
        "killed": {"config": killed, "die_at": 3},
        "resumed": {"config": killed | {"resume": True}},
    }
    adapter = few | {"lora": {"r": 2}, "rollout_lag": 0, "max_steps": 2, "save_every": None}
    lora = settings_of(served(model, prompts, tmp_path / "lora", server, **adapter))
    lora |= {"generation_server": {"url": server.url}, "lora": {"r": 2}}
    todo["lora"] = {"config": lora}
    run_cases(todo, tmp_path, 2)
    loaded = server.asked("/v1/load_lora_adapter")
    assert [payload["lora_name"].rpartition("-")[2] for payload in loaded] == ["0", "1", "2"]
    assert {line["policy_version"] for line in completions_of(tmp_path / "lora")} == {0, 1}
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert completions_of(tmp_path / "killed") == completions_of(tmp_path / "whole")
    versions = {line["step"]: line["policy_version"] for line in completions_of(tmp_path / "whole")}
    assert versions == {1: 0, 2: 0, 3: 1}
    lines = [read_metrics(tmp_path / name, without=TIMES) for name in ("killed", "whole")]
    assert lines[0] == lines[1]
