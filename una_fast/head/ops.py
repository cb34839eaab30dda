"""The fused head: from hidden states and the lm_head weight to log-probs and the UNA loss, without [N, V] logits.

    logp_t = z_t[y_t] - logsumexp(z_t)          z_t = transform(W h_t + bias), see engine.LogitTransform
    Delta_i = sum over t in response i of (logp_t - ref_logp_t)
    L = losses.una_loss(Delta, feedback)
    dL/dlogp_t = c_i                            one scalar per response, known once its component is summed

Because c_i does not depend on t, the gradient is built in the forward, chunk by chunk, either with c_i (known when
the whole component is in the chunk) or without it, to be scaled at the end (plan.py decides):

    for each chunk of C rows:   u = H W^T -> logp;  du = a (onehot - softmax) dz/du;  dH = du W;  dW += du^T H

One GEMM pass = 2 N D V flop. Policy: 3 passes with a trained head, 2 with a frozen one; reference: 1, or 0 when
its log-probs are cached. Per-token losses with arbitrary upstream gradients (token_logps) recompute: 4 and 3.
Stored between forward and backward: dH [N, D] in the dtype of hidden (float32 for float16), dW [V, D] in the
accumulator dtype.
Never stored: logits of more rows than the workspace holds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from una_fast.feedback import Feedback
from una_fast.head.engines import choose_engine
from una_fast.head.passes import Grads, Head, OnePass, Workspace, empty_hidden_grad, recompute
from una_fast.head.plan import chunks
from una_fast.head.segment_loss import Lengths
from una_fast.head.torch_engine import IGNORE, LogitTransform, accumulator_dtype
from una_fast.losses import Objective, UnaOutput, check_units, denominator

Result = TypeVar("Result")


def _outside_compile(function: Callable[..., Result]) -> Callable[..., Result]:
    """A compiled model calls `function` as it is: its loop over chunks is no graph. torch.compiler.disable, without its
    import of the compiler (seconds) for those who do not compile."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if call.eager is None:
            call.eager = torch.compiler.disable(function)
        return call.eager(*args, **kwargs)

    call.eager = None
    return call


@_outside_compile
def linear_una_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    feedback: Feedback,
    *,
    objective: Objective | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_units: int | Tensor | None = None,
    workspace_mb: float | None = None,
    engine: str = "auto",
) -> UnaOutput:
    """UNA loss of N response tokens in S responses, from hidden states.

    hidden: [N, D], the states that predict the targets (gathered: no prompt, no padding). weight: [V, D], same dtype.
    targets: [N] int64. cu_seqlens: [S+1] integers from 0 to N, on the CPU (on a GPU reading it costs a sync).
    feedback: units over the S responses; responses in no unit get log-probs but no gradient.

    Reference, one of: ref_logps [S], cached sums over tokens; or ref_hidden [N, D'] with ref_weight [V, D'] and
    ref_bias [V] (default: the policy's weight and bias, detached; with a ref_weight of its own, no bias unless
    ref_bias gives one). No gradient reaches the reference.

    Logits are z = softcap * tanh(logit_scale * (W h + bias) / softcap) / temperature, policy and reference alike.
    reduction: "mean" = weighted sum of unit losses / num_units (default: the units of this call), or "sum".
    workspace_mb: budget for everything that is neither input nor gradient (default 2048 on a GPU, 256 on a CPU).
    engine: "auto" | "torch" | "triton".

    Returns UnaOutput: float64 loss (scalar), logps, ref_logps, rewards [S] and unit_losses [U]; only loss carries a
    gradient: to hidden, weight and bias where they require one. Raises ValueError for inconsistent shapes, an empty
    response, feedback on missing responses and targets outside the vocabulary (on a GPU those give NaN instead).
    """
    objective = objective or Objective()
    leaves = hidden, weight, bias
    hidden, weight, bias = _autocast(*leaves)
    transform = LogitTransform(softcap, logit_scale, temperature)
    _check_head("", hidden, weight, targets, bias)
    targets = _int64_targets(targets, weight.shape[0])
    cu = _check_cu_seqlens(cu_seqlens, hidden.shape[0])
    check_units(feedback, objective, len(cu) - 1)  # before any GEMM
    denominator(reduction, num_units, feedback.num_units)
    workspace = Workspace.of(hidden.device, workspace_mb)
    lengths = Lengths(cu, hidden.device)
    head = Head(weight, bias, transform, workspace, engine)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    sums = head.engine.loss.sums

    logps = None  # of the policy, where no gradient is wanted
    if ref_logps is not None:
        for name, value in (
            ("ref_hidden", ref_hidden),
            ("ref_weight", ref_weight),
            ("ref_bias", ref_bias),
        ):
            if value is not None:
                raise ValueError(
                    f"give ref_logps or ref_hidden, not both: {name} is not read beside ref_logps"
                )
        if ref_logps.shape != (len(cu) - 1,):
            raise ValueError(
                f"ref_logps is {tuple(ref_logps.shape)}; expected [{len(cu) - 1}], one sum per response"
            )
        ref_logps = (
            ref_logps.detach().to(hidden.device, torch.float64, non_blocking=True).contiguous()
        )
    elif ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        elif ref_weight.shape[:1] != weight.shape[:1]:
            raise ValueError(
                f"ref_weight {tuple(ref_weight.shape)} and weight {tuple(weight.shape)} must have the same vocabulary"
            )
        ref_hidden, ref_weight, ref_bias = _autocast(ref_hidden, ref_weight, ref_bias)
        _check_head("ref_", ref_hidden, ref_weight, targets, ref_bias)
        with torch.no_grad():
            if not any(needs) and ref_weight is weight and ref_bias is bias:
                logps, ref_logps = head.logps_of_both(hidden, ref_hidden, targets)
                ref_logps = sums(lengths, ref_logps)
            else:
                ref = Head(ref_weight, ref_bias, transform, workspace, engine)
                ref_logps = sums(lengths, ref.logps(ref_hidden, targets)[0])
                del ref  # its logits buffer
    else:
        raise ValueError("the loss needs a reference: give ref_logps (cached sums) or ref_hidden")

    loss = head.engine.loss(lengths, ref_logps, feedback, objective, reduction, num_units)
    if not any(needs):
        with torch.no_grad():
            return loss.output(head.logps(hidden, targets)[0] if logps is None else logps)
    plan = head.plan(feedback, lengths, needs[1], needs[2], objective.length_normalize)
    return UnaOutput(*_LinearUna.apply(*leaves, OnePass(head, plan, hidden, targets, loss, needs)))


@_outside_compile
@torch.no_grad()
def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """[S] float64 sums of log-probs over each response, in 1 GEMM pass and without gradient: what a reference gives.

    Arguments as in linear_una_loss."""
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head("", hidden, weight, targets, bias)
    targets = _int64_targets(targets, weight.shape[0])
    lengths = Lengths(_check_cu_seqlens(cu_seqlens, hidden.shape[0]), hidden.device)
    workspace = Workspace.of(hidden.device, workspace_mb)
    head = Head(weight, bias, LogitTransform(softcap, logit_scale, temperature), workspace, engine)
    return head.engine.loss.sums(lengths, head.logps(hidden, targets)[0])


@_outside_compile
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    engine: str = "auto",
) -> Tensor:
    """[N] log-probs of the targets, float32 (float64 for float64 operands), for any per-token loss.

    hidden: [N, D]; weight: [V, D], same dtype; targets: [N] int64, -100 gives 0 and no gradient. The logits follow
    the formula of linear_una_loss. Backward recomputes them: 4 GEMM passes, 3 with a frozen head.
    """
    leaves = hidden, weight, bias
    hidden, weight, bias = _autocast(*leaves)
    _check_head("", hidden, weight, targets, bias)
    targets = _int64_targets(targets, weight.shape[0], ignore=True)
    workspace = Workspace.of(hidden.device, None)
    head = Head(weight, bias, LogitTransform(softcap, logit_scale, temperature), workspace, engine)
    return _TokenLogps.apply(*leaves, hidden.detach(), targets, head)


@_outside_compile
def gather_logps(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, inplace_backward: bool = False
) -> Tensor:
    """log softmax(logits / temperature) at the targets, for callers that already hold logits.

    logits: [..., V] float; targets: [...] int64, -100 gives 0 and no gradient. Returns [...] float32 (float64 for
    float64 logits). Keeps no softmax: backward reads the logits again and writes their gradient once: into a new
    tensor, or with `inplace_backward` over the logits, which nothing else may need by then (autograd raises where it
    knows of it).
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the shape of logits {tuple(logits.shape)} less V"
        )
    targets = _int64_targets(targets, logits.shape[-1], ignore=True)
    return _GatherLogps.apply(
        logits, targets, LogitTransform(temperature=temperature), inplace_backward
    )


# ---------------------------------------------------------------------------------------------------- input checks


@torch.no_grad()
def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, operands take its dtype as a linear layer's would. Gradients do not flow through the cast: they
    are made in the dtype of what was given, so that a float32 weight gets the float32 accumulator itself."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _check_head(
    prefix: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden {tuple(hidden.shape)} and {prefix}weight {tuple(weight.shape)} must be [N, D] and [V, D]"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{prefix}hidden is {hidden.dtype} and {prefix}weight {weight.dtype}; cast one, or run under autocast"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}] integers, one per row of {prefix}hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias {tuple(bias.shape)} must be [{weight.shape[0]}], one per vocabulary entry"
        )
    devices = {x.device for x in (hidden, weight, targets, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"{prefix}hidden, weight, targets and bias are on different devices: {sorted(map(str, devices))}"
        )


def _int64_targets(targets: Tensor, vocab: int, ignore: bool = False) -> Tensor:
    """Targets of any integer type as int64. Their values are checked on the CPU only: on a GPU a look would wait, and
    what is none of the vocabulary gives NaN."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be {list(targets.shape)} integers, not {targets.dtype}"
        )
    targets = targets.long().contiguous()
    if targets.device.type == "cpu":
        wrong = (targets < 0) | (targets >= vocab)
        if ignore:
            wrong &= targets != IGNORE
        if wrong.any():
            bad = int(wrong.flatten().nonzero()[0])
            raise ValueError(
                f"targets[{bad}] is {int(targets.flatten()[bad])}, outside the vocabulary [0, {vocab})"
            )
    elif not ignore:
        targets = torch.where(targets < 0, -1, targets)  # -100 too is none of the vocabulary here
    return targets


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> list[int]:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} must be [S+1] integers, starting at 0"
        )
    cu = cu_seqlens.tolist()
    if cu[0] != 0 or cu[-1] != rows:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at N={rows}; it starts at {cu[0]} and ends at {cu[-1]}"
        )
    for i in range(len(cu) - 1):
        if cu[i + 1] == cu[i]:
            raise ValueError(
                f"response {i} is empty (cu_seqlens[{i}] = cu_seqlens[{i + 1}] = {cu[i]})"
            )
        if cu[i + 1] < cu[i]:
            raise ValueError(f"cu_seqlens falls from {cu[i]} to {cu[i + 1]} at response {i}")
    return cu


def _graph_is_kept() -> bool:
    """Whether this backward may be followed by another one over the same graph (retain_graph=True)."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else probe()


class _LinearUna(torch.autograd.Function):
    """Forward computes the gradients; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: OnePass
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        out, grads, late = job.run()
        ctx.grads = (grads.hidden, grads.weight, grads.bias, late, grads.scale)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of this loss were handed out already; use backward(retain_graph=True)"
            )
        hidden, weight, bias, late, scale = ctx.grads
        if upstream is None:
            return None, None, None, None
        keep = _graph_is_kept()
        if not keep:
            ctx.grads = None

        def scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            if (
                grad.is_cuda and grad.dtype != dtype
            ):  # one trip through memory; a CPU would make a copy in between
                return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
            # out= keeps the factor unrounded where the gradient is narrower.
            return torch.mul(grad, factor, out=torch.empty_like(grad) if keep else grad).to(dtype)

        rows = upstream if late is None else (upstream * late).unsqueeze(1)
        whole = upstream if scale is None else upstream * scale
        return (
            scaled(hidden, rows, ctx.dtypes[0]),
            scaled(weight, whole, ctx.dtypes[1]),
            scaled(bias, whole, ctx.dtypes[2]),
            None,
        )


# --------------------------------------------------------------------------------------- any upstream gradient


class _TokenLogps(torch.autograd.Function):
    """Forward keeps the logsumexp; backward recomputes the logits. hidden: in the dtype of the head; the leaves, as
    given, get the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_leaf: Tensor,
        weight_leaf: Tensor,
        bias_leaf: Tensor | None,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
    ) -> Tensor:
        logps, lse = head.logps(hidden, targets)
        # The weight of the head too, so that autograd sees it change; under autocast the head has a copy.
        ctx.save_for_backward(hidden_leaf, weight_leaf, bias_leaf, hidden, targets, lse)
        ctx.head = head.drop_buffer()
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, hidden, targets, lse = ctx.saved_tensors
        head, count = ctx.head, hidden.shape[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        tile = head.tile(count)
        into = empty_hidden_grad(hidden, head, all_rows=True) if need_hidden else None
        grads = Grads(head, tile, need_weight, need_bias, into)
        coef = torch.where(targets == IGNORE, 0.0, upstream.to(lse.dtype))
        cuts = list(chunks([0], [0, count], tile.rows, head.size.quantum))
        recompute(head, tile, cuts, hidden, targets, coef, lse, grads)
        grads.finish()
        head.drop_buffer()
        made = (grads.hidden, grads.weight, grads.bias)
        found = (
            None if x is None else x.to(leaf.dtype) for x, leaf in zip(made, leaves, strict=True)
        )
        return *found, None, None, None


def _matrices(logits: Tensor) -> Iterator[Tensor]:
    """[..., V] as [M, V] views in row order; never a copy, since callers pass logits[:, :-1]."""
    if logits.dim() < 2:
        yield logits.unsqueeze(0)
    elif logits.dim() == 2:
        yield logits
    elif logits.is_contiguous():
        yield logits.view(-1, logits.shape[-1])
    else:
        for part in logits:
            yield from _matrices(part)


def _places(matrices: Iterable[Tensor]) -> Iterator[slice]:
    """Where the rows of each matrix stand among all rows."""
    stop = 0
    for matrix in matrices:
        start, stop = stop, stop + len(matrix)
        yield slice(start, stop)


class _GatherLogps(torch.autograd.Function):
    """Row operations on logits that the caller holds; backward writes each gradient row once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: LogitTransform, inplace: bool
    ) -> Tensor:
        engine = choose_engine("auto", logits.device, logits.dtype)
        labels = targets.reshape(-1)
        lse = torch.empty(labels.shape, dtype=accumulator_dtype(logits.dtype), device=logits.device)
        logps = torch.empty_like(lse)
        parts = list(_matrices(logits))
        for part, rows in zip(parts, _places(parts), strict=True):
            logps[rows], lse[rows] = engine.gather(part, labels[rows], transform)
        ctx.save_for_backward(logits, targets, lse)
        ctx.engine, ctx.transform, ctx.inplace = engine, transform, inplace
        return logps.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        logits, targets, lse = ctx.saved_tensors
        labels, upstream = targets.reshape(-1), upstream.reshape(-1).to(lse.dtype)
        grad = (
            logits.detach()
            if ctx.inplace
            else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        parts = list(_matrices(logits))
        for part, into, rows in zip(
            parts, _matrices_like(grad, parts), _places(parts), strict=True
        ):
            ctx.engine.gather_grad(
                part, labels[rows], lse[rows], upstream[rows], ctx.transform, into
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None


def _matrices_like(grad: Tensor, parts: Sequence[Tensor]) -> Iterable[Tensor]:
    """The rows of `grad` cut as `parts` are."""
    rows = list(_matrices(grad))
    return rows if len(rows) == len(parts) else rows[0].split([len(part) for part in parts])
