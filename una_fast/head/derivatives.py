"""First derivatives of the ops of the head, and refusals of all other derivatives.

An op has first derivatives, by backward() and torch.autograd.grad. An op has no second derivative,
no forward-mode derivative, and no rule for torch.func. Without a refusal some of these would be
zero, silently, and others would fail far from the op.
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
        if not isinstance(tensor, Tensor):
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
    """The op of a call, and its leaves in the graph, for the error of a second derivative.

    op: name of the op
    joints: [0, ...], an empty piece of every leaf with a gradient; a joint keeps the place of the
        leaf in the graph, without the memory of the leaf, and costs no kernel
    """

    def __init__(self, op: str, leaves: Sequence[Tensor | None]) -> None:
        """Make the joints. leaves: as given to the op; None: no such leaf"""
        self.op = op
        self.joints: list[Tensor] = []
        if torch.is_grad_enabled():
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            self.joints = [leaf[:0].clone() for leaf in wanted]


def first_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Return a backward with gradients to use, and an error for a derivative of the gradients.

    torch's once_differentiable raises only if the upstream gradient requires a gradient; gradients
    of an op depend on the leaves, too. Without create_graph=True nothing is added.

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
    """Pass gradients on with a graph to upstream gradients and leaves, and raise in backward."""

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
