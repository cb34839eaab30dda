"""Where the batches of an online run come from:

    prompts -> sampled ids (rollout.py) -> rewards (rewards.py) -> scores -> reference log-probs -> offsets -> Step

A step that this gives is one like those of the loader: its records hold one score per sampled response, with the
reference log-probs and the offset f(x) + c as numbers, so that what follows does not know where they came from. Every
rank samples for its share of the prompts and has them rewarded; then all ranks hold all of them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from una_fast.config import RunConfig
from una_fast.data.batch import collate
from una_fast.data.examples import Example, Prompt
from una_fast.data.loader import Loader, Step
from una_fast.distributed import World
from una_fast.feedback import Feedback
from una_fast.logs import say_once
from una_fast.model.policy import Policy
from una_fast.model.reference import Reference
from una_fast.model.scoring import Scoring
from una_fast.offsets import EmaOffset, group_offset
from una_fast.online.samplers import make_sampler
from una_fast.online.sampling import Completion, completion_text
from una_fast.resolved import ResolvedRun
from una_fast.rewards.scale import RewardScale
from una_fast.rewards.settings import RewardError, parse_rewards
from una_fast.rewards.total import Rewards

logger = logging.getLogger(__name__)


EVALUATION = 1_000_003  # a stream of samples of its own


@dataclass(frozen=True)
class Sampled(Example):
    """A record of responses that the policy drew. logps: [K] their log-probs, as the sampler computed them."""

    logps: np.ndarray


@dataclass(frozen=True)
class Rollout:
    """A prompt with its samples and what they were given: reward (None: it has none, and is left out), score (the
    reward as it is compared) and rewards by name."""

    prompt: Prompt
    completions: list[Completion]
    texts: list[str]
    rewards: list[float | None]
    parts: dict[str, list[float | None]]
    scores: list[float | None] = field(default_factory=list)

    def kept(self) -> list[int]:
        """The samples that have a reward."""
        return [k for k, reward in enumerate(self.rewards) if reward is not None]

    def example(self, scores: Sequence[float | None]) -> Sampled:
        """A record of the samples that have a reward, with these scores."""
        kept = self.kept()
        feedback = Feedback.scores(
            range(len(kept)), [scores[k] for k in kept], weight=self.prompt.weight
        )
        responses = tuple(self.completions[k].ids for k in kept)
        logps = np.array([self.completions[k].logp for k in kept])
        return Sampled(self.prompt.prompt_ids, responses, feedback, None, self.prompt.origin, logps)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is written down of every sample, for people."""
        for k, completion in enumerate(self.completions):
            yield {
                "policy_version": completion.version,
                "origin": self.prompt.origin,
                "prompt": self.prompt.text,
                "completion": self.texts[k],
                "tokens": len(completion.ids),
                "finished": completion.finished,
                "logp": completion.logp,
                "reward": self.rewards[k],
                "score": self.scores[k],
                "rewards": {name: values[k] for name, values in self.parts.items()},
            }


class Online:
    """Samples, scores and centres the records of every step. `stopped` says why it gave no more steps, if it did."""

    def __init__(
        self,
        config: RunConfig,
        run: ResolvedRun,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        reference: Reference,
        scoring: Scoring,
        prompts: Loader,
        records: Loader | None,
        every_prompt: Sequence[Prompt],
    ) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.policy, self.reference, self.scoring = policy, reference, scoring
        self.prompts, self.records = prompts, records
        self.sampler = make_sampler(config, policy, tokenizer, scoring, world)
        self.rewards = Rewards(
            parse_rewards(config.rewards),
            missing_eos_penalty=config.missing_eos_penalty,
            device=world.device,
            dtype=run.compute,
            trust_remote_code=config.trust_remote_code,
        )
        # In bf16 a sampler's log-probs, step by step from a cache, are not those of the packed row.
        self.rescored = config.anchor == "rollout" or run.compute == torch.bfloat16
        self.columns = sorted({name for prompt in every_prompt for name in prompt.columns})
        self.scale = RewardScale(config.reward_map, config.reward_range)
        self.ema = EmaOffset()
        self.sums: Counter[str] = Counter()
        self.stopped: str | None = None
        self.before: dict[str, Any] = {}
        self.completions: list[dict[str, Any]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; of the records in a mixed run, where prompts are taken as they are needed."""
        source = self.records or self.prompts
        return source.steps_per_epoch * self.config.inner_epochs

    def steps(self, first: int, stop: int) -> Iterator[Step]:
        """Steps first, ..., stop - 1; each is sampled from the policy as it stands when the step is asked for, and
        taken inner_epochs times. `first` must be a multiple of that."""
        inner = self.config.inner_epochs
        assert first % inner == 0, "a run resumes between rollouts"
        for step in range(first, stop):
            if step % inner == 0:
                self.before = self.state_dict()
                work = self._roll_out(step // inner, version=step)
                if self.stopped:
                    return  # with the completions that it stopped at, for take_completions
            yield replace(work, epoch=(step + 1) / self.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; but for times the same on every rank. Of a run that was stopped, as before the samples that
        stopped it, which are drawn again when it goes on."""
        if self.stopped:
            return self.before | {"sums": dict(self.sums)}
        return {
            "scale": self.scale.state_dict(),
            "ema": self.ema.state_dict(),
            "sums": dict(self.sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.load_state_dict(state["scale"])
        self.ema.load_state_dict(state["ema"])
        self.sums = Counter(state["sums"])

    def take(self) -> dict[str, float]:
        """Metrics of the rollouts since the last call, and the seconds that this rank spent on them."""
        sums, self.sums = self.sums, Counter()
        return _metrics(sums)

    def take_completions(self) -> list[dict[str, Any]]:
        """What completions.jsonl is to hold of the last rollout."""
        found, self.completions = self.completions, []
        return found

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Rewards and KL of one sample of every prompt; the same random stream every time."""
        sums: Counter[str] = Counter()
        missing: Counter[str] = Counter()
        size = self.config.online_batch_size() * self.config.samples_per_prompt
        for start in range(0, len(prompts), size):
            part, seed = prompts[start : start + size], [self.config.seed, EVALUATION, start]
            rollouts, failures = self._sample(part, seed, 0, sums, 1)
            missing += failures
            examples = [r.example(r.rewards) for r in rollouts if r.kept()]
            if examples:
                self._anchored(self.prompts.split(examples, 0.0), sums)
        if (
            not sums["rewarded"] and self.world.is_main
        ):  # the steps that were taken must not be lost to it
            logger.warning("no sample of the evaluation got a reward: %s", dict(missing))
        return _metrics(sums)

    # --- one rollout -------------------------------------------------------------------------------------------------

    def _roll_out(self, number: int, version: int) -> Step:
        prompts = self.prompts.records(number)
        rollouts, failures = self._sample(prompts, [self.config.seed, number], version, self.sums)
        self._check(rollouts, failures)
        scores = iter(
            self._scores([reward for r in rollouts for reward in r.rewards if reward is not None])
        )
        rollouts = [
            replace(r, scores=[None if x is None else next(scores) for x in r.rewards])
            for r in rollouts
        ]
        examples = [r.example(r.scores) for r in rollouts if r.kept()]
        step = self.prompts.split(
            [*examples, *(self.records.records(number) if self.records else [])], 0.0
        )
        step, kl, residual = self._anchored(step, self.sums)
        if self.config.offset == "ema":
            self.ema.update(residual)
        saved = rollouts[: self.config.saved_completions]
        self.completions = [line for rollout in saved for line in rollout.lines()]
        self._guard(kl, version)
        return step

    def _sample(
        self,
        prompts: Sequence[Prompt],
        seed: list[int],
        version: int,
        sums: Counter[str],
        samples: int | None = None,
    ) -> tuple[list[Rollout], Counter[str]]:
        """The rollouts of all ranks, in the order of the prompts, rewards as they were given; and why samples have
        none."""
        rank, size = self.world.rank, self.world.size
        mine = list(prompts[rank::size])
        asked = mine + [prompts[0]] * (
            -(-len(prompts) // size) - len(mine)
        )  # all ranks together, or none
        stream = int(np.random.SeedSequence([*seed, rank]).generate_state(1)[0])
        with _timed(sums, "time/generate"):
            drawn = self.sampler.sample(
                [p.prompt_ids for p in asked], seed=stream, samples=samples, version=version
            )
        with _timed(sums, "time/reward"):
            ranks = self.world.gather(
                self._reward(mine, drawn[: len(mine)])
            )  # waits for the slowest
        failures = sum((rank.failures for rank in ranks), Counter())
        errors = [rank.error for rank in ranks if rank.error]
        if errors:
            raise RewardError(errors[0])
        rollouts = [ranks[i % size].rollouts[i // size] for i in range(len(prompts))]
        _count(sums, rollouts)
        return rollouts, failures

    def _reward(self, prompts: list[Prompt], drawn: list[list[Completion]]) -> _Share:
        texts = [
            [self._text(prompt, c) for c in group]
            for prompt, group in zip(prompts, drawn, strict=True)
        ]
        repeated = [prompt for prompt, group in zip(prompts, drawn, strict=True) for _ in group]
        try:
            found = self.rewards(
                [prompt.text for prompt in repeated],
                [text for group in texts for text in group],
                [completion.finished for group in drawn for completion in group],
                {name: [prompt.columns.get(name) for prompt in repeated] for name in self.columns},
            )
        except RewardError as error:  # the other ranks wait, and must hear of it
            return _Share([], Counter(), str(error))
        rollouts, start = [], 0
        for prompt, group, own in zip(prompts, drawn, texts, strict=True):
            part = slice(start, start := start + len(group))
            parts = {name: values[part] for name, values in found.parts.items()}
            rollouts.append(Rollout(prompt, group, own, found.total[part], parts))
        return _Share(rollouts, found.failures, None)

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        return completion_text(self.tokenizer, prompt.prompt_ids, completion, self.sampler.sampling)

    def _check(self, rollouts: list[Rollout], failures: Counter[str]) -> None:
        """RewardError where no sample has a reward; what will teach little is told once."""
        rewards = [
            reward for rollout in rollouts for reward in rollout.rewards if reward is not None
        ]
        if not rewards:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in failures.most_common(3))
            raise RewardError(
                f"no response of the step got a reward: {reasons or 'every reward is None'}"
            )
        if not self.world.is_main:
            return
        if self.config.offset == "group" and len(rewards) > 1 and len(set(rewards)) == 1:
            say_once(
                logging.WARNING,
                f"all {len(rewards)} rewards of a step are {rewards[0]:g}: they teach nothing",
            )
        if not any(
            completion.finished for rollout in rollouts for completion in rollout.completions
        ):
            say_once(
                logging.WARNING,
                f"no response of a step ended within max_new_tokens={self.config.max_new_tokens}; raise it, or set "
                "missing_eos_penalty",
            )

    def _scores(self, rewards: list[float]) -> list[float]:
        scores = self.scale(rewards)
        if self.config.objective().scores_in_unit_interval:
            for score in scores:
                if not 0 <= score <= 1:
                    raise RewardError(
                        f"reward {score:g} lies outside [0, 1], which score={self.config.score} compares with "
                        "sigmoid(r); set reward_map: range, sigmoid or quantile, or score: reward_mse"
                    )
        return scores

    # --- reference log-probs and offsets -----------------------------------------------------------------------------

    @torch.no_grad()
    def _anchored(self, step: Step, sums: Counter[str]) -> tuple[Step, float, float]:
        """The step with reference log-probs and offsets as numbers; and of its samples the mean KL from the reference
        and the mean residual."""
        totals = torch.zeros(
            4, dtype=torch.float64
        )  # samples, KL, residuals, samples without another of their prompt
        batches: list[list[Example]] = []
        for examples in step.micro_batches:
            batch = collate(
                examples,
                packed=self.policy.packed,
                device=self.world.device,
                pad_id=self.tokenizer.pad_token_id,
            )
            anchors = ref_logps = self.reference.logps(batch).cpu().numpy()
            own_logps = (
                self.scoring.logps(self.policy, batch).cpu().numpy() if self.rescored else None
            )
            if self.config.anchor == "rollout":
                anchors = own_logps
            ends = np.cumsum([len(example.responses) for example in examples])
            done = []
            for example, end in zip(examples, ends, strict=True):
                own = slice(end - len(example.responses), end)
                if isinstance(example, Sampled):
                    logps = example.logps if own_logps is None else own_logps[own]
                    residuals = self._residuals(example, logps - anchors[own])
                    kl = logps - ref_logps[own]
                    lone = float(len(kl) == 1)
                    totals += torch.tensor(
                        [len(kl), kl.sum(), residuals.sum(), lone], dtype=torch.float64
                    )
                    feedback = replace(example.feedback, offset=self._offset(residuals))
                    done.append(replace(example, ref_logps=tuple(anchors[own]), feedback=feedback))
                else:
                    done.append(replace(example, ref_logps=tuple(ref_logps[own])))
            batches.append(done)
        count, kl, residual, lone = self.world.sum(totals).tolist()
        sums.update({"kl": kl, "scored": count, "lone": lone})
        return replace(step, micro_batches=batches), kl / count, residual / count

    def _residuals(self, example: Example, delta: np.ndarray) -> torch.Tensor:
        """[K] beta * Delta - R of the samples of a prompt."""
        if self.config.length_normalize:
            delta = delta / [len(ids) for ids in example.responses]
        return self.config.beta * torch.from_numpy(delta) - example.feedback.value

    def _offset(self, residuals: torch.Tensor) -> torch.Tensor:
        if self.config.offset == "group":
            return group_offset(residuals, torch.zeros(len(residuals), dtype=torch.int64))
        return torch.full_like(residuals, self.ema.offset if self.config.offset == "ema" else 0.0)

    def _guard(self, kl: float, version: int) -> None:
        ceiling = self.config.max_kl
        if ceiling is None or kl <= ceiling:
            return
        text = f"the samples of step {version + 1} have a KL of {kl:.3g} nats from the reference, above max_kl={ceiling:g}"
        if self.config.on_max_kl == "stop":
            self.stopped = (
                f"{text}: the run stops; raise beta, lower learning_rate, or raise max_kl"
            )
        elif self.world.is_main:
            say_once(logging.WARNING, text)


@dataclass(frozen=True)
class _Share:
    """What one rank gives the others: its rollouts, why samples have no reward, or why there are none at all."""

    rollouts: list[Rollout]
    failures: Counter[str]
    error: str | None


@contextmanager
def _timed(sums: Counter[str], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    sums[name] += time.perf_counter() - start


def _count(sums: Counter[str], rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        rewards = [reward for reward in rollout.rewards if reward is not None]
        sums.update(
            {
                "samples": len(rollout.completions),
                "rewarded": len(rewards),
                "reward": sum(rewards),
                "reward_squares": sum(reward**2 for reward in rewards),
                "tokens": sum(len(c.ids) for c in rollout.completions),
                "finished": sum(c.finished for c in rollout.completions),
            }
        )
        for name, values in rollout.parts.items():
            known = [value for value in values if value is not None]
            sums.update({f"part/{name}": sum(known), f"parts/{name}": len(known)})


def _metrics(sums: Counter[str]) -> dict[str, float]:
    """Names follow TRL's online trainers. Lengths in tokens, KL in nats per response, times in seconds."""
    if not sums["samples"]:
        return {}
    metrics = {}
    if sums["rewarded"]:
        mean = sums["reward"] / sums["rewarded"]
        deviation = max(sums["reward_squares"] / sums["rewarded"] - mean**2, 0.0) ** 0.5
        metrics = {"reward": mean, "reward_std": deviation, "kl": sums["kl"] / sums["scored"]}
    metrics |= {
        "completions/count": sums["samples"],
        "completions/skipped": sums["samples"] - sums["rewarded"],
        "completions/alone": sums["lone"],
        "completions/mean_length": sums["tokens"] / sums["samples"],
        "completions/clipped_ratio": 1 - sums["finished"] / sums["samples"],
    }
    for name in [key.removeprefix("parts/") for key in sums if key.startswith("parts/")]:
        if sums[f"parts/{name}"]:
            metrics[f"rewards/{name}/mean"] = sums[f"part/{name}"] / sums[f"parts/{name}"]
    return metrics | {name: sums[name] for name in ("time/generate", "time/reward")}
