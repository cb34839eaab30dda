"""una_fast: UNA alignment with fused, memory-lean kernels.

Importing the package needs torch alone; all modules are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Feedback": "feedback",
    "Objective": "losses",
    "UnaOutput": "losses",
    "una_loss": "losses",
    "linear_una_loss": "head.ops",
    "token_logps": "head.ops",
    "gather_logps": "head.ops",
    "group_offset": "offsets",
    "EmaOffset": "offsets",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"una_fast.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'una_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
