"""Load a tokenizer, a causal language model, an adapter directory; without dropout."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from una_fast.logs import say_once
from una_fast.model.head_probe import is_number

logger = logging.getLogger(__name__)

_DROPOUT_NAME = re.compile(r"dropout|pdrop|drop_path|drop_rate|layerdrop|jitter")


def load_tokenizer(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub name.

    Without a pad token, eos pads (lengths, not ids, mark padding). ValueError for a directory that
    does not exist and for a tokenizer without an end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        _find(path, "tokenizer"), trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} has no eos token, and every response must end with one; set "
            "eos_token in its tokenizer_config.json to a token of its vocabulary"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        message = (
            f"the tokenizer of {path} has no pad token; its eos token {tokenizer.eos_token!r} pads"
        )
        say_once(logging.INFO, message, logger)
    return tokenizer


def _find(path: str | os.PathLike[str], kind: str) -> str:
    """Return the absolute path of a local directory, or a hub name as given.

    path: a directory or a hub name
    kind: kind of the content, for the message

    ValueError for a local path without a directory.
    """
    text = str(path)
    expanded = Path(text).expanduser()
    if expanded.is_dir():
        return str(expanded.resolve())
    looks_local = expanded.is_absolute() or text.startswith(("./", "../", "~"))
    if looks_local or Path(expanded.parts[0]).exists():
        raise ValueError(
            f"{kind} directory {text} does not exist; give a directory in Hugging Face form "
            "(config.json, tokenizer files, *.safetensors), or a hub name such as org/name"
        )
    return text


def model_and_adapter(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return the model of a path, and the path itself if it is a PEFT adapter directory."""
    path = _find(path, "model")
    if not (Path(path) / "adapter_config.json").is_file():
        return path, None
    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        raise ValueError(
            f"{path} holds a {config.peft_type} adapter; adapters inside the layers (LoRA) are "
            "allowed"
        )
    kind = f"{path}/adapter_config.json: base_model_name_or_path, model"
    return _find(config.base_model_name_or_path, kind), path


def outline(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a causal language model on the meta device: all shapes, and no numbers.

    config: config of the model
    dtype: dtype of the weights
    attn_implementation: attention of transformers; flash kernels need not be installed
    trust_remote_code: run model code that comes with the config
    """

    def build(attention: str | None) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )

    if not is_flash(attn_implementation):
        return build(attn_implementation)
    try:
        return build("sdpa")  # keeps as much for backward as a flash kernel
    except ValueError:
        # A model without SDPA: its shapes under SDPA are right, and shapes alone matter here.
        model = build("eager")
        for part in (model.config, model.get_decoder().config):
            part._attn_implementation_internal = "sdpa"
        return model


def is_flash(attn_implementation: str | None) -> bool:
    """Return whether an attention of transformers is a flash kernel."""
    return attn_implementation is not None and "flash" in attn_implementation


def load_causal_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model without dropout.

    path: model directory, hub name, or PEFT adapter directory (the base is loaded, and the adapter
        is trainable)
    dtype: dtype of the weights; adapters are float32
    trust_remote_code: run model code that comes with the weights
    attn_implementation: attention of transformers; default: the model's

    ValueError for a directory that does not exist, for weights missing in the files (transformers
    would fill in random numbers), and for adapters that are not inside the layers (prompt tuning
    and the like).
    """
    path, adapter = model_and_adapter(path)
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    _refuse_missing(path, sorted(found["missing_keys"]))
    if adapter is not None:
        model = _load_adapter(model, adapter)
    remove_dropout(model)
    return model


def _load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Add a trainable PEFT adapter; ValueError for missing weights, which peft only warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, path, is_trainable=True)
        except UserWarning as warning:
            _refuse_missing(path, [str(warning).partition(":")[2].strip()])
            raise


def _refuse_missing(path: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{path} lacks weights: {', '.join(names[:3])[:200]}{more}; they would be random "
            "numbers. Give a complete model, or one whose class matches config.json"
        )


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout (and router jitter) of a model to 0.

    The implicit reward compares two deterministic log-probs.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    configs |= {id(c): c for c in getattr(model, "peft_config", {}).values()}
    for holder in (*modules, *configs.values()):
        for name, value in list(vars(holder).items()):
            if _DROPOUT_NAME.search(name) and is_number(value):
                setattr(holder, name, type(value)(0))
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
