"""Compare answers before and after the alignment: a table of numbers, and texts side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from una_fast.data.batch import collate
from una_fast.data.examples import Example
from una_fast.demo.answers import Answer
from una_fast.demo.measures import FEW_WORDS, brevity, is_one_sentence, names_function, overlap
from una_fast.demo.questions import Function
from una_fast.feedback import Feedback
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring

SCORING_BATCH = 8
SHOWN_TEXTS = 3  # on the terminal
KEPT_TEXTS = 8  # in comparison.json


class Row(NamedTuple):
    """A line of the table.

    key: name in summary.json
    name: in words
    before, after: numbers, or None without a measurement
    note: meaning of the numbers
    is_share: shown in per cent
    """

    key: str
    name: str
    before: float | None
    after: float | None
    note: str = ""
    is_share: bool = True


class Measure(NamedTuple):
    """A measure of one answer about a function, averaged over answers; fields as in `Row`."""

    key: str
    name: str
    value: Callable[[Answer, Function], float]
    note: str = ""
    is_share: bool = True


def _is_short_form(answer: Answer) -> bool:
    return answer.ended and is_one_sentence(answer.text)


def _names(answer: Answer, function: Function) -> bool:
    return names_function(answer.text, function.name)


def _passes(answer: Answer, function: Function) -> bool:
    is_brief = brevity(answer.text) == 1.0
    return _is_short_form(answer) and is_brief and _names(answer, function)


MEASURES = (
    Measure("ended", "answers that end", lambda answer, function: answer.ended),
    Measure(
        "one_sentence",
        "answers of one sentence",
        lambda answer, function: _is_short_form(answer),
        "ended, with one full stop",
    ),
    Measure("names_function", "answers with the function's name", _names),
    Measure(
        "words",
        "words of an answer",
        lambda answer, function: len(answer.text.split()),
        is_share=False,
    ),
    Measure(
        "overlap",
        "words in common with the documentation",
        lambda answer, function: overlap(answer.text, function.answer),
        "F1 with the first sentence of the docstring",
    ),
)

PASSES = Measure(
    "all_three",
    "answers that fulfil all three",
    _passes,
    f"one sentence, at most {FEW_WORDS} words, the function's name",
)


def answer_rows(
    measures: Sequence[Measure],
    functions: Sequence[Function],
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> list[Row]:
    """Return a row for every measure, and the overlap with documentation of other functions.

    measures: measures of an answer
    functions: [Q] functions asked about
    before, after: [Q] answers
    """
    rows = []
    for measure in measures:
        first = _mean(measure, before, functions)
        last = _mean(measure, after, functions)
        rows.append(Row(measure.key, measure.name, first, last, measure.note, measure.is_share))
    # Short texts share more words with any documentation: what is learnt of the form alone.
    others = [*functions[1:], functions[0]]
    of_overlap = MEASURES[-1]
    rows.append(
        Row(
            "overlap_with_another",
            "  the same, with another function's",
            _mean(of_overlap, before, others),
            _mean(of_overlap, after, others),
            "what the form alone gives",
        )
    )
    return rows


def _mean(measure: Measure, answers: Sequence[Answer], functions: Sequence[Function]) -> float:
    values = [measure.value(a, f) for a, f in zip(answers, functions, strict=True)]
    return float(np.mean(values))


def kl_row(policy: Policy, samples: Sequence[Answer]) -> Row:
    """Return the KL of the policy from the base model, in nats per answer.

    policy: with an adapter; without the adapter the policy is the base model
    samples: answers drawn from the policy at temperature 1
    """
    examples = [_example(sample) for sample in samples]
    after = _logps(policy, examples)
    with policy.reference_mode():
        before = _logps(policy, examples)
    kl = after - before
    error = float(kl.std() / np.sqrt(len(kl)))
    note = f"+- {error:.1f} nats per answer, samples at temperature 1"
    return Row("kl", "KL from the model before", 0.0, float(kl.mean()), note, is_share=False)


def _example(answer: Answer) -> Example:
    return Example(answer.prompt_ids, (answer.ids,), Feedback.merge([]), None, "")


def _logps(policy: Policy, examples: Sequence[Example]) -> np.ndarray:
    """Return the log-probs [S] of the examples' responses, sums over tokens."""
    logps = []
    for first in range(0, len(examples), SCORING_BATCH):
        batch = collate(
            examples[first : first + SCORING_BATCH],
            packed=policy.packed,
            device=policy.causal_lm.device,
            pad_id=0,
        )
        logps.append(Scoring().logps(policy, batch).cpu().numpy())
    return np.concatenate(logps)


def trained_rows(metrics: dict[str, float]) -> list[Row]:
    """Return rows of the run's last evaluation on held-out records.

    metrics: last metrics of the run, with eval_*
    """
    rows = []
    if "eval_rewards/accuracies" in metrics:
        accuracy = metrics["eval_rewards/accuracies"]
        note = "held-out pairs whose better answer has the higher implicit reward"
        rows.append(Row("pair_accuracy", "pair accuracy", None, accuracy, note))
    if "eval_una/calibration_error" in metrics:
        error = metrics["eval_una/calibration_error"]
        note = "|sigmoid(r) - grade| over bins of held-out answers"
        rows.append(Row("calibration_error", "calibration error", None, error, note))
    return rows


def table(rows: Sequence[Row], questions: int) -> str:
    """Return the rows as text.

    rows: lines of the table
    questions: number of held-out questions
    """
    lines = [f"{f'{questions} held-out questions':40} {'before':>8} {'after':>8}"]
    for row in rows:
        before, after = (_shown(value, row.is_share) for value in (row.before, row.after))
        lines.append(f"{row.name:40} {before:>8} {after:>8}   {row.note}".rstrip())
    return "\n".join(lines)


def _shown(value: float | None, is_share: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if is_share else f"{value:.1f}"


def show_texts(
    functions: Sequence[Function], before: Sequence[Answer], after: Sequence[Answer]
) -> str:
    """Return the first questions with the written answer and the models' answers."""
    blocks = []
    for function, old, new in zip(functions[:SHOWN_TEXTS], before, after, strict=False):
        lines = [
            function.question,
            f"  documentation  {function.answer}",
            f"  before         {' '.join(old.shown.split())}",
            f"  after          {' '.join(new.shown.split())}",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def comparison(
    title: str,
    rows: Sequence[Row],
    functions: Sequence[Function],
    before: Sequence[Answer],
    after: Sequence[Answer],
) -> dict[str, Any]:
    """Return the comparison as plain values, for comparison.json of a run directory.

    title: of the comparison
    rows: lines of the table
    functions: [Q] functions asked about
    before, after: [Q] answers; the first KEPT_TEXTS are kept
    """
    lines = []
    for row in rows:
        name = row.name.strip() + (", %" if row.is_share else "")
        factor = 100.0 if row.is_share else 1.0
        values = [None if v is None else round(factor * v, 2) for v in (row.before, row.after)]
        lines.append({"name": name, "values": values, "note": row.note})
    texts = []
    for function, old, new in zip(functions[:KEPT_TEXTS], before, after, strict=False):
        answers = [old.shown, new.shown]
        texts.append(
            {"prompt": function.question, "reference": function.answer, "answers": answers}
        )
    return {"title": title, "columns": ["before", "after"], "rows": lines, "texts": texts}


def summary(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return {key: [before, after]}, rounded."""
    found = {}
    for row in rows:
        values = (row.before, row.after)
        found[row.key] = [None if value is None else round(value, 4) for value in values]
    return found
