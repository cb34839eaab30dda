"""Log a message once per process; a formatter for lines that hold foreign text."""

from __future__ import annotations

import functools
import logging
from types import TracebackType

from una_fast.printable import told


@functools.cache
def say_once(level: int, message: str, logger: logging.Logger) -> None:
    """Log a choice or a slow path once per process and logger.

    level: a level of the logging module, such as logging.WARNING
    message: the finished text; a second call with equal text is silent
    logger: of the caller's module, whose name signs the message

    `say_once.cache_clear()` forgets every message said so far (for tests).
    """
    logger.log(level, message)


class LineFormatter(logging.Formatter):
    """Writes a record as one line, `logger: message`, and an exception as the lines of its own.

    Control characters are escaped and secrets of URLs left out, whoever logs the message.
    """

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return told(super().formatMessage(record))

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None]
    ) -> str:
        """Return the traceback of a record's exception."""
        return "\n".join(told(line) for line in super().formatException(ei).split("\n"))
