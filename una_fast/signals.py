"""Signals to a command, and the death of its launcher.

    SIGTERM, SIGHUP   a checkpoint at the end of the step, then the run ends: exit status 143, 129
                      (SIGHUP under nohup is ignored)
    SIGUSR1           a checkpoint at the end of the step; the run goes on
    SIGINT            the command ends at once; exit status 130

Outside `deferred` blocks nothing would be lost, and SIGTERM and SIGHUP end the command at once too.
Ranks whose launcher has died, even by SIGKILL, end by themselves: nobody would stop them any more.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SAVE = (signal.SIGUSR1,)
STOP = (signal.SIGTERM, signal.SIGHUP)

PATIENCE = 7.0  # seconds for a checkpoint after the death of the launcher; then the rank exits


class Stopped(KeyboardInterrupt):
    """A signal ended the command. No Exception: no `except Exception` may hold it up.

    number: of the signal
    message: what was saved, and how to go on
    by_signal: nothing had to be saved, and the process should die by the signal itself
    """

    def __init__(self, number: int, message: str = "", *, by_signal: bool = False) -> None:
        self.number = number
        self.name = signal.Signals(number).name
        self.message = message or f"ended by {self.name}"
        self.by_signal = by_signal
        super().__init__(self.message)


class Requests:
    """What signals have asked for; the handlers are installed inside `listening`.

    stop: number of the signal that asks the run to end, or 0
    save: number of the signal that asks for a checkpoint, or 0
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = 0
        self._is_listening = False
        self._deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block.

        A block inside another, and a block in another thread than the main one, change nothing.
        """
        if self._is_listening or threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, *SAVE, *STOP)
        # What the starter of the process told it to ignore (nohup) stays ignored.
        handled = [n for n in handled if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in handled}
        self.stop = self.save = 0
        self._is_listening = True
        ended = threading.Event()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            watch = threading.Thread(target=self._watch_launcher, args=(ended,), daemon=True)
            watch.start()
        try:
            yield
        finally:
            ended.set()
            self._is_listening = self._deferred = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals to stop wait inside the block; the block asks for them by `stop`."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals to stop end the block at once, inside of a deferred one."""
        before, self._deferred = self._deferred, False
        try:
            if self.stop:
                raise Stopped(self.stop)
            yield
        finally:
            self._deferred = before

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in SAVE:
            self.save = number
        elif number in STOP and self._deferred:
            self.stop = number
        else:
            self._deferred = True  # on the way out, a second signal must not cut the cleaning
            raise Stopped(number, by_signal=number in STOP)

    def _watch_launcher(self, ended: threading.Event) -> None:
        """Ask the run to end when another process has become the parent; then make it end."""
        launcher = os.getppid()
        while not ended.wait(1.0):
            if os.getppid() != launcher or _is_orphan():
                self.stop = signal.SIGTERM
                # Other ranks may be gone already, and a collective would wait for them.
                time.sleep(PATIENCE)
                os._exit(128 + signal.SIGTERM)


def _is_orphan() -> bool:
    """Return whether the system's first process is the parent, and is no launcher itself.

    A launcher may have died before the rank looked; and it may be the first process of a container.
    """
    if os.getppid() != 1:
        return False
    try:
        first = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return True
    return b"python" not in first and b"torchrun" not in first


requests = Requests()
"""The requests to this process."""
