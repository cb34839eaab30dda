"""Foreign code in this process: what it changes is put back, and what it raises is an error.

Put back: working directory, random states, default dtype and device, gradient mode, threads of
torch, standard streams, signal handlers and alarms. Not put back, and nothing of ours to mend:
environment variables, what is closed by its descriptor, changes inside of other modules.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from una_fast.rewards.outcome import redacted
from una_fast.signals import Stopped

logger = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)


class Exited(BaseException):
    """The code asked for the end of the process by os._exit."""


class Alarm(BaseException):
    """An alarm that the code had set rang, and nobody handled it: the process would have ended."""


def guarded(action: Callable[[], Any], where: str, error: type[Exception]) -> Any:
    """Return action(); what it raises, SystemExit included, becomes a line of an error.

    action: foreign code
    where: names the code in the message
    error: raised in the place of any other exception; itself, and a real Ctrl-C, pass
    """
    try:
        return action()
    except (Stopped, error):
        raise
    except BaseException as raised:
        # While signals are handled elsewhere, the code itself must have raised this.
        is_signal = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(raised, KeyboardInterrupt) and is_signal:
            raise
        text = f"{type(raised).__name__}: {redacted(raised)}{_place(raised)}"
    raise error(f"{where} raised {text}")


def _place(error: BaseException) -> str:
    """Return the innermost line of foreign code that an exception went through."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename != __file__:
            found = f" ({redacted(os.path.basename(frame.f_code.co_filename))}:{line})"
    return found


@contextmanager
def unharmed(seed: int | None = None) -> Iterator[None]:
    """Put the state of the process back after foreign code in the block.

    seed: of the random numbers that the code draws from the global generators; None: as they are

    The random states of the run are untouched; with equal seeds the code draws equal numbers.
    """
    folder = os.getcwd()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    threads = torch.get_num_threads()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    try:
        with ExitStack() as kept:
            kept.enter_context(_kept_streams())
            kept.enter_context(_kept_signals())
            kept.enter_context(_no_exit())
            kept.enter_context(_quiet_threads())
            yield
    finally:
        os.chdir(folder)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)
        torch.set_grad_enabled(modes[0])
        torch.set_default_dtype(modes[1])
        if torch.get_default_device() != modes[2]:
            torch.set_default_device(modes[2])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


class _Unclosable:
    """A standard stream that foreign code cannot close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


@contextmanager
def _kept_streams() -> Iterator[None]:
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Unclosable(sys.stdout), _Unclosable(sys.stderr)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Put signal handlers back, and make an alarm an exception instead of the process's end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    alarm, _ = signal.getitimer(signal.ITIMER_REAL)
    if before[signal.SIGALRM] == signal.SIG_DFL and not alarm:
        signal.signal(signal.SIGALRM, _ring)
    try:
        yield
    finally:
        if not alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            # A handler of None was not set by Python, and cannot be put back.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _ring(number: int, frame: object) -> None:
    raise Alarm("an alarm that it had set")


@contextmanager
def _no_exit() -> Iterator[None]:
    """Make os._exit an exception in this thread of this process; elsewhere it exits as ever."""
    leave, here = os._exit, (os.getpid(), threading.get_ident())

    def refuse(status: int) -> None:
        if (os.getpid(), threading.get_ident()) == here:
            raise Exited(f"os._exit({status})")
        leave(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Log what threads of foreign code raise, in one line each."""
    before = threading.excepthook

    def say(raised: threading.ExceptHookArgs) -> None:
        with contextlib.suppress(Exception):
            name = raised.thread.name if raised.thread else "unknown"
            text = f"{raised.exc_type.__name__}: {redacted(raised.exc_value)}"
            logger.warning("a thread of a reward (%s) raised %s", redacted(name), text)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = before
