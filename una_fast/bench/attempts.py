"""Attempts of contenders: a failure becomes a reason, and the bench goes on."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

CLEANING = 30.0  # seconds
LONGEST_REASON = 200  # characters

Watch = Callable[[str, float | None], contextlib.AbstractContextManager[None]]
"""(name of a contender, seconds of its attempt) -> context of the attempt."""

# The contexts of every attempt in this process, innermost last: bench/harness.py adds a guard.
watches: list[Watch] = []


class WrongResult(Exception):
    """A contender does not compute the work to be timed."""


class DeviceLost(Exception):
    """(name, reason) of a contender; the GPU is lost to the process."""

    def __str__(self) -> str:
        name, reason = self.args
        return f"{name} broke the GPU's context ({reason})"


def release() -> None:
    """Give the GPU's cached memory back."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _watched(name: str, seconds: float | None) -> contextlib.AbstractContextManager[None]:
    """Return the watch of an attempt, or an empty context without a watch."""
    return watches[-1](name, seconds) if watches else contextlib.nullcontext()


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError after `seconds` of Python; a running kernel is waited for.

    Without effect outside the main thread, for Python hears alarms in the main thread alone.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(
    name: str,
    run: Callable[[], Any],
    clean: Callable[[], None] = release,
    seconds: float | None = None,
) -> tuple[Any, str | None]:
    """Return (result of run, None), or (None, the reason of the failure) after a call of `clean`.

    name: the contender named by DeviceLost
    run: the work
    clean: frees the memory of a failed run; DeviceLost is raised if `clean` fails too
    seconds: the deadline of `run`, if any
    """
    try:
        with _watched(name, seconds), deadline(seconds):
            return run(), None
    except DeviceLost:
        raise
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except MemoryError as error:  # Python's, or a model's: then with the sizes
        reason = ": ".join(filter(None, ["out of memory", str(error)]))
    except WrongResult as error:
        reason = f"wrong result: {error}"
    except TimeoutError:
        reason = f"not done in {seconds:g} s"
    except Exception as error:  # a peer may fail in any way
        reason = _in_a_line(error)
    try:
        with _watched(name, CLEANING):
            clean()
    except Exception as error:
        raise DeviceLost(name, reason) from error
    return None, reason


def _in_a_line(error: Exception) -> str:
    """Return the reason of a failure; torch has several errors for full memory."""
    text = " ".join(str(error).split())
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]
