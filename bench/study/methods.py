"""The methods of the study: functions from a run's settings to the found numbers.

UNA runs through `una_fast.train.loop.train`, TRL through TRL's trainers, PPO through ppo.py. All
methods are full fine-tuning in float32 by AdamW (no weight decay) at a constant learning rate, with
gradients clipped to norm 1. The same `Watch` evaluates every policy after the same numbers of
steps, and stops the clock during an evaluation.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import task
from ppo import PPO, PPOSettings

UNA_SETTINGS = {
    "progress": False,
    "write_report": False,
    "loggers": [],
    "device": "cpu",
    "lr_schedule": "constant",
    "warmup_ratio": 0.0,
    "max_tokens_per_batch": 1 << 20,  # one forward a step
    "packing": False,  # on a CPU rows this short are padded
}
TRL_QUIET = {
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
NOISE = 0.1  # standard deviation of the noise on offline scores


@dataclass(frozen=True)
class Size:
    """The sizes of the study.

    prompts: of an offline data set, with two answers each
    offline_batch, online_batch: prompts per step
    offline_points, online_points: evaluations of a run
    """

    base_steps: int = 1000
    held_out: int = 512
    prompts: int = 1536
    epochs: int = 1
    offline_batch: int = 32
    offline_points: int = 6
    online_steps: int = 40
    online_batch: int = 32
    samples: int = 4
    online_points: int = 8


@dataclass(frozen=True)
class Spec:
    """One run.

    part: of the study
    what: select, report or time
    mean: of the offline scores; None: as sampled
    """

    part: str
    what: str
    method: str
    lr: float
    beta: float
    seed: int
    mean: float | None = None

    @property
    def key(self) -> str:
        return json.dumps(list(asdict(self).values()))


class Watch:
    """Evaluates a policy at some steps, and measures the time of the training alone."""

    def __init__(
        self, steps: int, points: int, evaluate: Callable[[Any], dict[str, float]]
    ) -> None:
        self.at = {-(-steps * k // points) for k in range(1, points + 1)} if points else set()
        self.evaluate, self.found = evaluate, []
        self.started = self.seconds = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def after_step(self, step: int, model: Any) -> None:
        if step in self.at:
            self.stop()
            self.found.append({"step": step, **self.evaluate(model)})
            self.start()


@dataclass(eq=False)
class Workshop:
    """Shared by the runs of a process: the base model in `directory`, and the size of the study."""

    directory: Path
    size: Size
    tokenizer: Any = field(init=False)
    reference: Any = field(init=False)

    def __post_init__(self) -> None:
        silence()
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        self.reference = self.load()

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.directory)

    def run(self, spec: Spec) -> dict[str, Any]:
        """Make a run, and return settings, points, seconds and bytes of the train state."""
        method = METHODS[spec.method]
        offline = spec.part != "E3"
        steps = self.offline_steps if offline else self.size.online_steps
        prompts = task.held_out(self.size.held_out)
        points = self.size.offline_points if offline else self.size.online_points
        points = 0 if spec.what == "time" else points

        def evaluate(model: Any) -> dict[str, float]:
            return task.evaluate(model, self.reference, self.tokenizer, prompts, seed=spec.seed)

        watch = Watch(steps, points, evaluate)
        with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            more = method.run(self, spec, watch, Path(directory), **method.settings)
        per_step = self.size.online_batch * self.size.samples
        if offline:
            per_step = 2 * self.size.offline_batch
        points = [{**point, "samples": per_step * point["step"]} for point in watch.found]
        return {**asdict(spec), "points": points, "seconds": watch.seconds, **more}

    @property
    def offline_steps(self) -> int:
        return self.size.epochs * self.size.prompts // self.size.offline_batch

    def records_per_step(self, kind: str) -> int:
        """Return the records of an offline step: labels count every answer."""
        return self.size.offline_batch * (2 if kind == "labels" else 1)

    @functools.lru_cache(maxsize=8)  # noqa: B019  one workshop per process
    def offline_data(self, seed: int, mean: float | None) -> list[dict[str, Any]]:
        """Return {prompt, completions, scores} with two ended, differing answers of the base model.

        mean: shift the scores to this mean; None: no shift.
        """
        size, held = self.size, task.held_out(self.size.held_out)
        prompts = task.make_prompts(size.prompts + size.prompts // 4 + 8, [seed, 1], held)
        policy = (self.reference, self.reference, self.tokenizer)
        found = task.sample(*policy, prompts, each=2, seed=seed)
        rng = np.random.default_rng([seed, 2])
        golds = np.array(task.reward(found.prompts, found.texts))
        scores = golds + NOISE * rng.standard_normal(len(found.texts))
        ended = [0 < len(text.split()) < task.MAX_NEW_TOKENS for text in found.texts]
        keep = []
        for k in range(0, len(ended), 2):
            if ended[k] and ended[k + 1] and found.texts[k] != found.texts[k + 1]:
                keep.append(k)
        keep = keep[: size.prompts]
        assert len(keep) == size.prompts, f"only {len(keep)} prompts have two ended answers"
        shift = 0.0
        if mean is not None:
            kept = np.stack([scores[k : k + 2] for k in keep])
            shift = mean - float(np.mean(kept))
        scores = np.clip(scores + shift, 0.0, 1.0)
        records = []
        for k in keep:
            record = {"prompt": prompts[k // 2], "completions": found.texts[k : k + 2]}
            records.append(record | {"scores": scores[k : k + 2].tolist()})
        return records

    def records(self, kind: str, seed: int, mean: float | None) -> list[dict[str, Any]]:
        """Return the answers as "scores", "labels" (above the median or not) or "pairs"."""
        data = self.offline_data(seed, mean)
        if kind == "scores":
            return data
        if kind == "pairs":
            return [pair_of(record) for record in data]
        median = float(np.median([record["scores"] for record in data]))
        labels = []
        for record in data:
            for text, score in zip(record["completions"], record["scores"], strict=True):
                label = {"prompt": record["prompt"], "completion": text, "label": score > median}
                labels.append(label)
        return labels

    def online_prompts(self, seed: int) -> list[str]:
        """Return the prompts of an online run, every prompt for one step only."""
        count = self.size.online_steps * self.size.online_batch
        return task.make_prompts(count, [seed, 3], task.held_out(self.size.held_out))


def pair_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return a pair of the two completions of a record, the better scored completion chosen."""
    first, second = record["completions"]
    if record["scores"][1] > record["scores"][0]:
        first, second = second, first
    return {"prompt": record["prompt"], "chosen": first, "rejected": second}


def silence() -> None:
    """Turn the messages and the progress bars of all packages off."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    logging.getLogger("una_fast").setLevel(logging.ERROR)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def state_bytes(
    trained: list[Tensor], optimizers: list[Any], frozen: Iterable[Tensor]
) -> dict[str, int]:
    """Return the bytes of trained weights, gradients, optimizer tensors, frozen weights."""
    values = []
    for optimizer in optimizers:
        values += chain.from_iterable(state.values() for state in optimizer.state.values())
    # The count of steps, a tensor without dimensions, is no moment.
    moments = [value for value in values if isinstance(value, Tensor) and value.dim()]
    return {
        "weights": nbytes(trained),
        "gradients": nbytes(trained),
        "optimizer": nbytes(moments),
        "frozen": nbytes(frozen),
    }


# ---------------------------------------------------------------------------------------------- UNA


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write one JSON object per line, and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def train_una(shop: Workshop, watch: Watch, directory: Path, **settings: Any) -> dict[str, Any]:
    """Run the trainer as users run the trainer, watched."""
    import una_fast.train.loop as una
    from una_fast.config import RunConfig

    trainers = []

    class Watched(una.Trainer):
        taken = 0

        def run(self) -> dict[str, float]:
            trainers.append(self)
            watch.start()
            metrics = super().run()
            watch.stop()
            return metrics

        def take_step(self, *arguments: Any) -> dict[str, float]:
            metrics = super().take_step(*arguments)
            self.taken += 1
            watch.after_step(self.taken, self.policy.causal_lm)
            return metrics

    paths = {"model": str(shop.directory), "output_dir": str(directory / "out")}
    config = RunConfig(**paths, **UNA_SETTINGS, **settings)
    with mock.patch.object(una, "Trainer", Watched):
        una.train(config)
    trainer = trainers[0]
    trained = trainer.policy.trainable_parameters()
    frozen = trainer.reference.policy.model.parameters()
    return {"bytes": state_bytes(trained, [trainer.optimizer], frozen)}


def una_offline(
    shop: Workshop, spec: Spec, watch: Watch, directory: Path, *, kind: str, **settings: Any
) -> dict[str, Any]:
    """Train on records of a kind."""
    data = write_jsonl(directory / "data.jsonl", shop.records(kind, spec.seed, spec.mean))
    return train_una(
        shop,
        watch,
        directory,
        data=data,
        batch_size=shop.records_per_step(kind),
        epochs=shop.size.epochs,
        learning_rate=spec.lr,
        beta=spec.beta,
        seed=spec.seed,
        **settings,
    )


def una_online(
    shop: Workshop, spec: Spec, watch: Watch, directory: Path, **settings: Any
) -> dict[str, Any]:
    """Train on samples of the policy."""
    size = shop.size
    rows = [{"prompt": prompt} for prompt in shop.online_prompts(spec.seed)]
    prompts = write_jsonl(directory / "prompts.jsonl", rows)
    more = train_una(
        shop,
        watch,
        directory,
        mode="online",
        data=prompts,
        rewards=[f"{task.__file__}:reward"],
        samples_per_prompt=size.samples,
        max_new_tokens=task.MAX_NEW_TOKENS,
        batch_size=size.online_batch,
        max_steps=size.online_steps,
        learning_rate=spec.lr,
        beta=spec.beta,
        seed=spec.seed,
        **settings,
    )
    lines = (directory / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = dict.fromkeys(("generate", "reward", "train"), 0.0)
    for metrics in map(json.loads, lines):
        for name in seconds:
            seconds[name] += metrics.get(f"time/{name}", 0.0)
    return {**more, "parts": seconds}


# ---------------------------------------------------------------------------------------------- TRL


class WatchCallback(TrainerCallback):
    """Puts a Watch around TRL's trainers."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.watch.after_step(state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.stop()


def train_trl(trainer: Any, watch: Watch) -> dict[str, Any]:
    """Run a trainer of TRL, watched."""
    trainer.add_callback(WatchCallback(watch))
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return {"bytes": state_bytes(trained, [trainer.optimizer], trainer.ref_model.parameters())}


def trl_offline(
    shop: Workshop, spec: Spec, watch: Watch, directory: Path, *, kind: str
) -> dict[str, Any]:
    """Train with DPOTrainer on pairs, or with KTOTrainer on labels."""
    import trl
    from datasets import Dataset

    name = {"pairs": "DPO", "labels": "KTO"}[kind]
    args = getattr(trl, f"{name}Config")(
        output_dir=str(directory),
        per_device_train_batch_size=shop.records_per_step(kind),
        num_train_epochs=shop.size.epochs,
        learning_rate=spec.lr,
        beta=spec.beta,
        seed=spec.seed,
        **TRL_QUIET,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=shop.load(),
        ref_model=shop.load(),
        args=args,
        train_dataset=Dataset.from_list(shop.records(kind, spec.seed, spec.mean)),
        processing_class=shop.tokenizer,
    )
    return train_trl(trainer, watch)


def trl_online(
    shop: Workshop, spec: Spec, watch: Watch, directory: Path, *, name: str
) -> dict[str, Any]:
    """Train with RLOOTrainer or GRPOTrainer on samples of the policy."""
    import trl
    from datasets import Dataset

    size = shop.size
    args = getattr(trl, f"{name}Config")(
        output_dir=str(directory),
        per_device_train_batch_size=size.online_batch * size.samples,
        num_generations=size.samples,
        max_completion_length=task.MAX_NEW_TOKENS,
        max_steps=size.online_steps,
        learning_rate=spec.lr,
        beta=spec.beta,
        seed=spec.seed,
        **TRL_QUIET,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=shop.load(),
        reward_funcs=task.reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": p} for p in shop.online_prompts(spec.seed)]),
        processing_class=shop.tokenizer,
    )
    return train_trl(trainer, watch)


# ---------------------------------------------------------------------------------------------- PPO


def ppo(
    shop: Workshop, spec: Spec, watch: Watch, directory: Path, *, epochs: int
) -> dict[str, Any]:
    """Train with PPO on samples of the policy."""
    from una_fast.model.policy import load_policy
    from una_fast.online.generate import TransformersSampler
    from una_fast.online.sampling import Sampling

    size, tokenizer = shop.size, shop.tokenizer
    policy, reference, critic = (load_policy(shop.directory, dtype=torch.float32) for _ in range(3))
    learner = PPO(policy, reference, critic, PPOSettings(spec.lr, spec.beta, epochs))
    sampling = Sampling(size.samples, task.MAX_NEW_TOKENS, stop_ids=(tokenizer.eos_token_id,))
    sampler = TransformersSampler(policy, tokenizer, sampling)
    texts = shop.online_prompts(spec.seed)
    watch.start()
    for step in range(size.online_steps):
        batch = texts[step * size.online_batch : (step + 1) * size.online_batch]
        prompts = [np.asarray(ids, dtype=np.int32) for ids in tokenizer(batch)["input_ids"]]

        def sample(prompts: Any = prompts, step: int = step) -> Any:
            found = []
            for completions in sampler.sample(prompts, seed=1000 * spec.seed + step):
                found.append([completion.ids for completion in completions])
            return found

        def reward(answers: Any, batch: Any = batch) -> list[float]:
            ids = list(chain.from_iterable(answers))
            said = tokenizer.batch_decode(ids, skip_special_tokens=True)
            asked = np.repeat(batch, size.samples).tolist()
            return task.reward(asked, said)

        learner.step(prompts, sample, reward)
        watch.after_step(step + 1, policy.causal_lm)
    watch.stop()
    trained = list(chain.from_iterable(learner.trained))
    state = state_bytes(trained, learner.optimizers, reference.model.parameters())
    return {"bytes": state, "parts": dict(learner.seconds)}


# ---------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """A method of the study: run(shop, spec, watch, directory, **settings) is one run."""

    run: Callable[..., dict[str, Any]]
    settings: dict[str, Any]


def _offline(kind: str, **settings: Any) -> Method:
    return Method(una_offline, {"kind": kind, **settings})


def _online(score: str, offset: str | float) -> Method:
    return Method(una_online, {"score": score, "offset": offset})


METHODS = {
    "una_pair": _offline("pairs"),
    "una_bce": _offline("labels", binary="bce"),
    "una_mse": _offline("labels", binary="mse"),
    "una_score": _offline("scores"),
    "una_centred": _offline("scores", score_center="dataset"),
    "trl_dpo": Method(trl_offline, {"kind": "pairs"}),
    "trl_kto": Method(trl_offline, {"kind": "labels"}),
    "una_group": _online("reward_mse", "group"),
    "una_ema": _online("reward_mse", "ema"),
    "una_none": _online("reward_mse", 0.0),
    "una_sigmoid": _online("mse", 0.0),
    "ppo_1": Method(ppo, {"epochs": 1}),
    "ppo_4": Method(ppo, {"epochs": 4}),
    "trl_rloo": Method(trl_online, {"name": "RLOO"}),
    "trl_grpo": Method(trl_online, {"name": "GRPO"}),
}
E1 = ("una_pair", "una_bce", "una_mse", "una_score", "una_centred", "trl_dpo", "trl_kto")
E2 = ("una_score", "una_centred")
E3 = ("una_group", "una_ema", "una_none", "una_sigmoid", "ppo_1", "ppo_4", "trl_rloo", "trl_grpo")
