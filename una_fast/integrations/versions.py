"""The versions of a host that an adapter was tested with."""

from __future__ import annotations

import importlib.metadata
import logging
import re

from una_fast.logs import say_once

logger = logging.getLogger(__name__)


def check_version(package: str, low: str, high: str, tested: str) -> None:
    """Warn once where the installed version of a host is outside the tested range.

    package: distribution name of the host
    low: oldest version
    high: newest version; its later patch releases are inside
    tested: versions that the tests were run with, for the message
    """
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # a stand-in, or a checkout on the path
    if _numbers(low) <= _numbers(installed)[:2] <= _numbers(high):
        return
    message = (
        f"una_fast was tested with {package} {tested}, and {package} {installed} is installed: "
        "compare the first losses with a run without una_fast, or install a tested version"
    )
    say_once(logging.WARNING, message, logger)


def _numbers(version: str) -> list[int]:
    """Return major and minor number of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
