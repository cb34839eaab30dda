"""The versions of the hosts that the adapters were tested with."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import NamedTuple

from una_fast.logs import say_once

logger = logging.getLogger(__name__)


class Tested(NamedTuple):
    """The releases of a host.

    package: name of the distribution
    low, high: oldest and newest minor release; those between are taken to be alike
    releases: that the tests were run with, in words
    """

    package: str
    low: str
    high: str
    releases: str


# By the module of una_fast.integrations.
TESTED = {
    "hf": Tested("transformers", "5.6", "5.24", "5.6.2, 5.10.4, 5.15.0, 5.16.1, 5.23.0 and 5.24.0"),
    "trl": Tested("trl", "1.15", "1.16", "1.15.0 and 1.16.0"),
    "trl_before_seam": Tested("trl", "1.9", "1.14", "1.9.0, 1.12.0 and 1.14.2"),
    "axolotl": Tested("axolotl", "0.19", "0.19", "0.19.0 (TRL 1.9.0, transformers 5.16.1)"),
    "verl": Tested("verl", "0.9", "0.9", "0.9.1"),
    "nemo_rl": Tested("nemo-rl", "0.6", "0.7", "0.6.0 and 0.7.0"),
}


def check_version(adapter: str) -> None:
    """Warn once where the installed version of a host is outside the tested range.

    adapter: one of TESTED
    """
    package, low, high, releases = TESTED[adapter]
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # a stand-in, or a checkout on the path
    if _numbers(low) <= _numbers(installed)[:2] <= _numbers(high):
        return
    message = (
        f"una_fast was tested with {package} {releases}, and {package} {installed} is installed: "
        "compare the first losses with a run without una_fast, or install a tested version"
    )
    say_once(logging.WARNING, message, logger)


def _numbers(version: str) -> list[int]:
    """Return major and minor number of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
