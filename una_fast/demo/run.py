"""The demo: train a small language model of docstrings, align it, and compare both models.

The alignment takes mixed feedback, or online rewards from programs (rewards.py). All text is of
the Python standard library (text.py); no file is downloaded. The alignment is an ordinary run of
`train`; the comparison (compare.py) uses held-out prompts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from una_fast.config import RunConfig
from una_fast.demo.base_model import train_base, train_tokenizer
from una_fast.demo.compare import NEW_TOKENS, Comparison, Findings, OnlineFindings, show_texts
from una_fast.demo.settings import QUICK, DemoConfig, Sizes
from una_fast.demo.text import (
    Corpus,
    Documented,
    Record,
    make_records,
    read_corpus,
    write_jsonl,
)
from una_fast.train.loop import train

KINDS = ("pairs", "labels", "scores")

BETA = 0.3
LEARNING_RATE = 7e-4

OFFSET = 1.0
"""Labels and scores are compared with sigmoid(r + 1): an unchanged policy finds every text rather
good (0.73), and learns which are not. On unseen prompts bad texts become less likely, while good
texts hardly become more likely."""


ONLINE_BETA = 0.02
ONLINE_LEARNING_RATE = 1e-3
MAX_KL = 25.0

REWARDS = {"known_words": 0.4, "well_formed": 0.2, "names_the_object": 0.2, "repeats_nothing": 0.2}
"""Functions of rewards.py, and their weights: rewards lie in [0, 1]."""


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo into a fresh directory; print and return a summary.

    The summary is the last line on stdout, as JSON, and stands in summary.json.
    """
    transformers_logging.disable_progress_bar()
    sizes = QUICK if config.quick else Sizes()
    output_dir = _fresh_directory(Path(config.output_dir))
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)

    corpus = read_corpus(config.seed, max_modules=sizes.max_modules)
    counts = _write_records(output_dir / "data", corpus, config.seed)
    say(
        f"docstrings of the standard library: {len(corpus.base)} for the base model, "
        f"{len(corpus.align)} for alignment, {len(corpus.held_out)} held out -> {output_dir}/data"
    )
    base_dir = output_dir / "base"
    tokenizer = train_tokenizer(corpus.base, sizes.vocab_size)
    model = train_base(corpus.base, tokenizer, sizes, config.seed, say)
    model.save_pretrained(base_dir)
    tokenizer.save_pretrained(base_dir)

    aligned_dir = output_dir / "aligned"
    feedback = "rewards of samples" if config.online else counts
    say(f"aligning with {feedback} ...")
    make_config = online_config if config.online else align_config
    result = train(make_config(output_dir, base_dir, aligned_dir, sizes, config.seed))
    say(f"aligned in {result.steps} steps -> {aligned_dir}")

    settings = RunConfig(**read_yaml(aligned_dir / "config.yaml"))
    comparison = Comparison(base_dir, aligned_dir, tokenizer, settings)
    found: Findings | OnlineFindings
    if config.online:
        found = comparison.online(aligned_dir / "metrics.jsonl", corpus.held_out, config.seed)
    else:
        found = comparison.run(corpus.held_out, sizes.samples, config.seed)
    image = output_dir / "demo.png"
    found.plot(aligned_dir / "metrics.jsonl", image)
    say(f"compared on {len(corpus.held_out)} held-out objects -> {image}")
    print(f"\n{found.table()}\n\n{show_texts(found.texts)}\n")
    print(f"{next_commands(output_dir, aligned_dir)}\n")
    seconds = round(time.perf_counter() - start, 1)
    summary = {"output_dir": str(output_dir), "seconds": seconds, **found.summary()}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return summary


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def next_commands(output_dir: Path, aligned_dir: Path) -> str:
    """Return commands to try after the demo, as text."""
    command = Path(sys.argv[0])
    train_again = f"{command if command.name == 'una-fast' else 'una-fast'} train"
    changed = f"--config {aligned_dir}/config.yaml --output_dir {output_dir}/again --beta 0.5"
    own = "--model YOUR_MODEL --data YOUR_RECORDS.jsonl --output_dir runs/first"
    return f"""Next:
  {train_again} {changed}    # the same, changed
  {train_again} {own}             # your own
  {train_again} --help"""


def _fresh_directory(wanted: Path) -> Path:
    """Make and return the first absent or empty directory of wanted, wanted-2, wanted-3, ...

    Earlier results are kept.
    """
    path = wanted
    number = 1
    while path.exists() and any(path.iterdir()):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    if path != wanted:
        print(f"{wanted} is not empty and stays as it is; writing to {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_records(directory: Path, corpus: Corpus, seed: int) -> str:
    """Write {pairs,labels,scores,prompts}.jsonl for alignment, and held_out_*.jsonl.

    Returns the numbers of records for alignment, as text.
    """
    _write_split(directory, "held_out_", corpus.held_out, seed)
    records = _write_split(directory, "", corpus.align, seed)
    return ", ".join(f"{len(records[kind])} {kind}" for kind in KINDS)


def _write_split(
    directory: Path, prefix: str, entries: list[Documented], seed: int
) -> dict[str, list[Record]]:
    prompts = [{"prompt": entry.prompt} for entry in entries]
    write_jsonl(directory / f"{prefix}prompts.jsonl", prompts)
    records = make_records(entries, seed)
    for kind in KINDS:
        write_jsonl(directory / f"{prefix}{kind}.jsonl", records[kind])
    return records


# --- alignment -----------------------------------------------------------------------------------


def align_config(
    output_dir: Path, base_dir: Path, aligned_dir: Path, sizes: Sizes, seed: int
) -> RunConfig:
    """Return the settings of an alignment with records.

    output_dir: of the demo, with the records in data/
    base_dir: of the base model
    aligned_dir: of the run
    sizes: number of epochs
    seed: of the run
    """
    data = output_dir / "data"
    return RunConfig(
        model=str(base_dir),
        data=[str(data / f"{kind}.jsonl") for kind in KINDS],
        eval_data=[str(data / f"held_out_{kind}.jsonl") for kind in KINDS],
        output_dir=str(aligned_dir),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        offset=OFFSET,
        epochs=sizes.align_epochs,
        batch_size=64,
        micro_batch_size=32,
        device="cpu",
        seed=seed,
        loggers=[],
        progress=sys.stderr.isatty(),
    )


def online_config(
    output_dir: Path, base_dir: Path, aligned_dir: Path, sizes: Sizes, seed: int
) -> RunConfig:
    """Return the settings of an alignment with rewards of samples.

    output_dir: of the demo, with the prompts in data/
    base_dir: of the base model
    aligned_dir: of the run
    sizes: numbers of steps and of prompts per step
    seed: of the run
    """
    data = output_dir / "data"
    rewards = [
        {"function": f"una_fast.demo.rewards.{name}", "weight": weight}
        for name, weight in REWARDS.items()
    ]
    return RunConfig(
        mode="online",
        model=str(base_dir),
        data=[str(data / "prompts.jsonl")],
        eval_data=[str(data / "held_out_prompts.jsonl")],
        output_dir=str(aligned_dir),
        rewards=rewards,
        beta=ONLINE_BETA,
        learning_rate=ONLINE_LEARNING_RATE,
        max_new_tokens=NEW_TOKENS,
        max_kl=MAX_KL,
        epochs=100.0,
        max_steps=sizes.online_steps,
        eval_every=max(sizes.online_steps // 2, 1),
        batch_size=sizes.online_prompts,
        micro_batch_size=sizes.online_prompts,
        device="cpu",
        seed=seed,
        loggers=[],
        progress=sys.stderr.isatty(),
    )
