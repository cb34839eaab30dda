"""Rewards: all are given the right text; a sample without a reward is left out, never scored."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from judge_server import JudgeServer, chat, wait_for
from tiny import make_tokenizer
from una_fast import signals
from una_fast.online.sampling import Completion, Sampling, whole_text
from una_fast.rewards import client as reward_client
from una_fast.rewards import http as reward_http
from una_fast.rewards import scale as scale_module
from una_fast.rewards.client import Reply
from una_fast.rewards.outcome import Failure
from una_fast.rewards.scale import RewardScale
from una_fast.rewards.settings import RewardError, RewardsDown, parse_rewards
from una_fast.rewards.total import Rewards
from una_fast.score_maps import mid_ranks, sigmoid, to_range

JUDGE_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
VOCABULARY = ["<unk>", "[BOS]", "[PAD]", "[end]", "[user]", "[assistant]"]
VOCABULARY += ["the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="module")
def running():
    with JudgeServer(lambda payload, number: chat("1")) as server:
        yield server


@pytest.fixture
def ask(running):
    """Return (rewards, server) of a judge that gives some answers."""

    def run(answer, completions=("a",), *, prompts=None, **settings):
        running.start(answer)
        entry = {"judge": f"{running.url}/v1", "judge_model": "m", "name": "j", **settings}
        return reward([entry], completions=completions, prompts=prompts), running

    return run


@pytest.fixture
def send(running):
    """Return (rewards, server) of an endpoint that gives some answers."""

    def run(answer, completions, *, columns=None, **settings):
        running.start(answer)
        entry = {"endpoint": f"{running.url}/score", "name": "e", "batch_size": 2, **settings}
        return reward([entry], completions=completions, columns=columns), running

    return run


@pytest.fixture(autouse=True)
def fast_and_direct(monkeypatch):
    """Retries do not wait, and no proxy stands before the local server."""
    monkeypatch.setattr(reward_http, "BACKOFF", 0.001)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def reward(entries, completions=("a", "b"), prompts=None, finished=None, columns=None, **settings):
    """Return the rewards of some completions, from entries as they stand in a configuration."""
    rewards = Rewards(parse_rewards(entries), **settings)
    try:
        count = len(completions)
        prompts = [f"prompt {i}" for i in range(count)] if prompts is None else prompts
        return rewards(prompts, list(completions), finished or [True] * count, columns or {})
    finally:
        rewards.close()


# ---- settings ------------------------------------------------------------------------------------

JUDGE = {"judge": "http://h/v1", "judge_model": "m"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("math.sqrt", "must be a list"),
        ([3], r"rewards\[0\] \(3\): must be the name of a function, or a mapping"),
        ([{"weight": 2}], "none of function, model, judge, endpoint"),
        ([{"function": "a.b", "model": "c"}], "both function and model"),
        (
            ["a.b", {"function": "a.c", "wieght": 2}],
            r"rewards\[1\] \(function a.c\): unknown key 'wieght'.*weight",
        ),
        ([{"function": "a.b", "batch_size": 2}], "unknown key 'batch_size' of a function"),
        ([{"judge": "http://h/v1"}], r"rewards\[0\] \(judge http://h/v1\): judge_model is missing"),
        (["f"], "package.module.function"),
        (["rewards.py"], "path/file.py:function"),
        (["a.f", "b.f"], "name 'f' is taken"),
        ([JUDGE, JUDGE], "name 'h' is taken"),
        ([{"function": "a.b", "weight": 0}], "weight=0"),
        ([{"function": "a.b", "weight": math.nan}], "weight=nan"),
        ([{"function": "a.b", "weight": True}], "weight=true"),
        ([{**JUDGE, "patience": -1}], "patience=-1 must not be negative"),
        ([{**JUDGE, "timeout": 1e300}], "timeout=.* must be at most"),
        ([{"function": "a.b", "keep_special_tokens": "yes"}], "must be true or false"),
        ([{"function": None}], "target=None"),
        ([{"model": "m", "template": "jinja"}], "template='jinja' is not one of auto, chat, plain"),
        ([{"model": "m", "batch_size": 0}], "batch_size=0"),
        ([{"model": "m", "max_tokens": 1.5}], "max_tokens=1.5"),
        ([{**JUDGE, "timeout": 0}], "timeout=0 must be positive"),
        ([{**JUDGE, "instruction": "Score {prompt}"}], "holds {completion}"),
        ([{"endpoint": "localhost:80"}], "must be a URL"),
        ([{"endpoint": "http://h:port/x"}], "must be a URL"),
    ],
)
def test_wrong_settings_are_refused_by_entry_and_key(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_rewards(entries)


def test_default_names():
    entries = [
        "a.b.f",
        "dir/x.py:g",
        {"model": "org/judge-7b/"},
        JUDGE,
        {"endpoint": "http://e:8/r", "name": "mine"},
    ]
    assert [spec.name for spec in parse_rewards(entries)] == ["f", "g", "judge-7b", "h", "mine"]


# ---- functions and the sum -----------------------------------------------------------------------

FUNCTIONS = """
import decimal, fractions, os, random, signal, sys, time
import numpy as np, torch
from dataclasses import dataclass

@dataclass
class Seen:
    calls: list

seen = Seen([])

def strict(prompts, completions, answer):
    seen.calls.append((prompts, completions, answer))
    return [float(a == c) for a, c in zip(answer, completions)]

def everything(completions, **columns):
    return [float(len(columns))] * len(completions)

def lengths(prompts, completions, **columns):
    return torch.tensor([len(c) for c in completions])

def scalars(prompts, completions):
    return [np.float32(0.5), torch.tensor(2), 3][: len(completions)]

def holes(prompts, completions):
    return [None, float("nan"), -float("inf"), 0.0, 10**400]

def tiny(prompts, completions):
    return [1e308] * len(completions)

def booleans(prompts, completions):
    return [True, False]

def texts(prompts, completions):
    return np.array(["1", "2"])

def nested(prompts, completions):
    return np.ones((2, 1))

def short(prompts, completions):
    return [1.0]

def number(prompts, completions):
    return 1.0

def breaks(prompts, completions):
    return [1 / 0]

def greedy(prompts, completions, **columns):
    completions.clear()
    return [1.0, 1.0]

def times(prompts, completions):
    return np.array(["2020-01-01"] * 2, dtype="datetime64[ns]")

def mapping(prompts, completions):
    return {"a": 1.0, "b": 1.0}

def waited(prompts, completions):
    async def later():
        return [1.0, 1.0]
    return later()

async def asynchronous(prompts, completions):
    return [1.0, 1.0]

def endless(prompts, completions):
    while True:
        yield 1.0

def leaves(prompts, completions):
    sys.exit(0)

def leaves_at_once(prompts, completions):
    os._exit(0)

def interrupts(prompts, completions):
    raise KeyboardInterrupt

def rings(prompts, completions):
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    time.sleep(5)

class Mute(BaseException):
    def __str__(self):
        raise RuntimeError

def mute(prompts, completions):
    raise Mute

def leaks(prompts, completions):
    raise RuntimeError("no answer for " + os.environ["UNA_TEST_KEY"])

def natural(completions, kind):
    values = [len(text) for text in completions]
    return {
        "bools": [bool(value) for value in values],
        "numpy": np.array(values, dtype=np.float16),
        "numpy bools": [np.bool_(value) for value in values],
        "gradient": torch.tensor(values, dtype=torch.bfloat16, requires_grad=True),
        "tensors": [torch.tensor(float(value)) for value in values],
        "tuple": tuple(values),
        "iterator": (value for value in values),
        "decimals": [decimal.Decimal(value) for value in values],
        "fractions": [fractions.Fraction(value) for value in values],
    }[kind[0]]

def vandal(prompts, completions, chats):
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    sys.stdout.close()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    chats[0][0]["content"] = "changed"
    prompts.clear()
    return [1.0, 1.0]

def drawn(completions):
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completions]

def positional(p, c):
    return [1.0, 1.0]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A folder with functions that is importable only as the current directory."""
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("own_rewards", None)


def test_functions_may_import_what_lies_beside_them(functions, monkeypatch):
    """When they are loaded and when they are called; nothing there hides a package."""
    folder = functions / "elsewhere"
    folder.mkdir()
    (folder / "sibling_helper.py").write_text("VALUE = 0.25")
    (folder / "json.py").write_text("raise ImportError")
    (folder / "scored.py").write_text(
        "from sibling_helper import VALUE\n"
        "def early(completions): return [VALUE] * len(completions)\n"
    )
    (functions / "late_helper.py").write_text("VALUE = 0.5")
    (functions / "late.py").write_text(
        "def score(completions):\n"
        "    import late_helper\n"
        "    return [late_helper.VALUE] * len(completions)\n"
    )
    for name in ("late", "late_helper", "sibling_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = reward([f"{folder}/scored.py:early", "late.score"])
    assert found.total == [0.75, 0.75] and str(folder) not in sys.path


def test_functions_get_what_they_name(functions):
    columns = {"answer": ["a", "x"], "level": [1, 2]}
    entries = [
        "own_rewards.strict",
        "own_rewards:everything",
        "own_rewards.py:lengths",
        "own_rewards.scalars",
    ]
    found = reward(entries, columns=columns)
    assert found.parts == {
        "strict": [1.0, 0.0],
        "everything": [3.0] * 2,
        "lengths": [1.0] * 2,
        "scalars": [0.5, 2.0],
    }
    assert found.total == [5.5, 6.0] and not found.failures
    assert sys.modules["own_rewards"].seen.calls == [
        (["prompt 0", "prompt 1"], ["a", "b"], ["a", "x"])
    ]
    assert str(functions) not in sys.path, "a file here must not be taken for a package"
    with pytest.raises(RewardError, match="strict.*needs column 'answer'.*columns: level"):
        reward(["own_rewards.strict"], columns={"level": [1, 2]})


def test_functions_of_one_file_share_its_state(functions):
    entries = ["own_rewards.py:strict", "own_rewards.py:scalars"]
    a, b = Rewards(parse_rewards(entries)).rewards
    assert a.function.__globals__ is b.function.__globals__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts", "returned str '1'"),
        ("nested", r"returned ndarray of shape \(2, 1\)"),
        ("times", "returned ndarray of shape .*datetime64"),
        ("mapping", "returned dict"),
        ("waited", "returned a coroutine"),
        ("endless", "returned 3 or more rewards for 2 completions"),
        ("leaves", "raised SystemExit: 0"),
        ("leaves_at_once", r"raised Exited: os._exit\(0\)"),
        ("interrupts", "raised KeyboardInterrupt"),
        ("rings", "raised Alarm"),
        ("mute", "raised Mute: <Mute without a text"),
        ("leaks", r"raised RuntimeError: no answer for \*\*\* \(own_rewards.py:"),
        ("short", "returned 1 rewards for 2 completions"),
        ("number", "returned float"),
        ("breaks", "raised ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_of_a_function_stops_the_run(functions, monkeypatch, name, message):
    monkeypatch.setenv("UNA_TEST_KEY", "secret-12345")
    error = pytest.raises(RewardError, match=f"{name}: function own_rewards.{name} {message}")
    with signals.requests.listening(), error:
        reward([f"own_rewards.{name}"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_rewards.missing", r"own_rewards\.py has no function missing"),
        ("no_such_module.f", "ModuleNotFoundError"),
        ("no_such_file.py:f", "there is no file"),
        ("own_rewards.seen", "cannot be called"),
        ("own_rewards.positional", "must take prompts and completions by these names"),
        ("own_rewards.asynchronous", "is async"),
        ("leaving.py:f", "raised SystemExit: 0"),
        ("broken.py:f", "raised SyntaxError"),
        ("builtins.dict", "has no signature"),
    ],
)
def test_functions_are_loaded_before_the_first_sample(functions, target, message):
    with pytest.raises(ValueError, match=message):
        Rewards(parse_rewards([target]))


def test_no_reward_is_never_zero(functions):
    """A sample without some reward has no total; 0.0 itself is a reward like any other."""
    found = reward(["own_rewards.holes", "own_rewards.lengths"], completions="abcde")
    assert found.parts["holes"] == [None, None, None, 0.0, None]
    assert found.parts["lengths"] == [1.0] * 5
    assert found.total == [None, None, None, 1.0, None]
    assert found.failures == Counter({"holes: None": 1, "holes: not finite": 3})
    again = {"function": "own_rewards.tiny", "weight": 9.0, "name": "b"}
    found = reward(["own_rewards.tiny", again])
    assert found.total == [None, None]
    assert found.failures == Counter({"tiny: larger than 1e+09": 2, "b: larger than 1e+09": 2})
    heavy = {"function": "own_rewards.lengths", "weight": 1e300}
    assert reward([heavy]).failures == Counter({"total: larger than 1e+09": 2})


def test_weights_and_penalty(functions):
    """The penalty is not weighted, and taken once, however many rewards there are."""
    entries = [
        {"function": "own_rewards.lengths", "weight": -2.0},
        {"function": "own_rewards.scalars", "weight": 4.0},
    ]
    found = reward(
        entries, completions=["x", "xyz"], finished=[True, False], missing_eos_penalty=0.75
    )
    assert found.total == [-2.0 + 2.0, -6.0 + 8.0 - 0.75]
    assert found.parts == {"lengths": [1.0, 3.0], "scalars": [0.5, 2.0]}


KINDS = ("bools", "numpy", "numpy bools", "gradient", "tensors", "tuple", "iterator", "decimals")


@pytest.mark.parametrize("kind", [*KINDS, "fractions"])
def test_the_natural_forms_of_numbers_are_taken(functions, kind):
    found = reward(["own_rewards.natural"], columns={"kind": [kind] * 2})
    assert found.total == [1.0, 1.0]


def test_a_function_cannot_change_the_run(functions):
    """Nor the records that it is given, which later steps read again."""

    def state():
        handler = signal.getsignal(signal.SIGTERM)
        drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), sys.stdout.closed
        return os.getcwd(), handler, os._exit, *drawn, *modes

    before = state()
    chats = [[{"content": "as it was"}], [{}]]
    assert reward(["own_rewards.vandal"], columns={"chats": chats}).total == [1.0, 1.0]
    assert state() == before and chats[0][0]["content"] == "as it was"


def test_random_numbers_of_a_function_follow_the_seed_of_the_step(functions):
    """A resumed run draws them again; the random states of the run itself are untouched."""
    rewards = Rewards(parse_rewards(["own_rewards.drawn"]))
    before = torch.get_rng_state()
    totals = [rewards(["p"] * 2, ["a"] * 2, [True] * 2, {}, seed=n).total for n in (1, 2, 1)]
    assert totals[0] == totals[2] != totals[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_real_interrupt_passes_a_function(functions, monkeypatch):
    """Ctrl-C, as it arrives without and with the handlers of a command."""
    rewards = Rewards(parse_rewards(["own_rewards.interrupts"]))
    with pytest.raises(KeyboardInterrupt):
        rewards(["p"], ["a"], [True], {})
    (function,) = rewards.rewards

    def stop(**_):
        raise signals.Stopped(signal.SIGINT)

    monkeypatch.setattr(function, "function", stop)
    with pytest.raises(signals.Stopped):
        rewards(["p"], ["a"], [True], {})


def test_rewards_do_not_disturb_each_other(functions):
    found = reward(["own_rewards.greedy", "own_rewards.lengths"])
    assert found.parts["lengths"] == [1.0, 1.0]


def test_no_samples_ask_nobody(functions):
    found = reward(["own_rewards.breaks"], completions=[])
    assert found.total == [] and found.parts == {"breaks": []}


# ---- reward models -------------------------------------------------------------------------------


def judge_tokenizer(*, template: str | None = JUDGE_CHAT) -> PreTrainedTokenizerFast:
    """Words, where the policy's tokenizer has bytes; it puts [BOS] before a text.

    As some published tokenizers do, it comes with truncation and padding switched on, which must
    not be obeyed.
    """
    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    raw.enable_truncation(4)
    raw.enable_padding(length=40, pad_id=2, pad_token="[PAD]")
    special = {"bos_token": "[BOS]", "pad_token": "[PAD]", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


def save_judge(
    directory, *, labels=1, pad=2, kind=LlamaForSequenceClassification, template=JUDGE_CHAT
) -> str:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.5,
        num_labels=labels,
        pad_token_id=pad,
    )
    kind(config).save_pretrained(directory)
    judge_tokenizer(template=template).save_pretrained(directory)
    return str(directory)


def save_absolute(directory) -> str:
    """A judge with learned positions: padding on the left would move them."""
    torch.manual_seed(2)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 2}
    config = GPT2Config(vocab_size=len(VOCABULARY), num_labels=1, **sizes, **ids)
    GPT2ForSequenceClassification(config).save_pretrained(directory)
    judge_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return {
        "chat": save_judge(root / "chat"),
        "plain": save_judge(root / "plain", template=None),
        "absolute": save_absolute(root / "absolute"),
        "no_pad": save_judge(root / "no_pad", pad=None),
    }


def words(text: str) -> list[int]:
    return [VOCABULARY.index(word) if word in VOCABULARY else 0 for word in text.split()]


def alone(path: str, texts: list[list[int]]) -> list[float]:
    """Return the rewards of single texts, straight from the model."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits) for ids in texts]


def test_a_model_reads_the_decoded_text_with_its_own_tokenizer(judges):
    """Token ids of the policy, decoded by the policy's tokenizer, are given as text.

    The authors' script gave a judge the policy's ids. BOS stands once, though template and
    tokenizer both write it.
    """
    policy = make_tokenizer()
    sampled = policy("cat sat on", add_special_tokens=False)["input_ids"] + [policy.eos_token_id]
    text = policy.decode(sampled, skip_special_tokens=True)
    wanted = words("[BOS] [user] the mat [end] [assistant] cat sat on [end]")
    assert text == "cat sat on" and sampled[:-1] != words(text)

    rewards = Rewards(parse_rewards([{"model": judges["chat"], "name": "rm"}]))
    (model,) = rewards.rewards
    assert model.text("the mat", text).ids == wanted
    assert model.text([{"role": "user", "content": "the mat"}], text).ids == wanted
    found = rewards(["the mat"], [text], [True], {})
    (truth,) = alone(judges["chat"], [wanted])
    assert found.parts["rm"] == [pytest.approx(truth, rel=1e-5)]

    wanted = words("[BOS] the mat cat sat on")
    for entry in ({"model": judges["plain"]}, {"model": judges["chat"], "template": "plain"}):
        (plain,) = Rewards(parse_rewards([entry])).rewards
        assert plain.text("the mat ", text).ids == wanted
        assert plain.text("[BOS] the mat ", text).ids == wanted


@pytest.mark.parametrize("which", ["chat", "absolute", "no_pad"])
def test_padding_changes_no_reward(judges, which):
    """Ragged texts in batches, in any order of lengths, give the rewards of single texts.

    A model whose config has no pad token would pool at the padding, and runs them one by one.
    """
    texts = ["cat", "cat sat on a mat", "a mat", "the the the the the the the", "on"]
    texts += ["sat cat", "mat on"]
    entry = {"model": judges[which], "name": "rm", "batch_size": 3}
    found = reward([entry], completions=texts, prompts=["the"] * 7).parts["rm"]
    ids = [words(f"[BOS] [user] the [end] [assistant] {text} [end]") for text in texts]
    truth = alone(judges[which], ids)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
    different = {round(value, 4) for value in truth}
    assert len(different) == 7, "the rewards must differ for the order to be seen"


def test_a_model_skips_what_it_cannot_read(judges):
    """A text is neither cut nor scored if too long, or refused by the template."""
    entry = {"model": judges["chat"], "name": "rm"}
    prompts = [[{"role": "tool", "content": "cat"}], "cat", "cat"]
    found = reward([entry], completions=["a", "a " * 30, "a"], prompts=prompts)
    assert found.total[:2] == [None, None] and found.total[2] is not None
    refused, long = "rm: the chat template refuses the messages", "rm: text over 24 tokens"
    assert found.failures == Counter({refused: 1, long: 1})
    found = reward([entry | {"max_tokens": 7}], completions=["a", "a a"], prompts=["cat", "cat"])
    assert found.total[0] is not None and found.failures == Counter({"rm: text over 7 tokens": 1})


def test_models_that_give_no_reward_are_refused(judges, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    headless = save_judge(tmp_path / "headless", kind=LlamaForCausalLM)
    refused = [
        ({"model": save_judge(tmp_path / "two", labels=2)}, "2 labels"),
        ({"model": headless}, r"lacks the weights score\.weight, so its rewards would be random"),
        (
            {"model": judges["plain"], "template": "chat"},
            "no chat template; set template: plain",
        ),
        ({"model": str(tmp_path)}, "PEFT adapter"),
    ]
    for entry, message in refused:
        with pytest.raises(ValueError, match=message):
            Rewards(parse_rewards([entry]))
    chats = [[{"role": "user", "content": "cat"}]]
    with pytest.raises(RewardError, match="prompts are chats"):
        reward([{"model": judges["plain"]}], completions=["a"], prompts=chats)


def change_weights(directory, change) -> None:
    file = Path(directory) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def change_config(directory, **changes) -> None:
    file = Path(directory) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


HEAD = "score.weight"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DAMAGED_JUDGES = {  # damage of a directory -> words of the refusal
    "another shape": (
        lambda d: change_weights(d, lambda w: w.update({HEAD: torch.ones(1, 15)})),
        r"score\.weight is \[1, 15\] and must be \[1, 16\]",
    ),
    "not finite": (
        lambda d: change_weights(d, lambda w: w[HEAD].fill_(torch.nan)),
        "reward rm: model .*score.weight has numbers that are not finite",
    ),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "header": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 4000),
        "model.safetensors is damaged",
    ),
    "pipe": (lambda d: os.mkfifo(d / "special_tokens_map.json"), "is a pipe"),
    "config": (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
    "width": (lambda d: change_config(d, hidden_size=10**8), "larger model than its weight files"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    "template": (
        lambda d: (d / "chat_template.jinja").write_text(ENDLESS),
        "the chat template of .* takes more than",
    ),
    "gone": (lambda d: d.rename(d.with_name("moved")), "does not exist"),
}


@pytest.mark.parametrize("kind", DAMAGED_JUDGES)
def test_a_damaged_model_is_refused_in_one_line(judges, tmp_path, kind):
    damage, message = DAMAGED_JUDGES[kind]
    directory = shutil.copytree(judges["chat"], tmp_path / "judge")
    damage(directory)
    with pytest.raises(ValueError, match=message) as refusal:
        Rewards(parse_rewards([{"model": str(directory), "name": "rm"}]))
    assert str(refusal.value).isprintable() and str(directory) in str(refusal.value)


def save_pair_judge(directory) -> str:
    """A cross-encoder: [CLS] question [SEP] answer [SEP], with segments."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **special)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=7, intermediate_size=16, num_labels=1, pad_token_id=0, **sizes)
    config.initializer_range = 0.5
    BertForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("template", ["auto", "pair"])
def test_a_model_of_pairs_is_given_question_and_answer(tmp_path, template):
    path = save_pair_judge(tmp_path)
    prompts = ["the cat", [{"role": "user", "content": "the"}]]
    found = reward(
        [{"model": path, "template": template, "name": "m"}], ["sat", "cat sat"], prompts
    )
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    for ids, split, got in (([2, 4, 5, 3, 6, 3], 4, 0), ([2, 4, 3, 5, 6, 3], 3, 1)):
        segments = torch.tensor([[0] * split + [1] * (6 - split)])
        with torch.no_grad():
            truth = model(input_ids=torch.tensor([ids]), token_type_ids=segments).logits.item()
        assert found.total[got] == pytest.approx(truth, rel=1e-5)


# ---- special tokens ------------------------------------------------------------------------------


def test_special_tokens_and_an_opened_thought_can_be_kept(functions):
    tokenizer = make_tokenizer()
    encode = lambda text: np.array(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    ids = np.append(encode(f"the cat</think>{tokenizer.bos_token}sat"), tokenizer.eos_token_id)
    sampling = Sampling(1, 9, stop_ids=(tokenizer.eos_token_id,))
    completion = Completion(ids, True, -1.0, 0)
    kept = f"the cat</think>{tokenizer.bos_token}sat"
    assert whole_text(tokenizer, encode("the mat<think>\n"), completion, sampling) == (
        f"<think>\n{kept}"
    )
    for prompt in ("the mat", "<think>the mat", "the mat<think></think>\n"):
        assert whole_text(tokenizer, encode(prompt), completion, sampling) == kept
    entries = ["own_rewards.lengths"]
    entries += [{"function": "own_rewards.lengths", "keep_special_tokens": True, "name": "whole"}]
    rewards = Rewards(parse_rewards(entries))
    parts = rewards(["p"], ["a"], [True], {}, whole=["<think>a"]).parts
    assert rewards.need_whole_texts and parts == {"lengths": [1.0], "whole": [8.0]}


# ---- judges --------------------------------------------------------------------------------------


REPLIES = {
    "85": 0.85,
    " 0\n": 0.0,
    "100": 1.0,
    "Score: 72.5": 0.725,
    "score:7/100": 0.07,
    "<think>\nIt says 3, maybe 90.\n</think>\n\n40": 0.4,
    "It says 3.</think>40": 0.4,
    "105": None,
    "-5": None,
    "1e2": None,
    "٤٢": None,
    "I would give it 85.": None,
    "85 because it is good": None,
    "8/10": None,
    "85\n90": None,
    "<think>85": None,
    "nan": None,
    "": None,
}


def test_a_reply_is_a_number_or_nothing(ask):
    """The judge replies with the completion itself."""
    found, _ = ask(
        lambda payload, number: chat(payload["messages"][0]["content"]),
        list(REPLIES),
        instruction="{completion}",
    )
    assert dict(zip(REPLIES, found.total, strict=True)) == REPLIES
    wrong = list(REPLIES.values()).count(None)
    assert found.failures == Counter({"j: the reply is no number from 0 to 100": wrong})


WRONG_BODIES = [
    (b"<html>busy</html>", "wrong JSON"),
    (b"", "wrong JSON"),
    (b"\xff\xfe{", "wrong JSON"),
    (b"[" * 100_000, "wrong JSON"),
    ({"error": "x"}, "wrong JSON"),
    ({"choices": []}, "wrong JSON"),
    ([1], "wrong JSON"),
    (None, "wrong JSON"),
    ({"choices": [{"message": {"content": None}}]}, "no text in the reply"),
    ({"choices": [{"message": {"content": 85}}]}, "no text in the reply"),
]


def test_wrong_json_leaves_the_sample_out(running):
    """The completion is the number of the body that the server answers with."""

    def answer(payload, number):
        return 200, WRONG_BODIES[int(payload["messages"][0]["content"])][0], {}

    running.start(answer)
    entry = {"judge": running.url, "judge_model": "m", "instruction": "{completion}"}
    (judge,) = Rewards(parse_rewards([entry])).rewards
    numbers = [str(number) for number in range(len(WRONG_BODIES))]
    outcomes = judge([""] * len(numbers), numbers, {})
    judge.close()
    for (body, reason), outcome in zip(WRONG_BODIES, outcomes, strict=True):
        assert isinstance(outcome, Failure) and outcome.reason == reason, body
    assert len(running.requests) == len(WRONG_BODIES), "nothing is asked again"


def test_what_a_judge_is_sent(ask, monkeypatch):
    """Braces and markers in the texts stay; a chat is written as lines; the key goes along."""
    monkeypatch.setenv("UNA_TEST_KEY", " secret-1\n")
    chat_prompt = [{"role": "system", "content": "Be {brief}"}, {"role": "user", "content": "Hi"}]
    settings = {
        "instruction": "P={prompt} C={completion} {other} {0}",
        "api_key_env": "UNA_TEST_KEY",
        "concurrency": 1,
    }
    prompts, completions = ["{completion} %s {", chat_prompt], ["{prompt}", "\\1 ok"]
    _, server = ask(lambda payload, number: chat("1"), completions, prompts=prompts, **settings)
    sent = [payload["messages"] for _, _, payload in server.requests]
    assert sent == [
        [{"role": "user", "content": "P={completion} %s { C={prompt} {other} {0}"}],
        [{"role": "user", "content": "P=system: Be {brief}\nuser: Hi C=\\1 ok {other} {0}"}],
    ]
    path, headers, payload = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-1"
    assert (payload["model"], payload["temperature"], payload["max_tokens"]) == ("m", 0, 16)


@pytest.mark.parametrize("value", [None, "", "clé"])
def test_a_missing_key_is_an_early_error(monkeypatch, value):
    monkeypatch.delenv("UNA_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("UNA_TEST_KEY", value)
    with pytest.raises(ValueError, match="UNA_TEST_KEY") as error:
        Rewards(parse_rewards([{**JUDGE, "api_key_env": "UNA_TEST_KEY"}]))
    assert not value or value not in str(error.value)


@pytest.mark.parametrize(("status", "advice"), [(401, "api_key_env"), (404, "base"), (307, "URL")])
def test_a_refusal_stops_the_run_without_telling_the_key(running, monkeypatch, status, advice):
    monkeypatch.setenv("UNA_TEST_KEY", "secret-1")
    body = {"error": "bad key secret-1" + "x" * 999}
    running.start(lambda payload, number: (status, body, {"Location": "http://127.0.0.1:9/"}))
    entry = {
        "judge": running.url.replace("//", "//user:hunter2@"),
        "judge_model": "m",
        "name": "j",
        "api_key_env": "UNA_TEST_KEY",
        "concurrency": 1,
    }
    message = f"reward j: .*{running.url}.*HTTP {status}.*bad key .*{advice}"
    with pytest.raises(RewardError, match=message) as error:
        reward([entry], completions="abcdef")
    shown = str(error.value)
    assert "secret-1" not in shown and "hunter2" not in shown and len(shown) < 600
    assert len(running.requests) == 1, "not retried, and the other samples are not sent"


def test_a_text_that_the_server_will_not_have_is_skipped(ask):
    statuses = [400, 413, 422]

    def answer(payload, number):
        return (statuses[number], "too long", {}) if number < 3 else chat("50")

    found, server = ask(answer, "abcd", concurrency=1)
    assert found.total == [None, None, None, 0.5]
    assert found.failures == Counter({f"j: HTTP {status}": 1 for status in statuses})
    assert len(server.requests) == 4, "asking again would not make a text shorter"


NOW = 1e9


def test_429_then_fine(monkeypatch):
    """Retry-After is honoured up to a cap, in seconds or as a date; if unreadable, as if absent."""
    asked = ["7", formatdate(NOW + 20, usegmt=True), "999999", "soon", "nan"]
    asked += ["-5", "Mon, 1 Jan 0001 00:00:00 -0000", "Fri, 99 Foo 99999 99:99:99 GMT"]
    waits, found = post_until_fine(monkeypatch, asked, retries=8)
    assert found == 0.5 and waits[:3] == [7, 20, reward_http.MAX_WAIT]
    # BACKOFF * 2**n, half to half as much again
    assert 0.004 <= waits[3] <= 0.012 and 0.008 <= waits[4] <= 0.024

    waits, found = post_until_fine(monkeypatch, ["30"], retries=0)
    assert found.reason == "HTTP 429" and not waits, "no wait after the last attempt"


def post_until_fine(monkeypatch, asked, *, retries):
    """Return the waits and the outcome; the server asks for waits, and then answers."""
    waits = []
    answers = [*asked, None]
    monkeypatch.setattr(reward_http, "time", SimpleNamespace(time=lambda: NOW))
    (judge,) = Rewards(parse_rewards([{**JUDGE, "retries": retries}])).rewards

    class Stop:
        def wait(self, seconds):
            waits.append(seconds)

    def post(body):
        wait = answers.pop(0)
        if wait is None:
            return Reply(200, {}, json.dumps(chat("50")[1]).encode())
        return Reply(429, {"retry-after": wait}, b"{}")

    monkeypatch.setattr(judge.client, "post", post)
    return waits, judge._outcome(judge._post({}, Stop()))


def test_errors_that_pass_are_retried(ask):
    def answer(payload, number):
        return [(429, {}, {"Retry-After": "0"}), (503, {}, {}), chat("50")][min(number, 2)]

    found, server = ask(answer)
    assert found.total == [0.5] and not found.failures and len(server.requests) == 3


def test_500_always(ask):
    """The jitter of the retries must not decide what a seeded run samples, either."""

    def answer(payload, number):
        good = payload["messages"][0]["content"].count("fine")
        return chat("30") if good else (500, {"error": "boom"}, {})

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    found, server = ask(answer, ["fine", "bad", "fine"], retries=2)
    assert found.total == [0.3, None, 0.3] and found.failures == Counter({"j: HTTP 500": 1})
    assert len(server.requests) == 2 + 3
    assert states() == before


def test_a_judge_that_is_down_pauses_the_run():
    with JudgeServer(lambda payload, number: chat("1")) as server:
        pass  # its port is free again
    entry = {"judge": server.url, "judge_model": "m", "name": "j", "retries": 1, "patience": 0.05}
    with pytest.raises(RewardsDown, match=r"reward j: judge .* is down.*patience=0.05 s.*paused"):
        reward([entry])


def test_a_judge_that_is_back_in_time_goes_on(ask):
    """The first request of a step is asked again until there is an answer; then all of them."""

    def answer(payload, number):
        return (503, "starting", {}) if number < 6 else chat("50")

    found, server = ask(answer, "ab", retries=0, patience=30)
    assert found.total == [0.5, 0.5] and not found.failures
    assert len(server.requests) == 9


def test_judge_slow():
    with JudgeServer(lambda payload, number: chat("1"), delay=600) as server:
        entry = {"judge": server.url, "judge_model": "m", "name": "j", "timeout": 0.1, "retries": 1}
        with pytest.raises(RewardsDown, match="timeout"):
            reward([entry | {"patience": 0}], completions=["a"])
    assert len(server.requests) == 2


class Raw:
    """A server that answers the first request with the bytes of a generator, until it is closed."""

    def __init__(self, parts) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/score"
        self.parts = parts
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError), self.socket.accept()[0] as connection:
            connection.recv(65536)
            for part in self.parts:
                connection.sendall(part)


def ask_raw(parts, **settings):
    """Return (outcome, seconds) of a request to a server that answers with some bytes."""
    server = Raw(parts)
    entry = {"endpoint": server.url, "name": "e", "retries": 0, **settings}
    (endpoint,) = Rewards(parse_rewards([entry])).rewards
    start = time.monotonic()
    answer, _ = endpoint._ask({})
    server.socket.close()
    endpoint.close()
    return answer, time.monotonic() - start


def drip(start):
    yield start
    while True:
        time.sleep(0.02)
        yield b"x"


@pytest.mark.parametrize(
    "start", [b"H", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"]
)
def test_the_deadline_holds_for_the_whole_request(start):
    """However slowly the status, the headers or the body drip in."""
    answer, seconds = ask_raw(drip(start), timeout=0.3)
    assert answer.reason == "timeout" and answer.passes and seconds < 2


def test_bodies_and_headers_are_bounded(monkeypatch):
    monkeypatch.setattr(reward_client, "LARGEST_REPLY", 10**5)
    endless = chain([b"HTTP/1.1 200 OK\r\n\r\n"], repeat(b" " * 4096))
    assert ask_raw(endless)[0].reason == "reply too large"
    packed = gzip.compress(b" " * 10**7)
    head = "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n"
    answer, _ = ask_raw([head.format(len(packed)).encode(), packed])
    assert len(packed) < 10**5 and answer.reason == "reply too large"
    small = gzip.compress(b'{"rewards": []}')
    assert ask_raw([head.format(len(small)).encode(), small])[0] == {"rewards": []}
    assert ask_raw([head.format(5).encode(), b"hello"])[0].reason == "wrong JSON"
    flood = chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"X-Y: " + b"z" * 4000 + b"\r\n"))
    assert ask_raw(flood)[0].reason == "no connection"


def test_replies_are_read_in_linear_time(ask):
    replies = [" " * 200_000 + "x", "<think>" * 30_000, "<think>" * 30_000 + "</think> 50"]
    start = time.monotonic()
    found, _ = ask(lambda payload, number: chat(replies[int(payload["messages"][0]["content"])]),
        "012", instruction="{completion}")  # fmt: skip
    assert found.total == [None, None, 0.5] and time.monotonic() - start < 5


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "::junk::"])
def test_a_server_of_this_machine_is_asked_without_a_proxy(ask, monkeypatch, proxy):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    found, _ = ask(lambda payload, number: chat("50"))
    assert found.total == [0.5]
    away = {"endpoint": "http://example.test/", "name": "e", "retries": 0}
    if proxy == "::junk::":
        with pytest.raises(ValueError, match="reward e: .*HTTP_PROXY must be a URL"):
            Rewards(parse_rewards([away]))
    else:
        (endpoint,) = Rewards(parse_rewards([away])).rewards
        assert endpoint._ask({})[0].reason == "no connection", "others go through it"


def test_addresses_of_this_machine():
    here = [
        "localhost",
        "a.localhost",
        "127.0.0.1",
        "127.9.9.9",
        "127.1",
        "[::1]",
        "::ffff:127.0.0.1",
    ]
    assert all(map(reward_client.is_loopback, [*here, "0.0.0.0", "LOCALHOST."]))
    assert not any(
        map(reward_client.is_loopback, ["localhost.com", "10.0.0.1", "::2", "128.0.0.1"])
    )


def test_a_judge_that_takes_other_parameters(ask, caplog):
    """As the reasoning models of OpenAI; the parameters are found once, and said once."""

    def answer(payload, number):
        if "max_tokens" in payload:
            name = "'max_tokens' is not supported with this model. Use 'max_completion_tokens'"
            return 400, {"error": {"message": f"Unsupported parameter: {name} instead."}}, {}
        if "temperature" in payload:
            text = "Unsupported value: 'temperature' does not support 0 with this model."
            return 400, {"error": {"message": text}}, {}
        assert payload["max_completion_tokens"] == 900
        return chat("50")

    found, server = ask(answer, "abcdef", max_tokens=900, concurrency=3)
    assert found.total == [0.5] * 6
    assert len(server.requests) <= 6 + 2 * 3
    assert [record.message.count("refuses the parameter") for record in caplog.records] == [1, 1]


def test_messages_without_text_are_asked_about(ask):
    """Tool calls, parts, nulls."""
    call = {"function": {"name": "add", "arguments": {"x": 2}}}
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "2+2"}, {"type": "image"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": None},
    ]
    _, server = ask(
        lambda payload, number: chat("1"), prompts=[prompt], instruction="{prompt}{completion}"
    )
    text = server.requests[0][2]["messages"][0]["content"]
    assert text == (
        'user: 2+2 {"type": "image"}\nassistant: [{"function": {"name": "add", "arguments": '
        '{"x": 2}}}]\ntool: a'
    )


def test_secrets_of_a_server_are_in_no_message(running, monkeypatch, caplog):
    """Not even where the server repeats what it was sent."""
    monkeypatch.setenv("UNA_TEST_KEY", "k-1")
    running.start(lambda payload, number: (500, "\x1b[31m k-1 hunter2 token77 x", {}))
    url = running.url.replace("//", "//user:hunter2@") + "/score?key=token77"
    entry = {"endpoint": url, "name": "e", "api_key_env": "UNA_TEST_KEY", "retries": 0}
    with pytest.raises(RewardsDown) as error:
        reward([entry | {"patience": 0.01}])
    told = str(error.value) + caplog.text
    assert "HTTP 500" in told and "*** *** *** x" in told
    for secret in ("k-1", "hunter2", "token77", "\x1b"):
        assert secret not in told


def test_order_and_bounded_concurrency(ask, running):
    """`concurrency` requests are under way, never more; a late answer keeps its sample's place."""

    def answer(payload, number):
        if number < 4:
            wait_for(lambda: running.most_in_flight >= 4, 60)
        time.sleep(0.01 if number % 3 == 0 else 0.001)
        return chat(payload["messages"][0]["content"])

    completions = [str(i) for i in range(40)]
    found, server = ask(answer, completions, instruction="{completion}", concurrency=4)
    assert found.total == [i / 100 for i in range(40)]
    assert server.most_in_flight == 4


SILENT_JUDGE = """
import sys
from una_fast.rewards.http import Judge
from una_fast.rewards.settings import parse_rewards
entry = {"judge": sys.argv[1], "judge_model": "m", "timeout": 600}
Judge(parse_rewards([entry])[0])(["p"] * 3, ["a"] * 3, {})
"""


def test_an_interrupted_run_does_not_wait_for_the_judge():
    """Ctrl-C while a judge stays silent ends the process, not its timeout of ten minutes."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    with JudgeServer(lambda payload, number: chat("1"), delay=600) as server:
        command = [sys.executable, "-c", SILENT_JUDGE, server.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
        assert wait_for(lambda: len(server.requests) == 3, 120)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert b"KeyboardInterrupt" in errors and process.returncode != 0


# ---- endpoints -----------------------------------------------------------------------------------


def test_an_endpoint_gets_chunks_with_their_columns(send):
    def answer(payload, number):
        pairs = zip(payload["completions"], payload["a"], strict=True)
        return 200, {"rewards": [int(completion) - a for completion, a in pairs]}, {}

    columns = {"a": [1, 1, 2, 2, 9], "prompts": [0] * 5}
    found, server = send(answer, list("34567"), columns=columns, concurrency=1)
    assert found.total == [2, 3, 3, 4, -2] and all(type(value) is float for value in found.total)
    assert server.requests[1][0] == "/score"
    assert server.requests[1][2] == {
        "prompts": ["prompt 2", "prompt 3"],
        "completions": ["5", "6"],
        "a": [2, 2],
    }


def test_a_wrong_answer_of_an_endpoint_leaves_its_chunk_out(send):
    bodies = {
        "a": {"rewards": [1.0]},
        "b": {"rewards": {"a": 1, "b": 2}},
        "c": {"scores": [1, 2]},
        "d": [1, 2],
        "e": b"1, 2",
        "f": {"rewards": [5.0, 6.0]},
    }
    completions = [letter for letter in bodies for _ in range(2)]
    found, _ = send(
        lambda payload, number: (200, bodies[payload["completions"][0]], {}), completions
    )
    assert found.total == [None] * 10 + [5.0, 6.0]
    assert found.failures == Counter({"e: wrong number of rewards": 2, "e: wrong JSON": 8})


def test_an_endpoint_without_a_number(send):
    body = b'{"rewards": [NaN, null, true, "3", -Infinity, 1' + b"0" * 400 + b", 0, [1]]}"
    found, _ = send(lambda payload, number: (200, body, {}), list("abcdefgh"), batch_size=8)
    assert found.total == [None, None, 1.0, None, None, None, 0.0, None]
    assert found.failures == Counter({"e: not finite": 3, "e: null": 1, "e: not a number": 2})


def test_columns_beyond_json_are_sent_as_json_holds_them(send):
    day = datetime.datetime(2026, 1, 2, 3, 4)
    columns = {"x": [math.nan], "day": [day], "d": [decimal.Decimal("0.5")], "b": [b"ab"]}
    columns |= {"n": [np.float32(2)], "a": [np.arange(2)], "o": [{1: day.date()}]}
    _, server = send(lambda payload, number: (200, {"rewards": [1]}, {}), ["a"], columns=columns)
    sent = server.requests[0][2]
    assert sent["x"] == [None] and sent["day"] == ["2026-01-02T03:04:00"] and sent["d"] == [0.5]
    assert sent["b"] == ["ab"] and sent["n"] == [2.0] and sent["a"] == [[0, 1]]
    assert sent["o"] == [{"1": "2026-01-02"}]


def test_a_key_that_stands_twice_is_no_answer(send):
    body = b'{"rewards": [9], "rewards": [1]}'
    found, _ = send(lambda payload, number: (200, body, {}), ["a"])
    assert found.failures == Counter({"e: wrong JSON": 1})


def test_a_failure_is_logged_once_with_what_came_back(running, caplog):
    """Thousands of samples may fail for one reason; without the reply nobody can mend it."""
    running.start(lambda payload, number: chat("Very good!"))
    rewards = Rewards(parse_rewards([{"judge": running.url, "judge_model": "m", "name": "j"}]))
    for _ in range(2):
        assert rewards(["p"] * 3, ["a"] * 3, [True] * 3, {}).failures.total() == 3
    rewards.close()
    ours = [record.message for record in caplog.records if "una_fast" in record.name]
    assert [message.count("Very good!") for message in ours] == [1]


# ---- scores --------------------------------------------------------------------------------------


def test_scale_none_range_and_sigmoid():
    assert RewardScale()([-3.0, 7.5]) == [-3.0, 7.5]
    scale = RewardScale("range", [-1.0, 3.0])
    assert scale([-1.0, 0.0, 3.0]) == [0.0, 0.25, 1.0]
    rounded = RewardScale("range", [0.0, 1.0])([1.0 + 2e-16, -1e-12])  # as weighted sums are
    assert rounded == [1.0, 0.0]
    for outside in (-1.01, 3.01):
        message = f"reward {outside} .*reward_range=.*reward_map.*missing_eos_penalty"
        with pytest.raises(RewardError, match=message):
            scale([0.0, outside])
    sigmoid = RewardScale("sigmoid")([-1e4, -1.0, 0.0, 1e4])
    assert sigmoid == [0.0, pytest.approx(1 / (1 + math.e)), 0.5, 1.0]


def test_quantile_ties_and_window(monkeypatch):
    monkeypatch.setattr(scale_module, "WINDOW", 4)
    scale = RewardScale("quantile")
    assert scale([5.0, 5.0, 5.0]) == [0.5] * 3, "all rewards equal: none is better than another"
    assert scale([9.0, 5.0]) == [7 / 8, 3 / 8]  # of 5, 5, 9, 5: the oldest has left
    assert scale([1.0] * 8) == [0.5] * 8, "a batch larger than the window is ranked as a whole"
    assert len(scale.recent) == 4 and scale([2.0]) == [7 / 8]
    assert scale([]) == []


def test_scale_goes_on_after_a_checkpoint(monkeypatch):
    monkeypatch.setattr(scale_module, "WINDOW", 12)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, generator=generator, dtype=torch.float64).tolist() for _ in range(6)]
    whole, first, second = (RewardScale("quantile") for _ in range(3))
    expected = [whole(batch) for batch in batches]
    found = [first(batch) for batch in batches[:3]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first([0.0])  # the state is a copy
    assert found + [second(batch) for batch in batches[3:]] == expected
    with pytest.raises(ValueError, match="reward_map=quantile, not sigmoid"):
        RewardScale("sigmoid").load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("kind", "limits", "message"),
    [
        ("rank", None, "reward_map='rank' is not one of none, range, sigmoid, quantile"),
        ("range", None, r"reward_map=range needs reward_range: \[lo, hi\], not None"),
        ("range", [0, 1, 2], r"reward_map=range needs reward_range: \[lo, hi\]"),
        ("none", [0, 1], r"reward_range=\[0, 1\] is only read with reward_map: range, not none"),
        ("range", [1, 1], r"reward_range=\[1, 1\] must rise"),
        ("range", [0, math.inf], "reward_range=inf must be a finite number"),
    ],
)
def test_wrong_scales_are_refused(kind, limits, message):
    with pytest.raises(ValueError, match=message):
        RewardScale(kind, limits)


def test_maps_of_scores():
    """Records and rewards are mapped alike; ranks are those among another list, too."""
    assert to_range(7, 1, 10) == 6 / 9
    assert mid_ranks([1, 5], among=[1, 5, 5, 9]) == [1 / 8, 1 / 2]
    assert mid_ranks([0, 10], among=[5, 1]) == [0.0, 1.0] and mid_ranks([], among=[]) == []
    truth = torch.sigmoid(torch.linspace(-800, 800, 101, dtype=torch.float64))
    found = [sigmoid(value) for value in torch.linspace(-800, 800, 101, dtype=torch.float64)]
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-15)
