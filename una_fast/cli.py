"""The command `una-fast`: train, precompute-ref, plan, check, demo."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from una_fast.capacity.settings import RunPlanConfig

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


@dataclass
class CheckConfig:
    """What `una-fast check` looks at besides the installation."""

    model: str | None = None
    """Model directory or hub name to probe: its head and whether its rows can be packed."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 after an error in the settings, the data or their files."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # One process is no reason for a warning, and the progress shown is that of the run.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    commands = {
        "train": _train,
        "precompute-ref": _precompute,
        "plan": _plan,
        "check": _check,
        "demo": _demo,
    }
    parsed = _parser().parse_args(arguments)
    try:
        commands[parsed.subcommand](parsed)
    except (ValueError, OSError) as error:  # OSError: what hubs and disks refuse
        print(f"una-fast {parsed.subcommand}: error: {error}", file=sys.stderr)
        return 1
    finally:
        if "WORLD_SIZE" in os.environ:
            from una_fast.distributed import stop_world

            stop_world()
    return 0


def _parser() -> ArgumentParser:
    from una_fast.capacity.settings import RunPlanConfig
    from una_fast.config import RunConfig
    from una_fast.demo.settings import DemoConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Abbreviated flags would take --lr for --lr_schedule.
    parser = ArgumentParser(
        prog="una-fast",
        allow_abbrev=False,
        description="UNA alignment of language models at long context.",
    )
    commands = parser.add_subcommands()
    for name, settings, what in (
        ("train", RunConfig, "Align a model with preference records."),
        (
            "precompute-ref",
            RunConfig,
            "Write the records of a run again, with reference log-probs.",
        ),
        (
            "plan",
            RunPlanConfig,
            "Show what a run, or a call of the fused head, will need before it is loaded.",
        ),
        ("check", CheckConfig, "Show the installation, and probe a model."),
        ("demo", DemoConfig, "Align a small model on real text, with nothing to download."),
    ):
        command = ArgumentParser(description=what, allow_abbrev=False)
        command.add_argument(
            "--config", action=ActionConfigFile, help="YAML file with any of the settings below."
        )
        command.add_class_arguments(settings, as_group=False)
        if name == "plan":
            what_op = (
                "Plan one call of the fused head instead: its rows, hidden size and vocabulary."
            )
            command.add_argument("--op", type=int, nargs=3, metavar=("N", "D", "V"), help=what_op)
        commands.add_subcommand(name, command, help=what)
    return parser


def _settings(kind: type, parsed: Namespace) -> Any:
    # Built here, not by the parser, which would print its whole usage with a refusal.
    values = parsed[parsed.subcommand].as_dict()
    return kind(**{name: value for name, value in values.items() if name not in ("config", "op")})


def _train(parsed: Namespace) -> None:
    from una_fast.config import RunConfig
    from una_fast.online.sampling import SamplerError
    from una_fast.rewards.settings import RewardError
    from una_fast.train.loop import DivergedError, train

    try:
        result = train(_settings(RunConfig, parsed))
    except (DivergedError, RewardError, SamplerError) as error:
        raise ValueError(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        print(
            json.dumps(
                {"output_dir": str(result.output_dir), "steps": result.steps, **result.metrics}
            )
        )


def _precompute(parsed: Namespace) -> None:
    from una_fast.config import RunConfig
    from una_fast.train.precompute import precompute_reference

    entries = precompute_reference(_settings(RunConfig, parsed))
    print("train on the new files with:\n" + yaml.safe_dump(entries, sort_keys=False), end="")


def _plan(parsed: Namespace) -> None:
    from una_fast.capacity.settings import RunPlanConfig
    from una_fast.head.describe import PlanConfig, describe_op

    given = parsed.plan.as_dict()
    of_op = {f.name for f in fields(PlanConfig)}
    changed = {
        f.name
        for f in fields(RunPlanConfig)
        if f.default is not MISSING and given[f.name] != f.default
    }
    if parsed.plan.op is None:
        if changed & {"pairs", "train_head"}:
            raise ValueError(
                "pairs and train_head describe a call of the fused head; give it with --op N D V"
            )
        print(_plan_run(_settings(RunPlanConfig, parsed)))
        return
    if changed - of_op:
        raise ValueError(
            f"--op plans one call of the fused head, which {', '.join(sorted(changed - of_op))} do not enter"
        )
    settings = {name: given[name] for name in of_op}
    settings["device"] = "cuda" if settings["device"] == "auto" else settings["device"]
    print(describe_op(*parsed.plan.op, PlanConfig(**settings)))


def _plan_run(settings: RunPlanConfig) -> str:
    """The plan of a run. With --measure it is loaded, and two steps are taken in a directory that is thrown away."""
    import tempfile

    from una_fast.capacity.fit import describe_run, largest_batch, longest_rollouts, plan_options
    from una_fast.capacity.trace import Row, StepTracer
    from una_fast.distributed import start_world
    from una_fast.model.loading import load_tokenizer
    from una_fast.resolved import find_facts
    from una_fast.train.loop import Trainer
    from una_fast.train.measure import measured_peak
    from una_fast.train.run_data import RunData, load_data

    def tokenizer() -> PreTrainedTokenizerBase:
        return load_tokenizer(
            settings.tokenizer or settings.model, trust_remote_code=settings.trust_remote_code
        )

    if settings.measure and settings.mode != "offline":
        raise ValueError(
            f"measure=true takes steps on records, and mode={settings.mode} samples; set mode: offline"
        )
    records: list[Any] = []
    if settings.prompt:
        examples = [Row(settings.prompt, tuple(settings.responses)).example()]
    elif settings.data:
        data = load_data(settings, tokenizer())
        records = data.examples()
        prompts = [prompt for part in data.prompts for prompt in part]
        examples = [example for part in data.records for example in part]
        examples += longest_rollouts(prompts, settings)
    else:
        raise ValueError(
            "what is to be planned? Give a row (--prompt 8000 --responses '[1000, 1000]'), or --data"
        )
    device = "cuda" if settings.device == "auto" else settings.device
    facts = find_facts(settings, records, device=device, ranks=settings.world_size)
    if settings.cached_reference:
        facts = replace(facts, has_ref_logps=True)
    planner = StepTracer(settings, facts)
    batch = largest_batch(examples, settings, packed=planner.packed)
    options = plan_options(settings, facts, batch)

    def measured() -> int:
        with tempfile.TemporaryDirectory() as scratch:
            run = replace(settings, output_dir=scratch, progress=False, loggers=[], resume=False)
            world = start_world(planner.device)
            trainer = Trainer(run, world, tokenizer(), RunData([batch], [1.0]))
            return measured_peak(trainer, batch, accumulate=options["accumulate"])

    return describe_run(planner, batch, options, measured if settings.measure else None)


def _check(parsed: Namespace) -> None:
    import torch

    from una_fast.head.engines import choose_engine

    settings = _settings(CheckConfig, parsed)
    print(f"python {sys.version.split()[0]}")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(devices) or 'none'}")
    device = torch.device("cuda" if devices else "cpu")
    print(
        f"engine of the fused head on {device.type}: {choose_engine('auto', device, torch.bfloat16).name}"
    )
    if settings.model:
        _check_model(settings)


def _check_model(settings: CheckConfig) -> None:
    import torch

    from una_fast.attention.probe import packing_refusal
    from una_fast.model.loading import load_tokenizer
    from una_fast.model.policy import load_policy

    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    policy = load_policy(
        settings.model, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
    )
    print(f"model: {type(policy.causal_lm).__name__}, tokenizer of {len(tokenizer)} tokens")
    vocab, hidden = policy.head.weight.shape
    print(
        f"head: {vocab} x {hidden}, softcap {policy.head.softcap}, logit scale {policy.head.logit_scale:g}"
    )
    refusal = packing_refusal(policy.causal_lm)
    print(
        "rows: packed, the prompt once"
        if refusal is None
        else f"rows: padded, not packed: {refusal}"
    )


def _demo(parsed: Namespace) -> None:
    from una_fast.demo.run import run_demo
    from una_fast.demo.settings import DemoConfig

    run_demo(_settings(DemoConfig, parsed))
