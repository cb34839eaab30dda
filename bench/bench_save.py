"""The time of saving: a checkpoint as it was written before, now, and in the background; and of
verifying one.

    python bench/bench_save.py --rounds 7 --out bench/results/save_cpu.json

The model has the shapes of SmolLM2-135M, with float32 weights and AdamW: 1.6 GB a checkpoint. A
round writes a checkpoint in every way, in an order that turns from round to round. In the
background, the seconds are those in which the step waits: for the call, for the copies before the
optimizer steps, and for the name of the checkpoint; the gradients of a step of 512 tokens are
computed meanwhile. `before` is what commit 5e7b693 did: save_pretrained and
torch.distributed.checkpoint, no hash, and no fsync of the weights. Needs 6 GB of memory and 7 GB in
--folder; run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from harness import ROOT, environment, write_report
from una_fast.config import RunConfig
from una_fast.distributed import World, start_world
from una_fast.model.policy import Policy, load_policy
from una_fast.optim import make_optimizer
from una_fast.train.manifest import Manifest
from una_fast.train.saver import Saver

WAYS = ("before", "now", "in the background")
TOKENS = 512  # of the step beside a background save
MOST_TIME = 1.15  # of `now` over `before`
MOST_STALL = 0.10  # of the background over `now`
MOST_SECONDS_PER_GB = 1.0  # of the verification


class Run:
    """A policy and an optimizer with moments, as after a step of training."""

    def __init__(self, folder: Path, *, small: bool) -> None:
        """Make the model in a folder, and load it as a run does."""
        self.folder = folder
        self.tokenizer = save_model(folder / "model", small=small)
        self.world: World = start_world("cpu")
        self.policy: Policy = load_policy(folder / "model", dtype=torch.float32)
        config = RunConfig(model=str(folder / "model"), data="x.jsonl", output_dir=str(folder))
        self.optimizer: Optimizer = make_optimizer(self.policy, config)
        for parameter in self.policy.trainable_parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number = 0
        self.foreground = self._saver(in_background=False)
        self.background = self._saver(in_background=True)

    def _saver(self, *, in_background: bool) -> Saver:
        name = "background" if in_background else "now"
        (self.folder / name).mkdir()
        return Saver(self.folder / name, self.world, 1, in_background=in_background)

    def state(self) -> dict[str, Any]:
        self.number += 1
        state = {"step": self.number, "run": {"data": "none"}, "scheduler": {}, "meter": []}
        return state | {"lines": {"metrics.jsonl": 0}}

    # ---- ways to save; each returns (seconds of the step, seconds until the checkpoint is there)

    def before(self) -> tuple[float, float]:
        start = time.perf_counter()
        save_as_before(self.folder / "before", self.policy, self.optimizer, self.tokenizer)
        seconds = time.perf_counter() - start
        return seconds, seconds

    def now(self) -> tuple[float, float]:
        return self._timed(self.foreground)

    def in_the_background(self) -> tuple[float, float]:
        """Save beside the gradients of the next step; count the seconds in which the step waits."""
        start = time.perf_counter()
        self.background.save(self.policy, self.optimizer, self.tokenizer, self.state())
        waited = time.perf_counter() - start
        self.gradients()
        waited += timed(self.background.hold)
        while not self.background.is_done:  # later steps
            time.sleep(0.01)
        waited += timed(self.background.finish)
        return waited, time.perf_counter() - start

    def gradients(self) -> None:
        """Compute the gradients of a step of a few hundred tokens: what the copies hide behind."""
        ids = torch.randint(0, 49152, (1, TOKENS)) % self.policy.causal_lm.config.vocab_size
        logits = self.policy.causal_lm(input_ids=ids).logits
        logits.logsumexp(-1).mean().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _timed(self, saver: Saver) -> tuple[float, float]:
        state = self.state()
        seconds = timed(lambda: saver.save(self.policy, self.optimizer, self.tokenizer, state))
        return seconds, seconds


def timed(action: Callable[[], object]) -> float:
    """Return the seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def save_model(folder: Path, *, small: bool) -> PreTrainedTokenizerBase:
    """Save a random model of SmolLM2-135M's shapes, or of a few MB; return a tokenizer."""
    sys.path.append(str(ROOT / "tests"))
    from tiny import make_tokenizer

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64 if small else 576,
        intermediate_size=128 if small else 1536,
        num_hidden_layers=2 if small else 30,
        num_attention_heads=9 if not small else 4,
        num_key_value_heads=3 if not small else 2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_as_before(
    folder: Path, policy: Policy, optimizer: Optimizer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a checkpoint as commit 5e7b693 did."""
    shutil.rmtree(folder, ignore_errors=True)  # where it deleted the oldest one
    folder.mkdir()
    policy.causal_lm.save_pretrained(folder, state_dict=dict(policy.model.state_dict()))
    tokenizer.save_pretrained(folder)
    training: dict[str, Any] = {"optimizer": get_optimizer_state_dict(policy.model, optimizer)}
    random: Tensor = torch.get_rng_state()
    dcp.save({**training, "cpu_rng_0": random}, checkpoint_id=folder / "training", no_dist=True)
    (folder / "state.json").write_text(json.dumps({"step": 1}), encoding="utf-8")
    (folder / "COMPLETE").touch()


def measure(run: Run, rounds: int) -> dict[str, Any]:
    """Save in every way, `rounds` times and once before; return the figures."""
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "before": run.before,
        "now": run.now,
        "in the background": run.in_the_background,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        turned = WAYS[number % 3 :] + WAYS[: number % 3]
        for name in turned:
            os.sync()  # no way pays for the pages of another
            found = ways[name]()
            if number:
                seconds[name].append(found)
    typical = {name: statistics.median(x for x, _ in found) for name, found in seconds.items()}
    checkpoint = run.folder / "now" / f"checkpoint-{newest(run.folder / 'now')}"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    checks = []
    for _ in range(rounds):
        start = time.perf_counter()
        Manifest.read(checkpoint).verify(checkpoint)
        checks.append(time.perf_counter() - start)
    return {
        "checkpoint_gb": size / 1e9,
        "seconds": {name: [round(x, 3) for x, _ in found] for name, found in seconds.items()},
        "until_there": {name: [round(x, 3) for _, x in found] for name, found in seconds.items()},
        "median_seconds": typical,
        "now_over_before": typical["now"] / typical["before"],
        "stall_over_now": typical["in the background"] / typical["now"],
        "verify_seconds_per_gb": statistics.median(checks) / (size / 1e9),
    }


def newest(folder: Path) -> int:
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def main() -> int:
    """Measure, store the result, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Run(Path(folder), small=options.small), options.rounds)
    bars = {
        "now_over_before": MOST_TIME,
        "stall_over_now": MOST_STALL,
        "verify_seconds_per_gb": MOST_SECONDS_PER_GB,
    }
    holds = {name: figures[name] <= bar for name, bar in bars.items()}
    report = {"environment": environment(torch.device("cpu")), **figures, "bars": bars}
    write_report({**report, "holds": holds}, options.out)
    for name, bar in bars.items():
        print(f"{name}: {figures[name]:.3f} of {bar}: {'holds' if holds[name] else 'misses'}")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
