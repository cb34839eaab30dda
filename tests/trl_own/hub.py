"""Build, offline, what TRL's DPO and KTO tests download: tiny models and small datasets.

    python tests/trl_own/hub.py TRL_SOURCE OUT

TRL_SOURCE: a checkout of huggingface/trl, for its tests and its generators of datasets. OUT/hf is a
cache of the Hugging Face hub with eleven tiny models of the tested architectures, OUT/data holds
the datasets as Parquet files.
"""

from __future__ import annotations

import importlib.util
import pydoc
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OWNER = "trl-internal-testing"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
DATASETS = ("zen", "toolcall", "harmony")
REMOTE = "scripts/generate_tiny_models/for_causal_lm/_remote_code"

# name of a model -> (its config class, fields beside SIZES, chat template)
_IDS = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
_SMALL = {"hidden_size": 8}
_EXPERTS = {"num_experts_per_tok": 2}
_HYBRID = {"layer_types": ["full_attention", "conv"], "block_multiple_of": 8}
_MAMBA = {
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "hidden_size": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", _SMALL, "qwen2_5"),
    "small-Qwen2ForCausalLM-2.5": ("Qwen2Config", _SMALL, "qwen2_5"),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        _SMALL | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
        "qwen3",
    ),
    "tiny-GptOssForCausalLM": (
        "GptOssConfig",
        _SMALL | _EXPERTS | {"num_local_experts": 4},
        "gptoss",
    ),
    "tiny-Cohere2ForCausalLM": ("Cohere2Config", _SMALL | {"logit_scale": 1.0}, "qwen2_5"),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4MoeConfig",
        _SMALL
        | _EXPERTS
        | {"moe_intermediate_size": 32, "head_dim": 2, "n_routed_experts": 4}
        | {"attention_bias": True, "use_qk_norm": True},
        "qwen2_5",
    ),
    "tiny-Olmo3ForCausalLM": ("Olmo3Config", _SMALL, "qwen2_5"),
    "tiny-Lfm2ForCausalLM": ("Lfm2Config", _SMALL | _HYBRID, "qwen2_5"),
    "tiny-Lfm2ForCausalLM-2.5": ("Lfm2Config", _SMALL | _HYBRID, "qwen2_5"),
    "tiny-NemotronHForCausalLM-nano": ("NemotronHConfig", _MAMBA | _EXPERTS, "qwen2_5"),
}
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}


def load_file(name: str, path: Path) -> Any:
    """Import a Python file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_datasets(source: Path, data: Path) -> Iterator[str]:
    """Run TRL's generators with a push that writes Parquet files; yield rows as text.

    source: checkout of TRL
    data: folder of the datasets
    """
    texts: list[str] = []

    def push(made: Any, repository: str, config_name: str = "default", **options: Any) -> None:
        parts = made if isinstance(made, dict) else {options.get("split") or "train": made}
        for split, part in parts.items():
            folder = data / repository / config_name
            folder.mkdir(parents=True, exist_ok=True)
            part.to_parquet(folder / f"{split}.parquet")
            texts.extend(str(row) for row in part.select(range(min(40, len(part)))))

    Dataset.push_to_hub = DatasetDict.push_to_hub = push
    for kind in DATASETS:
        module = load_file(kind, source / "scripts" / f"generate_{kind}_dataset.py")
        module.main(0.1, True, f"{OWNER}/{kind}")
    yield from texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE of 1000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def with_template(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with a chat template of TRL."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    made.model_max_length = 32768
    return made


def make_model(config: Any) -> Any:
    """Make a random bfloat16 model whose biases and norms are off their defaults."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.dim() > 1 else 0.01))
    for module in model.modules():
        if hasattr(module, "A_log"):
            module.A_log.data, module.D.data = module.A_log.data.float(), module.D.data.float()
    return model


def publish(out: Path, name: str, save: Callable[[Path], None]) -> None:
    """Let a model stand in the cache as if it had been downloaded.

    out: folder of everything
    name: of the model
    save: writes its files in a folder
    """
    root = out / "hf" / "hub" / f"models--{OWNER}--{name}"
    revision = "0" * 40
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    save(snapshot)


def remote_model(source: Path, vocab: int, folder: Path) -> Any:
    """Make a model whose code comes with its weights.

    source: checkout of TRL
    vocab: size of the vocabulary
    folder: for a copy of the code, as a package
    """
    shutil.copytree(source / REMOTE, folder / "remote_code")
    sys.path.insert(0, str(folder))
    from remote_code.configuration_remote import RemoteConfig
    from remote_code.modeling_remote import RemoteForCausalLM

    RemoteConfig.register_for_auto_class()
    RemoteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    config = RemoteConfig(vocab_size=vocab, **SIZES, **_SMALL)
    return RemoteForCausalLM(config).to(torch.bfloat16)


def main(source: Path, out: Path) -> None:
    """Build everything."""
    shutil.rmtree(out, ignore_errors=True)
    texts = list(write_datasets(source, out / "data"))
    texts += [pydoc.getdoc(__import__(name)) for name in ("os", "re", "json", "decimal")]
    raw = train_tokenizer(texts)
    vocab = raw.get_vocab_size() + 8
    for name, (kind, fields, template) in MODELS.items():
        ids = {} if kind in ("Qwen2Config",) else _IDS
        config = getattr(transformers, kind)(vocab_size=vocab, **{**SIZES, **ids, **fields})
        model, tokenizer = make_model(config), with_template(raw, template)
        model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)

        def save(folder: Path, parts: tuple[Any, Any] = (model, tokenizer)) -> None:
            for part in parts:
                part.save_pretrained(folder)

        publish(out, name, save)
        print("model", name)
    with tempfile.TemporaryDirectory() as folder:
        model = remote_model(source, vocab, Path(folder))
        tokenizer = with_template(raw, "qwen2_5")

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        publish(out, "tiny-RemoteForCausalLM", save)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
