"""The policy: a Hugging Face causal language model whose head is evaluated on response rows only.

    z = softcap * tanh(logit_scale * (W h + bias) / softcap)        h: last hidden state, W: [V, D]

`probe.probe_head` finds softcap and logit_scale, or refuses the model. `install_scorer` then lets
`causal_lm(..., scorer=fn, rows=rows)` hand the chosen rows of h to `fn` inside the model's own forward, where FSDP has
the head's weight gathered.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from una_fast.memory import KEEP_ALL, MemoryOptions
from una_fast.packing import packing_refusal
from una_fast.probe import HeadSpec, hidden_states, is_number, probe_head

if TYPE_CHECKING:
    from una_fast.config import LoraOptions
    from una_fast.data import Batch

logger = logging.getLogger(__name__)

Scorer = Callable[[Tensor, Tensor, Tensor | None], Any]
"""(hidden rows [N, D], head weight [V, D], head bias [V] or None) -> anything, which the forward returns."""

_DROPOUT_NAME = re.compile(r"dropout|pdrop|drop_path|drop_rate|layerdrop|jitter")
_PEFT_PREFIX = "base_model.model."


# --- loading ---------------------------------------------------------------------------------------------------------


def _resolve(path: str | os.PathLike[str], what: str) -> str:
    """The absolute path of a local directory, or the hub name as given. A local path must be a directory."""
    text = str(path)
    expanded = Path(text).expanduser()
    if expanded.is_dir():
        return str(expanded.resolve())
    if expanded.is_absolute() or text.startswith(("./", "../", "~")) or Path(expanded.parts[0]).exists():
        raise ValueError(
            f"{what} directory {text} does not exist; give a directory in Hugging Face form (config.json, tokenizer "
            "files, *.safetensors), or a hub name such as org/name"
        )
    return text


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def load_tokenizer(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name. Without a pad token, eos pads (lengths, not ids, mark padding).

    Raises ValueError for a directory that does not exist and for a tokenizer without an end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(_resolve(path, "tokenizer"), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {path} has no eos token, and every response must end with one; set eos_token in its "
            "tokenizer_config.json to a token of its vocabulary"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        _log_once(f"the tokenizer of {path} has no pad token; its eos token {tokenizer.eos_token!r} pads")
    return tokenizer


def model_and_adapter(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """(the model, the PEFT adapter directory that is on it, if `path` is one)."""
    path = _resolve(path, "model")
    if not (Path(path) / "adapter_config.json").is_file():
        return path, None
    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        raise ValueError(f"{path} holds a {config.peft_type} adapter; adapters inside the layers (LoRA) are allowed")
    return _resolve(config.base_model_name_or_path, f"{path}/adapter_config.json: base_model_name_or_path, model"), path


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
        path, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
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


# --- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Freeze the model and add trainable adapters, in float32 whatever the dtype of the model."""
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=options.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def _cast_outside_autocast(layer: BaseTunerLayer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """For peft's layers: under autocast the product casts its operands; peft would first copy x, [T, D], to fp32."""
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


# --- scoring inside the model's forward ------------------------------------------------------------------------------


def install_scorer(causal_lm: PreTrainedModel) -> None:
    """Let `causal_lm(input_ids=, position_ids=, attention_mask=, scorer=fn, rows=rows, ...)` return
    fn(hidden rows [N, D], head weight, head bias), `rows` being [N] indices into the flattened [B * T] positions.

    Without `scorer` the model's own forward runs. Idempotent; survives copy.deepcopy and fully_shard.
    """
    if hasattr(causal_lm, "_una_model_forward"):
        return

    @functools.wraps(type(causal_lm).forward)  # transformers reads the signature
    def forward(
        self: PreTrainedModel, *args: Any, scorer: Scorer | None = None, rows: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if scorer is None:
            return self._una_model_forward(*args, **kwargs)
        hidden = hidden_states(self, **kwargs).flatten(0, 1).index_select(0, rows)
        head = self.get_output_embeddings()
        return scorer(hidden, head.weight, getattr(head, "bias", None))

    causal_lm._una_model_forward = causal_lm.forward
    # A bound method, not a closure: a deep copy (the frozen reference) must run its own weights.
    causal_lm.forward = types.MethodType(forward, causal_lm)


# --- the policy ------------------------------------------------------------------------------------------------------


@dataclass
class Policy:
    """A model that scores batches, with what is known about its head."""

    model: PreTrainedModel | PeftModel
    """What is saved."""
    causal_lm: PreTrainedModel
    """What is called and sharded; the model itself, or the one inside the PeftModel."""
    head: HeadSpec
    """The constants and tensors of the head."""
    packed: bool
    """Whether batches are packed rows with a shared prompt."""

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and saved, instead of the whole model."""
        return self.model is not self.causal_lm

    def score(self, batch: Batch, scorer: Scorer) -> Any:
        """scorer(hidden rows, head weight, head bias) at the batch's rows, run inside the model's forward."""
        score = functools.partial(
            self.causal_lm, input_ids=batch.input_ids, position_ids=batch.position_ids, rows=batch.rows, scorer=scorer
        )
        if batch.segments is None:
            return score(attention_mask=batch.attention_mask)
        assert self.packed, "a packed batch for a policy that is not packed"
        from una_fast.attention import packed_attention

        with packed_attention(self.causal_lm):
            return score(attention_mask=None, una_segments=batch.segments)

    @contextmanager
    def reference_mode(self) -> Iterator[None]:
        """The model without its adapters, which is the reference of a LoRA run."""
        if not isinstance(self.model, PeftModel):
            raise ValueError(
                "a fully trained policy has no adapter to switch off; use a frozen copy or cached ref_logps"
            )
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        # peft's own disable_adapter also freezes the adapters, which FSDP2 may see in its first forward.
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that require a gradient, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]


def load_policy(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    lora: LoraOptions | None = None,
    memory: MemoryOptions = KEEP_ALL,
    packing: bool = False,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Policy:
    """Load a model for training: dropout removed, adapters added, head probed, scoring installed, in train mode
    (which activation checkpointing needs). packing: pack batches if a probe finds that this model can be packed; a
    refusal is logged. Raises ValueError for whatever cannot be trained truly."""
    model = load_causal_lm(
        path, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
    )
    if lora is not None:
        if isinstance(model, PeftModel):
            raise ValueError(f"{path} is an adapter already, and is trained on as it is; leave the lora options out")
        model = add_lora(model, lora)
    return make_policy(model, probe_head(_inside(model)), memory, packing=packing)


def make_policy(
    model: PreTrainedModel | PeftModel, head: HeadSpec, memory: MemoryOptions = KEEP_ALL, *, packing: bool = False
) -> Policy:
    """A policy from a model whose head is known: scoring installed, packing probed, then the switches of `memory` (in
    this order: what they patch is not for a CPU)."""
    causal_lm = _inside(model)
    for layer in causal_lm.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._cast_input_dtype = types.MethodType(_cast_outside_autocast, layer)
    install_scorer(causal_lm)
    packed = packing and _can_pack(causal_lm)
    memory.apply(causal_lm)
    model.train()
    return Policy(model, causal_lm, head, packed)


def _inside(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _can_pack(causal_lm: PreTrainedModel) -> bool:
    refusal = packing_refusal(causal_lm)
    if refusal is not None:
        logger.warning("batches are padded, not packed: %s", refusal)
    return refusal is None


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pretrained(
    policy: Policy,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
    *,
    merged: bool = False,
) -> None:
    """Write the model (safetensors) and tokenizer so that AutoModelForCausalLM.from_pretrained(directory) works.

    LoRA: the adapter, and with `merged` also whole weights, with the adapter added, in directory/merged.
    state_dict: full tensors under the names of policy.model.state_dict() (sharded runs gather them); default: live.
    """
    state_dict = dict(policy.model.state_dict() if state_dict is None else state_dict)
    if isinstance(policy.model, PeftModel):
        policy.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
        if merged:
            whole = Path(directory) / "merged"
            policy.causal_lm.save_pretrained(whole, state_dict=_merge(policy, state_dict))
            tokenizer.save_pretrained(whole)
    else:
        policy.causal_lm.save_pretrained(directory, state_dict=state_dict)
    tokenizer.save_pretrained(directory)


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """The live weights under the model's own names, with adapters added in."""
    if isinstance(policy.model, PeftModel):
        return _merge(policy, dict(policy.model.state_dict()))
    return policy.causal_lm.state_dict()


def _merge(policy: Policy, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + scaling * B A under the model's own names, added in float32. peft's merge would change the live weights,
    and taking it back rounds them."""
    merged = {
        name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in state_dict.items()
        if ".lora_" not in name
    }
    for name, layer in policy.causal_lm.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper) or (
            isinstance(layer, BaseTunerLayer) and (not isinstance(layer, LoraLinear) or layer.lora_variant)
        ):
            raise ValueError(f"{name} is a {type(layer).__name__}; only plain LoRA on linear layers is merged")
        if not isinstance(layer, LoraLinear):
            continue
        for adapter in layer.active_adapters:
            a, b = (state_dict[f"{_PEFT_PREFIX}{name}.lora_{side}.{adapter}.weight"].float() for side in "AB")
            delta = layer.scaling[adapter] * (b @ a)
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
    return merged
