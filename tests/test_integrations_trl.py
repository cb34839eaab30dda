"""TRL's trainers on the fused head: the same losses, gradient norms and metrics, step by step."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from embedded import eager_logps, make_batch
from families import SMALL, build
from tiny import WORDS, save_llama
from una_fast import Feedback, Objective, una_loss
from una_fast.attention.probe import randomize_weights
from una_fast.integrations.calls import una_calls

trl = pytest.importorskip("trl")

from accelerate.utils import convert_outputs_to_fp32  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from una_fast.demo.smollm2 import find_smollm2  # noqa: E402
from una_fast.integrations.hf import patch_model  # noqa: E402
from una_fast.integrations.trl import (  # noqa: E402
    UNADPOTrainer,
    UNAGRPOTrainer,
    UNAKTOTrainer,
    UNARLOOTrainer,
    add_una_head,
)
from una_fast.integrations.trl.objective import (  # noqa: E402
    POINT_COLUMNS,
    FeedbackOfPairs,
    OnFeedback,
)
from una_fast.integrations.trl.trainers import _una_head_in  # noqa: E402
from una_fast.logs import say_once  # noqa: E402
from una_fast.model.loading import load_causal_lm, load_tokenizer  # noqa: E402

# Every loss of TRL's DPOTrainer, with settings that it needs.
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {"learning_rate": 1e-4},  # grows without bound in larger steps
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
VARIANTS = {
    "several": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
    "weighted": {"use_weighting": True},
    "length desensitized": {"ld_alpha": 0.5},
    "forward kl": {"f_divergence_type": "forward_kl"},
    "precomputed": {"precompute_ref_log_probs": True},
    "cut": {"max_length": 12},
}
# Differences of numbers near 0, whose relative error says nothing: compared in nats instead.
ABSOLUTE = ("rewards/", "logits/", "kl", "objective/kl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


# Losses with large gradients of a trained model, whose steps multiply the rounding of both sides:
# theirs is no nearer to itself (test_steep_losses_are_as_near_as_theirs_to_itself).
STEEP = (
    {"loss_type": ["ipo"]},
    {"loss_type": ["discopop"]},
    {"f_divergence_type": "forward_kl"},
)


class Compared(NamedTuple):
    """A model of the comparisons with TRL.

    directory: of the model
    rate: factor of the learning rates: a trained model has larger gradients
    steep_rate: factor for STEEP losses
    """

    directory: str
    rate: float
    steep_rate: float

    def learning_rate(self, changes: dict[str, Any]) -> float:
        """Return the rate of a run on this model. changes: of `settings`"""
        steep = any(loss.items() <= changes.items() for loss in STEEP)
        usual = settings(Path())["learning_rate"]
        factor = self.steep_rate if steep else self.rate
        return factor * changes.get("learning_rate", usual)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def compared(request, tmp_path_factory) -> Compared:
    if request.param == "tiny":
        return Compared(request.getfixturevalue("directory"), 1.0, 1.0)
    if not os.environ.get("UNA_FAST_LONG"):
        pytest.skip("UNA_FAST_LONG=1 compares on SmolLM2 too, in half an hour")
    found = find_smollm2()
    saved = str(tmp_path_factory.mktemp("smollm2"))
    load_causal_lm(found, dtype=torch.float32).save_pretrained(saved)
    load_tokenizer(found).save_pretrained(saved)
    return Compared(saved, 0.01, 1e-4)


def preference_rows(count: int = 8) -> list[dict[str, str]]:
    rows = []
    for i in range(count):
        prompt = " ".join(WORDS[i : i + 4]) + " "
        chosen, rejected = WORDS[: 2 + i % 5], WORDS[6 : 8 + (3 * i) % 4]
        rows.append({"prompt": prompt, "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    return rows


def label_rows() -> list[dict[str, Any]]:
    """Return rows for KTO, every other one good."""
    rows = []
    for i, row in enumerate(preference_rows()):
        label = i % 2 == 0
        completion = row["chosen" if label else "rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": label})
    return rows


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    usual = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "logging_steps": 1,
        "report_to": [],
        "gradient_checkpointing": False,
        "bf16": False,  # TRL's default, also on a CPU: both sides would show its noise
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return usual | changes


def run(
    trainer: type, config: type, directory: str, rows: list, out: Path, **changes: Any
) -> tuple[list[dict[str, float]], PreTrainedModel]:
    """Train; return the logged steps, and the model. The arguments are those of `make`."""
    made = make(trainer, config, directory, rows, out, **changes)
    made.train()
    return logged(made), made.model


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def make(trainer: type, config: type, directory: str, rows: list, out: Path, **changes: Any) -> Any:
    """Build a trainer.

    trainer, config: of TRL, or ours
    directory: of the model
    rows: the dataset
    out: for outputs
    changes: of `settings`, and `given`, arguments of the trainer
    """
    datasets = pytest.importorskip("datasets")
    given = changes.pop("given", {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return trainer(
        model=model,
        args=config(**settings(out, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory),
        **copy.deepcopy(given),
    )


def assert_same_steps(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Compare every logged number of every step, to a relative tolerance."""
    assert len(ours) == len(theirs) > 0
    for mine, truth in zip(ours, theirs, strict=True):
        assert mine.keys() == truth.keys()
        for name, expected in truth.items():
            if "time" in name or "runtime" in name:
                continue
            size = {"rel": tolerance, "abs": 1e-7}
            if name.startswith(ABSOLUTE):
                size = {"abs": 20 * tolerance}
            assert mine[name] == pytest.approx(expected, **size, nan_ok=True), name


@pytest.fixture
def both(compared, tmp_path):
    """Return a function that runs both trainers, and checks that ours reached the fused head."""
    directory = compared.directory

    def compare(ours: type, theirs: type, config: type, rows: list, tolerance: float, **changes):
        changes["learning_rate"] = compared.learning_rate(changes)
        truth, their_model = run(theirs, config, directory, rows, tmp_path / "theirs", **changes)
        before = una_calls()
        found, our_model = run(ours, config, directory, rows, tmp_path / "ours", **changes)
        after = una_calls()
        assert after["packed"] > before["packed"] and after["fell_back"] == before["fell_back"]
        assert_same_steps(found, truth, tolerance)
        return our_model, their_model

    return compare


def dpo(both, tolerance: float, **changes):
    return both(
        UNADPOTrainer, trl.DPOTrainer, trl.DPOConfig, preference_rows(), tolerance, **changes
    )


# ---- DPO ----


def test_fifty_steps_of_sgd(both):
    """Without clipping: nothing hides a gradient that is off by a factor."""
    ours, theirs = dpo(both, 1e-5, max_steps=50, learning_rate=0.01)
    for mine, truth in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


def test_thirty_steps_of_adamw(both):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
    dpo(both, 1e-4, max_steps=30, **changes)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_theirs(both, loss):
    dpo(both, 1e-4, loss_type=[loss], **LOSSES[loss])


@pytest.mark.parametrize("compared", ["smollm2"], indirect=True)
@pytest.mark.parametrize("changes", STEEP, ids=["ipo", "discopop", "forward kl"])
def test_steep_losses_are_as_near_as_theirs_to_itself(compared, tmp_path, changes):
    """At the rate of the other losses; padding alone, which has no meaning, moves theirs.

    Largest relative differences of a loss or gradient norm when this was written, by padding and by
    ours: 0.74 and 0.63 of ipo, 4.8e-5 and 1.2e-4 of discopop, 2.9e-4 and 5.0e-4 of forward KL.
    """
    changes = changes | {"learning_rate": compared.rate * settings(Path())["learning_rate"]}

    def steps(name: str, trainer: type, **more: Any) -> list[dict[str, float]]:
        of_run = {**changes, **more}
        rows = preference_rows()
        out = tmp_path / name
        return run(trainer, trl.DPOConfig, compared.directory, rows, out, **of_run)[0]

    theirs = steps("theirs", trl.DPOTrainer)
    padded = steps("padded", trl.DPOTrainer, pad_to_multiple_of=32)
    ours = steps("ours", UNADPOTrainer)
    assert worst_difference(ours, theirs) <= max(1e-4, 4 * worst_difference(padded, theirs))


def worst_difference(steps: list[dict], truth: list[dict]) -> float:
    """Return the largest relative difference of the loss or gradient norm of a step."""
    return max(
        abs(step[name] - expected[name]) / abs(expected[name])
        for step, expected in zip(steps, truth, strict=True)
        for name in ("loss", "grad_norm")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_theirs(both, variant):
    dpo(both, 1e-4, max_steps=4, **VARIANTS[variant])


def test_checkpointed_layers(both):
    dpo(both, 1e-5, max_steps=4, gradient_checkpointing=True)


def test_adapters(both):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    dpo(both, 1e-4, max_steps=4, learning_rate=1.0, given={"peft_config": options})


def test_noise_in_the_embeddings_is_theirs(both):
    """Its size follows the width of a batch, and rows that share a prompt would share its noise.

    References have none, and are packed.
    """
    dpo(both, 1e-4, neftune_noise_alpha=5.0)
    both(
        UNAKTOTrainer,
        trl.KTOTrainer,
        trl.KTOConfig,
        label_rows(),
        1e-4,
        neftune_noise_alpha=5.0,
        max_steps=4,
    )


# ---- KTO, GRPO, RLOO ----


def test_kto(both):
    both(UNAKTOTrainer, trl.KTOTrainer, trl.KTOConfig, label_rows(), 1e-4)


def count_letters(completions: list[str], **_: Any) -> list[float]:
    """Reward the share of the letter e."""
    return [text.count("e") / (1 + len(text)) for text in completions]


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta": 0.04, "temperature": 0.9}, {"entropy_coef": 0.01, "beta": 0.1}],
    ids=["plain", "with a reference", "with an entropy bonus"],
)
def test_grpo(both, changes):
    rows = [{"prompt": row["prompt"]} for row in preference_rows()]
    changes = {"num_generations": 4, "max_completion_length": 8, "max_steps": 4} | changes
    changes |= {"per_device_train_batch_size": 4, "learning_rate": 0.01}
    given = {"reward_funcs": count_letters}
    both(UNAGRPOTrainer, trl.GRPOTrainer, trl.GRPOConfig, rows, 1e-4, given=given, **changes)


def test_rloo(both):
    rows = [{"prompt": row["prompt"]} for row in preference_rows()]
    changes = {"num_generations": 4, "max_completion_length": 8, "max_steps": 3, "beta": 0.05}
    changes |= {"per_device_train_batch_size": 4, "learning_rate": 0.01}
    given = {"reward_funcs": count_letters}
    both(UNARLOOTrainer, trl.RLOOTrainer, trl.RLOOConfig, rows, 1e-4, given=given, **changes)


# ---- the head itself ----


@pytest.mark.parametrize(
    "family", ["Gemma2Config", "CohereConfig", "GraniteConfig", "GptOssConfig"]
)
@pytest.mark.parametrize("cast", [False, True], ids=["", "float32 head"])
def test_the_output_is_theirs(family, cast):
    """Softcaps, scales, sinks; every member, with gradients of log-probs and entropy."""
    names = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    ours, theirs = build(family), build(family)
    add_una_head(ours, temperature=0.7, cast_lm_head_to_fp32=cast, outputs=names)
    trl.trainer.utils.add_fused_lm_head(
        theirs, temperature=0.7, cast_lm_head_to_fp32=cast, outputs=names
    )
    batch = make_batch()
    found = ours(**batch, fused_lm_head=True)
    truth = theirs(**batch, fused_lm_head=True)
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        assert found[name].dtype == expected.dtype, name
        assert torch.allclose(found[name].float(), expected.float(), atol=3e-5), name
    weights = torch.randn_like(truth.log_probs)
    for out in (found, truth):
        ((out.log_probs + 0.5 * out.entropy) * weights).sum().backward()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad, expected.grad, atol=1e-4 * (1 + expected.grad.abs().max()))


def test_experts_are_balanced_on_the_packed_row():
    """TRL's DPO asks for router logits: the auxiliary loss joins ours, too."""
    fields = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ours, theirs = build("MixtralConfig", fields), build("MixtralConfig", fields)
    add_una_head(ours, pack=False)
    trl.trainer.utils.add_fused_lm_head(theirs)
    batch = make_batch()
    found, truth = (
        m(**batch, fused_lm_head=True, output_router_logits=True) for m in (ours, theirs)
    )
    assert torch.allclose(found.aux_loss, truth.aux_loss, atol=1e-6)
    assert torch.allclose(found.loss, truth.loss, atol=1e-5)
    packed = build("MixtralConfig", fields)
    add_una_head(packed, pack=True)
    shared = packed(**batch, fused_lm_head=True, output_router_logits=True).aux_loss
    assert 0 < abs(shared - truth.aux_loss) < 0.3 * truth.aux_loss


def test_calls_that_are_not_served_run_their_head_and_are_counted(caplog):
    model = build("LlamaConfig")
    add_una_head(model)
    batch = make_batch()
    truth = model(**batch, fused_lm_head=True).log_probs
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    before = una_calls()["fell_back"]
    with caplog.at_level(logging.WARNING):
        found = model(**batch, shift_labels=shifted, fused_lm_head=True).log_probs
    assert torch.allclose(found[:, :-1], truth, atol=1e-5)
    assert una_calls()["fell_back"] == before + 1
    assert "una_fast leaves this call to TRL's head: it gives shift_labels" in caplog.text


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_labels_of_padding_are_scored_as_theirs(left, caplog):
    """By the fused head, padded: what the mask hides is TRL's to say."""
    batch = make_batch(left=left)
    batch["labels"] = batch["input_ids"].clone()
    assert (batch["labels"][batch["attention_mask"] == 0] != -100).any()
    model, theirs = build("LlamaConfig"), build("LlamaConfig")
    theirs.load_state_dict(model.state_dict())
    trl.trainer.utils.add_fused_lm_head(theirs)
    add_una_head(model)
    say_once.cache_clear()
    before = una_calls()
    with caplog.at_level(logging.WARNING):
        found = [model(**batch, fused_lm_head=True) for _ in range(2)]
    truth = theirs(**batch, fused_lm_head=True)
    assert torch.allclose(found[0].log_probs, truth.log_probs, atol=1e-5)
    assert torch.equal(found[0].label_mask, truth.label_mask)
    assert una_calls() == before | {"padded": before["padded"] + 2}
    assert caplog.text.count("batches stay padded: labels stand where attention_mask is 0") == 1


def test_a_label_in_the_first_column_is_no_reason_to_pad():
    """Labels that are the input ids, but for padding: packed, and TRL's numbers."""
    batch = make_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model, theirs = build("LlamaConfig"), build("LlamaConfig")
    theirs.load_state_dict(model.state_dict())
    trl.trainer.utils.add_fused_lm_head(theirs)
    add_una_head(model)
    before = una_calls()["packed"]
    found = model(**batch, fused_lm_head=True).log_probs
    assert torch.allclose(found, theirs(**batch, fused_lm_head=True).log_probs, atol=1e-5)
    assert una_calls()["packed"] == before + 1


def test_a_mask_of_attention_is_left_to_their_head(caplog):
    """Its four dimensions are no padding of labels."""
    batch = make_batch()
    model, theirs = build("LlamaConfig"), build("LlamaConfig")
    theirs.load_state_dict(model.state_dict())
    trl.trainer.utils.add_fused_lm_head(theirs)
    add_una_head(model)
    width = batch["labels"].shape[1]
    allowed = torch.ones(width, width, dtype=torch.bool).tril()
    allowed = (allowed & (batch["attention_mask"] != 0)[:, None]) | torch.eye(width).bool()
    batch["attention_mask"] = allowed[:, None]
    with caplog.at_level(logging.WARNING):
        found = model(**batch, fused_lm_head=True).log_probs
    assert torch.allclose(found, theirs(**batch, fused_lm_head=True).log_probs, atol=1e-5)
    assert "its attention_mask has another shape than its labels" in caplog.text


def test_a_model_that_cannot_be_scored_keeps_their_head():
    """Every call of it is counted."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    model = peft.get_peft_model(build("LlamaConfig"), options).get_base_model()
    add_una_head(model)
    before = una_calls()["fell_back"]
    for _ in range(2):
        assert model(**make_batch(), fused_lm_head=True).log_probs.any()
    assert una_calls()["fell_back"] == before + 2
    with pytest.raises(ValueError, match="adapted head"):
        add_una_head(model, pack=True)


def test_a_wrong_pack_is_no_refusal_of_the_model():
    """It would train on TRL's head, with a line in the log."""
    for pack in ("x", None):
        with pytest.raises(ValueError, match=f"pack={pack!r} is not one of"):
            add_una_head(build("LlamaConfig"), pack=pack)


def test_a_fused_call_needs_targets():
    model = build("LlamaConfig")
    add_una_head(model)
    before = una_calls()
    with pytest.raises(ValueError, match="give labels= or shift_labels="):
        model(input_ids=torch.tensor([[5, 6, 7]]), fused_lm_head=True)
    assert una_calls() == before


def test_a_second_trainer_replaces_the_head_of_the_first():
    model = build("LlamaConfig")
    batch = make_batch()
    logits = model(input_ids=batch["input_ids"]).logits
    add_una_head(model, temperature=0.5)
    add_una_head(model, temperature=2.0, outputs=("log_probs", "entropy"))
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)
    out = model(**batch, fused_lm_head=True)
    truth = eager_logps(model, batch, temperature=2.0)
    assert torch.allclose(out.log_probs, truth, atol=1e-5) and out.entropy is not None
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    theirs = model(**batch, shift_labels=shifted, fused_lm_head=True).log_probs[:, :-1]
    assert torch.allclose(theirs, truth, atol=1e-5)


def mixed_precision(model) -> None:
    """Wrap a model's forward as accelerate does under bf16."""
    forward = convert_outputs_to_fp32(model.forward.__func__)
    model.forward = types.MethodType(forward, model)


LAYERS = {
    "ours": add_una_head,
    "theirs": trl_utils.add_fused_lm_head,
    "patch": patch_model,
    "accelerate": mixed_precision,
}


@pytest.mark.parametrize(
    "order",
    [
        ("ours", "accelerate", "ours", "accelerate"),
        ("ours", "theirs", "ours"),
        ("ours", "patch", "ours"),
        ("patch", "ours", "patch", "accelerate", "ours"),
        ("patch", "theirs", "patch", "ours"),
    ],
    ids="-".join,
)
def test_forwards_stand_over_each_other_in_any_order(order):
    """Every layer calls the one underneath, and a copy runs its own weights."""
    model = build("LlamaConfig")
    batch = make_batch()
    logits = model(input_ids=batch["input_ids"]).logits
    truth = eager_logps(model, batch)
    for layer in order:
        LAYERS[layer](model)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)
    assert torch.allclose(model(**batch, fused_lm_head=True).log_probs, truth, atol=1e-5)
    if "patch" in order:
        assert torch.allclose(model(**batch, una="tokens").logps, truth, atol=1e-5)
    if "theirs" in order:
        return  # TRL's forward would run the weights of the original in a copy
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other_truth = eager_logps(other, batch)
    assert not torch.allclose(other_truth, truth, atol=1e-3)
    assert torch.allclose(other(**batch, fused_lm_head=True).log_probs, other_truth, atol=1e-5)


def test_a_deep_copy_runs_its_own_weights():
    model = build("LlamaConfig")
    add_una_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    fresh = build("LlamaConfig")
    fresh.load_state_dict(other.state_dict())
    batch = make_batch()
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(other(**ids).logits, fresh(**ids).logits)
    found = other(**batch, fused_lm_head=True).log_probs
    assert torch.allclose(found, eager_logps(fresh, batch), atol=1e-5)


def test_a_pickled_model_keeps_both_heads():
    """A bound method is pickled by its name, and would be the class's forward: no log_probs."""
    model = build("LlamaConfig")
    add_una_head(model, temperature=0.7)
    batch = make_batch()
    truth = model(**batch, fused_lm_head=True).log_probs
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**batch, fused_lm_head=True).log_probs, truth)
    assert inspect.signature(loaded.forward) == inspect.signature(build("LlamaConfig").forward)
    shifted = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    # TRL's head of the loaded model, of the loaded weights.
    with torch.no_grad():
        loaded.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        theirs = loaded(**batch, shift_labels=shifted, fused_lm_head=True).log_probs[:, :-1]
    fresh = build("LlamaConfig")
    fresh.load_state_dict(loaded.state_dict())
    batch = make_batch()
    assert torch.allclose(theirs, eager_logps(fresh, batch, temperature=0.7), atol=1e-5)


def test_dropout_in_the_config_is_no_reason_for_their_head():
    """GPT-2 comes with dropout; TRL sets the modules to 0, and the config stays."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)
    model = transformers.GPT2LMHeadModel(config)
    trl.trainer.utils.disable_dropout_in_model(model.train())
    add_una_head(model)
    before = una_calls()
    batch = make_batch()
    found = model(**batch, fused_lm_head=True).log_probs
    assert una_calls()["packed"] == before["packed"] + 1
    assert torch.allclose(found, eager_logps(model, batch), atol=1e-5)


def test_their_function_is_back_after_a_trainer_is_built(directory, tmp_path):
    """After an error, too: TRL refuses this loss in its `__init__`."""
    own = sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head
    changes = {"loss_type": ["exo_pair"], "label_smoothing": 0.0}
    with pytest.raises(ValueError, match="exo_pair"):
        make(UNADPOTrainer, trl.DPOConfig, directory, preference_rows(), tmp_path, **changes)
    assert sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head is own


def test_threads_build_trainers_in_turns():
    """Or else the second would take the head of the first for TRL's, and put it back last."""
    module = types.SimpleNamespace(add_fused_lm_head="theirs")
    inside = threading.Event()

    def second() -> None:
        with _una_head_in([module]):
            inside.set()

    thread = threading.Thread(target=second)
    with _una_head_in([module]):
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set() and module.add_fused_lm_head == "theirs"


# ---- an objective beside their pairs ----


def scored_rows() -> list[dict[str, Any]]:
    rows = preference_rows(4)
    for i, row in enumerate(rows):
        row["chosen_score"] = 0.9 if i % 2 else None
        row["rejected_label"] = False
    return rows


def test_labels_and_scores_join_the_pairs(directory, tmp_path):
    objective = Objective(beta=0.2)
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "beta": 0.2}
    given = {"given": {"objective": objective}, "max_steps": 1}
    steps, trained = run(
        UNADPOTrainer, trl.DPOConfig, directory, scored_rows(), tmp_path, **changes, **given
    )
    pairs = Feedback.pairs(range(4), range(4, 8))
    scores = Feedback.scores([1, 3], [0.9, 0.9])
    labels = Feedback.binary(range(4, 8), [False] * 4)
    zeros = torch.zeros(8)
    feedback = Feedback.merge([pairs, labels, scores])
    truth = una_loss(zeros, zeros, feedback, objective=objective).loss
    assert steps[0]["loss"] == pytest.approx(truth.item(), rel=1e-6)
    assert "rewards/accuracies" in steps[0] and "entropy" in steps[0]

    # Pairs alone are TRL's own sigmoid loss.
    found, ours = run(
        UNADPOTrainer, trl.DPOConfig, directory, preference_rows(4), tmp_path, **changes, **given
    )
    expected, theirs = run(
        trl.DPOTrainer,
        trl.DPOConfig,
        directory,
        preference_rows(4),
        tmp_path,
        max_steps=1,
        **changes,
    )
    assert_same_steps(found, expected, 1e-5)
    assert any(
        not torch.equal(a, b) for a, b in zip(trained.parameters(), ours.parameters(), strict=True)
    )


NOTHING = dict.fromkeys(POINT_COLUMNS)  # datasets reads the columns off the first record
RAGGED = {0: {"chosen_score": 0.9, "rejected_score": 0.2}, 2: {"rejected_label": False}}


def una_truth(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: dict, objective: Objective
) -> torch.Tensor:
    """Return the loss of 4 pairs with the feedback of RAGGED, from logits.

    batch: rows [chosen | rejected] of TRL's collator
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["completion_mask"][:, 1:]
    sums = []
    for model in (policy, reference):
        log_probs = model(**inputs).logits[:, :-1].double().log_softmax(-1)
        picked = log_probs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        sums.append((picked * mask).sum(1))
    units = [Feedback.pairs(range(4), range(4, 8)), Feedback.binary([6], [False])]
    units.append(Feedback.scores([0, 4], [0.9, 0.2]))
    lengths = mask.sum(1)
    return una_loss(*sums, Feedback.merge(units), objective=objective, lengths=lengths).loss


@pytest.mark.parametrize("split", [(4, 1), (1, 4), (2, 2)], ids=["whole", "single", "halves"])
def test_a_step_is_that_of_all_its_units_however_they_are_split(directory, tmp_path, split):
    """Loss, gradient and evaluation, with a policy that differs from its reference.

    7 units in 4 records: the mean over batches of their means is another number.
    """
    objective = Objective(beta=0.3, length_normalize=split[0] == 2)
    rows = [row | NOTHING | RAGGED.get(i, {}) for i, row in enumerate(preference_rows(4))]
    load = AutoModelForCausalLM.from_pretrained
    torch.manual_seed(1)
    reference = randomize_weights(load(directory, dtype=torch.float32))
    asked = []
    trainer = make(
        UNADPOTrainer,
        trl.DPOConfig,
        directory,
        rows,
        tmp_path,
        beta=0.3,
        max_steps=1,
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        per_device_eval_batch_size=3,
        given={"objective": objective, "ref_model": reference},
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy = load(directory, dtype=torch.float32)
    truth = una_truth(policy, reference, batch, objective)
    truth.backward()
    trainer.compute_metrics = lambda found: asked.append(found) or {"x": 1.0}
    with pytest.warns(FutureWarning, match="return_outputs"):
        evaluated = trainer.predict(trainer.train_dataset).metrics
    assert asked and evaluated["test_x"] == 1.0
    assert evaluated["test_loss"] == pytest.approx(truth.item(), rel=1e-5)
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(truth.item(), rel=1e-5)
    steps = (
        (before.data - after.data) / 0.05
        for before, after in zip(policy.parameters(), trainer.model.parameters(), strict=True)
    )
    for step, parameter in zip(steps, policy.parameters(), strict=True):
        size = parameter.grad.norm()
        assert (step - parameter.grad).norm() <= 1e-3 * size + 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": 0.3}, "beta=0.3 of the DPOConfig"),
        ({"loss_type": ["ipo"]}, "loss_type belongs to"),
    ],
)
def test_settings_that_an_objective_replaces_are_refused(tmp_path, changes, message):
    """Before the model is loaded, and before references are computed."""
    args = trl.DPOConfig(**settings(tmp_path, **changes))
    for given in ((None, args), ()):
        named = {} if given else {"args": args}
        with pytest.raises(ValueError, match=message):
            UNADPOTrainer("no/model", *given, una_pack=False, objective=Objective(), **named)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("chosen_label", "good", "must be numbers"),
        ("rejected_label", 0.5, "True or False"),
        ("chosen_score", float("nan"), "finite"),
        ("rejected_score", 7.0, "outside"),
    ],
)
def test_wrong_feedback_is_named_by_column_value_and_record(column, value, reason):
    collate = FeedbackOfPairs(lambda examples: {}, Objective())
    right = {"chosen_score": 0.5, "rejected_score": 0.5, "chosen_label": True}
    with pytest.raises(ValueError, match=rf"{column}={value!r} of record 1 .*{reason}"):
        collate([right, right | {column: value}, {}])


@pytest.mark.parametrize("objective", ["logistic", {"pair": "linear"}, Objective, {}], ids=str)
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_objective_of_another_type_is_refused(tmp_path, kind, objective):
    trainer = {"dpo": UNADPOTrainer, "kto": UNAKTOTrainer}[kind]
    config = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig}[kind]
    args = config(**settings(tmp_path))
    with pytest.raises(ValueError, match=r"is no Objective: give objective=Objective\(beta=0.1\)"):
        trainer("no/model", args=args, objective=objective)


def columns_said(caplog, directory, out, columns: dict[str, Any], **changes: Any) -> list[str]:
    """Return what is said of columns, when a trainer with an objective is built."""
    say_once.cache_clear()
    caplog.clear()
    rows = [row | columns for row in preference_rows()]
    given = {"objective": Objective(), **changes}
    with caplog.at_level(logging.INFO):
        make(UNADPOTrainer, trl.DPOConfig, directory, rows, out, given=given)
    return [f"{r.levelname} {r.message}" for r in caplog.records if "objective=" in r.message]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "INFO objective= trains on pairs alone of train_dataset"),
        ({"chosen_score": 0.5}, "INFO objective= trains on pairs, chosen_score of train_dataset"),
        (
            {"margin": 1.0, "source": "a"},
            "WARNING objective= trains on pairs alone of train_dataset; numbers that it does not "
            "read: margin",
        ),
    ],
    ids=["none", "a score", "a margin"],
)
def test_the_columns_of_an_objective_are_told(caplog, directory, tmp_path, columns, said):
    assert columns_said(caplog, directory, tmp_path, columns) == [said]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("chosen_scores", "chosen_score"),
        ("score_rejected", "rejected_score"),
        ("Rejected-Label", "rejected_label"),
        ("chosenLabel", "chosen_label"),
    ],
)
def test_a_slip_in_the_name_of_a_column_is_told(caplog, directory, tmp_path, name, meant):
    """The run would be one of pairs alone, without a word."""
    slip, _ = columns_said(caplog, directory, tmp_path, {name: 0.5})
    assert slip.startswith("WARNING train_dataset has a column " + name)
    assert f"did you mean {meant}?" in slip
    # With the column itself there, the other one is no slip.
    assert len(columns_said(caplog, directory, tmp_path, {name: 0.5, meant: 0.5})) == 1


def test_a_subclass_may_read_further_columns(directory, tmp_path):
    """Its own method runs after its `__init__`, not within ours."""

    class Further(UNADPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.further = ["margin"]

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += self.further

    rows = [row | {"margin": 1.0} for row in preference_rows()]
    given = {"objective": Objective()}
    trainer = make(Further, trl.DPOConfig, directory, rows, tmp_path, given=given)
    trainer.get_train_dataloader()
    assert {"margin", *POINT_COLUMNS} <= set(trainer._signature_columns)


def test_the_columns_of_every_dataset_are_told(caplog, directory, tmp_path):
    """Streams too, whose columns are those of the first record."""
    datasets = pytest.importorskip("datasets")
    rows = [row | {"chosen_label": True} for row in preference_rows(2)]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    evaluated = {"a": stream, "b": datasets.Dataset.from_list(preference_rows(2))}
    said = columns_said(caplog, directory, tmp_path, {}, eval_dataset=evaluated)
    assert said[1:] == [
        "INFO objective= trains on pairs, chosen_label of eval_dataset['a']",
        "INFO objective= trains on pairs alone of eval_dataset['b']",
    ]


def test_precomputed_references_of_an_objective(directory, tmp_path):
    given = {"objective": Objective()}
    logged = []
    for precompute in (False, True):
        changes = {"precompute_ref_log_probs": precompute, "max_steps": 3, "given": given}
        steps, _ = run(UNADPOTrainer, trl.DPOConfig, directory, scored_rows(), tmp_path, **changes)
        logged.append(steps)
    assert_same_steps(logged[1], logged[0], 1e-5)


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_untrained_policy_has_log_ratios_of_zero(kind, precompute, tmp_path, monkeypatch):
    """Exactly: both sums are in float64, at lengths whose sums in float32 would differ."""
    directory = save_llama(tmp_path / "llama")
    seen = []
    monkeypatch.setattr(
        f"{OnFeedback.__module__}.una_loss",
        lambda logps, ref_logps, *args, **kwargs: (
            seen.append((logps.detach(), ref_logps)) or una_loss(logps, ref_logps, *args, **kwargs)
        ),
    )
    ours, config, rows = {
        "dpo": (UNADPOTrainer, trl.DPOConfig, preference_rows(4)),
        "kto": (UNAKTOTrainer, trl.KTOConfig, label_rows()[:4]),
    }[kind]
    for row in rows:
        for column in {"chosen", "rejected", "completion"} & row.keys():
            row[column] = " ".join([row[column]] * 30)
    changes = {"precompute_ref_log_probs": precompute, "max_steps": 1, "learning_rate": 0.0}
    run(ours, config, directory, rows, tmp_path, given={"objective": Objective()}, **changes)
    assert len(seen) == 2
    for logps, ref_logps in seen:
        assert logps.dtype == ref_logps.dtype == torch.float64
        assert torch.equal(logps, ref_logps)
        assert (logps.float().double() != logps).any()


def test_an_objective_of_labels_is_the_loss(directory, tmp_path):
    """Of the first step, on a policy that differs from its reference; its gradient, too."""
    objective = Objective(beta=0.3, binary="mse")
    torch.manual_seed(1)
    load = AutoModelForCausalLM.from_pretrained
    reference = randomize_weights(load(directory, dtype=torch.float32))
    given = {"objective": objective, "ref_model": reference}
    changes = {"beta": 0.3, "undesirable_weight": 3.0, "max_steps": 1, "given": given}
    changes |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = make(UNAKTOTrainer, trl.KTOConfig, directory, label_rows(), tmp_path, **changes)
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy = load(directory, dtype=torch.float32)
    logps = [
        eager_logps(model, completions(batch)).double().sum(1) for model in (policy, reference)
    ]
    rewards = 0.3 * (logps[0] - logps[1].detach())
    label = torch.as_tensor(batch["label"]).double()
    weight = torch.where(label > 0, 1.0, 3.0).double()
    truth = (weight * (torch.sigmoid(rewards) - label) ** 2).mean()
    truth.backward()
    trainer.train()
    (step,) = logged(trainer)
    assert step["loss"] == pytest.approx(truth.item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    with pytest.raises(ValueError, match="loss_type belongs to TRL's losses.*leave loss_type at"):
        changes = {"loss_type": "apo_zero_unpaired", "given": {"objective": Objective()}}
        make(UNAKTOTrainer, trl.KTOConfig, directory, label_rows(), tmp_path, **changes)


def completions(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a model that scores the completions of TRL's batch."""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


def test_trainers_with_trls_losses_alone_refuse_an_objective(directory, tmp_path):
    given = {"objective": Objective(), "reward_funcs": count_letters}
    rows = [{"prompt": "a"}]
    with pytest.raises(ValueError, match="UNAGRPOTrainer keeps TRL's losses; objective= is for"):
        make(
            UNAGRPOTrainer,
            trl.GRPOConfig,
            directory,
            rows,
            tmp_path,
            given=given,
            num_generations=2,
        )


def test_eager_truth_of_the_tests():
    """The truth that other tests compare with is TRL's head, too."""
    model = build("LlamaConfig")
    batch = make_batch()
    truth = eager_logps(model, batch)
    trl.trainer.utils.add_fused_lm_head(model)
    assert torch.allclose(model(**batch, fused_lm_head=True).log_probs, truth, atol=1e-5)
