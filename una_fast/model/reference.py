"""Reference log-probs: a frozen copy of the starting model, the policy with its adapter off, or cached numbers.

The reference is always that of the start of the run: resuming from a checkpoint must not change the objective, so
its identity is saved with every checkpoint and compared.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from una_fast.data.batch import Batch
from una_fast.data.examples import Example
from una_fast.distributed import reshard
from una_fast.model.policy import Policy
from una_fast.model.scoring import Scoring


class Reference(Protocol):
    """Gives the [S] log-probs of a batch's responses. identity: the same for the same reference, in any process."""

    identity: str

    def logps(self, batch: Batch) -> Tensor: ...


class FrozenReference:
    """A model of its own that is never trained."""

    def __init__(self, policy: Policy, scoring: Scoring) -> None:
        self.policy, self.scoring = policy, scoring
        policy.model.requires_grad_(False).eval()
        self.identity = "frozen:" + fingerprint(policy.model.named_parameters())

    def logps(self, batch: Batch) -> Tensor:
        return self.scoring.logps(self.policy, batch)

    @torch.no_grad()
    def refresh(self, policy: Policy) -> None:
        """Take over the weights of a policy of the same architecture, sharded alike."""
        reshard(policy.model, self.policy.model)
        theirs = dict(policy.model.named_parameters())
        for name, parameter in self.policy.model.named_parameters():
            parameter.copy_(theirs[name])


class AdapterReference:
    """The policy with its adapter switched off: no second copy of the weights."""

    def __init__(self, policy: Policy, scoring: Scoring) -> None:
        self.policy, self.scoring = policy, scoring
        base = ((name, p) for name, p in policy.model.named_parameters() if not p.requires_grad)
        self.identity = "adapter:" + fingerprint(base)

    def logps(self, batch: Batch) -> Tensor:
        with self.policy.reference_mode():
            return self.scoring.logps(self.policy, batch)


class GivenReference:
    """The log-probs that the examples of a batch bring."""

    identity = "given"

    def logps(self, batch: Batch) -> Tensor:
        if batch.ref_logps is None:
            assert not batch.targets.numel(), "examples without reference log-probs"
            return torch.zeros(0, dtype=torch.float64, device=batch.input_ids.device)
        return batch.ref_logps


class CachedReference(GivenReference):
    """The ref_logps column of the records."""

    def __init__(self, examples: Sequence[Example]) -> None:
        missing = [example.origin for example in examples if example.ref_logps is None]
        if missing:
            raise ValueError(
                f"reference=cached, but {missing[0]} has no ref_logps ({len(missing)} of {len(examples)} records); "
                "write them with una-fast precompute-ref, or use reference=frozen"
            )
        values = [value for example in examples for value in example.ref_logps]
        self.identity = (
            "cached:" + hashlib.sha256(struct.pack(f"{len(values)}d", *values)).hexdigest()[:16]
        )


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and a sample of the values: cheap, and different for any two trained models."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(flat.numel() // 64, 1)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def has_cached_logps(examples: Sequence[Example]) -> bool:
    """Whether every record brings ref_logps; ValueError if only some do."""
    count = sum(example.ref_logps is not None for example in examples)
    if 0 < count < len(examples):
        without = next(example.origin for example in examples if example.ref_logps is None)
        raise ValueError(
            f"{without} has no ref_logps while {count} of {len(examples)} records have; complete them with "
            "una-fast precompute-ref, or set reference=frozen (or adapter) to compute all of them"
        )
    return bool(examples) and count == len(examples)


def without_cached_logps(examples: Sequence[Example]) -> list[Example]:
    """The same records, their ref_logps not used."""
    return [replace(example, ref_logps=None) for example in examples]
