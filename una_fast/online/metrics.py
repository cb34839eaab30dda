"""Metrics of rollouts: sums over the samples of all ranks, and the means that are reported.

Names of metrics follow TRL's online trainers. Lengths are in tokens, the KL in nats per response,
times in seconds of this rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from una_fast.online.rollouts import Rollout

TIMES = ("time/generate", "time/reward")


class RolloutMeter:
    """Sums over the rollouts since the last report, equal on all ranks but for times.

    Key "part/NAME" holds the sum of reward NAME, key "parts/NAME" the count of samples.
    """

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()

    def add_rollouts(self, rollouts: Sequence[Rollout], version: int = 0) -> None:
        """Count samples, lengths, rewards and ages.

        version: of the policy that is trained on the rollouts, in optimizer steps
        """
        for rollout in rollouts:
            rewards = rollout.known_rewards()
            completions = rollout.completions
            self.sums.update(
                {
                    "samples": len(completions),
                    "rewarded": len(rewards),
                    "reward": sum(rewards),
                    "reward_squares": sum(reward**2 for reward in rewards),
                    "tokens": sum(len(completion.ids) for completion in completions),
                    "finished": sum(completion.finished for completion in completions),
                    "age": sum(version - completion.version for completion in completions),
                }
            )
            for name, values in rollout.rewards_by_name.items():
                known = [value for value in values if value is not None]
                self.sums.update({f"part/{name}": sum(known), f"parts/{name}": len(known)})

    def add_kl(self, kl: float, samples: float, alone: float) -> None:
        """Add the KL of a step.

        kl: sum of log pi - log pi_ref over the samples of all ranks
        samples: samples of the sum
        alone: samples without another rewarded sample of the same prompt
        """
        self.sums.update({"kl": kl, "scored": samples, "lone": alone})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a sum of TIMES."""
        start = time.perf_counter()
        yield
        self.sums[name] += time.perf_counter() - start

    def state_dict(self) -> dict[str, float]:
        """Return the sums for a checkpoint."""
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the sums of a checkpoint."""
        self.sums = Counter(state)

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call; no metric without samples."""
        sums = self.sums
        self.sums = Counter()
        if not sums["samples"]:
            return {}
        metrics = {}
        if sums["rewarded"]:
            mean = sums["reward"] / sums["rewarded"]
            variance = max(sums["reward_squares"] / sums["rewarded"] - mean**2, 0.0)
            metrics["reward"] = mean
            metrics["reward_std"] = variance**0.5
            metrics["kl"] = sums["kl"] / sums["scored"]
        metrics |= {
            "completions/count": sums["samples"],
            "completions/skipped": sums["samples"] - sums["rewarded"],
            "completions/alone": sums["lone"],
            "completions/mean_length": sums["tokens"] / sums["samples"],
            "completions/clipped_ratio": 1 - sums["finished"] / sums["samples"],
            "completions/staleness": sums["age"] / sums["samples"],
        }
        for key, count in list(sums.items()):
            if key.startswith("parts/") and count:
                name = key.removeprefix("parts/")
                metrics[f"rewards/{name}/mean"] = sums[f"part/{name}"] / count
        return metrics | {name: sums[name] for name in TIMES}
