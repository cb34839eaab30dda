"""The command line: `una-fast train | precompute-ref | plan | check | demo`.

Importing the file, and `--help` of any command, loads neither torch nor transformers: modules are
imported when a command runs, and the parser is built for the given command alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

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

# Loggers of other packages, which show errors alone unless --verbose is given, ...
OTHERS = ("torch", "torchao", "transformers", "peft", "datasets", "huggingface_hub", "vllm")

# ... and the variables by which packages that are not imported yet set these loggers and bars.
QUIET = {
    "TORCH_LOGS": "-all",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

VERBOSE = "Show warnings and progress bars of other packages (torch, transformers, ...) too."
OP = "Plan one call of the fused head instead: its rows, hidden size and vocabulary."


@dataclass
class CheckConfig:
    """Model to look at besides the installation."""

    model: str | None = None
    """Model directory or hub name to probe: its head, and whether its rows can be packed."""
    trust_remote_code: bool = False
    """Run model code that comes with the model."""


class Command(NamedTuple):
    """A command: line of help, module and class of the settings, function."""

    help: str
    module: str
    settings: str
    run: Callable[[Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    arguments: words of the command line; default: the arguments of the process

    Returns the exit status: 0, or 1 after an error in the settings, in the data or in files.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser(arguments).parse_args(arguments)
    verbose = parsed.verbose or parsed[parsed.subcommand].verbose
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        with contextlib.nullcontext() if verbose else _quiet_others():
            COMMANDS[parsed.subcommand].run(parsed)
    except (ValueError, OSError) as error:  # OSError: from hubs and disks
        print(f"una-fast {parsed.subcommand}: error: {error}", file=sys.stderr)
        return 1
    finally:
        if "WORLD_SIZE" in os.environ:
            from una_fast.distributed import stop_world

            stop_world()
    return 0


@contextlib.contextmanager
def _quiet_others() -> Iterator[None]:
    """Hide warnings and bars of foreign packages; messages of una_fast are logged as ever."""
    added = [name for name in QUIET if name not in os.environ]
    os.environ.update({name: QUIET[name] for name in added})
    had_bars = False
    if "transformers" in sys.modules:  # imported already, so that the variables come too late
        bars = sys.modules["transformers"].utils.logging
        had_bars = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in OTHERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"({'|'.join(OTHERS)})\b")
            # One process is no reason for a warning, which torch says in the name of its caller.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in added:
            os.environ.pop(name, None)
        if had_bars:
            bars.enable_progress_bar()


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    """Build the parser, with the settings of the given command alone."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Abbreviated flags would take --lr for --lr_schedule.
    parser = ArgumentParser(
        prog="una-fast",
        allow_abbrev=False,
        description="UNA alignment of language models at long context.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    commands = parser.add_subcommands()
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        of_command = ArgumentParser(description=command.help, allow_abbrev=False)
        if name == asked:
            _add_settings(of_command, name)
        commands.add_subcommand(name, of_command, help=command.help)
    return parser


def _add_settings(parser: ArgumentParser, name: str) -> None:
    from una_fast.config import setting_groups

    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with any of the settings below."
    )
    if name == "plan":
        parser.add_argument("--op", type=int, nargs=3, metavar=("N", "D", "V"), help=OP)
    for group in setting_groups(_settings_of(name)):
        parser.add_class_arguments(group)


def _settings_of(name: str) -> type:
    """Return the dataclass of the settings of a command."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.settings)


def _settings(parsed: Namespace) -> Any:
    """Return the settings of the command.

    The settings are not built by the parser: a refusal by the parser prints the whole usage.
    """
    kind = _settings_of(parsed.subcommand)
    given = parsed[parsed.subcommand].as_dict()
    return kind(**{f.name: given[f.name] for f in fields(kind)})


def _train(parsed: Namespace) -> None:
    from una_fast.online.sampling import SamplerError
    from una_fast.rewards.settings import RewardError
    from una_fast.train.loop import DivergedError, train

    try:
        result = train(_settings(parsed))
    except (DivergedError, RewardError, SamplerError) as error:
        raise ValueError(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        summary = {"output_dir": str(result.output_dir), "steps": result.steps}
        print(json.dumps(summary | result.metrics))


def _precompute(parsed: Namespace) -> None:
    from una_fast.train.precompute import precompute_reference

    entries = precompute_reference(_settings(parsed))
    print("train on the new files with:\n" + yaml.safe_dump(entries, sort_keys=False), end="")


def _plan(parsed: Namespace) -> None:
    if parsed.plan.op is not None:
        _plan_op(parsed.plan)
        return
    from una_fast.capacity.settings import RunPlanConfig
    from una_fast.train.memory_plan import plan_run

    given = parsed.plan.as_dict()
    if {"pairs", "train_head"} & _changed(RunPlanConfig, given):
        raise ValueError(
            "pairs and train_head describe a call of the fused head; give it with --op N D V"
        )
    print(plan_run(_settings(parsed)))


def _plan_op(parsed: Namespace) -> None:
    from una_fast.capacity.settings import RunPlanConfig
    from una_fast.head.describe import describe_op
    from una_fast.head.settings import PlanConfig

    given = parsed.as_dict()
    of_op = {f.name for f in fields(PlanConfig)}
    others = _changed(RunPlanConfig, given) - of_op
    if others:
        raise ValueError(
            f"--op plans one call of the fused head, which {', '.join(sorted(others))} do not enter"
        )
    settings = {name: given[name] for name in of_op}
    if settings["device"] == "auto":
        settings["device"] = "cuda"
    print(describe_op(*parsed.op, PlanConfig(**settings)))


def _changed(kind: type, given: dict[str, Any]) -> set[str]:
    """Return the names of the fields with another value than the default."""
    return {f.name for f in fields(kind) if given[f.name] != _default(f)}


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _check(parsed: Namespace) -> None:
    import torch

    from una_fast.head.engines import choose_engine

    settings = _settings(parsed)
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
        _check_model(settings)


def _check_model(settings: CheckConfig) -> None:
    import torch

    from una_fast.attention.probe import packing_refusal
    from una_fast.model.loading import load_tokenizer
    from una_fast.model.policy import load_policy

    own_code = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(settings.model, **own_code)
    policy = load_policy(settings.model, dtype=torch.float32, **own_code)
    print(f"model: {type(policy.causal_lm).__name__}, tokenizer of {len(tokenizer)} tokens")
    head = policy.head
    vocab, hidden = head.weight.shape
    scale = f"softcap {head.softcap}, logit scale {head.logit_scale:g}"
    print(f"head: {vocab} x {hidden}, {scale}")
    refusal = packing_refusal(policy.causal_lm)
    if refusal is None:
        print("rows: packed, the prompt once")
    else:
        print(f"rows: padded, not packed: {refusal}")


def _demo(parsed: Namespace) -> None:
    from una_fast.demo.run import run_demo

    run_demo(_settings(parsed))


COMMANDS = {
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
    "check": Command(
        "Show the installation, and probe a model.", "una_fast.cli", "CheckConfig", _check
    ),
    "demo": Command(
        "Align a small model on real text, with nothing to download.",
        "una_fast.demo.settings",
        "DemoConfig",
        _demo,
    ),
}
