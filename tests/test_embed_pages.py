"""The pages on other trainers: what they show is run, and gives the numbers of an eager loop."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from embed_loops import (
    ACCUMULATED,
    PAGES,
    RANKS,
    eager_steps,
    load,
    make_loader,
    reference_of,
    run_loop,
    sgd,
    step_error,
)
from embedded import difference, eager_logps, gradients, make_batch
from pages import DOCS, MODEL, lines_of, python_of, run_page
from ranks import torchrun
from tiny import make_records, save_llama
from una_fast import Feedback, Objective, una_loss
from una_fast.config import RunConfig
from una_fast.data.settings import FIELDS
from una_fast.integrations.calls import una_calls
from una_fast.integrations.hf import FeedbackCollator
from una_fast.integrations.versions import TESTED
from una_fast.model.settings import LoraOptions
from una_fast.parallel import ParallelOptions

EMBED = DOCS / "embed"
README = DOCS.parent / "README.md"
LONGEST = 20
CLOSE = 1e-5  # norms and rotations of a float64 Llama are computed in float32


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return Path(save_llama(tmp_path_factory.mktemp("pages") / "model"))


def run(name: str, directory: Path) -> dict:
    return run_page(EMBED / f"{name}.md", directory)


@pytest.mark.parametrize("page", sorted(EMBED.glob("*.md")), ids=lambda page: page.stem)
def test_no_snippet_is_longer_than_twenty_lines(page):
    assert [lines_of(block) for block in python_of(page) if lines_of(block) > LONGEST] == []


# ---- from nothing ----


def test_a_first_loss_by_the_readme_alone(directory, tmp_path, monkeypatch):
    """Twenty lines from the name of a model to a step, with the gradients of its own logits."""
    monkeypatch.chdir(tmp_path)
    (block,) = python_of(README)
    assert lines_of(block) <= LONGEST
    before = una_calls()
    names = run_page(README, directory)
    assert una_calls()["packed"] >= before["packed"] + 2
    model = AutoModelForCausalLM.from_pretrained(directory)
    batch = FeedbackCollator(AutoTokenizer.from_pretrained(directory))(names["records"])
    logps = eager_logps(model, batch).sum(1)
    truth = una_loss(logps, logps.detach(), batch["feedback"]).loss
    assert names["out"].loss.item() == pytest.approx(truth.item(), rel=1e-5)
    found = {name: p.grad for name, p in names["model"].named_parameters()}
    assert difference(found, gradients(truth, model)) < 1e-5
    moved = (names["model"].lm_head.weight - model.lm_head.weight).abs().max()
    assert moved > 0


# ---- one process ----


def test_the_plain_loop_takes_eager_steps(directory):
    model = load(directory)
    start, truth, reference = (copy.deepcopy(model) for _ in range(3))
    reference = reference_of(reference)
    batches = list(make_loader(directory))[:3]
    expected = eager_steps(truth, reference, [[batch] for batch in batches], Objective(beta=0.1))
    found = run("pytorch", directory)["train"](model, reference, batches, sgd(model))
    assert found == pytest.approx(expected, rel=CLOSE)
    assert step_error(model.state_dict(), truth, start) < CLOSE


def test_the_adapter_is_its_own_reference(directory):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    model = peft.get_peft_model(load(directory), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    start, truth = copy.deepcopy(model), copy.deepcopy(model)
    batches = list(make_loader(directory))[:3]
    eager_steps(truth, load(directory), [[batch] for batch in batches])
    run("pytorch", directory)["train_adapter"](model, batches, sgd(model))
    assert step_error(model.state_dict(), truth, start) < CLOSE


def test_cached_references_are_those_of_the_model(directory):
    reference = reference_of(load(directory))
    records = make_records("mixed", 8)
    collate = FeedbackCollator(AutoTokenizer.from_pretrained(directory))
    run("pytorch", directory)["cache"](reference, records, collate)
    batch = collate(records)
    truth = eager_logps(reference, batch).sum(1)
    assert torch.allclose(batch["ref_logps"].double(), truth, atol=1e-5)


def test_the_group_loop_takes_eager_steps(directory):
    """Two epochs on a batch: in the second the ratio is not 1, and some of it is clipped."""
    model = load(directory)
    start, truth = copy.deepcopy(model), copy.deepcopy(model)
    rows = [((5, 6, 7), tuple(range(20, 24 + n))) for n in range(4)]
    rows += [((8, 9), tuple(range(30, 33 + n))) for n in range(4)]
    tokens = make_batch(rows)
    rewards = torch.tensor([0.0, 1.0, 3.0, -1.0, 2.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    optimizer = sgd(truth)
    by_group = rewards.view(2, 4)
    means, spreads = by_group.mean(1, keepdim=True), by_group.std(1, keepdim=True)
    advantages = ((by_group - means) / (spreads + 1e-4)).view(8, 1)
    scored = tokens["labels"][:, 1:] != -100
    old = eager_logps(truth, tokens).detach()
    clipped = []
    for _ in range(2):
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        log_p = truth(**inputs).logits[:, :-1].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (eager_logps(truth, tokens) - old).exp()
        bounded = ratio.clamp(0.8, 1.2)
        clipped.append(bool(((ratio != bounded) & scored).any()))
        free, held = ratio * advantages, bounded * advantages
        gain = torch.where(free < held, free, held)
        loss = -(gain + 0.01 * entropy)[scored].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert clipped == [False, True]
    run("grpo", directory)["train"](model, [tokens | {"rewards": rewards}], sgd(model))
    assert step_error(model.state_dict(), truth, start) < CLOSE


def test_a_model_of_ones_own_has_the_shift_and_the_gradients():
    names = run("own-model", Path("unused"))
    torch.manual_seed(0)
    embedding = nn.Embedding(97, 16).double()
    weight = nn.Parameter(torch.randn(97, 16, dtype=torch.float64))
    backbone = nn.Sequential(embedding, nn.Linear(16, 16).double(), nn.Tanh())
    model = names["WithLoss"](backbone, weight)
    batch = make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    feedback = Feedback.merge([Feedback.pairs([0, 3], [1, 2]), Feedback.scores([4], [0.9])])
    with torch.no_grad():
        ref_logps = model(ids, labels) + torch.linspace(-1, 1, 5)
    log_p = (backbone(ids) @ weight.T).log_softmax(-1)
    sums = []
    for row in range(5):
        places = [t for t in range(1, ids.shape[1]) if labels[row, t] != -100]
        sums.append(sum(log_p[row, t - 1, ids[row, t]] for t in places))
    truth = una_loss(torch.stack(sums), ref_logps, feedback, num_units=7).loss
    loss = model(ids, labels, feedback, ref_logps=ref_logps, num_units=7)
    assert loss.item() == pytest.approx(truth.item(), rel=CLOSE)
    assert difference(gradients(loss, model), gradients(truth, model)) < CLOSE


def test_a_model_of_ones_own_refuses_a_row_without_a_response():
    """Else `Feedback.pairs([0], [1])` would score the rows 1 and 2, and nothing would say so."""
    names = run("own-model", Path("unused"))
    model = names["WithLoss"](nn.Embedding(97, 16), nn.Parameter(torch.randn(97, 16)))
    batch = make_batch()
    ids, labels = batch["input_ids"], batch["labels"].clone()
    labels[0] = -100
    for feedback in (None, Feedback.pairs([0], [1])):
        with pytest.raises(ValueError, match="a row has no response"):
            model(ids, labels, feedback, ref_logps=torch.zeros(4))


# ---- Accelerate and Fabric ----


def require(page: str) -> None:
    if page == "fabric":
        pytest.importorskip("lightning_fabric", reason="pip install lightning-fabric")
    else:
        pytest.importorskip("accelerate")


def true_steps(directory: Path, ranks: int) -> tuple[nn.Module, nn.Module]:
    """Return the trained model, and the model before the first step, of steps of all ranks."""
    batches = list(make_loader(directory))
    size = ACCUMULATED * ranks
    steps = [batches[start : start + size] for start in range(0, len(batches), size)]
    assert len(steps) > 1 and len({len(step) for step in steps}) == 1
    start, truth = load(directory), load(directory)
    eager_steps(truth, reference_of(start), steps)
    return truth, start


@pytest.mark.parametrize("page", PAGES)
def test_a_loop_in_one_process_takes_eager_steps(page, directory):
    require(page)
    truth, start = true_steps(directory, 1)
    model = run_loop(page, directory.parent)
    assert step_error(model.state_dict(), truth, start) < CLOSE


@pytest.fixture(scope="module")
def ranks(directory) -> Path:
    pytest.importorskip("accelerate")
    torchrun("embed_loops", directory.parent, directory.parent / "log")
    return directory.parent


@pytest.mark.parametrize("page", PAGES)
def test_a_loop_on_two_ranks_takes_the_steps_of_one_process(page, ranks):
    """A step is one mean over the units of all batches and ranks, which differ in units."""
    require(page)
    truth, start = true_steps(ranks / "model", RANKS)
    found = torch.load(ranks / f"{page}.pt", weights_only=True)
    assert step_error(found, truth, start) < CLOSE


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_fabric_rounds_no_feedback(directory, precision):
    fabric = pytest.importorskip("lightning_fabric", reason="pip install lightning-fabric")
    host = fabric.Fabric(accelerator="cpu", devices=1, precision=precision)
    names = run("fabric", directory)
    batch = next(iter(make_loader(directory, names["PlainCollator"])))
    expected = next(iter(make_loader(directory)))["feedback"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    own, seen = model.forward, {}
    model.forward = lambda *args, **kwargs: seen.update(kwargs) or own(*args, **kwargs)
    host.setup(model)(**batch, ref_logps=[-0.1])
    assert Feedback.of(seen["feedback"]) == expected and seen["ref_logps"] == [-0.1]


# ---- trainers ----


def first_batch(directory: Path, records: list) -> tuple[nn.Module, dict]:
    """Return the model, and the records as one batch in their order."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    collate = FeedbackCollator(AutoTokenizer.from_pretrained(directory))
    return model, collate(records)


def norm(grads: dict) -> float:
    return torch.cat([grad.flatten() for grad in grads.values()]).norm().item()


def test_the_trainer_of_the_page_takes_eager_steps(directory, tmp_path, monkeypatch):
    """One batch holds all records of the page."""
    monkeypatch.chdir(tmp_path)
    names = run("trainer", directory)
    model, batch = first_batch(directory, names["records"])
    assert names["args"].per_device_train_batch_size >= len(names["records"])
    logps = eager_logps(model, batch).double().sum(1)
    truth = una_loss(logps, logps.detach(), batch["feedback"]).loss
    log = names["trainer"].state.log_history[0]
    assert log["loss"] == pytest.approx(truth.item(), rel=1e-5)
    assert log["grad_norm"] == pytest.approx(norm(gradients(truth, model)), rel=1e-5)


def test_one_import_makes_trls_trainer_ours(directory, tmp_path, monkeypatch):
    """The example of the page with TRL's own trainer, and with ours: one history."""
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    *imports, example = python_of(EMBED / "trl.md")
    assert len(imports) == 4 and all(lines_of(block) == 1 for block in imports)
    for block in imports:
        own = block.split(" as ")[1].strip()
        found: dict = {}
        exec(block, found)
        assert issubclass(found[own], getattr(trl, own))
    before = una_calls()
    ours = run("trl", directory)["trainer"]
    after = una_calls()
    steps = ours.state.global_step
    assert after["packed"] - before["packed"] == 2 * steps  # of the policy and its reference
    assert after["fell_back"] == before["fell_back"]
    theirs = {"DPOTrainer": trl.DPOTrainer}
    exec(example.replace(MODEL, str(directory)), theirs)
    histories = [trainer.state.log_history for trainer in (ours, theirs["trainer"])]
    assert len(histories[0]) == len(histories[1]) == steps + 1 > 2
    for line, expected in zip(*histories, strict=True):
        for name in set(expected) & {"loss", "grad_norm", "rewards/margins", "entropy"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


# ---- settings of other trainers ----

ROW = re.compile(r"^\| (`.+?) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)
SPAN = re.compile(r"(column )?`([^`]+)`")
HOSTS = ("TRL", "axolotl", "LLaMA-Factory")


def section(host: str) -> str:
    text = (EMBED / "migration.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {host}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found


def flags_of(host: str) -> set[str]:
    """Return every flag that the page says a host has, in tables and below."""
    text = section(host)
    spans = [span for row in ROW.findall(text) for span in SPAN.findall(row[0])]
    spans += SPAN.findall(text[text.index("Without a counterpart") :])
    return {name.partition(":")[0] for _, name in spans}


NESTED = {"lora": LoraOptions, "parallel": ParallelOptions}


def check_setting(span: str) -> None:
    """Raise where `name` or `name: value` is no setting of a run."""
    name, _, value = span.partition(": ")
    name, _, member = name.partition(".")
    hints = get_type_hints(RunConfig)
    assert name in hints, f"{name} is no setting"
    if member:
        assert name in NESTED, span
        hints = get_type_hints(NESTED[name])
        assert member in hints, span
    kinds = [hints[member or name], *get_args(hints[member or name])]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if value and choices:
        assert value in choices, f"{span} is none of {choices}"


@pytest.mark.parametrize("host", HOSTS)
def test_every_setting_of_the_migration_page_exists(host):
    rows = ROW.findall(section(host))
    assert len(rows) > 15
    for _, ours, remark in rows:
        spans = SPAN.findall(ours)
        assert spans or ours in ("no setting", "no counterpart"), ours
        for column, span in spans + [found for found in SPAN.findall(remark) if found[0]]:
            if column:
                assert span in FIELDS
            else:
                check_setting(span)


def test_a_setting_that_does_not_exist_is_seen():
    for wrong in ("batchsize", "pair: hinge", "lora.rank", "beta.r"):
        with pytest.raises(AssertionError):
            check_setting(wrong)


def test_every_flag_of_trl_exists():
    trl = pytest.importorskip("trl")
    configs = (trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig)
    known = {field.name for config in configs for field in fields(config)}
    named = flags_of("TRL")
    assert len(named) > 60 and named <= known, named - known


@pytest.mark.parametrize("host", [("axolotl", "axolotl"), ("LLaMA-Factory", "llamafactory")])
def test_every_flag_of_other_hosts_exists(host):
    """Read from their source: an import would need all that they need."""
    name, package = host
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    known = set()
    for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        if "schemas" in path.parts or "hparams" in path.parts:
            known |= set(re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.M))
    known |= {field.name for field in fields(TrainingArguments)}
    named = flags_of(name)
    assert len(named) > 30 and named <= known, named - known


def test_losses_of_trl_are_those_of_the_settings_beside_them():
    """The factors that the page gives, by gradients: a constant of a loss is no matter."""
    beta = 0.3
    sums = torch.tensor([-7.0, -9.0], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([-8.0, -8.5], dtype=torch.float64)
    lengths = torch.tensor([4, 5])
    good, bad = sums - before
    mean_good, mean_bad = (sums - before) / lengths
    pair = Feedback.pairs([0], [1])
    labels = Feedback.binary([0, 1], [True, False])
    rewards = Feedback.scores([0, 1], [0.5, -0.5])
    log_sigmoid = nn.functional.logsigmoid
    normalized = Objective(beta, length_normalize=True)
    squared = Objective(beta, pair="squared", length_normalize=True)
    cases = [
        (-log_sigmoid(beta * (good - bad)), Objective(beta), pair, 1.0),
        (-log_sigmoid(beta * (mean_good - mean_bad)), normalized, pair, 1.0),
        (
            (mean_good - mean_bad - 1 / (2 * beta)) ** 2,
            squared,
            Feedback.pairs([0], [1], margin=0.5),
            beta**2,
        ),
        (-log_sigmoid(beta * good) - log_sigmoid(-beta * bad), Objective(beta), labels, 0.5),
        (
            (good - 0.5 / beta) ** 2 + (bad + 0.5 / beta) ** 2,
            Objective(beta, score="reward_mse"),
            rewards,
            beta**2 / 2,
        ),
    ]
    for theirs, objective, feedback, factor in cases:
        ours = una_loss(sums, before, feedback, objective=objective, lengths=lengths).loss
        assert ours.item() == pytest.approx(factor * theirs.item(), rel=1e-12)
        (expected,) = torch.autograd.grad(theirs, sums, retain_graph=True)
        (found,) = torch.autograd.grad(ours, sums)
        assert torch.allclose(found, factor * expected, rtol=1e-12)


# ---- versions ----

NUMBER = re.compile(r"\d+(?:\.\d+)+")


@pytest.mark.parametrize("adapter", TESTED)
def test_the_table_names_the_versions_of_an_adapter(adapter):
    text = (EMBED / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    pattern = re.compile(rf"una_fast\.integrations\.{adapter}(_plugin)?\b")
    row = next(row for row in rows if pattern.search(row))
    numbers = set(NUMBER.findall(TESTED[adapter].releases))
    assert numbers and numbers <= set(NUMBER.findall(row))


def test_every_adapter_checks_its_host():
    root = DOCS.parent / "una_fast" / "integrations"
    found = [
        re.findall(r'check_version\("(\w+)"\)', path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    ]
    assert sorted(sum(found, [])) == sorted(TESTED)


def test_the_table_names_the_accelerate_of_the_pins():
    text = (EMBED / "README.md").read_text(encoding="utf-8")
    (accelerate,) = pinned("accelerate", DOCS.parent / "constraints.txt")
    assert f"| accelerate {accelerate}," in text


def pinned(package: str, *files: Path) -> set[str]:
    """Return the versions of a package in files of pins."""
    pin = re.compile(rf"^{package}==(\S+)$", re.MULTILINE)
    return {found for path in files for found in pin.findall(path.read_text(encoding="utf-8"))}


def row_of(page: Path, start: str) -> str:
    """Return the one line of a page that begins with a text."""
    lines = page.read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(start)]
    return found


def test_the_pages_name_every_transformers_that_is_tested():
    """Those of tests/versions.sh and of constraints.txt, no more and no fewer."""
    root = DOCS.parent
    versions = root / "tests" / "versions"
    hosts = pinned("transformers", *versions.glob("hosts-*.txt"))
    ends = pinned("transformers", versions / "floor.txt", versions / "ceiling.txt")
    tested = hosts | ends | pinned("transformers", root / "constraints.txt")
    assert len(hosts) >= 4 and len(ends) == 2
    row = row_of(EMBED / "README.md", "| [plain PyTorch](pytorch.md) |")
    assert set(NUMBER.findall(row)) == set(NUMBER.findall(TESTED["hf"].releases)) == tested
    row = row_of(README, "| beside other trainers |")
    assert set(NUMBER.findall(row)) == {version.rpartition(".")[0] for version in hosts}
