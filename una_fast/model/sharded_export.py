"""Save a sharded model in Hugging Face form: every rank writes some of the weight files.

    gather_part    weights of FILE_BYTES a file, and files by turns to the ranks; a weight at a time
                   is gathered, and kept by the rank of the file
    save_part      the files of this rank; on the main rank also index, config and tokenizer

A rank holds a share of the model, and a weight on the way. A model of a single file is gathered and
written by the main rank, as is a model with weights to be converted for the files: `gather_part`
returns None.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from una_fast.distributed import World, reshard
from una_fast.model.directory import INDEX, WEIGHTS
from una_fast.model.export import refuse_diverged, save_settings, usual_dtype, without_settings
from una_fast.model.policy import Policy

FILE_BYTES = 5 * 10**9  # of weights in a file

_ASIDE = "settings.tmp"


@dataclass(frozen=True)
class Part:
    """The weights in the files of a rank.

    tensors: name in the files -> whole weight, on the host
    files: name in the files -> file, of all weights
    own: files of this rank
    nbytes: of all weights
    """

    tensors: dict[str, Tensor]
    files: dict[str, str]
    own: set[str]
    nbytes: int

    @property
    def others(self) -> set[str]:
        """Return the files of other ranks."""
        return set(self.files.values()) - self.own


@torch.no_grad()
def gather_part(policy: Policy, world: World) -> Part | None:
    """Gather the weights in the files of this rank.

    policy: sharded
    world: the ranks; all of them must call

    None for a model for the main rank to write: of one file, converted, or an adapter.
    """
    if policy.is_adapter:
        return None
    reshard(policy.causal_lm)
    shards = _saved(policy.causal_lm)
    if shards is None:
        return None
    groups = _groups({name: tensor.nbytes for name, tensor in shards.items()})
    if len(groups) == 1:
        return None
    files: dict[str, str] = {}
    own: set[str] = set()
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        files |= dict.fromkeys(group, file)
        if number % world.size == world.rank:
            own.add(file)
    tensors = {}
    for name, tensor in shards.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        if files[name] in own:
            tensors[name] = whole.cpu()
    return Part(tensors, files, own, sum(tensor.nbytes for tensor in shards.values()))


def _saved(causal_lm: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return name in the files -> weight or buffer, live, tied ones once; None where converted."""
    tensors = dict(causal_lm.state_dict())
    names: dict[int, list[str]] = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    targets = set(getattr(causal_lm, "all_tied_weights_keys", None) or ())
    for tied in names.values():
        kept = next((name for name in tied if name not in targets), tied[0])
        for name in tied:
            if name != kept:
                del tensors[name]
    for name in getattr(causal_lm, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    live = {id(tensor) for tensor in tensors.values()}
    saved = revert_weight_conversion(causal_lm, dict(tensors))
    if {id(tensor) for tensor in saved.values()} != live:
        return None
    return saved


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names of weights by file, in order.

    sizes: name -> bytes; a weight larger than a file has a file alone
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def save_part(
    policy: Policy,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    world: World,
    *,
    final: bool = False,
) -> None:
    """Write the files of this rank: together the files of all ranks are a model.

    policy: the sharded model
    directory: exists; the files of all ranks
    tokenizer: of the model
    part: of this rank; the tensors are let go when they are written
    world: the ranks
    final: the result of a run, in the dtypes of policy.stored

    ValueError, by the name, for a weight with NaN or infinity.
    """
    refuse_diverged(part.tensors)
    dtype = usual_dtype(part.tensors) if part.tensors else "float32"
    for file in sorted(part.own):
        names = [name for name in part.tensors if part.files[name] == file]
        tensors = {name: part.tensors.pop(name) for name in names}
        if final and policy.stored is not None:
            tensors = policy.stored.base.cast_all(tensors)
            dtype = usual_dtype(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if world.is_main:
        index = {"metadata": {"total_size": part.nbytes}, "weight_map": part.files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX).write_text(text, encoding="utf-8")
        _save_config(policy, directory)
        save_settings(policy, directory, tokenizer, dtype)


def _save_config(policy: Policy, directory: Path) -> None:
    """Write the config, and the code of the model's own, without weights.

    transformers removes the weight files of others from the directory: the work is done aside.
    """
    aside = directory / _ASIDE
    without_settings(policy.causal_lm).save_pretrained(aside, state_dict={})
    for path in aside.iterdir():
        if path.name != WEIGHTS:
            path.replace(directory / path.name)
    shutil.rmtree(aside)


def remove_other_weights(directory: Path, names: set[str]) -> None:
    """Remove weight files of an earlier model from a directory.

    directory: of the new model
    names: files of the new model, or of an adapter; transformers would prefer a single file of
        before to an index
    """
    if not names & {WEIGHTS, INDEX}:
        return
    for path in [
        directory / WEIGHTS,
        directory / INDEX,
        *directory.glob("model-*-of-*.safetensors"),
    ]:
        if path.name not in names:
            path.unlink(missing_ok=True)
