"""The training steps that bench_step.py times: real architectures, random weights, two loops.

Both sides run the loop that users run, on the same token ids: `una_fast.train.loop.Trainer.run` and
`trl.DPOTrainer.train`. Only the origin of weights and tokens is exchanged: models are built from a
configuration, tokens are drawn. A step lasts from the first micro-batch of an optimizer step to the
end of the optimizer step (forward, backward, clipping, optimizer, schedule); fetching data and
logging stand outside on both sides, but for our collate, inside the step.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import contenders  # noqa: F401  finds the peers, and lets triton be imported without a GPU
import harness
from una_fast.bench import attempts
from una_fast.counters import LiveBytes
from una_fast.model.activations import BLOCK

SEED = 0
PAD, EOS = 0, 1
LEARNING_RATE = 1e-5
LORA = {"r": 32, "alpha": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_LONGEST = 1 << 20  # positions: rotary embeddings need no table, but a configuration states a limit

# --------------------------------------------------------------------------------------- the models


class Shape(NamedTuple):
    """A published architecture.

    label: the name in tables
    tokens: of a response in the suite "equal"
    mode: the reference in training: cached | adapter | frozen
    config: the fields of transformers' configuration
    """

    label: str
    tokens: int
    mode: str
    config: dict[str, Any]


def _sizes(
    hidden: int, layers: int, heads: tuple[int, int, int], inner: int, vocab: int, tied: bool
) -> dict[str, Any]:
    """Return the sizes of a configuration. heads: of the queries, of the keys, and the size of a
    head.
    """
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": _LONGEST,
    }


_LLAMA_8B = _sizes(4096, 32, (32, 8, 128), 14336, 128256, False)
_QWEN_8B = _sizes(4096, 36, (32, 8, 128), 12288, 151936, False)
_QWEN_2B = _sizes(2048, 28, (16, 8, 128), 6144, 151936, True)
_GEMMA_1B = _sizes(1152, 26, (4, 1, 256), 6912, 262144, True)
_TINY_LLAMA = _sizes(256, 4, (8, 4, 32), 688, 8000, False)
_TINY_GEMMA = _sizes(64, 6, (4, 1, 16), 96, 500, True)


def _shape(
    label: str, tokens: int, mode: str, kind: str, sizes: dict[str, Any], **more: Any
) -> Shape:
    return Shape(label, tokens, mode, {"model_type": kind, **sizes, **more})


_qwen = {"kind": "qwen3", "rope_parameters": _ROPE}
_llama = {"kind": "llama", "rope_parameters": _ROPE}
_gemma = {"kind": "gemma3_text"}
SHAPES = {
    "llama3-8b": _shape("Llama-3-8B", 4096, "adapter", sizes=_LLAMA_8B, **_llama),
    "qwen3-8b": _shape("Qwen3-8B", 4096, "adapter", sizes=_QWEN_8B, **_qwen),
    "qwen3-1.7b": _shape("Qwen3-1.7B", 8192, "cached", sizes=_QWEN_2B, **_qwen),
    "gemma3-1b": _shape(
        "gemma-3-1b", 8192, "cached", sizes=_GEMMA_1B, sliding_window=512, **_gemma
    ),
    "tiny-llama": _shape("tiny Llama", 512, "cached", "llama", _TINY_LLAMA),
    "tiny-gemma": _shape(
        "tiny gemma", 64, "cached", sizes=_TINY_GEMMA, sliding_window=16, **_gemma
    ),
}


class Case(NamedTuple):
    """Steps to be measured.

    pairs: (prompt, chosen, rejected) lengths of the pairs of one step
    micro: pairs of a micro-batch
    mode: the origin of the reference, cached | adapter | frozen
    changes: of the Setup
    memory_cap: GiB, None for all memory
    """

    suite: str
    model: str
    layers: int
    mode: str
    pairs: tuple[tuple[int, int, int], ...]
    micro: int = 1
    lora: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    memory_cap: float | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """Return the configuration of the model, at the depth of the case."""
        values = SHAPES[self.model].config | {"num_hidden_layers": self.layers}
        special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
        return AutoConfig.for_model(**values, **special, use_cache=False)

    @property
    def tokens(self) -> int:
        """Return the tokens of the pairs as separate sequences, without padding: equal for both
        sides.
        """
        return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.pairs)

    @property
    def responses(self) -> list[int]:
        """Return the tokens of every response."""
        return responses_of(self.pairs)

    @property
    def beta(self) -> float:
        """Return a beta with margins of order 1 at every length, so that a loss shows the
        log-probs.
        """
        return max(self.responses) ** -0.5


def responses_of(pairs: Iterable[tuple[int, int, int]]) -> list[int]:
    """Return the tokens of every response of the pairs, chosen before rejected."""
    return list(chain.from_iterable(pair[1:] for pair in pairs))


@dataclass(frozen=True)
class Setup:
    """Settings of both sides. mlp_tile is ours alone: TRL has no such option."""

    device: torch.device
    dtype: torch.dtype
    checkpointing: bool = True
    offload: bool = False
    liger: bool = False
    master_weights: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    mlp_tile: int | None = None

    def weights(self, lora: bool) -> torch.dtype:
        """Return the dtype of the base weights."""
        return torch.float32 if self.master_weights and not lora else self.dtype


def build(case: Case, setup: Setup, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model, with the same weights at every call, drawn on the device."""
    torch.manual_seed(SEED)
    kind = {"dtype": dtype, "attn_implementation": setup.attention}
    with setup.device:
        return AutoModelForCausalLM.from_config(case.config, **kind)


@torch.no_grad()
def drift(model: torch.nn.Module) -> None:
    """Move the trained weights away from the reference's weights, the same way on both sides.

    A policy equal to the reference has the loss log 2 whatever is computed.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2:
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            generator = torch.Generator(p.device).manual_seed(seed)
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            if "lora_" in name:
                # New adapters: one half is zero, and each side draws the second half for itself.
                p.copy_(noise * p.shape[1] ** -0.5)
            else:
                p.add_(noise * (0.3 * p.float().std()).to(p.dtype))


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer that both sides ask for the padding token; neither side tokenizes."""
    from tokenizers import Tokenizer, models

    vocab = {"<pad>": PAD, "</s>": EOS}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def draw(case: Case) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the token ids of every pair: prompt, chosen, rejected."""
    rng = np.random.default_rng(SEED)
    vocab = SHAPES[case.model].config["vocab_size"]
    found = []
    for pair in case.pairs:
        found.append(tuple(rng.integers(2, vocab, size=n, dtype=np.int32) for n in pair))
    return found


# ----------------------------------------------------------------------------------------- the work


def attended(length: int, window: int | None) -> int:
    """Count the (query, key) pairs of causal attention over one sequence."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def needed_flop(case: Case) -> float:
    """Count the flop that a step needs, if every response stands in a separate sequence.

    Forward: 2 per weight of the layers' linear maps and token, 4 per attended (query, key) pair,
    head and element of a head, 2 per weight of the head and response token. Backward: as much for
    inputs, and again for trained weights (attention: twice). A reference that is computed: one
    forward. Not counted: recomputation, norms, adapters. A step that encodes a shared prompt once
    does less, and may show more than the machine's peak.
    """
    c = case.config
    per_layer = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    per_layer += 3 * c.hidden_size * c.intermediate_size
    kinds = getattr(c, "layer_types", None) or ["full_attention"] * case.layers
    windows = [c.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    sequences = []
    for prompt, *responses in case.pairs:
        sequences += [prompt + response for response in responses]
    pairs = sum(attended(length, window) for window, length in product(windows, sequences))
    layers = 2.0 * per_layer * case.layers * case.tokens
    head = 2.0 * c.vocab_size * c.hidden_size * sum(case.responses)
    linear = layers + head
    attention = 4.0 * c.num_attention_heads * c.head_dim * pairs
    reference = case.mode != "cached"
    return linear * (2 + (not case.lora) + reference) + attention * (3 + reference)


# ----------------------------------------------------------------------------------------- watching


class Session(NamedTuple):
    """One run of a contender, alone in memory.

    history: logged numbers of every step
    seconds: of the timed steps
    peak_bytes: of a step
    row_tokens: of a step, padding included
    sequences: digests of (prompt, response) of the tokens that went through the model
    weights: dtype of the base weights
    packed: whether rows were packed
    """

    history: list[dict[str, float]]
    seconds: list[float]
    peak_bytes: int
    row_tokens: int
    sequences: list[str]
    weights: str
    packed: bool


class Watch:
    """Called around every optimizer step: measures the time and the memory of steps.

    Time: of the steps after the warm-up. Memory: of a step that finds the optimizer's state in
    place. On a CPU the bytes born within the last step of the warm-up, alive at once: gradients and
    activations, not weights. On a GPU all allocated bytes, in the timed steps. Without a warm-up
    the only step shows both.
    """

    def __init__(
        self, device: torch.device, warmup: int, timed: int, memory_cap: float | None = None
    ) -> None:
        self.device = device
        self.warmup, self.steps = warmup, warmup + timed
        self.memory_cap = memory_cap
        self.seconds: list[float] = []
        self.peak_bytes = self.count = 0
        self.sequences: list[str] = []
        self.row_tokens = 0
        self._live: LiveBytes | None = None
        self._start = 0.0

    @property
    def first(self) -> bool:
        return self.count == 0

    def saw(self, rows: int, sequences: list[str]) -> None:
        """Store a micro-batch of the first step: the tokens of all rows, and the digests of the
        sequences.
        """
        self.row_tokens += rows
        self.sequences += sequences

    def begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            if self.count == self.warmup:
                torch.cuda.reset_peak_memory_stats()
        elif self.count == max(self.warmup - 1, 0):
            self._live = LiveBytes().__enter__()
        self._start = time.perf_counter()

    def end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - self._start
        if self.count >= self.warmup:
            self.seconds.append(spent)
            if self.device.type == "cuda":
                self.peak_bytes = torch.cuda.max_memory_allocated()
        self.close()
        self.count += 1

    def close(self) -> None:
        """Stop counting; also after a step that failed.

        Raises OutOfMemoryError if a CPU step allocated more than the cap.
        """
        if self._live is not None:
            live, self._live = self._live, None
            live.__exit__(None, None, None)
            self.peak_bytes = live.peak()
            if self.memory_cap and self.peak_bytes > self.memory_cap * 2**30:
                needs = f"{self.peak_bytes} bytes, of {self.memory_cap} GiB"
                raise torch.OutOfMemoryError(f"out of memory: {needs}")

    def session(
        self, history: list[dict[str, float]], weights: torch.dtype, packed: bool
    ) -> Session:
        """Return the session of a finished run."""
        assert len(history) == self.count == self.steps, (len(history), self.count, self.steps)
        return Session(
            history=history,
            seconds=self.seconds,
            peak_bytes=self.peak_bytes,
            row_tokens=self.row_tokens,
            sequences=sorted(self.sequences),
            weights=str(weights).removeprefix("torch."),
            packed=packed,
        )


def digest(prompt: Tensor, response: Tensor) -> str:
    """Return a digest of the token ids of a prompt and a response."""
    ids = [tensor.detach().cpu().numpy().astype(np.int64) for tensor in (prompt, response)]
    return hashlib.sha256(b"|".join(array.tobytes() for array in ids)).hexdigest()[:16]


# --------------------------------------------------------------------------------------------- ours


def ours(case: Case, setup: Setup, watch: Watch) -> Session:
    """Run una_fast's trainer."""
    from una_fast.data.batch import collate
    from una_fast.data.examples import Example
    from una_fast.distributed import start_world
    from una_fast.feedback import Feedback
    from una_fast.train.build import build_run, open_run
    from una_fast.train.loop import Trainer
    from una_fast.train.run_data import RunData

    examples = []
    for k, (prompt, *responses) in enumerate(draw(case)):
        pair = Feedback.pairs([0], [1])
        examples.append(Example(prompt, tuple(responses), pair, None, f"pair {k}"))
    with tempfile.TemporaryDirectory() as folder, random_weights(case, setup):
        config = run_config(case, setup, watch.steps, folder)
        if case.mode == "cached":
            examples = with_reference(case, setup, config, examples)
        torch.manual_seed(SEED)
        data = RunData([examples], [1.0])
        world = start_world(setup.device.type)
        opened = open_run(config, world, data)
        trainer = Trainer(build_run(opened, tokenizer()), Path(config.output_dir))
        packed, take_step = trainer.policy.packed, trainer.take_step

        def look(micro_batches: list[list[Example]]) -> None:
            for micro_batch in micro_batches:
                batch = collate(micro_batch, packed=packed, pad_id=PAD)
                watch.saw(batch.input_ids.numel(), list(digests(batch)))

        def watched(work: Any) -> dict[str, float]:
            if watch.first:
                look(work.micro_batches)
                if setup.offload and len(case.pairs) == case.micro:
                    warm_pinned(case, setup, watch.row_tokens)
            watch.begin()
            taken = take_step(work)
            watch.end()
            return taken

        trainer.take_step = watched
        weights = trainer.policy.causal_lm.get_input_embeddings().weight.dtype
        trainer.run()
        history = harness.read_lines(Path(folder) / "metrics.jsonl")
    return watch.session(history, weights, packed)


def pinned_sizes(tokens: int, width: int, itemsize: int) -> list[int]:
    """Return the bytes of the pinned blocks of one hidden state [tokens, width]."""
    whole, rest = divmod(tokens * width * itemsize, BLOCK)
    return [BLOCK] * whole + [rest] * (rest > 0)


def warm_pinned(case: Case, setup: Setup, tokens: int) -> None:
    """Pin the host memory that the hidden states of a step will wait in, before the first step.

    torch keeps freed pinned blocks for reuse. Pinning is a system call of about a second for every
    few GiB, and a run makes it once: it is no part of a step, but a case without a warm-up times
    its first step.

    tokens: of the rows of the step, which is one micro-batch
    """
    if setup.device.type != "cuda":
        return
    sizes = pinned_sizes(tokens, case.config.hidden_size, setup.dtype.itemsize)
    held = []
    for _ in range(case.layers):
        held += [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]


def run_config(case: Case, setup: Setup, steps: int, folder: str) -> Any:
    """Return the configuration of una_fast's run."""
    from una_fast.config import RunConfig
    from una_fast.model.settings import LoraOptions

    precision = "bf16" if setup.dtype == torch.bfloat16 else "fp32"
    lora = LoraOptions(**LORA) if case.lora else None
    return RunConfig(
        model="random weights",
        data="random tokens",
        output_dir=folder,
        device=setup.device.type,
        precision=precision,
        master_weights=setup.master_weights,
        beta=case.beta,
        reference=case.mode,
        lora=lora,
        gradient_checkpointing=setup.checkpointing,
        offload_activations=setup.offload,
        mlp_tile=setup.mlp_tile,
        liger=setup.liger,
        attn_implementation=setup.attention,
        optimizer=setup.optimizer,
        batch_size=len(case.pairs),
        micro_batch_size=case.micro,
        epochs=float(steps),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_ratio=0.0,
        seed=SEED,
        loggers=[],
        progress=False,
        write_report=False,
    )


@contextmanager
def random_weights(case: Case, setup: Setup) -> Iterator[None]:
    """Make the trainer build models in place of reading files, and drift before the first step."""
    from una_fast import resolved
    from una_fast.model import policy
    from una_fast.model.loading import outline
    from una_fast.train import build as train

    make_optimizer = train.make_optimizer

    def drifted(policy: Any, *arguments: Any, **options: Any) -> Any:
        drift(policy.model)
        return make_optimizer(policy, *arguments, **options)

    def load(path: str, *, dtype: torch.dtype, **_: Any) -> PreTrainedModel:
        return build(case, setup, dtype)

    def shapes(_: Any) -> PreTrainedModel:
        return outline(case.config, dtype=torch.float32, attn_implementation=setup.attention)

    def plan_nothing(*_: Any) -> None:
        """Stand in for the memory check, which reads the model's files."""

    with (
        mock.patch.object(policy, "load_causal_lm", load),
        mock.patch.object(resolved.StoredDtypes, "of", lambda *_: None),
        mock.patch.object(resolved, "outline_of", shapes),
        mock.patch.object(train, "make_optimizer", drifted),
        mock.patch.object(train, "refuse_too_large", plan_nothing),
    ):
        yield


def with_reference(case: Case, setup: Setup, config: Any, examples: list[Any]) -> list[Any]:
    """Return the examples with log-probs of the undrifted model, as `una-fast precompute-ref`."""
    from una_fast.data.batch import collate
    from una_fast.resolved import find_facts, load_frozen, resolve, scoring_of

    run = resolve(config, find_facts(config, examples, device=setup.device.type))
    reference, scoring = load_frozen(config, run), scoring_of(config, run)
    found = []
    for example in examples:
        batch = collate([example], packed=run.packed, device=setup.device, pad_id=PAD)
        found.append(replace(example, ref_logps=tuple(scoring.logps(reference, batch).tolist())))
    del reference, batch
    clean()
    return found


def digests(batch: Any) -> Iterator[str]:
    """Yield the digest of every sequence of our batch, read from the inputs of model and loss."""
    ids, width = batch.input_ids.flatten(), batch.input_ids.shape[1]
    begins = []
    for segment in batch.segments or ():
        begins += [segment.prompt[0]] * len(segment.responses)
    bounds = batch.cu_seqlens.tolist()
    for k, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        last = int(batch.rows[start])  # of the prompt, it predicts the first token of the response
        begin = begins[k] if batch.segments else last // width * width
        yield digest(ids[begin : last + 1], batch.targets[start:stop])


# ---------------------------------------------------------------------------------------------- TRL


class Steps(TrainerCallback):
    """Puts a Watch around the optimizer steps of a transformers Trainer."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.end()


def theirs(case: Case, setup: Setup, watch: Watch) -> Session:
    """Run TRL's DPOTrainer."""
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOTrainer
    from trl.trainer import dpo_trainer

    datasets.disable_progress_bars()

    class Pretokenized(DPOTrainer):
        """Takes token ids as given, and tells which ids go through the model in the first step."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def training_step(self, model: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            if watch.first:
                watch.saw(inputs["input_ids"].numel(), list(padded_digests(inputs)))
            return super().training_step(model, inputs, *rest)

    columns = {}
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    for name, arrays in zip(names, zip(*draw(case), strict=True), strict=True):
        columns[name] = [ids.tolist() for ids in arrays]
    data = datasets.Dataset.from_dict(columns)
    # transformers hashes every weight on the CPU to name a cache; the case names these weights as
    # well.
    named = mock.patch.object(dpo_trainer, "hash_module", lambda module: repr((case, setup)))
    quiet = mock.patch.dict("os.environ", {"TQDM_DISABLE": "1"})
    adapters = {"r": LORA["r"], "lora_alpha": LORA["alpha"]}
    adapters |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = LoraConfig(**adapters) if case.lora else None
    weights = setup.weights(case.lora)
    with tempfile.TemporaryDirectory() as folder, named, quiet:
        policy = build(case, setup, weights)
        reference = build(case, setup, weights) if case.mode == "frozen" else None
        trainer = Pretokenized(
            policy,
            reference,
            args=trl_config(case, setup, watch.steps, folder),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=lora,
            callbacks=[Steps(watch)],
        )
        trainer.remove_callback(PrinterCallback)
        drift(trainer.model)
        trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    return watch.session(history, weights, packed=False)


def trl_config(case: Case, setup: Setup, steps: int, folder: str) -> Any:
    """Return the configuration of TRL's run."""
    from trl import DPOConfig

    # adamw: TRL's own default
    optimizers = {"adamw_8bit": {"optim": "adamw_torch_8bit"}, "sgd": {"optim": "sgd"}}
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=len(case.pairs) // case.micro,
        max_steps=steps,
        max_length=None,  # else it truncates to 1024
        beta=case.beta,
        precompute_ref_log_probs=case.mode == "cached",
        precompute_ref_batch_size=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=setup.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        activation_offloading=setup.offload,
        use_liger_kernel=setup.liger,
        bf16=setup.dtype == torch.bfloat16,
        use_cpu=setup.device.type == "cpu",
        seed=SEED,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **optimizers.get(setup.optimizer, {}),
    )


def padded_digests(inputs: dict[str, Tensor]) -> Iterator[str]:
    """Yield the digest of every sequence of TRL's batch."""
    masks = (inputs["attention_mask"].bool(), inputs["completion_mask"].bool())
    for ids, mask, completion in zip(inputs["input_ids"], *masks, strict=True):
        yield digest(ids[mask & ~completion], ids[completion])


# ---------------------------------------------------------------------------------------- everybody

CONTENDERS: dict[str, Callable[[Case, Setup, Watch], Session]] = {"una_fast": ours, "trl": theirs}


def clean() -> None:
    """Collect garbage: trainers stand in reference cycles, which hold memory until a collection."""
    gc.collect()
    attempts.release()


def run(
    name: str, case: Case, setup: Setup, warmup: int, timed: int, seconds: float | None
) -> tuple[Session | None, str | None]:
    """Run a contender, and leave nothing in memory.

    name: of CONTENDERS
    case: the steps
    setup: the same for both sides; case.changes are applied here
    warmup: steps before the timed steps
    timed: timed steps
    seconds: deadline, None for no deadline

    Returns (session, None), or (None, reason of the failure).
    """
    watch = Watch(setup.device, warmup, timed, case.memory_cap)
    setup = replace(setup, **dict(case.changes))

    def close() -> None:
        watch.memory_cap = None  # the reason is known
        watch.close()
        clean()

    work = functools.partial(CONTENDERS[name], case, setup, watch)
    session, reason = attempts.attempt(name, work, close, seconds)
    if not reason:
        clean()
    return session, reason
