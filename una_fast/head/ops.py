"""The fused head: hidden states and lm_head weight -> log-probs and UNA loss; no [N, V] logits.

    logp_t = z_t[y_t] - logsumexp(z_t)          z_t = transform(W h_t + bias), see LogitTransform
    Delta_i = sum over t in response i of (logp_t - ref_logp_t)
    L = losses.una_loss(Delta, feedback)
    dL/dlogp_t = c_i                            one scalar per response, known once all responses of
                                                its component are summed

Because c_i does not depend on t, the gradient is built in the forward, chunk by chunk, either with
c_i (known when the whole component is in the chunk) or without c_i, to be scaled at the end
(plan.py decides). A row's factor f (its coefficient, and the sum of its softmax) is left out of
what is written for the logits, and multiplies rows instead (one_read_ of torch_engine.py):

    for each chunk of C rows:   u = H W^T -> logp, E, f        f E = c (onehot - softmax) dz/du
                                dH = f (E W);  dW += E^T (f H)

One GEMM pass = 2 N D V flop. Policy: 3 passes with a trained head, 2 with a frozen one; reference:
1, or 0 when its log-probs are cached. Any upstream gradient (token_logps, sequence_logps): the same
3 and 2 for the rows whose logits the workspace holds until backward; 4 and 3 for the others, whose
logits are computed again.
Stored between forward and backward: dH [N, D] in the dtype of hidden (float32 for float16), dW
[V, D] in the accumulator dtype (bfloat16 where one chunk holds the call); for an upstream gradient
to come, logits within the workspace instead.
Never stored: logits of more rows than the workspace holds.

A target of -100 means everywhere: the row has no target; log-prob and statistics 0, no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from una_fast.feedback import Feedback
from una_fast.group import Group
from una_fast.head.compiling import outside_compile
from una_fast.head.derivatives import Origin, first_only, refuse_transforms
from una_fast.head.engines import choose_engine
from una_fast.head.passes import Head, LaterPass, OnePass
from una_fast.head.plan import Plan
from una_fast.head.row_stats import EntropyTerm, check_stats
from una_fast.head.segment_loss import Lengths
from una_fast.head.torch_engine import LogitTransform, accumulator_dtype
from una_fast.head.vocabulary import Shares, SplitHead, SplitPass, agreed, find_shares
from una_fast.losses import IGNORED, Objective, UnaOutput, as_tensor, check_units, denominator

# --- public functions -----------------------------------------------------------------------------


@outside_compile
def linear_una_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Sequence[int],
    cu_seqlens: Tensor | Sequence[int],
    feedback: Feedback | Mapping[str, Tensor],
    *,
    objective: Objective | None = None,
    ref_logps: Tensor | Sequence[float] | None = None,
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
    group: Group | dist.ProcessGroup | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    vocabulary: Group | dist.ProcessGroup | None = None,
) -> UnaOutput:
    """Compute the UNA loss of N response tokens in S responses, from hidden states.

    Logits are z = softcap * tanh(logit_scale * (W h + bias) / softcap) / temperature, policy and
    reference alike. The losses on the implicit reward (UNA paper, eq. 6) are in losses.py.

    hidden: [N, D], states that predict the targets (gathered: no prompt, no padding)
    weight: [V, D], dtype of hidden
    targets: [N] integers; -100 gives 0 and no gradient (refused where log-ratios are means)
    cu_seqlens: [S + 1] integers from 0 to N, on the CPU (on a GPU reading them costs a sync)
    feedback: units over the S responses, or the `to_dict` of such a table; responses in no unit get
        log-probs but no gradient
    objective: forms of the losses, and beta; None: Objective()
    ref_logps: [S], cached sums over tokens; instead of ref_hidden
    ref_hidden: [N, D'], states of the reference
    ref_weight: [V, D']; None: the weight of the policy, detached
    bias: [V]
    ref_bias: [V]; None: the bias of the policy, or no bias beside a ref_weight
    softcap: cap of the logits; None: no cap
    logit_scale: factor of the raw logits
    temperature: divisor of the logits
    reduction: "mean" (weighted sum of unit losses / num_units) or "sum"
    num_units: denominator of "mean"; None: the units of this call
    workspace_mb: MiB for everything that is neither input nor gradient; None: 2048 on a GPU, 256 on
        a CPU
    engine: "auto", "torch" or "triton"
    group: ranks that hold a part of every response each, and call with the same feedback; the rows
        are those of this rank, and a response may have none. One all-reduce of S numbers per call,
        and one more for ref_hidden. The result is equal on all ranks; a gradient is the part of
        this rank, and the gradient of the weight is the sum over the ranks
    lengths: [S] integers on the CPU, tokens of every response on all ranks of the group
    vocabulary: ranks that share the head (vocabulary.py); None: the head is whole. All ranks call,
        with rows of their own, and weights and biases hold the [V_r] entries of the rank: blocks in
        the order of ranks. The gradients of weight and bias are of the sum of all losses, which
        all ranks must multiply by the same number before backward

    Returns UnaOutput: float64 loss (scalar), logps, ref_logps, rewards [S] and unit_losses [U].
    Only the loss carries a gradient: to hidden, weight and bias where they require a gradient. No
    gradient reaches the reference.

    ValueError for inconsistent shapes, an empty response, feedback on missing responses, and
    targets outside the vocabulary (on a GPU such targets give NaN instead).
    """
    objective = objective or Objective()
    feedback = Feedback.of(feedback)
    leaves = (hidden, weight, bias)
    refuse_transforms("linear_una_loss", *leaves, ref_hidden, ref_weight, ref_bias)
    hidden, weight, bias = _autocast(*leaves)
    transform = LogitTransform(softcap, logit_scale, temperature)
    targets = as_tensor("targets", targets, hidden.device)
    _check_head("", hidden, weight, targets, bias)
    needs = _needs(leaves)
    # Before any product, and before ranks meet: a rank that refuses would leave the others waiting.
    lengths = _bounds(cu_seqlens, hidden, group, lengths)
    responses = len(lengths.ints)
    check_units(feedback, objective, responses)
    denominator(reduction, num_units, feedback.num_units)
    if ref_logps is None and ref_hidden is None:
        raise ValueError("the loss needs a reference: give ref_logps (cached sums) or ref_hidden")
    shares = find_shares(vocabulary, hidden, weight, needs, workspace_mb)
    vocab = weight.shape[0] if shares is None else shares.vocab
    # A mean over tokens would count the rows without a target.
    targets = _int64_targets(targets, vocab, ignore=not objective.length_normalize)
    options = (transform, workspace_mb, engine, shares)
    head = _make_head(weight, bias, *options, needs)
    leaf, plan = leaves[1].dtype, None
    if any(needs) and shares is None:
        train_weight = leaf if needs[1] else None
        plan = head.plan(feedback, lengths, train_weight, needs[2], objective.length_normalize)

    logps = None  # of the policy, where one pass without gradients gives both
    if ref_logps is not None:
        others = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        ref_logps = _cached_reference(ref_logps, responses, hidden.device, others)
    else:
        policy, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
        tokens, logps = _reference(head, policy, reference, targets, needs, plan, options)
        ref_logps = head.sums(lengths, tokens)

    loss = head.engine.segment_loss(lengths, ref_logps, feedback, objective, reduction, num_units)
    if not any(needs):
        with torch.no_grad():
            if logps is None:
                logps, _ = head.logps(hidden, targets)
            return loss.output(logps)
    if plan is None:
        job = SplitPass(head, hidden, targets, loss, needs, leaf)
    else:
        job = OnePass(head, plan, hidden, targets, loss, needs, leaf)
    origin = Origin("linear_una_loss", leaves)
    return UnaOutput(*_LinearUna.apply(*leaves, job, origin))


@outside_compile
def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Sequence[int],
    cu_seqlens: Tensor | Sequence[int],
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    engine: str = "auto",
    group: Group | dist.ProcessGroup | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    vocabulary: Group | dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the [S] float64 sums of log-probs over each response.

    Without gradients, as for a reference, 1 GEMM pass. With gradients, passes and kept logits are
    those of token_logps. Logits and errors are those of linear_una_loss:

    hidden: [N, D], states that predict the targets
    weight: [V, D], dtype of hidden
    targets: [N] integers; -100 gives 0 and no gradient
    cu_seqlens: [S + 1] integers from 0 to N, on the CPU
    bias: [V]
    softcap: cap of the logits; None: no cap
    logit_scale: factor of the raw logits
    temperature: divisor of the logits
    workspace_mb: MiB for logits; None: 2048 on a GPU, 256 on a CPU
    engine: "auto", "torch" or "triton"
    group: ranks that hold a part of every response each, as in linear_una_loss; the ranks must make
        the same loss of the sums
    lengths: [S] integers on the CPU, tokens of every response on all ranks of the group
    vocabulary: as in linear_una_loss, without gradients alone
    """
    leaves = (hidden, weight, bias)
    refuse_transforms("sequence_logps", *leaves)
    transform = LogitTransform(softcap, logit_scale, temperature)
    head, hidden, targets = _token_call(
        leaves, targets, transform, workspace_mb, engine, vocabulary
    )
    lengths = _bounds(cu_seqlens, hidden, group, lengths)
    if isinstance(head, SplitHead):
        with torch.no_grad():
            return head.sums(lengths, head.logps(hidden, targets)[0])
    return _later_pass(leaves, head, hidden, targets, lengths=lengths)[0]


@outside_compile
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | Sequence[int],
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    engine: str = "auto",
    *,
    workspace_mb: float | None = None,
    stats: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Return the [N] log-probs of the targets, for any per-token loss; statistics on request.

    float32 (float64 for float64 operands). Logits that fit the workspace are kept for backward: 3
    GEMM passes, 2 with a frozen head. Where rows do not fit, the rest is computed again: 4 and 3.
    All calls that wait for their backward keep no more than the workspace together; nothing is kept
    without gradients. Logits and errors are those of linear_una_loss.

    hidden: [N, D], states that predict the targets
    weight: [V, D], dtype of hidden
    targets: [N] integers; -100 gives 0 and no gradient
    bias: [V]
    softcap: cap of the logits; None: no cap
    logit_scale: factor of the raw logits
    temperature: divisor of the logits
    engine: "auto", "torch" or "triton"
    workspace_mb: MiB for logits, kept ones too; None: 2048 on a GPU, 256 on a CPU
    stats: names of statistics of every row, from the read of the logits that gives the log-probs,
        of softmax(z):
        "entropy", with gradient
        "mean_logits", mean of z over the vocabulary
        "is_top1", bool, whether the target's logit is the largest: of equal ones, the first
        "log_sum_sq_probs", log of the sum of squared probabilities

    With stats, returns (log-probs, {name: [N]}). Statistics are 0 where the target is -100.
    """
    leaves = (hidden, weight, bias)
    refuse_transforms("token_logps", *leaves)
    stats = check_stats(stats)
    transform = LogitTransform(softcap, logit_scale, temperature)
    head, hidden, targets = _token_call(leaves, targets, transform, workspace_mb, engine)
    logps, *values = _later_pass(leaves, head, hidden, targets, stats=stats)
    return (logps, dict(zip(stats, values, strict=True))) if stats else logps


@outside_compile
def gather_logps(
    logits: Tensor,
    targets: Tensor | Sequence[int],
    temperature: float = 1.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Return log softmax(logits / temperature) at the targets, for callers that hold logits.

    Keeps no softmax: backward reads the logits again, and writes their gradient once.

    logits: [..., V] float
    targets: [...] integers; -100 gives 0 and no gradient
    temperature: divisor of the logits
    inplace_backward: write the gradient over the logits, which no other operation may need by then
        (autograd raises where the other operation is known to autograd)

    Returns [...] float32 (float64 for float64 logits). ValueError for targets of another shape, and
    for targets outside the vocabulary (on a GPU such targets give NaN instead).
    """
    refuse_transforms("gather_logps", logits)
    targets = as_tensor("targets", targets, logits.device)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the shape of logits "
            f"{tuple(logits.shape)} less V"
        )
    targets = _int64_targets(targets, logits.shape[-1], ignore=True)
    transform = LogitTransform(temperature=temperature)
    origin = Origin("gather_logps", [logits])
    return _GatherLogps.apply(logits, targets, transform, inplace_backward, origin)


# --- input checks ---------------------------------------------------------------------------------


@torch.no_grad()
def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast operands under autocast, as a linear layer would.

    Gradients do not flow through the cast. They are made in the dtype of the leaves, so that a
    float32 weight gets the float32 accumulator itself.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _check_head(
    prefix: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not go together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden {tuple(hidden.shape)} and {prefix}weight {tuple(weight.shape)} must "
            "be [N, D] and [V, D]"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{prefix}hidden is {hidden.dtype} and {prefix}weight {weight.dtype}; cast one, or run "
            "under autocast"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}] integers, one per row of "
            f"{prefix}hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias {tuple(bias.shape)} must be [{weight.shape[0]}], one per vocabulary "
            "entry"
        )
    devices = {x.device for x in (hidden, weight, targets, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(
            f"{prefix}hidden, weight, targets and bias are on different devices: "
            f"{sorted(map(str, devices))}"
        )


def _needs(leaves: Sequence[Tensor | None]) -> list[bool]:
    """Return which leaves want a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in leaves]


def _token_call(
    leaves: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor | Sequence[int],
    transform: LogitTransform,
    workspace_mb: float | None,
    engine: str,
    vocabulary: Group | dist.ProcessGroup | None = None,
) -> tuple[Head, Tensor, Tensor]:
    """Return the head of a call, hidden states in the dtype of the head, and int64 targets.

    leaves: hidden, weight and bias as given
    targets: [N], -100 allowed
    transform: from raw logits to logits
    workspace_mb: as given
    engine: as given
    vocabulary: as given; refused where a gradient is wanted
    """
    hidden, weight, bias = _autocast(*leaves)
    targets = as_tensor("targets", targets, hidden.device)
    _check_head("", hidden, weight, targets, bias)
    needs = _needs(leaves)
    shares = find_shares(vocabulary, hidden, weight, needs, workspace_mb)
    if shares is not None and any(needs):
        raise ValueError(
            "sequence_logps over a split vocabulary has no gradient; call it under "
            "torch.no_grad(), use linear_una_loss, or leave vocabulary out"
        )
    vocab = weight.shape[0] if shares is None else shares.vocab
    targets = _int64_targets(targets, vocab, ignore=True)
    head = _make_head(weight, bias, transform, workspace_mb, engine, shares)
    return head, hidden.detach(), targets


def _make_head(
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    workspace_mb: float | None,
    engine: str,
    shares: Shares | None,
    needs: Sequence[bool] = (),
) -> Head:
    """Return a head: whole, or the own entries of a vocabulary that ranks share.

    shares: rows and entries of all ranks; None: the head is whole
    needs: whether hidden, weight and bias want a gradient; empty: none
    """
    options = (weight, bias, transform, workspace_mb, engine)
    return Head(*options) if shares is None else SplitHead(*options, shares, needs=needs)


@torch.no_grad()
def _reference(
    head: Head,
    policy: Sequence[Tensor | None],
    reference: Sequence[Tensor | None],
    targets: Tensor,
    needs: Sequence[bool],
    plan: Plan | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    """Return the [N] log-probs of the reference, and of the policy if one pass gives both.

    head: of the policy
    policy: hidden, weight and bias
    reference: hidden, weight and bias as given
    targets: [N]
    needs: whether hidden, weight and bias want a gradient
    plan: of the pass that takes the logits buffer of the reference; None: the buffer is freed
    options: of every head, see _make_head
    """
    hidden, weight, bias = policy
    ref_hidden, ref_weight, ref_bias = reference
    if ref_weight is None:
        ref_weight = weight
        ref_bias = bias if ref_bias is None else ref_bias
    _check_vocabularies(ref_weight, weight)
    ref_hidden, ref_weight, ref_bias = _autocast(ref_hidden, ref_weight, ref_bias)
    _check_head("ref_", ref_hidden, ref_weight, targets, ref_bias)
    if not any(needs) and ref_weight is weight and ref_bias is bias:
        logps, ref_logps = head.logps_of_both(hidden, ref_hidden, targets)
        return ref_logps, logps
    ref_head = _make_head(ref_weight, ref_bias, *options)
    ref_logps, _ = ref_head.logps(ref_hidden, targets)
    if plan is not None:
        head.take_buffer(ref_head, plan.tile)
    return ref_logps, None


def _check_vocabularies(ref_weight: Tensor, weight: Tensor) -> None:
    if ref_weight.shape[:1] != weight.shape[:1]:
        raise ValueError(
            f"ref_weight {tuple(ref_weight.shape)} and weight {tuple(weight.shape)} must have the "
            "same vocabulary"
        )


def _cached_reference(
    ref_logps: Tensor | Sequence[float],
    responses: int,
    device: torch.device,
    others: Mapping[str, Tensor | None],
) -> Tensor:
    """Return cached log-probs as the loss reads them: [S] float64 on the device.

    others: name -> reference that must not be given beside ref_logps
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"give ref_logps or ref_hidden, not both: {name} is not read beside ref_logps"
            )
    ref_logps = as_tensor("ref_logps", ref_logps, device, torch.float64)
    if ref_logps.shape != (responses,):
        raise ValueError(
            f"ref_logps is {tuple(ref_logps.shape)}; expected [{responses}], one sum per response"
        )
    return ref_logps.detach().to(device, torch.float64, non_blocking=True).contiguous()


def _int64_targets(targets: Tensor, vocab: int, ignore: bool = False) -> Tensor:
    """Return targets of any integer type as int64.

    Values are checked on the CPU only: on a GPU a check would wait, and targets outside the
    vocabulary give NaN there.

    targets: [...] integers
    vocab: V
    ignore: -100 is allowed
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be {list(targets.shape)} integers, not "
            f"{targets.dtype}"
        )
    targets = targets.long().contiguous()
    if targets.device.type == "cpu":
        wrong = (targets < 0) | (targets >= vocab)
        if ignore:
            wrong &= targets != IGNORED
        if wrong.any():
            bad = int(wrong.flatten().nonzero()[0])
            value = int(targets.flatten()[bad])
            hint = ""
            if value == IGNORED:
                hint = "; leave rows without a target out where length_normalize=True"
            raise ValueError(
                f"targets[{bad}] is {value}, outside the vocabulary [0, {vocab}){hint}"
            )
    elif not ignore:
        targets = torch.where(targets < 0, -1, targets)  # -100 too is outside the vocabulary here
    return targets


def _bounds(
    cu_seqlens: Tensor | Sequence[int],
    hidden: Tensor,
    group: Group | dist.ProcessGroup | None,
    whole: Tensor | Sequence[int] | None,
) -> Lengths:
    """Return the bounds of the responses, checked.

    cu_seqlens: [S + 1], of the rows of this rank
    hidden: [N, D]
    group: as given
    whole: [S] tokens on all ranks, as given
    """
    group = Group.of(group)
    cu = _check_cu_seqlens(cu_seqlens, hidden.shape[0], may_be_empty=group.size > 1)
    if whole is None:
        if group.size > 1:
            raise ValueError(
                f"the responses are in parts on {group.size} ranks: give lengths=, the tokens of "
                "every response on all of them"
            )
        return Lengths(cu, hidden.device)
    whole = as_tensor("lengths", whole, torch.device("cpu")).tolist()
    if len(whole) != len(cu) - 1:
        raise ValueError(f"lengths has {len(whole)} numbers for {len(cu) - 1} responses")
    lengths = Lengths(cu, hidden.device, group, whole)
    for i, (here, all_of_it) in enumerate(zip(lengths.ints, whole, strict=True)):
        if all_of_it < 1:
            raise ValueError(f"response {i} is empty (lengths[{i}] = {all_of_it})")
        if here > all_of_it or (group.size == 1 and here != all_of_it):
            raise ValueError(
                f"response {i} has {here} rows on this rank, and lengths[{i}] = {all_of_it} tokens "
                f"on the {group.size} of the group"
            )
    return lengths


def _check_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int], rows: int, *, may_be_empty: bool = False
) -> list[int]:
    """Return the row offsets of the responses as integers; ValueError for wrong ones."""
    cu_seqlens = as_tensor("cu_seqlens", cu_seqlens, torch.device("cpu"))
    is_integer = not (cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or not is_integer:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} must be [S+1] integers, starting at 0"
        )
    cu = cu_seqlens.tolist()
    if cu[0] != 0 or cu[-1] != rows:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at N={rows}; it starts at {cu[0]} and ends at "
            f"{cu[-1]}"
        )
    for i in range(len(cu) - 1):
        if cu[i + 1] == cu[i] and not may_be_empty:
            raise ValueError(
                f"response {i} is empty (cu_seqlens[{i}] = cu_seqlens[{i + 1}] = {cu[i]})"
            )
        if cu[i + 1] < cu[i]:
            raise ValueError(f"cu_seqlens falls from {cu[i]} to {cu[i + 1]} at response {i}")
    return cu


# --- autograd -------------------------------------------------------------------------------------


def _graph_is_kept() -> bool:
    """Return whether another backward may follow over the same graph (retain_graph=True)."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else probe()


class _LinearUna(torch.autograd.Function):
    """Forward computes the gradients; backward multiplies the missing factors and upstream in."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        job: OnePass,
        origin: Origin,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ctx.origin = origin
        out, grads = job.run()
        ctx.grads = (grads.hidden, grads.weight, grads.bias)
        ctx.missing = grads.missing
        ctx.engine = type(job.head.engine)  # the class: an engine would keep a copy of the weight
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    @first_only
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of this loss were handed out already; use "
                "backward(retain_graph=True)"
            )
        grads, missing = ctx.grads, ctx.missing
        if upstream is None:
            return None, None, None, None, None
        keep = _graph_is_kept()
        if not keep:
            ctx.grads = ctx.missing = None
        if missing.shared_by is not None:
            upstream = agreed(missing.shared_by, upstream)
        rows, head = missing.rows, missing.head
        row_factors = upstream if rows is None else (upstream * rows).unsqueeze(1)
        head_factor = upstream if head is None else upstream * head
        factors = (row_factors, head_factor, head_factor)
        scaled: list[Tensor | None] = [None, None, None]
        for k, grad in enumerate(grads):
            if grad is not None:
                scaled[k] = ctx.engine.scaled(grad, factors[k], ctx.dtypes[k], keep)
        return *scaled, None, None


def _later_pass(
    leaves: tuple[Tensor, Tensor, Tensor | None],
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    stats: tuple[str, ...] = (),
    lengths: Lengths | None = None,
) -> tuple[Tensor, ...]:
    """Return log-probs of tokens, or their sums, and statistics; with a graph where one is wanted.

    leaves: hidden, weight and bias, which get the gradients
    head: the head
    hidden: [N, D] in the dtype of the head, detached
    targets: [N]
    stats: names of the wanted statistics
    lengths: bounds of the responses to sum over; None: tokens
    """
    needs = _needs(leaves)
    if any(needs):
        job = LaterPass(head, len(hidden), needs[1], stats, lengths)
        origin = Origin("token_logps" if lengths is None else "sequence_logps", leaves)
        return _LaterPass.apply(*leaves, hidden, targets, job, origin)
    with torch.no_grad():
        rows = head.rows(hidden, targets, head.forward_plan(len(hidden)), stats)
        logps = rows.logps if lengths is None else head.sums(lengths, rows.logps)
    return logps, *rows.stats.values()


class _LaterPass(torch.autograd.Function):
    """Forward keeps logits within the workspace; backward uses them up, and recomputes the rest.

    The leaves get the gradients; `hidden` is the leaf in the dtype of the head. Over a kept graph
    the second backward finds no logits, and recomputes all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_leaf: Tensor,
        weight_leaf: Tensor,
        bias_leaf: Tensor | None,
        hidden: Tensor,
        targets: Tensor,
        job: LaterPass,
        origin: Origin,
    ) -> tuple[Tensor, ...]:
        ctx.origin = origin
        rows = job.run(hidden, targets)
        entropy = rows.stats.get("entropy")
        # The weight too, so that autograd sees it change; under autocast the head has a copy.
        leaves = (hidden_leaf, weight_leaf, bias_leaf)
        ctx.save_for_backward(*leaves, hidden, targets, rows.lse, entropy, rows.tail)
        ctx.job = job
        ctx.set_materialize_grads(False)
        others = [x for name, x in rows.stats.items() if name != "entropy"]
        ctx.mark_non_differentiable(*others)
        logps = rows.logps
        if job.lengths is not None:
            logps = job.head.sums(job.lengths, logps)
        return logps, *rows.stats.values()

    @staticmethod
    @first_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *leaves, hidden, targets, lse, entropy, tail = ctx.saved_tensors
        job = ctx.job
        of_logps, *of_stats = upstream
        of_entropy = dict(zip(job.stats, of_stats, strict=True)).get("entropy")
        term = None
        if of_entropy is not None:
            term = EntropyTerm(of_entropy, entropy, tail)
        needs = ctx.needs_input_grad[:3]
        rows = (hidden, targets, lse)
        grads = job.gradients(*rows, of_logps, term, needs, leaves[1].dtype)
        found: list[Tensor | None] = []
        for grad, leaf in zip((grads.hidden, grads.weight, grads.bias), leaves, strict=True):
            found.append(None if grad is None else grad.to(leaf.dtype))
        return *found, None, None, None, None


def _matrices(logits: Tensor) -> Iterator[Tensor]:
    """Yield [..., V] as [M, V] views in row order; never a copy: callers pass logits[:, :-1]."""
    if logits.dim() < 2:
        yield logits.unsqueeze(0)
    elif logits.dim() == 2:
        yield logits
    elif logits.is_contiguous():
        yield logits.view(-1, logits.shape[-1])
    else:
        for inner in logits:
            yield from _matrices(inner)


def _places(matrices: Iterable[Tensor]) -> Iterator[slice]:
    """Yield the place of the rows of each matrix among all rows."""
    stop = 0
    for matrix in matrices:
        start, stop = stop, stop + len(matrix)
        yield slice(start, stop)


def _matrices_like(grad: Tensor, matrices: list[Tensor]) -> Iterable[Tensor]:
    """Return the rows of `grad`, cut as `matrices` are."""
    rows = list(_matrices(grad))
    if len(rows) == len(matrices):
        return rows
    return rows[0].split([len(matrix) for matrix in matrices])


class _GatherLogps(torch.autograd.Function):
    """Row operations on logits that the caller holds; backward writes each gradient row once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        inplace: bool,
        origin: Origin,
    ) -> Tensor:
        ctx.origin = origin
        engine = choose_engine("auto", logits.device, logits.dtype)
        labels = targets.reshape(-1)
        lse = torch.empty(labels.shape, dtype=accumulator_dtype(logits.dtype), device=logits.device)
        logps = torch.empty_like(lse)
        matrices = list(_matrices(logits))
        for matrix, rows in zip(matrices, _places(matrices), strict=True):
            logps[rows], lse[rows] = engine.gather(matrix, labels[rows], transform)
        ctx.save_for_backward(logits, targets, lse)
        ctx.engine, ctx.transform, ctx.inplace = engine, transform, inplace
        return logps.view(targets.shape)

    @staticmethod
    @first_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        labels = targets.reshape(-1)
        upstream = upstream.reshape(-1).to(lse.dtype)
        if ctx.inplace:
            grad = logits.detach()
        else:
            grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        matrices = list(_matrices(logits))
        outs = _matrices_like(grad, matrices)
        for matrix, out, rows in zip(matrices, outs, _places(matrices), strict=True):
            ctx.engine.gather_grad(
                matrix, labels[rows], lse[rows], upstream[rows], ctx.transform, out
            )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None
