"""The policy: a Hugging Face causal language model; the head is evaluated on response rows alone.

    z = softcap * tanh(logit_scale * (W h + bias) / softcap)        h: last hidden state, W: [V, D]

`head_probe.probe_head` finds softcap and logit_scale, or refuses the model. `install_scorer` then
lets `causal_lm(..., scorer=fn, rows=rows)` hand the chosen rows of h to `fn` inside the model's own
forward, where FSDP has the weight of the head gathered.
"""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from una_fast.attention.packed import packed_attention
from una_fast.data.batch import Batch
from una_fast.distributed import World, shard
from una_fast.group import ALONE, Group
from una_fast.logs import say_once
from una_fast.model.activations import decoder_layers, switch_on
from una_fast.model.adapter import layers_off
from una_fast.model.directory import reading
from una_fast.model.head_forward import (
    Scorer,
    head_to_split,
    install_scorer,
    mark_split,
    vocabulary_of,
)
from una_fast.model.head_probe import (
    HeadSpec,
    NoSmallCopy,
    freeze_outside_text,
    probe_head,
    probe_reduced,
)
from una_fast.model.loading import load_causal_lm
from una_fast.model.lora import add_lora, cast_outside_autocast
from una_fast.model.places import split_revision
from una_fast.model.settings import KEEP_ALL, LoraOptions, MemoryOptions
from una_fast.model.sharded_loading import (
    NotInShards,
    Unread,
    check_unread,
    load_unread,
    stand_ins,
)
from una_fast.model.stored import StoredDtypes
from una_fast.parallel import ParallelOptions

logger = logging.getLogger(__name__)


@dataclass
class Policy:
    """A model that scores batches."""

    model: PreTrainedModel | PeftModel
    """The model as it is saved."""
    causal_lm: PreTrainedModel
    """The model as it is called and sharded: `model`, or the model inside the PeftModel."""
    head: HeadSpec
    """The constants and tensors of the head."""
    packed: bool
    """Whether batches are packed rows with a shared prompt."""
    stored: StoredDtypes | None = None
    """Dtypes that the final weights are saved in; None: as they are."""
    unread: Unread | None = None
    """Weights to be read when the model is sharded; None: none."""

    @property
    def is_adapter(self) -> bool:
        """Return whether an adapter is trained, and saved, instead of the whole model."""
        return self.model is not self.causal_lm

    @property
    def vocabulary(self) -> Group | None:
        """Return the ranks that share the vocabulary of the head; None for a whole head."""
        return vocabulary_of(self.causal_lm.get_output_embeddings())

    def score(self, batch: Batch, scorer: Scorer, context: Group = ALONE) -> Any:
        """Return scorer(hidden rows, head weight, head bias), run inside the model's forward.

        batch: gives the tokens, and the rows
        scorer: see Scorer
        context: ranks with a part of the batch each (data/split.py)
        """
        forward = functools.partial(
            self.causal_lm,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            rows=batch.rows,
            scorer=scorer,
        )
        if batch.segments is None:
            return forward(attention_mask=batch.attention_mask)
        assert self.packed, "a packed batch for a policy that is not packed"
        with packed_attention(self.causal_lm):
            return forward(attention_mask=None, una_segments=batch.segments, una_context=context)

    @contextmanager
    def reference_mode(self) -> Iterator[None]:
        """Run the model without its adapters inside the block: the reference of a LoRA run."""
        if not isinstance(self.model, PeftModel):
            raise ValueError(
                "a fully trained policy has no adapter to switch off; use a frozen copy or cached "
                "ref_logps"
            )
        with layers_off(self.model):
            yield

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that require a gradient, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]


def load_policy(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    base: str | os.PathLike[str] | None = None,
    lora: LoraOptions | None = None,
    memory: MemoryOptions = KEEP_ALL,
    packed: bool = False,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    in_shards: bool = False,
    quantize_base: str | None = None,
) -> Policy:
    """Load a model for training: dropout removed, head probed, scoring installed.

    path: model directory, GGUF file, hub name, or PEFT adapter directory
    dtype: dtype of the weights; adapters are float32
    base: model under an adapter directory; default: the model that the adapter names
    lora: adapters to add; default: all weights, or the adapter of `path`, are trained
    memory: switches that save memory
    packed: batches are packed rows, as a probe allowed (attention/probe.py)
    trust_remote_code: run model code that comes with the weights
    attn_implementation: attention of unpacked batches; default: the model's
    in_shards: leave the weights in the files, for `read_shards` (see `Policy.unread`); a model
        without rows in the files is loaded whole, and a line says so
    quantize_base: "nf4" holds linear weights at 4 bits, for an adapter or for scoring alone

    The model is in train mode, which activation checkpointing needs. ValueError for a model that
    cannot be trained truly.
    """
    options = {
        "dtype": dtype,
        "base": base,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "quantize_base": quantize_base,
    }
    if in_shards:
        random = torch.get_rng_state()
        try:
            model, unread = load_unread(path, **options)
            with stand_ins(model):
                model = _with_lora(path, model, lora)
            check_unread(model, unread.sources)
            head = probe_reduced(_inside(model))
            policy = make_policy(model, head, memory, packed=packed)
            policy.unread = unread
            return policy
        except (NotInShards, NoSmallCopy) as reason:
            torch.set_rng_state(random)
            message = f"{path}: every rank loads the whole model before it is sharded: {reason}"
            say_once(logging.INFO, message, logger)
    model = _with_lora(path, load_causal_lm(path, **options), lora)
    with reading(str(path), "model"):
        head = probe_head(_inside(model))
    return make_policy(model, head, memory, packed=packed)


def _with_lora(
    path: str | os.PathLike[str],
    model: PreTrainedModel | PeftModel,
    lora: LoraOptions | None,
) -> PreTrainedModel | PeftModel:
    """Return a model with new adapters, if any are asked for."""
    if lora is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{path} is an adapter already, and is trained on as it is; leave the lora options out"
        )
    return add_lora(model, lora, revision=split_revision(str(path))[1])


def make_policy(
    model: PreTrainedModel | PeftModel,
    head: HeadSpec,
    memory: MemoryOptions = KEEP_ALL,
    *,
    packed: bool = False,
) -> Policy:
    """Build a policy from a model with a known head.

    model: changed in place, and put in train mode
    head: form of the head
    memory: switches that save memory
    packed: batches are packed rows

    Scoring is installed before the switches: liger patches functions that a CPU cannot run.
    """
    causal_lm = _inside(model)
    for layer in causal_lm.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._cast_input_dtype = types.MethodType(cast_outside_autocast, layer)
    freeze_outside_text(causal_lm)
    install_scorer(causal_lm)
    switch_on(memory, causal_lm)
    model.train()
    return Policy(model, causal_lm, head, packed)


def _inside(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def shard_policy(
    policy: Policy,
    world: World,
    compute: torch.dtype | None,
    parallel: ParallelOptions | None = None,
) -> None:
    """Shard the weights of a policy, and split its head if the run splits the vocabulary.

    policy: changed in place
    world: several ranks
    compute: dtype of gathered weights; None: as loaded
    parallel: settings of the run
    """
    causal_lm = policy.causal_lm
    split = None
    if parallel is not None and parallel.split_vocabulary and world.shards > 1:
        split = head_to_split(causal_lm)
    shard(causal_lm, decoder_layers(causal_lm), world, compute, parallel, split)
    if split is not None:
        mark_split(split)
