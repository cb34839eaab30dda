"""The details of runs for the page: texts, planned memory, data, decisions and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from una_fast.config import RunConfig
from una_fast.flags import default_of
from una_fast.report.plain import (
    count_of,
    flat,
    is_number,
    list_of,
    mapping_of,
    mappings_of,
    number_in_words,
    size_in_words,
    text_of,
)
from una_fast.report.run_files import RunFiles
from una_fast.report.summary import Row, across, training_sources, units_in_words

MOST_TEXTS = 24  # of a comparison

# ---- texts --------------------------------------------------------------------------------------


def comparison_of(compared: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison before and after: title, columns, rows (name, values, note), texts."""
    columns = [text_of(column) for column in list_of(compared.get("columns"))]
    rows = []
    for row in mappings_of(compared.get("rows")):
        values = [number_in_words(value) for value in list_of(row.get("values"))]
        values += ["–"] * len(columns)
        name, note = text_of(row.get("name")), text_of(row.get("note") or "")
        rows.append((name, values[: len(columns)], note))
    texts = []
    for text in mappings_of(compared.get("texts"))[:MOST_TEXTS]:
        answers = [text_of(answer) for answer in list_of(text.get("answers"))]
        asked = {"prompt": _prompt(text.get("prompt")), "answers": answers[: len(columns)]}
        texts.append(asked | {"reference": text_of(text.get("reference") or "")})
    title = text_of(compared.get("title") or "Before and after")
    return {"title": title, "columns": columns, "rows": rows, "texts": texts}


def samples_of(run: RunFiles) -> list[dict[str, Any]]:
    """Return the samples of a run by step and prompt."""
    steps = []
    for number, samples in run.samples.items():
        by_prompt: dict[str, list[dict[str, str]]] = {}
        for sample in samples:
            by_prompt.setdefault(_prompt(sample.get("prompt")), []).append(_answer(sample))
        steps.append({"number": number, "prompts": by_prompt})
    return steps


def _answer(sample: dict[str, Any]) -> dict[str, str]:
    """Return text, reward and parts of the reward of a sample."""
    parts = mapping_of(sample.get("rewards")).items()
    details = [f"{name} {number_in_words(value)}" for name, value in parts]
    if "tokens" in sample:
        details.append(f"{text_of(sample['tokens'])} tokens")
    if sample.get("finished") is False:
        details.append("cut")
    return {
        "text": text_of(sample.get("completion")),
        "reward": number_in_words(sample.get("reward")),
        "details": ", ".join(details),
    }


def _prompt(prompt: Any) -> str:
    """Return a prompt, or the turns of a chat, as text."""
    turns = mappings_of(prompt)
    if not turns:
        return text_of(prompt)
    texts = [f"{text_of(turn.get('role'))}: {text_of(turn.get('content'))}" for turn in turns]
    return "\n\n".join(texts)


# ---- planned memory -----------------------------------------------------------------------------


def plan_in_words(plan: dict[str, Any]) -> str:
    """Return batch, peak and verdict of a plan."""
    peak, room = plan.get("peak"), plan.get("room")
    words = f"Largest batch: {text_of(plan.get('batch'))}. Peak {size_in_words(peak)}"
    if is_number(peak) and is_number(room):
        verdict = "it fits" if peak <= room else "it does not fit"
        words += f" of {size_in_words(room)} that may be filled: {verdict}"
    return f"{words}."


def bars_of(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return bars of sizes in bytes: name, size in words, share of the largest size."""
    known = {name: size for name, size in sizes.items() if count_of(size) > 0}
    largest = max(known.values(), default=1)
    bars = []
    for name, size in known.items():
        bars.append({"name": name, "size": size_in_words(size), "share": size / largest})
    return bars


# ---- data ---------------------------------------------------------------------------------------

# Counts of a source that are worth a remark.
_REMARKS = {
    "skipped": "skipped",
    "truncated_prompts": "prompts truncated on the left",
    "ties_dropped": "ties dropped",
    "unlabelled": "without a label, taken as good",
    "special_tokens": "with special tokens in their texts",
}


def sources_of(run: RunFiles) -> list[dict[str, str]]:
    """Return the sources of the data of a run: path, counts, units, remarks."""
    rows = []
    for number, source in enumerate(mappings_of(run.sources)):
        remarks = ["for evaluation"] if number >= training_sources(run) else []
        for name, words in _REMARKS.items():
            if count_of(source.get(name)):
                remarks.append(f"{count_of(source[name]):,} {words}")
        remarks += [text_of(message) for message in list_of(source.get("skip_messages"))[:3]]
        row = {
            "path": text_of(source.get("path")),
            "records": f"{count_of(source.get('records')):,}",
            "examples": f"{count_of(source.get('examples')):,}",
            "units": units_in_words(mapping_of(source.get("units"))),
            "remarks": "; ".join(remarks),
        }
        rows.append(row)
    return rows


# ---- decisions and settings ---------------------------------------------------------------------

# Fields of resolved.json, by the line that tells where they come from.
_LINES = dict.fromkeys(("compute", "weights", "trained", "autocast"), "dtypes") | {"packed": "rows"}


def decisions_of(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (name, value, source) of the decisions of a run."""
    sources = mapping_of(run.decisions.get("sources"))
    rows = []
    for name, value in run.decisions.items():
        if name in ("sources", "notes"):
            continue
        words = size_in_words(value) if name == "workspace" else text_of(value)
        source = sources.get(_LINES.get(name, name), "")
        rows.append((name, words, text_of(source)))
    rows += [("note", text_of(note), "") for note in list_of(run.decisions.get("notes"))]
    return rows


def changed_settings(run: RunFiles) -> list[Row]:
    """Return the settings of a run with other values than the defaults."""
    defaults = flat({field.name: default_of(field) for field in fields(RunConfig)})
    rows = []
    for name, value in flat(run.config).items():
        if defaults.get(name) != value:
            rows.append((name, [value]))
    return rows


def differing_settings(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the settings with several values among the runs, but for the directory."""
    rows = across([flat(run.config) for run in runs])
    return [row for row in rows if len(set(row[1])) > 1 and row[0] != "output_dir"]
