"""PPO for the study alone, small and plain: the baseline that online UNA is measured against.

    reward of token t   -beta * (log pi_old - log pi_ref)_t, and R of the answer added at its last token
    advantage           GAE(lambda) with gamma = 1 on a critic with a backbone of its own, whitened over the batch
    policy loss         -mean_t min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = pi / pi_old
    critic loss         mean_t (V - (A + V_old))^2 / 2

The parts that are not PPO are those of una_fast, so that times compare: the sampler, the batch layout, the model's
forward, and log-probs from `token_logps`, which never makes the logits. An epoch is one update on the whole batch, as a
step of UNA is; the log-probs, reference log-probs and values of the samples come from one pass before the epochs.
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
    learning_rate: float
    beta: float
    epochs: int
    clip: float = 0.2
    lam: float = 0.95
    max_grad_norm: float = 1.0


def gae(rewards: Tensor, values: Tensor, real: Tensor, lam: float) -> Tensor:
    """[S, T] advantages with gamma = 1. real: 1 at tokens of the answer, which come first, and 0 behind them."""
    advantages = torch.zeros_like(rewards)
    advantage, following = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + following - values[:, t]
        advantage = real[:, t] * (surprise + lam * advantage)
        following = real[:, t] * values[:, t]
        advantages[:, t] = advantage
    return advantages


def policy_loss(logps: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped objective to be minimised, a mean over tokens; all arguments are [N]."""
    ratio = (logps - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)


class PPO:
    """policy and critic are trained; critic: a copy of the reference whose head is not used but for a value head."""

    def __init__(
        self, policy: Policy, reference: Policy, critic: Policy, settings: PPOSettings
    ) -> None:
        self.policy, self.reference, self.critic, self.settings = (
            policy,
            reference,
            critic,
            settings,
        )
        reference.model.requires_grad_(False)
        size = critic.causal_lm.config.hidden_size
        self.value_head = nn.Linear(size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.trained = (
            policy.trainable_parameters(),
            [*critic.trainable_parameters(), *self.value_head.parameters()],
        )
        self.optimizers = [
            torch.optim.AdamW(part, lr=settings.learning_rate, weight_decay=0.0)
            for part in self.trained
        ]
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def token_logps(self, model: Policy, batch: Batch) -> Tensor:
        """[N] log-probs of the tokens of all answers."""
        head = {"softcap": model.head.softcap, "logit_scale": model.head.logit_scale}
        return model.score(
            batch, lambda h, weight, bias: token_logps(h, weight, batch.targets, bias, **head)
        )

    def values(self, batch: Batch) -> Tensor:
        """[N] values of the states before each token of the answers."""
        return self.critic.score(
            batch, lambda hidden, weight, bias: self.value_head(hidden).squeeze(1)
        )

    def step(
        self,
        prompts: Sequence[np.ndarray],
        sample: Callable[[], Answers],
        reward: Callable[[Answers], Sequence[float]],
    ) -> None:
        """One round: answers to the prompts, their rewards, and `epochs` updates of policy and critic."""
        with self.clock("generate"):
            answers = sample()
        with self.clock("reward"):
            rewards = torch.tensor(reward(answers), dtype=torch.float32)
        with self.clock("before"):
            examples = [
                Example(prompt, tuple(own), Feedback.merge([]), None, "sampled")
                for prompt, own in zip(prompts, answers, strict=True)
            ]
            batch = collate(examples, packed=self.policy.packed)
            with torch.no_grad():
                old, values = self.token_logps(self.policy, batch), self.values(batch)
                reference = self.token_logps(self.reference, batch)
            advantages = self.advantages(batch.cu_seqlens, rewards, old - reference, values)
            returns, advantages = advantages + values, whiten(advantages)
        with self.clock("train"):
            for _ in range(self.settings.epochs):
                policy_loss(
                    self.token_logps(self.policy, batch), old, advantages, self.settings.clip
                ).backward()
                (0.5 * (self.values(batch) - returns).square().mean()).backward()
                for optimizer, part in zip(self.optimizers, self.trained, strict=True):
                    torch.nn.utils.clip_grad_norm_(part, self.settings.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

    def advantages(
        self, cu_seqlens: Tensor, rewards: Tensor, log_ratio: Tensor, values: Tensor
    ) -> Tensor:
        """[N] advantages. rewards: [S]; log_ratio, values: [N]."""
        lengths = cu_seqlens.diff()
        real = torch.arange(int(lengths.max())) < lengths[:, None]

        def grid(flat: Tensor) -> Tensor:
            return torch.zeros(real.shape, dtype=flat.dtype).masked_scatter(real, flat)

        of_tokens = grid(-self.settings.beta * log_ratio)
        of_tokens[torch.arange(len(lengths)), lengths - 1] += rewards
        return gae(of_tokens, grid(values), real.to(values.dtype), self.settings.lam)[real]
