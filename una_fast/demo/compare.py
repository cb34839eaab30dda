"""Compare the base model with the aligned model on held-out prompts: numbers, a plot and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.sources import Source
from una_fast.demo.text import Documented, rouge_2
from una_fast.feedback import Feedback
from una_fast.model.policy import Policy, load_policy
from una_fast.model.scoring import Scoring
from una_fast.resolved import find_facts, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 10
SCORING_BATCH = 16
NEW_TOKENS = 48
SHOWN_TEXTS = 3
REJECTED = ("truncated", "shuffled", "of another object")


class ShownText(NamedTuple):
    """A held-out prompt with the written docstring and the greedy texts of both models."""

    prompt: str
    written: str
    before: str
    after: str


class Bin(NamedTuple):
    """A bin of implied scores: mean implied score, mean score, number of responses."""

    implied: float
    score: float
    responses: int


@dataclass(frozen=True)
class Scored:
    """Held-out records of one kind with the log-probs of their responses under both models.

    before, after: [K] sums over tokens for each record, K responses
    """

    examples: list[Example]
    before: list[np.ndarray]
    after: list[np.ndarray]

    def delta(self) -> np.ndarray:
        """Return log pi - log pi_ref of every response, record after record."""
        return np.concatenate(self.after) - np.concatenate(self.before)


@dataclass(frozen=True)
class Findings:
    """Measurements of an offline demo; pairs of numbers are (before, after)."""

    pair_accuracy: tuple[float, float]
    pair_accuracy_by_rejected: dict[str, tuple[float, int]]
    logp_accuracy: tuple[float, float]
    logp_per_token_accuracy: tuple[float, float]
    implied: tuple[np.ndarray, np.ndarray]
    scores: np.ndarray
    offset: float
    kl: tuple[float, float]
    rouge_2: tuple[float, float]
    texts: list[ShownText]

    @property
    def score_gap(self) -> tuple[float, float]:
        """Return the mean |sigmoid(r + offset) - score|."""
        return tuple(float(np.abs(implied - self.scores).mean()) for implied in self.implied)

    @property
    def correlation(self) -> float:
        """Return the correlation of sigmoid(r + offset) after the alignment with the scores."""
        return float(np.corrcoef(self.implied[1], self.scores)[0, 1])

    @property
    def constant_gap(self) -> float:
        """Return the score gap of a constant prediction, the mean score."""
        return float(np.abs(self.scores.mean() - self.scores).mean())

    @property
    def calibration_error(self) -> tuple[float, float]:
        """Return the mean of |mean p - mean score| over bins of p = sigmoid(r + offset).

        Bins are weighted by their responses.
        """
        return tuple(calibration_error(implied, self.scores) for implied in self.implied)

    def summary(self) -> dict[str, Any]:
        """Return the numbers alone, rounded, [before, after]."""
        names = ["pair_accuracy", "logp_accuracy", "logp_per_token_accuracy"]
        names += ["score_gap", "calibration_error", "rouge_2"]
        found: dict[str, Any] = {name: _rounded(getattr(self, name)) for name in names}
        found["pair_accuracy_by_rejected"] = {
            kind: round(accuracy, 4)
            for kind, (accuracy, _) in self.pair_accuracy_by_rejected.items()
        }
        found["score_gap_of_the_mean"] = round(self.constant_gap, 4)
        found["score_correlation"] = round(self.correlation, 4)
        found["kl"] = round(self.kl[0], 3)
        found["kl_standard_error"] = round(self.kl[1], 3)
        return found

    def table(self) -> str:
        """Return the numbers as a table, each with a remark that helps to read the number."""
        point = f"sigmoid(r + {self.offset:g})" if self.offset else "sigmoid(r)"
        by_rejected = [
            _row(f"  rejected: {kind}", None, accuracy, f"{count} pairs")
            for kind, (accuracy, count) in self.pair_accuracy_by_rejected.items()
        ]
        lines = [
            f"{'held-out prompts':40} {'before':>8} {'after':>8}",
            _row(
                "pair accuracy, implicit reward",
                *self.pair_accuracy,
                "0.5 is a coin; the reward is 0 for all before",
            ),
            *by_rejected,
            _row(
                "pair accuracy, log-prob",
                *self.logp_accuracy,
                "the models' own preference, sums over tokens",
            ),
            _row("pair accuracy, log-prob per token", *self.logp_per_token_accuracy),
            _row(
                f"|{point} - score|, mean",
                *self.score_gap,
                f"always guessing the mean score: {self.constant_gap:.3f}",
            ),
            _row(
                f"calibration error of {point}",
                *self.calibration_error,
                "10 bins; near 0 for a constant at the mean score",
            ),
            _row(f"correlation of {point} with scores", None, self.correlation),
            _row(
                "ROUGE-2 of samples",
                *self.rouge_2,
                "against the written docstring; this small a model knows little",
            ),
            _row(
                f"KL of the first {NEW_TOKENS} tokens, nats",
                0.0,
                self.kl[0],
                f"+- {self.kl[1]:.3f}, on samples of the aligned model",
            ),
        ]
        return "\n".join(lines)

    def plot(self, metrics: Path, path: Path) -> None:
        """Plot the training curves, and the reliability of sigmoid(r + offset), to a file.

        metrics: metrics.jsonl of the alignment
        path: of the image
        """
        lines = read_metrics(metrics)
        figure, axes = _two_axes()
        left, right = axes
        _plot_smooth(left, lines, "loss", "loss")
        _plot_smooth(left, lines, "rewards/margins", "margin of pairs")
        _plot_smooth(left, lines, "rewards/accuracies", "accuracy of pairs")
        left.set(xlabel="step", title="alignment on mixed feedback")
        left.legend()
        right.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for implied, label in zip(self.implied, ("before", "after"), strict=True):
            bins = reliability(implied, self.scores)
            x = [held.implied for held in bins]
            y = [held.score for held in bins]
            sizes = [10 + 300 * held.responses / len(self.scores) for held in bins]
            right.plot(x, y, marker="o", label=label)
            right.scatter(x, y, s=sizes, alpha=0.3)
        right.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel=f"sigmoid(r + {self.offset:g}), binned",
            ylabel="mean score",
            title="held-out scores",
        )
        right.legend()
        _save(figure, path)


@dataclass(frozen=True)
class OnlineFindings:
    """Findings of an online run's own evaluation on held-out prompts, one sample for each prompt.

    evaluations: metrics by step; the first of the base model, the last of the aligned model
    """

    evaluations: list[dict[str, float]]
    texts: list[ShownText]

    def of(self, name: str) -> tuple[float, float]:
        """Return a metric before and after."""
        return self.evaluations[0][f"eval_{name}"], self.evaluations[-1][f"eval_{name}"]

    @property
    def errors(self) -> list[float]:
        """Return the standard error of the mean reward at every evaluation."""
        errors = []
        for metrics in self.evaluations:
            samples = metrics["eval_completions/count"] - metrics["eval_completions/skipped"]
            errors.append(metrics["eval_reward_std"] / samples**0.5)
        return errors

    @property
    def rise(self) -> float:
        """Return the rise of the mean reward, in standard errors."""
        before, after = self.of("reward")
        error = (self.errors[0] ** 2 + self.errors[-1] ** 2) ** 0.5
        return (after - before) / max(error, 1e-12)

    @property
    def reward_names(self) -> list[str]:
        """Return the metrics of the rewards in the weighted sum, such as "rewards/known/mean"."""
        names = [name for name in self.evaluations[0] if name.startswith("eval_rewards/")]
        return sorted(name.removeprefix("eval_") for name in names)

    def summary(self) -> dict[str, Any]:
        """Return the numbers alone, rounded, [before, after]."""
        found: dict[str, Any] = {
            name: _rounded(self.of(name)) for name in ("reward", *self.reward_names)
        }
        found["rise_in_standard_errors"] = round(self.rise, 1)
        found["kl"] = round(self.of("kl")[1], 3)
        return found

    def table(self) -> str:
        """Return the numbers as a table."""
        note = f"+- {self.errors[-1]:.3f}; a rise of {self.rise:.1f} standard errors"
        lines = [
            f"{'held-out prompts, one sample each':40} {'before':>8} {'after':>8}",
            _row("reward, the weighted sum", *self.of("reward"), note),
            *(_row(f"  {_short(name)}", *self.of(name)) for name in self.reward_names),
            _row("tokens of a sample", *self.of("completions/mean_length")),
            _row("samples that do not end", *self.of("completions/clipped_ratio")),
            _row("KL from the base model, nats", *self.of("kl")),
        ]
        return "\n".join(lines)

    def plot(self, metrics: Path, path: Path) -> None:
        """Plot the rewards of the samples by step, and the held-out reward against KL, to a file.

        metrics: metrics.jsonl of the alignment
        path: of the image
        """
        lines = read_metrics(metrics)
        figure, axes = _two_axes()
        left, right = axes
        rewards = [n for n in lines[-2] if n.startswith("rewards/") and n.endswith("/mean")]
        for name in ("reward", *rewards):
            left.plot(*_curve(lines, name), label=_short(name))
        left.set(xlabel="step", title="rewards of the samples")
        left.legend()
        kl = [metrics["eval_kl"] for metrics in self.evaluations]
        reward = [metrics["eval_reward"] for metrics in self.evaluations]
        right.errorbar(kl, reward, yerr=self.errors, marker="o")
        right.set(xlabel="KL from the base model, nats", ylabel="reward", title="held-out prompts")
        _save(figure, path)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _row(name: str, before: float | None, after: float, note: str = "") -> str:
    first = "" if before is None else f"{before:.3f}"
    return f"{name:40} {first:>8} {after:8.3f}   {note}".rstrip()


def _short(name: str) -> str:
    return name.removeprefix("rewards/").removesuffix("/mean")


def _two_axes() -> tuple[Figure, tuple[Axes, Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of a metric, where the metric was logged."""
    logged = [line for line in lines if name in line]
    return [line["step"] for line in logged], [line[name] for line in logged]


def _plot_smooth(axes: Axes, lines: list[dict[str, Any]], name: str, label: str) -> None:
    """Plot a metric, pale, and the metric averaged over a twentieth of the run."""
    steps, values = _curve(lines, name)
    (curve,) = axes.plot(steps, values, alpha=0.3)
    width = max(len(values) // 20, 1)
    smooth = np.convolve(values, np.ones(width) / width, "valid") if values else []
    axes.plot(steps[width - 1 :], smooth, color=curve.get_color(), label=label)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show_texts(texts: Sequence[ShownText]) -> str:
    """Return prompts with the written docstring and the texts of the models, before and after."""
    blocks = []
    for text in texts:
        lines = [
            text.prompt.split("\n")[0],
            f"  written   {text.written}",
            f"  before    {text.before}",
            f"  after     {text.after}",
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


class Comparison:
    """The base model and the aligned model, on the evaluation records of an alignment run."""

    def __init__(
        self, base: Path, aligned: Path, tokenizer: PreTrainedTokenizerBase, settings: RunConfig
    ) -> None:
        """Load both models.

        base, aligned: directories in Hugging Face form
        tokenizer: of both models
        settings: of the alignment run
        """
        self.tokenizer = tokenizer
        self.settings = settings
        run = resolve(settings, find_facts(settings, [], device="cpu"))
        self.base = load_policy(base, dtype=run.compute, packed=run.packed)
        self.aligned = load_policy(aligned, dtype=run.compute, packed=run.packed)
        self.base.model.eval()
        self.aligned.model.eval()

    def run(self, held_out: Sequence[Documented], samples: int, seed: int) -> Findings:
        """Measure everything, on the run's evaluation records and on samples.

        held_out: objects that neither model has seen
        samples: number of held-out prompts that responses are sampled to
        seed: of the choice of prompts, and of the sampling
        """
        kinds = {}
        for entry in self.settings.eval_data:
            kinds[Path(str(entry)).stem.removeprefix("held_out_")] = entry
        pairs = self.score(self._load(kinds["pairs"]))
        scored = self.score(self._load(kinds["scores"]))
        feedback = Feedback.merge([example.feedback for example in scored.examples])
        offset = feedback.offset.numpy() + self.settings.offset
        rewards = self.settings.beta * scored.delta()
        order = np.random.default_rng(seed).permutation(len(held_out))[:samples]
        kl, rouge = self._on_policy([held_out[i] for i in order], seed)
        return Findings(
            **pair_accuracies(pairs),
            pair_accuracy_by_rejected=self._by_rejected(pairs),
            implied=(_sigmoid(0.0 + offset), _sigmoid(rewards + offset)),
            scores=feedback.value.numpy(),
            offset=self.settings.offset,
            kl=kl,
            rouge_2=rouge,
            texts=self._texts([held_out[i] for i in order[:SHOWN_TEXTS]]),
        )

    def online(self, metrics: Path, held_out: Sequence[Documented], seed: int) -> OnlineFindings:
        """Return the evaluations of an online run, and texts of the first held-out prompts.

        metrics: metrics.jsonl of the run
        held_out: objects that neither model has seen
        seed: of the choice of prompts
        """
        evaluations = [line for line in read_metrics(metrics) if "eval_reward" in line]
        order = np.random.default_rng(seed).permutation(len(held_out))[:SHOWN_TEXTS]
        return OnlineFindings(evaluations, self._texts([held_out[i] for i in order]))

    def _load(self, entry: str | dict[str, Any]) -> list[Example]:
        source = Source.parse(entry, self.settings.record_options())
        return load_examples(source, self.tokenizer, require_unit_scores=True)[0]

    def score(self, examples: list[Example]) -> Scored:
        """Compute the log-probs of the responses under both models."""
        before = self._logps(self.base, examples)
        after = self._logps(self.aligned, examples)
        return Scored(examples, before, after)

    def _logps(self, policy: Policy, examples: list[Example]) -> list[np.ndarray]:
        logps = []
        for first in range(0, len(examples), SCORING_BATCH):
            batch = collate(
                examples[first : first + SCORING_BATCH],
                packed=policy.packed,
                pad_id=self.tokenizer.pad_token_id,
            )
            logps.append(Scoring().logps(policy, batch).numpy())
        ends = np.cumsum([len(example.responses) for example in examples])
        return np.split(np.concatenate(logps), ends[:-1])

    def _by_rejected(self, pairs: Scored) -> dict[str, tuple[float, int]]:
        """Return {kind of rejected text: (accuracy of the implicit reward, pairs)}."""
        right: dict[str, list[float]] = {kind: [] for kind in REJECTED}
        for example, before, after in zip(pairs.examples, pairs.before, pairs.after, strict=True):
            chosen, rejected = self._decode(example.responses)
            right[kind_of_rejected(chosen, rejected)].append(_is_right(after - before))
        return {kind: (float(np.mean(found)), len(found)) for kind, found in right.items() if found}

    def _on_policy(
        self, prompts: Sequence[Documented], seed: int
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Sample a response of each model to every prompt, and measure the responses.

        Returns (KL of a response in nats, its standard error), from log pi - log pi_ref of the
        aligned model's responses; and the mean ROUGE-2 of responses against the written docstrings,
        (before, after).
        """
        texts = [entry.prompt for entry in prompts]
        before = self._sample(self.base, texts, seed)
        after = self._sample(self.aligned, texts, seed)
        delta = self.score(self._examples(texts, after)).delta()
        kl = (float(delta.mean()), float(delta.std() / np.sqrt(len(delta))))
        return kl, (self._mean_rouge(before, prompts), self._mean_rouge(after, prompts))

    def _examples(self, prompts: Sequence[str], responses: Sequence[np.ndarray]) -> list[Example]:
        """Return records of one response each, without feedback."""
        no_feedback = Feedback.merge([])
        examples = []
        for prompt, ids in zip(prompts, responses, strict=True):
            prompt_ids = np.array(self.tokenizer(prompt)["input_ids"], dtype=np.int32)
            examples.append(Example(prompt_ids, (ids,), no_feedback, None, prompt))
        return examples

    def _mean_rouge(self, responses: Sequence[np.ndarray], prompts: Sequence[Documented]) -> float:
        texts = self._decode(responses)
        found = [rouge_2(text, e.docstring) for text, e in zip(texts, prompts, strict=True)]
        return float(np.mean(found))

    @torch.no_grad()
    def _sample(self, policy: Policy, prompts: Sequence[str], seed: int | None) -> list[np.ndarray]:
        """Return the token ids of one continuation per prompt, up to and with EOS.

        seed: samples at temperature 1 from the whole distribution, so that log-probs of the samples
            are log-probs of the policy; None: greedy

        A continuation has at most NEW_TOKENS tokens.
        """
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False
        )
        how: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = policy.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **how)
        prompt_length = inputs["input_ids"].shape[1]
        samples = []
        for ids in output[:, prompt_length:].numpy():
            ends = np.flatnonzero(ids == self.tokenizer.eos_token_id)
            if ends.size:
                ids = ids[: ends[0] + 1]
            samples.append(ids)
        return samples

    def _decode(self, samples: Sequence[np.ndarray]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]

    def _texts(self, prompts: Sequence[Documented]) -> list[ShownText]:
        """Return the greedy texts of both models to prompts."""
        texts = [entry.prompt for entry in prompts]
        written = [entry.docstring for entry in prompts]
        before = self._decode(self._sample(self.base, texts, None))
        after = self._decode(self._sample(self.aligned, texts, None))
        return list(map(ShownText, texts, written, before, after))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _is_right(values: np.ndarray) -> float:
    """Return 1 where the first of two values is the higher, 0.5 for a tie, else 0."""
    return (values[0] > values[1]) + 0.5 * (values[0] == values[1])


def kind_of_rejected(chosen: str, rejected: str) -> str:
    """Return in which of the ways REJECTED a rejected text is worse than the chosen text."""
    if chosen.startswith(rejected):
        return "truncated"
    if sorted(chosen.split()) == sorted(rejected.split()):
        return "shuffled"
    return "of another object"


def pair_accuracies(pairs: Scored) -> dict[str, tuple[float, float]]:
    """Return shares of held-out pairs with the higher value for the chosen response.

    pair_accuracy: by implicit reward (0 for every response before)
    logp_accuracy: by the model's own log-prob, summed over tokens
    logp_per_token_accuracy: by the model's own log-prob per token

    Values are (before, after); a tie counts a half.
    """

    def share(values: Sequence[np.ndarray]) -> float:
        return float(np.mean([_is_right(pair) for pair in values]))

    def per_token(logps: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [sums / n for sums, n in zip(logps, lengths, strict=True)]

    lengths = [np.array(list(map(len, example.responses))) for example in pairs.examples]
    rewards = [after - before for before, after in zip(pairs.before, pairs.after, strict=True)]
    return {
        "pair_accuracy": (0.5, share(rewards)),
        "logp_accuracy": (share(pairs.before), share(pairs.after)),
        "logp_per_token_accuracy": (
            share(per_token(pairs.before)),
            share(per_token(pairs.after)),
        ),
    }


def reliability(implied: np.ndarray, scores: np.ndarray) -> list[Bin]:
    """Return every bin with responses, by implied score."""
    index = np.minimum((implied * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        held = index == number
        if held.any():
            mean = float(implied[held].mean())
            bins.append(Bin(mean, float(scores[held].mean()), int(held.sum())))
    return bins


def calibration_error(implied: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean of |mean implied score - mean score| over bins, weighted by responses."""
    bins = reliability(implied, scores)
    gaps = [held.responses * abs(held.implied - held.score) for held in bins]
    return sum(gaps) / len(scores)
