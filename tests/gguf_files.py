"""GGUF files for tests: a tiny Llama with its tokenizer and chat template, written by gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM

from tiny import CHAT_TEMPLATE, make_tokenizer, save_llama

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(
    file: Path,
    *,
    quantized: bool = False,
    half: bool = False,
    architecture: str = "llama",
    **fields: Any,
) -> tuple[str, LlamaForCausalLM]:
    """Write a tiny Llama as GGUF; return the file, and the model with the written numbers.

    file: the GGUF file; a directory of the same name without suffix gets the model itself
    quantized: matrices of the layers in Q8_0
    half: matrices in float16
    architecture: name of the class in the header
    fields: further fields of the header, `a__b` for the key a.b, whole numbers or texts
    """
    source = save_llama(file.with_suffix(""))
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    writer = gguf.GGUFWriter(file, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for key, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        matrix = tensor.numpy()
        in_blocks = quantized and ".layers." in name and matrix.ndim == 2
        kind = gguf.GGMLQuantizationType.F32
        if half and matrix.ndim == 2:
            matrix = matrix.astype(np.float16)
            kind = gguf.GGMLQuantizationType.F16
        leaf = name.split(".")[-2]
        stored = _interleaved(matrix, heads[leaf]) if leaf in heads else matrix
        if in_blocks and stored.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(stored, kind)
            matrix = gguf.quants.dequantize(stored, kind)
            matrix = _interleaved(matrix, heads[leaf], back=True) if leaf in heads else matrix
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
        tensor.copy_(torch.from_numpy(matrix.astype(np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file), model.eval()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = set(tokenizer.all_special_tokens) | {"<|user|>", "<|assistant|>"}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, number, rest = stem.split(".", 3)
        return f"blk.{number}.{NAMES[rest]}.{end}"
    return f"{NAMES[stem]}.{end}"


def _interleaved(matrix: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Return a query or key matrix with the halves of every head interleaved, or back."""
    rows, columns = matrix.shape
    halves = (heads, rows // heads // 2, 2) if back else (heads, 2, rows // heads // 2)
    return matrix.reshape(*halves, columns).swapaxes(1, 2).reshape(rows, columns)
