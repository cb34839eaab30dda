"""transformers' Trainer on the UNA loss: its loop, callbacks, checkpoints and resume are its own.

Units are counted over the accumulation window and over all ranks, so that N batches of one step, on
any number of ranks, have the gradient of one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from una_fast.distributed import World
from una_fast.feedback import Feedback
from una_fast.integrations.hf.collator import FeedbackCollator
from una_fast.integrations.hf.evaluation import UNCOUNTED, Filled, RecordsAlone, filled
from una_fast.integrations.hf.form import inner_model
from una_fast.integrations.hf.patch import is_patched, patch_model
from una_fast.integrations.hf.router import router_coefficient
from una_fast.integrations.hf.scored import UnaModelOutput, Uncast
from una_fast.integrations.hf.units import DividesByUnits, feedback_of
from una_fast.layout import IGNORED
from una_fast.losses import Objective
from una_fast.model.adapter import adapter_off, has_adapter, no_reference
from una_fast.model.dropout import remove_dropout
from una_fast.train.metrics import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_LOSS = ("feedback", "ref_logps", UNCOUNTED)
# Ways to order records by the lengths that the Trainer finds in them.
_BY_LENGTH = ("group_by_length", "batch_rebalance")


_NO_REFERENCE = (
    "a fully trained model needs its reference: give ref_model=, or ref_logps in every record"
)


class UNATrainer(DividesByUnits, Trainer):
    """Train a causal language model on pairs, labels and scores, with transformers' Trainer.

        UNATrainer(model, args, ref_model=reference, train_dataset=records,
                   processing_class=tokenizer).train()

    A batch has input_ids, attention_mask, labels (-100 outside the responses), feedback over the
    rows of the batch, and optionally ref_logps. FeedbackCollator makes such batches from records.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        ref_model: nn.Module | None = None,
        objective: Objective | None = None,
        pack: str | bool | None = None,
        workspace_mb: float | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        """Patch the model, and build the trainer.

        model: causal language model, or PeftModel; its dropout is set to 0, as log-ratios compare
            deterministic log-probs
        args: of the Trainer
        ref_model: frozen reference; None: the model with its adapter off, or ref_logps of the
            batches
        objective: forms of the losses; None: Objective()
        pack, workspace_mb: as of patch_model; with neither, a model that is patched already keeps
            its options
        data_collator: makes the batches; None: FeedbackCollator of the tokenizer
        processing_class: tokenizer, saved with the model
        kwargs: of transformers.Trainer: datasets, callbacks, optimizers

        ValueError, naming the argument, for settings that would give a wrong loss.
        """
        self.objective = objective or Objective()
        if not isinstance(model, nn.Module):
            raise ValueError("give model=, a loaded model: model_init is not served")
        args = args or TrainingArguments()
        _refuse_unread(args, kwargs)
        _check_trained(model)
        if ref_model is not None:
            _check_reference(ref_model, model, args)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("give processing_class= (a tokenizer), or a data_collator=")
            data_collator = FeedbackCollator(processing_class, objective=self.objective)
            if ref_model is None and not has_adapter(model):
                _refuse_uncached(kwargs.get("train_dataset"))
        remove_dropout(model)
        super().__init__(
            _patched(model, pack, workspace_mb),
            args,
            data_collator=data_collator,
            processing_class=processing_class,
            **kwargs,
        )
        evaluated = self.eval_dataset
        evaluated = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        self._refuse_joined_batches(self.train_dataset, *evaluated)
        self._say_divided()
        self.can_return_loss = True
        self.ref_model = None
        self._is_checked = False
        if ref_model is not None:
            if self.is_deepspeed_enabled:
                raise ValueError(
                    "a ref_model is not sharded by DeepSpeed here: give ref_logps in every "
                    "record, or train an adapter"
                )
            frozen = _patched(ref_model, pack, workspace_mb).eval().requires_grad_(False)
            known = list(self.accelerator._models)
            self.ref_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)
            # The Trainer takes any model here for its own, and would evaluate without preparing it.
            self.accelerator._models[:] = known
        accelerator = self.accelerator
        self.world = World(accelerator.process_index, accelerator.num_processes, accelerator.device)
        self._meters = {True: self._new_meter(), False: self._new_meter()}

    def _new_meter(self) -> Meter:
        return Meter(self.objective, self.accelerator.device)

    def _refuse_joined_batches(self, *datasets: Any) -> None:
        """Refuse loaders that join the batches of all ranks, and cut the whole by rows."""
        if self.accelerator.num_processes == 1:
            return
        dispatch = self.args.accelerator_config.dispatch_batches
        streams = any(isinstance(dataset, IterableDataset) for dataset in datasets)
        if dispatch or (streams and dispatch is None):
            raise ValueError(
                "batches of a stream are joined and cut by rows between the ranks, and feedback is "
                'not; set accelerator_config={"dispatch_batches": False}'
            )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; DeepSpeed would cast the reference's sums, too."""
        kept = {name: inputs[name] for name in _OF_LOSS if inputs.get(name) is not None}
        others = {name: value for name, value in inputs.items() if name not in _OF_LOSS}
        return {**super()._prepare_inputs(others), **kept}

    # Columns of records are read by the collator.
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        return RecordsAlone(data_collator)

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        """Return the Trainer's loader; of evaluation, with fillers in the place of repeats."""
        self._refuse_joined_batches(dataset)
        if not is_training:
            dataset = filled(dataset, self.args.eval_batch_size * self.accelerator.num_processes)
        return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)

    # The Trainer would order evaluation, too, by lengths that records need not have.
    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    # --- loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch: its units' sum, divided by the units of the step.

        model: wrapped
        inputs: a batch
        return_outputs: return the UnaModelOutput too
        num_items_in_batch: units of the step; None: those of the batch
        """
        tokens = {name: value for name, value in inputs.items() if name not in _OF_LOSS}
        feedback = feedback_of(inputs)
        ref_logps = inputs.get("ref_logps")
        if ref_logps is None:
            ref_logps = self.reference_logps(model, tokens)
        out = model(
            **tokens,
            feedback=feedback,
            ref_logps=Uncast(ref_logps),
            objective=self.objective,
            num_units=num_items_in_batch,
        )
        if not isinstance(out, UnaModelOutput):
            raise ValueError(
                "the model's forward gives no UNA loss any more; call patch_model on it again"
            )
        if not inputs.get(UNCOUNTED):
            self._meters[model.training].add(_Counted.of(tokens, feedback), out)
        router_loss = None if out.aux_loss is None else self._router_loss(out)
        loss = self._part_of_step(out.loss, router_loss, feedback.num_units, num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def _router_loss(self, out: UnaModelOutput) -> Tensor:
        """Return the load-balancing loss times its coefficient."""
        model = inner_model(self.accelerator.unwrap_model(self.model))
        coefficient = router_coefficient(model)
        if coefficient is None:
            raise ValueError(
                f"the config of {type(model).__name__} has no coefficient of the load-balancing "
                "loss; set router_aux_loss_coef in it, or output_router_logits=False"
            )
        return coefficient * out.aux_loss

    @torch.no_grad()
    def reference_logps(self, model: nn.Module, tokens: dict[str, Any]) -> Tensor:
        """Return the [B] log-probs of the reference.

        model: the policy, wrapped
        tokens: a batch without its feedback

        ValueError where there is neither a reference nor an adapter to switch off.
        """
        if self.ref_model is not None:
            return self.ref_model(**tokens, una="responses").logps
        inside = self.accelerator.unwrap_model(model)
        if not has_adapter(inside):
            raise ValueError(_NO_REFERENCE)
        if not self._is_checked:
            self._check_adapter(inside)
        with adapter_off(inside):
            return model(**tokens, una="responses").logps

    def _check_adapter(self, model: nn.Module) -> None:
        """Raise ValueError for a PeftModel that is no reference where its adapter is off."""
        reason = no_reference(model)
        if reason is not None:
            raise ValueError(
                f"the model without its adapter is no reference: {reason}; give ref_model=, or "
                "ref_logps in every record"
            )
        self._is_checked = True

    # --- evaluation and metrics ---

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._meters[True] = self._new_meter()  # of this start, and of no earlier one
        return super()._inner_training_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch; there are no logits.

        model: wrapped
        inputs: a batch
        prediction_loss_only, ignore_keys: of the Trainer; nothing but the loss is predicted
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach().float(), None, None

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's loop, and add the metrics: means over all units of all ranks.

        dataloader: of get_eval_dataloader or get_test_dataloader
        args, kwargs: of the Trainer
        """
        self._meters[False] = self._new_meter()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        given = inspect.signature(super().evaluation_loop).bind(dataloader, *args, **kwargs)
        prefix = given.arguments.get("metric_key_prefix", "eval")
        for name, value in self._meters[False].take(self.world).items():
            output.metrics[f"{prefix}_{name}"] = value
        if isinstance(dataloader.dataset, Filled):
            output = output._replace(num_samples=len(dataloader.dataset.records))
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the metrics of the steps since the last log."""
        if "loss" in logs:
            found = self._meters[True].take(self.world)
            logs = {**logs, **{name: value for name, value in found.items() if name != "loss"}}
        super().log(logs, *args, **kwargs)


def _patched(model: nn.Module, pack: str | bool | None, workspace_mb: float | None) -> nn.Module:
    """Return a patched model; without options, one that was patched before keeps its own.

    model, pack, workspace_mb: as of UNATrainer
    """
    if pack is None and workspace_mb is None and is_patched(model):
        return model
    return patch_model(model, pack="auto" if pack is None else pack, workspace_mb=workspace_mb)


def _refuse_unread(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of the Trainer that this trainer would not read.

    args: of the Trainer; liger's layers stay, without its cross-entropy in place of our forward
    kwargs: further arguments of the Trainer
    """
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not served: there are no logits, and the loss is UNA's")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not served: give pairs a target below 1")
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "neftune_noise_alpha is not served: log-ratios compare deterministic log-probs, and "
            "the noise would reach the policy alone"
        )
    if args.train_sampling_strategy in _BY_LENGTH:
        _check_lengths(args, kwargs.get("train_dataset"))
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would split batches by rows: start with torchrun, "
            "or show one GPU (CUDA_VISIBLE_DEVICES)"
        )
    if args.use_liger_kernel:
        liger = args.liger_kernel_config or {}
        if liger.get("fused_linear_cross_entropy"):
            raise ValueError(
                "liger_kernel_config fused_linear_cross_entropy=True replaces the forward that "
                "gives log-probs; leave it out"
            )
        args.liger_kernel_config = {**liger, "fused_linear_cross_entropy": False}


def _check_trained(model: nn.Module) -> None:
    """Raise ValueError for a model that no step would change, or none as of one batch."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model requires a gradient; load an adapter with "
            "is_trainable=True, or set requires_grad"
        )
    adapters = getattr(model, "peft_config", None) or {}
    if any(config.peft_type == "ADALORA" for config in adapters.values()):
        raise ValueError(
            "AdaLoRA adds its penalty to the loss of every micro-batch, and steps would depend on "
            "how they are split; use another adapter"
        )


def _check_reference(reference: nn.Module, model: nn.Module, args: TrainingArguments) -> None:
    """Raise ValueError for a reference that is trained, or that computes in another precision.

    reference: as given
    model: to be trained
    args: of the Trainer
    """
    own = {id(parameter) for parameter in reference.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in own:
            raise ValueError(
                f"ref_model shares {name} with the model, which is trained: give a copy of it "
                "(copy.deepcopy); for an adapter leave ref_model out"
            )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name} casts the model for an evaluation, and not its reference; use "
                f"{name[:4]}=True"
            )


def _refuse_uncached(dataset: Any) -> None:
    """Raise ValueError if the first record of a dataset has no ref_logps.

    dataset: of training; a stream passes
    """
    if dataset is None or isinstance(dataset, IterableDataset) or not len(dataset):
        return
    if isinstance(dataset[0], Mapping) and "ref_logps" not in dataset[0]:
        raise ValueError(_NO_REFERENCE)


def _check_lengths(args: TrainingArguments, dataset: Any) -> None:
    """Raise ValueError if the Trainer finds no lengths to order a dataset by.

    args: of the Trainer
    dataset: of training; of a stream, the Trainer says that it keeps the order
    """
    if dataset is None or isinstance(dataset, IterableDataset) or not len(dataset):
        return
    if args.length_column_name in getattr(dataset, "column_names", ()):
        return
    if isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        return
    raise ValueError(
        f"train_sampling_strategy={args.train_sampling_strategy!r} needs the lengths of records: "
        f"give a datasets.Dataset with a column {args.length_column_name!r} "
        "(length_column_name) of their tokens, or leave it out"
    )


@dataclass(frozen=True)
class _Counted:
    """What a Meter reads of a batch."""

    feedback: Feedback
    input_ids: Tensor
    targets: Tensor
    num_tokens: int

    @staticmethod
    def of(tokens: dict[str, Any], feedback: Feedback) -> _Counted:
        """Count the tokens of a batch."""
        mask, labels = tokens.get("attention_mask"), tokens["labels"]
        scored = labels[labels != IGNORED]
        # Labels stand for the ids, which are counted alone: a batch may have inputs_embeds.
        num_tokens = labels.numel() if mask is None else int(mask.sum())
        return _Counted(feedback, labels, scored, num_tokens)
