"""Write the settings of a run from a model and data: `una-fast init`.

records -> kinds of feedback -> task -> settings of the task -> planner -> settings that fit
        -> a YAML file with a comment beside every setting, checked as `train` checks it
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from una_fast.capacity.fit import (
    accumulates,
    capacity,
    cheapest_way,
    largest_batch,
    longest_rollouts,
    usable,
)
from una_fast.capacity.settings import RunPlanConfig
from una_fast.capacity.trace import StepTracer
from una_fast.config import RunConfig
from una_fast.data.examples import Example
from una_fast.data.sources import Source
from una_fast.files import write_text
from una_fast.guide.look import Found, has_responses, look
from una_fast.guide.settings import InitConfig
from una_fast.model.loading import load_tokenizer
from una_fast.model.positions import positions_of
from una_fast.printable import bytes_in_words, told
from una_fast.resolved import find_facts, outline_of
from una_fast.train.summary import lengths_in_words

SHARE = 0.8  # of the usable memory that a proposal may fill
ENOUGH = 50  # records from which a tenth is held out for evaluation

# Kind of most units -> task.
TASKS = {"pair": "pairs", "binary": "labels", "score": "scores"}

REWARDS = '''"""Rewards of sampled answers, a number each. Write your own in place of these."""


def short_and_ended(prompts, completions):
    """Reward an answer that ends in a full stop, and one of at most 40 words."""
    rewards = []
    for text in completions:
        words = len(text.split())
        ended = text.rstrip().endswith((".", "!", "?"))
        rewards.append(0.5 * ended + 0.5 * min(1.0, 40 / max(words, 1)))
    return rewards
'''


@dataclass
class Proposal:
    """Settings of a run with reasons, in the order of the file.

    settings: name -> value
    reasons: name -> comment
    """

    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: Any, reason: str) -> None:
        """Set a setting."""
        self.settings[name] = value
        self.reasons[name] = reason

    def text(self, header: Sequence[str]) -> str:
        """Return the YAML file. header: lines of comment at the top"""
        lines = [f"# {told(line)}".rstrip() for line in header]
        for name, value in self.settings.items():
            in_a_line = None if isinstance(value, (list, dict)) else False
            entry = yaml.safe_dump(
                {name: value}, default_flow_style=in_a_line, allow_unicode=True, width=10**6
            )
            lines += ["", f"# {self.reasons[name]}", entry.rstrip()]
        return "\n".join(lines) + "\n"


def init(settings: InitConfig) -> list[str]:
    """Write the settings of a run; return the findings, and the next command, as lines.

    ValueError for data without a usable record, for a task without records of the right kind, and
    for an existing file.
    """
    out = Path(settings.out).expanduser()
    if out.exists():
        raise ValueError(f"out={told(out)} is there already; set another, or move it away")
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    source = Source(settings.data)
    online = settings.task == "online" or not has_responses(source)
    found = look(source, tokenizer, online=online, require_unit_scores=False)
    wraps = found.texts > 0 and bool(tokenizer.chat_template)
    if wraps:
        options = replace(source.options, strings="chat")
        source = replace(source, options=options)
        found = look(source, tokenizer, online=online, require_unit_scores=False)
    if not found.examples:
        raise ValueError(
            "; ".join([f"no usable record in {told(settings.data)}", *_refused(found)])
        )
    task = _task(settings, found, online=online)
    proposal = _of_task(settings, task, found, out)
    if wraps:
        reason = "Plain text becomes a user's turn and its answer; raw trains on it as it is."
        proposal.put("strings", "chat", reason)
    notes = _fit(settings, task, proposal, found.examples)
    RunConfig(**proposal.settings)
    header = _header(settings, task, found, tokenizer, notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    if task == "online":
        rewards = _rewards_file(out)
        if not rewards.exists():
            write_text(rewards, REWARDS)
    write_text(out, proposal.text(header))
    return [
        *header,
        f"written    {told(out)}",
        f"next       una-fast train --config {shlex.quote(str(out))}",
    ]


def _header(
    settings: InitConfig,
    task: str,
    found: Found,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[str],
) -> list[str]:
    """Return what was found, as lines."""
    return [
        f"task       {task}",
        f"data       {told(found.report)}",
        f"lengths    {lengths_in_words(found.examples)}",
        f"template   {found.template_in_words(tokenizer)}",
        *_refused(found),
        *notes,
    ]


def _refused(found: Found) -> list[str]:
    if not found.report.skipped:
        return []
    lines = [f"refused    {found.report.skipped} of {found.report.records} records:"]
    return lines + [f"           {line}" for line in found.refusals_in_words()]


def _rewards_file(out: Path) -> Path:
    """Return the file of the example reward, beside the settings: run.yaml -> run_rewards.py."""
    return out.absolute().with_name(f"{out.stem}_rewards.py")


# ---- the task ----------------------------------------------------------------------------------


def _task(settings: InitConfig, found: Found, *, online: bool) -> str:
    """Return the task; ValueError for a task without records of the right kind."""
    kinds = {TASKS[kind] for kind in found.report.units}
    asked = settings.task
    if asked == "auto":
        if online:
            return "online"
        (kind, _), *_ = found.report.units.most_common(1)
        return TASKS[kind]
    if asked in TASKS.values() and asked not in kinds:
        what = "prompts alone" if online else ", ".join(sorted(kinds))
        raise ValueError(f"task={asked}, but {told(settings.data)} holds {what}; set task: auto")
    if asked == "long" and online:
        raise ValueError(
            f"task=long trains on records, and {told(settings.data)} holds prompts alone; set "
            "task: online"
        )
    return asked


def _of_task(settings: InitConfig, task: str, found: Found, out: Path) -> Proposal:
    """Return the settings of a task, before those of memory."""
    proposal = Proposal()
    put = proposal.put
    put("model", _path(settings.model), "The model to align.")
    put("data", [_path(settings.data)], "Its data; more sources may stand in the list.")
    put("output_dir", settings.output_dir, "Where model, metrics and checkpoints go.")
    put("lora", {"r": 16}, "Train adapters of this rank alone; null trains all weights.")
    put("learning_rate", 2e-4, "For adapters; all weights together take some 5e-6.")
    if task == "online":
        _put_online(proposal, out)
    else:
        put("beta", 0.1, "Lower: further from the model as it was.")
    if found.ratings and not (min(found.ratings) >= 0 and max(found.ratings) <= 1):
        limits = [float(min(found.ratings)), float(max(found.ratings))]
        if limits[0] == limits[1]:
            put("score_map", "sigmoid", "All scores are equal: a range has to be given by hand.")
        else:
            put("score_map", "range", "Scores outside [0, 1] are mapped into it.")
            put("score_range", limits, "The lowest and highest score found; set those possible.")
    if found.report.skipped:
        reason = f"{found.report.skipped} records are refused (see above), and left out."
        put("on_bad_record", "skip", reason)
    records = len(found.examples)
    largest = 8 if task in ("online", "long") else 32
    batch_size = max(min(largest, records // 8), 1)
    put("batch_size", batch_size, "Records, or prompts, of an optimizer step.")
    put("epochs", 1.0, f"Passes over the data: {-(-records // batch_size)} steps each.")
    if records >= ENOUGH:
        put("eval_fraction", 0.1, "Records held out, evaluated at the start and at the end.")
    steps = max(records // batch_size, 1)
    put("save_every", max(steps // 4, 1), "Steps between two checkpoints.")
    return proposal


def _path(text: str) -> str:
    """Return a local path as an absolute one, and any other name as it is."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def _put_online(proposal: Proposal, out: Path) -> None:
    rewards = [f"{_rewards_file(out)}:short_and_ended"]
    proposal.put("mode", "online", "Responses are sampled from the model as it is trained.")
    proposal.put("rewards", rewards, "An example: write the reward that you want there.")
    proposal.put("samples_per_prompt", 4, "Responses to every prompt of a step.")
    proposal.put("max_new_tokens", 128, "Longest response.")
    proposal.put("beta", 0.05, "Lower: further from the model as it was.")
    proposal.put("max_kl", 20.0, "Nats per response at which the run stops.")


# ---- memory ------------------------------------------------------------------------------------


def _fit(
    settings: InitConfig, task: str, proposal: Proposal, examples: Sequence[Example]
) -> list[str]:
    """Add settings for lengths and memory; return lines on what was planned."""
    if task == "long":
        proposal.put("gradient_checkpointing", True, "Activations are computed again in backward.")
        proposal.put("mlp_tile", 2048, "Tokens that an MLP sees at a time.")
    config = _planned(settings, proposal)
    if task != "online":
        _fit_positions(config, proposal, examples)
    if task == "online":
        examples = longest_rollouts(examples, config)
    device = "cuda" if settings.gpu or torch.cuda.is_available() else "cpu"
    memory = capacity(config, device)
    facts = find_facts(config, [], device=device)
    room = int(SHARE * usable(memory, device))
    size = config.batch_size
    while True:
        proposal.put("micro_batch_size", size, "Records in memory at a time.")
        tracer = StepTracer(_planned(settings, proposal), facts)
        batch = largest_batch(examples, tracer.config, packed=tracer.run.packed)
        accumulate = accumulates(tracer.config, tracer.run.mesh, batch)
        peak = tracer.step(batch, accumulate=accumulate).peak
        if peak <= room or size == 1:
            break
        size = max(size // 2, 1)
    if peak > room:
        chosen, step = cheapest_way(tracer, batch, room, accumulate=accumulate)
        for name, value in chosen.items():
            proposal.put(name, value, "Needed to fit into the memory.")
        peak = step.peak
    where = settings.gpu or ("the GPU" if device == "cuda" else "this machine")
    verdict = "" if peak <= room else "; it does not fit: set max_tokens, or take a larger GPU"
    sizes = f"{bytes_in_words(peak)} planned, of {bytes_in_words(memory)} on {where}"
    return [f"memory     {sizes}{verdict}"]


def _planned(settings: InitConfig, proposal: Proposal) -> RunPlanConfig:
    """Return the proposal as a run to be planned on the device that is asked for."""
    place = {"gpu": settings.gpu, "memory_gib": settings.memory_gib}
    return RunPlanConfig(**proposal.settings, **place, trust_remote_code=settings.trust_remote_code)


def _fit_positions(config: RunPlanConfig, proposal: Proposal, examples: Sequence[Example]) -> None:
    """Leave out the oldest part of prompts that are longer than the model was made for."""
    positions = positions_of(outline_of(config))
    longest = max((example.longest for example in examples), default=0)
    if positions is None or longest <= positions:
        return
    proposal.put("max_tokens", positions, f"Of the model; the longest record has {longest}.")
    proposal.put("prompt_overflow", "truncate_left", "Longer prompts lose their oldest part.")
