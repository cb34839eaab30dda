"""The settings of a run: a flat dataclass, read from YAML and the command line.

    RunConfig = RunBasics + ObjectiveOptions + OptimizerOptions + MemoryAndSpeed
              + OnlineOptions + RecordOptions (data/settings.py) + EvaluationAndSaving

`una-fast train --help` shows a group for every base, in the same order, titled by the docstring of
the base, and a line for every field, the docstring below the field. Values in contradiction are
refused here, by the name of the flag to change.
"""

import inspect
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from una_fast.checks import check_at_least
from una_fast.data.settings import RecordOptions
from una_fast.files import write_text
from una_fast.generation_server import ServerOptions
from una_fast.model.settings import LoraOptions, MemoryOptions
from una_fast.parallel import ParallelOptions
from una_fast.printable import printable, shown, was_redacted, without_secrets
from una_fast.rewards.scale import RewardScale
from una_fast.rewards.settings import parse_rewards
from una_fast.score_maps import ScoreMap

if TYPE_CHECKING:
    from una_fast.losses import Objective

Precision = Literal["auto", "bf16", "fp32"]
SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]

ReferenceKind = Literal["auto", "frozen", "adapter", "cached"]

Optimizer = Literal["adamw", "adamw_8bit", "sgd"]

QuantizedBase = Literal["nf4"]

Schedule = Literal["cosine", "linear", "constant"]

Logger = Literal["tensorboard", "wandb", "trackio"]

Engine = Literal["auto", "torch", "triton"]

Device = Literal["auto", "cpu", "cuda"]

Mode = Literal["offline", "online", "mixed"]

Generation = Literal["padded", "continuous", "vllm", "vllm_server"]

Anchor = Literal["ref", "rollout"]

OnMaxKl = Literal["stop", "warn"]


MOST_EPOCHS = 10**6

# With the data and the reference, these decide the numbers of a run; a resumed run keeps them.
TRAJECTORY = (
    "beta",
    "pair",
    "binary",
    "score",
    "offset",
    "length_normalize",
    "lora",
    "quantize_base",
    "precision",
    "batch_size",
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
)

# The same for runs that sample.
ONLINE_TRAJECTORY = (
    "mode",
    "online_fraction",
    "rewards",
    "samples_per_prompt",
    "max_new_tokens",
    "temperature",
    "top_p",
    "stop_strings",
    "generation",
    "generation_batch_size",
    "rollout_lag",
    "missing_eos_penalty",
    "reward_map",
    "reward_range",
    "inner_epochs",
    "anchor",
    "reference_refresh",
)

# Settings of records that make feedback; prompts to sample from have none.
FEEDBACK_SETTINGS = (
    "feedback",
    "ties",
    "margin",
    "score_columns",
    "divide",
    "score_map",
    "score_center",
)


@dataclass
class RunBasics:
    """Model and data."""

    model: str = ""
    """Directory of a model or PEFT adapter, GGUF file, or hub name (with @revision). Required."""
    data: str | list[str | dict[str, Any]] = field(default_factory=list)
    """Sources: paths, names, or {path, weight, split, online, any field of records}. Required."""
    output_dir: str = ""
    """Directory of the checkpoints, the metrics and the final model. Required."""
    tokenizer: str | None = None
    """Tokenizer directory or hub name; null: the model's."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""

    def required_settings(self) -> tuple[str, ...]:
        """Return the names of the fields without a usable default."""
        return ("model", "output_dir", "data")

    def _check_required(self) -> None:
        for name in self.required_settings():
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is missing; set --{name} or `{name}:` in the configuration file"
                )


@dataclass
class ObjectiveOptions:
    """Objective: losses, and the reference in the losses."""

    beta: float = 0.1
    """Scale of the implicit reward r = beta * (log pi - log pi_ref)."""
    pair: Literal["logistic", "linear", "squared"] = "logistic"
    """Loss of pairs; logistic is DPO."""
    binary: Literal["bce", "mse"] = "bce"
    """Loss of labels, on sigmoid(r)."""
    score: Literal["auto", "mse", "bce", "reward_mse"] = "auto"
    """Loss of scores: mse, bce on sigmoid(r); reward_mse on r; auto: mse offline or reward_mse."""
    offset: float | Literal["auto", "group", "ema"] = "auto"
    """f(x) + c added to r of labels and scores: a number, online group | ema; auto: 0, or group."""
    length_normalize: bool = False
    """Use the mean over the tokens of a response instead of the sum."""
    reference: ReferenceKind = "auto"
    """Reference: frozen (copy of the model) | adapter (LoRA off) | cached (column ref_logps)."""

    def _check_objective(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive and finite")

    def objective(self) -> "Objective":
        """Return the loss of every kind of feedback; ValueError for wrong forms or a wrong beta."""
        from una_fast.losses import Objective  # here, since it imports torch

        constant = 0.0 if isinstance(self.offset, str) else self.offset
        return Objective(
            self.beta, self.pair, self.binary, self.score, constant, self.length_normalize
        )


@dataclass
class OptimizerOptions:
    """Optimizer: trained weights, and steps."""

    lora: LoraOptions | None = None
    """Train low-rank adapters instead of all weights; null: full fine-tuning."""
    quantize_base: QuantizedBase | None = None
    """nf4: hold frozen linear weights under an adapter at 4 bits (QLoRA); null: as precision."""
    epochs: float | None = None
    """Passes over the mixture, may be fractional; null: 1, or as many as max_steps takes."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null: epochs decide."""
    batch_size: int = 32
    """Records per optimizer step, over all ranks."""
    learning_rate: float = 5e-6
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """Learning rate after the warmup: cosine or linear to zero, or constant."""
    warmup_ratio: float = 0.1
    """Fraction of all steps over which the learning rate rises to its peak."""
    optimizer: Optimizer = "adamw"
    """adamw | adamw_8bit (torchao's, moments in 8 bits) | sgd (plain, of fp32 weights only)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw and adamw_8bit."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of adamw and adamw_8bit."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; null: no clipping."""
    max_skipped_steps: int = 3
    """Steps in a row with a gradient that is not finite before the run stops; each is skipped."""
    seed: int = 0
    """Seed of the order of records and of new adapters."""

    def _check_steps(self) -> None:
        check_at_least(1, self, ["batch_size"])
        check_at_least(1, self, ["max_steps"], or_null=True)
        check_at_least(0, self, ["max_skipped_steps", "seed", "learning_rate", "weight_decay"])
        if self.epochs is not None and not 0 < self.epochs <= MOST_EPOCHS:
            raise ValueError(
                f"epochs={self.epochs} must be positive, and at most {MOST_EPOCHS}; or null"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio} must lie in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)} must lie in [0, 1), 1 left out")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping"
            )
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} acts on adamw and adamw_8bit only; remove it, "
                "or set optimizer=adamw"
            )


@dataclass
class MemoryAndSpeed:
    """Memory and speed: the same training, computed in another way."""

    precision: Precision = "auto"
    """Compute dtype, and of weights without master_weights; auto: bf16 on a GPU, fp32 on a CPU."""
    master_weights: bool = False
    """Trained weights and gradients in fp32: 4 bytes more each; adamw rounds bf16 at random."""
    gradient_checkpointing: bool = False
    """Keep one hidden state per layer and recompute the rest in backward."""
    offload_activations: bool = False
    """Move the hidden states of gradient_checkpointing to pinned host memory until backward."""
    mlp_tile: int | None = None
    """Run MLPs on so many tokens at a time, recomputed in backward; null: on all tokens at once."""
    offload_optimizer: bool = False
    """Keep adamw's moments, and fp32 copies of the trained weights, in host memory; step there."""
    liger: bool = False
    """Use liger-kernel's RMSNorm, RoPE and gated MLPs (a GPU, and liger-kernel installed)."""
    packing: bool = True
    """Pack prompts with all their responses into rows without padding, if a probe allows it."""
    micro_batch_size: int | None = None
    """Records per forward on a rank, at most; null: 1, or as many as max_tokens_per_batch takes."""
    max_tokens_per_batch: int | None = None
    """Tokens per forward on a rank, with padding; a longer record goes alone. null: no limit."""
    attn_implementation: str | None = None
    """Attention of unpacked batches: eager, sdpa, flash_attention_2; null: the model's default."""
    workspace_mb: float | None = None
    """Workspace of the fused head in MiB; null: 2048 on a GPU, 256 on a CPU."""
    memory_gib: float | None = None
    """GiB per device that the run may take; a run planned to need more is refused. null: all."""
    engine: Engine = "auto"
    """Engine of the fused head."""
    device: Device = "auto"
    """Device to train on."""
    parallel: ParallelOptions | None = None
    """How several ranks share the work, as {replicate: 2, context: 4}; null: all of them shard."""

    def memory_options(self, *, trained: bool = True) -> MemoryOptions:
        """Return the switches of a trained model, or of a model for scoring alone."""
        return MemoryOptions(
            gradient_checkpointing=trained and self.gradient_checkpointing,
            offload_activations=trained and self.offload_activations,
            mlp_tile=self.mlp_tile,
            liger=self.liger,
        )

    def _check_memory(self) -> None:
        check_at_least(1, self, ["micro_batch_size", "max_tokens_per_batch"], or_null=True)
        if self.workspace_mb is not None and not self.workspace_mb > 0:
            raise ValueError(f"workspace_mb={self.workspace_mb} must be positive, or null")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations=true moves what gradient_checkpointing keeps; set "
                "gradient_checkpointing=true too"
            )
        if self.liger and self.device == "cpu":
            raise ValueError("liger=true needs a GPU; set liger=false, or device=cuda")
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile={self.mlp_tile} must be at least 1 token, or null")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(
                f"memory_gib={self.memory_gib} must be positive and finite, or null for all of "
                "the device"
            )


@dataclass
class OnlineOptions:
    """Online: sampling of responses from the policy, and rewards; not read by offline runs."""

    mode: Mode = "offline"
    """offline: records as they are | online: responses sampled to their prompts | mixed: both."""
    online_fraction: float = 0.5
    """mode: mixed: share of batch_size that is prompts, from sources with `online: true`."""
    rewards: list[str | dict[str, Any]] = field(default_factory=list)
    """Rewards, summed by weight: module.function, or {function | model | judge | endpoint: ...}."""
    samples_per_prompt: int = 4
    """Responses sampled to every prompt; a prompt is computed once for all of them."""
    max_new_tokens: int = 256
    """Longest response sampled, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs, the reference's too, are taken at it."""
    top_p: float = 1.0
    """Sample from the smallest token set of this probability; below 1 samples are off-policy."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a response, besides the end-of-sequence and end-of-turn tokens."""
    generation: Generation = "padded"
    """padded | continuous (transformers' batching) | vllm (in one process) | vllm_server."""
    generation_server: ServerOptions | None = None
    """Server of generation: vllm_server, as {url: http://host:8000, ...}; null: none."""
    rollout_lag: int = 0
    """0 | 1: steps that samples may lag behind the policy; 1: sampled while the run trains."""
    generation_batch_size: int | None = None
    """Sequences sampled at a time on one rank; null: all of a step."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that max_new_tokens cut off."""
    reward_map: ScoreMap = "none"
    """Rewards to scores: none (as is) | range (reward_range) | sigmoid | quantile (of 4096)."""
    reward_range: list[float] | None = None
    """Lowest and highest possible reward, with missing_eos_penalty, [lo, hi]; reward_map: range."""
    inner_epochs: int = 1
    """Optimizer steps on the responses (and records) of one step; after the first off-policy."""
    anchor: Anchor = "ref"
    """Zero of a sampled response's implicit reward: ref | rollout (the policy that drew it)."""
    reference_refresh: int | None = None
    """Make the policy the new reference every so many steps; null: the reference stays."""
    max_kl: float | None = None
    """Ceiling of the KL of sampled responses from the reference, nats per response; null: none."""
    on_max_kl: OnMaxKl = "stop"
    """A step above max_kl: stop (the run ends there, and is saved) | warn."""
    off_policy_ok: bool = False
    """Allow reward_mse with top_p < 1, length_normalize or rollout_lag, off the policy gradient."""
    saved_completions: int = 8
    """Prompts per step with responses, rewards and log-probs in completions.jsonl."""

    def check_online(self) -> None:
        """Check these settings by themselves and together; ValueError by the flag to change."""
        if self.mode == "offline":
            self._check_defaults()
            return
        if not self.rewards:
            raise ValueError(
                f"mode={self.mode} needs rewards; set --rewards '[module.function]', or mappings "
                "with one of function, model, judge, endpoint"
            )
        parse_rewards(self.rewards)
        check_at_least(1, self, ["samples_per_prompt", "max_new_tokens", "inner_epochs"])
        check_at_least(1, self, ["generation_batch_size", "reference_refresh"], or_null=True)
        self._check_generation()
        self._check_server()
        self._check_sampling()
        self._check_rewards()
        self._check_kl()

    def _check_defaults(self) -> None:
        defaults = OnlineOptions()
        for f in fields(OnlineOptions):
            value = getattr(self, f.name)
            if value != getattr(defaults, f.name):
                raise ValueError(
                    f"{f.name}={shown(value)} is for sampled responses, and mode is offline; set "
                    f"mode: online or mixed, or remove {f.name}"
                )

    def _check_generation(self) -> None:
        size = self.generation_batch_size
        if size is not None and size < self.samples_per_prompt:
            raise ValueError(
                f"generation_batch_size={size} must hold the samples_per_prompt="
                f"{self.samples_per_prompt} of a prompt, which are sampled together"
            )
        if size is not None and self.generation in ("vllm", "vllm_server"):
            raise ValueError(
                f"generation_batch_size is not read with generation={self.generation}, which "
                "batches by itself; remove it"
            )
        if self.top_p < 1 and self.generation != "padded":
            raise ValueError(
                f"generation={self.generation} gives log-probs of the distribution that "
                f"top_p={self.top_p} has cut; set top_p: 1, or generation: padded"
            )
        if self.stop_strings and self.generation == "continuous":
            raise ValueError(
                "generation=continuous knows no stop_strings; set generation: padded, "
                "or remove them"
            )

    def _check_server(self) -> None:
        is_served = self.generation == "vllm_server"
        if is_served and self.generation_server is None:
            raise ValueError(
                "generation=vllm_server needs the address of the server; set "
                "--generation_server.url http://host:8000"
            )
        if not is_served and self.generation_server is not None:
            raise ValueError(
                "generation_server is read with generation=vllm_server alone; set generation: "
                "vllm_server, or remove generation_server"
            )
        if self.rollout_lag not in (0, 1):
            raise ValueError(f"rollout_lag={self.rollout_lag} must be 0 or 1")
        if self.rollout_lag and not is_served:
            raise ValueError(
                "rollout_lag=1 samples while the weights change, and "
                f"generation={self.generation} samples with these very weights; set generation: "
                "vllm_server, or rollout_lag: 0"
            )
        if self.rollout_lag and self.inner_epochs > 1:
            raise ValueError(
                f"rollout_lag=1 with inner_epochs={self.inner_epochs} would train on samples that "
                "are more than one step old; set inner_epochs: 1, or rollout_lag: 0"
            )

    def _check_sampling(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not all(self.stop_strings):
            raise ValueError(
                "stop_strings holds an empty text, which ends every response; remove it"
            )
        if self.mode == "online" and self.online_fraction != OnlineOptions.online_fraction:
            raise ValueError(
                f"online_fraction={self.online_fraction} is read with mode: mixed; remove it"
            )
        if self.mode == "mixed" and not 0 < self.online_fraction < 1:
            raise ValueError(
                f"online_fraction={self.online_fraction} must lie between 0 and 1; "
                "or set mode: online"
            )

    def _check_rewards(self) -> None:
        if not self.missing_eos_penalty >= 0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} must not be negative")
        RewardScale(self.reward_map, self.reward_range)  # refuses values that do not go together
        if self.saved_completions < 0:
            raise ValueError(f"saved_completions={self.saved_completions} must not be negative")

    def _check_kl(self) -> None:
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"max_kl={self.max_kl} must be positive, or null for no ceiling")
        if self.on_max_kl != "stop" and self.max_kl is None:
            raise ValueError(f"on_max_kl={self.on_max_kl} acts at max_kl, which is not set")


@dataclass
class EvaluationAndSaving:
    """Evaluation, saving and metrics."""

    eval_data: str | list[str | dict[str, Any]] = field(default_factory=list)
    """Sources of the evaluation set."""
    eval_fraction: float = 0.0
    """Fraction of the training records held out for evaluation when eval_data is empty."""
    eval_every: int | None = None
    """Evaluate every so many steps; null: at the start and the end, if a set is there."""
    save_every: int | None = None
    """Write a checkpoint every so many steps; null: only the final model."""
    save_async: bool = False
    """Write checkpoints in the background, while the next steps are taken."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints kept; older ones are deleted."""
    save_dtype: SaveDtype = "auto"
    """Dtype of the final model; auto: of the model's files. Checkpoints keep the trained dtype."""
    resume: bool = False
    """Continue from the newest complete checkpoint in output_dir; start afresh if it has none."""
    log_every: int = 1
    """Write metrics every so many steps, averaged over them."""
    loggers: list[Logger] = field(default_factory=lambda: ["tensorboard"])
    """Back-ends besides metrics.jsonl: tensorboard | wandb | trackio."""
    progress: bool = True
    """Show the progress: a bar on a terminal, elsewhere lines."""
    write_report: bool = True
    """Write report.html into output_dir at the end: curves, samples, data, settings."""

    def _check_evaluation(self) -> None:
        check_at_least(1, self, ["log_every", "keep_checkpoints"])
        check_at_least(1, self, ["eval_every", "save_every"], or_null=True)
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        if self.eval_fraction and self.eval_data:
            raise ValueError("give eval_data or eval_fraction, not both")
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                f"eval_every={self.eval_every} has nothing to evaluate on; set eval_data or "
                "eval_fraction"
            )


# Python collects the fields of a dataclass from the last base to the first.
@dataclass
class RunConfig(
    EvaluationAndSaving,
    RecordOptions,
    OnlineOptions,
    MemoryAndSpeed,
    OptimizerOptions,
    ObjectiveOptions,
    RunBasics,
):
    """A training run. Fields of records (columns, scores, limits) are defaults of every source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_redacted(self._plain())
        self._read_plain_values()
        self.check_online()
        self._choose_forms()
        self._check_required()
        self._check_sources()
        self._check_objective()
        self._check_steps()
        self._check_memory()
        self._check_evaluation()
        self._check_sampled_feedback()
        self._check_sampled_steps()
        self._check_trained_weights()
        if self.output_dir and os.path.realpath(self.output_dir) == os.path.realpath(self.model):
            raise ValueError(
                f"output_dir={printable(self.output_dir)} is the model itself, which would be "
                "overwritten; set another"
            )

    def _read_plain_values(self) -> None:
        """Turn values from YAML into the types of the fields."""
        self.data = _as_list(self.data)
        self.eval_data = _as_list(self.eval_data)
        if isinstance(self.lora, dict):
            self.lora = LoraOptions(**self.lora)
        if isinstance(self.generation_server, dict):
            self.generation_server = ServerOptions(**self.generation_server)
        if isinstance(self.parallel, dict):
            self.parallel = ParallelOptions(**self.parallel)
        self.adam_betas = tuple(self.adam_betas)

    def _check_sources(self) -> None:
        """Check the entries of data and eval_data; ValueError by the entry and the key."""
        from una_fast.data.sources import Source

        defaults = self.record_options()
        for name in ("data", "eval_data"):
            for number, entry in enumerate(getattr(self, name)):
                if entry and isinstance(entry, str):
                    continue  # a path alone
                try:
                    Source.parse(entry, defaults)
                except ValueError as error:
                    raise ValueError(f"{name}[{number}]: {error}") from None

    def _choose_forms(self) -> None:
        """Replace the "auto" of score and of offset, by the mode."""
        if self.score == "auto":
            self.score = "mse" if self.mode == "offline" else "reward_mse"
        on_rewards = self.mode != "offline" and self.score == "reward_mse"
        if self.offset == "auto":
            centred = "group" if self.samples_per_prompt > 1 else "ema"
            self.offset = centred if on_rewards else 0.0
        if not isinstance(self.offset, str):
            return
        if self.offset not in ("group", "ema"):
            raise ValueError(f"offset={shown(self.offset)} must be a number, group or ema")
        if not on_rewards:
            raise ValueError(
                f"offset={self.offset} centres the rewards of sampled responses; set mode: online "
                "and score: reward_mse, or give a number"
            )
        if self.offset == "group" and self.samples_per_prompt < 2:
            raise ValueError(
                "offset=group needs samples_per_prompt of at least 2; use ema for one sample"
            )

    def _check_sampled_feedback(self) -> None:
        """Check the settings of feedback against the mode; ValueError by the flag to change."""
        if self.mode == "online":
            defaults = RecordOptions()
            for name in FEEDBACK_SETTINGS:
                if getattr(self, name) != getattr(defaults, name):
                    raise ValueError(
                        f"{name}={shown(getattr(self, name))} makes feedback of records, and "
                        f"mode=online reads prompts alone; remove {name}, or set mode: mixed"
                    )
        if self.mode == "offline" or self.score != "reward_mse" or self.off_policy_ok:
            return
        on_policy_settings = (("top_p", 1.0), ("length_normalize", False), ("rollout_lag", 0))
        for name, on_policy in on_policy_settings:
            if getattr(self, name) != on_policy:
                raise ValueError(
                    f"{name}={getattr(self, name)}: the samples or log-probs are then not those "
                    "of the policy, and reward_mse does not follow the policy gradient; set "
                    f"{name}: {str(on_policy).lower()}, or off_policy_ok: true"
                )

    def _check_sampled_steps(self) -> None:
        """Check reference, saving and batches of sampling runs; ValueError by the flag."""
        if self.mode == "offline":
            return
        if self.reference == "cached":
            raise ValueError(
                "reference=cached has no log-probs of responses yet to be sampled; use frozen "
                "or adapter"
            )
        if self.reference_refresh and self.lora:
            raise ValueError(
                "reference_refresh copies all weights into the reference; it does not go with lora"
            )
        if self.save_every and self.save_every % self.inner_epochs:
            raise ValueError(
                f"save_every={self.save_every} would save between the {self.inner_epochs} "
                "inner_epochs of one rollout; make it a multiple"
            )
        if self.mode == "mixed" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature}: the log-probs of records would be taken at it "
                "too; set temperature: 1, or mode: online"
            )
        if self.mode == "mixed" and not 0 < self.online_batch_size() < self.batch_size:
            raise ValueError(
                f"online_fraction={self.online_fraction} of batch_size={self.batch_size} leaves "
                "no prompts, or no records; raise batch_size"
            )

    def _check_trained_weights(self) -> None:
        serves = self.mode != "offline" and self.generation == "vllm_server"
        if serves and self.quantize_base is not None and not self.off_policy_ok:
            raise ValueError(
                f"quantize_base={self.quantize_base}: the server of generation=vllm_server samples "
                "from a base of its own precision, not from the policy; set generation: padded, "
                "leave quantize_base out, or set off_policy_ok: true"
            )
        if self.reference == "adapter" and self.lora is None:
            raise ValueError(
                "reference=adapter needs lora; use reference=frozen or cached for full fine-tuning"
            )
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError(
                "offload_optimizer=true keeps the state of adamw on the host, not that of "
                f"{self.optimizer}; set optimizer=adamw"
            )
        on_host = self.parallel is not None and self.parallel.offload_parameters
        if self.offload_optimizer and on_host:
            raise ValueError(
                "parallel.offload_parameters keeps the optimizer's state on the host too; set "
                "offload_optimizer=false"
            )

    def online_batch_size(self) -> int:
        """Return the number of prompts to sample from in a step, over all ranks."""
        share = {"offline": 0.0, "mixed": self.online_fraction, "online": 1.0}[self.mode]
        return round(share * self.batch_size)

    def record_options(self) -> RecordOptions:
        """Return the defaults of every source."""
        values = {f.name: getattr(self, f.name) for f in fields(RecordOptions)}
        return RecordOptions(**values)

    def trajectory(self) -> dict[str, Any]:
        """Return the settings shared by a run and a continuation of the run, as plain values.

        Data and reference are compared by the trainer. Of rewards the identity counts: a run goes
        on with another port, or with more patience.
        """
        names = TRAJECTORY if self.mode == "offline" else TRAJECTORY + ONLINE_TRAJECTORY
        values = {name: value for name, value in self._plain().items() if name in names}
        if "rewards" in values:
            values["rewards"] = [spec.identity() for spec in parse_rewards(self.rewards)]
        return values

    def shareable(self) -> dict[str, Any]:
        """Return the settings as plain values without passwords, keys and query values of URLs."""
        return {name: _without_secrets(value) for name, value in self._plain().items()}

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML, to be read by --config; for the owner's eyes alone.

        Secrets are left out; a run that is started from the file refuses the gaps by name.
        """
        import yaml

        text = yaml.safe_dump(self.shareable(), sort_keys=False, allow_unicode=True)
        write_text(path, text, mode=0o600)

    def _plain(self) -> dict[str, Any]:
        plain = asdict(self)
        for name, value in plain.items():
            if isinstance(value, tuple):
                plain[name] = list(value)
        return plain


def _without_secrets(value: Any) -> Any:
    """Return a plain value with the secrets of all texts in it left out."""
    if isinstance(value, str):
        return without_secrets(value) if "://" in value else value
    if isinstance(value, (list, tuple)):
        return [_without_secrets(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return value


def _check_redacted(settings: dict[str, Any]) -> None:
    """Refuse settings whose secrets were left out when they were saved; ValueError by the name."""
    for name, value in settings.items():
        if was_redacted(value):
            raise ValueError(
                f"{name} holds *** where a secret was left out when the settings were saved; "
                f"give --{name} again"
            )


def _as_list(sources: str | list[Any]) -> list[Any]:
    return [sources] if sources and isinstance(sources, str) else sources


def setting_groups(settings: type) -> list[type]:
    """Return the dataclasses with the fields of a dataclass of settings, in field order."""
    return [base for base in reversed(settings.__mro__) if inspect.get_annotations(base)]
