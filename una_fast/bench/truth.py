"""The float64 truth of the work, and the errors of a contender."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from una_fast.bench.attempts import WrongResult
from una_fast.bench.contenders import Contender, step
from una_fast.bench.inputs import BETA, PEAK, Inputs


class LogpTruth(NamedTuple):
    """Log-probs in float64 from full rows of logits."""

    logps: Tensor  # [N]
    sums: Tensor  # [S]
    ref_sums: Tensor  # [S]


class Truth(NamedTuple):
    """Results in float64 from full rows of logits; the gradients lie on the CPU, in float32."""

    loss: float
    logps: Tensor  # [N]
    sums: Tensor  # [S]
    coef: Tensor  # [N], dL/dlogp
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    ref_sums: Tensor  # [S]


class _Wide:
    """A head in float64, with logits in blocks of rows."""

    def __init__(self, x: Inputs, block_bytes: int | None) -> None:
        """Take the policy of x.

        x: the inputs, or the inputs with the reference in the place of the policy
        block_bytes: of a block of float64 logits; default: 1 GiB on a GPU, 128 MiB on a CPU
        """
        if block_bytes is None:
            block_bytes = 1 << 30 if x.device.type == "cuda" else 1 << 27
        self.x, self.weight = x, x.weight.double()
        self.bias = 0.0 if x.bias is None else x.bias.double()
        self.targets = x.targets.unsqueeze(1)
        self.block = max(block_bytes // (8 * x.vocab), 1)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, hidden states [C, D], logits [C, V]) of every block."""
        for start in range(0, self.x.rows, self.block):
            rows = slice(start, start + self.block)
            wide = self.x.hidden[rows].double()
            raw = (wide @ self.weight.T).add_(self.bias)
            yield rows, wide, self.x.form.logits_(raw)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Return log-probs of the targets [N] and logsumexps [N]."""
        logps = torch.empty(self.x.rows, dtype=torch.float64, device=self.x.device)
        lse = torch.empty_like(logps)
        for rows, _, z in self.blocks():
            lse[rows] = z.logsumexp(1)
            logps[rows] = z.gather(1, self.targets[rows]).squeeze(1) - lse[rows]
        return logps, lse


@torch.no_grad()
def logp_truth(x: Inputs, block_bytes: int | None = None) -> LogpTruth:
    """Compute the true log-probs. block_bytes: as in `truth`"""
    ref_sums = x.sums(_Wide(x.reference(), block_bytes).log_probs()[0])
    logps, _ = _Wide(x, block_bytes).log_probs()
    return LogpTruth(logps, x.sums(logps), ref_sums)


@torch.no_grad()
def truth(x: Inputs, block_bytes: int | None = None) -> Truth:
    """Compute the truth in blocks of rows.

    x: the inputs
    block_bytes: size of one block of float64 logits (default: 1 GiB on a GPU, 128 MiB on a CPU)
    """
    ref_sums = x.sums(_Wide(x.reference(), block_bytes).log_probs()[0])
    wide = _Wide(x, block_bytes)
    logps, lse = wide.log_probs()
    sums = x.sums(logps).requires_grad_()
    with torch.enable_grad():
        loss = x.loss_of(sums, ref_sums)
    (response_coef,) = torch.autograd.grad(loss, sums)
    coef = response_coef.repeat_interleave(torch.tensor(x.lengths, device=x.device))
    grad_hidden, grad_weight = torch.empty(x.rows, x.dim), torch.zeros_like(wide.weight)
    grad_bias = torch.zeros_like(grad_weight[:, 0])
    for rows, hidden, z in wide.blocks():
        c = coef[rows].unsqueeze(1)
        p = (z - lse[rows].unsqueeze(1)).exp_()
        du = p.mul_(-c).scatter_add_(1, wide.targets[rows], c).mul_(x.form.slope_(z))
        grad_hidden[rows] = (du @ wide.weight).float().cpu()
        grad_weight.addmm_(du.T, hidden)
        grad_bias += du.sum(0)
    return Truth(
        loss=loss.item(),
        logps=logps,
        sums=sums.detach(),
        coef=coef,
        hidden=grad_hidden,
        weight=grad_weight.float().cpu(),
        bias=grad_bias.float().cpu(),
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


def _mismatch_of(found: Tensor, expected: Tensor, row_factor: Tensor | None) -> Mismatch:
    """Compare the gradient of a leaf: a matrix, or a bias [V] as a single row."""
    if found.dim() == 1:
        found, expected = found.unsqueeze(0), expected.unsqueeze(0)
    return mismatch(found, expected, row_factor)


def sum_noise(x: Inputs) -> float:
    """Return the noise, in nat, of a sum over the longest response with target logits in bfloat16.

    A standard deviation, of independent roundings.
    """
    if x.hidden.dtype == torch.float32:
        return 0.0
    spacing = 2.0 ** (math.floor(math.log2(PEAK)) - 7)
    return spacing / math.sqrt(12) * math.sqrt(max(x.lengths))


def check(contender: Contender, x: Inputs, true: Truth) -> dict[str, float]:
    """Return the errors of a step against the truth; also the contender's warm-up.

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
        if row_factor is not None and name != "hidden":
            continue  # the truth of another loss
        g = _mismatch_of(leaf.grad, getattr(true, name), row_factor)
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
def logp_errors(contender: Contender, x: Inputs, true: Truth | LogpTruth) -> dict[str, float]:
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
