"""The settings of a run: one flat dataclass, read from YAML and the command line.

Every field has one docstring line, which `una-fast train --help` shows. Values that cannot work together are refused
here, by the name of the flag to change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from una_fast.losses import Objective
from una_fast.memory import MemoryOptions
from una_fast.records import RecordOptions

Precision = Literal["auto", "bf16", "fp32"]
ReferenceKind = Literal["auto", "frozen", "adapter", "cached"]
Optimizer = Literal["adamw", "adamw_8bit", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Logger = Literal["tensorboard", "wandb", "trackio"]
Engine = Literal["auto", "torch", "triton"]
Device = Literal["auto", "cpu", "cuda"]

# With the data and the reference, these decide what a run does; a resumed run must not change them.
TRAJECTORY = (
    *("model", "beta", "pair", "binary", "score", "offset", "length_normalize", "lora", "precision", "batch_size"),
    *(
        "learning_rate",
        "lr_schedule",
        "warmup_ratio",
        "optimizer",
        "offload_optimizer",
        "master_weights",
        "weight_decay",
        "adam_betas",
        "max_grad_norm",
        "seed",
    ),
)


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters on linear layers; without dropout."""

    r: int = 32
    """Rank, at least 1."""
    alpha: int = 16
    """The adapter's output is multiplied by alpha / r."""
    target_modules: list[str] | str = "all-linear"
    """Names of the layers that get an adapter, or "all-linear": every linear layer but the head."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0:
            raise ValueError(f"lora r={self.r}, alpha={self.alpha}: r must be at least 1 and alpha positive")
        if not self.target_modules:
            raise ValueError('lora target_modules is empty; name layers, or use "all-linear"')


@dataclass
class RunConfig(RecordOptions):
    """A training run. Fields of the records (columns, feedback, scores, limits) are the defaults of every source."""

    model: str = ""
    """Model to align: a directory in Hugging Face form, a PEFT adapter directory, or a hub name. Required."""
    data: str | list[str | dict[str, Any]] = field(default_factory=list)
    """Sources: paths or dataset names, or mappings {path, weight, split, and any field of the records}. Required."""
    output_dir: str = ""
    """Where checkpoints, metrics and the final model go. Required."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name; null: the model's."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    beta: float = 0.1
    """Scale of the implicit reward r = beta * (log pi - log pi_ref)."""
    pair: Literal["logistic", "linear", "squared"] = "logistic"
    """Loss of pairs; logistic is DPO."""
    binary: Literal["bce", "mse"] = "bce"
    """Loss of labels, on sigmoid(r)."""
    score: Literal["mse", "bce", "reward_mse"] = "mse"
    """Loss of scores: on sigmoid(r) with scores in [0, 1], or reward_mse on r itself with any finite reward."""
    offset: float = 0.0
    """Constant added to r before labels and scores are compared with it."""
    length_normalize: bool = False
    """Use the mean over the tokens of a response instead of the sum."""

    reference: ReferenceKind = "auto"
    """Reference log-probs: frozen (a copy of the model) | adapter (LoRA switched off) | cached (column ref_logps)."""
    lora: LoraOptions | None = None
    """Train low-rank adapters instead of all weights; null: full fine-tuning."""
    precision: Precision = "auto"
    """Compute dtype, also of the weights unless master_weights. auto: bf16 on a GPU, fp32 on a CPU."""
    master_weights: bool = False
    """Keep trained weights and gradients in fp32, for 4 more bytes per weight; adamw rounds bf16 ones at random."""
    gradient_checkpointing: bool = False
    """Keep one hidden state per layer and recompute the rest in backward."""
    offload_activations: bool = False
    """Move the hidden states of gradient_checkpointing to pinned host memory until backward."""
    mlp_tile: int | None = None
    """Run MLPs on so many tokens at a time, recomputed in backward; null: on all tokens at once."""
    liger: bool = False
    """Use liger-kernel's RMSNorm, RoPE and gated MLPs (a GPU, and liger-kernel installed)."""
    packing: bool = True
    """Pack prompts with all their responses into rows without padding, where a probe shows that the model allows it."""
    attn_implementation: str | None = None
    """Attention of unpacked batches and generation (eager, sdpa, flash_attention_2); null: the model's default."""
    workspace_mb: float | None = None
    """Workspace of the fused head in MiB; null: 2048 on a GPU, 256 on a CPU."""
    memory_gib: float | None = None
    """Memory per device that the run may take, in GiB; a run planned to need more is refused. null: all there is."""
    engine: Engine = "auto"
    """Engine of the fused head."""
    device: Device = "auto"
    """Where to train."""

    epochs: float = 1.0
    """Passes over the mixture of sources; may be fractional."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; null: epochs decide."""
    batch_size: int = 32
    """Records per optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Records per forward on one rank, at most; null: 1, or as many as max_tokens_per_batch takes."""
    max_tokens_per_batch: int | None = None
    """Tokens per forward on one rank, padding included; a longer record is a batch of its own. null: no limit."""
    learning_rate: float = 5e-6
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """Learning rate after the warmup: cosine or linear to zero, or constant."""
    warmup_ratio: float = 0.1
    """Fraction of all steps over which the learning rate rises from zero."""
    optimizer: Optimizer = "adamw"
    """adamw | adamw_8bit (torchao's, moments in 8 bits) | sgd (plain, of fp32 weights only)."""
    offload_optimizer: bool = False
    """Keep adamw's moments, and fp32 copies of the trained weights, in host memory, and step there."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw and adamw_8bit."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of adamw and adamw_8bit."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; null: no clipping."""
    seed: int = 0
    """Seed of the order of records and of new adapters."""

    eval_data: str | list[str | dict[str, Any]] = field(default_factory=list)
    """Sources of the evaluation set."""
    eval_fraction: float = 0.0
    """Fraction of the training records held out for evaluation when eval_data is empty."""
    eval_every: int | None = None
    """Evaluate every so many steps; null: at the start and the end of the run, if there is anything to evaluate on."""
    save_every: int | None = None
    """Write a checkpoint every so many steps; null: only the final model."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints kept; older ones are deleted."""
    resume: bool = False
    """Continue from the newest complete checkpoint in output_dir, or start afresh if there is none."""
    log_every: int = 1
    """Write metrics every so many steps, averaged over them."""
    loggers: list[Logger] = field(default_factory=lambda: ["tensorboard"])
    """Back-ends besides metrics.jsonl: tensorboard | wandb | trackio."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data, self.eval_data = ([x] if x and isinstance(x, str) else x for x in (self.data, self.eval_data))
        if isinstance(self.lora, dict):  # as it comes from YAML
            self.lora = LoraOptions(**self.lora)
        self.adam_betas = tuple(self.adam_betas)
        for name in self.required_settings():
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; set --{name} or `{name}:` in the configuration file")
        self.objective()  # refuses wrong forms and a wrong beta
        for name, choices in (
            *(("reference", ReferenceKind), ("precision", Precision), ("optimizer", Optimizer)),
            *(("lr_schedule", Schedule), ("engine", Engine), ("device", Device)),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        for name in ("batch_size", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("micro_batch_size", "max_tokens_per_batch", "max_steps", "eval_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null")
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs={self.epochs} must be positive and finite")
        if not self.learning_rate >= 0 or not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"learning_rate={self.learning_rate} must not be negative, and warmup_ratio={self.warmup_ratio} must "
                "lie in [0, 1]"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        if self.eval_fraction and self.eval_data:
            raise ValueError("give eval_data or eval_fraction, not both")
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            raise ValueError(f"eval_every={self.eval_every} has nothing to evaluate on; set eval_data or eval_fraction")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations=true moves what gradient_checkpointing keeps; set gradient_checkpointing=true too"
            )
        if self.liger and self.device == "cpu":
            raise ValueError("liger=true needs a GPU; set liger=false, or device=cuda")
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile={self.mlp_tile} must be at least 1 token, or null")
        if self.memory_gib is not None and not 0 < self.memory_gib < float("inf"):
            raise ValueError(f"memory_gib={self.memory_gib} must be positive and finite, or null for all of the device")
        if self.reference == "adapter" and self.lora is None:
            raise ValueError("reference=adapter needs lora; use reference=frozen or cached for full fine-tuning")
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} acts on adamw and adamw_8bit only; remove it, or set optimizer=adamw"
            )
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError(
                f"offload_optimizer=true keeps the state of adamw on the host, not that of {self.optimizer}; set "
                "optimizer=adamw"
            )
        if self.output_dir and Path(self.output_dir).resolve() == Path(self.model).resolve():
            raise ValueError(
                f"output_dir={self.output_dir} is the model itself, which would be overwritten; set another"
            )
        unknown = set(self.loggers) - set(get_args(Logger))
        if unknown:
            raise ValueError(f"loggers: unknown {sorted(unknown)}; known: {', '.join(get_args(Logger))}")

    def required_settings(self) -> tuple[str, ...]:
        """Names of the fields that have no default."""
        return ("model", "output_dir", "data")

    def objective(self) -> Objective:
        """The loss of every kind of feedback."""
        return Objective(self.beta, self.pair, self.binary, self.score, self.offset, self.length_normalize)

    def memory_options(self, *, trained: bool = True) -> MemoryOptions:
        """The switches of a model that is trained, or of one that only scores."""
        checkpointing = {"gradient_checkpointing": trained and self.gradient_checkpointing}
        offload = {"offload_activations": trained and self.offload_activations}
        return MemoryOptions(**checkpointing, **offload, mlp_tile=self.mlp_tile, liger=self.liger)

    def record_options(self) -> RecordOptions:
        """The defaults that sources start from."""
        return RecordOptions(**{name: getattr(self, name) for name in RecordOptions.__dataclass_fields__})

    def trajectory(self) -> dict[str, Any]:
        """What a run that continues another one must share with it, beside data and reference; plain values."""
        return {name: value for name, value in self._plain().items() if name in TRAJECTORY}

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML that --config reads."""
        import yaml

        path.write_text(yaml.safe_dump(self._plain(), sort_keys=False), encoding="utf-8")

    def _plain(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
