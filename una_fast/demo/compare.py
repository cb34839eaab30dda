"""What the demo shows: the base model against the aligned one on held-out prompts, as numbers, a plot and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

BINS = 10
SCORING_BATCH = 16
NEW_TOKENS = 48
SHOWN_TEXTS = 3


@dataclass(frozen=True)
class Scored:
    """Held-out records of one kind with the log-probs of their responses under both models, sums over tokens.

    before, after: one array [K] per record.
    """

    examples: list[Example]
    before: list[np.ndarray]
    after: list[np.ndarray]

    def delta(self) -> np.ndarray:
        """log pi - log pi_ref of every response, record after record."""
        return np.concatenate(self.after) - np.concatenate(self.before)


@dataclass(frozen=True)
class Findings:
    """Everything that the demo measured; pairs of numbers are (before, after)."""

    pair_accuracy: tuple[float, float]
    pair_accuracy_by_rejected: dict[str, tuple[float, int]]
    logp_accuracy: tuple[float, float]
    logp_per_token_accuracy: tuple[float, float]
    implied: tuple[np.ndarray, np.ndarray]
    scores: np.ndarray
    offset: float
    kl: tuple[float, float]
    rouge_2: tuple[float, float]
    texts: list[tuple[str, str, str, str]]

    @property
    def score_gap(self) -> tuple[float, float]:
        """Mean |sigmoid(r + offset) - score|."""
        return tuple(float(np.abs(implied - self.scores).mean()) for implied in self.implied)

    @property
    def correlation(self) -> float:
        """Of sigmoid(r + offset) after the alignment with the scores."""
        return float(np.corrcoef(self.implied[1], self.scores)[0, 1])

    @property
    def constant_gap(self) -> float:
        """The gap of always predicting the mean score."""
        return float(np.abs(self.scores.mean() - self.scores).mean())

    @property
    def calibration_error(self) -> tuple[float, float]:
        """Mean over bins of p = sigmoid(r + offset), weighted by their responses, of |mean p - mean score|."""
        return tuple(
            sum(count * abs(x - y) for x, y, count in reliability(implied, self.scores))
            / len(self.scores)
            for implied in self.implied
        )

    def summary(self) -> dict[str, Any]:
        """Numbers alone, rounded, [before, after]."""
        pairs = {
            name: [round(value, 4) for value in getattr(self, name)]
            for name in (
                *("pair_accuracy", "logp_accuracy", "logp_per_token_accuracy"),
                *("score_gap", "calibration_error", "rouge_2"),
            )
        }
        pairs["pair_accuracy_by_rejected"] = {
            k: round(v, 4) for k, (v, _) in self.pair_accuracy_by_rejected.items()
        }
        pairs |= {
            "score_gap_of_the_mean": round(self.constant_gap, 4),
            "score_correlation": round(self.correlation, 4),
        }
        return {**pairs, "kl": round(self.kl[0], 3), "kl_standard_error": round(self.kl[1], 3)}

    def table(self) -> str:
        point = f"sigmoid(r + {self.offset:g})" if self.offset else "sigmoid(r)"
        lines = [f"{'held-out prompts':40} {'before':>8} {'after':>8}"]

        def row(name: str, before: float | None, after: float, note: str = "") -> None:
            lines.append(
                f"{name:40} {'' if before is None else f'{before:.3f}':>8} {after:8.3f}   {note}".rstrip()
            )

        row(
            "pair accuracy, implicit reward",
            *self.pair_accuracy,
            "0.5 is a coin; the reward is 0 for all before",
        )
        for kind, (accuracy, count) in self.pair_accuracy_by_rejected.items():
            row(f"  rejected: {kind}", None, accuracy, f"{count} pairs")
        row(
            "pair accuracy, log-prob",
            *self.logp_accuracy,
            "the models' own preference, sums over tokens",
        )
        row("pair accuracy, log-prob per token", *self.logp_per_token_accuracy)
        row(
            f"|{point} - score|, mean",
            *self.score_gap,
            f"always guessing the mean score: {self.constant_gap:.3f}",
        )
        row(
            f"calibration error of {point}",
            *self.calibration_error,
            "10 bins; near 0 for a constant at the mean score",
        )
        row(f"correlation of {point} with scores", None, self.correlation)
        row(
            "ROUGE-2 of samples",
            *self.rouge_2,
            "against the written docstring; this small a model knows little",
        )
        row(
            f"KL of the first {NEW_TOKENS} tokens, nats",
            0.0,
            self.kl[0],
            f"+- {self.kl[1]:.3f}, on samples of the aligned model",
        )
        return "\n".join(lines)

    def plot(self, metrics: Path, path: Path) -> None:
        """Training curves, and the reliability of sigmoid(r + offset) against the scores."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
        for name, label in (
            ("loss", "loss"),
            ("rewards/margins", "margin of pairs"),
            ("rewards/accuracies", "accuracy of pairs"),
        ):
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = zip(*points, strict=True) if points else ((), ())
            (curve,) = left.plot(steps, values, alpha=0.3)
            width = max(len(values) // 20, 1)
            smooth = np.convolve(values, np.ones(width) / width, "valid") if values else []
            left.plot(steps[width - 1 :], smooth, color=curve.get_color(), label=label)
        left.set(xlabel="step", title="alignment on mixed feedback")
        left.legend()
        right.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for implied, label in zip(self.implied, ("before", "after"), strict=True):
            x, y, count = zip(*reliability(implied, self.scores), strict=True)
            right.plot(x, y, marker="o", label=label)
            right.scatter(x, y, s=[10 + 300 * n / len(self.scores) for n in count], alpha=0.3)
        right.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel=f"sigmoid(r + {self.offset:g}), binned",
            ylabel="mean score",
            title="held-out scores",
        )
        right.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


@dataclass(frozen=True)
class OnlineFindings:
    """What an online run's own evaluation found on held-out prompts, one sample each: metrics by step, of which the
    first stand for the base model and the last for the aligned one."""

    evaluations: list[dict[str, float]]
    texts: list[tuple[str, str, str, str]]

    def of(self, name: str) -> tuple[float, float]:
        """A metric before and after."""
        return self.evaluations[0][f"eval_{name}"], self.evaluations[-1][f"eval_{name}"]

    @property
    def errors(self) -> list[float]:
        """Standard error of the mean reward at every evaluation."""
        return [
            e["eval_reward_std"]
            / (e["eval_completions/count"] - e["eval_completions/skipped"]) ** 0.5
            for e in self.evaluations
        ]

    @property
    def rise(self) -> float:
        """Of the mean reward, in its standard errors."""
        before, after = self.of("reward")
        return (after - before) / max((self.errors[0] ** 2 + self.errors[-1] ** 2) ** 0.5, 1e-12)

    def summary(self) -> dict[str, Any]:
        names = [
            "reward",
            *sorted(
                n.removeprefix("eval_")
                for n in self.evaluations[0]
                if n.startswith("eval_rewards/")
            ),
        ]
        found = {name: [round(value, 4) for value in self.of(name)] for name in names}
        return {
            **found,
            "rise_in_standard_errors": round(self.rise, 1),
            "kl": round(self.of("kl")[1], 3),
        }

    def table(self) -> str:
        lines = [f"{'held-out prompts, one sample each':40} {'before':>8} {'after':>8}"]

        def row(name: str, metric: str, note: str = "") -> None:
            before, after = self.of(metric)
            lines.append(f"{name:40} {before:8.3f} {after:8.3f}   {note}".rstrip())

        row(
            "reward, the weighted sum",
            "reward",
            f"+- {self.errors[-1]:.3f}; a rise of {self.rise:.1f} standard errors",
        )
        for name in sorted(n for n in self.evaluations[0] if n.startswith("eval_rewards/")):
            row(
                f"  {name.removeprefix('eval_rewards/').removesuffix('/mean')}",
                name.removeprefix("eval_"),
            )
        row("tokens of a sample", "completions/mean_length")
        row("samples that do not end", "completions/clipped_ratio")
        row("KL from the base model, nats", "kl")
        return "\n".join(lines)

    def plot(self, metrics: Path, path: Path) -> None:
        """Reward of the samples of every step, and the held-out reward against the KL that it costs."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
        for name in (
            "reward",
            *(n for n in lines[-2] if n.startswith("rewards/") and n.endswith("/mean")),
        ):
            points = [(line["step"], line[name]) for line in lines if name in line]
            left.plot(
                *zip(*points, strict=True),
                label=name.removeprefix("rewards/").removesuffix("/mean"),
            )
        left.set(xlabel="step", title="rewards of the samples")
        left.legend()
        kl, reward = ([e[f"eval_{name}"] for e in self.evaluations] for name in ("kl", "reward"))
        right.errorbar(kl, reward, yerr=self.errors, marker="o")
        right.set(xlabel="KL from the base model, nats", ylabel="reward", title="held-out prompts")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def show_texts(texts: Sequence[tuple[str, str, str, str]]) -> str:
    """Prompts with the written docstring and what the models write, before and after."""
    blocks = []
    for prompt, truth, before, after in texts:
        lines = [
            prompt.split("\n")[0],
            f"  written   {truth}",
            f"  before    {before}",
            f"  after     {after}",
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


class Comparison:
    """The base model and the aligned one, on the evaluation records of an alignment run."""

    def __init__(
        self, base: Path, aligned: Path, tokenizer: PreTrainedTokenizerBase, settings: RunConfig
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.base, self.aligned = (
            load_policy(path, dtype=torch.float32, packing=True) for path in (base, aligned)
        )
        for policy in (self.base, self.aligned):
            policy.model.eval()

    def run(self, held_out: Sequence[Documented], samples: int, seed: int) -> Findings:
        """Everything, on the run's evaluation records and `samples` of the held-out prompts."""
        kinds = {
            Path(str(entry)).stem.removeprefix("held_out_"): entry
            for entry in self.settings.eval_data
        }
        pairs, scored = (self.score(self._load(kinds[kind])) for kind in ("pairs", "scores"))
        feedback = Feedback.merge([example.feedback for example in scored.examples])
        offset = feedback.offset.numpy() + self.settings.offset
        implied = [
            1 / (1 + np.exp(-(r + offset))) for r in (0.0, self.settings.beta * scored.delta())
        ]
        order = np.random.default_rng(seed).permutation(len(held_out))[:samples]
        kl, rouge = self._on_policy([held_out[i] for i in order], seed)
        return Findings(
            **pair_accuracies(pairs),
            pair_accuracy_by_rejected=self._by_rejected(pairs),
            implied=tuple(implied),
            scores=feedback.value.numpy(),
            offset=self.settings.offset,
            kl=kl,
            rouge_2=rouge,
            texts=self._texts([held_out[i] for i in order[:SHOWN_TEXTS]]),
        )

    def online(self, metrics: Path, held_out: Sequence[Documented], seed: int) -> OnlineFindings:
        """The evaluations of an online run, and texts of the first held-out prompts."""
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        order = np.random.default_rng(seed).permutation(len(held_out))[:SHOWN_TEXTS]
        return OnlineFindings(
            [line for line in lines if "eval_reward" in line],
            self._texts([held_out[i] for i in order]),
        )

    def _load(self, entry: str | dict[str, Any]) -> list[Example]:
        source = Source.parse(entry, self.settings.record_options())
        return load_examples(source, self.tokenizer, require_unit_scores=True)[0]

    def score(self, examples: list[Example]) -> Scored:
        return Scored(
            examples, self._logps(self.base, examples), self._logps(self.aligned, examples)
        )

    def _logps(self, policy: Policy, examples: list[Example]) -> list[np.ndarray]:
        parts = []
        for k in range(0, len(examples), SCORING_BATCH):
            batch = collate(
                examples[k : k + SCORING_BATCH],
                packed=policy.packed,
                pad_id=self.tokenizer.pad_token_id,
            )
            parts.append(Scoring().logps(policy, batch).numpy())
        ends = np.cumsum([len(example.responses) for example in examples])
        return np.split(np.concatenate(parts), ends[:-1])

    def _by_rejected(self, pairs: Scored) -> dict[str, tuple[float, int]]:
        """(accuracy of the implicit reward, pairs) for each way in which the rejected text is worse."""
        right: dict[str, list[float]] = {"truncated": [], "shuffled": [], "of another object": []}
        for example, before, after in zip(pairs.examples, pairs.before, pairs.after, strict=True):
            chosen, rejected = self._decode(example.responses)
            if chosen.startswith(rejected):
                kind = "truncated"
            else:
                kind = (
                    "shuffled"
                    if sorted(chosen.split()) == sorted(rejected.split())
                    else "of another object"
                )
            reward = after - before
            right[kind].append((reward[0] > reward[1]) + 0.5 * (reward[0] == reward[1]))
        return {kind: (float(np.mean(found)), len(found)) for kind, found in right.items() if found}

    def _on_policy(
        self, prompts: Sequence[Documented], seed: int
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """(KL of a response, its standard error): the mean of log pi - log pi_ref over responses drawn from the aligned
        policy; and the mean ROUGE-2 of drawn responses against the written docstrings, (before, after)."""
        texts = [entry.prompt for entry in prompts]
        before, after = (self._sample(policy, texts, seed) for policy in (self.base, self.aligned))
        nothing = Feedback.merge([])
        examples = [
            Example(
                np.array(self.tokenizer(text)["input_ids"], dtype=np.int32),
                (ids,),
                nothing,
                None,
                text,
            )
            for text, ids in zip(texts, after, strict=True)
        ]
        delta = self.score(examples).delta()
        rouge = [
            float(
                np.mean(
                    [
                        rouge_2(text, e.docstring)
                        for text, e in zip(self._decode(drawn), prompts, strict=True)
                    ]
                )
            )
            for drawn in (before, after)
        ]
        return (float(delta.mean()), float(delta.std() / np.sqrt(len(delta)))), tuple(rouge)

    @torch.no_grad()
    def _sample(self, policy: Policy, prompts: Sequence[str], seed: int | None) -> list[np.ndarray]:
        """Token ids of one continuation per prompt, at most NEW_TOKENS, up to and with EOS. seed: drawn at temperature
        1 from the whole distribution, so that their log-probs are those of the policy; None: greedy."""
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False
        )
        how = {"do_sample": False}
        if seed is not None:
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = policy.model.generate(**inputs, max_new_tokens=NEW_TOKENS, **how)
        samples = []
        for ids in output[:, inputs["input_ids"].shape[1] :].numpy():
            ends = np.flatnonzero(ids == self.tokenizer.eos_token_id)
            samples.append(ids[: ends[0] + 1] if ends.size else ids)
        return samples

    def _decode(self, samples: Sequence[np.ndarray]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]

    def _texts(self, prompts: Sequence[Documented]) -> list[tuple[str, str, str, str]]:
        """(prompt, written docstring, greedy text before, after)."""
        texts = [entry.prompt for entry in prompts]
        before, after = (
            self._decode(self._sample(policy, texts, None)) for policy in (self.base, self.aligned)
        )
        return [
            (e.prompt, e.docstring, b, a) for e, b, a in zip(prompts, before, after, strict=True)
        ]


def pair_accuracies(pairs: Scored) -> dict[str, tuple[float, float]]:
    """Shares of held-out pairs in which the chosen response has the higher value, (before, after); a tie is half.

    pair_accuracy: by implicit reward (0 for every response before). logp_accuracy, logp_per_token_accuracy: by the
    model's own log-prob, sum and per token."""

    def share(values: Sequence[np.ndarray]) -> float:
        return float(np.mean([(v[0] > v[1]) + 0.5 * (v[0] == v[1]) for v in values]))

    lengths = [np.array([len(ids) for ids in example.responses]) for example in pairs.examples]
    reward = [after - before for before, after in zip(pairs.before, pairs.after, strict=True)]
    sides = (pairs.before, pairs.after)
    return {
        "pair_accuracy": (0.5, share(reward)),
        "logp_accuracy": tuple(share(side) for side in sides),
        "logp_per_token_accuracy": tuple(
            share([logps / n for logps, n in zip(side, lengths, strict=True)]) for side in sides
        ),
    }


def reliability(implied: np.ndarray, scores: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean implied score, mean score, responses) of every bin that holds any."""
    index = np.minimum((implied * BINS).astype(int), BINS - 1)
    parts = [(implied[index == b], scores[index == b]) for b in range(BINS)]
    return [(float(x.mean()), float(y.mean()), len(x)) for x, y in parts if len(x)]
