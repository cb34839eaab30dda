"""TRL 1.9 to 1.14: TRL's own methods on a stand-in for the logits, against TRL's own trainers.

The stand-in is tested beside any TRL. Training needs TRL 1.9 to 1.14, of tests/axolotl.sh.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from tiny import make_records  # noqa: E402
from una_fast import Feedback, Objective  # noqa: E402
from una_fast.integrations.trl_before_seam import (  # noqa: E402
    READERS,
    LabelLogProbs,
    Logits,
    PairLogProbs,
    ScoredOutput,
    Scoring,
    _read,
    una_calls,
)
from una_fast.logs import say_once  # noqa: E402

HAS_SEAM = hasattr(trl_utils, "add_fused_lm_head")
before_seam = pytest.mark.skipif(
    HAS_SEAM, reason=f"TRL {trl.__version__} has the seam; tests/axolotl.sh runs this with TRL 1.9"
)
STEPS = 4
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}
# A loss of the size of its gradient, 926 at first: larger steps diverge, and so do all roundings.
LEARNING_RATE = {"sppo_hard": 1e-5}
PAIR_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]


# --- the stand-in, beside any TRL -----------------------------------------------------------------


@pytest.fixture
def both():
    """Make logits [4, 6, 9], the mask of scored positions, and the stand-in that knows them."""
    torch.manual_seed(0)
    logits = 8 * torch.randn(4, 6, 9, dtype=torch.float64)
    targets = torch.randint(9, (4, 6))
    targets[:, ::2] = logits.argmax(-1)[:, ::2]
    mask = torch.rand(4, 6) < 0.6
    log_probs = logits.log_softmax(-1)
    stats = {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
    }
    picked = log_probs.gather(-1, targets[..., None])[..., 0]
    targets = targets.masked_fill(~mask, -100)
    return logits, targets, mask, Logits(picked, targets, stats)


def metrics_of(logits: Any, targets: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Ask logits, or their stand-in, what TRL's losses and metrics ask."""
    first, second = logits.detach().chunk(2, dim=0)
    chosen, _ = logits.chunk(2, dim=0)
    mask_first, mask_second = mask.chunk(2, dim=0)
    picked = logits.detach().index_select(0, torch.tensor([2, 0]))
    doubled = torch.logsumexp(2.0 * logits, dim=-1)
    return {
        "mean logit": second[mask_second].mean(-1).sum(),
        "of selected rows": picked[mask[[2, 0]]].mean(-1).sum(),
        "correct": ((first.argmax(dim=-1) == targets[:2]) & mask_first).sum(),
        "sft": F.cross_entropy(chosen[mask_first], targets[:2][mask_first]),
        "wpo": doubled - 2.0 * torch.logsumexp(logits, dim=-1),
        "size": torch.tensor(chosen.size(0)),
    }


def test_the_stand_in_answers_as_the_logits_would(both):
    logits, targets, mask, stand_in = both
    truth = metrics_of(logits, targets, mask)
    found = metrics_of(stand_in, targets, mask)
    for name in truth:
        torch.testing.assert_close(
            found[name], truth[name], msg=lambda text, n=name: f"{n}: {text}"
        )


def test_only_the_cut_of_the_last_position_is_taken_for_granted(both):
    """Once, and before anything else: a second cut would drop a position that is there."""
    logits = both[-1]
    output = ScoredOutput(logits.log_probs, logits.targets)
    for cut in ((..., slice(None, -1), slice(None)), (slice(None), slice(None, -1), slice(None))):
        found = output.logits[cut]
        assert torch.equal(found.log_probs, logits.log_probs)
        with pytest.raises(NotImplementedError, match="una_head: false"):
            found[cut]
    for ask in (lambda z: z[:, :-1], lambda z: z.size(1), lambda z: torch.logsumexp(z, -1)):
        with pytest.raises(NotImplementedError, match="una_head: false"):
            ask(output.logits)


def asked_of_rows(mask: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return questions on rows of logits, [rows, V], with targets of theirs, and of others."""
    mine, others = targets[mask], (targets[mask] + 1) % 9
    return {
        "sum": lambda z: F.cross_entropy(z[mask], mine, reduction="sum"),
        "smoothed": lambda z: F.cross_entropy(z[mask], mine, label_smoothing=0.1),
        "other targets": lambda z: F.cross_entropy(z[mask], others),
        "fewer targets": lambda z: F.cross_entropy(z[mask], mine[1:]),
        "unflattened": lambda z: F.cross_entropy(z, targets),
    }


ASKED = {
    "method": lambda z: z.softmax(-1),
    "function": lambda z: torch.softmax(z, -1),
    "second argument": lambda z: torch.where(torch.ones(4, 6, 9) > 0, z, 0.0),
    "factor": lambda z: 3.0 * z,
    "row": lambda z: z[0],
    "size of the vocabulary": lambda z: z.size(-1),
    "all sizes": lambda z: z.size(),
    "mean over rows": lambda z: z.mean(0),
    "mean of all": lambda z: z.mean(),
    "kept dimension": lambda z: z.mean(-1, keepdim=True),
    "argmax over rows": lambda z: z.argmax(dim=1),
    "chunk of the vocabulary": lambda z: z.chunk(2, dim=-1),
    "columns": lambda z: z.index_select(2, torch.tensor([0])),
    "logsumexp over rows": lambda z: torch.logsumexp(z, 0),
    "doubled logsumexp over rows": lambda z: torch.logsumexp(2.0 * z, 0),
    "doubled mean": lambda z: (2.0 * z).mean(-1),
    "doubled softmax": lambda z: torch.softmax(2.0 * z, -1),
}


@pytest.mark.parametrize("asked", [*ASKED, *asked_of_rows(torch.tensor([0]), torch.tensor([0]))])
def test_what_the_stand_in_does_not_know_is_refused_by_name(both, asked):
    _, targets, mask, stand_in = both
    ask = (ASKED | asked_of_rows(mask, targets))[asked]
    with pytest.raises(NotImplementedError, match="this TRL asks the logits for"):
        ask(stand_in)


def test_rows_are_parted_along_any_of_their_dimensions(both):
    logits, *_, stand_in = both
    for dim in (0, 1, -2, -3):
        parts, truth = stand_in.chunk(2, dim=dim), logits.chunk(2, dim=dim)
        assert [part.log_probs.shape for part in parts] == [part.shape[:-1] for part in truth]
        assert stand_in.size(dim) == logits.size(dim)


@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_log_probs_of_other_targets_are_refused(both, name):
    """TRL reads its ids [B, T - 1]; those outside the scored tokens may be anything."""
    _, targets, mask, stand_in = both
    read = _read(name, None)
    ids = targets.masked_fill(~mask, 7)
    assert read(stand_in, ids)[0].shape[-1] == 6
    with pytest.raises(NotImplementedError, match=f"{name} of other targets"):
        read(stand_in, torch.where(mask, (ids + 1) % 9, ids))


@pytest.mark.skipif(not HAS_SEAM, reason=f"TRL {trl.__version__} has no seam")
def test_newer_trl_is_sent_to_the_other_trainers():
    """TRL's losses with a seam never read logits: the swap would change nothing, in silence."""
    from una_fast.integrations.trl_before_seam import UNADPOTrainer

    with pytest.raises(RuntimeError, match=r"una_fast\.integrations\.trl"):
        UNADPOTrainer("model")


# --- training, with TRL 1.9 to 1.14 ---------------------------------------------------------------


def rows_of(kind: str) -> Dataset:
    columns = {
        "pairs": ("prompt", "chosen", "rejected"),
        "labels": ("prompt", "completion", "label"),
    }
    rows = [{name: row[name] for name in columns[kind]} for row in make_records(kind, 12)]
    return Dataset.from_list(rows)


def lora(*targets: str) -> LoraConfig:
    """Make adapters that change the policy from the first step on."""
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)


def build(
    method: str,
    ours: bool,
    model: Any,
    tokenizer_of: str,
    output_dir: Any,
    *,
    adapters: LoraConfig | None = None,
    options: dict[str, Any] | None = None,
    rows: Dataset | None = None,
    **settings: Any,
) -> Any:
    """Build TRL's trainer, or ours.

    method: "dpo" | "kto"
    model: a directory, or a model
    tokenizer_of: directory of the tokenizer
    options: arguments of our trainer
    rows: the dataset; None: `rows_of` the method
    settings: of the DPOConfig or KTOConfig
    """
    theirs = {"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[method]
    mixin = {"dpo": PairLogProbs, "kto": LabelLogProbs}[method]
    config = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig}[method]
    args = config(
        output_dir=str(output_dir),
        max_steps=STEPS,
        **{"per_device_train_batch_size": 2, "learning_rate": 0.01, **settings},
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model)
    data = rows or rows_of("pairs" if method == "dpo" else "labels")
    trainer = type("UNA", (mixin, theirs), {}) if ours else theirs
    return trainer(
        model,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(3)),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_of),
        peft_config=adapters,
        **(options or {} if ours else {}),
    )


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def check_equal(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-5
) -> None:
    """Check losses and gradient norms, and that every metric is there and close."""
    assert len(ours) == len(theirs) == STEPS
    for mine, truth in zip(ours, theirs, strict=True):
        assert set(mine) == set(truth)
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(truth[name], rel=rel, abs=1e-7), name
        # differences of log-probs near 100, in float32
        assert mine == pytest.approx(truth, rel=1e-4, abs=1e-4)


def served() -> int:
    calls = una_calls()
    return calls["packed"] + calls["padded"]


def compare(method: str, directory: str, tmp_path: Any, rel: float = 1e-5, **settings: Any) -> None:
    """Train TRL's trainer and ours, and compare; our op must have served, and no other."""
    before, fell_back = served(), una_calls()["fell_back"]
    theirs = build(method, False, directory, directory, tmp_path, **settings)
    truth = history(theirs)
    assert served() == before
    ours = build(method, True, directory, directory, tmp_path, **settings)
    check_equal(history(ours), truth, rel)
    # a call of the policy in every step, and one of the reference unless it is stored
    calls = 1 if settings.get("precompute_ref_log_probs") else 2
    assert served() - before >= calls * STEPS
    assert una_calls()["fell_back"] == fell_back


@before_seam
@pytest.mark.parametrize("adapters", [None, lora("q_proj", "v_proj")], ids=["full", "lora"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_every_pair_loss_of_trl_trains_the_same(llamas, tmp_path, loss, adapters):
    settings = {
        "loss_type": [loss],
        "label_smoothing": SMOOTHED.get(loss, 0.0),
        "learning_rate": LEARNING_RATE.get(loss, 0.01),
    }
    # discopop divides log-ratios by 0.05, and so grows the roundings of log-probs near 100
    rel = 1e-4 if loss == "discopop" else 1e-5
    compare("dpo", llamas["untied"], tmp_path, rel, adapters=adapters, **settings)


@before_seam
@pytest.mark.parametrize(
    "settings",
    [
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"precompute_ref_log_probs": True},
        {"gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_trl_does_with_log_probs_stays_trls(llamas, tmp_path, settings):
    compare("dpo", llamas["tied"], tmp_path, **settings)


@before_seam
@pytest.mark.parametrize("adapters", [None, lora("q_proj", "v_proj")], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "apo_zero_unpaired"}, {"precompute_ref_log_probs": True}],
    ids=["kto", "apo_zero_unpaired", "stored"],
)
def test_kto_trains_the_same(llamas, tmp_path, settings, adapters):
    compare("kto", llamas["untied"], tmp_path, adapters=adapters, **settings)


@before_seam
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_evaluation_gives_trls_losses_and_metrics(llamas, tmp_path, method):
    directory = llamas["untied"]
    adapters = lora("q_proj", "v_proj")
    found = []
    for ours in (False, True):
        trainer = build(method, ours, directory, directory, tmp_path, adapters=adapters)
        result = trainer.evaluate()
        found.append({n: x for n, x in result.items() if "second" not in n and "time" not in n})
    truth, mine = found
    assert set(mine) == set(truth)
    assert mine == pytest.approx(truth, rel=1e-4, abs=1e-4)
    assert mine["eval_loss"] == pytest.approx(truth["eval_loss"], rel=1e-5)


@before_seam
def test_the_router_loss_of_a_mixture_of_experts_is_kept(llamas, tmp_path):
    """Padded: in a packed row a shared prompt counts once among the tokens that are balanced."""
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=2,
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "experts")
    theirs, ours = (
        build(
            "dpo",
            mine,
            str(tmp_path / "experts"),
            llamas["untied"],
            tmp_path,
            router_aux_loss_coef=0.5,
            options={"una_pack": False},
        )
        for mine in (False, True)
    )
    truth = history(theirs)
    assert truth[0]["aux_loss"] > 0
    check_equal(history(ours), truth)


@before_seam
def test_an_adapter_on_the_head_falls_back_and_is_counted(llamas, tmp_path, caplog):
    say_once.cache_clear()
    before = una_calls()
    adapters = lora("q_proj", "lm_head")
    directory = llamas["untied"]
    truth = history(build("dpo", False, directory, directory, tmp_path, adapters=adapters))
    with caplog.at_level(logging.WARNING):
        ours = build("dpo", True, directory, directory, tmp_path, adapters=adapters)
        found = history(ours)
    check_equal(found, truth)
    after = una_calls()
    assert after["fell_back"] - before["fell_back"] == STEPS
    assert (after["packed"], after["padded"]) == (before["packed"], before["padded"])
    said = [r.getMessage() for r in caplog.records if "TRL's head" in r.getMessage()]
    assert len(said) == 1, "the reason is said once"
    with pytest.raises(ValueError, match="objective needs"):
        build(
            "dpo",
            True,
            directory,
            directory,
            tmp_path,
            adapters=adapters,
            options={"objective": Objective(beta=0.1)},
        )


@before_seam
def test_calls_outside_the_loss_are_the_models_own(llamas, tmp_path):
    directory = llamas["untied"]
    trainer = build("dpo", True, directory, directory, tmp_path)
    own = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        found, truth = trainer.model(input_ids=ids), own(input_ids=ids)
    assert torch.equal(found.logits, truth.logits)
    module = importlib.import_module("trl.trainer.dpo_trainer")
    names = [name for name in READERS if hasattr(module, name)]
    before = [getattr(module, name) for name in names]
    history(trainer)
    assert names
    assert [getattr(module, name) for name in names] == before, "TRL's functions are back"


@before_seam
def test_an_objective_of_pairs_is_the_loss(llamas, tmp_path):
    """Logistic pairs are TRL's sigmoid loss; linear pairs are what una_loss says."""
    directory = llamas["untied"]
    adapters = lora("q_proj", "v_proj")

    def run(ours: bool, **options: Any) -> list[dict[str, float]]:
        trainer = build("dpo", ours, directory, directory, tmp_path, adapters=adapters, **options)
        return history(trainer)

    truth = run(False)
    found = run(True, options={"objective": Objective(beta=0.1)})
    check_equal(found, truth)
    linear = run(True, options={"objective": Objective(beta=0.1, pair="linear")})
    assert linear[0]["loss"] == pytest.approx(-truth[0]["rewards/margins"], rel=1e-4)


@before_seam
def test_labels_and_scores_join_the_pairs(llamas, tmp_path):
    """From the columns that the trainers of newer TRL read; a step counts all its units."""
    directory = llamas["untied"]
    columns = {"chosen_score": 0.9, "rejected_label": False}
    nothing = dict.fromkeys(columns)
    rows = [row | (columns if i == 1 else nothing) for i, row in enumerate(rows_of("pairs"))]
    given = {
        "adapters": lora("q_proj", "v_proj"),
        "options": {"objective": Objective(beta=0.1)},
        "rows": Dataset.from_list(rows[:4]),
    }
    steps = []
    for size in (4, 1):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = build("dpo", True, directory, directory, tmp_path, **given, **split)
        steps.append(history(trainer))
    check_equal(*[[{n: line[n] for n in ("loss", "grad_norm")} for line in run] for run in steps])
    feedback = trainer.data_collator(list(trainer.train_dataset))["feedback"]
    units = [Feedback.pairs(range(4), range(4, 8)), Feedback.binary([5], [False])]
    assert feedback == Feedback.merge([*units, Feedback.scores([1], [0.9])])


@before_seam
def test_an_objective_of_labels_is_the_loss(llamas, tmp_path):
    directory = llamas["untied"]
    objective = Objective(beta=0.1, binary="mse")
    trainer = build(
        "kto",
        True,
        directory,
        directory,
        tmp_path,
        adapters=lora("q_proj", "v_proj"),
        options={"objective": objective},
        undesirable_weight=3.0,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    logps = {}
    for name in ("policy", "reference"):
        model = trainer.model
        context = model.disable_adapter() if name == "reference" else torch.no_grad()
        with context, torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[:, :-1].double()
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        logps[name] = (picked * batch["completion_mask"][:, 1:]).sum(1)
    rewards = 0.1 * (logps["policy"] - logps["reference"])
    label = torch.as_tensor(batch["label"]).double()
    weight = torch.where(label > 0, 1.0, 3.0).double()
    truth = (weight * (torch.sigmoid(rewards) - label) ** 2).mean()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
    assert rewards.abs().max() > 1e-3, "a policy that differs from its reference"
    assert float(found) == pytest.approx(float(truth), rel=1e-5)


@before_seam
@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
        ({"loss_type": ["ipo"]}, {"objective": Objective(beta=0.1)}, "loss_type"),
        ({"beta": 0.2}, {"objective": Objective(beta=0.1)}, "beta"),
        ({}, {"una_pack": "x"}, "pack='x' is not one of"),
    ],
    ids=["liger", "loss_type", "beta", "pack"],
)
def test_refusals_name_the_setting(llamas, tmp_path, settings, options, named):
    if "use_liger_kernel" in settings:
        available = importlib.import_module("trl.import_utils").is_liger_kernel_available
        if not available():
            pytest.skip("TRL itself refuses the setting without its liger-kernel")
    directory = llamas["untied"]
    with pytest.raises(ValueError, match=named):
        build("dpo", True, directory, directory, tmp_path, options=options, **settings)


@before_seam
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_compute_metrics_on_logits_is_refused(llamas, tmp_path, method):
    """When the trainer is built, and before references are computed."""
    directory = llamas["untied"]
    options = {"compute_metrics": lambda prediction: {}}
    before = una_calls()
    with pytest.raises(ValueError, match="compute_metrics and predict.. need logits"):
        build(
            method,
            True,
            directory,
            directory,
            tmp_path,
            options=options,
            precompute_ref_log_probs=True,
        )
    assert una_calls() == before
    trainer = build(method, True, directory, directory, tmp_path)
    trainer.compute_metrics = options["compute_metrics"]
    with pytest.raises(ValueError, match="compute_metrics"):
        trainer.evaluate()


@before_seam
def test_compute_metrics_on_trls_logits_stays(llamas, tmp_path):
    """Where the model is left to TRL's head."""
    directory = llamas["untied"]
    options = {"compute_metrics": lambda prediction: {"rows": len(prediction.predictions[0])}}
    adapters = lora("q_proj", "lm_head")
    trainer = build("dpo", True, directory, directory, tmp_path, adapters=adapters, options=options)
    assert trainer.una_refusal and trainer.compute_metrics is not None


@before_seam
@pytest.mark.parametrize("objective", ["logistic", {"pair": "linear"}, Objective], ids=str)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_objective_of_another_type_is_refused(llamas, tmp_path, method, objective):
    directory = llamas["untied"]
    options = {"objective": objective}
    with pytest.raises(ValueError, match=r"is no Objective: give objective=Objective\(beta=0.1\)"):
        build(method, True, directory, directory, tmp_path, options=options)


@before_seam
@pytest.mark.parametrize("adapters", [None, lora("q_proj", "v_proj")], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_trained_model_is_pickled_and_copied(llamas, tmp_path, method, adapters):
    """Policy and reference, with nothing of the trainer's, and after an error in a step too."""
    directory = llamas["untied"]
    try:
        pickle.dumps(AutoModelForCausalLM.from_pretrained(directory))
    except AttributeError as error:
        pytest.skip(f"transformers' own model cannot be pickled beside kernels: {error}")
    # The hook of checkpointing on adapters, transformers' own, cannot be pickled.
    settings = {"adapters": adapters, "gradient_checkpointing": False}
    trainer = build(method, True, directory, directory, tmp_path, **settings)
    history(trainer)
    ids = torch.arange(5, 17)[None]
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    batch = next(iter(trainer.get_train_dataloader()))
    of_loss = {name: batch[name] for name in ("input_ids", "completion_mask")}
    with pytest.raises(KeyError):
        trainer.compute_loss(trainer.model, of_loss)  # without the mask that TRL reads
    for model in models:
        truth = model(input_ids=ids).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        for other in (*others, torch.load(file, weights_only=False)):
            assert torch.equal(other(input_ids=ids).logits, truth)
            named = [*other._forward_hooks.values(), *other._forward_pre_hooks.values()]
            assert not any(isinstance(getattr(hook, "__self__", None), Scoring) for hook in named)
    trainer.state.log_history.clear()
    assert len(history(trainer)) == STEPS


@before_seam
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_noise_in_the_embeddings_is_trls(llamas, tmp_path, method):
    """Its size follows the width of a batch: packed rows would have less of it."""
    compare(method, llamas["untied"], tmp_path, neftune_noise_alpha=5.0)


@before_seam
def test_columns_that_an_objective_does_not_read_are_told(llamas, tmp_path, caplog):
    say_once.cache_clear()
    directory = llamas["untied"]
    rows = Dataset.from_list([row | {"chosen_scores": 0.5} for row in rows_of("pairs")])
    options = {"objective": Objective(beta=0.1)}
    with caplog.at_level(logging.WARNING):
        build("dpo", True, directory, directory, tmp_path, options=options, rows=rows)
    assert "train_dataset has a column chosen_scores" in caplog.text
    assert "objective= trains on pairs alone of eval_dataset" in caplog.text
