"""Load a model into shards: every rank reads its own rows of the weights, and no others.

    load_unread    config -> model on the meta device, and the place of every weight in the files
    shard          (distributed.py) FSDP2 on the meta device: every rank knows its rows
    read_shards    memory for the rows of this rank, and the rows from the files

A rank holds one shard, and `ROWS_AT_ONCE` bytes on the way from a file. transformers builds the
model and names the weights, from the headers of the files; missing, unexpected and misshapen
weights are refused as for whole models. Weights computed from several stored ones, such as fused
experts, have no rows in the files: such a model is loaded whole, as are GGUF files and quantized
weights. `NotInShards` says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import revert_weight_conversion

from una_fast.distributed import World, allocate_shards, home_of_shards, local_rows
from una_fast.model.base_form import form_to_pack
from una_fast.model.directory import (
    ModelError,
    StoredTensor,
    adapter_file,
    reading,
    stored_tensors,
)
from una_fast.model.dropout import remove_dropout
from una_fast.model.four_bits import Nf4Linear, pack_base, packed_layers
from una_fast.model.gguf import is_gguf
from una_fast.model.loading import (
    is_finite,
    load_adapter,
    load_base,
    load_config,
    model_and_adapter,
    refuse_non_finite,
)
from una_fast.parallel import ParallelOptions
from una_fast.printable import printable

ROWS_AT_ONCE = 2**26  # bytes read from a file at once

_BASE_PREFIX = "base_model.model."  # of the names of peft

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class NotInShards(Exception):
    """The reason to load a model whole, in words."""


@dataclass(frozen=True)
class Source:
    """The place of a weight: a safetensors file, and the name in the file."""

    file: str
    name: str


@dataclass(frozen=True)
class Unread:
    """Weights still to be read from files.

    path: of the model, for messages
    sources: name in the model, without adapter -> place
    """

    path: str
    sources: Mapping[str, Source]


def load_unread(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    base: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantize_base: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, Unread]:
    """Build a model without numbers: weights on the meta device, buffers and adapter on the host.

    path, dtype, base, trust_remote_code, attn_implementation, quantize_base: as for
        `load_causal_lm`

    ValueError as of `load_causal_lm`, but for weights with NaN or infinity: `read_shards` refuses
    those. NotInShards for a model without rows in the files.
    """
    base, adapter = model_and_adapter(path, base)
    if is_gguf(base):
        raise NotInShards("the weights of a GGUF file are converted")
    config = load_config(base, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise NotInShards("the weights are quantized")
    if adapter is not None:
        _check_plain(adapter)
    options = {
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }
    packed_from = form_to_pack(adapter, quantize_base, dtype)
    model, sources = _outline(base, adapter, dtype, options)
    if packed_from is not None:
        pack_base(model, printable(path), packed_from)
    if adapter is not None:
        with stand_ins(model):
            model = load_adapter(model, adapter)
    check_unread(model, sources)
    refuse_non_finite(model.named_parameters(), printable(path))
    remove_dropout(model)
    return model, Unread(str(path), sources)


def _outline(
    base: str, adapter: str | None, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Source]]:
    """Build the base model without the numbers of its weights; return places of the weights, too.

    base, adapter, dtype, options: as for `load_base`
    """
    try:
        with _headers_alone() as places:
            everything = {"": torch.device("meta")}
            model = load_base(base, adapter, dtype, options, device_map=everything)
        sources = _sources(model, places)
        with reading(base, "model"):
            _tie_equal(model, sources)
            _compute_buffers(model)
            _read_buffers(model, sources)
    except ModelError as error:
        # What model code raises without numbers says nothing about the model.
        if error.__cause__ is not None:
            raise NotInShards(str(error)) from error
        raise
    return model, sources


def check_unread(model: nn.Module, sources: Mapping[str, Source]) -> None:
    """Check the places of all weights without numbers; NotInShards by the name of a weight."""
    for names in _names_of_parameters(model).values():
        parameter = model.get_parameter(names[0])
        found = [name for name in names if base_name(name) in sources]
        if parameter.is_meta and not found:
            raise NotInShards(f"{printable(names[0])} is not stored as it is computed with")


def base_name(name: str) -> str:
    """Return the name of a weight in the model without its adapter."""
    return name.removeprefix(_BASE_PREFIX).replace(".base_layer.", ".")


# ---- the model, from the headers of its files --------------------------------------------------


class _Header:
    """Dtype and shape of a stored tensor."""

    def __init__(self, piece: Any) -> None:
        self.shape, self.dtype = piece.get_shape(), piece.get_dtype()

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")[index]


@contextmanager
def _headers_alone() -> Iterator[dict[str, Source]]:
    """Let transformers see the headers of safetensors files, and no numbers, inside the block.

    Yields name of every tensor -> place, filled while a model is loaded.
    """
    places: dict[str, Source] = {}

    class Headers:
        """A safetensors file without numbers."""

        def __init__(self, file: str, **_: Any) -> None:
            self.opened = safe_open(file, "pt")
            self.file = str(file)

        def __enter__(self) -> Headers:
            return self

        def __exit__(self, *exception: object) -> None:
            self.opened.__exit__(*exception)

        def keys(self) -> list[str]:
            return list(self.opened.keys())

        def metadata(self) -> dict[str, str] | None:
            return self.opened.metadata()

        def get_slice(self, name: str) -> _Header:
            header = _Header(self.opened.get_slice(name))
            if header.dtype not in _DTYPES:
                raise NotInShards(f"{printable(name)} is stored as {header.dtype}")
            places[name] = Source(self.file, name)
            return header

    whole = modeling_utils.safe_open
    modeling_utils.safe_open = Headers
    try:
        yield places
    finally:
        modeling_utils.safe_open = whole


def _sources(model: PreTrainedModel, places: Mapping[str, Source]) -> dict[str, Source]:
    """Return the places of weights and saved buffers, less converted ones.

    model: on the meta device
    places: name in the files -> place
    """
    tensors = model.state_dict()  # a tensor for every name, also of tied weights
    names = {id(tensor): name for name, tensor in tensors.items()}
    sources = {}
    for stored, tensor in revert_weight_conversion(model, dict(tensors)).items():
        # What a conversion has computed is another tensor.
        if id(tensor) in names and stored in places:
            sources[names[id(tensor)]] = places[stored]
    return sources


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter, by identity: tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _tie_equal(model: PreTrainedModel, sources: Mapping[str, Source]) -> None:
    """Tie equal weights stored twice, as transformers does with the numbers at hand.

    model: on the meta device; the config names the ties
    sources: places of the weights
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in tied.items():
        if target not in sources or source not in sources:
            continue
        if model.get_parameter(target) is model.get_parameter(source):
            continue
        if _are_equal(sources[target], sources[source]):
            parent, _, name = target.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_parameter(source))
        else:
            model.all_tied_weights_keys.pop(target)


def _are_equal(one: Source, two: Source) -> bool:
    """Return whether two stored tensors have the same numbers, read by rows."""
    with safe_open(one.file, "pt") as first, safe_open(two.file, "pt") as second:
        ours, theirs = first.get_slice(one.name), second.get_slice(two.name)
        if ours.get_shape() != theirs.get_shape():
            return False
        rows = ours.get_shape()[0]
        for start, stop in _portions(rows, ours):
            if not torch.equal(ours[start:stop], theirs[start:stop]):
                return False
    return True


def _portions(rows: int, piece: Any) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of a stored tensor of about ROWS_AT_ONCE bytes."""
    stored = StoredTensor(piece.get_dtype(), tuple(piece.get_shape()))
    row = _DTYPES[stored.dtype].itemsize * stored.numel // max(stored.shape[0], 1)
    step = max(ROWS_AT_ONCE // max(row, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


# ---- buffers -----------------------------------------------------------------------------------


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers outside the files, such as rotary frequencies, on the host."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    computed = False
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                module._is_hf_initialized = False
                computed = True
    if computed:
        model.initialize_weights()


@torch.no_grad()
def _read_buffers(model: PreTrainedModel, sources: Mapping[str, Source]) -> None:
    """Read saved buffers whole; NotInShards by the name of a buffer without a place."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name not in sources:
                raise NotInShards(f"the buffer {printable(full_name)} is not stored as it is")
            source = sources[full_name]
            with safe_open(source.file, "pt") as opened:
                module._buffers[name] = opened.get_tensor(source.name).to(buffer.dtype)


# ---- adapters ----------------------------------------------------------------------------------


def _check_plain(adapter: str) -> None:
    """Refuse an adapter of more than low-rank factors; NotInShards."""
    with reading(adapter, "adapter"):
        config = PeftConfig.from_pretrained(adapter)
    stored = stored_tensors([adapter_file(Path(adapter))])
    if getattr(config, "init_lora_weights", None) not in (True, False, "gaussian"):
        raise NotInShards("its adapter is computed from the weights")
    if not all(".lora_" in name for name in stored):
        raise NotInShards("its adapter brings weights of the model")


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Put a single number on the host in the place of every weight on the meta device, in a block.

    model: has the weights back after the block, with the flags set in the block

    peft makes adapters on the device of the weights: on the meta device, without numbers.
    NotInShards if the block has copied a weight.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                made[parameter] = nn.Parameter(number, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
            places.append((module, name, parameter))
    yield
    for module, name, parameter in places:
        parameter.requires_grad_(module._parameters[name].requires_grad)
        module._parameters[name] = parameter
    for name, parameter in model.named_parameters():
        has_numbers = parameter.is_meta or parameter.is_contiguous()
        if not has_numbers:
            raise NotInShards(f"{printable(name)} is a copy of a weight")


# ---- numbers -----------------------------------------------------------------------------------


def read_shards(
    causal_lm: PreTrainedModel,
    unread: Unread,
    world: World,
    parallel: ParallelOptions | None = None,
) -> None:
    """Give every rank the rows of its shards, from the files.

    causal_lm: sharded on the meta device; adapters and buffers have their numbers
    unread: places of the weights
    world: the ranks; all of them must call
    parallel: settings of the run

    ModelError on every rank, by the name of a weight with NaN or infinity, or by a file unreadable
    on one rank.
    """
    parameters = allocate_shards(causal_lm, home_of_shards(world, parallel))
    fault = None
    try:
        with reading(unread.path, "model"):
            _read(parameters, unread, dict(packed_layers(causal_lm)))
    except ModelError as error:
        fault = str(error)
    faults = [text for text in world.gather(fault) if text is not None]
    if faults:
        raise ModelError(faults[0])


@torch.no_grad()
def _read(
    parameters: Mapping[str, DTensor], unread: Unread, packed: Mapping[str, Nf4Linear]
) -> None:
    """Fill shards from the files, weight by weight.

    parameters: name -> sharded parameter; tied parameters have several names
    unread: places of the weights
    packed: name -> layer with a weight at 4 bits, whose rows are packed portion by portion
    """
    done: set[int] = set()
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, parameter in parameters.items():
            source = unread.sources.get(base_name(name))
            if source is None or id(parameter) in done:
                continue
            done.add(id(parameter))
            if source.file not in files:
                files[source.file] = stack.enter_context(safe_open(source.file, "pt"))
            local, first = local_rows(parameter)
            piece = files[source.file].get_slice(source.name)
            layer = packed.get(name.removesuffix(".weight"))
            for start, stop in _portions(len(local), piece):
                rows = piece[first + start : first + stop]
                if layer is not None:  # of packed rows nobody sees whether they were finite
                    refuse_non_finite([(base_name(name), rows)], printable(unread.path))
                    rows = layer.pack(rows)
                local[start:stop].copy_(rows)
            if not is_finite(local):
                refuse_non_finite([(base_name(name), local)], printable(unread.path))
    assert done == set(map(id, parameters.values())), "a weight without numbers"
