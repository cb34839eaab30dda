"""Gradients of a patched model under a wrapper: a worker of ranks.py, imported for one process.

Its argument is a directory OUT. Writes OUT/<wrapper>.pt: the gradients, whole, after four
micro-batches per rank. Then trainers run on the model in OUT/model: OUT/<trainer>.json holds their
logged steps, OUT/una_trainer.pt the weights of UNATrainer, and OUT/evaluations.json its metrics.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from embedded import make_batch
from families import build
from tiny import make_records
from una_fast import Feedback, Objective
from una_fast.attention.probe import randomize_weights
from una_fast.integrations.hf import UNATrainer, patch_model
from una_fast.integrations.trl import UNADPOTrainer

RANKS, MICRO_BATCHES = 2, 4
# Batch rows, and units, of every micro-batch; the last one of rank 1 has responses and no unit.
SIZES = ((4, 3, 5, 2), (2, 5, 3, 4))
WRAPPERS = ("ddp", "fsdp1", "fsdp1_head", "fsdp2", "fsdp2_head", "fsdp2_tied", "tokens", "lora")


def micro_batch(rank: int, number: int) -> tuple[dict[str, Tensor], Feedback, Tensor]:
    """Return a ragged batch, its feedback, and reference log-probs."""
    generator = torch.Generator().manual_seed(10 * rank + number)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    prompts = [tuple(draw(5, 90, size)) for size in (3, 6)]
    rows = []
    for row in range(SIZES[rank][number]):
        size = draw(1, 8, 1)[0]
        rows.append((prompts[row % 2], tuple(draw(5, 90, size))))
    batch = make_batch(rows)
    count = len(rows)
    if (rank, number) == (1, 3):
        feedback = Feedback.merge([])
    else:
        scores = [0.1 + 0.2 * (row % 4) for row in range(1, count)]
        feedback = Feedback.merge(
            [Feedback.pairs([0], [1]), Feedback.scores(range(1, count), scores)]
        )
    return batch, feedback, -3.0 - torch.rand(count, generator=generator).double()


def all_units() -> int:
    batches = [micro_batch(rank, n) for rank in range(RANKS) for n in range(MICRO_BATCHES)]
    return sum(feedback.num_units for _, feedback, _ in batches)


def make_model(wrapper: str) -> nn.Module:
    """Return a patched model, the same on every rank."""
    torch.manual_seed(0)
    model = patch_model(build("LlamaConfig tied" if "tied" in wrapper else "LlamaConfig"))
    if wrapper == "lora":
        import peft

        options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(model, options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Wrap a model for two ranks."""
    if wrapper in ("ddp", "tokens", "lora"):
        return DistributedDataParallel(model)
    if wrapper.startswith("fsdp1"):
        kinds = {LlamaDecoderLayer} | ({nn.Linear} if "head" in wrapper else set())
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(kinds),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if "head" in wrapper:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loss_of(model: nn.Module, wrapper: str, rank: int, number: int, units: int) -> Tensor:
    """Return the share of a micro-batch in the loss of the step."""
    batch, feedback, reference = micro_batch(rank, number)
    if wrapper == "tokens":
        logps = model(**batch, una="tokens").logps
        weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        return (logps * weights).sum() / units
    objective = Objective(beta=0.2)
    out = model(
        **batch, feedback=feedback, ref_logps=reference, objective=objective, num_units=units
    )
    return out.loss


def whole(tensor: Tensor | None) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor.detach().clone()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradients by the names of the unwrapped model."""
    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    summon: Any = nullcontext()
    if is_fsdp1:
        summon = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
    with summon:
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
                found[plain] = whole(parameter.grad)
    return found


def one_process(wrapper: str) -> dict[str, Tensor]:
    """Return the gradients of the same step in one process."""
    model = make_model(wrapper)
    for rank in range(RANKS):
        for number in range(MICRO_BATCHES):
            loss_of(model, wrapper, rank, number, all_units()).backward()
    return gradients_of(model)


# --- trainers -------------------------------------------------------------------------------------


def una_trainer(out: Path, ranks: int) -> UNATrainer:
    """Train with UNATrainer: steps of four records of unequal numbers of units, in batches of one.

    out: with the model
    ranks: of the run
    """
    return train(
        UNATrainer,
        TrainingArguments,
        out,
        make_records("mixed", 12),
        processing_class=AutoTokenizer.from_pretrained(out / "model"),
        ref_model=load(out),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // ranks,
        accelerator_config={"dispatch_batches": False},
        dataloader_drop_last=True,
    )


class Stream(IterableDataset):
    """Records without a length."""

    def __init__(self, records: list) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Any]:
        return iter(self.records)


def evaluations(trainer: UNATrainer) -> list[dict[str, float]]:
    """Return the metrics of seven records, and of one, in batches that no number of ranks fills."""
    # A record has one unit, or three.
    several, pairs = make_records("several", 4), make_records("pairs", 3)
    records = [each for both in itertools.zip_longest(several, pairs) for each in both if each]
    found = []
    for size in (1, 2, 3):
        trainer.args.per_device_eval_batch_size = size
        for dataset in (records, Stream(records), records[:1]):
            metrics = trainer.evaluate(dataset)
            timed = ("runtime", "_per_second")
            found.append({k: v for k, v in metrics.items() if not k.endswith(timed)})
    return found


def dpo_trainer(kind: type, out: Path) -> Any:
    """Train with TRL's DPOTrainer, or ours in its place."""
    return train(
        kind,
        functools.partial(trl.DPOConfig, bf16=False),
        out,
        Dataset.from_list(make_records("pairs", 12)),
        processing_class=AutoTokenizer.from_pretrained(out / "model"),
        ref_model=load(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )


def objective_trainer(out: Path, ranks: int) -> UNADPOTrainer:
    """Train TRL's DPOTrainer on an objective, in steps of four pairs; every third has a score.

    out: with the model
    ranks: of the run
    """
    records = Dataset.from_list(make_records("pairs", 12))
    scores = [0.9 if number % 3 == 0 else None for number in range(12)]
    records = records.add_column("chosen_score", scores)
    torch.manual_seed(1)
    return train(
        UNADPOTrainer,
        functools.partial(trl.DPOConfig, bf16=False),
        out,
        records,
        processing_class=AutoTokenizer.from_pretrained(out / "model"),
        ref_model=randomize_weights(load(out)),
        objective=Objective(beta=0.1),
        eval_dataset=records.select(range(5)),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2 // ranks,
        eval_strategy="epoch",
    )


def load(out: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)


def train(kind: type, config: Any, out: Path, records: Any, **options: Any) -> Any:
    """Take three unclipped steps of SGD; return the trainer.

    kind: of the trainer
    config: makes its arguments
    out: with the model
    records: the dataset
    options: of the trainer, and of its arguments
    """
    names = ("processing_class", "ref_model", "objective", "eval_dataset")
    of_trainer = {name: options.pop(name) for name in names if name in options}
    arguments = config(
        output_dir=str(out / "trained"),
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = kind(model=load(out), args=arguments, train_dataset=records, **of_trainer)
    trainer.train()
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[dict[str, float]]:
    """Return the lines of a trainer's log with a name: steps, or evaluations."""
    return [line for line in trainer.state.log_history if name in line]


def run_trainers(out: Path, rank: int) -> None:
    """Run the trainers on this rank, and write what they logged."""
    found = {"una_trainer": una_trainer(out, RANKS)}
    for name, kind in (("trl", trl.DPOTrainer), ("ours", UNADPOTrainer)):
        found[name] = dpo_trainer(kind, out)
    found["objective"] = objective_trainer(out, RANKS)
    evaluated = evaluations(found["una_trainer"])
    if rank == 0:
        (out / "evaluations.json").write_text(json.dumps(evaluated))
        of_objective = logged(found["objective"], "eval_loss")
        (out / "of_objective.json").write_text(json.dumps(of_objective))
        for name, trainer in found.items():
            (out / f"{name}.json").write_text(json.dumps(logged(trainer)))
        trained = found["una_trainer"].accelerator.unwrap_model(found["una_trainer"].model)
        torch.save(trained.state_dict(), out / "una_trainer.pt")


def main() -> None:
    """Run every wrapper on this rank, then the trainers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for wrapper in WRAPPERS:
        model = wrap(make_model(wrapper), wrapper)
        for number in range(MICRO_BATCHES):
            last = number == MICRO_BATCHES - 1
            waits = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if waits else nullcontext():
                # DDP and FSDP average over ranks what is a sum here.
                (RANKS * loss_of(model, wrapper, rank, number, all_units())).backward()
        found = gradients_of(model)
        if rank == 0:
            torch.save(found, Path(sys.argv[1]) / f"{wrapper}.pt")
    run_trainers(Path(sys.argv[1]), rank)
    dist.destroy_process_group()
