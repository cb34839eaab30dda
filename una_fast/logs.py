"""Log a message once per process."""

from __future__ import annotations

import functools
import logging

default_logger = logging.getLogger(__name__)


@functools.cache
def say_once(level: int, message: str, logger: logging.Logger = default_logger) -> None:
    """Log a choice or a slow path once per process and logger.

    level: a level of the logging module, such as logging.WARNING
    message: the finished text; a second call with equal text is silent
    logger: receives the message, for example the logger of the caller's module

    `say_once.cache_clear()` forgets every message said so far (for tests).
    """
    logger.log(level, message)
