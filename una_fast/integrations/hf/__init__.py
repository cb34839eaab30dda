"""transformers: models that give log-probs and losses, and a Trainer.

patch_model(model)
ref_logps = reference(**batch, una="responses").logps          # [B], sums over scored tokens
out = model(**batch, feedback=feedback, ref_logps=ref_logps)   # out.loss, out.rewards
logps = model(**batch, una="tokens").logps                     # [B, T - 1], for any loss
"""

from __future__ import annotations

from una_fast.lazy import lazy_names

_PUBLIC = {
    "patch_model": "patch",
    "unpatch_model": "patch",
    "remove_dropout": "patch",
    "adapter_off": "patch",
    "UnaModelOutput": "scored",
    "UNATrainer": "trainer",
    "FeedbackCollator": "collator",
}
__all__ = [*_PUBLIC]
__getattr__ = lazy_names(__name__, _PUBLIC)
