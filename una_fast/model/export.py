"""Save a policy in Hugging Face form, or merged with its adapter.

A model comes out as it came in: the files of its tokenizer byte by byte, the settings of its
generation with the end of turn that it was trained on, and its weights, in a final model, in the
dtypes of its own files.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from una_fast.data.encode import text_after_answer
from una_fast.model.base_form import write_base_form
from una_fast.model.four_bits import Nf4Linear, packed_layers
from una_fast.model.loading import is_finite, set_padding
from una_fast.model.policy import Policy
from una_fast.model.quantized import is_plain
from una_fast.printable import printable

_PEFT_PREFIX = "base_model.model."
_GENERATION = "generation_config.json"

# Files of a tokenizer beside those that its class names.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_TEMPLATES = "additional_chat_templates"


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
    *,
    final: bool = False,
) -> None:
    """Write model and tokenizer so that AutoModelForCausalLM.from_pretrained(directory) works.

    policy: the model; of LoRA the adapter is written
    directory: receives safetensors, config.json and the tokenizer's files
    tokenizer: tokenizer of the model
    state_dict: full tensors under the names of policy.model.state_dict() (sharded runs gather
        them); default: the live weights
    final: the result of a run, in the dtypes of policy.stored; default: weights as they are, to
        go on from

    ValueError, by the name, for a weight that is not finite: nothing is written.
    """
    state_dict = dict(policy.model.state_dict() if state_dict is None else state_dict)
    refuse_diverged(state_dict)
    stored = policy.stored if final else None
    directory = Path(directory)
    if isinstance(policy.model, PeftModel):
        _save_adapter(policy, directory, state_dict, stored)
        save_tokenizer(tokenizer, directory)
    else:
        _save_whole(policy, directory, tokenizer, state_dict, stored)


def save_merged(
    policy: Policy, directory: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write whole weights with the adapter added in, in the dtypes of policy.stored.

    policy: the model and its adapter
    directory: receives safetensors, config.json and the tokenizer's files
    tokenizer: tokenizer of the model

    ValueError, by the name, for a weight that is not finite, and for adapters other than LoRA.
    """
    state_dict = whole_weights(policy)
    refuse_diverged(state_dict)
    _save_whole(policy, Path(directory), tokenizer, state_dict, policy.stored)


def refuse_diverged(state_dict: dict[str, Tensor]) -> None:
    """Raise ValueError, by the name, for a weight with NaN or infinity."""
    for name, tensor in state_dict.items():
        if not is_finite(tensor):
            raise ValueError(
                f"the weight {printable(name)} has numbers that are not finite, and is not saved; "
                "go on from the last checkpoint with a lower learning_rate"
            )


def _save_adapter(
    policy: Policy, directory: Path, state_dict: dict[str, Tensor], stored: Any
) -> None:
    """Write an adapter, without peft's card of empty fields."""
    if stored is not None:
        state_dict = stored.adapter.cast_all(state_dict)
    model = _view(policy.model)
    model.create_or_update_model_card = lambda *_, **__: None
    model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
    write_base_form(policy.model, directory)


def _save_whole(
    policy: Policy,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor],
    stored: Any,
) -> None:
    """Write whole weights, the config, the settings of generation and the tokenizer."""
    if stored is not None:
        state_dict = stored.base.cast_all(state_dict)
    dtype = usual_dtype(state_dict)
    model = without_settings(policy.causal_lm)
    model.save_pretrained(directory, state_dict=dict(state_dict))  # transformers empties the dict
    save_settings(policy, directory, tokenizer, dtype)


def without_settings(causal_lm: PreTrainedModel) -> Any:
    """Return a view of a model without settings of generation, to be saved.

    Settings that transformers warns of when it reads them are refused when it writes them, at the
    end of a run.
    """
    model = _view(causal_lm)
    model.generation_config = GenerationConfig()
    return model


def save_settings(
    policy: Policy, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write the settings of generation and the tokenizer, and the dtype into a written config.

    policy: the model
    directory: has config.json
    tokenizer: tokenizer of the model
    dtype: as a config names it
    """
    _edit(directory / "config.json", dtype=dtype)
    settings = _generation_settings(policy.causal_lm.generation_config, tokenizer)
    (directory / _GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)


def _view(model: nn.Module) -> Any:
    """Return a second object over a model's modules, whose attributes may be set.

    A thread may save while the model is trained. copy.copy would build a sharded model anew.
    """
    view = object.__new__(next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule)))
    view.__dict__ = dict(vars(model))
    return view


def usual_dtype(state_dict: dict[str, Tensor]) -> str:
    """Return the dtype of most numbers, as a config names it."""
    sizes: dict[str, int] = {}
    for tensor in state_dict.values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=sizes.get)


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes, indent=2) + "\n", encoding="utf-8")


# ---- generation --------------------------------------------------------------------------------


def _generation_settings(
    config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the settings of generation as they came, with the end of turn among the stops."""
    config = config or GenerationConfig()
    settings = json.loads(config.to_json_string())
    settings.pop("_from_model_config", None)  # or else the stops are taken from config.json
    before = config.eos_token_id
    stops = [] if before is None else before if isinstance(before, list) else [before]
    for end in (tokenizer.eos_token_id, end_of_turn(tokenizer)):
        if end is not None and end not in stops:
            stops = [*stops, end]
    settings["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return settings


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an answer in the chat template; None if it is not one token."""
    if not tokenizer.chat_template:
        return None
    try:
        end, _ = text_after_answer(tokenizer, [{"role": "user", "content": "una-question"}])
    except Exception:  # a template may refuse anything; chats were not trained on then
        return None
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return ids[0] if len(ids) == 1 else None


# ---- tokenizer ---------------------------------------------------------------------------------


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer as it came: its files byte by byte, or without the pad that a run set."""
    source = Path(tokenizer.name_or_path or os.devnull)
    if not (source / "tokenizer_config.json").is_file():
        original = copy.deepcopy(tokenizer)
        set_padding(original, None)
        original.save_pretrained(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name in {*_TOKENIZER_FILES, *tokenizer.vocab_files_names.values(), *_own_code(source)}:
        if (source / name).is_file():
            _copy(source / name, directory / name)
    for template in (source / _TEMPLATES).glob("*.jinja"):
        (directory / _TEMPLATES).mkdir(exist_ok=True)
        _copy(template, directory / _TEMPLATES / template.name)


def _own_code(source: Path) -> set[str]:
    """Return the Python files beside a tokenizer that its auto_map names, and those they import."""
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    classes = config.get("auto_map") or {}
    classes = list(classes.values()) if isinstance(classes, dict) else [classes]
    files = set()
    for named in classes:
        for name in named if isinstance(named, list) else [named]:
            module = str(name).partition(".")[0]  # "org/name--module.Class" has no file here
            file = source / f"{module}.py"
            if module.isidentifier() and file.is_file():
                files |= {file.name, *(Path(f).name for f in get_relative_import_files(file))}
    return files


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and source.samefile(target)):
        shutil.copyfile(source, target)


# ---- merging -----------------------------------------------------------------------------------


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """Return the live weights under the model's own names, with adapters added in."""
    state_dict = dict(policy.model.state_dict())
    for name, layer in packed_layers(policy.model):
        state_dict[f"{name}.weight"] = layer.unpacked()
    if isinstance(policy.model, PeftModel):
        return _merge(policy, state_dict)
    return state_dict


def _merge(policy: Policy, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return W + scaling * B A under the model's own names, added in float32.

    peft's merge would change the live weights, and taking the merge back would round the weights.
    """
    merged = {
        name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state_dict.items()
        if ".lora_" not in name
    }
    for name, layer in policy.causal_lm.named_modules():
        _check_mergeable(name, layer)
        if not isinstance(layer, LoraLinear):
            continue
        for adapter in layer.active_adapters:
            prefix = f"{_PEFT_PREFIX}{name}"
            a = state_dict[f"{prefix}.lora_A.{adapter}.weight"].float()  # [r, D_in]
            b = state_dict[f"{prefix}.lora_B.{adapter}.weight"].float()  # [D_out, r]
            delta = layer.scaling[adapter] * (b @ a)
            if layer.fan_in_fan_out:
                delta = delta.T
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return merged


def _check_mergeable(name: str, layer: nn.Module) -> None:
    """Check that a module is plain LoRA or no adapter; ValueError by the module's name."""
    is_adapter = isinstance(layer, BaseTunerLayer)
    is_plain_lora = isinstance(layer, LoraLinear) and not layer.lora_variant
    if isinstance(layer, AuxiliaryTrainingWrapper) or (is_adapter and not is_plain_lora):
        raise ValueError(
            f"{name} is a {type(layer).__name__}; only plain LoRA on linear layers is merged"
        )
    is_ours = is_plain_lora and isinstance(layer.base_layer, Nf4Linear)
    if is_plain_lora and not is_ours and not is_plain(layer.base_layer.weight):
        raise ValueError(f"{name} is quantized; only adapters on plain weights are merged")
