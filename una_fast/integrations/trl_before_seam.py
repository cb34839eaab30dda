"""TRL 1.9 to 1.14: TRL's own losses and metrics, on log-probs made without logits.

TRL 1.15 has one function for every log-prob, and `una_fast.integrations.trl` replaces the function.
Older `_compute_loss` methods call `model(...)`, slice `outputs.logits`, and ask the slice for five
numbers per token: log-prob of the target, entropy, mean logit, most likely token, and under WPO the
sum of squared probabilities. TRL's method runs unchanged; three of its inputs are replaced:

    model(...)         a hook adds labels and `una="tokens"` to the call; the head of
                       `una_fast.integrations.hf` answers with one number per scored token
    outputs.logits     a stand-in, `Logits`: holds these numbers and answers from them
    selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy
                       read a `Logits` too

No formula of TRL is repeated here. Log-probs are computed inside the forward of the wrapped model,
where DDP and FSDP see them. Never stored: [B, T, V].

Vision-language models, prompt tuning and heads refused by the probe run on TRL's logits. The log
gives the reason once, and `una_calls()` counts the calls.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput
from trl import DPOTrainer, KTOTrainer
from trl.trainer import utils as trl_utils

from una_fast.integrations.calls import fall_back, una_calls
from una_fast.integrations.hf import patch_model
from una_fast.integrations.trl.objective import (
    OnFeedback,
    OnLabels,
    OnPairs,
    check_objective,
    without_feedback,
)
from una_fast.integrations.versions import TESTED, check_version
from una_fast.layout import IGNORED
from una_fast.losses import Objective
from una_fast.model.head_forward import CannotBeScored

__all__ = ["UNADPOTrainer", "UNAKTOTrainer", "una_calls"]

METRICS = ("entropy", "mean_logits", "is_top1")  # TRL logs them for the policy at every step
READERS = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
# What TRL's methods ask of a model beside log-probs, by the member of its output.
_OF_TOKENS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

_WITHOUT_LAST = [(rows, slice(None, -1), slice(None)) for rows in (..., slice(None))]


class _StandIn:
    """Stands for logits, and refuses by name every question without an answer."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f".{name}")

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """Answer a function of torch on logits, the first argument."""
        name = getattr(func, "__name__", repr(func))
        if not args or not isinstance(args[0], _StandIn):
            _refuse(name)
        return args[0]._answer(func, name, args[1:], kwargs or {})

    def _answer(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        _refuse(name)


class WholeLogits(_StandIn):
    """Stands for the logits of all positions, [B, T, V]; the last is never computed."""

    def __init__(self, logits: Logits) -> None:
        """Take the logits of the positions 0 .. T - 2."""
        self.logits = logits

    def __getitem__(self, key: Any) -> Logits:
        if key not in _WITHOUT_LAST:
            _refuse(f"[{key}]")
        return self.logits

    @property
    def device(self) -> torch.device:
        return self.logits.device


class Logits(_StandIn):
    """Stands for logits [..., V] without having them, and answers TRL's questions.

    log_probs: [...] float32, log-probs of the targets; carry the gradient
    targets: [...] int64, -100 where no token is scored
    stats: {name: [...]}, the statistics of METRICS, and "log_sum_sq_probs" under WPO

    Logits are defined up to a constant per row. `torch.logsumexp` answers for normalised logits:
    0, and log sum p^2 for doubled logits.

    NotImplementedError for any further question: about different targets, along another dimension,
    or with more arguments.
    """

    def __init__(self, log_probs: Tensor, targets: Tensor, stats: dict[str, Tensor]) -> None:
        self.log_probs = log_probs
        self.targets = targets
        self.stats = stats

    def _each(self, take: Callable[[Tensor], Tensor]) -> Logits:
        """Return a part of the rows: `take` applied to every tensor."""
        stats = {name: take(values) for name, values in self.stats.items()}
        return Logits(take(self.log_probs), take(self.targets), stats)

    def __getitem__(self, key: Any) -> Logits:
        # The numbers are those of positions 0 .. T - 2, so `[..., :-1, :]` has nothing to drop.
        if not isinstance(key, Tensor):
            _refuse(f"[{key}]")
        return self._each(lambda values: values[key])

    def detach(self) -> Logits:
        return self._each(Tensor.detach)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Logits, ...]:
        dim = self._of_rows("chunk", dim)
        parts = torch.arange(self.size(dim), device=self.device).chunk(chunks)
        return tuple(self.index_select(dim, part) for part in parts)

    def index_select(self, dim: int, index: Tensor) -> Logits:
        dim = self._of_rows("index_select", dim)
        return self._each(lambda values: values.index_select(dim, index))

    def size(self, dim: int | None = None) -> int:
        return self.log_probs.size(self._of_rows("size", dim))

    def mean(self, *args: Any, **kwargs: Any) -> Tensor:
        self.check_vocabulary("mean", args, kwargs)
        return self.stats["mean_logits"]

    def argmax(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the target where the target is the most likely token, and -1 elsewhere."""
        self.check_vocabulary("argmax", args, kwargs)
        return torch.where(self.stats["is_top1"].bool(), self.targets, -1)

    def __rmul__(self, factor: float) -> DoubledLogits:
        if factor != 2.0:
            _refuse(f"{factor} *")
        return DoubledLogits(self)

    @property
    def device(self) -> torch.device:
        return self.log_probs.device

    def _answer(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if func is torch.logsumexp:
            self.check_vocabulary(name, args, kwargs)
            return torch.zeros_like(self.log_probs)
        if func is F.cross_entropy:
            return self._cross_entropy(*args, **kwargs)
        _refuse(name)

    def _cross_entropy(self, target: Tensor, **settings: Any) -> Tensor:
        """Return the mean over the scored rows of [rows, V].

        target: [rows]
        settings: of F.cross_entropy; refused unless equal to the defaults
        """
        defaults = inspect.signature(F.cross_entropy).parameters
        changed = [name for name, value in settings.items() if value != defaults[name].default]
        # Of more dimensions torch takes the second for the vocabulary.
        if changed or self.log_probs.dim() != 1:
            _refuse(f"cross_entropy({', '.join(changed)})")
        self.check_targets("cross_entropy", target)
        return -self.log_probs[target != IGNORED].mean()

    def check_targets(self, what: str, targets: Tensor) -> None:
        """Refuse targets of scored tokens, if they differ from the targets of the log-probs.

        what: asked for
        targets: [...]
        """
        if targets.shape == self.targets.shape:
            other = (targets != self.targets) & (self.targets != IGNORED)
            if not other.any():
                return
        _refuse(f"{what} of other targets")

    def check_vocabulary(self, what: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse every question but the plain question along the vocabulary.

        what: asked for
        args, kwargs: of the question, beside the logits
        """
        last = self.log_probs.dim()
        if [*args, *kwargs.values()] not in ([-1], [last]) or set(kwargs) - {"dim"}:
            words = [repr(value) for value in args]
            words += [f"{name}={value!r}" for name, value in kwargs.items()]
            _refuse(f"{what}({', '.join(words)})")

    def _of_rows(self, what: str, dim: int | None) -> int:
        """Return the number of a dimension of the log-probs; refuse the vocabulary.

        what: asked for
        dim: of the logits
        """
        rows = self.log_probs.dim()
        if dim in range(rows):
            return dim
        if dim in range(-rows - 1, -1):
            return dim + rows + 1
        _refuse(f"{what}({dim})")


class DoubledLogits(_StandIn):
    """Stands for 2 * logits, and answers `torch.logsumexp` alone: log sum p^2."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits

    def _answer(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if func is not torch.logsumexp:
            _refuse(name)
        self.logits.check_vocabulary(name, args, kwargs)
        return self.logits.stats["log_sum_sq_probs"]


def _refuse(what: str) -> NoReturn:
    releases = TESTED["trl_before_seam"].releases
    raise NotImplementedError(
        f"this TRL asks the logits for `{what}`, which una_fast does not compute; "
        f"it was tested with TRL {releases}. Use TRL's own trainer (axolotl: una_head: false)"
    )


@dataclass
class ScoredOutput(ModelOutput):
    """The output of a scored call; its fields pass through DDP, FSDP and accelerate.

    log_probs: [B, T - 1] float32
    targets: [B, T - 1] int64
    entropy, mean_logits, is_top1, log_sum_sq_probs: [B, T - 1], or None if not asked for
    aux_loss: [] load balancing of a mixture of experts, or None without router logits
    """

    log_probs: Tensor | None = None
    targets: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None

    @property
    def logits(self) -> WholeLogits:
        stats = {name: self[name] for name in _OF_TOKENS if name in self}
        return WholeLogits(Logits(self.log_probs, self.targets, stats))


class Scoring:
    """Scores the calls of a model on given input ids.

    dtype: of log-probs; sums of float64 are exact
    asked: [(input_ids [B, T], labels [B, T])], of the batch and, for KTO, of mismatched pairs
    stats: names of the policy's statistics
    seen: log-probs [B, T - 1] of the calls on the first of `asked`: policy, then reference
    aux_loss: [] of the policy's call, for a mixture of experts
    models: patched, whose calls are scored
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.models: list[nn.Module] = []
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.stats: tuple[str, ...] = ()
        self.seen: list[Tensor] = []
        self.aux_loss: Tensor | None = None

    @contextmanager
    def of(self, batch: dict[str, Any], stats: tuple[str, ...]) -> Iterator[None]:
        """Score calls on the ids of a batch of TRL's collators, and no other calls.

        batch: of TRL's collator
        stats: names of the policy's statistics
        """
        kinds = [kind for kind in ("", "KL_") if f"{kind}input_ids" in batch]
        self.asked = [_ids_and_labels(batch, kind) for kind in kinds]
        self.stats = stats
        self.seen, self.aux_loss = [], None
        # For the time of a batch: hooks that stay would be pickled and copied with the model.
        hooks = []
        try:
            for model in self.models:
                hooks.append(model.register_forward_pre_hook(self._ask, with_kwargs=True))
                hooks.append(model.register_forward_hook(self._answer, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.asked = []

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Let a call on `asked` give log-probs, as a hook before the forward."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        number = self._number(input_ids)
        if number is None:
            return None
        _, labels = self.asked[number]
        # TRL asks the policy first, and wants statistics of that call alone.
        is_policy = number == 0 and not self.seen
        kwargs = kwargs | {"input_ids": input_ids, "una": "tokens"}
        kwargs["labels"] = labels.to(input_ids.device)
        kwargs["stats"] = self.stats if is_policy else ()
        return (), kwargs

    def _answer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """Return the stand-in for the logits of a scored call, as a hook after the forward."""
        if kwargs.get("una") != "tokens":
            return out
        if self._number(kwargs["input_ids"]) == 0:
            if not self.seen:
                self.aux_loss = out.aux_loss
            self.seen.append(out.logps)
        log_probs = out.logps.to(self.dtype, copy=True)  # TRL writes zeros into it
        stats = {name: out[name] for name in kwargs["stats"]}
        targets = kwargs["labels"][:, 1:]
        return ScoredOutput(log_probs, targets, **stats, aux_loss=out.aux_loss)

    def _number(self, input_ids: Tensor | None) -> int | None:
        """Return the place in `asked` of the ids of a call; None for a call not to score."""
        numbered = [(number, ids) for number, (ids, _) in enumerate(self.asked)]
        for number, ids in numbered:
            if input_ids is ids:
                return number
        if input_ids is None:
            return None
        for number, ids in numbered:
            # A wrapper may have copied the ids.
            if torch.equal(ids, input_ids.to(ids.device)):
                return number
        return None


def _ids_and_labels(batch: dict[str, Any], kind: str) -> tuple[Tensor, Tensor]:
    """Return [B, T] ids and labels of TRL's batch, labels -100 outside the completions.

    kind: "" for the batch, "KL_" for KTO's mismatched pairs
    """
    ids = batch[f"{kind}input_ids"]
    mask = batch[f"{kind}completion_mask"] != 0
    return ids, ids.masked_fill(~mask, IGNORED)


def _read(name: str, theirs: Callable) -> Callable:
    """Return TRL's function of logits, made to read a `Logits` too."""

    def read(logits: Tensor | Logits, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(logits, Logits):
            return theirs(logits, *args, **kwargs)
        if name == "entropy_from_logits":
            return logits.stats["entropy"].detach()
        index = args[0] if args else kwargs["index"]
        logits.check_targets(name, index)
        if name == "selective_log_softmax":
            return logits.log_probs
        return logits.log_probs, logits.stats["entropy"].detach()

    return read


def check_no_seam() -> None:
    """Raise RuntimeError for TRL 1.15 and newer: its losses do not read logits."""
    if hasattr(trl_utils, "add_fused_lm_head"):
        raise RuntimeError(
            "this TRL has add_fused_lm_head: use the trainers of una_fast.integrations.trl, which "
            "serve trl >= 1.15; those of trl_before_seam serve TRL 1.9 to 1.14"
        )


@contextmanager
def _reading(trainer: object) -> Iterator[None]:
    """Let the READERS of TRL's module read a `Logits` too."""
    theirs = [cls for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.trainer.")]
    module = sys.modules[theirs[0].__module__]
    before = {name: vars(module)[name] for name in READERS if name in vars(module)}
    for name, function in before.items():
        setattr(module, name, _read(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


class UnaLogProbs(OnFeedback):
    """Mixin, listed before TRL's trainer: its log-probs come from una_fast.

    una_pack, una_workspace_mb: as of patch_model
    objective: losses in place of args.loss_type, on DPO's pairs or KTO's labels; None: TRL's own

    ValueError for `use_liger_kernel=True`, a second head, for `compute_metrics`, which needs
    logits, and for an objective beside settings of TRL's losses.
    """

    def __init__(
        self,
        *args: Any,
        una_pack: str | bool = "auto",
        una_workspace_mb: float | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        check_no_seam()
        check_version("trl_before_seam")
        self.una_options = {"pack": una_pack, "workspace_mb": una_workspace_mb}
        self.objective = objective
        self.una_refusal: str | None = None
        self._una_scoring: Scoring | None = None
        self._una_reference: nn.Module | None = None
        super().__init__(*args, **kwargs)
        if objective is not None:
            self._take_feedback()

    @property
    def ref_model(self) -> nn.Module | None:
        """Return the reference, as TRL set it."""
        return self._una_reference

    @ref_model.setter
    def ref_model(self, reference: nn.Module | None) -> None:
        # TRL sets the reference when the policy has its adapters, and before policy or reference
        # are wrapped: the one moment at which both can be patched. Later settings are wrapped ones.
        self._una_reference = reference
        if self._una_scoring is None:
            of_objective = self.objective is not None
            self._una_scoring = Scoring(torch.float64 if of_objective else torch.float32)
            self._una_check()
            self.una_refusal = self._una_patch(reference)
            if self.una_refusal and self.objective is not None:
                raise ValueError(f"objective needs una_fast's log-probs, but {self.una_refusal}")
            # TRL sets compute_metrics before, and computes references after.
            if self.compute_metrics is not None:
                self._una_refuse_logits()

    def _una_check(self) -> None:
        """Raise ValueError for arguments of TRL at odds with our head or objective."""
        if self.args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True replaces the head that una_fast replaces; set "
                "use_liger_kernel=False (axolotl: dpo_use_liger_kernel: false)"
            )
        if self.objective is not None:
            check_objective(self.objective, self.args, self.settings)

    def _una_patch(self, reference: nn.Module | None) -> str | None:
        """Patch both models, and let them be scored; return why not, or None."""
        if getattr(self, "_is_vlm", False):
            return "the model reads images"
        adapters = getattr(self.model, "peft_config", None) or {}
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            return "prompt learning puts virtual tokens before the prompt"
        models = [self.model] if reference is None else [self.model, reference]
        try:
            for model in models:
                patch_model(model, **self.una_options)
        except CannotBeScored as refusal:
            if self.una_options["pack"] is True:
                raise
            return str(refusal)
        self._una_scoring.models = models
        return None

    @contextmanager
    def _una_scored(self, inputs: dict[str, Any], stats: tuple[str, ...]) -> Iterator[None]:
        """Take the log-probs of a batch from una_fast, or count a batch of TRL's logits.

        inputs: batch of TRL's collator
        stats: names of the policy's statistics
        """
        if self.una_refusal:
            fall_back("TRL's head", self.una_refusal)
            yield
            return
        with _reading(self), self._una_scoring.of(inputs, stats):
            yield
        if not self._una_scoring.seen:
            fall_back("TRL's head", "the model was called on other ids than those of the batch")

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Compute TRL's reference log-probs; with an objective, sums in float64."""
        with self._una_scored(inputs, ()):
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weighted = getattr(self, "use_weighting", False)
        stats = (*METRICS, "log_sum_sq_probs") if weighted else METRICS
        own = without_feedback(inputs)
        with self._una_scored(own, stats):
            result = super()._compute_loss(model, own, return_outputs)
        if self.objective is None:
            return result
        loss = self._una_loss(inputs)
        return (loss, result[1]) if return_outputs else loss

    def _una_loss(self, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of `objective` on the log-probs read by TRL's method just before.

        inputs: batch of TRL's collator
        """
        scored = self._una_scoring
        policy, *reference = (values.double().sum(1) for values in scored.seen)
        ref_logps = reference[0] if reference else self._ref_logps(inputs)
        return self._loss_of_units(policy, ref_logps, inputs, scored.aux_loss)

    def _una_refuse_logits(self) -> None:
        """Raise ValueError for compute_metrics or predictions, unless TRL's logits are there."""
        if not self.una_refusal:
            raise ValueError(
                "compute_metrics and predict() need logits, which are never computed; leave "
                "compute_metrics out, or use TRL's own trainer (axolotl: una_head: false)"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Return the loss of an evaluation batch, without logits.

        model, inputs, prediction_loss_only, ignore_keys: as of transformers' Trainer
        """
        if not prediction_loss_only:
            self._una_refuse_logits()
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class PairLogProbs(UnaLogProbs, OnPairs):
    """Reads DPO's batches: the chosen half, then the rejected half."""


class LabelLogProbs(UnaLogProbs, OnLabels):
    """Reads KTO's batches: a completion and its label."""


class UNADPOTrainer(PairLogProbs, DPOTrainer):
    """TRL's DPOTrainer without logits, for TRL 1.9 to 1.14."""


class UNAKTOTrainer(LabelLogProbs, KTOTrainer):
    """TRL's KTOTrainer without logits, for TRL 1.9 to 1.14."""


def __getattr__(name: str) -> Any:
    if name in ("UNAGRPOTrainer", "UNARLOOTrainer"):
        raise ImportError(
            f"{name} needs TRL 1.15 or newer: from una_fast.integrations.trl import {name}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
