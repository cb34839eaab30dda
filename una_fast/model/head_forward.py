"""From the rows of a causal language model's hidden states to a result of the head, no logits.

    hidden rows [N, D], weight [V, D], bias [V] or None  ->  scorer  ->  result

The scorer runs inside the head module's own call, and that inside the model's own forward: FSDP,
ZeRO and device maps gather weights by hooks around such calls, and reduce gradients of weights that
were read within them alone. Needs transformers, and neither peft nor datasets.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from una_fast.distributed import group_of_rows
from una_fast.group import Group
from una_fast.head.compiling import outside_compile
from una_fast.turns import turn

Scorer = Callable[[Tensor, Tensor, Tensor | None], Any]
"""(hidden rows [N, D], head weight [V, D], head bias [V] or None) -> result of the forward."""

Forward = Callable[..., Any]

# Attributes by which wrappers (FSDP1, activation checkpointing) keep the module inside.
_INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class CannotBeScored(ValueError):
    """The fused head cannot reproduce a model's logits; the message names class and reason."""


def backbone(causal_lm: PreTrainedModel) -> nn.Module:
    """Return the model under the head; CannotBeScored for a model class without one."""
    found = getattr(causal_lm, causal_lm.base_model_prefix or "_none", None)
    if not isinstance(found, nn.Module):
        raise CannotBeScored(
            f"{type(causal_lm).__name__} has no backbone (base_model_prefix is "
            f"{causal_lm.base_model_prefix!r}); it cannot be scored"
        )
    return found


def backbone_output(causal_lm: PreTrainedModel, **inputs: Any) -> Any:
    """Return the output of the model under the head; its first entry is [B, T, D].

    inputs: of the backbone; use_cache and return_dict among them (peft's forward adds them) are
        replaced
    """
    fixed = {"use_cache": False, "return_dict": True}
    return backbone(causal_lm)(**{**inputs, **fixed})


def hidden_states(causal_lm: PreTrainedModel, **inputs: Any) -> Tensor:
    """Return the last hidden states [B, T, D], the input of the head."""
    return backbone_output(causal_lm, **inputs)[0]


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return [N, D], some rows of hidden states, in memory of their own.

    hidden: [B, T, D]
    rows: [N] int64 indices into the flattened [B * T] positions
    """
    return hidden.flatten(0, 1).index_select(0, rows)


@outside_compile
def call_head(head: nn.Module, hidden: Tensor, scorer: Scorer) -> Any:
    """Call a head module with a scorer in place of its forward; its hooks run as ever.

    A second thread with a scorer waits; its calls without a scorer run the forward underneath.

    head: the output embedding, or a wrapper of it
    hidden: [N, D]
    scorer: see Scorer
    """
    inner = innermost(head)
    with turn(inner, alone=True):
        return _call_alone(head, inner, hidden, scorer)


def _call_alone(head: nn.Module, inner: nn.Module, hidden: Tensor, scorer: Scorer) -> Any:
    # A hook of accelerate, which brings weights from another device, calls `_old_forward`.
    name = "_old_forward" if hasattr(inner, "_hf_hook") else "forward"
    before = inner.__dict__.get(name)
    own = functools.partial(type(inner).forward, inner) if before is None else before
    me = threading.get_ident()

    def forward(rows: Tensor) -> Any:
        if threading.get_ident() != me:
            return own(rows)
        if is_split(inner):
            return _call_split(inner, rows, scorer)
        weight, bias = _whole(inner.weight), _whole(getattr(inner, "bias", None))
        return scorer(rows.to(weight.device), weight, bias)

    setattr(inner, name, forward)
    try:
        return head(hidden)
    finally:
        if before is None:
            delattr(inner, name)
        else:
            setattr(inner, name, before)


# --- a split vocabulary ---------------------------------------------------------------------------


def head_to_split(causal_lm: PreTrainedModel) -> nn.Linear:
    """Return the head of a model, to keep rows of it on every rank.

    ValueError, with the setting to change, for a head tied to the input embedding, and for a module
    other than a linear layer.
    """
    name = type(causal_lm).__name__
    advice = "set parallel.split_vocabulary=false"
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"parallel.split_vocabulary: the head of {name} is a {type(head).__name__}, and only a "
            f"linear layer can be split; {advice}"
        )
    if head.weight is causal_lm.get_input_embeddings().weight:
        raise ValueError(
            f"parallel.split_vocabulary: the head of {name} is tied to the input embedding, which "
            f"looks tokens up in all rows; {advice}"
        )
    return head


def mark_split(head: nn.Linear) -> None:
    """Let a head compute with this rank's rows of it: in `call_head`, and alone in its forward.

    head: parameters are DTensors of rows (distributed.keep_rows)
    """
    head._una_split = True
    head.forward = types.MethodType(_gathered_forward, head)


def is_split(head: nn.Module) -> bool:
    """Return whether every rank holds rows of a head, and computes with these rows alone."""
    return getattr(head, "_una_split", False)


def vocabulary_of(head: nn.Module) -> Group | None:
    """Return the ranks that share the vocabulary of a head; None for a whole head."""
    return group_of_rows(head.weight) if is_split(head) else None


def _gathered_forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return logits, for generation: the weight is gathered in every call."""
    weight, bias = _whole(head.weight), _whole(head.bias)
    weight = weight.to(hidden.device, hidden.dtype)
    return F.linear(hidden, weight, None if bias is None else bias.to(weight))


def _call_split(head: nn.Linear, rows: Tensor, scorer: Scorer) -> Any:
    """Call a scorer with this rank's rows of weight and bias.

    rows: [N, D] of this rank
    """
    weight, bias = (_own_rows(x, rows) for x in (head.weight, head.bias))
    # Wider weights, such as float32 masters, get wide gradients from narrow products.
    is_wider = weight.dtype != rows.dtype
    with torch.autocast(rows.device.type, dtype=rows.dtype, enabled=is_wider):
        return scorer(rows, weight, bias)


def _own_rows(tensor: DTensor | None, rows: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter, no narrower than the rows that it meets."""
    if tensor is None:
        return None
    local = tensor.to_local().to(rows.device)
    return local.to(torch.promote_types(local.dtype, rows.dtype))


def innermost(head: nn.Module) -> nn.Module:
    """Return the module that holds the weight."""
    for name in _INSIDE:
        inside = getattr(head, name, None)
        if inside is not None:
            return innermost(inside)
    return head


def _whole(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that no hook has gathered, from all ranks.

    Every rank holds other tokens, so the gradients of the ranks are parts of a sum.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


class ModelForward:
    """Stand over the forward of a model: `model.forward = ModelForward(model, function)`.

    A call runs function(model, under, ...), where `under` is the forward that the model had before.
    The signature is the signature of the class's forward, which transformers and peft read.

    A bound method would not do. Pickle finds a bound method again by its name alone, and a loaded
    model would run the forward of the class, without an error. A deep copy and a loaded model run
    their own weights.

    The model keeps the forwards underneath. model._una_under[k] is the forward under the
    ModelForward of place k, or None for the forward of the class. A forward of another package may
    stand between two ModelForwards.

    model: gets the forward
    function: of a module, so that pickle finds the function again
    """

    def __init__(self, model: nn.Module, function: Forward) -> None:
        under = model.__dict__.setdefault("_una_under", [])
        self._una_model = model
        self._una_function = function
        self._una_place = len(under)
        under.append(model.__dict__.get("forward"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        under = _under(self._una_model, self._una_place)
        return self._una_function(self._una_model, under, *args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.__func__.__name__

    # torch.export reads the code of a forward.
    @property
    def __code__(self) -> types.CodeType:
        return self.__func__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self._una_model).forward, self._una_model))

    # accelerate wraps the function of a method, and binds the wrapper to the model.
    @property
    def __self__(self) -> nn.Module:
        return self._una_model

    @property
    def __func__(self) -> Forward:
        function, place = self._una_function, self._una_place
        own = type(self._una_model).forward

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(model, _under(model, place), *args, **kwargs)

        # The own forward is no `__wrapped__`: accelerate takes wrapped forwards off.
        forward.__signature__ = inspect.signature(own)
        forward.__name__, forward.__doc__ = own.__name__, own.__doc__
        forward._una_function, forward._una_place = function, place
        return forward


def runs_function(model: nn.Module, function: Forward) -> bool:
    """Return whether a model's forward is a ModelForward of a function, or wraps one."""
    return any(is_forward_of(forward, function) for forward in forwards_of(model))


def forwards_of(model: nn.Module) -> Iterator[Forward]:
    """Yield the forward of a model, and the forwards inside, from above.

    The forward inside a wrapper is found through a ModelForward or `__wrapped__`.
    """
    forward = model.forward
    while forward is not None:
        yield forward
        inside = getattr(forward, "__func__", forward)
        place = getattr(inside, "_una_place", None)
        hidden = None if place is None else _under(getattr(forward, "__self__", model), place)
        forward = getattr(inside, "__wrapped__", hidden)


def is_forward_of(forward: Forward, function: Forward) -> bool:
    """Return whether a forward is a ModelForward of a function, and no wrapper around one.

    A wrapper by functools.wraps has our attributes, and `__wrapped__` beside them.
    """
    inside = getattr(forward, "__func__", forward)
    is_ours = getattr(inside, "_una_function", None) is function
    return is_ours and not hasattr(inside, "__wrapped__")


def take_off(model: nn.Module) -> None:
    """Give a model the forward under its forward, a ModelForward."""
    place = getattr(model.forward, "__func__", model.forward)._una_place
    under = model._una_under[place]
    del model._una_under[place:]
    if not model._una_under:
        del model._una_under
    del model.forward
    if under is not None:
        model.forward = under


def _under(model: nn.Module, place: int) -> Forward:
    """Return the forward under the ModelForward of a place; without one, that of the class."""
    under = model._una_under[place]
    # torch.compile looks into a partial function, and not into a method made in a call.
    return functools.partial(type(model).forward, model) if under is None else under


def install_scorer(causal_lm: PreTrainedModel) -> None:
    """Let a model's forward end in a scorer: `causal_lm(input_ids=..., scorer=fn, rows=rows)`.

    The forward then returns fn(hidden rows [N, D], head weight, head bias), `rows` being [N] int64
    indices into the flattened [B * T] positions. Without `scorer` the model's own forward runs.
    Idempotent; survives copy.deepcopy and fully_shard.
    """
    if runs_function(causal_lm, _forward_to_scorer):
        return
    causal_lm.forward = ModelForward(causal_lm, _forward_to_scorer)


def _forward_to_scorer(
    causal_lm: PreTrainedModel,
    under: Forward,
    *args: Any,
    scorer: Scorer | None = None,
    rows: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if scorer is None:
        return under(*args, **kwargs)
    chosen = select_rows(hidden_states(causal_lm, **kwargs), rows)
    return call_head(causal_lm.get_output_embeddings(), chosen, scorer)
