"""The head of a model: size and constants from the config, real hidden states from the weights.

The size and the constants need no weights: the constants are found on a small copy of the model.
Real states are states of a page of English from Python's own documentation (pydoc_data), the
reference is the same states with noise; weight and bias of the head are the model's.
"""

from __future__ import annotations

import gc
import textwrap
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

from una_fast.bench.inputs import SPREAD, Form
from una_fast.bench.machine import free_memory
from una_fast.model.directory import reading
from una_fast.model.gguf import is_gguf
from una_fast.model.head_probe import hidden_states, probe_reduced
from una_fast.model.loading import load_causal_lm, load_tokenizer, model_and_adapter, sized_outline
from una_fast.printable import bytes_in_words

CONTEXT = 64  # tokens before the first row of a response
LETTERS = 12  # of the text per wanted token, more than a tokenizer packs into a token


class ModelHead(NamedTuple):
    """The head of a model.

    name: model directory, GGUF file or hub name
    dim: D
    vocab: V
    form: softcap, logit scale, bias
    weights: numbers of the whole model
    """

    name: str
    dim: int
    vocab: int
    form: Form
    weights: int


def head_of(name: str, *, trust_remote_code: bool) -> ModelHead:
    """Return the size and the constants of a model's head, from the config alone.

    name: model directory, GGUF file, adapter directory or hub name
    trust_remote_code: run code beside the config

    ValueError for a missing model, and for logits of an unknown form.
    """
    base, _ = model_and_adapter(name)
    with reading(base, "model"):
        model = sized_outline(base, trust_remote_code=trust_remote_code)
        spec = probe_reduced(model)
    vocab, dim = spec.weight.shape
    weights = sum(p.numel() for p in model.parameters())
    form = Form(spec.softcap, spec.logit_scale, spec.bias is not None)
    return ModelHead(name, dim, vocab, form, weights)


class NoStates(Exception):
    """Real hidden states cannot be had here; the text says why."""


def refuse_states(head: ModelHead, device: torch.device, dtype: torch.dtype) -> None:
    """Raise NoStates for weights on another machine, or larger than the memory.

    head: of the model
    device, dtype: of the weights
    """
    base, _ = model_and_adapter(head.name)
    if not is_gguf(base) and not any(Path(base).glob("*.safetensors")):
        raise NoStates("the weights are not in a directory on this machine")
    # The file is read on the CPU, and whole in float32 from a GGUF file.
    on_cpu = head.weights * (4 if is_gguf(base) else dtype.itemsize)
    places = {device: head.weights * dtype.itemsize, torch.device("cpu"): on_cpu}
    for place, needed in places.items():
        free = free_memory(place)
        if needed > 0.8 * free:
            words = f"{bytes_in_words(needed)}, and {bytes_in_words(free)} are free"
            raise NoStates(f"the weights need {words} on the {place.type}")


@torch.no_grad()
def real_states(
    head: ModelHead,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
) -> dict[str, Tensor]:
    """Return states of two responses of equal length, and the head, on a device.

    head: of the model
    rows: of a response
    device, dtype: of the model
    trust_remote_code: run code beside the weights

    Keys: hidden, ref_hidden [N, D], weight, ref_weight [V, D], targets [N], perhaps bias [V].
    """
    refuse_states(head, device, dtype)
    tokenizer = load_tokenizer(head.name, trust_remote_code=trust_remote_code)
    model = load_causal_lm(head.name, dtype=dtype, trust_remote_code=trust_remote_code)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = model.to(device).eval()
    length = CONTEXT + rows
    ids = tokenizer(_text(LETTERS * 2 * length), return_tensors="pt").input_ids[0]
    if len(ids) < 2 * length:
        ids = ids.repeat(1 + 2 * length // len(ids))
    responses = ids[: 2 * length].view(2, length).to(device)
    states = [hidden_states(model, input_ids=row[None])[0] for row in responses]
    hidden = torch.cat([row[CONTEXT - 1 : -1] for row in states])
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator, device=device, dtype=torch.float32)
    size = hidden.float().square().mean().sqrt() / SPREAD
    output = model.get_output_embeddings()
    weight = output.weight.detach()
    found = {
        "hidden": hidden,
        "ref_hidden": (hidden + noise * size * rows**-0.5).to(dtype),
        "weight": weight,
        "ref_weight": weight,
        "targets": responses[:, CONTEXT:].flatten(),
    }
    if getattr(output, "bias", None) is not None:
        found["bias"] = output.bias.detach()
    del model, states
    gc.collect()  # the rest of the model has cycles
    return found


def _text(letters: int) -> str:
    """Return English text of at least so many letters, if Python has as many."""
    found = ""
    for name in sorted(topics):
        if len(found) >= letters:
            break
        found += textwrap.dedent(topics[name]) + "\n\n"
    return found
