"""Anchor the samples of a step: reference log-probs and offsets, as numbers in ready batches.

log ratio   log pi - log pi_ref, in nats per response; the mean over samples is the KL
anchor      zero of the implicit reward: log pi_ref, or log pi of the sampling policy
            (anchor: rollout)
residual    beta * (log pi - anchor) - score
offset      f(x) + c of the score: leave-one-out mean of residuals (group), running mean of
            earlier steps (ema), or 0
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from una_fast.config import RunConfig
from una_fast.data.batch import Batch, collate
from una_fast.data.examples import Example
from una_fast.data.loader import Step
from una_fast.distributed import World
from una_fast.model.policy import Policy
from una_fast.model.reference import Reference
from una_fast.model.scoring import Scoring
from una_fast.offsets import EmaOffset, group_offset
from una_fast.online.metrics import RolloutMeter
from una_fast.online.rollouts import Sampled
from una_fast.online.sampling import ServerError


@dataclass(frozen=True)
class AnchoredStep(Step):
    """A step with ready batches: reference log-probs and offsets are filled in.

    batches: micro_batches laid out, in order, on the device of the run
    """

    batches: list[Batch]


@dataclass(frozen=True)
class StepMeans:
    """Means over the samples of a step, of all ranks.

    kl: of log pi - log pi_ref, in nats per response
    residual: of beta * (log pi - anchor) - score
    """

    kl: float
    residual: float


@dataclass(frozen=True)
class _Scores:
    """Log-probs of the S responses of a batch, float64.

    reference: [S] by the reference
    policy: [S] by the policy; None where the log-probs of the sampler are used
    """

    reference: np.ndarray
    policy: np.ndarray | None


@dataclass(frozen=True)
class _Anchored:
    """Numbers of the K responses of a sampled example.

    anchors: [K] float64 log-probs at which r is zero
    log_ratios: [K] float64, log pi - log pi_ref
    residuals: [K] float64
    gap: sum over the responses of |log pi by the sampler - log pi by the policy|; 0 where the
        policy does not score
    tokens: of the responses
    """

    anchors: np.ndarray
    log_ratios: np.ndarray
    residuals: Tensor
    gap: float
    tokens: int


class Anchors:
    """Fills reference log-probs and offsets into the batches of online steps."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        policy: Policy,
        reference: Reference,
        scoring: Scoring,
        *,
        pad_id: int,
        compute: torch.dtype,
    ) -> None:
        """Keep the models.

        config: settings of the run
        world: the ranks
        policy: draws the samples
        reference: of the implicit reward
        scoring: how heads are computed
        pad_id: token id of the padding
        compute: dtype of matrix products
        """
        self.config = config
        self.world = world
        self.policy = policy
        self.reference = reference
        self.scoring = scoring
        self.pad_id = pad_id
        server = config.generation_server
        self.tolerance = None if server is None else server.tolerance
        # In bf16 the log-probs of a sampler, step by step from a cache, are not those of the row. A
        # server's are compared with the policy's.
        exact = compute != torch.bfloat16 and server is None
        self.scores_policy = config.anchor == "rollout" or not exact
        self.ema = EmaOffset()

    @torch.no_grad()
    def anchor(
        self, step: Step, meter: RolloutMeter, *, stale: bool = False
    ) -> tuple[AnchoredStep, StepMeans]:
        """Return the step with ready batches, and the means over its samples.

        step: micro-batches of sampled examples and, in a mixed run, of records
        meter: counts the KL
        stale: the policy has taken a step since the samples were drawn: log pi of the policy that
            drew them is the sampler's, and cannot be computed again

        ServerError for fresh samples of a server with log-probs other than the policy's.
        """
        batches = []
        sampled: list[_Anchored] = []
        for examples in step.micro_batches:
            batch = collate(
                examples,
                packed=self.policy.packed,
                device=self.world.device,
                pad_id=self.pad_id,
            )
            batch, anchored = self._anchor_batch(batch, examples, stale)
            batches.append(batch)
            sampled += anchored
        ready = AnchoredStep(step.epoch, step.micro_batches, step.num_units, batches)
        return ready, self._step_means(sampled, meter)

    def _anchor_batch(
        self, batch: Batch, examples: Sequence[Example], stale: bool
    ) -> tuple[Batch, list[_Anchored]]:
        """Return the batch with reference log-probs and offsets, and the sampled examples."""
        scores = self._score_batch(batch, stale)
        ref_logps = scores.reference.copy()
        sampled = []
        offsets = [torch.zeros(0, dtype=torch.float64)]
        start = 0
        for example in examples:
            own = slice(start, start + len(example.responses))
            start = own.stop
            if isinstance(example, Sampled):
                anchored = self._anchor_example(example, scores, own)
                sampled.append(anchored)
                ref_logps[own] = anchored.anchors
                offsets.append(self._offset(anchored.residuals))
            else:  # a record of a mixed run
                offsets.append(example.feedback.offset)
        batch = replace(
            batch,
            feedback=batch.feedback.replaced(offset=torch.cat(offsets)),
            ref_logps=torch.from_numpy(ref_logps).to(self.world.device, non_blocking=True),
        )
        return batch, sampled

    def _score_batch(self, batch: Batch, stale: bool) -> _Scores:
        """Compute the log-probs of a batch, on all ranks together; see `anchor`."""
        reference = self.reference.logps(batch).cpu().numpy()
        policy = None
        if self.scores_policy and not stale:
            policy = self.scoring.logps(self.policy, batch).cpu().numpy()
        return _Scores(reference, policy)

    def _anchor_example(self, example: Sampled, scores: _Scores, own: slice) -> _Anchored:
        """Return the numbers of a sampled example; own: the responses' places in the batch."""
        logps = example.logps if scores.policy is None else scores.policy[own]
        ref_logps = scores.reference[own]
        anchors = logps if self.config.anchor == "rollout" else ref_logps
        delta = logps - anchors
        if self.config.length_normalize:
            delta = delta / [len(ids) for ids in example.responses]
        return _Anchored(
            anchors=anchors,
            log_ratios=logps - ref_logps,
            residuals=self.config.beta * torch.from_numpy(delta) - example.feedback.value,
            gap=float(np.abs(logps - example.logps).sum()),
            tokens=sum(len(ids) for ids in example.responses),
        )

    def _offset(self, residuals: Tensor) -> Tensor:
        """Return the offsets of the samples of one prompt, [K] float64."""
        if self.config.offset == "group":
            one_prompt = torch.zeros(len(residuals), dtype=torch.int64)
            return group_offset(residuals, one_prompt)
        constant = self.ema.offset if self.config.offset == "ema" else 0.0
        return torch.full_like(residuals, constant)

    def _step_means(self, sampled: Iterable[_Anchored], meter: RolloutMeter) -> StepMeans:
        """Return the means over the samples of all ranks, and count the KL."""
        sums = torch.zeros(6, dtype=torch.float64)
        for anchored in sampled:
            log_ratios = anchored.log_ratios
            own = [
                len(log_ratios),
                log_ratios.sum(),
                anchored.residuals.sum(),
                float(len(log_ratios) == 1),
                anchored.gap,
                anchored.tokens,
            ]
            sums += torch.tensor(own, dtype=torch.float64)
        samples, kl, residual, alone, gap, tokens = self.world.sum_of_data(sums).tolist()
        self._check_gap(gap / tokens)
        meter.add_kl(kl, samples, alone)
        return StepMeans(kl=kl / samples, residual=residual / samples)

    def _check_gap(self, gap: float) -> None:
        """Refuse samples of a server whose log-probs are not the policy's, on all ranks.

        gap: mean over all tokens of |log pi by the server - log pi by the policy|, from below
        """
        if self.tolerance is None or gap <= self.tolerance:
            return
        raise ServerError(
            f"the log-probs of the server's samples differ from the policy's by {gap:.3g} nats per "
            f"token, above generation_server.tolerance={self.tolerance:g}; start the server with "
            "--logprobs-mode processed_logprobs, and with the run's model. The step is refused"
        )
