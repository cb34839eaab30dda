"""TRL's trainers on the fused head: their losses, metrics, datasets and adapters stay theirs.

    from una_fast.integrations.trl import UNADPOTrainer as DPOTrainer

From 1.15 on TRL computes every log-prob through one function, `add_fused_lm_head`, and
`model(..., labels=, fused_lm_head=True)`. `add_una_head` has its signature, and puts our head, our
packed rows and row statistics behind the same call. `una_calls()` counts the calls of the process:
packed, padded, and left to TRL's head.
"""

from __future__ import annotations

from una_fast.integrations.calls import una_calls
from una_fast.lazy import lazy_names

_PUBLIC = {
    "add_una_head": "head",
    "UNADPOTrainer": "trainers",
    "UNAKTOTrainer": "trainers",
    "UNAGRPOTrainer": "trainers",
    "UNARLOOTrainer": "trainers",
}
__all__ = [*_PUBLIC, "una_calls"]
__getattr__ = lazy_names(__name__, _PUBLIC)
