"""Load a tokenizer, a causal language model, an adapter directory; without dropout."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils.logging import is_progress_bar_enabled

from una_fast.attention.instance import is_flash
from una_fast.data.bounded import fault_of_trial
from una_fast.logs import say_once
from una_fast.model.base_form import form_to_pack
from una_fast.model.directory import (
    ADAPTER_CONFIG,
    ModelError,
    StoredTensor,
    adapter_file,
    check_config,
    reading,
    stored_tensors,
    weight_files,
    within_budget,
)
from una_fast.model.dropout import remove_dropout
from una_fast.model.four_bits import pack_base
from una_fast.model.gguf import is_gguf, read_header
from una_fast.model.places import (
    check_place,
    element_budget,
    find,
    pretrained,
    with_revision,
)
from una_fast.model.quantized import is_plain, quantized_weight
from una_fast.printable import printable, shown

logger = logging.getLogger(__name__)

# An adapter directory with one of these has a tokenizer of its own.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")

# Weights that a causal language model of transformers may leave out: other modalities, layers that
# predict several tokens at once, and buffers that are computed from the config.
_LEFT_OUT = re.compile(
    r"(^|[._])(vision|visual|image|audio|speech|video|multi_?modal|mm|connector|projector|mtp)"
    r"([._]|$)"
    r"|(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$"
)

# Special tokens of a tokenizer, and their keys in the header of a GGUF file.
_GGUF_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

# Settings of an adapter that are, or may be, regular expressions.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_NAME = re.compile(r"[\w.-]*")  # is found at once


def load_tokenizer(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub name.

    An adapter directory without a tokenizer takes the tokenizer of its base model. Without a pad
    token, eos pads (lengths, not ids, mark padding). ValueError for a directory that does not
    exist or is damaged, and for a tokenizer without an end-of-sequence token.
    """
    found = _tokenizer_directory(find(path, "tokenizer"))
    tokenizer = read_tokenizer(found, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {printable(found)} has no eos token, and every response must end "
            "with one; set eos_token in its tokenizer_config.json to a token of its vocabulary"
        )
    if tokenizer.pad_token_id is None:
        set_padding(tokenizer, tokenizer.eos_token)
        message = (
            f"the tokenizer of {printable(found)} has no pad token; its eos token "
            f"{shown(tokenizer.eos_token)} pads"
        )
        say_once(logging.INFO, message, logger)
    return tokenizer


def read_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a directory or hub name as it is; ValueError for a damaged one."""
    check_place(path)
    name, where = pretrained(path)
    with reading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **where
        )
        tokenizer("a b")  # damage that shows in use alone
    if is_gguf(path):
        _take_special_tokens(tokenizer, read_header(path).fields)
        tokenizer.name_or_path = path  # not the directory: its files may be another model's
    return tokenizer


def _take_special_tokens(tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> None:
    """Give a tokenizer the special tokens that the header of its GGUF file names.

    tokenizer: changed in place
    fields: of the header

    transformers 5.17 takes BOS for EOS, and never adds BOS.
    """
    for name, key in _GGUF_TOKENS.items():
        number = fields.get(f"tokenizer.ggml.{key}")
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    adds_bos = fields.get("tokenizer.ggml.add_bos_token")
    if isinstance(adds_bos, bool) and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = adds_bos


def set_padding(tokenizer: PreTrainedTokenizerBase, token: str | None) -> None:
    """Let a token pad in memory; None: the tokenizer's own pad token again, as it is saved."""
    if token is not None:
        if not hasattr(tokenizer, "_una_own_pad"):
            tokenizer._una_own_pad = tokenizer.pad_token
        tokenizer.pad_token = token
    elif hasattr(tokenizer, "_una_own_pad"):
        tokenizer.pad_token = tokenizer._una_own_pad


def _tokenizer_directory(path: str) -> str:
    """Return the directory of a tokenizer: for an adapter without one, the base model's."""
    directory = Path(path)
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    if not is_adapter or any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return path
    base, _ = model_and_adapter(path)
    message = (
        f"the adapter {printable(path)} has no tokenizer; that of its base model "
        f"{printable(base)} is taken (set tokenizer to take another)"
    )
    say_once(logging.WARNING, message, logger)
    return base


def model_and_adapter(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[str, str | None]:
    """Return the model of a path, and the path itself if it is a PEFT adapter directory.

    path: model directory, hub name, or adapter directory
    base: model under an adapter directory; default: the model that the adapter names

    ValueError for a directory with damaged files (see check_directory), and for an adapter without
    a base model.
    """
    path = find(path, "model")
    check_place(path)
    if not (Path(path) / ADAPTER_CONFIG).is_file():
        return path, None
    with reading(path, "adapter"):
        config = PeftConfig.from_pretrained(path)
    where = f"{printable(path)}/{ADAPTER_CONFIG}"
    if config.is_prompt_learning:
        raise ModelError(
            f"{where}: a {printable(config.peft_type)} adapter; adapters inside the layers (LoRA) "
            "are allowed"
        )
    if getattr(config, "megatron_config", None):
        raise ModelError(f"{where}: megatron_config must be null: a run has no such layers")
    if base is not None:
        return model_and_adapter(base)[0], path
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{where}: base_model_name_or_path={shown(base)} must be a model directory or hub name"
        )
    if not Path(base).exists():  # of a copy on this machine there are no revisions
        base = with_revision(base, config.revision)
    base = find(base, f"{where}: base_model_name_or_path, model")
    check_place(base)
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ModelError(
            f"{where}: base_model_name_or_path is {printable(base)}, a directory without "
            "config.json; give the directory or hub name of the model"
        )
    return base, path


def load_config(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the config of a model directory, GGUF file or hub name; ValueError for a damaged one.

    path: as `find` returns it
    trust_remote_code: run code that comes with the config
    """
    path = str(path)
    if is_gguf(path):
        status = os.stat(path)
        return copy.deepcopy(_gguf_config(path, status.st_size, status.st_mtime_ns))
    name, where = pretrained(path)
    with reading(path, "model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)


@functools.lru_cache(maxsize=8)
def _gguf_config(path: str, size: int, changed: int) -> PreTrainedConfig:
    """Return the config in the header of a GGUF file: seconds, for the vocabulary is read too.

    path: the file
    size, changed: bytes, and time of the last change, which tell versions of the file apart
    """
    name, where = pretrained(path)
    with reading(path, "model"):
        config = AutoConfig.from_pretrained(name, **where)
    check_config(config.to_dict(), Path(path))
    config.name_or_path = path  # the directory may hold several
    vars(config).pop("_model_name_or_path", None)  # a title, in the config of no other model
    return config


def sized_outline(
    path: str,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build the outline of a model directory or hub name, and check its size.

    path: as model_and_adapter returns it
    trust_remote_code, attn_implementation: as in `outline`

    ModelError for a model that is larger than its weight files. Other exceptions of model code
    pass.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    quantized = getattr(config, "quantization_config", None) is not None
    budget = element_budget(path, quantized=quantized)
    with within_budget(path, budget):
        model = outline(
            config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    # Tables of positions and masks are computed, however large.
    computed = sum(buffer.numel() for buffer in model.buffers())
    if budget is not None and computed > max(budget, 2**30):
        raise ModelError(
            f"the config of {printable(path)} describes tables of {computed:,} numbers beside the "
            "weights; correct its number of positions"
        )
    return model


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
            return _class_for(config).from_config(
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


def _class_for(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that builds the model of a config, with a head for text.

    Most models that also read images are known under a class of their own; as a text model is
    inside, they are trained on text. ModelError for a model without such a head.
    """
    kind = type(config)
    own_code = getattr(config, "auto_map", None) or {}
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ModelError(
        f"{printable(config.name_or_path)}: transformers has no causal language model for its "
        f"config, {kind.__name__}; give a model that writes text from left to right"
    )


def load_causal_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    base: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantize_base: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model without dropout.

    path: model directory, GGUF file, hub name, or PEFT adapter directory (the base is loaded, and
        the adapter is trainable)
    dtype: dtype of the weights; adapters are float32
    base: model under an adapter directory; default: the model that the adapter names
    trust_remote_code: run model code that comes with the weights
    attn_implementation: attention of transformers; default: the model's
    quantize_base: "nf4" packs linear weights at 4 bits (four_bits.py), from the numbers that the
        adapter was trained on; default: none

    ValueError for a directory that does not exist or is damaged, for weights that are missing in
    the files, unexpected, of another shape or not finite, and for adapters that are not inside the
    layers (prompt tuning and the like). Weights are read from safetensors alone.
    """
    base, adapter = model_and_adapter(path, base)
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }
    packed_from = form_to_pack(adapter, quantize_base, dtype)
    model = load_base(base, adapter, dtype, options)
    if packed_from is not None:
        refuse_non_finite(model.named_parameters(), printable(path))
        pack_base(model, printable(path), packed_from)
    if adapter is not None:
        model = load_adapter(model, adapter)
    refuse_non_finite(model.named_parameters(), printable(path))
    remove_dropout(model)
    return model


def load_base(
    base: str,
    adapter: str | None,
    dtype: torch.dtype,
    options: dict[str, Any],
    **placing: Any,
) -> PreTrainedModel:
    """Load the model under an adapter, or alone, and check its files.

    base, adapter: as `model_and_adapter` returns them; the adapter is checked, and not loaded
    dtype: dtype of the weights
    options: trust_remote_code and attn_implementation
    placing: further keywords of transformers, such as device_map
    """
    _check_files(base, adapter, options)
    name, where = pretrained(base)
    kind = _class_for(load_config(base, trust_remote_code=options["trust_remote_code"]))
    converting = _converting() if is_gguf(base) else nullcontext()
    with reading(base, "model"), converting:
        model, found = kind.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            # Refused below, by name and shape.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **where,
            **_of_gguf(base),
            **placing,
        )
    quantized = getattr(model.config, "quantization_config", None) is not None
    _check_found(base, found, quantized=quantized)
    _drop_spent_quantization(model)
    if is_gguf(base):
        model.name_or_path = base
    return model


def _of_gguf(path: str) -> dict[str, Any]:
    """Return further keywords for the weights of a GGUF file, to become floating-point numbers.

    Left as blocks, weights could not be trained, and would be multiplied by kernels that
    transformers fetches: the numbers would depend on the machine.
    """
    if not is_gguf(path):
        return {}
    keywords: dict[str, Any] = {"config": load_config(path)}
    if hasattr(transformers, "GgufConfig"):  # or the transformers is older, and keeps no blocks
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return keywords


@contextmanager
def _converting() -> Iterator[None]:
    """Let transformers convert a GGUF file fast, and without a bar where its other bars are off.

    transformers asks for the table of all names of weights once per module: a minute for a model of
    100 layers.
    """
    import gguf

    bar, table = modeling_gguf_pytorch_utils.tqdm, gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(table)
    if not is_progress_bar_enabled():
        modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm, gguf.get_tensor_name_map = bar, table


def _check_files(path: str, adapter: str | None, options: dict[str, Any]) -> None:
    """Check a model's size, and the dtypes and the adapter in its files, before it is allocated.

    path: of the base model
    adapter: adapter directory, if any
    options: for the outline
    """
    try:
        model = sized_outline(path, **options)
    except ModelError:
        raise
    except Exception:  # model code may fail in any way without numbers; loading will say
        model = None
    if Path(path).is_dir():
        stored = stored_tensors(weight_files(Path(path)))
        if model is not None and getattr(model.config, "quantization_config", None) is None:
            _refuse_integers(path, model, stored)
    if adapter is not None:
        adapter_file(Path(adapter))
        if model is not None:
            _check_adapter(model, adapter)


def _refuse_integers(path: str, model: PreTrainedModel, stored: dict[str, StoredTensor]) -> None:
    """Refuse quantized weights of a model whose config does not say that it is quantized."""
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in stored.items():
        # Experts are stored apart, under names of their own.
        is_weight = name in names or name.endswith(".weight")
        if is_weight and not tensor.is_float and not _LEFT_OUT.search(name):
            raise ModelError(
                f"{printable(path)}: the weight {printable(name)} is stored as {tensor.dtype}, "
                "and config.json has no quantization_config that says what its numbers mean"
            )


def _check_found(path: str, found: dict[str, Any], *, quantized: bool) -> None:
    """Refuse weights that transformers would make up, leave out, or fill with random numbers.

    path: of the model
    found: loading info of transformers
    quantized: the config says that weights are quantized; AutoGPTQ writes a bias of zeros for
        every layer, and such may be left out
    """
    refuse_misshapen(path, found["mismatched_keys"], "config.json")
    _refuse_missing(path, sorted(found["missing_keys"]))
    unexpected = sorted(found["unexpected_keys"])
    strange = [name for name in unexpected if not _LEFT_OUT.search(name)]
    if quantized and strange:
        zeros = _zero_biases(path, strange)
        strange = [name for name in strange if name not in zeros]
    _refuse_unexpected(path, strange)
    if unexpected:
        message = (
            f"{printable(path)}: {len(unexpected)} weights are not part of the text model, and are "
            f"left out, of saved models too: {_some(unexpected)}"
        )
        say_once(logging.WARNING, message, logger)


def _zero_biases(path: str, names: Iterable[str]) -> set[str]:
    """Return those of the names that are biases of zeros in the files of a local directory."""
    found: set[str] = set()
    if not Path(path).is_dir():
        return found
    biases = {name for name in names if name.endswith(".bias")}
    for file in weight_files(Path(path)):
        with reading(path, "model"), safe_open(file, "pt") as opened:
            for name in biases.intersection(opened.keys()):
                if not opened.get_tensor(name).any():
                    found.add(name)
    return found


def _drop_spent_quantization(model: PreTrainedModel) -> None:
    """Forget the quantization of a model whose weights are plain numbers again.

    transformers leaves it in the config, and then refuses to save the model.
    """
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized and quantized_weight(model) is None:
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False


def _check_adapter(model: PreTrainedModel, path: str) -> None:
    """Refuse adapter weights that do not fit, by name, before a rank of 10^9 is allocated.

    model: outline of the base model; gets the adapter
    path: adapter directory
    """
    stored = stored_tensors([adapter_file(Path(path))])
    for name, tensor in stored.items():
        if not tensor.is_float:
            raise ModelError(
                f"{printable(path)}: the weight {printable(name)} is stored as {tensor.dtype}, and "
                "the weights of adapters are floating-point numbers"
            )
    whole = {f"base_model.model.{name}" for name in model.state_dict()}
    with reading(path, "adapter"), torch.device("meta"):
        config = PeftConfig.from_pretrained(path)
        _try_patterns(path, config, model)
        config.inference_mode = False
        config.base_model_name_or_path = None  # peft warns where an outline has another name
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # some others compute with the weights of the model
        adapted = get_peft_model(model, config)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _refuse_missing(path, sorted(set(wanted) - set(stored)))
    # An adapter of a model with more tokens brings the whole embedding.
    _refuse_unexpected(path, sorted(set(stored) - set(wanted) - whole))
    shapes = []
    for name, tensor in wanted.items():
        shapes.append((name, stored[name].shape, tuple(tensor.shape)))
    refuse_misshapen(path, shapes, ADAPTER_CONFIG)


def _try_patterns(path: str, config: PeftConfig, model: PreTrainedModel) -> None:
    """Refuse an adapter whose regular expressions take no end on the names of a model's modules.

    path: adapter directory
    config: of the adapter
    model: outline of the base model
    """
    patterns: list[str] = []
    for name in _PATTERNS:
        value = getattr(config, name, None)
        patterns += [value] if isinstance(value, str) else list(value or ())
    patterns = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    names = [name for name, _ in model.named_modules()]

    def match_all() -> None:
        for pattern, name in itertools.product(patterns, names):
            re.match(rf"(.*\.)?({pattern})$", name)  # the longest form that peft makes of them

    fault = fault_of_trial(match_all, seconds=2, memory=1 << 30) if patterns else None
    if fault is not None:
        raise ModelError(
            f"{printable(path)}/{ADAPTER_CONFIG}: matching {', '.join(_PATTERNS)} with the names "
            f"of the layers takes {fault}; give names instead of regular expressions"
        )


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Add a trainable PEFT adapter; ValueError for missing weights, which peft only warns of."""
    with warnings.catch_warnings(), reading(path, "adapter"):
        warnings.filterwarnings("error", message=".*missing adapter keys")
        # peft could assign the file's tensors, but would round them to the dtype of the base.
        return PeftModel.from_pretrained(model, path, is_trainable=True, torch_device="cpu")


def refuse_misshapen(path: str, shapes: Iterable[tuple[str, Any, Any]], config: str) -> None:
    """Refuse weights of another shape than the model's.

    path: of the files
    shapes: name, shape in the file, shape in the model
    config: file that gives the model's shapes
    """
    wrong = []
    for name, in_file, in_model in sorted(shapes):
        if tuple(in_file) != tuple(in_model):
            wrong.append(f"{name} is {list(in_file)} and must be {list(in_model)}")
    if wrong:
        raise ModelError(
            f"{printable(path)} has weights of another shape than {config} says: {_some(wrong)}; "
            f"correct {config}, or give the weights that belong to it"
        )


def _refuse_missing(path: str, names: list[str]) -> None:
    if names:
        raise ModelError(
            f"{printable(path)} lacks weights: {_some(names)}; they would be random numbers. Give "
            "a complete model, or one whose class matches config.json"
        )


def _refuse_unexpected(path: str, names: list[str]) -> None:
    if names:
        raise ModelError(
            f"{printable(path)} holds weights that the model has no place for: {_some(names)}; "
            "correct the config (layers, class), or remove them from the files"
        )


def _some(names: list[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return printable(", ".join(names[:3])) + more


def refuse_non_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise ValueError for a weight with NaN or infinity, by its name.

    tensors: names and weights; quantized weights are passed over
    where: place of the weights, for the message
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise ModelError(
                f"{where}: the weight {printable(name)} has numbers that are not finite; give an "
                "undamaged copy"
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; quantized tensors and integers are."""
    if not is_plain(tensor) or tensor.is_meta or not tensor.numel():
        return True
    # One pass without a copy: minimum and maximum carry NaN on.
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
