"""PPO for the study alone, small and plain: the baseline of online UNA.

    reward of token t   -beta * (log pi_old - log pi_ref)_t, and R of the answer at the last token
    advantage           GAE(lambda) with gamma = 1 on a critic with a separate backbone, whitened
    policy loss         -mean_t min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = pi / pi_old
    critic loss         mean_t (V - (A + V_old))^2 / 2

All code besides PPO is una_fast's, so that times compare: the sampler, the batch layout, the
model's forward, and log-probs from `token_logps`, without logits. An epoch is one update on the
whole batch, like a step of UNA; log-probs, reference log-probs and values of the samples come from
one pass before the epochs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from una_fast import Feedback, token_logps
from una_fast.data.batch import Batch, collate
from una_fast.data.examples import Example
from una_fast.model.policy import Policy

Answers = Sequence[Sequence[np.ndarray]]
"""Token ids of the answers to every prompt."""


@dataclass(frozen=True)
class PPOSettings:
    """Settings of a run. lam: of GAE; clip: of the ratio of probabilities."""

    learning_rate: float
    beta: float
    epochs: int
    clip: float = 0.2
    lam: float = 0.95
    max_grad_norm: float = 1.0


def gae(rewards: Tensor, values: Tensor, real: Tensor, lam: float) -> Tensor:
    """Return [S, T] advantages with gamma = 1.

    rewards: [S, T] rewards of the tokens
    values: [S, T] values of the states before the tokens
    real: [S, T], 1 at tokens of the answer, which come first, and 0 behind the answer
    lam: lambda of GAE
    """
    advantages = torch.zeros_like(rewards)
    advantage, following = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + following - values[:, t]
        advantage = real[:, t] * (surprise + lam * advantage)
        following = real[:, t] * values[:, t]
        advantages[:, t] = advantage
    return advantages


def policy_loss(logps: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Compute the clipped objective to be minimised, a mean over tokens.

    logps: [N] log-probs of the policy
    old: [N] log-probs of the policy that sampled
    advantages: [N]
    clip: largest change of the ratio of probabilities
    """
    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def whiten(x: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1."""
    return (x - x.mean()) / (x.std() + 1e-8)


class PPO:
    """Trains policy and critic.

    The critic is a copy of the reference with a value head in place of the head.
    """

    def __init__(
        self, policy: Policy, reference: Policy, critic: Policy, settings: PPOSettings
    ) -> None:
        self.policy, self.reference, self.critic = policy, reference, critic
        self.settings = settings
        reference.model.requires_grad_(False)
        size = critic.causal_lm.config.hidden_size
        self.value_head = nn.Linear(size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        of_critic = [*critic.trainable_parameters(), *self.value_head.parameters()]
        self.trained = (policy.trainable_parameters(), of_critic)
        options = {"lr": settings.learning_rate, "weight_decay": 0.0}
        self.optimizers = [torch.optim.AdamW(own, **options) for own in self.trained]
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time of a phase of the step to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def token_logps(self, model: Policy, batch: Batch) -> Tensor:
        """Return [N] log-probs of the tokens of all answers."""
        head = {"softcap": model.head.softcap, "logit_scale": model.head.logit_scale}

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return token_logps(hidden, weight, batch.targets, bias, **head)

        return model.score(batch, score)

    def values(self, batch: Batch) -> Tensor:
        """Return [N] values of the states before each token of the answers."""

        def score(hidden: Tensor, *_: Tensor | None) -> Tensor:
            return self.value_head(hidden).squeeze(1)

        return self.critic.score(batch, score)

    def step(
        self,
        prompts: Sequence[np.ndarray],
        sample: Callable[[], Answers],
        reward: Callable[[Answers], Sequence[float]],
    ) -> None:
        """Sample answers, reward the answers, and update policy and critic `epochs` times."""
        with self.clock("generate"):
            answers = sample()
        with self.clock("reward"):
            rewards = torch.tensor(reward(answers), dtype=torch.float32)
        with self.clock("before"):
            batch = self.lay_out(prompts, answers)
            with torch.no_grad():
                old, values = self.token_logps(self.policy, batch), self.values(batch)
                reference = self.token_logps(self.reference, batch)
            advantages = self.advantages(batch.cu_seqlens, rewards, old - reference, values)
            returns, advantages = advantages + values, whiten(advantages)
        with self.clock("train"):
            for _ in range(self.settings.epochs):
                logps = self.token_logps(self.policy, batch)
                policy_loss(logps, old, advantages, self.settings.clip).backward()
                (0.5 * (self.values(batch) - returns).square().mean()).backward()
                for optimizer, own in zip(self.optimizers, self.trained, strict=True):
                    torch.nn.utils.clip_grad_norm_(own, self.settings.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    def lay_out(self, prompts: Sequence[np.ndarray], answers: Answers) -> Batch:
        """Return one batch of all prompts and answers."""
        examples = []
        for prompt, own in zip(prompts, answers, strict=True):
            examples.append(Example(prompt, tuple(own), Feedback.merge([]), None, "sampled"))
        return collate(examples, packed=self.policy.packed)

    def advantages(
        self, cu_seqlens: Tensor, rewards: Tensor, log_ratio: Tensor, values: Tensor
    ) -> Tensor:
        """Return [N] advantages.

        cu_seqlens: [S + 1] begins of the answers among the N tokens
        rewards: [S] rewards of the answers
        log_ratio: [N] log pi_old - log pi_ref
        values: [N] values of the states before the tokens
        """
        lengths = cu_seqlens.diff()
        real = torch.arange(int(lengths.max())) < lengths[:, None]

        def grid(flat: Tensor) -> Tensor:
            return torch.zeros(real.shape, dtype=flat.dtype).masked_scatter(real, flat)

        of_tokens = grid(-self.settings.beta * log_ratio)
        of_tokens[torch.arange(len(lengths)), lengths - 1] += rewards
        return gae(of_tokens, grid(values), real.to(values.dtype), self.settings.lam)[real]
