"""Bounds on foreign code that runs in this process: seconds of computing, and memory.

A chat template is code that came with a model. It may loop without end, in Python or inside one
operation (`9 ** 9 ** 9`), or ask for gigabytes. Two bounds hold it:

    computing   a thread looks at running calls ten times a second, and raises an exception in a
                thread that has computed for too long. A call costs about 2 microseconds, and works
                in any thread; a signal (SIGALRM) would work in the main thread alone, and take the
                timer of the program that calls us. An operation inside Python is not interrupted.
    a trial     the first call runs in a forked child, where the kernel bounds computing and memory
                of everything, single operations too. It costs a few hundredths of a second, once.

Seconds are seconds of computing: a busy machine, or a stopped process, refuses nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

LOOKS_PER_SECOND = 10
IDLE_LOOKS = 50  # until the watching thread ends

TRIAL_WAIT = 60.0  # seconds until a child that does not compute (a lock held at the fork) is left

_EXIT_MEMORY = 3


class _Interrupt(BaseException):
    """Raised in a call that has computed for too long; no `except Exception` stops it."""


@dataclass(eq=False)
class _Call:
    """A running call.

    thread: identity of its thread
    clock: seconds that its thread has computed
    limit: on the clock
    interrupted: the exception was raised in the thread
    """

    thread: int
    clock: Callable[[], float]
    limit: float
    interrupted: bool = False


class _Watch:
    """Running calls, and a thread that interrupts those over their limit."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: set[_Call] = set()
        self.thread: threading.Thread | None = None

    def enter(self, call: _Call) -> None:
        """Watch a call from now on."""
        with self.lock:
            self.calls.add(call)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._run, name="una-watch", daemon=True)
                self.thread.start()

    def leave(self, call: _Call) -> None:
        """Stop watching a call; an interrupt that has not arrived is taken back."""
        with self.lock:
            self.calls.discard(call)
            if call.interrupted:
                _raise_in(call.thread, None)

    def _run(self) -> None:
        idle = 0
        while idle < IDLE_LOOKS:
            time.sleep(1 / LOOKS_PER_SECOND)
            with self.lock:
                idle = 0 if self.calls else idle + 1
                for call in self.calls:
                    if not call.interrupted and call.clock() > call.limit:
                        call.interrupted = True
                        _raise_in(call.thread, _Interrupt)
                if idle == IDLE_LOOKS:
                    self.thread = None


_watch = _Watch()


def interrupted_after(seconds: float, call: Callable[[], Result]) -> Result:
    """Return call(); TimeoutError once the thread has computed for more than `seconds` in it."""
    thread = threading.get_ident()
    clock = _clock_of(thread)
    running = _Call(thread, clock, clock() + seconds)
    try:
        try:
            _watch.enter(running)
            return call()
        finally:
            _watch.leave(running)
    except _Interrupt:
        _watch.leave(running)  # the interrupt may have come while the call was leaving
        raise TimeoutError(f"more than {seconds:g} s of computing") from None


def _clock_of(thread: int) -> Callable[[], float]:
    """Return a clock of the seconds that a thread computes; of all seconds where there is none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    return functools.partial(time.clock_gettime, time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Let a thread raise an exception at its next instruction; None takes one back."""
    raised = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def fault_of_trial(call: Callable[[], object], *, seconds: int, memory: int) -> str | None:
    """Run a call in a forked child, and return why it cannot run here; None if it can.

    call: changes nothing outside its process; its result and its exceptions are dropped
    seconds: of computing at most
    memory: bytes at most, beside those that the process has

    Returns None, too, where a process cannot fork.
    """
    if not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():
        # Python warns of locks that other threads hold at a fork: a child that waits for one is
        # left after a while.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_child(call, seconds, memory)
    status = _wait_for(child)
    if status is None or status == 0:
        return None
    if os.WIFEXITED(status):
        return f"more than {memory >> 20} MiB of memory"
    if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"more than {seconds} s of computing"
    return f"a crash ({signal.Signals(os.WTERMSIG(status)).name})"


def _run_child(call: Callable[[], object], seconds: int, memory: int) -> None:
    """Run a call under the limits of the kernel, and end the process."""
    import resource

    code = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        call()
    except MemoryError:
        code = _EXIT_MEMORY
    except BaseException:  # a refusal of the template, which the call in the parent will repeat
        code = 0
    finally:
        os._exit(code)


def _wait_for(child: int) -> int | None:
    """Return the status of a child; None for a child that went elsewhere or had to be left."""
    deadline = time.monotonic() + TRIAL_WAIT
    pause = 0.001
    while time.monotonic() < deadline:
        try:
            done, status = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            return None
        if done:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
