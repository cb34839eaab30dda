"""The decisions of a run, made once, before a model is loaded.

    settings (config.py) + facts (the machine, the model's config, the records)  ->  ResolvedRun

Trainer, planner, precompute and bench read the decisions here and derive none of them again:

    compute     dtype of matrix products, and of frozen weights
    weights     dtype of the policy's own weights; wider than `compute` under master_weights alone
    autocast    dtype that products are cast to, where trained weights are wider than `compute`
    reference   frozen (a copy of the model) | adapter (LoRA switched off) | cached (column ref_logps)
    packed      rows with a shared prompt, or padded batches
    workspace   bytes of the fused head
    engine      torch | triton
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from una_fast.attention.probe import packing_refusal
from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.head.engines import choose_engine
from una_fast.head.plan import workspace_bytes
from una_fast.model.loading import model_and_adapter, outline
from una_fast.model.policy import Policy, load_policy
from una_fast.model.reference import has_cached_logps
from una_fast.model.scoring import Scoring, autocast_dtype, match_autocast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """The machine, the model and the records of a run, as far as decisions depend on them."""

    device: str
    """cpu | cuda"""
    ranks: int
    """Processes of the run; more than one are sharded by FSDP2."""
    is_adapter: bool
    """The model is a PEFT adapter directory."""
    keeps_float32: bool
    """The model's class keeps some weights in float32, in a model of bfloat16 too."""
    packing_refusal: str | None
    """Reason why rows of this model cannot be packed; None where they can."""
    has_ref_logps: bool
    """Every record brings ref_logps."""


@dataclass(frozen=True)
class ResolvedRun:
    """The decisions of one run; the module's docstring says what each of them means."""

    device: str
    ranks: int
    compute: torch.dtype
    weights: torch.dtype
    autocast: torch.dtype | None
    reference: str
    packed: bool
    workspace: int
    engine: str
    sources: dict[str, str] = field(default_factory=dict)
    """Decision -> its source: a setting that was given, or the default and the fact behind it."""

    @property
    def imitates_autocast(self) -> bool:
        """Whether a frozen copy must compute as float32 weights do under autocast."""
        return self.autocast is not None and self.weights != self.compute

    def lines(self) -> list[str]:
        """Return the decisions as text, one per line, each with its source."""
        wide = "" if self.autocast is None else f", autocast to {_name(self.autocast)}"
        shown = {
            "device": f"{self.device}, {self.ranks} rank{'s' * (self.ranks > 1)}",
            "dtypes": f"products {_name(self.compute)}, weights {_name(self.weights)}{wide}",
            "reference": self.reference,
            "rows": "packed" if self.packed else "padded",
            "workspace": f"{self.workspace / 2**20:g} MiB",
            "engine": self.engine,
        }
        return [f"{name:10} {value}  [{self.sources[name]}]" for name, value in shown.items()]

    def plain(self) -> dict[str, Any]:
        """Return the decisions and their sources as plain values, to be saved as JSON."""
        dtypes = {name: _name(getattr(self, name)) for name in ("compute", "weights", "autocast")}
        return asdict(self) | dtypes


def find_facts(
    config: RunConfig, records: Sequence[Example], *, device: str, ranks: int = 1
) -> Facts:
    """Look at the model's config and at the records; nothing is loaded.

    config: settings of the run
    records: all records, held-out ones too; no prompts to sample from
    device: "cpu" or "cuda"
    ranks: processes of the run

    ValueError where only some records bring ref_logps and the run would use them.
    """
    model = outline_of(config)
    refusal = packing_refusal(model) if config.packing else None
    if refusal is not None:
        logger.warning("batches are padded, not packed: %s", refusal)
    asked = config.reference == "auto" and config.mode == "offline"
    return Facts(
        device=device,
        ranks=ranks,
        is_adapter=model_and_adapter(config.model)[1] is not None,
        keeps_float32=_keeps_float32(model),
        packing_refusal=refusal,
        has_ref_logps=asked and has_cached_logps(records),
    )


def outline_of(config: RunConfig) -> PreTrainedModel:
    """Build the model of a run from its config alone: shapes, and no numbers."""
    path, _ = model_and_adapter(config.model)
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    return outline(
        model_config,
        dtype=torch.float32,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def _keeps_float32(model: PreTrainedModel) -> bool:
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    return bool(parts & set(kept))


def resolve(config: RunConfig, facts: Facts) -> ResolvedRun:
    """Decide everything that a run computes with.

    bf16 weights have bf16 gradients, which micro-batches are added up in; with float32 weights both
    are float32. Adapters are float32 over a base in the dtype of the products.
    """
    bf16 = config.precision == "bf16" or (config.precision == "auto" and facts.device == "cuda")
    compute = torch.bfloat16 if bf16 else torch.float32
    wide = config.master_weights and not config.lora
    weights = torch.float32 if wide else compute
    trains_adapter = config.lora is not None or facts.is_adapter
    mixed = trains_adapter or facts.keeps_float32 or weights != compute
    # FSDP2 casts the weights that it gathers by itself.
    autocast = compute if bf16 and mixed and facts.ranks == 1 else None
    run = ResolvedRun(
        device=facts.device,
        ranks=facts.ranks,
        compute=compute,
        weights=weights,
        autocast=autocast,
        reference=_reference(config, facts),
        packed=config.packing and facts.packing_refusal is None,
        workspace=workspace_bytes(facts.device, config.workspace_mb),
        engine=_engine(config, facts.device, compute),
    )
    run.sources.update(_sources(config, facts, run))
    return run


def _reference(config: RunConfig, facts: Facts) -> str:
    """Return the kind of reference that a run uses."""
    if config.reference == "cached" or (config.reference == "auto" and facts.has_ref_logps):
        return "cached"
    return "adapter" if config.lora and config.reference != "frozen" else "frozen"


def _engine(config: RunConfig, device: str, compute: torch.dtype) -> str:
    """Return the name of the engine; a GPU that is planned for and not there has Triton."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch" if config.engine == "torch" else "triton"
    return choose_engine(config.engine, torch.device(device), compute).name


def _sources(config: RunConfig, facts: Facts, run: ResolvedRun) -> dict[str, str]:
    """Return the source of each line: the settings that were given, or the default's reason."""
    reasons = {
        "cached": "every record brings ref_logps",
        "adapter": "lora is set",
        "frozen": "lora is not set",
    }
    found = {
        "device": ("device", f"{facts.device} is there"),
        "dtypes": ("precision master_weights lora", f"on {facts.device}"),
        "reference": ("reference", reasons[run.reference]),
        "rows": ("packing", facts.packing_refusal or "the packing probe passed"),
        "workspace": ("workspace_mb", f"on {facts.device}"),
        "engine": ("engine", f"on {facts.device}"),
    }
    return {line: _source(config, *entry) for line, entry in found.items()}


def _source(config: RunConfig, names: str, reason: str) -> str:
    defaults = type(config).__dataclass_fields__
    given = []
    for name in names.split():
        value = getattr(config, name)
        if value != defaults[name].default:
            given.append(f"{name}={value}")
    return f"given: {', '.join(given)}" if given else f"default: {reason}"


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def scoring_of(config: RunConfig, run: ResolvedRun) -> Scoring:
    """Return how the run's heads are computed."""
    return Scoring(config.workspace_mb, config.engine, run.autocast, config.temperature)


def load_trained(
    config: RunConfig, run: ResolvedRun, checkpoint: str | os.PathLike[str] | None = None
) -> Policy:
    """Load the policy of a run, from a checkpoint where one is given."""
    policy = load_policy(
        checkpoint or config.model,
        dtype=run.weights,
        lora=config.lora if checkpoint is None else None,  # a checkpoint brings its adapter
        memory=config.memory_options(trained=True),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        packed=run.packed,
    )
    if run.ranks == 1:
        found = autocast_dtype(policy, run.compute)
        assert found == run.autocast, f"weights need autocast to {found}, resolved: {run.autocast}"
    return policy


def load_frozen(config: RunConfig, run: ResolvedRun) -> Policy:
    """Load a frozen reference, so that it computes what the untrained policy computes."""
    policy = load_policy(
        config.model,
        dtype=run.compute,
        memory=config.memory_options(trained=False),
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        packed=run.packed,
    )
    policy.model.requires_grad_(False).eval()
    if run.imitates_autocast:
        match_autocast(policy)
    return policy
