"""The settings of a run: one flat dataclass, read from YAML and the command line.

Every field has one docstring line, which `una-fast train --help` shows. Values that cannot work together are refused
here, by the name of the flag to change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from una_fast.checks import check_number
from una_fast.data.records import RecordOptions
from una_fast.losses import Objective
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.rewards.scale import RewardScale, ScaleKind
from una_fast.rewards.settings import parse_rewards

Precision = Literal["auto", "bf16", "fp32"]

ReferenceKind = Literal["auto", "frozen", "adapter", "cached"]

Optimizer = Literal["adamw", "adamw_8bit", "sgd"]

Schedule = Literal["cosine", "linear", "constant"]

Logger = Literal["tensorboard", "wandb", "trackio"]

Engine = Literal["auto", "torch", "triton"]

Device = Literal["auto", "cpu", "cuda"]

Mode = Literal["offline", "online", "mixed"]

Generation = Literal["padded", "continuous", "vllm"]

Anchor = Literal["ref", "rollout"]

OnMaxKl = Literal["stop", "warn"]


# With the data and the reference, these decide what a run does; a resumed run must not change them.
TRAJECTORY = (
    *(
        "model",
        "beta",
        "pair",
        "binary",
        "score",
        "offset",
        "length_normalize",
        "lora",
        "precision",
        "batch_size",
    ),
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

ONLINE_TRAJECTORY = (
    *(
        "mode",
        "online_fraction",
        "rewards",
        "samples_per_prompt",
        "max_new_tokens",
        "temperature",
        "top_p",
    ),
    *(
        "stop_strings",
        "generation",
        "generation_batch_size",
        "missing_eos_penalty",
        "reward_map",
        "reward_range",
    ),
    *("inner_epochs", "anchor", "reference_refresh"),
)


@dataclass
class OnlineOptions:
    """How a run samples responses from its policy and has them rewarded; of no use to a run that is offline."""

    mode: Mode = "offline"
    """offline: records as they are | online: sample responses to the prompts of the records | mixed: both."""
    online_fraction: float = 0.5
    """mode: mixed: share of batch_size that is prompts to sample from; sources with `online: true` give them."""
    rewards: list[str | dict[str, Any]] = field(default_factory=list)
    """Rewards, summed with weights: module.function names, or mappings with one of function, model, judge, endpoint."""
    samples_per_prompt: int = 4
    """Responses sampled to every prompt; a prompt is computed once for all of them."""
    max_new_tokens: int = 256
    """Longest response sampled, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs, the reference's too, are taken at it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens of this probability; below 1 the samples are not the policy's."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a response, besides the end-of-sequence and end-of-turn tokens."""
    generation: Generation = "padded"
    """What samples: padded | continuous (transformers' continuous batching) | vllm (installed by you; one process)."""
    generation_batch_size: int | None = None
    """Sequences sampled at a time on one rank; null: all of a step."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that max_new_tokens cut off."""
    reward_map: ScaleKind = "none"
    """Rewards to scores in [0, 1]: none (as is) | range (reward_range) | sigmoid | quantile (of the last 4096)."""
    reward_range: list[float] | None = None
    """Lowest and highest possible reward, [lo, hi], missing_eos_penalty included, for reward_map: range."""
    inner_epochs: int = 1
    """Optimizer steps on the responses (and records) of one step; beyond the first they are off-policy."""
    anchor: Anchor = "ref"
    """What the implicit reward of sampled responses is measured from: ref | rollout (the policy that drew them)."""
    reference_refresh: int | None = None
    """Make the policy the new reference every so many optimizer steps; null: the reference stays."""
    max_kl: float | None = None
    """Ceiling of the KL of sampled responses from the reference, in nats per response; null: none."""
    on_max_kl: OnMaxKl = "stop"
    """What a step above max_kl does: stop (the run ends there, and is saved) | warn."""
    off_policy_ok: bool = False
    """Allow reward_mse with top_p below 1 or length_normalize, where it no longer follows the policy gradient."""
    saved_completions: int = 8
    """Prompts per step whose responses, rewards and log-probs go to completions.jsonl."""

    def check_online(self) -> None:
        """ValueError for values that are wrong by themselves or together."""
        for name, choices in (
            *(("mode", Mode), ("generation", Generation), ("anchor", Anchor)),
            ("on_max_kl", OnMaxKl),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}"
                )
        if self.mode == "offline":
            for f, default in (
                (f, getattr(OnlineOptions(), f.name)) for f in fields(OnlineOptions)
            ):
                if getattr(self, f.name) != default:
                    raise ValueError(
                        f"{f.name}={getattr(self, f.name)!r} is for sampled responses, and mode is offline; set "
                        f"mode: online or mixed, or remove {f.name}"
                    )
            return
        if not self.rewards:
            raise ValueError(
                f"mode={self.mode} needs rewards; set --rewards '[module.function]', or mappings with one of function, "
                "model, judge, endpoint"
            )
        parse_rewards(self.rewards)
        for name in ("samples_per_prompt", "max_new_tokens", "inner_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("generation_batch_size", "reference_refresh"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null")
        if (
            self.generation_batch_size is not None
            and self.generation_batch_size < self.samples_per_prompt
        ):
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} must hold the samples_per_prompt="
                f"{self.samples_per_prompt} of a prompt, which are sampled together"
            )
        if self.generation_batch_size is not None and self.generation == "vllm":
            raise ValueError(
                "generation_batch_size is not read with generation=vllm, which batches by itself; remove it"
            )
        if self.mode == "online" and self.online_fraction != OnlineOptions.online_fraction:
            raise ValueError(
                f"online_fraction={self.online_fraction} is read with mode: mixed; remove it"
            )
        if not check_number("temperature", self.temperature) > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_p < 1 and self.generation != "padded":
            raise ValueError(
                f"generation={self.generation} gives log-probs of the distribution that top_p={self.top_p} has cut; "
                "set top_p: 1, or generation: padded"
            )
        if self.stop_strings and self.generation == "continuous":
            raise ValueError(
                "generation=continuous knows no stop_strings; set generation: padded, or remove them"
            )
        if not all(self.stop_strings):
            raise ValueError(
                "stop_strings holds an empty text, which ends every response; remove it"
            )
        if not check_number("missing_eos_penalty", self.missing_eos_penalty) >= 0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} must not be negative")
        RewardScale(self.reward_map, self.reward_range)  # refuses what does not go together
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"max_kl={self.max_kl} must be positive, or null for no ceiling")
        if self.on_max_kl != "stop" and self.max_kl is None:
            raise ValueError(f"on_max_kl={self.on_max_kl} acts at max_kl, which is not set")
        if self.saved_completions < 0:
            raise ValueError(f"saved_completions={self.saved_completions} must not be negative")
        if self.mode == "mixed" and not 0 < self.online_fraction < 1:
            raise ValueError(
                f"online_fraction={self.online_fraction} must lie between 0 and 1; or set mode: online"
            )


@dataclass
class RunConfig(RecordOptions, OnlineOptions):
    """A training run. Fields of the records (columns, feedback, scores, limits) are the defaults of every source."""

    model: str = ""
    """Model to align: a directory in Hugging Face form, a PEFT adapter directory, or a hub name. Required."""
    data: str | list[str | dict[str, Any]] = field(default_factory=list)
    """Sources: paths, dataset names, or mappings {path, weight, split, online, any field of the records}. Required."""
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
    score: Literal["auto", "mse", "bce", "reward_mse"] = "auto"
    """Loss of scores: mse or bce on sigmoid(r), or reward_mse on r itself; auto: mse offline, else reward_mse."""
    offset: float | Literal["auto", "group", "ema"] = "auto"
    """f(x) + c added to r of labels and scores: a number, or online group | ema (see README); auto: 0, online group."""
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
        self.data, self.eval_data = (
            [x] if x and isinstance(x, str) else x for x in (self.data, self.eval_data)
        )
        if isinstance(self.lora, dict):  # as it comes from YAML
            self.lora = LoraOptions(**self.lora)
        self.adam_betas = tuple(self.adam_betas)
        self.check_online()
        self._choose_forms()
        for name in self.required_settings():
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is missing; set --{name} or `{name}:` in the configuration file"
                )
        self.objective()  # refuses wrong forms and a wrong beta
        for name, choices in (
            *(("reference", ReferenceKind), ("precision", Precision), ("optimizer", Optimizer)),
            *(("lr_schedule", Schedule), ("engine", Engine), ("device", Device)),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}"
                )
        for name in ("batch_size", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "micro_batch_size",
            "max_tokens_per_batch",
            "max_steps",
            "eval_every",
            "save_every",
        ):
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
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        if self.eval_fraction and self.eval_data:
            raise ValueError("give eval_data or eval_fraction, not both")
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                f"eval_every={self.eval_every} has nothing to evaluate on; set eval_data or eval_fraction"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations=true moves what gradient_checkpointing keeps; set gradient_checkpointing=true too"
            )
        if self.liger and self.device == "cpu":
            raise ValueError("liger=true needs a GPU; set liger=false, or device=cuda")
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile={self.mlp_tile} must be at least 1 token, or null")
        if self.memory_gib is not None and not 0 < self.memory_gib < float("inf"):
            raise ValueError(
                f"memory_gib={self.memory_gib} must be positive and finite, or null for all of the device"
            )
        self._check_rollouts()
        if self.reference == "adapter" and self.lora is None:
            raise ValueError(
                "reference=adapter needs lora; use reference=frozen or cached for full fine-tuning"
            )
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
            raise ValueError(
                f"loggers: unknown {sorted(unknown)}; known: {', '.join(get_args(Logger))}"
            )

    def _choose_forms(self) -> None:
        """score and offset, where they are "auto"."""
        if self.score == "auto":
            self.score = "mse" if self.mode == "offline" else "reward_mse"
        on_rewards = self.mode != "offline" and self.score == "reward_mse"
        if self.offset == "auto":
            self.offset = ("group" if self.samples_per_prompt > 1 else "ema") if on_rewards else 0.0
        if isinstance(self.offset, str):
            if self.offset not in ("group", "ema"):
                raise ValueError(f"offset={self.offset!r} must be a number, group or ema")
            if not on_rewards:
                raise ValueError(
                    f"offset={self.offset} centres the rewards of sampled responses; set mode: online and score: "
                    "reward_mse, or give a number"
                )
            if self.offset == "group" and self.samples_per_prompt < 2:
                raise ValueError(
                    "offset=group needs samples_per_prompt of at least 2; use ema for one sample"
                )

    def _check_rollouts(self) -> None:
        """What the settings of online runs and others exclude."""
        if self.mode == "offline":
            return
        if self.mode == "online":
            defaults = RecordOptions()
            for name in (
                "feedback",
                "ties",
                "margin",
                "score_columns",
                "divide",
                "score_map",
                "score_center",
            ):
                if getattr(self, name) != getattr(defaults, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} makes feedback of records, and mode=online reads prompts "
                        f"alone; remove {name}, or set mode: mixed"
                    )
        if self.score == "reward_mse" and not self.off_policy_ok:
            for name, value, right in (
                ("top_p", self.top_p, 1.0),
                ("length_normalize", self.length_normalize, False),
            ):
                if value != right:
                    raise ValueError(
                        f"{name}={value}: the samples or log-probs are then not those of the policy, and reward_mse "
                        f"does not follow the policy gradient; set {name}: {str(right).lower()}, or off_policy_ok: true"
                    )
        if self.reference == "cached":
            raise ValueError(
                "reference=cached has no log-probs of responses yet to be sampled; use frozen or adapter"
            )
        if self.reference_refresh and self.lora:
            raise ValueError(
                "reference_refresh copies all weights into the reference; it does not go with lora"
            )
        if self.save_every and self.save_every % self.inner_epochs:
            raise ValueError(
                f"save_every={self.save_every} would save between the {self.inner_epochs} inner_epochs of one rollout; "
                "make it a multiple"
            )
        if self.mode == "mixed":
            if self.temperature != 1:
                raise ValueError(
                    f"temperature={self.temperature}: the log-probs of records would be taken at it too; set "
                    "temperature: 1, or mode: online"
                )
            if not 0 < self.online_batch_size() < self.batch_size:
                raise ValueError(
                    f"online_fraction={self.online_fraction} of batch_size={self.batch_size} leaves no prompts, or no "
                    "records; raise batch_size"
                )

    def online_batch_size(self) -> int:
        """Prompts of a step that are sampled from, over all ranks."""
        share = {"offline": 0.0, "mixed": self.online_fraction, "online": 1.0}[self.mode]
        return round(share * self.batch_size)

    def required_settings(self) -> tuple[str, ...]:
        """Names of the fields that have no default."""
        return ("model", "output_dir", "data")

    def objective(self) -> Objective:
        """The loss of every kind of feedback."""
        constant = 0.0 if isinstance(self.offset, str) else self.offset
        return Objective(
            self.beta, self.pair, self.binary, self.score, constant, self.length_normalize
        )

    def memory_options(self, *, trained: bool = True) -> MemoryOptions:
        """The switches of a model that is trained, or of one that only scores."""
        checkpointing = {"gradient_checkpointing": trained and self.gradient_checkpointing}
        offload = {"offload_activations": trained and self.offload_activations}
        return MemoryOptions(**checkpointing, **offload, mlp_tile=self.mlp_tile, liger=self.liger)

    def record_options(self) -> RecordOptions:
        """The defaults that sources start from."""
        return RecordOptions(
            **{name: getattr(self, name) for name in RecordOptions.__dataclass_fields__}
        )

    def trajectory(self) -> dict[str, Any]:
        """What a run that continues another one must share with it, beside data and reference; plain values."""
        names = TRAJECTORY if self.mode == "offline" else TRAJECTORY + ONLINE_TRAJECTORY
        values = {name: value for name, value in self._plain().items() if name in names}
        if (
            "rewards" in values
        ):  # not how they are asked: a run goes on with another port, or more patience
            values["rewards"] = [spec.identity() for spec in parse_rewards(self.rewards)]
        return values

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML that --config reads."""
        import yaml

        path.write_text(yaml.safe_dump(self._plain(), sort_keys=False), encoding="utf-8")

    def _plain(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
