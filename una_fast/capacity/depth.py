"""Which layers of a model tell about all: kinds of layers, and how the kinds repeat.

Layers of one kind have the same modules, with the same shapes and settings. Kinds are read from the
model as built, on no memory, and not from the config: a list of layer types, dense layers in front
of experts, and windows in five layers of six are all seen.

    kinds     a b b b b b b b      from the second layer on the kinds repeat, with a period of 1
    traced    a b b b b            the first layers; as many as keep the kinds at the end
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from una_fast.model.activations import decoder_layers
from una_fast.model.head_probe import text_modules

Kind = tuple[Any, ...]
"""Modules, settings and shapes of a layer."""

ATTEMPTS = 3
"""Numbers of layers to try before all are traced."""


@dataclass(frozen=True)
class Depth:
    """The kinds of a model's layers, and the numbers of layers whose trace may tell about all."""

    kinds: list[Kind]
    """Kind of every layer."""
    root: Kind
    """Shapes of the tensors outside the layers."""
    period: int
    """Layers until the kinds repeat."""
    tries: tuple[int, ...]
    """Numbers of layers to trace, until one does; ascending. Empty: only all layers do."""

    @property
    def total(self) -> int:
        """Return the number of layers."""
        return len(self.kinds)

    def begins_as(self, shallow: PreTrainedModel) -> bool:
        """Return whether a shallower model has the first layers of this one, and all the rest."""
        kinds, root = kinds_of(shallow)
        return root == self.root and kinds == self.kinds[: len(kinds)]


def depth_of(model: PreTrainedModel, further: int = 0) -> Depth:
    """Return the kinds of a model's layers, and the numbers of layers to trace.

    model: without numbers
    further: layers that work of a layer reaches beyond the next one: weights gathered ahead
    """
    kinds, root = kinds_of(model)
    total = len(kinds)
    best = total
    best_period = 1
    for period in range(1, total // 3):
        least = _fewest(kinds, period, further)
        if least < best:
            best, best_period = least, period
    tries = tuple(range(best, total, best_period))[:ATTEMPTS]
    return Depth(kinds, root, best_period, tries)


def _fewest(kinds: list[Kind], period: int, further: int) -> int:
    """Return the fewest layers to trace, if the kinds of a model's layers repeat with a period.

    Those are the layers before the kinds repeat, the first period, which makes what layers of a
    kind share, two periods to compare, the last two layers, and those that work reaches further.
    """
    before = len(kinds) - period
    while before and kinds[before - 1] == kinds[before - 1 + period]:
        before -= 1
    least = before + 3 * period + 2 + further
    # The last traced layer is of the kind of the model's last layer.
    return least + (len(kinds) - least) % period


def kinds_of(model: PreTrainedModel) -> tuple[list[Kind], Kind]:
    """Return the kinds of a model's layers, and the shapes of the tensors outside the layers.

    Counters of layers, as layer_idx, have no part in a kind.
    """
    layers = text_layers(model)
    settings = [_settings(layer) for layer in layers]
    counters = _counters(settings)
    kinds: list[Kind] = []
    inside: set[int] = set()
    for layer, found in zip(layers, settings, strict=True):
        kept = tuple((key, value) for key, value in found.items() if key not in counters)
        tensors = {id(x) for _, x in _named_tensors(layer)}
        # A layer with a weight of another layer is of no other layer's kind.
        shared = len(kinds) if tensors & inside else None
        kinds.append((kept, _shapes(_named_tensors(layer)), shared))
        inside |= tensors
    outside = [(name, x) for name, x in _named_tensors(model) if id(x) not in inside]
    return kinds, _shapes(outside)


def text_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers that text runs through."""
    inside = text_modules(causal_lm)
    return [layer for layer in decoder_layers(causal_lm) if layer in inside]


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the type and the plain attributes of every module in a layer.

    Floating-point numbers, as scales, change no shape.
    """
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, ""] = type(module)
        for attribute, value in vars(module).items():
            if value is None or isinstance(value, int | str):
                found[name, attribute] = value
    return found


def _counters(settings: list[dict[tuple[str, str], Any]]) -> set[tuple[str, str]]:
    """Return the keys of the attributes that count the layers: one more from layer to layer."""
    found = set()
    for key, first in settings[0].items() if len(settings) > 1 else ():
        if isinstance(first, int) and not isinstance(first, bool):
            values = [other.get(key) for other in settings]
            if values == list(range(first, first + len(settings))):
                found.add(key)
    return found


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> Kind:
    return tuple((name, tuple(x.shape), x.requires_grad) for name, x in tensors)


def repeated(
    model: nn.Module,
    layers: list[nn.Module],
    source: list[int],
    tensors_of: Callable[[nn.Module], Iterable[Tensor]],
) -> list[Tensor]:
    """Return the tensors of a deep model: those of a shallow one, as often as layers repeat.

    model: the shallow model, with or without adapters
    layers: of the shallow model
    source: traced layer of each layer of the deep model
    tensors_of: returns tensors of a module
    """
    by_layer = [list(tensors_of(layer)) for layer in layers]
    inside = set(map(id, itertools.chain.from_iterable(by_layer)))
    found = [x for x in tensors_of(model) if id(x) not in inside]
    for k in source:
        found += by_layer[k]
    return found
