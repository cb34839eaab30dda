"""Metrics of a run: sums over micro-batches and ranks, times, peaks."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from una_fast.data.batch import Batch
from una_fast.distributed import World
from una_fast.feedback import PAIR, SCORE, Feedback
from una_fast.losses import Objective, UnaOutput

# Sums of a meter, in the order of its tensor and of checkpoints.
NAMES = (
    "loss",
    "units",
    "pairs",
    "chosen",
    "rejected",
    "correct",
    "decided",
    "logps_chosen",
    "logps_rejected",
    "points",
    "target",
    "implicit",
    "calibrated",
    "log_ratio",
    "responses",
    "tokens",
    "response_tokens",
    "computed",
)
BINS = 10  # of sigmoid(r), for the calibration error

# Dense bf16 tensor-core peak, TFLOP/s, by a substring of the device name.
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

    Layout of `sums`, float64: NAMES | labels and scores per bin of sigmoid(r) [BINS] | sum of
    sigmoid(r) - label per bin [BINS].

    Metric `log_ratio` is the mean of log pi - log pi_ref over the scored responses, chosen and
    rejected, in nats; negative if the policy finds the responses less likely than the reference
    does. Only fresh samples of the policy estimate a KL: metric `kl` of online/metrics.py.

    Metric `rewards/accuracies` is over the pairs of unequal implicit rewards: a policy equal to the
    reference orders no pair, rightly or wrongly.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.sums = torch.zeros(len(NAMES) + 2 * BINS, dtype=torch.float64, device=device)

    def add(self, batch: Batch, out: UnaOutput) -> None:
        """Add one micro-batch.

        batch: laid-out examples
        out: their loss, log-probs and implicit rewards
        """
        feedback = batch.feedback
        is_pair = feedback.kind == PAIR
        chosen = self._selected(feedback.first, is_pair)
        rejected = self._selected(feedback.second, is_pair)
        margins = out.rewards[chosen] - out.rewards[rejected]
        # A tie of the ratings has no right order, and a tie of the rewards is no order.
        decided = (self._selected(feedback.value, is_pair) > 0.5) & (margins != 0)
        points = self._points(feedback, out)
        weight = feedback.weight.to(self.sums.device, non_blocking=True)
        on_host = {
            "units": feedback.num_units,
            "pairs": chosen.numel(),
            "points": points.wanted.numel(),
            "responses": out.logps.numel(),
            "tokens": batch.num_tokens,
            "response_tokens": batch.targets.numel(),
            "computed": batch.input_ids.numel(),
        }
        on_device = {
            "loss": (out.unit_losses * weight).sum(),
            "chosen": out.rewards[chosen].sum(),
            "rejected": out.rewards[rejected].sum(),
            "correct": ((margins > 0) & decided).sum(),
            "decided": decided.sum(),
            "logps_chosen": out.logps[chosen].sum(),
            "logps_rejected": out.logps[rejected].sum(),
            "target": points.wanted.sum(),
            "implicit": points.implied.sum(),
            "calibrated": points.counts.sum(),
            "log_ratio": (out.logps - out.ref_logps).sum(),
        }
        values = on_device | self._counts(on_host)
        named = [values[name].double() for name in NAMES]
        self.sums += torch.cat([torch.stack(named), points.counts, points.gaps])

    def _counts(self, numbers: dict[str, int]) -> dict[str, Tensor]:
        """Copy numbers of the host to the device, as float64 scalars by name.

        All in one copy that the host does not wait for: `torch.as_tensor(number, device="cuda")`
        waits for the device, once for every number.
        """
        counts = torch.tensor(list(numbers.values()), dtype=torch.float64)
        if self.sums.is_cuda:
            counts = counts.pin_memory()
        counts = counts.to(self.sums.device, non_blocking=True)
        return dict(zip(numbers, counts, strict=True))

    def _selected(self, column: Tensor, units: Tensor) -> Tensor:
        """Return a column of the feedback at some units, on the device. units: [U] bool."""
        return column[units].to(self.sums.device, non_blocking=True)

    def _points(self, feedback: Feedback, out: UnaOutput) -> _Points:
        """Compare labels and scores with the policy's implicit rewards."""
        is_point = feedback.kind != PAIR
        response = self._selected(feedback.first, is_point)
        offset = self._selected(feedback.offset, is_point)
        wanted = self._selected(feedback.value, is_point)
        raw = out.rewards[response] + offset + self.objective.offset
        # Form reward_mse compares scores with r itself, every other form with sigmoid(r).
        is_raw = (feedback.kind == SCORE) & (not self.objective.scores_in_unit_interval)
        is_raw = self._selected(is_raw, is_point)
        probability = torch.sigmoid(raw)
        # A policy that diverged has no bin, and must not stop the run before the check of the
        # gradient norm names the records.
        index = (probability.nan_to_num(0.0) * BINS).long().clamp_max(BINS - 1)
        counted = (~is_raw).double()
        counts = raw.new_zeros(BINS).index_add_(0, index, counted)
        gaps = raw.new_zeros(BINS).index_add_(0, index, counted * (probability - wanted))
        return _Points(wanted, torch.where(is_raw, raw, probability), counts, gaps)

    def pool(self, world: World) -> list[float]:
        """Return the sums over all ranks, for a checkpoint.

        The first rank goes on with the pooled sums, the others from zero.
        """
        pooled = world.sum_of_data(self.sums)
        self.sums = pooled if world.is_main else torch.zeros_like(pooled)
        return pooled.tolist()

    def load_state_dict(self, state: Sequence[float], world: World) -> None:
        """Go on from the pooled sums of a checkpoint; the first rank holds all of them."""
        if world.is_main:
            self.sums += torch.tensor(state, dtype=torch.float64, device=self.sums.device)

    def take(self, world: World) -> dict[str, float]:
        """Return the metrics over all ranks since the last call; no metric without its data."""
        pooled = world.sum_of_data(self.sums).cpu()
        named, _, gaps = pooled.split([len(NAMES), BINS, BINS])
        self.sums = torch.zeros_like(self.sums)
        sums = dict(zip(NAMES, named.tolist(), strict=True))
        metrics = {}
        if sums["units"]:
            metrics["loss"] = sums["loss"] / sums["units"]
        if sums["pairs"]:
            chosen = sums["chosen"] / sums["pairs"]
            rejected = sums["rejected"] / sums["pairs"]
            metrics |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "logps/chosen": sums["logps_chosen"] / sums["pairs"],
                "logps/rejected": sums["logps_rejected"] / sums["pairs"],
            }
        if sums["decided"]:
            metrics["rewards/accuracies"] = sums["correct"] / sums["decided"]
        if sums["points"]:
            metrics["una/target_mean"] = sums["target"] / sums["points"]
            metrics["una/implicit_mean"] = sums["implicit"] / sums["points"]
        if sums["calibrated"]:
            metrics["una/calibration_error"] = sum(map(abs, gaps.tolist())) / sums["calibrated"]
        if sums["responses"]:
            metrics["log_ratio"] = sums["log_ratio"] / sums["responses"]
        for name in ("units", "tokens", "response_tokens"):
            metrics[name] = sums[name]
        metrics["padding"] = 1.0 - sums["tokens"] / max(sums["computed"], 1.0)
        return metrics


@dataclass(frozen=True)
class _Points:
    """Labels and scores of a micro-batch, P units, on the device.

    wanted: [P] label or score
    implied: [P] the policy's value on the same scale, sigmoid(r) or r
    counts: [BINS] units on the scale of sigmoid(r), by bin
    gaps: [BINS] sum of sigmoid(r) - label, by bin
    """

    wanted: Tensor
    implied: Tensor
    counts: Tensor
    gaps: Tensor


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


class Clock:
    """Wall time spent training, with pauses for evaluation and checkpoints left out.

    spent: seconds since the last report, up to the last pause
    """

    def __init__(self, spent: float = 0.0) -> None:
        self.spent = spent
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        self.spent += time.perf_counter() - self._since

    def go_on(self) -> None:
        """Count again after a pause."""
        self._since = time.perf_counter()

    def take(self) -> float:
        """Return the seconds since the last call."""
        self.pause()
        self.go_on()
        spent = self.spent
        self.spent = 0.0
        return spent
