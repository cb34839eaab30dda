"""una_fast: UNA alignment with fused, memory-lean kernels.

Importing the package needs torch alone; all modules are loaded at first use.
"""

from __future__ import annotations

from una_fast.lazy import lazy_names

__version__ = "0.1.0"

_PUBLIC = {
    "Feedback": "feedback",
    "Objective": "losses",
    "UnaOutput": "losses",
    "una_loss": "losses",
    "linear_una_loss": "head.ops",
    "token_logps": "head.ops",
    "sequence_logps": "head.ops",
    "gather_logps": "head.ops",
    "Layout": "layout",
    "group_offset": "offsets",
    "EmaOffset": "offsets",
    "presets": "presets",
}
__all__ = [*_PUBLIC, "__version__"]


__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted(__all__)
