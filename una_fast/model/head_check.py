"""Check the head and the forward of a model at hand: the probe of a class sees the class alone.

The head is called with a few random hidden states, with and without a scorer in place of the
forward: the logits must agree. No call of the model is needed. The weight is read within the call
of the head, because hooks may bring the weight for the call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from una_fast.attention.instance import added_forwards, function_of, is_trusted, is_within, origin
from una_fast.head.compiling import outside_compile
from una_fast.model.head_forward import (
    CannotBeScored,
    Forward,
    call_head,
    forwards_of,
    innermost,
    is_forward_of,
)
from una_fast.model.head_probe import in_mode, row_error

# Packages whose hooks bring weights, and change no numbers.
_CARRIERS = ("una_fast", "torch", "accelerate", "deepspeed")
# Packages whose forwards of a model give the logits of the class.
_FORWARDS = (*_CARRIERS, "liger_kernel", "peft", "transformers", "trl")
# Forwards in another precision, which a function under which they stand would leave out.
_PRECISIONS = ("torch.amp", "torch.cuda.amp", "torch.cpu.amp", "accelerate")
_MOVERS = ("accelerate.hooks",)
_LOGITS = (0.3, 3.0, 30.0, 300.0)  # sizes, one a row: a softcap bends the large ones alone


class HeadCheck:
    """Compare the logits of a head with W h + b, and again after a change of the head.

    A change is a new class, forward or hook of the head, and is found in the next call.

    causal_lm: the model
    before: an earlier check of the model; an unchanged head is not compared again
    """

    def __init__(self, causal_lm: PreTrainedModel, before: HeadCheck | None = None) -> None:
        self._compared: tuple[Any, ...] = ()
        head = causal_lm.get_output_embeddings()
        weight = innermost(head).weight
        foreign = _foreign(head)
        if before is not None and _are_same(before._compared, foreign):
            self._compared = foreign
        elif foreign and has_numbers(weight):  # without such, the head is W h + b
            hidden = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            for training in (True, False):
                with in_mode(head, training=training):
                    _compare(causal_lm, head, hidden)
            self._compared = foreign

    def __getstate__(self) -> dict[str, Any]:
        """Leave out functions, which may not be pickled: the next call compares again."""
        return {"_compared": ()}

    @outside_compile
    def look(self, causal_lm: PreTrainedModel, hidden: Tensor) -> None:
        """Raise CannotBeScored for a changed head with logits unlike W h + b.

        causal_lm: the model, in a call
        hidden: [N, D], about to enter the head
        """
        head = causal_lm.get_output_embeddings()
        foreign = _foreign(head)
        if not _are_same(foreign, self._compared):
            _compare(causal_lm, head, hidden)
            self._compared = foreign


def _are_same(found: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    """Return whether two tuples hold the same objects; objects may have an == of their own."""
    return len(found) == len(known) and all(map(operator.is_, found, known))


def has_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor is whole, and here."""
    return not (tensor.is_meta or tensor.numel() == 0 or isinstance(tensor, DTensor))


def _foreign(head: nn.Module) -> tuple[Any, ...]:
    """Return the forwards and hooks of a head, but for forwards of torch and hooks of carriers."""
    inner = innermost(head)
    own = type(inner).forward
    found = [] if is_within(origin(own), ("torch.nn.modules.linear",)) else [own]
    added = list(added_forwards(inner))
    for module in dict.fromkeys((head, inner)):
        added.extend(module._forward_hooks.values())
    found += [function for function in added if not is_trusted(function, _CARRIERS, (own,))]
    return tuple(found)


@torch.no_grad()
def _compare(causal_lm: PreTrainedModel, head: nn.Module, like: Tensor) -> None:
    """Raise CannotBeScored for a head with logits unlike W h + b.

    Numbers of the head besides the weight are random meanwhile: fresh numbers may change no logits.

    like: [N, D], gives width, dtype and device
    """
    name = f"the head of {type(causal_lm).__name__} ({type(innermost(head)).__name__})"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(_LOGITS), like.shape[-1], generator=generator).to(like)
    sizes = torch.tensor(_LOGITS)[:, None].to(hidden.device)
    with ExitStack() as stack:
        devices = [like.device] if like.is_cuda else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_random_rest(innermost(head)))
        try:
            size = _plain(head, hidden).float().pow(2).mean(-1, keepdim=True).sqrt()
            hidden = hidden * (sizes.to(size) / size).to(hidden)
            ours = _plain(head, hidden).float()
            theirs = head(hidden[None])[0].float()
        # A head of somebody's own may fail in any way.
        except Exception as error:
            raise CannotBeScored(
                f"{name} cannot be compared with W h + b ({type(error).__name__}: {error}); it "
                "cannot be scored"
            ) from error
    if theirs.shape == ours.shape:
        distance = row_error(theirs, ours)
        allowed = max(1e-5, torch.finfo(like.dtype).eps)
        if distance <= allowed:
            return
        difference = f"off by {distance:.1e} (relative, allowed {allowed:.0e})"
    else:
        difference = f"of shape {list(theirs.shape)} for {list(ours.shape)}"
    changes = [getattr(one, "__qualname__", type(one).__name__) for one in _foreign(head)]
    found = f"; it runs {', '.join(changes)}" if changes else ""
    raise CannotBeScored(
        f"the logits of {name} are not W h + b: {difference}{found}. Take the change of the head "
        "off; it cannot be scored"
    )


def _plain(head: nn.Module, hidden: Tensor) -> Tensor:
    """Return W h + b [N, V], computed within the call of the head as a result is."""

    # Of the same shape as in the model's own call, which may choose the kernel.
    def scorer(rows: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        return {"logits": F.linear(rows[None], weight, bias)[0]}

    return call_head(head, hidden, scorer)["logits"]


@contextmanager
def _random_rest(head: nn.Module) -> Iterator[None]:
    """Replace the parameters of a head besides the weight by random numbers inside the block.

    Buffers, such as running means, have their numbers back at the end.
    """
    saved = {buffer: buffer.data.clone() for buffer in head.buffers() if has_numbers(buffer)}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in head.named_parameters():
        of_weight = name == "weight" or name.startswith("parametrizations.")
        if not of_weight and has_numbers(parameter) and parameter.is_floating_point():
            saved[parameter] = parameter.data.clone()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for tensor, numbers in saved.items():
            tensor.data.copy_(numbers)


# ---- the forward of the model ----


def is_replaced(causal_lm: PreTrainedModel, function: Forward, *, hooks: bool) -> bool:
    """Return whether a model has a forward, or a forward hook, with logits unlike the class's.

    Forwards and hooks of a few packages are trusted.

    causal_lm: the model
    function: is to stand over the forward, as a ModelForward, or does so already
    hooks: look at forward hooks, too

    CannotBeScored for a forward in another precision under the function.
    """
    chain = _forwards(causal_lm)
    ours = [is_forward_of(forward, function) for forward in chain]
    below = chain[ours.index(True) + 1 :] if True in ours else chain
    for forward in below:
        module = origin(forward)
        if is_within(module, _PRECISIONS) and not is_within(module, _MOVERS):
            raise CannotBeScored(
                f"the forward of {type(causal_lm).__name__} runs under {module}, whose precision "
                "scored calls would leave out; patch the model before accelerator.prepare, or take "
                "the wrapper off: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            )
    added = [*chain, *causal_lm._forward_hooks.values()] if hooks else chain
    return not all(is_trusted(function, _FORWARDS, _own(causal_lm)) for function in added)


def _own(causal_lm: PreTrainedModel) -> list[Forward]:
    """Return the forwards of the class of a model and of the classes above."""
    return [kind.__dict__["forward"] for kind in type(causal_lm).__mro__ if "forward" in vars(kind)]


def _forwards(causal_lm: PreTrainedModel) -> list[Forward]:
    """Return the forwards over the forward of the class, from above."""
    own, found = _own(causal_lm), []
    for forward in forwards_of(causal_lm):
        if function_of(forward) in own:
            break
        found.append(forward)
    return found
