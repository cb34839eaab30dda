"""The demo: ask a chat model about Python, align the model with feedback on answers, ask again.

    questions.py    functions of the standard library, some held out
    answers.py      the model is asked, before and after
    records.py      pairs, labels and scores of the model's own answers; or rewards.py, online
    compare.py      a table, and texts side by side

The alignment is an ordinary run of `train`, of an adapter.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from una_fast.config import RunConfig
from una_fast.demo.answers import Answer, Asker
from una_fast.demo.base_model import train_base, train_tokenizer
from una_fast.demo.compare import (
    MEASURES,
    PASSES,
    Row,
    answer_rows,
    comparison,
    kl_row,
    show_texts,
    summary,
    table,
    trained_rows,
)
from una_fast.demo.questions import ONE_SENTENCE, Questions, read_questions
from una_fast.demo.records import (
    ask_twice,
    held_out_records,
    make_records,
    prompts_of,
    write_jsonl,
)
from una_fast.demo.settings import QUICK, DemoConfig, Sizes
from una_fast.demo.smollm2 import find_smollm2
from una_fast.files import write_json
from una_fast.model.loading import load_tokenizer
from una_fast.model.policy import Policy, load_policy
from una_fast.report.page import NAME, write_own_report
from una_fast.resolved import ResolvedRun, find_facts, resolve
from una_fast.train.loop import train

LORA = {"r": 16, "alpha": 16}

OFFLINE = {"beta": 0.3, "learning_rate": 5e-4, "lr_schedule": "constant", "warmup_ratio": 0.0}

ONLINE = OFFLINE | {
    "beta": 0.02,
    "learning_rate": 1e-3,
    "temperature": 0.7,
    "samples_per_prompt": 4,
    "epochs": 100.0,
}

REWARDS = {"one_sentence": 0.4, "brief": 0.4, "names_the_function": 0.2}
"""Functions of rewards.py, and their weights: rewards lie in [0, 1]."""


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo into a fresh directory; print and return a summary.

    The summary is the last line on stdout, as JSON, and stands in summary.json.
    """
    return Demo(config).run()


class Demo:
    """A run of the demo."""

    def __init__(self, config: DemoConfig) -> None:
        """Read the questions, find or train the model, and make a fresh directory."""
        self.start = time.perf_counter()
        self.config = config
        self.sizes = QUICK if config.quick else Sizes()
        self.show_progress = sys.stderr.isatty()
        found = None if config.from_scratch else config.model or find_smollm2()
        self.output_dir = _fresh_directory(Path(config.output_dir))
        self.run_dir = self.output_dir / "aligned"
        self.questions = read_questions(
            config.seed, self.sizes.held_out, max_modules=self.sizes.max_modules
        )
        self.model = found or str(self._train_model(self.questions))
        self.name = Path(self.model).stem if Path(self.model).is_file() else self.model
        self.tokenizer = load_tokenizer(self.model)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.model} has no chat template, and the demo asks questions in a chat; give "
                "a chat model"
            )

    def run(self) -> dict[str, Any]:
        """Ask, align, ask again; print and return the summary."""
        held_out = self.questions.held_out
        before = self._ask_before()
        feedback = "rewards of samples" if self.config.online else "pairs, labels and scores"
        self._say(f"aligning an adapter of {self.name} with {feedback} ...")
        result = train(self.run_config())
        self._say(f"aligned in {result.steps} steps -> {self.run_dir}")
        after, rows = self._ask_after(before)
        rows += trained_rows(result.metrics)
        print(f"\n{table(rows, len(held_out))}\n\n{show_texts(held_out, before, after)}\n")
        title = f"{len(held_out)} held-out questions, before and after"
        write_json(
            self.run_dir / "comparison.json", comparison(title, rows, held_out, before, after)
        )
        write_own_report(self.run_dir)
        print(f"{self._next_commands()}\n")
        seconds = round(time.perf_counter() - self.start, 1)
        found = {"output_dir": str(self.output_dir), "seconds": seconds, **summary(rows)}
        write_json(self.output_dir / "summary.json", found)
        print(json.dumps(found))
        return found

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.1f} s] {text}", flush=True)

    def _train_model(self, questions: Questions) -> Path:
        """Train a tiny chat model, held-out questions left out; return the model's directory."""
        path = self.output_dir / "base"
        functions = [*questions.train, *questions.others]
        tokenizer = train_tokenizer(functions, self.sizes.vocab_size)
        model = train_base(functions, tokenizer, self.sizes, self.config.seed, self.show_progress)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        self._say(f"trained a tiny chat model on {len(functions)} docstrings -> {path}")
        return path

    @functools.cached_property
    def decided(self) -> ResolvedRun:
        """Return the decisions of the alignment: dtypes, packing."""
        settings = self.run_config()
        return resolve(settings, find_facts(settings, [], device=self.device))

    def _policy(self, path: str | Path) -> Policy:
        """Load a model as the run of the alignment does."""
        policy = load_policy(path, dtype=self.decided.compute, packed=self.decided.packed)
        policy.model.to(self.device)
        return policy

    @property
    def device(self) -> str:
        """Return the device of the demo: a GPU, or else the CPU."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _asker(self, policy: Policy) -> Asker:
        return Asker(policy, self.tokenizer, self.sizes.answer_tokens, self.show_progress)

    def _asked(self) -> list[str]:
        """Return the held-out questions, as asked before and after.

        An online run is rewarded for a single sentence, and the questions ask for a sentence.
        """
        ending = ONE_SENTENCE if self.config.online else ""
        return [function.question + ending for function in self.questions.held_out]

    def _ask_before(self) -> list[Answer]:
        """Return the model's answers to the held-out questions; write the records."""
        asker = self._asker(self._policy(self.model))
        before = asker.ask(self._asked(), title="answers before")
        self._say(f"{len(before)} held-out questions answered by {self.name}")
        self._write("prompts", prompts_of(self.questions.train))
        if self.config.online:
            return before
        sizes = self.sizes
        wanted = sizes.pairs + sizes.labels + sizes.scores
        functions = self.questions.train[:wanted]
        pairs = ask_twice(asker, functions, self.config.seed)
        if len(pairs) <= sizes.pairs + sizes.labels:
            raise ValueError(
                f"{self.name} gave two different answers to {len(pairs)} of {wanted} questions, "
                f"and the records need more than {sizes.pairs + sizes.labels}; give a chat model "
                "that answers in more than a sentence"
            )
        records = make_records(pairs, sizes)
        for kind, lines in records.items():
            self._write(kind, lines)
        held_out = ask_twice(asker, self.questions.held_out, self.config.seed, before)
        self._write("held_out", held_out_records(held_out))
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in records.items())
        self._say(f"records of the model's own answers: {counts} -> {self.output_dir}/data")
        return before

    def _write(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        write_jsonl(self.output_dir / f"data/{name}.jsonl", records)

    def _ask_after(self, before: Sequence[Answer]) -> tuple[list[Answer], list[Row]]:
        """Return the aligned model's answers, and the rows of the comparison.

        before: answers of the model before
        """
        policy = self._policy(self.run_dir)
        asker = self._asker(policy)
        after = asker.ask(self._asked(), title="answers after")
        measures = (PASSES, *MEASURES) if self.config.online else MEASURES
        rows = answer_rows(measures, self.questions.held_out, before, after)
        samples = asker.ask(self._asked(), title="samples", temperature=1.0, seed=self.config.seed)
        return after, [*rows, kl_row(policy, samples)]

    def run_config(self) -> RunConfig:
        """Return the settings of the alignment."""
        data = self.output_dir / "data"
        common: dict[str, Any] = {
            "model": self.model,
            "output_dir": str(self.run_dir),
            "lora": LORA,
            "device": self.device,
            "seed": self.config.seed,
            "loggers": [],
            "progress": self.show_progress,
            "log_every": 1,
            "write_report": False,  # the comparison is a part of the page
        }
        sizes = self.sizes
        if not self.config.online:
            return RunConfig(
                data=[str(data / f"{kind}.jsonl") for kind in ("pairs", "labels", "scores")],
                eval_data=[{"path": str(data / "held_out.jsonl"), "feedback": "both"}],
                batch_size=sizes.batch_size,
                micro_batch_size=sizes.batch_size,
                **common,
                **OFFLINE,
            )
        rewards = [
            {"function": f"una_fast.demo.rewards.{name}", "weight": weight}
            for name, weight in REWARDS.items()
        ]
        return RunConfig(
            mode="online",
            data=[str(data / "prompts.jsonl")],
            rewards=rewards,
            max_new_tokens=sizes.online_tokens,
            max_steps=sizes.online_steps,
            batch_size=sizes.online_prompts,
            micro_batch_size=sizes.online_prompts,
            **common,
            **ONLINE,
        )

    def _next_commands(self) -> str:
        """Return what to look at and to try after the demo, as text."""
        called = Path(sys.argv[0])
        command = str(called) if called.name == "una-fast" else "una-fast"
        lines = [
            f"{self.run_dir / NAME}    # curves and answers, for a browser",
            f"{command} chat {self.run_dir} --compare",
            f"{command} train --config {self.run_dir}/config.yaml --beta 0.1 "
            f"--output_dir {self.output_dir}/again",
            f"{command} init --model YOUR_MODEL --data YOUR_RECORDS.jsonl",
        ]
        return "Next:\n  " + "\n  ".join(lines)


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
