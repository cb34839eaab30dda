"""Draw samples in a thread while the run goes on, and store samples in a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from una_fast.online.sampling import Completion, ServerError

Drawn = list[list[Completion]]


class Ahead:
    """Samples on their way.

    stop: set to end the requests early; the samples are lost then
    """

    def __init__(self, draw: Callable[[threading.Event], Drawn]) -> None:
        """Start a thread. draw: returns the samples, and reads no state of the run."""
        self.stop = threading.Event()
        self._drawn: Drawn | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._work, args=(draw,), name="una-fast-ahead", daemon=True
        )
        self._thread.start()

    def _work(self, draw: Callable[[threading.Event], Drawn]) -> None:
        try:
            self._drawn = draw(self.stop)
        except Exception as error:
            self._error = error

    def wait(self) -> Drawn:
        """Return the samples, or raise the error of their request."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._drawn

    def settle(self) -> None:
        """Wait for the end of the thread, with samples or with an error."""
        self._thread.join()

    def plain(self) -> list[Any] | None:
        """Return the samples as JSON values; None after a failure of the server."""
        try:
            drawn = self.wait()
        except ServerError:
            return None
        plain = []
        for completions in drawn:
            plain.append([_plain(completion) for completion in completions])
        return plain


def stored(plain: list[Any], version: int) -> Ahead:
    """Return samples out of a checkpoint.

    plain: of `Ahead.plain`
    version: of the policy behind the samples
    """
    drawn = []
    for completions in plain:
        drawn.append([_completion(entry, version) for entry in completions])
    return Ahead(lambda stop: drawn)


def _plain(completion: Completion) -> list[Any]:
    return [completion.ids.tolist(), completion.finished, completion.logp]


def _completion(entry: list[Any], version: int) -> Completion:
    ids, finished, logp = entry
    return Completion(np.array(ids, dtype=np.int32), finished, logp, version)
