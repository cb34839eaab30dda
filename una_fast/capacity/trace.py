"""Plan the memory and the flop of a training step, before anything is loaded.

The step itself is run, on tensors with shapes and without memory (torch's fake tensors): the model
is built from a config alone, and the model's own forward, checkpointing, tiles and backward decide
about the life of every tensor. LiveBytes counts the tensors. So no formula per architecture can go
stale.

Few layers are traced where they tell about all (depth.py, timeline.py): the plan is the same to
the byte. Stand-ins (stand_ins.py) replace the pieces with code per device, or with a look at
numbers: the fused head (block plan and allocations as always), the attention kernel of a GPU, and
the optimizer (sizes of the state).

Of several ranks the first is planned, which holds the largest shards. The model is sharded as in
the run, among ranks that are not there (planned_ranks.py): FSDP2 itself gathers weights and reduces
gradients, and what crosses ranks is counted.

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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from una_fast.attention.ulysses import padded_tokens
from una_fast.capacity.depth import depth_of, repeated, text_layers
from una_fast.capacity.planned_ranks import planned_rank
from una_fast.capacity.stand_ins import PlannedHead, PlannedSplitHead, planned_attention
from una_fast.capacity.timeline import EARLIER, Cuts, Timeline, deepened, find_copies, trace_of
from una_fast.config import RunConfig
from una_fast.counters import COLLECTIVES, FlopCounter, LiveBytes, memory_category
from una_fast.data.batch import Batch, collate, layout_tokens
from una_fast.data.examples import Example
from una_fast.data.split import split_batch
from una_fast.distributed import World, local_part, reduce_gradients, reshard, sum_over_copies
from una_fast.feedback import Feedback
from una_fast.group import ALONE
from una_fast.model.dropout import remove_dropout
from una_fast.model.four_bits import pack_linears
from una_fast.model.head_probe import HeadSpec
from una_fast.model.loading import load_config, model_and_adapter, outline
from una_fast.model.lora import add_lora
from una_fast.model.policy import Policy, make_policy, shard_policy
from una_fast.model.reference import without_cached_logps
from una_fast.model.scoring import match_autocast
from una_fast.model.settings import LoraOptions
from una_fast.optim import state_bytes, step_bytes
from una_fast.parallel import ParallelOptions
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
at work. gathered: whole weights of the layers at work, and what FSDP2 gathers and reduces from."""
_CATEGORY_OF = {"forward": "activations", "backward": "layer", "": "layer"}

MIDDLE = "middle layers"
EARLIER_BATCH = "earlier micro-batch"


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
    """Bytes in host memory at the most: offloaded activations, optimizer state and shards."""
    flop: float
    """Flop of matrix products and packed attention, with recomputation; NaN where some products
    are not counted: attention of padded batches, grouped products."""
    tokens: int
    """Tokens in the batch."""
    packed: bool
    traced: int
    """Layers that were traced."""
    sent_last: dict[str, float] = field(default_factory=dict)
    """Collective -> bytes that the rank sends in the last micro-batch of a step."""
    sent_earlier: dict[str, float] = field(default_factory=dict)
    """The same, in each micro-batch before; empty where a step has one alone."""
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

    def sent(self, micro_batches: int) -> dict[str, float]:
        """Return the bytes that the rank sends in a step of some micro-batches, by collective."""
        found = {}
        for name, last in self.sent_last.items():
            earlier = self.sent_earlier.get(name, 0.0)
            found[name] = last + (micro_batches - 1) * earlier
        return found


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
        further = 0
        if facts.ranks > 1:
            parallel = config.parallel or ParallelOptions()
            further = 1 + 2 * parallel.prefetch
        self.depth = depth_of(self._adapted(whole), further)
        self._batch: list[Example] = []  # of the traces
        self._traces: dict[tuple[Any, ...], _Traced | None] = {}
        self._shallow_ones: dict[int, bool] = {}  # layers -> begins as the model does

    @property
    def trains_head(self) -> bool:
        """Return whether the head has a gradient: not below an adapter."""
        return self.config.lora is None and self.adapter is None

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
        moments = self._moments(config, run, traced, accumulate=accumulate)
        return StepMemory(
            moments,
            self._host(config, traced),
            traced.flop,
            traced.tokens,
            run.packed,
            layers,
            sent_last=traced.sent(earlier=False),
            sent_earlier=traced.sent(earlier=True),
        )

    def _host(self, config: RunConfig, traced: _Traced) -> int:
        """Return the bytes that a rank holds in host memory."""
        timeline = traced.timeline
        not_host = set(timeline.names) - {"host"}
        offloaded = sum(timeline.peak(not_host, 0, len(timeline.changes)).values())
        on_device, on_host = state_bytes(traced.trained(), config)
        held = offloaded + on_host
        if _keeps_shards_on_host(config):
            gradients = _bytes(traced.trained())
            held += _bytes(traced.parameters()) + traced.reference_bytes() + gradients + on_device
        return held

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
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        products = FlopCounter(strict=False)
        with ExitStack() as stack:
            world = None
            group = ALONE
            if run.ranks > 1:
                place = _place_of_most_rows(batch, run.mesh.context)
                world = stack.enter_context(planned_rank(run.ranks, config.parallel, place))
                group = world.context
            part = split_batch(batch, group)
            policy, reference = self._models(config, run, mode, layers, world)
            given = (config, run.workspace, run.device, batch, group)
            head = PlannedHead(*given)
            if policy.vocabulary is not None:
                rows = _rows_of_places(batch, run.mesh.context) * run.mesh.shard
                head = PlannedSplitHead(*given, vocabulary=policy.vocabulary, rows=tuple(rows))
            trained = policy.trainable_parameters()
            stack.enter_context(mode)
            kernel = stack.enter_context(planned_attention(run.device, unpadded))
            fake_batch = _fake_batch(part, mode)
            if reference is not None and run.imitates_autocast:
                match_autocast(reference)
            if accumulate and world is None:  # born before storages are counted
                for p in trained:
                    p.grad = torch.empty_like(p)
            for model in (policy, reference):
                if world is not None and model is not None:
                    _settle_shards(model)
            step = _Step(policy, reference, fake_batch, head, run)
            with _no_collection(), LiveBytes(products) as live:

                def flop() -> float:
                    return products.flop + head.flop + kernel.flop

                cuts = Cuts(live, flop, lambda: live.traffic.sent)
                if world is None:
                    step.trace(cuts)
                else:
                    step.run_sharded(cuts, live, accumulate=accumulate)
            live.assign("gradients", [p.grad for p in trained if p.grad is not None])
            if reference is not None:
                reshard(reference.causal_lm)  # parameters are then those that a rank keeps
        trace = trace_of(live, cuts.pieces)
        timeline: Timeline = trace
        source = list(range(layers))
        if layers < self.depth.total:
            copies = find_copies(trace, self.depth.period, self.depth.total)
            if copies is None:
                return None
            timeline, source = deepened(trace, copies), copies.source
        counted = run.packed and not products.uncounted
        work = timeline.flop if counted else math.nan
        return _Traced(policy, reference, source, timeline, work, batch.num_tokens)

    def _models(
        self,
        config: RunConfig,
        run: ResolvedRun,
        mode: FakeTensorMode,
        layers: int,
        world: World | None,
    ) -> tuple[Policy, Policy | None]:
        """Build the policy, and a frozen copy if the run has one; no numbers.

        world: the ranks to shard over; None: a single process
        """
        policy = self._policy(config, run, mode, layers, trained=True)
        reference = None
        if run.reference == "frozen":
            reference = self._policy(config, run, mode, layers, trained=False)
        for one in (policy, reference):
            if world is not None and one is not None:
                # Outside the mode, because a mesh of ranks is a tensor with numbers.
                shard_policy(one, world, run.compute, config.parallel)
        return policy, reference

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
        gradients = _bytes(trained)
        stepping = step_bytes(trained, config, run.device)
        left_out = ["host"]
        if _keeps_shards_on_host(config):
            gradients, stepping = 0, 0
            left_out.append("gradients")
        moments = {}
        for phase, (first, last) in self._phases(traced.timeline).items():
            held = dict(always)
            for category, size in traced.timeline.peak(left_out, first, last).items():
                held[_CATEGORY_OF.get(category, category)] += size
            if accumulate and run.ranks == 1:
                held["gradients"] += gradients
            moments[phase] = held
        stepping += always["optimizer"]
        moments["optimizer"] = always | {"gradients": gradients, "optimizer": stepping}
        end = len(traced.timeline.changes)
        kept = traced.timeline.peak((), end, end)
        moments["optimizer"]["reference"] += kept.get("reference", 0)
        return moments

    def _resident(self, config: RunConfig, run: ResolvedRun, traced: _Traced) -> Categories:
        """Return the bytes by category held through all phases, on a rank."""
        held = dict.fromkeys(CATEGORIES, 0)
        held["weights"] = traced.buffer_bytes()
        if not _keeps_shards_on_host(config):
            held["weights"] += _bytes(traced.parameters())
            held["optimizer"] = state_bytes(traced.trained(), config)[0]
            held["reference"] = traced.reference_bytes()
        return held

    def _phases(self, timeline: Timeline) -> dict[str, tuple[int, int]]:
        """Return the first and the last event of every phase.

        From layer to layer of backward kept activations fall and gradients grow, both in straight
        lines: in models with more layers, too, the peak is in the first or the last layers.
        """
        bounds = {}
        for phase in ("reference", "forward", "backward"):
            pieces = timeline.of_phase(phase)
            bounds[phase] = (pieces[0].start, pieces[-1].stop)
        if timeline.of_phase(EARLIER + "forward"):
            bounds[EARLIER_BATCH] = (0, bounds["reference"][0])
        start, end = bounds.pop("backward")
        layers = [piece.stop for piece in timeline.of_phase("backward")[:-2]]
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

    def sent(self, *, earlier: bool) -> dict[str, float]:
        """Return the bytes sent by collective, in the earlier micro-batch or in the last one."""
        sent = self.timeline.sent(earlier=earlier)
        return {name: size for name, size in zip(COLLECTIVES, sent, strict=False) if size}

    def parameters(self) -> list[Tensor]:
        """Return the rank's parts of the policy's parameters."""
        return self._tensors(self.policy, nn.Module.parameters)

    def trained(self) -> list[Tensor]:
        """Return the rank's parts of the policy's trained parameters."""
        return self._tensors(self.policy, _trained)

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
        return list(map(local_part, repeated(policy.model, layers, self.source, tensors_of)))


def _traced_settings(config: RunConfig) -> str:
    """Return the settings that a trace depends on: all but the optimizer's."""
    given = {one.name: getattr(config, one.name) for one in fields(config)}
    for name in ("optimizer", "offload_optimizer"):
        del given[name]
    return repr(given)


def _is_everywhere(lora: LoraOptions) -> bool:
    """Return whether adapters are surely in all layers alike, or in none."""
    targets = lora.target_modules
    if isinstance(targets, str):
        return targets == "all-linear"
    return not any(re.search(r"\d", target) for target in targets)


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _keeps_shards_on_host(config: RunConfig) -> bool:
    return config.parallel is not None and config.parallel.offload_parameters


def _assign_gradients(live: LiveBytes) -> None:
    """Count what backward leaves behind as gradients: shards, or whole ones not yet reduced."""
    live.assign_living("gradients", of="backward")
    live.assign_living("gradients", of="gathered")


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


def _place_of_most_rows(batch: Batch, context: int) -> int:
    """Return which rank of a context group has the most scored rows: responses end the row."""
    rows = _rows_of_places(batch, context)
    return rows.index(max(rows))


def _rows_of_places(batch: Batch, context: int) -> list[int]:
    """Return the scored rows of every rank of a context group."""
    if context == 1:
        return [len(batch.host_rows)]
    tokens = padded_tokens(batch.input_ids.shape[1], context) // context
    return torch.bincount(batch.host_rows // tokens, minlength=context).tolist()


def _fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Return the batch with fake tensors in place of the tensors on the device."""
    fakes = {}
    for name in ("input_ids", "position_ids", "attention_mask", "rows", "targets"):
        x = getattr(batch, name)
        fakes[name] = None if x is None else mode.from_tensor(x)
    return replace(batch, **fakes)


@dataclass(frozen=True)
class _Step:
    """A step to be traced.

    policy: is trained
    reference: a frozen copy, if the run has one
    batch: fake tensors; of several ranks in a context group, the part of one
    head: stands in for the fused head
    run: decisions of the step
    """

    policy: Policy
    reference: Policy | None
    batch: Batch
    head: PlannedHead
    run: ResolvedRun

    def run_sharded(self, cuts: Cuts, live: LiveBytes, *, accumulate: bool) -> None:
        """Run the last micro-batch of a step on a rank, and one before if there are several."""
        if self.reference is not None:
            _gather_for_good(self.reference)
        model, at_each = self.policy.causal_lm, self.run.parallel.reduce == "each"
        if accumulate:
            cuts.micro_batch(earlier=True)
            reduce_gradients(model, now=at_each, is_last=False)
            self.trace(cuts)
            _assign_gradients(live)
            cuts.micro_batch(earlier=False)
        reduce_gradients(model, now=at_each, is_last=True)
        self.trace(cuts, is_last=True)

    def trace(self, cuts: Cuts, *, is_last: bool = False) -> None:
        """Run forward and backward of the batch, as the trainer does, cut into pieces.

        cuts: records the pieces
        is_last: gradients outside FSDP2 are then summed over the copies of the weights
        """
        casts = {"dtype": self.run.autocast, "enabled": self.run.autocast is not None}
        cuts.begin("reference")
        if self.run.reference != "cached":
            self._score_reference(cuts, casts)
        cuts.cut(None)
        cuts.begin("forward")
        with (
            memory_category("forward"),
            torch.autocast("cpu", **casts),
            _cut_between_layers(self.policy, cuts),
        ):
            loss = self.policy.score(self.batch, self.head.loss, self.head.group)
        cuts.cut(None)
        cuts.begin("backward")
        with memory_category("backward"):
            # A tensor behind the loss has the first hook of backward.
            end = loss.view_as(loss)
            end.register_hook(lambda grad: _at_the_end(lambda: cuts.cut(0)))
            end.backward()
            if is_last and self.policy.vocabulary is not None:
                head = self.policy.causal_lm.get_output_embeddings()
                sum_over_copies(head.parameters())
        cuts.cut(None)

    def _score_reference(self, cuts: Cuts, casts: dict[str, Any]) -> None:
        referring, without = self.reference, nullcontext()
        if referring is None:
            referring, without = self.policy, self.policy.reference_mode()
        with (
            memory_category("reference"),
            torch.no_grad(),
            torch.autocast("cpu", **casts),
            without,
            _cut_between_layers(referring, cuts),
        ):
            referring.score(self.batch, self.head.logps, self.head.group)


def _at_the_end(action: Callable[[], None]) -> None:
    """Act at the end of the backward pass under way, before FSDP2 clears up after the layers."""
    torch.autograd.Variable._execution_engine.queue_callback(action)


def _settle_shards(policy: Policy) -> None:
    """Let FSDP2 pad the shards, as in a run that has loaded them, before storages are counted."""
    for module in policy.causal_lm.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def _gather_for_good(reference: Policy) -> None:
    """Gather the weights outside the layers of a frozen copy.

    No backward pass frees them, so that they stay gathered from the first step on.
    """
    with memory_category("reference"):
        reference.causal_lm.unshard()


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
