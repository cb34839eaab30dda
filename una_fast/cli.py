"""The process of a command: its words, its log lines, its errors and its exit status.

Importing the file loads neither torch nor transformers, and the parser is built for the given
command alone; commands.py has the commands.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields

from una_fast.commands import COMMANDS, settings_of
from una_fast.extras import missing_extra
from una_fast.flags import (
    Parser,
    UsageError,
    add_settings,
    field_in_place,
    given_settings,
    suggestion,
)
from una_fast.logs import LineFormatter
from una_fast.printable import printable, shown, told
from una_fast.signals import Stopped, requests

# Loggers of other packages, which show errors alone unless --verbose is given, ...
OTHERS = (
    "torch",
    "torchao",
    "transformers",
    "peft",
    "datasets",
    "huggingface_hub",
    "vllm",
    "matplotlib",
)

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and say in one line why it failed.

    arguments: words of the command line; default: the arguments of the process

    Returns the exit status: 0; 1 after an error in settings, data or files; 70 after a bug of
    una_fast; 128 + N after signal N. SystemExit(2) for wrong words.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = "una-fast"
    try:
        with requests.listening():
            parser = _parser(arguments)
            parsed = _parse(parser, arguments)
            command = f"una-fast {parsed.command}"
            verbose = parsed.verbose or parsed.verbose_too
            with _logging(), contextlib.nullcontext() if verbose else _quiet_others():
                COMMANDS[parsed.command].run(parsed)
            sys.stdout.flush()
        return 0
    except UsageError as error:
        _say_error(f"{error.prog}: error: {told(error)}; see {error.prog} --help")
        raise SystemExit(2) from None
    except Stopped as stopped:
        return _stopped(command, stopped)
    except KeyboardInterrupt:
        return _stopped(command, Stopped(signal.SIGINT))
    except BrokenPipeError as error:
        if _nobody_reads_stdout():
            return 128 + signal.SIGPIPE
        return _failed(command, told(error))
    except Exception as error:
        text = _for_users(error)
        if text is None:
            print(LineFormatter().formatException(sys.exc_info()), file=sys.stderr)
            text = "this is a bug of una_fast; please report it with the traceback above"
            return _failed(command, text, status=70)
        return _failed(command, text)
    finally:
        if "una_fast.distributed" in sys.modules:
            sys.modules["una_fast.distributed"].stop_world()


OUT_OF_MEMORY = (
    "lower micro_batch_size, max_tokens_per_batch or samples_per_prompt, set "
    "gradient_checkpointing: true, or ask `una-fast plan`"
)


def _for_users(error: Exception) -> str | None:
    """Return the message of an error that users can mend; None for a bug of una_fast."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {OUT_OF_MEMORY} ({printable(error)})"
    if "can't allocate memory" in str(error):  # torch's, on a CPU
        return f"out of memory: {OUT_OF_MEMORY} ({printable(error)})"
    ranks = sys.modules.get("una_fast.distributed")
    if ranks is not None and ranks.is_loss_of_a_rank(error):
        return f"another rank of the run is gone, and its own message says why ({told(error)})"
    needed = missing_extra(error)
    if needed is not None:
        return needed
    ours = type(error).__module__.split(".")[0] == "una_fast"  # raised on purpose
    return told(error) if ours or isinstance(error, (ValueError, OSError)) else None


def _failed(command: str, text: str, status: int = 1) -> int:
    _say_error(f"{command}: error: {text}")
    return status


def _stopped(command: str, stopped: Stopped) -> int:
    """Say what stopped the command; return the exit status, or end by the signal itself."""
    if os.environ.get("RANK", "0") == "0":
        _say_error(f"{command}: {told(stopped.message)}")
    if stopped.by_signal:
        signal.signal(stopped.number, signal.SIG_DFL)
        os.kill(os.getpid(), stopped.number)
    return 128 + stopped.number


RANK_PATIENCE = 4.0  # seconds in which torchrun ends the other ranks after rank 0 has failed


def _say_error(line: str) -> None:
    """Write a line on stderr; an error of all ranks is said by rank 0 alone.

    Another rank waits before it speaks: if rank 0 has failed too, the launcher ends it meanwhile.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _leave_for_launcher(line)
        if os.environ.get("RANK", "0") != "0":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(RANK_PATIENCE)
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def _leave_for_launcher(line: str) -> None:
    """Write the line where torchrun looks for the cause, which it shows last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)


def _nobody_reads_stdout() -> bool:
    """Return whether the reader of stdout is gone; the rest of the output then goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # stdout is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Show warnings of all loggers as lines on stderr, unless the caller has set up logging."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


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


def _parser(arguments: Sequence[str]) -> Parser:
    """Build the parser, with the settings of the given command alone."""
    parser = Parser(
        prog="una-fast", description="UNA alignment of language models at long context."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, description=command.help, help=command.help)
        # A name of its own: the parser of a command writes over what the outer one has read.
        of_command.add_argument(
            "-v", "--verbose", action="store_true", dest="verbose_too", help=VERBOSE
        )
        if name == "plan":
            of_command.add_argument("--op", type=_size, nargs=3, metavar=("N", "D", "V"), help=OP)
        if name == asked:
            from una_fast.config import setting_groups

            add_settings(of_command, setting_groups(settings_of(name)))
    return parser


LARGEST_SIZE = 2**21  # of --op: the plan is made chunk by chunk


def _size(text: str) -> int:
    """Return a size of --op."""
    usable = text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= LARGEST_SIZE
    if not usable:
        raise ArgumentTypeError(f"{shown(text)} must be a whole number, at most {LARGEST_SIZE}")
    return int(text)


def _parse(parser: Parser, arguments: list[str]) -> Namespace:
    """Return the command, and the settings that the words give, as `given`.

    UsageError for unknown flags and settings, and for values of another type.
    """
    parsed, unknown = parser.parse_known_args(arguments)
    prog = f"una-fast {parsed.command}"
    kind = settings_of(parsed.command)
    takes_words = field_in_place(kind) is not None
    if unknown and (not takes_words or any(word.startswith("-") for word in unknown)):
        names = [f"--{f.name}" for f in fields(kind) if "in_place" not in f.metadata]
        first = next((k for k, word in enumerate(unknown) if word.startswith("-")), 0)
        hint = suggestion(unknown[first].split("=")[0], names)
        wrong = " ".join(map(printable, unknown[first:]))
        raise UsageError(prog, f"unrecognized: {wrong}{hint}")
    try:
        parsed.given = given_settings(kind, getattr(parsed, "words", []), unknown)
    except ValueError as error:
        raise UsageError(prog, str(error)) from None
    return parsed
