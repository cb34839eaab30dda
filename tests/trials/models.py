#!/usr/bin/env python3
"""Damage model, tokenizer and adapter directories in every way, and load them as a run does.

    .venv/bin/python tests/trials/models.py [--seed N] [--short]

A damaged directory must load as what it says, or be refused by one printable line that names the
directory: without a traceback, within 20 s, and without a gigabyte more of memory. Damage to the
weights themselves must be refused; whatever loads must give finite log-probs.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Result, Trial, in_process, main

MUTATIONS = 700  # per seed and kind of model
SHORT = 40
LIMIT = 20.0  # seconds
LARGEST_GROWTH = 2**20  # KiB
LONGEST = 1100  # characters of a message

HOSTILE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    10**6,
    10**9,
    10**12,
    -(10**9),
    10**30,
    0.5,
    -0.5,
    1e-30,
    1e38,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "\x1b[2J",
    "llama",
    "../../etc/passwd",
    [],
    [None],
    [1, 2, 3],
    {},
    {"a": {"b": [1]}},
    [[[[]]]],
]

NEW_KEYS: dict[str, list[Any]] = {
    "auto_map": [{"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, {}, 3],
    "quantization_config": [
        {"quant_method": "gguf"},
        {"quant_method": "torchao"},
        {},
        "x",
        {"a": 1},
    ],
    "transformers_weights": ["../x.safetensors", "model.bin", 3, "adapter_model.bin"],
    "rope_parameters": [None, {}, {"rope_type": "yarn"}, {"rope_type": "x", "factor": -1}, 5],
    "rope_scaling": [{"type": "linear", "factor": 0}, {"rope_type": "dynamic"}, [1]],
    "layer_types": [["full_attention"], ["x", "x"], [], 7],
    "head_dim": [0, 3, -4, 10**9, "8", None],
    "attention_bias": [True, "x"],
    "tie_word_embeddings": [True, False, "no"],
    "dtype": ["bfloat16", "float8_e4m3fn", "x", 5, "int8"],
    "sliding_window": [0, -1, 3, "x"],
    "architectures": [[], ["X"], None, ["BertModel"], 3],
    "model_type": ["", "bert", "t5", "mixtral", "gpt2", "nonsense", None, 5, ["llama"]],
    "text_config": [{}, {"model_type": "llama"}, 3],
    "is_encoder_decoder": [True],
    "use_cache": ["x"],
    "attn_implementation": ["flash_attention_2", "x"],
    "tokenizer_class": ["X", "LlamaTokenizer", "GPT2Tokenizer", None, 5],
    "chat_template": ["{% if %}", 5, {"default": "x"}, [{"name": "default", "template": "{{ x"}]],
    "added_tokens_decoder": [{}, {"x": 1}, {"5": {"content": 3}}],
    "eos_token": [None, 5, {"content": "</s>"}, "not there", "\x1b"],
    "pad_token": ["not there", 5],
    "model_max_length": [-1, 0, "x"],
    "peft_type": ["IA3", "PROMPT_TUNING", "X", None, 5],
    "target_modules": [[], ["nothing"], "(", "all-linear", None, 7],
    "modules_to_save": [["lm_head"], ["nothing"], 5],
    "r": [0, -1, 3, 10**9, "4", None],
    "rank_pattern": [{"q_proj": 9}, {"(": 1}, 5],
    "megatron_config": [{"a": 1}],
    "layer_replication": [[[0, 2], [0, 2]], [[0, 10**6]], 5],
    "base_model_name_or_path": [None, "", "/gone", 5, "../.."],
    "use_dora": [True],
    "task_type": ["X", None, "SEQ_CLS"],
}


# ---- models ------------------------------------------------------------------------------------


def make_models(root: Path) -> dict[str, Path]:
    """Write a tiny model of every kind, with its tokenizer."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import tiny

    torch.manual_seed(0)
    root.mkdir(parents=True)
    made = {name: root / name for name in ("llama", "sharded", "gpt2", "mixtral", "adapter")}
    tiny.save_llama(made["llama"])
    tokenizer = tiny.make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(made["llama"])
    model.save_pretrained(made["sharded"], max_shard_size="20KB")
    tokenizer.save_pretrained(made["sharded"])
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(made["gpt2"])
    tokenizer.save_pretrained(made["gpt2"])
    mixtral = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **ids,
    )
    transformers.MixtralForCausalLM(mixtral).save_pretrained(made["mixtral"])
    tokenizer.save_pretrained(made["mixtral"])
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(made["adapter"])
    tokenizer.save_pretrained(made["adapter"])
    return made


# ---- damage ------------------------------------------------------------------------------------


def damage_json(directory: Path, rng: random.Random) -> str:
    """Change, remove or add a value in a JSON file."""
    files = sorted(directory.glob("*.json"))
    small = [file for file in files if file.name != "tokenizer.json"]
    file = rng.choice(small * 4 + files)
    content = json.loads(file.read_text())
    places = list(_places(content))
    if file.name == "tokenizer.json":  # thousands of them are tokens and merges
        places = [place for place in places if len(place) < 4] or places
    what = rng.random()
    if what < 0.35:
        key = rng.choice(list(NEW_KEYS))
        content[key] = rng.choice([*NEW_KEYS[key], rng.choice(HOSTILE)])
        done = f"{key}={content[key]!r}"
    elif what < 0.45:
        place = rng.choice(places)
        _parent(content, place).__delitem__(place[-1])
        done = f"without {place}"
    else:
        place = rng.choice(places)
        value = copy.deepcopy(rng.choice(HOSTILE))
        _parent(content, place)[place[-1]] = value
        done = f"{place}={value!r}"
    text = json.dumps(content)
    if rng.random() < 0.02:
        text = "[" * 100_000 + text
        done = "deep"
    file.write_text(text)
    return f"{file.name}: {done}"


def _places(value: Any, place: tuple[Any, ...] = ()) -> Any:
    """Yield the way to every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inner:
        yield (*place, key)
        if isinstance(child, dict | list):
            yield from _places(child, (*place, key))


def _parent(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def damage_bytes(directory: Path, rng: random.Random) -> str:
    """Cut, empty, fill or flip the bytes of a file; of weights, those of the header."""
    file = rng.choice(sorted(path for path in directory.iterdir() if path.is_file()))
    data = bytearray(file.read_bytes())
    end = len(data)
    if file.suffix == ".safetensors":
        end = min(8 + struct.unpack("<Q", data[:8])[0], end)
    kind = rng.choice(["cut", "empty", "garbage", "flip", "flip", "zero", "insert", "double"])
    at = rng.randrange(max(end, 1))
    if kind == "cut":
        data = data[:at]
    elif kind == "empty":
        data = bytearray()
    elif kind == "garbage":
        data = bytearray(rng.randbytes(rng.randrange(1, 3000)))
    elif kind == "flip":
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif kind == "insert":
        data[at:at] = rng.randbytes(3)
    else:
        data = data * 2
    file.write_bytes(data)
    return f"{file.name}: {kind} at {at}"


def damage_kind(directory: Path, rng: random.Random) -> str:
    """Put something else in the place of a file."""
    names = [path.name for path in directory.iterdir() if path.is_file()]
    names += ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"]
    file = directory / rng.choice(sorted(set(names)))
    kind = rng.choice(["gone", "folder", "pipe", "nowhere", "zeros", "loop", "outside"])
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "nowhere":
        file.symlink_to("/nowhere/at/all")
    elif kind == "zeros":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "outside":
        file.symlink_to("/etc/passwd")
    return f"{file.name}: {kind}"


def damage_index(directory: Path, rng: random.Random) -> str:
    """Let a sharded index name other files."""
    file = directory / "model.safetensors.index.json"
    if not file.exists():
        return damage_json(directory, rng)
    content = json.loads(file.read_text())
    name = rng.choice(sorted(content["weight_map"]))
    others = ["../../x.safetensors", "/etc/passwd", "", ".", "gone.safetensors", 5, None, "a/b"]
    content["weight_map"][name] = rng.choice([*others, "config.json"])
    file.write_text(json.dumps(content))
    return f"index: {name} in {content['weight_map'][name]!r}"


def damage_weights(directory: Path, rng: random.Random) -> str:
    """Remove, add, reshape or spoil a weight: never to be accepted."""
    import torch
    from safetensors.torch import load_file, save_file

    file = rng.choice(sorted(directory.glob("*.safetensors")))
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(["without", "more", "other layer", "longer", "flat", "nan", "inf", "int8"])
    if kind == "without":
        del tensors[name]
    elif kind == "more":
        tensors["model.extra.weight"] = tensor.clone()
    elif kind == "other layer":
        tensors["model.layers.7.mlp.up_proj.weight"] = tensor.clone()
    elif kind == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == "flat":
        tensors[name] = tensor.reshape(1, -1).clone()
    elif kind == "int8":
        tensors[name] = tensor.to(torch.int8)
    else:
        flat = tensor.view(-1)
        flat[rng.randrange(len(flat))] = float(kind)
    save_file(tensors, file, metadata={"format": "pt"})
    return f"weights: {kind} {name}"


DAMAGES: list[tuple[Callable[[Path, random.Random], str], float]] = [
    (damage_json, 0.5),
    (damage_bytes, 0.2),
    (damage_kind, 0.12),
    (damage_index, 0.05),
    (damage_weights, 0.13),
]


# ---- loading -----------------------------------------------------------------------------------


def load(directory: Path) -> int:
    """Load a model as a run does, and score a few tokens; print a refusal as the command does."""
    import torch

    from una_fast.config import RunConfig
    from una_fast.model.loading import load_tokenizer
    from una_fast.resolved import find_facts, load_trained, resolve

    try:
        tokenizer = load_tokenizer(directory)
        config = RunConfig(
            model=str(directory), data=["x.jsonl"], output_dir="out", device="cpu", loggers=[]
        )
        run = resolve(config, find_facts(config, [], device="cpu"))
        policy = load_trained(config, run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    ids = ids.clamp(max=policy.causal_lm.get_input_embeddings().weight.shape[0] - 1)
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=ids).logits
    if not logits.isfinite().all():
        print("accepted, with logits that are not finite")
        return 2
    return 0


def fault_of(result: Result, directory: Path, done: str) -> str:
    """Return what is wrong with the end of a load; "" if nothing is."""
    if result.timed_out:
        return "hang"
    if result.has_traceback:
        return "traceback: " + result.err.strip().splitlines()[-1][:150]
    if result.code == 2:
        return "accepted: " + result.out.strip()[-100:]
    if result.code == 0:
        return "accepted damaged weights" if done.startswith("weights:") else ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    if len(lines) != 1 or not lines[0].isprintable():
        return f"a message of {len(lines)} lines: {result.err[-300:]!r}"
    if len(lines[0]) > LONGEST:
        return f"a message of {len(lines[0])} characters"
    if str(directory) not in lines[0]:
        return f"the directory is not named: {lines[0][:300]}"
    return ""


def run(trial: Trial) -> None:
    """Damage every kind of model, and count how the loads end."""
    import logging

    logging.disable(logging.CRITICAL)
    models = make_models(trial.root / "models")
    ends: Counter[str] = Counter()
    copied = trial.root / "copy"
    for kind, model in models.items():
        result = in_process(lambda model=model: load(model), timeout=60)
        trial.report(f"{kind}: whole", result.code == 0, result.err[-300:])
        for number in range(SHORT if trial.short else MUTATIONS):
            rng = trial.rng(kind, number)
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(model, copied)
            damage = rng.choices(*zip(*DAMAGES, strict=True))[0]
            done = damage(copied, rng)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = in_process(lambda: load(copied), timeout=LIMIT)
            fault = fault_of(result, copied, done)
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if growth > LARGEST_GROWTH:
                fault = f"{growth} KiB of memory"
            ends["fault" if fault else "refused" if result.code else "loaded"] += 1
            trial.total += 1
            if fault:
                trial.failures.append(f"{kind} {number}")
                print(f"FAIL {kind} {number}: {done[:200]}: {fault}", flush=True)
        print(f"# {kind}: {dict(ends)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
