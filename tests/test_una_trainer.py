"""UNATrainer: transformers' Trainer on feedback, accumulated, evaluated, adapted, resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from embedded import add_native_adapter
from families import FAMILIES, SMALL, build
from tiny import make_records, save_llama
from una_fast import Objective, una_loss
from una_fast.data.settings import RecordOptions
from una_fast.integrations.hf import FeedbackCollator, UNATrainer


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def load(directory: str):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def arguments(out: Path, **changes) -> TrainingArguments:
    usual = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    return TrainingArguments(**(usual | changes))


def make_trainer(directory, tokenizer, out, records=None, model=None, **changes) -> UNATrainer:
    model = load(directory) if model is None else model
    given = {name: changes.pop(name) for name in list(changes) if name in OF_TRAINER}
    if "ref_model" not in given:
        given["ref_model"] = load(directory)
    return UNATrainer(
        model,
        arguments(out, **changes),
        train_dataset=records or make_records("mixed", 16),
        processing_class=tokenizer,
        **given,
    )


OF_TRAINER = (
    "ref_model",
    "eval_dataset",
    "callbacks",
    "objective",
    "data_collator",
    "compute_metrics",
    "compute_loss_func",
)
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def losses(trainer: UNATrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_collated_records_are_responses_with_feedback(tokenizer):
    records = [*make_records("pairs", 2), *make_records("labels", 1), *make_records("several", 1)]
    batch = FeedbackCollator(tokenizer)(records)
    feedback = batch["feedback"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert feedback.first[:3].tolist() == [0, 2, 4] and feedback.second[:2].tolist() == [1, 3]
    assert feedback.num_units == 3 + batch["input_ids"].shape[0] - 5
    for row in range(len(batch["labels"])):
        scored = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][scored], batch["input_ids"][row][scored])
        assert scored.any() and batch["labels"][row][scored][-1] == tokenizer.eos_token_id
        assert not scored[batch["attention_mask"][row] == 0].any() and not scored[0]


def test_malformed_records_are_named(tokenizer):
    records = [make_records("pairs", 1)[0], {"prompt": "a", "chosen": "b"}]
    with pytest.raises(ValueError, match="record 1 of the batch: .*rejected"):
        FeedbackCollator(tokenizer)(records)
    with pytest.raises(ValueError, match="score_center=dataset needs every record at once"):
        FeedbackCollator(tokenizer, options=RecordOptions(score_center="dataset"))


@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)])
def test_any_split_of_a_step_is_one_batch(directory, tokenizer, tmp_path, split):
    """Batches have unequal numbers of units: a mean of means would be another gradient."""
    size, accumulated = split
    records = make_records("mixed", 8)
    model = load(directory)
    trainer = make_trainer(
        directory,
        tokenizer,
        tmp_path,
        records,
        model,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
    )
    trainer.train()

    truth, reference = load(directory), load(directory)
    seen = []
    again = make_trainer(directory, tokenizer, tmp_path, records)
    batches = list(again.get_train_dataloader())  # of two records, in the order of the seed
    optimizer = torch.optim.SGD(truth.parameters(), lr=0.05)
    for parts in (batches[0:2], batches[2:4]):
        units = sum(part["feedback"].num_units for part in parts)
        total = 0.0
        for part in parts:
            inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
            sums = []
            for each in (truth, reference):
                logits = each(**inputs).logits[:, :-1]
                targets = part["labels"][:, 1:]
                found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
                sums.append(found.squeeze(-1).where(targets != -100, 0.0).sum(1))
            total = total + una_loss(*sums, part["feedback"], num_units=units).loss
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total.item())
    assert losses(trainer) == pytest.approx(seen, rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = truth.get_parameter(name)
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_evaluation_counts_units(directory, tokenizer, tmp_path):
    """The mean over units, not over batches; metrics under the names of the trainer."""
    records = make_records("mixed", 7)
    changes = {"eval_dataset": records, "per_device_eval_batch_size": 3}
    trainer = make_trainer(directory, tokenizer, tmp_path, records, **changes)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    metrics = trainer.evaluate()
    batch = FeedbackCollator(tokenizer)(records)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    reference = trainer.ref_model(**inputs, una="responses").logps
    out = trainer.model(**inputs, feedback=batch["feedback"], ref_logps=reference)
    assert metrics["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-6)
    pairs = batch["feedback"].kind == 0
    chosen = out.rewards[batch["feedback"].first[pairs]].mean()
    assert metrics["eval_rewards/chosen"] == pytest.approx(chosen.item(), rel=1e-6)
    assert metrics["eval_units"] == batch["feedback"].num_units


def test_metrics_of_training_are_logged(directory, tokenizer, tmp_path):
    class Watch(TrainerCallback):
        seen: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    watch = Watch()
    records = make_records("mixed", 16)
    changes = {"callbacks": [watch], "per_device_train_batch_size": 8}
    make_trainer(directory, tokenizer, tmp_path, records, **changes).train()
    step = watch.seen[0]
    assert {"loss", "grad_norm", "rewards/chosen", "una/implicit_mean", "log_ratio"} <= set(step)
    assert step["units"] > 0 and "rewards/chosen" not in watch.seen[-1]


def test_adapters_need_no_reference(directory, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.3)
    model = peft.get_peft_model(load(directory), options)
    trainer = make_trainer(
        directory, tokenizer, tmp_path, model=model, ref_model=None, learning_rate=1.0
    )
    trainer.train()
    first, second = losses(trainer)
    objective_at_zero = make_trainer(directory, tokenizer, tmp_path, max_steps=1)
    objective_at_zero.train()
    assert first == pytest.approx(losses(objective_at_zero)[0], rel=1e-6)
    assert second != first
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def lora(model, **changes):
    peft = pytest.importorskip("peft")
    changes = {"target_modules": ["q_proj", "down_proj"], **changes}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **changes))


def test_frozen_adapters_stay_frozen(directory, tokenizer, tmp_path):
    """Where the adapter is switched off for the reference, peft alone would make all trainable."""
    model = lora(load(directory))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    records = make_records("mixed", 8)
    given = {"ref_model": None, "eval_dataset": records, "learning_rate": 1.0}
    trainer = make_trainer(directory, tokenizer, tmp_path, records, model, **given)
    trainer.evaluate()
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in before if "lora_B" in name}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_adapters_of_transformers_need_no_reference(directory, tokenizer, tmp_path):
    """Those of `add_adapter`: the same steps as those of a PeftModel."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(directory), options)
    torch.manual_seed(0)
    native = load(directory)
    add_native_adapter(native, options)
    given = {"ref_model": None, "learning_rate": 1.0}
    runs = []
    for model in (adapted, native):
        trainer = make_trainer(directory, tokenizer, tmp_path, model=model, **given)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6) and runs[0][0] != runs[0][1]


def with_trained_norm(model):
    model = lora(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_trained_norm, "model.norm.weight is trained, and stays as trained"),
        (lambda model: lora(model, bias="all"), "bias is trained, and stays as trained"),
        (lambda model: lora(model, init_lora_weights="pissa"), "'pissa' changes the weights"),
    ],
    ids=["norm", "bias", "pissa"],
)
def test_an_adapter_that_is_not_all_is_no_reference(tokenizer, tmp_path, make, reason):
    """Such a model with its adapter off is not the policy before training."""
    directory = save_llama(tmp_path / "biased")
    config = AutoConfig.from_pretrained(directory, attention_bias=True)
    model = make(AutoModelForCausalLM.from_config(config))
    trainer = make_trainer(directory, tokenizer, tmp_path, model=model, ref_model=None)
    with pytest.raises(ValueError, match=f"is no reference: .*{reason}.* give ref_model="):
        trainer.train()


def test_parameters_must_be_trained_and_not_the_references(directory, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        frozen = load(directory).requires_grad_(False)
        make_trainer(directory, tokenizer, tmp_path, model=frozen)
    base = load(directory)
    adapted = lora(base)
    with pytest.raises(ValueError, match="ref_model shares .*lora_A.* for an adapter leave"):
        make_trainer(directory, tokenizer, tmp_path, model=adapted, ref_model=base)
    model, reference = load(directory), load(directory)
    reference.lm_head = model.lm_head
    with pytest.raises(ValueError, match="ref_model shares lm_head.weight"):
        make_trainer(directory, tokenizer, tmp_path, model=model, ref_model=reference)
    options = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=4)
    with pytest.raises(ValueError, match="AdaLoRA adds its penalty"):
        model = peft.get_peft_model(load(directory), options)
        make_trainer(directory, tokenizer, tmp_path, model=model)


def test_an_evaluation_before_training_has_the_precision_of_training(
    directory, tokenizer, tmp_path
):
    """Policy and reference are equal, and both are under autocast."""
    records = make_records("pairs", 6)
    changes = {"eval_dataset": records, "bf16": True}
    trainer = make_trainer(directory, tokenizer, tmp_path, records, **changes)
    assert trainer.evaluate()["eval_log_ratio"] == 0.0
    with pytest.raises(ValueError, match="bf16_full_eval casts the model .* use bf16=True"):
        make_trainer(directory, tokenizer, tmp_path, bf16_full_eval=True)


def test_a_compiled_model_has_a_reference(directory, tokenizer, tmp_path):
    torch._dynamo.reset()
    records = make_records("pairs", 4)
    plain = make_trainer(directory, tokenizer, tmp_path, records)
    plain.train()
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = make_trainer(directory, tokenizer, tmp_path, records, **changes)
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_metrics_are_those_of_the_call(directory, tokenizer, tmp_path):
    """Nothing is left of a call that failed, or of an earlier start."""
    records = make_records("mixed", 8)
    given = {"eval_dataset": records, "per_device_eval_batch_size": 2, "learning_rate": 0.0}
    trainer = make_trainer(directory, tokenizer, tmp_path, records, **given)
    expected = trainer.evaluate()
    with pytest.raises(ValueError, match="broken"):
        trainer.evaluate([*records[:4], {"broken": 1}])
    again = trainer.evaluate()
    names = ("eval_loss", "eval_units", "eval_log_ratio")
    assert {name: again[name] for name in names} == {name: expected[name] for name in names}
    loader = trainer.get_eval_dataloader()
    found = trainer.evaluation_loop(loader, "Evaluation", None, None, "valid").metrics
    assert found["valid_units"] == expected["eval_units"]
    trainer.train()
    units = trainer.state.log_history[0]["units"]
    trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    trainer.train()
    steps = [line for line in trainer.state.log_history if "units" in line]
    assert steps[-2]["units"] == units


def test_a_full_model_without_reference_is_refused(directory, tokenizer, tmp_path):
    """Before the first step, where records are at hand; a collator may bring references."""
    message = "give ref_model=, or ref_logps in every record"
    with pytest.raises(ValueError, match=message):
        make_trainer(directory, tokenizer, tmp_path, ref_model=None)
    given = {"ref_model": None, "data_collator": FeedbackCollator(tokenizer)}
    trainer = make_trainer(directory, tokenizer, tmp_path, **given)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_cached_references_replace_the_model(directory, tokenizer, tmp_path):
    records = make_records("pairs", 8)
    truth = make_trainer(directory, tokenizer, tmp_path, records)
    truth.train()
    collate, reference = FeedbackCollator(tokenizer), truth.ref_model
    for record in records:
        batch = collate([record])
        del batch["feedback"]
        with torch.no_grad():
            record["ref_logps"] = reference(**batch, una="responses").logps.tolist()
    trainer = make_trainer(directory, tokenizer, tmp_path, records, ref_model=None)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(truth), rel=1e-6)


def test_a_run_goes_on_from_its_checkpoint(directory, tokenizer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = make_trainer(directory, tokenizer, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(directory, tokenizer, tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(map(torch.equal, saved.parameters(), whole.model.parameters()))


def test_objectives_reach_the_loss(directory, tokenizer, tmp_path):
    records = [dict(record, weight=1.0) for record in make_records("pairs", 8)]
    changes = {"max_steps": 1, "per_device_train_batch_size": 8}
    usual = make_trainer(directory, tokenizer, tmp_path, records, **changes)
    usual.train()
    squared = Objective(pair="squared", beta=0.5)
    margin = [dict(record, margin=2.0) for record in records]
    other = make_trainer(directory, tokenizer, tmp_path, margin, objective=squared, **changes)
    other.train()
    assert losses(usual) == pytest.approx([0.6931472], rel=1e-6)
    assert losses(other) == pytest.approx([4.0], rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"compute_metrics": print}, "compute_metrics is not served"),
        ({"compute_loss_func": print}, "compute_loss_func is not served"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not served"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not served"),
        (
            {
                "use_liger_kernel": True,
                "liger_kernel_config": {"fused_linear_cross_entropy": True},
            },
            "fused_linear_cross_entropy=True replaces the forward",
        ),
    ],
)
def test_what_would_not_be_read_is_refused(directory, tokenizer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(directory, tokenizer, tmp_path, **changes)


def test_models_that_cannot_be_trained_are_refused(directory, tokenizer, tmp_path):
    model = load(directory)
    with pytest.raises(ValueError, match="ref_model shares model.embed_tokens.weight with"):
        make_trainer(directory, tokenizer, tmp_path, model=model, ref_model=model)
    with pytest.raises(ValueError, match="give model=, a loaded model"):
        UNATrainer(None, arguments(tmp_path), processing_class=tokenizer)
    without = FeedbackCollator(tokenizer)

    def collate(rows: list) -> dict:
        batch = without(rows)
        del batch["feedback"]
        return batch

    trainer = make_trainer(directory, tokenizer, tmp_path, data_collator=collate)
    with pytest.raises(ValueError, match="a batch has no feedback"):
        trainer.train()


@pytest.mark.parametrize("family", ["MixtralConfig", "JetMoeConfig"])
def test_the_loss_of_routers_has_the_coefficient_of_its_family(tokenizer, tmp_path, family):
    """JetMoe's config has another name for it."""
    fields = FAMILIES["JetMoeConfig"] if "Jet" in family else SMALL | MIXTRAL
    name = "aux_loss_coef" if "Jet" in family else "router_aux_loss_coef"
    fields = fields | {"output_router_logits": True, "vocab_size": len(tokenizer)}
    records = make_records("pairs", 2)
    seen = []
    for coefficient in (0.0, 5.0):
        model = build(family, fields | {name: coefficient})
        trainer = make_trainer(
            None, tokenizer, tmp_path, records, model, ref_model=copy.deepcopy(model), max_steps=1
        )
        trainer.train()
        seen.append(losses(trainer)[0])
    assert seen[1] - seen[0] > 1.0


class Stream(IterableDataset):
    def __init__(self, records: list) -> None:
        self.records = records

    def __iter__(self):
        return iter(copy.deepcopy(self.records))


def test_streams_are_not_cut_by_rows(directory, tokenizer, tmp_path, monkeypatch):
    """accelerate would join the batches of all ranks, and cut them by rows: feedback is no row."""
    records = Stream(make_records("pairs", 8))
    trainer = make_trainer(directory, tokenizer, tmp_path, records)
    trainer.train()
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    joined = {"accelerator_config": {"dispatch_batches": True}}
    listed = make_records("pairs", 8)
    for given, changes in ((records, {}), (listed, joined), (listed, {"eval_dataset": records})):
        with pytest.raises(ValueError, match='"dispatch_batches": False'):
            make_trainer(directory, tokenizer, tmp_path, given, **changes)
    with pytest.raises(ValueError, match='"dispatch_batches": False'):
        trainer.evaluate(records)


def test_lengths_of_records_are_read_or_asked_for(directory, tokenizer, tmp_path):
    """The Trainer orders by the lengths of input_ids, which records have not."""
    datasets = pytest.importorskip("datasets")
    records = make_records("pairs", 8)
    measured = [dict(record, length=len(record["prompt"])) for record in records]
    dataset = datasets.Dataset.from_list(measured)
    for strategy in ("group_by_length", "batch_rebalance"):
        changes = {"train_sampling_strategy": strategy, "eval_dataset": records}
        with pytest.raises(ValueError, match="needs the lengths of records: .*'length'"):
            make_trainer(directory, tokenizer, tmp_path, records, **changes)
        trainer = make_trainer(directory, tokenizer, tmp_path, dataset, **changes)
        trainer.train()
        assert trainer.evaluate()["eval_units"] == 8


def test_evaluation_leaves_no_record_out(directory, tokenizer, tmp_path):
    """A last batch that is not full is no reason to drop records."""
    records = make_records("pairs", 5)
    changes = {"eval_dataset": records, "per_device_eval_batch_size": 3}
    trainer = make_trainer(
        directory, tokenizer, tmp_path, records, dataloader_drop_last=True, **changes
    )
    assert trainer.evaluate()["eval_units"] == 5
    assert trainer.predict(records[:2]).metrics["test_units"] == 2
    assert trainer.evaluate([]).get("eval_units", 0) == 0
