"""The records of the demo: a model's own answers, graded against docstrings.

Every question is asked twice, plain and with "Answer in one sentence.": `long` and `short` below.
Records hold the plain question, so that the short form is learnt, not asked for.

    pairs    short is better than long
    labels   short is good, or long is bad, in turn
    scores   short and long by `grade`, the written answer 1

Good answers are the model's own, in another form: a text with a low probability, such as a
docstring, teaches a small model to write something else than either text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from una_fast.demo.answers import Answer, Asker
from una_fast.demo.measures import first_sentences, is_one_sentence, overlap
from una_fast.demo.questions import ONE_SENTENCE, Function, first_sentence
from una_fast.demo.settings import Sizes

TEMPERATURE = 0.7  # of the answers in records
SHORT_TOKENS = 40  # longest short answer, of which the first sentence is kept

Record = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A function, and two answers to the question about it."""

    function: Function
    long: str
    short: str

    def prompt(self) -> Record:
        """Return the prompt of a record."""
        return {"prompt": _turn("user", self.function.question)}


def make_records(pairs: Sequence[Pair], sizes: Sizes) -> dict[str, list[Record]]:
    """Make the records of an alignment; {kind: records}.

    pairs: of different answers, used in order
    sizes: number of records by kind; fewer pairs give fewer scores
    """
    of_pairs = pairs[: sizes.pairs]
    of_labels = pairs[sizes.pairs : sizes.pairs + sizes.labels]
    of_scores = pairs[sizes.pairs + sizes.labels :]
    return {
        "pairs": [_preference(pair) for pair in of_pairs],
        "labels": [_label(pair, number % 2 == 0) for number, pair in enumerate(of_labels)],
        "scores": [_scores(pair, [pair.function.answer]) for pair in of_scores],
    }


def held_out_records(pairs: Sequence[Pair]) -> list[Record]:
    """Make records of the graded answers alone, which give both pairs and scores."""
    return [_scores(pair, []) for pair in pairs]


def _preference(pair: Pair) -> Record:
    return pair.prompt() | {"chosen": _reply(pair.short), "rejected": _reply(pair.long)}


def _label(pair: Pair, is_good: bool) -> Record:
    completion = pair.short if is_good else pair.long
    return pair.prompt() | {"completion": _reply(completion), "label": is_good}


def _scores(pair: Pair, perfect: list[str]) -> Record:
    """Return the graded answers of a pair, and texts of score 1."""
    graded = [pair.short, pair.long]
    scores = [1.0] * len(perfect) + [grade(text, pair.function) for text in graded]
    completions = [_reply(text) for text in [*perfect, *graded]]
    return pair.prompt() | {"completions": completions, "scores": scores}


def grade(text: str, function: Function) -> float:
    """Return the score of an answer: half for one whole sentence, half for the words in common."""
    form = float(is_one_sentence(text))
    return round(0.5 * form + 0.5 * overlap(text, function.answer), 3)


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _reply(text: str) -> list[dict[str, str]]:
    return _turn("assistant", text)


def ask_twice(
    asker: Asker, functions: Sequence[Function], seed: int, long: Sequence[Answer] | None = None
) -> list[Pair]:
    """Return the two answers of a model about every function, unless the answers are equal.

    asker: asks the model
    functions: functions to ask about
    seed: of the samples
    long: answers to the plain questions, if the model was asked already

    Long answers are cut after the last whole sentence, short answers after the first.
    """
    questions = [function.question for function in functions]
    if long is None:
        long = asker.ask(questions, title="long answers", temperature=TEMPERATURE, seed=seed)
    questions = [question + ONE_SENTENCE for question in questions]
    short = asker.ask(
        questions,
        title="short answers",
        temperature=TEMPERATURE,
        seed=seed,
        max_new_tokens=SHORT_TOKENS,
    )
    pairs = []
    for function, long_answer, short_answer in zip(functions, long, short, strict=True):
        long_text = first_sentences(long_answer.text)
        short_text = first_sentence(short_answer.text) or first_sentences(short_answer.text)
        if long_text and short_text and long_text != short_text:
            pairs.append(Pair(function, long_text, short_text))
    return pairs


def prompts_of(functions: Iterable[Function]) -> list[Record]:
    """Return prompts for an online run, with the function in question."""
    records = []
    for function in functions:
        prompt = _turn("user", function.question + ONE_SENTENCE)
        records.append({"prompt": prompt, "function": function.name})
    return records


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON, a line per record; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
