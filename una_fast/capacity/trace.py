"""Plan the memory and the flop of a training step, before anything is loaded.

The step itself is run, on tensors with shapes and without memory (torch's fake tensors): the model
is built from a config alone, and the model's own forward, checkpointing, tiles and backward decide
about the life of every tensor. LiveBytes counts the tensors. So no formula per architecture can go
stale.

Few layers are traced where they tell about all (depth.py, timeline.py): the plan is the same to
the byte. Stand-ins (stand_ins.py) replace the pieces with code per device, or with a look at
numbers: the fused head (block plan and allocations as always), the attention kernel of a GPU, and
the optimizer (sizes of the state).

    peak = weights + optimizer state + max over the phases of a step of the bytes held by a phase
    phases: reference, forward, first layers, middle layers and last layers of backward, optimizer
            (the optimizer's phase holds gradients + temporaries)
"""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from una_fast.capacity.depth import depth_of, repeated, text_layers
from una_fast.capacity.stand_ins import PlannedHead, planned_attention
from una_fast.capacity.timeline import Cuts, Timeline, deepened, find_copies, trace_of
from una_fast.config import RunConfig
from una_fast.counters import FlopCounter, LiveBytes, memory_category
from una_fast.data.batch import Batch, collate, layout_tokens
from una_fast.data.examples import Example
from una_fast.feedback import Feedback
from una_fast.model.activations import decoder_layers
from una_fast.model.dropout import remove_dropout
from una_fast.model.four_bits import pack_linears
from una_fast.model.head_probe import HeadSpec
from una_fast.model.loading import load_config, model_and_adapter, outline
from una_fast.model.lora import add_lora
from una_fast.model.policy import Policy, make_policy
from una_fast.model.reference import without_cached_logps
from una_fast.model.scoring import match_autocast
from una_fast.model.settings import LoraOptions
from una_fast.optim import state_bytes, step_bytes
from una_fast.printable import printable
from una_fast.resolved import Facts, ResolvedRun, outline_of, resolve

Categories = dict[str, int]
"""Bytes of each of CATEGORIES."""
CATEGORIES = (
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
"""Categories of memory. activations: kept from forward to backward. layer: temporaries of the layer
at work. gathered: whole weights and gradients of the layers at work, under FSDP2."""
_CATEGORY_OF = {"forward": "activations", "backward": "layer", "": "layer"}

MIDDLE = "middle layers"


@dataclass(frozen=True)
class Row:
    """A prompt and the responses to it, in tokens."""

    prompt: int
    responses: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prompt < 1 or not self.responses or min(self.responses) < 1:
            raise ValueError(f"a row needs a prompt and responses of at least 1 token, not {self}")

    @property
    def tokens(self) -> int:
        """Return the tokens of the packed row."""
        return self.prompt + sum(self.responses)

    def scaled(self, factor: float) -> Row:
        """Return a row of the same proportions, `factor` times as long."""
        responses = tuple(max(round(n * factor), 1) for n in self.responses)
        return Row(max(round(self.prompt * factor), 1), responses)

    def example(self) -> Example:
        """Return a record of the row's shape: a pair for two responses, scores otherwise."""
        count = len(self.responses)
        feedback = Feedback.scores(range(count), [0.5] * count)
        if count == 2:
            feedback = Feedback.pairs([0], [1])
        prompt = np.zeros(self.prompt, dtype=np.int32)
        responses = tuple(np.zeros(n, dtype=np.int32) for n in self.responses)
        return Example(prompt, responses, feedback, None, "planned")


@dataclass(frozen=True)
class StepMemory:
    """Memory and work of a forward and backward pass with the optimizer's step, on a device."""

    moments: dict[str, Categories]
    """Phase of the step -> bytes by category where the phase holds most."""
    host: int
    """Bytes in host memory at the most: offloaded activations and optimizer state."""
    flop: float
    """Flop of matrix products and packed attention, with recomputation; NaN where some products
    are not counted: attention of padded batches, grouped products."""
    tokens: int
    """Tokens in the batch."""
    packed: bool
    traced: int
    """Layers that were traced."""
    note: str | None = None
    """Why all layers were traced, where few tell about all in most models."""

    @property
    def categories(self) -> Categories:
        """Return the bytes by category at the peak."""
        return max(self.moments.values(), key=lambda held: sum(held.values()))

    @property
    def peak(self) -> int:
        """Return the bytes on the device at the most."""
        return sum(self.categories.values())


class StepTracer:
    """Planner of the steps of a run, from the config of the model."""

    def __init__(self, config: RunConfig, facts: Facts) -> None:
        """Read the model's config, and build the model's outline to count the weights.

        config: settings of the run
        facts: device (planned for, present or not), ranks, model and records
        """
        self.config = config
        self.facts = facts
        self.run = resolve(config, facts)
        path, self.adapter = model_and_adapter(config.model)
        self.model_config = load_config(path, trust_remote_code=config.trust_remote_code)
        whole = outline_of(config)
        self.parameters = sum(p.numel() for p in whole.parameters())
        self.depth = depth_of(self._adapted(whole))
        self._batch: list[Example] = []  # of the traces
        self._traces: dict[tuple[Any, ...], _Traced | None] = {}
        self._shallow_ones: dict[int, bool] = {}  # layers -> begins as the model does

    def rough_bytes(self, examples: Sequence[Example]) -> float:
        """Return surely enough bytes for a batch of a usual model, without tracing.

        Small runs are spared the plan by the bound; infinity for a model without a bound.
        """
        config = self.model_config.get_text_config()
        if self.config.attn_implementation == "eager" or not hasattr(config, "hidden_size"):
            return math.inf
        inner_size = getattr(config, "intermediate_size", 0) or 0
        width = 64 * config.hidden_size + 16 * max(inner_size, 4 * config.hidden_size)
        tokens = layout_tokens(examples, packed=False)
        activations = 4 * tokens * config.num_hidden_layers * width
        return 24 * self.parameters + activations + self.run.workspace

    def step(
        self,
        examples: Sequence[Example],
        *,
        accumulate: bool = False,
        whole: bool = False,
        **switches: Any,
    ) -> StepMemory:
        """Plan the step of a batch.

        examples: records of the batch
        accumulate: the batch follows another batch of the step, and all gradients exist
        whole: trace all layers, where few would tell about all
        switches: fields of the run to plan with instead
        """
        config = replace(self.config, **switches) if switches else self.config
        run = resolve(config, self.facts)
        note = None
        if not whole:
            for layers in self.depth.tries:
                if not self._is_shallow(layers):
                    note = f"all layers: a model of {layers} layers is no part of this one"
                    break
                found = self._planned(config, run, examples, layers, accumulate=accumulate)
                if found is not None:
                    return found
                note = f"all layers: the memory of a layer differs in a model of {layers} layers"
        found = self._planned(config, run, examples, self.depth.total, accumulate=accumulate)
        return replace(found, note=note)

    def _planned(
        self,
        config: RunConfig,
        run: ResolvedRun,
        examples: Sequence[Example],
        layers: int,
        *,
        accumulate: bool,
    ) -> StepMemory | None:
        """Plan the step of the whole model from a trace of some layers.

        config: settings of the step
        run: decisions of the step
        examples: records of the batch
        layers: layers to trace
        accumulate: all gradients exist

        Returns None where the traced layers do not tell about the others.
        """
        if list(map(id, self._batch)) != list(map(id, examples)):
            self._batch = list(examples)
            self._traces.clear()
        key = (layers, accumulate, _traced_settings(config))
        if key not in self._traces:
            self._traces[key] = self._trace(config, run, examples, layers, accumulate=accumulate)
        traced = self._traces[key]
        if traced is None:
            return None
        timeline = traced.timeline
        moments = self._moments(config, run, traced, accumulate=accumulate)
        not_host = set(timeline.names) - {"host"}
        offloaded = sum(timeline.peak(not_host, 0, len(timeline.changes)).values())
        host = offloaded + state_bytes(traced.trained(), config)[1]
        return StepMemory(moments, host, traced.flop, traced.tokens, run.packed, layers)

    def _trace(
        self,
        config: RunConfig,
        run: ResolvedRun,
        examples: Sequence[Example],
        layers: int,
        *,
        accumulate: bool,
    ) -> _Traced | None:
        """Trace a step of a model of some layers; see _planned."""
        # Cached log-probs have no part in the memory, and rollouts have none beside records.
        batch = collate(without_cached_logps(examples), packed=run.packed)
        unpadded = batch.attention_mask is None or bool(batch.attention_mask.all())
        head = PlannedHead(config, run.workspace, run.device, batch)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        policy, reference = self._models(config, run, mode, layers)
        trained = policy.trainable_parameters()
        products = FlopCounter(strict=False)
        with mode, planned_attention(run.device, unpadded) as kernel:
            fake_batch = _fake_batch(batch, mode)
            if reference is not None and run.imitates_autocast:
                match_autocast(reference)
            if accumulate:  # born before storages are counted
                for p in trained:
                    p.grad = torch.empty_like(p)
            with _no_collection(), LiveBytes(products) as live:
                cuts = Cuts(live, lambda: products.flop + head.flop + kernel.flop)
                _run(policy, reference, fake_batch, head, run, cuts)
            live.assign("gradients", [p.grad for p in trained if p.grad is not None])
        trace = trace_of(live, cuts.pieces)
        timeline: Timeline = trace
        source = list(range(layers))
        if layers < self.depth.total:
            copies = find_copies(trace, self.depth.period, self.depth.total)
            if copies is None:
                return None
            timeline, source = deepened(trace, copies), copies.source
        counted = run.packed and not products.uncounted
        flop = timeline.flop if counted else math.nan
        return _Traced(policy, reference, source, timeline, flop, batch.num_tokens)

    def _models(
        self, config: RunConfig, run: ResolvedRun, mode: FakeTensorMode, layers: int
    ) -> tuple[Policy, Policy | None]:
        """Build the policy, and a frozen copy if the run has one; no numbers."""
        policy = self._policy(config, run, mode, layers, trained=True)
        if run.reference != "frozen":
            return policy, None
        return policy, self._policy(config, run, mode, layers, trained=False)

    def _policy(
        self,
        config: RunConfig,
        run: ResolvedRun,
        mode: FakeTensorMode,
        layers: int,
        *,
        trained: bool,
    ) -> Policy:
        model_config = self._config_of(layers)
        dtype = run.weights if trained else run.compute
        with torch.device("meta"):
            model: Any = outline(
                model_config,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
            remove_dropout(model)
            head = HeadSpec(model)
            if config.quantize_base is not None:
                pack_linears(model, printable(config.model))
            if trained:
                model = self._with_adapter(model, config)
            if trained and run.ranks > 1:
                model.to(run.compute)  # adapters too: FSDP2 casts all weights that it gathers
        _make_fake(model, mode)
        # liger's kernels take no tensors without memory; without them the plan is an upper bound.
        options = replace(config.memory_options(trained=trained), liger=False)
        with mode:
            policy = make_policy(model, head, options)
        policy.packed = run.packed
        if not trained:
            model.requires_grad_(False).eval()
        return policy

    def _config_of(self, layers: int) -> PreTrainedConfig:
        if layers == self.depth.total:
            return self.model_config
        return _shallow(self.model_config, layers)

    def _is_shallow(self, layers: int) -> bool:
        """Return whether the model of fewer layers has the first layers of the whole model."""
        if layers not in self._shallow_ones:
            self._shallow_ones[layers] = False
            with suppress(Exception):  # a config may have fields that go with the number of layers
                model = outline(
                    self._config_of(layers),
                    dtype=torch.float32,
                    attn_implementation=self.config.attn_implementation,
                    trust_remote_code=self.config.trust_remote_code,
                )
                self._shallow_ones[layers] = self.depth.begins_as(self._adapted(model))
        return self._shallow_ones[layers]

    def _adapted(self, model: Any) -> Any:
        """Return an outline as it is, or with adapters that may be in some layers alone."""
        lora = self.config.lora
        if self.adapter is None and (lora is None or _is_everywhere(lora)):
            return model
        with torch.device("meta"):
            return self._with_adapter(model, self.config).get_base_model()

    def _with_adapter(self, model: Any, config: RunConfig) -> Any:
        if config.lora is not None:
            return add_lora(model, config.lora)
        if self.adapter is None:
            return model
        adapter = PeftConfig.from_pretrained(self.adapter)
        adapter.inference_mode = False
        adapter.base_model_name_or_path = None  # peft warns where an outline has another name
        return get_peft_model(model, adapter)

    def _moments(
        self,
        config: RunConfig,
        run: ResolvedRun,
        traced: _Traced,
        *,
        accumulate: bool,
    ) -> dict[str, Categories]:
        """Return the bytes by category at the peak of every phase, on a rank.

        config: settings of the step
        run: decisions of the step
        traced: the traced step
        accumulate: all gradients existed before
        """
        trained = traced.trained()
        always = self._resident(config, run, traced)
        gradients = self._loaded_bytes(run, trained) // run.ranks
        left_out = ("host", "gradients") if run.ranks > 1 else ("host",)
        moments = {}
        for phase, (first, last) in self._phases(traced.timeline).items():
            held = dict(always)
            for category, size in traced.timeline.peak(left_out, first, last).items():
                held[_CATEGORY_OF.get(category, category)] += size
            if run.ranks > 1:
                held["gradients"] = gradients
            elif accumulate:
                held["gradients"] += _bytes(trained)
            moments[phase] = held
        stepping = always["optimizer"] + step_bytes(trained, config, run.device)
        moments["optimizer"] = always | {"gradients": gradients, "optimizer": stepping}
        return moments

    def _resident(self, config: RunConfig, run: ResolvedRun, traced: _Traced) -> Categories:
        """Return the bytes by category held through all phases, on a rank."""
        held = dict.fromkeys(CATEGORIES, 0)
        weights = self._loaded_bytes(run, traced.parameters()) + traced.buffer_bytes()
        held["weights"] = weights // run.ranks
        held["optimizer"] = state_bytes(traced.trained(), config)[0] // run.ranks
        held["reference"] = traced.reference_bytes() // run.ranks
        if run.ranks > 1:
            held["gathered"] = _gathered(traced.policy, traced.reference, run.compute)
        return held

    def _loaded_bytes(self, run: ResolvedRun, parameters: Iterable[Tensor]) -> int:
        """Return the bytes of weights as loaded.

        Traced weights of FSDP2 are gathered weights, in the dtype of the products; trained weights
        may be loaded wider.
        """
        total = 0
        for p in parameters:
            gathered = run.ranks > 1 and p.requires_grad
            total += p.numel() * (run.trained.itemsize if gathered else p.itemsize)
        return total

    def _phases(self, timeline: Timeline) -> dict[str, tuple[int, int]]:
        """Return the first and the last event of every phase.

        From layer to layer of backward kept activations fall and gradients grow, both in straight
        lines: in models with more layers, too, the peak is in the first or the last layers.
        """
        bounds = {}
        for phase in ("reference", "forward", "backward"):
            pieces = timeline.of_phase(phase)
            bounds[phase] = (pieces[0].start, pieces[-1].stop)
        start, end = bounds.pop("backward")
        layers = [piece.stop for piece in timeline.of_phase("backward")[:-1]]
        period = _period(self.model_config)
        early, late = end, end
        if len(layers) > 2 * period:
            early, late = layers[period], layers[-period]
        return bounds | {
            "first layers": (start, early),
            MIDDLE: (early, late),
            "last layers": (late, end),
        }


@dataclass(frozen=True)
class _Traced:
    """A traced step, with the events and the tensors of all layers."""

    policy: Policy
    reference: Policy | None
    source: list[int]
    """Traced layer of each layer."""
    timeline: Timeline
    flop: float
    tokens: int

    def parameters(self) -> list[Tensor]:
        """Return the policy's parameters."""
        return self._tensors(self.policy, nn.Module.parameters)

    def trained(self) -> list[Tensor]:
        """Return the policy's trained parameters."""
        return [p for p in self.parameters() if p.requires_grad]

    def buffer_bytes(self) -> int:
        """Return the bytes of the policy's buffers."""
        return _bytes(self._tensors(self.policy, nn.Module.buffers))

    def reference_bytes(self) -> int:
        """Return the bytes of the frozen copy's parameters."""
        if self.reference is None:
            return 0
        return _bytes(self._tensors(self.reference, nn.Module.parameters))

    def _tensors(
        self, policy: Policy, tensors_of: Callable[[nn.Module], Iterable[Tensor]]
    ) -> list[Tensor]:
        layers = text_layers(policy.causal_lm)
        return repeated(policy.model, layers, self.source, tensors_of)


def _traced_settings(config: RunConfig) -> str:
    """Return the settings that a trace depends on: all but the optimizer's."""
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in ("optimizer", "offload_optimizer"):
        del given[name]
    return repr(given)


def _is_everywhere(lora: LoraOptions) -> bool:
    """Return whether adapters are surely in all layers alike, or in none."""
    targets = lora.target_modules
    if isinstance(targets, str):
        return targets == "all-linear"
    return not any(re.search(r"\d", target) for target in targets)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def _period(config: PreTrainedConfig) -> int:
    """Return the number of layers until the kinds of layers repeat."""
    config = config.get_text_config()
    layers = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or [None] * layers)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n])


def _shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same model with the first layers alone."""
    whole = copy.deepcopy(config)
    config = whole.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, value[:layers])  # one entry per layer
    config.num_hidden_layers = layers
    return whole


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a model's parameters and buffers from meta tensors into fake tensors on the CPU.

    Unlike meta tensors, fake tensors take part in autocast, and mix with real tensors.
    """
    made: dict[int, Tensor] = {}  # by the meta tensor, so that tied weights stay tied

    def fake(x: Tensor) -> Tensor:
        if id(x) not in made:
            new = mode.fake_tensor_converter.from_meta_and_device(
                mode, x.detach(), torch.device("cpu")
            )
            is_parameter = isinstance(x, nn.Parameter)
            made[id(x)] = nn.Parameter(new, x.requires_grad) if is_parameter else new
        return made[id(x)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = fake(x)


def _fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Return the batch with fake tensors in place of the tensors on the device."""
    fakes = {}
    for name in ("input_ids", "position_ids", "attention_mask", "rows", "targets"):
        x = getattr(batch, name)
        fakes[name] = None if x is None else mode.from_tensor(x)
    return replace(batch, **fakes)


def _run(
    policy: Policy,
    reference: Policy | None,
    batch: Batch,
    head: PlannedHead,
    run: ResolvedRun,
    cuts: Cuts,
) -> None:
    """Run forward and backward of a batch, as the trainer does, cut into pieces."""
    casts = {"dtype": run.autocast, "enabled": run.autocast is not None}
    cuts.begin("reference")
    if run.reference != "cached":
        referring = policy if reference is None else reference
        without = policy.reference_mode() if reference is None else nullcontext()
        with (
            memory_category("reference"),
            torch.no_grad(),
            torch.autocast("cpu", **casts),
            without,
            _cut_between_layers(referring, cuts),
        ):
            referring.score(batch, head.logps)
    cuts.cut(None)
    cuts.begin("forward")
    with (
        memory_category("forward"),
        torch.autocast("cpu", **casts),
        _cut_between_layers(policy, cuts),
    ):
        loss = policy.score(batch, head.loss)
    cuts.cut(None)
    cuts.begin("backward")
    with memory_category("backward"):
        loss.backward()
    cuts.cut(0)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector of cycles away: storages die by reference counts, at fixed events."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _cut_between_layers(policy: Policy, cuts: Cuts) -> Iterator[None]:
    """Cut a policy's forward in the block between the layers, and the backward to follow, too.

    A layer that checkpointing runs again, after the block, makes no cut.
    """
    layers = text_layers(policy.causal_lm)
    hooks = []
    for number, layer in enumerate(layers):
        last = number + 1 == len(layers)
        if number:  # when a layer begins, the state before the last layer is gone
            hooks.append(layer.register_forward_pre_hook(_cut_before(cuts, number)))
        hooks.append(layer.register_forward_hook(_cut_after(cuts, number, last=last)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cut_before(cuts: Cuts, number: int) -> Callable[..., None]:
    """Return a hook to call when a layer begins."""
    return lambda module, given: cuts.cut(number - 1)


def _cut_after(cuts: Cuts, number: int, *, last: bool) -> Callable[..., None]:
    """Return a hook to call when a layer ends."""

    def hook(module: nn.Module, given: Any, out: Tensor | tuple[Tensor, ...]) -> None:
        if last:
            cuts.cut(number)
        first = out if isinstance(out, Tensor) else out[0]
        if first.requires_grad:
            above = None if last else number + 1
            first.register_hook(lambda grad: cuts.cut(above))

    return hook


def _gathered(policy: Policy, reference: Policy | None, compute: torch.dtype) -> int:
    """Return the bytes of the whole weights and gradients held at a time under FSDP2.

    weights: the root (embedding, norm, head), of the reference too, whose root stays gathered after
        forward; and two layers, the second fetched ahead
    gradients: the largest group, in the dtype of the products, and in float32 to be reduced
    """
    root, layer = _group_sizes(policy, compute.itemsize, trained=False)
    weights = root * (1 + (reference is not None)) + 2 * layer
    gradients = max(_group_sizes(policy, compute.itemsize + 4, trained=True))
    return weights + gradients


def _group_sizes(policy: Policy, width: int, *, trained: bool) -> tuple[int, int]:
    """Return the bytes of the root and of the largest layer, of all or of trained weights.

    width: bytes of a number; packed weights are gathered as they are
    """

    def size(p: Tensor) -> int:
        return p.numel() * (width if p.is_floating_point() else p.itemsize)

    def count(module: nn.Module) -> int:
        return sum(size(p) for p in module.parameters() if p.requires_grad or not trained)

    layers = [count(layer) for layer in decoder_layers(policy.causal_lm)]
    return count(policy.model) - sum(layers), max(layers, default=0)
