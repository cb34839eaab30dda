"""Metrics of a run: sums over micro-batches and ranks, times, peaks."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor

from una_fast.data.batch import Batch
from una_fast.distributed import World
from una_fast.feedback import PAIR, SCORE
from una_fast.losses import Objective, UnaOutput

BINS = 10

_SUMS = (
    *(
        "loss",
        "units",
        "pairs",
        "chosen",
        "rejected",
        "correct",
        "decided",
        "logps_chosen",
        "logps_rejected",
    ),
    *(
        "points",
        "target",
        "implicit",
        "calibrated",
        "log_ratio",
        "responses",
        "tokens",
        "response_tokens",
    ),
    "computed",
)

# Dense bf16 tensor-core peak, TFLOP/s, by a part of the device name.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "MI300X": 1307.0,
    "L40S": 362.0,
}


class Meter:
    """Sums over units and responses since the last report, on the device; one read per report.

    Metric `kl` is the mean of log pi - log pi_ref over the responses of the data, chosen and rejected: an estimate of
    the KL only where the policy itself drew them, negative where it finds them less likely than the reference does.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.sums = torch.zeros(len(_SUMS) + 2 * BINS, dtype=torch.float64, device=device)

    def add(self, batch: Batch, out: UnaOutput) -> None:
        feedback, device = batch.feedback, self.sums.device

        def of(units: Tensor, *columns: Tensor) -> list[Tensor]:
            return [column[units].to(device, non_blocking=True) for column in columns]

        pairs = feedback.kind == PAIR
        first, second, target = of(pairs, feedback.first, feedback.second, feedback.value)
        decided = target > 0.5  # a tie has no right order
        points, predicted, wanted, bins = self._points(feedback, out, of)
        (weight,) = of(torch.ones_like(pairs), feedback.weight)
        values = {
            "loss": (out.unit_losses * weight).sum(),
            "units": feedback.num_units,
            "pairs": first.numel(),
            "chosen": out.rewards[first].sum(),
            "rejected": out.rewards[second].sum(),
            "correct": ((out.rewards[first] > out.rewards[second]) & decided).sum(),
            "decided": decided.sum(),
            "logps_chosen": out.logps[first].sum(),
            "logps_rejected": out.logps[second].sum(),
            "points": points,
            "target": wanted.sum(),
            "implicit": predicted.sum(),
            "calibrated": bins[0].sum(),
            "log_ratio": (out.logps - out.ref_logps).sum(),
            "responses": out.logps.numel(),
            "tokens": batch.num_tokens,
            "response_tokens": batch.targets.numel(),
            "computed": batch.input_ids.numel(),
        }
        self.sums += torch.cat(
            [
                torch.stack(
                    [torch.as_tensor(values[n], dtype=torch.float64, device=device) for n in _SUMS]
                ),
                bins.flatten(),
            ]
        )

    def _points(self, feedback: Any, out: UnaOutput, of: Any) -> tuple[int, Tensor, Tensor, Tensor]:
        """Labels and scores: how many, what the policy implies (on the scale that is compared), what was wanted, and
        (count, gap) per bin of sigmoid(r)."""
        points = feedback.kind != PAIR
        first, offset, wanted = of(points, feedback.first, feedback.offset, feedback.value)
        raw = out.rewards[first] + offset + self.objective.offset
        (on_rewards,) = of(
            points, (feedback.kind == SCORE) & (not self.objective.scores_in_unit_interval)
        )
        probability = torch.sigmoid(raw)
        # A policy that diverged has no bin, and must not stop the run before its gradient norm does, by name.
        index = (probability.nan_to_num(0.0) * BINS).long().clamp_max(BINS - 1)
        counted = (~on_rewards).double()
        bins = raw.new_zeros(2, BINS)
        bins[0].index_add_(0, index, counted)
        bins[1].index_add_(0, index, counted * (probability - wanted))
        return first.numel(), torch.where(on_rewards, raw, probability), wanted, bins

    def pool(self, world: World) -> list[float]:
        """The sums over all ranks, for a checkpoint; the first rank goes on with them, the others from zero."""
        pooled = world.sum(self.sums)
        self.sums = pooled if world.is_main else torch.zeros_like(pooled)
        return pooled.tolist()

    def take(self, world: World) -> dict[str, float]:
        """Metrics over all ranks since the last call; what had no data is left out."""
        values = world.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        s = dict(zip(_SUMS, values, strict=False))
        gaps = values[len(_SUMS) + BINS :]
        metrics = {"loss": s["loss"] / max(s["units"], 1.0)}
        if s["pairs"]:
            chosen, rejected = s["chosen"] / s["pairs"], s["rejected"] / s["pairs"]
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
            }
            metrics |= {f"logps/{n}": s[f"logps_{n}"] / s["pairs"] for n in ("chosen", "rejected")}
        if s["decided"]:
            metrics["rewards/accuracies"] = s["correct"] / s["decided"]
        if s["points"]:
            metrics |= {
                "una/target_mean": s["target"] / s["points"],
                "una/implicit_mean": s["implicit"] / s["points"],
            }
        if s["calibrated"]:
            metrics["una/calibration_error"] = sum(map(abs, gaps)) / s["calibrated"]
        if s["responses"]:
            metrics["kl"] = s["log_ratio"] / s["responses"]
        metrics |= {n: s[n] for n in ("units", "tokens", "response_tokens")}
        metrics["padding"] = 1.0 - s["tokens"] / max(s["computed"], 1.0)
        return metrics


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


class Clock:
    """Wall time spent training, with pauses for evaluation and checkpoints left out."""

    def __init__(self) -> None:
        self.spent, self.since = 0.0, time.perf_counter()

    def pause(self) -> None:
        self.spent += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def take(self) -> float:
        """Seconds since the last call."""
        self.pause()
        self.go_on()
        spent, self.spent = self.spent, 0.0
        return spent
