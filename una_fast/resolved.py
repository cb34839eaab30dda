"""The decisions of a run, made once, before a model is loaded.

    settings (config.py) + facts (the machine, the model's config, the records)  ->  ResolvedRun

Trainer, planner, precompute and bench read the decisions here, and derive no decision again:

    compute     dtype of matrix products, and of frozen weights
    weights     dtype of the policy's own weights; wider than `compute` under master_weights alone
    trained     dtype of trained weights: `weights`, or float32 of adapters
    autocast    dtype that operands are cast to, if trained weights are wider than `compute`
    reference   frozen (a copy of the model) | adapter (LoRA off) | cached (column ref_logps)
    packed      rows with a shared prompt, or padded batches
    rope_limits lengths of records that no micro-batch mixes (model/positions.py)
    mesh        sizes of the groups of ranks (parallel.py)
    parallel    how the ranks share the work; `reduce` is "each" or "last"
    workspace   bytes of the fused head
    engine      torch | triton
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from una_fast.attention.instance import is_flash
from una_fast.attention.probe import packing_refusal
from una_fast.attention.split_probe import split_refusal
from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.distributed import SHARDS_INTEGERS
from una_fast.group import ALONE, Group
from una_fast.head.engines import choose_engine, compute_dtype
from una_fast.head.plan import workspace_bytes
from una_fast.model.directory import reading
from una_fast.model.head_forward import head_to_split
from una_fast.model.head_probe import outside_text
from una_fast.model.loading import model_and_adapter, sized_outline
from una_fast.model.policy import Policy, load_policy
from una_fast.model.positions import (
    longer_records,
    positions_of,
    rope_limits,
    row_wide_rope,
)
from una_fast.model.quantized import quantized_weight, refuse_quantized
from una_fast.model.reference import has_cached_logps
from una_fast.model.scoring import Scoring, match_autocast
from una_fast.model.stored import StoredDtypes
from una_fast.parallel import Mesh, ParallelOptions
from una_fast.printable import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """The machine, the model and the records of a run, as far as decisions need them."""

    device: str
    """cpu | cuda"""
    ranks: int
    """Processes of the run; more than one are sharded by FSDP2."""
    is_adapter: bool
    """The model is a PEFT adapter directory."""
    keeps_float32: bool
    """The model's class keeps some weights in float32, in a model of bfloat16 too."""
    packing_refusal: str | None
    """Reason why rows of this model cannot be packed."""
    has_ref_logps: bool
    """Every record brings ref_logps, and the run would use them."""
    router_loss: float = 0.0
    """Coefficient of an auxiliary loss of routers that the model's config asks for."""
    positions: int | None = None
    """Tokens of the longest sequence that the model was made for."""
    longer_records: str | None = None
    """Records with more tokens than positions, in words."""
    towers: list[str] = field(default_factory=list)
    """Modules of the model that text does not run through."""
    rope_limits: tuple[int, ...] = ()
    """Tokens beyond which a row of the model has other rotary factors."""


@dataclass(frozen=True)
class ResolvedRun:
    """The decisions of a run; the docstring of the module explains every field."""

    device: str
    ranks: int
    mesh: Mesh
    parallel: ParallelOptions
    compute: torch.dtype
    weights: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None
    reference: str
    packed: bool
    rope_limits: tuple[int, ...]
    workspace: int
    engine: str
    sources: dict[str, str] = field(default_factory=dict)
    """Line of `lines` -> settings that were given, or the default and the fact behind it."""
    notes: list[str] = field(default_factory=list)
    """Lines on what the model, or its records, ask for and the run does not do."""
    quantize_base: str | None = None
    """Format of the linear weights under an adapter, "nf4"; None: plain numbers."""

    @property
    def imitates_autocast(self) -> bool:
        """Return whether a frozen copy must compute as float32 weights do under autocast."""
        return self.autocast is not None and self.weights != self.compute

    def lines(self) -> list[str]:
        """Return the decisions as text, a decision per line, with the sources."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        dtypes = f"products {_name(self.compute)}, weights {_name(self.weights)}"
        if self.quantize_base is not None:
            dtypes += f", of linear layers {self.quantize_base}"
        if self.autocast is not None:
            dtypes += f", autocast to {_name(self.autocast)}"
        shown = {
            "device": f"{self.device}, {ranks}",
            "dtypes": dtypes,
            "reference": self.reference,
            "rows": "packed" if self.packed else "padded",
            "workspace": f"{self.workspace / 2**20:g} MiB",
            "engine": self.engine,
        }
        if self.ranks > 1:
            at_last = self.parallel.reduce == "last"
            times = "the last micro-batch of a step" if at_last else "each micro-batch"
            shown["mesh"] = ", ".join([str(self.mesh), *self.parallel.words()])
            shown["gradients"] = f"cross ranks after {times}"
        lines = [f"{name:10} {value}  [{self.sources[name]}]" for name, value in shown.items()]
        return [*lines, *self.notes]

    def plain(self) -> dict[str, Any]:
        """Return the decisions and sources as plain values, to be saved as JSON."""
        plain = asdict(self)
        for name in ("compute", "weights", "trained", "autocast"):
            plain[name] = _name(plain[name])
        plain["rope_limits"] = list(self.rope_limits)
        return plain


# ---- facts -------------------------------------------------------------------------------------


def find_facts(
    config: RunConfig,
    records: Sequence[Example],
    *,
    device: str,
    ranks: int = 1,
) -> Facts:
    """Look at the model's config and at the records; no weights are loaded.

    config: settings of the run
    records: all records, held-out records too; no prompts to sample from
    device: "cpu" or "cuda"
    ranks: processes of the run

    ValueError if only some records bring ref_logps, and the run would use the column; and where
    ranks are to split the tokens of rows, or the vocabulary, and the model does not allow that.
    """
    keeps_float32 = False
    context = 1 if config.parallel is None else config.parallel.context
    router_loss, positions, longer, limits = 0.0, None, None, ()
    towers: list[str] = []
    unsplit = None
    try:
        # A wrong path or setting ends here.
        with reading(config.model, "model", only=(ValueError, OSError)):
            model = outline_of(config)
        keeps_float32 = _keeps_float32(model)
        router_loss = _router_loss(model.config)
        towers = outside_text(model)
        positions, longer = positions_of(model), longer_records(records, model)
        limits = rope_limits(model)
        if config.parallel is not None and config.parallel.split_vocabulary:
            head_to_split(model)
        refusal = packing_refusal(model) if config.packing else None
        if context > 1 and config.packing and refusal is None:
            unsplit = row_wide_rope(model) or split_refusal(model, context)
    except ValueError:
        raise
    except Exception as error:  # model code may fail in any way on tensors without numbers
        failure = printable(f"{type(error).__name__}: {error}")
        refusal = f"the model cannot be built without weights: {failure}"
    if context > 1:
        _refuse_unsplit(config, context, refusal, unsplit)
    if config.packing and refusal is not None:
        logger.warning("batches are padded, not packed: %s", refusal)
    may_be_cached = config.reference == "auto" and config.mode == "offline"
    return Facts(
        device=device,
        ranks=ranks,
        is_adapter=model_and_adapter(config.model)[1] is not None,
        keeps_float32=keeps_float32,
        packing_refusal=refusal,
        has_ref_logps=may_be_cached and has_cached_logps(records),
        router_loss=router_loss,
        positions=positions,
        longer_records=longer,
        towers=towers,
        rope_limits=limits,
    )


def _refuse_unsplit(
    config: RunConfig, context: int, refusal: str | None, unsplit: str | None
) -> None:
    """Raise ValueError, with the reason, where ranks cannot split the tokens of a run's rows.

    config: settings of the run
    context: ranks that would split a row
    refusal: reason why rows of the model cannot be packed
    unsplit: reason why packed rows cannot be split
    """
    reason = refusal or unsplit
    advice = "set parallel.context=1"
    if not config.packing:
        reason, advice = "packing=false pads them", f"{advice}, or packing=true"
    if reason is not None:
        raise ValueError(
            f"parallel.context={context} splits packed rows over {context} ranks, and "
            f"{printable(config.model)} has no such rows: {reason}; {advice}"
        )


def outline_of(config: RunConfig) -> PreTrainedModel:
    """Build the model of a run from the model's config alone: shapes, and no numbers."""
    path, _ = model_and_adapter(config.model)
    model = sized_outline(
        path,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    # The packing probe must know the attention of the run: flash kernels compute what eager does.
    if is_flash(config.attn_implementation):
        for part in (model.config, model.get_decoder().config):
            part._attn_implementation_internal = config.attn_implementation
    return model


def _router_loss(config: PreTrainedConfig) -> float:
    """Return the coefficient of the routers' auxiliary loss, if a config asks for the loss."""
    config = config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    return float(coefficient) if isinstance(coefficient, int | float) else 0.0


def _keeps_float32(model: PreTrainedModel) -> bool:
    """Return whether transformers loads some weights in float32 when asked for bfloat16.

    Names of the class attribute are patterns, found anywhere in a weight's name: "gate.weight",
    "mlp.*.bias".
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if not kept:
        return False
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept))
    return any(pattern.search(name) for name, _ in model.named_parameters())


# ---- decisions ---------------------------------------------------------------------------------


def resolve(config: RunConfig, facts: Facts) -> ResolvedRun:
    """Decide dtypes, reference, layout, workspace and engine of a run.

    config: settings of the run
    facts: the machine, the model and the records

    Weights in bf16 have bf16 gradients, and micro-batches are added up in bf16; with float32
    weights both are float32. Adapters are float32 over a base in the dtype of the products.
    """
    compute = compute_dtype(config, facts.device)
    wide = config.master_weights and not config.lora
    weights = torch.float32 if wide else compute
    trains_adapter = config.lora is not None or facts.is_adapter
    if config.quantize_base is not None and not trains_adapter:
        raise ValueError(
            f"quantize_base={config.quantize_base}: weights at 4 bits are not trained; set lora to "
            "train adapters on them, or leave quantize_base out"
        )
    refuse_sharded_codes(config, facts.ranks)
    trained = torch.float32 if trains_adapter else weights
    wider = trained != compute or (facts.keeps_float32 and compute == torch.bfloat16)
    parallel = config.parallel or ParallelOptions()
    reduce = parallel.reduce
    if reduce == "auto":
        # Whole gradients of an adapter are small; of a model they would be 4 bytes per weight on
        # every rank.
        reduce = "last" if trains_adapter else "each"
    # FSDP2 casts the weights that it gathers by itself.
    autocast = compute if wider and facts.ranks == 1 else None
    run = ResolvedRun(
        device=facts.device,
        ranks=facts.ranks,
        mesh=parallel.mesh(facts.ranks),
        parallel=replace(parallel, reduce=reduce),
        compute=compute,
        weights=weights,
        trained=trained,
        autocast=autocast,
        reference=_reference(config, facts),
        packed=config.packing and facts.packing_refusal is None,
        rope_limits=facts.rope_limits,
        workspace=workspace_bytes(facts.device, config.workspace_mb),
        engine=_engine(config, facts.device, compute),
        quantize_base=config.quantize_base,
    )
    run.sources.update(_sources(config, facts, run))
    run.notes.extend(_notes(facts))
    return run


def refuse_sharded_codes(config: RunConfig, ranks: int) -> None:
    """Raise ValueError for weights at 4 bits on several ranks of a torch that cannot shard them."""
    if config.quantize_base is not None and ranks > 1 and not SHARDS_INTEGERS:
        raise ValueError(
            f"quantize_base={config.quantize_base} on {ranks} ranks needs torch 2.12 or newer, "
            f"and this is torch {torch.__version__}: its FSDP2 shards no integers; use one process"
        )


def _reference(config: RunConfig, facts: Facts) -> str:
    """Return the kind of a run's reference."""
    if config.reference != "auto":
        return config.reference
    if facts.has_ref_logps:
        return "cached"
    return "frozen" if config.lora is None else "adapter"


def _engine(config: RunConfig, device: str, compute: torch.dtype) -> str:
    """Return the name of the engine; an absent GPU, planned for, is taken to have Triton."""
    if _is_absent(device):
        return "torch" if config.engine == "torch" else "triton"
    return choose_engine(config.engine, torch.device(device), compute).name


def _is_absent(device: str) -> bool:
    return device == "cuda" and not torch.cuda.is_available()


def _sources(config: RunConfig, facts: Facts, run: ResolvedRun) -> dict[str, str]:
    """Return the source of every line: the given settings, or the default's reason."""
    device = facts.device
    dtypes = f"on {device}"
    if facts.is_adapter:
        dtypes += ", the model is an adapter"
    if config.lora is not None:
        dtypes += ", lora is set"
    if facts.keeps_float32:
        dtypes += ", the model keeps weights in float32"
    references = {
        "cached": "every record brings ref_logps",
        "adapter": "lora is set",
        "frozen": "lora is not set",
    }
    settings_and_reasons = {
        "device": (["device"], "planned for" if _is_absent(device) else f"{device} is there"),
        "dtypes": (["precision", "master_weights", "quantize_base"], dtypes),
        "reference": (["reference"], references[run.reference]),
        "rows": (["packing"], facts.packing_refusal or "the packing probe passed"),
        "workspace": (["workspace_mb"], f"on {device}"),
        "engine": (["engine"], f"on {device}"),
    }
    sources = {line: _source(config, *entry) for line, entry in settings_and_reasons.items()}
    parallel = config.parallel or ParallelOptions()
    of_mesh = [one.name for one in fields(parallel) if one.name != "reduce"]
    sources["mesh"] = _source(parallel, of_mesh, "no copies", prefix="parallel.")
    trained = "an adapter is" if run.parallel.reduce == "last" else "all weights are"
    sources["gradients"] = _source(parallel, ["reduce"], f"{trained} trained", prefix="parallel.")
    return sources


def _notes(facts: Facts) -> list[str]:
    """Return lines on the auxiliary loss, and on positions of long records."""
    notes = []
    if facts.router_loss:
        notes.append(
            "left out   the auxiliary loss that balances the router of the experts  [config.json: "
            f"output_router_logits, router_aux_loss_coef={facts.router_loss:g}]"
        )
    if facts.towers:
        names = ", ".join(map(printable, facts.towers))
        notes.append(f"frozen     {names}: text does not run through; saved as it came")
    if facts.rope_limits:
        lengths = ", ".join(map(str, facts.rope_limits))
        notes.append(
            f"rotary     rows of more than {lengths} tokens have other factors; records on either "
            "side are in batches of their own"
        )
    if facts.longer_records:
        notes.append(
            f"positions  {facts.positions}, as the model was made for; {facts.longer_records}  "
            f"[max_tokens={facts.positions} leaves them out]"
        )
    return notes


def _source(
    settings: RunConfig | ParallelOptions, names: Sequence[str], reason: str, prefix: str = ""
) -> str:
    """Return the settings among `names` that were given; without any, the default's reason."""
    defaults = type(settings).__dataclass_fields__
    given = []
    for name in names:
        value = getattr(settings, name)
        if value != defaults[name].default:
            given.append(f"{prefix}{name}={value}")
    return f"given: {', '.join(given)}" if given else f"default: {reason}"


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


# ---- models, loaded as decided -----------------------------------------------------------------


def scoring_of(config: RunConfig, run: ResolvedRun, group: Group = ALONE) -> Scoring:
    """Return how the run's heads are computed.

    config: settings of the run
    run: decisions of the run
    group: ranks that split the tokens of every batch among themselves (World.context)
    """
    return Scoring(run.workspace / 2**20, run.engine, run.autocast, config.temperature, group)


def load_trained(
    config: RunConfig, run: ResolvedRun, checkpoint: str | os.PathLike[str] | None = None
) -> Policy:
    """Load the policy of a run.

    config: settings of the run
    run: decisions of the run
    checkpoint: directory to load weights from; default: the model of the settings

    The policy knows the dtypes that its final weights are saved in: those of the settings' model,
    also when the weights come from a checkpoint. ValueError for quantized weights that would be
    trained, or sharded.
    """
    policy = load_policy(
        checkpoint or config.model,
        base=None if checkpoint is None else model_and_adapter(config.model)[0],
        dtype=run.weights,
        lora=config.lora if checkpoint is None else None,  # a checkpoint brings its adapter
        memory=config.memory_options(trained=True),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        packed=run.packed,
        in_shards=run.ranks > 1,
        quantize_base=run.quantize_base,
    )
    policy.stored = StoredDtypes.of(config.model, config.save_dtype)
    if not policy.is_adapter:
        refuse_quantized(policy.model, printable(config.model))
    elif run.ranks > 1:
        refuse_quantized_shards(policy, config)
    if run.ranks == 1:
        trained_dtypes = {p.dtype for p in policy.trainable_parameters()}
        needed = run.compute if trained_dtypes - {run.compute} else None
        if needed != run.autocast:
            names = ", ".join(sorted(map(str, trained_dtypes)))
            raise ValueError(
                f"the trained weights of {config.model} are loaded in {names}, and the run decided "
                f"on autocast to {run.autocast}; set master_weights: true, or precision: fp32"
            )
    return policy


def refuse_quantized_shards(policy: Policy, config: RunConfig) -> None:
    """Raise ValueError for weights that came quantized, which several ranks cannot shard."""
    if config.quantize_base is None and quantized_weight(policy.model) is not None:
        raise ValueError(
            f"{printable(config.model)} is quantized, and quantized weights are not sharded; start "
            "one process, or give the model in bf16, with quantize_base: nf4 to hold it at 4 bits"
        )


def load_frozen(config: RunConfig, run: ResolvedRun, *, in_shards: bool | None = None) -> Policy:
    """Load a frozen reference with the numerics of the untrained policy.

    config: settings of the run
    run: decisions of the run
    in_shards: leave the weights in the files; None: where the run has several ranks
    """
    policy = load_policy(
        config.model,
        dtype=run.compute,
        memory=config.memory_options(trained=False),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        packed=run.packed,
        in_shards=run.ranks > 1 if in_shards is None else in_shards,
        quantize_base=run.quantize_base,
    )
    policy.model.requires_grad_(False).eval()
    if run.imitates_autocast:
        match_autocast(policy)
    return policy
