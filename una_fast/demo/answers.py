"""Ask a chat model questions, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from una_fast.model.policy import Policy
from una_fast.online.sampling import drawn_at, stop_ids

BATCH_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    text: without special tokens
    ended: the model ended the answer itself; the longest answers are cut off
    prompt_ids: [P] int32, the question in the chat template
    ids: [R] int32, the tokens of the answer, with the token that ends the answer
    """

    text: str
    ended: bool
    prompt_ids: np.ndarray
    ids: np.ndarray

    @property
    def shown(self) -> str:
        """Return the text, with a mark if the answer was cut off."""
        return self.text if self.ended else f"{self.text} ..."


@dataclass
class Asker:
    """Asks a model, with a bar of progress.

    policy: answers
    tokenizer: of the policy, with a chat template
    max_new_tokens: longest answer
    show_progress: draw a bar for every list of questions
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    show_progress: bool

    def ask(
        self,
        questions: Sequence[str],
        *,
        title: str,
        temperature: float = 0.0,
        seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Return the answers to questions, every question asked in a new chat.

        questions: texts of a user's turn
        title: of the bar
        temperature: of the samples, drawn from the whole distribution; 0: the likeliest tokens
        seed: of the samples
        max_new_tokens: longest answer; default: the asker's
        """
        longest = max_new_tokens or self.max_new_tokens
        self.tokenizer.padding_side = "left"
        model = self.policy.model.eval()
        stops = stop_ids(self.tokenizer, self.policy.causal_lm)
        config = GenerationConfig(
            max_new_tokens=longest,
            eos_token_id=list(stops),
            pad_token_id=self.tokenizer.pad_token_id,
            **drawn_at(temperature),
        )
        torch.manual_seed(seed)
        answers = []
        with self._bar(title, len(questions)) as bar:
            for start in range(0, len(questions), BATCH_SIZE):
                inputs = self._rendered(questions[start : start + BATCH_SIZE])
                inputs = inputs.to(self.policy.causal_lm.device)
                tick = _Tick(bar, longest)
                output = model.generate(
                    **inputs, generation_config=config, stopping_criteria=[tick]
                )
                tick.finish(len(output))
                answers += self._read(inputs, output.cpu().numpy(), stops)
        return answers

    def _bar(self, title: str, questions: int) -> tqdm:
        return tqdm(
            total=questions,
            desc=title,
            unit="answer",
            disable=not self.show_progress,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            leave=False,
        )

    def _rendered(self, questions: Sequence[str]) -> Any:
        """Return the token ids of questions in the chat template, padded on the left."""
        chats = [[{"role": "user", "content": question}] for question in questions]
        return self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )

    def _read(self, inputs: Any, output: np.ndarray, stops: tuple[int, ...]) -> list[Answer]:
        """Return the answers in the output of a batch.

        inputs: token ids and attention mask [B, P] of the questions
        output: [B, P + R] questions and answers, padded after the end
        stops: token ids that end an answer
        """
        width = inputs["input_ids"].shape[1]
        answers = []
        for row, mask in zip(output, inputs["attention_mask"].cpu().numpy(), strict=True):
            prompt_ids = row[:width][mask == 1].astype(np.int32)
            ids = row[width:].astype(np.int32)
            ends = np.flatnonzero(np.isin(ids, stops))
            ended = ends.size > 0
            if ended:
                ids = ids[: ends[0] + 1]
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(Answer(text, ended, prompt_ids, ids))
        return answers


class _Tick(StoppingCriteria):
    """Moves a bar on with every token of a batch; stops nothing."""

    def __init__(self, bar: tqdm, max_new_tokens: int) -> None:
        """Take a bar that counts answers; a batch is done after max_new_tokens at the latest."""
        self.bar = bar
        self.max_new_tokens = max_new_tokens
        self.done = 0.0  # answers of the batch that the bar has counted

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return [B] False."""
        step = len(input_ids) / self.max_new_tokens
        self.bar.update(step)
        self.done += step
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self, answers: int) -> None:
        """Count the rest of a batch of answers."""
        self.bar.update(answers - self.done)
