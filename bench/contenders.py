"""The work that bench_head.py times, the float64 truth of the work, and the contenders.

The work: forward and backward of a loss over S responses of N rows in all, policy and reference,
head trained or frozen. Pairs carry the DPO loss, single responses (s - sigmoid(r))^2. Every
contender gets the same tensors and leaves gradients in x.hidden.grad and, with a trained head, in
x.weight.grad.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.machinery
import inspect
import math
import os
import site
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import real_states
from una_fast import Feedback, Objective, linear_una_loss, token_logps
from una_fast.head.ops import sequence_logps

if not torch.cuda.is_available():
    # Before anything imports triton: the suite "forward" then runs in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "BENCH_PEERS" in os.environ:
    # A folder of installed peers, searched after the packages of this machine.
    site.addsitedir(os.environ["BENCH_PEERS"])

BETA = 0.1
# Of the target's logit, and of all other logits: half of the probability lies on the target.
PEAK, SPREAD = 24.0, 4.0
TRL_CHUNK = 32768  # as trl/trainer/utils.py calls it
HEADS = ("trained", "frozen")


class Inputs:
    """S responses of `lengths` rows: (chosen, rejected), (chosen, rejected), … or, with scores,
    singles.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        dim: int,
        vocab: int,
        *,
        scores: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lengths, self.rows = list(lengths), sum(lengths)
        self.dim, self.vocab = dim, vocab
        self.fill(device, dtype)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        count = len(self.lengths)
        self.scores: Tensor | None = None
        if scores:
            self.scores = torch.linspace(0, 1, count, device=device, dtype=torch.float64)
            self.feedback = Feedback.scores(range(count), self.scores.tolist())
        else:
            self.feedback = Feedback.pairs(range(0, count, 2), range(1, count, 2))
        self.head("trained")

    def fill(self, device: str, dtype: torch.dtype) -> None:
        """Draw hidden, ref_hidden [N, D], weight, ref_weight [V, D] and targets [N] at random."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device, dtype=dtype)

        drift = max(self.lengths) ** -0.5  # of the reference: rewards of order 1 at every length
        self.weight = normal(self.vocab, self.dim).mul_(self.dim**-0.5)
        self.targets = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        target_weights = self.weight[self.targets]  # [N, D]
        self.hidden = normal(self.rows, self.dim).mul_(SPREAD).add_(target_weights, alpha=PEAK)
        self.ref_hidden = normal(self.rows, self.dim).mul_(drift).add_(self.hidden)
        noise = normal(self.vocab, self.dim).mul_(drift * self.dim**-0.5)
        self.ref_weight = noise.add_(self.weight)

    def head(self, head: str) -> None:
        """Make the head "trained" or "frozen", and drop all gradients."""
        self.clear()
        self.hidden.requires_grad_()
        self.weight.requires_grad_(head == "trained")

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors that get a gradient, by name."""
        found = {"hidden": self.hidden}
        if self.trained:
            found["weight"] = self.weight
        return found

    def reference(self) -> Inputs:
        """Return the same inputs with the reference in the place of the policy."""
        found = copy.copy(self)
        found.hidden, found.weight = self.ref_hidden, self.ref_weight
        return found

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum [N] numbers per response, in the precision given; returns [S]."""
        return torch.stack([part.sum() for part in per_token.split(self.lengths)])

    def loss_of(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """Compute the loss from sums of log-probs [S]."""
        rewards = BETA * (logps - ref_logps)
        if self.scores is None:
            return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        return (rewards.sigmoid() - self.scores).square().mean()


class RealInputs(Inputs):
    """The pair of real_states.py: states of real text through a trained model, and its head."""

    def fill(self, device: str, dtype: torch.dtype) -> None:
        """Take the tensors from the cache; bfloat16 rounds what the model computed in float32."""
        for name, tensor in real_states.states().items():
            wide = tensor.to(device)
            setattr(self, name, wide.to(dtype) if wide.is_floating_point() else wide)


class Truth(NamedTuple):
    """Results in float64 from full rows of logits; the gradients lie on the CPU, in float32."""

    loss: float
    logps: Tensor  # [N]
    sums: Tensor  # [S]
    coef: Tensor  # [N], dL/dlogp
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    ref_sums: Tensor  # [S]


@torch.no_grad()
def truth(x: Inputs, block_bytes: int | None = None) -> Truth:
    """Compute the truth in blocks of rows.

    x: the inputs
    block_bytes: size of one block of float64 logits (default: 1 GiB on a GPU, 128 MiB on a CPU)
    """
    if block_bytes is None:
        block_bytes = 1 << 30 if x.device.type == "cuda" else 1 << 27
    step = max(block_bytes // (8 * x.vocab), 1)
    targets = x.targets.unsqueeze(1)

    def blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, x.rows, step):
            rows = slice(start, start + step)
            wide = hidden[rows].double()
            yield rows, wide, wide @ weight.T

    def log_probs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.empty(x.rows, dtype=torch.float64, device=x.device)
        lse = torch.empty_like(logps)
        for rows, _, z in blocks(hidden, weight):
            lse[rows] = z.logsumexp(1)
            logps[rows] = z.gather(1, targets[rows]).squeeze(1) - lse[rows]
        return logps, lse

    ref_sums = x.sums(log_probs(x.ref_hidden, x.ref_weight.double())[0])
    weight = x.weight.double()
    logps, lse = log_probs(x.hidden, weight)
    sums = x.sums(logps).requires_grad_()
    with torch.enable_grad():
        loss = x.loss_of(sums, ref_sums)
    (response_coef,) = torch.autograd.grad(loss, sums)
    coef = response_coef.repeat_interleave(torch.tensor(x.lengths, device=x.device))
    grad_hidden, grad_weight = torch.empty(x.rows, x.dim), torch.zeros_like(weight)
    for rows, hidden, z in blocks(x.hidden, weight):
        c = coef[rows].unsqueeze(1)
        du = z.sub_(lse[rows].unsqueeze(1)).exp_().mul_(-c).scatter_add_(1, targets[rows], c)
        grad_hidden[rows] = (du @ weight).float().cpu()
        grad_weight.addmm_(du.T, hidden)
    return Truth(
        loss=loss.item(),
        logps=logps,
        sums=sums.detach(),
        coef=coef,
        hidden=grad_hidden,
        weight=grad_weight.float().cpu(),
        ref_sums=ref_sums,
    )


class Mismatch(NamedTuple):
    """A gradient g beside the true gradient g*.

    error: |g - g*| / |g*|
    factor: a, the best factor in g = a g*
    rest: |g - a g*| / |a g*|

    One pair has one coefficient: an error of the sums of log-probs shows in the factor, any error
    besides in the rest.
    """

    error: float
    factor: float
    rest: float


def mismatch(found: Tensor, expected: Tensor, row_factor: Tensor | None = None) -> Mismatch:
    """Compare a gradient with the true gradient, block by block.

    found: [R, D] on any device
    expected: [R, D] on the CPU
    row_factor: [R], multiplies the rows of `expected`, if given
    """
    step = max((1 << 24) // found.shape[1], 1)
    ff = fe = ee = 0.0
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        f, e = found[rows].double(), expected[rows].to(found.device).double()
        if row_factor is not None:
            e *= row_factor[rows].unsqueeze(1)
        ff += (f * f).sum().item()
        fe += (f * e).sum().item()
        ee += (e * e).sum().item()
    rest = math.sqrt(max(ff * ee / fe**2 - 1, 0.0)) if fe else math.inf
    return Mismatch(math.sqrt(max(ff - 2 * fe + ee, 0.0) / ee), fe / ee, rest)


# --------------------------------------------------------------------------------------- contenders


class Contender:
    """A participant in the bench, under `name`.

    module: the package to be imported
    passes: GEMM passes of 2 N D V flop, with a trained and with a frozen head
    rounds_logits: the logits, or the target's logit alone, are rounded to the dtype of the
        operands, so that sums of log-probs, and with the sums the coefficient of a pair, carry
        noise
    same_work: False for a contender with other work
    """

    name: str
    module: str | None = None  # to be imported
    needs_cuda = False
    passes = {"trained": 4, "frozen": 3}
    minimal = {"trained": 4, "frozen": 3}
    rounds_logits = False
    same_work = True
    pairs_only = False

    def unavailable(self, x: Inputs) -> str | None:
        """Return the reason why the contender cannot do the work here, or None."""
        if self.needs_cuda and x.device.type != "cuda":
            return "needs a GPU"
        if self.pairs_only and (x.scores is not None or len(set(x.lengths)) > 1):
            return "takes pairs of one length only"
        try:
            importlib.import_module(self.module or "torch")
        except Exception as error:  # a peer's import may fail in any way
            return f"cannot import {self.module}: {error}"
        return None

    def loss(self, x: Inputs) -> Tensor:
        """Compute the loss of x, with a graph."""
        raise NotImplementedError

    def logps(self, x: Inputs) -> Tensor | None:
        """Return [N] log-probs of the policy, None from a contender that exposes no log-probs."""
        return None

    def sums(self, x: Inputs) -> Tensor | None:
        """Return [S] sums of log-probs as the contender's users form sums."""
        logps = self.logps(x)
        return None if logps is None else x.sums(logps)


class Una(Contender):
    def __init__(
        self, workspace_mb: int | None = None, engine: str = "auto", name: str = "una_fast"
    ) -> None:
        self.workspace_mb, self.engine = workspace_mb, engine
        self.name = name if workspace_mb is None else f"{name} {workspace_mb} MiB"

    def loss(self, x: Inputs) -> Tensor:
        return linear_una_loss(
            x.hidden,
            x.weight,
            x.targets,
            x.cu_seqlens,
            x.feedback,
            objective=Objective(beta=BETA),
            ref_hidden=x.ref_hidden,
            ref_weight=x.ref_weight,
            workspace_mb=self.workspace_mb,
            engine=self.engine,
        ).loss

    def logps(self, x: Inputs) -> Tensor:
        return token_logps(x.hidden, x.weight, x.targets, engine=self.engine)

    def sums(self, x: Inputs) -> Tensor:
        options = {"workspace_mb": self.workspace_mb, "engine": self.engine}
        return sequence_logps(x.hidden, x.weight, x.targets, x.cu_seqlens, **options)


class PerToken(Contender):
    """A function of (hidden, weight, targets) to log-probs [N]; the loss follows from the sums."""

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def logps(self, x: Inputs) -> Tensor:
        return self.per_token(x.hidden, x.weight, x.targets)

    def loss(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            ref = x.sums(self.per_token(x.ref_hidden, x.ref_weight, x.targets))
        return x.loss_of(self.sums(x), ref)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return [N] log-probs from full rows of logits."""
    logps = F.linear(hidden, weight).float().log_softmax(-1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1)


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


class Eager(PerToken):
    name = "eager"
    rounds_logits = True
    per_token = staticmethod(full_logits)


class Compiled(PerToken):
    name = "torch.compile"
    rounds_logits = True
    needs_cuda = True  # a CPU's compiler would take longer than the smoke test

    @functools.cached_property
    def per_token(self) -> Callable[..., Tensor]:
        return torch.compile(full_logits, dynamic=False)


class Trl(PerToken):
    """TRL's chunked log-probs, in tiles of 32768 vocabulary entries."""

    name = "trl"
    module = "trl.kernels"
    passes = {"trained": 5, "frozen": 4}
    rounds_logits = True

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        arguments = (hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0]


class Cce(PerToken):
    """Cut cross-entropy."""

    name = "cce"
    module = "cut_cross_entropy"
    needs_cuda = True
    passes = {"trained": 5, "frozen": 4}
    rounds_logits = True  # the target's, whose products are rounded one by one

    def per_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none")


class Liger(Contender):
    """Liger's fused linear DPO loss."""

    name = "liger"
    module = "liger_kernel.chunked_loss"
    rounds_logits = True
    pairs_only = True

    def _apply(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Return (loss, [S] sums of log-probs).

        Liger wants [2 B, T, D], all chosen responses before all rejected responses.
        """
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        def stacked(rows: Tensor) -> Tensor:
            pairs = rows.view(-1, 2, x.lengths[0], *rows.shape[1:])
            return pairs.transpose(0, 1).flatten(0, 1)

        head = LigerFusedLinearDPOLoss(beta=BETA, compiled=x.device.type == "cuda")
        hidden, targets, ref_hidden = map(stacked, (x.hidden, x.targets, x.ref_hidden))
        loss, (chosen, rejected, *_) = head(
            x.weight, hidden, targets, ref_input=ref_hidden, ref_weight=x.ref_weight
        )
        return loss, torch.stack((chosen, rejected), 1).flatten()

    def loss(self, x: Inputs) -> Tensor:
        return self._apply(x)[0]

    def sums(self, x: Inputs) -> Tensor:
        return self._apply(x)[1].detach()


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
    passes = minimal = {"trained": 3, "frozen": 2}
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


def lacks(function: Callable[..., Any], positional: int, *named: str) -> str | None:
    """Return what a peer's function no longer takes, or None.

    function: of another version than the version that this bench was written for, perhaps
    positional: number of arguments that are passed by position
    named: arguments that are passed by name
    """
    try:
        call = inspect.signature(function)
        call.bind(*[None] * positional, **dict.fromkeys(named))
    except (TypeError, ValueError) as error:
        name = getattr(function, "__qualname__", repr(function))
        return f"{name} has another signature in this version: {error}"
    return None


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


# ------------------------------------------------------------------------------------------- parity


class WrongResult(Exception):
    """A contender that does not compute the work to be timed."""


def step(contender: Contender, x: Inputs) -> Tensor:
    """Run forward and backward, and return the loss."""
    x.clear()
    loss = contender.loss(x)
    loss.backward()
    return loss.detach()


def sum_noise(x: Inputs) -> float:
    """Return the noise, in nat, of a sum over the longest response with target logits in bfloat16.

    A standard deviation, of independent roundings.
    """
    if x.hidden.dtype == torch.float32:
        return 0.0
    spacing = 2.0 ** (math.floor(math.log2(PEAK)) - 7)
    return spacing / math.sqrt(12) * math.sqrt(max(x.lengths))


def check(contender: Contender, x: Inputs, true: Truth) -> dict[str, float]:
    """Return the errors of one step against the truth; also the contender's warm-up.

    Raises WrongResult for errors beyond rounding.
    """
    exact = x.hidden.dtype == torch.float32
    rounds = contender.rounds_logits and not exact
    limit = 1e-4
    if not exact:
        limit = 0.2 if rounds else 0.02
    if contender.same_work:
        # Six standard deviations of the margin of a pair, which its coefficient follows.
        noise = 6 * BETA * math.sqrt(2) * sum_noise(x) if rounds else 0.0
        expected, row_factor = true.loss, None
        loss_limit = noise + max(limit / 4, 1e-4)
    else:  # cross entropy: dL/dlogp = -1, no coefficient
        expected, row_factor = -true.logps.sum().item(), -1 / true.coef
        noise = 0.0
        loss_limit = 0.01 * abs(expected)
    loss = step(contender, x).item()
    found = {"loss_error": abs(loss - expected)}
    ensure(found["loss_error"] <= loss_limit, f"loss {loss:.4f} is not {expected:.4f}")
    for name, leaf in x.leaves.items():
        ensure(leaf.grad is not None, f"no gradient for {name}")
        if row_factor is not None and name == "weight":
            continue  # the truth of another loss
        g = mismatch(leaf.grad, getattr(true, name), row_factor)
        found[f"{name}_grad_error"] = g.error
        in_step = abs(math.log(g.factor)) <= noise + limit if g.factor > 0 else False
        # The coefficients of several pairs share no factor.
        several = noise / 6 if len(x.lengths) > 2 else 0.0
        wrong = f"gradient of {name} is off by {g.rest:.1e}, factor {g.factor:.3f}"
        ensure(g.rest <= limit + several and in_step, wrong)
    return found


def ensure(right: bool, message: str) -> None:
    """Raise WrongResult with a message, unless all is right."""
    if not right:
        raise WrongResult(message)


@torch.no_grad()
def logp_errors(contender: Contender, x: Inputs, true: Truth) -> dict[str, float]:
    """Return, in nat, the largest and the root-mean-square error of log-probs, and the largest
    errors of a response's sum and of the log-ratio that the loss sees: of a pair, policy against
    reference and chosen against rejected; with scores, of a response.
    """
    found = {}
    logps = contender.logps(x)
    if logps is not None:
        error = logps.double() - true.logps
        found["logp_error"] = error.abs().max().item()
        found["logp_rms"] = error.square().mean().sqrt().item()
        del logps, error
    sums = contender.sums(x)
    if sums is not None:
        found["sum_error"] = (sums.double() - true.sums).abs().max().item()
        found["sum_tokens"] = max(x.lengths)
        ratios = sums.double() - contender.sums(x.reference()).double()
        errors = ratios - (true.sums - true.ref_sums)
        if x.scores is None:
            errors = errors[0::2] - errors[1::2]
        found["ratio_error"] = errors.abs().max().item()
    return found
