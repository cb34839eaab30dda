"""What a training step will need, before anything is loaded: peak memory by part, and flop.

The step itself is run, on tensors that have shapes and no memory (torch's fake tensors): the model is built from its
config alone, and its own forward, checkpointing, tiles and backward decide what lives when. LiveBytes counts it. So
there is no formula per architecture to go stale. Three things are stood in for, because they differ between devices or
look at numbers: the fused head (its plan is made as always; what it allocates is allocated), the attention kernel of a
GPU, and the optimizer (sizes of its state).

    peak = weights + optimizer state + max over the phases of the step of what it holds, the optimizer's own being
           gradients + temporaries
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from una_fast.capacity.stand_ins import PlannedHead, planned_attention
from una_fast.config import RunConfig
from una_fast.counters import FlopCounter, LiveBytes, memory_category
from una_fast.data.batch import Batch, collate, layout_tokens
from una_fast.data.examples import Example
from una_fast.feedback import Feedback
from una_fast.model.activations import decoder_layers
from una_fast.model.head_probe import HeadSpec
from una_fast.model.loading import model_and_adapter, outline, remove_dropout
from una_fast.model.lora import add_lora
from una_fast.model.policy import Policy, make_policy
from una_fast.model.scoring import match_autocast
from una_fast.optim import state_bytes, step_bytes
from una_fast.resolved import Facts, outline_of, resolve

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "head",
    "activations",
    "attention",
    "layer",
    "reference",
    "gathered",
)
"""Parts of the peak. activations: kept from forward to backward. layer: the one at work. gathered: FSDP's whole
weights of the layers at work."""


@dataclass(frozen=True)
class Row:
    """One prompt and its responses, in tokens."""

    prompt: int
    responses: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prompt < 1 or not self.responses or min(self.responses) < 1:
            raise ValueError(f"a row needs a prompt and responses of at least 1 token, not {self}")

    @property
    def tokens(self) -> int:
        """Of the packed row."""
        return self.prompt + sum(self.responses)

    def scaled(self, factor: float) -> Row:
        """The same proportions, `factor` times as long."""
        return Row(
            max(round(self.prompt * factor), 1),
            tuple(max(round(n * factor), 1) for n in self.responses),
        )

    def example(self) -> Example:
        """A record of this shape: a pair for two responses, scores otherwise."""
        count = len(self.responses)
        feedback = (
            Feedback.pairs([0], [1]) if count == 2 else Feedback.scores(range(count), [0.5] * count)
        )
        empty = [np.zeros(n, dtype=np.int32) for n in (self.prompt, *self.responses)]
        return Example(empty[0], tuple(empty[1:]), feedback, None, "planned")


Parts = dict[str, int]


@dataclass(frozen=True)
class StepMemory:
    """One forward and backward of a batch, with the optimizer behind it, on one device."""

    moments: dict[str, Parts]
    """Bytes of each of PARTS where each phase of the step holds most: reference, forward, backward of the first layers
    that it meets, of the last ones and of those between, and the optimizer's step."""
    host: int
    """Bytes in host memory at the most: offloaded activations and optimizer state."""
    flop: float
    """Of matrix products and packed attention, recomputation included; NaN where some are not counted: attention of
    padded batches, grouped products."""
    tokens: int
    """In the batch."""
    packed: bool

    @property
    def parts(self) -> Parts:
        """Bytes of each of PARTS at the peak."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """Bytes on the device at the most."""
        return sum(self.parts.values())


class StepTracer:
    """Plans steps of one run, from the config of its model."""

    def __init__(self, config: RunConfig, facts: Facts) -> None:
        """config: settings of the run. facts: device (which need not be there), ranks, model and records."""
        self.config, self.facts = config, facts
        self.device, self.world_size = facts.device, facts.ranks
        path, self.adapter = model_and_adapter(config.model)
        self.model_config = AutoConfig.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
        self.parameters = sum(p.numel() for p in outline_of(config).parameters())

    @property
    def packed(self) -> bool:
        """Whether batches are packed rows."""
        return resolve(self.config, self.facts).packed

    def rough_bytes(self, examples: Sequence[Example]) -> float:
        """Surely enough for a batch of a usual model, without looking: to spare small runs the plan."""
        config = self.model_config.get_text_config()
        if self.config.attn_implementation == "eager" or not hasattr(config, "hidden_size"):
            return math.inf
        width = 64 * config.hidden_size + 16 * max(
            getattr(config, "intermediate_size", 0) or 0, 4 * config.hidden_size
        )
        tokens = layout_tokens(examples, packed=False)
        workspace = resolve(self.config, self.facts).workspace
        return 24 * self.parameters + 4 * tokens * config.num_hidden_layers * width + workspace

    def estimate(self, examples: Sequence[Example], **options: Any) -> StepMemory:
        """`step` from two shallower models of the same layers, each moment continued in a straight line: faster."""
        total, period = (
            self.model_config.get_text_config().num_hidden_layers,
            _period(self.model_config),
        )
        few, more = (min(n * period, total) for n in (4, 6))  # fewer are all beginning and end
        if more >= total:
            return self.step(examples, **options)
        a, b = (self.step(examples, layers=n, **options) for n in (few, more))

        def at(x: float, y: float) -> float:
            return y + (y - x) / (more - few) * (total - more)

        moments = {
            name: {
                kind: max(round(at(a.moments[name][kind], held)), 0) for kind, held in parts.items()
            }
            for name, parts in b.moments.items()
            if name != MIDDLE
        }
        return StepMemory(
            moments, round(at(a.host, b.host)), at(a.flop, b.flop), a.tokens, a.packed
        )

    def step(
        self,
        examples: Sequence[Example],
        *,
        cached_reference: bool = False,
        accumulate: bool = False,
        layers: int | None = None,
        **switches: Any,
    ) -> StepMemory:
        """The step of one batch. cached_reference: the records bring ref_logps. accumulate: the batch is not the first
        of its step, so that all gradients are there already. layers: of a shallower model of the same kind. switches:
        fields of the run to plan with instead."""
        config = replace(self.config, **switches) if switches else self.config
        facts = replace(self.facts, has_ref_logps=cached_reference)
        run = resolve(config, facts)
        compute, sharded = run.compute, run.ranks > 1
        batch = collate(examples, packed=self.packed, device=torch.device("cpu"), pad_id=0)
        unpadded = batch.attention_mask is None or bool(batch.attention_mask.all())
        cached = cached_reference or run.reference == "cached"
        frozen_copy = not cached and run.reference == "frozen"
        head = PlannedHead(config, self.device, batch)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        policy = self._policy(
            config, run.weights, mode, layers, cast=compute if sharded else None, trained=True
        )
        reference = (
            self._policy(config, compute, mode, layers, trained=False) if frozen_copy else None
        )
        with mode, planned_attention(self.device, unpadded) as kernel:
            on_device = {name: getattr(batch, name) for name in _ON_DEVICE}
            fakes = {k: None if x is None else mode.from_tensor(x) for k, x in on_device.items()}
            autocast = run.autocast
            if reference is not None and run.imitates_autocast:
                match_autocast(reference)
            with FlopCounter(strict=False) as products, LiveBytes() as live:
                for _ in range(1 + accumulate):
                    live.marks.clear()
                    _run(policy, reference, replace(batch, **fakes), head, autocast, cached, live)
            trained = policy.trainable_parameters()
            live.assign("gradients", [p.grad for p in trained if p.grad is not None])
            moments = self._moments(config, policy, reference, live, compute)
            host = (
                live.peak_parts(without=set(live.parts) - {"host"}).total()
                + state_bytes(trained, config)[1]
            )
        counted = self.packed and not products.uncounted
        flop = (products.flop + head.flop + kernel.flop) / (1 + accumulate) if counted else math.nan
        return StepMemory(moments, host, flop, batch.num_tokens, self.packed)

    def _moments(
        self,
        config: RunConfig,
        policy: Policy,
        reference: Policy | None,
        live: LiveBytes,
        compute: torch.dtype,
    ) -> dict[str, Parts]:
        """The parts of each phase at its peak, with what is there all the time; of FSDP's ranks each holds a share."""
        ranks = self.world_size
        trained = policy.trainable_parameters()
        # What is loaded: under FSDP2 the traced weights are those that were gathered, in the dtype of the computation.
        wide = ranks > 1 and (
            config.master_weights or config.lora is not None or self.adapter is not None
        )

        def loaded(parameters: Iterable[Tensor]) -> int:
            return sum(
                p.numel() * (4 if wide and p.requires_grad else p.itemsize) for p in parameters
            )

        gradients = loaded(trained) // ranks
        buffers = sum(x.numel() * x.itemsize for x in policy.model.buffers())
        always = dict.fromkeys(PARTS, 0)
        always["weights"] = (loaded(policy.model.parameters()) + buffers) // ranks
        always["optimizer"] = state_bytes(trained, config)[0] // ranks
        if reference is not None:
            always["reference"] = (
                sum(p.numel() * p.itemsize for p in reference.model.parameters()) // ranks
            )
        if ranks > 1:
            always["gathered"] = _gathered(policy, reference, compute)
        start, referred, forward, *layers, end = live.marks
        # From layer to layer what is kept falls and what is built grows, both in straight lines: in models with more
        # layers too, the peak is at one of the ends.
        ends = _period(self.model_config)
        late, early = (layers[-ends], layers[ends]) if len(layers) > 2 * ends else (end, end)
        spans = {
            "reference": (start, referred),
            "forward": (referred, forward),
            "first layers": (forward, early),
        }
        spans |= {MIDDLE: (early, late), "last layers": (late, end)}
        left_out = ("host", "gradients") if ranks > 1 else ("host",)
        moments = {}
        for name, (first, last) in spans.items():
            parts = dict(always)
            for origin, size in live.peak_parts(left_out, first, last).items():
                parts[_PART_OF.get(origin, origin)] += size
            if ranks > 1:
                parts["gradients"] = gradients
            moments[name] = parts
        stepping = step_bytes(trained, config)
        moments["optimizer"] = always | {
            "gradients": gradients,
            "optimizer": always["optimizer"] + stepping,
        }
        return moments

    def _model(self, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        model_config = self.model_config
        return outline(
            model_config if layers is None else _shallow(model_config, layers),
            dtype=dtype,
            attn_implementation=self.config.attn_implementation,
            trust_remote_code=self.config.trust_remote_code,
        )

    def _policy(
        self,
        config: RunConfig,
        dtype: torch.dtype,
        mode: FakeTensorMode,
        layers: int | None,
        *,
        trained: bool,
        cast: torch.dtype | None = None,
    ) -> Policy:
        """cast: turn all weights to this dtype, adapters too, as FSDP2 gathers them."""
        with torch.device("meta"):
            model: Any = self._model(dtype, layers)
            remove_dropout(model)
            head = HeadSpec(model)
            if trained and config.lora is not None:
                model = add_lora(model, config.lora)
            elif trained and self.adapter is not None:
                adapter = PeftConfig.from_pretrained(self.adapter)
                adapter.inference_mode = False
                model = get_peft_model(model, adapter)
            if cast is not None:
                model.to(cast)
        _make_fake(model, mode)
        # liger's kernels take no tensors without memory; without them the plan is an estimate from above.
        with mode:
            policy = make_policy(
                model, head, replace(config.memory_options(trained=trained), liger=False)
            )
        policy.packed = self.packed
        if not trained:
            model.requires_grad_(False).eval()
        return policy


def _period(config: PreTrainedConfig) -> int:
    """After how many layers their kinds come again."""
    config = config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n])


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first layers alone."""
    whole = copy.deepcopy(config)
    config = whole.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, value[:layers])  # one entry per layer
    config.num_hidden_layers = layers
    return whole


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn the parameters and buffers of a model on the meta device into fake tensors that say they are on the CPU:
    unlike meta tensors they take part in autocast, and mix with real ones."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:  # tied ones stay tied
                    fake = mode.fake_tensor_converter.from_meta_and_device(
                        mode, x.detach(), torch.device("cpu")
                    )
                    made[id(x)] = (
                        nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
                    )
                tensors[name] = made[id(x)]


MIDDLE = "middle layers"
_ON_DEVICE = ("input_ids", "position_ids", "attention_mask", "rows", "targets", "ref_logps")
_PART_OF = {"forward": "activations", "backward": "layer", "": "layer"}


def _run(
    policy: Policy,
    reference: Policy | None,
    batch: Batch,
    head: PlannedHead,
    autocast: torch.dtype | None,
    cached: bool,
    live: LiveBytes,
) -> None:
    """Forward and backward of one batch, as the trainer runs them, with marks between the phases."""
    casts = {"dtype": autocast, "enabled": autocast is not None}
    live.mark()
    if not cached:
        with memory_category("reference"), torch.no_grad(), torch.autocast("cpu", **casts):
            if reference is not None:
                reference.score(batch, head.logps)
            else:
                with policy.reference_mode():
                    policy.score(batch, head.logps)
    live.mark()
    hooks = [
        layer.register_forward_hook(lambda _, __, out: _when_backward_reaches(out, live.mark))
        for layer in decoder_layers(policy.causal_lm)
    ]
    with memory_category("forward"), torch.autocast("cpu", **casts):
        loss = policy.score(batch, head.loss)
    for hook in hooks:  # a layer that checkpointing runs again is not met again
        hook.remove()
    live.mark()
    with memory_category("backward"):
        loss.backward()
    live.mark()


def _when_backward_reaches(out: Tensor | tuple[Tensor, ...], do: Callable[[], None]) -> None:
    first = out if isinstance(out, Tensor) else out[0]
    if first.requires_grad:
        first.register_hook(lambda grad: do())


def _gathered(policy: Policy, reference: Policy | None, compute: torch.dtype) -> int:
    """FSDP2: whole weights of the roots (embedding, norm, head), of which the reference's too stay gathered after its
    forward, and of two layers, one of them fetched ahead; the whole gradients of one group, in the dtype of the
    computation and in float32 to be reduced."""

    def sizes(trained: bool) -> tuple[int, int]:
        """Numbers in the root and in the largest layer."""
        layers = [
            sum(p.numel() for p in layer.parameters() if p.requires_grad or not trained)
            for layer in decoder_layers(policy.causal_lm)
        ]
        total = sum(p.numel() for p in policy.model.parameters() if p.requires_grad or not trained)
        return total - sum(layers), max(layers, default=0)

    root, layer = sizes(trained=False)
    return (root * (1 + (reference is not None)) + 2 * layer) * compute.itemsize + max(
        sizes(trained=True)
    ) * (compute.itemsize + 4)
