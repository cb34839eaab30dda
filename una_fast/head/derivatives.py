"""Derivatives that the ops of the head have, and refusals of all others.

An op has first derivatives, by backward() and torch.autograd.grad. An op has no second derivative,
no forward-mode derivative, and no rule for torch.func: without a refusal, they would be zero,
silently, or fail far from the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Gradients = tuple[Tensor | None, ...]

# Tests for the tensors of torch.func, and of is_grads_batched=True.
_IS_WRAPPED = ("is_functorch_wrapped_tensor", "is_legacy_batchedtensor")


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError for tensors within a transform of torch.func, or with a tangent.

    op: name of the op, for the error
    tensors: inputs of the op, or upstream gradients
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if _is_wrapped(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{op} has first derivatives in backward mode alone: call it outside of torch.func "
                "(jvp, vmap, grad), of forward_ad and of is_grads_batched=True, and differentiate "
                "with backward() or torch.autograd.grad"
            )


def _is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func."""
    probes = [getattr(torch._C._functorch, name, None) for name in _IS_WRAPPED]
    return any(probe(tensor) for probe in probes if probe is not None)


class Origin:
    """Where the gradients of a call come from, for the error of a second derivative.

    op: name of the op
    joints: empty tensors, joined to the graph of every leaf that wants a gradient; they hold no
        memory of the leaves, and no kernel makes them
    """

    def __init__(self, op: str, leaves: Sequence[Tensor | None]) -> None:
        """Join to the leaves of a call. leaves: as given to the op; None: no such leaf"""
        self.op = op
        self.joints: list[Tensor] = []
        if torch.is_grad_enabled():
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            self.joints = [leaf[:0].clone() for leaf in wanted]


def first_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Let the gradients of a backward be used, and refuse to differentiate them.

    torch's once_differentiable refuses only where the upstream gradient requires a gradient; the
    gradients of an op depend on its leaves, too. Nothing is added unless create_graph=True.

    backward: of an autograd.Function whose forward sets ctx.origin
    """

    @functools.wraps(backward)
    def gradients(ctx: Any, *upstream: Tensor | None) -> Gradients:
        refuse_transforms(ctx.origin.op, *upstream)
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # create_graph=True enables it
            return grads
        sources = [x for x in (*upstream, *ctx.origin.joints) if x is not None and x.requires_grad]
        return _NoSecondDerivative.apply(ctx.origin.op, len(sources), *sources, *grads)

    return gradients


class _NoSecondDerivative(torch.autograd.Function):
    """Give gradients a graph to all that they depend on, and raise in backward."""

    @staticmethod
    def forward(ctx: Any, op: str, sources: int, *tensors: Tensor | None) -> Gradients:
        ctx.op = op
        return tuple(x if x is None else x.detach() for x in tensors[sources:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> None:
        raise RuntimeError(
            f"{ctx.op} has no second derivative, and a loss depends on its gradient "
            "(create_graph=True): detach the gradient, or compute that term from whole logits"
        )
