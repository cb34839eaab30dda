"""Load a tokenizer, a causal language model, an adapter directory; without dropout."""

from __future__ import annotations

import functools
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

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

from una_fast.model.head_probe import is_number

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)


_DROPOUT_NAME = re.compile(r"dropout|pdrop|drop_path|drop_rate|layerdrop|jitter")


# --- loading ---------------------------------------------------------------------------------------------------------


def _resolve(path: str | os.PathLike[str], what: str) -> str:
    """The absolute path of a local directory, or the hub name as given. A local path must be a directory."""
    text = str(path)
    expanded = Path(text).expanduser()
    if expanded.is_dir():
        return str(expanded.resolve())
    if (
        expanded.is_absolute()
        or text.startswith(("./", "../", "~"))
        or Path(expanded.parts[0]).exists()
    ):
        raise ValueError(
            f"{what} directory {text} does not exist; give a directory in Hugging Face form (config.json, tokenizer "
            "files, *.safetensors), or a hub name such as org/name"
        )
    return text


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def load_tokenizer(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name. Without a pad token, eos pads (lengths, not ids, mark padding).

    Raises ValueError for a directory that does not exist and for a tokenizer without an end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        _resolve(path, "tokenizer"), trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} has no eos token, and every response must end with one; set eos_token in its "
            "tokenizer_config.json to a token of its vocabulary"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        _log_once(
            f"the tokenizer of {path} has no pad token; its eos token {tokenizer.eos_token!r} pads"
        )
    return tokenizer


def model_and_adapter(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """(the model, the PEFT adapter directory that is on it, if `path` is one)."""
    path = _resolve(path, "model")
    if not (Path(path) / "adapter_config.json").is_file():
        return path, None
    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        raise ValueError(
            f"{path} holds a {config.peft_type} adapter; adapters inside the layers (LoRA) are allowed"
        )
    return _resolve(
        config.base_model_name_or_path,
        f"{path}/adapter_config.json: base_model_name_or_path, model",
    ), path


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
    if attn_implementation is not None and "flash" in attn_implementation:
        attn_implementation = "sdpa"  # keeps as much for backward
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )


def load_causal_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel | PeftModel:
    """A causal language model without dropout, or, from a PEFT adapter directory, its base with the adapter trainable.

    Raises ValueError for a directory that does not exist and for adapters that are not inside the layers (prompt
    tuning and the like).
    """
    path, adapter = model_and_adapter(path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    remove_dropout(model)
    return model


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout (and router jitter) to 0: the implicit reward compares two deterministic log-probs."""
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    configs |= {id(c): c for c in getattr(model, "peft_config", {}).values()}
    for holder in (*modules, *configs.values()):
        for name, value in list(vars(holder).items()):
            if _DROPOUT_NAME.search(name) and is_number(value):
                setattr(holder, name, type(value)(0))
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
