"""Log a message once per process."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log a choice or a slow path once per process."""
    logger.log(level, message)
