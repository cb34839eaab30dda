"""All contenders of bench_head.py: those of `una-fast bench`, and more peers.

una_fast/bench/inputs.py describes the work, una_fast/bench/contenders.py the first contenders.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import site
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

import real_states
from una_fast.bench.contenders import (
    Cce,
    Compiled,
    Contender,
    Eager,
    Liger,
    PerToken,
    Trl,
    Una,
    lacks,
)
from una_fast.bench.inputs import Inputs

if not torch.cuda.is_available():
    # Before anything imports triton: the suite "forward" then runs in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "BENCH_PEERS" in os.environ:
    # A folder of installed peers, searched after the packages of this machine.
    site.addsitedir(os.environ["BENCH_PEERS"])


class RealInputs(Inputs):
    """The pair of real_states.py: states of real text through a trained model, and its head."""

    def fill(self, device: str, dtype: torch.dtype) -> None:
        """Take the tensors from the cache."""
        self.take(real_states.states(), device, dtype)


# --------------------------------------------------------------------------------------- contenders


class PerResponse(Contender):
    """A cross entropy summed over its rows, called once for every response.

    Not per token: the gradients are built in the forward, and the scalar of a response scales them.
    """

    def nll(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return -log p of one response, a scalar. hidden: [n, D]; targets: [n]."""
        raise NotImplementedError

    def sums(self, x: Inputs) -> Tensor:
        rows = zip(x.hidden.split(x.lengths), x.targets.split(x.lengths), strict=True)
        return -torch.stack([self.nll(hidden, x.weight, targets) for hidden, targets in rows])

    def loss(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            ref = self.sums(x.reference())
        return x.loss_of(self.sums(x), ref)


class LigerScaled(PerToken):
    """Liger's per-token cross entropy with any upstream gradient, by kernels for Hopper."""

    name = "liger scaled"
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    needs_cuda = True
    passes = {"trained": 5, "frozen": 4}
    rounds_logits = True  # held to the wider limits until a GPU has shown its errors

    def unavailable(self, x: Inputs) -> str | None:
        reason = super().unavailable(x)
        if reason is None and torch.cuda.get_device_capability(x.device) != (9, 0):
            return "its kernels are for Hopper (9.0); elsewhere it is a chunked fallback"
        return reason or lacks(self._apply, 5)

    @property
    def _apply(self) -> Callable[..., Tensor]:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as ops

        return ops.LigerFusedLinearScaledCrossEntropyFunction.apply

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -self._apply(hidden, weight, targets, 1.0, -100)


class Unsloth(PerToken):
    """The log-probs of Unsloth's fused preference loss (UNSLOTH_FUSED_PREFERENCE_LOSS)."""

    name = "unsloth"
    module = "unsloth_zoo.fused_losses.preference_loss"
    needs_cuda = True
    passes = {"trained": 5, "frozen": 4}

    def unavailable(self, x: Inputs) -> str | None:
        with suppress(ImportError):  # then the import below says why
            without_start_code("unsloth_zoo", "unsloth_zoo.fused_losses")
        return super().unavailable(x) or lacks(self._function, 5)

    @property
    def _function(self) -> Callable[..., dict[str, Tensor]]:
        return importlib.import_module(self.module).fused_linear_token_logps

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        every_row = torch.ones_like(targets, dtype=torch.bool)
        return self._function(hidden, weight, None, targets, every_row)["per_token_logps"]


class Torch(PerResponse):
    """torch's own linear cross entropy. Its sum is a scalar of the operands' dtype."""

    name = "torch ce"
    rounds_logits = True

    def unavailable(self, x: Inputs) -> str | None:
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        return lacks(F.linear_cross_entropy, 3, "reduction")

    def nll(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")


class QuackSums(PerResponse):
    """QuACK's cross entropy per response: one pass each, a [V, D] gradient for every response."""

    name = "quack"
    module = "quack.linear_cross_entropy"
    needs_cuda = True
    rounds_logits = True

    def unavailable(self, x: Inputs) -> str | None:
        if any(length % 8 for length in x.lengths):
            return "takes responses of a multiple of 8 tokens"
        return super().unavailable(x) or lacks(self._function, 3, "reduction")

    @property
    def _function(self) -> Callable[..., Tensor]:
        return importlib.import_module(self.module).chunked_linear_cross_entropy

    def nll(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return self._function(hidden, weight, targets, reduction="sum")


class Quack(Contender):
    """Cross entropy alone, one number for all rows: no reference, no preference. A yardstick for
    QuACK's GEMM rate.
    """

    name = "quack ce"
    module = "quack.linear_cross_entropy"
    needs_cuda = True
    passes = {"trained": 3, "frozen": 2}
    rounds_logits = True
    same_work = False

    def loss(self, x: Inputs) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="sum")


def everybody(workspaces: Sequence[int | None], engine: str = "auto") -> list[Contender]:
    """Return una_fast once per workspace in MiB (None: the default), then the peers."""
    ours = [Una(workspace_mb, engine) for workspace_mb in workspaces]
    per_token = [Trl(), LigerScaled(), Unsloth(), Cce(), Eager(), Compiled()]
    return [*ours, *per_token, Liger(), QuackSums(), Torch(), Quack()]


def without_start_code(*packages: str) -> None:
    """Make packages importable as bare folders: their modules load, their `__init__` does not run.

    packages: a package and the package within it; unsloth_zoo's own start refuses to run without
        unsloth, and patches torch and transformers for every contender in this process

    ImportError for a package that is not installed.
    """
    folders: list[str] | None = None
    for package in packages:
        if package in sys.modules:
            folders = list(sys.modules[package].__path__)
            continue
        spec = importlib.machinery.PathFinder.find_spec(package, folders)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no package {package}")
        folders = list(spec.submodule_search_locations)
        bare = types.ModuleType(package)
        bare.__path__, bare.__spec__ = folders, spec
        sys.modules[package] = bare
