"""The commands of `una-fast`: purpose, settings and function.

Modules are imported when a command runs: `--help` of any command loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from una_fast.flags import default_of
from una_fast.printable import told

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "flash-attn",
    "liger-kernel",
    "trl",
)


class Command(NamedTuple):
    """A command: line of help, module and class of the settings, function."""

    help: str
    module: str
    settings: str
    run: Callable[[Namespace], None]


def settings_of(name: str) -> type:
    """Return the dataclass of the settings of a command."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.settings)


def settings_from(parsed: Namespace) -> Any:
    """Return the settings of the command; ValueError for values that do not go together."""
    return settings_of(parsed.command)(**parsed.given)


def _train(parsed: Namespace) -> None:
    settings = settings_from(parsed)  # before anything is loaded

    from una_fast.train.loop import train
    from una_fast.train.summary import closing_lines, result_line

    result = train(settings)
    if os.environ.get("RANK", "0") == "0":
        lines = closing_lines(settings, result.output_dir, result.steps, result.metrics)
        print(*map(told, lines), sep="\n")
        print(json.dumps(result_line(result.output_dir, result.steps, result.metrics)))


def _merge(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.guide.merge import merge

    output_dir = merge(settings)
    print(told(f"merged; next: una-fast chat {shlex.quote(str(output_dir))}"))
    print(json.dumps({"output_dir": str(output_dir)}))


def _chat(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.guide.chat import chat

    chat(settings)


def _data(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.guide.data_view import show_data

    print(json.dumps(show_data(settings)))


def _init(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.guide.init import init

    print(*init(settings), sep="\n")


def _precompute(parsed: Namespace) -> None:
    import yaml

    settings = settings_from(parsed)

    from una_fast.train.precompute import precompute_reference

    entries = precompute_reference(settings)
    if os.environ.get("RANK", "0") == "0":
        print("train on the new files with:\n" + yaml.safe_dump(entries, sort_keys=False), end="")


def _plan(parsed: Namespace) -> None:
    if parsed.op is not None:
        _plan_op(parsed)
        return
    from una_fast.capacity.settings import RunPlanConfig

    if {"pairs", "train_head"} & _changed(RunPlanConfig, parsed.given):
        raise ValueError(
            "pairs and train_head describe a call of the fused head; give it with --op N D V"
        )
    settings = settings_from(parsed)

    from una_fast.train.memory_plan import plan_run

    print(plan_run(settings))


def _plan_op(parsed: Namespace) -> None:
    from una_fast.capacity.settings import RunPlanConfig
    from una_fast.head.settings import PlanConfig

    of_op = {f.name for f in fields(PlanConfig)}
    others = _changed(RunPlanConfig, parsed.given) - of_op
    if others:
        raise ValueError(
            f"--op plans one call of the fused head, which {', '.join(sorted(others))} do not enter"
        )
    given = {name: value for name, value in parsed.given.items() if name in of_op}
    if given.get("device", "auto") == "auto":
        given["device"] = "cuda"
    settings = PlanConfig(**given)

    from una_fast.head.describe import describe_op

    print(describe_op(*parsed.op, settings))


def _changed(kind: type, given: dict[str, Any]) -> set[str]:
    """Return the names of the given settings with another value than the default."""
    defaults = {f.name: default_of(f) for f in fields(kind)}
    return {name for name, value in given.items() if value != defaults[name]}


def _report(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.report.page import write_report

    print(write_report(settings))


def _check(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    import torch

    from una_fast.head.engines import choose_engine

    print(f"python {sys.version.split()[0]}")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(devices) or 'none'}")
    kind = "cuda" if devices else "cpu"
    device = torch.device(kind)
    engine = choose_engine("auto", device, torch.bfloat16).name
    print(f"engine of the fused head on {device.type}: {engine}")
    if settings.model:
        from una_fast.guide.check import model_lines

        print(*map(told, model_lines(settings)), sep="\n")


def _bench(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.bench.run import run_bench

    print(json.dumps(run_bench(settings)))


def _demo(parsed: Namespace) -> None:
    settings = settings_from(parsed)

    from una_fast.demo.run import run_demo

    run_demo(settings)


COMMANDS = {
    "init": Command(
        "Write the settings of a run from a model and its data.",
        "una_fast.guide.settings",
        "InitConfig",
        _init,
    ),
    "train": Command(
        "Align a model with preference records.", "una_fast.config", "RunConfig", _train
    ),
    "precompute-ref": Command(
        "Write the records of a run again, with reference log-probs.",
        "una_fast.config",
        "RunConfig",
        _precompute,
    ),
    "plan": Command(
        "Show what a run, or a call of the fused head, will need before it is loaded.",
        "una_fast.capacity.settings",
        "RunPlanConfig",
        _plan,
    ),
    "report": Command(
        "Show runs as one HTML file: curves, samples, data, decisions, settings.",
        "una_fast.report.settings",
        "ReportConfig",
        _report,
    ),
    "merge": Command(
        "Add an adapter to its base model.", "una_fast.guide.settings", "MergeConfig", _merge
    ),
    "chat": Command(
        "Talk to the model of a run, or to any other.",
        "una_fast.guide.settings",
        "ChatConfig",
        _chat,
    ),
    "data": Command(
        "Show records as they will be trained on, and what would be refused.",
        "una_fast.guide.settings",
        "DataConfig",
        _data,
    ),
    "check": Command(
        "Show the installation, and probe a model.",
        "una_fast.guide.settings",
        "CheckConfig",
        _check,
    ),
    "bench": Command(
        "Measure the fused head on this machine, beside eager PyTorch and other kernels.",
        "una_fast.bench.settings",
        "BenchConfig",
        _bench,
    ),
    "demo": Command(
        "Align a chat model, and show its answers before and after.",
        "una_fast.demo.settings",
        "DemoConfig",
        _demo,
    ),
}
